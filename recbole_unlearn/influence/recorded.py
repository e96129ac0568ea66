"""What was recorded of a training, to run it again: its triples, how Adam was set, and its weights along the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from recbole_unlearn.influence.threads import parallel

GAMMA = 1e-10  # of RecBole's BPRLoss


@dataclass(frozen=True)
class Adam:
    """Hyperparameters of the optimiser to run again, as torch.optim.Adam names them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Adam":
        """Those of a group of torch's parameters; ``SparseAdam`` has no weight decay."""
        beta1, beta2 = group["betas"]
        return cls(group["lr"], beta1, beta2, group["eps"], group.get("weight_decay", 0.0))

    def numbers(self) -> tuple[float, ...]:
        """The fields as kernels take them."""
        return tuple(float(value) for value in astuple(self))


@dataclass(frozen=True)
class Recorded:
    """A training as far as it was recorded, but for its weights.

    Attributes:
        users, pos: anchors, ints ``[rows]``, grouped by user.
        negatives: the sampled item ids of each epoch, unsigned ``[rows, m]``.
        n_users, n_items: sizes of the id spaces.
        optimizer: as in training; None: no Adam.
        batch_triples: triples of a training batch.
        popularity: number of interactions of each item id by which negatives were drawn; None: uniform over
            1..n_items-1.
        alpha: an item's weight is its popularity to this power.
        absent: rows that were taken away since, bool ``[rows]``.
        drawn: rows that were there when the negatives were drawn, bool ``[rows]``; default: all.
        order: epoch -> all rows, absent ones too, in the order in which they were trained on, or None; default: not
            known.
        fixed_order: rows in the order in which every epoch takes those that are there; None: each epoch draws an order.
        rates: epoch -> learning rate of each of its steps, float64 ``[steps]``; default: the optimiser's, always.
            Where there are more steps than rates, the last one holds on.
        static: whether all epochs have the same negatives.
        returns: whether a user's items are never drawn as negatives, so that forgotten ones come back.
    """

    users: np.ndarray
    pos: np.ndarray
    negatives: Sequence[np.ndarray]
    n_users: int
    n_items: int
    optimizer: Adam | None
    batch_triples: int
    popularity: np.ndarray | None = None
    absent: np.ndarray | None = None
    drawn: np.ndarray | None = None
    order: Callable[[int], np.ndarray | None] | None = None
    rates: Callable[[int], np.ndarray] | None = None
    static: bool = False
    returns: bool = True
    alpha: float = 1.0
    fixed_order: np.ndarray | None = None

    @cached_property  # negatives may be drawn when they are asked for
    def m(self) -> int:
        """Negatives of a row."""
        return self.negatives[0].shape[1]

    @property
    def batch_rows(self) -> int:
        """Rows of a training batch."""
        return max(self.batch_triples // max(self.m, 1), 1)

    @property
    def adam(self) -> Adam:
        """The optimiser, where it is known to be Adam."""
        if self.optimizer is None:
            raise ValueError("the training was not one by Adam")
        return self.optimizer

    @property
    def weights(self) -> np.ndarray | None:
        """By which items are drawn as negatives, float64 ``[n_items]``; None: uniformly."""
        return None if self.popularity is None else popularity_weights(self.popularity, self.alpha)

    def counted_without(self, gone: np.ndarray) -> "Recorded":
        """The same with popularity counted anew, without some rows, bool ``[rows]``."""
        if self.popularity is None:
            return self
        return replace(self, popularity=self.popularity - np.bincount(self.pos[gone], minlength=self.n_items))

    def ordered(self) -> bool:
        """Whether the order of every epoch is known."""
        return self.order is not None and all(self.order(epoch) is not None for epoch in range(len(self.negatives)))

    def present(self) -> np.ndarray:
        """Rows that are not absent, bool ``[rows]``."""
        return np.ones(len(self.users), bool) if self.absent is None else ~np.asarray(self.absent, bool)

    def rates_of(self, epoch: int, n_steps: int) -> np.ndarray:
        """Learning rate of each step of an epoch, ``[n_steps]``."""
        rates = np.full(n_steps, self.adam.lr) if self.rates is None else self.rates(epoch)
        return np.append(rates, np.full(max(n_steps - len(rates), 0), rates[-1]))[:n_steps]


def marked(n: int, rows: Any) -> np.ndarray:
    """Which of n rows are these, bool ``[n]``."""
    found = np.zeros(n, bool)
    found[rows] = True
    return found


def popularity_weights(count: np.ndarray, alpha: float) -> np.ndarray:
    """``count ** alpha``, by which RecBole draws items that occur, float64; 0 of others."""
    return np.where(count > 0, np.maximum(count, 1.0) ** alpha, 0.0)


def steps_made(bounds: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where batches begin, and the rate of each, without those of which nothing is left: they make no step."""
    bounds = np.asarray(bounds, np.int64)
    full = np.diff(bounds) > 0
    return np.append(bounds[:-1][full], bounds[-1]), np.asarray(rates, np.float64)[full]


def single(array: np.ndarray) -> np.ndarray:
    """A copy in float32: torch converts float16 fifty times faster than numpy, but not from read-only memory."""
    return torch.from_numpy(np.array(array)).float().numpy()


@parallel
def _interpolate(begin, end, start, rise, part, out):
    for k in range(np.uint64(begin), np.uint64(end)):
        out[k] = start[k] + part * rise[k]


class Trajectory:
    """Weights over the course of training, interpolated between snapshots.

    Args:
        epochs: increasing, the first 0 (initialisation), the last the number of epochs trained.
        weights: flat, ``[size]`` of any float type, one an epoch named.
    """

    def __init__(self, epochs: Sequence[int], weights: Sequence[np.ndarray]) -> None:
        if len(epochs) < 2 or epochs[0] != 0 or list(epochs) != sorted(set(epochs)):
            raise ValueError("a trajectory needs snapshots in order, of initialisation and end at least")
        self.epochs = list(epochs)
        self.weights = weights
        self._interval: tuple[int, np.ndarray, np.ndarray] | None = None  # number, start and rise of the last one used

    def at(self, time: float, out: np.ndarray | None = None) -> np.ndarray:
        """Weights at a time in epochs: float32 ``[size]``, written to ``out`` if given."""
        k = int(np.clip(np.searchsorted(self.epochs, time, "right"), 1, len(self.epochs) - 1))
        if self._interval is None or self._interval[0] != k:
            start = single(self.weights[k - 1])
            self._interval = k, start, single(self.weights[k]) - start
        _, start, rise = self._interval
        part = np.float32((time - self.epochs[k - 1]) / (self.epochs[k] - self.epochs[k - 1]))
        out = np.empty_like(start) if out is None else out
        _interpolate(len(out), start, rise, part, out)
        return out
