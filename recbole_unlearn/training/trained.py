"""One training to unlearn from: its model, configuration, data and log, from a checkpoint or in memory."""

import copy
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.general_recommender import BPR, LightGCN
from recbole.trainer import Trainer
from recbole.utils import init_logger

from recbole_unlearn import distributed
from recbole_unlearn.compat.recbole_models import checkpoint_state, class_named
from recbole_unlearn.data import frozen_data
from recbole_unlearn.data.split import Split
from recbole_unlearn.devices import array, copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.recorded import Recorded
from recbole_unlearn.models.losses import fixed_randomness
from recbole_unlearn.settings import keys, recbole_keys
from recbole_unlearn.settings.config import UnlearnConfig, anywhere, extended
from recbole_unlearn.settings.conflicts import check_open, supported, trainable
from recbole_unlearn.settings.given import Given
from recbole_unlearn.settings.shown import hidden, plain
from recbole_unlearn.storage import checkpoints, purging
from recbole_unlearn.storage.files import locked
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.training import adoption
from recbole_unlearn.training.again import recorded, redraws
from recbole_unlearn.training.fit import new_model


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint before there is data or a model: of a training with a log, or of one without, to be adopted.

    Attributes:
        path: its file; of one to be adopted, where the adopted one will lie.
        config: what it was trained with, and what the request says.
        stored: its content.
        log: its triple log; None before it is adopted.
        stock: file without a log that it was, or is to be, adopted from; None: there is none.
    """

    path: Path
    config: UnlearnConfig
    stored: dict[str, Any]
    log: TripleLog | None
    stock: Path | None = None

    @classmethod
    def open(cls, given: Given, held: ExitStack) -> "Checkpoint | None":
        """The checkpoint that a request names, or None; its lock goes to ``held``.

        Raises:
            InputError: what `checkpoints.load` refuses; another model or data set, another value of a key that shaped
                the training, or what `UnlearnConfig` refuses.
        """
        if (named := given.get("checkpoint")) is None:
            return None
        if not isinstance(named, (str, Path)):
            raise InputError(f"checkpoint must be a path, not {named!r}")
        looks = given.get("dry_run") is True
        _hold(named, held, looks=looks)
        path, stock, verify = Path(named), None, distributed.leads()
        stored, log = checkpoints.read(path, logged=False), None
        if stored.get("triple_log") is None:
            adoption.check_epoch(path, stored)
            stored["config"].pop("log_negatives", None)  # it is to have a log
            stock, path = path, adoption.adopted_path(path, given.get("checkpoint_dir"))
            _hold(path, held, new=True, looks=looks)
            if path.exists():
                stored, log = checkpoints.load(path, verify)
                adoption.check_origin(path, stored, stock)
            elif distributed.shared():
                raise InputError(f"checkpoint {stock} is adopted by one process; first leave torchrun and nproc out")
        else:
            log = checkpoints.log_of(path, stored, verify)
            stock = adoption.origin(path, stored)
        config = supported(config_of(named, stored, log, given))
        if log is None:  # to be adopted, by training again
            trainable(config)
        if config["purge"] and stock and stock.is_file():
            then = f"forget from {path} once you have deleted it yourself"
            if log is None:  # it is all that there is
                then = (
                    f"have it adopted as {path} first, by recbole_unlearn.load({str(stock)!r}) with your other keys, "
                    "and then delete it yourself and forget from the adopted one"
                )
            raise InputError(
                f"purge: True would leave {stock}, which has no log and knows what is to be forgotten too; "
                f"{then}, or leave purge out"
            )
        return cls(path, config, stored, log, stock)

    @classmethod
    def written(cls, path: Path | str, config: UnlearnConfig) -> "Checkpoint":
        """The one that a training of this configuration has just written."""
        return cls(Path(path), config, *checkpoints.load(path))

    def split(self) -> Split:
        """The data that it was trained on, without what it has forgotten since."""
        split = Split.seeded(self.config, self.log)
        if self.stock and not self.log:
            adoption.check(self.stock, self.stored, self.config, split)
        return split

    def trained(self, split: Split, seed: int | None = None) -> "Trained":
        """The training, on its data; one without a log is adopted now.

        ``seed`` is that of the training, for models whose structure is drawn at random; default: the configuration's.
        """
        stored, log = self.stored, self.log
        if log is None:
            assert self.stock
            stored, log = adoption.adopt(self.stock, stored, self.config, split, self.path)
        seed = seed_of(stored) if seed is None else seed
        model = new_model(self.config, split, seed)
        initial = _parameters(model)
        load_weights(model, stored)
        return Trained(model, self.config, split, log, stored, Path(self.path).absolute(), initial, seed)


def _hold(path, held, new=False, looks=False):
    """Lock a checkpoint, and finish or undo what a killed process was doing to it, unless one only ``looks``.

    Raises:
        InputError: it is locked, or its purge is finished now.
    """
    if distributed.leads() and (new or Path(path).is_file() or purging.pending(path)):
        held.enter_context(locked(path))
        if looks:
            if purging.pending(path):
                raise InputError(f"checkpoint {path} was being purged by a process that was killed; leave dry_run out")
        elif purging.recover(path):
            raise InputError(f"checkpoint {path} was purged by a process that was killed; the purge is finished now")


@dataclass(frozen=True)
class Trained:
    """One training to unlearn from.

    Attributes:
        model: RecBole model with the trained weights; only read.
        config: its configuration, with our keys.
        split: its data.
        log: what was drawn in training.
        stored: the other content of its checkpoint.
        path: of the checkpoint, wherever one works by now.
        initial: weights that the training's seed gives, by name; None where nobody knows them.
        seed: of the training, where it is another than the configuration's.
    """

    model: AbstractRecommender
    config: UnlearnConfig
    split: Split
    log: TripleLog
    stored: dict[str, Any]
    path: Path
    initial: dict[str, np.ndarray] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.split.draws(self.log)

    @classmethod
    def of(cls, trainer: Trainer, train, valid, test, **changes: Any) -> "Trained":
        """A model in memory that one of our trainers has trained.

        Its weights are those that it has now: of the best epoch, if RecBole's ``evaluate`` has loaded them, or of the
        last. The triple log lies where the trainer wrote it, beside ``trainer.saved_model_file``.

        Args:
            trainer: what `trainer_of`, or RecBole's ``get_trainer`` with this package imported, gave; it has fitted.
            train, valid, test: the loaders that RecBole's ``data_preparation`` gave.
            changes: keys of this package, such as ``method="influence"``.

        Raises:
            InputError: it has no log; other data than the log's; a value that a key cannot hold; what only a run does,
                asked for by ``changes`` or by the trainer's configuration.
        """
        asked = {key: value for key, value in trainer.config.external_config_dict.items() if key in keys.KEYS}
        check_open(Given.read(config_dict={**asked, **changes}))
        if getattr(trainer, "triple_log", None) is None:
            reason = getattr(trainer, "no_log", None) or (
                "it was not fitted by one of our trainers, for an epoch or more, with saved=True and log_negatives"
            )
            raise InputError(f"the trainer has no triple log: {reason}")
        path = Path(trainer.saved_model_file)
        if not path.is_absolute() and (beside := trainer.triple_log.path.with_name(path.name)).is_file():
            path = beside  # the working folder may be another by now
        stored, log = checkpoints.load(path)
        now = copies(trainer.model.state_dict())
        if not same_weights(now, stored["state_dict"]):  # of the last epoch, not of the best
            state = checkpoint_state(trainer, log.n_epochs - 1)
            tie = {**stored["triple_log"], "epochs": log.n_epochs}
            stored = {**copy.deepcopy(state), "state_dict": now, "triple_log": tie}
        config = anywhere(supported(extended(trainer.config, {"checkpoint": str(path), **changes})))
        split = Split.of(config, train, valid, test).align(log)
        with fixed_randomness(0):  # building a model sets and uses the random streams of the process
            model = new_model(config, split)
        initial = _parameters(model)
        load_weights(model, stored)
        return cls(model, config, split, log, stored, path, initial)

    @property
    def epochs(self) -> int:
        """Epochs that the weights were trained for."""
        return self.stored["triple_log"]["epochs"]

    @property
    def optimizer(self) -> dict[str, Any]:
        """State of the optimiser, as torch gives it."""
        return self.stored["optimizer"]

    @property
    def redraws(self) -> tuple[int, ...]:
        """Seed of what requests draw; see `again.redraws`."""
        return redraws(self.config["seed"] if self.seed is None else self.seed, self.log)

    def recorded(self) -> Recorded:
        """The training as it was recorded, but for its weights."""
        return recorded(self.config, self.split, self.stored, self.log)

    @property
    def unlearned_before(self) -> bool:
        """Whether the log is that of an unlearned model."""
        return self.log.missing > 0

    def copy(self) -> AbstractRecommender:
        """A model of its own with the trained weights."""
        model = new_model(self.config, self.split, self.seed)
        model.load_state_dict(self.stored["state_dict"])
        return model


def seed_of(stored: dict[str, Any]) -> int | None:
    """Seed that a checkpoint's model was built by; None: the configuration's."""
    seed = stored["triple_log"].get("seed")
    return seed if type(seed) is int and 0 <= seed < 1 << 32 else None


def inexact(stored: dict[str, Any]) -> str | None:
    """In words, how a checkpoint's weights are known to be approximate; None: they are not."""
    if stored["triple_log"].get("approximate"):
        return "has forgotten approximately, by a step or on touched rows"
    left = adoption.approximate(stored)
    return f"was adopted though training again by its seed ends {left:.2g} of the way off" if left else None


def not_paired(trained: Trained) -> str | None:
    """In words, why a training cannot be run again, without some rows, by its own random numbers; None: it can."""
    if not trained.recorded().ordered():
        return "the order of its batches is not known"
    if trained.unlearned_before and type(trained.model) not in (BPR, LightGCN):
        return f"{type(trained.model).__name__} may draw in training (dropout), of which a result's log holds nothing"
    return None


def _parameters(model):
    """Copies of a model's parameters as arrays, by name."""
    return {name: array(value).copy() for name, value in model.named_parameters()}


def config_of(path: Path | str, stored: dict[str, Any], log: TripleLog | None, given: Given) -> UnlearnConfig:
    """The configuration of a checkpoint, with what a request says.

    Args:
        path: of the checkpoint, to name it.
        stored: its content; a ``data_path`` changes where the files lie beside which its data are frozen.
        log: its log; None: data that were frozen with it are not found.
        given: the request.

    Raises:
        InputError: another model or data set, another value of a key that shaped the training, or what
            `UnlearnConfig` refuses.
    """
    earlier, model = stored["config"], given.model
    name = model.__name__ if isinstance(model, type) else model
    for key, value in (("model", name), ("dataset", given.dataset)):
        if value is not None and value != earlier.get(key):
            raise InputError(f"checkpoint {path} was trained with {key} {earlier.get(key)!r}, not {value!r}")
    if not isinstance(model, type) and earlier["model"] not in recbole_keys.known_models():
        raise InputError(
            f"checkpoint {path} was trained with a class of your own, {earlier['model']}; give it from Python: "
            f"run_unlearn({earlier['model']}, config_dict={{'checkpoint': ...}}) or load(..., model=...)"
        )
    kept = {key: value for key, value in earlier.items() if key not in (*keys.OF_RUNS, *recbole_keys.DERIVED)}
    negatives = kept.get("train_neg_sample_args")
    if isinstance(negatives, dict) and negatives.get("distribution") == "none":  # as RecBole writes None
        kept["train_neg_sample_args"] = None
    if stored.get("data") and log:
        kept["data_path"] = str(frozen_data.folder(log.path))
        if not (folder := Path(kept["data_path"]) / earlier["dataset"]).is_dir():
            raise InputError(f"{path} keeps its data with its log; {folder} is not there: put it back")
        given = _beside_frozen(path, stored, kept["data_path"], given)
    elif earlier.get("data_path"):
        kept["data_path"] = str(Path(earlier["data_path"]).parent)
    arguments = model if isinstance(model, type) else earlier["model"], earlier["dataset"]
    trained = UnlearnConfig(*arguments, None, None, kept)  # first: the last one built chooses the devices to be seen
    config = UnlearnConfig(*arguments, None, given.values, kept)
    _check_training(path, config, trained)
    return config


def _beside_frozen(path, stored, frozen, given):
    """A request without its ``data_path``: of frozen data that says where the files lie now which a purge thins out."""
    values = dict(given.values)
    named, dataset = values.pop("data_path", None), stored["config"]["dataset"]
    if named is None or os.path.realpath(named) == os.path.realpath(frozen):
        return replace(given, values=values)
    inter = Path(named) / dataset / f"{dataset}.inter"
    if not inter.is_file():
        raise InputError(
            f"data_path: there is no {inter}; leave data_path out: {path} keeps its data with its log, and needs the "
            "files for purge_dataset alone"
        )
    stored["data"] = {**stored["data"], "inter": os.path.abspath(inter)}
    return replace(given, values=values)


def _check_training(path, config, trained):
    """Raises InputError where a request gives another value to a key that shaped the training."""
    free = recbole_keys.FREE | set(keys.KEYS) - set(keys.OF_TRAINING)
    for key in sorted(config.given_keys - free):
        now, then = plain(config[key]), plain(trained[key])
        if not recbole_keys.alike(key, now, then):
            raise InputError(
                f"checkpoint {path} was trained with {key} {then!r}, not {now!r}; a request cannot change it: leave it "
                "out, or train anew"
            )


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit, wherever each is."""
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


def load_weights(model: AbstractRecommender, stored: dict[str, Any]) -> None:
    """Give a model a checkpoint's weights; InputError where they are not of its shape."""
    for name, value in model.state_dict().items():
        theirs = stored["state_dict"].get(name, value).dtype
        if theirs != value.dtype:
            raise InputError(f"the checkpoint's weights do not fit the configuration: {name} is {theirs}")
    try:
        model.load_state_dict(stored["state_dict"])
    except RuntimeError as error:
        raise InputError(
            f"the checkpoint's weights do not fit the configuration: {' '.join(str(error).split())}"
        ) from None


def load_data_and_model(model_file):
    """RecBole's function of this name, for checkpoints of this package: originals and unlearned ones.

    Of an unlearned model the data are those that it has not forgotten; without its log beside it, all of them.

    Returns:
        (configuration, model, dataset, train loader, validation loader, test loader)

    Raises:
        InputError: what `checkpoints.read` refuses, a class of the user's own, other data than the log's.
    """
    path = Path(model_file)
    stored = checkpoints.read(path, logged=False)
    tied = isinstance(stored.get("triple_log"), dict) and "run_id" in stored["triple_log"]
    log = checkpoints.load(path)[1] if tied and log_path(path).is_dir() else None
    name = stored["config"]["model"]
    own = None if name in recbole_keys.known_models() else class_named(name)  # if one has been defined by now
    shown = {key: value for key, value in stored["config"].items() if key in ("gpu_id", "use_gpu", "show_progress")}
    config = config_of(path, stored, log, Given.read(own, config_dict=shown))
    with hidden(config):
        init_logger(config)
    split = Split.seeded(config, log)
    model = new_model(config, split, seed_of(stored) if tied else None)
    load_weights(model, stored)
    model.load_other_parameter(stored.get("other_parameter"))
    return config, model, split.whole_dataset(), split.train, split.valid, split.test
