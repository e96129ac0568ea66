"""What the benchmarks share: command lines, measuring in turns, trained seeds, processes, and what is written.

Importing it needs the standard library alone.
"""

import argparse
import importlib.metadata
import inspect
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))  # the checkout need not be installed

CLOCKS = {"wall": perf_counter, "cpu": process_time}
TOLD = "RESULT "  # begins the lines in which a process tells another what it found


# Command lines


def option(default=None, help=None, **more):
    """An argument of a command."""
    return {"default": default, "help": help, **more}


DATA = {
    "dataset": "ml-100k",
    "data_path": "dataset/",
    "config_files": option([], type=os.path.abspath, nargs="+"),
}
CACHED = {
    **DATA,
    "cache": option("saved/fidelity", "folder of trained models, shared by all benchmarks"),
    "processes": option(type=int, help="trainings at once"),
}
CHANGES = option("", "keys of the configuration, KEY=VALUE, separated by spaces")
AGAIN = option(False, "replace the page that is there, whatever it was measured with")
CLOCK = option("wall", "cpu: for a busy machine, with 1 thread", choices=CLOCKS)


def takes(**arguments):
    """Make a function of parsed arguments a command; of each argument the default is given, or an `option`."""

    def named(function):
        function.arguments = arguments
        return function

    return named


def run(doc, commands, inner=()):
    """Do what the first word of the command line names; without one, the command that is called like its file.

    ``inner`` commands are for processes that a benchmark starts itself.
    """
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=doc, **form)
    kinds = parser.add_subparsers(metavar="COMMAND", required=True)
    for function in (*commands, *inner):
        about = inspect.getdoc(function) or doc
        listed = {} if function in inner else {"help": about.partition("\n")[0]}
        one = kinds.add_parser(function.__name__.replace("_", "-"), description=about, **form, **listed)
        for name, value in function.arguments.items():
            _add(one, name, value if isinstance(value, dict) else option(value))
        one.set_defaults(parser=one, function=function)
    words, own = sys.argv[1:], Path(sys.argv[0]).stem
    lists = len(commands) > 1 and words[:1] in (["-h"], ["--help"])
    if own in kinds.choices and words[:1] not in [[name] for name in kinds.choices] and not lists:
        words = [own, *words]
    options = parser.parse_args(words)
    sys.argv[1:] = []  # RecBole would read them
    try:
        options.function(options)
    except ValueError as error:
        errors = sys.modules.get("recbole_unlearn.errors")
        if not errors or not isinstance(error, errors.InputError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _add(parser, name, keys):
    default = keys["default"]
    if default is False:
        keys = {**keys, "action": "store_true"}
    elif isinstance(default, Path):
        keys = {"type": lambda text: Path(text).resolve(), **keys}
    elif isinstance(default, (int, float)):
        keys = {"type": type(default), **keys}
    parser.add_argument(f"--{name}", **keys)


def words(options, *names):
    """Named options as words of a command line."""
    found = []
    for name in names:
        value = getattr(options, name)
        if isinstance(value, list):
            found += [f"--{name}", *map(str, value)] if value else []
        elif value is True:
            found.append(f"--{name}")
        elif value is not None and value is not False:
            found.append(f"--{name}={value}")
    return found


def command(options):
    """The command line, with what differs from the defaults but for places on this machine."""
    places = ("data_path", "cache", "processes", "minutes", "output", "picture", "folder", "again")
    parser = options.parser
    names = [name for name in options.function.arguments if name not in places]
    changed = [name for name in names if getattr(options, name) != parser.get_default(name)]
    given = shlex.join(words(options, *changed)).replace(f"{ROOT}/", "")
    return f"python benchmarks/{parser.prog} {given}".rstrip()


# Measuring


def seconds(function, clock=perf_counter):
    start = clock()
    function()
    return clock() - start


def take_turns(functions, rounds, repeats=1, clock=perf_counter):
    """Seconds of each function (dict by name), ``[rounds]``: the median of ``repeats`` calls in each round.

    Whatever else runs on the machine slows all of them alike. Each is called once before.
    """
    for function in functions.values():
        function()
    found = {name: [] for name in functions}
    for _ in range(rounds):
        turns = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                turns[name].append(seconds(function, clock))
        for name, values in turns.items():
            found[name].append(median(values))
    return found


def ratios(over, under):
    """Of neighbouring measurements."""
    return [a / b for a, b in zip(over, under, strict=True)]


def epoch_seconds(config, split, epochs, trainer=None):
    """Seconds of each training epoch plus validation; by default stock RecBole's, its own loader and trainer.

    One epoch more goes before them: it loads kernels.
    """
    from recbole.trainer.trainer import Trainer

    from recbole_unlearn.training.fit import new_model

    trainer = (trainer or Trainer)(config, new_model(config, split, 1))
    trainer.log_negatives = False
    loader = split.remaining([], 1)

    def epoch(n):
        trainer._train_epoch(loader, n)
        trainer._valid_epoch(split.valid)

    epoch(0)
    return [seconds(lambda n=n: epoch(n)) for n in range(1, epochs + 1)]


def peak_memory():
    """Peak resident MiB of this process; unlike ru_maxrss, without what the parent held when it forked."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def toward(change, truth):
    """How far changes of some pairs go of the true ones, and how they correlate.

    Returns:
        dict: ``way``, of the means, and ``correlation``.
    """
    import numpy as np

    return {"way": float(change.mean() / truth.mean()), "correlation": float(np.corrcoef(change, truth)[0, 1])}


# Trained models


def trained_seeds(options, model="BPR", dataset=None, files=None, **settings):
    """`TrainedSeeds` of the options `CACHED`."""
    from recbole_unlearn.comparison.seeds import TrainedSeeds

    logging.getLogger().setLevel(logging.ERROR)
    files, settings = options.config_files if files is None else files, {"data_path": options.data_path, **settings}
    return TrainedSeeds((model, dataset or options.dataset, files, settings), options.cache, options.processes)


def seed_runs(trained, seeds, forgotten=()):
    """The originals of some seeds, with log, or models retrained without rows."""
    from recbole_unlearn.comparison.seeds import SeedRun

    rows, first = tuple(map(int, forgotten)), trained.config["seed"]
    return [SeedRun(first + n, rows, not rows) for n in range(seeds)]


def unlearner_of(trained, run):
    """What unlearns from an original of `TrainedSeeds`."""
    from recbole_unlearn.training.trained import Checkpoint
    from recbole_unlearn.unlearner import InfluenceUnlearner

    return InfluenceUnlearner(Checkpoint.written(trained.path(run), trained.config).trained(trained.split, run.seed))


def weights_of(trained, run):
    """The weights of a finished run."""
    import torch

    return torch.load(trained.path(run), weights_only=True)["state_dict"]


def judge(trained, protocol, candidates):
    """A function of weights and forgotten rows: their figures, by one of the protocols of `ranking.evaluate`."""
    from recbole_unlearn.evaluation import forgetting, ranking
    from recbole_unlearn.training.fit import new_model
    from recbole_unlearn.training.trainer import judge

    config, split = trained.config, trained.split
    model = new_model(config, split)
    trainer = judge(config, split, model)

    def measure(state, rows):
        model.load_state_dict(state)
        found = ranking.evaluate(trainer, model, split, config["seed"], protocols={protocol: candidates})[protocol]
        auc = float(forgetting.percentiles(model, split, rows).mean())
        return {"HR@10": found["hit@10"], "NDCG@10": found["ndcg@10"], "forget-set AUC": auc}

    return measure


# Other processes


def tell(figures):
    """Print what `apart` reads; again whenever more is known."""
    print(TOLD + json.dumps(figures), flush=True)


def apart(file, *arguments, timeout=None, threads=None):
    """Run a command in a process of its own: the figures that it told last, {} if none, and what went wrong or None."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(each) for each in sys.path if each)}
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as scratch:
        call = [sys.executable, os.path.abspath(file), *map(str, arguments)]
        keys = {"capture_output": True, "text": True, "timeout": timeout, "cwd": scratch, "env": environment}
        try:
            done = subprocess.run(call, **keys)
            printed, failed = done.stdout, None
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                failed = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                if done.returncode < 0:  # by 9 where memory ran out
                    failed = f"ended by signal {-done.returncode}"
        except subprocess.TimeoutExpired as late:
            printed, failed = (late.stdout or b"").decode(), f"not done in {timeout:.0f} s"
    lines = [line for line in printed.splitlines() if line.startswith(TOLD)]
    return json.loads(lines[-1][len(TOLD) :]) if lines else {}, failed


# What is written


def spread(values, unit=1.0, digits=3):
    """``median [smallest, largest]`` in ``unit``."""
    low, middle, high = (f"{x / unit:.{digits}g}" for x in (min(values), median(values), max(values)))
    return f"{middle} [{low}, {high}]"


def mean_sd(values, digits=4):
    """Mean and, of several values, sample standard deviation."""
    import numpy as np

    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def load():
    """Cores and what they are busy with."""
    return f"{os.cpu_count()} cores, load average {', '.join(f'{x:.1f}' for x in os.getloadavg())} at the end"


def versions(device="cpu"):
    """Card and versions, in one line."""
    import torch

    card = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    packages = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "recbole", "numba"))
    return f"{card}; Python {platform.python_version()}, {', '.join(packages)}, CUDA {torch.version.cuda}"


def setting(options):
    """What the results call the options' configuration files."""
    return Path(options.config_files[-1]).stem if options.config_files else "default"


def changed_keys(options):
    """What `CHANGES` says."""
    from recbole_unlearn.settings.given import read_arguments

    return read_arguments([f"--{change}" for change in options.changes.split()])


def shown(options):
    """`setting`, and what `CHANGES` says."""
    return " ".join([setting(options), *options.changes.split()])


def read_json(file):
    """The dict that a JSON file holds; InputError where there is none."""
    from recbole_unlearn.errors import InputError

    try:
        found = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} must hold an object, not {type(found).__name__}")
    return found


def check_new(options, *names):
    """InputError where a page is there already: hours went into it, and its name does not tell every option."""
    from recbole_unlearn.errors import InputError

    for file in (options.output / f"{name}.md" for name in names):
        if file.exists() and not options.again:
            raise InputError(f"{file} is there; give --again to replace it, or --output for another folder")


def markdown(rows):
    """A table of dicts."""
    import pandas as pd

    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def write_json(file, figures):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def write(page, folder, name, figures=None):
    """Print a page, and write it as Markdown, beside its figures as JSON where there are any."""
    print(page, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(page, "utf-8")
    if figures is not None:
        write_json(folder / f"{name}.json", figures)
