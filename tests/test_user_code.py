"""What a user writes, as it stands in the design of this package, for every kind of model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender import BPR
from recbole.utils import get_trainer, init_seed

import recbole_unlearn as ru
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.testing import flat

COLUMNS = {"inter": ["user_id", "item_id", "timestamp"]}
FACTS = ["head_id", "relation_id", "tail_id"]


class Own(BPR):
    """A model of the user's own, whose loss is another."""

    def calculate_loss(self, interaction):
        return 2 * super().calculate_loss(interaction)


class Sparse(BPR):
    """One with sparse gradients, which have an optimiser of their own."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.user_embedding.sparse = self.item_embedding.sparse = True


class Normed(BPR):
    """Computes a layer from its weights before each use, as RepeatNet does: torch copies no such tensor."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.layer = torch.nn.utils.spectral_norm(torch.nn.Linear(self.embedding_size, self.embedding_size))

    def forward(self, user, item):
        users, items = super().forward(user, item)
        return self.layer(users), items


OWN = {"Own": Own, "Sparse": Sparse, "Normed": Normed}
MODELS = {
    "BPR": {},
    "LightGCN": {"n_layers": 2},
    "NGCF": {"hidden_size_list": [8]},
    "CKE": {"kg_embedding_size": 8, "load_col": {**COLUMNS, "kg": FACTS, "link": ["item_id", "entity_id"]}},
    "GRU4Rec": {
        "loss_type": "BPR", "hidden_size": 8, "MAX_ITEM_LIST_LENGTH": 6, "load_col": COLUMNS,
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
    },
    "Own": {},
    "Sparse": {"learner": "sparse_adam"},
}  # fmt: skip


@pytest.fixture
def prepared(linked_path, make_options):
    """Function (name, kind of configuration, **keys) -> (config, model, train, valid, test), as RecBole's users do."""

    def make(name, kind=Config, **keys):
        name, given = OWN.get(name, name), {**MODELS.get(name, {}), **keys}
        config = kind(name, "tiny", config_dict=make_options(data_path=linked_path, **given))
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        loaders = data_preparation(config, dataset)
        init_seed(config["seed"], config["reproducibility"])
        model = config.model_class(config, loaders[0]._dataset).to(config["device"])
        return config, model, *loaders

    return make


@pytest.mark.parametrize("kind", [Config, UnlearnConfig], ids=["RecBole's", "ours"])
@pytest.mark.parametrize("name", MODELS)
def test_the_lines_of_the_readme(prepared, name, kind):
    config, model, train, valid, test = prepared(name, kind)
    own = OWN.get(name)

    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid)

    before = flat(model.state_dict())
    unlearner = ru.InfluenceUnlearner(ru.Trained.of(trainer, train, valid, test))
    gone = unlearner.forget(users=["u17"])
    assert gone.model is unlearner.model and gone.seconds > 0 and gone.why
    assert gone.method == "replay" and gone.details["exact"], gone.why  # trainings of a second
    assert not torch.equal(flat(gone.model.state_dict()), before)
    assert torch.equal(flat(model.state_dict()), before)  # the user's own model stays
    pair = tuple(str(unlearner.split.token(kind, ids[:1])[0]) for kind, ids in
                 (("user", unlearner.split.users), ("item", unlearner.split.items)))  # fmt: skip
    unlearner.forget(pairs=[pair])
    assert len(unlearner.requests) == 2
    unlearner.save("v2.pth")

    with ru.load("v2.pth", model=own) as reopened:
        assert torch.equal(flat(reopened.model.state_dict()), flat(unlearner.model.state_dict()))
        assert reopened.split.n_rows == unlearner.split.n_rows - len(unlearner.forgotten)
        reopened.forget(count=3)
        with pytest.raises(InputError, match="forget set is empty"):  # nothing of theirs is left
            reopened.forget(users=["u17"])


@pytest.mark.parametrize("name", MODELS)
def test_in_memory_and_from_the_checkpoint_are_one(prepared, name):
    """Of the best epoch's weights, which RecBole's ``evaluate`` loads; recbole's ``get_trainer`` gives the trainer."""
    config, model, train, valid, test = prepared(name)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(train, valid, verbose=False)
    trainer.evaluate(test)
    rows = np.arange(0, 40, 4)
    inside = ru.InfluenceUnlearner(ru.Trained.of(trainer, train, valid, test)).forget(rows=rows)
    with ru.load(trainer.saved_model_file, model=OWN.get(name)) as unlearner:
        outside = unlearner.forget(rows=rows)
    assert torch.equal(flat(inside.state_dict), flat(outside.state_dict))


def test_dense_gradients_for_the_optimiser_of_sparse_ones_are_one_line_and_leave_nothing(make_options):
    with pytest.raises(InputError, match="gradients of Own are dense, .* take another learner") as caught:
        ru.run_unlearn(Own, "tiny", config_dict=make_options(learner="sparse_adam", output_dir="out", forget_count=3))
    assert "\n" not in str(caught.value) and not Path("out").exists()


def test_sparse_gradients_are_trained_again_and_take_no_step(prepared):
    config, model, train, valid, test = prepared("Sparse", learner="sgd")
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    trained = ru.Trained.of(trainer, train, valid, test)
    long = ru.Auto(replay=ru.Replay(exact_seconds=0.0), influence=ru.Influence(damping="scalar"))
    unlearner = ru.InfluenceUnlearner(trained, long)
    assert unlearner.method == "replay" and unlearner.chosen.endswith("gradients of its embeddings are sparse")
    with pytest.raises(InputError, match="method: influence is not possible: gradients of its embeddings are sparse"):
        ru.InfluenceUnlearner(trained, ru.Influence(damping="scalar"))


def test_ways_are_values(prepared):
    config, model, train, valid, test = prepared("BPR")
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    trained = ru.Trained.of(trainer, train, valid, test)
    ways = (ru.Replay(rows="all"), ru.Replay(rows="touched"), ru.Influence(damping="scalar"), ru.PAPER)
    found = [ru.InfluenceUnlearner(trained, way).unlearn(np.arange(9)) for way in ways]
    assert [each.method for each in found] == ["replay", "replay", "influence", "influence"]
    assert len({flat(each.state_dict).sum().item() for each in found}) == 4
    asked = ru.Trained.of(trainer, train, valid, test, replay_rows="all")
    same = ru.InfluenceUnlearner(asked).unlearn(np.arange(9))
    assert torch.equal(flat(same.state_dict), flat(found[0].state_dict))
    with pytest.raises(InputError, match="reoptimise is not possible: negatives were redrawn"):
        ru.InfluenceUnlearner(trained, ru.Reoptimise())


@pytest.mark.parametrize("absolute", [False, True])
def test_a_folder_may_be_moved_after_training_and_no_model_says_where_it_was(prepared, absolute):
    config, model, train, valid, test = prepared("BPR")
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    folder = Path(trainer.saved_model_file).parent.rename("archive")
    trainer.saved_model_file = str((folder.absolute() if absolute else folder) / Path(trainer.saved_model_file).name)
    trained = ru.Trained.of(trainer, train, valid, test, audit="kept/audit.jsonl", suppression="kept/list")
    Path("kept").mkdir()
    unlearner = ru.InfluenceUnlearner(trained)
    unlearner.forget(count=3)
    unlearner.save("v2.pth")
    kept = torch.load("v2.pth", weights_only=True)["config"]
    assert not [key for key, value in kept.items() if "kept" in str(value) or "archive" in str(value)]


def test_the_last_epochs_weights_are_forgotten_from_too(prepared):
    """Without RecBole's ``evaluate`` the model has the last epoch's weights, the checkpoint the best one's."""
    config, model, train, valid, test = prepared("BPR", epochs=30, learning_rate=0.03, stopping_step=40)
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    trained = ru.Trained.of(trainer, train, valid, test)
    assert trained.epochs == 30 > torch.load(trainer.saved_model_file, weights_only=True)["triple_log"]["epochs"]
    unlearner = ru.InfluenceUnlearner(trained)
    assert torch.equal(flat(unlearner.state_dict), flat(model.state_dict()))
    assert unlearner.check().distance < 1e-4


SEQUENTIAL = {
    "loss_type": "CE", "train_neg_sample_args": None, "hidden_size": 8, "inner_size": 8, "MAX_ITEM_LIST_LENGTH": 6,
    "load_col": COLUMNS, "epochs": 2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), [("Normed", {}), ("RepeatNet", SEQUENTIAL)])
def test_tensors_that_are_computed_before_each_use_are_no_hindrance(prepared, name, keys):
    config, model, train, valid, test = prepared(name, **keys)
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, verbose=False)
    trained = ru.Trained.of(trainer, train, valid, test)
    gone = ru.InfluenceUnlearner(trained, ru.Replay()).forget(users=["u17"])
    assert gone.details["exact"] and torch.equal(flat(trained.model.state_dict()), flat(model.state_dict()))


@pytest.mark.parametrize("split", [{"RS": [0.9, 0, 0.1]}, {"RS": [1, 0, 0]}, {"LS": "test_only"}])
def test_there_need_be_no_validation_data(prepared, split):
    """Given to ``fit`` all the same, as RecBole's lines do, or not."""
    config, model, train, valid, test = prepared("NGCF", eval_args={"split": split, "order": "RO", "mode": "full"})
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    unlearner = ru.InfluenceUnlearner(ru.Trained.of(trainer, train, valid, test), ru.Replay())
    assert unlearner.check().distance == 0 and unlearner.forget(users=["u17"]).details["exact"]


@pytest.mark.parametrize("validated", [True, False])
def test_what_validation_drew_in_between_is_drawn_again_if_there_was_any(prepared, validated):
    """It masks items at random (BERT4Rec), and what training masks next is drawn after it."""
    config, model, train, valid, test = prepared("BERT4Rec", mask_ratio=0.4, eval_step=1, **SEQUENTIAL)
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid if validated else None, verbose=False)
    trained = ru.Trained.of(trainer, train, valid, test)
    assert ru.InfluenceUnlearner(trained, ru.Replay()).check().distance == 0


def test_an_optimisers_name_is_in_any_case_as_recbole_reads_it(prepared):
    config, model, train, valid, test = prepared("BPR", learner="Adam")
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    trained = ru.Trained.of(trainer, train, valid, test)
    for way in (ru.Replay(rows="touched"), ru.Influence(damping="adam")):
        assert ru.InfluenceUnlearner(trained, way).forget(users=["u17"]).seconds > 0


def test_an_optimiser_that_recbole_does_not_know_is_one_line(prepared):
    config, model, train, valid, test = prepared("BPR", learner="adm")
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    with pytest.raises(InputError, match="learner must be one of adam, .*, not 'adm'; did you mean 'adam'"):
        ru.Trained.of(trainer, train, valid, test)


def test_what_cannot_be_forgotten_from_is_one_line(prepared):
    config, model, train, valid, test = prepared("BPR")
    trainer = ru.trainer_of(config, model)
    with pytest.raises(InputError, match="has no triple log"):
        ru.Trained.of(trainer, train, valid, test)
    trainer.fit(train, valid, verbose=False)
    for keys in ({"damping": "adm"}, {"negatives": "static"}, {"epochs": 3}, {"method": "replya"}):
        with pytest.raises(InputError):
            ru.Trained.of(trainer, train, valid, test, **keys)
    unlearner = ru.InfluenceUnlearner(ru.Trained.of(trainer, train, valid, test))
    for request in ({}, {"users": ["u17"], "items": ["i1"]}, {"users": ["nobody"]}, {"rows": [10**6]}, {"rows": [0.5]},
                    {"pairs": [("u17",)]}, {"everything": True}):  # fmt: skip
        with pytest.raises(InputError):
            unlearner.forget(**request)
    assert not unlearner.requests and torch.equal(flat(unlearner.state_dict), flat(model.state_dict()))


@pytest.mark.parametrize("keys", [{"purge": True}, {"dry_run": True}, {"forget_users": ["u17"]}])
def test_what_only_a_run_does_is_refused_where_the_training_was_configured_with_it(prepared, keys):
    config, model, train, valid, test = prepared("BPR", **keys)
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    with pytest.raises(InputError, match=f"leave (it|{min(keys)}) out"):
        ru.Trained.of(trainer, train, valid, test)


def test_the_old_name_warns(prepared):
    config, model, train, valid, _ = prepared("BPR")
    trainer = ru.trainer_of(config, model)
    trainer.fit(train, valid, verbose=False)
    with pytest.warns(FutureWarning, match="InfluenceUnlearner.load"):
        session = ru.UnlearnSession.open(trainer.saved_model_file)
    with session:
        assert session.forget("users", ["u17"]).seconds > 0
