"""Paired replay: unrolled influence, restricted to the rows that a forget set touches, not linearised.

An influence function linearises around the final weights. A model that was stopped early is no optimum, so
what its weights owe to a triple was paid in during all of training, most of it early, when gradients were
large. Given the triple log (what was trained on) and the trajectory (snapshots of the weights), the optimiser
can be run again for the touched rows alone (the forgotten interactions' users and items), with every other
row held on its recorded path. It is run twice side by side, in the same order: with the forgotten triples,
and without them but with the forgotten items back in their users' negative pools, and popularity, where negatives
are drawn by it, counted without them. The difference is the step; what the two have in common (the order of batches,
drawn anew) cancels.

The two lanes run in parallel with each other; an epoch's triples are found and ordered by all threads before.

All rows at once need no second lane to be compared with: that is training again, see `coupling`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from recbole_unlearn.influence.compiling import compiled, inlined
from recbole_unlearn.influence.coupling import Recounted
from recbole_unlearn.influence.objective import returning
from recbole_unlearn.influence.recorded import Recorded, Trajectory, marked
from recbole_unlearn.influence.sharding import Shard
from recbole_unlearn.influence.threads import parallel
from recbole_unlearn.influence.vectors import add_scaled, dot, exp, load_like, spread, store

CHUNKS = 16  # of rows; fixed, so that the order of triples is the same whatever the number of threads
BLOCK = 64  # rows that are passed over together where few items are touched
FEW = 8  # items, at most, that are looked for by comparing: each costs a pass over the log, at memory speed


@inlined
def _mix(x):
    """splitmix64: a random 64-bit number from a counter, so that draws need no state and no order."""
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@inlined
def _step(row, order, n_steps):
    """Which of an epoch's steps a row falls in, uint64; of an epoch whose random number is ``order``."""
    draw = _mix(np.uint64(order) ^ (row << np.uint64(20)))
    return ((draw >> np.uint64(32)) * np.uint64(n_steps)) >> np.uint64(32)


@compiled
def _steps(rows, order, n_steps):
    """`_step` of each of some rows."""
    found = np.empty(len(rows), np.int64)
    for k in range(len(rows)):
        found[k] = _step(rows[k], order, n_steps)
    return found


@inlined
def _found(few, negatives, anchored):
    """Whether one of a few items is among some negatives, or some row anchored: by comparisons of many at once."""
    found = 0
    for i in range(len(few)):
        item, hits = few[i], 0
        for k in range(len(negatives)):
            hits += negatives[k] == item
        found += hits
    for r in range(len(anchored)):
        found += anchored[r]
    return found > 0


@parallel
def _touching(begin, end, users, pos, touched_users, touched_items, result):
    for r in range(np.uint64(begin), np.uint64(end)):
        result[r] = touched_users[users[r]] | touched_items[pos[r]]


def touching(users: np.ndarray, pos: np.ndarray, touched_users: np.ndarray, touched_items: np.ndarray) -> np.ndarray:
    """Which of some interactions have a touched user or item, bool ``[rows]``.

    Args:
        users, pos: int arrays ``[rows]``.
        touched_users, touched_items: bool ``[n_users]`` and ``[n_items]``.
    """
    result = np.empty(len(users), bool)
    ids = np.asarray(users, np.uint32), np.asarray(pos, np.uint32)
    _touching(len(result), *ids, touched_users, touched_items, result)
    return result


@cache
def _select(m):
    """Kernel that finds an epoch's rows with a touched weight row in some triple, and draws the step of each.

    These are the present rows that are ``anchored`` ``[n_rows]`` or have a negative that is ``touched`` ``[n_items]``.
    The ids of touched items, if they are ``few``, save a look at most rows; else this is empty. ``chosen`` and ``step``
    ``[n_rows]`` are filled from the start of each chunk to its ``ends`` ``[chunks]``, ``counts``
    ``[2, chunks, n_steps]`` says how many anchored rows of a chunk fall in a step, and how many touched negatives of
    others.

    In this and the next kernels m, the number of negatives, is a constant, and indices are unsigned: of others numba
    asks at each use whether they count from the end, which takes as long as the rest.
    """
    m = np.uint64(m)

    @parallel
    def kernel(low, high, anchored, neg, present, touched, few, n_steps, seed, chunks, chosen, step, ends, counts):
        block = np.uint64(BLOCK)
        flat = neg.reshape(-1)
        for c in range(low, high):
            end = chunks[c]
            for start in range(chunks[c], chunks[c + 1], block):
                stop = min(start + block, chunks[c + 1])
                if len(few) and not _found(few, flat[start * m : stop * m], anchored[start:stop]):
                    continue
                for r in range(start, stop):
                    hit = anchored[r]
                    for t in range(m):
                        hit |= touched[flat[r * m + t]]
                    chosen[end] = r  # kept or overwritten: no branch, it would be mispredicted often
                    end += np.uint64(hit & present[r])
            ends[c] = end
            counts[:, c] = 0
            for k in range(chunks[c], end):
                r = np.uint64(chosen[k])
                s = _step(r, seed, n_steps)
                step[k] = s
                lone = np.uint64(0)
                for t in range(m):
                    lone += touched[flat[r * m + t]]
                counts[0, c, s] += anchored[r]
                counts[1, c, s] += np.uint64(0) if anchored[r] else lone

    return kernel


@cache
def _arrange(m):
    """Kernel that writes the chosen rows in order of steps, as places: anchored ones whole, of others touched triples.

    ``rows`` ``[n, 2 + m + 1]`` are user, positive, negatives and whether they are ``forgotten``, ``lone`` ``[n, 3]``
    triples whose negative alone is touched. ``next_free`` ``[2, chunks, n_steps]`` says where the first row of each
    chunk and step goes, and the first triple; it is changed.
    """
    m = np.uint64(m)

    @parallel
    def kernel(
        low, high, anchored, users, pos, neg, user_place, item_place, forgotten, n_touched,
        chunks, chosen, step, ends, next_free, rows, lone,
    ):  # fmt: skip
        one, two = np.uint64(1), np.uint64(2)
        for c in range(low, high):
            touched = np.empty(m, rows.dtype)
            for k in range(chunks[c], ends[c]):
                r, s = np.uint64(chosen[k]), np.uint64(step[k])
                u, i = user_place[users[r]], item_place[pos[r]]
                if anchored[r]:
                    at = next_free[0, c, s]
                    next_free[0, c, s] += one
                    rows[at, 0], rows[at, one] = u, i
                    for t in range(m):
                        rows[at, two + t] = item_place[neg[r, t]]
                    rows[at, two + m] = forgotten[r]
                    continue
                n = np.uint64(0)
                for t in range(m):
                    touched[n] = item_place[neg[r, t]]  # kept or overwritten, as in `_select`
                    n += np.uint64(item_place[neg[r, t]] < n_touched)
                at = next_free[1, c, s]
                next_free[1, c, s] += n
                for t in range(n):
                    lone[at + t, 0], lone[at + t, one], lone[at + t, two] = u, i, touched[t]

    return kernel


@inlined
def adam_step(w, m, v, g, step, lr, hyper):
    """A step of torch.optim.Adam on flat float32 arrays, the ``step``-th from 1 on; ``g`` is set to zero."""
    _, beta1, beta2, eps, weight_decay = hyper  # as Adam's fields
    b1, b2, rest1, rest2 = np.float32(beta1), np.float32(beta2), np.float32(1 - beta1), np.float32(1 - beta2)
    rate, correction = np.float32(lr / (1 - beta1**step)), np.float32(1 / (1 - beta2**step))
    decay, small = np.float32(weight_decay), np.float32(eps)
    for f in range(len(w)):
        grad = g[f] + decay * w[f]
        first = b1 * m[f] + rest1 * grad
        second = b2 * v[f] + rest2 * grad * grad
        m[f] = first
        v[f] = second
        w[f] -= rate * first / (np.sqrt(second * correction) + small)
        g[f] = 0


# Not functions in the kernels' closures: that would defeat the cache on disk. Of each step, all scores are taken before
# the first sigmoid: a loop of nothing else computes many at once.


@inlined
def _sigmoids(x, n, scale):
    """Turn the first scores into ``scale * sigmoid(-x)``: what a triple weighs in the gradient."""
    for k in range(n):
        x[k] = scale / (np.float32(1) + exp(x[k]))


@inlined
def _add_rows(zero, m, W, G, rows, begin, end, without, n_touched, shift, scale, x):
    """Adds the gradients of ``rows[begin:end]`` to ``G``, indexed as the touched rows of a lane.

    ``without`` the forgotten ones or with them; see `replay_epoch`. ``x`` has room for a number a triple.
    """
    one, two = np.uint64(1), np.uint64(2)
    n = np.uint64(0)
    for k in range(np.uint64(begin), np.uint64(end)):
        u, i = np.uint64(rows[k, 0]), np.uint64(rows[k, one])
        p = load_like(zero, W, u + shift * (u < n_touched), 0)
        score = dot(p, load_like(zero, W, i + shift * (i < n_touched), 0))
        for t in range(m):
            j = np.uint64(rows[k, two + t])
            x[n + t] = score - dot(p, load_like(zero, W, j + shift * (j < n_touched), 0))
        n += m
    _sigmoids(x, n, scale)
    n = np.uint64(0)
    for k in range(np.uint64(begin), np.uint64(end)):
        if not (without and rows[k, two + m]):
            u, i = np.uint64(rows[k, 0]), np.uint64(rows[k, one])
            p = load_like(zero, W, u + shift * (u < n_touched), 0)
            total = np.float32(0)
            for t in range(m):
                total += x[n + t]
            if u < n_touched:
                own = add_scaled(load_like(zero, G, u, 0), -total, load_like(zero, W, i + shift * (i < n_touched), 0))
                for t in range(m):
                    j = np.uint64(rows[k, two + t])
                    own = add_scaled(own, x[n + t], load_like(zero, W, j + shift * (j < n_touched), 0))
                store(G, u, 0, own)
            if i < n_touched:
                store(G, i, 0, add_scaled(load_like(zero, G, i, 0), -total, p))
            for t in range(m):
                j = np.uint64(rows[k, two + t])
                if j < n_touched:
                    store(G, j, 0, add_scaled(load_like(zero, G, j, 0), x[n + t], p))
        n += m


@inlined
def _add_lone(zero, W, G, lone, begin, end, shift, scale, x):
    """`_add_rows` for triples whose negative alone is touched."""
    begin, end, one, two = np.uint64(begin), np.uint64(end), np.uint64(1), np.uint64(2)
    for k in range(begin, end):
        p, i, j = load_like(zero, W, lone[k, 0], 0), lone[k, one], lone[k, two]
        x[k - begin] = dot(p, load_like(zero, W, i, 0)) - dot(p, load_like(zero, W, j + shift, 0))
    _sigmoids(x, end - begin, scale)
    for k in range(begin, end):
        j = lone[k, two]
        store(G, j, 0, add_scaled(load_like(zero, G, j, 0), x[k - begin], load_like(zero, W, lone[k, 0], 0)))


@cache
def replay_epoch(K, m):
    """Kernel for an epoch of both lanes: 0 with the forgotten triples, 1 without them but with the returns.

    ``W`` ``[2 * n_touched + n_users + n_items, K]``: touched rows of lane 0, touched rows of lane 1, all rows
    as they were recorded. ``rows`` and ``lone`` are as `_arrange` leaves them: places in ``W``, of which those below
    ``n_touched`` are touched rows, of either lane. ``returned`` ``[r, 4]`` are rows with one negative. Each comes with
    ``[n_steps + 1]`` numbers that delimit the steps; ``most`` is the number of triples that a step has at most of each
    kind, ``scale`` ``[n_steps]`` weights them. ``M`` and ``V`` ``[2, n_touched, K]`` are Adam's state, ``rates``
    ``[n_steps]`` its learning rates.
    """
    m, one = np.uint64(m), np.uint64(1)

    @parallel
    def kernel(
        low, high, W, rows, start, lone, lone_start, returned, return_start,
        most, M, V, steps_before, scale, rates, hyper,
    ):  # fmt: skip
        n_touched, zero = np.uint64(M.shape[1]), spread(K, np.float32(0))
        for lane in range(np.uint64(low), np.uint64(high)):
            G = np.zeros((n_touched, K), np.float32)
            x = np.empty(most, np.float32)
            shift = lane * n_touched
            for s in range(len(scale)):
                _add_rows(zero, m, W, G, rows, start[s], start[s + 1], lane == 1, n_touched, shift, scale[s], x)
                _add_lone(zero, W, G, lone, lone_start[s], lone_start[s + 1], shift, scale[s], x)
                if lane == 1:
                    back, end = return_start[s], return_start[s + 1]
                    _add_rows(zero, one, W, G, returned, back, end, False, n_touched, shift, scale[s], x)
                w = W[shift : shift + n_touched]
                adam_step(w.ravel(), M[lane].ravel(), V[lane].ravel(), G.ravel(), steps_before + s + 1, rates[s], hyper)

    return kernel


@dataclass
class Replayed:
    """Result of a replay.

    Attributes:
        rows: weight rows that were replayed (users first, then ``n_users +`` item), sorted int array.
        change: final difference of the lanes on those rows, float64 ``[rows, K]``.
        snapshots: epoch of the trajectory -> difference at that time, float32 ``[rows, K]``.
        untrained: which of ``rows`` are users without a triple left, bool; in the second lane their weights
            are the initialisation, but for weight decay.
        without: final weights of the second lane on ``rows``, float32.
        triples: that were run through (those of both lanes once), summed over epochs.
    """

    rows: np.ndarray
    change: np.ndarray
    snapshots: dict[int, np.ndarray]
    untrained: np.ndarray
    without: np.ndarray
    triples: int


def replay(
    recorded: Recorded,
    trajectory: Trajectory,
    forgotten: np.ndarray,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
    shard: Shard | None = None,
) -> Replayed | None:
    """Run the optimiser again for the rows that some interactions touch, with and without these interactions.

    Args:
        recorded: the training; neither lane has its absent rows. The order of batches, which both share, is drawn.
        trajectory: over the same epochs; flat weights are ``[P.ravel(), Q.ravel()]``.
        forgotten: sorted ints, rows.
        seed: of the order of batches and the returned negatives.
        progress: called after each epoch.
        shard: what of the rows this rank looks through for triples; rank 0 runs the lanes.

    Returns:
        None on other ranks than 0.
    """
    epochs = len(recorded.negatives)
    if trajectory.epochs[-1] != epochs:
        raise ValueError(f"negatives of {epochs} epochs, but a trajectory of {trajectory.epochs[-1]}")
    recorded = replace(recorded, users=np.array(recorded.users, np.uint32), pos=np.array(recorded.pos, np.uint32))
    gone = marked(len(recorded.users), np.asarray(forgotten, np.int64))
    places = _Places(recorded, gone, wide=shard is not None)
    selection = _Selection(recorded, gone, places, shard)
    lanes = _Lanes(recorded, places, trajectory)
    draw = selection.recounted(seed) if recorded.popularity is not None else selection.returning()
    rng, total = np.random.default_rng(seed), 0
    snapshots = {0: lanes.change().astype(np.float32)}
    for epoch in range(epochs):
        parts, returned = draw(epoch, rng)
        if shard:
            parts = [shard.merge(*part) for part in parts]
            if not shard.leads:
                continue
        total += lanes.run(epoch, [*parts, places.of(returned)], selection.sizes)
        if epoch + 1 in trajectory.epochs:
            snapshots[epoch + 1] = lanes.change().astype(np.float32)
        if progress:
            progress()
    if shard and not shard.leads:
        return None
    untrained = np.isin(places.rows, selection.bare_users())
    return Replayed(places.rows, lanes.change(), snapshots, untrained, lanes.now[-1].copy(), total)


_Part = tuple[np.ndarray, np.ndarray]  # a table in order of steps, and where each step begins in it
_Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # users, positives, negatives, start of each step
_Draw = Callable[[int, np.random.Generator], tuple[list[_Part], _Drawn]]  # of an epoch, see `_Selection.find`


class _Places:
    """Which weight rows are run again, and where each weight row is in the kernels' ``W``.

    Attributes:
        users: touched ones, sorted int64.
        rows: weight rows that are run again, sorted ints.
        user, item: places, ``[n_users]`` and ``[n_items]``; those below ``len(rows)`` are run again.
    """

    def __init__(self, recorded: Recorded, gone: np.ndarray, wide: bool) -> None:
        n_users, n_weights = recorded.n_users, recorded.n_users + recorded.n_items
        self.users = np.unique(recorded.users[gone]).astype(np.int64)
        items = np.unique(recorded.pos[gone]).astype(np.int64)
        self.rows = np.concatenate([self.users, n_users + items])
        first = 2 * len(self.rows)
        # Places are written and read often: in two bytes where these hold them. Ranks exchange them in four.
        self.dtype = np.int32 if wide or first + n_weights > 1 << 16 else np.uint16
        place = np.arange(first, first + n_weights, dtype=self.dtype)
        place[self.rows] = np.arange(len(self.rows))
        self.user, self.item = place[:n_users], place[n_users:]

    def of(self, returned: _Drawn) -> _Part:
        """What `Returns.draw` gives, as rows of one negative for the kernels, and where each step begins."""
        user, positive, item, start = returned
        columns = [self.user[user], self.item[positive], self.item[item], np.zeros_like(user)]
        return np.stack(columns, axis=1).astype(self.dtype), start


class _Selection:
    """Finds the triples of each epoch that move a row which is run again, in order of steps."""

    def __init__(self, recorded: Recorded, gone: np.ndarray, places: _Places, shard: Shard | None) -> None:
        self.recorded, self.gone, self.places = recorded, gone, places
        self.present, n_rows, m = recorded.present(), len(gone), recorded.m
        self.n_present = int(self.present.sum())
        self.n_steps = -(-self.n_present * m // recorded.batch_triples)
        self.sizes = np.full(self.n_steps, self.n_present * m / self.n_steps)  # triples of a step
        self.touched = places.item < len(places.rows)
        self.anchored = touching(recorded.users, recorded.pos, places.user < len(places.rows), self.touched)
        few = np.flatnonzero(self.touched).astype(recorded.negatives[0].dtype)
        self.few = few[: len(few) if len(few) <= FEW else 0]
        own = shard.rows if shard else slice(0, n_rows)
        self.chunks = np.linspace(own.start, own.stop, CHUNKS + 1).astype(np.uint64)
        self.ends, self.counts = self.chunks[1:].copy(), np.empty((2, CHUNKS, self.n_steps), np.int64)
        # As long as any epoch may need: what is not written to takes no memory.
        self.chosen, self.step = np.empty(n_rows, np.uint32), np.empty(n_rows, np.uint32)
        self.tables = np.empty((n_rows, 2 + m + 1), places.dtype), np.empty((n_rows * m, 3), places.dtype)

    def find(self, negatives: np.ndarray, order: np.uint64, without: np.ndarray | None = None) -> list[_Part]:
        """What `_arrange` writes, each with where its steps begin.

        Args:
            negatives: of the epoch, ``[rows, m]``.
            order: a random number, for the steps.
            without: rows that the second lane lacks beside the forgotten ones, ints.
        """
        recorded, places, m = self.recorded, self.places, self.recorded.m
        anchored, gone = self.anchored, self.gone
        if without is not None:
            anchored, gone = anchored.copy(), gone.copy()
            anchored[without] = gone[without] = True  # a row as a whole, whatever is touched of it
        neg = np.ascontiguousarray(negatives).view()
        neg.flags.writeable = False  # memory-mapped or not: one compiled version
        where = self.chunks, self.chosen, self.step, self.ends
        drawn = self.n_steps, order
        _select(m)(CHUNKS, anchored, neg, self.present, self.touched, self.few, *drawn, *where, self.counts)
        starts, next_free = zip(*map(_delimit, self.counts), strict=True)
        data = anchored, recorded.users, recorded.pos, neg, places.user, places.item, gone, len(places.rows)
        _arrange(m)(CHUNKS, *data, *where, np.stack(next_free), *self.tables)
        return list(zip(self.tables, starts, strict=True))

    def returning(self) -> _Draw:
        """Epochs in which forgotten items return, all as likely, to the pools of the rows that are present."""
        recorded, some = self.recorded, slice(None) if self.n_present == len(self.gone) else self.present
        rows = recorded.users[some], recorded.pos[some], self.gone[some] & recorded.returns
        returns = Returns(*rows, recorded.n_items, recorded.m)

        def draw(epoch, rng):
            parts = self.find(recorded.negatives[epoch], np.uint64(rng.integers(2**63)))
            return parts, returns.draw(rng, self.n_steps)

        return draw

    def recounted(self, seed: int) -> _Draw:
        """Epochs in which popularity is counted anew: rows whose negatives change are triples of the second lane."""
        recorded, m, recounted = self.recorded, self.recorded.m, Recounted(self.recorded, self.gone, (seed,))

        def draw(epoch, rng):
            order = np.uint64(rng.integers(2**63))
            negatives, changed, after = recounted.epoch(epoch)
            step = np.repeat(_steps(changed.astype(np.uint64), order, self.n_steps), m)
            rows, item = np.repeat(changed, m), after.ravel().astype(np.int64)
            moves = np.flatnonzero(self.anchored[rows] | self.touched[item])  # a row that is run again
            moves = moves[np.argsort(step[moves], kind="stable")]
            rows, start = rows[moves], np.searchsorted(step[moves], np.arange(self.n_steps + 1))
            users, positives = (ids[rows].astype(np.int64) for ids in (recorded.users, recorded.pos))
            return self.find(negatives, order, changed), (users, positives, item[moves], start)

        return draw

    def bare_users(self) -> np.ndarray:
        """Touched users without a row left."""
        users, who = self.recorded.users, self.places.users
        asked = who.astype(users.dtype)  # of another type, all users would be converted first
        bounds = np.searchsorted(users, asked), np.searchsorted(users, asked, "right")
        left = [np.any(self.present[start:stop] & ~self.gone[start:stop]) for start, stop in zip(*bounds, strict=True)]
        return who[~np.array(left, bool)]


class _Lanes:
    """Weights of the rows that are run again, with the forgotten triples and without them.

    Attributes:
        now: ``[2, rows, K]``, views of the kernels' ``W``, as are the ``held`` rows, flat.
    """

    def __init__(self, recorded: Recorded, places: _Places, trajectory: Trajectory) -> None:
        self.recorded, self.places, self.trajectory = recorded, places, trajectory
        n_weights, n_rows = recorded.n_users + recorded.n_items, len(places.rows)
        self.K = len(trajectory.weights[0]) // n_weights
        self.W = np.empty((2 * n_rows + n_weights, self.K), np.float32)
        self.now, self.held = self.W[: 2 * n_rows].reshape(2, n_rows, self.K), self.W[2 * n_rows :].reshape(-1)
        self.now[:] = trajectory.at(0).reshape(-1, self.K)[places.rows]
        self.M, self.V = np.zeros_like(self.now), np.zeros_like(self.now)

    def change(self) -> np.ndarray:
        """Difference of the lanes, float64 ``[rows, K]``."""
        return self.now[1].astype(np.float64) - self.now[0]

    def run(self, epoch: int, parts: list[_Part], size: np.ndarray) -> int:
        """An epoch of steps of ``size`` triples; returns how many triples were run through.

        ``parts`` are rows with all negatives, lone triples and returned ones, each with where its steps begin.
        """
        m, hyper, before = self.recorded.m, self.recorded.adam.numbers(), epoch * len(size)
        (rows, start), (lone, lone_start), (returned, return_start) = parts
        most = max(np.diff(bounds).max() * width for bounds, width in ((start, m), (lone_start, 1), (return_start, 1)))
        weight, rate = (1 / size).astype(np.float32), self.recorded.rates_of(epoch, len(size))
        self.trajectory.at(epoch + 0.5, out=self.held)
        found = rows, start, lone, lone_start, returned, return_start, most
        replay_epoch(self.K, m)(2, self.W, *found, self.M, self.V, before, weight, rate, hyper)
        return m * int(start[-1]) + int(lone_start[-1]) + len(returned)


def _delimit(counts):
    """Where each step begins, ``[n_steps + 1]``, and each chunk's part of it, like ``counts`` ``[chunks, n_steps]``."""
    start = np.concatenate([[0], np.cumsum(counts.T)])
    return start[:: len(counts)].copy(), start[:-1].reshape(counts.T.shape).T.astype(np.uint64, order="C")


class Returns:
    """Draws forgotten items as negatives of their users, as often as retraining would, where all are as likely."""

    def __init__(self, users: np.ndarray, pos: np.ndarray, gone: np.ndarray, n_items: int, m: int) -> None:
        user, item, rate, first, count = [], [], [], [], []
        rest_of = []
        offset = 0
        for who, kept, back, share in returning(users, pos, gone, n_items):
            user.append(np.full(len(back), who))
            item.append(back)
            rate.append(np.full(len(back), m * len(kept) * share))
            first.append(np.full(len(back), offset))
            count.append(np.full(len(back), len(kept)))
            rest_of.append(pos[kept])
            offset += len(kept)

        def joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
            return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)

        self.user, self.item = joined(user, np.int32), joined(item, np.int32)
        self.rate = joined(rate, np.float64)
        self.first, self.count = joined(first, np.int64), joined(count, np.int64)
        self.rest = joined(rest_of, np.int32)

    def draw(self, rng: np.random.Generator, n_steps: int) -> _Drawn:
        """Triples of one epoch in order of steps: users, positives, negatives, start of each step."""
        times = rng.poisson(self.rate)
        which = np.repeat(np.arange(len(times)), times)
        step = np.sort(rng.integers(0, n_steps, len(which)))
        which = rng.permutation(which)
        positive = self.rest[self.first[which] + rng.integers(0, self.count[which])]
        return self.user[which], positive, self.item[which], np.searchsorted(step, np.arange(n_steps + 1))
