"""RecBole's ``Config`` with this package's own keys."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from recbole.config import Config
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import get_model

from recbole_unlearn import distributed
from recbole_unlearn.compat.recbole_models import is_recboles, scores_all_items
from recbole_unlearn.data.knowledge import KEY
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings import keys, recbole_keys
from recbole_unlearn.settings.given import as_path, parse_value, read_files


def changed(config, **values):
    """A copy of a configuration with other values."""
    new = copy.copy(config)
    new.final_config_dict = {**config.final_config_dict, **values}
    return new


def anywhere(config: "UnlearnConfig") -> "UnlearnConfig":
    """A configuration whose paths of ours mean the same in another working folder, for a model that stays open.

    A bare ``audit`` stays: it is a name beside the model that is written.
    """
    named = {key: config[key] for key in keys.PATHS if config[key]}
    return changed(config, **{key: os.path.abspath(path) for key, path in named.items() if not is_bare(key, path)})


def is_bare(key: str, path: str) -> bool:
    """Whether a key's path is the name of a file that lies where the new model does."""
    return key == "audit" and Path(path).name == path


def extended(config: Config, changes: Mapping[str, Any]) -> "UnlearnConfig":
    """RecBole's own configuration, or ours, of a training that is over, with our keys; nothing else is changed.

    Args:
        config: stays as it is.
        changes: keys of this package that a request may give.

    Raises:
        InputError: another key, or a value that it cannot hold; an optimiser that RecBole does not know.
    """
    for key in changes:
        if key not in keys.OWN or key in keys.OF_TRAINING:
            raise InputError(f"{key} is no key that forgetting takes; it takes {', '.join(sorted(keys.OWN))}")
    new = copy.copy(config) if isinstance(config, UnlearnConfig) else UnlearnConfig.__new__(UnlearnConfig)
    new.__dict__.update({"_checkpoint_config": {}, "_given_by_files": set(), **vars(config)})
    defaults = {name: key.default for name, key in keys.KEYS.items() if name in keys.OWN}
    new.final_config_dict = {**defaults, **config.final_config_dict, **changes}
    new.external_config_dict = {**config.external_config_dict, **changes}
    recbole_keys.lower(new.final_config_dict)
    recbole_keys.check_choice("learner", new["learner"], recbole_keys.CHOICES["learner"])
    new._check_own()
    return new


class UnlearnConfig(Config):
    """RecBole's configuration with the keys of ``properties/overall.yaml``.

    Differs from ``Config`` in that the command line is not read here (``run_unlearn.py`` passes it in
    ``config_dict``), strings are never evaluated, ``config_dict`` is not changed, and misspelt keys are refused.

    Args:
        checkpoint_config (dict, optional): configuration stored in a checkpoint; below config files in priority.

    Raises:
        InputError: unknown key, value or file.
    """

    def __init__(self, model=None, dataset=None, config_file_list=None, config_dict=None, checkpoint_config=None):
        self._checkpoint_config = checkpoint_config or {}
        config_dict = {
            key: as_path(parse_value(value, key), key) for key, value in copy.deepcopy(config_dict or {}).items()
        }
        try:
            super().__init__(model, dataset, config_file_list, config_dict)
        except KeyError as error:
            raise InputError(str(error.args[0])) from None
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, yaml.YAMLError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"configuration: {' '.join(str(error).split())}") from None
        self._check_own()
        recbole_keys.check_values(self)

    @property
    def given_keys(self):
        """Keys that files or ``config_dict`` give, those of a checkpoint aside."""
        return self._given_by_files | set(self.variable_config_dict)

    def _init_device(self):
        """RecBole's for one process, and for several without its NCCL: `distributed.joined` has started gloo."""
        final = self.final_config_dict
        final.pop("local_rank", None)
        super()._init_device()
        rank, size = distributed.rank_and_size()
        if size > 1:
            final.update({"single_spec": False, "local_rank": rank, "world_size": size})
            if final["device"].type == "cuda":
                local = int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()
                final["device"] = torch.device("cuda", local)
            if rank:
                final.update({"state": "error", "show_progress": False, "log_wandb": False})

    def _init_parameters_category(self):
        super()._init_parameters_category()
        self.parameters = {name: list(keys) for name, keys in self.parameters.items()}
        self.parameters["Unlearning"] = [key for key in keys.KEYS if key in keys.OWN]

    def _load_config_files(self, file_list):
        given = read_files(file_list)
        self._given_by_files = set(given)
        return {**self._checkpoint_config, **given}

    def _load_cmd_line(self):
        return {}

    def _convert_config_dict(self, config_dict):
        return config_dict

    def _get_model_and_dataset(self, model, dataset):
        model = model or self.external_config_dict.get("model")
        if isinstance(model, str):
            recbole_keys.check_model_name(model)
            try:
                model = get_model(model)
            except (ValueError, ImportError, AttributeError) as error:
                raise InputError(f"model {model} cannot be loaded from RecBole: {error}") from None
        elif isinstance(model, type) and not is_recboles(model):
            if model.__name__ in recbole_keys.known_models():
                raise InputError(f"RecBole has a model named {model.__name__} already; give your class another name")
        if model is not None and not (isinstance(model, type) and issubclass(model, AbstractRecommender)):
            raise InputError(f"model must be the name of a RecBole model or a class of your own, not {model!r}")
        for key in self.external_config_dict:
            if key in recbole_keys.DERIVED and key not in self._checkpoint_config:
                raise InputError(f"{key} is no setting: it follows from others; leave it out")
            if key not in self._checkpoint_config:
                recbole_keys.check_known(key, {*keys.KEYS, KEY}, model)
        return super()._get_model_and_dataset(model, dataset)

    def _load_internal_config_dict(self, model, model_class, dataset):
        # a class of the user's own has the defaults of RecBole's that it is derived from
        super()._load_internal_config_dict(recbole_keys.recbole_name(model_class), model_class, dataset)
        of_recbole = self.internal_config_dict["eval_batch_size"]
        self._update_internal_config_dict(keys.properties_dir() / "overall.yaml")
        if not scores_all_items(model_class):
            # every score is a row of the network's: ConvNCF would take 26 GB for all of ml-100k's
            self.internal_config_dict["eval_batch_size"] = of_recbole

    def _update_internal_config_dict(self, file):
        found = recbole_keys.defaults_in(Path(file))
        self.internal_config_dict.update(found)
        return found

    def _check_own(self):
        given = self.external_config_dict
        for name, key in keys.KEYS.items():
            if name in keys.OWN:
                self.final_config_dict[name] = key.checked(self[name])
        patterns = self["unlearn_params"]
        if patterns is not None and not (patterns and isinstance(patterns, str)):
            if not (isinstance(patterns, list) and patterns and all(isinstance(p, str) for p in patterns)):
                raise InputError(f"unlearn_params must be a list of parameter names or patterns, not {patterns!r}")
        if self["paper"]:
            for key, value in PAPER.items():
                if (
                    key in given
                    and key not in self._checkpoint_config
                    and (given[key] if given[key] is not None else "none") != value
                ):
                    raise InputError(f"paper: True fixes {key} at {value!r}; leave {key} out or set paper: False")
            self.final_config_dict.update(PAPER)
        self._check_unjudged()
        if self["method"] == "reoptimise" and not (self["negatives"] == "static" and self["weight_decay"]):
            raise InputError("method: reoptimise needs negatives: static and weight_decay above 0; use method: auto")

    def _check_unjudged(self):
        """``evaluate: none`` leaves nothing to compare; what is asked for to be compared contradicts it."""
        if self["evaluate"] != "none":
            return
        asked = [key for key in ("methods", "compare_models") if self[key] is not None]
        contradicting = {"experiment": ("paper",), "compare": ("retrain", "paired")}
        asked += [key for key, words in contradicting.items() if self._asked(key) in words]
        if asked:
            raise InputError(f"evaluate: none judges no model; leave it out, or leave out {asked[0]}")
        self.final_config_dict["compare"] = "none"

    def _asked(self, key):
        """The value of a key that the user has given, in this run."""
        return self.external_config_dict.get(key) if key not in self._checkpoint_config else None


UNLIMITED = 1e9  # undone_limit of steps that are measured as they are
# UBPR, equation (7): nothing of design beyond the paper.
PAPER = {
    "method": "influence",
    "curvature": "hessian",
    "damping": "none",
    "pool_return": False,
    "log_epochs": 1,
}
