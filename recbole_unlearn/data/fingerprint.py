"""What ties a checkpoint and its log to a data set."""

import hashlib
from collections.abc import Iterable

import numpy as np
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


def rows_checksum(users: np.ndarray, items: np.ndarray) -> str:
    """sha256 of interactions in order: ids, ``[rows]``."""
    return hashlib.sha256(np.stack([users, items]).astype("<i8").tobytes()).hexdigest()


def tokens_checksum(tokens: Iterable[str]) -> str:
    """sha256 of a list of tokens, by id from 0 (padding) on."""
    return hashlib.sha256("\n".join(map(str, tokens)).encode()).hexdigest()
