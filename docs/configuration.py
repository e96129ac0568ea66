"""Writes docs/configuration.md from properties/overall.yaml.

python docs/configuration.py
"""

import re
from pathlib import Path

from recbole_unlearn.settings.config import own_options, properties_dir


def page():
    """The configuration reference, as Markdown: one table a section of the YAML file."""
    known = {key: (default, meaning) for key, default, meaning in own_options()}
    lines = [
        "# Configuration",
        "",
        "Made from `properties/overall.yaml` by `python docs/configuration.py`. Any key can be given in a YAML file",
        "(`--config_files`), in `config_dict`, or on the command line as `--key=value`; RecBole's own keys likewise.",
        "`properties/paper.yaml` holds the setting of the paper.",
    ]
    for line in (properties_dir() / "overall.yaml").read_text("utf-8").splitlines()[2:]:
        if line.startswith("# "):
            lines += [
                "",
                f"## {line[2:].rstrip('.')}",
                "",
                "| Key | Default | Type | Meaning |",
                "|:---|:---|:---|:---|",
            ]
        elif match := re.match(r"(\w+):", line):
            default, meaning = known[match[1]]
            kind, meaning = re.fullmatch(r"\((.*?)\) (.*)", meaning).groups()
            shown = "" if default is None else f"`{default}`"
            lines.append(f"| `{match[1]}` | {shown} | {kind} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), "utf-8")
