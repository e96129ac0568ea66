"""What retraining would change in the objective: triples that vanish, and triples that come in.

The objective is a sum over weighted triples plus L2,
``L(theta) = sum_t w_t -log sigmoid(x_t) + N (weight_decay / 2) ||theta||^2``, N the number of triples of an epoch:
N times the mean loss that RecBole minimises.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recbole_unlearn.influence import kernels
from recbole_unlearn.influence.recorded import marked


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
    users: np.ndarray, items: np.ndarray, gone: np.ndarray, n_items: int
) -> Iterator[tuple[np.integer, np.ndarray, np.ndarray, float]]:
    """Forgotten items that come back into the negative pools of their users, from which all are as likely.

    Args:
        users, items: all rows before forgetting, ``[rows]``, grouped by user.
        gone: which of them are forgotten, bool ``[rows]``.
        n_items: number of item ids, the padding id 0 (never drawn) included.

    Yields:
        User, rows that the user keeps, items that come back, probability of any of them in a draw of one negative.
    """
    forgetting = np.unique(users[gone])
    starts, stops = np.searchsorted(users, forgetting), np.searchsorted(users, forgetting, "right")
    used = np.zeros(n_items, bool)
    for user, start, stop in zip(forgetting, starts, stops, strict=True):
        rows, lost = np.arange(start, stop), gone[start:stop]
        kept = rows[~lost]
        used[:] = False
        used[items[kept]] = True
        back = np.unique(items[rows[lost]])
        # an item that was recorded twice and forgotten once is still a positive
        back = back[~used[back]]
        if len(kept) and len(back):
            yield user, kept, back, 1 / (n_items - 1 - np.count_nonzero(used))


class Redraw:
    """Changes negatives drawn from the pools of some rows into ones drawn from the pools of fewer, as few as it can.

    An item that its user's rows no longer have comes into the pool; where items are drawn by popularity, their weights
    change too. So a negative of a user was drawn with probability ``p_j = b_j / B`` and must be with ``q_j = a_j / A``
    (b, a: weights before and after; B, A: of the user's pools). It stays with probability ``min(1, q_j / p_j)``, and is
    else drawn in proportion to ``max(q_j - p_j, 0)``: a maximal coupling of the two. Uniform draws only change into
    items that come back.

    Called with the negatives of an epoch, ``[rows, m]``, and a random generator, it changes and returns them.

    Attributes:
        rows: whose negatives it may change.

    Args:
        users, items: all rows before forgetting, ``[rows]``, grouped by user.
        gone: which of them are forgotten, bool ``[rows]``.
        n_items: number of item ids, the padding id 0 (never drawn) included.
        before, after: weights that items are drawn by, ``[n_items]``; None: uniform.
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        gone: np.ndarray,
        n_items: int,
        before: np.ndarray | None = None,
        after: np.ndarray | None = None,
    ) -> None:
        self.n_items, uniform = n_items, np.append(0.0, np.ones(n_items - 1))
        self.before, self.after = (uniform if each is None else np.array(each, np.float64) for each in (before, after))
        self.before[0] = self.after[0] = 0
        pairs = users.astype(np.int64) * n_items + items
        self.had, has = distinct(pairs), distinct(pairs[~gone])
        back = np.setdiff1d(self.had, has, assume_unique=True)
        n_users = int(users[-1]) + 1 if len(users) else 0

        def weight(pairs, weights):
            return np.bincount(pairs // n_items, weights[pairs % n_items], n_users)

        self.back, self.back_ends = back % n_items, np.cumsum(self.after[back % n_items])
        self.first = np.searchsorted(back, np.arange(n_users) * n_items)  # of a user's own in them
        with np.errstate(divide="ignore", invalid="ignore"):
            old, new = (1 / (w.sum() - weight(at, w)) for at, w in ((self.had, self.before), (has, self.after)))
            self.less = self.after / self.before  # nan: never drawn
            self.more = self.before / self.after
        self.old, self.new = old, new  # per unit of weight, of users
        # what a user's negatives change into lies below these two, which are drawn from: all items, the returned ones
        self.least = np.nanmin(self.more, initial=np.inf)
        self.whole, self.ends = np.maximum(new - self.least * old, 0) * self.after.sum(), np.cumsum(self.after)
        self.returned = weight(back, self.after) * new
        alike = np.array_equal(self.before, self.after)
        affected = ~gone & (self.returned[users] > 0) if alike else ~gone
        self.rows = np.flatnonzero(affected)
        self.owner = users[self.rows].astype(np.int64)

    def __call__(self, negatives: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawn = negatives[self.rows]
        stays = self.less[drawn] * (self.new / self.old)[self.owner][:, None]  # with such a probability
        row, column = np.nonzero(stays < 1)
        goes = rng.random(len(row)) >= stays[row, column]
        goes &= (self.whole + self.returned)[self.owner[row]] > 0  # else all that makes a difference is rounding
        row, column = row[goes], column[goes]
        negatives[self.rows[row], column] = self._others(self.owner[row], rng)
        return negatives

    def _others(self, users, rng):
        """An item for each, in proportion to what the new pool has more of."""
        found, open_ = np.zeros(len(users), np.int64), np.arange(len(users))
        while len(open_):
            who, drawn = users[open_], rng.random((3, len(open_)))
            returns = drawn[0] * (self.whole + self.returned)[who] < self.returned[who]
            some = np.searchsorted(self.ends, drawn[1] * self.ends[-1], "right")
            surplus, most = (self.new[who] - each * self.old[who] for each in (self.more[some], self.least))
            taken = returns | (drawn[2] * most < surplus) & ~_among(who * self.n_items + some, self.had)
            start = np.append(0.0, self.back_ends)[self.first[who]]
            own = np.searchsorted(self.back_ends, start + drawn[1] * (self.returned / self.new)[who], "right")
            last = np.append(self.first, len(self.back))[who + 1] - 1
            item = np.where(returns, np.append(self.back, 0)[np.minimum(own, last)], some)
            found[open_[taken]] = item[taken]
            open_ = open_[~taken]
        return found


def distinct(values: np.ndarray) -> np.ndarray:
    """``np.unique`` by a sort: numpy's own hashes since 2.3, which takes ten times as long where most values differ."""
    values = np.sort(values)
    return values[np.concatenate([values[:1] == values[:1], values[1:] != values[:-1]])]


def _among(values, ordered):
    """Which values are in an ordered array."""
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def pool_return(
    users: np.ndarray,
    items: np.ndarray,
    forgotten: np.ndarray,
    n_items: int,
    negatives: int,
) -> Triples:
    """Triples that retraining would draw with a forgotten item as NEGATIVE of its user, in expectation an epoch.

    A forgotten item is no positive of its user any more, so it is back in the user's negative pool. For each
    remaining positive i' of the user, the triple (u, i', forgotten item) then has weight
    ``negatives / pool size``, since sampling is uniform; of negatives by popularity see `coupling.Recounted`.

    Args:
        forgotten: rows to forget, sorted int array.
        negatives: negatives per row and epoch.
        users, items, n_items: as for `returning`.
    """
    gone = marked(len(users), forgotten)
    parts = [
        (
            np.full(len(kept) * len(back), user, np.int64),
            np.tile(items[kept].astype(np.int64), len(back)),
            np.repeat(back.astype(np.int64), len(kept)),
            np.full(len(kept) * len(back), negatives * share),
        )
        for user, kept, back, share in returning(users, items, gone, n_items)
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
