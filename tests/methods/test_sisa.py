"""SISA: isolated shards and slices, exact forgetting, and an ensemble that RecBole evaluates like any model."""

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.trainer.trainer import Trainer

from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import ranking
from recbole_unlearn.evaluation.forgetting import percentiles, scores
from recbole_unlearn.evaluation.ranks import RankedLoader
from recbole_unlearn.methods import chosen, shards
from recbole_unlearn.methods.sisa import SISA, MeanScore
from recbole_unlearn.training.trainer import BPRTrainer


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def spied(monkeypatch):
    """Every loader that a shard was trained with: [(seed, rows' pairs, loader)]."""
    seen, fit = [], shards.fit

    def spy(config, model, loader, *args, **kwargs):
        data = loader.dataset
        pairs = {(int(u), int(i)) for u, i in zip(data.inter_feat["user_id"], data.inter_feat["item_id"], strict=True)}
        seen.append((config["seed"], pairs, loader))
        return fit(config, model, loader, *args, **kwargs)

    monkeypatch.setattr(shards, "fit", spy)
    return seen


def prepared(task, settings):
    method = SISA(task, settings)
    method.prepare()
    return method


def test_shards_divide_the_rows_evenly_at_random(make_shard_task, make_settings):
    method = prepared(make_shard_task(epochs=1), make_settings("sisa", shards=3, slices=2))
    size = np.bincount(method.shard * 2 + method.slice, minlength=6)
    assert size.sum() == method.task.split.n_rows and np.ptp(size) <= 2
    # at random: every user's rows lie in several shards
    split = method.task.split
    assert np.mean([len(set(method.shard[split.users == u])) > 1 for u in np.unique(split.users)]) > 0.9


@pytest.mark.parametrize("model", ["BPR", "LightGCN"])
def test_a_request_retrains_its_shard_without_the_forgotten_and_nothing_else(
    model, make_shard_task, make_settings, some_rows, content, spied
):
    method = prepared(make_shard_task(model), make_settings("sisa", shards=3))
    assert len({seed for seed, _, _ in spied}) == len(spied) == 3
    files, before = content(method.folder), {k: v.clone() for k, v in method.original().state_dict().items()}
    rows = some_rows(method, 1, 9)
    spied.clear()
    result = method.forget(rows)
    split = method.task.split
    forgotten = {(int(split.users[r]), int(split.items[r])) for r in rows}
    ((_, pairs, _),) = spied
    assert not forgotten & pairs
    assert pairs == {(int(split.users[r]), int(split.items[r])) for r in np.flatnonzero(method.shard == 1)} - forgotten
    assert result.details["shards_retrained"] == [1] and result.details["rows_retrained"] == len(pairs)
    for shard in (0, 2):
        assert torch.equal(result.model.user[:, shard], before["user"][:, shard])
        assert torch.equal(result.model.item[:, shard], before["item"][:, shard])
    assert not torch.equal(result.model.user[:, 1], before["user"][:, 1])
    # what was prepared is as it was
    assert content(method.folder) == files
    assert all(torch.equal(value, before[name]) for name, value in method.original().state_dict().items())
    assert result.seconds >= result.details["seconds_shards"] > 0


@pytest.mark.parametrize("slices", [1, 3])
def test_forgetting_is_exact(slices, make_shard_task, make_settings, some_rows, monkeypatch, tmp_path):
    """The result is bit for bit what training without the forgotten rows, in the same shards, would have given."""
    settings = make_settings("sisa", shards=2, slices=slices)
    method = prepared(make_shard_task(), settings)
    rows = some_rows(method, 0, 7)
    forgotten = method.forget(rows).model

    class Never(SISA):  # the forgotten rows are in no shard from the start
        def partition(self, rng):
            shard, number = super().partition(rng)
            shard[rows] = -1
            return shard, number

    task = make_shard_task()
    task.folder = tmp_path / "never"
    never = Never(task, settings)
    never.prepare()
    assert torch.equal(forgotten.user, never.original().user)
    assert torch.equal(forgotten.item, never.original().item)
    assert same(method.forget(rows).model, forgotten)  # whatever has been trained in between


def test_slices_restart_from_the_checkpoint_before_the_first_that_is_hit(
    make_shard_task, make_settings, some_rows, spied
):
    method = prepared(make_shard_task(), make_settings("sisa", shards=2, slices=3))
    split, config = method.task.split, method.task.config
    assert len(spied) == 6
    seen = [pairs for _, pairs, _ in spied[:3]]
    assert seen[0] < seen[1] < seen[2]
    rows = np.sort(np.concatenate([some_rows(method, 1, 4, number) for number in (1, 2)]))
    spied.clear()
    result = method.forget(rows)
    assert result.details["slices_retrained"] == len(spied) == 2
    before = torch.load(method.folder / "shard-1-slice-0.pth", weights_only=True)["made"]
    weights, keep = before, np.setdiff1d(np.arange(split.n_rows), rows)
    for number in (1, 2):
        own = shards.trainable(split, keep[(method.shard[keep] == 1) & (method.slice[keep] <= number)])
        seed = shards.derived_seed(method.task.seed, 1, number)
        weights = shards.train_shard(config, split, own, seed, round(config["epochs"] * 2 / 4), weights)
    user, item = shards.shard_embeddings(config, split, own, weights)
    assert torch.equal(result.model.user[:, 1], user) and torch.equal(result.model.item[:, 1], item)


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_negatives_are_items_of_the_shard_that_the_user_has_not_there(
    distribution, make_shard_task, make_settings, spied, monkeypatch
):
    """Stock RecBole draws here; the draws of the trainer's compiled loader are tested below."""
    drawn = []

    def record(self, train_data, *args, **kwargs):
        class Recorder:
            def __iter__(self):
                for batch in train_data:
                    drawn.append((train_data.dataset, batch["user_id"].numpy(), batch["neg_item_id"].numpy()))
                    yield batch

            def __len__(self):
                return len(train_data)

            def __getattr__(self, name):
                return getattr(train_data, name)

        return Trainer._train_epoch(self, Recorder(), *args, **kwargs)

    monkeypatch.setattr(BPRTrainer, "_train_epoch", record)
    args = {"distribution": distribution, "sample_num": 2, "alpha": 0.7, "dynamic": False, "candidate_num": 0}
    task = make_shard_task(epochs=2, train_neg_sample_args=args)
    method = prepared(task, make_settings("sisa", shards=4))
    split = task.split
    drop = np.isin(split.items, [3, 4, 5, 6]) & (method.shard == 2)  # items that only other shards have
    method.forget(np.flatnonzero(drop))
    assert len({id(data) for data, _, _ in drawn}) == 5
    for data, users, negatives in drawn:
        own_users, own_items = data.inter_feat["user_id"].numpy(), data.inter_feat["item_id"].numpy()
        assert np.isin(negatives, own_items).all()
        pair = own_users * split.n_items + own_items
        assert not np.isin(users * split.n_items + negatives, pair).any()
    assert not np.isin(drawn[-1][2], [3, 4, 5, 6]).any()
    assert any(len(set(negatives)) > 10 for _, _, negatives in drawn)


def test_compiled_draws_are_shard_local_too(split):
    """The loader as the trainer uses it, with its compiled collate function."""
    from recbole_unlearn.data.sampling import NegativeDraw

    rows = np.flatnonzero(split.items % 4 == 1)
    data = shards.subset(split, shards.trainable(split, rows))
    draw = NegativeDraw(shards.ShardSampler(data).set_phase("train"), split.n_users)
    users = np.repeat(data.inter_feat["user_id"].numpy(), 20)
    negatives = draw(users, 1)
    own = data.inter_feat["user_id"].numpy() * split.n_items + data.inter_feat["item_id"].numpy()
    assert set(negatives) == set(data.inter_feat["item_id"].numpy())
    assert not np.isin(users * split.n_items + negatives, own).any()


def test_rows_without_a_negative_are_left_out(split):
    """A user with all of a shard's items has no triple there; sampling would never end."""
    user = int(split.users[0])
    items = split.items[split.users == user][:3]
    rows = np.flatnonzero(np.isin(split.items, items) & (split.users != 0))
    rest = shards.trainable(split, rows)
    assert user in split.users[rows] and user not in split.users[rest]
    assert len(rest) and set(split.items[rest]) == set(items)
    assert not len(shards.trainable(split, rows[split.users[rows] == user]))


def test_validation_of_a_shard_knows_nothing_of_other_shards(make_shard_task):
    task = make_shard_task()
    split = task.split
    rows = np.arange(0, split.n_rows, 3)
    loader = shards.shard_validation(task.config, split, shards.subset(split, rows))
    masked = [set(loader.uid2history_item[u].tolist()) for u in loader.uid_list]
    expected = [set(split.items[rows][split.users[rows] == int(u)].tolist()) for u in loader.uid_list]
    assert masked == expected


@torch.no_grad()
def test_score_is_the_mean_over_shards_with_both_and_popularity_elsewhere(make_shard_task):
    config = make_shard_task().config
    rng = np.random.default_rng(0)
    user, item = rng.normal(size=(9, 3, 4)).astype("f4"), rng.normal(size=(12, 3, 4)).astype("f4")
    user[0] = item[0] = 0
    user[rng.random((9, 3)) < 0.5] = 0
    item[rng.random((12, 3)) < 0.5] = 0
    user[5] = 0  # a user of no shard
    ensemble = MeanScore(config, torch.from_numpy(user), torch.from_numpy(item))
    count = rng.integers(0, 50, 12)
    ensemble.set_popularity(count)
    got = ensemble.full_sort_predict(Interaction({"user_id": torch.arange(9)})).view(9, 12).numpy()
    within = []
    for u in range(9):
        for i in range(12):
            both = [k for k in range(3) if user[u, k].any() and item[i, k].any()]
            within += [float(user[u, k] @ item[i, k]) for k in both]
            if both:
                assert got[u, i] == pytest.approx(np.mean([user[u, k] @ item[i, k] for k in both]), abs=1e-5)
            else:
                assert got[u, i] == ensemble.fallback[i]
    popularity = np.log1p(count)[1:]
    expected = np.mean(within) + np.std(within) * (popularity - popularity.mean()) / popularity.std(ddof=1)
    np.testing.assert_allclose(ensemble.fallback.numpy()[1:], expected, rtol=1e-4)
    order = np.argsort(-got[5, 1:], kind="stable")
    assert (np.diff(count[1:][order]) <= 0).all()
    pairs = {"user_id": torch.arange(9).repeat_interleave(12), "item_id": torch.arange(12).repeat(9)}
    np.testing.assert_allclose(ensemble.predict(Interaction(pairs)).numpy(), got.ravel(), atol=1e-5)


def test_a_user_who_lost_everything_is_ranked_by_what_remains_popular(make_shard_task, make_settings):
    method = prepared(make_shard_task(epochs=1), make_settings("sisa", shards=2))
    split = method.task.split
    rows = np.flatnonzero(split.users == 5)
    model = method.forget(rows).model
    ((_, row),) = scores(model, np.array([5]), "user_id")
    count = np.bincount(np.delete(split.items, rows), minlength=split.n_items)
    order = 1 + np.argsort(-row[0, 1:], kind="stable")
    assert (np.diff(count[order]) <= 0).all() and count[order[0]] > count[order[-1]]


@pytest.mark.parametrize("model", ["BPR", "LightGCN"])
def test_recbole_evaluates_saves_and_loads_it_like_any_model(
    model, make_shard_task, make_settings, some_rows, tmp_path
):
    method = prepared(make_shard_task(model), make_settings("sisa", shards=2))
    split, config = method.task.split, method.task.config
    rows = some_rows(method, 0, 12)
    ensemble = method.forget(rows).model
    trainer = BPRTrainer(config, ensemble)
    for sampled in (0, 99):
        assert RankedLoader.fits(trainer, split.test_loader(sampled))
    fast = ranking.evaluate(trainer, ensemble, split, 3)
    slow = ranking.evaluate(super_trainer(config, ensemble), ensemble, split, 3)
    assert fast == slow and 0 < fast["full"]["ndcg@10"] < 1
    assert ((percentiles(ensemble, split, rows) >= 0) & (percentiles(ensemble, split, rows) <= 1)).all()

    ensemble.save(tmp_path / "ensemble.pth")
    again = MeanScore.load(tmp_path / "ensemble.pth", config)
    assert same(again, ensemble)
    assert ranking.evaluate(trainer, again, split, 3) == fast


def super_trainer(config, model):
    """RecBole's own trainer, which ranks by sorting."""
    from recbole.trainer.trainer import Trainer

    return Trainer(config, model)


def test_what_is_prepared_is_found_again_and_a_cut_off_preparation_goes_on(
    make_shard_task, make_settings, spied, content, monkeypatch
):
    settings = make_settings("sisa", shards=3)
    method = SISA(make_shard_task(), settings)
    fit = shards.fit

    def killed(*args, **kwargs):
        if len(spied) == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(shards, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        method.prepare()
    monkeypatch.setattr(shards, "fit", fit)
    seconds = method.prepare()
    assert len(spied) == 3  # the two finished ones were not trained again
    files = content(method.folder)
    again = SISA(make_shard_task(), settings)
    assert again.prepare() == seconds > 0 and len(spied) == 3
    assert content(method.folder) == files and same(again.original(), method.original())
    other = SISA(make_shard_task(learning_rate=0.03), settings)
    other.prepare()
    assert other.folder != method.folder and len(spied) == 6


def test_ideal_puts_the_forget_set_into_one_shard(make_shard_task, make_settings):
    rows = np.arange(5, 500, 50)
    method = SISA(make_shard_task(epochs=1), make_settings("sisa", ideal=True))
    with pytest.raises(InputError, match="ideal needs the forget set"):
        method.prepare()
    method.prepare(rows)
    assert len(set(method.shard[rows])) == 1
    assert len(method.forget(rows).details["shards_retrained"]) == 1
    plain = prepared(make_shard_task(epochs=1), make_settings("sisa"))
    assert len(set(plain.shard[rows])) > 1 and (plain.shard != method.shard).sum() < len(rows)
    assert plain.folder != method.folder


def test_a_shard_that_loses_everything_drops_out(make_shard_task, make_settings):
    method = prepared(make_shard_task(epochs=1), make_settings("sisa", shards=3))
    result = method.forget(np.flatnonzero(method.shard == 1))
    model = result.model
    assert result.details["shards_retrained"] == [1] and result.details["slices_retrained"] == 0
    assert not model.user[:, 1].any() and not model.item[:, 1].any()
    assert torch.isfinite(model.full_sort_predict(Interaction({"user_id": torch.arange(1, 9)}))).all()


def test_other_models_and_damaged_files_are_refused(make_shard_task, make_settings, make_config, tmp_path):
    with pytest.raises(InputError, match="sisa is not for NeuMF: it is for BPR and LightGCN"):
        chosen("sisa", make_config("NeuMF"))
    method = prepared(make_shard_task(epochs=1), make_settings("sisa", shards=2))
    (method.folder / "shard-1-slice-0.pth").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="shard-1-slice-0.pth cannot be read.*delete it"):
        method.prepare()
    with pytest.raises(InputError, match="no MeanScore ensemble"):
        MeanScore.load(method.folder / "partition.pth", method.task.config)
