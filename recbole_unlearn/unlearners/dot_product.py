"""BPR: scores are dot products of embeddings, so that all is known in closed form."""

import secrets
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from recbole_unlearn import distributed
from recbole_unlearn.devices import array, copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence import damping as damping_metrics
from recbole_unlearn.influence.coupling import Epoch, Fresh, Paired
from recbole_unlearn.influence.dot_product import DotProductTraining
from recbole_unlearn.influence.newton import Objective, flat
from recbole_unlearn.influence.objective import Triples, gradient, pool_return, sampled_triples
from recbole_unlearn.influence.operators import DotProductCurvature, UserTriples
from recbole_unlearn.influence.recorded import Recorded, Trajectory, single
from recbole_unlearn.influence.replay import replay, touching
from recbole_unlearn.influence.sharding import Shard
from recbole_unlearn.influence.solver import preconditioner
from recbole_unlearn.storage.checkpoints import check_finite
from recbole_unlearn.training.compiled import adam_states, seconds, training_of
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.unlearners.base import Change, NewTraining, Problem, Unlearned
from recbole_unlearn.unlearners.influence import Influence, conjugate, warn_unless_converged

MOSTLY_TOUCHED = 0.5  # share of the interactions with a touched user or item, from which on replay runs all rows again
CURVATURE_TRIPLES = 8_000_000
TABLES = "user_embedding.weight", "item_embedding.weight"
MOMENT_EPOCHS = 5  # that moments anew are the running mean of


class DotProduct(Problem):
    """A BPR training.

    Args:
        trained: its log is only read.
        shared: whether every rank has such a problem, of which it works on its share of the users. All end with the
            same weights.

    Raises:
        InputError: optimiser or weights that are not those of the log.
    """

    name = "BPR"
    schedules = True

    def __init__(self, trained: Trained, shared: bool = False):
        super().__init__(trained)
        log = self.log
        self._hold(copies(trained.model.state_dict()))
        check_finite(self.state_dict, "the model")
        if len(self.P) != log.metadata["n_users"] or len(self.Q) != log.metadata["n_items"]:
            raise InputError(
                f"the model has {len(self.P)} users and {len(self.Q)} items, the triple log {log.metadata['n_users']} "
                f"and {log.metadata['n_items']}; they belong to different runs"
            )
        sizes = (len(self.P), len(self.Q), self.P.shape[1])
        self.shared = shared
        self.shard = Shard(log.users, *sizes, *(distributed.rank_and_size() if shared else (0, 1)))
        self.pending = self.absent.copy()  # absent rows since all rows were last replayed
        self.snapshots = {n: log.snapshot(n) for n in log.snapshots if n <= self.epochs}
        self.recorded = trained.recorded()
        self._start = self._first_weights()

    # state

    @property
    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._state

    def _hold(self, state_dict):
        self._state = state_dict
        self.P, self.Q = (state_dict[name].numpy() for name in TABLES)

    @property
    def table(self) -> np.ndarray:
        """Embeddings of users, then items, ``[n_users + n_items, K]``."""
        return np.concatenate([self.P, self.Q])

    def moved(self, step: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        rows = np.asarray(step).reshape(-1, self.P.shape[1])
        changes = zip(TABLES, (self.P, self.Q), np.split(rows, [len(self.P)]), strict=True)
        new = {name: torch.from_numpy((table + change).astype(table.dtype)) for name, table, change in changes}
        return {**self.state_dict, **new}

    def apply(self, rows: np.ndarray, unlearned: Unlearned) -> None:
        super().apply(rows, unlearned)
        self.pending[rows] = True
        if new := unlearned.training:
            self.pending[:] = False
            if isinstance(new.epochs, Fresh):  # from now on, this is the training to be coupled to
                self.recorded, self._start = new.epochs.recorded_anew(), (new.start, True)
        self._hold(unlearned.state_dict)

    def served(self, model):
        """``model`` itself."""
        model.load_state_dict(self.state_dict)
        return model

    def spread(self) -> torch.Tensor:
        """The weights as a vector spread over ranks, see `Shard`; alone, all of them."""
        return flat(self.P[self.shard.users], self.Q)

    def norm(self, v: torch.Tensor) -> float:
        """Norm of a vector that is spread over ranks."""
        return self.shard.norm(v)

    # replay

    def not_replayed(self, rows: str) -> str | None:
        config, log, group = self.config, self.log, self.trained.optimizer["param_groups"][0]
        if not log.snapshots or log.snapshots[0] != 0:
            return "the triple log has no weight snapshots from the start of training"
        if config["learner"] != "adam" or "betas" not in group or group.get("amsgrad"):
            return f"it runs Adam again, and the model was trained with {config['learner']}"
        if config["clip_grad_norm"]:
            return "gradients were clipped in training"
        return None

    def warm_up_replay(self) -> None:
        """Load or compile its kernels."""
        one = np.zeros(1, np.int64)
        row = np.zeros((1, self.P.shape[1]), np.float32)
        neg = np.zeros((1, self.log.negatives), self.log.dtype)
        n_users, n_items = len(self.P), len(self.Q)  # true sizes: small ones might take narrower places
        ends = Trajectory([0, 1], [np.zeros((n_users + n_items) * row.size, np.float32)] * 2)
        replay(Recorded(one, one, [neg], n_users, n_items, self.recorded.adam, 1), ends, one)
        self.warm_up_training()

    def warm_up_training(self) -> None:
        """Load or compile the kernels of `retrained`."""
        one, weights = np.ones(1, self.log.users.dtype), np.zeros((4, self.P.shape[1]), np.float32)
        items, neg = one.astype(self.log.items.dtype), np.ones((1, self.log.negatives), self.log.dtype)
        small = DotProductTraining(weights, 2, self.recorded.adam)
        epoch = Epoch(np.zeros(1, np.int64), np.array([0, 1]), neg, np.full(1, 1e-3))
        small.epoch(one[:1] * 0, items * 0, epoch)

    # all of training again

    def training(self, start: np.ndarray, kept: np.ndarray, stride: int = 1) -> Any:
        """What trains on ``kept`` rows (bool ``[rows]``) from weights ``[n_users + n_items, K]``, as the model was.

        ``stride``: steps to make at once, of a model that is approximated in this way.
        """
        pairs = self.log.users[kept], self.log.items[kept]
        return training_of(self.trained.model, pairs, start, self.recorded.adam, stride)

    def seconds_again(self) -> float:
        """About how long `retrained` takes on two cores."""
        return seconds(self.epochs, self.n_triples, self.P.shape[1])

    def _first_weights(self) -> tuple[np.ndarray, bool] | None:
        """Weights that training began with, float32 ``[n_users + n_items, K]``, and whether they are exact.

        Those of the log, but where an earlier version rounded them to float16, and the seed gives them. None without
        either.
        """
        if 0 not in self.snapshots:
            return None
        recorded = self.snapshots[0]
        known = np.concatenate([each.ravel() for each in (self.trained.initial or {}).values()] or [recorded[:0]])
        exact = recorded.dtype != np.float16
        if not exact and known.shape == recorded.shape and (known.astype(np.float16) == recorded).all():
            recorded, exact = known, True
        return single(recorded).reshape(-1, self.P.shape[1]), exact

    def _train(self, training, epochs, bar=None):
        """Train on epochs, and keep the weights when they were kept before: number of epochs -> flat weights."""
        kept = {0: training.W.ravel().copy()}
        for number, each in enumerate(tqdm(epochs, bar, len(epochs), ncols=100, disable=bar is None), 1):
            training.epoch(self.log.users, self.log.items, each)
            if number in self.snapshots:
                kept[number] = training.W.ravel().copy()
        return kept

    def reproduction(self, show_progress: bool = False) -> tuple[float, float] | None:
        """How far training again with nothing forgotten ends from the stored weights, over how far it moved them.

        Returns:
            The distance, and how much of it the start's rounding may account for; None where the batches of an epoch
            are not known, so that it would be another training.
        """
        assert self._start
        recorded, (start, exact) = self.recorded, self._start
        if not recorded.ordered():
            return None
        again = Paired(recorded, np.zeros(len(recorded.users), bool))
        training = self.training(start, again.kept)
        self._train(training, again, "Check the log" if show_progress else None)
        stored = self.trained.stored["state_dict"]  # a step may have moved the problem's since
        end = np.concatenate([array(stored[name]) for name in TABLES])
        way = max(float(np.linalg.norm(end - start)), np.finfo(np.float32).tiny)
        rounding = 0.0 if exact else float(np.linalg.norm(start) * np.finfo(np.float16).eps / 2)
        return float(np.linalg.norm(training.W - end) / way), float(rounding / way)

    def retrained(
        self, rows: np.ndarray, coupling: str, show_progress: bool = False, stride: int = 1, validated: bool = False
    ) -> Change:
        """The change to the weights that training ends in without ``rows`` and all that was forgotten before.

        Args:
            coupling: 'paired' or 'fresh', see `influence.coupling`.
            stride: as for `training`.
            validated: whether validation chooses among fresh epochs, see `Replay`.
        """
        if validated:
            return self._validated(rows, show_progress)
        weights = self.table
        if not self.shard.leads:
            change = self.shard.from_leader(torch.zeros(weights.shape, dtype=torch.float64)).numpy()
            return Change(change, {})
        epochs = self._coupled(rows, coupling)
        start, exact = (self._start if coupling == "paired" else None) or (self._drawn_start(), True)
        training = self.training(start, epochs.kept, stride)
        snapshots = self._train(training, epochs, "Unlearn" if show_progress else None)
        change = training.W.astype(np.float64) - weights
        self.shard.from_leader(torch.from_numpy(change))
        details = self._trained_again(epochs, coupling, change, exact and stride == 1)
        details |= {"stride": stride} if stride > 1 else {}
        moments = adam_states([len(self.P), len(self.Q)], training.M, training.V, training.steps)
        new = NewTraining(epochs, start, dict(enumerate(moments)))
        return Change(change, details, snapshots, new if details["exact"] else None)

    def _validated(self, rows, show_progress):
        """As `retrained`, by fresh random numbers, with as many epochs as validation chooses."""
        epochs = self._coupled(rows, "fresh", self.config["epochs"])
        again, chosen = self._again(epochs, self._beginning(epochs, True), "Unlearn" if show_progress else None, True)
        model, shape = again.trainer.model, (-1, self.P.shape[1])
        change = np.concatenate([array(value) for value in model.parameters()]).astype(np.float64)
        change -= self.table
        details = self._trained_again(again.epochs, "fresh", change, True) | chosen
        moments = {n: copies(state) for n, state in again.trainer.optimizer.state_dict()["state"].items()}
        start = again.start.numpy().astype(np.float32).reshape(shape)
        new = NewTraining(again.epochs, start, moments, validated=chosen)
        return Change(change, details, again.snapshots, new)

    def _trained_again(self, epochs, coupling, change, exact):
        """What is to be known of a training again."""
        return {
            "epochs": len(epochs),
            "rows_replayed": len(change),
            "all_rows": True,
            "exact": exact,
            "coupling": coupling,
            "triples_replayed": int(epochs.kept.sum()) * self.log.negatives * len(epochs),
            "step_norm": float(np.linalg.norm(change)),
        }

    def _drawn_start(self):
        """New initial weights, float32 ``[n_users + n_items, K]``; they do not depend on the data."""
        drawn = self._drawn(secrets.randbits(32))  # tells nothing of the rest
        return np.concatenate([drawn[name] for name in self._changed_by_steps()]).astype(np.float32)

    def moments(self) -> dict[int, dict[str, torch.Tensor]]:
        states, group = self.trained.optimizer["state"], self.trained.optimizer["param_groups"][0]
        if "betas" not in group:
            return {}
        nothing = np.zeros(self.log.n_rows, bool)
        epochs = Paired(replace(self._remaining(), order=None), nothing, secrets.randbits(128))
        training = self.training(self.table, epochs.kept)
        for number in range(max(self.epochs - MOMENT_EPOCHS, 0), self.epochs):
            epoch = epochs.epoch(number)
            training.epoch(self.log.users, self.log.items, replace(epoch, rates=np.zeros_like(epoch.rates)))
        steps, decay = int(states[0]["step"]), group["betas"][1]
        squares = training.V * np.float32((1 - decay**steps) / (1 - decay**training.steps))
        sizes = [len(self.P), len(self.Q)]
        return dict(enumerate(adam_states(sizes, np.zeros_like(squares), squares, steps)))

    # replay of touched rows

    def touches_most(self, rows: np.ndarray) -> bool:
        """Whether the users and items of ``rows`` anchor most interactions, with those of requests not yet settled.

        Many small requests count together, so that what each leaves undone does not add up.
        """
        log, forgotten = self.log, self.pending.copy()
        forgotten[rows] = True
        touched_users, touched_items = np.zeros(len(self.P), bool), np.zeros(len(self.Q), bool)
        touched_users[log.users[forgotten]] = True
        touched_items[log.items[forgotten]] = True
        touched = touching(log.users, log.items, touched_users, touched_items)
        return bool(np.mean(touched[~self.absent]) > MOSTLY_TOUCHED)

    def _trajectory(self):
        """The weights over the course of training, as far as they were kept."""
        times = [n for n in self.snapshots if n < self.epochs]
        weights = [*(self.snapshots[n] for n in times), self.table.ravel()]
        return Trajectory([*times, self.epochs], weights)

    def replayed(self, rows: np.ndarray, show_progress: bool = False) -> Change:
        """The replayed change of the touched rows, and the recorded snapshots with the same change."""
        (n_users, K), recorded, trajectory = self.P.shape, self.snapshots, self._trajectory()
        bar = tqdm(total=self.epochs, desc="Unlearn", ncols=100, disable=not show_progress)
        with bar as progress:
            shard = self.shard if self.shared else None
            result = replay(self._remaining(), trajectory, rows, sum(self.trained.redraws), progress.update, shard)
        change = np.zeros((n_users + len(self.Q), K))
        if result is None:  # rank 0 ran the lanes
            change = self.shard.from_leader(torch.from_numpy(change)).numpy()
            return Change(change, {})
        change[result.rows] = result.change
        # A user without any interaction left was never trained: a fresh initial embedding. The recorded one would not
        # do, since every item that was ever sampled against this user has moved along it.
        bare = result.rows[result.untrained]
        initial = trajectory.at(0)[: self.P.size]
        seeds = ([self.trained.redraws[0], int(user)] for user in bare)  # another for each, whichever request it is
        drawn = [np.random.default_rng(seed).normal(initial.mean(), initial.std(), K) for seed in seeds]
        fresh = np.reshape(drawn, (len(bare), K))
        change[bare] = fresh - self.P[bare]
        self.shard.from_leader(torch.from_numpy(change))
        snapshots = {}
        for n, weights in recorded.items():
            weights = single(weights).reshape(-1, K)
            weights[result.rows] += result.snapshots[n]
            weights[bare] = fresh
            snapshots[n] = weights.ravel()
        details = {
            "epochs": self.epochs,
            "rows_replayed": len(result.rows),
            "all_rows": False,
            "exact": False,
            "triples_replayed": result.triples,
            "step_norm": float(np.linalg.norm(change)),
        }
        return Change(change, details, snapshots)

    # re-optimisation

    def objective(self, rows: np.ndarray, returns: bool) -> Objective:
        """What training on the log without some rows minimises, their items' return as negatives included.

        What earlier requests returned is not included: the log of an unlearned model does not say what was forgotten.
        Negatives by popularity are those of paired retraining, after all requests.
        """
        log, shard = self.log, self.shard
        sizes = (shard.n_own, len(self.Q))
        users, items = (
            np.asarray(log.users[shard.rows], np.int64) - shard.users.start,
            np.asarray(log.items[shard.rows]),
        )
        keep = ~self.absent
        keep[rows] = False
        own = keep[shard.rows]
        by_popularity = self.recorded.popularity is not None and returns
        negatives = self._coupled(rows, "paired").negatives(0) if by_popularity else log.epoch(0)
        triples = [UserTriples(users[own], items[own], negatives[shard.rows][own], *sizes)]
        if self.come_back(returns) and not by_popularity:
            returned = self._come_back(rows)
            pos, neg = returned.pos.astype(items.dtype), returned.neg.astype(log.dtype)
            triples.append(UserTriples(returned.users, pos, neg[:, None], *sizes, returned.weight))
        n_triples = int(keep.sum()) * log.negatives
        return Objective(triples, n_triples, self.weight_decay, (*sizes, self.P.shape[1]), shard)

    # a step

    def damping(self, way: Influence) -> torch.Tensor | float:
        return self.metric(way)

    def _metric(self, way):
        """All of the damping."""
        strength, kind, optimizer_state = way.damping_strength, way.damping, self.trained.optimizer
        l2 = self.n_triples * self.weight_decay
        if kind == "none":
            return l2
        if kind == "scalar":
            return l2 + self.n_triples * strength
        states = [optimizer_state["state"].get(i, {}) for i in range(2)]
        if not all("exp_avg_sq" in state for state in states):
            raise InputError("damping: adam needs a checkpoint that was trained with Adam; use damping: scalar")
        for state, value in zip(states, (self.P, self.Q), strict=True):
            average = state["exp_avg_sq"]
            if average.shape != value.shape or not (torch.isfinite(average) & (average >= 0)).all():
                raise InputError("the optimiser's averages in the checkpoint are not those of the model; train again")
            if not state.get("step", 0) >= 1:
                raise InputError("the optimiser's state in the checkpoint is that of an untrained model; train again")
        group = optimizer_state["param_groups"][0]
        metric = [
            damping_metrics.adam(
                array(state["exp_avg_sq"]).ravel(),
                int(state["step"]),
                group["betas"][1],
                group["eps"],
                group["lr"],
                self.n_triples,
            )
            for state in states
        ]
        return l2 + strength * torch.from_numpy(np.concatenate(metric))

    def one_row(self) -> UserTriples:
        """One row's triples, of the types that the log's have: for kernels to be loaded or compiled."""
        one, neg = np.zeros(1, np.int64), np.zeros((1, self.log.negatives), self.log.dtype)
        return UserTriples(one.astype(np.int32), one.astype(self.log.items.dtype), neg, 1, 1)

    def warm_up_step(self, way: Influence) -> None:
        """Load or compile the kernels of a step."""
        row = np.zeros((1, self.P.shape[1]), np.float32)
        curvature = DotProductCurvature(self.one_row(), row, row, exact=way.exact)
        z = torch.ones(curvature.size, dtype=torch.float64)
        conjugate(way, curvature, 1.0, z, preconditioner(curvature, 1.0))
        gradient(sampled_triples([0], [0], np.zeros((1, 1, 1), np.int64)), row, row)

    def without(self, rows: np.ndarray, way: Influence) -> np.ndarray:
        """The rows themselves: nothing else has to be built."""
        return rows

    def _changed_by_steps(self) -> list[str]:
        return list(TABLES)

    def _mean_loss(self, after, rows, state):
        E = self._embedded(np.concatenate([state[name].numpy() for name in TABLES]), after)
        users, items = E[: len(self.P)], E[len(self.P) :]
        negatives = np.asarray(self.log.epoch(self.epochs - 1)[rows], np.int64)
        ways = items[np.asarray(self.log.items[rows], np.int64)][:, None] - items[negatives]
        margins = np.einsum("rk,rmk->rm", users[np.asarray(self.log.users[rows], np.int64)], ways)
        return float(np.logaddexp(0, -margins.astype(np.float64)).mean())

    def _embedded(self, weights, without):
        """Embeddings that are multiplied, without some rows: of BPR the weights themselves."""
        return weights

    def solve(self, after: np.ndarray, z: torch.Tensor, way: Influence, show_progress: bool = False):
        """``(H + D)^-1 z``, how it was found, and of how many triples H is."""
        curvature, n_triples = self.curvature(after, way)
        damping = self.shard.take(self.damping(way))
        precondition = preconditioner(curvature, damping)
        step, report = conjugate(way, curvature, damping, z, precondition, show_progress, self.shard)
        step = self.shard.whole(step)
        warn_unless_converged(report)
        return step, report, n_triples

    def _returned(self, rows, epochs):
        """Triples of the own users, numbered from the first of them, that retraining would draw more often.

        By popularity some are drawn less, in an epoch of these: their weights are negative.
        """
        return self._come_back(rows) if self.recorded.popularity is None else self._drawn_instead(rows, epochs)

    def _come_back(self, rows):
        """See `pool_return`."""
        users, items, forgotten = self.remaining(rows)
        own = slice(*np.searchsorted(users, [self.shard.users.start, self.shard.users.stop]))
        forgotten = forgotten[(forgotten >= own.start) & (forgotten < own.stop)] - own.start
        users = users[own] - self.shard.users.start
        return pool_return(users, items[own], forgotten, len(self.Q), self.log.negatives)

    def _drawn_instead(self, rows, epochs):
        changed, before, after, share = self.drawn_anew(rows, epochs)
        own = (changed >= self.shard.rows.start) & (changed < self.shard.rows.stop)
        at, column = np.nonzero((before != after) & own[:, None])
        changed = np.tile(changed[at], 2)
        users = np.asarray(self.log.users[changed], np.int64) - self.shard.users.start
        negatives = np.concatenate([before[at, column], after[at, column]])
        weight = np.repeat([-share, share], len(at))
        return Triples(users, np.asarray(self.log.items[changed], np.int64), negatives, weight)

    def lost(self, after: np.ndarray, way: Influence) -> torch.Tensor:
        rows = after
        log, shard = self.log, self.shard
        P, own = self.P[shard.users], shard.owned(rows)
        users, items = np.asarray(log.users[own], np.int64) - shard.users.start, np.asarray(log.items[own], np.int64)
        removed = sampled_triples(users, items, log.gather(own, self.log_epochs(way)))
        z = torch.from_numpy(gradient(removed, P, self.Q))
        # L2 is a mean over triples too, so fewer triples carry less of it
        shard.once(z).add_(len(rows) * log.negatives * self.weight_decay * shard.once(self.spread()))
        if self.come_back(way.pool_return):
            z -= torch.from_numpy(gradient(self._returned(rows, self.log_epochs(way)), P, self.Q))
        return shard.sum_items(z)

    def _curvature_triples(self, rows, way):
        """A part of the logged triples that is large enough, without ``rows``, weighted to one epoch."""
        log, m, shard = self.log, self.log.negatives, self.shard
        epochs = self.log_epochs(way)
        if log.static:
            epochs = epochs[-1:]
        limits = {"auto": CURVATURE_TRIPLES, "all": log.n_rows * m * len(epochs)}
        wanted = way.curvature_triples
        wanted = max(limits.get(wanted, wanted) // log.n_rows, 1)
        if wanted < m and not way.forgotten_stay:
            negatives = np.ascontiguousarray(log.epoch(epochs[-1])[shard.rows, :wanted])
        else:
            count = min(max(wanted // m, 1), len(epochs))
            chosen = epochs[np.linspace(0, len(epochs) - 1, count).round().astype(int)] if count > 1 else epochs[-1:]
            negatives = np.concatenate([log.epoch(e)[shard.rows] for e in chosen], axis=1)
        weight = np.full(log.n_rows, m / negatives.shape[1], np.float32)
        weight[self.absent] = 0
        if not way.forgotten_stay:  # equation (7) keeps them in H
            weight[rows] = 0
        users, items = np.asarray(log.users[shard.rows]) - shard.users.start, np.array(log.items[shard.rows])
        return UserTriples(users, items, negatives, shard.n_own, len(self.Q), weight[shard.rows])

    def curvature(self, after: np.ndarray, way: Influence) -> tuple[Any, int]:
        """The curvature, and of how many triples it is on all ranks together."""
        triples = self._curvature_triples(after, way)
        curvature = DotProductCurvature(triples, self.P[self.shard.users], self.Q, exact=way.exact)
        return self.shard.together(curvature), self.log.n_rows * triples.neg.shape[1]
