"""RecBole's own reading, splitting and loaders without their loops over single rows: the same data, row for row.

Each function stands in for a method of RecBole's, which goes on where it does not fit. They are in place only while
this package builds a `Split` (`faster`): what a stock script builds, and may pickle, is RecBole's own.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader, NegSampleDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.sampler import Sampler
from recbole.utils import InputType, ModelType

from recbole_unlearn.compat.recbole_models import replaced
from recbole_unlearn.data.reading import read_csv

_load_feat = Dataset._load_feat
_filter_by_inter_num = Dataset._filter_by_inter_num
_split_by_ratio = Dataset.split_by_ratio
_full_init = FullSortEvalDataLoader.__init__
_sampled_init = NegSampleEvalDataLoader.__init__

_lock, _held = threading.RLock(), ExitStack()
_users = 0  # of the context: sessions may open in several threads


@contextmanager
def faster() -> Iterator[None]:
    """RecBole builds and indexes data by the functions below, for a while."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for owner, methods in QUICK.items():
                _held.enter_context(replaced(owner, **methods))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _held.close()


def _load(self, filepath, source):
    """``Dataset._load_feat``."""
    with replaced(pd, read_csv=read_csv):
        return _load_feat(self, filepath, source)


def _counted(values=()):
    """``Counter`` of a column, which it counts value by value."""
    if not isinstance(values, (np.ndarray, pd.api.extensions.ExtensionArray)) or pd.isna(values).any():
        return Counter(values)  # a missing token must stay the object that it is: RecBole subtracts its count
    codes, tokens = pd.factorize(values)
    return Counter(dict(zip(tokens.tolist(), np.bincount(codes).tolist(), strict=True)))


def _filter_by_count(self):
    """``Dataset._filter_by_inter_num``, which counts every token to find that its defaults drop none."""
    if any(self.config[f"{kind}_inter_num_interval"] not in (None, "[0,inf)") for kind in ("user", "item")):
        _filter_by_inter_num(self)


class _Groups:
    """Row numbers of each key, keys in the order in which they first occur: ``Dataset._grouped_index``."""

    def __init__(self, keys):
        codes, _ = pd.factorize(np.asarray(keys))
        self.rows, self.sizes = np.argsort(codes, kind="stable"), np.bincount(codes)

    def __iter__(self):
        return (part.tolist() for part in np.split(self.rows, np.cumsum(self.sizes)[:-1]))

    def __len__(self):
        return len(self.sizes)

    def cut(self, counts):
        """Rows of each part, key by key: ``counts`` ``[keys, parts]`` says how many, and they add up to the sizes."""
        ends = np.cumsum(counts, axis=1)
        first = np.cumsum(self.sizes) - self.sizes
        place = np.arange(len(self.rows)) - np.repeat(first, self.sizes)
        parts = np.zeros(len(place), np.int8)
        for end in ends.T[:-1]:
            parts += place >= np.repeat(end, self.sizes)
        return [self.rows[parts == n] for n in range(ends.shape[1])]


def _grouped_index(self, group_by_list):
    return _Groups(group_by_list)


def _leave_out(self, grouped_index, leave_one_num):
    """``Dataset._split_index_by_leave_one_out``: the last rows of each key, one to a part, the first being kept."""
    left = np.minimum(leave_one_num, grouped_index.sizes - 1)
    counts = np.stack([left >= n for n in range(leave_one_num, 0, -1)], axis=1)
    return grouped_index.cut(np.column_stack([grouped_index.sizes - left, counts]))


def _by_ratio(self, ratios, group_by=None):
    """``Dataset.split_by_ratio``."""
    if group_by is None:
        return _split_by_ratio(self, ratios)
    self.logger.debug(f"split by ratios [{ratios}], group_by=[{group_by}]")
    ratios = [ratio / sum(ratios) for ratio in ratios]
    groups = self._grouped_index(self.inter_feat[group_by].numpy())
    sizes, which = np.unique(groups.sizes, return_inverse=True)
    counts = [np.diff(self._calcu_split_ids(tot=size, ratios=ratios), prepend=0, append=size) for size in sizes]
    self._drop_unused_col()
    return [self.copy(self.inter_feat[rows]) for rows in groups.cut(np.array(counts)[which])]


class UsedItems:
    """Items of each user, sorted; RecBole's ``used_ids``, an array of sets, made when a set is asked for.

    Attributes:
        ptr: where each user's items begin, int64 ``[users + 1]``.
        items: int32.
    """

    def __init__(self, ptr: np.ndarray, items: np.ndarray) -> None:
        self.ptr, self.items, self._sets = ptr, items, {}

    @classmethod
    def of(cls, keys: np.ndarray, n_users: int, n_items: int) -> "UsedItems":
        """From sorted distinct ``user * n_items + item``."""
        ptr = np.searchsorted(keys, np.arange(n_users + 1, dtype=np.int64) * n_items)
        return cls(ptr, (keys % n_items).astype(np.int32))

    def keys(self, n_items: int) -> np.ndarray:
        users = np.repeat(np.arange(len(self), dtype=np.int64), np.diff(self.ptr))
        users *= n_items
        users += self.items
        return users

    def __len__(self):
        return len(self.ptr) - 1

    def __getitem__(self, users):
        if users is None:  # RecBole asks for the items of no user, and throws them away
            return None
        if np.ndim(users) == 0:
            return self._set(int(users))
        users = np.arange(len(self))[users]
        found = np.empty(len(users), object)
        found[:] = [self._set(user) for user in users.tolist()]
        return found

    def __iter__(self):
        return map(self._set, range(len(self)))

    def _set(self, user):
        if user not in self._sets:
            self._sets[user] = set(self.items[self.ptr[user] : self.ptr[user + 1]].tolist())
        return self._sets[user]


def _used_ids(self):
    """``Sampler.get_used_ids``: each phase's items are those of the phases before, and its own."""
    found, keys = {}, np.empty(0, np.int64)
    for phase, data in zip(self.phases, self.datasets, strict=True):
        more = data.inter_feat[self.uid_field].numpy() * self.item_num + data.inter_feat[self.iid_field].numpy()
        keys = _distinct(np.concatenate([keys, np.sort(more)]))
        found[phase] = UsedItems.of(keys, self.user_num, self.item_num)
    if (np.diff(found[self.phases[-1]].ptr) + 1 == self.item_num).any():
        raise ValueError(
            "Some users have interacted with all items, "
            "which we can not sample negative items for them. "
            "Please set `user_inter_num_interval` to filter those users."
        )
    return found


def _distinct(keys):
    """Sorted distinct values of two sorted arrays, one after the other."""
    keys.sort(kind="stable")  # which merges them
    new = np.ones(len(keys), bool)
    new[1:] = keys[1:] != keys[:-1]
    return keys[new]


def _without(keys, others):
    """Sorted keys that are not among others."""
    places = np.searchsorted(keys, others)
    there = places < len(keys)
    there[there] = keys[places[there]] == others[there]
    return np.delete(keys, places[there])


class Ragged:
    """Items of some users as tensors, None for the others: an array of objects, made when they are asked for.

    Attributes:
        ptr, items: as `UsedItems` has them, of int64 items; users without an entry have none.
        known: users that have an entry, bool ``[users]``.
    """

    def __init__(self, keys: np.ndarray, known: np.ndarray, n_items: int) -> None:
        self.ptr = np.searchsorted(keys, np.arange(len(known) + 1, dtype=np.int64) * n_items)
        self.items, self.known = keys % n_items, known

    def __len__(self):
        return len(self.known)

    def __getitem__(self, users):
        if np.ndim(users) == 0:
            user = int(users)
            return torch.from_numpy(self.items[self.ptr[user] : self.ptr[user + 1]]) if self.known[user] else None
        users = np.arange(len(self))[np.asarray(users)].tolist()
        found = np.empty(len(users), object)
        for n, user in enumerate(users):
            found[n] = self[user]
        return found


def _full_loader(self, config, dataset, sampler, shuffle=False):
    """``FullSortEvalDataLoader.__init__``, but for histories in the data, which need no such lists."""
    used = getattr(sampler, "used_ids", None)
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL or not isinstance(used, UsedItems) or not len(dataset):
        return _full_init(self, config, dataset, sampler, shuffle=shuffle)
    self.logger = dataset.logger
    self.uid_field, self.iid_field, self.is_sequential = dataset.uid_field, dataset.iid_field, False
    n_users, n_items = dataset.user_num, dataset.item_num
    dataset.sort(by=self.uid_field, ascending=True)
    users = dataset.inter_feat[self.uid_field].numpy()
    held_out = _distinct(np.sort(users * n_items + dataset.inter_feat[self.iid_field].numpy()))
    self.uid2items_num = np.bincount(held_out // n_items, minlength=n_users)
    known = self.uid2items_num > 0
    history = used.keys(n_items)
    history = _without(history[np.repeat(known, np.diff(used.ptr))], held_out)
    self.uid2positive_item, self.uid2history_item = (Ragged(keys, known, n_items) for keys in (held_out, history))
    self.uid_list = torch.from_numpy(np.flatnonzero(known))
    self.user_df = dataset.join(Interaction({self.uid_field: self.uid_list}))
    self.sample_size = len(self.user_df)
    if shuffle:
        self.logger.warning("FullSortEvalDataLoader can't shuffle")
    AbstractDataLoader.__init__(self, config, dataset, sampler, shuffle=False)


def _sampled_loader(self, config, dataset, sampler, shuffle=False):
    """``NegSampleEvalDataLoader.__init__``, where it samples negatives."""
    args = config[f"{sampler.phase}_neg_sample_args"] if isinstance(sampler, Sampler) and sampler.phase else None
    if not args or "none" in (args["distribution"], args["sample_num"]) or not len(dataset):
        return _sampled_init(self, config, dataset, sampler, shuffle=shuffle)
    self.logger = dataset.logger
    self._set_neg_sample_args(config, dataset, InputType.POINTWISE, args)
    dataset.sort(by=dataset.uid_field, ascending=True)
    users = dataset.inter_feat[dataset.uid_field].numpy()
    self.uid_list, first, counts = np.unique(users, return_index=True, return_counts=True)
    self.uid2index = np.array([None] * dataset.user_num)
    self.uid2items_num = np.zeros(dataset.user_num, dtype=np.int64)
    self.uid2items_num[self.uid_list] = counts
    self.uid2index[self.uid_list] = [
        slice(*ends) for ends in zip(first.tolist(), (first + counts).tolist(), strict=True)
    ]
    self.sample_size = len(self.uid_list)
    if shuffle:
        self.logger.warning("NegSampleEvalDataLoader can't shuffle")
    NegSampleDataLoader.__init__(self, config, dataset, sampler, shuffle=False)


def _mean_count(field):
    """``Dataset.avg_actions_of_users`` or ``..._items``, of a built data set."""

    def mean(self):
        counts = np.bincount(self.inter_feat[getattr(self, field)].numpy())
        return np.mean(counts[counts > 0])

    return property(mean)


def described(dataset: Dataset) -> str:
    """A built data set in RecBole's words."""
    with replaced(
        Dataset, avg_actions_of_users=_mean_count("uid_field"), avg_actions_of_items=_mean_count("iid_field")
    ):
        return str(dataset)


QUICK = {
    Dataset: {
        "_load_feat": _load,
        "_filter_by_inter_num": _filter_by_count,
        "_grouped_index": _grouped_index,
        "_split_index_by_leave_one_out": _leave_out,
        "split_by_ratio": _by_ratio,
    },
    sys.modules[Dataset.__module__]: {"Counter": _counted},
    Sampler: {"get_used_ids": _used_ids},
    FullSortEvalDataLoader: {"__init__": _full_loader},
    NegSampleEvalDataLoader: {"__init__": _sampled_loader},
}
