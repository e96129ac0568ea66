"""Users split between processes: curvature, inner products and triples of a log that no process reads whole.

Each rank of torch.distributed's group owns a contiguous range of users, with their rows of the log and their
embeddings; all hold all items. A spread vector on a rank is ``[own users' rows, all item rows]``, the item part equal
on all ranks. A product with the curvature then moves the ``n_items * K`` sums over items and nothing of users.
Every rank makes the same decisions, since these depend on sums that all ranks get the same bits of.
"""

import numpy as np
import torch
import torch.distributed as dist

from recbole_unlearn.influence.operators import BlockCurvature
from recbole_unlearn.influence.solver import Space


def user_bounds(users: np.ndarray, n_users: int, size: int) -> np.ndarray:
    """Rank r owns the users ``bounds[r] : bounds[r + 1]``, as near to an equal number of rows as whole users allow.

    Args:
        users: int array ``[rows]``, non-decreasing.
    """
    cuts = [int(users[part * len(users) // size]) if len(users) else 0 for part in range(1, size)]
    return np.array([0, *cuts, n_users])


class Shard(Space):
    """What one rank owns, and the algebra of vectors that are spread over all ranks.

    With one rank it owns everything, and nothing is sent. Methods named after sums are collective: all ranks call them.

    Args:
        users: user of each row of the log, int array ``[rows]``, non-decreasing.
        n_users, n_items, K: sizes.
        rank, size: of torch.distributed's group; its backend must take CPU tensors.

    Attributes:
        users, rows (slice): its users, and their rows.
        bytes_summed (int): bytes that this rank has given into sums so far.
    """

    def __init__(self, users: np.ndarray, n_users: int, n_items: int, K: int, rank: int = 0, size: int = 1) -> None:
        bounds = user_bounds(users, n_users, size)
        self.rank, self.size = rank, size
        self.users = slice(int(bounds[rank]), int(bounds[rank + 1]))
        first, stop = np.searchsorted(users, [self.users.start, self.users.stop])
        self.rows = slice(int(first), int(stop))
        self.n_users, self.n_items, self.K = n_users, n_items, K
        self.n_own = self.users.stop - self.users.start
        self.bytes_summed = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, whose item rows count."""
        return self.rank == 0

    def owned(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows of the log that belong to its users."""
        rows = np.asarray(rows)
        return rows[(rows >= self.rows.start) & (rows < self.rows.stop)]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(x)
            self.bytes_summed += x.numel() * x.element_size()
        return x

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.sum(torch.dot(self.once(a), self.once(b)))

    def norm(self, v: torch.Tensor) -> float:
        return v.norm().item() if self.size == 1 else self.dot(v, v).sqrt().item()

    def once(self, v: torch.Tensor) -> torch.Tensor:
        """The part of a spread vector that counts here, so that every entry counts on one rank."""
        return v if self.leads else v[: self.n_own * self.K]

    def sum_items(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of the item rows of ``x`` ``[own users + items, ...]`` (or flat), in place."""
        self.sum(x.view(self.n_own + self.n_items, -1)[self.n_own :])
        return x

    def together(self, curvature: BlockCurvature) -> BlockCurvature:
        """The curvature of all ranks' triples, from that of this one's."""
        return curvature if self.size == 1 else Summed(curvature, self)

    def take(self, v: float | torch.Tensor) -> float | torch.Tensor:
        """Its part of a whole flat vector ``[(n_users + n_items) K]``; numbers stay as they are."""
        if self.size == 1 or not isinstance(v, torch.Tensor) or v.dim() == 0:
            return v
        rows = v.view(-1, self.K)
        return torch.cat([rows[self.users], rows[self.n_users :]]).view(-1)

    def whole(self, v: torch.Tensor) -> torch.Tensor:
        """The whole of a spread vector, on every rank."""
        if self.size == 1:
            return v
        rows = torch.zeros(self.n_users + self.n_items, self.K, dtype=v.dtype)
        own = v.view(-1, self.K)
        rows[self.users] = own[: self.n_own]
        if self.leads:
            rows[self.n_users :] = own[self.n_own :]
        return self.sum(rows).view(-1)

    def from_leader(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, on every rank, in place."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def merge(self, table: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bring together on rank 0 what the ranks have found of an epoch, ordered by steps, then ranks.

        Args:
            table: int32 ``[n, width]``, ordered by steps.
            start: int64 ``[n_steps + 1]``, where each step begins.

        Returns:
            the same of all ranks; on the others their own.
        """
        if not self.leads:
            self._send(start)
            if start[-1]:
                self._send(table[: start[-1]])
        if self.size == 1 or not self.leads:
            return table, start
        starts, parts = [start], [table[: start[-1]]]
        for rank in range(1, self.size):
            theirs = np.empty_like(start)
            dist.recv(torch.from_numpy(theirs), rank)
            part = np.empty((theirs[-1], table.shape[1]), np.int32)
            if len(part):
                dist.recv(torch.from_numpy(part), rank)
            starts.append(theirs)
            parts.append(part)
        counts = np.diff(starts, axis=1)
        begin = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        merged = np.empty((begin[-1], table.shape[1]), np.int32)
        before = begin[:-1].copy()
        for count, own, part in zip(counts, starts, parts, strict=True):
            merged[np.repeat(before - own[:-1], count) + np.arange(own[-1])] = part
            before += count
        return merged, begin

    def _send(self, array):
        dist.send(torch.from_numpy(array), 0)
        self.bytes_summed += array.nbytes


class Summed:
    """Curvature of the triples of all ranks, each of which holds those of its users; acts on spread vectors.

    Args:
        own: `DotProductCurvature`, or `Sum` of them, over this rank's triples at its users' and all item embeddings.
        shard: whose sums they are.
    """

    def __init__(self, own: BlockCurvature, shard: Shard) -> None:
        self.own, self.shard = own, shard
        self.K, self.size = own.K, own.size
        self.loss = shard.sum(torch.tensor(own.loss, dtype=torch.float64)).item()

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.shard.sum_items(self.own.matvec(v))

    def gradient(self) -> torch.Tensor:
        return self.shard.sum_items(self.own.gradient())

    def diagonal(self) -> torch.Tensor:
        return self.shard.sum_items(self.own.diagonal())

    def blocks(self) -> torch.Tensor:
        return self.shard.sum_items(self.own.blocks())
