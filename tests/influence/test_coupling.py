"""The random numbers of retraining: their law, by enumeration, and how little the paired ones change."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_unlearn.influence.coupling import Fresh, Paired, Recounted
from recbole_unlearn.influence.recorded import Adam, Recorded

N_ITEMS, M, SIZE = 12, 2, 7
# User 1 has items 1..4, user 2 items 5 and 6 (6 twice), user 3 item 7, user 4 items 1, 2; the padding is item 0.
USERS = np.array([1, 1, 1, 1, 2, 2, 2, 3, 4, 4], np.uint8)
ITEMS = np.array([1, 2, 3, 4, 5, 6, 6, 7, 1, 2], np.uint16)
GONE = np.isin(np.arange(10), [1, 2, 5, 7])  # 2 and 3 of user 1, one of the two 6 of user 2, all of user 3


def pool(user, keep, weight):
    """How likely each item is as a negative of a user who has the kept rows."""
    free = weight * ~np.isin(np.arange(N_ITEMS), ITEMS[keep & (USERS == user)])
    free[0] = 0
    return free / free.sum()


def weighed(keep, alpha):
    """Weights by popularity among the kept rows, and others which have items 2, 5, 8 and 11; None: uniform ones."""
    counted = (np.arange(N_ITEMS) % 3 == 2) * 2 + np.bincount(ITEMS[keep], minlength=N_ITEMS)
    return np.ones(N_ITEMS) if alpha is None else np.where(counted > 0, np.maximum(counted, 1.0) ** alpha, 0)


def draws(keep, weight, epochs, rng, m=M):
    negatives = np.zeros((epochs, len(USERS), m), np.uint16)
    for row, user in enumerate(USERS):
        negatives[:, row] = rng.choice(N_ITEMS, (epochs, m), p=pool(user, keep, weight))
    return negatives


EVERYTHING = np.ones(len(USERS), bool)


def recorded(epochs=3, alpha=None, seed=0, **more):
    rng = np.random.default_rng(seed)
    negatives = list(draws(EVERYTHING, weighed(EVERYTHING, alpha), epochs, rng))
    order = [rng.permutation(len(USERS)) for _ in range(epochs)]
    adam = Adam(0.01, 0.9, 0.999, 1e-8, 0.0)
    more = {"order": order.__getitem__, **more}
    if alpha is not None:
        more |= {"popularity": weighed(EVERYTHING, 1).astype(int), "alpha": alpha}
    return Recorded(USERS, ITEMS, negatives, 5, N_ITEMS, adam, SIZE * M // 2, **more)


def own_draw(weight):
    """A stand-in for RecBole's sampler of the remaining rows."""

    def draw(users, m, rng):
        return np.stack([rng.choice(N_ITEMS, m, p=pool(user, ~GONE, weight)) for user in users])

    return draw


ALPHAS = {"uniform": None, "popularity": 1.0, "its root": 0.5, "the rare ones": -1.0}


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
@pytest.mark.parametrize("kind", ["paired", "fresh"])
def test_each_negative_is_drawn_from_the_new_pool(kind, alpha):
    """Over many epochs each is as frequent as enumeration says, and two of a row do not depend on each other.

    Where items are drawn by popularity, what is forgotten does not count any more, in nobody's pool.
    """
    weights = weighed(~GONE, alpha)
    training = recorded(2000, alpha)
    epochs = Paired(training, GONE, 1) if kind == "paired" else Fresh(training, GONE, 1, own_draw(weights))
    found = np.array([epoch.negatives for epoch in epochs])
    for row in np.flatnonzero(~GONE):
        expected = pool(USERS[row], ~GONE, weights)
        alone = np.array([np.bincount(found[:, row, k], minlength=N_ITEMS) for k in range(M)]) / len(found)
        error = np.sqrt(expected * (1 - expected) / len(found))
        assert (np.abs(alone - expected) <= 5 * error).all()
        both = np.bincount(found[:, row, 0] * N_ITEMS + found[:, row, 1].astype(int), minlength=N_ITEMS**2) / len(found)
        together = np.outer(expected, expected).ravel()
        assert (np.abs(both - together) <= 5.5 * np.sqrt(together * (1 - together) / len(found))).all()


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
def test_where_own_items_are_drawn_too_nothing_comes_back_and_popularity_is_counted_anew(alpha):
    """RecBole's ``repeatable``: of a row's pool its own item alone is missing."""

    def pool_of(row, weight):
        free = weight * (np.arange(N_ITEMS) > 0) * (np.arange(N_ITEMS) != ITEMS[row])
        return free / free.sum()

    rng, before, after = np.random.default_rng(3), weighed(EVERYTHING, alpha), weighed(~GONE, alpha)
    rows = range(len(USERS))
    drawn = np.stack([rng.choice(N_ITEMS, (2000, M), p=pool_of(row, before)) for row in rows], 1).astype(np.uint16)
    training = recorded(1, alpha, returns=False, order=None)
    training = replace(training, negatives=list(drawn))
    found = np.array([epoch.negatives for epoch in Paired(training, GONE, 1)])
    for row in np.flatnonzero(~GONE):
        expected = pool_of(row, after)
        error = np.sqrt(expected * (1 - expected) / len(found))
        for k in range(M):
            share = np.bincount(found[:, row, k], minlength=N_ITEMS) / len(found)
            assert (np.abs(share - expected) <= 5 * error).all()
        distance = np.abs(pool_of(row, before) - expected).sum() / 2
        changed = (found[:, row] != drawn[:, row]).mean()
        assert abs(changed - distance) <= 5 * np.sqrt(distance * (1 - distance) / drawn[:, row].size) + 1e-12


@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
def test_a_paired_negative_changes_as_rarely_as_it_can(alpha):
    """By the total variation between the old pool and the new one."""
    training = recorded(2000, alpha)
    changed = np.array(
        [e.negatives != old for e, old in zip(Paired(training, GONE, 1), training.negatives, strict=True)]
    )
    for row in np.flatnonzero(~GONE):
        apart = [pool(USERS[row], keep, weighed(keep, alpha)) for keep in (EVERYTHING, ~GONE)]
        distance = np.abs(apart[0] - apart[1]).sum() / 2
        share = changed[:, row].mean()
        assert abs(share - distance) <= 5 * np.sqrt(distance * (1 - distance) / changed[:, row].size) + 1e-12


def test_the_order_is_the_recorded_one_with_rows_from_its_end_in_place_of_the_forgotten():
    training = recorded()
    for number, epoch in enumerate(Paired(training, GONE)):
        before, left = training.order(number), int((~GONE).sum())
        assert sorted(epoch.order) == np.flatnonzero(~GONE).tolist()
        stays = ~GONE[before[:left]]
        assert np.array_equal(epoch.order[stays], before[:left][stays])
        assert epoch.order[~stays].tolist() == [row for row in before[left:] if not GONE[row]]
        assert np.diff(epoch.bounds)[:-1].tolist() == [training.batch_rows] * (len(epoch.bounds) - 2)
        assert len(epoch.rates) == len(epoch.bounds) - 1 and epoch.bounds[-1] == left
        steps = epoch.steps(len(USERS))
        assert (steps[GONE] == -1).all() and (np.diff(steps[epoch.order]) >= 0).all()


@pytest.mark.parametrize("fixed", [None, np.arange(len(USERS))])
def test_with_nothing_forgotten_it_is_the_training(fixed):
    """In the order that was recorded, whatever the data's is now."""
    training = recorded(fixed_order=fixed)
    for number, epoch in enumerate(Paired(training, np.zeros(len(USERS), bool), 3)):
        assert np.array_equal(epoch.order, training.order(number))
        assert np.array_equal(epoch.negatives, training.negatives[number])


@pytest.mark.parametrize("kind", ["paired", "fresh"])
def test_an_order_that_is_not_drawn_stays(kind):
    fixed = np.random.default_rng(2).permutation(len(USERS))
    training = recorded(order=lambda number: fixed, fixed_order=fixed)
    epochs = Paired(training, GONE, 4) if kind == "paired" else Fresh(training, GONE, 4, own_draw(np.ones(N_ITEMS)))
    for epoch in epochs:
        assert epoch.order.tolist() == [row for row in fixed if not GONE[row]]


@pytest.mark.parametrize("kind", ["paired", "fresh"])
def test_orders_are_uniform(kind):
    """Each row is in each place as often as another; a paired one by the recorded, uniform one."""
    training = recorded(2000)
    epochs = Paired(training, GONE, 4) if kind == "paired" else Fresh(training, GONE, 4, own_draw(np.ones(N_ITEMS)))
    kept = np.flatnonzero(~GONE)
    orders = np.array([epoch.order for epoch in epochs])
    assert (np.sort(orders) == kept).all()
    share = np.array([np.bincount(place, minlength=len(USERS))[kept] for place in orders.T]) / len(orders)
    assert np.abs(share - 1 / len(kept)).max() < 5 * np.sqrt(1 / len(kept) / len(orders))
    pairs = np.unique(orders[:, 1] * 100 + orders[:, 4], return_counts=True)[1] / len(orders)
    expected = 1 / (len(kept) * (len(kept) - 1))
    assert len(pairs) * expected == pytest.approx(1)
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected / len(orders))


@pytest.mark.parametrize("kind", ["paired", "fresh"])
def test_epochs_are_the_same_each_time_and_others_with_another_seed(kind):
    training = recorded(order=None)

    def epochs(seed):
        return (
            Paired(training, GONE, seed)
            if kind == "paired"
            else Fresh(training, GONE, seed, own_draw(np.ones(N_ITEMS)))
        )

    one = epochs(5)
    for first, again in zip(one, one, strict=True):
        assert np.array_equal(first.order, again.order) and np.array_equal(first.negatives, again.negatives)
    assert not all(np.array_equal(a.order, b.order) for a, b in zip(one, epochs(6), strict=True))


def test_static_negatives_stay_the_same_from_epoch_to_epoch():
    training = recorded()
    same = Recorded(**{**training.__dict__, "negatives": training.negatives[:1] * 3, "static": True})
    changed = 0
    for seed in range(20):
        found = [epoch.negatives for epoch in Paired(same, GONE, seed)]
        assert all(np.array_equal(found[0], each) for each in found)
        changed += not np.array_equal(found[0], same.negatives[0])
    assert changed


def test_nothing_returns_where_a_users_own_items_were_drawn_all_along():
    training = recorded(returns=False)
    for epoch, old in zip(Paired(training, GONE, 1), training.negatives, strict=True):
        assert np.array_equal(epoch.negatives, old)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_what_was_absent_before_stays_away_and_comes_back_as_negatives(alpha):
    """Two requests, one after the other, are one for both."""
    first, second = np.isin(np.arange(10), [1, 5]), np.isin(np.arange(10), [2, 7])
    training = recorded(alpha=alpha)
    later = Recorded(**{**training.__dict__, "absent": first})
    for one, other in zip(Paired(training, GONE, 8), Paired(later, second, 8), strict=True):
        assert np.array_equal(one.order, other.order) and np.array_equal(one.negatives, other.negatives)


@pytest.mark.parametrize("alpha", [1.0, -1.0])
def test_without_training_again_popularity_is_counted_anew_from_what_earlier_requests_left(alpha):
    """Negatives are of the law before, then of that after, and as few change as the two allow."""
    first, second = np.isin(np.arange(10), [1, 5]), np.isin(np.arange(10), [2, 7])
    recounted = Recounted(recorded(2000, alpha, absent=first), second, (4,))
    found = np.zeros((2, 2000, len(USERS), M), int)
    for epoch in range(2000):
        found[0, epoch], changed, after = recounted.epoch(epoch)
        found[1, epoch] = found[0, epoch]
        assert (found[0, epoch, changed] != after).any(1).all()
        found[1, epoch, changed] = after
    for row in np.flatnonzero(~GONE):
        laws = [pool(USERS[row], keep, weighed(keep, alpha)) for keep in (~first, ~GONE)]
        for law, drawn in zip(laws, found[:, :, row], strict=True):
            share = np.bincount(drawn.ravel(), minlength=N_ITEMS) / drawn.size
            assert (np.abs(share - law) <= 5 * np.sqrt(law * (1 - law) / drawn.size)).all()
        distance = np.abs(laws[0] - laws[1]).sum() / 2
        share = (found[0, :, row] != found[1, :, row]).mean()
        assert abs(share - distance) <= 5 * np.sqrt(distance * (1 - distance) / found[0, :, row].size)


def test_the_first_request_recounts_as_exact_retraining_does():
    training = recorded(alpha=1.0)
    recounted, paired = Recounted(training, GONE, (8,)), Paired(training, GONE, 8)
    for number in range(3):
        negatives, changed, after = recounted.epoch(number)
        assert np.array_equal(negatives, training.negatives[number])
        negatives = negatives.copy()
        negatives[changed] = after
        assert np.array_equal(negatives[~GONE], paired.negatives(number)[~GONE])


def test_a_fresh_training_can_be_coupled_to():
    """Its epochs are then what is recorded, and popularity is counted as it was drawn by."""
    fresh = Fresh(recorded(alpha=1.0), GONE, 9, own_draw(weighed(~GONE, 1)))
    np.testing.assert_array_equal(fresh.recorded_anew().weights, weighed(~GONE, 1))
    for one, other in zip(fresh, Paired(fresh.recorded_anew(), np.zeros(10, bool)), strict=True):
        assert np.array_equal(one.order, other.order) and np.array_equal(one.bounds, other.bounds)
        assert np.array_equal(one.negatives[~GONE], other.negatives[~GONE])


def test_a_fresh_training_may_have_other_numbers_of_epochs_than_was_recorded():
    """Of more, the last known rates hold on; another one can be coupled to all of them, and to the first few."""
    training = recorded(rates=[np.full(3, 0.1), np.full(3, 0.2), np.full(3, 0.3)].__getitem__)
    short, long = (Fresh(training, GONE, 5, own_draw(np.ones(N_ITEMS)), epochs) for epochs in (None, 5))
    assert (len(short), len(long), len(long.first(2))) == (3, 5, 2)
    for one, other in zip(short, long, strict=False):
        assert np.array_equal(one.order, other.order) and np.array_equal(one.negatives, other.negatives)
    assert [epoch.rates[0] for epoch in long] == [0.1, 0.2, 0.3, 0.3, 0.3]
    assert len({tuple(epoch.order) for epoch in long}) == 5
    for fresh in (long, long.first(4)):
        again = Paired(fresh.recorded_anew(), np.zeros(10, bool))
        for one, other in zip(fresh, again, strict=True):
            assert np.array_equal(one.order, other.order) and np.array_equal(one.rates, other.rates)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=10, max_size=10), st.integers(0, 2**64))
def test_no_kept_row_has_an_item_of_its_user_as_negative(gone, seed):
    gone = np.array(gone)
    for epoch in Paired(recorded(), gone, seed):
        for row in epoch.order:
            assert not set(epoch.negatives[row].tolist()) & {0, *ITEMS[(USERS == USERS[row]) & ~gone].tolist()}
