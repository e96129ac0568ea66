"""How time and memory grow to ten million interactions, end to end through ``run_unlearn.py``.

    python benchmarks/scale.py --folder=FOLDER                          # 1, 3 and 10 million interactions
    python benchmarks/scale.py --folder=FOLDER --millions 1 --stock     # and RecBole's own reading and splitting beside
    python benchmarks/scale.py wait --against=d4d03c4                   # a request, in turns with another version
    python benchmarks/scale.py judging                                  # two models, in turns with an epoch

Data are drawn with a law like that of real ones: users' numbers of interactions are log-normal, items' popularity a
power law, and users mostly stay within one group of taste. Per million there are 10,000 users and 5,000 items. BPR with
K = 64 trains for --epochs epochs, with log and a validation after each; then 200 interactions are forgotten, without a
retrained model; then from the checkpoint again, as a user would; then in an open session, which is saved; then with a
purge. Each command runs in a process of its own, whose parts are timed in place; peak memory is that of the process
while the part runs. After each full ranking the matrix product alone is timed in the same process, of the same tables;
validation and judging hold it. The table is printed, and written to --output as far as it has come.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import common
from common import DATA, RESULTS, ROOT, option, ratios, takes

GROUPS, LOYAL = 8, 0.7  # groups of taste, and the share of interactions within one's own
ROUNDS = 4
POPULARITY, FIRST = 0.9, 10  # item r is drawn as often as 1 / (r + FIRST) ** POPULARITY
BESIDE = "beside it: matrix product alone"
KEYS = {
    "model": "BPR",
    "embedding_size": "64",
    "train_batch_size": "16384",
    "learning_rate": "0.002",
    "valid_metric": "NDCG@10",
    "show_progress": "False",
    "load_col": "{'inter': ['user_id', 'item_id']}",
    "forget_ratio": "None",
    "forget_count": "200",
    "compare": "none",
}


# The data


def interactions(millions, seed=2020):
    """Distinct (user, item), in random order: int64 arrays of about ``millions`` million."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows, n_users, n_items = round(millions * 1e6), round(millions * 1e4), round(millions * 5e3)
    activity = rng.lognormal(0, 1, n_users)
    wanted = np.clip(activity / activity.sum() * rows, 5, n_items / 8)
    group_of_user, group_of_item = rng.integers(0, GROUPS, n_users), rng.integers(0, GROUPS, n_items)
    weight = 1 / (np.arange(n_items) + FIRST) ** POPULARITY
    by_group = np.argsort(group_of_item, kind="stable")
    cumulated, cumulated_in_groups = np.cumsum(weight), np.concatenate([[0], np.cumsum(weight[by_group])])
    first = np.searchsorted(group_of_item[by_group], np.arange(GROUPS + 1))
    keys = np.empty(0, np.int64)
    for _ in range(ROUNDS):  # what is drawn twice counts once
        missing = np.maximum(wanted - np.bincount(keys // n_items, minlength=n_users), 0)
        users = np.repeat(np.arange(n_users), rng.poisson(missing))
        group, draw = group_of_user[users], rng.random(len(users))
        low, high = cumulated_in_groups[first[group]], cumulated_in_groups[first[group + 1]]
        own = np.searchsorted(cumulated_in_groups, low + draw * (high - low), "right") - 1
        own = by_group[np.minimum(own, n_items - 1)]
        any_item = np.minimum(np.searchsorted(cumulated, draw * cumulated[-1], "right"), n_items - 1)
        items = np.where(rng.random(len(users)) < LOYAL, own, any_item)
        keys = np.unique(np.concatenate([keys, users * n_items + items]))
    keys = rng.permutation(keys)
    return keys // n_items, keys % n_items


def write(folder, name, millions):
    """The data set in RecBole's format, if it is not there; returns the path of the ``.inter`` file."""
    import numpy as np
    import pandas as pd

    path = Path(folder) / name / f"{name}.inter"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        users, items = interactions(millions)
        table = {"user_id:token": users, "item_id:token": items, "timestamp:float": 10**9 + np.arange(len(users))}
        pd.DataFrame(table).to_csv(path.with_suffix(".part"), sep="\t", index=False)
        path.with_suffix(".part").rename(path)
    return path


# One process, its parts timed in place


class Parts:
    """Seconds, calls and peak memory (GiB) of named parts of this process; a part may lie within another."""

    def __init__(self):
        self.found = {}
        self._peaks = []  # of the parts that are open, as far as they have come

    @contextmanager
    def part(self, name):
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], _GiB())
        self._peaks.append(0.0)
        _forget_GiB()
        start = perf_counter()
        try:
            yield
        finally:
            seconds, peak = perf_counter() - start, max(self._peaks.pop(), _GiB())
            entry = self.found.setdefault(name, {"seconds": 0.0, "calls": 0, "GiB": 0.0})
            entry["seconds"] += seconds
            entry["calls"] += 1
            entry["GiB"] = max(entry["GiB"], peak)
            if self._peaks:
                self._peaks[-1] = max(self._peaks[-1], peak)

    def watch(self, owner, method, name):
        """Time a method, or a function of a module, whenever it is called."""
        function = getattr(owner, method)

        @wraps(function)
        def timed(*arguments, **options):
            with self.part(name):
                return function(*arguments, **options)

        setattr(owner, method, timed)


def _forget_GiB():
    Path("/proc/self/clear_refs").write_text("5")


def _GiB():
    return common.peak_memory() / 1024


def watch(parts):
    """Time everything that a user of this size waits for."""
    with parts.part("imports"):
        from recbole_unlearn import unlearner
        from recbole_unlearn.data import dataset as faster
        from recbole_unlearn.data import split
        from recbole_unlearn.evaluation import forgetting, ranking, ranks
        from recbole_unlearn.runs import output
        from recbole_unlearn.training.trainer import BPRTrainer
    parts.watch(faster, "read_csv", "reading the file")
    parts.watch(split, "create_dataset", "reading, filtering, numbering")
    parts.watch(split, "data_preparation", "splitting, samplers, loaders")
    parts.watch(split.Split, "__init__", "all of the data")
    parts.watch(BPRTrainer, "_train_epoch", "an epoch with its log")
    parts.watch(BPRTrainer, "_valid_epoch", "validation")
    parts.watch(unlearner.InfluenceUnlearner, "warm_up", "warming up")
    parts.watch(unlearner.InfluenceUnlearner, "unlearn", "the request")
    parts.watch(ranks.RankedLoader, "_full", "of judging and validation: full ranking")
    _beside(parts, ranks.RankedLoader)
    parts.watch(ranks.RankedLoader, "_sampled", "of judging: 99 sampled")
    parts.watch(ranking, "evaluate", "judging a model, both protocols")
    parts.watch(forgetting, "percentiles", "forget-set AUC of a model")
    for owner in (output, unlearner):
        parts.watch(owner, "save_unlearned", "saving model and log")
    parts.watch(output, "record", "audit")
    parts.watch(output, "purge", "purge")


def _beside(parts, loader):
    """After each full ranking time the matrix product alone, of the same tables, a block of users at a time."""
    full = loader._full

    @wraps(full)
    def ranked(self, cutoff):
        hits = full(self, cutoff)
        users, items = (
            each.weight.detach() for each in (self.trainer.model.user_embedding, self.trainer.model.item_embedding)
        )
        users = users[self.loader.uid_list]
        with parts.part(BESIDE):
            for start in range(0, len(users), 256):
                users[start : start + 256] @ items.T
        return hits

    loader._full = ranked


def _run(parts, *arguments):
    import run_unlearn

    if run_unlearn.main(arguments):
        sys.exit("run_unlearn.py failed")


def _session(parts, checkpoint, path):
    import numpy as np

    from recbole_unlearn import InfluenceUnlearner

    with parts.part("opening a session"):
        session = InfluenceUnlearner.load(checkpoint)
    with session:
        rows = np.random.default_rng(7).permutation(session.split.n_rows)[:400]
        for some in np.split(rows, 2):
            session.forget_rows(some)
        with parts.part("saving a session"):
            session.save(path)


def _stock(parts, *arguments):
    """RecBole's own data set and loaders."""
    import pandas as pd
    from recbole.utils import init_seed

    from recbole_unlearn.data import dataset as faster
    from recbole_unlearn.data.split import Split
    from recbole_unlearn.settings.config import UnlearnConfig

    keys = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    config = UnlearnConfig(config_dict=keys)
    init_seed(config["seed"], config["reproducibility"])
    faster.QUICK.clear()
    parts.watch(pd, "read_csv", "reading the file")
    Split(config)


KINDS = {"run": _run, "session": _session, "stock": _stock}


@takes(kind="run", report="", arguments="[]")
def part(options):
    """Do one of `KINDS` in this process, and write its parts down."""
    parts = Parts()
    with parts.part("everything"):
        watch(parts)
        KINDS[options.kind](parts, *json.loads(options.arguments))
    Path(options.report).write_text(json.dumps(parts.found, indent=1))


# All of them


def measured(folder, kind, *arguments):
    """Parts of a process of its own."""
    report = folder / "parts.json"
    words = [f"--kind={kind}", f"--report={report}", f"--arguments={json.dumps(arguments)}"]
    with open(folder / "output.log", "ab") as output:
        done = subprocess.run([sys.executable, __file__, "part", *words], cwd=folder, stdout=output, stderr=output)
    if done.returncode:
        sys.exit(f"{kind} failed; see {folder / 'output.log'}")
    return json.loads(report.read_text())


def size(millions, options):
    """(command, its parts) of each command at one size."""
    name = f"scale-{millions:g}m"
    folder = options.folder
    write(folder, name, millions)
    work = folder / f"{name}-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    keys = {**KEYS, "dataset": name, "data_path": folder, "epochs": options.epochs}
    keys = [f"--{key}={value}" for key, value in keys.items()]
    again = ["--checkpoint=train/model.pth", "--forget_ratio=None", "--forget_count=200", "--compare=none"]
    again += ["--show_progress=False"]
    yield "train and forget", measured(work, "run", *keys, "--output_dir=train")
    yield "request", measured(work, "run", *again, "--output_dir=request")
    yield "request, not judged", measured(work, "run", *again, "--output_dir=unjudged", "--evaluate=none")
    yield "session", measured(work, "session", "train/model.pth", "session.pth")
    if options.stock:
        yield "stock RecBole", measured(work, "stock", *keys)
    yield "purge", measured(work, "run", *again, "--output_dir=purge", "--purge=True", "--purge_dataset=False")
    shutil.rmtree(work)


def _all(dicts):
    """Keys of all of them, each once, in order."""
    return list(dict.fromkeys(key for each in dicts for key in each))


def table(found):
    """Markdown: a line for each command and part, two columns for each size."""
    sizes = sorted(found, key=float)
    lines = ["| | " + " | ".join(f"{size} M: s | GiB" for size in sizes) + " |", "|:---|" + "---:|---:|" * len(sizes)]
    for command in _all(found.values()):
        cells = {size: found[size].get(command, {}) for size in sizes}
        lines.append(f"| **{command}** |" + " |" * 2 * len(sizes))
        for part in _all(cells.values()):
            entries = [cells[size].get(part) for size in sizes]
            row = [
                text
                for each in entries
                for text in ((f"{each['seconds'] / each['calls']:.3g}", f"{each['GiB']:.2f}") if each else ("", ""))
            ]
            calls = max(each["calls"] for each in entries if each)
            lines.append(f"| {part}{f' (mean of {calls})' if calls > 1 else ''} | " + " | ".join(row) + " |")
    return "\n".join([*lines, ""])


# What is drawn: a part of which command, and its name there.
DRAWN = {
    "all of the data, RecBole's own": ("stock RecBole", "all of the data"),
    "all of the data": ("request", "all of the data"),
    "an epoch with its log": ("train and forget", "an epoch with its log"),
    "validation": ("train and forget", "validation"),
    "matrix product alone": ("train and forget", BESIDE),
    "opening a session": ("session", "opening a session"),
    "an exact request": ("request", "the request"),
    "saving model and log": ("request", "saving model and log"),
}


def picture(found, path):
    """Time and peak memory of the parts over the size, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "scale", "svg.fonttype": "none"}
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.2), sharex=True, constrained_layout=True)
    for label, (command, part) in DRAWN.items():
        cells = {float(size): parts[command][part] for size, parts in found.items() if part in parts.get(command, {})}
        sizes = sorted(cells)
        style = "o--" if label.endswith(("own", "alone")) else "o-"
        seconds = [cells[size]["seconds"] / cells[size]["calls"] for size in sizes]
        (line,) = axes[0].loglog(sizes, seconds, style, label=label, markersize=4)
        if part != BESIDE:  # which has that of the command it stands beside
            axes[1].loglog(sizes, [cells[size]["GiB"] for size in sizes], style, markersize=4, color=line.get_color())
    for ax, title in zip(axes, ("seconds", "peak memory of the process, GiB"), strict=True):
        ax.set(title=title, xlabel="million interactions", xticks=sorted(map(float, found)))
        ax.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        ax.grid(alpha=0.3)
    axes[1].yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes[1].yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    figure.legend(frameon=False, fontsize="small", loc="outside right center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


@takes(
    folder=option(
        help="for the data sets (0.3 GB at 10 million) and the runs",
        type=lambda text: Path(text).resolve(),
        required=True,
    ),
    millions=option([1, 3, 10], type=float, nargs="+"),
    epochs=2,
    stock=option(False, "measure RecBole's own reading and splitting too"),
    output=RESULTS / "scale",
)
def scale(options):
    found = {}
    for millions in options.millions:
        for command, parts in size(millions, options):
            found.setdefault(f"{millions:g}", {})[command] = parts
            common.write(table(found), options.output, "scale", found)
    picture(found, options.output / "scale.svg")


# A request from the command line

QUIET = "--show_progress=False"


def exported(revision, folder):
    """The sources of a revision, in a folder of their own."""
    content = subprocess.check_output(["git", "archive", revision], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def called(root, folder, *arguments):
    """Run ``run_unlearn.py``, or Python with other arguments, by the sources in ``root``."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


@takes(
    against=option(help="git revision to compare with", required=True),
    **DATA,
    epochs=3,
    rounds=3,
    output=RESULTS / "scale",
)
def wait(options):
    """What a user waits for: one request from the command line, in turns with another version of this package.

    The older version trains a model for --epochs epochs; then 200 of its interactions are forgotten, --rounds times by
    each version, in a process of its own each, without a retrained model. Kernels are compiled before. "not judged" is
    `evaluate: none`. The versions must judge the original alike, which is asserted. The import of RecBole alone is
    timed beside that of this package.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        roots = {options.against: exported(options.against, folder / "before"), "now": ROOT}
        keys = [f"--dataset={options.dataset}", f"--epochs={options.epochs}", "--compare=none", QUIET]
        keys += [f"--data_path={Path(options.data_path).resolve()}"]
        keys += [f"--config_files={' '.join(options.config_files)}"] if options.config_files else []
        before = roots[options.against]  # trains: this version reads what older ones wrote, not the other way round
        called(before, folder, before / "run_unlearn.py", *keys, "--output_dir=train")
        request = ["--checkpoint=train/model.pth", "--forget_ratio=None", "--forget_count=200", "--compare=none", QUIET]
        kinds = {name: (root, request) for name, root in roots.items()}
        kinds["now, not judged"] = (ROOT, [*request, "--evaluate=none"])

        def asked(name):
            root, words = kinds[name]
            output = folder / name
            shutil.rmtree(output, ignore_errors=True)
            called(root, folder, root / "run_unlearn.py", *words, f"--output_dir={output}")

        functions = {name: partial(asked, name) for name in kinds}
        for name, code in (
            ("RecBole", "import recbole.trainer, recbole.data"),
            ("this package", "import recbole_unlearn"),
        ):
            functions[f"import of {name}"] = partial(called, ROOT, folder, "-c", code)
        seconds = common.take_turns(functions, options.rounds)
        figures = {name: json.loads((folder / name / "result.json").read_text())["models"] for name in roots}
    before, now = ({**found["original"], "seconds": 0} for found in figures.values())
    assert (
        before == now
    )  # the unlearned model's may differ: what is drawn in a forgotten item's place has changed since
    lines = [f"A request of 200 interactions, {options.dataset}, {options.rounds} rounds in turns", ""]
    lines += ["| | s, median | from | to | ratio of neighbours |", "|:---|---:|---:|---:|---:|"]
    for name, took in seconds.items():
        ratio = f"{median(ratios(seconds[options.against], took)):.1f}" if name in kinds else ""
        lines.append(f"| {name} | {median(took):.2f} | {min(took):.2f} | {max(took):.2f} | {ratio} |")
    common.write("\n".join([*lines, ""]), options.output, f"wait-{options.dataset}")


@takes(**DATA, rounds=3, output=RESULTS / "scale")
def judging(options):
    """Judging two models, by full ranking and against 99 sampled items, in turns with an epoch of our trainer.

    By processor seconds of all threads, so that what else runs on the machine counts less; set OMP_WAIT_POLICY=passive,
    else threads that wait for others count too.
    """
    from recbole_unlearn.comparison.seeds import opened
    from recbole_unlearn.evaluation import ranking
    from recbole_unlearn.training.fit import new_model
    from recbole_unlearn.training.trainer import judge, make_trainer

    config, split = opened(("BPR", options.dataset, options.config_files, {"data_path": options.data_path}))
    models = [new_model(config, split, seed) for seed in (1, 2)]
    trainer, referee = make_trainer(config, new_model(config, split, 3)), judge(config, split, models[0])
    trainer.log_negatives, loader = False, split.train

    def judged(sampled):
        seeds.append(len(seeds))  # else the negatives of the round before would be known
        for model in models:
            ranking.evaluate(referee, model, split, seeds[-1], protocols={"": sampled})

    seeds = []
    functions = {"an epoch": lambda: trainer._train_epoch(loader, 0), "full ranking": partial(judged, 0)}
    functions["99 sampled"] = partial(judged, 99)
    seconds = common.take_turns(functions, options.rounds, clock=process_time)
    lines = [f"Two models judged, {options.dataset}, {options.rounds} rounds in turns, processor seconds", ""]
    lines += ["| | s, median | from | to | of an epoch |", "|:---|---:|---:|---:|---:|"]
    for name, took in seconds.items():
        share = median(ratios(took, seconds["an epoch"]))
        lines.append(f"| {name} | {median(took):.2f} | {min(took):.2f} | {max(took):.2f} | {share:.3f} |")
    common.write("\n".join([*lines, ""]), options.output, f"judging-{options.dataset}")


if __name__ == "__main__":
    common.run(__doc__, [scale, wait, judging], [part])
