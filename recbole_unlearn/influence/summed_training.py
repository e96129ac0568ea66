"""Scores of a sum of embeddings with an item's, trained as torch.optim.Adam trains them.

A score is a sum of parts. Each part has a table of embeddings of its own, of which a row of the data names some, its
*query*; their sum q meets the embedding e of the item:

    product   q e          Rendle et al., "Factorizing Personalized Markov Chains" (FPMC), 2010, equation (9)
    distance  -||q - e||   He et al., "Translation-based Recommendation" (TransRec), 2017, equation (2)
    own       e            one number, a bias

Rows catch up (`catching_up`), and two threads have half of the columns each (`two_threads`). The loss is RecBole's
``BPRLoss``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np

from recbole_unlearn.influence.catching_up import NONE, SOON, advance, catch_up, fetch, planned, quotients
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.pairwise_loss import slope, total_loss
from recbole_unlearn.influence.recorded import Adam, steps_made
from recbole_unlearn.influence.two_threads import halved, in_step, joined, meet, threads_for, together
from recbole_unlearn.influence.vectors import FLAGS, aligned, dot, pointer, put, root, spread, take

PRODUCT, DISTANCE, OWN, NOTHING = range(4)
BLOCK = 1 << 20  # rows that are arranged at once
TINY, HUGE = np.float32(1e-30), np.float32(1e18)


@dataclass(frozen=True)
class Part:
    """A part of a score.

    Attributes:
        kind: `PRODUCT`, `DISTANCE` or `OWN`.
        start: initial embeddings, float32 ``[rows, K]``; K is 1 of `OWN`.
        items: which of the rows is that of item 0; the other items follow.
        pulled: a row whose L1 norm is a term of the loss (what RecBole's ``RegLoss`` comes to, of a vector).
    """

    kind: int
    start: np.ndarray
    items: int = 0
    pulled: int = int(NONE)


@numba.njit(**FLAGS)
def _arrange(ids, bounds, slot, slots, names, following, first, counts):
    """Number the table rows that each step touches, in the order in which it names them.

    ``ids`` ``[rows, roles]`` are what the rows of the data name, ``slots`` their numbers. ``names`` are which they are,
    those of step s from ``roles * bounds[s]`` on, ``counts[s]`` of them, and ``following`` the step that touches each
    next; ``first`` ``[table rows]`` is the one that touches it first. ``slot`` is `NONE` everywhere, before and after.
    """
    roles, steps = np.uint64(ids.shape[1]), len(bounds) - 1
    flat, numbered = pointer(ids, 0), pointer(slots, 0)
    for s in range(steps):
        start, stop, count = roles * np.uint64(bounds[s]), roles * np.uint64(bounds[s + 1]), np.uint64(0)
        for k in range(start, stop):
            name = np.uint64(flat[k])
            if slot[name] == NONE:
                slot[name] = count
                names[start + count] = name
                count += np.uint64(1)
            numbered[k] = slot[name]
        for k in range(start, start + count):
            slot[names[k]] = NONE
        counts[s] = count
    first[:] = steps
    for s in range(steps - 1, -1, -1):
        start = roles * np.uint64(bounds[s])
        for k in range(start, start + np.uint64(counts[s])):
            following[k] = first[names[k]]
            first[names[k]] = s


# Not functions in the kernels' closures: that would defeat the cache on disk.


@numba.njit(**FLAGS, inline="always")
def _half(array, half):
    """Pointer to a half of an array ``[halves, rows, columns]``."""
    return pointer(array, half * array.shape[1] * array.shape[2])


@numba.njit(**FLAGS, inline="always")
def _score(kind, L, m, queries, part, half, start, n, scores, squares):
    """Add a half of a part to the scores ``[n, 1 + m]`` of a step's items, the positive one first.

    Of distances it is the squares that halves are added of.
    """
    table, ids, sums = _half(part[0], half), pointer(part[1], 0), _half(part[5], half)
    size, to = np.uint64(3 * L), np.uint64(0)
    at = (queries + m + np.uint64(1)) * start
    for r in range(n):
        query = spread(L, np.float32(0))
        for _ in range(queries):
            query = query + take(L, table, size * np.uint64(ids[at]))
            at += np.uint64(1)
        put(sums, r * np.uint64(L), query)
        for _ in range(m + np.uint64(1)):
            item = take(L, table, size * np.uint64(ids[at]))
            if kind == PRODUCT:
                scores[to] += dot(query, item)
            elif kind == DISTANCE:
                way = query - item
                squares[to] = dot(way, way)
            else:
                scores[to] += dot(item, spread(L, np.float32(1)))
            at += np.uint64(1)
            to += np.uint64(1)


@numba.njit(**FLAGS, inline="always")
def _scatter(kind, L, m, queries, part, half, start, n, weights, lengths):
    """Add to the gradients of a step's table rows what each of its rows and items weighs in them."""
    table, ids, slots = _half(part[0], half), pointer(part[1], 0), pointer(part[2], 0)
    sums, gradients = _half(part[5], half), _half(part[6], half)
    size, to = np.uint64(3 * L), np.uint64(0)
    begin = (queries + m + np.uint64(1)) * start
    for r in range(n):
        query, total = take(L, sums, r * np.uint64(L)), spread(L, np.float32(0))
        at = begin + queries
        for _ in range(m + np.uint64(1)):
            item, place = take(L, table, size * np.uint64(ids[at])), np.uint64(L) * np.uint64(slots[at])
            weight = weights[to]
            if kind == PRODUCT:
                total = total + weight * item
                own = weight * query
            elif kind == DISTANCE:
                own = (weight / lengths[to]) * (query - item)
                total = total - own
            else:
                own = spread(L, weight)
            put(gradients, place, take(L, gradients, place) + own)
            at += np.uint64(1)
            to += np.uint64(1)
        for k in range(begin, begin + queries):
            place = np.uint64(L) * np.uint64(slots[k])
            put(gradients, place, take(L, gradients, place) + total)
        begin = at


@numba.njit(**FLAGS, inline="always")
def _move(L, roles, part, half, pulled, s, start, plan, ratio, good, reach, numbers):
    """Take step ``s`` of all rows of a part's table that it touches."""
    names, following = part[3], part[4]
    own, gradients = _half(part[0], half), _half(part[6], half)
    base, count = roles * start, np.uint64(part[7][s])
    for k in range(count):
        fetch(L, own, names[base + min(k + SOON, count - np.uint64(1))])
        name, gradient = np.uint64(names[base + k]), take(L, gradients, k * np.uint64(L))
        if name == pulled:
            w = take(L, own, np.uint64(3 * L) * name)
            w = w * HUGE
            gradient = gradient + w / (root(w * w) + TINY)  # each number's sign, 0 of 0
        gap = np.uint64(following[base + k]) - s
        advance(L, own, name, gradient, s, gap, plan, ratio, good, reach, numbers)


@numba.njit(**FLAGS)
def _weigh(m, n, scores, squares, halves, scale, differences, weights, lengths):
    """Turn the halves ``[2, n * (1 + m)]`` of a step's scores into the derivatives of its loss by them.

    ``halves`` are how many there are of scores and of the squares of distances; ``differences`` ``[n, m]`` are of the
    pairs' scores, ``lengths`` the distances.
    """
    width = m + np.uint64(1)
    for k in range(n * width):
        total = scores[0, k] + scores[1, k] if halves[0] > 1 else scores[0, k]
        if halves[1]:
            lengths[k] = np.sqrt(squares[0, k] + squares[1, k] if halves[1] > 1 else squares[0, k])
            total -= lengths[k]
        weights[k] = total
    for r in range(n):
        at, total = r * width, np.float32(0)
        score = weights[at]
        for t in range(m):
            difference = score - weights[at + np.uint64(1) + t]
            differences[r * m + t] = difference
            share = slope(difference, scale)
            weights[at + np.uint64(1) + t] = share
            total += share
        weights[at] = -total


@cache
def _train(m, kind, L, queries, kind2, L2, queries2):
    """Kernel for the steps of a block, for the halves ``begin`` to ``end`` of a model of one or two parts.

    A part is a table ``[halves, rows, 3 * L]`` of weights and both moments, what rows of the data name, what `_arrange`
    leaves of it, room for sums ``[halves, n, L]`` and gradients ``[halves, most, L]``, and again of `_arrange`.
    ``scores`` and ``squares`` ``[2, 2, most * (1 + m)]`` are for the even and the odd steps: a thread can be ahead of
    the other by a step's half. ``room`` is a thread's own.
    """
    m, queries, queries2 = np.uint64(m), np.uint64(queries), np.uint64(queries2)
    roles, roles2 = queries + m + np.uint64(1), queries2 + m + np.uint64(1)

    @numba.njit(**FLAGS)
    def kernel(
        begin, end, part, part2, pulled, pulled2, first, first2, bounds, scores, squares, halves, room, progress,
        sums, powers, schedule, reach, numbers, with_loss,
    ):  # fmt: skip
        weights, lengths, differences = room
        count, count2 = part[0].shape[0], part2[0].shape[0]
        ratios = np.empty((powers.shape[1], 4), np.float32)
        good, loss = np.uint64(0), 0.0
        plan, ratio = pointer(schedule, 0), pointer(ratios, 0)
        early, early2 = pointer(first, 0), pointer(first2, 0)
        rows, rows2 = np.uint64(len(first)), np.uint64(len(first2))
        for s in range(np.uint64(len(bounds) - 1)):
            if powers.shape[1] > 1:
                good = np.uint64(quotients(sums, powers, s, np.float64(numbers[4]), ratios))
            if s == 0:
                for half in range(begin, min(end, count)):
                    catch_up(L, _half(part[0], half), early, rows, plan, ratio, good, reach, numbers)
                for half in range(begin, min(end, count2) if kind2 != NOTHING else begin):
                    catch_up(L2, _half(part2[0], half), early2, rows2, plan, ratio, good, reach, numbers)
            start = np.uint64(bounds[s])
            n = np.uint64(bounds[s + np.uint64(1)]) - start
            x, y = scores[s & np.uint64(1)], squares[s & np.uint64(1)]
            for half in range(begin, end):
                x[half, : n * (m + np.uint64(1))] = 0
                if half < count:
                    _score(kind, L, m, queries, part, half, start, n, x[half], y[half])
                if kind2 != NOTHING and half < count2:
                    _score(kind2, L2, m, queries2, part2, half, start, n, x[half], y[half])
            if end - begin < halves[0]:
                meet(progress, begin, np.int64(s))
            _weigh(m, n, x, y, halves, np.float32(1 / (n * m)), differences[0], weights, lengths)
            if with_loss and begin == 0:
                loss += total_loss(differences, 0, n * m) / (n * m)
            for half in range(begin, end):
                if half < count:
                    part[6][half, : np.uint64(part[7][s])] = 0
                    _scatter(kind, L, m, queries, part, half, start, n, weights, lengths)
                    _move(L, roles, part, half, pulled, s, start, plan, ratio, good, reach, numbers)
                if kind2 != NOTHING and half < count2:
                    part2[6][half, : np.uint64(part2[7][s])] = 0
                    _scatter(kind2, L2, m, queries2, part2, half, start, n, weights, lengths)
                    _move(L2, roles2, part2, half, pulled2, s, start, plan, ratio, good, reach, numbers)
        return loss

    return kernel


class SummedTraining:
    """A model of such scores in training.

    Args:
        parts: one or two, of which at most one is a `DISTANCE`.
        optimizer: as torch.optim.Adam takes it; its learning rate gives way to each epoch's.
        threads: at most, of which two have something to do; default: as many as numba has.

    Attributes:
        steps: that were taken.
    """

    def __init__(self, parts: Sequence[Part], optimizer: Adam, threads: int | None = None) -> None:
        if not 1 <= len(parts) <= 2 or sum(part.kind == DISTANCE for part in parts) > 1:
            raise ValueError("a score has one or two parts, of which at most one is a distance")
        self.parts, self._optimizer, self.steps = list(parts), optimizer, 0
        self._threads = threads_for(threads)
        self._tables = [halved(part.start) for part in self.parts]

    @property
    def W(self) -> list[np.ndarray]:
        """A copy of each part's embeddings, float32 ``[rows, K]``."""
        return [joined(table, 0) for table in self._tables]

    @property
    def M(self) -> list[np.ndarray]:
        """A copy of Adam's first moments, likewise."""
        return [joined(table, 1) for table in self._tables]

    @property
    def V(self) -> list[np.ndarray]:
        """A copy of Adam's second moments, likewise."""
        return [joined(table, 2) for table in self._tables]

    def epoch(
        self, queries: Sequence[np.ndarray], pos: np.ndarray, epoch: Epoch, with_loss: bool = False
    ) -> float | None:
        """Train on an epoch's batches.

        Args:
            queries: of each part, the table rows that each row of the data names, ints ``[rows, any]``.
            pos: positive item of each row, ints ``[rows]``.
            epoch: of these rows; an empty batch makes no step.
            with_loss: whether to return the sum of the batches' mean losses.
        """
        order = np.asarray(epoch.order)
        bounds, rates = steps_made(epoch.bounds, epoch.rates)
        loss, begin = 0.0, 0
        while begin < len(rates):
            end = max(int(np.searchsorted(bounds, bounds[begin] + BLOCK, "right")) - 1, begin + 1)
            rows = order[bounds[begin] : bounds[end]]
            items = np.column_stack([pos[rows], epoch.negatives[rows]])
            block = bounds[begin : end + 1] - bounds[begin]
            parts = [(p, named[rows], items, block) for p, named in enumerate(queries)]
            arranged = together(self._arranged, parts, self._threads)
            loss += self._train(arranged, items.shape[1] - 1, block, rates[begin:end], with_loss)
            begin = end
        return loss if with_loss else None

    def _arranged(self, number, queries, items, bounds):
        """What the kernel takes of a part for a block, and when its table's rows are touched first."""
        part, table = self.parts[number], self._tables[number]
        (halves, rows, size), (n, own) = table.shape, queries.shape
        ids = np.empty((n, own + items.shape[1]), np.uint32)
        ids[:, :own] = queries
        np.add(items, part.items, out=ids[:, own:], casting="unsafe")
        slots, names, following = (np.empty(shape, np.uint32) for shape in (ids.shape, ids.size, ids.size))
        first, counts = np.empty(rows, np.uint32), np.empty(len(bounds) - 1, np.uint32)
        _arrange(ids, bounds, np.full(rows, NONE), slots, names, following, first, counts)
        if self.steps == 0 and self._optimizer.weight_decay == 0:
            first = first[:0]  # moments are zero: nothing moves before its first touch
        sums = aligned((halves, int(np.diff(bounds).max()), size // 3), np.float32)
        gradients = aligned((halves, int(counts.max()), size // 3), np.float32)
        return (table, ids, slots, names, following, sums, gradients, counts), first

    def _train(self, arranged, m, bounds, rates, with_loss):
        """Take a block's steps; returns the sum of their losses."""
        shapes = [
            (part.kind, table.shape[2] // 3, data[1].shape[1] - m - 1)
            for part, table, (data, _) in zip(self.parts, self._tables, arranged, strict=True)
        ]
        if len(shapes) == 1:
            shapes, arranged = [*shapes, (NOTHING, 1, 0)], arranged * 2
        (data, first), (data2, first2) = arranged
        most, steps = int(np.diff(bounds).max()), len(rates)
        pulled = [np.uint64(part.pulled) for part in (self.parts[0], self.parts[-1])]
        scores, squares = np.empty((2, 2, 2, most * (m + 1)), np.float32)
        every = [len(table) for table in self._tables]
        distance = [n for n, part in zip(every, self.parts, strict=True) if part.kind == DISTANCE]
        halves = np.array([max(every), max(distance, default=0)])
        plan = planned(self._optimizer, rates, self.steps)
        kernel: Any = _train(m, *shapes[0], *shapes[1])

        def run(begin, end, progress):
            room = *np.empty((2, most * (m + 1)), np.float32), np.empty((1, most * m), np.float32)
            rest = first, first2, bounds, scores, squares, halves, room, progress, *plan, with_loss
            return kernel(begin, end, data, data2, *pulled, *rest)

        losses = in_step(run, max(every), self._threads, steps)
        self.steps += steps
        return losses[0]
