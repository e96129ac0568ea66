"""Writes docs/configuration.md from properties/overall.yaml.

python docs/configuration.py
"""

import re
from pathlib import Path

from recbole_unlearn.settings.keys import KEYS, properties_dir


def page():
    """The configuration reference, as Markdown: one table a section of the YAML file."""
    lines = [
        "# Configuration",
        "",
        "Made from `properties/overall.yaml` by `python docs/configuration.py`. Any key can be given in a YAML file",
        "(`--config_files`), in `config_dict`, or on the command line as `--key=value`; RecBole's own keys likewise.",
        "`properties/paper.yaml` holds the setting of the paper. What is *of the training* no request changes; what",
        "is *of the model* the next one takes over where it says nothing else; all other values are those of one run.",
        "*personal*: never written anywhere; *audited*: part of the audit record.",
    ]
    for line in (properties_dir() / "overall.yaml").read_text("utf-8").splitlines()[5:]:
        if line.startswith("# "):
            lines += [
                "",
                f"## {line[2:].rstrip('.')}",
                "",
                "| Key | Default | Holds | Meaning |",
                "|:---|:---|:---|:---|",
            ]
        elif match := re.match(r"(\w+):", line):
            key = KEYS[match[1]]
            shown = "" if key.default is None else f"`{key.default}`"
            kind, meaning = (text.replace("|", chr(92) + "|") for text in (key.kind, key.meaning))
            flags = f" *({', '.join(key.flags)})*" if key.flags else ""
            lines.append(f"| `{key.name}` | {shown} | {kind} | {meaning}{flags} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), "utf-8")
