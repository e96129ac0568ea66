"""Columns of interactions that RecBole scales to 0..1, by the smallest and the largest value of all rows."""

from collections.abc import Iterable

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.utils import FeatureType

Limits = dict[str, tuple[float, float]]


def scaled(config: Config, data: Dataset) -> list[str]:
    """Names of the columns of numbers that ``normalize_all`` or ``normalize_field`` has scaled."""
    fields = data.float_like_fields if config["normalize_all"] else config["normalize_field"] or []
    columns = data.inter_feat.columns
    return [name for name in fields if name in columns and data.field2type.get(name) == FeatureType.FLOAT]


def limits(columns: Iterable[tuple[str, np.ndarray]]) -> Limits:
    """Smallest and largest value of each column."""
    return {name: (float(values.min()), float(values.max())) for name, values in columns}


def rescale(data: Dataset, before: Limits, after: Limits) -> None:
    """Scale columns as RecBole would have without the rows with which limits went, in place; histories too.

    Args:
        data: RecBole data set with tensors of its own, in a dict of its own.
        before, after: limits of all rows, and of those that stay.
    """
    columns = data.inter_feat.interaction
    for name, (low, high) in after.items():
        if (low, high) == before[name]:
            continue
        columns[name] = _between(columns[name], low, high)
        if (field := getattr(data, f"{name}_list_field", None)) in columns:
            there = torch.arange(columns[field].shape[1]) < columns[data.item_list_length_field][:, None]
            columns[field] = torch.where(there, _between(columns[field], low, high), columns[field])


def _between(values, low, high):
    """As RecBole: one value alone is 1."""
    return (values - low) / (high - low) if high > low else torch.ones_like(values)
