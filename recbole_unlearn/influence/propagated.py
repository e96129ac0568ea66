"""Models that propagate their embeddings over the user-item graph, like LightGCN, in closed form.

The embeddings that score are ``E = A_bar E0``: E0 the weights, ``A_bar`` the mean of the powers 0..L of the normalised
adjacency ``A = D^-1/2 B D^-1/2`` (He et al. 2020). Since E is linear in E0, gradient and curvature in E0 are those of
the dot-product model in E, between two products with the symmetric ``A_bar``: ``A_bar g`` and ``A_bar C A_bar``. A
product with a vector takes 2 L passes over the edges, once for all triples.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch

from recbole_unlearn.influence.objective import distinct
from recbole_unlearn.influence.operators import DotProductCurvature
from recbole_unlearn.influence.threads import parallel
from recbole_unlearn.influence.vectors import add_scaled, load, store

EPSILON = 1e-7  # RecBole adds it to every degree
PROBES = 16  # of the diagonal's estimate, whose error is then some 35 %: it only preconditions


@cache
def _layer(K):
    """Kernel ``(nodes, start, neighbour, root, X, now, then, out)``: ``out = X + A Y``.

    ``root`` ``[n]`` is D^-1/2, ``now`` is ``root`` times Y, and ``then`` becomes ``root`` times the result.
    """

    @parallel
    def kernel(begin, end, start, neighbour, root, X, now, then, out):
        for r in range(begin, end):
            total = load(K, X, r, 0)
            for e in range(start[r], start[r + 1]):
                total = add_scaled(total, root[r], load(K, now, neighbour[e], 0))
            store(out, r, 0, total)
            for f in range(K):
                then[r, f] = root[r] * out[r, f]

    return kernel


class Graph:
    """The user-item graph of some interactions, as a propagation.

    Nodes are users, then items. It has the layout of the flat vector ``[P.ravel(), Q.ravel()]``.

    Args:
        users, items: int arrays ``[interactions]``; a pair that occurs twice is one edge.
        n_users, n_items: sizes of the id spaces.
        layers: L.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, layers: int) -> None:
        pairs = distinct(np.asarray(users, np.int64) * n_items + np.asarray(items, np.int64))
        users, items = pairs // n_items, n_users + pairs % n_items
        ends, others = np.concatenate([users, items]), np.concatenate([items, users])
        order = np.argsort(ends, kind="stable")
        self.n_users, self.n_items, self.layers = n_users, n_items, layers
        self.size = n_users + n_items
        kind = np.uint16 if self.size <= 1 << 16 else np.int32  # read for every edge of every product
        self.neighbour = others[order].astype(kind)
        degree = np.bincount(ends, minlength=self.size)
        self.start = np.concatenate([[0], np.cumsum(degree)])
        self.root = (degree + EPSILON) ** -0.5

    def propagate(self, X: np.ndarray, out: np.ndarray | None = None, scaled: np.ndarray | None = None) -> np.ndarray:
        """``A_bar X``.

        Args:
            X: float32 or float64 ``[n_users + n_items, K]``, C-contiguous.
            out, scaled: room for the result, and for ``[2, *X.shape]``.
        """
        result = np.empty_like(X) if out is None else out
        scaled = np.empty((2, *X.shape), X.dtype) if scaled is None else scaled
        root, layer = self.root.astype(X.dtype), _layer(X.shape[1])
        np.multiply(root[:, None], X, out=scaled[0])
        for n in range(self.layers):
            layer(self.size, self.start, self.neighbour, root, X, scaled[n % 2], scaled[1 - n % 2], result)
        if not self.layers:
            np.copyto(result, X)
        result *= X.dtype.type(1 / (self.layers + 1))
        return result


class PropagatedCurvature:
    """Curvature of a dot-product loss at propagated embeddings, with respect to the embeddings that are propagated.

    Since those are linear in these, ``A_bar C A_bar`` is the Hessian where C is, and Gauss-Newton where C is.

    Args:
        graph: of the propagation.
        curvature: C, at ``graph.propagate`` of the parameters.
    """

    def __init__(self, graph: Graph, curvature: DotProductCurvature) -> None:
        self.graph, self.inner = graph, curvature
        self.K, self.size = curvature.K, curvature.size
        self.loss, self.triples, self.split = curvature.loss, curvature.triples, curvature.split
        self._one, self._two = np.empty((graph.size, self.K)), np.empty((graph.size, self.K))
        self._scaled = np.empty((2, graph.size, self.K))

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self.graph.propagate(np.asarray(v).reshape(self._one.shape), self._one, self._scaled)
        product = self.inner.matvec(torch.from_numpy(self._one.reshape(-1))).numpy().reshape(self._two.shape)
        self.graph.propagate(product, self._two, self._scaled)
        return torch.from_numpy(self._two.ravel().copy())

    def gradient(self) -> torch.Tensor:
        """Gradient of the loss, float64 ``[size]``."""
        inner = self.inner.gradient().numpy().reshape(self._two.shape)
        return torch.from_numpy(self.graph.propagate(inner, None, self._scaled).ravel())

    def diagonal(self, seed: int = 0) -> torch.Tensor:
        """Estimate of the diagonal of ``A_bar diag(C) A_bar``, C's Gauss-Newton part; positive, float64 ``[size]``.

        ``sum_j A_bar_ij^2 C_jj`` is the mean of ``(A_bar sqrt(C) e)_i^2`` over random signs e (Hutchinson 1990).
        """
        root = np.sqrt(self.inner.diagonal().numpy().reshape(self._one.shape))
        rng = np.random.default_rng(seed)
        total = np.zeros_like(root)
        for _ in range(PROBES):
            signs = rng.integers(0, 2, root.shape) * 2.0 - 1
            total += self.graph.propagate(root * signs, self._one, self._scaled) ** 2
        return torch.from_numpy(total.ravel() / PROBES)


def batch_norms(W: np.ndarray, nodes: Iterable[np.ndarray], batch: int) -> np.ndarray:
    """Norm of the embeddings of a batch, ``sqrt(batch mean ||w||^2)``: float64, one of each array of ``nodes``.

    Args:
        W: embeddings, ``[nodes, K]``.
        nodes: int arrays ``[triples]``, of all triples that batches are drawn from: rows of ``W``.
        batch: triples of a batch.
    """
    squares = np.einsum("nk,nk->n", W, W, dtype=np.float64)
    counts = (np.bincount(rows, minlength=len(W)).astype(np.float64) for rows in nodes)
    return np.array([np.sqrt(batch * (count @ squares) / count.sum()) for count in counts])


def embedding_l2(
    size: int, nodes: Iterable[np.ndarray], weight: np.ndarray, reg_weight: float, norms: Sequence[float] | np.ndarray
) -> np.ndarray:
    """RecBole's ``EmbLoss`` over triples, as factors of the embeddings in its gradient: float64 ``[size]``.

    In the scaling of a sum over triples. Squared (``require_pow``) it is a sum over triples itself, and the factors are
    exact. Else it is the norm of a batch's embeddings, of users, positives and negatives each, which is not: it is then
    taken at its mean over batches of a random order (`batch_norms`), whichever triples of theirs are asked for.

    Args:
        size: number of embeddings.
        nodes: three int arrays ``[triples]``: users, positives, negatives, as numbers of embeddings.
        weight: of each triple, ``[triples]``.
        reg_weight: of the loss.
        norms: of a batch's embeddings, of users, positives and negatives; squared: 1.
    """
    total = np.zeros(size)
    for rows, norm in zip(nodes, norms, strict=True):
        total += reg_weight * np.bincount(rows, weight, size) / norm
    return total
