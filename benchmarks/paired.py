"""A request against the model's own training again without the forgotten rows, with the same dropout.

    python benchmarks/paired.py --models=SASRec,GRU4Rec,FPMC --seeds=3

Two trainings from different random streams differ by more than a small request does. Here the second training has the
first one's initial weights, batches, negatives and dropout masks; forgotten rows have no weight in their batches, and
are in no history. What is left is the effect of the request (and of rounding: see the column *nothing forgotten*, the
training again with all rows). For the sequential models of `models.py` that need no pre-trained vectors.
"""

import argparse
import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
from models import KINDS, again, opened, settings, trained

SEED = 2020
SHIFT = 1e-6  # of initial weights, relative
ONE_STEP = "one step"  # at the last weights


@contextmanager
def training(name, dataset, epochs, count, seed):
    """A training to be done again: what `opened` and `trained` return."""
    import torch

    torch.set_num_threads(1)
    chosen = settings(name, dataset, epochs) | {"use_gpu": False, "seed": seed}
    config, split, rows = opened(name, dataset, chosen, count)
    with tempfile.TemporaryDirectory() as folder:
        yield config, split, rows, *trained(config, split, folder)


def run(name, dataset, epochs, count, seed, variants, check):
    """Figures of one model of one seed."""
    from recbole_unlearn.evaluation.forgetting import percentiles
    from recbole_unlearn.training import new_model
    from recbole_unlearn.unlearner import InfluenceUnlearner

    with training(name, dataset, epochs, count, seed) as (config, split, rows, original, unlearner, seconds):
        found = {"train_seconds": seconds, "unlearned": {}}
        asked = {"original": percentiles(original, split, rows)}
        model = new_model(config, split, data=split.remaining_dataset(rows))
        for variant in variants:
            triples = "all" if variant == ONE_STEP else int(variant) if variant.isdecimal() else variant
            last = epochs if variant == ONE_STEP else "all"
            way = replace(unlearner.way, log_epochs=last, curvature_triples=triples)
            result = InfluenceUnlearner(unlearner.trained, way).unlearn(rows)
            model.load_state_dict(result.state_dict)
            asked[variant] = percentiles(model, split, rows)
            report = {key: value for key, value in result.report().items() if key != "history"}
            found["unlearned"][variant] = {"seconds": result.seconds, "report": report}
        start = perf_counter()
        asked["paired"] = percentiles(again(config, split, unlearner.log, rows, epochs), split, rows)
        found["paired_seconds"] = perf_counter() - start
        if check:
            whole = again(config, split, unlearner.log, rows[:0], epochs)
            found["nothing_forgotten"] = float((percentiles(whole, split, rows) - asked["original"]).mean())
    found["auc"] = {key: float(value.mean()) for key, value in asked.items()}
    truth = asked["paired"] - asked["original"]
    for variant in variants:
        change = asked[variant] - asked["original"]
        found["unlearned"][variant] |= {
            "way": float(change.mean() / truth.mean()),
            "correlation": float(np.corrcoef(change, truth)[0, 1]),
        }
    return found


def beside(name, dataset, epochs, count, seed):
    """How paired training agrees with itself where the initial weights differ by a millionth.

    Returns:
        dict: ``shift`` of the original's AUC, ``way`` of the one request's change to the other's, ``correlation``.
    """
    from recbole_unlearn.evaluation.forgetting import percentiles

    with training(name, dataset, epochs, count, seed) as (config, split, rows, original, unlearner, _):
        before = percentiles(original, split, rows)
        change = percentiles(again(config, split, unlearner.log, rows, epochs), split, rows) - before
        shifted, without = (
            percentiles(again(config, split, unlearner.log, gone, epochs, SHIFT), split, rows)
            for gone in (rows[:0], rows)
        )
    return {
        "shift": float((shifted - before).mean()),
        "way": float((without - shifted).mean() / change.mean()),
        "correlation": float(np.corrcoef(without - shifted, change)[0, 1]),
    }


def table(folder, dataset):
    """Markdown of all that has run: a row a model and variant, means and sample standard deviations over seeds."""
    lines = [
        "| model | seeds | request | forget-set AUC: original | unlearned | paired | way to paired "
        "| correlation | seconds / training's | nothing forgotten | beside: way, correlation |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def told(values, digits=4):
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    for name in KINDS:
        files = sorted(folder.glob(f"{dataset}-{name}-*.json"))
        runs = [json.loads(file.read_text()) for file in files]
        for variant in dict.fromkeys(v for each in runs for v in each["unlearned"]):
            some = [each for each in runs if variant in each["unlearned"]]
            mine = [each["unlearned"][variant] for each in some]
            auc = {key: [each["auc"][key] for each in some] for key in ("original", variant, "paired")}
            moved, truth = (np.mean(auc[key]) - np.mean(auc["original"]) for key in (variant, "paired"))
            ratio = np.mean([each["seconds"] / run["train_seconds"] for each, run in zip(mine, some, strict=True)])
            ways = [each["way"] for each in mine]
            ways = f" ({min(ways):.0%} to {max(ways):.0%})" if len(ways) > 1 else ""
            rounding = [run["nothing_forgotten"] for run in some if "nothing_forgotten" in run]
            tried = [
                (file.stem.rpartition("-")[2], run["beside"])
                for file, run in zip(files, runs, strict=True)
                if "beside" in run
            ]
            agreement = [f"{each['way']:.0%}, {each['correlation']:.2f} ({seed})" for seed, each in tried]
            cells = [
                name, str(len(some)), variant, *(told(auc[key]) for key in auc), f"{moved / truth:.0%}{ways}",
                told([each["correlation"] for each in mine], 2), f"{ratio:.2f}", told(rounding) if rounding else "–",
                "; ".join(agreement) or "–",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--models", default="SASRec,GRU4Rec,FPMC")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--count", type=int, default=200, help="random interactions to forget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default="auto,one step", help="separated by commas; numbers: see results")
    parser.add_argument("--output", default="results")
    parser.add_argument("--beside", default="", help="seeds that are done, to try paired training itself on")
    parser.add_argument("--again", action="store_true", help="seeds that are done too")
    arguments = parser.parse_args()
    folder = Path(arguments.output) / "paired"
    folder.mkdir(parents=True, exist_ok=True)
    variants = arguments.variants.split(",")
    for name in arguments.models.split(","):
        for seed in range(SEED, SEED + arguments.seeds):
            file = folder / f"{arguments.dataset}-{name}-{seed}.json"
            if file.exists() and not arguments.again:
                continue
            found = run(name, arguments.dataset, arguments.epochs, arguments.count, seed, variants, seed == SEED)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, seed, found["auc"], {v: found["unlearned"][v]["correlation"] for v in variants}, flush=True)
        for seed in map(int, filter(None, arguments.beside.split(","))):
            file = folder / f"{arguments.dataset}-{name}-{seed}.json"
            found = json.loads(file.read_text())
            found["beside"] = beside(name, arguments.dataset, arguments.epochs, arguments.count, seed)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(name, seed, "beside", found["beside"], flush=True)
    title = f"# Requests against paired training on {arguments.dataset}\n\n"
    note = (
        f"{arguments.count} random interactions forgotten, {arguments.epochs} epochs, one thread, machine not idle. "
        "*Paired*: the model's own training again without the forgotten rows, with the same initial weights, batches, "
        "negatives and dropout. *Way to paired*: change of the forget-set AUC by unlearning over that by paired "
        "training, of the means over the seeds and from the lowest to the highest seed. *Correlation*: of the changes "
        "of the forgotten interactions' percentiles. *Nothing forgotten*: change of the AUC where the training is run "
        "again with all rows, one seed. *Beside* (`--beside=SEED`): the same for paired training itself, where the "
        "initial weights differ by a millionth: what any prediction can reach.\n\n"
        f"`python benchmarks/paired.py --models=MODEL --epochs={arguments.epochs} --seeds=SEEDS --variants=...` "
        "(*request*: `auto` follows the training along its snapshots, `one step` takes one at the last weights, a "
        "number takes it with the curvature of so many triples)\n\n"
    )
    (Path(arguments.output) / "paired.md").write_text(title + note + table(folder, arguments.dataset))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
