"""Replay against torch.optim.Adam and autograd in float64, and its random draws against enumeration."""

from dataclasses import astuple, dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_unlearn.influence import replay as module
from recbole_unlearn.influence.coupling import Recounted
from recbole_unlearn.influence.recorded import Adam, Recorded, Trajectory
from recbole_unlearn.influence.replay import Returns, replay
from recbole_unlearn.influence.threads import limited_threads, threads

# Weights are of magnitude 1 and kept in float32 (epsilon 1.2e-7), and an epsilon of Adam's that is not tiny
# beside the gradients keeps it from blowing up the rounding of those that nearly vanish.
FLOAT32 = 3e-6
ADAM = Adam(lr=0.05, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.0)


@dataclass
class Problem:
    """``users``, ``pos`` ``[rows]``; ``negatives``: ``[rows, m]`` an epoch; ``weights``: epoch -> flat."""

    users: np.ndarray
    pos: np.ndarray
    negatives: list
    forgotten: np.ndarray
    weights: dict
    n_users: int
    n_items: int
    batch_triples: int
    adam: Adam = field(default_factory=lambda: ADAM)
    popularity: np.ndarray = None
    seed: int = 7

    @property
    def m(self):
        return self.negatives[0].shape[1]

    @property
    def n_steps(self):
        return -(-len(self.users) * self.m // self.batch_triples)

    @property
    def gone(self):
        return np.isin(np.arange(len(self.users)), self.forgotten)

    @property
    def rows(self):
        """Weight rows to run again."""
        items = self.n_users + self.pos[self.forgotten].astype(np.int64)
        return np.unique(np.concatenate([self.users[self.forgotten], items]))

    def at(self, time):
        """Recorded weights in float64, ``[n_users + n_items, K]``."""
        epochs, weights = list(self.weights), np.array(list(self.weights.values()), np.float64)
        k = max(k for k, epoch in enumerate(epochs[:-1]) if epoch <= time)
        part = (time - epochs[k]) / (epochs[k + 1] - epochs[k])
        return ((1 - part) * weights[k] + part * weights[k + 1]).reshape(self.n_users + self.n_items, -1)

    def trajectory(self):
        return Trajectory(list(self.weights), list(self.weights.values()))

    def recorded(self):
        return Recorded(
            self.users, self.pos, self.negatives, self.n_users, self.n_items, self.adam, self.batch_triples,
            self.popularity,
        )  # fmt: skip

    def replay(self, **changes):
        p = replace(self, **changes)
        return replay(p.recorded(), p.trajectory(), p.forgotten, p.seed)

    def returns(self):
        return Returns(self.users, self.pos, self.gone, self.n_items, self.m)


def random_problem(
    seed=0,
    n_users=9,
    n_items=13,
    K=3,
    m=2,
    rows=47,
    forgotten=6,
    epochs=3,
    snapshots=(0, 1, 3),
    batch_triples=20,
    **more,
):
    """Some users and items may have no rows at all; ids start at 1."""
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(1, n_users, rows)).astype(np.uint8)
    pos = rng.integers(1, n_items, rows).astype(np.uint16)
    # of 1..n_items-1, never the positive of the row
    ahead = rng.integers(1, n_items - 1, (epochs, rows, m))
    negatives = list((1 + (pos[:, None] - 1 + ahead) % (n_items - 1)).astype(np.uint16))
    weights = {n: rng.normal(size=(n_users + n_items) * K).astype(np.float32) for n in snapshots}
    chosen = np.sort(rng.choice(rows, forgotten, replace=False))
    return Problem(users, pos, negatives, chosen, weights, n_users, n_items, batch_triples, **more)


def splitmix(x):
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def expected_returns(p):
    """(user, item) -> expected returns an epoch, and the remaining items of each user, by enumeration."""
    rest_of = {int(u): [] for u in p.users}
    for row in range(len(p.users)):
        if not p.gone[row]:
            rest_of[p.users[row]].append(int(p.pos[row]))
    rate = {}
    for row in p.forgotten:
        user, item = int(p.users[row]), int(p.pos[row])
        pool = [j for j in range(1, p.n_items) if j not in rest_of[user]]
        if item in pool and rest_of[user]:
            rate[user, item] = p.m * len(rest_of[user]) / len(pool)
    return dict(sorted(rate.items())), rest_of


def draws(p):
    """For each epoch: the step of every row, and the returned triples with theirs, ``[r, 4]``.

    The generator is used in the order in which `replay` uses it; what is drawn is defined anew.
    """
    rng = np.random.default_rng(p.seed)
    rate, rest_of = expected_returns(p) if p.popularity is None else ({}, {})  # by popularity, `Recounted` draws
    for _ in p.negatives:
        key = int(rng.integers(2**63))
        hashes = (splitmix(key ^ (row << 20)) for row in range(len(p.users)))
        step = np.array([(x >> 32) * p.n_steps >> 32 for x in hashes])
        times = rng.poisson(list(rate.values()))
        pairs = [pair for pair, n in zip(rate, times, strict=True) for _ in range(n)]
        return_step = np.sort(rng.integers(0, p.n_steps, len(pairs)))
        pairs = [pairs[k] for k in rng.permutation(np.arange(len(pairs)))]
        choice = rng.integers(0, np.array([len(rest_of[u]) for u, _ in pairs], np.int64))
        returned = zip(pairs, choice, return_step, strict=True)
        triples = [(user, rest_of[user][c], item, s) for (user, item), c, s in returned]
        yield step, np.array(triples, np.int64).reshape(-1, 4)


def reference(p, lane):
    """Touched rows after each epoch, ``[epochs + 1, rows, K]``, by torch.optim.Adam on all triples."""
    rows = torch.from_numpy(p.rows)
    param = torch.tensor(p.at(0)[p.rows], requires_grad=True)
    a = p.adam
    optimizer = torch.optim.Adam([param], a.lr, (a.beta1, a.beta2), a.eps, a.weight_decay)
    history = [param.detach().clone()]
    popular = p.popularity is not None
    recounted = Recounted(p.recorded(), p.gone, (p.seed,)) if popular else None
    for epoch, (step, returned) in enumerate(draws(p)):
        recorded, negatives = torch.from_numpy(p.at(epoch + 0.5)), p.negatives[epoch].copy()
        if popular and lane == 1:
            _, changed, after = recounted.epoch(epoch)
            negatives[changed] = after
        for s in range(p.n_steps):
            chosen = np.flatnonzero((step == s) & ~(p.gone & (lane == 1)))
            u, i = (np.repeat(ids[chosen].astype(np.int64), p.m) for ids in (p.users, p.pos))
            j = negatives[chosen].astype(np.int64).ravel()
            if lane == 1 and not popular:
                extra = returned[returned[:, 3] == s].T
                u, i, j = (np.concatenate(pair) for pair in zip((u, i, j), extra[:3], strict=True))
            W = torch.index_copy(recorded, 0, rows, param)
            x = (W[u] * (W[p.n_users + i] - W[p.n_users + j])).sum(1)
            # mean over the batch: as many triples as there are on average
            loss = torch.nn.functional.softplus(-x).sum() * (p.n_steps / (len(p.users) * p.m))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(param.detach().clone())
    return torch.stack(history).numpy()


def assert_equals_reference(p, tolerance=FLOAT32):
    result = p.replay()
    np.testing.assert_array_equal(result.rows, p.rows)
    with_them, without = reference(p, 0), reference(p, 1)
    assert np.abs(without[-1] - without[0]).max() > 100 * tolerance  # it did train
    np.testing.assert_allclose(result.without, without[-1], rtol=0, atol=tolerance)
    np.testing.assert_allclose(result.change, without[-1] - with_them[-1], rtol=0, atol=2 * tolerance)
    for epoch, change in result.snapshots.items():
        np.testing.assert_allclose(change, without[epoch] - with_them[epoch], rtol=0, atol=2 * tolerance)


class TestAgainstTorch:
    @pytest.mark.parametrize("weight_decay", [0.0, 0.01])
    @pytest.mark.parametrize(("K", "m"), [(3, 2), (8, 3)])
    def test_full_batches(self, K, m, weight_decay):
        p = random_problem(seed=K, K=K, m=m, batch_triples=47 * m, adam=replace(ADAM, weight_decay=weight_decay))
        assert p.n_steps == 1
        assert_equals_reference(p)

    @pytest.mark.parametrize("weight_decay", [0.0, 0.01])
    @pytest.mark.parametrize(("K", "m"), [(1, 2), (3, 2), (8, 3)])
    def test_many_batches(self, K, m, weight_decay):
        adam = replace(ADAM, weight_decay=weight_decay)
        p = random_problem(seed=10 + K, K=K, m=m, batch_triples=5 * m, adam=adam)
        assert p.n_steps == 10
        assert_equals_reference(p)

    def test_a_batch_size_beyond_the_data_takes_the_mean_over_the_data(self):
        """Only weight decay can tell, since Adam divides by the scale of the gradient."""
        p = random_problem(batch_triples=5000, adam=replace(ADAM, weight_decay=0.01))
        assert_equals_reference(p)
        np.testing.assert_array_equal(p.replay().change, p.replay(batch_triples=94).change)

    def test_default_epsilon(self):
        p = random_problem(seed=3, adam=Adam(0.01, 0.9, 0.999, 1e-8, 0.0))
        assert_equals_reference(p, tolerance=1e-5)

    def test_nothing_comes_back_from_a_user_without_other_items(self):
        """Lane 1 is then training without the forgotten triples, and nothing else."""
        p = random_problem(seed=4)
        p.forgotten = np.flatnonzero(p.users == p.users[20])
        assert not expected_returns(p)[0]
        assert_equals_reference(p)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32 - 1),
        n_users=st.integers(2, 9),
        n_items=st.integers(3, 12),
        shape=st.sampled_from([(1, 2), (3, 2), (8, 1), (8, 4)]),  # each is compiled
        rows=st.integers(2, 40),
        part=st.floats(0, 1),
        batch_triples=st.integers(1, 200),
        weight_decay=st.sampled_from([0.0, 0.01]),
        popular=st.booleans(),
    )
    def test_random_sizes(self, seed, n_users, n_items, shape, rows, part, batch_triples, weight_decay, popular):
        p = random_problem(
            seed, n_users, n_items, *shape, rows, max(int(part * rows), 1), 2, (0, 2), batch_triples,
            adam=replace(ADAM, weight_decay=weight_decay, eps=1e-2),
        )  # fmt: skip
        if popular:
            others = np.random.default_rng(seed).integers(0, 2, n_items)
            p.popularity = np.bincount(p.pos, minlength=n_items) + others
        result = p.replay()
        for lane, actual in enumerate((result.without - result.change, result.without)):
            np.testing.assert_allclose(actual, reference(p, lane)[-1], rtol=0, atol=2 * FLOAT32)


class TestSelection:
    """What the kernel of an epoch is given."""

    @pytest.fixture
    def epochs(self, monkeypatch):
        """A list that fills with the kernel's arguments, one tuple an epoch."""
        seen = []

        def record(K, m):
            return lambda lanes, W, rows, start, lone, lone_start, returned, return_start, *_: seen.append(
                (rows[: start[-1]].copy(), start, lone[: lone_start[-1]].copy(), lone_start, returned, return_start)
            )

        monkeypatch.setattr(module, "replay_epoch", record)
        return seen

    # few items and many; of the sparse ones most blocks of rows hold none
    @pytest.mark.parametrize(
        "n_items, rows, forgotten", [(60, 500, 5), (60, 500, 40), (3000, 9000, 1), (3000, 9000, 8)]
    )
    @pytest.mark.parametrize("m", [1, 4])
    def test_every_touched_triple_is_in_one_step(self, epochs, m, n_items, rows, forgotten):
        p = random_problem(
            n_users=min(rows // 12, 250), n_items=n_items, m=m, rows=rows, forgotten=forgotten, batch_triples=rows // 16
        )
        result = p.replay()
        place = np.arange(p.n_users + p.n_items) + 2 * len(p.rows)
        place[p.rows] = np.arange(len(p.rows))
        total = 0
        for (step, returned), neg, seen in zip(draws(p), p.negatives, epochs, strict=True):
            triples = place[np.column_stack([p.users, p.n_users + p.pos, p.n_users + neg.astype(int)])]
            touched = triples < len(p.rows)
            total += np.where(touched[:, :2].any(1), m, touched[:, 2:].sum(1)).sum() + len(returned)
            assert 0 < touched.any(1).sum() <= len(p.users)
            anchored = np.flatnonzero(touched[:, :2].any(1))
            anchored = anchored[np.argsort(step[anchored], kind="stable")]
            np.testing.assert_array_equal(seen[0], np.column_stack([triples[anchored], p.gone[anchored]]))
            np.testing.assert_array_equal(seen[1], np.searchsorted(step[anchored], np.arange(p.n_steps + 1)))
            row, column = np.nonzero(touched & ~touched[:, :2].any(1, keepdims=True))
            order = np.argsort(step[row], kind="stable")
            row, column = row[order], column[order]
            np.testing.assert_array_equal(seen[2], np.column_stack([triples[row, :2], triples[row, column]]))
            np.testing.assert_array_equal(seen[3], np.searchsorted(step[row], np.arange(p.n_steps + 1)))
            returned[:, 1:3] += p.n_users
            np.testing.assert_array_equal(seen[4][:, :3], place[returned[:, :3]])
            assert not seen[4][:, 3].any()
            np.testing.assert_array_equal(seen[5], np.searchsorted(returned[:, 3], np.arange(p.n_steps + 1)))
        assert result.triples == total

    def test_rows_fall_evenly_into_steps_anew_each_epoch(self, epochs):
        p = random_problem(rows=20_000, forgotten=2, epochs=2, snapshots=(0, 2), batch_triples=1000)
        p.users[:] = 1
        p.replay()
        counts = np.array([np.diff(start) for _, start, *_ in epochs])
        assert counts.shape == (2, 40) and (counts.sum(1) == 20_000).all()
        assert np.abs(counts - 500).max() < 5 * np.sqrt(500)
        assert (counts[0] != counts[1]).any()


def test_nothing_forgotten():
    result = random_problem(forgotten=0).replay()
    assert result.rows.shape == result.untrained.shape == (0,)
    assert result.change.shape == (0, 3) and result.triples == 0


def test_no_change_where_the_forgotten_triples_have_no_gradient():
    """The forgotten user is so sure of its item that the gradient is 0 in float32; it cannot come back."""
    p = random_problem(K=3, rows=200, forgotten=1, popularity=np.ones(13))
    user, item = p.users[p.forgotten[0]], p.pos[p.forgotten[0]]
    keep = np.flatnonzero((p.pos != item) | (p.users != user) | p.gone)
    p.users, p.pos, p.negatives = p.users[keep], p.pos[keep], [neg[keep] for neg in p.negatives]
    p.forgotten = np.searchsorted(keep, p.forgotten)
    p.popularity[item] = 0
    for flat in p.weights.values():
        flat.reshape(-1, 3)[[user, p.n_users + item]] = 20
    result = p.replay()
    np.testing.assert_array_equal(result.change, np.zeros((2, 3)))
    assert (np.abs(result.without - 20).max(1) > ADAM.lr).all()  # other triples did move both rows
    assert not result.untrained.any()


class TestBits:
    """The same seed gives the same bits, another seed others."""

    @pytest.fixture
    def wide(self):
        """Enough rows for every chunk and step to hold some, K and m as in the paper."""
        return random_problem(n_users=60, n_items=90, K=8, m=4, rows=3000, forgotten=40, batch_triples=500)

    def bits(self, p, **changes):
        result = p.replay(**changes)
        return np.concatenate([result.change, result.without, *result.snapshots.values()])

    def test_same_when_run_twice(self, wide):
        np.testing.assert_array_equal(self.bits(wide), self.bits(wide))

    def test_other_with_another_seed(self, wide):
        assert (self.bits(wide) != self.bits(wide, seed=8)).any()

    @pytest.mark.skipif(threads() < 2, reason="one thread only")
    def test_same_for_any_number_of_threads(self, wide):
        results = []
        for n in range(1, min(threads(), 4) + 1):
            with limited_threads(n):
                results.append(self.bits(wide))
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
    def test_same_for_any_type_of_ids(self, wide, dtype):
        other = self.bits(
            wide,
            users=wide.users.astype(dtype),
            pos=wide.pos.astype(dtype),
            negatives=[neg.astype(dtype) for neg in wide.negatives],
        )
        np.testing.assert_array_equal(other, self.bits(wide))

    def test_same_from_files(self, wide, tmp_path):
        for epoch, neg in enumerate(wide.negatives):
            np.save(tmp_path / f"{epoch}.npy", neg)
        mapped = [np.load(tmp_path / f"{epoch}.npy", mmap_mode="r") for epoch in range(len(wide.negatives))]
        np.testing.assert_array_equal(self.bits(wide, negatives=mapped), self.bits(wide))

    def test_inputs_are_left_alone(self, wide):
        arrays = [wide.users, wide.pos, wide.forgotten, *wide.negatives, *wide.weights.values()]
        before = [array.copy() for array in arrays]
        wide.replay()
        for array, kept in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(array, kept)
            assert array.flags.writeable


class TestReturns:
    @pytest.fixture
    def problem(self):
        """User 1 forgets 4, 5 and one of two recordings of 2; 2 all; 3 one; 4 one."""
        users = np.array([1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4], np.int32)
        pos = np.array([2, 2, 3, 3, 4, 5, 6, 2, 7, 9, 8, 1, 5], np.int32)
        neg = [np.ones((len(users), 5), np.uint8)]
        forgotten = np.array([0, 4, 5, 7, 8, 10, 11])
        return Problem(users, pos, neg, forgotten, {}, 5, 11, 7)

    def test_rates(self, problem):
        rate, rest_of = expected_returns(problem)
        returns = problem.returns()
        assert set(rate) == {(1, 4), (1, 5), (3, 8), (4, 1)}
        assert list(zip(returns.user, returns.item, strict=True)) == list(rate)
        np.testing.assert_allclose(returns.rate, list(rate.values()), rtol=1e-14)
        # user 1: 4 rows left, of the 3 items 2, 3 and 6, so that 7 of the 10 items are in the pool
        assert rate[1, 5] == pytest.approx(5 * 4 / 7)
        assert sorted(rest_of[1]) == [2, 3, 3, 6]

    def test_rates_are_those_of_sampling(self, problem):
        """Draw as RecBole does, again and again until the item is none of the user's."""
        rate, rest_of = expected_returns(problem)
        rng = np.random.default_rng(0)
        drawn = rng.integers(1, 11, 400_000)
        for (user, item), expected in rate.items():
            accepted = drawn[~np.isin(drawn, rest_of[user])]
            p = (accepted == item).mean()
            per_row = expected / problem.m / len(rest_of[user])
            assert abs(p - per_row) < 5 * np.sqrt(per_row / len(accepted))

    def test_draws(self, problem):
        rate, rest_of = expected_returns(problem)
        returns, rng, n = problem.returns(), np.random.default_rng(1), 4000
        n_steps = 13
        counts = {pair: 0 for pair in rate}
        positives = {user: np.zeros(11) for user in rest_of}
        steps = np.zeros(n_steps)
        for _ in range(n):
            users, positive, items, start = returns.draw(rng, n_steps)
            assert len(users) == len(positive) == len(items) == start[-1] and start[0] == 0
            assert len(start) == n_steps + 1
            steps += np.diff(start)
            for user, i, item in zip(users, positive, items, strict=True):
                counts[user, item] += 1
                positives[user][i] += 1
        for pair, expected in rate.items():
            assert abs(counts[pair] - n * expected) < 5 * np.sqrt(n * expected)
        total = sum(counts.values())
        assert np.abs(steps - total / n_steps).max() < 5 * np.sqrt(total / n_steps)
        for user, seen in positives.items():
            expected = seen.sum() * np.bincount(rest_of[user], minlength=11) / max(len(rest_of[user]), 1)
            assert (seen[expected == 0] == 0).all()
            assert (np.abs(seen - expected) <= 5 * np.sqrt(expected)).all()

    def test_counts_are_poisson(self, problem):
        """Not the rounded mean every time: variance equals mean."""
        returns, rng = problem.returns(), np.random.default_rng(2)
        counts = np.array([np.sum(returns.draw(rng, 3)[2] == 8) for _ in range(4000)])
        mean = expected_returns(problem)[0][3, 8]
        assert counts.var() == pytest.approx(mean, rel=5 * np.sqrt((2 + 1 / mean) / 4000))

    def test_no_returns(self, problem):
        problem.forgotten = np.array([7, 8])
        users, positive, items, start = problem.returns().draw(np.random.default_rng(0), 4)
        assert len(users) == len(positive) == len(items) == 0
        np.testing.assert_array_equal(start, np.zeros(5))


class TestUntrained:
    @pytest.fixture
    def problem(self):
        """User 3 goes altogether, user 1 all but one row; item 12 goes with its only interaction."""
        p = random_problem(rows=60)
        p.pos[p.pos == 12] = 11
        of_1, of_3 = np.flatnonzero(p.users == 1), np.flatnonzero(p.users == 3)
        assert len(of_1) > 1 and len(of_3) > 1
        p.pos[of_1[0]] = 12
        p.forgotten = np.sort([*of_1[:-1], *of_3])
        return p

    def test_only_users_without_rows_are_untrained(self, problem):
        result = problem.replay()
        assert result.rows[result.untrained].tolist() == [3]

    def test_they_keep_the_initialisation(self, problem):
        result = problem.replay()
        initial = problem.at(0)[result.rows].astype(np.float32)
        np.testing.assert_array_equal(result.without[result.untrained], initial[result.untrained])
        assert (result.without[~result.untrained] != initial[~result.untrained]).all()
        assert (result.change[result.untrained] != 0).all()

    def test_or_decay_from_it(self, problem):
        problem.adam = replace(ADAM, weight_decay=0.01)
        assert_equals_reference(problem)
        result = problem.replay()
        initial = problem.at(0)[result.rows][result.untrained]
        assert (np.abs(result.without[result.untrained]) < np.abs(initial)).all()


class TestSnapshots:
    def test_epochs_and_last(self):
        result = random_problem(epochs=4, snapshots=(0, 1, 2, 4)).replay()
        assert list(result.snapshots) == [0, 1, 2, 4]
        np.testing.assert_array_equal(result.snapshots[0], np.zeros_like(result.snapshots[4]))
        np.testing.assert_array_equal(result.snapshots[4], result.change.astype(np.float32))
        assert (result.snapshots[1] != result.snapshots[2]).any()
        assert all(change.dtype == np.float32 for change in result.snapshots.values())

    def test_each_is_the_change_of_the_training_so_far(self):
        """Where the path is straight, stopping earlier is the same but for the path's end."""
        p = random_problem(epochs=4, snapshots=(0, 2, 4))
        first = replace(p, negatives=p.negatives[:2], weights={n: p.weights[n] for n in (0, 2)})
        np.testing.assert_array_equal(p.replay().snapshots[2], first.replay().snapshots[2])


def test_progress_is_called_after_each_epoch():
    p, calls = random_problem(), []
    replay(p.recorded(), p.trajectory(), p.forgotten, progress=lambda: calls.append(1))
    assert len(calls) == 3


def test_negatives_and_trajectory_must_be_of_the_same_epochs():
    p = random_problem()
    with pytest.raises(ValueError, match="2 epochs, but a trajectory of 3"):
        p.replay(negatives=p.negatives[:2])


class TestTrajectory:
    EPOCHS = [0, 1, 4]

    @pytest.fixture(params=[np.float16, np.float32, np.float64])
    def weights(self, request):
        return [np.array(w, request.param) for w in ([0, 10, -1], [1, 8, -1], [4, -1, 5])]

    def test_interpolates(self, weights):
        trajectory = Trajectory(self.EPOCHS, weights)
        for time in (0.5, 3, 2.5, 0, 0.25, 1, 4):  # back and forth
            value = trajectory.at(time)
            assert value.dtype == np.float32
            exact = [np.interp(time, self.EPOCHS, [w[k] for w in weights]) for k in range(3)]
            np.testing.assert_allclose(value, exact, rtol=1e-6, atol=1e-6)

    def test_is_exact_at_snapshots_and_each_call_is_new(self, weights):
        trajectory = Trajectory(self.EPOCHS, weights)
        values = [trajectory.at(epoch) for epoch in self.EPOCHS]
        for value, expected in zip(values, weights, strict=True):
            np.testing.assert_array_equal(value, expected)

    def test_writes_into_a_given_array(self, weights):
        trajectory, out = Trajectory(self.EPOCHS, weights), np.full(3, np.nan, np.float32)
        assert trajectory.at(2.5, out=out) is out
        np.testing.assert_array_equal(out, trajectory.at(2.5))

    @pytest.mark.parametrize("epochs", [[0], [1, 2], [0, 2, 1], [0, 1, 1], []])
    def test_refuses_what_is_no_course_of_training(self, epochs):
        with pytest.raises(ValueError, match="initialisation and end"):
            Trajectory(epochs, [np.zeros(2)] * len(epochs))


def test_adam_is_torchs():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(30, 11)).astype(np.float32)
    w = rng.normal(size=11).astype(np.float32)
    param = torch.tensor(w, requires_grad=True)
    adam = Adam(0.01, 0.9, 0.999, 1e-8, 0.1)
    optimizer = torch.optim.Adam([param], adam.lr, (adam.beta1, adam.beta2), adam.eps, adam.weight_decay)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step, grad in enumerate(grads):
        param.grad = torch.from_numpy(grad)
        optimizer.step()
        g = grad.copy()
        module.adam_step(w, m, v, g, step + 1, adam.lr, astuple(adam))
        assert not g.any()
    np.testing.assert_allclose(w, param.detach(), rtol=0, atol=1e-6)
