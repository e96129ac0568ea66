"""The methods of a comparison, by name. A new one: its file here, its YAML in properties/method/, its line below."""

import difflib
from collections.abc import Collection, Iterable
from numbers import Real
from typing import Any

import yaml
from recbole.config import Config

from recbole_unlearn.errors import InputError
from recbole_unlearn.methods.base import Method
from recbole_unlearn.methods.certified import CertifiedRemoval
from recbole_unlearn.methods.ceu import CEU
from recbole_unlearn.methods.fine_tune import FineTune
from recbole_unlearn.methods.gif import GIF
from recbole_unlearn.methods.gradient_ascent import GradientAscent
from recbole_unlearn.methods.ifru import IFRU
from recbole_unlearn.methods.ours import Ours
from recbole_unlearn.methods.receraser import RecEraser
from recbole_unlearn.methods.retrain import Retrain
from recbole_unlearn.methods.rrl import RRL
from recbole_unlearn.methods.scif import SCIF
from recbole_unlearn.methods.sisa import SISA
from recbole_unlearn.methods.ubpr import UBPR
from recbole_unlearn.methods.ultrare import UltraRE
from recbole_unlearn.settings.keys import properties_dir
from recbole_unlearn.settings.recbole_keys import check_choice, is_a

METHODS: dict[str, type[Method]] = {
    "retrain": Retrain,
    "sisa": SISA,
    "receraser": RecEraser,
    "ultrare": UltraRE,
    "scif": SCIF,
    "ifru": IFRU,
    "gif": GIF,
    "ceu": CEU,
    "certified": CertifiedRemoval,
    "rrl": RRL,
    "gradient_ascent": GradientAscent,
    "fine_tune": FineTune,
    "ubpr": UBPR,
    "ours": Ours,
}


def suited(names: Iterable[str], config: Config) -> list[str]:
    """Those of some methods that are for a configuration's model."""
    return [name for name in names if METHODS[name].refuses(config) is None]


def chosen(value: object, config: Config | None = None) -> list[str]:
    """Names of methods as the user gives them: ``all`` that are for a model, names separated by commas, or a list.

    Args:
        config: of the model; default: whatever it is.

    Raises:
        InputError: a name that no method has, or a method that is not for the model.
    """
    names = names_in(value, "methods")
    if names == ["all"]:
        return list(METHODS) if config is None else suited(METHODS, config)
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0)
            raise InputError(f"unknown method {name!r}; did you mean {near[0]!r}? methods: {', '.join(METHODS)}")
        if config and (reason := METHODS[name].refuses(config)):
            raise InputError(f"method {name} is not for {config['model']}: {reason}; choose another method")
    return names


def names_in(value: object, key: str) -> list[str]:
    """A list of names, from one or from text with commas; each once."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{key} must be names separated by commas, not {value!r}")
    return list(dict.fromkeys(name.strip() for name in names))


def settings_of(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings of a method: its ``properties/method/<name>.yaml``, with the user's changes.

    Raises:
        InputError: a setting that the method does not have, or a value of another type than its default.
    """
    settings = yaml.safe_load((properties_dir() / "method" / f"{name}.yaml").read_text("utf-8")) or {}
    if not isinstance(changes or {}, dict):
        raise InputError(f"method_args: {name} must hold settings as {{name: value}}, not {changes!r}")
    for key, value in (changes or {}).items():
        if key not in settings:
            near = difflib.get_close_matches(str(key), settings, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(settings) or 'none'}"
            raise InputError(f"method_args: {name} has no setting {key!r}; {hint}")
        default = settings[key]
        if isinstance(default, bool) or isinstance(value, bool):
            fits = isinstance(default, bool) and isinstance(value, bool)
        elif isinstance(default, (int, float)):
            fits = isinstance(value, int if isinstance(default, int) else (int, float)) and 0 <= value < float("inf")
        else:
            fits = default is None or isinstance(value, type(default))
        if not fits:
            raise InputError(f"method_args: {name}: {key} must be of the kind of {default!r}, not {value!r}")
    _check_ranges(name, changes or {})
    return settings | (changes or {})


def _check_ranges(name, changes):
    """Raises InputError where a value is of the right type, but none that the method can work with."""
    method = METHODS[name]
    for key, value in changes.items():
        what, (low, high) = f"method_args: {name}: {key}", method.limits.get(key, (0, float("inf")))
        if key in method.positive and not value > 0:
            raise InputError(f"{what} must be above 0, not {value!r}")
        if key in method.limits and value is not None and not (is_a(Real, value) and low <= value <= high):
            limit = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
            raise InputError(f"{what} must be a number {limit}, not {value!r}")
        if key in method.choices:
            check_choice(what, value, method.choices[key])


def all_settings(
    names: Collection[str], method_args: dict[str, dict[str, Any] | None] | None = None
) -> dict[str, dict[str, Any]]:
    """Settings of several methods.

    Args:
        method_args: name -> changed settings, as in the key ``method_args``.

    Returns:
        Name -> settings.
    """
    if not isinstance(method_args or {}, dict):
        raise InputError(f"method_args must be {{method: {{setting: value}}}}, not {method_args!r}")
    for name, changes in (method_args or {}).items():
        chosen([name])
        settings_of(name, changes)
        if name not in names:
            raise InputError(
                f"method_args: {name} is not among the methods {', '.join(names)}; leave it out, or add it"
            )
    return {name: settings_of(name, (method_args or {}).get(name)) for name in names}
