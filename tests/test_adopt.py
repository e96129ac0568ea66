"""Checkpoints that RecBole wrote without this package: trained again, compared, adopted; or refused in one line."""

import json
import pickletools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import SEQUENTIAL
from recbole.model.general_recommender.bpr import BPR
from recbole.quick_start import load_data_and_model, run_recbole
from test_crash import KILLED, Dying
from test_crash_stream import exit_status
from test_trainer import train_stock

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import checkpoints, purging
from recbole_unlearn.storage.files import locked
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.testing import tiny_interactions, write_dataset
from recbole_unlearn.training import adoption
from recbole_unlearn.training.fit import LIMIT, new_model, train
from recbole_unlearn.unlearner import load

NEGATIVES = {"distribution": "uniform", "sample_num": 3}
SOFTMAX = {"loss_type": "CE", "train_neg_sample_args": None, "hidden_size": 8, "inner_size": 8}
GRAPH = {
    "inter": ["user_id", "item_id"], "kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"],
}  # fmt: skip
SAMPLED = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "uni10"}
TRAININGS = {
    "bpr": ("BPR", {}),
    "negatives": ("BPR", {"train_neg_sample_args": NEGATIVES}),
    "popularity": ("BPR", {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1}}),
    "early": ("BPR", {"epochs": 60, "learning_rate": 0.05, "stopping_step": 2}),
    "sampled": ("BPR", {"epochs": 9, "eval_step": 2, "eval_args": SAMPLED, "eval_batch_size": 50}),
    "unjudged": ("BPR", {"eval_step": 0}),
    "graph": ("LightGCN", {"n_layers": 2}),
    "sequential": ("GRU4Rec", {**SEQUENTIAL, "hidden_size": 8}),
    "translation": ("TransRec", SEQUENTIAL),
    "chain": ("FPMC", SEQUENTIAL),
    "facts": ("CKE", {"kg_embedding_size": 8, "load_col": GRAPH}),
    "softmax": ("SASRec", {**SEQUENTIAL, **SOFTMAX}),
    "dropout": ("NGCF", {"hidden_size_list": [8], "message_dropout": 0.2}),
    "own": ("Mine", {}),
}
REFUSED = {"descent": ("BPR", {"learner": "sgd", "learning_rate": 0.5})}


class Mine(BPR):
    """The class of the user's own that stock_recbole.py has too."""


@pytest.fixture(scope="session")
def stock_files(tmp_path_factory, make_options, linked_path):
    """Folder of checkpoints of RecBole's own. No test may change it."""
    folder = tmp_path_factory.mktemp("stock")
    given = {name: (model, {**make_options(seed=7), **keys}) for name, (model, keys) in (TRAININGS | REFUSED).items()}
    given["facts"][1]["data_path"] = linked_path
    script = [sys.executable, str(Path(__file__).with_name("stock_recbole.py")), str(folder)]
    done = subprocess.run(script, input=json.dumps(given), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def stock(stock_files, tmp_path):
    """Function name -> copy of a checkpoint of RecBole's own."""
    return lambda name: Path(shutil.copy(stock_files / f"{name}.pth", tmp_path / f"{name}.pth"))


def adopted(path):
    return path.with_stem(f"{path.stem}-adopted")


def raw(path):
    """Weights of a file of RecBole's own, by torch's own reader, which trusts it."""
    return torch.load(path, weights_only=False)["state_dict"]


def edited(path, **parts):
    """Replace parts of a checkpoint file, functions of what they were."""
    with zipfile.ZipFile(path) as file:
        kept = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in kept.items():
            change = parts.get(name.partition("/")[2].replace("/", "_").replace(".", "_"), lambda same: same)
            file.writestr(name, change(content))
    return path


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and "cwd" not in file.parts}


def refusal(path, **keys):
    """What is said of it, in one line; nothing beside it may change."""
    before = contents(path.parent)
    with pytest.raises(InputError) as refused:
        load(path, config_dict=keys)
    assert "\n" not in str(refused.value)
    assert contents(path.parent) == before
    return str(refused.value)


# -- adopted


@pytest.mark.parametrize("keys", [{"replay_rows": "touched"}, {"method": "influence"}])
def test_what_cannot_forget_when_it_is_adopted_is_not_trained_again(stock, keys, monkeypatch):
    monkeypatch.setattr(adoption, "adopt", None)
    assert "damping: adam does not fit learner: sgd; use damping: scalar" in refusal(stock("descent"), **keys)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_checkpoint_of_recboles_own_is_adopted(stock, monkeypatch, name):
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Mine, raising=False)  # for `raw`
    path = stock(name)
    content, weights = path.read_bytes(), raw(path)
    with load(path, model=Mine if name == "own" else None) as unlearner:
        stored = unlearner.trained.stored
        assert unlearner.model is unlearner.trained.model
    assert path.read_bytes() == content
    kept, log = checkpoints.load(adopted(path))
    assert stored["state_dict"].keys() == weights.keys() == kept["state_dict"].keys()
    assert all(torch.equal(kept["state_dict"][key], value) for key, value in weights.items())
    assert kept["triple_log"]["adopted"]["file"] == path.name
    assert 0 <= kept["triple_log"]["adopted"]["distance"] < 1e-5 < LIMIT
    assert log.n_epochs == kept["epoch"] + 1
    assert kept["config"]["compiled"] is False


def test_a_checkpoint_of_an_older_environment_is_adopted(tmp_path):
    """That stock_recbole.py wrote on Python 3.10, with torch 1.12.1 and numpy 1.23.5, of seed 7."""
    path = Path(shutil.copy(Path(__file__).with_name("older.pth"), tmp_path))
    data = write_dataset(tmp_path / "data", "tiny", tiny_interactions())
    with load(path, config_dict={"data_path": data}) as opened:
        assert 0 < opened.trained.stored["triple_log"]["adopted"]["distance"] < 1e-5
        assert all(torch.equal(opened.state_dict[key], value) for key, value in raw(path).items())
        assert opened.forget(users=["u20"]).details["exact"]


@pytest.mark.parametrize("name", ["bpr", "negatives", "popularity", "early", "sampled", "unjudged"])
def test_what_recboles_own_trainer_wrote_beside_this_package_is_adopted(make_options, tmp_path, name):
    """In a process that has imported it, where the checkpoint is no pickle of RecBole's."""
    options = make_options(seed=7, **TRAININGS[name][1])
    path = Path(train_stock(options, tmp_path / "hand").saved_model_file)
    content = path.read_bytes()
    with load(path) as opened:
        assert opened.forget(users=["u20"]).details["exact"]
    kept, _ = checkpoints.load(adopted(path))
    assert path.read_bytes() == content and kept["triple_log"]["adopted"]["distance"] < 1e-5
    assert all(torch.equal(kept["state_dict"][key], value) for key, value in raw(path).items())


def test_a_training_of_ours_that_kept_no_log_is_adopted(make_options, tmp_path):
    options = make_options(seed=7, log_negatives=False, checkpoint_dir=str(tmp_path / "saved"))
    run_recbole("BPR", "tiny", config_dict=options)
    (path,) = (tmp_path / "saved").glob("*.pth")
    assert not log_path(path).exists()
    with load(path) as opened:
        assert opened.forget(users=["u20"]).details["exact"]
    load(adopted(path)).close()


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_a_checkpoint_that_was_loaded_and_written_anew_is_adopted(stock, protocol):
    path = stock("bpr")
    torch.save(torch.load(path, weights_only=False), path, pickle_protocol=protocol)
    load(path).close()
    assert adopted(path).is_file()


def _adopt(path, n):
    Dying(n).start()
    load(path).close()


def killed_at(path, points):
    """Whether there is an adopted checkpoint after the next start, of adoptions that die at changes of the disk."""
    content, found, status = path.read_bytes(), [], KILLED
    temporary = path.parent / "temporary"
    temporary.mkdir()
    for number, n in enumerate(points):
        for left in path.parent.glob("*-adopted*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        status = exit_status(_adopt, path.parent, temporary, path, n)
        assert status in (0, KILLED) and path.read_bytes() == content
        with locked(adopted(path)):
            purging.recover(adopted(path))
        found.append(adopted(path).exists())
        if found[-1]:
            kept, log = checkpoints.load(adopted(path), verify=True)
            assert log.run_id == kept["triple_log"]["run_id"]
            assert all(torch.equal(kept["state_dict"][key], value) for key, value in raw(path).items())
        if number % 10 == 0 or found[-1]:
            with load(path) as opened:
                assert opened.forget(count=3).details["exact"]
            assert not [each for each in path.parent.glob(".*") if each.suffix != ".lock"]
        if status == 0:
            break
    return found, status


def test_killed_while_it_adopts_there_is_nothing_or_a_whole_checkpoint(stock):
    found, _ = killed_at(stock("unjudged"), range(1, 400, 20))
    assert set(found) == {False, True} and found == sorted(found)


@pytest.mark.slow
def test_killed_at_any_change_of_the_disk_while_it_adopts_there_is_nothing_or_a_whole_checkpoint(stock):
    found, status = killed_at(stock("unjudged"), range(1, 1000))
    assert status == 0 and set(found) == {False, True} and found == sorted(found)


def test_how_long_an_epoch_takes_is_known_of_what_was_adopted(stock):
    """So that it is trained again where there is time, as what was trained by our trainer."""
    with load(stock("dropout")) as unlearner:
        done = unlearner.forget(users=["u20"])
        assert done.method == "replay" and done.details["exact"], done.why


def test_a_dry_run_adopts_nothing(stock):
    path = stock("bpr")
    before = contents(path.parent)
    told = run_unlearn(config_dict={"checkpoint": str(path), "dry_run": True, "forget_count": 3})
    assert contents(path.parent) == before and not Path("saved").exists()
    assert told["way"]["method"] is None and told["forget_set"]["interactions"] == 3 and "adopted first" in told.page


def test_the_best_epoch_is_adopted_where_training_went_on(stock):
    path = stock("early")
    kept = checkpoints.read(path, logged=False)
    load(path).close()
    assert 0 < kept["epoch"] < kept["config"]["epochs"] - 1
    assert TripleLog.open(log_path(adopted(path))).n_epochs == kept["epoch"] + 1


@pytest.mark.parametrize("name", ["unjudged", "negatives", "early"])
def test_forgetting_is_that_of_the_own_training_bit_for_bit(stock, make_split, tmp_path, name):
    split = make_split(seed=7, **TRAININGS[name][1])
    train(split.config, split, tmp_path / "own.pth")
    path, found = stock(name), []
    for each in (tmp_path / "own.pth", path):
        with load(each) as unlearner:
            assert unlearner.forget(users=["u20"]).method == "replay"
            unlearner.forget(rows=np.arange(9))
            found.append(unlearner.state_dict)
    assert not torch.equal(found[0]["user_embedding.weight"], raw(path)["user_embedding.weight"])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    logs = [TripleLog.open(log_path(each)) for each in (tmp_path / "own.pth", adopted(path))]
    assert logs[0].n_epochs == logs[1].n_epochs and logs[0].order == logs[1].order
    assert all(np.array_equal(logs[0].epoch(epoch), logs[1].epoch(epoch)) for epoch in range(logs[0].n_epochs))


def test_run_unlearn_takes_it_and_then_what_it_adopted(stock, monkeypatch, caplog):
    path = stock("bpr")
    keys = {"forget_count": 5, "compare": "none", "show_progress": False, "state": "INFO"}
    with caplog.at_level("INFO"):
        first = run_unlearn(config_dict={"checkpoint": str(path), "output_dir": "one", **keys})
    assert f"{path}, which has no log, is adopted as {adopted(path)}" in caplog.text
    assert first["guard"]["checked"] == "replayed" and first["files"]["original"] == str(adopted(path))
    monkeypatch.setattr(adoption, "adopt", lambda *_: pytest.fail("it is adopted already"))
    for number, each in enumerate((path, adopted(path))):
        again = run_unlearn(config_dict={"checkpoint": str(each), "output_dir": f"again{number}", **keys})
        assert again["models"]["unlearned"]["ranking"] == first["models"]["unlearned"]["ranking"]


def test_it_may_lie_elsewhere_and_its_data_too(stock, tmp_path, data_path):
    path, moved = stock("bpr"), tmp_path / "moved"
    shutil.copytree(data_path, moved)
    load(path, config_dict={"checkpoint_dir": str(tmp_path / "new"), "data_path": str(moved)}).close()
    assert (tmp_path / "new" / "bpr-adopted.pth").is_file() and not adopted(path).exists()


def test_sampled_validation_draws_from_the_stream_of_training(stock, monkeypatch):
    monkeypatch.setattr(adoption, "NegSampleEvalDataLoader", lambda *_, **__: ())
    assert "cannot be adopted" in refusal(stock("sampled"))


def test_recboles_own_function_reads_it(stock):
    path = stock("graph")
    _, model, *_ = load_data_and_model(str(path))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in raw(path).items())


# -- refused


def test_a_file_that_was_not_adopted_from_it_is_left_alone(stock, stock_files):
    path = stock("bpr")
    load(path).close()
    shutil.copy(stock_files / "negatives.pth", path)
    assert "was not adopted from" in refusal(path)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_checkpoint_of_no_epoch_is_refused_for_that(make_options, tmp_path, by_hand):
    options = make_options(epochs=0)
    if by_hand:
        path = Path(train_stock(options, tmp_path / "saved").saved_model_file)
    else:
        run_recbole("BPR", "tiny", config_dict={**options, "checkpoint_dir": str(tmp_path / "saved")})
        (path,) = (tmp_path / "saved").glob("*.pth")
    assert "is of epoch -1 of 0, which no training ended with" in refusal(path)


def test_a_model_to_compare_with_is_refused_for_what_it_is(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(adoption, "adopt", lambda *_: pytest.fail("it trained"))
    path = Path(shutil.copy(finished[1] / "retrained.pth", tmp_path))
    assert "no triple log: it was trained to be compared with" in refusal(path)


def test_edited_weights_are_refused_with_their_distance(stock, make_split):
    path = stock("bpr")
    before = raw(path)
    edited(path, data_1=lambda content: (np.frombuffer(content, "<f4") * np.float32(1.01)).tobytes())
    after, split = raw(path), make_split(seed=7)
    start = new_model(split.config, split).state_dict()

    def norm(one, other):
        return torch.cat([(one[key] - other[key]).double().ravel() for key in one]).norm().item()

    message = refusal(path)
    distance = float(re.search(r"ends ([\d.e-]+) of the way", message)[1])
    assert distance == pytest.approx(norm(before, after) / norm(after, start), rel=0.05) and distance > LIMIT
    assert "weights were changed since" in message and "train anew" in message
    assert not adopted(path).exists() and not log_path(adopted(path)).exists()


@pytest.mark.parametrize("name", ["bpr", "graph", "sequential"])
def test_weights_that_training_does_not_give_take_one_approximate_step(stock, tmp_path, name):
    path, keys = stock(name), {"show_progress": False, "compare": "none", "forget_users": ["u20"]}
    edited(path, data_1=lambda content: (np.frombuffer(content, "<f4") * np.float32(1.2)).tobytes())
    assert "method: influence" in refusal(path)
    before = raw(path)
    out = run_unlearn(config_dict={"checkpoint": str(path), "method": "influence", "output_dir": "out", **keys})
    assert out["unlearning"]["method"] == "influence" and not out["unlearning"].get("exact")
    assert out["guard"]["checked"] == "not" and "approximate" in out["guard"]["sentence"]
    assert "approximate" in out.page and "approximate" in Path("out/report.html").read_text()
    kept, log = checkpoints.load(adopted(path))
    assert all(torch.equal(kept["state_dict"][key], value) for key, value in before.items())
    assert kept["triple_log"]["adopted"]["distance"] > LIMIT and not log.snapshots
    assert out["models"]["unlearned"]["forget_auc"] < out["models"]["original"]["forget_auc"]
    keys["forget_users"] = ["u92"]  # it is never taken for what was recorded
    with pytest.raises(InputError):
        run_unlearn(config_dict={"checkpoint": str(adopted(path)), "method": "replay", **keys})
    again = run_unlearn(config_dict={"checkpoint": "out/unlearned.pth", "evaluate": "none", **keys})
    assert again["unlearning"]["method"] == "influence" and "approximate" in again["guard"]["sentence"]


def test_data_in_another_order_are_refused(stock, write_data, interactions, tmp_path):
    other = write_data(tmp_path / "other", "tiny", interactions[::-1])
    assert "the data are others" in refusal(stock("bpr"), data_path=other)


def test_data_of_another_size_are_refused(stock, write_data, interactions, tmp_path):
    more = write_data(tmp_path / "more", "tiny", [*interactions, ("new", interactions[0][1], 1)])
    message = refusal(stock("bpr"), data_path=more)
    assert "user_embedding.weight is [38, 8]" in message and "it is [39, 8]" in message


def test_missing_data_are_refused(stock, tmp_path):
    assert "cannot load data set" in refusal(stock("bpr"), data_path=str(tmp_path / "none"))


def test_other_settings_than_it_was_trained_with_are_refused(stock):
    assert "was trained with learning_rate 0.02" in refusal(stock("bpr"), learning_rate=0.5)


def test_a_configuration_that_cannot_have_trained_it_is_refused(stock):
    path = stock("bpr")
    state = torch.load(path, weights_only=False)
    state["config"].final_config_dict["train_neg_sample_args"] = None
    torch.save(state, path, pickle_protocol=4)
    assert "pairwise models need them" in refusal(path)


def test_a_class_of_the_users_own_must_be_given(stock):
    assert "class of your own, Mine" in refusal(stock("own"))


def test_a_folder_that_cannot_be_written_to_is_refused(stock):
    Path("file").touch()
    assert "cannot write" in refusal(stock("bpr"), checkpoint_dir="file")


def test_bad_requests_are_refused_before_anything_is_trained(stock, monkeypatch):
    monkeypatch.setattr(adoption, "adopt", lambda *_: pytest.fail("it trained"))
    path = stock("bpr")
    with pytest.raises(InputError, match="nobody"):
        run_unlearn(config_dict={"checkpoint": str(path), "forget_users": ["nobody"]})


def test_a_purge_would_leave_what_recbole_wrote(stock):
    path, request = stock("bpr"), {"forget_count": 5, "compare": "none", "evaluate": "none", "purge": True}
    for leave in (path, path, adopted(path)):
        before = contents(path.parent)
        for keys in ({"output_dir": "out"}, {"dry_run": True}):
            with pytest.raises(InputError, match="would leave") as refused:
                run_unlearn(config_dict={"checkpoint": str(leave), **keys, **request})
        assert contents(path.parent) == before
        # nobody is to delete the only one that there is
        assert (f"adopted as {adopted(path)} first, by recbole_unlearn.load({str(path)!r})" in str(refused.value)) == (
            not adopted(path).exists()
        )
        load(path).close()
    path.unlink()
    assert run_unlearn(config_dict={"checkpoint": str(adopted(path)), "output_dir": "out", **request})
    assert not adopted(path).exists()


# -- nothing that a file holds is run, and none makes us fail otherwise than in one line


def word(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module, name):
    return word(module) + word(name) + b"\x93"


def called(module, name, *arguments):
    """Arguments: pieces of pickle."""
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def small(number):
    return b"K" + bytes([number])


REBUILD, STORAGE = ("torch._utils", "_rebuild_tensor_v2"), named("torch", "FloatStorage")


def storage(key="0", size=38 * 8):
    return b"(" + word("storage") + STORAGE + word(key) + word("cpu") + b"M" + size.to_bytes(2, "little") + b"tQ"


def tensor(size, stride, offset=0):
    """Size, stride: pieces of pickle."""
    return called(*REBUILD, storage(), small(offset), size, stride, b"\x89", called("collections", "OrderedDict"))


HOSTILE = {
    "a call": called("builtins", "open", word("ran"), word("w")),
    "a call of torch": called("torch", "save", small(1), word("ran")),
    "a dotted name": called("torch.serialization", "os.mkdir", word("ran")),
    "a class": named("subprocess", "Popen") + b")\x81",
    "a name that is never called": named("builtins", "open"),
    "a call within a call": called("collections", "OrderedDict", called("builtins", "open", word("ran"), word("w"))),
    "a change of a name": named(*REBUILD) + b"}" + word("call") + small(1) + b"sb",
    "a change of Config": named("recbole.config.configurator", "Config") + b"}" + word("a") + small(1) + b"sb",
    "slots of Config": named("recbole.config.configurator", "Config") + b"N}" + word("a") + small(1) + b"s\x86b",
    "another Config": named("recbole.config.configurator", "Config") + b")\x81",
    "a change of a tensor": tensor(small(1) + b"\x85", small(1) + b"\x85") + b"}" + word("data") + small(1) + b"sb",
    "a change of a model's name": named("recbole.model.general_recommender.bpr", "BPR") + b"}b",
    "a call of the model": called("recbole.model.general_recommender.bpr", "BPR"),
    "odd arguments of a dict": called("collections", "OrderedDict", small(1)),
    "a tensor of nothing": called(*REBUILD, small(1), small(1), b")", b")"),
    "a tensor without arguments": called(*REBUILD),
    "a tensor that is too large": tensor(b"M\xff\xff\x85", small(1) + b"\x85"),
    "a tensor repeated": tensor(b"M\xff\xff\x85", small(0) + b"\x85"),
    "a tensor of negative steps": tensor(small(2) + b"\x85", b"J\xff\xff\xff\xff\x85"),
    "a tensor of huge steps": tensor(small(2) + b"\x85", b"\x8a\x09" + b"\xff" * 8 + b"\x7f\x85"),
    "numbers elsewhere": called(*REBUILD, storage("../../0"), small(0), b")", b")", b"\x89", b"N"),
    "numbers that are not there": called(*REBUILD, storage("99"), small(0), b")", b")", b"\x89", b"N"),
    "numbers of another size": called(*REBUILD, storage(size=9), small(0), b")", b")", b"\x89", b"N"),
    "a sparse tensor": called("torch._utils", "_rebuild_sparse_tensor", small(1)),
    "an object of numpy": called("numpy", "dtype", word("O")),
    "a huge dtype": called("numpy", "dtype", word("V999999999")),
    "a scalar of nothing": called("numpy.core.multiarray", "scalar", small(1), small(2)),
    "a scalar that is too short": called(
        "numpy.core.multiarray", "scalar", called("numpy", "dtype", word("f8")), b"C\x01a"
    ),
    "a place in memory": small(1) + b"r\xff\xff\xff\x7f",
    "an extension": b"\x82\x01",
    "an old-fashioned call": b"(" + word("ran") + word("w") + b"ibuiltins\nopen\n",
    "a huge length": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "nested lists": b"]" * 100_000 + b"a" * 99_999,
    "nested tuples as a key": b"}" + b")" + b"\x85" * 1_000_000 + b"Ns",
    "a tuple as a key": b"}" + small(1) + b"\x85Ns",
    "values without end": b"(]\x94" + (b"](" + b"%b" * 9 + b"e\x94") * 12 + b"t",
    "a list of itself": b"]\x94%ba",
    "a huge number": b"\x8a\xff" + b"\x7f" * 255,
    "nothing on the stack": b"0000",
}


def placed(content, more):
    """Add a value to the dict that a pickle holds; ``%b`` in it is what was remembered last."""
    content = content[:2] + content[11:] if content[2:3] == b"\x95" else content  # without its frame
    count = sum(opcode.name == "MEMOIZE" for opcode, _, _ in pickletools.genops(content))
    whole = b""
    for number, piece in enumerate(more.split(b"\x94")):
        last = b"j" + (count + number - 1).to_bytes(4, "little")
        whole += piece.replace(b"%b", last) + b"\x94"
    return content[:-1] + word("more") + whole[:-1] + b"s."


def test_a_value_more_is_read(stock):
    every_second = tensor(small(9) + b"\x85", small(2) + b"\x85")
    path = edited(stock("bpr"), data_pkl=lambda content: placed(content, every_second))
    assert torch.equal(checkpoints.read(path, logged=False)["more"], raw(path)["user_embedding.weight"].ravel()[:18:2])


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_in_it_runs(stock, what):
    path = edited(stock("bpr"), data_pkl=lambda content: placed(content, HOSTILE[what]))
    with pytest.raises(InputError, match="cannot be read") as refused:
        checkpoints.read(path, logged=False)
    assert "\n" not in str(refused.value)
    assert not Path("ran").exists()


def test_a_model_that_recbole_computes_is_refused_for_what_it_is(stock):
    """Its checkpoint holds what was computed: EASE's a sparse matrix of scipy's."""
    path = stock("bpr")
    state = torch.load(path, weights_only=False)
    state["other_parameter"] = {"item_similarity": scipy.sparse.csr_matrix(np.eye(3))}
    torch.save(state, path, pickle_protocol=4)
    with pytest.raises(InputError, match=r"csr_matrix.*\(EASE, ItemKNN\).*build them anew"):
        checkpoints.read(path, logged=False)


def test_the_traps_work(stock):
    path = edited(stock("bpr"), data_pkl=lambda content: placed(content, HOSTILE["a call"]))
    torch.load(path, weights_only=False)["more"].close()
    assert Path("ran").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(stock, share):
    path = stock("bpr")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("seed", range(5))
def test_a_pickle_with_changed_bytes_is_read_or_refused(stock, seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):

        def spoil(content):
            changed = bytearray(content)
            for place in rng.integers(12, len(changed), rng.integers(1, 4)):
                changed[place] = rng.integers(256)
            return bytes(changed)

        path = edited(stock("bpr"), data_pkl=spoil)
        try:
            checkpoints.read(path, logged=False)
        except InputError as error:
            assert "\n" not in str(error)
