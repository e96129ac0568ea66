"""Time evaluation and training epochs against stock RecBole at its defaults, in turns; prints a Markdown table.

    python benchmarks/evaluation_speed.py
    python benchmarks/evaluation_speed.py --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml

Both give the same metrics, leave numpy's random stream in the same state, and train the same weights, bit for bit: all
of it is asserted here. An epoch is a pass over the training data, with log and snapshots in ours, and a validation.
"""

import argparse
import copy
import logging
import os
import sys
import tempfile
import warnings
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


def line(what, seconds):
    """A row of the table: medians, and the median and range of the ratios of neighbouring measurements."""
    stock, ours = np.median(seconds, axis=0)
    ratios = np.divide(*np.transpose(seconds))
    spread = f"{np.median(ratios):.1f} ({ratios.min():.1f} to {ratios.max():.1f})"
    print(f"| {what} | {stock:.3f} | {ours:.3f} | {spread} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--config_files", type=lambda text: text.split())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
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

        print(f"{options.dataset}, K = {stock.model.embedding_size}, {threads} threads, {options.rounds} rounds\n")
        print("| | stock, s | ours, s | ratio |\n|---|---|---|---|")
        line("training epoch with validation", np.transpose([seconds for _, _, seconds in runs]))
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
            line(f"evaluation, {name}", seconds)


if __name__ == "__main__":
    main()
