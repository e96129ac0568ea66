"""Trainings by compiled kernels: of a log again, and, where ``compiled: True`` asks for it, with RecBole's draws, logs,
validation and checkpoints. The weights are those of RecBole's own trainer up to rounding."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.general_recommender import BPR, LightGCN
from recbole.model.sequential_recommender import TransRec
from recbole.trainer import Trainer
from recbole.utils import InputType

from recbole_unlearn.compat.recbole_models import clear_caches
from recbole_unlearn.data.sampling import Played, own_draws
from recbole_unlearn.devices import array
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.dot_product import DotProductTraining
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.propagated_training import GraphLoss, PropagatedTraining
from recbole_unlearn.influence.recorded import Adam
from recbole_unlearn.influence.summed_training import BLOCK, POINTWISE, SummedTraining
from recbole_unlearn.models.compared import COMPARED, Compared, Comparisons, otherwise
from recbole_unlearn.models.sums import SUMMED, Sums, last_items, width
from recbole_unlearn.settings.conflicts import plain_adam

NAN = "Training loss is nan"  # RecBole's words
LOGGED = (BPR, LightGCN, *SUMMED)  # whose log tells all that training drew
COMPILED = (*LOGGED, *COMPARED)
# What ML-1M took, K = 8 and 64, two cores (results/): to tell which requests training again serves soon enough.
SECONDS_A_TRIPLE, SECONDS_A_NUMBER = 2e-8, 1.5e-9
SECONDS_A_DRAW = 1.5e-6  # a triple of ml-100k, where batches are made as for RecBole's trainer


def plain_steps(config: Any, group: dict[str, Any]) -> bool:
    """Whether a training took the steps that kernels take; ``group``: of the optimiser's settings."""
    return plain_adam(config) and "betas" in group and not group.get("amsgrad")


def not_again(config: Any, model: AbstractRecommender, group: dict[str, Any], loader: TrainDataLoader) -> str | None:
    """Why kernels cannot repeat a training, in words; None where they can.

    Args:
        group: of the optimiser's settings.
        loader: of the training data.
    """
    if type(model) not in COMPILED:
        *others, last = (each.__name__ for each in LOGGED)
        return f"it is for {', '.join(others)} and {last}, not for {type(model).__name__}"
    if not plain_steps(config, group):
        return "it is for plain Adam, without clipped gradients"
    if not config["single_spec"] or config["enable_amp"]:
        return "it is for one process, in float32"
    if own := own_draws(loader):
        return f"batches come from {own}"
    summed, compared = type(model) in SUMMED, type(model) in COMPARED
    if not (_pairs(loader) if summed or compared else Played.fits(loader)):
        return "batches hold more than a user, an item and negatives"
    if reason := otherwise(model):
        return reason
    if summed and not last_items(loader._dataset).all():
        return "there are empty histories"
    return None


def refusal(trainer: Trainer, loader: TrainDataLoader) -> str | None:
    """Why a training cannot be compiled, in words; None where it can."""
    if reason := not_again(trainer.config, trainer.model, trainer.optimizer.param_groups[0], loader):
        return reason
    if type(trainer.model) in COMPARED:
        return f"{type(trainer.model).__name__} draws more than its log holds, and is trained again alone by kernels"
    if type(trainer.model) is TransRec:  # norms, most of which nothing is differentiated by
        return "the loss that TransRec's trainer reports has more terms than the kernels take"
    if trainer.start_epoch:
        return "a training cannot go on in this way, only begin"
    return None


def seconds(epochs: int, triples: int, numbers: int) -> float:
    """About how long kernels take on two cores: so many triples an epoch, each of so many numbers."""
    return epochs * triples * (SECONDS_A_TRIPLE + SECONDS_A_NUMBER * numbers)


def seconds_again(model: AbstractRecommender, epochs: int, triples: int) -> float:
    """The same of a model that has other kernels than BPR and LightGCN."""
    if type(model) in SUMMED:
        return seconds(epochs, triples, width(model))
    numbers = Comparisons(model).part.start.shape[1]  # for each triple there is at most one comparison more
    return seconds(epochs, 2 * triples, numbers) + epochs * triples * SECONDS_A_DRAW


def _pairs(loader):
    """Whether a loader's batches are a row and its negatives, drawn whatever the model is."""
    dynamic = loader.neg_sample_args.get("dynamic", False)
    return loader.dl_format == InputType.PAIRWISE and not dynamic and not loader.config["transform"]


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


class _Kernels:
    """What both kinds of kernels leave in a trainer's model and its optimiser."""

    _parameters: list[list[torch.Tensor]]
    _training: Any

    def __init__(self, trainer: Trainer) -> None:
        self._model, self._optimizer = trainer.model, trainer.optimizer
        self._adam = Adam.of(trainer.optimizer.param_groups[0])

    def _steps(self, parameters: Sequence[torch.Tensor]) -> list[int]:
        """That Adam has taken of some parameters."""
        return [self._training.steps] * len(parameters)

    def write_back(self) -> None:
        """Bring the model and its optimiser's state up to date."""
        read = (self._training.W, self._training.M, self._training.V)
        parts = zip(*(each if isinstance(each, list) else [each] for each in read), strict=True)
        for parameters, (weights, first, second) in zip(self._parameters, parts, strict=True):
            sizes = [value.shape[0] if value.ndim > 1 else 1 for value in parameters]
            states = adam_states(sizes, first, second, self._training.steps)
            now = torch.from_numpy(weights).split(sizes)
            for value, new, state, steps in zip(parameters, now, states, self._steps(parameters), strict=True):
                with torch.no_grad():
                    value.copy_(new.view_as(value))
                placed = {name: state[name].view_as(value).to(value.device) for name in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[value] = {"step": torch.tensor(float(steps)), **placed}
        clear_caches(self._model)


class Kernels(_Kernels):
    """What trains a trainer's model on some data instead of it.

    Args:
        trainer: before its first step, of a training that can be compiled.
        data: RecBole's.
        rows: of ``data`` that stand for the rows of epochs, ints; default: all.
    """

    def __init__(self, trainer: Trainer, data: Dataset, rows: np.ndarray | slice = slice(None)) -> None:
        super().__init__(trainer)
        users, items = (data.inter_feat[name].numpy() for name in (data.uid_field, data.iid_field))
        self._items = items[rows]
        if type(trainer.model) in SUMMED:
            sums = Sums(trainer.model)
            self._parameters, self._named = sums.parameters, [each[rows] for each in sums.queries(data)]
            self._training = SummedTraining(sums.parts, self._adam)
            return
        self._parameters, self._named = [list(trainer.model.parameters())], users[rows]
        start = np.concatenate([array(value) for value in trainer.model.parameters()])
        self._training = training_of(trainer.model, (users, items), start, self._adam)

    def epoch(self, epoch: Epoch) -> float:
        """Train on an epoch; returns the sum of its batches' mean losses; ValueError where it is NaN."""
        loss = self._training.epoch(self._named, self._items, epoch, with_loss=True)
        if not np.isfinite(loss):
            raise ValueError(NAN)
        return loss


class BatchKernels(_Kernels):
    """What trains a trainer's model on batches instead of it, where they hold more than a log tells: facts, draws.

    Args:
        trainer: before its first step, of a training that can be compiled, of one learning rate.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._compared = Comparisons(trainer.model)
        self._parameters = [self._compared.parameters]
        self._training = SummedTraining([self._compared.part], self._adam, loss=POINTWISE)

    def _steps(self, parameters):
        return [int(self._training.taken[owner]) for owner in self._compared.owner]

    def epoch(self, batches: Iterable[Interaction]) -> float:
        """Train on batches as they come; returns the sum of their losses; ValueError where it is NaN."""
        loss = 0.0
        for some in _blocks(map(self._compared.told, batches)):
            loss += self._taken(some)
        if not np.isfinite(loss):
            raise ValueError(NAN)
        return loss

    def _taken(self, batches):
        """Take a step for each of what some batches compare; returns the sum of their losses."""
        bounds = np.cumsum([0, *(len(each.high) for each in batches)])
        queries, high, low, shares = map(np.concatenate, zip(*batches, strict=True))
        epoch = Epoch(np.arange(len(high)), bounds, low[:, None], np.full(len(batches), self._adam.lr))
        return self._training.epoch([queries], high, epoch, with_loss=True, shares=shares)


def _blocks(batches: Iterable[Compared]) -> Iterator[list[Compared]]:
    """As many at a time as kernels arrange at once."""
    some, rows = [], 0
    for each in batches:
        some.append(each)
        rows += len(each.high)
        if rows >= BLOCK:
            yield some
            some, rows = [], 0
    if some:
        yield some


def warm_up(model: AbstractRecommender, data: Dataset, adam: Adam, m: int) -> None:
    """Load or compile the kernels of a model that has others than BPR and LightGCN, for m negatives a row."""
    one, bounds, rates = np.zeros(1, np.int64), np.array([0, 1]), np.full(1, 1e-3)
    if type(model) in COMPARED:
        seen = Comparisons(model)
        epoch = Epoch(one, bounds, np.zeros((1, 1), int), rates)
        SummedTraining([seen.part], adam, loss=POINTWISE).epoch([np.zeros((1, seen.queries), int)], one, epoch)
        return
    sums, epoch = Sums(model), Epoch(one, bounds, np.zeros((1, m), int), rates)
    SummedTraining(sums.parts, adam).epoch([each[:1] for each in sums.queries(data)], one, epoch)


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
        self._optimizer, self._kernels = trainer.optimizer, Kernels(trainer, loader._dataset)

    def __call__(self, recorded: Any, rates: list[float]) -> float:
        """Train on what a loader draws; returns the sum of the batches' losses.

        Args:
            recorded: the loader, which writes down what it yields (`trainer._Recorded`).
            rates: takes the learning rate of each step.
        """
        recorded.keep = True
        n_steps = sum(1 for _ in recorded)
        rates += [self._optimizer.param_groups[0]["lr"]] * n_steps
        step, drawn = recorded.step[recorded.position], recorded.drawn[recorded.position]
        order = np.argsort(step, kind="stable")
        bounds = np.searchsorted(step[order], np.arange(n_steps + 1))
        loss = self._kernels.epoch(Epoch(order, bounds, drawn, np.array(rates)))
        self._kernels.write_back()
        return loss
