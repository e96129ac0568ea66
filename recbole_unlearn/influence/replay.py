"""Paired replay: unrolled influence, restricted to the embedding rows that a forget set touches, not linearised.

An influence function linearises around the final weights. A model that was stopped early is no optimum, so what
its weights owe to a triple was paid in during all of training, most of it early, when gradients were large. Given
the triple log (what was trained on) and the trajectory (snapshots of the weights), the optimiser can be run again
for the touched rows alone (the forgotten interactions' users and items), with every other row held on
its recorded path. It is run twice side by side, in the same order: with the forgotten triples, and without them
but with the forgotten items back in their users' negative pools. The difference is the step; what the two have in
common (the order of batches, which the log does not keep) cancels.
"""

from dataclasses import dataclass
from functools import cache

import numba
import numpy as np

from recbole_unlearn.influence.kernels import FLAGS

CHUNKS = 16


@dataclass
class Adam:
    """Hyperparameters of the optimiser to run again, as torch.optim.Adam names them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@numba.njit(inline="always")
def _mix(x):
    """splitmix64: a random 64-bit number from a counter, so that draws need no state and no order."""
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(**{**FLAGS, "parallel": True})
def _select(active, item_slot, neg, chunks, counts, base, row_out, column_out):
    """Triples of an epoch that touch an active row: those of active anchors, and those with an active negative.

    Called twice: with empty outputs it fills ``counts`` (one a chunk), then it writes (row, column) from ``base``.
    """
    fill = len(row_out) > 0
    for c in numba.prange(len(chunks) - 1):
        n = 0
        at = base[c]
        for r in range(chunks[c], chunks[c + 1]):
            for t in range(neg.shape[1]):
                if active[r] or item_slot[neg[r, t]] >= 0:
                    if fill:
                        row_out[at + n] = r
                        column_out[at + n] = t
                    n += 1
        counts[c] = n


@numba.njit(**FLAGS)
def _by_step(rows, columns, neg, users, pos, forgotten, n_steps, seed, start, u, i, j, gone):
    """Assign each row to a random step and write the triples in order of steps; ``start`` is ``[n_steps + 1]``."""
    step = np.empty(len(rows), np.int32)
    start[:] = 0
    for k in range(len(rows)):
        s = np.int32(_mix(np.uint64(seed) ^ (np.uint64(rows[k]) << np.uint64(20))) % np.uint64(n_steps))
        step[k] = s
        start[s + 1] += 1
    for s in range(n_steps):
        start[s + 1] += start[s]
    next_free = start[:-1].copy()
    for k in range(len(rows)):
        at = next_free[step[k]]
        next_free[step[k]] += 1
        r = rows[k]
        u[at] = users[r]
        i[at] = pos[r]
        j[at] = neg[r, columns[k]]
        gone[at] = forgotten[r]


@cache
def _replay_epoch(K):
    """Kernel for one epoch of both lanes: lane 0 with the forgotten triples, lane 1 without them, with the returns.

    ``W`` ``[2, n_users + n_items, K]`` holds each lane's weights; only rows in ``rows`` are updated. ``slot`` maps a
    weight row to its place in ``rows``, or -1.
    """

    @numba.njit(**{**FLAGS, "parallel": True})
    def kernel(W, slot, rows, n_users, u, i, j, gone, start, xu, xi, xj, x_start, M, V, t0, scale, hyper):
        lr, b1, b2, eps, decay = hyper
        n_steps = len(start) - 1
        for lane in numba.prange(2):
            w = W[lane]
            G = np.zeros((len(rows), K), np.float32)
            for s in range(n_steps):
                end = start[s + 1]
                extra = x_start[s + 1] - x_start[s] if lane == 1 else 0
                for k in range(start[s], end + extra):
                    if k < end:
                        if lane == 1 and gone[k]:
                            continue
                        a, b, c = u[k], n_users + i[k], n_users + j[k]
                    else:
                        e = x_start[s] + k - end
                        a, b, c = xu[e], n_users + xi[e], n_users + xj[e]
                    x = np.float32(0)
                    for f in range(K):
                        x += w[a, f] * (w[b, f] - w[c, f])
                    g = np.float32(scale / (1.0 + np.exp(x)))
                    la, lb, lc = slot[a], slot[b], slot[c]
                    if la >= 0:
                        for f in range(K):
                            G[la, f] -= g * (w[b, f] - w[c, f])
                    if lb >= 0:
                        for f in range(K):
                            G[lb, f] -= g * w[a, f]
                    if lc >= 0:
                        for f in range(K):
                            G[lc, f] += g * w[a, f]
                step = t0 + s + 1
                c1 = np.float32(lr / (1 - b1**step))
                c2 = np.float32(1 / (1 - b2**step))
                for r in range(len(rows)):
                    a = rows[r]
                    for f in range(K):
                        g = G[r, f] + decay * w[a, f]
                        m = b1 * M[lane, r, f] + (np.float32(1) - b1) * g
                        v = b2 * V[lane, r, f] + (np.float32(1) - b2) * g * g
                        M[lane, r, f] = m
                        V[lane, r, f] = v
                        w[a, f] -= c1 * m / (np.sqrt(v * c2) + eps)
                        G[r, f] = 0

    return kernel


class Trajectory:
    """Weights over the course of training, interpolated between snapshots.

    Args:
        epochs: increasing ints, the first 0 (initialisation), the last the number of epochs trained.
        weights: list of flat arrays ``[size]`` of any float type, one an epoch named.
    """

    def __init__(self, epochs, weights):
        if len(epochs) < 2 or epochs[0] != 0 or list(epochs) != sorted(set(epochs)):
            raise ValueError("a trajectory needs snapshots in order, of the initialisation and of the end at least")
        self.epochs = list(epochs)
        self.weights = weights

    def at(self, time):
        """Weights at a time in epochs: float32 ``[size]``."""
        k = int(np.clip(np.searchsorted(self.epochs, time, "right"), 1, len(self.epochs) - 1))
        low, high = self.epochs[k - 1], self.epochs[k]
        part = np.float32((time - low) / (high - low))
        a = np.asarray(self.weights[k - 1], np.float32)
        return a + part * (np.asarray(self.weights[k], np.float32) - a)


@dataclass
class Replayed:
    """Result of a replay.

    Attributes:
        rows: weight rows that were replayed (users first, then ``n_users +`` item), sorted int array.
        change: final difference of the lanes on those rows, float64 ``[rows, K]``.
        snapshots (dict): epoch of the trajectory -> difference at that time, float32 ``[rows, K]``.
        untrained: which of ``rows`` have no triple left, bool; their weights in the second lane are the initialisation.
        without: final weights of the second lane on ``rows``, float32.
        triples (int): triples that were run through, summed over epochs.
    """

    rows: np.ndarray
    change: np.ndarray
    snapshots: dict
    untrained: np.ndarray
    without: np.ndarray
    triples: int


def replay(
    users, pos, negatives, forgotten, trajectory, n_users, n_items, optimizer, batch_triples,
    popularity=None, seed=0, progress=None,
):  # fmt: skip
    """Run the optimiser again for the rows that some interactions touch, with and without these interactions.

    Args:
        users, pos: anchors, int arrays ``[rows]``, grouped by user.
        negatives: sequence of the sampled item ids of each epoch, ``[rows, m]`` unsigned.
        forgotten: sorted int array of rows.
        trajectory (Trajectory): over the same epochs; flat weights are ``[P.ravel(), Q.ravel()]``.
        optimizer (Adam): as in training.
        batch_triples (int): triples of a training batch.
        popularity: sampling weight of each item id; None: uniform over 1..n_items-1.
        seed (int): of the order of batches and the returned negatives.
        progress (callable, optional): called after each epoch.

    Returns:
        Replayed
    """
    users, pos = np.array(users, np.int32), np.array(pos, np.int32)
    n_rows, m = len(users), negatives[0].shape[1]
    K = len(trajectory.weights[0]) // (n_users + n_items)
    n_steps = -(-n_rows * m // batch_triples)
    gone = np.zeros(n_rows, bool)
    gone[forgotten] = True

    touched_users = np.unique(users[forgotten]).astype(np.int64)
    touched_items = np.unique(pos[forgotten]).astype(np.int64)
    rows = np.concatenate([touched_users, n_users + touched_items])
    slot = np.full(n_users + n_items, -1, np.int32)
    slot[rows] = np.arange(len(rows))
    active = (slot[users] >= 0) | (slot[n_users:][pos] >= 0)
    returns = _Returns(users, pos, forgotten, gone, n_items, m, popularity)

    def lanes(flat):
        return np.repeat(flat.reshape(1, -1, K), 2, axis=0)

    W = lanes(trajectory.at(0))
    M, V = np.zeros((2, len(rows), K), np.float32), np.zeros((2, len(rows), K), np.float32)
    snapshots = {0: np.zeros((len(rows), K), np.float32)}
    chunks = np.linspace(0, n_rows, CHUNKS + 1).astype(np.int64)
    hyper = tuple(np.float32(x) for x in (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay))
    rng = np.random.default_rng(seed)
    total = 0
    for epoch, neg in enumerate(negatives):
        neg = np.ascontiguousarray(neg).view()
        neg.flags.writeable = False  # memory-mapped or not: one compiled version
        counts, none = np.zeros(CHUNKS, np.int64), np.empty(0, np.int32)
        _select(active, slot[n_users:], neg, chunks, counts, counts, none, none)
        base, n = np.concatenate([[0], np.cumsum(counts)[:-1]]), int(counts.sum())
        chosen, columns = np.empty(n, np.int32), np.empty(n, np.int32)
        if n:
            _select(active, slot[n_users:], neg, chunks, counts, base, chosen, columns)
        start = np.empty(n_steps + 1, np.int64)
        u, i, j, out = (np.empty(n, t) for t in (np.int32, np.int32, np.int32, np.bool_))
        order = np.uint64(rng.integers(2**63))
        _by_step(chosen, columns, neg, users, pos, gone, n_steps, order, start, u, i, j, out)
        extra = returns.draw(rng, n_steps)

        others = trajectory.at(epoch + 0.5).reshape(-1, K)
        kept = W[:, rows].copy()
        W[:] = others
        W[:, rows] = kept
        _replay_epoch(K)(W, slot, rows, n_users, u, i, j, out, start, *extra, M, V, epoch * n_steps, 1 / batch_triples, hyper)
        total += n + len(extra[0])
        if epoch + 1 in trajectory.epochs:
            snapshots[epoch + 1] = W[1, rows] - W[0, rows]
        if progress:
            progress()
    left = np.bincount(users[~gone], minlength=n_users)[touched_users]
    untrained = np.concatenate([left == 0, np.zeros(len(touched_items), bool)])
    without = W[1, rows]
    return Replayed(rows, without.astype(np.float64) - W[0, rows], snapshots, untrained, without, total)


class _Returns:
    """Draws forgotten items as negatives of their users, as often as retraining would."""

    def __init__(self, users, pos, forgotten, gone, n_items, m, popularity):
        weight = np.ones(n_items) if popularity is None else np.asarray(popularity, np.float64).copy()
        weight[0] = 0
        pool = weight.sum()
        ptr = np.searchsorted(users, np.arange(int(users[-1]) + 2))
        user, item, rate, first, count = [], [], [], [], []
        rest_of = []
        offset = 0
        for who in np.unique(users[forgotten]):
            part = slice(ptr[who], ptr[who + 1])
            rest = pos[part][~gone[part]]
            back = np.setdiff1d(pos[part][gone[part]], rest)  # recorded twice, forgotten once: still a positive
            if len(rest) == 0 or len(back) == 0:
                continue
            share = weight[back] / (pool - weight[np.unique(rest)].sum())
            user.append(np.full(len(back), who))
            item.append(back)
            rate.append(m * len(rest) * share)
            first.append(np.full(len(back), offset))
            count.append(np.full(len(back), len(rest)))
            rest_of.append(rest)
            offset += len(rest)

        def joined(parts, dtype):
            return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)

        self.user, self.item = joined(user, np.int32), joined(item, np.int32)
        self.rate = joined(rate, np.float64)
        self.first, self.count = joined(first, np.int64), joined(count, np.int64)
        self.rest = joined(rest_of, np.int32)

    def draw(self, rng, n_steps):
        """Triples of one epoch in order of steps: users, positives, negatives, start of each step."""
        times = rng.poisson(self.rate)
        which = np.repeat(np.arange(len(times)), times)
        step = np.sort(rng.integers(0, n_steps, len(which)))
        which = rng.permutation(which)
        positive = self.rest[self.first[which] + rng.integers(0, self.count[which])] if len(which) else self.rest[:0]
        return self.user[which], positive, self.item[which], np.searchsorted(step, np.arange(n_steps + 1))
