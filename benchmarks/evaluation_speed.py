"""Time evaluation and training epochs against stock RecBole at its defaults, in turns.

    python benchmarks/evaluation_speed.py
    python benchmarks/evaluation_speed.py --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml

Both give the same metrics, leave numpy's random stream in the same state, and train the same weights, bit for bit: all
of it is asserted here. An epoch is a pass over the training data, with log and snapshots in ours, and a validation.
The table is printed, and written to --output.
"""

import argparse
import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.model.general_recommender.bpr import BPR
from recbole.trainer.trainer import Trainer
from recbole.utils import init_seed

from recbole_unlearn.trainer import BPRTrainer

KINDS = (Trainer, BPRTrainer)


def train(options, settings, kind):
    """A trainer with its data, after an epoch and with the seconds of each later one and its validation."""
    config = Config("BPR", options.dataset, options.config_files, copy.deepcopy(settings))
    init_seed(config["seed"], config["reproducibility"])
    data, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    trainer = kind(config, BPR(config, data._dataset))
    marks = []
    trainer.fit(data, valid, verbose=False, saved=False, callback_fn=lambda *_: marks.append(perf_counter()))
    return trainer, test, np.diff(marks)


def evaluate(trainer, loader):
    np.random.seed(trainer.config["seed"])
    start = perf_counter()
    result = trainer.evaluate(loader, load_best_model=False)
    return perf_counter() - start, (result, np.random.random())


def ratios(seconds):
    """Medians of stock and ours, and median, smallest and largest ratio of neighbouring measurements."""
    stock, ours = np.median(seconds, axis=0)
    found = np.divide(*np.transpose(seconds))
    return {"stock, s": stock, "ours, s": ours, "ratio": np.median(found), "from": found.min(), "to": found.max()}


def line(what, found):
    return (
        f"| {what} | {found['stock, s']:.3f} | {found['ours, s']:.3f} | "
        f"{found['ratio']:.1f} ({found['from']:.1f} to {found['to']:.1f}) |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--config_files", type=lambda text: text.split())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="results/speed")
    options = parser.parse_args()
    output = Path(options.output).resolve()
    sys.argv = sys.argv[:1]  # RecBole reads it
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()

    with tempfile.TemporaryDirectory() as folder:
        settings = {"checkpoint_dir": folder, "epochs": options.rounds + 1, "show_progress": False}
        if options.data_path:
            settings["data_path"] = os.path.abspath(options.data_path)
        os.chdir(folder) if options.config_files is None else None
        runs = [train(options, settings, kind) for kind in KINDS]
        (stock, test, _), (ours, _, _) = runs
        for name, weight in stock.model.state_dict().items():
            assert torch.equal(weight, ours.model.state_dict()[name]), name
        assert stock.best_valid_result == ours.best_valid_result

        table = {"training epoch with validation": ratios(np.transpose([seconds for _, _, seconds in runs]))}
        sampled = copy.deepcopy(stock.config)
        sampled["test_neg_sample_args"] = {"distribution": "uniform", "sample_num": 99}
        loaders = {
            "full ranking": FullSortEvalDataLoader(stock.config, test._dataset, test._sampler),
            "99 sampled": NegSampleEvalDataLoader(sampled, test._dataset, test._sampler),
        }
        for name, loader in loaders.items():
            evaluate(ours, loader)  # compiles
            seconds = []
            for _ in range(options.rounds):
                (slow, expected), (fast, result) = (evaluate(trainer, loader) for trainer in (stock, ours))
                assert result == expected, (result, expected)
                seconds.append((slow, fast))
            table[f"evaluation, {name}"] = ratios(seconds)
    name = f"{options.dataset}-{Path(options.config_files[0]).stem if options.config_files else 'default'}"
    head = f"{name}, K = {stock.model.embedding_size}, {threads} threads, {options.rounds} rounds"
    lines = [head, "", "| | stock, s | ours, s | ratio |", "|:---|:---|:---|:---|"]
    text = "\n".join([*lines, *(line(*row) for row in table.items()), ""])
    output.mkdir(parents=True, exist_ok=True)
    (output / f"evaluation-{name}.md").write_text(text)
    (output / f"evaluation-{name}.json").write_text(json.dumps(table, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
