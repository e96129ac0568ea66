"""RecBole's knowledge-aware, sequential and context-aware models stand in one table with a general one."""

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
from recbole.data.dataset import KnowledgeBasedDataset
from recbole.data.interaction import Interaction
from recbole.utils import get_model

from recbole_unlearn.comparison.beside import beside, first_rows
from recbole_unlearn.comparison.other_models import PLAIN, known_models, model_arguments, other_models, train_any
from recbole_unlearn.comparison.seeds import opened
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import ranking
from recbole_unlearn.evaluation.forgetting import percentiles
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trainer import BPRTrainer

IN_TIME = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
FACTS = 300


@pytest.fixture(scope="module")
def given(linked_path, make_options):
    """Function (**keys) -> config_dict on this data set, the last two interactions of each user held out."""

    def make(**keys):
        columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "class"]}
        data = {"data_path": linked_path, "load_col": columns, "eval_args": IN_TIME}
        small = {"kg_embedding_size": 8, "MAX_ITEM_LIST_LENGTH": 6, "hidden_size": 8, "inner_size": 16, "epochs": 2}
        return make_options(**{**data, **small, **keys})

    return make


@pytest.fixture
def together(given):
    """Function (name, **keys) -> (Beside, configuration of the other model)."""

    def make(name, **keys):
        _, split = opened(("BPR", "tiny", None, given(**keys)))
        config, own = opened(model_arguments(name, "BPR", "tiny", None, given(**keys)))
        return beside(name, split, own), config

    return make


def judged(other, model, seed=3):
    """Metrics of a model on the compared model's loaders."""
    config = other.split.config
    trainer = BPRTrainer(config, new_model(config, other.split))
    trainer.eval_collector.data_collect(other.split.train)
    return ranking.evaluate(trainer, other.asked(model), other.split, seed)


def named(data, columns):
    """Set of tuples of tokens."""
    return set(zip(*(data.id2token(field, values.numpy()) for field, values in columns), strict=True))


# -- one table


class _Here:
    """A pool of this process alone: another one would import for longer than it trains."""

    def __init__(self, processes, context, initializer, arguments):
        initializer(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done


def test_all_kinds_of_models_stand_in_one_table(given, tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_unlearn.comparison.seeds.ProcessPoolExecutor", _Here)
    keys = given(
        methods="ours", compare_models="CKE,FPMC,FM", forget_count=20, comparison_cache=str(tmp_path / "cache")
    )
    result = run_unlearn(dataset="tiny", config_dict={**keys, "output_dir": str(tmp_path / "out")})
    ((_, each),) = result["comparison"]["sets"].items()
    assert list(each["figures"]) == [
        "original", "retrain", "ours", "CKE", "CKE, retrained", "CKE, unlearned", "FPMC", "FPMC, retrained",
        "FPMC, unlearned", "FM",
    ]  # fmt: skip
    for name, (run,) in each["figures"].items():
        assert 0 < run["forget_auc"] < 1 and run["ranking"]["uni99"]["hit@10"] > 0, name
    for name in ("CKE", "FPMC"):
        (before,), (after,) = each["figures"][name], each["figures"][f"{name}, retrained"]
        assert after["forget_auc"] < before["forget_auc"]
    (note,) = each["notes"]
    assert note.startswith("FPMC: asked with the history") and note in result["page"]


# -- knowledge-aware


def test_a_knowledge_graph_changes_no_interaction_and_no_id(together, linked_path):
    """RecBole's own would leave out the items that it does not know, and number the others anew."""
    other, config = together("CKE")
    stock = UnlearnConfig("CKE", "tiny", config_dict={**config.external_config_dict})
    del stock.final_config_dict["linked_knowledge"]
    recboles, data = KnowledgeBasedDataset(stock), other.own.train.general_dataloader.dataset
    assert len(recboles) < len(other.split.train.dataset) + 2 * (other.split.n_users - 1)
    assert other.own.fingerprint == other.split.fingerprint
    fields = (data.head_entity_field, data.relation_field, data.tail_entity_field)
    assert named(data, [(f, data.kg_feat[f]) for f in fields]) == named(
        recboles, [(f, torch.tensor(recboles.kg_feat[f].values)) for f in fields]
    )


def test_a_linked_item_is_its_entity_and_others_are_apart(together):
    data = together("CKE")[0].own.train.general_dataloader.dataset
    heads = np.unique(data.head_entities)
    assert heads.max() < data.item_num <= data.tail_entities.min() and heads.min() > 0
    entities, items = data.id2token(data.entity_field, heads), data.id2token(data.iid_field, heads)
    assert [f"m.{item}" for item in items] == list(entities)
    assert len(np.unique(data.field2id_token[data.entity_field])) == data.entity_num == data.item_num + 9


def test_another_graph_is_another_training(given, linked_path):
    before = model_arguments("CKE", "BPR", "tiny", None, given())[3]
    with (Path(linked_path) / "tiny/tiny.kg").open("a") as file:
        file.write("m.new\tr0\tt0\n")
    assert model_arguments("CKE", "BPR", "tiny", None, given())[3] != before


@pytest.mark.parametrize("name", ["KGCN", "KTUP", "MKR", "RippleNet"])
def test_knowledge_aware_models_train(together, tmp_path, name):
    other, config = together(name)
    model, seconds = train_any(config, other.own, 3, tmp_path)
    assert seconds > 0 and judged(other, model)["full"]["hit@10"] > 0
    ranks = other.percentiles(model, np.arange(30))
    assert ((ranks >= 0) & (ranks <= 1)).all() and np.ptp(ranks) > 0


# -- sequential


def test_rows_of_a_sequential_model_are_the_same_interactions(together):
    other, _ = together("GRU4Rec")
    split, own = other.split, other.own
    assert own.n_rows == split.n_rows - len(np.unique(split.users))
    rows = np.setdiff1d(np.arange(split.n_rows), first_rows(split))
    assert split.pairs(rows) == own.pairs(other.rows(rows))
    assert len(other.rows(first_rows(split))) == 0
    data = own.train.dataset  # the first of a user opens the history of the second
    second = other.rows(first_rows(split) + 1)
    opening = data.inter_feat[data.iid_field + "_list"][own.data_row[second], 0].numpy()
    np.testing.assert_array_equal(opening, split.items[first_rows(split)])


@pytest.mark.parametrize("name", ["SASRec", "FPMC", "DIN", "SASRecF"])
def test_a_sequential_model_is_asked_with_each_users_own_history(together, tmp_path, name):
    """As RecBole's own test loader asks it; the pairs of sampled ranking score as in full ranking."""
    other, config = together(name)
    model, _ = train_any(config, other.own, 3, tmp_path)
    asked, data = other.asked(model), other.own.test.dataset
    users = data.inter_feat[data.uid_field][torch.tensor([9, 4, 4, 20])]
    items = torch.tensor([1, 17, 5, 30])
    rows = data[torch.tensor([9, 4, 4, 20])]
    rows.update(Interaction({data.iid_field: items}))
    rows = other.own.test.transform(data, data.join(rows))
    with torch.no_grad():
        expected = model.predict(rows)
        got = asked.predict(Interaction({data.uid_field: users, data.iid_field: items}))
    np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_all_models_are_judged_on_the_same_interactions_and_negatives(together):
    """A sequential model that scores like a general one gets its figures."""
    other, _ = together("FPMC")
    scores = torch.rand(other.split.n_users, other.split.n_items, generator=torch.Generator().manual_seed(1))

    class Table(torch.nn.Module):
        device, n_items = "cpu", other.split.n_items

        def full_sort_predict(self, interaction):
            return scores[interaction["user_id"]]

        def predict(self, interaction):
            return scores[interaction["user_id"], interaction["item_id"]]

    trainer = BPRTrainer(other.split.config, new_model(other.split.config, other.split))
    trainer.eval_collector.data_collect(other.split.train)
    assert judged(other, Table()) == ranking.evaluate(trainer, Table(), other.split, 3)
    rows = np.setdiff1d(np.arange(60), first_rows(other.split))
    np.testing.assert_array_equal(other.percentiles(Table(), rows), percentiles(Table(), other.split, rows))


def test_what_is_forgotten_is_in_no_history_that_a_model_is_asked_with(together):
    other, _ = together("GRU4Rec")
    split, last = other.split, np.searchsorted(other.split.users, np.unique(other.split.users), "right") - 1
    field = other.own.test.dataset.iid_field + "_list"
    before, after = (other.asked(new_model(other.own.config, other.own), rows).data for rows in ((), last))
    for row in last:
        at = np.flatnonzero(after.inter_feat["user_id"].numpy() == split.users[row])[0]
        assert split.items[row] in before.inter_feat[field][at]
        assert split.items[row] not in after.inter_feat[field][at]


def test_sequential_models_of_both_losses(given):
    keys = [model_arguments("GRU4Rec", "BPR", "tiny", None, given(**loss))[3] for loss in ({}, {"loss_type": "BPR"})]
    assert keys[0]["train_neg_sample_args"] is None and keys[1]["train_neg_sample_args"]["sample_num"] == 1


def test_models_beside_a_sequential_one(given):
    keys = given(loss_type="BPR")
    _, split = opened(("GRU4Rec", "tiny", None, keys))
    _, own = opened(model_arguments("FPMC", "GRU4Rec", "tiny", None, keys))
    assert own.sequential and np.array_equal(beside("FPMC", split, own).rows(np.arange(5)), np.arange(5))
    with pytest.raises(InputError, match="give a general model as --model, such as BPR, and GRU4Rec"):
        other_models("ItemKNN", "GRU4Rec", "tiny", None, keys)


# -- context-aware


def test_a_context_aware_model_knows_features_but_nothing_of_the_interaction(together, tmp_path):
    other, config = together("FM")
    data = other.own.train.dataset
    assert "class" in data.item_feat and "timestamp" not in data.inter_feat
    model, _ = train_any(config, other.own, 3, tmp_path)
    assert "class" in model.token_field_names
    users, items = torch.tensor([3, 3]), torch.tensor([2, 40])
    pair = data.join(Interaction({"user_id": users, "item_id": items}))
    got = other.asked(model).predict(Interaction({"user_id": users, "item_id": items}))
    assert torch.equal(got, model.predict(pair)) and judged(other, model)["full"]["hit@10"] > 0


# -- what is refused

SINCE_1_2_1 = pytest.mark.skipif(recbole.__version__ == "1.2.0", reason="a model of RecBole 1.2.1")


@pytest.mark.parametrize(
    "model, keys, message",
    [
        ("SASRec", {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO"}}, "give --eval_args="),
        ("SASRec", {"eval_args": {**IN_TIME, "order": "RO"}}, "'order': 'TO'"),
        ("SASRec", {"eval_args": {**IN_TIME, "split": {"LS": "test_only"}}}, "last two are held out"),
        pytest.param("SASRecCPR", {"loss_type": "BPR"}, "leave loss_type out", marks=SINCE_1_2_1),
        ("S3Rec", {}, "several runs"),
        ("KSR", {}, "pre-trained vectors"),
        ("CKE", {"forget_spam": 3}, "forget_spam is for general models only"),
        ("FM", {"load_col": None}, "name those to load in load_col"),
        ("lightgbm", {}, "lightgbm"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(given, model, keys, message):
    with pytest.raises(InputError, match=f"^compare_models.*{message}") as refused:
        other_models(model, "BPR", "tiny", None, given(**keys))
    assert "\n" not in str(refused.value) and not torch.is_anomaly_enabled()


def test_a_data_set_without_knowledge_is_refused(make_options):
    with pytest.raises(InputError, match="compare_models: CKE: a knowledge-aware model needs the file tiny.kg"):
        other_models("CKE", "BPR", "tiny", None, make_options())


def test_every_model_of_recbole_is_taken_or_refused_in_one_line(given):
    taken = []
    others = [name for name in known_models() if "boost" not in name and "gbm" not in name]
    for name in [name for name in others if get_model(name).type not in PLAIN]:
        try:
            taken += other_models(name, "BPR", "tiny", None, given())
        except InputError as error:
            assert str(error).startswith(f"compare_models: {name}") and "\n" not in str(error)
    assert len(taken) > 45 and {"CKE", "SASRec", "BERT4Rec", "DIN", "FDSA", "DeepFM"} <= set(taken)


def test_users_with_too_short_a_history_are_refused(make_options, write_data, interactions, tmp_path):
    few = [("new", item, time) for _, item, time in interactions[:3]]
    keys = make_options(
        data_path=write_data(tmp_path / "data", "tiny", interactions + few),
        load_col={"inter": ["user_id", "item_id", "timestamp"]},
        eval_args=IN_TIME,
    )
    keys |= {"methods": "ours", "compare_models": "FPMC", "forget_count": 9, "output_dir": "out"}
    with pytest.raises(InputError, match=r"\(1 users\); give --user_inter_num_interval"):
        run_unlearn(dataset="tiny", config_dict=keys)
    assert not Path("out").exists()
    config = UnlearnConfig("BPR", "tiny", config_dict=keys | {"user_inter_num_interval": "[4,inf)"})
    assert Split(config).n_users == len({user for user, _, _ in interactions}) + 1


def test_a_model_that_fails_says_so_in_one_line(together, tmp_path):
    other, config = together("ConvNCF")  # its kernels need larger embeddings
    with pytest.raises(InputError, match="compare_models: ConvNCF cannot be trained on tiny"):
        train_any(config, other.own, 3, tmp_path)
