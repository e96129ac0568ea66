"""What problems and ways agree on.

A *problem* is a model's training, seen from the rows that are to be forgotten: what they did to the loss, how curved it
is on what remains, how it is trained again. A *way* is how to get from there to weights that have forgotten. Which way
serves which problem, `choose` says.
"""

import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.compat.recbole_models import is_recboles
from recbole_unlearn.data.sampling import PoolDraw
from recbole_unlearn.devices import array, copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Coupling, Fresh, Paired, Recounted
from recbole_unlearn.influence.recorded import Recorded, marked
from recbole_unlearn.influence.sharding import Shard
from recbole_unlearn.models.losses import fixed_randomness
from recbole_unlearn.storage.triple_log import snapshot_due
from recbole_unlearn.training.again import Again, Beginning, trained_again
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trained import Trained

SEEN = 8192  # rows whose loss tells whether a step holds
# Back to where it began, and as far beyond: of what was tried (docs/method.md), training again moved no row farther.
FARTHEST = 2.0


@dataclass
class NewTraining:
    """The training whose weights an exact request gives.

    Attributes:
        epochs: what it trained on.
        start: where it began: initial weights, float32 ``[rows, K]``, or the `Beginning` of any model.
        optimizer: state of its optimiser at its end, by number of the parameter, as torch gives it.
        model: that it trained, where it was not by kernels.
        seed: of what that model drew when it was built; None: the original's.
        validated: plain values of what validation chose; empty where it did not.
    """

    epochs: Coupling
    start: Any
    optimizer: dict[int, dict[str, torch.Tensor]]
    model: AbstractRecommender | None = None
    seed: int | None = None
    validated: dict[str, Any] = field(default_factory=dict)


@dataclass
class Unlearned:
    """Result of one request.

    Attributes:
        state_dict: the new weights; load them into a model of the same class.
        method: 'reoptimise', 'replay' or 'influence'.
        seconds: from the request to the weights, log reading included.
        details: plain values: why this method (``chosen``), what it did, and how its solver fared.
        snapshots: number of epochs -> flat weights that have forgotten, for the next request's trajectory.
        training: that the weights are of, where they are exact.
        model: the model to serve, once the request was applied.
    """

    state_dict: dict[str, torch.Tensor]
    method: str
    seconds: float
    details: dict[str, Any]
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)
    training: NewTraining | None = None
    model: AbstractRecommender | None = None

    @property
    def why(self) -> str:
        """In words, why it was done in this way."""
        return self.details["chosen"]

    def report(self) -> dict[str, Any]:
        """Everything but weights, as plain values."""
        return {"method": self.method, "seconds": self.seconds, **self.details}


@dataclass
class Change:
    """What a way found.

    Attributes:
        step: change of the weights, flat or in rows, float64.
        details, snapshots, training: as of `Unlearned`.
        state_dict: the new weights, where they are known themselves, what is no parameter included.
    """

    step: np.ndarray | torch.Tensor
    details: dict[str, Any]
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)
    training: NewTraining | None = None
    state_dict: dict[str, torch.Tensor] | None = None


class Way(Protocol):
    """A way to forget: frozen settings, and what it does with a problem."""

    name: ClassVar[str]

    def refuses(self, problem: Any) -> str | None:
        """Why it is not valid for a problem, in words; None where it is."""

    def warm_up(self, problem: Any) -> None:
        """Load (or, the very first time, compile) what a request needs, so that it is timed without."""

    def forget(self, problem: Any, rows: np.ndarray, show_progress: bool = False) -> Change:
        """The change of the weights without some rows of the log (sorted int64); the problem stays as it is."""
        ...


class Problem(ABC):
    """A model's training, and what requests have left of it. The model and the log are only read.

    Attributes:
        trained: the training.
        absent: rows of the log that requests before the next one have taken away, bool ``[rows]``.
        snapshots: number of epochs -> flat weights.
    """

    name: str
    derived: bool = True  # whether its closed forms are known
    schedules: bool = False  # whether its replay takes a learning rate for each step
    no_step: str | None = None  # in words, why no influence step can be taken
    shared: bool = False  # whether ranks share it
    shard: Shard  # of a problem that ranks share
    recorded: Recorded  # the training that a next one is coupled to

    def __init__(self, trained: Trained):
        self.trained = trained
        self.config, self.split, self.log = trained.config, trained.split, trained.log
        self.epochs = trained.epochs
        if not 1 <= self.epochs <= self.log.n_epochs:
            raise InputError(
                f"the checkpoint was written after epoch {self.epochs}, the triple log holds {self.log.n_epochs}; "
                "train again"
            )
        self.absent = np.zeros(self.log.n_rows, bool)
        self.snapshots: dict[int, np.ndarray] = {}
        self._metrics: dict[Any, torch.Tensor | float] = {}
        self.weight_decay = float(self.config["weight_decay"] or 0)

    @abstractmethod
    def not_replayed(self, rows: str) -> str | None:
        """In words, why training cannot be run again; None where it can. ``rows``: which, see `Replay`."""

    def out_of_order(self) -> str | None:
        """In words, why the order in which unshuffled rows are trained again is not known; None where it is."""
        order = self.recorded.fixed_order
        if order is None or self.split.in_order:
            return None
        steps = (self.log.steps(epoch) for epoch in range(self.epochs))
        if all(each is not None and (np.diff(each[order].astype(np.int64)) >= 0).all() for each in steps):
            return None
        return (
            "shuffle: False trains in the order of the data, which the earlier version that froze them (purge_dataset) "
            "did not keep; train anew"
        )

    def not_validated(self) -> str | None:
        """In words, why validation cannot choose how many epochs are trained again; None where it can."""
        if not len(self.split.valid):
            return "there is no validation data to choose an epoch by"
        rates = [self.log.rates(epoch) for epoch in range(self.epochs)]
        known = np.unique(np.concatenate([each for each in rates if each is not None] or [np.zeros(1)]))
        if len(known) > 1:
            return "nobody knows the learning rate of later epochs, since that of the log's changed"
        return None

    @property
    def own_draws(self) -> str | None:
        """In words, why nobody but the user can draw as the training did; None where we can."""
        return self.log.own_draws and f"negatives came from {self.log.own_draws}, whose law we do not know"

    def come_back(self, wanted: bool) -> bool:
        """Whether negatives are drawn otherwise without what is forgotten, if that is wanted.

        Forgotten items return to negative pools, but for ``repeatable`` ones, which never lacked them; and popularity
        counts less of them.
        """
        return wanted and (self.recorded.returns or self.recorded.popularity is not None)

    def drawn_anew(self, rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Negatives by popularity that retraining without ``rows`` would draw otherwise, in some epochs.

        Returns:
            Remaining rows, int64 ``[changed]``, each as often as it changes; their negatives before, and after,
            ``[changed, m]``; and what of an epoch each of them is.
        """
        recounted = Recounted(self._remaining(), marked(self.log.n_rows, rows), self.trained.redraws)
        found, epochs = [], epochs[-1:] if self.log.static else epochs  # all alike
        for epoch in epochs:
            before, changed, after = recounted.epoch(epoch)
            found.append((changed, before[changed], after))
        changed, before, after = map(np.concatenate, zip(*found, strict=True))
        return changed, before.astype(np.int64), after.astype(np.int64), 1 / len(epochs)

    # what training again needs, see `replay.Replay`

    def _remaining(self) -> Recorded:
        """What was recorded, without what earlier requests have taken away."""
        return replace(self.recorded, absent=self.absent)

    def _coupled(self, rows: np.ndarray, coupling: str, epochs: int | None = None) -> Coupling:
        """Epochs of training without ``rows`` and what earlier requests have taken away.

        ``epochs``: of fresh ones, how many there may be; default: as many as the weights are of.
        """
        gone = marked(self.log.n_rows, rows)
        if coupling == "paired":
            return Paired(self._remaining(), gone, self.trained.redraws)
        forgotten = np.flatnonzero(gone | self.absent)
        draw = PoolDraw(self.split.remaining(forgotten), np.delete(self.split.items, forgotten))
        return Fresh(self._remaining(), gone, secrets.randbits(128), draw, epochs)

    def _again(
        self, epochs: Coupling, beginning: Beginning, bar: str | None = None, validated: bool = False
    ) -> tuple[Again, dict[str, Any]]:
        """`trained_again`, by kernels where these can, and plain values of what validation chose."""
        numbers = set(self.snapshots)
        if validated and numbers:
            numbers = {number for number in range(len(epochs) + 1) if snapshot_due(number)}
        again = trained_again(
            self.config, self.split, epochs, beginning, numbers, bar, compiled=True, validated=validated
        )
        if not validated:
            return again, {}
        chosen = f"validation without what is forgotten chose epoch {len(again.epochs)} of {again.played}"
        score = float(again.trainer.best_valid_score)
        return again, {"chosen": f"asked for: {chosen}", "epochs_trained": again.played, "valid_score": score}

    def _beginning(self, epochs: Coupling, validated: bool) -> Beginning:
        """Of a training that shares no random number with the log's."""
        seed = secrets.randbits(32)  # tells nothing of the rest
        return Beginning(seed, np.flatnonzero(~epochs.kept), validated=validated)

    # what a step needs, see `influence.Influence`

    def check(self, way: Any) -> None:
        """Raises InputError where a step cannot be made in this way."""
        self.damping(way)

    @abstractmethod
    def without(self, rows: np.ndarray, way: Any) -> Any:
        """What remains without some rows, in whatever form the other methods take it."""

    @abstractmethod
    def lost(self, after: Any, way: Any) -> torch.Tensor:
        """Gradient of what retraining removes minus that of what it adds: z, float64 ``[size]``."""

    @abstractmethod
    def curvature(self, after: Any, way: Any) -> tuple[Any, int]:
        """Curvature of the loss on what remains, and of how many triples it is."""

    @abstractmethod
    def damping(self, way: Any) -> torch.Tensor | float:
        """Diagonal added to the curvature of the loss, L2 included: float64 ``[size]`` or a number."""

    def stops(self, way: Any) -> list[int]:
        """Numbers of epochs after which a step looks at weights and curvature; empty: one step, at the last ones."""
        return []

    def details(self, after: Any, step: torch.Tensor) -> dict[str, Any]:
        """What is to be known of a step beyond what every step tells."""
        return {}

    def metric(self, way: Any) -> torch.Tensor | float:
        """What of the damping is measured, once between requests."""
        if way not in self._metrics:
            self._metrics[way] = self._metric(way)
        return self._metrics[way]

    @abstractmethod
    def _metric(self, way) -> Any: ...

    def shortened(self, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A flat change of the weights in which no row of a parameter goes farther than `FARTHEST`, and which did.

        Measured in the way that training moved the row that it moved most, of the same parameter.

        Returns:
            The change, and a bool for each row of each parameter, one after another.
        """
        parts, held = [], []
        for name, now, part in self._parts(step):
            rows = part.view(len(now) if now.dim() else 1, -1)
            farthest = FARTHEST * (now.double() - self.untrained[name].double()).reshape(rows.shape).norm(dim=1).max()
            lengths = rows.norm(dim=1)
            far = lengths > farthest
            held.append(far)
            parts.append(torch.where(far[:, None], rows * (farthest / lengths)[:, None], rows).view(-1))
        return torch.cat(parts), torch.cat(held)

    def renewed(self, rows: np.ndarray, change: Change) -> Change:
        """A flat change of the weights after which users with nothing left are as new, rows of their own.

        They were never trained, had the request been known; a step leaves much of what their rows had learnt. The rows
        that they began with would not do: every item that was sampled against them has moved along these.
        """
        users = np.setdiff1d(self.log.users[rows], self.log.users[self._kept(rows)]).astype(np.int64)
        tables = [name for name in self._changed_by_steps() if name in self._user_tables]
        if not len(users) or not tables:
            return change
        # not the seed of the training
        seed = int(np.random.SeedSequence(self.trained.redraws[0]).generate_state(1)[0])
        drawn = self._drawn(seed, np.union1d(np.flatnonzero(self.absent), rows))
        step = torch.as_tensor(change.step).clone()
        for name, now, part in self._parts(step):
            if name in tables:
                part[users] = (drawn[name][users] - now[users]).double()
        for weights in change.snapshots.values():
            for name in tables:
                self.log.named(weights)[name][users] = array(drawn[name][users])
        return replace(change, step=step, details={**change.details, "users_renewed": len(users)})

    @cached_property
    def _user_tables(self):
        """Names of parameters with a row for each user: those that are longer where there is one user more.

        Others may have as many rows by chance: a table of items, of facts, of positions in a history.
        """
        n_users = self.split.n_users
        found = {name for name, value in self.trained.model.named_parameters() if value.shape[:1] == (n_users,)}
        try:
            with fixed_randomness(0):  # building a model sets and uses the random streams of the process
                wider = new_model(self.config, self.split, self.trained.seed, self.split.with_another_user())
        except Exception:  # a class of the user's own may take as many users as there are, and no more
            return {name for name in found if "user" in name.lower()}
        rows = {name: value.shape[:1] for name, value in wider.named_parameters()}
        return {name for name in found if rows.get(name) == (n_users + 1,)}

    @abstractmethod
    def _changed_by_steps(self) -> list[str]:
        """Names of the parameters that a step changes, in its order."""

    def _parts(self, step):
        """Of each parameter that a flat step changes: name, weights, and the step's view of it."""
        state, names = self.state_dict, self._changed_by_steps()
        parts = step.split([state[name].numel() for name in names])
        return [(name, state[name], part.view(state[name].shape)) for name, part in zip(names, parts, strict=True)]

    def _kept(self, rows):
        """Rows that are left without some, and what earlier requests have taken away: int64."""
        kept = ~self.absent
        kept[rows] = False
        return np.flatnonzero(kept)

    def undone(self, rows: np.ndarray, after: Any, step: np.ndarray | torch.Tensor) -> float | None:
        """How much of what training had gained on what remains a change of the weights takes back.

        By the mean loss of at most `SEEN` of the remaining rows: 0 where it is as before, 1 where it is as that of
        weights that were never trained. None where training had gained nothing.

        Args:
            rows: that go.
            after: what `without` made of them.
            step: the change.
        """
        some = spread(self._kept(rows), SEEN)
        now, then, new = (
            self._mean_loss(after, some, each) for each in (self.state_dict, self.moved(step), self.untrained)
        )
        return (then - now) / (new - now) if new > now else None

    @cached_property
    def untrained(self) -> dict[str, torch.Tensor]:
        """Weights that were never trained, by name."""
        if self.trained.initial:
            return {**self.state_dict, **{n: torch.as_tensor(value) for n, value in self.trained.initial.items()}}
        return self._drawn(0)

    def _drawn(self, seed, gone=None):
        """New initial weights, by name. A user's own class may compute them from the data: not from ``gone`` rows."""
        with fixed_randomness(seed):  # building a model sets and uses the random streams of the process
            own = not is_recboles(type(self.trained.model))
            data = self.split.remaining_dataset(gone) if own and gone is not None else None
            return copies(new_model(self.config, self.split, seed, data).state_dict())

    @abstractmethod
    def _mean_loss(self, after, rows, state) -> float:
        """Mean loss of remaining rows, with negatives of the last epoch, at weights given by name."""

    def moments(self) -> dict[int, dict[str, torch.Tensor]]:
        """Adam's state as if it had seen nothing but what remains, with the weights as they are; empty: of others."""
        return {}

    # state

    @property
    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights as they are now."""

    @property
    def n_triples(self) -> int:
        """Triples of an epoch that earlier requests left."""
        return int(np.count_nonzero(~self.absent)) * self.log.negatives

    @property
    def n_batches(self) -> int:
        """Batches of an epoch of what earlier requests left, as training makes them."""
        return -(-int(np.count_nonzero(~self.absent)) // self.split.batch_rows)

    @abstractmethod
    def moved(self, step: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights with a change added."""

    def apply(self, rows: np.ndarray, unlearned: Unlearned) -> None:
        """Go on from the result of a request: the next one starts where it ended, on what it left of the log."""
        self.absent[rows] = True
        self.snapshots = unlearned.snapshots
        if unlearned.training:
            self.epochs = len(unlearned.training.epochs)
        self._metrics.clear()

    @abstractmethod
    def served(self, model: AbstractRecommender) -> AbstractRecommender:
        """The RecBole model to go on serving, instead of ``model``, with the weights as they are now."""

    def remaining(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Users and items of the rows that earlier requests left, int64, and where among them ``rows`` are."""
        present = np.flatnonzero(~self.absent)
        users, items = np.asarray(self.log.users, np.int64), np.asarray(self.log.items, np.int64)
        return users[present], items[present], np.searchsorted(present, rows)

    def log_epochs(self, way: Any) -> np.ndarray:
        """Numbers of the epochs that the forgotten triples come from: the last ``way.log_epochs``."""
        last = way.log_epochs
        return np.arange(0 if last == "all" else max(self.epochs - last, 0), self.epochs)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
