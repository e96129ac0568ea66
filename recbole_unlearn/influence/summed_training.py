"""Scores of a sum of embeddings with an item's, trained as torch.optim.Adam trains them.

A score is a sum of parts. Each part has a table of embeddings of its own, of which a row of the data names some, its
*query*; their sum q meets the embedding e of the item:

    product   q e          Rendle et al., "Factorizing Personalized Markov Chains" (FPMC), 2010, equation (9)
    distance  -||q - e||   He et al., "Translation-based Recommendation" (TransRec), 2017, equation (2)
    own       e            one number, a bias

The loss of a row, of a positive item and m negative ones, is

    pairwise   the mean of RecBole's ``BPRLoss`` of the differences of their scores x
    pointwise  softplus(-x) of the positive one + the sum of softplus(x) of the others, each by its own
               Tang et al., "LINE: Large-scale Information Network Embedding", 2015, equation (7)

Rows catch up (`catching_up`), and two threads have half of the columns each (`threads`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from recbole_unlearn.influence.catching_up import NONE, SOON, advance, catch_up, fetch, planned, quotients
from recbole_unlearn.influence.compiling import compiled, inlined
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.pairwise_loss import sigmoid, slope, softplus, total_loss
from recbole_unlearn.influence.recorded import Adam, steps_made
from recbole_unlearn.influence.threads import halved, in_step, joined, meet, threads_for, together
from recbole_unlearn.influence.vectors import (
    aligned,
    columns,
    dot,
    onward,
    pointer,
    put,
    root,
    spread,
    take_like,
)

PRODUCT, DISTANCE, OWN, NOTHING = range(4)
PAIRWISE, POINTWISE = range(2)
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
        begins: first rows, from 0 on, of parameters that steps may leave out: where a step names no row of one, it has
            no gradient, and torch's Adam leaves it and its moments as they are. Only of a score of one part.
    """

    kind: int
    start: np.ndarray
    items: int = 0
    pulled: int = int(NONE)
    begins: tuple[int, ...] = (0,)


@inlined
def _parameter(name, begins):
    """Which parameter a table row is of."""
    p = np.uint64(0)
    for k in range(np.uint64(1), np.uint64(len(begins))):
        p += np.uint64(name >= begins[k])
    return p


@compiled
def _arrange(ids, bounds, begins, slot, slots, names, following, first, counts, taken):
    """Number the table rows that each step touches, in the order in which it names them.

    ``ids`` ``[rows, roles]`` are what the rows of the data name, ``slots`` their numbers. ``names`` are which they are,
    those of step s from ``roles * bounds[s]`` on, ``counts[s]`` of them, and ``following`` the step that touches each
    next; ``first`` ``[table rows]`` is the one that touches it first. ``taken`` ``[parameters, steps + 1]`` is how many
    steps each parameter has taken before each, which is how its steps are numbered. ``slot`` is `NONE` everywhere,
    before and after.
    """
    roles, steps = np.uint64(ids.shape[1]), len(bounds) - 1
    flat, numbered = pointer(ids, 0), pointer(slots, 0)
    for s in range(steps):
        start, stop, count = roles * np.uint64(bounds[s]), roles * np.uint64(bounds[s + 1]), np.uint64(0)
        for p in range(len(begins)):  # not as arrays, for which numba compiles what it would say of their shapes
            taken[p, s + 1] = taken[p, s]
        for k in range(start, stop):
            name = np.uint64(flat[k])
            if slot[name] == NONE:
                p = _parameter(name, begins)
                taken[p, s + 1] = taken[p, s] + 1
                slot[name] = count
                names[start + count] = name
                count += np.uint64(1)
            numbered[k] = slot[name]
        for k in range(start, start + count):
            slot[names[k]] = NONE
        counts[s] = count
    for p in range(len(begins)):
        first[begins[p] :] = taken[p, steps]
    for s in range(steps - 1, -1, -1):
        start = roles * np.uint64(bounds[s])
        for k in range(start, start + np.uint64(counts[s])):
            name = names[k]
            following[k] = first[name]
            first[name] = taken[_parameter(name, begins), s]


# Not functions in the kernels' closures: that would defeat the cache on disk.


@inlined
def _half(array, half):
    """Pointer to a half of an array ``[halves, rows, columns]``."""
    return pointer(array, half * array.shape[1] * array.shape[2])


@inlined
def _score(kind, zero, m, queries, part, half, start, n, scores, squares):
    """Add a half of a part to the scores ``[n, 1 + m]`` of a step's items, the positive one first.

    Of distances it is the squares that halves are added of.
    """
    table, ids, sums = _half(part[0], half), pointer(part[1], 0), _half(part[5], half)
    size, to = np.uint64(3) * columns(zero), np.uint64(0)
    at = (queries + m + np.uint64(1)) * start
    for r in range(n):
        query = zero
        for _ in range(queries):
            query = query + take_like(zero, table, size * np.uint64(ids[at]))
            at += np.uint64(1)
        put(sums, r * columns(zero), query)
        for _ in range(m + np.uint64(1)):
            item = take_like(zero, table, size * np.uint64(ids[at]))
            if kind == PRODUCT:
                scores[to] += dot(query, item)
            elif kind == DISTANCE:
                way = query - item
                squares[to] = dot(way, way)
            else:
                scores[to] += dot(item, zero + np.float32(1))
            at += np.uint64(1)
            to += np.uint64(1)


@inlined
def _scatter(kind, zero, m, queries, part, half, start, n, weights, lengths):
    """Add to the gradients of a step's table rows what each of its rows and items weighs in them."""
    table, ids, slots = _half(part[0], half), pointer(part[1], 0), pointer(part[2], 0)
    sums, gradients = _half(part[5], half), _half(part[6], half)
    size, to = np.uint64(3) * columns(zero), np.uint64(0)
    begin = (queries + m + np.uint64(1)) * start
    for r in range(n):
        query, total = take_like(zero, sums, r * columns(zero)), zero
        at = begin + queries
        for _ in range(m + np.uint64(1)):
            item, place = take_like(zero, table, size * np.uint64(ids[at])), columns(zero) * np.uint64(slots[at])
            weight = weights[to]
            if kind == PRODUCT:
                total = total + weight * item
                own = weight * query
            elif kind == DISTANCE:
                own = (weight / lengths[to]) * (query - item)
                total = total - own
            else:
                own = zero + weight
            put(gradients, place, take_like(zero, gradients, place) + own)
            at += np.uint64(1)
            to += np.uint64(1)
        for k in range(begin, begin + queries):
            place = columns(zero) * np.uint64(slots[k])
            put(gradients, place, take_like(zero, gradients, place) + total)
        begin = at


@inlined
def _move(zero, roles, part, half, pulled, s, start, plans, places, ratios, good, reach, numbers):
    """Take step ``s`` of all rows of a part's table that it touches.

    ``plans`` has what the parameters' steps are made of, each one's from ``places`` on; ``ratios`` and ``good`` are as
    `quotients` leaves them of each.
    """
    names, following, begins, taken = part[3], part[4], part[8], part[9]
    own, gradients = _half(part[0], half), _half(part[6], half)
    base, count = roles * start, np.uint64(part[7][s])
    plan, ratio, size = pointer(plans, 0), pointer(ratios, 0), np.uint64(4 * ratios.shape[1])
    for k in range(count):
        fetch(zero, own, names[base + min(k + SOON, count - np.uint64(1))])
        name, gradient = np.uint64(names[base + k]), take_like(zero, gradients, k * columns(zero))
        if name == pulled:
            w = take_like(zero, own, np.uint64(3) * columns(zero) * name)
            w = w * HUGE
            gradient = gradient + w / (root(w * w) + TINY)  # each number's sign, 0 of 0
        p = _parameter(name, begins)
        step = np.uint64(taken[p, s])
        gap, own_plan = np.uint64(following[base + k]) - step, onward(plan, np.uint64(4) * places[p])
        advance(zero, own, name, gradient, step, gap, own_plan, onward(ratio, size * p), good[p], reach, numbers)


@inlined
def _catch_up(zero, part, half, first, plans, places, ratios, good, reach, numbers):
    """Take the steps of all rows of a part's table until they are touched first."""
    begins, size = part[8], np.uint64(4 * ratios.shape[1])
    for p in range(np.uint64(len(begins))):
        begin, last = np.uint64(begins[p]), p + np.uint64(1) == np.uint64(len(begins))
        end = np.uint64(len(first)) if last else np.uint64(min(begins[p + np.uint64(1)], len(first)))
        own = onward(_half(part[0], half), np.uint64(3) * columns(zero) * begin)
        plan, ratio = pointer(plans, np.uint64(4) * places[p]), pointer(ratios, size * p)
        if begin < end:
            catch_up(zero, own, pointer(first, begin), end - begin, plan, ratio, good[p], reach, numbers)


@inlined
def _add(count, scores, squares, halves, weights, lengths):
    """Put the scores of a step's items, from their halves ``[2, count]``, into ``weights``.

    ``halves`` are how many there are of scores and of the squares of distances, ``lengths`` the distances.
    """
    for k in range(count):
        total = scores[0, k] + scores[1, k] if halves[0] > 1 else scores[0, k]
        if halves[1]:
            lengths[k] = np.sqrt(squares[0, k] + squares[1, k] if halves[1] > 1 else squares[0, k])
            total -= lengths[k]
        weights[k] = total


@inlined
def _weigh_pairs(m, n, scale, differences, weights):
    """Turn a step's scores ``[n, 1 + m]`` into the derivatives of the pairwise loss by them.

    ``differences`` ``[n, m]`` are of the pairs' scores.
    """
    width = m + np.uint64(1)
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


@inlined
def _weigh_each(m, n, shares, start, weights, with_loss):
    """The same of the pointwise loss, each row's times its share; returns it."""
    loss, at = 0.0, np.uint64(0)
    for r in range(n):
        share = shares[start + r]
        if with_loss:
            total = softplus(-weights[at])
            for t in range(m):
                total += softplus(weights[at + np.uint64(1) + t])
            loss += share * total
        weights[at] = -share * sigmoid(-weights[at])
        for _ in range(m):
            at += np.uint64(1)
            weights[at] = share * sigmoid(weights[at])
        at += np.uint64(1)
    return loss


@cache
def _train(loss_kind, m, kind, L, queries, kind2, L2, queries2):
    """Kernel for the steps of a block, for the halves ``begin`` to ``end`` of a model of one or two parts.

    A part is a table ``[halves, rows, 3 * L]`` of weights and both moments, what rows of the data name, what `_arrange`
    leaves of it, room for sums ``[halves, n, L]`` and gradients ``[halves, most, L]``, and again of `_arrange`: counts,
    where parameters begin, and the steps that they have taken. Their plans are one after the other in ``schedule``.
    ``scores`` and ``squares`` ``[2, 2, most * (1 + m)]`` are for the even and the odd steps: a thread can be ahead of
    the other by a step's half. ``room`` is a thread's own.
    """
    m, queries, queries2 = np.uint64(m), np.uint64(queries), np.uint64(queries2)
    roles, roles2 = queries + m + np.uint64(1), queries2 + m + np.uint64(1)

    @compiled
    def kernel(
        begin, end, part, part2, pulled, pulled2, first, first2, bounds, shares, scores, squares, halves, room,
        progress, sums, powers, schedule, places, reach, numbers, with_loss,
    ):  # fmt: skip
        zero, zero2 = spread(L, np.float32(0)), spread(L2, np.float32(0))
        weights, lengths, differences = room
        count, count2, taken = part[0].shape[0], part2[0].shape[0], part[9]
        ratios = np.empty((len(places), powers.shape[1], 4), np.float32)
        good, loss = np.zeros(len(places), np.uint64), 0.0
        for s in range(np.uint64(len(bounds) - 1)):
            for p in range(len(places) if powers.shape[1] > 1 else 0):
                if s == 0 or taken[p, s + np.uint64(1)] > taken[p, s]:
                    good[p] = quotients(sums[p], powers, np.uint64(taken[p, s]), np.float64(numbers[4]), ratios[p])
            if s == 0:
                for half in range(begin, min(end, count)):
                    _catch_up(zero, part, half, first, schedule, places, ratios, good, reach, numbers)
                for half in range(begin, min(end, count2) if kind2 != NOTHING else begin):
                    _catch_up(zero2, part2, half, first2, schedule, places, ratios, good, reach, numbers)
            start = np.uint64(bounds[s])
            n = np.uint64(bounds[s + np.uint64(1)]) - start
            x, y = scores[s & np.uint64(1)], squares[s & np.uint64(1)]
            for half in range(begin, end):
                x[half, : n * (m + np.uint64(1))] = 0
                if half < count:
                    _score(kind, zero, m, queries, part, half, start, n, x[half], y[half])
                if kind2 != NOTHING and half < count2:
                    _score(kind2, zero2, m, queries2, part2, half, start, n, x[half], y[half])
            if end - begin < halves[0]:
                meet(progress, begin, end, np.int64(s))
            _add(n * (m + np.uint64(1)), x, y, halves, weights, lengths)
            if loss_kind == POINTWISE:
                loss += _weigh_each(m, n, shares, start, weights, with_loss and begin == 0)
            else:
                _weigh_pairs(m, n, np.float32(1 / (n * m)), differences[0], weights)
                if with_loss and begin == 0:
                    loss += total_loss(differences, 0, n * m) / (n * m)
            for half in range(begin, end):
                if half < count:
                    part[6][half, : np.uint64(part[7][s])] = 0
                    _scatter(kind, zero, m, queries, part, half, start, n, weights, lengths)
                    _move(zero, roles, part, half, pulled, s, start, schedule, places, ratios, good, reach, numbers)
                if kind2 != NOTHING and half < count2:
                    part2[6][half, : np.uint64(part2[7][s])] = 0
                    _scatter(kind2, zero2, m, queries2, part2, half, start, n, weights, lengths)
                    _move(zero2, roles2, part2, half, pulled2, s, start, schedule, places, ratios, good, reach, numbers)
        return loss

    return kernel


class SummedTraining:
    """A model of such scores in training.

    Args:
        parts: one or two, of which at most one is a `DISTANCE`.
        optimizer: as torch.optim.Adam takes it; its learning rate gives way to each epoch's.
        threads: at most, of which two have something to do; default: as many as kernels run on.
        loss: `PAIRWISE` or `POINTWISE`.

    Attributes:
        steps: that were taken.
        taken: by each parameter that steps may leave out, or by all together, ints ``[parameters]``.

    Raises:
        ValueError: parts that do not make a score.
    """

    def __init__(
        self, parts: Sequence[Part], optimizer: Adam, threads: int | None = None, loss: int = PAIRWISE
    ) -> None:
        if not 1 <= len(parts) <= 2 or sum(part.kind == DISTANCE for part in parts) > 1:
            raise ValueError("a score has one or two parts, of which at most one is a distance")
        if len(parts) > 1 and any(len(part.begins) > 1 for part in parts):
            raise ValueError("steps may leave out parameters of a score of one part alone")
        self.parts, self._optimizer, self.steps, self._loss = list(parts), optimizer, 0, loss
        self.taken = np.zeros(len(parts[0].begins), int)
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
        self,
        queries: Sequence[np.ndarray],
        pos: np.ndarray,
        epoch: Epoch,
        with_loss: bool = False,
        shares: np.ndarray | None = None,
    ) -> float | None:
        """Train on an epoch's batches.

        Args:
            queries: of each part, the table rows that each row of the data names, ints ``[rows, any]``.
            pos: positive item of each row, ints ``[rows]``.
            epoch: of these rows; an empty batch makes no step.
            with_loss: whether to return the sum of the batches' losses.
            shares: of each row's loss in its batch's, ``[rows]``; default: the batch's mean. Of the pointwise loss.
        """
        order = np.asarray(epoch.order)
        bounds, rates = steps_made(epoch.bounds, epoch.rates)
        if self._loss == PAIRWISE and shares is not None:
            raise ValueError("of the pairwise loss, a batch's mean is taken")
        loss, begin = 0.0, 0
        while begin < len(rates):
            end = max(int(np.searchsorted(bounds, bounds[begin] + BLOCK, "right")) - 1, begin + 1)
            rows = order[bounds[begin] : bounds[end]]
            items = np.column_stack([pos[rows], epoch.negatives[rows]])
            block = bounds[begin : end + 1] - bounds[begin]
            parts = [(p, named[rows], items, block) for p, named in enumerate(queries)]
            arranged = together(self._arranged, parts, self._threads)
            sizes = np.diff(block)
            own = np.repeat(1 / sizes, sizes) if shares is None else shares[rows]
            loss += self._train(arranged, items.shape[1] - 1, block, rates[begin:end], own, with_loss)
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
        begins, taken = np.array(part.begins, np.uint32), np.zeros((len(part.begins), len(bounds)), np.uint32)
        _arrange(ids, bounds, begins, np.full(rows, NONE), slots, names, following, first, counts, taken)
        if self.steps == 0 and self._optimizer.weight_decay == 0:
            first = first[:0]  # moments are zero: nothing moves before its first touch
        sums = aligned((halves, int(np.diff(bounds).max()), size // 3), np.float32)
        gradients = aligned((halves, int(counts.max()), size // 3), np.float32)
        return (table, ids, slots, names, following, sums, gradients, counts, begins, taken), first

    def _train(self, arranged, m, bounds, rates, shares, with_loss):
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
        taken = data[9]
        plans = [
            planned(self._optimizer, rates[np.diff(own) > 0], before)
            for own, before in zip(taken, self.taken.tolist(), strict=True)
        ]
        sums, powers, schedules, reach, numbers = zip(*plans, strict=True)
        places = np.cumsum([0, *map(len, schedules[:-1])]).astype(np.uint64)
        plan = sums, powers[0], np.concatenate(schedules), places, reach[0], numbers[0]
        shares = shares.astype(np.float32) if self._loss == POINTWISE else np.empty(0, np.float32)
        kernel: Any = _train(self._loss, m, *shapes[0], *shapes[1])

        def run(begin, end, progress):
            room = *np.empty((2, most * (m + 1)), np.float32), np.empty((1, most * m), np.float32)
            rest = first, first2, bounds, shares, scores, squares, halves, room, progress, *plan, with_loss
            return kernel(begin, end, data, data2, *pulled, *rest)

        losses = in_step(run, max(every), self._threads, steps)
        self.steps += steps
        self.taken += taken[:, -1]
        return losses[0]
