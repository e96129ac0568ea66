"""What retraining changes in the objective: which triples, how much of each, and their gradient."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_unlearn.influence.objective import Triples, distinct, gradient, pool_return, sampled_triples


def weight_of_each(triples):
    """Total weight of each distinct (user, positive, negative)."""
    total = Counter()
    for u, i, j, w in zip(triples.users, triples.pos, triples.neg, triples.weight, strict=True):
        total[int(u), int(i), int(j)] += float(w)
    return total


class TestSampledTriples:
    users, items = np.array([4, 0, 4]), np.array([7, 2, 5])
    negatives = np.array(  # 3 epochs, 3 rows, 2 negatives
        [[[1, 2], [3, 3], [6, 8]], [[2, 1], [9, 3], [6, 1]], [[1, 8], [4, 6], [3, 8]]]
    )

    def test_every_logged_triple_weighs_one_over_the_epochs(self):
        expected = Counter()
        for epoch in self.negatives:
            for u, i, row in zip(self.users, self.items, epoch, strict=True):
                for j in row:
                    expected[u, i, j] += 1 / 3
        triples = sampled_triples(self.users, self.items, self.negatives)
        assert len(triples) == 18
        assert weight_of_each(triples) == expected

    @pytest.mark.parametrize("epochs", [1, 3, 7])
    @pytest.mark.parametrize("m", [1, 4])
    def test_total_weight_is_the_triples_of_one_epoch(self, epochs, m):
        negatives = np.random.default_rng(0).integers(1, 9, (epochs, 3, m), dtype=np.uint16)
        triples = sampled_triples(self.users, self.items, negatives)
        assert len(triples) == epochs * 3 * m
        np.testing.assert_allclose(triples.weight.sum(), 3 * m, rtol=1e-14)

    def test_no_rows(self):
        assert len(sampled_triples([], [], np.empty((3, 0, 2), np.uint16))) == 0


def random_triples(seed, n_users, n_items, n):
    rng = np.random.default_rng(seed)
    ids = (rng.integers(high, size=n) for high in (n_users, n_items, n_items))
    return Triples(*ids, rng.choice([-0.5, 0.0, 1.0, 3.0], n))


def loss(triples, P, Q):
    users, pos, neg, weight = map(torch.from_numpy, (triples.users, triples.pos, triples.neg, triples.weight))
    x = (P[users] * (Q[pos] - Q[neg])).sum(1)
    return -(weight * torch.nn.functional.logsigmoid(x)).sum()


class TestGradient:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32 - 1),
        n_users=st.integers(1, 8),
        n_items=st.integers(1, 12),
        K=st.sampled_from([1, 3, 8]),
        n=st.integers(0, 40),
    )
    def test_agrees_with_autograd(self, seed, n_users, n_items, K, n):
        triples = random_triples(seed, n_users, n_items, n)
        rng = np.random.default_rng(seed + 1)
        P, Q = rng.normal(size=(n_users, K)), rng.normal(size=(n_items, K))
        params = [torch.tensor(part, requires_grad=True) for part in (P, Q)]
        expected = np.concatenate([g.flatten() for g in torch.autograd.grad(loss(triples, *params), params)])
        tolerance = 1e-12 * (1 + np.abs(expected).max())
        np.testing.assert_allclose(gradient(triples, P, Q), expected, rtol=0, atol=tolerance)

    def test_agrees_with_central_differences(self):
        triples = random_triples(2, n_users=4, n_items=6, n=20)
        rng = np.random.default_rng(3)
        theta = rng.normal(size=30)
        step = 1e-5  # truncation ~step^2, rounding ~1e-15 / step: both near 1e-10

        def value(vector):
            vector = torch.from_numpy(vector)
            return loss(triples, vector[:12].view(4, 3), vector[12:].view(6, 3)).item()

        slopes = [(value(theta + step * e) - value(theta - step * e)) / (2 * step) for e in np.eye(30)]
        result = gradient(triples, theta[:12].reshape(4, 3), theta[12:].reshape(6, 3))
        np.testing.assert_allclose(result, slopes, rtol=0, atol=1e-8)

    def test_embeddings_in_float32_are_summed_in_float64(self):
        """A model's weights are float32. Many triples with the same row must not lose digits."""
        triples = random_triples(4, n_users=2, n_items=3, n=20_000)
        rng = np.random.default_rng(5)
        P, Q = (rng.normal(size=(n, 3)).astype(np.float32) for n in (2, 3))
        single = gradient(triples, P, Q)
        double = gradient(triples, P.astype(np.float64), Q.astype(np.float64))
        assert single.dtype == np.float64
        np.testing.assert_allclose(single, double, rtol=0, atol=1e-6 * abs(double).max())

    def test_large_margins_stay_finite(self):
        triples = Triples(np.array([0, 0]), np.array([0, 1]), np.array([1, 0]), np.ones(2))
        P, Q = np.array([[1000.0]]), np.array([[1.0], [-1.0]])
        # x = 2000 gives nothing, x = -2000 the whole slope
        np.testing.assert_allclose(gradient(triples, P, Q), [2, 1000, -1000], rtol=1e-15)


def expected_draws(users, items, forgotten, n_items, m):
    """Expected count an epoch of each triple with a forgotten item, enumerated from the sampling rule.

    After forgetting, each row draws m negatives from the items 1 .. n_items - 1 that are no remaining
    positive of its user, all as likely.
    """
    remaining = [(u, i) for r, (u, i) in enumerate(zip(users, items, strict=True)) if r not in set(forgotten)]
    gone = {(users[r], items[r]) for r in forgotten}
    expected = Counter()
    for u, positive in remaining:
        pool = [j for j in range(1, n_items) if (u, j) not in remaining]
        for j in pool:
            if (u, j) in gone:
                expected[u, positive, j] += m / len(pool)
    return expected


class TestPoolReturn:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32 - 1),
        n_users=st.integers(1, 6),
        n_items=st.integers(3, 12),
        rows=st.integers(1, 25),
        m=st.integers(1, 4),
    )
    def test_rates_are_those_of_the_sampling_rule(self, seed, n_users, n_items, rows, m):
        """Users with nothing forgotten, something or everything, and items recorded more than once."""
        rng = np.random.default_rng(seed)
        users = np.sort(rng.integers(1, n_users + 1, size=rows))
        items = rng.integers(1, n_items, size=rows)
        forgotten = np.sort(rng.choice(rows, rng.integers(rows + 1), replace=False))
        triples = pool_return(users, items, forgotten, n_items, m)
        expected = expected_draws(users.tolist(), items.tolist(), forgotten.tolist(), n_items, m)
        actual = weight_of_each(triples)
        assert actual.keys() == expected.keys()
        keys = sorted(expected)
        np.testing.assert_allclose([actual[k] for k in keys], [expected[k] for k in keys], rtol=1e-12)

    users = np.array([1, 1, 1, 1, 2, 2, 3])
    items = np.array([1, 2, 3, 4, 1, 5, 6])

    def test_rates_match_a_simulation(self):
        """User 1 forgets items 2 and 4; negatives drawn by rejection, as a sampler does."""
        triples = pool_return(self.users, self.items, np.array([1, 3]), 8, 2)
        rng = np.random.default_rng(6)
        epochs, remaining = 20_000, [1, 3]
        draws = rng.integers(1, 8, (epochs, 2, 2))
        while (rejected := np.isin(draws, remaining)).any():
            draws[rejected] = rng.integers(1, 8, rejected.sum())
        actual = weight_of_each(triples)
        assert actual.keys() == {(1, i, j) for i in remaining for j in (2, 4)}
        for (_, i, j), weight in actual.items():
            simulated = (draws[:, remaining.index(i)] == j).sum() / epochs
            # five standard errors of a count of Bernoulli draws
            np.testing.assert_allclose(simulated, weight, rtol=0, atol=5 * np.sqrt(weight / epochs))

    def test_uniform_rate_by_hand(self):
        """User 1 keeps 1, 3, 4 of the items 1 .. 7: one of four pool items returned, two draws a row."""
        triples = pool_return(self.users, self.items, np.array([1]), 8, 2)
        assert weight_of_each(triples) == {(1, 1, 2): 0.5, (1, 3, 2): 0.5, (1, 4, 2): 0.5}

    def test_item_recorded_twice_and_forgotten_once_does_not_return(self):
        items = self.items.copy()
        items[3] = 2  # user 1 has items 1, 2, 3, 2
        assert len(pool_return(self.users, items, np.array([1]), 8, 2)) == 0

    def test_item_recorded_twice_and_forgotten_twice_returns_once(self):
        items = self.items.copy()
        items[3] = 2
        triples = pool_return(self.users, items, np.array([1, 3]), 8, 2)
        # pool 2, 4, 5, 6, 7
        assert weight_of_each(triples) == {(1, 1, 2): 0.4, (1, 3, 2): 0.4}

    def test_user_left_with_nothing_draws_nothing(self):
        assert len(pool_return(self.users, self.items, np.array([6]), 8, 2)) == 0

    def test_nothing_forgotten(self):
        empty = pool_return(self.users, self.items, np.array([], np.int64), 8, 2)
        assert len(empty) == 0
        np.testing.assert_array_equal(gradient(empty, np.ones((4, 2)), np.ones((8, 2))), np.zeros(24))

    def test_no_rows_at_all(self):
        none = np.array([], np.int64)
        assert len(pool_return(none, none, none, 8, 2)) == 0


@given(st.lists(st.integers(0, 20)))
def test_distinct_values_are_numpys(values):
    values = np.array(values, np.int64)
    before = values.copy()
    found, expected = distinct(values), np.unique(values)
    assert found.dtype == expected.dtype and np.array_equal(found, expected) and np.array_equal(values, before)
