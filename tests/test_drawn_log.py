"""A log that stores no negatives, but draws them again: what is forgotten from it is what the stored ones give."""

import json

import numpy as np
import pytest
from conftest import weights
from recbole.model.general_recommender import BPR

import recbole_unlearn as ru
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.triple_log import TripleLog, crc32, log_path
from recbole_unlearn.training.trained import same_weights
from recbole_unlearn.training.trainer import BPRTrainer, trainer_of
from recbole_unlearn.verify import verify

POPULAR = {"distribution": "popularity", "sample_num": 3, "alpha": 0.75, "dynamic": False, "candidate_num": 0}
UNIFORM = {**POPULAR, "distribution": "uniform"}
SEQUENTIAL = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": 5, "loss_type": "BPR",
    "hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1,
    "train_neg_sample_args": {**UNIFORM, "sample_num": 1},
}  # fmt: skip
MODELS = {
    "BPR": ("BPR", {}),
    "BPR, compiled": ("BPR", {"compiled": True}),
    "BPR, by popularity": ("BPR", {"train_neg_sample_args": POPULAR}),
    "SASRec": ("SASRec", SEQUENTIAL),
    "NeuMF, of labels": ("NeuMF", {"train_neg_sample_args": UNIFORM, "mlp_hidden_size": [8]}),
    "SGL": ("SGL", {"n_layers": 1}),  # draws its graph from the stream of the negatives, before each epoch
}


class Drawing(BPR):
    """Draws from the stream of the negatives between two batches."""

    def calculate_loss(self, interaction):
        np.random.rand()
        return super().calculate_loss(interaction)


@pytest.fixture
def forgotten(make_options):
    """Function (model, log_negatives, keys) -> (original, unlearned): checkpoints of a request right after training."""

    def run(model, log_negatives, **keys):
        folder = f"{log_negatives}"
        keys = {"forget_count": 5, "compare": "none", "evaluate": "none", "epochs": 4, **keys}
        run_unlearn(model, "tiny", config_dict=make_options(log_negatives=log_negatives, output_dir=folder, **keys))
        return f"{folder}/model.pth", f"{folder}/unlearned.pth"

    return run


def opened(path):
    """The training behind a checkpoint."""
    with ru.load(path) as unlearner:
        return unlearner.trained


@pytest.mark.parametrize("name", MODELS)
def test_forgetting_from_drawn_and_stored_negatives_ends_in_the_same_weights(name, forgotten):
    model, keys = MODELS[name]
    stored, drawn = (forgotten(model, kind, **keys) for kind in (True, "drawn"))
    for one, other in zip(stored, drawn, strict=True):
        assert same_weights(weights(one), weights(other))
    log, again = (opened(path[0]) for path in (stored, drawn))
    assert not list(again.log.path.glob("epoch-*")) and again.log.n_epochs == log.log.n_epochs
    for epoch in reversed(range(log.log.n_epochs)):
        assert np.array_equal(log.log.epoch(epoch), again.log.epoch(epoch))
        assert again.log.epoch(epoch).dtype == log.log.dtype
        assert np.array_equal(*(each.recorded().order(epoch) for each in (log, again)))


def test_a_later_request_and_recbole_itself_draw_the_same(forgotten):
    (stored, _), (drawn, _) = forgotten("BPR", True), forgotten("BPR", "drawn")
    assert verify(drawn) < 1e-4
    for way in (ru.Replay(), ru.Replay(rows="touched"), ru.Influence()):
        results = []
        for path in (stored, drawn):
            before = np.random.get_state()[1].copy()
            with ru.load(path, way=way) as unlearner:
                results.append(unlearner.forget(count=7).state_dict)
            assert np.array_equal(before, np.random.get_state()[1])
        assert same_weights(*results)


def test_a_result_stores_its_negatives_and_nothing_that_draws_the_old_ones(forgotten):
    original, result = forgotten("BPR", "drawn")
    log = TripleLog.open(log_path(result))
    assert log.salt and log.n_epochs > 1 and log.drawn == [None] * log.n_epochs
    assert len(list(log.path.glob("epoch-*"))) == log.n_epochs and not list(log.path.glob("stream-*"))
    assert "drawn" not in json.loads((log.path / "metadata.json").read_text())
    with ru.load(result) as unlearner:
        unlearner.forget(count=3)
    run_unlearn(config_dict={"checkpoint": original, "output_dir": "purged", "forget_count": 2, "purge": True,
                             "evaluate": "none", "show_progress": False})  # fmt: skip
    assert not log_path(original).exists()


def test_a_session_outlives_the_files_of_its_log(forgotten):
    original, _ = forgotten("BPR", "drawn")
    trained = opened(original)
    for file in log_path(original).glob("stream-*"):
        file.unlink()
    assert all(each.shape == (trained.log.n_rows, 1) for each in trained.recorded().negatives)


def test_negatives_that_were_drawn_otherwise_are_stored(make_options, caplog):
    keys = {"forget_count": 5, "compare": "none", "evaluate": "none", "epochs": 3}
    with caplog.at_level("WARNING"):
        for kind in (True, "drawn"):
            run_unlearn(Drawing, "tiny", config_dict=make_options(log_negatives=kind, output_dir=str(kind), **keys))
    assert same_weights(weights("True/unlearned.pth"), weights("drawn/unlearned.pth"))
    log = TripleLog.open(log_path("drawn/model.pth"))
    assert set(log.drawn) == {None} and "drawn again" in caplog.text


def test_what_cannot_be_drawn_again_is_said_in_one_line(forgotten):
    original, _ = forgotten("BPR", "drawn")
    log = TripleLog.open(log_path(original))
    log.verify()
    with pytest.raises(InputError, match="holds no negatives of epoch 1"):
        log.epoch(1)  # nobody has given it its data
    log.metadata["drawn"][1] ^= 1
    log.truncate(log.n_epochs)  # writes the metadata
    with pytest.raises(InputError, match="epoch 1") as error, ru.load(original) as unlearner:
        unlearner.forget(count=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place, accepted", [(624, True), (625, False)])
def test_a_stream_that_is_none_is_refused(place, accepted, forgotten):
    original, _ = forgotten("BPR", "drawn")
    log = TripleLog.open(log_path(original))
    file = log.path / "stream-00001.npy"
    np.save(file, np.append(np.load(file)[:-1], np.uint32(place)))
    log.metadata["crc32"][file.name] = crc32(np.load(file))
    log.truncate(log.n_epochs)  # writes the metadata
    if accepted:
        checkpoints.load(original)
    else:
        with pytest.raises(InputError, match=file.name):
            checkpoints.load(original)


def test_a_log_is_cut_with_its_streams(forgotten):
    log = TripleLog.open(log_path(forgotten("BPR", "drawn")[0]))
    log.truncate(2)
    assert sorted(file.name for file in log.path.glob("stream-*")) == ["stream-00000.npy", "stream-00001.npy"]
    again = TripleLog.open(log.path)
    again.verify()
    assert len(again.drawn) == again.n_epochs == 2 and None not in again.drawn


def test_of_many_epochs_only_some_are_kept_in_memory(forgotten, monkeypatch):
    trained = opened(forgotten("BPR", "drawn")[0])
    monkeypatch.setattr("recbole_unlearn.storage.triple_log.KEPT", 2 * trained.log.n_rows)
    drawn, twice = trained.log.again, []
    trained.log.again = lambda epoch, stream: times.append(epoch) or drawn(epoch, stream)
    times = []
    for _ in range(2):
        twice.append([trained.log.epoch(epoch).copy() for epoch in range(trained.log.n_epochs)])
    assert times == 2 * list(range(trained.log.n_epochs)), "an epoch is drawn again once others took its place"
    assert trained.log.epoch(trained.log.n_epochs - 1) is not None and len(times) == 2 * trained.log.n_epochs
    assert all(np.array_equal(*each) for each in zip(*twice, strict=True))


def test_static_negatives_are_stored_once_in_any_case(forgotten):
    log = TripleLog.open(log_path(forgotten("BPR", "drawn", negatives="static")[0]))
    assert set(log.drawn) == {None} and len(list(log.path.glob("epoch-*"))) == 1


def test_it_is_refused_where_it_is_known_not_to_go(make_options, linked_path):
    keys = {"log_negatives": "drawn", "data_path": linked_path, "output_dir": "out"}
    with pytest.raises(InputError, match="log_negatives: drawn is not for CKE"):
        run_unlearn("CKE", "tiny", config_dict=make_options(**keys))
    with pytest.raises(InputError, match="dynamic"):
        run_unlearn("BPR", "tiny", config_dict=make_options(
            log_negatives="drawn", output_dir="out", train_neg_sample_args={**POPULAR, "dynamic": True}
        ))  # fmt: skip
    with pytest.raises(InputError, match="log_negatives must be True or False"):
        run_unlearn("BPR", "tiny", config_dict=make_options(log_negatives="again", output_dir="out"))


def test_a_resumed_training_goes_on_so(make_split, make_model, tmp_path):
    logs = []
    for kind in (True, "drawn"):
        path = None
        for epochs in (2, 5):
            keys = {
                "epochs": epochs,
                "log_negatives": kind,
                "eval_step": 1,
                "checkpoint_dir": str(tmp_path / str(kind)),
            }
            split = make_split(**keys)
            trainer = BPRTrainer(split.config, make_model(split))
            if path:
                trainer.resume_checkpoint(path)
            trainer.fit(split.train, split.valid, verbose=False)
            path = trainer.saved_model_file
            log = TripleLog.open(log_path(path))
            split.draws(log)
        logs.append(log)
    stored, drawn = logs
    assert stored.n_epochs == drawn.n_epochs > 2 and None not in drawn.drawn
    assert all(np.array_equal(stored.epoch(n), drawn.epoch(n)) for n in range(stored.n_epochs))


def test_a_training_by_recbole_is_forgotten_from_in_memory(make_split, make_model, tmp_path):
    split = make_split(log_negatives="drawn", checkpoint_dir=str(tmp_path))
    trainer = trainer_of(split.config, make_model(split))
    trainer.fit(split.train, split.valid, verbose=False)
    assert None not in trainer.triple_log.drawn
    trained = ru.Trained.of(trainer, split.train, split.valid, split.test)
    result = ru.InfluenceUnlearner(trained).forget(count=3)
    assert result.report()["exact"]
