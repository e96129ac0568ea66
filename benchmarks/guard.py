"""How far replay with nothing forgotten ends from the stored weights: of trainings that their log tells, and of others.

    python benchmarks/guard.py
    python benchmarks/guard.py --dataset=ml-1m --data_path=PATH --seeds=1

Each training of BPR runs over settings and seeds as it is, and with something that no log holds. The limit of the guard
(recbole_unlearn/unlearners/guard.py) lies between. Also what the check costs, over the training's seconds. Writes
--output.
"""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import common
import numpy as np
import pandas as pd
import torch
from common import DATA, RESULTS, takes

from recbole_unlearn.comparison.seeds import opened
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.training.trainer import BPRTrainer
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.guard import LIMIT
from recbole_unlearn.unlearners.replay import Replay

PAPER = {"embedding_size": 8, "learning_rate": 0.01, "train_neg_sample_args": {"sample_num": 4}}
SETTINGS = {
    "K = 64, RecBole's defaults": {},
    "K = 8, 4 negatives, rate .01": PAPER,
    "static negatives, weight decay": {"negatives": "static", "weight_decay": 1e-5},
}


def scaled(trainer, epoch, epochs):
    """Weights scaled by one percent, once."""
    if epoch == epochs // 2:
        with torch.no_grad():
            for value in trainer.model.parameters():
                value.mul_(1.01)


def state_reset(trainer, epoch, epochs):
    """Adam's moments forgotten half-way."""
    if epoch == epochs // 2:
        trainer.optimizer.state.clear()


def weights_back(trainer, epoch, epochs):
    """An epoch's weights put back after the next: as by a second fit from the best model."""
    if epoch == epochs // 2:
        trainer.kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    if epoch == epochs // 2 + 1:
        trainer.model.load_state_dict(trainer.kept)


def items_held(trainer, epoch, epochs):
    """A hook that holds the items still in one step of ten."""
    if epoch == 0:
        count = iter(range(10**9))
        weight = trainer.model.item_embedding.weight
        weight.register_hook(lambda grad: grad * (next(count) % 10 != 0))


def decayed(trainer, epoch, epochs):
    """Weights made one per mille smaller after each epoch."""
    with torch.no_grad():
        for value in trainer.model.parameters():
            value.mul_(0.999)


OTHERS = {
    "as the log tells": None,
    "learning rate .98 a epoch (noted in the log)": "schedule",
    "weights times 1.01, once": scaled,
    "Adam's state reset half-way": state_reset,
    "one epoch undone": weights_back,
    "a hook holds items in every tenth step": items_held,
    "weights times .999 after each epoch": decayed,
}


class Meddled(BPRTrainer):
    """The trainer, with something done after each epoch that no log holds."""

    meddle = None

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        if self.meddle and epoch_idx == 0:
            self.meddle(self, 0, self.epochs)
        loss = super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)
        if self.meddle and epoch_idx:
            self.meddle(self, epoch_idx, self.epochs)
        return loss


def distance(config, split, other, seed, folder):
    """Distance of the replay, the same from the rounded start, what it took over the training and over a request."""
    config["checkpoint_dir"] = str(folder)
    loader = split.remaining(np.empty(0, np.int64), seed)
    trainer = Meddled(config, new_model(config, split, seed))
    trainer.saved_model_file = str(Path(folder) / "model.pth")
    if callable(other):
        trainer.meddle = other
    elif other == "schedule":
        schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.98)
        trainer.meddle = lambda *_: schedule.step()
    start = perf_counter()
    trainer.fit(loader, verbose=False)
    trained = perf_counter() - start
    opened = Checkpoint.written(trainer.saved_model_file, config).trained(split, seed)
    unlearner = InfluenceUnlearner(opened, Replay("all"))
    unlearner.warm_up()
    start = perf_counter()
    (far, _), checked = unlearner.problem.reproduction(), perf_counter() - start
    rounded, _ = InfluenceUnlearner(replace(opened, initial=None), Replay("all")).problem.reproduction()
    return far, rounded, checked / trained, checked / unlearner.unlearn(np.arange(200)).seconds


@takes(dataset=DATA["dataset"], data_path=DATA["data_path"], epochs=30, seeds=2, output=RESULTS / "guard")
def guard(options):
    logging.disable(logging.WARNING)
    rows, costs = [], []
    for name, keys in SETTINGS.items():
        given = {"epochs": options.epochs, "eval_step": 0, "state": "ERROR", "data_path": options.data_path, **keys}
        config, split = opened(("BPR", options.dataset, None, given))
        found = {}
        for what, other in OTHERS.items():
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as folder:
                    far, rounded, *cost = distance(config, split, other, 2020 + seed, folder)
                found.setdefault(what, []).append(far)
                print(f"{name}; {what}; seed {2020 + seed}: {far:.2g}", flush=True)
                if other is None:
                    found.setdefault(f"{what}, from the start as the log keeps it (float16)", []).append(rounded)
                    costs.append(cost)
        rows.append({"training": name, **{what: " ".join(f"{x:.2g}" for x in each) for what, each in found.items()}})
    table = pd.DataFrame(rows).set_index("training").T.to_markdown()
    of_training, of_request = zip(*costs, strict=True)
    shown = f"{min(of_training):.0%} to {max(of_training):.0%}"
    page = (
        f"# The guard, BPR on {options.dataset}\n\n`python benchmarks/guard.py --dataset={options.dataset} "
        f"--epochs={options.epochs} --seeds={options.seeds}`; distance of the replay with nothing forgotten from the "
        "stored weights, over the way that training moved them, one number a seed. Allowed are at most "
        f"{LIMIT:g}.\n\n{table}\n\n"
        f"The check, once a log, takes {shown} of the seconds of the training that it checks (this package's trainer, "
        f"without validation), and {min(of_request):.2f} to {max(of_request):.2f} times a request that replays all "
        "rows, in turn in one process.\n"
    )
    figures = {"of training": float(np.median(of_training)), "of a replay": float(np.median(of_request))}
    common.write_json(options.output.parent / f"speed/guard-{options.dataset}.json", figures)
    common.write(page, options.output.parent, f"{options.output.name}-{options.dataset}")


if __name__ == "__main__":
    common.run(__doc__, [guard])
