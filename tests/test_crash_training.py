"""Killed while it trains, or while a session is saved: the next start finds no checkpoint, or one with its own log."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import inside
from recbole.utils import init_seed
from test_crash import FAILED, KILLED, Dying, files_up_to, forked, strided

from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.runs.output import output_folder
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage import audit, checkpoints, purging
from recbole_unlearn.storage.files import Locked, locked
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.training import fit as training
from recbole_unlearn.training import trainer as trainers
from recbole_unlearn.training.trained import same_weights
from recbole_unlearn.unlearner import InfluenceUnlearner

EPOCHS, MODEL, LATER = 3, Path("out/model.pth"), Path("later.pth")


class Training:
    """A training run that can be started again and again, and what it writes if nobody kills it."""

    def __init__(self, make_options, folder):
        keys = {"epochs": EPOCHS, "output_dir": "out", "checkpoint_dir": str(folder), "forget_count": 3}
        self.config = UnlearnConfig("BPR", "tiny", config_dict=make_options(**keys))
        init_seed(self.config["seed"], self.config["reproducibility"])
        self.split = Split(self.config)
        self.after = {}  # number of epochs -> weights
        with pytest.MonkeyPatch.context() as patch, inside(folder):
            patch.setattr(trainers, "save", self._save)
            self()
            self.last, log = checkpoints.load(MODEL)
            self.epochs = [np.array(log.epoch(n)) for n in range(log.n_epochs)]

    def _save(self, path, state):
        self.after[state["epoch"] + 1] = {name: value.clone() for name, value in state["state_dict"].items()}
        checkpoints.save(path, state)

    def __call__(self, ready=lambda: None):
        MODEL.parent.mkdir(exist_ok=True)
        init_seed(self.config["seed"], self.config["reproducibility"])
        ready()
        training.train(self.config, self.split, MODEL, [], self.config["seed"])

    def check(self):
        """What the next start finds: number of epochs of the checkpoint, 0 for none."""
        purging.tidy("out")
        with locked(MODEL):
            purging.recover(MODEL)
        assert not [file.name for file in Path("out").rglob(".*")]
        try:
            state, log = checkpoints.load(MODEL)
        except InputError as error:
            assert "\n" not in str(error) and not MODEL.exists()
            return 0
        n = state["triple_log"]["epochs"]
        assert log.run_id == state["triple_log"]["run_id"] and n <= log.n_epochs
        assert same_weights(state["state_dict"], self.after[n])
        assert all(np.array_equal(log.epoch(epoch), self.epochs[epoch]) for epoch in range(n))
        return n

    def check_next(self):
        """A new run does not mix with what is there, whether it takes the same folder or trains the same file."""
        if any(Path("out").iterdir()):
            with pytest.raises(InputError, match="not an empty folder"):
                output_folder(self.config)
        assert forked(self) == 0
        assert self.check() == self.last["triple_log"]["epochs"]
        assert TripleLog.open(log_path(MODEL)).n_epochs == len(self.epochs)


@pytest.fixture(scope="module")
def trained(make_options, tmp_path_factory):
    return Training(make_options, tmp_path_factory.mktemp("trained"))


def kill_at(trained, folder, points, next_every):
    found = []
    for number, point in enumerate(points):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with inside(folder):
            status = forked(lambda point=point: trained(Dying(point).start))
            assert status in (0, KILLED) and status != FAILED, f"failed instead of dying, at step {point}"
            found.append(trained.check())
            if number % next_every == 0:
                trained.check_next()
            if status == 0:
                break
    return found


def test_killed_in_training_there_is_no_checkpoint_or_one_with_its_own_log(trained, tmp_path):
    points = np.sort(np.random.default_rng(5).choice(np.arange(1, 140), 14, replace=False))
    found = kill_at(trained, tmp_path / "run", points.tolist(), 7)
    assert found[0] == 0 and max(found) > 0 and found == sorted(found)


@pytest.mark.slow
def test_killed_at_any_step_of_training_there_is_no_checkpoint_or_one_with_its_own_log(trained, tmp_path):
    found = kill_at(trained, tmp_path / "run", range(1, 1000), 10)
    assert set(found) == {0, *trained.after} and len(found) > 100 and found == sorted(found)


# -- saving a session


@pytest.fixture(scope="module")
def session(finished, tmp_path_factory, make_options):
    """An open session that has forgotten something, with a copy of its checkpoint in its folder."""
    folder = tmp_path_factory.mktemp("session")
    for name in ("model.pth", "model.triples"):
        copy = shutil.copytree if name.endswith("triples") else shutil.copy
        copy(finished[1] / name, folder / name)
    with inside(folder), InfluenceUnlearner.load(folder / "model.pth", None, make_options(epochs=6)) as session:
        session.forget("count", 12)
        yield session


@strided(3)
def test_killed_in_saving_a_session_there_is_nothing_or_the_whole(session, tmp_path, stride):
    (tmp_path / "run").mkdir()
    with inside(tmp_path / "run"):
        found, n, status = [], 1 - stride, KILLED
        while status == KILLED:
            n += stride
            for left in Path(".").iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()

            def save(n=n):
                Dying(n).start()
                session.save(LATER)

            status = forked(save)
            assert status in (0, KILLED), f"failed instead of dying, at step {n}"
            reader = whole(session)  # even before anybody tidied up
            with locked(LATER):
                purging.recover(LATER)
            assert whole(session) == reader
            files = {file.name for file in Path(".").iterdir()}
            assert files - {"audit.jsonl", "audit.jsonl.key"} == ({"later.pth", "later.triples"} if reader else set())
            if "audit.jsonl" in files:  # on record once it is there, and not before; the line may be torn
                assert reader and (not audit.read("audit.jsonl").records or audit.verify("audit.jsonl", [LATER]))
            found.append(reader)
            if len(found) % 10 == 0 and not reader:
                assert forked(lambda: session.save(LATER)) == 0 and whole(session)
    assert found[0] is False and found[-1] is True and found == sorted(found) and len(found) > 40 // stride
    assert len(audit.verify(tmp_path / "run" / "audit.jsonl", [tmp_path / "run" / LATER]).records) == 1


@pytest.mark.parametrize("limit", [0, 500, 3000, 12000])
def test_a_full_disk_in_saving_a_session_is_one_error_and_leaves_nothing(session, tmp_path, limit):
    (tmp_path / "run").mkdir()
    with files_up_to(limit), pytest.raises(InputError, match="cannot write to .*another file") as refused:
        session.save(tmp_path / "run" / LATER)
    assert "\n" not in str(refused.value) and not list((tmp_path / "run").iterdir())


def test_saving_a_session_where_nothing_can_be_written_is_one_error(session):
    with pytest.raises(InputError, match="cannot write to /proc") as refused:
        session.save("/proc/later.pth")
    assert "\n" not in str(refused.value)


def test_a_session_is_not_saved_where_somebody_else_is_writing(session, tmp_path):
    with locked(tmp_path / LATER), pytest.raises(Locked):
        session.save(tmp_path / LATER)
    assert not (tmp_path / LATER).exists()


def test_a_session_keeps_others_off_while_it_is_saved(session, tmp_path, monkeypatch):
    tried = []

    def save(path, *_, **__):
        with pytest.raises(Locked), locked(path):
            pass
        tried.append(path)

    monkeypatch.setattr("recbole_unlearn.unlearner.save_unlearned", save)
    monkeypatch.setitem(session.config.final_config_dict, "audit", None)
    session.save(tmp_path / LATER)
    assert tried == [tmp_path / LATER]
    with locked(tmp_path / LATER):
        pass


def whole(session):
    """Whether there is a saved session, which must be all of it."""
    if not LATER.exists():
        return False
    state, log = checkpoints.load(LATER)
    assert same_weights(state["state_dict"], session.model.state_dict())
    left = np.delete(np.arange(session.split.n_rows), session.forgotten)
    np.testing.assert_array_equal(log.users, session.split.users[left])
    np.testing.assert_array_equal(log.items, session.split.items[left])
    return True
