"""One training from a configuration, and a new model on given data."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from recbole.utils import init_seed

from recbole_unlearn import distributed
from recbole_unlearn.compat.recbole_models import is_recboles
from recbole_unlearn.devices import array
from recbole_unlearn.errors import InputError
from recbole_unlearn.models.support import DENSE
from recbole_unlearn.settings import keys
from recbole_unlearn.settings.shown import plain
from recbole_unlearn.storage.files import remove
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.training.compiled import NAN
from recbole_unlearn.training.trainer import load_best, make_trainer

# How far training again may end from the weights, of the way that training moved them. Trainings that did what their
# log tells end some 1e-6 away, though torch's arithmetic is another than the replay's; those that did not, as mildly as
# was tried, .0035 (results/guard-ml-100k.md).
LIMIT = 0.001
COMPARED = "it was trained to be compared with, not to be unlearned from"  # why such models have no log


def distance(start, first, second):
    """How far two state dicts on the CPU are apart, over the way from a start to the first."""

    def between(one, other):
        both = [(one[name].double(), other[name].double()) for name in one if one[name].is_floating_point()]
        return float(torch.cat([(a - b).reshape(-1) for a, b in both]).norm())

    return between(first, second) / max(between(first, start), torch.finfo(torch.float32).tiny)


def magnitude(apart: float) -> float:
    """The power of ten that a distance is at most: all its digits are a checksum of the training."""
    return float(f"1e{math.ceil(math.log10(apart))}") if apart else 0.0


def new_model(config, split, seed=None, data=None):
    """A freshly initialised model, as RecBole's run_recbole makes it, on ``data`` (default: the split's training data).

    Graphs and histories that a model holds are those of ``data``.
    """
    data = split.train._dataset if data is None else data
    init_seed(config["seed"] if seed is None else seed, config["reproducibility"])
    try:
        return config.model_class(config, data).to(config["device"])
    except (TypeError, ValueError, RuntimeError, AssertionError, MemoryError, ZeroDivisionError, IndexError) as error:
        if not is_recboles(config.model_class):
            raise  # a fault of the user's own class is shown whole
        raise InputError(
            f"{config['model']} cannot be built with this configuration: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; check the keys of the model"
        ) from error


def train(config, split, path, forgotten=None, seed=None, log_negatives=True):
    """Train with early stopping on the validation data and keep the best epoch in ``path``.

    Args:
        forgotten (int array, optional): rows to leave out; None trains on ``split.train`` itself.
        seed (int, optional): of initialisation, order and negatives; default: the configuration's.
        log_negatives (bool): whether to write the triple log beside ``path``.

    Returns:
        (model with the best weights, trainer, seconds of ``fit``)
    """
    rows = None if forgotten is None else _rows(forgotten).tolist()
    distributed.order("train", path=str(path), forgotten=rows, seed=seed, log_negatives=log_negatives)
    loader = split.train if forgotten is None and seed is None else split.remaining(_rows(forgotten), seed)
    model = new_model(config, split, seed, loader._dataset)
    trainer = make_trainer(config, model)
    trainer.saved_model_file = str(path)
    if not log_negatives:
        trainer.log_negatives, trainer.no_log = False, COMPARED
    start = perf_counter()
    valid = split.validation_without(_rows(forgotten), loader._dataset)
    try:
        trainer.fit(loader, valid, verbose=True, saved=True, show_progress=config["show_progress"])
    except (ValueError, RuntimeError) as error:
        if str(error) == NAN:
            said = f"the training's loss became NaN after {len(trainer.train_loss_dict)} epochs; lower learning_rate"
        elif str(error).startswith("SparseAdam does not support dense gradients"):
            said = f"the gradients of {config['model']} are dense, and {DENSE}"
        else:
            raise
        for each in (Path(path), log_path(path)):
            remove(each)
        raise InputError(said) from None
    seconds = perf_counter() - start
    if not config["single_spec"]:
        distributed.barrier()  # rank 0 has written the best weights
    state = load_best(trainer)
    if trainer.triple_log:
        TripleLog.open(log_path(path)).truncate(state["epoch"] + 1)
    return model, trainer, seconds


@contextmanager
def nan_said(words: str) -> Iterator[None]:
    """RecBole's exception of a loss that is NaN in other words."""
    try:
        yield
    except ValueError as error:
        if str(error) != NAN:
            raise
        raise InputError(words) from None


def flat_weights(model):
    """All weights of a model, one after the other."""
    return np.concatenate([array(value).ravel() for value in model.parameters()])


def training_settings(config):
    """The part of a configuration that decides, with data and seed, what weights training ends in; plain values."""
    own = set(keys.KEYS) - {"negatives", *(["compiled"] if config["compiled"] else [])}
    skipped = own | set(keys.OF_RUNS) | {"seed", "metrics", "topk", "metric_decimal_place", "state"}
    return {key: value for key, value in plain(config.final_config_dict).items() if key not in skipped}


def _rows(forgotten):
    return np.empty(0, np.int64) if forgotten is None else np.asarray(forgotten, np.int64)
