"""Loading a checkpoint: whatever the file holds, it is refused in one line or safe; nothing in it runs."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.shown import plain
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage.triple_log import log_path


@pytest.fixture
def path(finished, tmp_path):
    """Copy of a trained model's checkpoint, log beside it."""
    _, folder = finished
    shutil.copy(folder / "model.pth", tmp_path / "model.pth")
    shutil.copytree(folder / "model.triples", tmp_path / "model.triples")
    return tmp_path / "model.pth"


def edit(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def refusal(path):
    with pytest.raises(InputError) as refused:
        checkpoint.load(path)
    message = str(refused.value)
    assert "\n" not in message and str(path.parent) in message
    return message


def hostile(target):
    class Hostile:
        def __reduce__(self):
            return open, (str(target), "w")

    return Hostile()


def test_load_gives_the_weights_and_the_log(path):
    state, log = checkpoint.load(path)
    expected = torch.load(path, weights_only=True)
    for name, value in expected["state_dict"].items():
        assert torch.equal(state["state_dict"][name], value)
    assert log.path == log_path(path) and log.run_id == state["triple_log"]["run_id"]


def test_load_takes_a_path_as_text_too(path):
    assert checkpoint.load(str(path))[1].run_id == checkpoint.load(path)[1].run_id


def test_load_does_not_change_the_files(path):
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    checkpoint.load(path)
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before


# -- files that are no checkpoint


def test_a_missing_file_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.pth")


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "model.pth").mkdir()
    refusal(tmp_path / "model.pth")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"garbage", b"PK\x03\x04garbage", bytes(range(256)) * 40, b"\x80\x04.", b"\x80\x02}q\x00."],
    ids=repr,
)
def test_garbage_is_refused(path, content):
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("content", [5, "text", [1, 2], {}, {"state_dict": {}}, torch.ones(3)], ids=str)
def test_other_torch_files_are_refused(path, content):
    torch.save(content, path)
    refusal(path)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", ["plain pickle", "torch file", "legacy torch file", "inside a checkpoint"])
def test_a_hostile_pickle_is_refused_and_its_code_does_not_run(path, tmp_path, how, protocol):
    trap = hostile(tmp_path / "ran")
    pickle.loads(pickle.dumps(trap, protocol)).close()
    assert (tmp_path / "ran").exists()  # the trap works
    (tmp_path / "ran").unlink()
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(trap, protocol))
    elif how == "inside a checkpoint":
        state = torch.load(path, weights_only=True)
        torch.save({**state, "other_parameter": trap}, path, pickle_protocol=protocol)
    else:
        torch.save(trap, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "torch file")
    assert "weights_only" not in (said := refusal(path)) and "trust" not in said
    assert not (tmp_path / "ran").exists()


def test_a_configuration_of_another_class_than_recboles_is_refused(path, make_config):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "config": make_config()}, path, pickle_protocol=4)
    assert "cannot be read" in refusal(path)


# -- checkpoints that do not fit


@pytest.mark.parametrize("key", ["config", "epoch", "state_dict", "optimizer", "triple_log"])
def test_a_checkpoint_without_one_of_its_parts_is_refused(path, key):
    edit(path, lambda state: state.pop(key))
    refusal(path)


def test_a_checkpoint_trained_without_log_is_refused_with_what_to_do(path):
    edit(path, lambda state: state.pop("triple_log"))
    shutil.rmtree(log_path(path))
    assert "no triple log" in (said := refusal(path)) and "adopts it" in said


def test_a_checkpoint_whose_log_is_gone_is_refused(path):
    shutil.rmtree(log_path(path))
    assert "triple log" in refusal(path)


def test_the_log_of_another_run_is_refused(path, finished):
    shutil.rmtree(log_path(path))
    shutil.copytree(finished[1] / "unlearned.triples", log_path(path))
    assert "different runs" in refusal(path)


def test_a_log_with_fewer_epochs_than_the_checkpoint_is_refused(path):
    edit(path, lambda state: state["triple_log"].update(epochs=state["triple_log"]["epochs"] + 1))
    refusal(path)


def test_a_log_changed_by_one_byte_is_refused(path):
    file = log_path(path) / "epoch-00000.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "checksum" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(path, value):
    def spoil(state):
        state["state_dict"]["item_embedding.weight"][3, 2] = value

    edit(path, spoil)
    assert "item_embedding.weight" in refusal(path)


MALFORMED = {
    "tie no dict": lambda state: state.update(triple_log=3),
    "tie None": lambda state: state.update(triple_log=None),
    "tie epochs text": lambda state: state["triple_log"].update(epochs="3"),
    "tie epochs NaN": lambda state: state["triple_log"].update(epochs=float("nan")),
    "tie epochs zero": lambda state: state["triple_log"].update(epochs=0),
    "tie without run": lambda state: state["triple_log"].pop("run_id"),
    "weights no dict": lambda state: state.update(state_dict=[1, 2]),
    "weights no tensors": lambda state: state.update(state_dict={"user_embedding.weight": 3}),
    "config no dict": lambda state: state.update(config="BPR"),
    "config without model": lambda state: state["config"].pop("model"),
    "config without data set": lambda state: state["config"].pop("dataset"),
    "optimizer no dict": lambda state: state.update(optimizer=3),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_checkpoint_is_refused(path, what):
    edit(path, MALFORMED[what])
    refusal(path)


# -- writing


def test_save_replaces_the_old_file_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    checkpoint.save(path, {"x": torch.ones(3)})

    def killed(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"x": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["a.pth"]


def test_plain_makes_any_configuration_loadable_without_pickle(make_config, tmp_path):
    config = make_config()
    values = {
        **config.final_config_dict,
        "numpy": np.float64(0.1),
        "path": tmp_path,
        "set": {1},
        "tuple": (1, (2, "a")),
    }
    torch.save(plain(values), tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert loaded.keys() == values.keys()
    assert (loaded["epochs"], loaded["numpy"], loaded["tuple"]) == (3, 0.1, [1, [2, "a"]])
    assert loaded["topk"] == [5, 10] and loaded["train_neg_sample_args"]["sample_num"] == 1
