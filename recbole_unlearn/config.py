"""RecBole's ``Config`` with this package's own keys."""

import ast
import copy
import difflib
import math
import numbers
import os
import re
from pathlib import Path

import torch
import yaml
from recbole.config import Config
from recbole.config import configurator as recbole_configurator

from recbole_unlearn import distributed
from recbole_unlearn.compat import model_class
from recbole_unlearn.input_error import InputError

CHOICES = {
    "method": ("auto", "reoptimise", "replay", "influence"),
    "replay_rows": ("auto", "touched", "all"),
    "negatives": ("redrawn", "static"),
    "curvature": ("gauss_newton", "hessian"),
    "damping": ("adam", "scalar", "none"),
    "compare": ("retrain", "none"),
    "evaluate": ("comparison", "fidelity", "none"),
    "experiment": ("none", "paper"),
}
# RecBole's keys of whole numbers: smallest and largest value
WHOLE = (
    ("seed", 0, 2**32 - 1),
    ("epochs", 0, math.inf),
    ("train_batch_size", 1, math.inf),
    ("eval_batch_size", 1, math.inf),
    ("embedding_size", 1, math.inf),
    ("eval_step", 0, math.inf),
    ("stopping_step", 0, math.inf),
)
LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")  # RecBole takes Adam for all others
MAX_VALUES = 1_000_000  # of a configuration file
# Keys that RecBole reads without listing them in any properties file.
RECBOLE_EXTRA = (
    "config_files",
    "local_rank",
    "nproc",
    "world_size",
    "offset",
    "ip",
    "port",
    "seq_len",
    "preload_weight",
)


def properties_dir():
    """Folder of the YAML files: inside the installed package, or beside it in a source checkout."""
    here = Path(__file__).resolve().parent
    return here / "properties" if (here / "properties").is_dir() else here.parent / "properties"


def own_options():
    """Own keys in file order: ``[(key, default, "(type) meaning")]``, read from ``properties/overall.yaml``."""
    text = (properties_dir() / "overall.yaml").read_text("utf-8")
    defaults = yaml.safe_load(text)
    return [
        (key, defaults[key], meaning.strip())
        for key, meaning in re.findall(r"^(\w+):[^#\n]*#\s*(.*)$", text, re.MULTILINE)
    ]


def parse_value(text):
    """A command-line string as a Python literal where it is one, else as it is. Unlike RecBole, runs nothing."""
    if not isinstance(text, str):
        return text
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null", "~"):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _is_a(kind, value):
    """Whether a value is a number of this kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _size(value, known=None):
    """How many values a YAML file spells out, aliases followed: few lines of them can make billions."""
    known = {} if known is None else known
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # for what lies within itself
        known[id(value)] = sum(_size(each, known) for each in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def changed(config, **values):
    """A copy of a configuration with other values."""
    new = copy.copy(config)
    new.final_config_dict = {**config.final_config_dict, **values}
    return new


def recbole_keys():
    """Every key that RecBole's own properties files and argument lists name."""
    keys = set(RECBOLE_EXTRA)
    for group in ("general", "training", "evaluation", "dataset"):
        keys.update(getattr(recbole_configurator, f"{group}_arguments"))
    for file in (Path(recbole_configurator.__file__).parent.parent / "properties").rglob("*.yaml"):
        keys.update(re.findall(r"^(\w+)\s*:", file.read_text("utf-8"), re.MULTILINE))
    return keys


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
        self._own = {key: default for key, default, _ in own_options()}
        config_dict = {key: parse_value(value) for key, value in copy.deepcopy(config_dict or {}).items()}
        try:
            super().__init__(model, dataset, config_file_list, config_dict)
        except KeyError as error:
            raise InputError(str(error.args[0])) from None
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, yaml.YAMLError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"configuration: {' '.join(str(error).split())}") from None
        self._check_own()
        self._check_training()

    @classmethod
    def peek(cls, key, config_file_list=None, config_dict=None):
        """Value of one key in ``config_dict`` or the files, without building a configuration; None if absent."""
        if config_dict and key in config_dict:
            return config_dict[key]
        reader = cls.__new__(cls)
        reader._checkpoint_config = {}
        reader.yaml_loader = reader._build_yaml_loader()
        return reader._load_config_files(config_file_list).get(key)

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
        self.parameters["Unlearning"] = [key for key in self._own if key != "eval_batch_size"]

    def _load_config_files(self, file_list):
        loaded = dict(self._checkpoint_config)
        for file in file_list or []:
            path = Path(file)
            if not path.is_file() and path.parts[:1] == ("properties",):
                path = properties_dir().joinpath(*path.parts[1:])
            try:
                content = yaml.load(path.read_text("utf-8"), Loader=self.yaml_loader)
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot read config file {file}: {error}") from None
            except yaml.YAMLError as error:
                raise InputError(f"config file {file} is not valid YAML: {' '.join(str(error).split())}") from None
            except RecursionError:
                raise InputError(f"config file {file} is not valid YAML: it is nested too deeply") from None
            if not isinstance(content or {}, dict):
                raise InputError(f"config file {file} must hold 'key: value' lines")
            if _size(content) > MAX_VALUES:
                raise InputError(f"config file {file} refers to itself, or grows beyond {MAX_VALUES} values")
            loaded.update(content or {})
        return loaded

    def _load_cmd_line(self):
        return {}

    def _convert_config_dict(self, config_dict):
        return config_dict

    def _get_model_and_dataset(self, model, dataset):
        self._refuse_misspelt()
        model = model or self.external_config_dict.get("model")
        if isinstance(model, str):
            try:
                model = model_class(model)
            except (ValueError, ImportError, AttributeError) as error:
                raise InputError(f"model {model!r} cannot be loaded from RecBole: {error}") from None
        return super()._get_model_and_dataset(model, dataset)

    def _load_internal_config_dict(self, model, model_class, dataset):
        super()._load_internal_config_dict(model, model_class, dataset)
        self._update_internal_config_dict(properties_dir() / "overall.yaml")

    def _refuse_misspelt(self):
        known = recbole_keys() | set(self._own) | {"model", "dataset", "log_wandb"}
        for key in self.external_config_dict:
            if key in known or key in self._checkpoint_config:
                continue
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
            if near:
                raise InputError(f"unknown key {key!r}; did you mean {near[0]!r}?")
            if key.startswith(("forget", "spam", "unlearn", "damping", "cg_", "curvature", "log_", "reoptimise")):
                raise InputError(f"unknown key {key!r}; --help lists the keys of recbole_unlearn")

    def _check_own(self):
        given = self.external_config_dict
        for key, allowed in CHOICES.items():
            value = self[key]
            if value is None and "none" in allowed:
                value = self.final_config_dict[key] = "none"
            if value not in allowed:
                near = difflib.get_close_matches(str(value), allowed, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"{key} must be one of {', '.join(allowed)}, not {value!r}{hint}")
        for key in ("output_dir", "checkpoint", "fidelity_cache", "comparison_cache", "audit"):
            if isinstance(self[key], (int, float)) and not isinstance(self[key], bool):  # `--output_dir=5`
                self.final_config_dict[key] = str(self[key])
            elif self[key] is not None and not (isinstance(self[key], str) and "\0" not in self[key]):
                raise InputError(f"{key} must be a path, not {self[key]!r}")
        for key in ("quick", "paper", "pool_return", "log_negatives", "purge", "purge_dataset"):
            if not isinstance(self[key], bool):
                raise InputError(f"{key} must be True or False, not {self[key]!r}")
        for key, low in (("damping_strength", 0), ("cg_tolerance", 0), ("reoptimise_tolerance", 0)):
            if not (_is_a((int, float), self[key]) and low <= self[key] < math.inf):
                raise InputError(f"{key} must be a number of at least {low}, not {self[key]!r}")
        for key, low in (
            *((key, 1) for key in ("cg_max_iterations", "reoptimise_max_iterations", "request_batch")),
            ("drift_every", 0),
            ("fidelity_seeds", 3),
            ("comparison_seeds", 1),
            ("rank_timeout", 1),
        ):
            if not (_is_a(int, self[key]) and self[key] >= low):
                raise InputError(f"{key} must be a whole number of at least {low}, not {self[key]!r}")
        patterns = self["unlearn_params"]
        if patterns is not None and not (patterns and isinstance(patterns, str)):
            if not (isinstance(patterns, list) and patterns and all(isinstance(p, str) for p in patterns)):
                raise InputError(f"unlearn_params must be a list of parameter names or patterns, not {patterns!r}")
        for key, words in (("log_epochs", ("all",)), ("curvature_triples", ("auto", "all"))):
            value = self[key]
            if value not in words and not (_is_a(int, value) and value >= 1):
                allowed = ", ".join(map(repr, words))
                raise InputError(f"{key} must be {allowed} or a whole number of at least 1, not {value!r}")
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
        asked += [key for key, word in (("experiment", "paper"), ("compare", "retrain")) if self._asked(key) == word]
        if asked:
            raise InputError(f"evaluate: none judges no model; leave it out, or leave out {asked[0]}")
        self.final_config_dict["compare"] = "none"

    def _asked(self, key):
        """The value of a key that the user has given, in this run."""
        return self.external_config_dict.get(key) if key not in self._checkpoint_config else None

    def _check_training(self):
        """RecBole takes these as they come, and fails, if at all, when it trains."""
        for key, low, high in WHOLE:
            value = self[key]
            if key in self and not (_is_a(numbers.Integral, value) and low <= value <= high):
                limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
                raise InputError(f"{key} must be a whole number of {limit}, not {value!r}")
        for key, zero in (("learning_rate", False), ("weight_decay", True)):
            value = self[key]
            if not (_is_a(numbers.Real, value) and 0 <= value < math.inf and (value or zero)):
                raise InputError(f"{key} must be a number {'of at least' if zero else 'above'} 0, not {value!r}")
        if str(self["learner"]).lower() not in LEARNERS:
            near = difflib.get_close_matches(str(self["learner"]), LEARNERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"learner must be one of {', '.join(LEARNERS)}, not {self['learner']!r}{hint}")
        if not isinstance(self["train_neg_sample_args"], dict):
            raise InputError(f"train_neg_sample_args must be a dict, not {self['train_neg_sample_args']!r}")
        if not (isinstance(self["topk"], list) and self["topk"]):
            raise InputError(f"topk must be a list of whole numbers, not {self['topk']!r}")


# UBPR, equation (7): nothing of design beyond the paper.
PAPER = {
    "method": "influence",
    "curvature": "hessian",
    "damping": "none",
    "pool_return": False,
    "log_epochs": 1,
}
