"""What a user gives, read once: files and ``config_dict``, by key. Nothing that is read can run code."""

import ast
import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config

from recbole_unlearn.data.tokens import NOBODY
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings import keys, recbole_keys
from recbole_unlearn.storage.files import read_text

MAX_VALUES = 1_000_000  # of a configuration file
MAX_YAML = 16 << 20  # bytes of one
# Keys whose values are text even where they look like numbers: what names users and items, and paths and names.
TEXTS = frozenset((*keys.VERBATIM, *recbole_keys.TEXT))
Files = Sequence[str] | None


@dataclass(frozen=True)
class Given:
    """One request, before there is a configuration.

    Attributes:
        model: name of a RecBole model, class of the user's own, or None.
        dataset: name, or None.
        files: YAML files that were read, in order.
        options: the keys of ``config_dict``.
        values: all keys: ``options`` above those of files, and later files above earlier ones.
    """

    model: str | type | None
    dataset: str | None
    files: tuple[str, ...]
    options: dict[str, Any]
    values: dict[str, Any]

    @classmethod
    def read(cls, model=None, dataset=None, config_file_list: Files = None, config_dict: Mapping | None = None):
        """Read it all. InputError for files that cannot be read, or are no YAML of keys and values."""
        if config_dict is not None and not isinstance(config_dict, Mapping):
            raise InputError("config_dict must be a dict")
        copied = copy.deepcopy(dict(config_dict or {}))
        options = {key: as_path(parse_value(value, key), key) for key, value in copied.items()}
        values = {**read_files(config_file_list), **options}
        return cls(
            values.get("model") if model is None else model,
            values.get("dataset") if dataset is None else dataset,
            tuple(config_file_list or ()),
            options,
            values,
        )

    def get(self, key: str) -> Any:
        """A key's value as a Python value; None if it is not given."""
        return parse_value(self.values.get(key), key)

    @cached_property
    def many(self) -> list[str]:
        """What is asked for that trains many models, none of which is an original to replace; the first is the run."""
        experiment, way = self.get("experiment") not in (None, "none"), self.get("evaluate")
        return (
            ["experiment"] * experiment
            + [f"evaluate: {way}"] * (way in ("fidelity", "audit"))
            + [key for key in ("methods", "compare_models") if self.get(key) is not None]
        )

    @property
    def arguments(self) -> tuple:
        """Arguments of `UnlearnConfig`; without a model or data set, the defaults are BPR and the bundled ml-100k."""
        return self.model or "BPR", self.dataset or "ml-100k", None, self.values


def parse_value(text: Any, key: str | None = None) -> Any:
    """A command-line string as a Python literal where it is one, else as it is. Unlike RecBole, runs nothing.

    Of a ``key`` of `TEXTS` it is left as it is, but for what means None.
    """
    if not isinstance(text, str):
        return text
    lowered = text.strip().lower()
    if key in ("field_separator", "seq_separator") and text == r"\t":  # as shells hand it over
        return "\t"
    if key in TEXTS:
        return None if lowered in NOBODY and (lowered or key in keys.NOBODY) else text
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null", "~"):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def read_arguments(arguments: Sequence[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keys of a command line's ``--key=value``, beside those that it has given otherwise; InputError for others."""
    found = dict(given or {})
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or not key:
            raise InputError(f"cannot read argument {argument!r}; write --key=value")
        if key in found:
            raise InputError(f"--{key} is given twice; give it once")
        found[key] = value
    return found


def as_path(value: Any, key: str) -> Any:
    """The value of one of our keys of paths as text."""
    return str(value) if key in keys.PATHS and isinstance(value, os.PathLike) else value


def read_files(files: Files) -> dict[str, Any]:
    """Keys and values of YAML files, later ones above earlier ones; ``properties/...`` is found in the package too.

    Raises:
        InputError: no list, a file that cannot be read, or is no YAML of keys and values.
    """
    if not isinstance(files or [], (list, tuple)):
        raise InputError(f"config_file_list must be a list of files, such as ['bpr.yaml'], not {files!r}")
    loaded: dict[str, Any] = {}
    for file in files or []:
        path = Path(file)
        if not path.is_file() and path.parts[:1] == ("properties",):
            path = keys.properties_dir().joinpath(*path.parts[1:])
        try:
            content = yaml.load(read_text(path, MAX_YAML), Loader=_LOADER)
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
        loaded |= {key: parse_value(value, key) if key in TEXTS else value for key, value in (content or {}).items()}
    return loaded


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


# RecBole's loader, which knows floats such as 1e-5
_LOADER = _loader_of_texts(Config._build_yaml_loader(Config.__new__(Config)))


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
