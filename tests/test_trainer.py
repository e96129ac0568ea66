"""The trainer is RecBole's own to the last bit, and its log is what training used."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender.bpr import BPR
from recbole.model.knowledge_aware_recommender.cke import CKE
from recbole.trainer.trainer import KGATTrainer, NCLTrainer, S3RecTrainer, TraditionalTrainer, Trainer
from recbole.utils import ModelType, get_model, get_trainer, init_seed

from recbole_unlearn.data.sampling import PairwiseCollate
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.keys import KEYS
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.training.trainer import BPRTrainer, ClusterTrainer, KnowledgeTrainer, trainer_of

ITEM_FEATURES = {"load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "class"]}}


def negatives(sample_num, distribution="uniform", **more):
    return {
        "train_neg_sample_args": {
            "distribution": distribution,
            "sample_num": sample_num,
            "alpha": 1.0,
            **more,
        }
    }


def train_stock(options, folder):
    """RecBole's own run_recbole, step by step, without anything of ours; returns the trainer after fit."""
    own = set(KEYS)
    given = {key: value for key, value in copy.deepcopy(options).items() if key not in own}
    config = Config("BPR", "tiny", config_dict={**given, "checkpoint_dir": str(folder)})
    init_seed(config["seed"], config["reproducibility"])
    train, valid, _ = data_preparation(config, create_dataset(config))
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    trainer = Trainer(config, BPR(config, train.dataset).to(config["device"]))
    assert type(trainer) is Trainer
    trainer.valid_history = []
    original = trainer._valid_epoch
    trainer._valid_epoch = lambda *args, **kw: (
        trainer.valid_history.append(original(*args, **kw)) or (trainer.valid_history[-1])
    )
    trainer.best = trainer.fit(train, valid, verbose=False)
    return trainer


class Recording:
    """Notes every triple that a model's calculate_loss is given: one array [n, 2 + negatives] an epoch."""

    def __init__(self, model, times, rows):
        self.times, self.rows, self.batches = times, rows, []
        original = model.calculate_loss

        def calculate_loss(interaction):
            columns = [interaction[name].clone().view(times, -1) for name in ("user_id", "item_id", "neg_item_id")]
            users, items, drawn = columns
            assert (users == users[0]).all() and (items == items[0]).all()
            self.batches.append(torch.cat([users[:1], items[:1], drawn]).T.numpy())
            return original(interaction)

        model.calculate_loss = calculate_loss

    @property
    def epochs(self):
        whole = np.concatenate(self.batches)
        assert len(whole) % self.rows == 0
        return np.split(whole, len(whole) // self.rows)


def build(make_split, make_model, folder, **overrides):
    """(split, trainer, recording) on the tiny data set, as run_unlearn trains."""
    split = make_split(checkpoint_dir=str(folder), **overrides)
    model = make_model(split)
    trainer = BPRTrainer(split.config, model)
    return split, trainer, Recording(model, split.train.times, split.n_rows)


@pytest.fixture
def train(make_split, make_model, tmp_path):
    """Function (folder='ours', **overrides) -> (split, trainer after fit, recording)."""

    def run(folder="ours", **overrides):
        split, trainer, recording = build(make_split, make_model, tmp_path / folder, **overrides)
        trainer.valid_history = []
        original = trainer._valid_epoch
        trainer._valid_epoch = lambda *args, **kw: (
            trainer.valid_history.append(original(*args, **kw)) or (trainer.valid_history[-1])
        )
        trainer.best = trainer.fit(split.train, split.valid, verbose=False)
        return split, trainer, recording

    return run


def logged_epochs(log):
    """What a log says training used: one array [rows, 2 + negatives] an epoch."""
    anchors = np.stack([log.users, log.items], axis=1).astype(np.int64)
    return [np.concatenate([anchors, log.epoch(e).astype(np.int64)], axis=1) for e in range(log.n_epochs)]


def ordered(triples):
    return triples[np.lexsort(triples.T[::-1])]


def check_log(log, used):
    """The log holds exactly the triples that each epoch used, each beside its own interaction."""
    logged = logged_epochs(log)
    assert len(logged) == len(used)
    for mine, theirs in zip(logged, used, strict=True):
        np.testing.assert_array_equal(ordered(mine), ordered(theirs))


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# -- bit-identical to stock RecBole


CASES = {
    "1 negative": {},
    "4 negatives": negatives(4),
    "popularity": negatives(1, "popularity"),
    "4 by popularity": negatives(4, "popularity"),
    "2 workers": {"worker": 2, "epochs": 2},
    "4 negatives, 2 workers": {"worker": 2, "epochs": 2, **negatives(4)},
    "no shuffle": {"shuffle": False},
    "item features": ITEM_FEATURES,
    "item features, 2 workers": {"worker": 2, "epochs": 2, **ITEM_FEATURES, **negatives(2)},
    "dynamic negatives": negatives(2, dynamic=True, candidate_num=3),
    "batch of one": {"train_batch_size": 1, "epochs": 1},
    "one batch": {"train_batch_size": 4096},
    "batch smaller than the negatives": {"train_batch_size": 3, "epochs": 1, **negatives(4)},
    "weight decay and SGD": {"weight_decay": 1e-3, "learner": "sgd"},
    "Adagrad, whose state is there from the start": {"learner": "adagrad"},
    "sampled validation": {"eval_args": {"mode": {"valid": "uni20", "test": "full"}}},
    "validation every second epoch": {"eval_step": 2},
    "leave one out by time": {
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    },
    "another seed": {"seed": 99},
}


@pytest.mark.parametrize("case", CASES)
def test_weights_validation_and_log_are_those_of_stock_recbole(make_options, train, tmp_path, case):
    split, ours, recording = train(**CASES[case])
    stock = train_stock(make_options(**CASES[case]), tmp_path / "stock")
    same_weights(ours.model, stock.model)
    assert ours.best == stock.best
    assert ours.valid_history == stock.valid_history and len(ours.valid_history) > 0
    assert ours.train_loss_dict == stock.train_loss_dict
    check_log(TripleLog.open(log_path(ours.saved_model_file)), recording.epochs)
    ours_state = torch.load(ours.saved_model_file, weights_only=True)
    stock_state = torch.load(stock.saved_model_file, weights_only=True)
    assert ours_state["epoch"] == stock_state["epoch"]
    for name, value in stock_state["state_dict"].items():
        assert torch.equal(value, ours_state["state_dict"][name])


def test_several_epochs_without_a_validation_set_are_those_of_stock_recbole(make_split, make_model, tmp_path):
    weights = []
    for kind in (BPRTrainer, Trainer):
        split = make_split(checkpoint_dir=str(tmp_path / kind.__name__), epochs=5, **negatives(2))
        trainer = kind(split.config, make_model(split))
        trainer.fit(split.train, verbose=False)
        weights.append(trainer.model)
    same_weights(*weights)


def test_training_twice_gives_the_same_bits_and_another_seed_does_not(train):
    first, again, other = (train(folder, seed=seed)[1].model for folder, seed in (("a", 1), ("b", 1), ("c", 2)))
    same_weights(first, again)
    assert not torch.equal(first.user_embedding.weight, other.user_embedding.weight)


class Dated(BPR):
    """A model of the user's own that weighs pairs by another column of the interactions."""

    def calculate_loss(self, interaction):
        return super().calculate_loss(interaction) * (1 + interaction["timestamp"] % 3).mean()


def test_a_class_of_ones_own_gets_every_column_of_the_interactions(make_options, tmp_path):
    columns = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    options, weights = make_options(checkpoint_dir=str(tmp_path), **columns, **negatives(2)), []
    for kind in (Trainer, trainer_of):
        config = Config(Dated, "tiny", config_dict=options)
        init_seed(config["seed"], config["reproducibility"])
        train = data_preparation(config, create_dataset(config))[0]
        init_seed(config["seed"], config["reproducibility"])
        trainer = kind(config, Dated(config, train._dataset))
        trainer.fit(train, verbose=False)
        weights.append(trainer.model)
    same_weights(*weights)
    assert isinstance(train.collate_fn, PairwiseCollate)  # as fast as RecBole's own


# -- the log


def test_the_log_lies_beside_the_checkpoint_and_verifies(train):
    split, trainer, _ = train()
    state = torch.load(trainer.saved_model_file, weights_only=True)
    log = TripleLog.open(log_path(trainer.saved_model_file))
    log.verify()
    assert state["triple_log"]["run_id"] == log.run_id
    assert state["triple_log"]["epochs"] == state["epoch"] + 1 <= log.n_epochs
    assert log.metadata["fingerprint"] == split.fingerprint
    assert (log.metadata["n_users"], log.metadata["n_items"]) == (split.n_users, split.n_items)


def test_the_log_is_anchored_at_the_splits_rows(train):
    split, trainer, _ = train(**negatives(3))
    log = TripleLog.open(log_path(trainer.saved_model_file))
    np.testing.assert_array_equal(log.users, split.users)
    np.testing.assert_array_equal(log.items, split.items)
    assert log.negatives == 3


def test_epochs_have_different_negatives(train):
    _, _, recording = train()
    first, second = (ordered(epoch) for epoch in recording.epochs[:2])
    assert (first[:, :2] == second[:, :2]).all() and (first[:, 2] != second[:, 2]).mean() > 0.5


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_no_logged_negative_is_a_training_positive_of_its_user_or_padding(train, distribution):
    split, trainer, _ = train(epochs=6, **negatives(4, distribution))
    log = TripleLog.open(log_path(trainer.saved_model_file))
    positives = set(zip(split.users.tolist(), split.items.tolist(), strict=True))
    pairs = set()
    for epoch in logged_epochs(log):
        for column in range(2, 6):
            pairs |= set(zip(epoch[:, 0].tolist(), epoch[:, column].tolist(), strict=True))
    assert len(pairs) > 500
    assert not pairs & positives
    assert 0 not in {item for _, item in pairs}


def test_static_negatives_are_the_same_in_every_epoch(train):
    _, trainer, recording = train(negatives="static", epochs=4, **negatives(2))
    log = TripleLog.open(log_path(trainer.saved_model_file))
    check_log(log, recording.epochs)
    first = ordered(recording.epochs[0])
    for epoch in recording.epochs[1:]:
        np.testing.assert_array_equal(ordered(epoch), first)
    orders = [epoch[:, :2].tolist() for epoch in recording.epochs]
    assert orders[0] != orders[1]  # the rows are shuffled all the same


@pytest.mark.parametrize("more", [{"worker": 2}, ITEM_FEATURES, {"worker": 2, **ITEM_FEATURES}], ids=str)
def test_static_negatives_hold_with_workers_and_item_features(train, more):
    split, trainer, recording = train(negatives="static", epochs=2, **negatives(3), **more)
    log = TripleLog.open(log_path(trainer.saved_model_file))
    assert log.static
    check_log(log, recording.epochs)
    np.testing.assert_array_equal(ordered(recording.epochs[0]), ordered(recording.epochs[1]))
    positives = set(zip(split.users.tolist(), split.items.tolist(), strict=True))
    used = recording.epochs[0]
    for column in range(2, 5):
        assert not set(zip(used[:, 0].tolist(), used[:, column].tolist(), strict=True)) & positives


def test_duplicated_interactions_are_logged_one_by_one(make_split, make_model, write_data, interactions, tmp_path):
    doubled = interactions + [(user, item, time + 7) for user, item, time in interactions[::3]]
    path = write_data(tmp_path, "tiny", doubled)
    split, trainer, recording = build(make_split, make_model, tmp_path / "ours", data_path=path, **negatives(2))
    trainer.fit(split.train, split.valid, verbose=False)
    check_log(TripleLog.open(log_path(trainer.saved_model_file)), recording.epochs)


def test_log_negatives_false_writes_no_log_and_changes_no_bit(train):
    _, plain, _ = train("plain", log_negatives=False)
    _, logged, _ = train("logged")
    assert not log_path(plain.saved_model_file).exists()
    assert "triple_log" not in torch.load(plain.saved_model_file, weights_only=True)
    same_weights(plain.model, logged.model)


def test_the_remaining_data_is_logged_likewise(make_split, make_model, tmp_path):
    """What an unlearned model is compared with can itself be unlearned from."""
    split = make_split(checkpoint_dir=str(tmp_path / "ours"))
    loader = split.remaining(np.arange(0, split.n_rows, 5))
    model = make_model(split)
    trainer = BPRTrainer(split.config, model)
    recording = Recording(model, 1, len(loader.dataset))
    trainer.fit(loader, split.valid, verbose=False)
    log = TripleLog.open(log_path(trainer.saved_model_file))
    check_log(log, recording.epochs)
    assert log.n_rows == split.n_rows - len(range(0, split.n_rows, 5))


def test_two_runs_in_the_same_second_do_not_share_a_checkpoint(make_split, make_model, tmp_path):
    split = make_split(checkpoint_dir=str(tmp_path / "saved"), epochs=1)
    paths = set()
    for _ in range(3):
        trainer = BPRTrainer(split.config, make_model(split))
        trainer.fit(split.train, split.valid, verbose=False)
        paths.add(trainer.saved_model_file)
    assert len(paths) == 3
    run_ids = {TripleLog.open(log_path(path)).run_id for path in paths}
    assert len(run_ids) == 3


# -- with stock RecBole


class MyBPR(BPR):
    """A user's own model."""


NCL = ClusterTrainer if importlib.util.find_spec("faiss") else NCLTrainer  # without it, it cannot be trained at all


class MyCKE(CKE):
    """A user's own knowledge-aware model."""


@pytest.mark.parametrize(
    "kind, name, expected",
    [
        (ModelType.GENERAL, "BPR", BPRTrainer), (ModelType.GENERAL, "LightGCN", BPRTrainer),
        (ModelType.GENERAL, "NGCF", BPRTrainer), (ModelType.SEQUENTIAL, "SASRec", BPRTrainer),
        (ModelType.SEQUENTIAL, "GRU4Rec", BPRTrainer), (ModelType.KNOWLEDGE, "CKE", KnowledgeTrainer),
        (ModelType.GENERAL, "MyBPR", BPRTrainer), (ModelType.KNOWLEDGE, "MyCKE", KnowledgeTrainer),
        (ModelType.GENERAL, "NeuMF", BPRTrainer), (ModelType.SEQUENTIAL, "BERT4Rec", BPRTrainer),
        (ModelType.GENERAL, "ENMF", Trainer), (ModelType.GENERAL, "MultiDAE", Trainer),
        (ModelType.CONTEXT, "FM", Trainer), (ModelType.TRADITIONAL, "Pop", TraditionalTrainer),
        (ModelType.KNOWLEDGE, "KGAT", KGATTrainer), (ModelType.GENERAL, "NCL", NCL),
        (ModelType.SEQUENTIAL, "S3Rec", S3RecTrainer), (ModelType.GENERAL, "NobodysModel", Trainer),
    ],
)  # fmt: skip
def test_get_trainer_returns_ours_where_a_model_can_be_unlearned_from_and_else_recboles(kind, name, expected):
    assert get_trainer(kind, name) is expected


def test_a_stock_config_trains_with_our_trainer(make_options, tmp_path):
    """A stock script that only adds `import recbole_unlearn` has none of our keys."""
    config = Config("BPR", "tiny", config_dict=make_options(checkpoint_dir=str(tmp_path / "saved")))
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, BPR(config, train.dataset))
    trainer.fit(train, valid, verbose=False)
    assert TripleLog.open(log_path(trainer.saved_model_file)).n_epochs == 3
    assert 0 <= trainer.evaluate(test)["ndcg@10"] <= 1


def test_a_checkpoint_loads_without_pickle_and_through_stock_evaluate(train):
    split, trainer, _ = train()
    state = torch.load(trainer.saved_model_file, weights_only=True)
    assert state["config"]["model"] == "BPR" and isinstance(state["config"], dict)
    stock = Trainer(split.config, BPR(split.config, split.train.dataset))
    stock.eval_collector.data_collect(split.train)
    result = stock.evaluate(split.test, model_file=trainer.saved_model_file)
    assert torch.equal(stock.model.user_embedding.weight, state["state_dict"]["user_embedding.weight"])
    assert result == trainer.evaluate(split.test) and result["recall@10"] > 0


@pytest.fixture
def resume(train, make_split, make_model, tmp_path):
    """Function (**overrides) -> (first trainer, its epochs, second trainer, log, second's recording)."""

    def run(**overrides):
        _, first, _ = train(eval_step=1, **overrides)
        path = first.saved_model_file
        before = [epoch.copy() for epoch in logged_epochs(TripleLog.open(log_path(path)))]
        split, second, recording = build(make_split, make_model, tmp_path / "again", **{**overrides, "epochs": 6})
        np.random.seed(31)  # a new process would draw other numbers too
        second.resume_checkpoint(path)
        second.fit(split.train, split.valid, verbose=False)
        return first, before, second, TripleLog.open(log_path(path)), recording

    return run


def test_training_resumes_from_a_checkpoint_and_so_does_its_log(resume):
    first, before, second, log, recording = resume()
    start = second.start_epoch
    assert 0 < start <= 3 and second.saved_model_file == first.saved_model_file
    assert list(second.train_loss_dict) == list(range(start, 6))
    log.verify()
    assert log.n_epochs == start + len(recording.epochs) == 6
    check_log(log, before[:start] + recording.epochs)


def test_a_resumed_run_ends_in_a_checkpoint_tied_to_its_log(resume):
    _, _, second, log, _ = resume()
    state = torch.load(second.saved_model_file, weights_only=True)
    assert state["triple_log"]["run_id"] == log.run_id
    assert state["triple_log"]["epochs"] == state["epoch"] + 1 <= log.n_epochs


def test_static_negatives_stay_the_same_when_training_is_resumed(resume):
    """Else the log, which stores them once, would not hold what the later epochs used."""
    _, before, second, log, recording = resume(negatives="static")
    assert log.static
    check_log(log, before[: second.start_epoch] + recording.epochs)


def test_resuming_beside_the_log_of_another_run_is_refused(train, make_split, make_model, tmp_path):
    _, first, _ = train("first")
    _, other, _ = train("other", seed=5)
    log_path(first.saved_model_file).rename(tmp_path / "away")
    log_path(other.saved_model_file).rename(log_path(first.saved_model_file))
    split, second, _ = build(make_split, make_model, tmp_path / "again", epochs=6)
    second.resume_checkpoint(first.saved_model_file)
    with pytest.raises(InputError):
        second.fit(split.train, split.valid, verbose=False)


def test_resuming_without_the_log_trains_on_without_one(train, make_split, make_model, tmp_path, caplog):
    _, first, _ = train("first")
    log_path(first.saved_model_file).rename(tmp_path / "away")
    split, second, _ = build(make_split, make_model, tmp_path / "again", epochs=6)
    second.resume_checkpoint(first.saved_model_file)
    second.fit(split.train, split.valid, verbose=False)
    assert "no triple log is kept of this training: there is none beside the checkpoint" in caplog.text
    stored = torch.load(second.saved_model_file, weights_only=True)
    assert "none beside" in stored["triple_log"]["missing"] and max(second.train_loss_dict) == 5


def test_resuming_with_a_log_that_lacks_epochs_is_refused(train, make_split, make_model, tmp_path):
    _, first, _ = train(shuffle=False)
    state = torch.load(first.saved_model_file, weights_only=True)
    assert state["epoch"] >= 1
    TripleLog.open(log_path(first.saved_model_file)).truncate(1)
    split, second, _ = build(make_split, make_model, tmp_path / "again", epochs=6)
    second.resume_checkpoint(first.saved_model_file)
    with pytest.raises(InputError):
        second.fit(split.train, split.valid, verbose=False)


def test_lightgcn_trains_saves_and_loads_with_stock_recbole(make_split, tmp_path):
    """On the installed versions of torch and scipy, for which RecBole 1.2.1 was not written."""
    split = make_split("LightGCN", checkpoint_dir=str(tmp_path / "saved"), epochs=1)
    init_seed(2020, True)
    model = get_model("LightGCN")(split.config, split.train.dataset)
    trainer = get_trainer(split.config["MODEL_TYPE"], "LightGCN")(split.config, model)
    start = model.user_embedding.weight.detach().clone()
    trainer.fit(split.train, split.valid, verbose=False)
    trained = model.user_embedding.weight.detach().clone()
    assert not torch.equal(start, trained)
    with torch.no_grad():
        model.user_embedding.weight.zero_()
    assert trainer.evaluate(split.test)["recall@10"] > 0
    assert torch.equal(model.user_embedding.weight, trained)
