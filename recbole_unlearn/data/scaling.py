"""Columns of numbers in which rows owe something to others.

RecBole scales some to 0..1, by the smallest and the largest value of all rows, and fills what is missing by their mean.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType

from recbole_unlearn.data.histories import history_columns
from recbole_unlearn.errors import InputError

NAMELESS = "[forgotten {}]"  # instead of the token of an id that has lost its name
Limits = dict[str, tuple[float, float]]


def scaled(config: Config, data: Dataset) -> list[str]:
    """Names of the columns of numbers of interactions that ``normalize_all`` or ``normalize_field`` has scaled."""
    return [name for name in data.inter_feat.columns if _is_scaled(config, data, name)]


def _is_scaled(config, data, name):
    fields = data.float_like_fields if config["normalize_all"] else config["normalize_field"] or []
    return name in fields and data.field2type.get(name) == FeatureType.FLOAT


def check_scaled(config: Config, data: Dataset) -> None:
    """Raises InputError where histories hold numbers that cannot be scaled anew: rows lack each user's last one."""
    known = history_columns(data)
    for name in known if config["normalize_all"] else config["normalize_field"] or []:
        field = known.get(name)
        if name in data.inter_feat.columns or data.field2type.get(field) != FeatureType.FLOAT_SEQ:
            continue
        if isinstance(data.field2seqlen[field], int):  # else it holds lists of numbers, which stay as they are
            raise InputError(
                f"unused_col drops {name}, which is scaled by its smallest and largest value and stays in histories; "
                f"nobody would know these of what remains: take {name} out of unused_col, or do not normalize it"
            )


def value(column: np.ndarray) -> np.ndarray:
    """What RecBole scales of a column of numbers: of ``numerical_features`` the first of two, ``[rows, 2]``."""
    return column[:, 0] if column.ndim > 1 else column


def limits(columns: Iterable[tuple[str, np.ndarray]]) -> Limits:
    """Smallest and largest value of each column."""
    return {name: (float(values.min()), float(values.max())) for name, values in columns}


def rescale(data: Dataset, before: Limits, after: Limits) -> None:
    """Scale columns as RecBole would have without the rows with which limits went, in place; histories too.

    Args:
        data: RecBole data set with tensors of its own, in a dict of its own.
        before, after: limits of all rows, and of those that stay.
    """
    columns, histories = data.inter_feat.interaction, history_columns(data)
    for name, (low, high) in after.items():
        if (low, high) == before[name]:
            continue
        pairs = name in data.config["numerical_features"]
        columns[name] = _between(columns[name], low, high, pairs)
        if field := histories.get(name):
            there = torch.arange(columns[field].shape[1]) < columns[data.item_list_length_field][:, None]
            there = there[:, :, None] if pairs else there
            columns[field] = torch.where(there, _between(columns[field], low, high, pairs), columns[field])


def tables_without(
    config: Config, data: Dataset, gone: Mapping[str, np.ndarray], given: Callable[[str, str], Iterable[str] | None]
) -> dict[str, Interaction]:
    """The tables of users and items that would hold other numbers without the lines of some, by attribute of ``data``.

    RecBole's tables have a row for each id, padding's too, for which there is no line.

    Args:
        gone: ids by ``user`` and ``item``, beside those who have no names any more.
        given: of 'user' or 'item' and a column, the tokens whose line has a number there; None: nobody knows, and what
            is the number that padding has counts as missing.
    """
    found = {}
    for part, owner in (("user", data.uid_field), ("item", data.iid_field)):
        table = getattr(data, f"{part}_feat", None)
        if table is None or not len(gone.get(part, ())):
            continue
        there = ~np.isin(np.arange(len(table)), gone[part])
        there &= [str(token) != NAMELESS.format(n) for n, token in enumerate(data.field2id_token[owner])]
        columns = dict(table.interaction)
        for name, column in table.interaction.items():
            if data.field2type.get(name) == FeatureType.FLOAT:
                values = value(column.numpy()).astype(np.float64)
                tokens = given(part, name)
                own = values != values[0] if tokens is None else np.isin(data.field2id_token[owner], list(tokens))
                columns[name] = _anew(column, values, there & own, there, _is_scaled(config, data, name))
        if any(columns[name] is not column for name, column in table.interaction.items()):
            found[f"{part}_feat"] = Interaction(columns)
    return found


def _anew(column, values, own, there, scaled):
    """A table's column as RecBole makes it of the rows' ``own`` values; itself where that changes nothing of others."""
    rest = np.where(own, values, values[own].mean() if own.any() else 0.0)
    if own.any() and scaled:
        rest = _between(torch.from_numpy(rest), values[own].min(), values[own].max(), False).numpy()
    changed = torch.from_numpy(rest).to(column.dtype)
    if torch.equal(changed[there], torch.from_numpy(value(column.numpy()))[there]):
        return column
    return torch.stack([changed, column[:, 1]], dim=1) if column.ndim > 1 else changed


def _between(values, low, high, pairs):
    """As RecBole: one value alone is 1; of pairs of a value and an index (``numerical_features``), the value."""
    if pairs:
        return torch.stack([_between(values[..., 0], low, high, False), values[..., 1]], dim=-1)
    return (values - low) / (high - low) if high > low else torch.ones_like(values)
