"""The random numbers of retraining, given those of the training that it replaces: a coupling of the two.

Retraining without some rows F is a training like any other: initial weights, an order of the rows in every epoch, and
negatives, each drawn from the pool of its row's user. `Paired` takes them from the original's:

- the initial weights are the same;
- the order is the original's, with the places of F taken by rows from its end; whatever is done with the places of F
  alone, the remaining rows are in a uniformly random order again, since none of them is treated otherwise than another.
  It is cut into batches as training does, so that only the last ones become smaller. Where no order is drawn, the
  remaining rows stay in theirs. With nothing forgotten it is the recorded one;
- a negative of user u becomes one of the items that F gives back to u's pool as often as these are in the new pool,
  and else stays. Where items are drawn by popularity, F's own count less too, in the pools of all users: see `Redraw`.
  Where a user's own items are drawn too (RecBole's ``repeatable``), none is given back.

So its law is retraining's, and what it does not have to change it does not change: other users keep what they were
recommended. Nothing else of this training is random. `Fresh` draws all of it anew.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recbole_unlearn.influence.objective import Redraw
from recbole_unlearn.influence.recorded import Recorded

ORDER, NEGATIVES = range(2)  # what is drawn for an epoch


@dataclass(frozen=True)
class Epoch:
    """What an epoch trains on.

    Attributes:
        order: rows in the order of training, ints; those that are not named are left out.
        bounds: where in it each batch begins, and the end, ints ``[steps + 1]``.
        negatives: item ids, unsigned ``[rows, m]``.
        rates: learning rate of each step, float64 ``[steps]``.
    """

    order: np.ndarray
    bounds: np.ndarray
    negatives: np.ndarray
    rates: np.ndarray

    def steps(self, n_rows: int) -> np.ndarray:
        """Batch of each row, int32 ``[n_rows]``; -1: left out."""
        steps = np.full(n_rows, -1, np.int32)
        steps[self.order] = np.repeat(np.arange(len(self.bounds) - 1, dtype=np.int32), np.diff(self.bounds))
        return steps


class Coupling(ABC):
    """Epochs of retraining without some rows. Iterating gives them; each time the same ones.

    Args:
        recorded: the original's training; its absent rows are left out too.
        gone: rows to be left out, bool ``[rows]``.
        seed: of all that is drawn; a training's, and what tells two couplings of its draws apart.

    Attributes:
        kept: rows that are left, bool ``[rows]``.
        lost: rows that are not, of those that there were when the random numbers were drawn, bool ``[rows]``.
        n_rows: how many there were then.
    """

    def __init__(self, recorded: Recorded, gone: np.ndarray, seed: int | tuple[int, ...]) -> None:
        self.recorded, self.seed = recorded, (seed,) if isinstance(seed, int) else seed
        self.kept = recorded.present() & ~gone
        there = np.ones(len(gone), bool) if recorded.drawn is None else recorded.drawn
        self.lost = there & ~self.kept  # since the negatives were drawn
        self.n_rows = int(np.count_nonzero(there))

    def __len__(self) -> int:
        return len(self.recorded.negatives)

    def __iter__(self) -> Iterator[Epoch]:
        return map(self.epoch, range(len(self)))

    def epoch(self, number: int) -> Epoch:
        """One of them."""
        order, size = self.order(number), self.recorded.batch_rows
        bounds = np.append(np.arange(0, len(order), size), len(order))
        return Epoch(order, bounds, self.negatives(number), self.recorded.rates_of(number, len(bounds) - 1))

    def order(self, number: int) -> np.ndarray:
        """An epoch's order alone."""
        fixed = self.recorded.fixed_order
        return self._order(number) if fixed is None else fixed[self.kept[fixed]]

    def negatives(self, number: int) -> np.ndarray:
        """An epoch's negatives alone."""
        return self._negatives(number, self._rng(0 if self.recorded.static else number, NEGATIVES))

    def recorded_anew(self) -> Recorded:
        """What would be recorded of this training: another one can be coupled to it."""
        counted = self.recorded.counted_without(self.lost)
        return replace(counted, negatives=_Drawn(self), order=self.order, absent=~self.kept, drawn=self.kept)

    def _rng(self, number, what):
        return np.random.default_rng([self.seed[0], number, what, *self.seed[1:]])

    @abstractmethod
    def _order(self, number) -> np.ndarray: ...

    @abstractmethod
    def _negatives(self, number, rng) -> np.ndarray: ...


class Paired(Coupling):
    """Retraining by the original's random numbers, as far as these fit; see the module."""

    def __init__(self, recorded: Recorded, gone: np.ndarray, seed: int | tuple[int, ...] = 0) -> None:
        super().__init__(recorded, gone, seed)
        self.redraw = None
        if recorded.returns or recorded.popularity is not None:
            there = np.flatnonzero(self.lost | self.kept)
            # where a user's own items are drawn too, but for that of the row itself, each row has a pool of its own
            owners = np.asarray(recorded.users)[there] if recorded.returns else np.arange(len(there))
            data = owners, np.asarray(recorded.pos)[there], self.lost[there]
            weights = recorded.weights, recorded.counted_without(self.lost).weights
            self.redraw = Redraw(*data, recorded.n_items, *weights)
            self.redraw.rows = there[self.redraw.rows]

    def order(self, number: int) -> np.ndarray:
        known = None if self.lost.any() else self._recorded_order(number)
        return super().order(number) if known is None else known[self.kept[known]]

    def _recorded_order(self, number):
        return self.recorded.order(number) if self.recorded.order else None

    def _order(self, number):
        order = self._recorded_order(number)
        if order is None:
            order = self._rng(number, ORDER).permutation(len(self.kept))
        n_left = int(np.count_nonzero(self.kept[order]))
        order, tail = order[:n_left].copy(), order[n_left:]
        order[~self.kept[order]] = tail[self.kept[tail]]
        return order

    def _negatives(self, number, rng):
        negatives = self.recorded.negatives[number]
        if self.redraw is None or not len(self.redraw.rows):
            return negatives
        return self.redraw(np.array(negatives), rng)


class Fresh(Coupling):
    """Retraining by random numbers of its own: nothing of the original's is left.

    Args:
        draw: negatives of users ``[n]``, as many each, from a random generator: ints ``[n, m]``; see `data.sampling`.
        epochs: how many; default: as many as were recorded. Of more than that, the last one's learning rate holds on.
        others: as for `Coupling`; the seed should be the operating system's, and secret.
    """

    def __init__(
        self,
        recorded: Recorded,
        gone: np.ndarray,
        seed: int,
        draw: Callable[[np.ndarray, int, np.random.Generator], np.ndarray],
        epochs: int | None = None,
    ) -> None:
        if recorded.rates is not None:
            known, last = recorded.rates, len(recorded.negatives) - 1
            recorded = replace(recorded, rates=lambda number: known(min(number, last)))
        super().__init__(recorded, gone, seed)
        self.draw = draw
        self.n_rows = int(np.count_nonzero(self.kept))
        self.n_epochs = len(recorded.negatives) if epochs is None else epochs

    def __len__(self):
        return self.n_epochs

    def first(self, epochs: int) -> "Fresh":
        """The same, of its first epochs alone."""
        new = copy(self)
        new.n_epochs = epochs
        return new

    def _order(self, number):
        return self._rng(number, ORDER).permutation(np.flatnonzero(self.kept))

    def _negatives(self, number, rng):
        negatives = np.zeros_like(self.recorded.negatives[0])
        negatives[self.kept] = self.draw(np.asarray(self.recorded.users)[self.kept], self.recorded.m, rng)
        return negatives


class Recounted:
    """Negatives by popularity before and after some rows go, of one training: as few change as the two laws allow.

    For ways that do not train again. Retraining would draw other negatives for all users, where items count less than
    in the log. After earlier requests the log's are of a law that holds no more: these begin with what their absent
    rows left.

    Args:
        recorded: the training.
        gone: rows that go, bool ``[rows]``.
        seed: as of `Paired`; what the first request changes is what its exact retraining would.
    """

    def __init__(self, recorded: Recorded, gone: np.ndarray, seed: tuple[int, ...]) -> None:
        self.before = Paired(recorded, np.zeros_like(gone), seed).recorded_anew()
        absent = int(np.count_nonzero(~recorded.present()))
        self.after = Paired(self.before, gone, (*seed, absent) if absent else seed)

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All negatives before, ``[rows, m]``, remaining rows in which some change, and their negatives after."""
        before, after = self.before.negatives[number], self.after.negatives(number)
        changed = np.flatnonzero((before != after).any(1) & self.after.kept)
        return before, changed, after[changed]


class _Drawn(Sequence[np.ndarray]):
    """The negatives of a coupling's epochs, drawn when they are asked for."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling

    def __len__(self) -> int:
        return len(self.coupling)

    def __getitem__(self, number: Any) -> Any:
        return self.coupling.negatives(number)
