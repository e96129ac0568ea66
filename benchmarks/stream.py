"""A thousand single requests, one after the other, against retraining without them, over seeds.

    python benchmarks/stream.py --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml

Trained models are cached in --cache, together with those of the other benchmarks.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.trained import Checkpoint
from recbole_unlearn.trainer import BPRTrainer
from recbole_unlearn.training import new_model
from recbole_unlearn.unlearner import InfluenceUnlearner


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--config_files", default="")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", default="saved/fidelity")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--output", default="results/stream")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    files = args.config_files.split()
    trained = TrainedSeeds(("BPR", args.dataset, files, {"data_path": args.data_path}), args.cache, args.processes)
    config, split = trained.config, trained.split
    rows = ForgetRequest("count", args.requests).rows(split)
    order = np.random.default_rng(1).permutation(rows)
    first = config["seed"]
    originals = [SeedRun(first + n, (), True) for n in range(args.seeds)]
    retrainings = [SeedRun(first + n, tuple(map(int, rows))) for n in range(args.seeds)]
    trained.train(originals + retrainings)
    model = new_model(config, split)
    trainer = BPRTrainer(config, model)
    trainer.eval_collector.data_collect(split.train)

    def measure(state):
        model.load_state_dict(state)
        found = ranking.evaluate(trainer, model, split, config["seed"], protocols={"full": 0})["full"]
        metrics = {name: found[f"{key}@10"] for name, key in (("HR@10", "hit"), ("NDCG@10", "ndcg"))}
        return {"forget-set AUC": forgetting.percentiles(model, split, rows).mean(), **metrics}

    figures, seconds, replays = {"original": [], "unlearned": [], "retrained": []}, [], []
    for original, retrained in zip(originals, retrainings, strict=True):
        session = InfluenceUnlearner(Checkpoint.written(trained.path(original), config).trained(split))
        session.warm_up()
        replays.append(0)
        for row in tqdm(order, "Requests", ncols=100):
            served = session.forget_rows([row])
            seconds.append(served.seconds)
            replays[-1] += served.details["all_rows"]
        figures["original"].append(measure(session.trained.stored["state_dict"]))
        figures["unlearned"].append(measure(session.state_dict))
        figures["retrained"].append(measure(torch.load(trained.path(retrained), weights_only=True)["state_dict"]))
    table = {}
    for name in figures["original"][0]:
        values = {of: np.array([each[name] for each in found]) for of, found in figures.items()}
        table[name] = {of: f"{v.mean():.4f} ± {v.std(ddof=1):.4f}" for of, v in values.items()}
        gap, spread = values["unlearned"].mean() - values["retrained"].mean(), values["retrained"].std(ddof=1)
        table[name]["sd from Retrain"] = f"{gap / spread:+.1f}"
    page = (
        f"## {args.dataset}, {Path(args.config_files).stem or 'default'} BPR, {args.requests} requests one by one, "
        f"{args.seeds} seeds\n\n{pd.DataFrame(table).T.to_markdown()}\n\n"
        f"Seconds a request: {np.median(seconds):.3g} (median), {np.max(seconds):.3g} (longest); all rows replayed "
        f"{np.mean(replays):.1f} times in a stream.\n"
    )
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{args.dataset}-{Path(args.config_files).stem or 'default'}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
