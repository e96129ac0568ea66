"""What ties a checkpoint and its log to a data set."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from recbole.data.dataloader import TrainDataLoader
from recbole.data.dataset import Dataset

from recbole_unlearn.data.histories import history_columns
from recbole_unlearn.data.scaling import scaled

HELD_OUT = "held_out"
HELD_OUT_ROWS = "held_out_rows"  # of logs that lack rows: of the held-out interactions in data that have these rows


def by_user(users: np.ndarray) -> np.ndarray:
    """Interactions in the order of a log's rows, grouped by user: places, int64, of their users' ids."""
    return np.argsort(users, kind="stable")


def fingerprint(loader: TrainDataLoader) -> dict[str, str]:
    """Checksums of the data set of a RecBole loader.

    Returns:
        sha256 hex digests: ``users`` and ``items`` of the id maps (token of every id), ``rows`` of the
        interactions in log order (ids, grouped by user), and where negatives are drawn by popularity, for which RecBole
        counts held-out interactions too, ``held_out`` of these counts.
    """
    dataset, sampler = loader._dataset, loader._sampler
    users = dataset.inter_feat[dataset.uid_field].numpy()
    items = dataset.inter_feat[dataset.iid_field].numpy()
    order = by_user(users)
    return {
        "users": tokens_checksum(dataset.field2id_token[dataset.uid_field]),
        "items": tokens_checksum(dataset.field2id_token[dataset.iid_field]),
        "rows": rows_checksum(users[order], items[order]),
        **(_held_out(dataset, sampler) if getattr(sampler, "distribution", None) == "popularity" else {}),
    }


def _held_out(dataset, sampler):
    counted = getattr(sampler, "datasets", None) or [sampler.dataset]
    parts = (np.bincount(each.inter_feat[each.iid_field].numpy(), minlength=each.item_num) for each in counted)
    return held_out_checksum(
        sum(parts) - np.bincount(dataset.inter_feat[dataset.iid_field].numpy(), minlength=dataset.item_num)
    )


def held_out_checksum(counts: np.ndarray) -> dict[str, str]:
    """Entry of a fingerprint: sha256 of the number of held-out interactions of each item, ``[items]``."""
    return {HELD_OUT: hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()}


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


def surroundings(data: Dataset, tables: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Checksum of what a training reads beside who had what: features, facts, histories, pre-trained vectors.

    Args:
        data: a built RecBole data set.
        tables: name -> columns, of the training interactions in log order (``train``: `told` of them) and of its other
            tables.
    """
    read = {f"train/{name}": tables["train"][name] for name in told(data) & tables["train"].keys()}
    for table in tables.keys() - {"train"}:
        read |= {f"{table}/{name}": column for name, column in tables[table].items()}
    read |= {f"preloaded/{field}": vectors for field, vectors in data._preloaded_weight.items()}
    checksum = hashlib.sha256()
    for name, array in sorted(read.items()):
        checksum.update(f"{name} {array.dtype} {array.shape}\0".encode())
        checksum.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()


def told(data: Dataset) -> set[str]:
    """Columns of the interactions that `surroundings` tells from others.

    Not the ids, which the fingerprint knows, nor the numbers that a trainer gives to rows, which are no field; nor
    what is scaled by what remains: in two requests it is rounded otherwise than in one.
    """
    moving, histories = scaled(data.config, data), history_columns(data)
    lists = {histories[name] for name in moving if name in histories}
    return data.field2type.keys() - {data.uid_field, data.iid_field, *moving, *lists}


def rows_checksum(users: np.ndarray, items: np.ndarray) -> str:
    """sha256 of interactions in order: ids, ``[rows]``."""
    return hashlib.sha256(np.stack([users, items]).astype("<i8").tobytes()).hexdigest()


def tokens_checksum(tokens: Iterable[str]) -> str:
    """sha256 of a list of tokens, by id from 0 (padding) on."""
    return hashlib.sha256("\n".join(map(str, tokens)).encode()).hexdigest()
