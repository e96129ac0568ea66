"""Where the held-out items of each user rank, without sorting: what RecBole's top-K metrics are computed from.

RecBole sorts out the best K items of every user, a few users at a time. Its metrics only ask which of these K are held
out, so it is enough to count the items that score higher than each held-out one. The metrics themselves stay RecBole's.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import BPR
from recbole.sampler import Sampler
from recbole.utils import EvaluatorType, ModelType
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

from recbole_unlearn.compat.recbole_models import is_recboles, runs_recboles, scores_all_items
from recbole_unlearn.data.dataset import Ragged
from recbole_unlearn.data.sampling import NegativeDraw, listed_items
from recbole_unlearn.data.split import EvalLoader
from recbole_unlearn.storage.triple_log import smallest_uint

if TYPE_CHECKING:
    from recbole.trainer import Trainer

BLOCK = 2**18  # scores at a time, and PAIRS for pairs: they stay in the processor's cache
PAIRS = 2**13
DENSE = 8  # times the pairs: of so many products of users and all items, a matrix product is faster than single ones
KEPT = 2**26  # bytes of sampled negatives that are kept for the next model
HALF_BIT = 2.0**-24  # of float32, as a share of a number
USERS, LARGE = 64, 2**22  # users at a time for the sake of the matrix product, while there are no more scores than that
DEFAULT_BATCH = 4096  # RecBole's eval_batch_size
# The last bits of a score depend on how many users are scored at once. Where a rank depends on them, the user is
# ranked again in the batch that RecBole would put them in. As a share of the user's largest score:
ROUNDING = 4e-6
OTHER_NEEDS = ("rec.items", "rec.meanrank", "rec.score", "data.label")

_kept = WeakKeyDictionary()


class RankedLoader:
    """Stands in for an evaluation loader in RecBole's ``Trainer.evaluate``, where it fits.

    Iterating over it ranks all users and hands the collector the finished ``rec.topk``; it yields no batch.
    """

    def __init__(self, trainer: "Trainer", loader: EvalLoader, show_progress: bool = False) -> None:
        self.trainer, self.loader, self.show_progress = trainer, loader, show_progress
        self._dataset = loader._dataset

    @staticmethod
    def fits(trainer: "Trainer", loader: EvalLoader) -> bool:
        """Whether this gives what RecBole gives: top-K metrics of a general recommender, all items or uniform ones."""
        config, model = trainer.config, trainer.model
        if (
            config["eval_type"] != EvaluatorType.RANKING
            or any(map(trainer.eval_collector.register.need, OTHER_NEEDS))
            or max(config["topk"]) > loader._dataset.item_num
            or getattr(model, "type", None) != ModelType.GENERAL
            or trainer.device.type != "cpu"
            or isinstance(loader.sampler, DistributedSampler)
            or config["transform"]
            or not runs_recboles(trainer, "_full_sort_batch_eval", "_neg_sample_batch_eval", "_spilt_predict")
            or not runs_recboles(trainer.eval_collector, "eval_batch_collect")
            or not runs_recboles(loader)
            or not runs_recboles(loader._dataset, "__getitem__", "join")
        ):
            return False
        if isinstance(loader, FullSortEvalDataLoader):
            return scores_all_items(type(model))
        data = loader._dataset
        ids_alone = len(data.inter_feat.columns) == 2 and data.user_feat is None and data.item_feat is None
        return (
            isinstance(loader, NegSampleEvalDataLoader)
            and (ids_alone or is_recboles(type(model)))  # a class of the user's own may read what pairs have beside ids
            and loader.neg_sample_args["distribution"] == "uniform"
            and loader.neg_sample_args["sample_num"] != "none"
            and not loader.neg_sample_args.get("dynamic", False)
            and isinstance(loader._sampler, Sampler)
            and runs_recboles(loader._sampler)
            and loader._sampler.distribution == "uniform"
            and loader.num_workers == 0  # else the negatives come from the workers' random streams
        )

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)  # torch's iterators' base seed
        rank = self._full if isinstance(self.loader, FullSortEvalDataLoader) else self._sampled
        with ThreadPoolExecutor(torch.get_num_threads()) as self.threads:
            hits = rank(max(self.trainer.config["topk"]))
        self.trainer.eval_collector.data_struct.set("rec.topk", torch.from_numpy(hits))
        return iter(())

    def _full(self, cutoff):
        """int32 ``[users, cutoff + 1]``: whether each of the best items is held out, and how many items are."""
        loader, n_items, n_users = self.loader, self._dataset.item_num, len(self.loader.uid_list)
        (ptr, items), (history_ptr, history) = _ragged(loader)
        hits = np.zeros((n_users, cutoff + 1), np.int32)
        hits[:, -1] = np.diff(ptr)
        step = max(BLOCK // n_items, min(LARGE // n_items, USERS), 1)
        batch, first = max(DEFAULT_BATCH // n_items, 1), None
        for start in self._bar(range(0, n_users, step)):
            part = slice(start, start + step)
            try:
                scores = self.trainer.model.full_sort_predict(loader.user_df[part]).view(-1, n_items).numpy()
            except NotImplementedError:  # RecBole takes the scores of pairs then
                open_users = np.arange(n_users)[part]
            else:
                bits = scores.view(f"u{scores.itemsize}")
                rest = (ptr, items, history_ptr, history)
                shares = [
                    (scores[n], bits[n], start + n.start, hits[part][n, :-1], *rest) for n in _shares(len(scores))
                ]
                open_users = np.concatenate(list(self._side_by_side(_rank_all, shares)))
            for user in open_users:
                if first != user - user % batch:
                    first = user - user % batch
                    index = list(range(first, min(first + batch, n_users)))
                    if self.trainer.item_tensor is None:
                        self.trainer.item_tensor = self._dataset.get_item_feature().to(self.trainer.device)
                    _, again, _, _ = self.trainer._full_sort_batch_eval(loader.collate_fn(index))
                own = items[ptr[user] : ptr[user + 1]]
                hits[user, :-1] = _sort(again[user - first], own, cutoff)
        return hits

    def _sampled(self, cutoff):
        """As `_full`, among the held-out items and their sampled negatives only."""
        hits = np.zeros((len(self.loader.uid_list), cutoff + 1), np.int32)
        waiting = None  # the block before, whose scores are taken while the next one's negatives are drawn
        for part, users, items, ptr in self._candidates(hits[:, -1]):
            scores = self.scores(users, items, ptr, hits[part, -1], cutoff)
            if waiting:
                self._rank_block(*waiting)
            waiting = hits[part], users, items, ptr, scores
        if waiting:
            self._rank_block(*waiting)
        return hits

    def _candidates(self, n_held_out):
        """Items to rank, block by block: (slice of users, user and item of each pair, where the users' pairs begin).

        Held-out items come first; how many there are is written to ``n_held_out`` ``[users]``.
        """
        loader, data, times = self.loader, self._dataset, self.loader.times
        items = data.inter_feat[loader.iid_field].numpy()  # sorted by user
        everyone, counts = loader.uid_list, loader.uid2items_num[loader.uid_list]
        draw = _Draws.of(loader)
        ptr = np.concatenate([[0], np.cumsum(counts)])
        blocks = np.flatnonzero(np.diff(ptr[:-1] * times // BLOCK, prepend=-1))
        for start, stop in zip(self._bar(blocks), [*blocks[1:], len(everyone)], strict=True):
            part, held_out = slice(start, stop), items[ptr[start] : ptr[stop]]
            negatives = draw(everyone[part], counts[part] * (times - 1))
            ends, pairs, n_held_out[part] = _distinct(counts[part], held_out, negatives, data.item_num)
            yield part, np.repeat(everyone[part], np.diff(ends)), pairs, ends

    def _rank_block(self, hits, users, items, ptr, scores):
        scores = scores()
        for user in _rank_sampled(scores, ptr, hits):
            own = slice(ptr[user], ptr[user + 1])
            row = torch.full((self._dataset.item_num,), -torch.inf)
            row[items[own]] = torch.from_numpy(self.predict(users[own], items[own]))
            hits[user, :-1] = _sort(row, items[own][: hits[user, -1]], hits.shape[1] - 1)

    def scores(self, users, items, ptr, n_held_out, cutoff):
        """Function that gives scores of pairs by which the held-out items rank as by the model's own.

        BPR's are inner products. They are taken here, and by the model only where they are near a held-out item's: in
        torch they may come out otherwise in the last bits.

        Args:
            users, items, ptr: as `_candidates` gives them.
            n_held_out: how many of each user's items are held out.
            cutoff: up to which ranks matter.
        """
        if not self._tables:
            found = self.predict(users, items)
            return lambda: found
        P, Q, longest = self._tables
        scores, near = np.empty(len(items), np.float32), np.zeros(len(items), bool)
        products, rest = np.empty((0, 0), np.float32), (P, Q, longest, cutoff, scores, near)
        if len(n_held_out) * len(Q) <= DENSE * len(items):
            products = (torch.from_numpy(P[users[ptr[:-1]]]) @ torch.from_numpy(Q).T).numpy()
        shares = [
            (users, items, ptr[n.start : n.stop + 1], n_held_out[n], products[n], *rest)
            for n in _shares(len(n_held_out))
        ]
        running = self._side_by_side(inner_products, shares)

        def finished():
            list(running)
            pairs = np.flatnonzero(near)
            scores[pairs] = self.predict(users[pairs], items[pairs])
            return scores

        return finished

    @cached_property
    def _tables(self):
        """Embeddings of users and items whose inner products are the model's scores, and see `inner_products`."""
        model = self.trainer.model
        own = type(model) is not BPR or getattr(model.predict, "__func__", None) is not BPR.predict
        if own or model.user_embedding.weight.dtype != torch.float32:
            return None
        P, Q = (np.ascontiguousarray(each.weight.numpy()) for each in (model.user_embedding, model.item_embedding))
        return P, Q, np.linalg.norm(Q, axis=1).max() * 4 * (Q.shape[1] + 1) * HALF_BIT

    def predict(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Scores of pairs, ``[pairs]``."""
        columns = {self.loader.uid_field: torch.from_numpy(users), self.loader.iid_field: torch.from_numpy(items)}
        pairs = Interaction(columns)
        parts = [self.trainer.model.predict(pairs[n : n + PAIRS]) for n in range(0, len(users), PAIRS)]
        return torch.cat([part.view(-1) for part in parts]).numpy() if parts else np.empty(0, np.float32)

    def _side_by_side(self, kernel, shares):
        """Start a kernel with each tuple of arguments, a thread each; an iterator waits for the results."""
        return self.threads.map(lambda share: kernel(*share), shares)

    def _bar(self, blocks):
        return tqdm(blocks, "Evaluate   ", ncols=100, disable=not self.show_progress)


class _Draws:
    """`NegativeDraw.one_by_one` that keeps what it drew from a random state: the next model is judged by the same."""

    def __init__(self, loader, of):
        self.draw, self.made_of = NegativeDraw(loader._sampler, loader._dataset.user_num), of
        self.kind, self.kept, self.room = smallest_uint(loader._dataset.item_num), {}, KEPT

    @classmethod
    def of(cls, loader):
        """Those of a loader, kept as long as it is, and anew where what they are made of has been changed."""
        used = listed_items(loader._sampler, loader._dataset.user_num)
        of = [*used, loader.uid_list, loader.uid2items_num[loader.uid_list]]
        kept = _kept.get(loader)
        if kept is None or kept.draw.sampler is not loader._sampler or not all(map(np.array_equal, kept.made_of, of)):
            kept = _kept[loader] = cls(loader, [np.array(each) for each in of])
        return kept

    def __call__(self, users, counts):
        block, (_, key, *rest) = (int(users[0]), len(users)), np.random.get_state()
        if block in self.kept:
            key_then, rest_then, negatives, after = self.kept[block]
            if rest_then == rest and np.array_equal(key_then, key):
                np.random.set_state(after)
                return negatives.astype(np.int64)
            self.room += self.kept.pop(block)[2].nbytes
        found = self.draw.one_by_one(users, counts)
        if len(found) * self.kind.itemsize <= self.room:
            self.kept[block] = key, rest, found.astype(self.kind), np.random.get_state()
            self.room -= self.kept[block][2].nbytes
        return found


def _ragged(loader):
    """Held-out items and history of each user of a full-ranking loader: where the user's begin, and the items."""
    lists = (loader.uid2positive_item, loader.uid2history_item)
    if all(isinstance(each, Ragged) for each in lists):
        return [(np.append(each.ptr[loader.uid_list.numpy()], each.ptr[-1]), each.items) for each in lists]
    lists = [columns[loader.uid_list] for columns in lists]
    return [(np.cumsum([0, *map(len, each)]), torch.cat(list(each)).numpy()) for each in lists]


def _shares(n):
    """Slices of ``n`` users, one for each of torch's threads."""
    ends = np.linspace(0, n, torch.get_num_threads() + 1).astype(int).tolist()
    return [slice(*each) for each in itertools.pairwise(ends)]


def _sort(scores, held_out, cutoff):
    """Which of the best items are held out, in RecBole's way: the order of equal scores is that of ``torch.topk``."""
    return np.isin(torch.topk(scores, cutoff).indices.numpy(), held_out)


@numba.njit(cache=True, nogil=True)
def _compare(scores, low, high):
    """How many of ``scores`` are above ``high``, and how many are not below ``low`` (NaN included)."""
    above = not_below = np.uint32(0)  # as wide as a score, for the sake of vector instructions
    for i in range(len(scores)):
        above = np.uint32(above + np.uint32(scores[i] > high))
        not_below = np.uint32(not_below + np.uint32(not (scores[i] < low)))
    return np.int64(above), np.int64(not_below)


@numba.njit(cache=True, nogil=True)
def _rank(scores, held_out, margin, hits):
    """Mark the ranks of the ``held_out`` scores, which are among ``scores``, in ``hits``, as far as it goes.

    Returns False where other scores within ``margin``, or NaN, leave them open.
    """
    beyond = -np.inf
    for score in held_out:
        if score < beyond:
            continue
        higher, not_lower = _compare(scores, score - margin, score + margin)
        if higher >= len(hits):
            beyond = score
        elif not_lower == higher + 1:
            hits[higher] = 1
        else:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _largest(bits):
    """Place of the largest score, signs put aside; NaN is larger than all."""
    largest = bits[0] * bits.dtype.type(2)  # which drops the sign
    for value in bits:
        largest = max(largest, value * bits.dtype.type(2))
    place = 0
    while bits[place] * bits.dtype.type(2) != largest:
        place += 1
    return place


@numba.njit(cache=True, nogil=True)
def _rank_all(scores, bits, first, hits, ptr, items, history_ptr, history):
    """Rank among all items but padding and history, whose scores are overwritten.

    Args:
        scores: ``[users, n_items]``, of the users from ``first`` on.
        bits: the same memory as unsigned whole numbers, which grow with the size of a score.

    Returns:
        int64 array: those of the users whose ranks are open.
    """
    open_users = []
    for u in range(len(scores)):
        row, n = scores[u], first + u
        largest = np.abs(row[_largest(bits[u])])
        row[0] = -np.inf
        row[history[history_ptr[n] : history_ptr[n + 1]]] = -np.inf
        margin = scores.dtype.type(ROUNDING * largest)
        if not _rank(row, row[items[ptr[n] : ptr[n + 1]]], margin, hits[u]):
            open_users.append(n)
    return np.array(open_users, np.int64)


@numba.njit(cache=True, nogil=True)
def _append_new(items, n, more, seen_by, user):
    for item in more:
        if seen_by[item] != user:
            seen_by[item] = user
            items[n] = item
            n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _distinct(counts, held_out, negatives, n_items):
    """The items to rank for each user: held-out ones, then negatives, each once, however often it occurs.

    Args:
        counts, held_out: number of held-out items of each user, and the items.
        negatives: items, as many times ``counts`` for each user.

    Returns:
        (where each user's items begin ``[users + 1]``, the items, how many of each user's are held out ``[users]``)
    """
    times = len(negatives) // len(held_out)
    items = np.empty(len(held_out) + len(negatives), np.int64)
    ptr = np.zeros(len(counts) + 1, np.int64)
    n_held_out = np.empty(len(counts), np.int64)
    seen_by = np.full(n_items, -1)
    n = first = 0
    for u in range(len(counts)):
        last = first + counts[u]
        n = _append_new(items, n, held_out[first:last], seen_by, u)
        n_held_out[u] = n - ptr[u]
        n = _append_new(items, n, negatives[first * times : last * times], seen_by, u)
        ptr[u + 1] = n
        first = last
    return ptr, items[:n], n_held_out


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _inner_product(p, q):
    total = np.float32(0)
    for k in range(len(p)):
        total += p[k] * q[k]
    return total


@numba.njit(cache=True, nogil=True)
def inner_products(users, items, ptr, n_held_out, products, P, Q, longest, cutoff, scores, near):
    """Scores of some users' items, and which of them are near a held-out one that may be among the best, both marked.

    Args:
        products: of these users with all items, ``[users, n_items]``, or none.
        longest: how far rounding may move two scores apart, for a user whose embedding has length 1.
        cutoff: how many are the best.
    """
    for u in range(len(n_held_out)):
        first, last = ptr[u], ptr[u + 1]
        if first == last:
            continue
        p = P[users[first]]
        for n in range(first, last):
            scores[n] = products[u, items[n]] if len(products) else _inner_product(p, Q[items[n]])
        margin = longest * np.sqrt(_inner_product(p, p))
        beyond = np.float32(-np.inf)
        for h in range(first, first + n_held_out[u]):
            if scores[h] < beyond:
                continue
            low, high = np.float32(scores[h] - margin), np.float32(scores[h] + margin)
            above, not_below = _compare(scores[first:last], low, high)
            if above >= cutoff:
                beyond = scores[h]
            for n in range(first, last if above < cutoff and not_below != above + 1 else first):
                if n != h and not scores[n] < low and not scores[n] > high:
                    near[n] = near[h] = True


@numba.njit(cache=True, nogil=True)
def _rank_sampled(scores, ptr, hits):
    """Rank among each user's own scores, the first of which, as many as ``hits[:, -1]`` says, are held out.

    Returns:
        int64 array: the users whose ranks are open.
    """
    open_users = []
    for u in range(len(hits)):
        own = scores[ptr[u] : ptr[u + 1]]
        if not _rank(own, own[: hits[u, -1]], own.dtype.type(0), hits[u, :-1]):
            open_users.append(u)
    return np.array(open_users, np.int64)
