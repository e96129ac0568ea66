"""Ranking metrics are RecBole's own, and every model meets the same sampled negatives."""

import copy

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.model.general_recommender.bpr import BPR
from recbole.trainer.trainer import Trainer
from recbole.utils import init_seed

from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import ranking
from recbole_unlearn.training.trainer import BPRTrainer

METRICS = {"metrics": ["Recall", "MRR", "NDCG", "Hit", "Precision", "MAP"]}


@pytest.fixture(scope="module")
def wide(tmp_path_factory, write_data):
    """A data set of 400 items, of which 99 negatives are a small part: config_dict entries."""
    rng = np.random.default_rng(1)
    rows = []
    for user in range(31):
        liked = np.where(np.arange(400) % 4 == user % 4, 6.0, 1.0)
        for item in rng.choice(400, 28 + user % 5, replace=False, p=liked / liked.sum()):
            rows.append((f"u{user}", f"i{item}", len(rows)))
    return {"data_path": write_data(tmp_path_factory.mktemp("wide"), "tiny", rows), **METRICS}


@pytest.fixture
def trained(make_split, make_model, tmp_path, wide):
    """(split, trainer, trained model, another model)"""
    split = make_split(checkpoint_dir=str(tmp_path / "saved"), epochs=8, learning_rate=0.05, **wide)
    trainer = BPRTrainer(split.config, make_model(split))
    trainer.fit(split.train, split.valid, verbose=False, saved=False)
    return split, trainer, trainer.model, make_model(split, seed=8)


@pytest.fixture
def stock(make_options, tmp_path, wide):
    """Function (model's weights, uni99?, seed) -> metrics by stock RecBole at its default eval_batch_size."""

    def evaluate(state_dict, sampled, seed):
        options = make_options(checkpoint_dir=str(tmp_path / "stock"), **wide)
        config = Config("BPR", "tiny", config_dict=options)
        assert config["eval_batch_size"] == 4096
        init_seed(config["seed"], config["reproducibility"])
        train, _, test = data_preparation(config, create_dataset(config))
        if sampled:
            config = copy.deepcopy(config)
            config["test_neg_sample_args"] = {"distribution": "uniform", "sample_num": 99}
            test = NegSampleEvalDataLoader(config, test.dataset, test._sampler, shuffle=False)
        else:
            assert type(test) is FullSortEvalDataLoader
        trainer = Trainer(config, BPR(config, train.dataset))
        trainer.model.load_state_dict(state_dict)
        trainer.eval_collector.data_collect(train)
        np.random.seed(seed)
        return dict(trainer.evaluate(test, load_best_model=False))

    return evaluate


@pytest.mark.parametrize("seed", [0, 2020])
def test_both_protocols_equal_stock_recbole(trained, stock, seed):
    split, trainer, model, other = trained
    for each in (model, other):
        results = ranking.evaluate(trainer, each, split, seed)
        assert set(results) == {"full", "uni99"}
        assert results["full"] == stock(each.state_dict(), False, seed)
        assert results["uni99"] == stock(each.state_dict(), True, seed)


def test_models_and_protocols_are_told_apart(trained):
    split, trainer, model, other = trained
    first, second = (ranking.evaluate(trainer, each, split, 1) for each in (model, other))
    assert first["full"] != second["full"] and first["full"] != first["uni99"]
    assert first["full"]["ndcg@10"] > second["full"]["ndcg@10"]


def test_the_same_model_twice_gives_the_same_numbers_and_another_seed_does_not(trained):
    split, trainer, model, _ = trained
    first = ranking.evaluate(trainer, model, split, 3)
    np.random.random(17)
    assert ranking.evaluate(trainer, model, split, 3) == first
    assert ranking.evaluate(trainer, model, split, 4)["uni99"] != first["uni99"]


def test_all_models_meet_the_same_negatives(trained):
    split, trainer, model, other = trained
    met = []
    for each in (model, other):
        seen = []

        def predict(pairs, each=each, seen=seen):
            seen.append(pairs["item_id"].clone())
            return type(each).predict(each, pairs)

        each.predict = predict
        ranking.evaluate(trainer, each, split, 3)
        met.append(torch.cat(seen))
    assert len(met[0]) > 1000 and torch.equal(*met)


def test_numpys_stream_is_restored(trained):
    split, trainer, model, _ = trained
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    ranking.evaluate(trainer, model, split, 3)
    np.testing.assert_array_equal(np.random.random(3), expected)


def test_the_trainer_keeps_its_model_and_stream_even_when_evaluation_fails(trained):
    split, trainer, model, other = trained
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)

    class Failure(Exception):
        pass

    def fail(*args):
        raise Failure

    other.predict = fail
    with pytest.raises(Failure):
        ranking.evaluate(trainer, other, split, 3)
    assert trainer.model is model
    assert np.random.random() == expected


def test_evaluating_changes_no_weight(trained):
    split, trainer, model, other = trained
    before = {name: value.clone() for name, value in other.state_dict().items()}
    ranking.evaluate(trainer, other, split, 3)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("size", [1, 47, 4096, 2**21])
def test_the_numbers_do_not_depend_on_eval_batch_size(make_split, trained, wide, size):
    split, trainer, model, _ = trained
    other = make_split(eval_batch_size=size, **wide)
    assert ranking.evaluate(trainer, model, other, 3) == ranking.evaluate(trainer, model, split, 3)


def test_the_most_active_users_are_those_with_most_interactions():
    users = np.repeat(np.arange(1, 42), [40, *range(1, 41)])  # the first has most, the last as many
    active, others = ranking.activity(users, 45)
    assert np.flatnonzero(active).tolist() == [1, 41]  # 5 % of 41
    assert np.flatnonzero(others).tolist() == list(range(2, 41))


def test_fairness_is_the_difference_of_the_groups_ndcg(trained):
    split, trainer, model, _ = trained
    groups = ranking.activity(np.delete(split.users, np.arange(20)), split.n_users)
    plain, found = (ranking.evaluate(trainer, model, split, 1, groups=each) for each in (None, groups))
    assert {key for key in found["full"] if key not in plain["full"]} == {f"fairness@{k}" for k in split.config["topk"]}
    assert found["uni99"] == plain["uni99"] and all(found["full"][key] == plain["full"][key] for key in plain["full"])
    held, valid = (loader.dataset.inter_feat for loader in (split.test, split.valid))
    users, items = held["user_id"].numpy(), held["item_id"].numpy()
    k, gains = max(split.config["topk"]), ([], [])
    for user in np.unique(users):
        scores = (model.user_embedding.weight[user] @ model.item_embedding.weight.T).detach().numpy().copy()
        scores[[0, *split.items[split.users == user], *valid["item_id"][valid["user_id"] == user]]] = -np.inf
        own = items[users == user]
        gain = (np.isin(np.argsort(-scores)[:k], own) / np.log2(np.arange(2, k + 2))).sum()
        gains[0 if groups[0][user] else 1].append(gain / (1 / np.log2(np.arange(2, min(len(own), k) + 2))).sum())
    assert found["full"][f"fairness@{k}"] == pytest.approx(np.mean(gains[0]) - np.mean(gains[1]), abs=1e-6)


def test_without_anybody_in_a_group_there_is_no_fairness(trained):
    split, trainer, model, _ = trained
    nobody = np.zeros(split.n_users, bool)
    assert ranking.evaluate(trainer, model, split, 1, groups=(nobody, ~nobody)) == ranking.evaluate(
        trainer, model, split, 1
    )


@pytest.mark.parametrize("metric", ["NDCG", "GAUC"])  # ranked by us, and by RecBole
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(make_split, make_model, metric, value):
    split = make_split(metrics=[metric], valid_metric=metric if metric == "GAUC" else "NDCG@10")
    model, data = make_model(split), split.test._dataset
    trainer = BPRTrainer(split.config, make_model(split))
    trainer.eval_collector.data_collect(split.train)
    assert ranking.evaluate(trainer, model, split, 1)
    model.user_embedding.weight.data[data.inter_feat[data.uid_field][0], 0] = value
    with pytest.raises(InputError, match="scores are not finite"):
        ranking.evaluate(trainer, model, split, 1)
