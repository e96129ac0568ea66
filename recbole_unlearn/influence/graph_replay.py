"""Replay for models that propagate their embeddings over the user-item graph: all of training again, compiled.

Every weight moves with every batch, since the gradient is propagated too; so all rows are run again, from the recorded
start, with the recorded negatives, without the forgotten interactions in triples and graph. A step costs two products
with the graph, on which torch spends most of an epoch of LightGCN too, but several times as long.

**Strides.** Up to ``stride`` steps can be made at once, the more the later: their gradients are taken at the same
weights, so that the graph serves all of them, and Adam moves by what it would in ``stride`` steps with their mean
gradient. Its second moment needs each step's own gradient squared, on average: the mean gradient squared plus a
variance, for which the first step's deviation from the mean stands.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np

from recbole_unlearn.influence.objective import Redraw
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.recorded import Adam, Recorded
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


class _Training:
    """A model in training: weights ``W`` ``[nodes, K]``, Adam's moments, and a graph."""

    def __init__(self, graph: Graph, start: np.ndarray, optimizer: Adam, loss: GraphLoss) -> None:
        self.graph, self.W = graph, start.copy()
        self.M, self.V = np.zeros_like(start), np.zeros_like(start)
        self.hyper = optimizer.numbers()
        self.reg_weight, self.require_pow = float(loss.reg_weight), bool(loss.require_pow)
        self.E, self.G, self.first, self.total = (np.empty_like(start) for _ in range(4))
        self.scaled = np.empty((2, *start.shape), np.float32)
        self.reg = np.empty(len(start))
        self.steps = 0

    def _propagate(self, X, out):
        self.graph.propagate(X, out, self.scaled)

    def epoch(self, triples: np.ndarray, start: np.ndarray, stride: int) -> None:
        """Train on triples ``[n, 3]`` of nodes; steps begin and end at ``start`` ``[steps + 1]``."""
        batch = _gradient(self.W.shape[1])
        n_steps = len(start) - 1
        end = 0
        while end < n_steps:
            begin, end = end, min(end + min(stride, 1 + self.steps // WARM_UP), n_steps)
            self._propagate(self.W, self.E)
            self.G[:], self.reg[:] = 0, 0
            for s in range(begin, end):
                part = triples[start[s] : start[s + 1]]
                batch(self.E, self.W, part, 1 / len(part), self.reg_weight, self.require_pow, self.G, self.reg)
                if s == begin and end - begin > 1:
                    self._propagate(self.G, self.first)
            self._propagate(self.G, self.total)
            first = self.first if end - begin > 1 else self.total
            _adam(self.W, self.M, self.V, first, self.total, self.reg, self.steps + 1, end - begin, self.hyper)
            self.steps += end - begin


@dataclass
class Retrained:
    """Result of a replay.

    Attributes:
        weights: ``[n_users + n_items, K]``, float32; users without any triple have their initial ones.
        snapshots: number of epochs -> weights after them.
        triples: that were run through, summed over epochs.
    """

    weights: np.ndarray
    snapshots: dict[int, np.ndarray]
    triples: int


def replay_graph(
    recorded: Recorded,
    start: np.ndarray,
    forgotten: np.ndarray,
    loss: GraphLoss,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
    snapshots: Container[int] = (),
    stride: int = 1,
) -> Retrained:
    """Train again from the recorded start, without some interactions.

    Args:
        recorded: the training; its absent rows count as forgotten. Batches are drawn anew, at the optimiser's rate.
        start: initial weights, flat ``[P.ravel(), Q.ravel()]``.
        forgotten: sorted ints, rows.
        loss: as in training.
        seed: of the order of batches and the returned negatives.
        progress: called after each epoch.
        snapshots: numbers of epochs after which to keep the weights.
        stride: steps to make at once: two from the ``WARM_UP``-th on, three from twice as many on, up to this.
    """
    users, pos, m, gone = np.asarray(recorded.users), np.asarray(recorded.pos), recorded.m, ~recorded.present()
    gone[forgotten] = True
    n_users, n_items, rng = recorded.n_users, recorded.n_items, np.random.default_rng(seed)
    redraw = Redraw(users, pos, gone, n_items, recorded.popularity, rng)
    users, pos = users[~gone].astype(np.int64), pos[~gone].astype(np.int64)
    graph = Graph(users, pos, n_users, n_items, loss.layers)
    start = np.array(start, np.float32).reshape(n_users + n_items, -1)
    training = _Training(graph, start, recorded.optimizer, loss)
    per_step = max(recorded.batch_triples // m, 1)
    begin = m * np.append(np.arange(0, len(users), per_step), len(users))
    kept = {0: start} if 0 in snapshots else {}
    for epoch, neg in enumerate(recorded.negatives, 1):
        neg = redraw(np.asarray(neg)[~gone])
        order = rng.permutation(len(users))
        triples = np.empty((len(users), m, 3), np.int32)
        triples[:, :, 0] = users[order, None]
        triples[:, :, 1] = n_users + pos[order, None]
        triples[:, :, 2] = n_users + neg[order].astype(np.int32)
        training.epoch(triples.reshape(-1, 3), begin, stride)
        if epoch in snapshots:
            kept[epoch] = training.W.copy()
        if progress:
            progress()
    return Retrained(training.W, kept, len(users) * m * len(recorded.negatives))
