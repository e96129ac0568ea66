"""The one class that makes a trained model forget, request after request."""

import os
import secrets
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import numpy as np
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn import distributed
from recbole_unlearn.data.forget import ForgetRequest, rows_of_pairs
from recbole_unlearn.errors import InputError
from recbole_unlearn.runs.output import (
    append_record,
    audit_file,
    recorded_or_gone,
    save_unlearned,
    suppress,
    suppression_list,
)
from recbole_unlearn.settings.config import anywhere
from recbole_unlearn.settings.conflicts import COHORT, check_open
from recbole_unlearn.settings.given import Files, Given
from recbole_unlearn.storage import audit
from recbole_unlearn.storage.checkpoints import check_finite
from recbole_unlearn.storage.files import in_one_line, locked, sweep_scratch
from recbole_unlearn.storage.paths import check_apart, check_path, check_written
from recbole_unlearn.storage.triple_log import log_path
from recbole_unlearn.training.trained import Checkpoint, Trained, inexact
from recbole_unlearn.unlearners import guard
from recbole_unlearn.unlearners.base import NewTraining, Unlearned, Way
from recbole_unlearn.unlearners.choose import Auto, choose, problem_of, wanted
from recbole_unlearn.unlearners.influence import Influence, Undone
from recbole_unlearn.unlearners.replay import Replay

UNTRAINED = "nothing of it was trained on"
TURN = threading.RLock()


def _alone():
    """A process that was forked has no other thread, and none that would give back the turn."""
    global TURN
    TURN = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_alone)


@contextmanager
def in_turn() -> Iterator[None]:
    """One thread after the other, whichever unlearner: training again uses the random streams of the process."""
    with TURN:
        yield


class InfluenceUnlearner:
    """Changes a model's weights to what they would be had some interactions never been there (docs/method.md).

    For every model of RecBole that is trained row by row, and classes of your own. Each request starts where the one
    before ended: with its weights, its trajectory, and without its interactions. Before `save` nothing is written but a
    lock, ``guard.json`` in the log's folder (what the check of the log found), and what a checkpoint of RecBole's own
    is adopted as. The log was verified when it was opened, and a checkpoint stays locked until `close`, or the end of a
    ``with`` block. Requests of several threads wait for each other, and for `run_unlearn`; what else draws at random in
    other threads must wait too, since training uses the random streams of the process. Copies there are none.

    Args:
        trained: the training to unlearn from; its model and log are only read, but for ``guard.json``.
        way: one of `Replay`, `Reoptimise`, `Influence`, `PAPER`; default: what the configuration says, which is the
            first that is valid unless it says otherwise.
        shared: whether every rank has such an unlearner, of which it works on its share of the users. What rank 0 is
            asked to do, the others are ordered to do likewise; all end with the same weights.

    Attributes:
        model: the RecBole model to serve; where BPR is replayed by kernels, its weights change in place with each
            request, else it is a new object, whose graph and histories have forgotten too.
        method: 'reoptimise', 'replay' or 'influence'; ``chosen`` says why.
        guard (Guard): what is known of whether the log tells the training; None before `check`.
        requests: what is on record of each request, see `audit.request_entry`.

    Raises:
        InputError: model, optimiser or weights that the way is not valid for.
    """

    def __init__(self, trained: Trained, way: "Auto | Way | None" = None, shared: bool = False):
        self.trained, self.config, self.split, self.log = trained, trained.config, trained.split, trained.log
        way = wanted(trained.config) if way is None else way
        self.problem = problem_of(trained, way, shared)
        self.way, self.chosen = choose(self.problem, way)
        self.method = self.way.name
        self.auto = way if isinstance(way, Auto) else None  # until a log does not tell its training
        self.model: AbstractRecommender = trained.model
        self.shared = shared and self.problem.shared
        self.guard: guard.Guard | None = None
        self.requests: list[dict[str, Any]] = []
        self.whole: dict[str, np.ndarray] = {}  # ids of users and items that were named as such
        self.training: NewTraining | None = None  # that the weights are of, since a request was exact
        self.held = ExitStack()
        self.closed = False

    @classmethod
    @in_turn()
    def load(
        cls,
        checkpoint: Path | str,
        config_file_list: Files = None,
        config_dict: dict[str, Any] | None = None,
        model: type | None = None,
        way: "Auto | Way | None" = None,
    ) -> "InfluenceUnlearner":
        """Open a checkpoint that `run_unlearn` or our trainer wrote.

        Args:
            checkpoint: its path.
            config_file_list, config_dict: as for `run_unlearn`.
            model: of a model of your own.
            way: as for the class.

        Raises:
            InputError: as `run_unlearn` does.
        """
        sweep_scratch()
        check_path("checkpoint", checkpoint)
        given = Given.read(model, None, config_file_list, {**(config_dict or {}), "checkpoint": str(checkpoint)})
        check_open(given)
        with ExitStack() as held:
            opened = Checkpoint.open(given, held)
            assert opened
            opened = replace(opened, config=anywhere(opened.config))
            unlearner = cls(opened.trained(opened.split()), way)
            unlearner.check()
            unlearner.warm_up()
            unlearner.held = held.pop_all()
        return unlearner

    @in_turn()
    def close(self) -> None:
        """Give the checkpoint free: others may change it now, and so nothing is forgotten or saved any more."""
        self.held.close()
        self.closed = True

    def _check_open(self):
        if self.closed:
            raise InputError(
                f"this unlearner is closed, and {self.trained.path} may be another one by now; open it again"
            )

    def __enter__(self) -> "InfluenceUnlearner":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise InputError("an open unlearner cannot be copied or pickled; save it, and load what was saved")

    @property
    def forgotten(self) -> np.ndarray:
        """Rows of ``split`` that requests have taken away, sorted int64."""
        return np.flatnonzero(self.problem.absent)

    @property
    def state_dict(self) -> dict[str, Any]:
        """The weights as they are now."""
        return self.problem.state_dict

    # -- one request

    def check(self, show_progress: bool = False) -> guard.Guard:
        """Compare the log with the training, once. InputError where it does not tell what training did."""
        if self.guard is None:
            try:
                self.guard = guard.check(self, self.way, show_progress)
            except guard.NotReproduced as failed:
                if not self.auto or self.problem.derived or self.auto.influence.refuses(self.problem):
                    raise
                self.way, self.chosen = self.auto.influence, f"auto: {failed.reason}"
                self.method, self.auto = self.way.name, None
                self.problem.check(self.way)
                self.guard = guard.check(self, self.way, show_progress)
        return self.guard

    def warm_up(self) -> None:
        """Load (or, the very first time, compile) the kernels, so that requests are timed without."""
        self.way.warm_up(self.problem)

    def unlearn(self, rows: np.ndarray, show_progress: bool = False) -> Unlearned:
        """What forgetting some rows of the log would give; nothing changes before `apply`.

        Args:
            rows: sorted ints; empty: the weights come back unchanged, but where facts or features are to go.

        Raises:
            InputError: a step that was asked for is none (`Undone`), or the result is not finite.
        """
        rows, problem = np.asarray(rows, np.int64), self.problem
        if len(rows) == 0 and not (self.split.stale and self.will_be_exact(rows)):
            details = {"chosen": UNTRAINED, "unchanged": True, "exact": self.settled}
            return Unlearned(dict(problem.state_dict), self.method, 0.0, details, problem.snapshots, self.training)
        way = self.way
        if isinstance(way, Replay):  # decided once for all ranks
            way = replace(way, rows="all" if way.exact(problem, rows) else "touched")
        try:
            return self.carry_out(way, rows, show_progress)
        except Undone as failed:
            if not isinstance(way, Replay) and not self._train_again(f"auto: {failed.reason}"):
                raise
            self.check(show_progress)
            if not isinstance(self.way, Replay):  # since the log does not tell its training
                raise
            return self.carry_out(replace(self.way, rows="all"), rows, show_progress)

    def expect(self, rows: np.ndarray) -> None:
        """Have `auto` train again, whatever that takes, where a step would have to forget more than `COHORT` of all."""
        share = len(np.union1d(rows, self.forgotten)) / self.split.n_rows
        if share > COHORT:
            self._train_again(f"auto: a step is no way to forget {share:.0%} of the interactions")

    def _train_again(self, why):
        """Train again from now on, whatever that takes, where `auto` would take steps; whether that is done."""
        if not (self.auto and isinstance(self.way, Influence)):
            return False
        replay = replace(self.auto.replay, rows="all")
        if replay.refuses(self.problem):
            return False
        self.way, self.method, self.guard, self.chosen = replay, replay.name, None, why
        return True

    def will_be_exact(self, rows: np.ndarray) -> bool:
        """Whether `unlearn` is going to train again on all other rows, as far as that is known before the guard."""
        return isinstance(self.way, Replay) and self.way.exact(self.problem, rows)

    def carry_out(self, way: Way, rows: np.ndarray, show_progress: bool = False) -> Unlearned:
        """As `unlearn`, by a way that is as this problem's, down to which rows are replayed."""
        start, problem = perf_counter(), self.problem
        shard = problem.shard if self.shared else None
        if shard:
            distributed.order("unlearn", rows=rows.tolist(), replayed=getattr(way, "rows", None))
        sent = shard.bytes_summed if shard else 0
        change = way.forget(problem, rows, show_progress)
        state = change.state_dict or problem.moved(change.step)
        check_finite(state, "the unlearned model; raise damping_strength: the result")
        details = {"chosen": self.chosen, **change.details}
        if shard:
            details |= {"ranks": shard.size, "bytes_summed_a_rank": shard.bytes_summed - sent}
        seconds = perf_counter() - start
        return Unlearned(state, self.method, seconds, details, change.snapshots, change.training)

    @in_turn()
    def settle(self, show_progress: bool = False) -> Unlearned:
        """Make all that was forgotten so far exact: training again without it, in one go.

        Returns:
            Unlearned: its ``model`` is the one to serve.

        Raises:
            InputError: the training cannot be run again, or the unlearner is closed; nothing has changed.
        """
        self._check_open()
        exact = self.way if isinstance(self.way, Replay) else Replay()
        exact = replace(exact, rows="all")
        if reason := exact.refuses(self.problem):
            raise InputError(f"what was forgotten cannot be settled exactly: {reason}")
        if not isinstance(self.way, Replay):
            self.guard = guard.check(self, exact, show_progress)
        self.check(show_progress)
        nothing = np.empty(0, np.int64)
        unlearned = self.carry_out(exact, nothing, show_progress)
        self.apply(nothing, unlearned)
        unlearned.model = self.model = self.served(self.model)
        return unlearned

    def moments(self) -> dict[int, dict[str, Any]] | None:
        """State of the optimiser to keep in place of the original's; None: that, or the new training's, is kept."""
        purged = self.config["purge"] and self.training is None and len(self.forgotten)
        return self.problem.moments() if purged else None

    def settle_if_wanted(self, show_progress: bool = False) -> Unlearned | None:
        """`settle`, unless all is exact, only touched rows were asked for, or the way is another than replay."""
        if self.settled or not isinstance(self.way, Replay) or self.way.rows == "touched":
            return None
        return self.settle(show_progress)

    def hurry(self, requests: int) -> None:
        """Take no longer for so many requests together than for one: what is not exact then is settled later."""
        if isinstance(self.way, Replay):
            self.way = replace(self.way, exact_seconds=self.way.exact_seconds / max(requests, 1))

    @property
    def settled(self) -> bool:
        """Whether the weights are those of training without all that was ever forgotten, exactly."""
        begun = inexact(self.trained.stored) or len(self.forgotten) or self.split.stale
        return self.training is not None or not begun

    def apply(self, rows: np.ndarray, unlearned: Unlearned) -> None:
        """Go on from the result of a request: the next one starts where it ended, on what it left of the log."""
        if self.shared:
            distributed.order("apply")
        self.problem.apply(rows, unlearned)
        self.training = unlearned.training

    def served(self, model: AbstractRecommender) -> AbstractRecommender:
        """The RecBole model to go on serving, instead of ``model``, with the weights as they are now."""
        return self.problem.served(model)

    @in_turn()
    def forget(self, *request: Any, **named: Any) -> Unlearned:
        """Forget some interactions, now.

        Args:
            named: one of ``users``, ``items``, ``pairs`` (of tokens), ``file``, ``count``, ``rows`` (of ``split``), or
                another kind of `forget.KINDS`, with what the key ``forget_<kind>`` takes. ``forget("users", [...])``
                says the same. What is drawn or counted is so of what is left.

        Returns:
            Unlearned: its ``model`` is the one to serve.

        Raises:
            InputError: unknown tokens or pairs, nothing left to forget or nothing left to model, or the unlearner is
                closed; nothing has changed.
        """
        self._check_open()
        if len(request) == 2 and not named:
            named = {request[0]: request[1]}
        elif request or len(named) != 1:
            raise InputError("forget takes one request, such as users=['42'] or file='requests.tsv'")
        ((kind, value),) = named.items()
        if kind == "rows":
            return self.forget_rows(value)
        if kind == "pairs":
            return self.forget_rows(rows_of_pairs(self.split, value, "pairs"))
        wanted = ForgetRequest.of(kind, value, self.config)
        rows = wanted.rows_left(self.split, self.problem.absent)
        try:
            return self.forget_rows(rows)
        finally:
            if self.problem.absent[rows].all():  # by this request, or pair by pair before
                for field, ids in wanted.whole(self.split).items():
                    self.whole[field] = np.union1d(self.whole.get(field, ids), ids)

    @in_turn()
    def forget_rows(self, rows: np.ndarray) -> Unlearned:
        """As `forget`, for rows of ``split``."""
        self._check_open()
        self.check()
        try:
            rows = np.asarray(rows)
        except ValueError:  # lists of several lengths
            rows = np.empty((0, 0))
        if rows.ndim == 1 and not len(rows):
            raise InputError("rows is empty: it names nothing to forget")
        if not (
            rows.ndim == 1
            and np.issubdtype(rows.dtype, np.integer)
            and 0 <= rows.min() <= rows.max() < self.split.n_rows
        ):
            raise InputError(
                f"rows must be whole numbers from 0 to {self.split.n_rows - 1}, of the training data, in one flat list"
            )
        rows = np.unique(rows)
        rows = rows[~self.problem.absent[rows]]
        if len(rows) == 0:
            raise InputError("every interaction of this request has been forgotten already")
        if len(rows) + len(self.forgotten) >= self.split.n_rows:
            raise InputError("the request would leave no training interaction to model")
        self.expect(rows)
        self.check()
        unlearned = self.unlearn(rows)
        self.apply(rows, unlearned)
        unlearned.model = self.model = self.served(self.model)
        self.requests.append(audit.request_entry(len(rows), unlearned))
        return unlearned

    # -- what is kept

    def now(self, seconds: float = 0.0, details: dict[str, Any] | None = None) -> Unlearned:
        """The model as it is now, as result of all requests together."""
        found = {"chosen": self.chosen, **(details or {}), **(self.training.validated if self.training else {})}
        return Unlearned(self.state_dict, self.method, seconds, found, self.problem.snapshots, self.training)

    @in_turn()
    def save(self, path: Path | str) -> None:
        """Write checkpoint and log, in which nothing is left of what was forgotten.

        It is settled first, where `settle_if_wanted` does so. Then a line is added to the audit file that the key
        ``audit`` names, a bare name in the checkpoint's folder.

        Raises:
            InputError: there is something already, another process is writing there, the audit file is damaged, the
                unlearner is closed, or the system refuses.
        """
        self._check_open()
        check_path("path", path)
        path, original = Path(path), self.trained.path
        _check_new(path)
        check_written("file", path, original)
        trail = audit_file(self.config, path.parent)
        if trail:
            check_written("audit", trail, original)
            check_apart("audit", trail, {"the new file": path, "the checkpoint": original})
        listed = suppression_list(self.config)
        self.settle_if_wanted()
        now = self.now()
        with in_one_line(path.parent, "file"), locked(path):
            _check_new(path)  # again, now that nobody else can be writing
            with recorded_or_gone(path):
                save_unlearned(path, self.trained, now, self.forgotten, guarded=self.guard)
                suppress(listed, self.split, self.forgotten, self.whole)
                if trail:
                    result = {"forget_set": self.split.counts(self.forgotten), "unlearning": now.report(), "models": {}}
                    request = secrets.token_hex(8)
                    append_record(trail, request, result, self.trained, path, now.state_dict, self.requests)


class UnlearnSession(InfluenceUnlearner):
    """Old name of `InfluenceUnlearner`, for one version."""

    @classmethod
    def open(cls, checkpoint, config_file_list=None, config_dict=None, model=None):
        """Old name of `InfluenceUnlearner.load`."""
        warnings.warn("UnlearnSession.open is now InfluenceUnlearner.load", FutureWarning, stacklevel=2)
        return cls.load(checkpoint, config_file_list, config_dict, model)


load = InfluenceUnlearner.load


def _check_new(path):
    if log_path(path) == path:
        raise InputError(f"{path}: .triples is the ending of a triple log; name a .pth file")
    if path.exists() or log_path(path).exists():
        raise InputError(f"{path} exists already; name a new file")
