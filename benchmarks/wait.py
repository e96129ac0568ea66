"""Time what a user waits for: one request from the command line, in turns with another version of this package.

    python benchmarks/wait.py --against d4d03c4                          # ml-100k
    python benchmarks/wait.py --against d4d03c4 --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml

A model is trained for --epochs epochs; then 200 of its interactions are forgotten, --rounds times by each version, in a
process of its own each, without a retrained model. Kernels are compiled before. "not judged" is `evaluate: none`. The
versions must end in the same figures: that is asserted. The import of RecBole alone is timed beside that of this
package. The table is printed, and written to --output.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

ROOT = Path(__file__).parents[1]
QUIET = "--show_progress=False"


def exported(revision, folder):
    """The sources of a revision, in a folder of their own."""
    content = subprocess.check_output(["git", "archive", revision], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(root, folder, *arguments):
    """Seconds of ``run_unlearn.py``, or of Python with other arguments, by the sources in ``root``."""
    command = [sys.executable, *arguments]
    start = perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="git revision to compare with")
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--config_files")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="results/scale")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        roots = {options.against: exported(options.against, folder / "before"), "now": ROOT}
        keys = [f"--dataset={options.dataset}", f"--epochs={options.epochs}", "--compare=none", QUIET]
        keys += [f"--data_path={Path(options.data_path).resolve()}"] if options.data_path else []
        keys += [f"--config_files={options.config_files}"] if options.config_files else []
        run(ROOT, folder, ROOT / "run_unlearn.py", *keys, "--output_dir=train")
        request = ["--checkpoint=train/model.pth", "--forget_ratio=None", "--forget_count=200", "--compare=none", QUIET]
        kinds = {name: (root, root / "run_unlearn.py", *request) for name, root in roots.items()}
        kinds["now, not judged"] = (ROOT, ROOT / "run_unlearn.py", *request, "--evaluate=none")
        imports = {
            "import of RecBole": "import recbole.trainer, recbole.data",
            "import of this package": "import recbole_unlearn",
        }
        imports = {name: (ROOT, "-c", code) for name, code in imports.items()}
        seconds, figures = {name: [] for name in [*kinds, *imports]}, {}
        for n in range(options.rounds + 1):  # the first one compiles
            for name, (root, *arguments) in {**kinds, **imports}.items():
                output = folder / f"{name}-{n}"
                took = run(root, folder, *arguments, *([f"--output_dir={output}"] if name in kinds else []))
                seconds[name] += [took] * (n > 0)
                if name in roots:
                    figures[name] = json.loads((output / "result.json").read_text())["models"]
    for model, expected in figures[options.against].items():
        assert {**expected, "seconds": 0} == {**figures["now"][model], "seconds": 0}, model
    base = seconds[options.against]
    lines = [f"A request of 200 interactions, {options.dataset}, {options.rounds} rounds in turns", ""]
    lines += ["| | s, median | from | to | ratio of neighbours |", "|:---|---:|---:|---:|---:|"]
    for name, took in seconds.items():
        ratio = f"{median(b / t for b, t in zip(base, took, strict=True)):.1f}" if name in kinds else ""
        lines.append(f"| {name} | {median(took):.2f} | {min(took):.2f} | {max(took):.2f} | {ratio} |")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*lines, ""])
    (output / f"wait-{options.dataset}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
