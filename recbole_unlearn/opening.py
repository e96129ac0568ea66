"""From what the user gives to configuration, model and triple log; refuses what cannot work, before any work."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole.utils import ModelType, init_logger, init_seed

from recbole_unlearn import distributed
from recbole_unlearn.compat.recbole_models import class_named
from recbole_unlearn.data import frozen_data
from recbole_unlearn.data.split import Split
from recbole_unlearn.devices import array
from recbole_unlearn.errors import InputError
from recbole_unlearn.models.support import refusal
from recbole_unlearn.settings import recbole_keys
from recbole_unlearn.settings.config import UnlearnConfig, own_options, parse_value
from recbole_unlearn.settings.shown import hidden, plain
from recbole_unlearn.storage import checkpoints, purging
from recbole_unlearn.storage.files import locked
from recbole_unlearn.storage.triple_log import log_path
from recbole_unlearn.training import RUN_KEYS, new_model
from recbole_unlearn.unlearners import SUPPORTED, unlearner_of

OF_TRAINING = ("negatives", "log_negatives")  # own keys that shape a training


def configure(held, model, dataset, config_file_list, config_dict) -> tuple[UnlearnConfig, Any, Any]:
    """Configuration, and checkpoint and log if one was named; the checkpoint's lock goes to ``held`` (ExitStack)."""
    if config_dict is not None and not isinstance(config_dict, Mapping):
        raise InputError("config_dict must be a dict")
    named = _given("checkpoint", config_file_list, config_dict)
    many = _many(config_file_list, config_dict)
    if many and distributed.shared():
        raise InputError(f"{many[0]} trains its models in processes of its own; leave torchrun and nproc out")
    if many and isinstance(model, type):
        raise InputError(f"{many[0]} trains models by name, in other processes; give the name of a RecBole model")
    if many and named is not None:
        raise InputError(f"{many[0]} trains its own models; leave checkpoint out")
    if named is None:
        return _trainable(_supported(UnlearnConfig(model or _given("model", config_file_list, config_dict) or "BPR",
                          dataset or _given("dataset", config_file_list, config_dict) or "ml-100k",
                          config_file_list, config_dict))), None, None  # fmt: skip
    if not isinstance(named, (str, Path)):
        raise InputError(f"checkpoint must be a path, not {named!r}")
    if distributed.leads() and (Path(named).is_file() or purging.pending(named)):
        held.enter_context(locked(named))
        if purging.recover(named):
            raise InputError(f"checkpoint {named} was purged by a process that was killed; the purge is finished now")
    stored, log = checkpoints.load(named, verify=distributed.leads())
    model = model or _given("model", config_file_list, config_dict)
    dataset = dataset or _given("dataset", config_file_list, config_dict)
    config = trained_config(named, stored, log, model, dataset, config_file_list, config_dict)
    return _supported(config), stored, log


def trained_config(path, stored, log, model=None, dataset=None, config_file_list=None, config_dict=None):
    """The configuration of a checkpoint, with what a request says.

    Args:
        path: of the checkpoint, to name it.
        stored (dict), log (TripleLog): its content, and its log (None: data that were frozen with it are not found).
        model (str or class, optional), dataset (str, optional): as the user gives them.

    Raises:
        InputError: another model or data set, another value of a key that shaped the training, or what
            `UnlearnConfig` refuses.
    """
    earlier = stored["config"]
    name = model.__name__ if isinstance(model, type) else model
    for key, value in (("model", name), ("dataset", dataset)):
        if value is not None and value != earlier.get(key):
            raise InputError(f"checkpoint {path} was trained with {key} {earlier.get(key)!r}, not {value!r}")
    if not isinstance(model, type) and earlier["model"] not in recbole_keys.known_models():
        raise InputError(
            f"checkpoint {path} was trained with a class of your own, {earlier['model']}; give it from Python: "
            f"run_unlearn({earlier['model']}, config_dict={{'checkpoint': ...}}) or UnlearnSession.open(..., model=...)"
        )
    kept = {key: value for key, value in earlier.items() if key not in (*RUN_KEYS, *recbole_keys.DERIVED)}
    negatives = kept.get("train_neg_sample_args")
    if isinstance(negatives, dict) and negatives.get("distribution") == "none":  # as RecBole writes None
        kept["train_neg_sample_args"] = None
    if stored.get("data") and log:
        kept["data_path"] = str(frozen_data.folder(log.path))
    elif earlier.get("data_path"):
        kept["data_path"] = str(Path(earlier["data_path"]).parent)
    arguments = model if isinstance(model, type) else earlier["model"], earlier["dataset"]
    trained = UnlearnConfig(*arguments, None, None, kept)  # first: the last one built chooses the devices to be seen
    config = UnlearnConfig(*arguments, config_file_list, config_dict, kept)
    _check_training(path, config, trained)
    return config


def _check_training(path, config, trained):
    """Raises InputError where a request gives another value to a key that shaped the training."""
    free = recbole_keys.FREE | {key for key, _, _ in own_options()} - set(OF_TRAINING)
    for key in sorted(config.given_keys - free):
        now, then = plain(config[key]), plain(trained[key])
        if not recbole_keys.alike(key, now, then):
            raise InputError(
                f"checkpoint {path} was trained with {key} {then!r}, not {now!r}; a request cannot change it: leave it "
                "out, or train anew"
            )


def _many(config_file_list, config_dict):
    """What is asked for that trains many models, none of which is an original to replace."""
    many = [key for key in ("methods", "compare_models") if _given(key, config_file_list, config_dict) is not None]
    if _given("evaluate", config_file_list, config_dict) == "fidelity":
        many = ["evaluate: fidelity", *many]
    return many


def experiment(config_file_list, config_dict):
    """Whether an experiment is asked for."""
    return _given("experiment", config_file_list, config_dict) not in (None, "none", "None")


def check_purge(config_file_list, config_dict, saved):
    """Raises InputError where a purge is asked for that would not happen: nothing replaces an original."""
    asked = [
        key for key in ("purge", "purge_dataset") if parse_value(_given(key, config_file_list, config_dict)) is True
    ]
    if not asked:
        return
    many = ["experiment"] * experiment(config_file_list, config_dict) + _many(config_file_list, config_dict)
    if many:
        raise InputError(f"{many[0]} purges nothing; leave {' and '.join(asked)} out, or {many[0]}")
    if not saved:
        raise InputError(
            f"saved=False keeps no model to replace the original; leave {' and '.join(asked)} out, or save"
        )


def ranks(config_file_list, config_dict) -> dict[str, Any]:
    """Arguments of `distributed.joined`, from RecBole's keys and ours."""
    if config_dict is not None and not isinstance(config_dict, Mapping):
        raise InputError("config_dict must be a dict")
    names = {key: key for key in ("nproc", "world_size", "ip", "port", "offset")} | {"timeout": "rank_timeout"}
    found = {name: parse_value(_given(key, config_file_list, config_dict)) for name, key in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def _given(key, config_file_list, config_dict):
    """``model`` or ``dataset`` where RecBole also looks for it."""
    return UnlearnConfig.peek(key, config_file_list, config_dict)


def _trainable(config):
    """Raises InputError where training would end in nothing that can be unlearned from."""
    if not config["log_negatives"]:
        raise InputError("log_negatives: False leaves nothing to unlearn from; leave it out")
    if config["epochs"] < 1:
        raise InputError(f"epochs must be at least 1, not {config['epochs']}")
    if config["train_neg_sample_args"]["distribution"] == "none":
        raise InputError("train_neg_sample_args: None trains without negatives; pairwise models need them")
    adam = config["learner"].lower() == "adam"
    if config["method"] == "replay" and (not adam or config["clip_grad_norm"]):
        raise InputError("method: replay needs learner: adam and no clip_grad_norm; use method: influence")
    replayed = config["method"] == "auto" and adam and not config["clip_grad_norm"]
    if config["damping"] == "adam" and not adam and not replayed and config["method"] != "reoptimise":
        raise InputError(f"damping: adam does not fit learner: {config['learner']}; use damping: scalar")
    return config


def _supported(config):
    if reason := refusal(config):
        raise InputError(reason)
    recbole_keys.check_judged(config)
    if config["log_wandb"] and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise InputError("log_wandb: True needs the package wandb, which is not installed; install it, or leave it out")
    if config["model"] not in SUPPORTED or config["unlearn_params"]:
        _influence_only(config)
    if config["purge_dataset"] and not config["purge"]:
        raise InputError("purge_dataset: True leaves an original that fits no data; give purge: True too")
    return config


def check_cutoffs(config, split):
    """Raises InputError where a metric's cutoff is beyond the catalogue."""
    if (most := max(config["topk"])) >= split.n_items:
        raise InputError(f"topk: {most} is more than the {split.n_items - 1} items of {config['dataset']}")


def _influence_only(config):
    """Raises InputError for what is there for BPR only."""
    name = config["model"]
    if config["method"] not in ("auto", "influence"):
        what = f"{name} with unlearn_params" if name in SUPPORTED else name
        raise InputError(f"method: {config['method']} is not for {what}; use method: influence")
    if config["damping"] == "adam" and config["learner"].lower() != "adam":
        raise InputError(f"damping: adam does not fit learner: {config['learner']}; use damping: scalar")
    if config["purge_dataset"]:
        raise InputError(f"purge_dataset is for {' and '.join(SUPPORTED)} only, not for {name}; leave it out")
    if config["forget_spam"] is not None and config["MODEL_TYPE"] != ModelType.GENERAL:
        raise InputError(f"forget_spam is for general models only, not for {name}")
    if config["evaluate"] == "fidelity" and config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        raise InputError(f"evaluate: fidelity is not for sequential models such as {name}")


def open_unlearner(config, split, stored, log, path=None, seed=None):
    """The model of a checkpoint, and its unlearner; if ``path`` says where it lies, one that all ranks share.

    ``seed`` is that of the training, for models whose structure is drawn at random; default: the configuration's.
    """
    shared = distributed.shared() and path is not None
    if shared:
        distributed.order("open_unlearner", checkpoint=str(path), run_id=log.run_id)
    model = new_model(config, split, seed)
    initial = {name: array(value).copy() for name, value in model.named_parameters()}
    load_weights(model, stored)
    unlearner = unlearner_of(model, config, split, stored, log, shared)
    unlearner.initial = initial
    return model, unlearner


def load_weights(model, stored):
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
        InputError: what `checkpoint.read` refuses, a class of the user's own, other data than the log's.
    """
    path = Path(model_file)
    stored = checkpoints.read(path, logged=False)
    tied = isinstance(stored.get("triple_log"), dict) and "run_id" in stored["triple_log"]
    log = checkpoints.load(path)[1] if tied and log_path(path).is_dir() else None
    config = trained_config(path, stored, log, _own_class(stored["config"]["model"]))
    init_seed(config["seed"], config["reproducibility"])
    with hidden(config):
        init_logger(config)
    split = Split(config)
    if log:
        split = split.align(log)
    model = new_model(config, split)
    load_weights(model, stored)
    model.load_other_parameter(stored.get("other_parameter"))
    return config, model, split.whole_dataset(), split.train, split.valid, split.test


def _own_class(name):
    """A class of the user's own, if one of this name has been defined by now."""
    return None if name in recbole_keys.known_models() else class_named(name)
