"""RecEraser: balanced clusters, attention with the published formulas, and retraining of what was hit."""

from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction

from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import ranking
from recbole_unlearn.evaluation.ranks import RankedLoader
from recbole_unlearn.methods import receraser, shards
from recbole_unlearn.methods.receraser import Aggregated, Points, RecEraser, assign, cluster
from recbole_unlearn.training.trainer import BPRTrainer


def within(points, labels):
    """Mean distance to the own cluster's centroid."""
    k = labels.max() + 1
    centroids = points.means(labels, [np.zeros((k, table.shape[1])) for table, _ in points.factors])
    return points.distances(centroids)[np.arange(len(points)), labels].mean()


def interactions(rng, groups=4, rows=3000):
    """Interactions of users and items that lie in groups, and mostly stay in their own."""
    centre = rng.normal(size=(groups, 6)) * 3
    user, item = (centre[np.arange(n) % groups] + rng.normal(size=(n, 6)) for n in (150, 90))
    users = rng.integers(0, 150, rows)
    items = rng.integers(0, 90, rows)
    own = rng.random(rows) < 0.8
    items[own] = (items[own] // groups * groups + users[own] % groups) % 90
    return Points([(user, users), (item, items)])


# Partition


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_assignment_is_greedy_over_all_sorted_pairs(seed, ties):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 60)), int(rng.integers(1, 7))
    distance = rng.integers(0, 6, (n, k)).astype(float) if ties else rng.random((n, k)) * rng.random(k)
    capacity = ceil(rng.uniform(1, 1.5) * n / k)
    labels, size = np.full(n, -1), np.zeros(k, int)
    for pair in np.argsort(distance, axis=None, kind="stable"):
        point, target = divmod(pair, k)
        if labels[point] < 0 and size[target] < capacity:
            labels[point] = target
            size[target] += 1
    got = assign(distance, capacity)
    assert np.bincount(got, minlength=k).max() <= capacity
    if not ties:  # among equal pairs the order is free, but not the distances
        np.testing.assert_array_equal(got, labels)


def test_distances_and_centroids_are_the_published_ones():
    rng = np.random.default_rng(1)
    points = interactions(rng, rows=200)
    (user, users), (item, items) = points.factors
    centroids = [rng.normal(size=(3, 6)), rng.normal(size=(3, 6))]
    expected = [
        [((user[u] - a) ** 2).sum() * ((item[i] - b) ** 2).sum() for a, b in zip(*centroids, strict=True)]
        for u, i in zip(users, items, strict=True)
    ]
    np.testing.assert_allclose(points.distances(centroids), expected)
    labels = rng.integers(0, 2, 200)
    for mean, (table, index), before in zip(points.means(labels, centroids), points.factors, centroids, strict=True):
        for k in (0, 1):
            np.testing.assert_allclose(mean[k], table[index[labels == k]].mean(0))
        np.testing.assert_array_equal(mean[2], before[2])


@pytest.mark.parametrize("factors", [slice(0, 2), slice(0, 1), slice(1, 2)])
def test_clusters_are_balanced_and_much_tighter_than_random_ones(factors):
    rng = np.random.default_rng(2)
    points = interactions(rng)
    points.factors = points.factors[factors]
    labels = cluster(points, 4, 1.2, 50, rng)
    assert np.bincount(labels, minlength=4).max() <= ceil(1.2 * len(points) / 4)
    assert within(points, labels) < 0.5 * within(points, rng.permutation(labels))


@pytest.mark.parametrize("kind, column", [("user", "users"), ("item", "items")])
def test_a_shard_holds_all_interactions_of_its_users_or_items(kind, column, make_shard_task, make_settings):
    method = RecEraser(make_shard_task(epochs=1), make_settings("receraser", shards=3, partition=kind, epochs=1))
    method.prepare()
    ids = getattr(method.task.split, column)
    homes = [set(method.shard[ids == each]) for each in np.unique(ids)]
    assert all(len(home) == 1 for home in homes)
    assert np.bincount([home.pop() for home in homes], minlength=3).max() <= ceil(1.2 * len(homes) / 3)


# Aggregation


@pytest.fixture
def aggregated(make_shard_task):
    """A small ensemble in float64 and a batch for it."""
    torch.manual_seed(5)
    user, item = torch.randn(9, 3, 4).double(), torch.randn(12, 3, 4).double()
    user[2, 1], item[3] = 0, 0
    model = Aggregated(make_shard_task().config, user, item, dropout=0.3, regularisation=1e-2)
    for parameter in model.parameters():  # zero biases would sit on ReLU's kink for absent embeddings
        torch.nn.init.normal_(parameter, std=0.7)
    ids = {"user_id": torch.randint(1, 9, (20,)), "item_id": torch.randint(1, 12, (20,))}
    return model, Interaction({**ids, "neg_item_id": torch.randint(1, 12, (20,))})


def by_hand(attention, parts):
    """The published formulas, one embedding at a time: ``[shards, d]`` -> ``[d]``."""
    moved = [p @ w + b for p, w, b in zip(parts, attention.transfer, attention.bias, strict=True)]
    hidden = [torch.relu(attention.hidden.weight @ m + attention.hidden.bias) for m in moved]
    score = torch.stack([attention.out.weight[0] @ h for h in hidden]).exp()
    return sum(a * m for a, m in zip(score / score.sum(), moved, strict=True))


@torch.no_grad()
def test_loss_and_scores_follow_the_formulas(aggregated):
    model, batch = aggregated
    model.eval()
    assert model.user_attention.hidden.weight.shape == (2, 4)  # attention size d / 2
    p = [by_hand(model.user_attention, parts) for parts in model.user]
    q = [by_hand(model.item_attention, parts) for parts in model.item]
    gap = [p[u] @ (q[i] - q[j]) for u, i, j in zip(*(batch[f] for f in batch.interaction), strict=True)]
    both = (model.user_attention, model.item_attention)
    norm = sum((table**2).sum() for a in both for table in (a.transfer, a.bias)) / 2
    expected = -torch.log(1e-10 + torch.sigmoid(torch.stack(gap))).mean() + 1e-2 * norm
    torch.testing.assert_close(model.calculate_loss(batch), expected)
    scores = model.full_sort_predict(Interaction({"user_id": torch.arange(9)})).view(9, 12)
    torch.testing.assert_close(scores, torch.stack(p) @ torch.stack(q).T)
    torch.testing.assert_close(model.predict(batch), scores[batch["user_id"], batch["item_id"]])


def test_gradients_agree_with_finite_differences(aggregated):
    model, batch = aggregated
    model.eval()
    model.calculate_loss(batch).backward()
    assert {name for name, _ in model.named_parameters()} == {
        f"{side}_attention.{name}"
        for side in ("user", "item")
        for name in ("transfer", "bias", "hidden.weight", "hidden.bias", "out.weight")
    }
    step = 1e-6
    for name, parameter in model.named_parameters():
        expected = torch.empty_like(parameter)
        for index in np.ndindex(*parameter.shape):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * step
                    values.append(model.calculate_loss(batch).item())
                    parameter[index] -= sign * step
            expected[index] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_falls_on_the_user_in_training_only(aggregated):
    model, batch = aggregated
    with torch.no_grad():
        still = model.eval().calculate_loss(batch)
        assert model.calculate_loss(batch) == still
        moving = {model.train().calculate_loss(batch).item() for _ in range(5)}
    assert len(moving) == 5


# Requests


@pytest.mark.parametrize("model", ["BPR", "LightGCN"])
def test_a_request_retrains_one_shard_and_the_aggregation(
    model, make_shard_task, make_settings, some_rows, content, monkeypatch, tmp_path
):
    task = make_shard_task(model)
    method = RecEraser(task, make_settings("receraser", shards=3, epochs=2))
    seconds = method.prepare()
    files, before = content(method.folder), {k: v.clone() for k, v in method.original().state_dict().items()}
    seen, fit = [], shards.fit

    def spy(config, model, loader, *args, **kwargs):
        data = loader.dataset
        seen.append(
            {(int(u), int(i)) for u, i in zip(data.inter_feat["user_id"], data.inter_feat["item_id"], strict=True)}
        )
        return fit(config, model, loader, *args, **kwargs)

    monkeypatch.setattr(shards, "fit", spy)
    monkeypatch.setattr(receraser, "fit", spy)
    rows = some_rows(method, 2, 8)
    result = method.forget(rows)
    split = task.split
    forgotten = {(int(split.users[r]), int(split.items[r])) for r in rows}
    assert len(seen) == 2 and not any(forgotten & pairs for pairs in seen)
    assert len(seen[1]) == split.n_rows - len(rows)  # the aggregation learns from all that remains
    assert torch.equal(result.model.user[:, :2], before["user"][:, :2])
    assert torch.equal(result.model.item[:, :2], before["item"][:, :2])
    assert not torch.equal(result.model.user[:, 2], before["user"][:, 2])
    assert not torch.equal(result.model.user_attention.transfer, before["user_attention.transfer"])
    assert content(method.folder) == files
    assert all(torch.equal(value, before[name]) for name, value in method.original().state_dict().items())
    details = result.details
    assert details["shards_retrained"] == [2] and "have seen the forget set" in details["partition"]
    assert min(details["seconds_shards"], details["seconds_combination"]) > 0
    assert result.seconds == pytest.approx(details["seconds_shards"] + details["seconds_combination"])
    assert seconds == pytest.approx(
        sum(torch.load(path, weights_only=True)["seconds"] for path in method.folder.glob("*.pth"))
    )

    # evaluated, saved and loaded like any model
    trainer = BPRTrainer(task.config, result.model)
    assert RankedLoader.fits(trainer, split.test_loader(0))
    metrics = ranking.evaluate(trainer, result.model, split, 3)
    result.model.save(tmp_path / "ensemble.pth")
    again = Aggregated.load(tmp_path / "ensemble.pth", task.config)
    assert ranking.evaluate(trainer, again, split, 3) == metrics
    assert torch.equal(method.forget(rows).model.user_attention.transfer, again.user_attention.transfer)


def test_aggregation_learns_to_tell_interactions_from_negatives(make_shard_task, make_settings):
    task = make_shard_task(epochs=12, learning_rate=0.05)
    method = RecEraser(task, make_settings("receraser", shards=2, epochs=15))
    method.prepare()
    split, model = task.split, method.original()
    with torch.no_grad():
        scores = model.full_sort_predict(Interaction({"user_id": torch.arange(split.n_users)}))
    scores = scores.view(split.n_users, -1).numpy()
    had = np.zeros(scores.shape, bool)
    had[split.users, split.items] = True
    better = [scores[u, had[u]].mean() > scores[u, 1:][~had[u, 1:]].mean() for u in range(1, split.n_users)]
    assert np.mean(better) > 0.9


def test_shards_may_be_trained_by_kernels_and_the_attention_as_ever(make_shard_task, make_settings):
    found = {}
    for compiled in (False, True):
        task = make_shard_task(epochs=4, compiled=compiled)
        task.folder = task.folder / str(compiled)
        method = RecEraser(task, make_settings("receraser", shards=2, epochs=2))
        method.prepare()
        found[compiled] = method.original().state_dict()
    assert not torch.equal(found[True]["user"], found[False]["user"])  # but for rounding
    torch.testing.assert_close(found[True]["user"], found[False]["user"], rtol=1e-4, atol=1e-5)


def test_another_model_makes_another_partition_in_another_folder(make_shard_task, make_settings):
    task = make_shard_task(epochs=1)
    method = RecEraser(task, make_settings("receraser", shards=3, epochs=1))
    method.prepare()
    other = make_shard_task(epochs=1)
    other.stored = {**task.stored, "state_dict": {k: v.flip(0) for k, v in task.stored["state_dict"].items()}}
    again = RecEraser(other, method.settings)
    again.prepare()
    assert again.folder != method.folder and not np.array_equal(again.shard, method.shard)


def test_more_shards_than_users_are_refused(make_shard_task, make_settings):
    method = RecEraser(make_shard_task(), make_settings("receraser", shards=99, partition="user"))
    with pytest.raises(InputError, match="99 shards of 37 users; lower shards"):
        method.prepare()
