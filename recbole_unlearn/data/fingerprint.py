"""What ties a checkpoint and its log to a data set."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """Checksums of a built RecBole data set.

    Returns:
        sha256 hex digests: ``users`` and ``items`` of the id maps (token of every id), ``rows`` of the
        interactions in log order (ids, grouped by user).
    """
    users = dataset.inter_feat[dataset.uid_field].numpy()
    items = dataset.inter_feat[dataset.iid_field].numpy()
    order = np.argsort(users, kind="stable")
    return {
        "users": tokens_checksum(dataset.field2id_token[dataset.uid_field]),
        "items": tokens_checksum(dataset.field2id_token[dataset.iid_field]),
        "rows": rows_checksum(users[order], items[order]),
    }


def marks(dataset: Dataset, order: np.ndarray) -> np.ndarray | None:
    """What tells repeated interactions of a user and an item apart: a checksum of what else is loaded of each.

    Args:
        order: rows of the data set, in the order in which they are wanted.

    Returns:
        uint64, as many; None where the data set repeats no interaction.
    """
    own = set(dataset.field2type) - {getattr(dataset, "item_list_length_field", None)}  # others make the history
    columns = dataset.inter_feat.interaction.items()
    columns = {name: column.numpy() for name, column in columns if name in own and column.ndim == 1}
    keys = [dataset.uid_field, dataset.iid_field]
    if not pd.DataFrame({key: columns[key] for key in keys}).duplicated().any():
        return None
    return pd.util.hash_pandas_object(pd.DataFrame(columns), index=False).to_numpy()[order]


def rows_checksum(users: np.ndarray, items: np.ndarray) -> str:
    """sha256 of interactions in order: ids, ``[rows]``."""
    return hashlib.sha256(np.stack([users, items]).astype("<i8").tobytes()).hexdigest()


def tokens_checksum(tokens: Iterable[str]) -> str:
    """sha256 of a list of tokens, by id from 0 (padding) on."""
    return hashlib.sha256("\n".join(map(str, tokens)).encode()).hexdigest()
