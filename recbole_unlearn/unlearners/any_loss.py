"""Any pairwise model of RecBole, by automatic differentiation through its own loss."""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from recbole_unlearn.data.split import pairwise_loader
from recbole_unlearn.devices import array, copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Fresh, Paired
from recbole_unlearn.influence.damping import adam
from recbole_unlearn.influence.objective import returning
from recbole_unlearn.influence.operators import AutogradCurvature
from recbole_unlearn.influence.solver import jacobi
from recbole_unlearn.models.draws import keep_draws
from recbole_unlearn.models.losses import fixed_randomness
from recbole_unlearn.models.support import BATCH_NORM, no_step
from recbole_unlearn.models.view import View
from recbole_unlearn.storage.checkpoints import check_finite
from recbole_unlearn.training import compiled
from recbole_unlearn.training.again import Beginning, Onward, trained_again
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.unlearners.base import Change, NewTraining, Problem, Unlearned, spread
from recbole_unlearn.unlearners.influence import Influence, conjugate, descended, warn_unless_converged

CURVATURE_TRIPLES = {True: "all", False: 65_536}  # of sequential and of other models
SAMPLED_TRIPLES = 8192  # where all are wanted, but not by batches
BATCH_TRIPLES = 1024  # of the curvature at a time, where all are wanted at the last weights
GRADIENT_ROWS = 200_000  # that each part of z is computed on at most
MEAN_ROWS, MEAN_SHARE = 1024, 0.5  # twice so many tell how long the mean gradient is; from which share of z it counts
STAYS = 1e12  # damping, a triple, of a weight that never had a gradient
# Snapshots of the weights, at most, that the training is followed along; steps of the descent at each, and triples in
# each. Smaller batches are noise in the Hessian, which the change grows by: HRM went 1.3 of its way by 60 of 1024.
STOPS, STEPS, STEP_TRIPLES = 6, 30, 2048
LEAST_SEEN = 1 / 4  # of all triples, in the batches of a stop: of rows in none of them curvature is missing
BATCHES_ANEW = 20  # that moments anew are the mean of, at least
MOMENT_BATCHES = 2  # of training, at each snapshot, that tell how large gradients were
PROBE = 256  # rows that tell whether a model holds the data itself
ROUNDING = 1e-6  # of a row's loss in float32


@dataclass(frozen=True)
class After:
    """What remains without some rows.

    Attributes:
        rows: that are gone, sorted int64.
        view: of the model on what remains.
        changed: remaining rows whose loss is another then, sorted int64.
    """

    rows: np.ndarray
    view: View
    changed: np.ndarray


class AnyLoss(Problem):
    """The training of any model; see docs/models.md.

    ``theta* = theta + (H + D)^-1 z`` with ``z = grad [L(D; S) - L(D'; S')]``: D the logged triples and S the graph or
    the histories that the model holds, D' and S' the same without the forgotten rows. D' has the negatives that
    retraining would draw: forgotten items among their users'. Where a batch's loss is a mean, the rows that stay weigh
    more for those that go: of each of these its distance from the mean gradient is lost, and nothing of what belongs to
    no row (facts, norms of whole tables). Where that mean is little of z, it is left out. H is the curvature of the
    remaining triples on S', and D the damping.

    Args:
        trained: its model and log are only read.
        params: names or patterns of the parameters to change; default: all.
        step: what is done until all can be made exact at once.

    Raises:
        InputError: model, optimiser or weights that are not those of the log.
    """

    derived = False

    def __init__(self, trained: Trained, params: tuple[str, ...] | None = None, step: Influence | None = None):
        super().__init__(trained)
        model, log = trained.model, self.log
        self.name = type(model).__name__
        check_finite(model.state_dict(), "the model")
        if self.split.sequential and log.snapshots:
            if log.metadata["parameters"] != [[n, list(value.shape)] for n, value in model.named_parameters()]:
                raise InputError(f"the triple log's snapshots of the weights are not of this {self.name}; train again")
            self.snapshots = {n: log.snapshot(n) for n in log.snapshots if n <= self.epochs}
        self._params = list(params) if params else None
        self.weights = copies(model.state_dict())  # a class of the user's own may move some when it sees a batch
        self.view = View(model, self.split.train, self.split.data_row, self._params)
        self.step = step or Influence()
        self.no_step = no_step(self.config)
        if any(getattr(each, "sparse", False) is True for each in model.modules()):
            self.no_step = "gradients of its embeddings are sparse"
        self.recorded, self.beginning = trained.recorded(), Beginning.of(trained.seed, trained.stored, self.log)

    @property
    def state_dict(self) -> dict[str, torch.Tensor]:
        return copies(self.weights)

    @property
    def n_triples(self) -> int:
        """Terms of the loss, of an epoch, that earlier requests left."""
        return int(np.count_nonzero(~self.absent)) * self._terms

    @property
    def _terms(self):
        """Terms of a row's loss."""
        return 1 if self.view.traits.row_loss else self.split.terms

    def served(self, model=None):
        """A model of its own with the weights as they are now, its graph and histories too."""
        return self._rebuilt(self.split.remaining_dataset(np.flatnonzero(self.absent))).eval()

    # all of training again, by the model's own trainer

    def not_replayed(self, rows: str) -> str | None:
        if self._params:
            return "unlearn_params names what may change, and training changes all"
        if rows == "touched":
            return f"{self.name} is trained again as a whole, not in its touched rows"
        if self.log.optimizer is None:
            return "the triple log is of an earlier version"
        return None

    def warm_up_replay(self) -> None:
        """Load or compile the kernels of a model that has some; RecBole's trainer has been loaded."""
        if self._compiled:
            compiled.warm_up(self.view.model, self.split.train._dataset, self.recorded.adam, self.log.negatives)

    @cached_property
    def _compiled(self):
        """Whether it is trained again by kernels."""
        group, loader = self.trained.optimizer["param_groups"][0], pairwise_loader(self.split.train)
        return compiled.not_again(self.config, self.view.model, group, loader) is None

    def seconds_again(self) -> float:
        """About how long `retrained` takes, of kernels or by what an epoch took; infinite where nobody knows."""
        if self._compiled:
            return compiled.seconds_again(self.view.model, self.epochs, self.n_triples)
        seconds = self.trained.stored["triple_log"].get("seconds")
        if type(seconds) is not float or not seconds > 0:
            return np.inf
        return self.epochs * seconds * np.count_nonzero(~self.absent) / self.log.n_rows

    def touches_most(self, rows: np.ndarray) -> bool:
        """Whether all is trained again whatever that takes: nothing is replayed in part, and there may be no step."""
        return self.step.refuses(self) is not None

    def replayed(self, rows: np.ndarray, show_progress: bool = False) -> Change:
        """One step, where there is no time to be exact."""
        self.check(self.step)
        change = self.step.forget(self, rows, show_progress)
        return replace(change, details={**change.details, "exact": False})

    def reproduction(self, show_progress: bool = False) -> tuple[float, float] | None:
        """As of `DotProduct`; nothing of the start is rounded."""
        if not self.recorded.ordered():
            return None
        again = Paired(self.recorded, np.zeros(self.log.n_rows, bool))
        bar = "Check the log" if show_progress else None
        found, _ = self._again(again, self.beginning, bar)
        stored = self.trained.stored["state_dict"]
        now = _joined(stored[name] for name, _ in self.view.model.named_parameters())
        way = max(float((now - found.start).norm()), float(np.finfo(np.float32).tiny))
        return float((_flat(found.trainer.model) - now).norm()) / way, 0.0

    def retrained(
        self, rows: np.ndarray, coupling: str, show_progress: bool = False, validated: bool = False
    ) -> Change:
        """What training ends in without ``rows`` and all that was forgotten before.

        Args:
            coupling: 'paired' or 'fresh', see `influence.coupling`.
            validated: whether validation chooses among fresh epochs, see `Replay`.
        """
        epochs = self._coupled(rows, coupling, self.config["epochs"] if validated else None)
        beginning = self._beginning(epochs, validated) if coupling == "fresh" else self.beginning
        again, chosen = self._again(epochs, beginning, "Unlearn" if show_progress else None, validated)
        epochs = again.epochs
        model, optimizer = again.trainer.model, again.trainer.optimizer
        states = {n: copies(state) for n, state in optimizer.state_dict()["state"].items()}
        step = _flat(model) - _flat(self.view.model)
        details = {
            "epochs": len(epochs),
            "all_rows": True,
            "exact": True,
            "coupling": coupling,
            "parameters": len(step),
            "triples_replayed": int(epochs.kept.sum()) * self.split.terms * len(epochs),
            "step_norm": float(step.norm()),
            **chosen,
        }
        new = NewTraining(epochs, beginning, states, model, beginning.seed, chosen)
        return Change(step, details, again.snapshots, new, copies(model.state_dict()))

    def _rebuilt(self, data):
        """The model, with the weights as they are, on other data."""
        with fixed_randomness(0):  # building a model sets and uses the random streams of the process
            model = new_model(self.config, self.split, self.beginning.seed, data)
        model.load_state_dict(self.weights)
        keep_draws(self.view.model, model, data)
        return model

    @property
    def _l2(self):
        """Curvature of the optimiser's weight decay."""
        return self.n_triples * self.weight_decay

    def damping(self, way: Influence) -> torch.Tensor | float:
        return self._l2 + self.metric(way)

    def _metric(self, way):
        """The damping without L2."""
        strength, kind, n = way.damping_strength, way.damping, self.n_triples
        if kind == "none":
            return 0.0
        if kind == "scalar":
            return n * strength
        group = self.trained.optimizer["param_groups"][0]
        if "betas" not in group:
            raise InputError("damping: adam needs a checkpoint that was trained with Adam; use damping: scalar")
        if self.view.traits.sums:  # Adam saw gradients of sums over a batch
            n = self.n_batches
        names = [name for name, _ in self.view.model.named_parameters()]
        parts = []
        for name, value in self.view.named.items():
            state = self.trained.optimizer["state"].get(names.index(name))
            squares = np.zeros(value.numel()) if state is None else array(state["exp_avg_sq"]).ravel()
            steps = 1 if state is None else int(state["step"])
            metric = adam(squares, steps, group["betas"][1], group["eps"], group["lr"], n)
            metric *= max(steps / self._steps_of_rows, 1.0)  # in the others nothing of rows pulled
            parts.append(np.where(squares > 0, metric, STAYS * n))  # what training never moved stays
        return strength * torch.from_numpy(np.concatenate(parts))

    @cached_property
    def _steps_of_rows(self):
        """How many steps training took by its rows, where others were by facts alone; infinite where nobody knows."""
        found = 0
        for epoch in range(self.epochs if self.view.facts else 0):
            if (rates := self.log.rates(epoch)) is None:
                return np.inf
            found += 0 if _as_before(self.log, epoch) else len(rates)
        return found or np.inf

    def check(self, way: Influence) -> None:
        super().check(way)
        if way.curvature_triples == "all" and not self._descends(way):
            raise InputError(
                "curvature_triples: all needs curvature: gauss_newton and a damping above 0; give it a number instead"
            )

    def warm_up_step(self, way: Influence) -> None:
        """Run the loss once, so that a request is timed without first calls."""
        rows = np.flatnonzero(~self.absent)[:2]
        self._gradient(self.view, rows, self.log.epoch(0)[rows], np.zeros(len(rows)))

    def without(self, rows: np.ndarray, way: Influence) -> After:
        view = self._without(rows)
        return After(rows, view, self.changed(view, rows, self.log_epochs(way)))

    def norm(self, v: torch.Tensor) -> float:
        return float(v.norm())

    def _changed_by_steps(self):
        return list(self.view.named)

    def _mean_loss(self, after, rows, state):
        view, epoch = after.view, [self.epochs - 1]
        view.load(state)
        batches = view.batches(rows, self._one_epoch_each(rows, epoch), np.full(len(rows), 1 / len(rows)))
        with torch.no_grad():
            return float(sum(view.loss(batch) for batch in batches))

    def details(self, after: After, step: torch.Tensor) -> dict[str, Any]:
        """What is to be known of a step, beyond how it was found."""
        return {
            "rows_changed": len(after.changed),
            "parameters": len(step),
            "approximated": self._approximated(after.rows),
        }

    def moved(self, step: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state_dict
        for name, value in self._moved(state, torch.as_tensor(step)).items():
            state[name] = torch.from_numpy(value).to(state[name].dtype)
        return state

    def stops(self, way: Influence) -> list[int]:
        """Numbers of epochs after which the weights and the curvature are looked at; empty: one step at the last."""
        whole = 0 in self.snapshots and way.log_epochs == "all"
        if not whole or way.damping != "adam" or self.curvature_triples(way) != "all":
            return []
        wanted = [self.epochs * k / STOPS for k in range(1, STOPS)]
        near = {min(self.snapshots, key=lambda n: abs(n - each)) for each in wanted}
        between = sorted(near - {0, self.epochs})
        return [*between, self.epochs] if between else []

    def follow(self, stops: list[int], after: After, way: Influence, show_progress: bool = False) -> Change:
        """The change of the weights over the training, how it was found, and the snapshots with it.

        The last epochs are trained, as many as `Influence.last_epochs`, from where the step has come to then: what is
        left of its error is followed by the training itself.
        """
        taken_up = self._taken_up(stops, way)
        before = self._without(after.rows[:0])  # its weights are to move: not those of the user's model
        sizes = [value.numel() for value in before.parameters]
        change = torch.zeros(sum(sizes), dtype=torch.float64)
        snapshots, found = {0: np.array(self.snapshots[0], np.float32)}, {"stops": stops, "iterations": 0}
        held = torch.zeros((), dtype=torch.bool)  # of each row, whether it was at any stop
        pace = self.pace(before, stops)
        for start, stop in pairwise([0, *(stop for stop in stops if stop <= taken_up)]):
            weights, epochs = self._weights(stop), np.arange(start, stop)
            before.load(weights)
            after.view.load(weights)
            metric = self.metric(way) * torch.from_numpy(np.repeat(pace[stop], sizes)) * (self.epochs / len(epochs))
            z = self._lost(before, after, epochs, way)
            pull = z + metric * change
            change, report = self._descended(after.view, epochs, way, pull, metric + self._l2, show_progress)
            change, far = self.shortened(change)
            held = held | far
            if stop != self.epochs:
                moved = weights | self._moved(weights, change)
                snapshots[stop] = np.concatenate([np.ravel(value) for value in moved.values()]).astype(np.float32)
            report.iterations += found["iterations"]
            report.converged &= found.get("converged", True)
            report.change = max(report.change, found.get("change", 0.0))
            found |= asdict(report) | {"gradient_norm": float(z.norm())}
        found["curvature_triples"] = self._triples_of(after.view, found["iterations"], self._step_triples)
        if taken_up < self.epochs:
            found["last_epochs"] = self.epochs - taken_up
            change, snapshots = self._trained_on(after, change, taken_up, pace[taken_up], snapshots, show_progress)
        details = {**self.details(after, change), "step_norm": float(change.norm())}
        details |= {"rows_shortened": int(held.sum())} if held.any() else {}
        return Change(change, {**details, **found}, snapshots)

    def _taken_up(self, stops, way):
        """After how many epochs training is taken up again: the first of the stops that there is time for."""
        first = next(stop for stop in stops if self.epochs - stop <= way.last_epochs)
        refused = self.not_replayed("all") or self.own_draws
        if first < self.epochs and (refused or self.out_of_order() or not self.recorded.ordered()):
            return self.epochs
        return first

    def _trained_on(self, after, change, epochs, pace, snapshots, show_progress):
        """The change at the end, and the snapshots, where training goes on from a change after so many epochs.

        It goes on twice, with the rows and without, by the same random numbers: what the two have in common cancels,
        such as the rounding of the snapshot, and moments of Adam that are not those of the time.
        """
        numbers = {number for number in self.snapshots if number > epochs}
        ends = []
        for rows, moved in ((after.rows[:0], torch.zeros_like(change)), (after.rows, change)):
            state = copies(self.weights)
            for name, value in self._moved(self._weights(epochs), moved).items():
                state[name] = torch.from_numpy(value).to(state[name].dtype)
            then = Onward(epochs, state, self._optimizer_then(epochs, pace), self.log.torch_stream(epochs))
            beginning = replace(self.beginning, onward=then)
            bar, coupled = "Unlearn" if show_progress else None, self._coupled(rows, "paired")
            ends.append(trained_again(self.config, self.split, coupled, beginning, numbers, bar))
        with_rows, without = ends
        for number in numbers & with_rows.snapshots.keys():
            difference = without.snapshots[number] - with_rows.snapshots[number]
            snapshots[number] = np.asarray(self.snapshots[number], np.float32) + difference
        return _flat(without.trainer.model) - _flat(with_rows.trainer.model), snapshots

    def _optimizer_then(self, epochs, pace):
        """The optimiser's state after so many epochs: second moments are those of the end by the parameters' pace.

        The first ones, means of some ten batches, are left out.
        """
        optimizer, moments = self.trained.optimizer, {}
        beta = optimizer["param_groups"][0]["betas"][1]
        for n, each in optimizer["state"].items():
            steps = float(each["step"])
            now = steps * epochs / self.epochs
            grown = (1 - beta**now) / (1 - beta**steps) * pace[n] ** 2
            squares = {key: value * grown for key, value in each.items() if key.endswith("exp_avg_sq")}
            first = {"exp_avg": torch.zeros_like(each["exp_avg"]), "step": torch.as_tensor(now, dtype=torch.float32)}
            moments[n] = squares | first
        return {**optimizer, "state": moments}

    def _descended(self, view, epochs, way, pull, damping, show_progress):
        """An implicit step along the training, by the Hessian; by Gauss-Newton where that is too far from convex."""

        def by(outputs):
            batches = self._batches(view, epochs, outputs, self._step_triples)
            return descended(way, batches, pull, damping, show_progress, STEPS)

        try:
            return by(None)
        except InputError:
            return by(view.outputs)

    @property
    def _step_triples(self):
        """Triples of a batch, along the training."""
        return max(STEP_TRIPLES, int(self.n_triples * LEAST_SEEN / STEPS))

    def _weights(self, epochs):
        """The weights after so many epochs, by name."""
        if epochs == self.epochs:
            return {name: array(self.weights[name]) for name, _ in self.view.model.named_parameters()}
        return self.log.named(np.array(self.snapshots[epochs], np.float32))

    def pace(self, view: View, stops: list[int]) -> dict[int, np.ndarray]:
        """Of each parameter the root of Adam's second moment after so many epochs, over that at the end.

        The moments are kept of the end alone; they are running means of squared gradients, whose means over each
        parameter are measured at the snapshots.

        Args:
            view: of what remains; its weights are moved.
            stops: numbers of epochs, at least 1.

        Returns:
            stop -> float64 ``[parameters]``.
        """
        sizes = [value.numel() for value in view.parameters]
        kept, numbers = np.flatnonzero(~self.absent), sorted({*self.snapshots, self.epochs})
        rows, rng = min(self.recorded.batch_rows, len(kept)), np.random.default_rng(0)
        squares = np.zeros((len(numbers), len(sizes)))
        for at, number in enumerate(numbers):
            view.load(self._weights(number))
            for _ in range(MOMENT_BATCHES):
                some = np.sort(rng.choice(kept, rows, replace=False))
                gradient = self._mean_gradient(view, some, [min(number, self.epochs - 1)])
                squares[at] += [float(part.square().sum()) for part in gradient.split(sizes)]
        decay = self.trained.optimizer["param_groups"][0]["betas"][1] ** (len(kept) / rows)  # an epoch's
        moments, moment = [], np.zeros(len(sizes))
        for epoch in range(self.epochs):
            then = [np.interp(epoch + 0.5, numbers, column) for column in squares.T]
            moment = decay * moment + (1 - decay) * np.array(then)
            moments.append(moment / (1 - decay ** (epoch + 1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            paces = {stop: np.sqrt(moments[stop - 1] / moments[-1]) for stop in stops}
        return {stop: np.where(np.isfinite(pace) & (pace > 0), pace, 1.0) for stop, pace in paces.items()}

    def moments(self) -> dict[int, dict[str, torch.Tensor]]:
        optimizer, view = self.trained.optimizer, self.view.of_all()  # the next request may change others
        group = optimizer["param_groups"][0]
        if "betas" not in group:
            return {}
        rng, kept = np.random.default_rng(0), np.flatnonzero(~self.absent)
        size = min(self.recorded.batch_rows, len(kept))
        batches = max(-(-len(kept) // size), BATCHES_ANEW)  # every row's turn comes: else its user may have no moments
        orders = [rng.permutation(kept) for _ in range(-(-batches * size // len(kept)))]
        weight = np.full(size, 1.0 if view.traits.sums else 1 / size)
        l2 = self.weight_decay * _joined(view.parameters)
        squares = torch.zeros_like(l2)
        for some in np.sort(np.concatenate(orders)[: batches * size].reshape(batches, size), axis=1):
            negatives = self._one_epoch_each(some, [self.epochs - 1])
            squares += (self._gradient(view, some, negatives, weight) + l2).square() / batches
        parts = dict(zip(view.named, squares.split([value.numel() for value in view.parameters]), strict=True))
        found = {}
        for n, (name, value) in enumerate(view.model.named_parameters()):
            if n in optimizer["state"]:
                steps = optimizer["state"][n]["step"]
                part = parts.get(name, torch.zeros(value.numel())) * (1 - group["betas"][1] ** int(steps))
                average = part.view(value.shape).to(value.dtype)
                found[n] = {"step": steps, "exp_avg": torch.zeros_like(average), "exp_avg_sq": average}
        return found

    def _moved(self, weights, change):
        """The weights that change, by name, as float64 arrays with a flat change added."""
        parts = change.split([value.numel() for value in self.view.parameters])
        return {
            name: np.asarray(weights[name], np.float64) + part.view(value.shape).numpy()
            for (name, value), part in zip(self.view.named.items(), parts, strict=True)
        }

    def solve(self, after: After, z: torch.Tensor, way: Influence, show_progress: bool = False):
        """``(H + D)^-1 z``, how it was found, and of how many triples H is."""
        damping = self.damping(way)
        if self.curvature_triples(way) == "all":
            batches = self._batches(after.view, self.log_epochs(way), after.view.outputs, BATCH_TRIPLES)
            step, report = descended(way, batches, z, damping, show_progress)
            return step, report, self._triples_of(after.view, report.iterations, BATCH_TRIPLES)
        curvature, n_triples = self.curvature(after, way)
        diagonal = torch.zeros_like(z) if curvature.outputs is None else curvature.diagonal()
        step, report = conjugate(way, curvature, damping, z, jacobi(diagonal, damping), show_progress)
        warn_unless_converged(report)
        return step, report, n_triples

    def apply(self, rows: np.ndarray, unlearned: Unlearned) -> None:
        super().apply(rows, unlearned)
        new = unlearned.training
        self.view = self._without(np.empty(0, np.int64), new.model if new else None)
        self.view.model.load_state_dict(unlearned.state_dict)
        self.weights = copies(unlearned.state_dict)
        if new and isinstance(new.epochs, Fresh):  # from now on, this is the training to be coupled to
            self.recorded, self.beginning = new.epochs.recorded_anew(), new.start

    def _approximated(self, rows):
        """What of the training is not accounted for exactly, in words."""
        found = list(self.view.traits.approximated)
        if self.view.unreduced.norms:
            found.append("L2 norms over a batch: quadratic, with a fixed weight")
        if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.view.model.modules()):
            found.append(BATCH_NORM)
        if any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.view.model.modules()):
            found.append("dropout: off")
        gone = np.union1d(np.flatnonzero(self.absent), rows)
        if self.split.sequential and (users := self.split.first_items_kept(gone)):
            found.append(
                f"items forgotten wholly: still the first of {users} users' histories, where no row names them"
            )
        return found

    def _without(self, rows, model=None):
        """The model, with the weights as they are, on what remains without ``rows`` and all that went before.

        ``model``: one that has been trained on that, to take instead.
        """
        gone = np.union1d(np.flatnonzero(self.absent), rows)
        loader = self.split.remaining(gone)
        model, position = model or self._rebuilt(loader._dataset), self.split.positions_without(gone)
        return View(model, loader, position, self._params, self.view)

    def _gradient(self, view, rows, negatives, weight):
        """Gradient of the weighted sum of the rows' losses, float64 ``[size]``."""
        if not len(rows):
            return torch.zeros(sum(p.numel() for p in view.parameters), dtype=torch.float64)
        return AutogradCurvature(view.parameters, view.batches(rows, negatives, weight), view.loss).gradient()

    def _gradient_rows(self):
        """Rows that each part of z is computed on at most: fewer where the loss is dear."""
        dear = self.view.traits.curvature_triples
        return 4 * dear // self.split.terms if dear else GRADIENT_ROWS

    def _one_epoch_each(self, rows, epochs):
        """Negatives ``[rows, m]``, each row's of one of the epochs, in turn."""
        negatives = np.empty((len(rows), self.log.negatives), np.int64)
        for turn, epoch in enumerate(epochs):
            negatives[turn :: len(epochs)] = self.log.epoch(epoch)[rows[turn :: len(epochs)]]
        return negatives

    def lost(self, after: After, way: Influence) -> torch.Tensor:
        return self._lost(self.view, after, self.log_epochs(way), way)

    def _lost(self, before, after, epochs, way):
        """z, with the negatives of some epochs."""
        log, limit = self.log, self._gradient_rows()
        rows, changed, after = after.rows, after.changed, after.view
        count = max(min(limit // len(rows), len(epochs)), 1) if log.negatives else 1  # without, epochs are alike
        z = torch.zeros(sum(p.numel() for p in before.parameters), dtype=torch.float64)
        chosen = epochs[np.linspace(0, len(epochs) - 1, count).round().astype(int)]
        negatives = log.gather(rows, chosen).reshape(count * len(rows), log.negatives)
        z += self._gradient(before, np.tile(rows, count), negatives, np.full(len(negatives), 1 / count))
        if len(changed):
            some = spread(changed, limit)
            negatives, weight = self._one_epoch_each(some, epochs), np.full(len(some), len(changed) / len(some))
            z += self._gradient(before, some, negatives, weight) - self._gradient(after, some, negatives, weight)
        if not (self.view.traits.sums or way.forgotten_stay) and self._mean_counts(before, len(rows), epochs, z):
            present = np.flatnonzero(~self.absent)
            z -= len(rows) * self._mean_gradient(before, spread(present, limit), epochs)
        else:
            z += len(rows) * self._terms * self.weight_decay * _joined(before.parameters)
        if self.come_back(way.pool_return):
            kept, drawn, returned, weight = self.returned(rows, epochs)
            # an item is drawn instead of another
            z -= self._gradient(after, kept, returned, weight) - self._gradient(after, kept, drawn, weight)
        return z

    def _mean_counts(self, view, count, epochs, z):
        """Whether the mean gradient of all rows, times a count of them, is a good part of z; else it is left out.

        Its square is that of two halves of a sample, whose noise is not the same.
        """
        present = np.random.default_rng(0).permutation(np.flatnonzero(~self.absent))
        halves = np.array_split(present[: 2 * MEAN_ROWS], 2)
        first, second = (self._mean_gradient(view, np.sort(half), epochs) for half in halves)
        square = float(first @ second)
        return count * math.copysign(abs(square) ** 0.5, square) > MEAN_SHARE * float(z.norm())

    def _mean_gradient(self, view, rows, epochs):
        """Mean of the gradients of some rows: of what belongs to no row, all of it."""
        return self._gradient(view, rows, self._one_epoch_each(rows, epochs), np.full(len(rows), 1 / max(len(rows), 1)))

    def returned(self, rows, epochs):
        """Rows in which retraining would draw other negatives, their negatives before and then, and how often."""
        log = self.log
        if self.recorded.popularity is not None:
            kept, drawn, returned, share = self.drawn_anew(rows, epochs)
            some = spread(np.arange(len(kept)), self._gradient_rows())
            weight = np.full(len(some), len(kept) / max(len(some), 1) * share)
            return kept[some], drawn[some], returned[some], weight
        present = np.flatnonzero(~self.absent)
        users, items = np.asarray(log.users, np.int64)[present], np.asarray(log.items, np.int64)[present]
        gone = np.isin(present, rows)
        found = list(returning(users, items, gone, log.metadata["n_items"]))
        empty = np.empty(0, np.int64)
        kept = np.concatenate([empty, *(np.tile(present[k], len(back)) for _, k, back, _ in found)]).astype(np.int64)
        item = np.concatenate([empty, *(np.repeat(back, len(k)) for _, k, back, _ in found)]).astype(np.int64)
        often = (np.full(len(k) * len(back), log.negatives * share) for _, k, back, share in found)
        weight = np.concatenate([np.empty(0), *often])
        some = spread(np.arange(len(kept)), self._gradient_rows())
        kept, item, weight = kept[some], item[some], weight[some] * (len(kept) / max(len(some), 1))
        drawn = self._one_epoch_each(kept, epochs)
        returned = drawn.copy()
        returned[np.arange(len(kept)), np.arange(len(kept)) % log.negatives] = item
        return kept, drawn, returned, weight

    def changed(self, after: View, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Remaining rows whose loss is another on what remains, with the same weights and negatives: sorted array.

        By trying: a graph ties all rows together, a user's history those of the user; most models hold no data. A
        shallow graph may tie few: rows of the forgotten items, and of other items of their users, are tried too.
        """
        kept = self._kept(rows)
        own = np.isin(self.log.users[kept], np.unique(self.log.users[rows]))
        if self.split.sequential:
            kept = kept[own]
            columns = (self.view.dataset.inter_feat, after.dataset.inter_feat)
            field = f"{self.split.train._dataset.iid_field}{self.config['LIST_SUFFIX']}"
            then, now = columns[0][field][self.view.position[kept]], columns[1][field][after.position[kept]]
            return kept[array((then != now).any(1))]
        others, items = kept[~own], np.asarray(self.log.items)
        near = (np.isin(items[others], items[each]) for each in (rows, kept[own]))
        tried = [others, *(others[each] for each in near)]
        if self._differ(after, np.unique(np.concatenate([spread(each, PROBE) for each in tried])), epochs):
            return kept
        return kept[own] if self._differ(after, spread(kept[own], PROBE), epochs) else kept[:0]

    def _differ(self, after, rows, epochs):
        if not len(rows):
            return False
        negatives, ones = self._one_epoch_each(rows, epochs), np.ones(len(rows))
        with torch.no_grad():
            for batches in zip(*(view.batches(rows, negatives, ones) for view in (self.view, after)), strict=True):
                then, now = (
                    view.losses(batch[0], len(batch[1]))
                    for view, batch in zip((self.view, after), batches, strict=True)
                )
                if not torch.allclose(then, now, rtol=ROUNDING, atol=ROUNDING):
                    return True
        return False

    def _descends(self, way):
        """Whether a curvature that is known a batch at a time will do: none is negative, and D is invertible."""
        damped = torch.as_tensor(self.damping(way)).min() > 0
        return not way.exact and way.damping != "none" and bool(damped)

    def curvature_triples(self, way: Influence) -> int | str:
        """How many triples the curvature is of: a number or 'all'."""
        wanted = way.curvature_triples
        if wanted != "auto":
            return wanted
        wanted = self.view.traits.curvature_triples or CURVATURE_TRIPLES[self.split.sequential]
        return SAMPLED_TRIPLES if wanted == "all" and not self._descends(way) else wanted

    def _batch_rows(self, triples):
        return self.view.batch_rows if self.view.traits.batch else max(triples // self.split.terms, 1)

    def _triples_of(self, after, batches, triples):
        """Triples that so many batches of the curvature hold, each counted once."""
        return min(batches * self._batch_rows(triples), int(np.count_nonzero(after.position >= 0))) * self.split.terms

    def _batches(self, after, epochs, outputs, triples):
        """Function: number of a batch -> curvature of it, scaled to all remaining rows. Every row's turn comes."""
        kept, size = np.flatnonzero(after.position >= 0), self._batch_rows(triples)
        turns = -(-len(kept) // size)

        @lru_cache(maxsize=1)
        def order(turn):
            return np.random.default_rng(turn).permutation(len(kept))

        def curvature_of(number):
            rows = kept[np.sort(order(number // turns)[number % turns :: turns])]
            negatives, weight = self._one_epoch_each(rows, epochs), np.full(len(rows), len(kept) / len(rows))
            batches = after.batches(rows, negatives, weight)
            return AutogradCurvature(after.parameters, batches, after.loss, outputs)

        return curvature_of

    def curvature(self, after: After, way: Influence) -> tuple[AutogradCurvature, int]:
        """Curvature of so many remaining triples at most, those of the users concerned first; and of how many."""
        rows, view = after.rows, after.view
        wanted = max(int(self.curvature_triples(way)) // self.split.terms, 1)
        kept = np.flatnonzero(view.position >= 0)
        own = np.isin(self.log.users[kept], np.unique(self.log.users[rows]))
        concerned, others = spread(kept[own], max(wanted // 2, 1)), spread(kept[~own], wanted - wanted // 2)
        weight = np.concatenate(
            [
                np.full(len(part), len(whole) / max(len(part), 1))
                for part, whole in ((concerned, kept[own]), (others, kept[~own]))
            ]
        )
        sample = np.concatenate([concerned, others])
        order = np.argsort(sample)
        sample, weight = sample[order], weight[order]
        batches = view.batches(sample, self._one_epoch_each(sample, self.log_epochs(way)), weight)
        outputs = None if way.exact else view.outputs
        return AutogradCurvature(view.parameters, batches, view.loss, outputs), len(sample) * self.split.terms


def _as_before(log, epoch):
    """Whether an epoch is noted down as the one before is: KTUP's of facts alone are."""
    if not epoch or log.static or log.order[epoch] != log.order[epoch - 1]:
        return False
    return np.array_equal(log.epoch(epoch), log.epoch(epoch - 1))


def _flat(model):
    return _joined(model.parameters())


def _joined(values):
    """Flat vector of all values, float64."""
    return torch.cat([value.detach().cpu().double().reshape(-1) for value in values])
