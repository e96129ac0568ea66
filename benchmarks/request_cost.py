"""What a request costs: against stock RecBole's Retrain, against a curvature product, and what logging costs before.

    python benchmarks/request_cost.py --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml

Everything is measured in one process, one after the other, on an otherwise idle machine. Retrain is stock RecBole: its
own loader and trainer, median of --epochs epochs with validation, taken in turn with the requests of each original,
times the epochs that the configuration trains (or, under early stopping, that the original trained). The originals
(--seeds of them) come from --cache or are trained first.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from paper_ratios import stock_epoch_seconds

from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
from recbole_unlearn.influence.operators import DotProductCurvature, UserTriples
from recbole_unlearn.storage.triple_log import log_path, snapshot_due
from recbole_unlearn.trainer import BPRTrainer
from recbole_unlearn.training import new_model
from recbole_unlearn.unlearner import InfluenceUnlearner

RATIO = 0.0002


def seconds(function):
    start = perf_counter()
    function()
    return perf_counter() - start


def logging_cost(config, split, folder, rounds, trained):
    """What logging adds to training time: of epochs with and without, in turn, and of snapshots.

    ``trained`` epochs are a whole training: snapshots, ever rarer, come at their rate in it.

    Returns:
        (ratios minus 1, list; share of snapshots; seconds of the epochs with log, list)
    """
    trainers = {}
    for logged in (False, True):
        trainers[logged] = BPRTrainer(config, new_model(config, split, 1))
        trainers[logged].log_negatives = logged
        trainers[logged].saved_model_file = str(folder / f"speed-{logged}.pth")
    loaders = {logged: split.remaining([], 1) for logged in trainers}
    times = {False: [], True: []}
    plain = [epoch for epoch in range(1, 10 * rounds) if not snapshot_due(epoch + 1)]
    for epoch in [0, *plain[:rounds]]:  # the first one compiles and opens the log
        for logged, trainer in list(trainers.items())[:: 1 if epoch % 2 else -1]:
            took = seconds(lambda t=trainer, loader=loaders[logged], e=epoch: t._train_epoch(loader, e))
            if epoch:
                times[logged].append(took)
    due = [epoch for epoch in range(trained + 1) if snapshot_due(epoch)]
    snapshots = [seconds(lambda n=n: trainers[True]._snapshot(n)) for n in due]
    ratios = [b / a - 1 for a, b in zip(times[False], times[True], strict=True)]
    return ratios, sum(snapshots) / (trained * median(times[False])), times[True]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--config_files", default="")
    parser.add_argument("--cache", default="saved/fidelity")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--logged_epochs", type=int, default=9, help="to measure with and without log, in turn")
    parser.add_argument("--requests", type=int, default=11)
    parser.add_argument("--seeds", type=int, default=1, help="originals to take requests on")
    parser.add_argument("--output", default="results/speed")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    trained = TrainedSeeds(
        ("BPR", args.dataset, args.config_files.split(), {"data_path": args.data_path, "method": "replay"}), args.cache
    )
    config, split = trained.config, trained.split
    paths = trained.train([SeedRun(config["seed"] + n, (), True) for n in range(args.seeds)])
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)

    # Each request starts from the original: what a session has forgotten is not kept here.
    openings, replayed, requests, single, stock = [], [], [], [], []
    settings = {"data_path": args.data_path, "method": "replay", "show_progress": False}
    for path in paths:
        start = perf_counter()
        session = InfluenceUnlearner.load(path, args.config_files.split(), settings)
        openings.append(perf_counter() - start)
        replayed.append(session.problem.epochs)
        for n in range(args.requests):
            rng = np.random.default_rng(n)
            for times, count in ((requests, max(round(RATIO * split.n_rows), 1)), (single, 1)):
                rows = np.sort(rng.choice(split.n_rows, count, replace=False))
                times.append(session.unlearn(rows).seconds)
        session.close()
        # in turn, so that a slow spell of the machine meets both
        stock += [stock_epoch_seconds(config, split, 1) for _ in range(-(-args.epochs // len(paths)))]
    log, stored = session.log, session.trained.stored

    triples = UserTriples(
        log.users, np.array(log.items), np.ascontiguousarray(log.epoch(0)), split.n_users, split.n_items
    )
    curvature = DotProductCurvature(triples, session.problem.P, session.problem.Q)
    vector = torch.randn(curvature.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    curvature.matvec(vector)
    products = [seconds(lambda: curvature.matvec(vector)) for _ in range(args.requests)]

    epoch = median(stock)
    stopped = stored["epoch"] + 1 + config["stopping_step"]
    epochs = min(config["epochs"], stopped)
    with tempfile.TemporaryDirectory() as folder:
        ratios, snapshots, training = logging_cost(config, split, Path(folder), args.logged_epochs, epochs)
    n_logged = log.n_epochs if not log.static else 1
    size = sum(f.stat().st_size for f in log_path(paths[-1]).iterdir()) / (n_logged * log.n_rows * log.negatives)

    def spread(times):
        return f"{median(times):.3g} s ({min(times):.3g}-{max(times):.3g})"

    figures = {
        "triples an epoch": f"{log.n_rows * log.negatives:,}",
        "Retrain, stock RecBole": f"{epochs * epoch:.4g} s ({epochs} epochs of {epoch:.3g} s)",
        "epochs replayed (up to the best one)": ", ".join(map(str, replayed)),
        f"request, {RATIO:.2%} of the interactions": spread(requests),
        "times faster than Retrain": f"{epochs * epoch / median(requests):.0f}",
        "request, 1 interaction": spread(single),
        "times faster than Retrain, 1 interaction": f"{epochs * epoch / median(single):.0f}",
        "one curvature product": spread(products),
        "request, 1 interaction, in curvature products": f"{median(single) / median(products):.1f}",
        "opening before the first request": spread(openings),
        "logging, share of training time": f"{median(ratios) + snapshots:+.1%} "
        f"(an epoch {min(ratios):+.1%} to {max(ratios):+.1%}, snapshots {snapshots:+.1%})",
        "log, bytes a triple": f"{size:.2f}",
        "training epoch": f"{median(training):.3g} s",
    }
    name = f"{args.dataset}-{Path(args.config_files).stem or 'default'}"
    table = pd.Series(figures, name=name).to_markdown()
    (output / f"request_cost-{name}.md").write_text(table + "\n")
    (output / f"request_cost-{name}.json").write_text(
        json.dumps({"figures": figures, "requests": requests, "single": single, "logging": ratios})
    )
    print(table)


if __name__ == "__main__":
    main()
