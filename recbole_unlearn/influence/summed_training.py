"""Scores of a sum of embeddings with an item's, trained as torch.optim.Adam trains them.

A score is a sum of parts. Each part has a table of embeddings of its own, of which a row of the data names some, its
*query*; their sum q meets the embedding e of the item:

    product   q e          Rendle et al., "Factorizing Personalized Markov Chains" (FPMC), 2010, equation (9)
    distance  -||q - e||   He et al., "Translation-based Recommendation" (TransRec), 2017, equation (2)
    own       e            one number, a bias

Rows catch up as in `dot_product`, at the cost of the rows that a step touches. The loss is RecBole's ``BPRLoss``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np

from recbole_unlearn.influence.catching_up import NONE, advance, catch_up, planned, quotients
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.pairwise_loss import slope, total_loss
from recbole_unlearn.influence.recorded import Adam, steps_made
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
def _score(kind, L, m, queries, part, start, n, scores, lengths):
    """Add a part to the scores ``[n, 1 + m]`` of a step's items, the positive one first."""
    table, ids, sums = pointer(part[0], 0), pointer(part[1], 0), pointer(part[5], 0)
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
                lengths[to] = np.sqrt(dot(way, way))
                scores[to] -= lengths[to]
            else:
                scores[to] += dot(item, spread(L, np.float32(1)))
            at += np.uint64(1)
            to += np.uint64(1)


@numba.njit(**FLAGS, inline="always")
def _scatter(kind, L, m, queries, part, start, n, weights, lengths):
    """Add to the gradients of a step's table rows what each of its rows and items weighs in them."""
    table, ids, slots, sums, gradients = (
        pointer(part[0], 0), pointer(part[1], 0), pointer(part[2], 0), pointer(part[5], 0), pointer(part[6], 0)
    )  # fmt: skip
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
def _move(L, roles, part, pulled, s, start, plan, ratio, good, reach, numbers):
    """Take step ``s`` of all rows of a part's table that it touches."""
    table, names, following, gradients = part[0], part[3], part[4], pointer(part[6], 0)
    own = pointer(table, 0)
    base = roles * start
    for k in range(np.uint64(part[7][s])):
        name, gradient = np.uint64(names[base + k]), take(L, gradients, k * np.uint64(L))
        if name == pulled:
            w = take(L, own, np.uint64(3 * L) * name)
            w = w * HUGE
            gradient = gradient + w / (root(w * w) + TINY)  # each number's sign, 0 of 0
        gap = np.uint64(following[base + k]) - s
        advance(L, own, name, gradient, s, gap, plan, ratio, good, reach, numbers)


@numba.njit(**FLAGS)
def _weigh(m, n, scores, scale, differences, weights):
    """Turn a step's scores into the derivatives of its loss by them; ``differences`` ``[n, m]`` are of the pairs."""
    width = m + np.uint64(1)
    for r in range(n):
        at, total = r * width, np.float32(0)
        for t in range(m):
            difference = scores[at] - scores[at + np.uint64(1) + t]
            differences[r * m + t] = difference
            share = slope(difference, scale)
            weights[at + np.uint64(1) + t] = share
            total += share
        weights[at] = -total


@cache
def _train(m, kind, L, queries, kind2, L2, queries2):
    """Kernel for the steps of a block, of a model of one or two parts.

    A part is a table ``[rows, 3 * L]`` of weights and both moments, what rows of the data name, what `_arrange` leaves
    of it, room for sums ``[n, L]`` and gradients ``[most, L]``, and again what `_arrange` leaves.
    """
    m, queries, queries2 = np.uint64(m), np.uint64(queries), np.uint64(queries2)
    roles, roles2 = queries + m + np.uint64(1), queries2 + m + np.uint64(1)

    @numba.njit(**FLAGS)
    def kernel(
        part, part2, pulled, pulled2, first, first2, bounds, scores, lengths, differences, weights,
        sums, powers, schedule, reach, numbers, with_loss,
    ):  # fmt: skip
        ratios = np.empty((powers.shape[1], 4), np.float32)
        good, loss = np.uint64(0), 0.0
        plan, ratio = pointer(schedule, 0), pointer(ratios, 0)
        for s in range(np.uint64(len(bounds) - 1)):
            if powers.shape[1] > 1:
                good = np.uint64(quotients(sums, powers, s, np.float64(numbers[4]), ratios))
            if s == 0:
                rows = np.uint64(len(first))
                catch_up(L, pointer(part[0], 0), pointer(first, 0), rows, plan, ratio, good, reach, numbers)
                if kind2 != NOTHING:
                    rows = np.uint64(len(first2))
                    catch_up(L2, pointer(part2[0], 0), pointer(first2, 0), rows, plan, ratio, good, reach, numbers)
            start = np.uint64(bounds[s])
            n = np.uint64(bounds[s + np.uint64(1)]) - start
            scores[: n * (m + np.uint64(1))] = 0
            _score(kind, L, m, queries, part, start, n, scores, lengths)
            if kind2 != NOTHING:
                _score(kind2, L2, m, queries2, part2, start, n, scores, lengths)
            _weigh(m, n, scores, np.float32(1 / (n * m)), differences[0], weights)
            if with_loss:
                loss += total_loss(differences, 0, n * m) / (n * m)
            part[6][: np.uint64(part[7][s])] = 0
            _scatter(kind, L, m, queries, part, start, n, weights, lengths)
            _move(L, roles, part, pulled, s, start, plan, ratio, good, reach, numbers)
            if kind2 != NOTHING:
                part2[6][: np.uint64(part2[7][s])] = 0
                _scatter(kind2, L2, m, queries2, part2, start, n, weights, lengths)
                _move(L2, roles2, part2, pulled2, s, start, plan, ratio, good, reach, numbers)
        return loss

    return kernel


class SummedTraining:
    """A model of such scores in training.

    Args:
        parts: one or two, of which at most one is a `DISTANCE`.
        optimizer: as torch.optim.Adam takes it; its learning rate gives way to each epoch's.

    Attributes:
        steps: that were taken.
    """

    def __init__(self, parts: Sequence[Part], optimizer: Adam) -> None:
        if not 1 <= len(parts) <= 2 or sum(part.kind == DISTANCE for part in parts) > 1:
            raise ValueError("a score has one or two parts, of which at most one is a distance")
        self.parts, self._optimizer, self.steps = list(parts), optimizer, 0
        self._tables = []
        for part in self.parts:
            rows, K = part.start.shape
            table = aligned((rows, 3 * K), np.float32)
            table[:, :K] = part.start
            self._tables.append(table)

    def _read(self, which: int) -> list[np.ndarray]:
        return [np.array(np.split(table, 3, 1)[which]) for table in self._tables]

    @property
    def W(self) -> list[np.ndarray]:
        """A copy of each part's embeddings, float32 ``[rows, K]``."""
        return self._read(0)

    @property
    def M(self) -> list[np.ndarray]:
        """A copy of Adam's first moments, likewise."""
        return self._read(1)

    @property
    def V(self) -> list[np.ndarray]:
        """A copy of Adam's second moments, likewise."""
        return self._read(2)

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
            arranged = [
                self._arranged(p, queries[p][rows], items, bounds[begin : end + 1]) for p in range(len(queries))
            ]
            loss += self._train(arranged, items.shape[1] - 1, bounds[begin : end + 1], rates[begin:end], with_loss)
            begin = end
        return loss if with_loss else None

    def _arranged(self, number, queries, items, bounds):
        """What the kernel takes of a part for a block, and when its table's rows are touched first."""
        part, table = self.parts[number], self._tables[number]
        ids = np.column_stack([queries, items + part.items]).astype(np.uint32)
        slots, names, following = (np.empty(shape, np.uint32) for shape in (ids.shape, ids.size, ids.size))
        first, counts = np.empty(len(table), np.uint32), np.empty(len(bounds) - 1, np.uint32)
        bounds = bounds - bounds[0]
        _arrange(ids, bounds, np.full(len(table), NONE), slots, names, following, first, counts)
        if self.steps == 0 and self._optimizer.weight_decay == 0:
            first = first[:0]  # moments are zero: nothing moves before its first touch
        K = table.shape[1] // 3
        sums = aligned((int(np.diff(bounds).max()), K), np.float32)
        gradients = aligned((int(counts.max()), K), np.float32)
        return (table, ids, slots, names, following, sums, gradients, counts), first

    def _train(self, arranged, m, bounds, rates, with_loss):
        """Take a block's steps; returns the sum of their losses."""
        shapes = [
            (part.kind, part.start.shape[1], data[1].shape[1] - m - 1)
            for part, (data, _) in zip(self.parts, arranged, strict=True)
        ]
        if len(shapes) == 1:
            shapes, arranged = [*shapes, (NOTHING, 1, 0)], arranged * 2
        (data, first), (data2, first2) = arranged
        most = int(np.diff(bounds).max())
        room = [np.empty(most * (m + 1), np.float32) for _ in range(2)]
        pulled = [np.uint64(part.pulled) for part in (self.parts[0], self.parts[-1])]
        rest = np.empty((1, most * m), np.float32), np.empty(most * (m + 1), np.float32)
        plan = planned(self._optimizer, rates, self.steps)
        kernel: Any = _train(m, *shapes[0], *shapes[1])
        loss = kernel(data, data2, *pulled, first, first2, bounds - bounds[0], *room, *rest, *plan, with_loss)
        self.steps += len(rates)
        return loss
