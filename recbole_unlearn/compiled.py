"""Epochs of a trainer by compiled kernels, where ``compiled: True`` asks for it: RecBole's draws, logs, validation and
checkpoints, to weights that are its own up to rounding."""

from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.model.general_recommender import BPR, LightGCN
from recbole.trainer import Trainer

from recbole_unlearn.compat.recbole_models import clear_caches
from recbole_unlearn.data.sampling import Played
from recbole_unlearn.devices import array
from recbole_unlearn.influence.dot_product import DotProductTraining
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.propagated_training import GraphLoss, PropagatedTraining
from recbole_unlearn.influence.recorded import Adam


def refusal(trainer: Trainer, loader: TrainDataLoader) -> str | None:
    """Why a training cannot be compiled, in words; None where it can."""
    config, group = trainer.config, trainer.optimizer.param_groups[0]
    if type(trainer.model) not in (BPR, LightGCN):
        return f"it is for BPR and LightGCN, not for {type(trainer.model).__name__}"
    if config["learner"] != "adam" or group.get("amsgrad") or config["clip_grad_norm"]:
        return "it is for plain Adam, without clipped gradients"
    if not config["single_spec"] or trainer.enable_amp:
        return "it is for one process, in float32"
    if not Played.fits(loader):
        return "batches hold more than a user, an item and negatives"
    if trainer.start_epoch:
        return "a training cannot go on in this way, only begin"
    return None


class CompiledEpochs:
    """What trains a trainer's model, an epoch a call; the model and the optimiser's state are up to date after each.

    Args:
        trainer: before its first epoch.
        loader: of its training data.
    """

    def __init__(self, trainer: Trainer, loader: TrainDataLoader) -> None:
        self.model, self.optimizer, data = trainer.model, trainer.optimizer, loader._dataset
        self.users, self.items = (data.inter_feat[name].numpy() for name in (data.uid_field, data.iid_field))
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        adam = Adam(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        self.parameters: list[torch.Tensor] = list(self.model.parameters())
        start, n_users = np.concatenate([array(value) for value in self.parameters]), len(self.parameters[0])
        if isinstance(self.model, LightGCN):
            loss = GraphLoss(self.model.n_layers, float(self.model.reg_weight), bool(self.model.require_pow))
            graph = Graph(self.users, self.items, n_users, len(start) - n_users, loss.layers)
            self.training: Any = PropagatedTraining(graph, start, adam, loss, n_users)
        else:
            self.training = DotProductTraining(start, n_users, adam)

    def __call__(self, recorded: Any, rates: list[float]) -> float:
        """Train on what a loader draws; returns the sum of the batches' losses.

        Args:
            recorded: the loader, which writes down what it yields (`trainer._Recorded`).
            rates: takes the learning rate of each step.
        """
        recorded.keep = True
        n_steps = sum(1 for _ in recorded)
        rates += [self.optimizer.param_groups[0]["lr"]] * n_steps
        step, drawn = recorded.step[recorded.position], recorded.drawn[recorded.position]
        order = np.argsort(step, kind="stable")
        bounds = np.searchsorted(step[order], np.arange(n_steps + 1))
        loss = self.training.epoch(self.users, self.items, drawn, order, bounds, np.array(rates), with_loss=True)
        self._write_back()
        return loss

    def _write_back(self):
        sizes = [len(value) for value in self.parameters]
        parts = [
            torch.from_numpy(np.array(each)).split(sizes)
            for each in (self.training.W, self.training.M, self.training.V)
        ]
        with torch.no_grad():
            for value, now, first, second in zip(self.parameters, *parts, strict=True):
                value.copy_(now)
                state = self.optimizer.state[value]
                state["step"] = torch.tensor(float(self.training.steps))
                state["exp_avg"], state["exp_avg_sq"] = first.to(value.device), second.to(value.device)
        clear_caches(self.model)
