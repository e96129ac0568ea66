"""Every patch of RecBole 1.2.0 and 1.2.1, and every private name of them that we rely on, in one place.

``apply()`` is idempotent and runs at ``import recbole_unlearn``. It makes stock RecBole train, save and load on
the versions that ``pyproject.toml`` admits, and changes no number. Modules of RecBole that the package does not need by
itself are patched when they are loaded.
"""

import copy
import sys
import warnings
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.machinery import PathFinder
from inspect import signature
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import recbole
import torch
from recbole.utils import get_tensorboard
from scipy.sparse import dok_matrix

from recbole_unlearn.compat.recbole_models import checkpoint_state, replaced, runs_recboles
from recbole_unlearn.distributed import leads
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.shown import masked


def _save_checkpoint(self, epoch, verbose=True, **kwargs):
    if not self.config["single_spec"] and self.config["local_rank"] != 0:
        return
    path = kwargs.pop("saved_model_file", self.saved_model_file)
    torch.save(checkpoint_state(self, epoch), path)
    if verbose:
        self.logger.info(f"Saving current: {path}")


def _get_data_struct(self):
    """RecBole's, which asks numbers and counters for their copy on the CPU too, and so breaks on some metrics."""
    held = self.data_struct._data_dict
    for key, value in held.items():
        held[key] = value.cpu() if isinstance(value, torch.Tensor) else value
    returned = copy.deepcopy(self.data_struct)
    for key in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):
        held.pop(key, None)
    return returned


def _rows_of(stock):
    """RecBole's ``Interaction.__getitem__``, which makes a list of each array of rows, and a tensor of it a column."""

    @wraps(stock)
    def rows_of(self, index):
        if isinstance(index, range):
            index = np.arange(index.start, index.stop, index.step)
        if isinstance(index, (np.ndarray, torch.Tensor)) and index.ndim == 1:
            rows = torch.as_tensor(index)
            if rows.dtype in (torch.int32, torch.int64) and not (rows < 0).any():
                columns = self.interaction.items()
                return type(self)({name: value.index_select(0, rows.to(value.device)) for name, value in columns})
        return stock(self, index)

    return rows_of


def _by_user_ids(stock):
    """RecBole's ``RepeatableSampler.sample_by_user_ids``, which makes a set of each item: same draws, same stream."""

    @wraps(stock)
    def sample_by_user_ids(self, user_ids, item_ids, num):
        if not runs_recboles(self, "sample_by_key_ids"):
            return stock(self, user_ids, item_ids, num)
        items = np.tile(np.asarray(item_ids), num)
        drawn, again = np.zeros(len(items), np.int64), np.arange(len(items))
        while len(again):
            drawn[again] = self.sampling(len(again))
            again = again[drawn[again] == items[again]]
        return torch.from_numpy(drawn)

    return sample_by_user_ids


def _dok_update(self, values):
    self._dict.update(values)


def _load_data_and_model(model_file):
    # the code of RecBole's function of this name, under whatever name it was imported: it may use no global of ours
    from recbole_unlearn.training.trained import load_data_and_model

    return load_data_and_model(model_file)


def _masking_wandb(logger):
    """RecBole's ``WandbLogger`` that sends no value that names the forgotten."""

    class WandbLogger(logger):
        def __init__(self, config):
            super().__init__(masked(config))

    return WandbLogger


def _masking_tensorboard(method):
    """RecBole's ``Trainer._add_hparam_to_tensorboard`` on a configuration that names nobody."""

    @wraps(method)
    def add(self, best_valid_result):
        with replaced(self, config=masked(self.config)):
            return method(self, best_valid_result)

    return add


class NoTensorboard:
    """Stands in for tensorboard's writer where no files are to be written, as on ranks other than 0."""

    def add_scalar(self, *_):
        pass

    add_hparams = add_scalar


def _tensorboard(logger):
    return get_tensorboard(logger) if leads() else NoTensorboard()


# What Config names by np.float_, np.complex_ and np.unicode_, which numpy 2 removed. RecBole uses these all over.
NUMPY_ALIASES = {
    "bool": np.bool_,
    "int": np.int_,
    "float": np.float64,
    "complex": np.complex128,
    "object": np.object_,
    "str": np.str_,
    "long": np.int_,
    "unicode": np.str_,
}


def _numpy_aliases(_config):
    for name, kind in NUMPY_ALIASES.items():
        setattr(np, name, kind)


@contextmanager
def _config(module):
    yield
    module.Config.compatibility_settings = _numpy_aliases


PANDAS_3 = int(pd.__version__.partition(".")[0]) >= 3


class _Pandas(ModuleType):
    """pandas for RecBole's data sets, which fill the holes of a sequence column in a copy since pandas 3."""

    def __getattr__(self, name):
        return getattr(pd, name)

    @staticmethod
    def read_csv(*args, **kwargs):
        frame = pd.read_csv(*args, **kwargs)
        return frame.fillna({name: "" for name in frame if name.endswith("_seq")})


def _lengths(value):
    """``len``; of a column of sequences all lengths: what ``Series.agg(len)`` gave before pandas 3."""
    return value.map(len) if isinstance(value, pd.Series) and value.dtype == object else len(value)


@contextmanager
def _any_dataset(module):
    yield
    if PANDAS_3:
        module.len = _lengths


# pandas 2's and 3's words on what is mended here, and torch's on columns that pandas 3 marks as read-only: nobody else
# has the frame.
NOISE = "A value is (trying to be|being) set on a copy|The given NumPy array is not writable"


def _quietly(function):
    @wraps(function)
    def quiet(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", NOISE)
            return function(*args, **kwargs)

    return quiet


def _fill_nan(self):
    """Fill holes as RecBole means to: its ``feat[field].fillna(inplace=True)`` changes nothing since pandas 3."""
    for feat in (getattr(self, name) for name in self.feat_name_list):
        for field in feat:
            kind = self.field2type[field].value
            if kind in ("token", "float") and feat[field].hasnans:
                feat[field] = feat[field].fillna(0 if kind == "token" else feat[field].mean())
    self._recbole_fill_nan()


@contextmanager
def _dataset(module):
    with _any_dataset(module):
        yield
    kind = module.Dataset
    for name in ("_load_feat", "_fill_nan", "_dataframe_to_interaction"):
        setattr(kind, name, _quietly(getattr(kind, name)))
    if PANDAS_3:
        module.pd = _Pandas("pandas")
        kind._recbole_fill_nan, kind._fill_nan = kind._fill_nan, _fill_nan


class _Tune(ModuleType):
    """``ray.tune`` for RecBole's ``objective_function``, which reports to it even where hyperopt calls it.

    A trial of Ray Tune runs in a process that has loaded ray: elsewhere nobody waits for the report.
    """

    @staticmethod
    def report(**result):
        if sys.modules.get("ray"):
            tune = import_module("ray.tune")
            if "metrics" in signature(tune.report).parameters:  # later than ray 2.6: a dict
                tune.report(result)
            else:
                tune.report(**result)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(import_module("ray.tune"), name)
        except ImportError:
            raise InputError(f"Ray Tune ({name}) is asked for and not installed; pip install 'ray[tune]'") from None


@contextmanager
def _quick_start(module):
    """Spare ``recbole.quick_start`` ray, which it imports for one call: slow, and not to be had beyond Python 3.11."""
    ray: Any = ModuleType("ray")
    ray.tune = _Tune("ray.tune")
    before = {"ray": sys.modules["ray"]} if "ray" in sys.modules else {}
    sys.modules["ray"] = ray
    try:
        yield
    finally:
        del sys.modules["ray"]
        sys.modules.update(before)
    module.tune = ray.tune  # where somebody loaded it, with ray, before us
    module.load_data_and_model.__code__ = _load_data_and_model.__code__


def _dropout_in_training_only(name, rate):
    """RecBole 1.2.0 builds a dropout layer in ``forward``, which then drops in evaluation too; 1.2.1 mended it."""

    @contextmanager
    def patch(module):
        yield
        model = getattr(module, name)
        stock = model.forward

        def forward(self, *args, **kwargs):
            with replaced(self, **({} if self.training else {rate: 0.0})):
                return stock(self, *args, **kwargs)

        if recbole.__version__ == "1.2.0":
            model.forward = forward

    return patch


@contextmanager
def _sine(module):
    """Turns torch's anomaly detection on when it is imported, and any sequential model of RecBole imports it.

    All that the process then differentiates is many times slower, since each operation keeps the stack it came from.
    """
    before = torch.is_anomaly_enabled()
    yield
    torch.autograd.set_detect_anomaly(before)


# Context managers around the execution of a module of RecBole, the first time that anybody imports it.
AROUND = {
    "recbole.config.configurator": _config,
    "recbole.data.dataset.dataset": _dataset,
    "recbole.data.dataset.kg_dataset": _any_dataset,
    "recbole.data.dataset.sequential_dataset": _any_dataset,
    "recbole.quick_start.quick_start": _quick_start,
    "recbole.model.general_recommender.ngcf": _dropout_in_training_only("NGCF", "message_dropout"),
    "recbole.model.sequential_recommender.sine": _sine,
    "recbole.model.sequential_recommender.gru4reckg": _dropout_in_training_only("GRU4RecKG", "dropout"),
}


class _Finder:
    """Import hook that finds the modules of ``AROUND`` where they are, and patches them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in AROUND else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module):
                with AROUND[name](module):
                    execute(module)

            spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _patch_modules():
    """Patch what is loaded by now, and the rest when it is."""
    for name in AROUND.keys() & sys.modules.keys():
        with AROUND[name](sys.modules[name]):
            pass
    sys.meta_path.insert(0, _Finder)


def apply() -> None:
    """Patch RecBole and scipy for the installed versions."""
    if _Finder not in sys.meta_path:
        _patch_modules()
    from recbole.data.interaction import Interaction
    from recbole.evaluator.collector import Collector
    from recbole.sampler import RepeatableSampler
    from recbole.trainer import trainer as recbole_trainer
    from recbole.trainer.trainer import Trainer

    recbole_trainer.get_tensorboard = _tensorboard
    if Trainer._save_checkpoint is not _save_checkpoint:
        recbole_trainer.WandbLogger = _masking_wandb(recbole_trainer.WandbLogger)
        Trainer._add_hparam_to_tensorboard = _masking_tensorboard(Trainer._add_hparam_to_tensorboard)
    Trainer._save_checkpoint = _save_checkpoint
    Collector.get_data_struct = _get_data_struct
    if not hasattr(Interaction.__getitem__, "__wrapped__"):
        Interaction.__getitem__ = _rows_of(Interaction.__getitem__)
    if not hasattr(RepeatableSampler.sample_by_user_ids, "__wrapped__"):
        RepeatableSampler.sample_by_user_ids = _by_user_ids(RepeatableSampler.sample_by_user_ids)
    if not hasattr(dok_matrix, "_update"):  # removed in scipy 1.13; LightGCN, NGCF and others call it
        dok_matrix._update = _dok_update
