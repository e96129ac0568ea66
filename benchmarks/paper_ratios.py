"""The paper's six forget ratios: original, unlearned and retrained under both protocols.

    python benchmarks/paper_ratios.py --dataset=ml-1m --data_path=PATH

Trained models are cached in --cache. Training times in the cache were taken while other trainings ran beside; the last
line therefore times one Retrain with stock RecBole (--retrain_epochs epochs of it) and the unlearning again, alone,
one after the other.
"""

import argparse
import logging
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from recbole.trainer.trainer import Trainer

from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.trained import Checkpoint
from recbole_unlearn.trainer import BPRTrainer
from recbole_unlearn.training import new_model
from recbole_unlearn.unlearner import InfluenceUnlearner

RATIOS = (0.0001, 0.00015, 0.0002, 0.00025, 0.0003, 0.00035)


def stock_epoch_seconds(config, split, epochs):
    """Median seconds of a training epoch plus validation of stock RecBole, its own loader and trainer."""
    trainer = Trainer(config, new_model(config, split, 1))
    loader = split.remaining([], 1)
    times = []
    for epoch in range(epochs):
        start = perf_counter()
        trainer._train_epoch(loader, epoch)
        trainer._valid_epoch(split.valid)
        times.append(perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-1m")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--cache", default="saved/fidelity")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--retrain_epochs", type=int, default=3)
    parser.add_argument("--output", default="results")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    trained = TrainedSeeds(
        ("BPR", args.dataset, ["properties/paper.yaml"], {"data_path": args.data_path}), args.cache, args.processes
    )
    config, split = trained.config, trained.split
    requests = {ratio: ForgetRequest("ratio", ratio).rows(split) for ratio in RATIOS}
    originals = [SeedRun(config["seed"] + n, (), True) for n in range(args.seeds)]
    retrainings = {
        ratio: [SeedRun(config["seed"] + n, tuple(map(int, rows))) for n in range(args.seeds)]
        for ratio, rows in requests.items()
    }
    trained.train(originals + sum(retrainings.values(), []))
    model = new_model(config, split)
    trainer = BPRTrainer(config, model)
    trainer.eval_collector.data_collect(split.train)

    def measure(state, rows):
        model.load_state_dict(state)
        uni = ranking.evaluate(trainer, model, split, config["seed"], protocols={"uni99": 99})["uni99"]
        return uni["hit@10"], uni["ndcg@10"], float(forgetting.percentiles(model, split, rows).mean())

    table, seconds = {}, []
    for ratio, rows in requests.items():
        figures = {"original": [], "unlearned": [], "retrained": []}
        for run, retraining in zip(originals, retrainings[ratio], strict=True):
            unlearner = InfluenceUnlearner(Checkpoint.written(trained.path(run), config).trained(split))
            original = unlearner.trained.stored["state_dict"]
            unlearner.warm_up()
            unlearned = unlearner.unlearn(rows)
            seconds.append(unlearned.seconds)
            retrained = torch.load(trained.path(retraining), weights_only=True)["state_dict"]
            for name, state in zip(figures, (original, unlearned.state_dict, retrained), strict=True):
                figures[name].append(measure(state, rows))
        row = {"interactions": str(len(rows))}
        for k, metric in enumerate(("HR@10", "NDCG@10", "forget-set AUC")):
            values = {name: np.array(f)[:, k] for name, f in figures.items()}
            row |= {f"{metric} {name}": f"{v.mean():.4f} ± {v.std(ddof=1):.4f}" for name, v in values.items()}
            difference = values["unlearned"].mean() - values["retrained"].mean()
            row[f"{metric} difference"] = f"{difference:+.4f}"
        row["AUC, sd from Retrain"] = f"{difference / values['retrained'].std(ddof=1):+.1f}"
        row["seconds"] = f"{np.median(seconds[-args.seeds :]):.2f}"
        table[f"{ratio:.3%}"] = row
        print(f"{ratio:.3%}", row, flush=True)
    frame = pd.DataFrame.from_dict(table, orient="index")
    epoch = stock_epoch_seconds(config, split, args.retrain_epochs)
    total, unlearning = epoch * config["epochs"], sorted(seconds)[len(seconds) // 2]
    page = (
        f"## {args.dataset}, the paper's setting, {args.seeds} seeds\n\n"
        f"{frame.T.to_markdown(disable_numparse=True)}\n\n"
        f"Stock RecBole: {epoch:.2f} s an epoch with validation (median of {args.retrain_epochs}), {total:.0f} s for "
        f"{config['epochs']} epochs; unlearning {unlearning:.3f} s (median of all): "
        f"{total / unlearning:.0f} times faster.\n"
    )
    print(page)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"paper_ratios-{args.dataset}.md").write_text(page)


if __name__ == "__main__":
    main()
