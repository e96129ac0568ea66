"""Say whether this environment runs the package: its versions, `pip check`, the README's run and a short suite.

    python benchmarks/pythons.py --name=NAME             # NAME: a line of the table in results/pythons.md
    python benchmarks/pythons.py --name=NAME --alone     # RecBole without this package, which need not be installed
    python benchmarks/pythons.py                         # writes the page again from what was measured

Nothing but the standard library and common.py is imported. `nox` makes the environments and calls it (noxfile.py).
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import common
from common import RESULTS, ROOT, option, takes

PACKAGES = ("recbole", "ray", "torch", "numpy", "pandas", "scipy", "numba", "setuptools")
SUITE = [
    *("tests/test_package.py", "tests/test_compat.py", "tests/test_config.py", "tests/test_checkpoint.py"),
    *("tests/test_trainer.py", "tests/test_run.py", "tests/data", "tests/influence/test_objective.py"),
]
# RecBole without this package: what its documentation begins with, and the first step past the import of ray.
ALONE = {
    "run_recbole": """
from recbole.quick_start import run_recbole
run_recbole("BPR", "ml-100k", config_dict={"epochs": 1, "show_progress": False, "use_gpu": False, "gpu_id": ""})
""",
    "Config": """
from recbole.config import Config
Config("BPR", "ml-100k")
""",
}
BOTH = "import recbole_unlearn, recbole.quick_start"
IMPORTS = {"ray": f"import recbole_unlearn, ray.tune; {BOTH}", "without": BOTH}
TIMED = "from time import perf_counter as now; start = now(); {}; print(now() - start)"


def run(*command, cwd=None):
    """(status, output, error) of Python with the arguments, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd or "")}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)
    return done.returncode, done.stdout, done.stderr


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment():
    return {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}}


def pip_check():
    return run("-m", "pip", "check")[1].strip().splitlines()


def readme_run():
    """The line of the forget set's AUC that the README's first command prints, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        status, out, error = run(str(ROOT / "run_unlearn.py"), "--show_progress=False", cwd=folder)
    if status:
        return {"error": error.strip().splitlines()[-1]}
    return {"auc": re.findall(r"\d\.\d{4}", next(line for line in out.splitlines() if "forget-set AUC" in line))[:3]}


def suite():
    """pytest's last line, after the names of what failed."""
    lines = run("-m", "pytest", "-q", *SUITE, cwd=ROOT)[1].strip().splitlines()
    return "; ".join([line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:])


def import_ratio(rounds=7):
    """How many times longer importing takes with ray, in turns; None where ray cannot be imported."""
    if run("-W", "ignore", "-c", "import ray.tune")[0]:
        return None
    seconds = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, script in IMPORTS.items():
            seconds[name].append(float(run("-W", "ignore", "-c", TIMED.format(script))[1]))
    return median(seconds["ray"]) / median(seconds["without"])


def attempt(script):
    """What a script ends with: the last line of its error, or "runs"."""
    with tempfile.TemporaryDirectory() as folder:
        status, _, error = run("-W", "ignore", "-c", script, cwd=folder)
    return error.strip().splitlines()[-1] if status else "runs"


def measure(only_recbole):
    figures = {"versions": environment(), "pip check": pip_check()}
    if only_recbole:
        return {**figures, "alone": {name: attempt(script) for name, script in ALONE.items()}}
    return {**figures, "run": readme_run(), "suite": suite(), "import ratio": import_ratio()}


# The page


def table(head, lines):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, [":---"] * len(head), *lines))


def versions(figures):
    return ", ".join(f"{name} {figures['versions'][name]}" for name in PACKAGES if figures["versions"][name])


def result(run):
    return run.get("error") or "{} → {}, retrained {}".format(*run["auc"])


def ours(name, each):
    check = "; ".join(each["pip check"])
    return each["versions"]["python"], name, versions(each), check, result(each["run"]), each["suite"]


def others(each):
    return each["versions"]["python"], versions(each), *(line.replace("`", "'") for line in each["alone"].values())


def imports(measured):
    ratios = [(name, f"{each['import ratio']:.2f}") for name, each in measured.items() if each.get("import ratio")]
    text = (
        f"Where RecBole brought a ray that can be imported, `{BOTH}` with `import ray.tune` takes so many times as "
        "long as without (medians of seven in turns):"
    )
    return [text, table(("environment", "times"), ratios)] if ratios else []


def page(measured):
    environments = {name: each for name, each in measured.items() if "run" in each}
    parts = [
        "# Pythons",
        "`pip install nox && nox` (Linux, x86-64): in fresh environments, with what pip took that day, the README's "
        f"run (ml-100k, 202 interactions forgotten) and `pytest {' '.join(SUITE)}`.",
        "*newest*: the README's command. *numpy1*: with numpy 1.26.4 and pandas 2. *recbole121*: with "
        "`pip install --no-deps recbole==1.2.1` after it.",
        table(
            ("Python", "environment", "versions", "pip check", "forget-set AUC", "short suite"),
            [ours(*each) for each in environments.items()],
        ),
        *imports(measured),
        "## RecBole alone",
        "`pip install torch==2.13.0 recbole`, then one epoch of `run_recbole('BPR', 'ml-100k')`, and `Config('BPR', "
        "'ml-100k')`, which needs no ray; the last line of each:",
        table(("Python", "versions", *ALONE), [others(each) for each in measured.values() if "alone" in each]),
    ]
    return "\n\n".join(parts) + "\n"


@takes(
    name=option(help="what to call this environment in the page"),
    alone=option(False, "measure RecBole without this package"),
    output=RESULTS,
)
def pythons(options):
    folder = options.output / "pythons"
    if options.name:
        figures = measure(options.alone)
        common.write_json(folder / f"{options.name}.json", figures)
        print(json.dumps(figures, indent=1))
    measured = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    common.write(page(measured), options.output, "pythons")


if __name__ == "__main__":
    common.run(__doc__, [pythons])
