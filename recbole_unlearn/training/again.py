"""A training again without some rows, by its own random numbers or by others."""

from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat
from time import perf_counter
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.trainer import trainer as recbole_trainer
from recbole.utils import KGDataLoaderState
from tqdm import tqdm

from recbole_unlearn.compat.patches import NoTensorboard
from recbole_unlearn.compat.recbole_models import checkpoint_state, is_recboles, replaced
from recbole_unlearn.data.orders import BatchOrder
from recbole_unlearn.data.sampling import Played, positions, streams
from recbole_unlearn.data.split import Split, pairwise_loader
from recbole_unlearn.devices import set_torch_stream
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Coupling, Fresh, Paired
from recbole_unlearn.influence.recorded import Adam, Recorded, marked
from recbole_unlearn.models.draws import keep_draws
from recbole_unlearn.models.losses import fixed_randomness
from recbole_unlearn.settings.config import changed
from recbole_unlearn.settings.recbole_keys import validating
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import scratch_folder
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.training.compiled import LOGGED, BatchKernels, Kernels, not_again
from recbole_unlearn.training.fit import COMPARED, flat_weights, nan_said, new_model
from recbole_unlearn.training.trainer import load_best, make_trainer


def train_paired(config, split, path, original, forgotten, seed):
    """A model's own training again, without some rows: by its random numbers, as far as these fit (`Paired`).

    For every model: see `trained_again`. It takes as many epochs as the model's weights did, and no validation data
    picks another. By RecBole's trainer, not by our kernels. With nothing left out it ends in the model's weights.

    Args:
        path: file for the new weights.
        original: checkpoint of the model, its log beside it.
        forgotten (int array): rows to leave out.
        seed (int): of the model's training.

    Returns:
        (model with the new weights, seconds of training)

    Raises:
        InputError: no or a damaged original; an order of batches that nobody knows.
    """
    stored, log = checkpoints.load(original)
    gone = marked(log.n_rows, np.asarray(forgotten, np.int64))
    paired = Paired(recorded(config, split, stored, log), gone, redraws(seed, log))
    if not paired.recorded.ordered():
        raise InputError(f"the order of batches of {log.path} is not known; train again")
    again = trained_again(config, split, paired, Beginning.of(seed, stored, log))
    state = checkpoint_state(again.trainer, len(paired) - 1)
    checkpoints.save(path, {**state, "triple_log": {"missing": COMPARED}})
    return again.trainer.model, again.seconds


@dataclass(frozen=True)
class Onward:
    """Where a training is taken up that is not begun anew.

    Attributes:
        epochs: that are done.
        state_dict: of the model then.
        optimizer: state of the optimiser then, as torch gives it.
        stream: where torch's random streams stood then, see `devices.torch_stream`; None: not known.
    """

    epochs: int
    state_dict: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    stream: np.ndarray | None = None


@dataclass(frozen=True)
class Beginning:
    """Where a training's random numbers came from, beside those that are recorded.

    Attributes:
        seed: of the initial weights, and of what is drawn in training.
        without: rows of the split that were not there, sorted ints.
        log: that may hold the initial weights; None: they are drawn by the seed.
        validated: whether RecBole's validation came between its epochs, which may draw (BERT4Rec's masks).
        onward: where to take it up, by the model's own trainer, instead.
    """

    seed: int | None = None
    without: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    log: TripleLog | None = None
    validated: bool = False
    onward: Onward | None = None

    @classmethod
    def of(cls, seed: int | None, stored: dict[str, Any], log: TripleLog) -> "Beginning":
        """That of a checkpoint's training: where it validated, there is a score."""
        return cls(seed, log=log, validated=was_validated(stored))


def was_validated(stored: dict[str, Any]) -> bool:
    """Whether a checkpoint's training validated: else its best score is RecBole's first one, or, by a purge, gone."""
    return stored.get("best_valid_score") not in (np.inf, -np.inf)


@dataclass
class Again:
    """What a training came to.

    Attributes:
        trainer: with its model and its optimiser.
        start: initial weights, flat, float64.
        seconds: of training.
        snapshots: number of epochs -> flat weights.
        epochs: that the weights are of.
        played: how many were trained, where validation chose among them.
    """

    trainer: Trainer
    start: torch.Tensor
    seconds: float
    snapshots: dict[int, np.ndarray]
    epochs: Coupling
    played: int


def trained_again(
    config: Config,
    split: Split,
    epochs: Coupling,
    beginning: Beginning,
    snapshots: Iterable[int] = (),
    bar: str | None = None,
    compiled: bool = False,
    validated: bool = False,
) -> Again:
    """Train on given epochs, with nothing of other rows in graph, histories or facts.

    The initial weights are those of the beginning, and so is what the model draws in training (dropout), as far as it
    draws as much. A class of the user's own begins with the weights that the seed gives it without those rows: it may
    compute them from the data. No random stream of the process moves.

    Args:
        epochs: what to train on.
        snapshots: numbers of epochs after which the weights are kept.
        bar: name of what is shown of the progress.
        compiled: whether our kernels may train, where they can; else RecBole's own trainer does.
        validated: whether RecBole's validation, with nothing of other rows, chooses among epochs that are `Fresh`,
            and stops early; else all are trained.
    """
    static, numbers = config["negatives"] == "static", set(snapshots)
    onward = beginning.onward
    done = onward.epochs if onward else 0
    with (
        fixed_randomness(0),
        scratch_folder() as folder,
        replaced(recbole_trainer, get_tensorboard=lambda logger: NoTensorboard()),
    ):
        gone = np.flatnonzero(~epochs.kept)
        rest = split.remaining(gone)
        model = new_model(config, split, beginning.seed, rest._dataset)
        own = changed(config, checkpoint_dir=str(folder), suppression=None, log_wandb=False, **validating(config))
        trainer: Any = make_trainer(own, model)
        first = new_model(config, split, beginning.seed, split.remaining_dataset(beginning.without))
        start = perf_counter()
        _begin_as(trainer, first, rest._dataset, beginning)
        initial, position = flat_weights(model), split.positions_without(gone)
        group = trainer.optimizer.param_groups[0]
        by_kernels = compiled and not onward and not not_again(config, model, group, pairwise_loader(rest))
        if by_kernels and type(model) in LOGGED:
            play = _by_kernels(Kernels(trainer, rest._dataset, position), iter(epochs))
        else:
            whole = split.remaining(np.empty(0, np.int64), beginning.seed)
            trainer.equip(pairwise_loader(whole), static)
            played = _Coupled(whole, epochs, position, rest, beside=first, done=done)
            if by_kernels and played.facts:
                played.set_mode(KGDataLoaderState.RSKG)
            play = _by_kernels(BatchKernels(trainer), repeat(played)) if by_kernels else _by_trainer(trainer, played)
        kept = {0: initial} if 0 in numbers else {}

        def train_epoch(number):
            with nan_said(f"training again, the loss became NaN in epoch {number}; train anew, more slowly"):
                loss = play(number, validated or number + 1 in numbers or number + 1 == len(epochs))
            if number + 1 in numbers:
                kept[number + 1] = flat_weights(model)
            return loss

        if validated:
            assert isinstance(epochs, Fresh)
            valid = split.validation_without(gone, rest._dataset)
            epochs = epochs.first(_validated(trainer, rest, valid, train_epoch, bar is not None))
            kept = {number: weights for number, weights in kept.items() if number <= len(epochs)}
        else:
            repeats = isinstance(epochs, Paired) and not (by_kernels or onward) and beginning.validated
            repeats = repeats and len(split.valid) > 0
            if onward and onward.stream is not None:
                with suppress(ValueError):  # another torch's: masks of dropout are others then, as where none is known
                    set_torch_stream(onward.stream)
            between = _Validations(trainer, rest, lambda: split.judged_without(gone).valid, repeats)
            for number in tqdm(range(done, len(epochs)), bar, ncols=100, disable=bar is None):
                trainer.begin_epoch(number)
                train_epoch(number)
                if number + 1 < len(epochs):
                    between(number)
        played = len(trainer.train_loss_dict) if validated else len(epochs)
        seconds = perf_counter() - start
        return Again(trainer, torch.from_numpy(initial).double(), seconds, kept, epochs, played)


def _begin_as(trainer, first, data, beginning):
    """Give a trainer's model on some data, and its optimiser, the state that they begin with.

    ``first``: the model on the data that there were when the random numbers were drawn.
    """
    model, onward = trainer.model, beginning.onward
    if is_recboles(type(model)):  # what is drawn of a graph or histories, when it is built, may come before weights
        with torch.no_grad():
            for value, theirs in zip(model.parameters(), first.parameters(), strict=True):
                value.copy_(theirs)
        keep_draws(first, model, data)
        if beginning.log is not None:
            begin(model, beginning.log)
    if onward:
        model.load_state_dict(onward.state_dict)
        trainer.optimizer.load_state_dict(onward.optimizer)


class _Validations:
    """Validates between epochs, as training did, where that draws: what comes after would be drawn otherwise."""

    def __init__(self, trainer, loader, valid, repeats):
        self.trainer, self.loader, self.made, self.valid = trainer, loader, valid, None
        self.wanted = repeats and trainer.eval_step > 0

    def __call__(self, number):
        if not self.wanted or (number + 1) % self.trainer.eval_step:
            return
        if self.valid is None:
            self.valid = self.made()
            self.trainer.eval_collector.data_collect(self.loader)
        before = positions()
        self.trainer._valid_epoch(self.valid)
        self.wanted = positions() != before


def _validated(trainer, loader, valid, train_epoch, verbose):
    """RecBole's ``fit``, of other epochs than it draws; the trainer then has the best one's weights and moments.

    Returns:
        Number of epochs up to the best one.
    """
    with replaced(trainer, _train_epoch=lambda data, number, *_, **__: train_epoch(number)):
        trainer.fit(loader, valid, verbose=verbose)
    state = load_best(trainer)
    trainer.optimizer.load_state_dict(state["optimizer"])
    return state["epoch"] + 1


def _by_kernels(kernels, coming):
    """What trains an epoch, told whether its model's weights are wanted then, and returns its loss: by our kernels.

    ``coming``: what these take of each epoch.
    """

    def play(number, wanted):
        loss = kernels.epoch(next(coming))
        if wanted:
            kernels.write_back()
        return loss

    return play


def _by_trainer(trainer, played):
    """The same by RecBole's trainer."""

    own = trainer._train_epoch  # is RecBole's for a loader like this one, which there is no log of

    def play(number, wanted):
        return own(played, number)

    return play


class _Coupled(Played):
    """Draws as much in a shortened batch as in the one that it stands for, so that what is drawn later stays the same.

    Args:
        beside: a model of the same class that is thrown away, to draw with: the one that is trained is to see no row
            that is gone, whatever it keeps of the batches that it sees.
        done: number of the first epochs, which are passed over.
        others: as for `Played`.
    """

    def __init__(self, loader, epochs, position, rest, beside, done=0):
        super().__init__(loader, map(epochs.epoch, range(done, len(epochs))), position, rest)
        self.n_rows, self.beside = epochs.n_rows, beside
        self.draws = bool(self.rest.config["transform"])  # what is done to a batch may be random (BERT4Rec's masks)
        self.before = None

    def _drawn(self):
        self.left = self.n_rows
        batches = iter(super()._drawn())
        while True:
            self.before = streams() if self.draws else None
            try:
                drawn = next(batches)
            except StopIteration:
                return
            yield drawn

    def made(self, rows, negatives):
        if self.before is None:
            return super().made(rows, negatives)
        after = streams()
        self.before()
        batch = super().made(rows, negatives)
        after()
        return batch

    @contextmanager
    def shortened(self, drawn, rows):
        whole = min(len(drawn[self.rest.iid_field]) // self.rest.times, self.left)
        self.left -= whole
        back = streams() if rows < whole else None
        yield
        if back:
            self._move_on(back, drawn, whole * self.rest.times)

    def _move_on(self, back, drawn, length):
        """Put the streams where the loss of the ``length`` first of a batch leaves them, from where they were."""
        after = streams()
        back()
        before, moved = positions(), False
        cut = {name: value if name in self.facts else value[:length] for name, value in drawn.interaction.items()}
        with suppress(Exception):  # it may lack what only training gives a model (NCL's clusters)
            self.beside.calculate_loss(Interaction(cut).to(self.beside.device))
            moved = positions() != before
        if not moved:  # else the next batch would draw once more what this one has
            after()


def begin(model, log):
    """Give a model the initial weights that a log holds; those of the seed, where an earlier version rounded them."""
    if log.snapshots[:1] == [0] and (start := log.snapshot(0)).dtype == np.float32:
        named, parameters = log.named(np.array(start)), dict(model.named_parameters())
        with torch.no_grad():
            for name, value in named.items():
                parameters[name].copy_(torch.from_numpy(value))


def redraws(seed: int, log: TripleLog) -> tuple[int, ...]:
    """Seed of what is drawn of items that come back, for a log of a training of this seed.

    It is another one for each training, so that models of several seeds are independent, and for each log that requests
    led to: drawn by the same numbers, what one request changed would be what the next one changes.
    """
    return (seed, log.missing) if log.missing else (seed,)


def recorded(config, split, stored, log):
    """What a checkpoint and its log tell of their training.

    Returns:
        Recorded
    """
    epochs, batch_rows = stored["triple_log"]["epochs"], split.batch_rows
    split.draws(log)
    group = stored["optimizer"]["param_groups"][0]
    return Recorded(
        users=log.users,
        pos=log.items,
        negatives=log.epochs(epochs),
        n_users=split.n_users,
        n_items=split.n_items,
        optimizer=Adam.of(group) if "betas" in group else None,
        batch_triples=batch_rows * max(log.negatives, 1),
        popularity=split.popularity(),
        alpha=config["train_neg_sample_args"]["alpha"],
        order=BatchOrder(log, split.data_row, batch_rows),
        rates=None if any(log.rates(epoch) is None for epoch in range(epochs)) else log.rates,
        static=log.static,
        returns=not split.repeatable,
        fixed_order=None if config["shuffle"] else np.argsort(split.data_row),
    )
