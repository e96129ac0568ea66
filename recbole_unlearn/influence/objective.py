"""What retraining would change in the objective: triples that vanish, and triples that come in.

The objective is a sum over weighted triples plus L2,
``L(theta) = sum_t w_t -log sigmoid(x_t) + N (weight_decay / 2) ||theta||^2``, N the number of triples of an epoch:
N times the mean loss that RecBole minimises.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recbole_unlearn.influence import kernels


@dataclass
class Triples:
    """A plain list of weighted triples: int arrays ``users``, ``pos``, ``neg`` and float ``weight``, each ``[n]``."""

    users: np.ndarray
    pos: np.ndarray
    neg: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


def sampled_triples(
    users: np.ndarray | Sequence[int], items: np.ndarray | Sequence[int], negatives: np.ndarray
) -> Triples:
    """Triples of some rows, averaged over epochs.

    Args:
        users, items: anchors, ``[rows]``.
        negatives: sampled item ids, ``[epochs, rows, m]``.

    Returns:
        ``epochs * rows * m`` of weight ``1 / epochs``.
    """
    epochs, _, m = negatives.shape
    return Triples(
        np.tile(np.repeat(np.asarray(users, np.int64), m), epochs),
        np.tile(np.repeat(np.asarray(items, np.int64), m), epochs),
        np.asarray(negatives, np.int64).reshape(-1),
        np.full(negatives.size, 1 / epochs),
    )


def returning(
    users: np.ndarray, items: np.ndarray, gone: np.ndarray, n_items: int, popularity: np.ndarray | None = None
) -> Iterator[tuple[np.integer, np.ndarray, np.ndarray, np.ndarray]]:
    """Forgotten items that come back into the negative pools of their users.

    Args:
        users, items: all rows before forgetting, ``[rows]``, grouped by user.
        gone: which of them are forgotten, bool ``[rows]``.
        n_items: number of item ids, the padding id 0 (never drawn) included.
        popularity: sampling weight of each item id, ``[n_items]``; None: uniform.

    Yields:
        User, rows that the user keeps, items that come back, probability of each in a draw of one negative.
    """
    forgetting = np.unique(users[gone])
    starts, stops = np.searchsorted(users, forgetting), np.searchsorted(users, forgetting, "right")
    weight = np.ones(n_items) if popularity is None else np.asarray(popularity, np.float64).copy()
    weight[0] = 0
    total, used = weight.sum(), np.zeros(n_items, bool)
    for user, start, stop in zip(forgetting, starts, stops, strict=True):
        rows, lost = np.arange(start, stop), gone[start:stop]
        kept = rows[~lost]
        used[:] = False
        used[items[kept]] = True
        back = np.unique(items[rows[lost]])
        # an item that was recorded twice and forgotten once is still a positive
        back = back[~used[back] & (weight[back] > 0)]
        if len(kept) and len(back):
            yield user, kept, back, weight[back] / (total - weight[used].sum())


class Redraw:
    """Replaces negatives by items that came back into their users' pools, each with its probability of being drawn.

    Called with the negatives of an epoch, ``[rows, m]``, and a random generator, it changes and returns them.

    Attributes:
        rows: whose negatives it may change.

    Args:
        others: as for `returning`.
    """

    def __init__(
        self, users: np.ndarray, items: np.ndarray, gone: np.ndarray, n_items: int, popularity: np.ndarray | None = None
    ) -> None:
        returns = list(returning(users, items, gone, n_items, popularity))
        self.rows = np.concatenate([np.empty(0, np.int64), *(kept for _, kept, _, _ in returns)]).astype(np.int64)
        self.owner = np.repeat(np.arange(len(returns)), [len(kept) for _, kept, _, _ in returns])
        self.chance = np.array([share.sum() for _, _, _, share in returns])
        self.back = np.concatenate([np.empty(0, items.dtype), *(back for _, _, back, _ in returns)])
        # one search finds the item of any user: user n's shares, cumulated, lie between n and n + 1
        cumulated = [n + np.cumsum(share) / share.sum() for n, (_, _, _, share) in enumerate(returns)]
        self.cumulated = np.concatenate([np.empty(0), *cumulated])

    def __call__(self, negatives: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(self.rows):
            draws = rng.random((len(self.rows), negatives.shape[1]))
            row, column = np.nonzero(draws < self.chance[self.owner][:, None])
            found = np.searchsorted(self.cumulated, self.owner[row] + rng.random(len(row)), "right")
            negatives[self.rows[row], column] = self.back[np.minimum(found, len(self.back) - 1)]
        return negatives


def pool_return(
    users: np.ndarray,
    items: np.ndarray,
    forgotten: np.ndarray,
    n_items: int,
    negatives: int,
    popularity: np.ndarray | None = None,
) -> Triples:
    """Triples that retraining would draw with a forgotten item as NEGATIVE of its user, in expectation an epoch.

    A forgotten item is no positive of its user any more, so it is back in the user's negative pool. For each
    remaining positive i' of the user, the triple (u, i', forgotten item) then has weight
    ``negatives * p(item) / p(pool)``: ``negatives / pool size`` where sampling is uniform.

    Args:
        forgotten: rows to forget, sorted int array.
        negatives: negatives per row and epoch.
        users, items, n_items, popularity: as for `returning`.
    """
    gone = np.zeros(len(users), bool)
    gone[forgotten] = True
    parts = [
        (
            np.full(len(kept) * len(back), user, np.int64),
            np.tile(items[kept].astype(np.int64), len(back)),
            np.repeat(back.astype(np.int64), len(kept)),
            np.repeat(negatives * share, len(kept)),
        )
        for user, kept, back, share in returning(users, items, gone, n_items, popularity)
    ]
    if not parts:
        empty = np.empty(0, np.int64)
        return Triples(empty, empty, empty, np.empty(0))
    return Triples(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def gradient(triples: Triples, P: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """Gradient of ``sum w -log sigmoid(p_u . (q_i - q_j))``: float64 ``[P.size + Q.size]``."""
    grad_P, grad_Q = np.zeros(P.shape), np.zeros(Q.shape)
    kernels.triple_gradient(P, Q, triples.users, triples.pos, triples.neg, triples.weight, grad_P, grad_Q)
    return np.concatenate([grad_P.ravel(), grad_Q.ravel()])
