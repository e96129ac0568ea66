"""Draws RecBole's training negatives and batches faster, bit for bit the same."""

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from recbole.data.dataloader import KnowledgeBasedDataLoader, TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.sampler import Sampler
from recbole.utils import InputType, KGDataLoaderState

from recbole_unlearn.compat.recbole_models import is_recboles, runs_recboles
from recbole_unlearn.data.dataset import UsedItems
from recbole_unlearn.data.orders import BatchOrder, next_order, pass_over, permutation
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.storage.triple_log import TripleLog

ROW = "triple_row"
FILTER_BITS = 2**29  # 64 MiB

Batch = TypeVar("Batch")


def used_items(sampler: Any, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Items that ``sampler`` never draws for each user, as CSR: ``ptr`` ``[n_users + 1]`` and sorted ``items``."""
    ptr, items = listed_items(sampler, n_users)
    if isinstance(sampler.used_ids, UsedItems):
        return ptr, items
    keys = np.sort(np.repeat(np.arange(n_users, dtype=np.int64) << 32, np.diff(ptr)) + items)
    return ptr, (keys & (2**32 - 1)).astype(np.int32)


def listed_items(sampler: Any, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """`used_items` in whatever order, the same as long as nothing changes: several times faster where they are sets."""
    used = sampler.used_ids
    if isinstance(used, UsedItems):
        return used.ptr, used.items
    ptr = np.cumsum([0, *map(len, used)])
    assert len(ptr) == n_users + 1
    return ptr, np.fromiter(itertools.chain.from_iterable(used), np.int32, ptr[-1])


def _filter(ptr, items, n_items):
    """A bit for each (user, item) that is used; pairs share bits where the table would be larger than `FILTER_BITS`."""
    n_bits = min(1 << ((len(ptr) - 1) * n_items).bit_length(), FILTER_BITS)
    bits = np.zeros(max(n_bits >> 3, 1), np.uint8)
    _set_bits(bits, ptr, items, n_items)
    return bits


@numba.njit(cache=True, nogil=True)
def _bit(bits, user, item, n_items):
    at = (user * n_items + item) & (8 * len(bits) - 1)
    return at >> 3, np.uint8(1 << (at & 7))


@numba.njit(cache=True, nogil=True)
def _set_bits(bits, ptr, items, n_items):
    for u in range(len(ptr) - 1):
        for item in items[ptr[u] : ptr[u + 1]]:
            byte, bit = _bit(bits, u, item, n_items)
            bits[byte] |= bit


@numba.njit(cache=True, nogil=True)
def _is_used(user, item, ptr, items):
    at = ptr[user] + np.searchsorted(items[ptr[user] : ptr[user + 1]], item)
    return at < ptr[user + 1] and items[at] == item


@numba.njit(cache=True, nogil=True)
def _refill(values, pending, fresh, users, bits, ptr, items, n_items):
    """Put ``fresh`` draws where ``values`` are pending; returns how many, moved to the front, still are."""
    n = marked = 0
    for i in range(len(fresh)):
        t = pending[i]
        values[t] = fresh[i]
        byte, bit = _bit(bits, users[t], fresh[i], n_items)
        pending[marked] = t
        marked += np.int64(bits[byte] & bit != 0)  # no branch, which a processor could not foretell
    if (len(ptr) - 1) * n_items <= 8 * len(bits):  # each pair has a bit of its own
        return marked
    for t in pending[:marked]:
        pending[n] = t
        n += np.int64(_is_used(users[t], values[t], ptr, items))
    return n


@numba.njit(cache=True, nogil=True)
def _fill(values, stream, users, counts, bits, ptr, items, n_items):
    """`_refill` for the ``counts`` values of one user after another; returns the draws needed, -1 for too few."""
    pending = np.empty(counts.max(), np.int64)
    start = used = 0
    for n in counts:
        pending[:n] = np.arange(start, start + n)
        start += n
        while n:
            if used + n > len(stream):
                return -1
            fresh = stream[used : used + n]
            used += n
            n = _refill(values, pending, fresh, users, bits, ptr, items, n_items)
    return used


@numba.njit(cache=True, nogil=True)
def record(
    rows: np.ndarray, negatives: np.ndarray, number: int, position: np.ndarray, drawn: np.ndarray, step: np.ndarray
) -> None:
    """Note a batch down: ``negatives`` ``[m, n]`` of ``rows`` ``[n]`` in ``drawn``, its number in ``step``.

    ``position``: row -> place in ``drawn`` ``[rows, m]`` and ``step`` ``[rows]``.
    """
    # One loop for each array: each waits for memory at random places, and so several do at once.
    place = np.empty(len(rows), np.uint64)
    for r in range(len(rows)):
        place[r] = position[rows[r]]
    for r in range(len(rows)):
        step[place[r]] = number
    for r in range(len(rows)):
        for t in range(len(negatives)):
            drawn[place[r], t] = negatives[t, r]


def own_draws(loader: TrainDataLoader | KnowledgeBasedDataLoader) -> str | None:
    """Whose code makes a train loader's batches, in words, where it is not RecBole's alone; None: it is.

    What stands in for RecBole's loaders and samplers asks this first, and whatever draws by ``train_neg_sample_args``
    what a training would have drawn.
    """
    pairs, facts = getattr(loader, "general_dataloader", loader), getattr(loader, "kg_dataloader", None)
    both = [pairs] if facts is None else [pairs, facts]
    asked: list[tuple[str, Any, tuple[str, ...]]] = [("data loader", each, ()) for each in (loader, *both)]
    asked += [("sampler", each._sampler, ()) for each in both if each._sampler is not None]
    asked += [("data set", pairs._dataset, ("__getitem__", "join"))]
    for name, each, methods in asked:
        if not runs_recboles(each, *methods):
            return f"a {name} of your own, {type(each).__name__}"
    args, sampler = pairs.neg_sample_args, pairs._sampler
    if sampler is not None and args["distribution"] != "none":
        law = args["distribution"] == "popularity" and args.get("alpha", 1.0)
        if (sampler.distribution, law) != (args["distribution"], law and sampler.alpha):
            return f"a sampler of another law than train_neg_sample_args, {sampler.distribution} ({sampler.alpha})"
    return None


class NegativeDraw:
    """RecBole's ``AbstractSampler.sample_by_key_ids`` with the membership test compiled: same draws, same stream.

    Args:
        sampler: of items for users, or of anything with `sampling` and `used_ids`.
        n_users: how many keys it has.
        n_items: how many values; default: the sampler's items.
    """

    def __init__(self, sampler: Any, n_users: int, n_items: int | None = None) -> None:
        self.sampler = sampler
        ptr, items = used_items(sampler, n_users)
        n_items = sampler.item_num if n_items is None else n_items
        self.used = _filter(ptr, items, n_items), ptr, items, n_items

    def __call__(self, users, negatives):
        """``negatives`` items for each of ``users`` (int64 ``[n]``); int64 ``[negatives * n]``, repetition-major."""
        users = np.tile(users, negatives)
        values = np.empty(len(users), np.int64)
        pending = np.arange(len(users))
        n = len(users)
        while n:
            n = _refill(values, pending, self.sampler.sampling(n), users, *self.used)
        return values

    def one_by_one(self, users: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """``counts`` items (int64 ``[n]``) for each of ``users`` in turn, as by a call for each; for uniform samplers.

        Uniform draws are one stream however they are split into calls: all are drawn at once, then numpy's stream is
        put where the calls would have left it.
        """
        values, users = np.empty(counts.sum(), np.int64), np.repeat(users, counts)
        stream, needed = self.sampler.sampling(len(values)), -1  # all of which the calls would have needed
        while needed < 0:
            before, length = np.random.get_state(), len(stream)
            stream = np.concatenate([stream, self.sampler.sampling(length // 8 + 100)])
            needed = _fill(values, stream, users, counts, *self.used)
        np.random.set_state(before)
        self.sampler.sampling(needed - length)
        return values


class PairwiseCollate:
    """A ``collate_fn`` for RecBole's ``TrainDataLoader`` that also says the row.

    The triples are those that stock RecBole would have drawn. It replaces the stock one where nothing is joined to
    interactions (no features, no transform, no dynamic negatives). RecBole's own models read ids alone of a pair, and
    get no other column; classes of the user's own get all.

    Args:
        loader: one that it fits.
        model: class of what is trained.
    """

    table: np.ndarray | None = None  # of static negatives

    def __init__(self, loader: TrainDataLoader, model: type) -> None:
        columns = loader._dataset.inter_feat.interaction
        ids = (loader.uid_field, loader.iid_field)
        read = ids if is_recboles(model) else columns
        self.columns = {name: columns[name].numpy() for name in read}
        self.users, self.negative_field = self.columns[loader.uid_field], loader.neg_item_id
        self.negatives = loader.times
        self.draw = NegativeDraw(loader._sampler, loader._dataset.user_num)

    @staticmethod
    def fits(loader: TrainDataLoader) -> bool:
        """Whether the loader's batches can be made this way."""
        dataset = loader._dataset
        return (
            loader.dl_format == InputType.PAIRWISE
            and loader.neg_sample_args["distribution"] in ("uniform", "popularity")
            and not loader.neg_sample_args.get("dynamic", False)
            and dataset.user_feat is None
            and dataset.item_feat is None
            and not loader.config["transform"]
            and isinstance(loader._sampler, Sampler)
            and not loader.is_sequential
            and own_draws(loader) is None
        )

    def draw_table(self) -> np.ndarray:
        """Negatives for every row, drawn once: int64 ``[rows, negatives]``."""
        return self.draw(self.users, self.negatives).reshape(self.negatives, -1).T.copy()

    def __call__(self, index):
        rows = np.asarray(index)
        users = self.users[rows]
        if self.table is None:
            negatives = self.draw(users, self.negatives)
        else:
            negatives = self.table[rows].T.reshape(-1)
        batch = {name: _repeated(column[rows], self.negatives) for name, column in self.columns.items()}
        batch |= {self.negative_field: negatives, ROW: rows}
        return Interaction({name: torch.from_numpy(column) for name, column in batch.items()})


def _repeated(column, times):
    """The rows of a column, ``[n, ...]``, again and again."""
    return np.tile(column, (times, *[1] * (column.ndim - 1)))


def batches(
    loader: TrainDataLoader, collate: Callable[[np.ndarray], Batch], step: int | None = None
) -> Iterator[Batch]:
    """What iterating ``loader`` with ``collate`` yields, without torch's loop over single rows.

    ``step``: rows of a batch; default: the loader's, as torch has it (`update_config` changes RecBole's alone).
    """
    order = next_order(loader.sample_size, loader.generator) if loader.shuffle else np.arange(loader.sample_size)
    step = step or loader.batch_size or loader.step
    for start in range(0, loader.sample_size, step):
        yield collate(order[start : start + step])


def drawn_by(loader: TrainDataLoader) -> Iterable[Interaction]:
    """A loader's own batches, without torch's loop over single rows where they can be had so."""
    if not isinstance(loader, TrainDataLoader) or loader.num_workers or own_draws(loader):
        return loader
    fast = loader.shuffle or isinstance(loader.collate_fn, PairwiseCollate)
    return batches(loader, loader.collate_fn) if fast else loader


class WithFacts:
    """Batches of pairs and facts as RecBole's ``KnowledgeBasedDataLoader`` draws them, without a loop over rows."""

    def __init__(self, loader: KnowledgeBasedDataLoader) -> None:
        self.loader, self.facts = loader, loader.kg_dataloader
        n = self.facts._dataset.entity_num
        self.draw = NegativeDraw(self.facts._sampler, n, n)

    @staticmethod
    def fits(loader: TrainDataLoader | KnowledgeBasedDataLoader) -> bool:
        """Whether a loader's next batches can be made this way: both kinds from generators of their own."""
        if getattr(loader, "state", None) != KGDataLoaderState.RSKG or own_draws(loader):
            return False
        both = loader.general_dataloader, loader.kg_dataloader
        return all(each.num_workers == 0 and each.generator is not None for each in both)

    def __iter__(self):
        facts, pairs = self._facts(), iter(drawn_by(self.loader.general_dataloader))
        while True:
            drawn = next(facts)  # before it is known whether there are pairs
            if (batch := next(pairs, None)) is None:
                return
            batch.update(drawn)
            yield batch

    def _facts(self):
        """Batches of facts, again and again."""
        loader, n, step = self.facts, self.facts.sample_size, self.facts.step
        while True:
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            order = permutation(n, loader.generator)
            for start in range(0, n, step):
                if start + step > n:  # torch looks for more rows: see `next_order`
                    pass_over(n, loader.generator)
                batch = loader._dataset.kg_feat[order[start : start + step]]
                tails = torch.from_numpy(self.draw(batch[loader.hid_field].numpy(), loader.neg_sample_num))
                batch.update(Interaction({loader.neg_tid_field: tails}))
                yield batch
            if n % step == 0:
                pass_over(n, loader.generator)


def negatives_of(loader: TrainDataLoader) -> int | None:
    """Negatives of a row in a loader's batches, 0 where the loss has none; None: not a loader that is logged."""
    none = isinstance(loader, TrainDataLoader) and loader.neg_sample_args["distribution"] == "none"
    if not isinstance(loader, TrainDataLoader) or (none and loader.dl_format == InputType.PAIRWISE):
        return None
    return 0 if none else loader.neg_sample_num


def negatives_in(loader: TrainDataLoader, batch: Interaction) -> torch.Tensor:
    """Negatives in a loader's batch, ``[m, rows]``: of pairs a column, else rows with labels after the others."""
    if loader.dl_format == InputType.PAIRWISE:
        return batch[loader.neg_item_id].view(loader.times, -1)
    return batch[loader.iid_field].view(loader.times, -1)[1:]


def interaction(loader: TrainDataLoader, rows: np.ndarray, negatives: np.ndarray) -> Interaction:
    """A batch as a loader makes it: rows of its data set ``[B]`` with negatives ``[B, m]``."""
    data = loader.transform(loader._dataset, loader._dataset[rows])
    if not negatives.shape[1]:
        return data
    ids = torch.from_numpy(np.ascontiguousarray(negatives.T, np.int64).reshape(-1))
    return loader.sampling_func(data, ids)


class Played:
    """A train loader that plays epochs: in their order, cut as they are, with their negatives.

    Each time that it is gone through it gives the next epoch. A batch of which nothing is left is passed over. The
    loader of all rows is gone through as well: the facts of a knowledge graph come as it draws them, and what a model
    draws in training finds the random streams where the loader leaves them.

    Args:
        loader: RecBole's, of all rows.
        epochs: what to play.
        position: row in the data set of ``rest`` of each row, int64 ``[rows]``; of rows that are never played, any.
        rest: RecBole's loader of the data that batches are made of; default: ``loader``.
    """

    def __init__(
        self,
        loader: TrainDataLoader | KnowledgeBasedDataLoader,
        epochs: Iterable[Epoch],
        position: np.ndarray,
        rest: TrainDataLoader | KnowledgeBasedDataLoader | None = None,
    ) -> None:
        self.loader, self.epochs, self.position = loader, iter(epochs), position
        self.rest: TrainDataLoader = getattr(rest or loader, "general_dataloader", rest or loader)
        facts = getattr(loader, "kg_dataloader", None)
        self.facts = [*facts._dataset.kg_feat.columns, facts.neg_tid_field] if facts else []

    @staticmethod
    def fits(loader: TrainDataLoader | KnowledgeBasedDataLoader) -> bool:
        """Whether a loader's batches are made of ids alone, so that a log holds all of them."""
        return not hasattr(loader, "general_dataloader") and PairwiseCollate.fits(loader)

    def set_mode(self, state: KGDataLoaderState) -> None:
        """Whether pairs, facts or both are next: of loaders with a knowledge graph."""
        self.loader.set_mode(state)

    def __iter__(self):
        epoch = next(self.epochs)
        bounds = itertools.pairwise(epoch.bounds)
        for drawn in self._drawn():
            if self.rest.iid_field not in drawn:  # facts alone
                yield drawn
                continue
            rows = epoch.order[slice(*next(bounds, (0, 0)))]
            with self.shortened(drawn, len(rows)):
                if len(rows):
                    batch = self.made(self.position[rows], epoch.negatives[rows])
                    batch.update(Interaction({name: drawn[name] for name in self.facts if name in drawn}))
                    yield batch

    def _drawn(self):
        return self._with_facts if WithFacts.fits(self.loader) else drawn_by(self.loader)

    @cached_property
    def _with_facts(self):
        return WithFacts(self.loader)

    def made(self, rows: np.ndarray, negatives: np.ndarray) -> Interaction:
        """A batch of rows of the data set of ``rest``."""
        return interaction(self.rest, rows, negatives)

    def shortened(self, drawn: Interaction, rows: int) -> AbstractContextManager[None]:
        """Entered around what is done with the ``rows`` that stand for a batch of the loader's."""
        return nullcontext()

    def __len__(self):
        return len(self.loader)


class PoolDraw:
    """Negatives of users, drawn as RecBole's loader does, from a random generator of their own.

    Called with users (ints ``[n]``), how many of each, and the generator; returns ints ``[n, negatives]``.

    Args:
        loader: of the data that the users have.
        items: of the rows that will be asked for, ints ``[n]``: a repeatable sampler leaves out these alone.
    """

    def __init__(self, loader: TrainDataLoader | KnowledgeBasedDataLoader, items: np.ndarray | None = None) -> None:
        pairs: TrainDataLoader = getattr(loader, "general_dataloader", loader)
        if isinstance(pairs._sampler, Sampler) and runs_recboles(pairs._sampler):
            self.draw = NegativeDraw(pairs._sampler, pairs._dataset.user_num)
        else:
            self.draw = lambda users, negatives: pairs._sampler.sample_by_user_ids(users, items, negatives).numpy()

    def __call__(self, users: np.ndarray, negatives: int, rng: np.random.Generator) -> np.ndarray:
        if not negatives:
            return np.empty((len(users), 0), np.int64)
        before = np.random.get_state()  # samplers draw from the process's stream
        np.random.seed(rng.integers(2**32, size=4, dtype=np.uint32))
        try:
            return self.draw(np.asarray(users, np.int64), negatives).reshape(negatives, -1).T
        finally:
            np.random.set_state(before)


def streams() -> Callable[[], None]:
    """What puts all random streams back to where they are now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def back():
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return back


def positions() -> tuple[bytes, ...]:
    """Where all random streams stand, to be compared."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    python, numpy = repr(random.getstate()).encode(), numpy_stream().tobytes()
    return python, numpy, *(state.numpy().tobytes() for state in (torch.get_rng_state(), *gpus))


def numpy_stream() -> np.ndarray:
    """Where numpy's stream stands, uint32 ``[625]``; what only normal numbers are drawn from is left out."""
    _, key, place, *_ = np.random.get_state()
    return np.append(key, np.uint32(place))


class DrawnAgain:
    """Draws the negatives of a log's epochs as its training drew them, batch by batch; see `TripleLog.again`.

    Args:
        log: says in which order.
        loader: of its training's data.
        data_row: row in the loader's data set of each row of the log, ``[rows]``.
        batch_rows: rows of a batch.
    """

    _one_at_a_time = threading.Lock()  # the stream is the process's

    def __init__(self, log: TripleLog, loader: TrainDataLoader, data_row: np.ndarray, batch_rows: int) -> None:
        self.loader, self.data_row, self.batch_rows = loader, data_row, batch_rows
        self.order = BatchOrder(log, data_row, batch_rows)
        self.shape, self.dtype = (log.n_rows, log.negatives), log.dtype

    @cached_property
    def _draw(self) -> Callable[[np.ndarray], np.ndarray]:
        """Negatives of a batch of rows of the data set, ``[m, rows]``."""
        loader, times = self.loader, self.shape[1]
        if not PairwiseCollate.fits(loader):
            return lambda rows: negatives_in(loader, loader.collate_fn(rows)).numpy()[:, : len(rows)]
        draw = NegativeDraw(loader._sampler, loader._dataset.user_num)
        users = loader._dataset.inter_feat[loader.uid_field].numpy()
        return lambda rows: draw(users[rows], times).reshape(times, -1)

    def __call__(self, epoch: int, stream: np.ndarray) -> np.ndarray | None:
        with self._one_at_a_time:
            if (order := self.order(epoch)) is None:
                return None
            drawn, back = np.empty(self.shape, self.dtype), streams()
            np.random.set_state(("MT19937", stream[:-1], int(stream[-1]), 0, 0.0))
            try:
                for start in range(0, len(order), self.batch_rows):
                    rows = order[start : start + self.batch_rows]
                    drawn[rows] = self._draw(self.data_row[rows]).T
            finally:
                back()
            return drawn
