"""Seconds of an epoch of LightGCN: stock RecBole's training and validation, and replay's.

    python benchmarks/lightgcn_speed.py --dataset=ml-1m --data_path=PATH

Stock epochs are measured on ``--steps`` batches. Costs do not depend on the weights, so replay runs on negatives drawn
at random. ``--clock=cpu`` counts processor time, on one thread: for a machine that does other things too.
"""

import argparse
import json
import logging
import sys
from pathlib import Path
from time import perf_counter, process_time

import numba
import numpy as np
import pandas as pd
import torch
from recbole.trainer import Trainer
from recbole.utils import init_seed

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.influence.graph_replay import GraphLoss, replay_graph
from recbole_unlearn.influence.recorded import Adam, Recorded
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.training import new_model
from recbole_unlearn.unlearners.propagated import MOVES


def stock(config, split, steps, clock):
    """Seconds of a training epoch, and of a validation."""
    model = new_model(config, split, 1)
    trainer = Trainer(config, model)
    batches, seconds = iter(split.train), []
    for _ in range(min(steps, len(split.train))):
        start = clock()
        batch = next(batches)
        trainer.optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        trainer.optimizer.step()
        seconds.append(clock() - start)
    start = clock()
    trainer.evaluate(split.valid, load_best_model=False)
    return float(np.median(seconds)) * len(split.train), clock() - start


def replayed(config, split, rows, clock):
    """Seconds of replay's first epoch, and of a later one."""
    rng = np.random.default_rng(0)
    epochs = 3
    negatives = [rng.integers(1, split.n_items, (split.n_rows, 1)).astype(np.uint16) for _ in range(epochs)]
    start = np.concatenate([p.detach().numpy().ravel() for p in new_model(config, split, 1).parameters()])
    batch = config["train_batch_size"]
    stride = max(-(-split.n_rows // batch) // MOVES, 1)
    times = []

    one, adam = np.ones(1, np.int64), Adam(config["learning_rate"], 0.9, 0.999, 1e-8, 0.0)
    loss = GraphLoss(config["n_layers"], config["reg_weight"])
    small, zero = Recorded(one, one, [one[:, None]] * 30, 2, 2, adam, 1), np.zeros(4 * config["embedding_size"])
    replay_graph(small, zero, one[:0], loss, stride=2)  # compiles
    recorded = Recorded(split.users, split.items, negatives, split.n_users, split.n_items, adam, batch)
    begin = clock()
    replay_graph(recorded, start, rows, loss, progress=lambda: times.append(clock()), stride=stride)
    return times[0] - begin, float(np.median(np.diff(times))), stride


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--forget", type=int, default=200, help="interactions to forget")
    parser.add_argument("--steps", type=int, default=20, help="batches of stock training to measure")
    parser.add_argument("--epochs", type=int, default=50, help="of the training that is compared")
    parser.add_argument("--rounds", type=int, default=5, help="stock and replay in turn")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--output", default="results/speed")
    args = parser.parse_args()
    clock = {"wall": perf_counter, "cpu": process_time}[args.clock]
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    config = UnlearnConfig("LightGCN", args.dataset, [], {"data_path": args.data_path, "show_progress": False})
    init_seed(config["seed"], config["reproducibility"])
    split = Split(config)
    logging.getLogger().setLevel(logging.ERROR)
    rows = ForgetRequest("count", args.forget, 2020).rows(split)
    rounds = []
    for _ in range(args.rounds):
        epoch, validation = stock(config, split, args.steps, clock)
        first, later, stride = replayed(config, split, rows, clock)
        retrain, request = args.epochs * (epoch + validation), first + (args.epochs - 1) * later
        rounds.append(
            {
                "stock RecBole, an epoch, s": epoch,
                "a validation, s": validation,
                "replay, first epoch, s": first,
                "a later epoch, s": later,
                f"stock RecBole, {args.epochs} epochs, s": retrain,
                f"replay, {args.epochs} epochs, s": request,
                "times faster": retrain / request,
            }
        )
    found = pd.DataFrame(rounds)
    table = pd.DataFrame({"median": found.median(), "lowest": found.min(), "highest": found.max()})
    given = " ".join(word for word in sys.argv[1:] if not word.startswith(("--data_path", "--output")))
    text = (
        f"`python benchmarks/lightgcn_speed.py {given}`: LightGCN on {args.dataset}, {len(rows)} "
        f"interactions forgotten, stride {stride}, {args.rounds} rounds of stock epoch and replay in turn, one thread, "
        f"{args.clock} time:\n\n{table.map(lambda x: f'{x:.3g}').to_markdown(disable_numparse=True)}\n"
    )
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"lightgcn-{args.dataset}.md").write_text(text)
    (folder / f"lightgcn-{args.dataset}.json").write_text(json.dumps(rounds, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
