"""Curvature operators: symmetric matrices over the flat parameter vector, known by their products.

A curvature is any object with ``size`` (int) and ``matvec(v) -> Tensor`` on flat float64 vectors of that size.
Everything is a sum over triples (not a mean), with explicit weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from recbole_unlearn.influence import kernels

# Of users; fixed, so that sums are the same whatever the number of threads. Fewer where the accumulators over items,
# one a chunk, would be large.
CHUNKS = 16
ACCUMULATOR_BYTES = 32 << 20
BLOCK_TRIPLES = 4_000_000
KEPT_TRIPLES = 16_000_000


class Curvature(Protocol):
    """Symmetric linear operator on flat vectors."""

    size: int

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Product with a float64 vector ``[size]``."""
        ...


class LossCurvature(Curvature, Protocol):
    """Curvature of a loss of embeddings of K numbers, users' and then items'."""

    K: int
    loss: float

    def gradient(self) -> torch.Tensor:
        """Gradient of the loss, float64 ``[size]``."""
        ...

    def diagonal(self) -> torch.Tensor:
        """Diagonal of the Gauss-Newton matrix, float64 ``[size]``."""
        ...


class BlockCurvature(LossCurvature, Protocol):
    """A `LossCurvature` that knows the K x K diagonal blocks of the Gauss-Newton matrix."""

    def blocks(self) -> torch.Tensor:
        """One an embedding row: ``[n_users + n_items, K, K]``."""
        ...


BlockArguments = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Block:
    """Triples of the users ``users`` (slice), grouped as `kernels` wants them; ``rows`` (slice) of all rows."""

    users: slice
    rows: slice
    row_ptr: np.ndarray
    pos: np.ndarray
    neg: np.ndarray
    count: np.ndarray
    dist: np.ndarray

    def arguments(self, chunks: int) -> BlockArguments:
        """What every kernel takes, the users in so many chunks of about as many rows."""
        ends = np.searchsorted(self.row_ptr, np.linspace(0, self.row_ptr[-1], chunks + 1)[1:-1])
        chunk_ptr = np.concatenate([[0], ends, [len(self.count)]])
        return self.row_ptr, self.pos, self.neg, self.count, self.dist, chunk_ptr


class UserTriples:
    """Triples grouped by user: the data that a dot-product curvature is summed over.

    The arrays are only read, a block of users at a time, and may be memory-mapped. Above ``kept_triples`` nothing of
    their size is kept: every pass reads and groups the blocks again, so that memory does not grow with the triples.

    Args:
        users: int array ``[rows]``, non-decreasing.
        pos: positive item of each row, ``[rows]``.
        neg: negatives of each row, ``[rows, m]``; any unsigned integer type that holds all item ids.
        n_users, n_items: sizes of the id spaces.
        weight: weight of each triple of a row, float ``[rows]`` or one number.
        block_triples: size of a block; users are not split.
        kept_triples: up to so many triples, the grouped blocks are kept in memory.
    """

    def __init__(
        self,
        users: np.ndarray,
        pos: np.ndarray,
        neg: np.ndarray,
        n_users: int,
        n_items: int,
        weight: float | np.ndarray = 1.0,
        block_triples: int = BLOCK_TRIPLES,
        kept_triples: int = KEPT_TRIPLES,
    ) -> None:
        self.n_users, self.n_items = n_users, n_items
        self.pos, self.neg = np.asarray(pos), np.asarray(neg)
        self.weight = np.broadcast_to(np.asarray(weight, np.float32), self.pos.shape)
        self.row_ptr = np.searchsorted(np.asarray(users), np.arange(n_users + 1))
        starts = np.arange(0, len(self.pos), max(block_triples // max(self.neg.shape[1], 1), 1))[1:]
        inner = np.unique(np.searchsorted(self.row_ptr, starts))
        self.bounds = [0, *(int(user) for user in inner if 0 < user < n_users), n_users]
        self.kept = len(self) <= kept_triples
        self._blocks = [self._block(b) for b in range(len(self.bounds) - 1)] if self.kept else None

    def __len__(self) -> int:
        return self.neg.size

    def _block(self, b):
        users = slice(self.bounds[b], self.bounds[b + 1])
        ptr = self.row_ptr[users.start : users.stop + 1]
        rows = slice(int(ptr[0]), int(ptr[-1]))
        pos, neg = self.pos[rows].astype(self.neg.dtype), np.array(self.neg[rows], order="C")
        block = Block(
            users,
            rows,
            ptr - ptr[0],
            pos,
            neg,
            np.empty(len(ptr) - 1, np.int64),
            np.empty(pos.size + neg.size, neg.dtype),
        )
        kernels.number_items(CHUNKS, *block.arguments(CHUNKS), self.n_items)
        return block

    def blocks(self) -> Iterable[Block]:
        """The blocks, in order of users."""
        return self._blocks or (self._block(b) for b in range(len(self.bounds) - 1))


class DotProductCurvature:
    """Curvature of ``sum w -log sigmoid(p_u . (q_i - q_j))`` at given embeddings, in closed form.

    The vector is ``[P.ravel(), Q.ravel()]``.

    Args:
        triples: what is summed over.
        P, Q: embeddings, ``[n_users, K]`` and ``[n_items, K]``.
        exact: the Hessian; else its Gauss-Newton part, which is positive semi-definite.
        dtype: of embeddings, scores and what is stored a triple: float32, or float64 for twice the memory traffic.
            Sums are float64 either way.
    """

    def __init__(
        self,
        triples: UserTriples,
        P: np.ndarray,
        Q: np.ndarray,
        exact: bool = False,
        dtype: type[np.floating] = np.float32,
    ) -> None:
        self.triples = triples
        self.P = np.ascontiguousarray(P, dtype)
        self.Q = np.ascontiguousarray(Q, dtype)
        self.K = self.P.shape[1]
        self.exact = exact
        self.size = self.P.size + self.Q.size
        # the two factors of e = v_u . q_k + p_u . v_k, as one inner product of twice the length
        self._VP = np.concatenate([np.zeros_like(self.P), self.P], axis=1)
        self._QV = np.concatenate([self.Q, np.zeros_like(self.Q)], axis=1)
        self._kept = None
        self.loss = 0.0
        linear = []
        for block in triples.blocks():
            loss, h, b = self._linearise(block)
            self.loss += loss
            if triples.kept:
                linear.append((block, h, b))
        if triples.kept:
            self._kept = linear

    def _linearise(self, block: Block):
        h, b = np.empty(block.neg.shape, self.P.dtype), np.empty(len(block.dist), self.P.dtype)
        weight = np.array(self.triples.weight[block.rows])  # writable, or numba compiles the kernel once more
        kernel = kernels.linearise(self.K, self.P.dtype == np.float32)
        loss = np.empty(CHUNKS)
        kernel(CHUNKS, self.P[block.users], self.Q, *block.arguments(CHUNKS), weight, h, b, loss)
        return float(loss.sum()), h, b

    def _parts(self):
        """Each block with its h and b, see `kernels.linearise`."""
        return self._kept or ((block, *self._linearise(block)[1:]) for block in self.triples.blocks())

    def _accumulate(self, kernel, shape, taken):
        """Sum what a kernel adds up, one array ``shape`` a row of P and of Q, over blocks and chunks.

        ``taken(block, arguments, h, b, out_P, out_Q)`` are the kernel's arguments from the embeddings on.
        """
        t = self.triples
        chunks = int(np.clip(ACCUMULATOR_BYTES // (8 * t.n_items * np.prod(shape)), 2, CHUNKS))
        result = np.empty((t.n_users + t.n_items, *shape))
        partial = np.zeros((chunks, t.n_items, *shape))
        for block, h, b in self._parts():
            kernel(chunks, *taken(block, block.arguments(chunks), h, b, result[block.users], partial))
        partial.sum(axis=0, out=result[t.n_users :])
        return result

    def split(self, v: torch.Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The user and item parts of a flat vector, as views ``[n_users, K]`` and ``[n_items, K]``."""
        v = np.asarray(v)
        return v[: self.P.size].reshape(self.P.shape), v[self.P.size :].reshape(self.Q.shape)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self._VP[:, : self.K], self._QV[:, self.K :] = self.split(v)

        def taken(block, arguments, h, b, out_P, out_Q):
            return self._VP[block.users], self._QV, *arguments, h, b, out_P, out_Q

        result = self._accumulate(kernels.curvature_product(self.K, self.exact), (self.K,), taken)
        return torch.from_numpy(result.ravel())

    def gradient(self) -> torch.Tensor:
        """Gradient of the loss, float64 ``[size]``."""

        def taken(block, arguments, h, b, out_P, out_Q):
            return self.P[block.users], self.Q, *arguments, b, out_P, out_Q

        return torch.from_numpy(self._accumulate(kernels.gradient(self.K), (self.K,), taken).ravel())

    def _per_row(self, kernel, shape):
        def taken(block, arguments, h, b, out_P, out_Q):
            return self.P[block.users], self.Q, *arguments, h, out_P, out_Q

        return torch.from_numpy(self._accumulate(kernel, shape, taken))

    def diagonal(self) -> torch.Tensor:
        """Diagonal of the Gauss-Newton matrix, float64 ``[size]``."""
        return self._per_row(kernels.gauss_newton_diagonal(self.K), (self.K,)).view(-1)

    def blocks(self) -> torch.Tensor:
        """K x K diagonal blocks of the Gauss-Newton matrix, one an embedding row: ``[n_users + n_items, K, K]``."""
        return self._per_row(kernels.gauss_newton_blocks(self.K), (self.K, self.K))


class Sum:
    """Sum of `DotProductCurvature` objects over different triples at the same embeddings; like one of them."""

    def __init__(self, parts: Sequence[DotProductCurvature]) -> None:
        self.parts = parts
        self.K, self.size = parts[0].K, parts[0].size
        self.loss: float = sum(part.loss for part in parts)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return _sum(part.matvec(v) for part in self.parts)

    def gradient(self) -> torch.Tensor:
        return _sum(part.gradient() for part in self.parts)

    def diagonal(self) -> torch.Tensor:
        return _sum(part.diagonal() for part in self.parts)

    def blocks(self) -> torch.Tensor:
        return _sum(part.blocks() for part in self.parts)


def _sum(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return sum(terms, torch.zeros((), dtype=torch.float64))


def logistic_curvature(x: torch.Tensor, weight: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Second derivative of ``w -log sigmoid(x)`` by x, without a graph."""
    s = torch.sigmoid(x.detach())
    return weight * s * (1 - s)


class AutogradCurvature:
    """Curvature of any additive loss, by automatic differentiation, on the parameters' device; vectors stay on the CPU.

    Args:
        params: parameters, concatenated in this order into the flat vector; they are not changed.
        batches: list of batches; the matrix is the sum over them.
        loss: ``loss(batch) -> scalar``, a weighted SUM over the batch.
        outputs: ``outputs(batch) -> (x, c)``: outputs of the model that the loss is convex in, and its second
            derivative by each, for the Gauss-Newton matrix ``sum c dx dx^T``; None: the exact Hessian of the loss.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        batches: Iterable[Any],
        loss: Callable[[Any], torch.Tensor],
        outputs: Callable[[Any], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.params = list(params)
        self.batches = batches
        self.loss = loss
        self.outputs = outputs
        self.size = sum(p.numel() for p in self.params)

    def _flat(self, grads):
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(self.params, grads, strict=True)]
        ).to("cpu", torch.float64)

    def _pieces(self, v):
        parts = torch.split(v, [p.numel() for p in self.params])
        return [part.view_as(p).to(p.device, p.dtype) for part, p in zip(parts, self.params, strict=True)]

    def _outputs(self, batch):
        if self.outputs is None:
            raise ValueError("a Gauss-Newton matrix needs outputs")
        return self.outputs(batch)

    def gradient(self) -> torch.Tensor:
        """Gradient of the summed loss, float64 ``[size]``."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for batch in self.batches:
            total += self._flat(torch.autograd.grad(self.loss(batch), self.params, allow_unused=True))
        return total

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        pieces = self._pieces(v)
        total = torch.zeros(self.size, dtype=torch.float64)
        for batch in self.batches:
            product = self._hessian if self.outputs is None else self._gauss_newton
            total += self._flat(product(batch, pieces))
        return total

    def diagonal(self, probes: int = 1) -> torch.Tensor:
        """Unbiased estimate of the diagonal of the Gauss-Newton matrix, float64 ``[size]``; always the same.

        The mean of squared gradients of ``sum +-sqrt(c) x`` with random signs (Hutchinson 1990), batch by batch.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        for batch in self.batches:
            x, c = self._outputs(batch)
            for _ in range(probes):
                signs = (torch.randint(2, c.shape, generator=generator) * 2 - 1).to(c)
                grads = torch.autograd.grad(x, self.params, signs * c.sqrt(), retain_graph=True, allow_unused=True)
                total += self._flat(grads) ** 2
        return total / probes

    def _hessian(self, batch, pieces):
        """Reverse over reverse (Pearlmutter 1994)."""
        grads = torch.autograd.grad(self.loss(batch), self.params, create_graph=True, allow_unused=True)
        along = sum((g * d).sum() for g, d in zip(grads, pieces, strict=True) if g is not None and g.requires_grad)
        if not torch.is_tensor(along):
            return [None] * len(self.params)
        return torch.autograd.grad(along, self.params, allow_unused=True)

    def _gauss_newton(self, batch, pieces):
        """J^T (c * J v); J v by the double backward trick, since forward mode fails on sparse products."""
        x, c = self._outputs(batch)
        probe = torch.zeros_like(x, requires_grad=True)
        back = torch.autograd.grad(x, self.params, probe, create_graph=True, allow_unused=True)
        along = sum((g * d).sum() for g, d in zip(back, pieces, strict=True) if g is not None)
        if not torch.is_tensor(along):
            return [None] * len(self.params)
        (jv,) = torch.autograd.grad(along, probe, retain_graph=True)
        return torch.autograd.grad(x, self.params, c * jv, allow_unused=True)


class Damped:
    """``curvature + diag(d)``; ``d`` a float64 vector ``[size]`` or a number."""

    def __init__(self, curvature: Curvature, d: float | torch.Tensor) -> None:
        self.curvature = curvature
        self.d = d
        self.size = curvature.size

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.curvature.matvec(v) + self.d * v
