"""From a trained RecBole model, its log and a forget set to weights that have forgotten."""

import logging
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from recbole_unlearn import distributed
from recbole_unlearn.data.sampling import BatchOrder
from recbole_unlearn.devices import array, copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence import damping as damping_metrics
from recbole_unlearn.influence.newton import Objective, flat, minimise
from recbole_unlearn.influence.objective import gradient, pool_return, sampled_triples
from recbole_unlearn.influence.operators import Damped, DotProductCurvature, UserTriples
from recbole_unlearn.influence.recorded import Adam, Recorded, Trajectory, single
from recbole_unlearn.influence.replay import replay, touching
from recbole_unlearn.influence.sharding import Shard
from recbole_unlearn.influence.solver import preconditioner
from recbole_unlearn.storage.checkpoints import check_finite
from recbole_unlearn.unlearners.common import Unlearned, gradient_epochs, solve, trained_epochs, warn_unless_converged

MOSTLY_TOUCHED = 0.5  # share of the interactions with a touched user or item, from which on replay runs all rows again
CURVATURE_TRIPLES = 8_000_000
# Gradient of the whole objective, as a share of its L2 part's, up to which a model counts as converged. At a minimum
# the loss and L2 pull equally hard and the share is 0; where training stopped early it is of order 1. The flattest
# directions of a minimum have a curvature near weight_decay / 10 (measured, ml-100k, K = 8), so that the weights
# are then within some 10 times this share of their norm, .1 %, from the minimum: less than forgetting moves them.
CONVERGED = 1e-4


class InfluenceUnlearner:
    """Changes a model's weights to what they would be had some interactions never been there.

    Three methods (see docs/method.md). **replay**: influence unrolled over the recorded training for the touched rows,
    without linearising and with nothing to tune; needs a log with weight snapshots and Adam. **reoptimise**: for
    models that were trained to convergence, Newton steps to a minimum of the objective without the forgotten rows,
    certified by its gradient norm; needs one objective (static negatives) with L2. **influence**: one step
    ``theta* = theta + (H + D)^-1 z`` (UBPR, equation (7), corrected), with H the curvature of the loss summed over the
    remaining triples, D the damping, and z the gradient of what retraining removes (the forgotten rows' triples and
    their share of the L2 term) minus what it adds (forgotten items drawn as negatives).

    ``method: auto`` takes reoptimise where the model has converged (see `CONVERGED`), else replay, else influence.

    The model and the log are only read.

    Args:
        model: trained RecBole model.
        log (TripleLog): its log.
        optimizer_state (dict): ``optimizer`` entry of its checkpoint.
        config: configuration with the keys of properties/overall.yaml.
        epochs (int, optional): epochs that the weights were trained for; default: all of the log.
        popularity (array, optional): sampling weight of each item where negatives are not uniform.
        data_row (array, optional): row in RecBole's training data of each row of the log, int ``[rows]``, to replay
            all rows in the order of batches of their training; default: in another order.
        shared (bool): whether every rank has such an unlearner, of which it works on its share of the users. What rank
            0 is asked to do, the others are ordered to do likewise; all end with the same weights.

    Raises:
        InputError: model, optimiser or weights that the method is not valid for.
    """

    model_name = "BPR"
    initial: dict | None = None  # weights that the training's seed gives, by name, if somebody knows them

    def __init__(self, model, log, optimizer_state, config, epochs=None, popularity=None, data_row=None, shared=False):
        name = type(model).__name__
        if name != self.model_name:
            raise InputError(f"model {name} is not supported; {self.model_name} is")
        self.log = log
        self.config = config
        self.epochs = trained_epochs(log, epochs)
        self.popularity = popularity
        batch_rows = max(config["train_batch_size"] // log.negatives, 1)
        self.order = None if data_row is None else BatchOrder(log.order, data_row, batch_rows)
        self._hold(copies(model.state_dict()))
        check_finite(self.state_dict, "the model")
        if len(self.P) != log.metadata["n_users"] or len(self.Q) != log.metadata["n_items"]:
            raise InputError(
                f"the model has {len(self.P)} users and {len(self.Q)} items, the triple log {log.metadata['n_users']} "
                f"and {log.metadata['n_items']}; they belong to different runs"
            )
        sizes = (len(self.P), len(self.Q), self.P.shape[1])
        self.shared = shared
        self.shard = Shard(log.users, *sizes, *(distributed.rank_and_size() if shared else (0, 1)))
        self.weight_decay = float(config["weight_decay"] or 0)
        self.optimizer_state = optimizer_state
        self.absent = np.zeros(log.n_rows, bool)  # rows that requests before the next one have taken away
        self.pending = self.absent.copy()  # those of them since all rows were last replayed
        self.snapshots = {n: log.snapshot(n) for n in log.snapshots if n <= epochs}
        self.method, self.chosen = self._choose_method()
        self.damping: Any = self._damping(optimizer_state) if self.method == "influence" else None

    def _choose_method(self):
        """The method, and in words why."""
        wanted = "influence" if self.config["paper"] else self.config["method"]
        if wanted == "influence":
            return wanted, "asked for"
        if wanted == "replay":
            if why_not := self._no_replay():
                raise InputError(f"method: replay is not possible: {why_not}; use method: influence")
            return wanted, "asked for"
        auto, no_reoptimise = wanted == "auto", self._no_reoptimise()
        if no_reoptimise and not auto:
            raise InputError(f"method: reoptimise is not possible: {no_reoptimise}; use method: auto")
        if not no_reoptimise:
            share = self._gradient_share()
            converged = share <= CONVERGED
            found = f"{'' if converged else 'not '}converged, the gradient is {share:.1e} of its L2 part"
            if not (auto or converged):
                logging.getLogger().warning(f"{found}: re-optimisation will also finish the model's training")
            if converged or not auto:
                return "reoptimise", f"{'auto' if auto else 'asked for'}: {found}"
            no_reoptimise = found
        if no_replay := self._no_replay():
            return "influence", f"auto: {no_reoptimise}; {no_replay}"
        return "replay", f"auto: {no_reoptimise}"

    def _no_reoptimise(self):
        if not self.log.static:
            return "negatives were redrawn every epoch, so that no one objective was minimised"
        if not self.weight_decay > 0:
            return "weight_decay is 0, so that the objective has no minimum"
        return None

    def _gradient_share(self):
        """Gradient norm of the whole objective at the trained weights, divided by that of its L2 part."""
        objective = self._objective(np.empty(0, np.int64))
        theta = self._spread()
        return self.shard.norm(objective.at(theta)[1]) / (objective.l2 * self.shard.norm(theta))

    def _no_replay(self):
        group = self.optimizer_state["param_groups"][0]
        if not self.log.snapshots or self.log.snapshots[0] != 0:
            return "the triple log has no weight snapshots from the start of training"
        if self.config["learner"] != "adam" or "betas" not in group or group.get("amsgrad"):
            return f"it runs Adam again, and the model was trained with {self.config['learner']}"
        if self.config["clip_grad_norm"]:
            return "gradients were clipped in training"
        return None

    def _damping(self, optimizer_state):
        """Diagonal added to the curvature of the loss, L2 included: float64 ``[size]`` or a number."""
        strength, kind = self.config["damping_strength"], self.config["damping"]
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

    def warm_up(self):
        """Load (or, the very first time, compile) the kernels, so that `unlearn` is timed without."""
        one = np.zeros(1, np.int64)
        row = np.zeros((1, self.P.shape[1]), np.float32)
        neg = np.zeros((1, self.log.negatives), self.log.dtype)
        if self.method == "replay":
            n_users, n_items = len(self.P), len(self.Q)  # true sizes: small ones might take narrower places
            ends = Trajectory([0, 1], [np.zeros((n_users + n_items) * row.size, np.float32)] * 2)
            for all_rows in (False, True):
                replay(Recorded(one, one, [neg], n_users, n_items, self._adam(), 1), ends, one, all_rows)
            return
        triples = UserTriples(one.astype(np.int32), one.astype(self.log.items.dtype), neg, 1, 1)
        if self.method == "reoptimise":
            minimise(Objective([triples], 1, 1.0, (1, 1, row.size)), row + 1, row + 1, 0.1, 1)
            return
        curvature = DotProductCurvature(triples, row, row, exact=self.config["curvature"] == "hessian")
        self._solve(curvature, torch.ones(curvature.size, dtype=torch.float64), 1.0)
        gradient(sampled_triples([0], [0], np.zeros((1, 1, 1), np.int64)), row, row)

    def unlearn(self, rows, show_progress=False):
        """Forget some rows of the log.

        Args:
            rows: sorted int array of rows of the log; empty: the weights come back unchanged.

        Returns:
            Unlearned
        """
        start = perf_counter()
        rows = np.asarray(rows, np.int64)
        if len(rows) == 0:
            details = {"chosen": self.chosen}
            return Unlearned(dict(self.state_dict), self.method, perf_counter() - start, details, self.snapshots)
        if self.shared:
            distributed.order("unlearn", rows=rows.tolist())
        sent = self.shard.bytes_summed
        run = {"replay": self._replay, "reoptimise": self._reoptimise, "influence": self._influence}[self.method]
        user_change, item_change, details, snapshots = run(rows, show_progress)
        state = dict(self.state_dict)
        state["user_embedding.weight"] = torch.from_numpy((self.P + user_change).astype(self.P.dtype))
        state["item_embedding.weight"] = torch.from_numpy((self.Q + item_change).astype(self.Q.dtype))
        check_finite(state, "the unlearned model; raise damping_strength: the result")
        if self.shared:
            details |= {"ranks": self.shard.size, "bytes_summed_a_rank": self.shard.bytes_summed - sent}
        return Unlearned(state, self.method, perf_counter() - start, {"chosen": self.chosen, **details}, snapshots)

    @property
    def n_triples(self):
        """Triples of an epoch that earlier requests left."""
        return int(np.count_nonzero(~self.absent)) * self.log.negatives

    def apply(self, rows, unlearned):
        """Go on from the result of a request: the next one starts where it ended, on what it left of the log."""
        if self.shared:
            distributed.order("apply")
        self.absent[rows] = True
        self.pending[rows] = True
        if unlearned.details.get("all_rows"):
            self.pending[:] = False
        self.snapshots = unlearned.snapshots
        self._hold(unlearned.state_dict)
        if self.method == "influence":
            self.damping = self._damping(self.optimizer_state)

    def served(self, model):
        """The RecBole model to go on serving: ``model`` itself, with the weights as they are now."""
        model.load_state_dict(self.state_dict)
        return model

    def _hold(self, state_dict):
        self.state_dict = state_dict
        self.P = state_dict["user_embedding.weight"].numpy()
        self.Q = state_dict["item_embedding.weight"].numpy()

    def _spread(self):
        """The weights as a vector spread over ranks, see `Shard`; alone, all of them."""
        return flat(self.P[self.shard.users], self.Q)

    def _remaining(self, rows):
        """Users and items of the rows that earlier requests left, int64, and where among them ``rows`` are."""
        present = np.flatnonzero(~self.absent)
        users, items = np.asarray(self.log.users, np.int64), np.asarray(self.log.items, np.int64)
        return users[present], items[present], np.searchsorted(present, rows)

    def _adam(self):
        group = self.optimizer_state["param_groups"][0]
        beta1, beta2 = group["betas"]
        return Adam(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])

    def _all_rows(self, rows):
        """Whether to replay all weight rows: closer to retraining, since the others respond too, at little extra cost.

        Many small requests count together, so that what each leaves undone does not add up.
        """
        wanted, log = self.config["replay_rows"], self.log
        if wanted != "auto":
            return wanted == "all"
        forgotten = self.pending.copy()
        forgotten[rows] = True
        touched_users, touched_items = np.zeros(len(self.P), bool), np.zeros(len(self.Q), bool)
        touched_users[log.users[forgotten]] = True
        touched_items[log.items[forgotten]] = True
        touched = touching(log.users, log.items, touched_users, touched_items)
        return bool(np.mean(touched[~self.absent]) > MOSTLY_TOUCHED)

    def _trajectory(self):
        """The weights over the course of training, as far as they were kept."""
        times = [n for n in self.snapshots if n < self.epochs]
        weights = [*(self.snapshots[n] for n in times), flat(self.P, self.Q).numpy()]
        return Trajectory([*times, self.epochs], weights)

    def _run_again(self, trajectory, rows, all_rows, absent, steps, bar, shard=True):
        """`replay` of the log; ``bar`` names what is shown of its progress, None: nothing."""
        log, m = self.log, self.log.negatives
        known = all(log.rates(epoch) is not None for epoch in range(self.epochs))
        recorded = Recorded(
            log.users,
            log.items,
            [log.epoch(e) for e in range(self.epochs)],
            len(self.P),
            len(self.Q),
            self._adam(),
            max(self.config["train_batch_size"] // m, 1) * m,
            self.popularity,
            absent,
            steps,
            log.rates if known else None,
        )
        with tqdm(total=self.epochs, desc=bar, ncols=100, disable=bar is None) as progress:
            sharded = self.shard if self.shared and shard else None
            return replay(recorded, trajectory, rows, all_rows, self.config["seed"], progress.update, sharded)

    def reproduction(self, show_progress=False):
        """How far replay of all rows with nothing forgotten ends from the weights, over how far training moved them.

        From the initial weights that the seed gives, where these round to the recorded ones; else from the recorded
        ones, whose rounding to float16 may be carried through.

        Returns:
            (float, float): the distance, and how much of it the start's rounding may account for; None where the
            batches of an epoch are not known, so that it would be another training.
        """
        if not (order := self.order):
            return None

        def steps(epoch):
            if (found := order.steps(epoch)) is None:
                raise LookupError
            return found

        recorded, end = self._trajectory().at(0), flat(self.P, self.Q).numpy()
        known = np.concatenate([each.ravel() for each in (self.initial or {}).values()] or [recorded[:0]])
        exact = known.shape == recorded.shape and bool((known.astype(np.float16) == recorded).all())
        start = known.astype(np.float32) if exact else recorded
        bar = "Check the log" if show_progress else None
        try:
            trajectory = Trajectory([0, self.epochs], [start, end])
            result: Any = self._run_again(trajectory, np.empty(0, np.int64), True, None, steps, bar, shard=False)
        except LookupError:
            return None
        way = max(float(np.linalg.norm(end - start)), np.finfo(np.float32).tiny)
        rounding = 0.0 if exact else float(np.linalg.norm(start) * np.finfo(np.float16).eps / 2)
        return float(np.linalg.norm(result.change)) / way, rounding / way

    def _replay(self, rows, show_progress):
        """The replayed change of the touched rows, and the recorded snapshots with the same change."""
        (n_users, K), recorded = self.P.shape, self.snapshots
        trajectory, all_rows, absent = self._trajectory(), self._all_rows(rows), self.absent
        if all_rows:  # from the start, without anything that was ever forgotten
            rows, absent = np.union1d(rows, np.flatnonzero(absent)), None
        steps = self.order.steps if all_rows and self.order else None
        result = self._run_again(trajectory, rows, all_rows, absent, steps, "Unlearn" if show_progress else None)
        change = np.zeros((n_users + len(self.Q), K))
        if result is None:  # rank 0 ran the lanes
            change = self.shard.from_leader(torch.from_numpy(change)).numpy()
            return change[:n_users], change[n_users:], {}, {}
        change[result.rows] = result.change
        # A user without any interaction left was never trained: a fresh initial embedding. The recorded one would not
        # do, since every item that was ever sampled against this user has moved along it.
        bare = result.rows[result.untrained & (not all_rows)]
        initial = trajectory.at(0)[: self.P.size]
        fresh = np.random.default_rng(self.config["seed"]).normal(initial.mean(), initial.std(), (len(bare), K))
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
            "all_rows": all_rows,
            "triples_replayed": result.triples,
            "step_norm": float(np.linalg.norm(change)),
        }
        return change[:n_users], change[n_users:], details, snapshots

    def _objective(self, rows):
        """What training on the log without some rows minimises, their items' return as negatives included.

        What earlier requests returned is not included: the log of an unlearned model does not say what was forgotten.
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
        triples = [UserTriples(users[own], items[own], log.epoch(0)[shard.rows][own], *sizes)]
        if self.config["pool_return"]:
            returned = self._returned(rows)
            pos, neg = returned.pos.astype(items.dtype), returned.neg.astype(log.dtype)
            triples.append(UserTriples(returned.users, pos, neg[:, None], *sizes, returned.weight))
        n_triples = int(keep.sum()) * log.negatives
        return Objective(triples, n_triples, self.weight_decay, (*sizes, self.P.shape[1]), shard)

    def _reoptimise(self, rows, show_progress):
        """The change to a minimum of the objective without the rows, and the certificate that it is one.

        It is that of float64 weights; ``gradient_norm_stored`` is that of the model's own type, which anyone can
        recompute from a checkpoint.
        """
        objective = self._objective(rows)
        limit = self.config["reoptimise_max_iterations"]
        with tqdm(total=limit, desc="Unlearn", ncols=100, disable=not show_progress) as bar:

            def progress(report):
                bar.update()
                bar.set_postfix_str(f"gradient {report.gradient_norm:.1e}")

            tolerance = self.config["reoptimise_tolerance"]
            P, Q, report = minimise(objective, self.P[self.shard.users], self.Q, tolerance, limit, progress)
        if not report.converged:
            logging.getLogger().warning(
                f"re-optimisation stopped at a mean gradient norm of {report.gradient_norm:.1e}, above "
                f"reoptimise_tolerance, after {report.iterations} iterations"
            )
        stored = flat(P.astype(self.P.dtype), Q.astype(self.Q.dtype))
        user_change, item_change = self._split(self.shard.whole(flat(P - self.P[self.shard.users], Q - self.Q)))
        details = {
            "triples": objective.n_triples,
            "step_norm": float(flat(user_change, item_change).norm()),
            "gradient_norm_stored": self.shard.norm(objective.at(stored)[1]) / objective.n_triples,
            **asdict(report),
        }
        return user_change, item_change, details, {}

    def _influence(self, rows, show_progress):
        """One influence-function step."""
        z = self._right_hand_side(rows)
        curvature, n_triples = self._curvature(rows)
        step, report = self._solve(curvature, z, self.shard.take(self.damping), show_progress, self.shard)
        step = self.shard.whole(step)
        warn_unless_converged(report)
        details = {
            "curvature_triples": n_triples,
            "step_norm": float(step.norm()),
            "gradient_norm": self.shard.norm(z),
            **asdict(report),
        }
        return *self._split(step), details, {}

    def _split(self, v):
        """The user and item parts of a whole flat vector, as arrays ``[n_users, K]`` and ``[n_items, K]``."""
        rows = v.numpy().reshape(-1, self.P.shape[1])
        return rows[: len(self.P)], rows[len(self.P) :]

    def _log_epochs(self):
        return gradient_epochs(self.config, self.epochs)

    def _returned(self, rows):
        """Triples of the own users, numbered from the first of them, that retraining would draw; see `pool_return`."""
        users, items, forgotten = self._remaining(rows)
        own = slice(*np.searchsorted(users, [self.shard.users.start, self.shard.users.stop]))
        forgotten = forgotten[(forgotten >= own.start) & (forgotten < own.stop)] - own.start
        users = users[own] - self.shard.users.start
        return pool_return(users, items[own], forgotten, len(self.Q), self.log.negatives, self.popularity)

    def _right_hand_side(self, rows):
        log, shard = self.log, self.shard
        P, own = self.P[shard.users], shard.owned(rows)
        users, items = np.asarray(log.users[own], np.int64) - shard.users.start, np.asarray(log.items[own], np.int64)
        removed = sampled_triples(users, items, log.gather(own, self._log_epochs()))
        z = torch.from_numpy(gradient(removed, P, self.Q))
        # L2 is a mean over triples too, so fewer triples carry less of it
        shard.once(z).add_(len(rows) * log.negatives * self.weight_decay * shard.once(self._spread()))
        if self.config["pool_return"]:
            z -= torch.from_numpy(gradient(self._returned(rows), P, self.Q))
        return shard.sum_items(z)

    def _curvature_triples(self, rows):
        """A part of the logged triples that is large enough, without ``rows``, weighted to one epoch."""
        log, m, shard = self.log, self.log.negatives, self.shard
        epochs = self._log_epochs()
        if log.static:
            epochs = epochs[-1:]
        limits = {"auto": CURVATURE_TRIPLES, "all": log.n_rows * m * len(epochs)}
        wanted = self.config["curvature_triples"]
        wanted = max(limits.get(wanted, wanted) // log.n_rows, 1)
        if wanted < m and not self.config["paper"]:
            negatives = np.ascontiguousarray(log.epoch(epochs[-1])[shard.rows, :wanted])
        else:
            count = min(max(wanted // m, 1), len(epochs))
            chosen = epochs[np.linspace(0, len(epochs) - 1, count).round().astype(int)] if count > 1 else epochs[-1:]
            negatives = np.concatenate([log.epoch(e)[shard.rows] for e in chosen], axis=1)
        weight = np.full(log.n_rows, m / negatives.shape[1], np.float32)
        weight[self.absent] = 0
        if not self.config["paper"]:  # equation (7) keeps the forgotten triples in H
            weight[rows] = 0
        users, items = np.asarray(log.users[shard.rows]) - shard.users.start, np.array(log.items[shard.rows])
        return UserTriples(users, items, negatives, shard.n_own, len(self.Q), weight[shard.rows])

    def _curvature(self, rows):
        """The curvature, and of how many triples it is on all ranks together."""
        triples = self._curvature_triples(rows)
        exact = self.config["curvature"] == "hessian"
        curvature = DotProductCurvature(triples, self.P[self.shard.users], self.Q, exact=exact)
        return self.shard.together(curvature), self.log.n_rows * triples.neg.shape[1]

    def _solve(self, curvature, z, damping, show_progress=False, space=None):
        damped, precondition = Damped(curvature, damping), preconditioner(curvature, damping)
        return solve(self.config, damped, z, precondition, show_progress, space)
