"""How the forget set ranks: percentiles against a plain count, and the verdict drawn from them."""

import numpy as np
import pytest
import torch

from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import forgetting


@pytest.fixture
def model(split, make_model):
    return make_model(split, seed=4)


def brute_force(model, split, rows):
    """Share of the items that a user never had below the forgotten one, ties half, counted one by one."""
    users = model.user_embedding.weight.detach()
    items = model.item_embedding.weight.detach()
    had = set()
    for loader in (split.train, split.valid, split.test):
        data = loader.dataset
        features = data.inter_feat
        had |= set(zip(features[data.uid_field].tolist(), features[data.iid_field].tolist(), strict=True))
    result = []
    for row in rows:
        user, item = int(split.users[row]), int(split.items[row])
        scores = items @ users[user]
        points = total = 0
        for candidate in range(1, split.n_items):
            if (user, candidate) in had:
                continue
            total += 1
            points += float(scores[candidate] < scores[item]) + float(scores[candidate] == scores[item]) / 2
        result.append(points / total)
    return np.array(result)


def test_percentiles_equal_a_plain_count(model, split):
    rows = np.sort(np.random.default_rng(0).choice(split.n_rows, 80, replace=False))
    got = forgetting.percentiles(model, split, rows)
    assert len(np.unique(got)) > 10
    np.testing.assert_allclose(got, brute_force(model, split, rows), atol=1e-12)


def test_ties_count_half(model, split):
    with torch.no_grad():
        model.user_embedding.weight.round_()
        model.user_embedding.weight[:, 0] = 1
        model.item_embedding.weight.zero_()
        model.item_embedding.weight[:, 0] = torch.arange(split.n_items) % 4
    rows = np.arange(0, split.n_rows, 7)
    got = forgetting.percentiles(model, split, rows)
    np.testing.assert_allclose(got, brute_force(model, split, rows), atol=1e-12)
    assert len(np.unique(got)) > 4


def test_a_model_without_opinion_gives_one_half(model, split):
    with torch.no_grad():
        model.item_embedding.weight.zero_()
    np.testing.assert_array_equal(forgetting.percentiles(model, split, np.arange(50)), 0.5)


@pytest.mark.parametrize("sign, expected", [(1, 1.0), (-1, 0.0)])
def test_a_forgotten_item_above_or_below_all_others_gives_one_or_zero(model, split, sign, expected):
    row = 33
    with torch.no_grad():
        user = model.user_embedding.weight[split.users[row]]
        model.item_embedding.weight[split.items[row]] = sign * 1000 * user
    assert forgetting.percentiles(model, split, np.array([row]))[0] == expected


def test_the_padding_item_and_items_that_the_user_had_do_not_count(model, split):
    row = 33
    user = int(split.users[row])
    before = forgetting.percentiles(model, split, np.array([row]))
    with torch.no_grad():
        had = np.setdiff1d(split.seen()(user), [split.items[row]])
        for item in (0, *had):
            model.item_embedding.weight[int(item)] = 1000 * model.user_embedding.weight[user]
    np.testing.assert_array_equal(forgetting.percentiles(model, split, np.array([row])), before)


def test_rows_come_back_in_their_order(model, split):
    rows = np.array([200, 3, 77, 4])
    together = forgetting.percentiles(model, split, rows)
    alone = [forgetting.percentiles(model, split, np.array([row]))[0] for row in rows]
    np.testing.assert_array_equal(together, alone)


def test_percentiles_change_no_weight(model, split):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forgetting.percentiles(model, split, np.arange(20))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# -- the verdict


def around(mean, noise=0.02, n=200, seed=0):
    draw = np.random.default_rng(seed).normal(0, noise, n)
    return mean + draw - draw.mean()


RETRAINED = around(0.6, seed=3)


@pytest.mark.parametrize(
    "original, unlearned, outcome, beginning",
    [
        (around(0.6001, seed=1), around(0.6, seed=2), "too small", "The forget set is too small to tell"),
        (around(0.9, seed=1), around(0.6001, seed=2), "alike", "The forget set now looks like the retrained model's"),
        (
            around(0.9, seed=1),
            around(0.75, seed=2),
            "not yet",
            "The forget set does not yet look like the retrained model's",
        ),
        (around(0.9, seed=1), around(0.45, seed=2), "over-forgotten", "The forget set is over-forgotten"),
    ],
    ids=["too small", "forgotten", "not yet", "over-forgotten"],
)
def test_the_verdict_names_the_situation(original, unlearned, outcome, beginning):
    text, figures = forgetting.verdict(original, unlearned, RETRAINED)
    assert figures["outcome"] == outcome
    assert text.startswith(beginning) and "\n" not in text
    for mean in (original.mean(), unlearned.mean(), RETRAINED.mean()):
        assert f"{mean:.4f}" in text
    assert figures["gap"] == pytest.approx(unlearned.mean() - 0.6)
    assert figures["effect"] == pytest.approx(original.mean() - 0.6)


def test_not_yet_says_how_much_of_the_way_was_made():
    text, figures = forgetting.verdict(around(0.9, seed=1), around(0.75, seed=2), RETRAINED)
    assert figures["gap_closed"] == pytest.approx(0.5)
    assert "50%" in text


def test_a_step_in_the_wrong_direction_is_not_called_forgotten():
    text, figures = forgetting.verdict(around(0.7, seed=1), around(0.8, seed=2), RETRAINED)
    assert "does not yet" in text and figures["gap_closed"] < 0


def test_doing_nothing_is_never_called_forgotten():
    for mean in (0.6001, 0.605, 0.61, 0.7, 0.95):
        original = around(mean, seed=1)
        text, _ = forgetting.verdict(original, original, RETRAINED)
        assert "now looks like" not in text


def test_the_verdict_compares_pair_by_pair():
    """The same means, but pairs that move together leave no room for noise: a small gap then counts."""
    original, retrained = around(0.9, 0.2, seed=1), around(0.6, 0.2, seed=3)
    together, apart = retrained + 0.01, around(0.61, 0.2, seed=2)
    assert "does not yet" in forgetting.verdict(original, together, retrained)[0]
    assert "now looks like" in forgetting.verdict(original, apart, retrained)[0]


def test_one_forgotten_pair_is_too_small_to_tell():
    text, _ = forgetting.verdict(np.array([0.9]), np.array([0.6]), np.array([0.5]))
    assert "too small" in text


def test_equal_models_give_a_verdict_too():
    text, _ = forgetting.verdict(RETRAINED, RETRAINED, RETRAINED)
    assert "too small" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused_but_for_paddings(make_split, make_model, value):
    split = make_split()
    model, rows = make_model(split), np.arange(5)
    model.item_embedding.weight.data[0, 0] = value
    assert np.isfinite(forgetting.percentiles(model, split, rows)).all()
    model.item_embedding.weight.data[7, 0] = value
    with pytest.raises(InputError, match="scores are not finite"):
        forgetting.percentiles(model, split, rows)
