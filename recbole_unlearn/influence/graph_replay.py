"""Replay for models that propagate their embeddings over the user-item graph: all of training again, compiled.

Every weight moves with every batch, since the gradient is propagated too; so all rows are run again, from the recorded
start and with the recorded negatives, in two lanes side by side (see `replay`): with the forgotten interactions, and
without them in triples and graph. A step costs two products with the graph, on which torch spends most of an epoch of
LightGCN too, but several times as long.

**Strides.** Up to ``stride`` steps can be made at once, the more the later: their gradients are taken at the same
weights, so that the graph serves all of them, and Adam moves by what it would in ``stride`` steps with their mean
gradient. Its second moment needs each step's own gradient squared, on average: the mean gradient squared plus a
variance, for which the first step's deviation from the mean stands.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import cache

import numba
import numpy as np

from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.replay import Replayed, _Returns
from recbole_unlearn.influence.vectors import FLAGS, add_scaled, dot, exp, load, store

WARM_UP = 10  # steps; Adam's moments, and the weights, change most in the first ones


@cache
def _gradient(K):
    """Kernel ``(E, W, triples, share, reg_weight, squared, G, reg)``: adds a batch's gradient.

    ``triples`` ``[n, 3]`` are nodes; ``share`` is the weight of a triple, one over their number. ``G`` ``[nodes, K]``
    takes the gradient of the loss in the propagated embeddings ``E``, ``reg`` ``[nodes]`` the factors of ``W`` in that
    of RecBole's ``EmbLoss``, squared (``require_pow``) or not.
    """

    @numba.njit(**FLAGS)
    def kernel(E, W, triples, share, reg_weight, squared, G, reg):
        if reg_weight > 0:
            for part in range(3):
                factor = share * reg_weight
                if not squared:
                    norm = 0.0
                    for t in range(len(triples)):
                        row = load(K, W, triples[t, part], 0)
                        norm += dot(row, row)
                    factor /= max(np.sqrt(norm), 1e-30)
                for t in range(len(triples)):
                    reg[triples[t, part]] += factor
        for t in range(len(triples)):
            u, i, j = triples[t, 0], triples[t, 1], triples[t, 2]
            user, item, other = load(K, E, u, 0), load(K, E, i, 0), load(K, E, j, 0)
            g = np.float32(share) / (np.float32(1) + exp(dot(user, item) - dot(user, other)))
            store(G, u, 0, add_scaled(add_scaled(load(K, G, u, 0), -g, item), g, other))
            store(G, i, 0, add_scaled(load(K, G, i, 0), -g, user))
            store(G, j, 0, add_scaled(load(K, G, j, 0), g, user))

    return kernel


@numba.njit(**FLAGS)
def _adam(W, M, V, first, total, reg, step, stride, hyper):
    """``stride`` steps of torch.optim.Adam, the first of them the ``step``-th from 1 on.

    ``total`` is the sum of their gradients and ``first`` the first one, ``reg`` the sum of factors of ``W`` to be added
    to the former.
    """
    lr, beta1, beta2, eps, weight_decay = hyper
    b1, b2 = np.float32(beta1**stride), np.float32(beta2**stride)
    old, new = 0.0, 0.0  # weights of the first moment before and of the gradient in the sum of the moves
    for k in range(stride):
        rate = lr / (1 - beta1 ** (step + k))
        old += rate * beta1 ** (k + 1)
        new += rate * (1 - beta1 ** (k + 1))
    old, new = np.float32(old), np.float32(new)
    correction, small = np.float32(1 / (1 - beta2 ** (step + stride - 1))), np.float32(eps)
    share, decay = np.float32(1 / stride), np.float32(weight_decay)
    for r in range(len(W)):
        pull = share * np.float32(reg[r]) + decay
        for f in range(W.shape[1]):
            mean = share * total[r, f]
            deviation = first[r, f] - mean
            grad = mean + pull * W[r, f]
            second = b2 * V[r, f] + (1 - b2) * (grad * grad + deviation * deviation)
            W[r, f] -= (old * M[r, f] + new * grad) / (np.sqrt(second * correction) + small)
            M[r, f] = b1 * M[r, f] + (1 - b1) * grad
            V[r, f] = second


class _Lane:
    """A model in training: weights ``W`` ``[nodes, K]``, Adam's moments, and a graph."""

    def __init__(self, graph, start, optimizer, reg_weight, require_pow):
        self.graph, self.W = graph, start.copy()
        self.M, self.V = np.zeros_like(start), np.zeros_like(start)
        self.hyper = tuple(float(value) for value in astuple(optimizer))
        self.reg_weight, self.require_pow = float(reg_weight), bool(require_pow)
        self.E, self.G, self.first, self.total = (np.empty_like(start) for _ in range(4))
        self.scaled = np.empty((2, *start.shape), np.float32)
        self.reg = np.empty(len(start))
        self.steps = 0

    def _propagate(self, X, out, parallel):
        self.graph.propagate(X, out, self.scaled, parallel)

    def epoch(self, triples, start, shares, stride, parallel):
        """Train on triples ``[n, 3]`` of nodes in order of steps, which begin at ``start``."""
        batch = _gradient(self.W.shape[1])
        n_steps = len(shares)
        end = 0
        while end < n_steps:
            begin, end = end, min(end + min(stride, 1 + self.steps // WARM_UP), n_steps)
            self._propagate(self.W, self.E, parallel)
            self.G[:], self.reg[:] = 0, 0
            for s in range(begin, end):
                part = triples[start[s] : start[s + 1]]
                batch(self.E, self.W, part, shares[s], self.reg_weight, self.require_pow, self.G, self.reg)
                if s == begin and end - begin > 1:
                    self._propagate(self.G, self.first, parallel)
            self._propagate(self.G, self.total, parallel)
            first = self.first if end - begin > 1 else self.total
            _adam(self.W, self.M, self.V, first, self.total, self.reg, self.steps + 1, end - begin, self.hyper)
            self.steps += end - begin


def replay_graph(
    users, pos, negatives, forgotten, start, n_users, n_items, layers, optimizer, batch_triples, reg_weight=0.0,
    require_pow=False, popularity=None, seed=0, progress=None, absent=None, paired=True, snapshots=(), stride=1,
):  # fmt: skip
    """Train again from the recorded start, with and without some interactions.

    Args:
        users, pos: anchors, int arrays ``[rows]``, grouped by user.
        negatives: sequence of the sampled item ids of each epoch, ``[rows, m]``.
        forgotten: sorted int array of rows.
        start: initial weights, flat ``[P.ravel(), Q.ravel()]``.
        layers (int): of propagation.
        optimizer (Adam): as in training.
        batch_triples (int): triples of a training batch.
        reg_weight, require_pow: of RecBole's ``EmbLoss`` on the weights of a batch.
        popularity: sampling weight of each item id; None: uniform over 1..n_items-1.
        seed (int): of the order of batches and the returned negatives.
        progress (callable, optional): called after each epoch.
        absent (optional): rows that earlier requests took away, bool ``[rows]``; neither lane has them.
        paired (bool): whether to run the lane with the forgotten interactions too. Changes are then the difference
            of the lanes, else undefined, and ``without`` alone is of use.
        snapshots: numbers of epochs after which to keep the changes (or, not paired, the weights).
        stride (int): steps to make at once: two from the ``WARM_UP``-th on, three from twice as many on, up to this.

    Returns:
        Replayed: of all rows.
    """
    users, pos = np.array(users, np.int64), np.array(pos, np.int64)
    n_rows, m = len(users), negatives[0].shape[1]
    present = np.ones(n_rows, bool) if absent is None else ~np.asarray(absent, bool)
    gone = np.zeros(n_rows, bool)
    gone[forgotten] = True
    start = np.array(start, np.float32).reshape(n_users + n_items, -1)
    lanes = []
    for rows in (present, present & ~gone)[0 if paired else 1 :]:
        graph = Graph(users[rows], pos[rows], n_users, n_items, layers)
        lanes.append(_Lane(graph, start, optimizer, reg_weight, require_pow))
    batches = _Batches(users, n_users + pos, gone, np.flatnonzero(present), m, batch_triples)
    returns = _Returns(users[present], pos[present], gone[present], n_items, m, popularity)
    rng = np.random.default_rng(seed)
    kept, total = {}, 0

    def keep(time):
        if time in snapshots or time == len(negatives):
            kept[time] = lanes[-1].W - lanes[0].W if paired else lanes[-1].W.copy()

    keep(0)
    with ThreadPoolExecutor(len(lanes)) as pool:
        for epoch, neg in enumerate(negatives):
            user, positive, item, begin = returns.draw(rng, batches.n_steps)
            back = np.stack([user, n_users + positive, n_users + item], axis=1).astype(np.int32)
            everything, remaining = batches.draw(rng, n_users + np.asarray(neg).astype(np.int32), back, np.diff(begin))
            jobs = [
                pool.submit(lane.epoch, *triples, batches.shares, stride, not paired)
                for lane, triples in zip(lanes, (everything, remaining)[0 if paired else 1 :], strict=True)
            ]
            for job in jobs:
                job.result()
            total += len(remaining[0])
            keep(epoch + 1)
            if progress:
                progress()
    left = np.bincount(users[present & ~gone], minlength=n_users)
    had = np.bincount(users[present], minlength=n_users)
    untrained = np.concatenate([(left == 0) & (had > 0), np.zeros(n_items, bool)])
    change = kept.pop(len(negatives)) if len(negatives) not in snapshots else kept[len(negatives)]
    return Replayed(np.arange(n_users + n_items), change.astype(np.float64), kept, untrained, lanes[-1].W.copy(), total)


class _Batches:
    """Cuts epochs into batches, in an order drawn at random, for both lanes."""

    def __init__(self, users, items, gone, rows, m, batch_triples):
        self.anchors, self.gone, self.rows, self.m = np.stack([users, items], axis=1), gone, rows, m
        per_step = max(batch_triples // m, 1)
        self.n_steps = -(-len(rows) // per_step)
        sizes = np.diff(np.minimum(np.arange(self.n_steps + 1) * per_step, len(rows)))
        self.step = np.repeat(np.arange(self.n_steps), sizes * m)
        self.shares = 1 / (sizes * m)

    def draw(self, rng, neg, back, times):
        """An epoch's triples of each lane, in order of steps, and where each step begins.

        Args:
            neg: nodes of the negatives, ``[all rows, m]``.
            back: returned triples in order of steps, int32 ``[r, 3]``, and ``times`` how many fall in each step.
        """
        order = rng.permutation(self.rows)
        triples = np.empty((len(order), self.m, 3), np.int32)
        triples[:, :, :2] = self.anchors[order, None]
        triples[:, :, 2] = neg[order]
        triples, left = triples.reshape(-1, 3), np.repeat(~self.gone[order], self.m)
        step = np.concatenate([self.step[left], np.repeat(np.arange(self.n_steps), times)])
        by_step = np.argsort(step, kind="stable")
        without = np.concatenate([triples[left], back])[by_step]
        ends = np.arange(self.n_steps + 1)
        return (triples, np.searchsorted(self.step, ends)), (without, np.searchsorted(step[by_step], ends))
