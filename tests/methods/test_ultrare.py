"""UltraRE: balanced clusters by optimal transport, and a combination by logistic regression."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from recbole_unlearn.evaluation import ranking
from recbole_unlearn.evaluation.forgetting import scores
from recbole_unlearn.methods.receraser import Points
from recbole_unlearn.methods.ultrare import (
    UltraRE,
    WeightedScore,
    logistic_regression,
    pair_scores,
    transport,
    transport_clusters,
)
from recbole_unlearn.training.trainer import BPRTrainer


def test_transport_has_the_marginals_and_is_optimal():
    """Equal rows and columns, and the least cost - entropy of all such plans: its form is that of the optimum."""
    rng = np.random.default_rng(0)
    cost = rng.random((300, 4)) * [1, 2, 1, 3]
    scale, error = transport(np.exp(-cost / 0.1), np.ones(4), 2000, 1e-9)
    assert error < 1e-9
    plan = np.exp(-cost / 0.1) * scale
    plan /= plan.sum(1, keepdims=True) * 300
    np.testing.assert_allclose(plan.sum(0), 0.25, rtol=1e-8)

    def objective(p):
        return (p * cost).sum() + 0.1 * (p * np.log(p)).sum()

    for _ in range(20):  # no direction that keeps the marginals leads down
        rows, columns = rng.choice(300, 2, replace=False), rng.choice(4, 2, replace=False)
        move = np.zeros_like(plan)
        move[np.ix_(rows, columns)] = np.array([[1, -1], [-1, 1]]) * plan[np.ix_(rows, columns)].min() * 0.5
        assert objective(plan + move) > objective(plan) and objective(plan - move) > objective(plan)


def test_clusters_are_balanced_and_much_tighter_than_random_ones():
    rng = np.random.default_rng(2)
    group = rng.choice(4, 1003, p=[0.4, 0.3, 0.2, 0.1])
    points = Points([((rng.normal(size=(4, 6)) * 3)[group] + rng.normal(size=(1003, 6)), np.arange(1003))])
    labels = transport_clusters(points, 4, 0.05, 10, rng)
    size = np.bincount(labels, minlength=4)
    assert size.max() == 251 and size.min() >= 250

    def within(labels):
        return points.distances(points.means(labels, points.at(np.arange(4))))[np.arange(1003), labels].mean()

    assert within(labels) < 0.6 * within(rng.permutation(labels))


def test_regression_finds_the_minimum():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 3)) * [1, 5, 0.1]
    y = rng.random(400) < 1 / (1 + np.exp(-(x @ [1.5, -0.2, 0] + 0.4)))
    sign = np.where(y, -1, 1)

    def objective(w):
        return np.logaddexp(0, sign * (x @ w[:-1] + w[-1])).sum() + 0.35 * w[:-1] @ w[:-1]

    weight, intercept = logistic_regression(x, y, 0.7)
    found = np.append(weight, intercept)
    best = minimize(objective, np.zeros(4), tol=1e-12)
    assert objective(found) <= best.fun + 1e-6
    np.testing.assert_allclose(found, best.x, atol=1e-3)


def test_regression_survives_separable_data_and_empty_shards():
    x = np.column_stack([np.repeat([1.0, -1.0], 50), np.zeros(100)])
    weight, _ = logistic_regression(x, np.repeat([True, False], 50), 0)
    assert weight[0] > 1 and weight[1] == 0 and np.isfinite(weight).all()


def test_score_is_the_weighted_sum(make_shard_task):
    torch.manual_seed(0)
    user, item = torch.randn(7, 3, 4), torch.randn(8, 3, 4)
    model = WeightedScore(make_shard_task().config, user, item)
    model.weight.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    ((_, got),) = scores(model, np.arange(7), "user_id")
    users, items = np.divmod(np.arange(56), 8)
    expected = pair_scores(user.numpy(), item.numpy(), users, items) @ [0.5, -1, 2]
    np.testing.assert_allclose(got.ravel(), expected, atol=1e-5)
    np.testing.assert_allclose(
        pair_scores(user.numpy(), item.numpy(), users[29:30], items[29:30])[0], (user[3] * item[5]).sum(1)
    )


@pytest.mark.parametrize("model", ["BPR", "LightGCN"])
def test_a_request_retrains_one_shard_and_the_combination(
    model, make_shard_task, make_settings, some_rows, content, tmp_path
):
    task = make_shard_task(model)
    method = UltraRE(task, make_settings("ultrare", shards=3))
    assert method.prepare() > 0
    split = task.split
    homes = [set(method.shard[split.users == user]) for user in np.unique(split.users)]
    assert all(len(home) == 1 for home in homes)  # the published partition is of users
    files, before = content(method.folder), {k: v.clone() for k, v in method.original().state_dict().items()}
    rows = some_rows(method, 0, 8)
    result = method.forget(rows)
    assert torch.equal(result.model.user[:, 1:], before["user"][:, 1:])
    assert torch.equal(result.model.item[:, 1:], before["item"][:, 1:])
    assert not torch.equal(result.model.user[:, 0], before["user"][:, 0])
    assert not torch.equal(result.model.weight, before["weight"])
    assert content(method.folder) == files
    assert result.details["shards_retrained"] == [0] and "have seen" in result.details["partition"]
    assert len(result.details["weights"]) == 3

    # evaluated, saved and loaded like any model
    trainer = BPRTrainer(task.config, result.model)
    metrics = ranking.evaluate(trainer, result.model, split, 3)
    result.model.save(tmp_path / "ensemble.pth")
    again = WeightedScore.load(tmp_path / "ensemble.pth", task.config)
    assert ranking.evaluate(trainer, again, split, 3) == metrics and metrics["full"]["ndcg@10"] > 0
    assert torch.equal(method.forget(rows).model.weight, again.weight)


def test_a_user_who_lost_everything_is_ranked_by_popularity(make_shard_task, make_settings):
    method = UltraRE(make_shard_task(epochs=1), make_settings("ultrare", shards=2, partition="interaction"))
    method.prepare()
    split = method.task.split
    rows = np.flatnonzero(split.users == 5)
    ((_, row),) = scores(method.forget(rows).model, np.array([5]), "user_id")
    count = np.bincount(np.delete(split.items, rows), minlength=split.n_items)
    assert (np.diff(count[1 + np.argsort(-row[0, 1:], kind="stable")]) <= 0).all()
