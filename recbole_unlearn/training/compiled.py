"""Epochs of a trainer by compiled kernels, where ``compiled: True`` asks for it: RecBole's draws, logs, validation and
checkpoints, to weights that are its own up to rounding."""

from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.general_recommender import BPR, LightGCN
from recbole.trainer import Trainer

from recbole_unlearn.compat.recbole_models import clear_caches
from recbole_unlearn.data.sampling import Played
from recbole_unlearn.devices import array
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Epoch
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


def training_of(
    model: AbstractRecommender, pairs: tuple[np.ndarray, np.ndarray], start: np.ndarray, adam: Adam, stride: int = 1
) -> DotProductTraining | PropagatedTraining:
    """The kernels that train a BPR or LightGCN.

    Args:
        model: says which, and its loss.
        pairs: users and items that a graph is made of, ints ``[n]``.
        start: initial weights, ``[n_users + n_items, K]``.
        adam: as in training.
        stride: steps to make at once, of a LightGCN that is approximated in this way.
    """
    if not isinstance(model, LightGCN):
        return DotProductTraining(start, model.n_users, adam)
    loss = GraphLoss(model.n_layers, float(model.reg_weight), bool(model.require_pow))
    graph = Graph(*pairs, model.n_users, model.n_items, loss.layers)
    return PropagatedTraining(graph, start, adam, loss, model.n_users, stride)


def adam_states(sizes: list[int], first: np.ndarray, second: np.ndarray, steps: int) -> list[dict[str, torch.Tensor]]:
    """What torch's Adam keeps of parameters of so many rows each: both moments, ``[rows, K]``, and its steps."""
    parts = (torch.from_numpy(np.array(each)).split(sizes) for each in (first, second))
    return [
        {"step": torch.tensor(float(steps)), "exp_avg": one.clone(), "exp_avg_sq": other.clone()}
        for one, other in zip(*parts, strict=True)
    ]


class CompiledEpochs:
    """What trains a trainer's model, an epoch a call; the model and the optimiser's state are up to date after each.

    Args:
        trainer: before its first epoch.
        loader: of its training data.

    Raises:
        InputError: the training cannot be compiled.
    """

    def __init__(self, trainer: Trainer, loader: TrainDataLoader) -> None:
        if reason := refusal(trainer, loader):
            raise InputError(f"compiled: {reason}; leave compiled out")
        self.model, self.optimizer, data = trainer.model, trainer.optimizer, loader._dataset
        self.users, self.items = (data.inter_feat[name].numpy() for name in (data.uid_field, data.iid_field))
        self.parameters: list[torch.Tensor] = list(self.model.parameters())
        start, adam = (
            np.concatenate([array(value) for value in self.parameters]),
            Adam.of(trainer.optimizer.param_groups[0]),
        )
        self.training = training_of(self.model, (self.users, self.items), start, adam)

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
        epoch = Epoch(order, bounds, drawn, np.array(rates))
        loss = self.training.epoch(self.users, self.items, epoch, with_loss=True)
        assert loss is not None
        self._write_back()
        return loss

    def _write_back(self):
        training, sizes = self.training, [len(value) for value in self.parameters]
        states = adam_states(sizes, training.M, training.V, training.steps)
        weights = torch.from_numpy(np.array(training.W)).split(sizes)
        with torch.no_grad():
            for value, now, state in zip(self.parameters, weights, states, strict=True):
                value.copy_(now)
                moments = {name: state[name].to(value.device) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[value] = {**state, **moments}
        clear_caches(self.model)
