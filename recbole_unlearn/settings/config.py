"""RecBole's ``Config`` with this package's own keys."""

import ast
import copy
import math
import os
import re
from pathlib import Path

import torch
import yaml
from recbole.config import Config
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn import distributed
from recbole_unlearn.compat.recbole_models import model_class
from recbole_unlearn.data.knowledge import KEY
from recbole_unlearn.data.tokens import NOBODY
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings import recbole_keys
from recbole_unlearn.storage.files import read_text

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
MAX_VALUES = 1_000_000  # of a configuration file
MAX_YAML = 16 << 20  # bytes of one
# Keys whose values are text even where they look like numbers: what names users and items, and paths and names.
TOKENS = ("forget_users", "forget_items", "forget_category", "spam_items")
PATHS = ("checkpoint", "output_dir", "fidelity_cache", "comparison_cache", "audit")
TEXTS = (*TOKENS, *PATHS, "forget_file", "forget_requests", "forget_time", "forget_category_field", *recbole_keys.TEXT)
EMPTY = (*TOKENS, "forget_file", "forget_requests")  # of which an empty text is none


def properties_dir():
    """Folder of the YAML files: inside the installed package, or beside it in a source checkout."""
    here = Path(__file__).resolve().parents[1]
    return here / "properties" if (here / "properties").is_dir() else here.parent / "properties"


def own_options():
    """Own keys in file order: ``[(key, default, "(type) meaning")]``, read from ``properties/overall.yaml``."""
    text = (properties_dir() / "overall.yaml").read_text("utf-8")
    defaults = yaml.safe_load(text)
    return [
        (key, defaults[key], meaning.strip())
        for key, meaning in re.findall(r"^(\w+):[^#\n]*#\s*(.*)$", text, re.MULTILINE)
    ]


def parse_value(text, key=None):
    """A command-line string as a Python literal where it is one, else as it is. Unlike RecBole, runs nothing.

    Of a ``key`` of `TEXTS` it is left as it is, but for what means None.
    """
    if not isinstance(text, str):
        return text
    lowered = text.strip().lower()
    if key in ("field_separator", "seq_separator") and text == r"\t":  # as shells hand it over
        return "\t"
    if key in TEXTS:
        return None if lowered in NOBODY and (lowered or key in EMPTY) else text
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null", "~"):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _loader_of_texts(base):
    """A YAML loader that leaves values of `TEXTS` as they are written: of ``12_34`` YAML would make a number."""

    class Loader(base):
        def get_single_node(self):
            node = super().get_single_node()
            if isinstance(node, yaml.MappingNode):
                self.flatten_mapping(node)
                names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
                if twice := {name for name in names if names.count(name) > 1}:
                    raise InputError(f"{min(twice)} is given twice; give it once")
                node.value = [(key, _as_text(value) if key.value in TEXTS else value) for key, value in node.value]
            return node

    return Loader


def _as_text(node):
    """A node whose numbers, dates and switches are text, in a list too; null stays: it names nobody."""
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != "tag:yaml.org,2002:null":
        return yaml.ScalarNode("tag:yaml.org,2002:str", node.value)
    if isinstance(node, yaml.SequenceNode):
        parts = [_as_text(each) if isinstance(each, yaml.ScalarNode) else each for each in node.value]
        return yaml.SequenceNode(node.tag, parts)
    return node


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
        config_dict = {key: parse_value(value, key) for key, value in copy.deepcopy(config_dict or {}).items()}
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

    @classmethod
    def peek(cls, key, config_file_list=None, config_dict=None):
        """Value of one key in ``config_dict`` or the files, without building a configuration; None if absent."""
        if config_dict and key in config_dict:
            value = config_dict[key]
            return str(value) if key in PATHS and isinstance(value, os.PathLike) else value
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
        loaded, given = dict(self._checkpoint_config), set()
        for file in file_list or []:
            path = Path(file)
            if not path.is_file() and path.parts[:1] == ("properties",):
                path = properties_dir().joinpath(*path.parts[1:])
            try:
                content = yaml.load(read_text(path, MAX_YAML), Loader=_loader_of_texts(self.yaml_loader))
            except InputError as error:
                raise InputError(f"config file {file}: {error}") from None
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot read config file {file}: {error}") from None
            except (yaml.YAMLError, ValueError) as error:
                raise InputError(f"config file {file} is not valid YAML: {' '.join(str(error).split())}") from None
            except RecursionError:
                raise InputError(f"config file {file} is not valid YAML: it is nested too deeply") from None
            if not isinstance(content or {}, dict):
                raise InputError(f"config file {file} must hold 'key: value' lines")
            if _size(content) > MAX_VALUES:
                raise InputError(f"config file {file} refers to itself, or grows beyond {MAX_VALUES} values")
            content = {
                key: parse_value(value, key) if key in TEXTS else value for key, value in (content or {}).items()
            }
            loaded.update(content)
            given.update(content)
        self._given_by_files = given
        return loaded

    def _load_cmd_line(self):
        return {}

    def _convert_config_dict(self, config_dict):
        return config_dict

    def _get_model_and_dataset(self, model, dataset):
        model = model or self.external_config_dict.get("model")
        if isinstance(model, str):
            recbole_keys.check_model_name(model)
            try:
                model = model_class(model)
            except (ValueError, ImportError, AttributeError) as error:
                raise InputError(f"model {model} cannot be loaded from RecBole: {error}") from None
        elif isinstance(model, type) and model.__module__.partition(".")[0] != "recbole":
            if model.__name__ in recbole_keys.known_models():
                raise InputError(f"RecBole has a model named {model.__name__} already; give your class another name")
        if model is not None and not (isinstance(model, type) and issubclass(model, AbstractRecommender)):
            raise InputError(f"model must be the name of a RecBole model or a class of your own, not {model!r}")
        for key in self.external_config_dict:
            if key in recbole_keys.DERIVED and key not in self._checkpoint_config:
                raise InputError(f"{key} is no setting: it follows from others; leave it out")
            if key not in self._checkpoint_config:
                recbole_keys.check_known(key, {*self._own, KEY}, model)
        return super()._get_model_and_dataset(model, dataset)

    def _load_internal_config_dict(self, model, model_class, dataset):
        # a class of the user's own has the defaults of RecBole's that it is derived from
        super()._load_internal_config_dict(recbole_keys.recbole_name(model_class), model_class, dataset)
        self._update_internal_config_dict(properties_dir() / "overall.yaml")

    def _check_own(self):
        given = self.external_config_dict
        for key, allowed in CHOICES.items():
            value = self[key]
            if value is None and "none" in allowed:
                value = self.final_config_dict[key] = "none"
            recbole_keys.check_choice(key, value, allowed)
        for key in PATHS:
            if self[key] is not None and not (isinstance(self[key], str) and self[key] and "\0" not in self[key]):
                raise InputError(f"{key} must be a path, not {self[key]!r}")
        for key in ("quick", "paper", "pool_return", "log_negatives", "purge", "purge_dataset"):
            recbole_keys.check_switch(key, self[key])
        for key, low in (("damping_strength", 0), ("cg_tolerance", 0), ("reoptimise_tolerance", 0)):
            if not (recbole_keys.is_a((int, float), self[key]) and low <= self[key] < math.inf):
                raise InputError(f"{key} must be a number of at least {low}, not {self[key]!r}")
        for key, low in (
            *((key, 1) for key in ("cg_max_iterations", "reoptimise_max_iterations", "request_batch")),
            ("drift_every", 0),
            ("fidelity_seeds", 3),
            ("comparison_seeds", 1),
            ("rank_timeout", 1),
        ):
            recbole_keys.check_whole(key, self[key], low)
        patterns = self["unlearn_params"]
        if patterns is not None and not (patterns and isinstance(patterns, str)):
            if not (isinstance(patterns, list) and patterns and all(isinstance(p, str) for p in patterns)):
                raise InputError(f"unlearn_params must be a list of parameter names or patterns, not {patterns!r}")
        for key, words in (("log_epochs", ("all",)), ("curvature_triples", ("auto", "all"))):
            value = self[key]
            if value not in words and not (recbole_keys.is_a(int, value) and value >= 1):
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


# UBPR, equation (7): nothing of design beyond the paper.
PAPER = {
    "method": "influence",
    "curvature": "hessian",
    "damping": "none",
    "pool_return": False,
    "log_epochs": 1,
}
