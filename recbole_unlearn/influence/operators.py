"""Curvature operators: symmetric matrices over the flat parameter vector, known by their products.

A curvature is any object with ``size`` (int) and ``matvec(v) -> Tensor`` on flat float64 vectors of that size.
Everything is a sum over triples (not a mean), with explicit weights.
"""

from typing import Protocol

import numpy as np
import torch

from recbole_unlearn.influence import kernels

CHUNKS = 16  # of users; fixed, so that sums are the same whatever the number of threads


class Curvature(Protocol):
    """Symmetric linear operator on flat vectors."""

    size: int

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Product with a float64 vector ``[size]``."""
        ...


class UserTriples:
    """Triples grouped by user: the data that a dot-product curvature is summed over.

    Args:
        users: int array ``[rows]``, non-decreasing.
        pos: positive item of each row, ``[rows]``.
        neg: negatives of each row, ``[rows, m]``; any unsigned integer type.
        n_users, n_items: sizes of the id spaces.
        weight: weight of each triple of a row, float ``[rows]`` or one number.
    """

    def __init__(self, users, pos, neg, n_users, n_items, weight=1.0):
        users = np.asarray(users)
        self.n_users, self.n_items = n_users, n_items
        self.pos, self.neg = np.ascontiguousarray(pos), np.ascontiguousarray(neg)
        self.weight = np.array(np.broadcast_to(np.float32(weight), self.pos.shape))  # a copy: writable, one kernel
        self.row_ptr = np.searchsorted(users, np.arange(n_users + 1))
        self.chunk_ptr = np.searchsorted(self.row_ptr, np.linspace(0, len(users), CHUNKS + 1)[1:-1], side="left")
        self.chunk_ptr = np.concatenate([[0], self.chunk_ptr, [n_users]])
        self.dist_ptr = np.zeros(n_users + 1, np.int64)
        empty = np.empty(0, np.int32)
        args = (self.row_ptr, self.pos, self.neg, self.chunk_ptr, n_items, self.dist_ptr)
        kernels.distinct_items(*args, empty)
        np.cumsum(self.dist_ptr, out=self.dist_ptr)
        self.dist = np.empty(self.dist_ptr[-1], np.int32)
        if len(self.dist):
            kernels.distinct_items(*args, self.dist)

    def __len__(self):
        return self.neg.size

    def grouping(self):
        """Arguments that every kernel takes."""
        return self.row_ptr, self.pos, self.neg


class DotProductCurvature:
    """Curvature of ``sum w -log sigmoid(p_u . (q_i - q_j))`` at given embeddings, in closed form.

    The vector is ``[P.ravel(), Q.ravel()]``.

    Args:
        triples (UserTriples): what is summed over.
        P, Q: embeddings, ``[n_users, K]`` and ``[n_items, K]``.
        exact (bool): the Hessian; else its Gauss-Newton part, which is positive semi-definite.
        dtype: of embeddings, scores and what is stored a triple: float32, or float64 for twice the memory traffic.
            Sums are float64 either way.
    """

    def __init__(self, triples, P, Q, exact=False, dtype=np.float32):
        self.triples = triples
        self.P = np.ascontiguousarray(P, dtype)
        self.Q = np.ascontiguousarray(Q, dtype)
        self.K = self.P.shape[1]
        self.exact = exact
        self.size = self.P.size + self.Q.size
        t = triples
        self.h = np.empty(t.neg.shape, dtype)
        self.a = np.empty(len(t.dist), dtype)
        self.b = np.empty(len(t.dist), dtype)
        self.loss = kernels.linearise(self.K)(
            self.P, self.Q, *t.grouping(), t.weight, t.dist_ptr, t.dist, t.chunk_ptr, t.n_items, self.h, self.a, self.b
        )
        self._out_Q = np.empty((len(t.chunk_ptr) - 1, t.n_items, self.K))
        self._QV = np.empty((t.n_items, 2 * self.K), dtype)
        self._QV[:, : self.K] = self.Q

    def split(self, v):
        """The user and item parts of a flat vector, as views ``[n_users, K]`` and ``[n_items, K]``."""
        v = np.asarray(v)
        return v[: self.P.size].reshape(self.P.shape), v[self.P.size :].reshape(self.Q.shape)

    def matvec(self, v):
        t = self.triples
        VP, VQ = self.split(v)
        self._QV[:, self.K :] = VQ
        result = np.empty(self.size)
        out_P, out_Q = self.split(result)
        kernels.curvature_product(self.K, self.exact)(
            self.P, VP.astype(self.P.dtype), self._QV, *t.grouping(), self.h, t.dist_ptr, t.dist, self.b,
            t.chunk_ptr, t.n_items, out_P, self._out_Q,
        )  # fmt: skip
        self._out_Q.sum(axis=0, out=out_Q)
        return torch.from_numpy(result)

    def gradient(self):
        """Gradient of the loss, float64 ``[size]``."""
        t = self.triples
        result = np.empty(self.size)
        out_P, out_Q = self.split(result)
        kernels.gradient(self.K)(self.P, self.Q, t.dist_ptr, t.dist, self.b, t.chunk_ptr, out_P, self._out_Q)
        self._out_Q.sum(axis=0, out=out_Q)
        return torch.from_numpy(result)

    def _per_row(self, kernel, shape):
        t = self.triples
        P_part = np.zeros((t.n_users, *shape))
        Q_part = np.zeros((len(t.chunk_ptr) - 1, t.n_items, *shape))
        kernel(
            self.P, self.Q, *t.grouping(), self.h, t.dist_ptr, t.dist, self.a, t.chunk_ptr, t.n_items, P_part, Q_part
        )
        return np.concatenate([P_part, Q_part.sum(axis=0)])

    def diagonal(self):
        """Diagonal of the Gauss-Newton matrix, float64 ``[size]``."""
        return torch.from_numpy(self._per_row(kernels.gauss_newton_diagonal(self.K), (self.K,)).ravel())

    def blocks(self):
        """K x K diagonal blocks of the Gauss-Newton matrix, one an embedding row: ``[n_users + n_items, K, K]``."""
        lower = torch.from_numpy(self._per_row(kernels.gauss_newton_blocks(self.K), (self.K, self.K)))
        return lower.tril() + lower.tril(-1).mT


class Sum:
    """Sum of `DotProductCurvature` objects over different triples at the same embeddings; like one of them."""

    def __init__(self, parts):
        self.parts = parts
        self.K, self.size = parts[0].K, parts[0].size
        self.loss = sum(part.loss for part in parts)

    def matvec(self, v):
        return sum(part.matvec(v) for part in self.parts)

    def gradient(self):
        return sum(part.gradient() for part in self.parts)

    def diagonal(self):
        return sum(part.diagonal() for part in self.parts)

    def blocks(self):
        return sum(part.blocks() for part in self.parts)


class AutogradCurvature:
    """Curvature of any additive loss, by automatic differentiation.

    Args:
        params (list of Tensor): parameters, concatenated in this order into the flat vector; they are not changed.
        batches: list of batches; the matrix is the sum over them.
        loss: ``loss(batch) -> scalar``, a weighted SUM over the batch, for the exact Hessian.
        margins: ``margins(batch) -> (x, w)`` with ``loss = sum w -log sigmoid(x)``, for the Gauss-Newton matrix
            ``sum w h(x) dx dx^T``. Give one of the two.
    """

    def __init__(self, params, batches, loss=None, margins=None):
        if (loss is None) == (margins is None):
            raise ValueError("give either loss (exact Hessian) or margins (Gauss-Newton)")
        self.params = list(params)
        self.batches = batches
        self.loss = loss
        self.margins = margins
        self.size = sum(p.numel() for p in self.params)

    def _flat(self, grads):
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(self.params, grads, strict=True)]
        ).double()

    def _pieces(self, v):
        parts = torch.split(v, [p.numel() for p in self.params])
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.params, strict=True)]

    def gradient(self):
        """Gradient of the summed loss, float64 ``[size]``."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for batch in self.batches:
            if self.loss is not None:
                value = self.loss(batch)
            else:
                x, w = self.margins(batch)
                value = -(w * torch.nn.functional.logsigmoid(x)).sum()
            total += self._flat(torch.autograd.grad(value, self.params, allow_unused=True))
        return total

    def matvec(self, v):
        pieces = self._pieces(v)
        total = torch.zeros(self.size, dtype=torch.float64)
        for batch in self.batches:
            product = self._hessian if self.loss is not None else self._gauss_newton
            total += self._flat(product(batch, pieces))
        return total

    def _hessian(self, batch, pieces):
        """Reverse over reverse (Pearlmutter 1994)."""
        grads = torch.autograd.grad(self.loss(batch), self.params, create_graph=True, allow_unused=True)
        along = sum((g * d).sum() for g, d in zip(grads, pieces, strict=True) if g is not None and g.requires_grad)
        if not torch.is_tensor(along):
            return [None] * len(self.params)
        return torch.autograd.grad(along, self.params, allow_unused=True)

    def _gauss_newton(self, batch, pieces):
        """J^T (w h * J v); J v by the double backward trick, since forward mode fails on sparse products."""
        x, w = self.margins(batch)
        probe = torch.zeros_like(x, requires_grad=True)
        back = torch.autograd.grad(x, self.params, probe, create_graph=True, allow_unused=True)
        along = sum((g * d).sum() for g, d in zip(back, pieces, strict=True) if g is not None)
        (jv,) = torch.autograd.grad(along, probe, retain_graph=True)
        s = torch.sigmoid(-x.detach())
        return torch.autograd.grad(x, self.params, w * s * (1 - s) * jv, allow_unused=True)


class Damped:
    """``curvature + diag(d)``; ``d`` a float64 vector ``[size]`` or a number."""

    def __init__(self, curvature, d):
        self.curvature = curvature
        self.d = d
        self.size = curvature.size

    def matvec(self, v):
        return self.curvature.matvec(v) + self.d * v
