"""What retraining would change in the objective: triples that vanish, and triples that come in.

The objective is a sum over weighted triples plus L2,
``L(theta) = sum_t w_t -log sigmoid(x_t) + N (weight_decay / 2) ||theta||^2``, N the number of triples of an epoch:
N times the mean loss that RecBole minimises.
"""

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

    def __len__(self):
        return len(self.users)


def sampled_triples(users, items, negatives):
    """Triples of some rows, averaged over epochs.

    Args:
        users, items: anchors, ``[rows]``.
        negatives: sampled item ids, ``[epochs, rows, m]``.

    Returns:
        Triples: ``epochs * rows * m`` of weight ``1 / epochs``.
    """
    epochs, _, m = negatives.shape
    return Triples(
        np.tile(np.repeat(np.asarray(users, np.int64), m), epochs),
        np.tile(np.repeat(np.asarray(items, np.int64), m), epochs),
        np.asarray(negatives, np.int64).reshape(-1),
        np.full(negatives.size, 1 / epochs),
    )


def pool_return(users, items, forgotten, n_items, negatives, popularity=None):
    """Triples that retraining would draw with a forgotten item as NEGATIVE of its user, in expectation an epoch.

    A forgotten item is no positive of its user any more, so it is back in the user's negative pool. For each
    remaining positive i' of the user, the triple (u, i', forgotten item) then has weight
    ``negatives * p(item) / p(pool)``: ``negatives / pool size`` where sampling is uniform.

    Args:
        users, items: all rows before forgetting, ``[rows]``, grouped by user.
        forgotten: rows to forget, sorted int array.
        n_items: number of item ids, the padding id 0 (never drawn) included.
        negatives: negatives per row and epoch.
        popularity: sampling weight of each item id, ``[n_items]``; None: uniform.
    """
    keep = np.ones(len(users), bool)
    keep[forgotten] = False
    ptr = np.searchsorted(users, np.arange(users[-1] + 2 if len(users) else 1))
    weight = np.ones(n_items) if popularity is None else np.asarray(popularity, np.float64).copy()
    weight[0] = 0
    total = weight.sum()
    parts = []
    for user in np.unique(users[forgotten]):
        rows = slice(ptr[user], ptr[user + 1])
        rest = items[rows][keep[rows]]
        used = np.unique(rest)
        # an item that was recorded twice and forgotten once is still a positive
        returned = np.setdiff1d(items[rows][~keep[rows]], used)
        if len(rest) == 0 or len(returned) == 0:
            continue
        rate = negatives * weight[returned] / (total - weight[used].sum())
        parts.append(
            (
                np.full(len(rest) * len(returned), user, np.int64),
                np.tile(rest.astype(np.int64), len(returned)),
                np.repeat(returned.astype(np.int64), len(rest)),
                np.repeat(rate, len(rest)),
            )
        )
    if not parts:
        empty = np.empty(0, np.int64)
        return Triples(empty, empty, empty, np.empty(0))
    return Triples(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def gradient(triples, P, Q):
    """Gradient of ``sum w -log sigmoid(p_u . (q_i - q_j))``: float64 ``[P.size + Q.size]``."""
    grad_P, grad_Q = np.zeros(P.shape), np.zeros(Q.shape)
    kernels.triple_gradient(P, Q, triples.users, triples.pos, triples.neg, triples.weight, grad_P, grad_Q)
    return np.concatenate([grad_P.ravel(), grad_Q.ravel()])
