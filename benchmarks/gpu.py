"""BPR, LightGCN, GRU4Rec and SASRec trained on a GPU, made to forget there, and compared with paired training.

    python benchmarks/gpu.py --check                            # names what is missing, and how to bring it
    python benchmarks/gpu.py                                    # in 8 minutes; writes results/gpu.md
    python benchmarks/gpu.py --device=cpu --epochs=1 --iterations=5   # without a GPU, to try it; prints only

It needs nothing but this checkout, RecBole's bundled ml-100k, and packages. On a machine without a network, with torch,
numpy, numba, scipy, pandas and scikit-learn, the others come as wheels, none of which is compiled. Where there is one:

    pip download --no-deps --dest wheels recbole==1.2.0 kmeans-pytorch==0.3 colorlog==4.7.2 colorama texttable

(and whatever else ``--check`` names there, with ``--only-binary=:all: --python-version 3.12`` where that is compiled).
``--no-deps``, since RecBole asks for versions of others that it does not need. Then, with the folder carried along:

    python -m pip install --no-index --no-deps --find-links wheels --target site wheels/*.whl
    PYTHONPATH=site python benchmarks/gpu.py --check && PYTHONPATH=site python benchmarks/gpu.py

Each model has a process of its own. One that fails, or takes longer than its share of the time, leaves a row that says
so, with what it had found by then.

*Paired*: the model's own training again on the device without the forgotten rows, by RecBole's own trainer, with the
same initial weights, batches, negatives and dropout as far as they fit (`training.train_paired`). *Exact* is that too
(of BPR and LightGCN compiled, on the CPU), so that it differs by what the device does not repeat; *influence* steps are
judged by it.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import common
from common import RESULTS, option, takes, versions

EPOCHS = {"BPR": 30, "LightGCN": 15, "GRU4Rec": 5, "SASRec": 5}
NEEDED = {  # module that is imported -> distribution that holds it
    "torch": "torch", "numpy": "numpy", "scipy": "scipy", "pandas": "pandas", "sklearn": "scikit-learn",
    "numba": "numba", "tqdm": "tqdm", "yaml": "pyyaml", "psutil": "psutil", "tensorboard": "tensorboard",
    "recbole": "recbole==1.2.0", "kmeans_pytorch": "kmeans-pytorch==0.3", "colorlog": "colorlog==4.7.2",
    "colorama": "colorama", "texttable": "texttable",
}  # fmt: skip
DATASET, SEED = "ml-100k", 2020
WAYS = {"exact": {"method": "replay", "replay_rows": "all"}, "influence": {"method": "influence"}}


def missing():
    """Modules that cannot be found."""
    return [module for module in NEEDED if importlib.util.find_spec(module) is None]


def check(device):
    """What keeps the benchmark from running here, in words; None: nothing."""
    if absent := missing():
        names = " ".join(NEEDED[module] for module in absent)
        return f"missing: {', '.join(absent)}\nbring: pip download --no-deps --dest wheels {names}"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; --device=cpu tries the benchmark without one"
    return None


ASKED = {
    "device": option("cuda", choices=["cuda", "cpu"]),
    "count": option(200, "interactions to forget"),
    "iterations": option(200, "of linear solves; fewer: quicker, less faithful"),
}


@takes(**ASKED, model="", epochs=0)
def one(options):
    """Tells the figures of one model, after each part of the work all that are known by then."""
    import numpy as np
    import torch
    from models import settings

    from recbole_unlearn import InfluenceUnlearner
    from recbole_unlearn.comparison.seeds import opened, quiet
    from recbole_unlearn.evaluation.forgetting import percentiles
    from recbole_unlearn.training.again import train_paired
    from recbole_unlearn.training.fit import flat_weights, new_model, train

    name, device, epochs = options.model, options.device, options.epochs
    found = {"epochs": epochs}

    def tell(**figures):
        found.update(figures)
        common.tell(found)

    def weights(model):
        return flat_weights(model).astype(np.float64)

    where = {"gpu_id": "0" if device == "cuda" else ""}
    with tempfile.TemporaryDirectory() as folder, quiet():
        chosen = settings(name, epochs) | where | {"seed": SEED, "checkpoint_dir": folder}
        chosen["cg_max_iterations"] = options.iterations
        config, split = opened((name, DATASET, None, chosen))
        if config["device"].type != device:
            raise RuntimeError(f"the model would be on {config['device']}")
        torch.ones(2, 2, device=device).mm(torch.ones(2, 2, device=device)).sum().item()  # starts CUDA
        rows = np.sort(np.random.default_rng(0).choice(split.n_rows, options.count, replace=False))
        path = Path(folder) / "model.pth"
        original, _, seconds = train(config, split, path)
        before = percentiles(original, split, rows)
        tell(train_seconds=seconds, original=float(before.mean()), on=str(next(original.parameters()).device))

        own, changes, ways = where | {"show_progress": False, "state": "ERROR"}, {}, {}
        for way, keys in (WAYS if name not in ("BPR", "LightGCN") else {"exact": WAYS["exact"]}).items():
            start = perf_counter()
            with InfluenceUnlearner.load(path, config_dict=own | keys) as session:
                ways[way] = {"open_seconds": perf_counter() - start, "guard": session.guard.distance}
                tell(ways=ways)
                unlearned = session.forget_rows(rows)
                changes[way] = percentiles(session.model, split, rows) - before
                ways[way] |= {
                    "request_seconds": unlearned.seconds,
                    "unlearned": float((before + changes[way]).mean()),
                    "served_on": str(next(session.model.parameters()).device),
                }
                tell(ways=ways)

        def paired(gone):
            return train_paired(config, split, Path(folder) / "paired.pth", path, gone, SEED)[0]

        truth = percentiles(paired(rows), split, rows) - before
        for way, change in changes.items():
            ways[way] |= common.toward(change, truth)
        tell(paired=float((before + truth).mean()), ways=ways)
        start, end = weights(new_model(config, split)), weights(original)
        distance = np.linalg.norm(weights(paired(rows[:0])) - end) / np.linalg.norm(end - start)
        tell(repeats=float(distance), memory=torch.cuda.max_memory_allocated() if device == "cuda" else None)


def table(results):
    """Markdown: a row a model and way."""
    head = [
        "model", "epochs", "trained, served on", "training, s", "way", "opening, s", "request, s",
        "request / training", "forget-set AUC: original", "unlearned", "paired", "way to paired", "correlation",
        "trained again, nothing forgotten", "guard", "GPU memory, MiB", "failed",
    ]  # fmt: skip
    lines = [head, [":--", "--:", ":--", "--:", ":--", *["--:"] * 11, ":--"]]
    for name, model in results.items():
        for way, figures in (model.get("ways") or {"–": {}}).items():
            found = {**model, **figures}

            def told(key, form, found=found):
                return "–" if found.get(key) is None else format(found[key], form)

            ratio = "–"
            if "request_seconds" in found:
                ratio = f"{found['request_seconds'] / found['train_seconds']:.3f}"
            memory = f"{found['memory'] / 2**20:.0f}" if found.get("memory") else "–"
            lines.append([
                name, told("epochs", "d"), f"{told('on', '')}, {told('served_on', '')}", told("train_seconds", ".2f"),
                way, told("open_seconds", ".2f"), told("request_seconds", ".3f"), ratio, told("original", ".4f"),
                told("unlearned", ".4f"), told("paired", ".4f"), told("way", ".0%"), told("correlation", ".4f"),
                told("repeats", ".1e"), told("guard", ".1e"), memory, found.get("failed", "").replace("|", "/")[:300],
            ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def report(results, options):
    """The whole text."""
    return (
        f"# Training and forgetting on a GPU: {DATASET}\n\n{versions(options.device)}\n\n"
        f"{options.count} random interactions forgotten, one seed. *Opening*: of a session, with guard and kernels "
        "(compiled, where they never were). *Paired*: the model's own training again on the device without the "
        "forgotten rows, with the same initial weights, batches, negatives and dropout. *Way to paired*: change of the "
        "forget-set AUC by the request over that by paired training; *correlation*: of the changes of the forgotten "
        "interactions' percentiles. *Trained again, nothing forgotten*: distance of the weights from the original's, "
        "over the way from the initial ones: how far the device repeats itself, which bounds all that is compared. "
        "*Guard*: the same of an exact request's training.\n\n"
        f"`python benchmarks/gpu.py --device={options.device} --iterations={options.iterations}`\n\n"
        f"{table(results)}"
    )


@takes(
    **ASKED,
    check=option(False, "only say what is missing"),
    models=",".join(EPOCHS),
    epochs=option(help="of every model; default: a few, of each its own", type=int),
    minutes=option(7.5, "for all models together"),
    output=option(help="file to write; default: results/gpu.md with a GPU, else none", type=Path),
)
def gpu(options):
    if problem := check(options.device):
        sys.exit(problem)
    if options.check:
        print(f"nothing is missing; {versions(options.device)}")
        return
    output = options.output or (RESULTS / "gpu.md" if options.device == "cuda" else None)
    ends, results = perf_counter() + 60 * options.minutes, {}
    names = options.models.split(",")
    for n, name in enumerate(names):
        share = max((ends - perf_counter()) / (len(names) - n), 1)  # what one leaves of its time is for those after it
        words = [f"--model={name}", f"--epochs={options.epochs or EPOCHS.get(name, 1)}", *common.words(options, *ASKED)]
        found, failed = common.apart(__file__, "one", *words, timeout=share)
        results[name] = found | ({"failed": failed} if failed else {})  # says why there is no more
        print(name, json.dumps(results[name]), flush=True)
        if output:
            output.write_text(report(results, options))
    print(report(results, options))


if __name__ == "__main__":
    common.run(__doc__, [gpu], [one])
