"""Telling two populations of models apart by single pairs, against brute force and laws that are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from recbole_unlearn.evaluation.per_example import auc, effect_left, epsilons, klom, log_ratios, told_apart


def margins(seed, models=64, pairs=50, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (models, pairs))


def test_equal_laws_are_told_by_nothing():
    found = told_apart(margins(1), margins(2))
    assert found["lira_auc"] == pytest.approx(0.5, abs=0.03) and found["tpr_1"] < 0.03
    assert found["lira_accuracy"] == pytest.approx(0.5, abs=0.03)


def test_other_laws_are_told():
    near, far = told_apart(margins(1, shift=0.5), margins(2)), told_apart(margins(1, shift=4.0), margins(2))
    for name in near:
        assert far[name] > near[name]
    assert far["lira_auc"] > 0.99 and far["lira_accuracy"] > 0.95


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 9), st.integers(3, 9))
def test_likelihood_ratios_leave_the_judged_model_out(seed, n, m):
    one, other = margins(seed, n, 3), margins(seed + 1, m, 3)
    own, theirs = log_ratios(one, other)
    for k in range(n):
        rest = np.delete(one, k, 0)
        want = norm.logpdf(one[k], rest.mean(0), rest.std(0, ddof=1))
        want -= norm.logpdf(one[k], other.mean(0), other.std(0, ddof=1))
        np.testing.assert_allclose(own[k], want, rtol=1e-6, atol=1e-6)
    for k in range(m):
        rest = np.delete(other, k, 0)
        want = norm.logpdf(other[k], one.mean(0), one.std(0, ddof=1))
        want -= norm.logpdf(other[k], rest.mean(0), rest.std(0, ddof=1))
        np.testing.assert_allclose(theirs[k], want, rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_auc_counts_pairs(positives, negatives):
    pairs = [(a > b) + (a == b) / 2 for a in positives for b in negatives]
    assert auc(np.array(positives), np.array(negatives)) == pytest.approx(np.mean(pairs))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([0, 9]))
def test_epsilon_is_that_of_the_worst_threshold(seed, n, digits):
    one, other = (np.round(margins(seed + k, n, 4), digits) for k in range(2))  # with ties, and without
    want = np.zeros(4)
    for pair in range(4):
        for cut in np.concatenate([one[:, pair], other[:, pair]]):
            low, high = (one[:, pair] <= cut).sum(), (other[:, pair] <= cut).sum()
            if low + high == 2 * n:
                continue  # no threshold: all are on one side
            for miss, alarm in ((low, n - high), (n - low, high)):
                fnr, fpr = (miss + 0.5) / (n + 1), (alarm + 0.5) / (n + 1)
                want[pair] = max(want[pair], np.log((1 - 1e-5 - fpr) / fnr), np.log((1 - 1e-5 - fnr) / fpr))
    np.testing.assert_allclose(epsilons(one, other), want, rtol=1e-9)


def test_no_threshold_tells_what_is_the_same():
    assert not epsilons(np.full((8, 3), 0.25), np.full((8, 3), 0.25)).any()


def test_epsilon_shows_no_more_than_so_many_models_can():
    assert epsilons(margins(1, 16, shift=50), margins(2, 16)) == pytest.approx(np.log(2 * 16 + 1), abs=1e-3)


def test_klom_is_zero_of_the_same_models_and_grows():
    same = margins(1)
    np.testing.assert_allclose(klom(same, same), 0, atol=1e-12)
    assert np.median(klom(margins(1, shift=3), margins(2))) > 2 * np.median(klom(margins(3), margins(2)))
    assert klom(margins(1, shift=99), margins(2)).max() < np.log(1e5)


@pytest.mark.parametrize("kept", [0.0, 0.05, 1.0, -0.5])
def test_what_is_left_of_an_effect(kept):
    effect = np.linspace(0.2, 3, 50)
    left = effect_left(margins(1) + kept * effect, margins(2), effect, np.ones(50))
    assert left == pytest.approx(kept, abs=0.03)
