"""A configuration as plain values, and what of it nobody may see: what names those who are to be forgotten."""

import copy
from contextlib import contextmanager
from typing import Any

import torch

from recbole_unlearn.settings.keys import PERSONAL

PLAIN = (str, int, float, bool, type(None))


def plain(value) -> Any:
    """``value`` with everything dropped that ``torch.load(weights_only=True)`` refuses.

    Returns a str, int, float, bool, None, torch.Tensor, or list/dict of these; other things become ``str(value)``.
    """
    if isinstance(value, PLAIN) or isinstance(value, torch.Tensor):
        # subclasses (enums, numpy scalars) would be pickled by their own class
        if isinstance(value, torch.Tensor) or type(value) in PLAIN:
            return value
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return str(value)


def public(config, seed=True):
    """The configuration as plain values, without anything that names the forgotten; with or without the ``seed``."""
    dropped = (*PERSONAL, *(() if seed else ("seed",)))
    return {key: value for key, value in plain(config.final_config_dict).items() if key not in dropped}


MASK = "(given, not logged)"


def masked(config):
    """A copy of a configuration, RecBole's or ours, to be shown to anybody: without values that name the forgotten."""
    shown = copy.copy(config)
    for name, held in vars(config).items():
        if isinstance(held, dict):
            kept = {key: MASK if key in PERSONAL and value is not None else value for key, value in held.items()}
            vars(shown)[name] = kept
    return shown


@contextmanager
def hidden(config):
    """Personal values masked in place while RecBole prints a configuration, or hashes it into names of its files."""
    names = (*PERSONAL, *(["seed"] if config["purge"] else []))
    kept = {key: config[key] for key in names if config[key] is not None}
    config.final_config_dict.update(dict.fromkeys(kept, MASK))
    try:
        yield
    finally:
        config.final_config_dict.update(kept)
