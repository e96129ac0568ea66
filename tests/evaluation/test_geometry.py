"""Distances in embedding space: the ratio against plain loops, the map by who ends up near whom, and no names."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recbole_unlearn.evaluation import geometry
from recbole_unlearn.methods.receraser import Aggregated
from recbole_unlearn.methods.sisa import MeanScore


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def model(P, Q):
    """What `geometry` needs of a RecBole model."""
    state = {"user_embedding.weight": torch.from_numpy(P), "item_embedding.weight": torch.from_numpy(Q)}
    return SimpleNamespace(state_dict=lambda: state)


def log(users, items, negatives):
    """A log whose every epoch drew ``negatives[epoch]``."""
    return SimpleNamespace(
        users=np.array(users),
        items=np.array(items),
        negatives=negatives.shape[-1],
        gather=lambda rows, epochs: negatives[epochs][:, rows],
    )


def test_the_ratio_is_the_mean_distance_to_negatives_over_that_to_the_item(rng):
    P, Q = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)
    users, items, negatives = np.array([0, 3, 3]), np.array([1, 2, 5]), np.array([[4, 6], [7, 8], [4, 1]])
    expected = []
    for user, item, others in zip(users, items, negatives, strict=True):
        near = np.sqrt(((P[user].astype(float) - Q[item]) ** 2).sum())
        expected.append(np.mean([np.sqrt(((P[user].astype(float) - Q[j]) ** 2).sum()) / near for j in others]))
    np.testing.assert_allclose(geometry.pnpr(P, Q, users, items, negatives), expected, rtol=1e-6)


def test_the_distance_of_weights_counts_every_weight_once(rng):
    P, Q = rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    assert geometry.weight_distance((P, Q), (P, Q)) == 0
    moved = geometry.weight_distance((P, Q), (P + np.float32(2), Q - np.float32(1)))
    assert moved == pytest.approx(np.sqrt(6 * 4 + 10 * 1), rel=1e-6)


def test_an_ensemble_that_averages_scores_has_the_mean_over_the_shards_that_have_a_row(make_config, rng):
    user, item = (rng.normal(size=(n, 3, 8)).astype(np.float32) for n in (4, 5))
    user[0], user[1, 2], item[3, :2] = 0, 0, 0
    P, Q = geometry.embeddings(MeanScore(make_config(), torch.from_numpy(user), torch.from_numpy(item)))
    np.testing.assert_array_equal(P[0], 0)
    np.testing.assert_allclose(P[1:], [user[1, :2].mean(0), *user[2:].mean(1)], rtol=1e-5)
    np.testing.assert_allclose(Q, [*item[:3].mean(1), item[3, 2], item[4].mean(0)], rtol=1e-5)


def test_an_aggregated_ensemble_has_the_embeddings_that_it_scores_by(make_config, rng):
    parts = [torch.from_numpy(rng.normal(size=(n, 3, 8)).astype(np.float32)) for n in (4, 5)]
    ensemble = Aggregated(make_config(), *parts).eval()
    P, Q = geometry.embeddings(ensemble)
    scores = ensemble.full_sort_predict({ensemble.USER_ID: torch.arange(4)}).view(4, 5)
    np.testing.assert_allclose(P @ Q.T, scores, rtol=1e-5, atol=1e-6)


def test_models_without_a_pair_of_embeddings_have_no_distance(rng):
    P, Q = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)
    assert geometry.models_distance(model(P, Q), model(P, Q)) == 0
    assert geometry.models_distance(model(P, Q), model(P, Q[:, :2])) is None


def test_means_are_taken_user_by_user():
    np.testing.assert_allclose(geometry.by_user(np.array([5, 2, 5, 9]), np.array([1.0, 7.0, 4.0, 0.5])), [7, 2.5, 0.5])


def test_the_map_keeps_neighbours_together(rng):
    far = np.zeros(8)
    far[0] = 30
    P = rng.normal(size=(2, 8))
    Q = np.concatenate([P[1] + 0.1 * rng.normal(size=(3, 8)), far + rng.normal(size=(20, 8))])
    found = geometry.tsne_map(P, Q, 1, np.arange(3), np.arange(3, 23))
    assert found == geometry.tsne_map(P, Q, 1, np.arange(3), np.arange(3, 23))
    distance = [np.linalg.norm(np.subtract(found["user"], found[kind]), axis=1) for kind in ("positives", "negatives")]
    assert [len(each) for each in distance] == [3, 20]
    assert distance[0].max() < distance[1].min()
    places = np.array([found["user"], *found["positives"], *found["negatives"]])
    assert places.min() >= 0 and places.max() <= 1


def test_every_user_that_loses_something_is_counted_and_one_is_mapped(rng):
    P, Q = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(30, 4)).astype(np.float32)
    users, items = [1, 1, 1, 1, 2, 4, 5], [3, 4, 5, 6, 3, 8, 9]
    negatives = rng.integers(10, 30, (12, 7, 2))
    rows = np.array([0, 1, 2, 3, 4, 6])
    models = {"original": model(P, Q), "unlearned": model(P + 0.1, Q)}
    found = geometry.geometry(models, log(users, items, negatives), rows, 12)
    recent = negatives[2:].transpose(1, 0, 2).reshape(7, -1)  # of the last ten epochs
    expected = geometry.pnpr(P, Q, np.array(users)[rows], np.array(items)[rows], recent[rows])
    by_user = [expected[:4].mean(), expected[4], expected[5]]
    assert sorted(found["pnpr"]["original"]) == pytest.approx(sorted(by_user), abs=1e-4)
    for each in found["map"].values():
        assert len(each["positives"]) == 3 and 3 <= len(each["negatives"]) <= 45
    assert found == geometry.geometry(models, log(users, items, negatives), rows, 12)
    unmapped = geometry.geometry(models, log(users, items, negatives), rows, 12, mapped=False)
    assert unmapped == {"pnpr": found["pnpr"], "map": {}}


def test_a_single_forgotten_interaction_has_a_map_too(rng):
    P, Q = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    found = geometry.geometry({"original": model(P, Q)}, log([1], [2], np.array([[[5]], [[6]]])), np.array([0]), 2)
    assert len(found["pnpr"]["original"]) == 1 and len(found["map"]["original"]["negatives"]) == 2


def test_models_without_embeddings_and_empty_requests_have_no_geometry(rng):
    P, Q = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    other = SimpleNamespace(state_dict=lambda: {"layer.weight": torch.ones(2, 2)})
    each_log = log([1], [2], np.array([[[5]], [[6]]]))
    assert geometry.geometry({"original": model(P, Q), "unlearned": other}, each_log, np.array([0]), 2) == {}
    assert geometry.geometry({"original": model(P, Q)}, each_log, np.array([], int), 2) == {}


def test_turning_undoes_a_rotation_and_leaves_scores_alone(rng):
    pair = rng.normal(size=(40, 5)), rng.normal(size=(30, 5))
    matrix, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    other = tuple(table @ matrix for table in pair)
    found = geometry.turned(pair, other)
    assert geometry.weight_distance(pair, other) > 1 > 1e-10 > geometry.weight_distance(found, other)
    users, items = rng.integers(0, 40, 100), rng.integers(0, 30, 100)
    np.testing.assert_allclose(geometry.scores(found, users, items), geometry.scores(pair, users, items))
    np.testing.assert_allclose(
        geometry.scores(pair, users, items), [pair[0][u] @ pair[1][i] for u, i in zip(users, items, strict=True)]
    )


def test_no_other_rotation_is_nearer(rng):
    first, second = ((rng.normal(size=(20, 3)), rng.normal(size=(10, 3))) for _ in range(2))
    nearest = geometry.weight_distance(geometry.turned(first, second), second)
    for _ in range(200):
        matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        assert nearest <= geometry.weight_distance(tuple(table @ matrix for table in first), second)
