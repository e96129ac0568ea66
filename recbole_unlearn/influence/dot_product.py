"""BPR on dot products, trained as torch.optim.Adam trains it, at the cost of the rows that a step touches.

Rows catch up (`catching_up`). Two threads take its steps (`threads`). Rows too short to be halved are trained on by
one thread, and the other one arranges the next block's.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from recbole_unlearn.influence.catching_up import NONE, SOON, advance, catch_up, fetch, planned, quotients
from recbole_unlearn.influence.compiling import compiled, inlined
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.pairwise_loss import slope, total_loss
from recbole_unlearn.influence.recorded import Adam, steps_made
from recbole_unlearn.influence.threads import halved, in_step, joined, meet, threads_for, together
from recbole_unlearn.influence.vectors import (
    aligned,
    columns,
    dot,
    pointer,
    prefetch,
    put,
    spread,
    take_like,
)

BLOCK = 1 << 20  # rows, at least, that are arranged at once; a quarter of it where one thread trains
AHEAD = np.uint64(32)  # rows for which memory is asked before it is needed


def _plain(array: np.ndarray, dtype: type | None = None) -> np.ndarray:
    """The same in one piece, not to be written to: memory-mapped or not, numba compiles one version."""
    array = np.ascontiguousarray(array, dtype).view()
    array.flags.writeable = False
    return array


# Indices are unsigned throughout: of others numba asks at each use whether they count from the end.


@compiled
def _group(ids, slot, names, stops, place):
    """Number the different ones of some ids, in the order of their first: ``names``; returns how many there are.

    ``place`` of each id is where it goes when they are sorted by these numbers, ``stops`` are where each number ends.
    ``slot`` ``[all ids]`` is ``NONE`` everywhere, before and after.
    """
    count = np.uint64(0)
    stops[: len(ids)] = 0
    for r in range(np.uint64(len(ids))):
        name = np.uint64(ids[r])
        new = slot[name] == NONE
        k = np.uint32(count) if new else slot[name]
        names[count] = name  # kept or overwritten: no branch, it would be mispredicted often
        stops[k] += np.uint32(1)
        slot[name] = k
        place[r] = k
        count += np.uint64(new)
    total = np.uint32(0)
    for k in range(count):
        size = stops[k]
        stops[k] = total
        total += size
        slot[names[k]] = NONE
    for r in range(np.uint64(len(ids))):
        k = np.uint64(place[r])
        place[r] = stops[k]
        stops[k] += np.uint32(1)
    return count


@cache
def _arrange(m):
    """Kernel that arranges steps ``begin`` to ``end`` of a block for `train_steps`, m negatives a row.

    Items are weight rows here. ``items`` ``[rows, 1 + m]`` are each row's positive and negatives, a step's rows in
    order of users. ``pairs`` ``[rows * (1 + m), 2]`` are a user and where in the step's items, a step's pairs in order
    of the item there. Of each weight row that a step touches, users before items, ``names`` are which it is, ``stops``
    where its rows or pairs end, and ``following`` is the step that touches it next; those of step s begin at
    ``(2 + m) * bounds[s]``, and ``counts[s]`` says how many users there are, and users and items. ``last`` is where
    each weight row's next touch is to be written in ``following``.
    """
    m = np.uint64(m)

    @compiled
    def kernel(
        begin, end, users, pos, negatives, order, bounds, n_users,
        last, slot, place, owner, items, names, stops, following, pairs, counts,
    ):  # fmt: skip
        one = np.uint64(1)
        width = m + one
        never, final = np.uint32(len(bounds) - 1), np.uint64(len(order) - 1)
        for s in range(np.uint64(begin), np.uint64(end)):
            first = np.uint64(bounds[s])
            n = np.uint64(bounds[s + one]) - first
            base, item = (width + one) * first, width * first
            for r in range(n):
                row = np.uint64(order[first + r])
                prefetch(pointer(users, 0), order[min(first + r + AHEAD, final)])
                prefetch(pointer(pos, 0), row)
                prefetch(pointer(negatives, 0), m * row)
                owner[r] = users[row]
            n_owners = _group(owner[:n], slot, names[base:], stops[base:], place)
            for r in range(n):
                row, to = np.uint64(order[first + r]), item + width * np.uint64(place[r])
                items[to] = n_users + np.uint32(pos[row])
                for t in range(m):
                    items[to + one + t] = n_users + np.uint32(negatives[row, t])
            touched, used = names[base + n_owners :], stops[base + n_owners :]
            n_items = _group(items[item : item + width * n], slot, touched, used, place)
            r = np.uint64(0)
            for k in range(n_owners):
                user, stop = names[base + k], np.uint64(stops[base + k])
                while r < stop:
                    for c in range(r * width, (r + one) * width):
                        to = item + np.uint64(place[c])
                        pairs[to, 0] = user
                        pairs[to, one] = c
                    r += one
            counts[s, 0], counts[s, one] = n_owners, n_owners + n_items
            for k in range(base, base + n_owners + n_items):
                name = np.uint64(names[k])
                following[last[name]] = s
                following[k] = never
                last[name] = k

    return kernel


@compiled
def _link(last, following, first):
    """Tell what was arranged in ``len(last)`` chunks which of the later ones touches each row next.

    ``first`` ``[chunks, rows]`` is where in ``following`` each chunk's first touch of a row is.
    """
    for c in range(len(last) - 1, 0, -1):
        for r in range(last.shape[1]):
            following[last[c - 1, r]] = following[first[c, r]]


# Not functions in the kernels' closures: that would defeat the cache on disk.


@inlined
def _score(zero, m, table, names, stops, n_owners, items, scores):
    """Write the scores of a step's triples, as far as some columns make them."""
    one, r, size = np.uint64(1), np.uint64(0), np.uint64(3) * columns(zero)
    at, to = np.uint64(0), np.uint64(0)
    for k in range(n_owners):
        user, stop = take_like(zero, table, size * names[k]), np.uint64(stops[k])
        while r < stop:
            item = take_like(zero, table, size * items[at])
            at += one
            for _ in range(m):
                scores[to] = dot(user, item - take_like(zero, table, size * items[at]))
                at += one
                to += one
            r += one


@inlined
def _weigh(m, n, scores, scale, weights):
    """Turn the parts of a step's scores into what each of its items' or users' rows weighs in a gradient."""
    one, last = np.uint64(1), np.uint64(len(scores) - 1)
    share = weights[n * (m + one) :]
    for c in range(n * m):
        total = scores[0, c] + scores[last, c] if last else scores[0, c]
        share[c] = slope(total, scale)
    for r in range(n):
        at, total = r * (m + one), np.float32(0)
        for t in range(m):
            weights[at + one + t] = share[r * m + t]
            total += share[r * m + t]
        weights[at] = -total


@inlined
def _move(
    zero, m, table, names, stops, following, n_owners, n_touched, items, pairs, weights, gradients,
    s, schedule, ratios, good, reach, numbers,
):  # fmt: skip
    """Take the step of all rows that it touches. Of the users, the items need the old weights."""
    one, two, width, L = np.uint64(1), np.uint64(2), m + np.uint64(1), columns(zero)
    size = np.uint64(3) * L
    at = np.uint64(0)
    for k in range(n_owners):
        gradient, stop = zero, width * stops[k]
        while at < stop:
            gradient = gradient + weights[at] * take_like(zero, table, size * items[at])
            at += one
        put(gradients, k * L, gradient)
    at = np.uint64(0)
    for k in range(n_owners, n_touched):
        gradient, stop = zero, two * stops[k]
        fetch(zero, table, names[min(k + SOON, n_touched - one)])
        while at < stop:
            gradient = gradient + weights[pairs[at + one]] * take_like(zero, table, size * pairs[at])
            at += two
        gap = np.uint64(following[k]) - s
        advance(zero, table, names[k], gradient, s, gap, schedule, ratios, good, reach, numbers)
    for k in range(n_owners):
        fetch(zero, table, names[min(k + SOON, n_owners - one)])
        gradient, gap = take_like(zero, gradients, k * L), np.uint64(following[k]) - s
        advance(zero, table, names[k], gradient, s, gap, schedule, ratios, good, reach, numbers)


@cache
def train_steps(L, m):
    """Kernel for the steps of a block, for the parts ``begin`` to ``end`` of L columns each.

    ``table`` ``[parts, rows, 3 * L]`` are weights and both moments, ``first`` the step that touches each row first;
    the next arguments are as `_arrange` leaves them. ``scores`` ``[2, parts, triples]`` are for the even and the odd
    steps: a thread can be ahead of the other by a step's part. ``weights`` and ``gradients`` are a thread's own.
    """
    m, one = np.uint64(m), np.uint64(1)

    @compiled
    def kernel(
        begin, end, table, first, items, names, stops, following, pairs, counts, bounds,
        scores, weights, gradients, progress, sums, powers, schedule, reach, numbers, losses,
    ):  # fmt: skip
        parts, size, zero = len(table), table.shape[1] * table.shape[2], spread(L, np.float32(0))
        ratios = np.empty((powers.shape[1], 4), np.float32)
        good = np.uint64(0)
        plan, ratio = pointer(schedule, 0), pointer(ratios, 0)
        for s in range(np.uint64(len(bounds) - 1)):
            if powers.shape[1] > 1:
                good = np.uint64(quotients(sums, powers, s, np.float64(numbers[4]), ratios))
            if s == 0:
                for part in range(begin, end):
                    own, rows = pointer(table, part * size), np.uint64(len(first))
                    catch_up(zero, own, pointer(first, 0), rows, plan, ratio, good, reach, numbers)
            start = np.uint64(bounds[s])
            n = np.uint64(bounds[s + one]) - start
            base, item = (m + one + one) * start, pointer(items, (m + one) * start)
            n_owners, n_touched = np.uint64(counts[s, 0]), np.uint64(counts[s, one])
            name, stop, then = pointer(names, base), pointer(stops, base), pointer(following, base)
            pair, weight, gradient = pointer(pairs, (m + one) * start * 2), pointer(weights, 0), pointer(gradients, 0)
            x = scores[s & one]
            for part in range(begin, end):
                own = pointer(table, part * size)
                _score(zero, m, own, name, stop, n_owners, item, pointer(x, part * x.shape[1]))
            if end - begin < parts:
                meet(progress, begin, end, np.int64(s))
            _weigh(m, n, x, np.float32(1 / (n * m)), weights)
            for part in range(begin, end):
                own = pointer(table, part * size)
                _move(
                    zero, m, own, name, stop, then, n_owners, n_touched, item, pair, weight, gradient,
                    s, plan, ratio, good, reach, numbers,
                )  # fmt: skip
                if len(losses):
                    count = np.int64(n * m)
                    losses[part] += total_loss(x, count * part // parts, count * (part + 1) // parts) / count

    return kernel


class DotProductTraining:
    """A model of BPR on dot products in training.

    Args:
        start: initial weights, users before items, float32 ``[n_users + n_items, K]``.
        n_users: how many of the rows are users.
        optimizer: as torch.optim.Adam takes it; its learning rate gives way to each epoch's.
        threads: at most, of which two have something to do; default: as many as kernels run on.

    Attributes:
        steps: that were taken.
    """

    def __init__(self, start: np.ndarray, n_users: int, optimizer: Adam, threads: int | None = None) -> None:
        self.steps, self._n_users, self._optimizer = 0, n_users, optimizer
        self._threads = threads_for(threads)
        self._table = halved(start)
        self._columns = self._table.shape[2] // 3
        self._slots = np.full((self._threads, len(start)), NONE)
        self._scratch: dict[str, np.ndarray] = {}

    @property
    def W(self) -> np.ndarray:
        """A copy of the weights, float32 ``[n_users + n_items, K]``."""
        return joined(self._table, 0)

    @property
    def M(self) -> np.ndarray:
        """A copy of Adam's first moment, likewise."""
        return joined(self._table, 1)

    @property
    def V(self) -> np.ndarray:
        """A copy of Adam's second moment, likewise."""
        return joined(self._table, 2)

    def epoch(self, users: np.ndarray, pos: np.ndarray, epoch: Epoch, with_loss: bool = False) -> float | None:
        """Train on an epoch's batches.

        Args:
            users, pos: of each row, ints ``[rows]``.
            epoch: of these rows, its negatives memory-mapped or not; an empty batch makes no step.
            with_loss: whether to return the sum of the batches' mean losses, RecBole's ``BPRLoss``.
        """
        users, pos, negatives = _plain(users, np.uint32), _plain(pos, np.uint32), _plain(epoch.negatives)
        order = _plain(epoch.order, np.int64)
        bounds, rates = steps_made(epoch.bounds, epoch.rates)
        losses = np.zeros(len(self._table) if with_loss else 0)
        for begin, end, arranged in self._blocks(users, pos, negatives, order, bounds):
            self._train(negatives.shape[1], arranged, bounds[begin : end + 1] - bounds[begin], rates[begin:end], losses)
        return float(losses.sum()) if with_loss else None

    def _blocks(self, users, pos, negatives, order, bounds) -> Iterator[tuple[int, int, tuple[np.ndarray, ...]]]:
        """Steps of each block, and what `_arrange` makes of it: the next one's while one thread trains on this one."""
        rows, parts, steps, cuts = self._table.shape[1], len(self._table), len(bounds) - 1, [0]
        while cuts[-1] < steps:
            least = bounds[cuts[-1]] + max(BLOCK if parts > 1 else BLOCK // 4, 4 * rows)
            cuts.append(min(int(np.searchsorted(bounds, least)), steps))

        def arrange(k, threads):
            begin, end = cuts[k], cuts[k + 1]
            block = order[bounds[begin] : bounds[end]], bounds[begin : end + 1] - bounds[begin]
            return begin, end, self._arrange(users, pos, negatives, *block, threads, k % 2)

        blocks = range(len(cuts) - 1)
        if self._threads <= parts:
            yield from (arrange(k, self._threads) for k in blocks)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = [ahead.submit(arrange, k, self._threads) for k in blocks[:1]]
            for k in blocks:
                arranged = coming.pop().result()
                coming += [ahead.submit(arrange, after, 1) for after in blocks[k + 1 : k + 2]]
                yield arranged

    def _room(self, name: str, *shape: int, dtype: type = np.uint32) -> np.ndarray:
        """An array to be written to, the same again and again as long as it is large enough."""
        size = int(np.prod(shape))
        if name not in self._scratch or len(self._scratch[name]) < size:
            self._scratch[name] = aligned((size,), dtype)
        return self._scratch[name][:size].reshape(shape)

    def _arrange(self, users, pos, negatives, order, bounds, threads, room) -> tuple[np.ndarray, ...]:
        """What `train_steps` takes of a block's rows, in ``order``: first touches, and what `_arrange` leaves.

        It stays until the next of the same ``room``.
        """
        n, m, rows, steps = len(order), negatives.shape[1], self._table.shape[1], len(bounds) - 1
        chunks, most = min(threads, steps), int(np.diff(bounds).max())
        touches = (2 + m) * n
        first = (touches + np.arange(chunks * rows, dtype=np.uint32)).reshape(chunks, rows)
        last = first.copy()
        items, pairs = self._room(f"items {room}", (1 + m) * n), self._room(f"pairs {room}", (1 + m) * n, 2)
        names, stops = self._room(f"names {room}", touches), self._room(f"stops {room}", touches)
        following = self._room(f"following {room}", touches + chunks * rows)
        following[touches:] = steps
        counts = np.empty((steps, 2), np.uint32)
        place, owner = self._room("place", chunks, (1 + m) * most), self._room("owner", chunks, most)
        cuts = np.searchsorted(bounds, np.linspace(0, n, chunks + 1))
        result = items, names, stops, following, pairs, counts
        data = users, pos, negatives, order, bounds, np.uint32(self._n_users)
        own = zip(last, self._slots, place, owner, strict=False)
        parts = [(*cuts[c : c + 2], *data, *arrays, *result) for c, arrays in enumerate(own)]
        together(_arrange(m), parts)
        _link(last, following, first)
        return following[touches : touches + rows], *result

    def _train(self, m, arranged, bounds, rates, losses) -> None:
        """Take a block's steps."""
        parts, steps, most = len(self._table), len(rates), int(np.diff(bounds).max())
        if self.steps == 0 and self._optimizer.weight_decay == 0:
            arranged = arranged[0][:0], *arranged[1:]  # moments are zero: nothing moves before its first touch
        plan = planned(self._optimizer, rates, self.steps)
        scores = self._room("scores", 2, parts, m * most, dtype=np.float32)
        threads = min(self._threads, parts)
        weights = self._room("weights", threads, (2 * m + 1) * most, dtype=np.float32)
        gradients = self._room("gradients", threads, most, self._columns, dtype=np.float32)
        kernel: Any = train_steps(self._columns, m)

        def run(begin, end, progress):
            own = weights[begin], gradients[begin], progress
            kernel(begin, end, self._table, *arranged, bounds, scores, *own, *plan, losses)

        in_step(run, parts, threads, steps)
        self.steps += steps
