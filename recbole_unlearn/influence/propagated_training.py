"""Training of a model that propagates its embeddings over the user-item graph: RecBole's LightGCN and Adam, compiled.

A step costs two products with the graph a layer, and these the reading of a row of embeddings for every edge. So tables
are kept in blocks of columns, one after the other: what is read at random of a block stays in a core's second-level
cache, and threads share the blocks out among them, to meet once a step, when the scores are summed. Sums have the
same order whatever the number of threads.

Propagation is ``A_bar X = (X + A (X + A (X + ...))) / (L + 1)``. Tables hold rows that are multiplied with D^-1/2: an
edge then has no weight, for ``A = D^-1/2 B D^-1/2``. The last layer is taken at the nodes of the batch alone.

**Strides.** Up to ``stride`` steps can be made at once, the more the later: their gradients are taken at the same
weights, so that the graph serves all of them, and Adam moves by what it would in ``stride`` steps with their mean
gradient. Its second moment needs each step's own gradient squared, on average: the mean gradient squared plus a
variance, for which the first step's deviation from the mean stands.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from recbole_unlearn.influence.compiling import compiled, inlined
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.recorded import GAMMA, Adam, steps_made
from recbole_unlearn.influence.threads import in_step, meet, threads_for
from recbole_unlearn.influence.vectors import (
    add_scaled,
    aligned,
    dot,
    exp,
    load_like,
    multiply,
    root,
    spread,
    store,
)

WARM_UP = 10  # steps; Adam's moments, and the weights, change most in the first ones
WIDTH = 16  # columns of a block, at most: a line of cache


@dataclass(frozen=True)
class GraphLoss:
    """What a propagating model's loss is made of, beside the triples.

    Attributes:
        layers: of propagation.
        reg_weight, require_pow: of RecBole's ``EmbLoss`` on the weights of a batch.
    """

    layers: int
    reg_weight: float = 0.0
    require_pow: bool = False


# Not functions in the kernel's closure: that would defeat the cache on disk. Rows are as wide as a vector ``zero``.


@inlined
def _layer(zero, own, table, out, start, neighbour, share, rows):
    """``out = own + share * (sum of table over neighbours)`` for some rows."""
    one, four = np.float32(1), np.uint64(4)
    for k in range(len(rows)):
        r = np.uint64(rows[k])
        e, end = np.uint64(start[r]), np.uint64(start[r + np.uint64(1)])
        x = load_like(zero, own, r, 0)
        a = b = c = d = zero  # an addition waits for the one before it
        while e + four <= end:
            a = add_scaled(a, one, load_like(zero, table, neighbour[e], 0))
            b = add_scaled(b, one, load_like(zero, table, neighbour[e + np.uint64(1)], 0))
            c = add_scaled(c, one, load_like(zero, table, neighbour[e + np.uint64(2)], 0))
            d = add_scaled(d, one, load_like(zero, table, neighbour[e + np.uint64(3)], 0))
            e += four
        while e < end:
            a = add_scaled(a, one, load_like(zero, table, neighbour[e], 0))
            e += np.uint64(1)
        store(out, r, 0, add_scaled(x, share[r], add_scaled(add_scaled(a, one, b), one, add_scaled(c, one, d))))


@inlined
def _score(zero, E, W, scale, batch, x, squares):
    """A block's part of the scores' differences ``x`` ``[triples]``, and of ``squares`` ``[3]`` of the weights."""
    m = batch.shape[1] - 2
    for k in range(len(batch)):
        u, i = batch[k, 0], batch[k, 1]
        user, w = load_like(zero, E, u, 0), load_like(zero, W, u, 0)
        squares[0] += m * dot(w, w)
        w = load_like(zero, W, i, 0)
        squares[1] += m * dot(w, w)
        score = scale[i] * dot(user, load_like(zero, E, i, 0))
        for t in range(m):
            j = batch[k, 2 + t]
            w = load_like(zero, W, j, 0)
            squares[2] += dot(w, w)
            x[k * m + t] = scale[u] * (score - scale[j] * dot(user, load_like(zero, E, j, 0)))


@inlined
def _add(zero, E, scale, factor, batch, g, G):
    """Adds the gradient in the embeddings ``scale * E``, times ``factor``; ``g`` ``[triples]``: in the scores."""
    m = batch.shape[1] - 2
    for k in range(len(batch)):
        u, i = batch[k, 0], batch[k, 1]
        user = load_like(zero, E, u, 0)
        own, item, total = load_like(zero, G, u, 0), load_like(zero, E, i, 0), np.float32(0)
        for t in range(m):
            j = batch[k, 2 + t]
            total += g[k * m + t]
            own = add_scaled(own, -factor[u] * scale[j] * g[k * m + t], load_like(zero, E, j, 0))
            store(G, j, 0, add_scaled(load_like(zero, G, j, 0), -factor[j] * scale[u] * g[k * m + t], user))
        store(G, u, 0, add_scaled(own, factor[u] * scale[i] * total, item))
        store(G, i, 0, add_scaled(load_like(zero, G, i, 0), factor[i] * scale[u] * total, user))


@inlined
def _copy(zero, table, out):
    for r in range(len(table)):
        store(out, r, 0, load_like(zero, table, r, 0))


@inlined
def _touch(batch, flag, touched):
    """List the nodes of some rows in ``touched``, in order; returns how many. ``flag`` is False before and after."""
    for k in range(len(batch)):
        for part in range(batch.shape[1]):
            flag[batch[k, part]] = True
    n = 0
    for r in range(len(flag)):
        touched[n] = r
        n += flag[r]
        flag[r] = False
    return n


@inlined
def _losses(x, total, g):
    """Sum the blocks' parts ``x`` ``[blocks, n]`` of score differences; ``g`` is the mean loss's derivative by them."""
    n = x.shape[1]
    for t in range(n):
        total[t] = x[0, t]
    for b in range(1, len(x)):
        for t in range(n):
            total[t] += x[b, t]
    share, gamma, one = np.float32(1 / n), np.float32(GAMMA), np.float32(1)
    for t in range(n):
        odds = exp(max(min(total[t], np.float32(80)), np.float32(-80)))
        g[t] = -share / (one + odds) * (odds / (odds + gamma * (one + odds)))


@inlined
def _loss(x, squares, reg_weight, squared):
    """RecBole's loss of a batch of score differences ``x``; ``squares`` ``[3]`` as in `_score`."""
    total = 0.0
    for t in range(len(x)):
        total -= np.log(GAMMA + 1 / (1 + np.exp(-np.float64(x[t]))))
    for part in range(3):
        total += reg_weight * (squares[part] / 2 if squared else np.sqrt(squares[part]))
    return total / len(x)


@inlined
def _regularise(batch, squares, reg_weight, squared, reg):
    """Adds the factors of the weights in the gradient of RecBole's ``EmbLoss``."""
    m = batch.shape[1] - 2
    for part in range(2 + m):
        norm = 1.0 if squared else max(np.sqrt(squares[min(part, 2)]), 1e-30)
        factor = reg_weight * (m if part < 2 else 1) / (len(batch) * m * norm)
        for k in range(len(batch)):
            reg[batch[k, part]] += factor


@inlined
def _propagate(zero, own, out, layers, start, neighbour, share, some, everyone):
    """Propagate a table, the last layer to ``some`` rows; returns where the result is, in one of ``out`` or ``own``."""
    now = own
    for layer in range(layers):
        rows = some if layer == layers - 1 else everyone
        _layer(zero, own, now, out[layer % 2], start, neighbour, share, rows)
        now = out[layer % 2]
    return now


@inlined
def _move(zero, W, M, V, S, first, total, scale, factor, reg, several, part, numbers):
    """Steps of torch.optim.Adam with the mean ``part * scale * total`` of their gradients; see the module."""
    b1, rest1, b2, rest2, old, new, correction, eps, decay = numbers
    one = np.float32(1)
    for r in range(len(W)):
        w, m, v = load_like(zero, W, r, 0), load_like(zero, M, r, 0), load_like(zero, V, r, 0)
        mean = (part * scale[r]) * load_like(zero, total, r, 0)
        grad = add_scaled(mean, part * np.float32(reg[r]) + decay, w)
        square = multiply(grad, grad)
        if several:
            deviation = add_scaled(mean, -scale[r], load_like(zero, first, r, 0))
            square = add_scaled(square, one, multiply(deviation, deviation))
        v = add_scaled(b2 * v, rest2, square)
        below = root(correction * v) + eps
        w = w - add_scaled(old * m, new, grad) / below
        m = add_scaled(b1 * m, rest1, grad)
        store(W, r, 0, w)
        store(M, r, 0, m)
        store(V, r, 0, v)
        store(S, r, 0, factor[r] * w)


@inlined
def _adam(steps, rates, hyper):
    """What `_move` takes of Adam, in float32, for steps of some ``rates`` after ``steps`` others."""
    _, beta1, beta2, eps, weight_decay = hyper
    n = len(rates)
    b1, b2 = beta1**n, beta2**n
    old, new = 0.0, 0.0  # weights of the first moment before and of the gradient in the sum of the moves
    for k in range(n):
        rate = rates[k] / (1 - beta1 ** (steps + k + 1))
        old += rate * beta1 ** (k + 1)
        new += rate * (1 - beta1 ** (k + 1))
    return (
        np.float32(b1), np.float32(1 - b1), np.float32(b2), np.float32(1 - b2), np.float32(old), np.float32(new),
        np.float32(1 / (1 - beta2 ** (steps + n))), np.float32(max(eps, 1e-37)), np.float32(weight_decay),
    )  # fmt: skip


@cache
def _train(width):
    """Kernel for an epoch, for the blocks ``begin`` to ``end``; returns the sum of its losses if asked for.

    Tables ``W``, ``M``, ``V``, ``S`` (the weights times ``factor``), ``G`` (zeros), ``first`` are ``[blocks, nodes,
    width]``, ``T`` is ``[blocks, 2, nodes, width]``. ``factor`` ``[nodes]`` is D^-1/2, ``inverse`` D^-1, ``scale``
    D^1/2 over the layers plus one. ``batches`` ``[n, 2 + m]`` are nodes; step s has those from ``bounds[s]`` to
    ``bounds[s + 1]``; steps from ``groups[k]`` to ``groups[k + 1]`` are made at once. ``scores`` ``[2, blocks,
    triples]`` and ``norms`` ``[2, blocks, stride, 3]`` are for the even and the odd ones: a thread can be ahead of the
    others by one.
    """

    @compiled
    def kernel(
        begin, end, progress, W, M, V, S, G, first, T, start, neighbour, scale, factor, inverse, layers,
        batches, bounds, groups, rates, steps, hyper, reg_weight, squared, with_loss, scores, norms,
    ):  # fmt: skip
        blocks, n, m = W.shape[0], W.shape[1], batches.shape[1] - 2
        everyone, touched, flag = np.arange(n), np.empty(n + 1, np.int64), np.zeros(n, np.bool_)
        total, g = np.empty(scores.shape[2], np.float32), np.empty(scores.shape[2], np.float32)
        reg, square, loss, zero = np.empty(n), np.empty(3), 0.0, spread(width, np.float32(0))
        for k in range(len(groups) - 1):
            low, several = groups[k], groups[k + 1] - groups[k]
            origin = bounds[low]
            rows = batches[origin : bounds[low + several]]
            some = touched[: _touch(rows, flag, touched)]
            x, squares = scores[k % 2], norms[k % 2]
            for b in range(begin, end):
                E = _propagate(zero, S[b], T[b], layers, start, neighbour, inverse, some, everyone)
                for s in range(several):
                    for part in range(3):  # not as arrays, for which numba compiles what it would say of their shapes
                        squares[b, s, part] = 0
                    one, last = bounds[low + s] - origin, bounds[low + s + 1] - origin
                    _score(zero, E, W[b], scale, rows[one:last], x[b, one * m : last * m], squares[b, s])
            if end - begin < blocks:
                meet(progress, begin, end, k)
            reg[:] = 0
            for s in range(several):
                one, last = bounds[low + s] - origin, bounds[low + s + 1] - origin
                _losses(x[:, one * m : last * m], total[one * m : last * m], g[one * m : last * m])
                for part in range(3):
                    square[part] = squares[0, s, part]
                    for b in range(1, blocks):
                        square[part] += squares[b, s, part]
                if reg_weight > 0:
                    _regularise(rows[one:last], square, reg_weight, squared, reg)
                if with_loss and begin == 0:
                    loss += _loss(total[one * m : last * m], square, reg_weight, squared)
            numbers, share = _adam(steps, rates[low : low + several], hyper), np.float32(1 / several)
            steps += several
            for b in range(begin, end):
                E = T[b, (layers - 1) % 2] if layers else S[b]
                for s in range(several):
                    one, last = bounds[low + s] - origin, bounds[low + s + 1] - origin
                    _add(zero, E, scale, factor, rows[one:last], g[one * m : last * m], G[b])
                    if s == 0 and several > 1:
                        _copy(zero, G[b], first[b])
                if several > 1:
                    found = _propagate(zero, first[b], T[b], layers, start, neighbour, inverse, everyone, everyone)
                    _copy(zero, found, first[b])
                mean = _propagate(zero, G[b], T[b], layers, start, neighbour, inverse, everyone, everyone)
                _move(zero, W[b], M[b], V[b], S[b], first[b], mean, scale, factor, reg, several > 1, share, numbers)
                for r in some:
                    store(G[b], r, 0, zero)
        return loss

    return kernel


class PropagatedTraining:
    """A model in training.

    Args:
        graph: of the propagation.
        start: initial weights, float32 ``[n_users + n_items, K]``; not changed.
        optimizer: its learning rate is not used.
        loss: as in RecBole.
        n_users: of the nodes; the others are items.
        stride: steps to make at once: two from the ``WARM_UP``-th on, three from twice as many on, up to this.
        threads: at most, of which as many have something to do as there are blocks; default: as many as kernels run on.

    Attributes:
        W, M, V: weights and Adam's moments, float32 ``[n_users + n_items, K]``.
        steps (int): made so far.
    """

    def __init__(
        self,
        graph: Graph,
        start: np.ndarray,
        optimizer: Adam,
        loss: GraphLoss,
        n_users: int,
        stride: int = 1,
        threads: int | None = None,
    ) -> None:
        self.loss, self.n_users, self.stride, self.threads = loss, n_users, stride, threads
        self.W, self.steps = np.array(start, np.float32), 0
        self.M, self.V = np.zeros_like(self.W), np.zeros_like(self.W)
        self._hyper = optimizer.numbers()
        (n, K), root = self.W.shape, graph.root.astype(np.float32)
        scale = np.float32(1 / (loss.layers + 1)) / root
        self._edges = graph.start, graph.neighbour, scale, root, root * root
        width = min(1 << (K - 1).bit_length(), WIDTH)
        blocks = -(-K // width)  # the last one filled up with zeros
        self._tables = [aligned((blocks, n, width)) for _ in range(3)]
        sizes = (n, width), (n, width), (n * (stride > 1), width), (2, n, width)
        self._rooms = [aligned((blocks, *size)) for size in sizes]

    def epoch(self, users: np.ndarray, pos: np.ndarray, epoch: Epoch, with_loss: bool = False) -> float | None:
        """Train on an epoch's batches.

        Args:
            users, pos: ints ``[rows]``.
            epoch: of these rows; an empty batch makes no step.
            with_loss: whether to return the sum of the batches' losses.
        """
        order, negatives = epoch.order, epoch.negatives
        batches = np.empty((len(order), 2 + negatives.shape[1]), np.int32)
        batches[:, 0], batches[:, 1], batches[:, 2:] = users[order], pos[order], negatives[order]
        batches[:, 1:] += self.n_users
        bounds, rates = steps_made(epoch.bounds, epoch.rates)
        groups = [0]
        while groups[-1] < len(rates):
            most = min(self.stride, 1 + (self.steps + groups[-1]) // WARM_UP)
            groups.append(min(groups[-1] + most, len(rates)))
        steps = bounds, np.array(groups), rates, self.steps
        loss = self.loss.layers, batches, *steps, self._hyper, float(self.loss.reg_weight), bool(self.loss.require_pow)
        blocks, most = len(self._tables[0]), int(np.diff(bounds[groups]).max(initial=0)) * negatives.shape[1]
        room = np.empty((2, blocks, most), np.float32), np.empty((2, blocks, self.stride, 3))
        total = self._run(len(groups) - 1, *self._edges, *loss, with_loss, *room)
        self.steps += len(rates)
        return total if with_loss else None

    def _run(self, steps, *epoch):
        """Run the kernel, on the tables brought into blocks of columns and back."""
        for part, block in self._parts():
            block[:] = part
        np.multiply(self._tables[0], self._edges[3][:, None], out=self._rooms[0])
        blocks, kernel = len(self._tables[0]), _train(self._tables[0].shape[2])

        def run(begin, end, progress):
            return kernel(begin, end, progress, *self._tables, *self._rooms, *epoch)

        try:
            return in_step(run, blocks, threads_for(self.threads, blocks), steps)[0]
        finally:
            for part, block in self._parts():
                part[:] = block

    def _parts(self):
        """Columns of weights and moments, and where the kernel has them."""
        width = self._tables[0].shape[2]
        for array, table in zip((self.W, self.M, self.V), self._tables, strict=True):
            for b, block in enumerate(table):
                part = array[:, b * width : (b + 1) * width]
                yield part, block[:, : part.shape[1]]
