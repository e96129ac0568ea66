"""What was forgotten cannot come back unnoticed: trainings refuse what the list names, and the list names nobody."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SECRET_ITEM, SECRET_USER
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender import BPR
from recbole.utils import get_trainer, init_seed

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import secret, suppression
from recbole_unlearn.unlearner import load

LIST = "gone.jsonl"


@pytest.fixture
def scene(finished, data_path):
    """An own copy of data and of a trained model."""
    shutil.copytree(data_path, "data")
    shutil.copy(finished[1] / "model.pth", "model.pth")
    shutil.copytree(finished[1] / "model.triples", "model.triples")


def forget(**keys):
    given = {
        "checkpoint": "model.pth",
        "data_path": "data",
        "output_dir": "out",
        "compare": "none",
        "show_progress": False,
    }
    return run_unlearn(config_dict={**given, "suppression": LIST, **keys})


def trains(make_options, **keys):
    given = make_options(data_path="data", forget_count=2, output_dir="new", compare="none", epochs=1, **keys)
    return run_unlearn("BPR", "tiny", None, {**given, "suppression": LIST})


def named(inter="data/tiny/tiny.inter"):
    """Lines of a file that the list names."""
    pairs = [tuple(line.split("\t")[:2]) for line in Path(inter).read_text().splitlines()[1:]]
    found = suppression.suppressed(LIST, *zip(*pairs, strict=True))
    return [pair for pair, gone in zip(pairs, found, strict=True) if gone]


@pytest.mark.parametrize("kind, token", [("users", SECRET_USER), ("items", SECRET_ITEM)])
def test_who_was_forgotten_is_refused_and_can_be_taken_out(scene, make_options, kind, token, capsys):
    forget(**{f"forget_{kind}": [token]})
    kept = [json.loads(line) for line in Path(LIST).read_text().splitlines()]
    assert [each["of"] for each in kept] == [kind[:-1]] and token not in Path(LIST).read_text()
    place = 0 if kind == "users" else 1
    assert {pair[place] for pair in named()} == {token}
    with pytest.raises(InputError, match=r"^[1-9]\d* of \d+ training interactions bring back") as refused:
        trains(make_options)
    assert "\n" not in str(refused.value) and not list(Path("new").glob("*.pth"))
    before, gone = Path("data/tiny/tiny.inter").read_text().splitlines(), len(named())
    assert suppression.main(["remove", LIST, "data/tiny/tiny.inter"]) == 0
    assert f"{gone} lines removed" in capsys.readouterr().out
    after = Path("data/tiny/tiny.inter").read_text().splitlines()
    assert after == [line for line in before if line.split("\t")[place] != token] and len(before) - len(after) == gone
    shutil.rmtree("new", ignore_errors=True)
    assert trains(make_options)["files"]


@pytest.mark.parametrize("field", ['"{}"', '"{}'], ids=["quoted", "open"])
def test_what_recbole_reads_otherwise_than_line_by_line_is_not_said_to_be_removed(scene, capsys, field):
    forget(forget_users=[SECRET_USER])
    inter = Path("data/tiny/tiny.inter")
    inter.write_text(inter.read_text().replace(f"\n{SECRET_USER}\t", f"\n{field.format(SECRET_USER)}\t", 1))
    before = inter.read_bytes()
    assert suppression.main(["remove", LIST, str(inter)]) == 2
    error = capsys.readouterr().err
    assert "quoted" in error and SECRET_USER not in error and error.count("\n") == 1
    assert inter.read_bytes() == before


def test_pairs_are_listed_one_by_one(scene, make_split):
    split = make_split(data_path="data")
    pairs = split.pairs(np.array([3, 90, 200]))
    Path("r.tsv").write_text("".join("\t".join(pair) + "\n" for pair in pairs))
    forget(forget_file="r.tsv")
    assert sorted(named()) == sorted(pairs)
    Path("r.csv").write_text(f"user,item\n{SECRET_USER},\n{pairs[0][0]},{split.pairs(np.array([4]))[0][1]}\n")
    forget(checkpoint="out/unlearned.pth", output_dir="second", forget_requests="r.csv")
    kept = [json.loads(line)["of"] for line in Path(LIST).read_text().splitlines()]
    assert kept == ["user", "pair", "pair", "pair", "pair"]
    assert set(pairs) < set(named()) and (SECRET_USER in {user for user, _ in named()})


def test_nobody_on_it_can_be_tried_without_the_key(scene):
    forget(forget_users=[SECRET_USER])
    (entry,) = map(json.loads, Path(LIST).read_text().splitlines())
    key = secret.read(Path(f"{LIST}.key"))
    assert entry["hash"] == secret.keyed(key, json.dumps(["user", SECRET_USER]))
    assert entry["hash"] != secret.keyed(bytes(32), json.dumps(["user", SECRET_USER]))
    assert Path(f"{LIST}.key").stat().st_mode & 0o777 == 0o600


def test_it_is_written_before_the_purge_and_for_what_an_unlearner_saves(scene, monkeypatch):
    def stopped(*_, **__):
        assert named() and Path("model.pth").exists()
        raise InputError("stopped")

    with load("model.pth", config_dict={"suppression": LIST}) as opened:
        opened.forget(count=3)
        opened.save("later.pth")
    assert len(named()) == 3
    monkeypatch.setattr("recbole_unlearn.storage.purging.purge", stopped)
    os.remove(LIST)
    with pytest.raises(InputError, match="stopped"):
        forget(forget_users=[SECRET_USER], purge=True)


@pytest.mark.parametrize("before", [False, True], ids=["at once", "pair by pair before"])
@pytest.mark.parametrize("kind, token", [("users", SECRET_USER), ("items", SECRET_ITEM)])
def test_an_unlearner_lists_those_who_were_named_as_such_too(scene, kind, token, before):
    """What they do that is not in the training data, or not yet, is refused as well."""
    with load("model.pth", config_dict={"suppression": LIST}) as opened:
        if before:
            opened.forget(pairs=[pair for pair in opened.split.pairs(np.arange(opened.split.n_rows)) if token in pair])
            with pytest.raises(InputError, match="already"):
                opened.forget(**{kind: [token]})
        else:
            opened.forget(**{kind: [token]})
        opened.forget(count=3)
        opened.save("later.pth")
    kept = [json.loads(line)["of"] for line in Path(LIST).read_text().splitlines()]
    assert sorted(kept) == sorted([kind[:-1], *["pair"] * 3])
    someone = (token, "new") if kind == "users" else ("new", token)
    assert suppression.suppressed(LIST, *([each] for each in someone)).all()


def test_recboles_own_training_refuses_too(scene, make_options):
    forget(forget_users=[SECRET_USER])
    config = Config("BPR", "tiny", config_dict={**make_options(data_path="data", epochs=1), "suppression": LIST})
    init_seed(config["seed"], config["reproducibility"])
    train, valid, _ = data_preparation(config, create_dataset(config))
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, BPR(config, train.dataset))
    with pytest.raises(InputError, match="bring back"):
        trainer.fit(train, valid, saved=False)


def test_what_histories_begin_with_is_refused_too(scene, make_options):
    """The first interaction of a user is the target of no row, and trained on all the same."""
    times = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    given = make_options(data_path="data", forget_count=2, epochs=1, compare="none", evaluate="none", **times)
    run_unlearn("FPMC", "tiny", None, {**given, "output_dir": "histories"})
    with load("histories/model.pth") as opened:
        users, items = opened.split.firsts()
        (pair,) = opened.split.tokens(users[:1], items[:1])
    suppression.add(LIST, [("pair", *pair)])
    with pytest.raises(InputError, match="^1 of .*bring back.*remove"):
        run_unlearn("FPMC", "tiny", None, {**given, "output_dir": "new", "suppression": LIST})
    again = {"checkpoint": "histories/unlearned.pth", "forget_count": 3}
    with pytest.raises(InputError, match="^1 of .*bring back.*compare: none$"):
        forget(**again, output_dir="next", compare="retrain")
    assert not Path("next").exists() and forget(**again, output_dir="next")["files"]


@pytest.mark.parametrize("how", ["damaged", "no key", "wrong kind", "no folder", "the audit"])
def test_a_list_that_cannot_be_used_is_refused_before_any_work(scene, how):
    forget(forget_users=[SECRET_USER])
    keys = {}
    if how == "damaged":
        Path(LIST).write_text(Path(LIST).read_text()[:40] + "\n")
    elif how == "wrong kind":
        Path(LIST).write_text(re.sub('"user"', '"friend"', Path(LIST).read_text()))
    elif how == "no key":
        os.remove(f"{LIST}.key")
    elif how == "no folder":
        keys = {"suppression": "none/gone.jsonl"}
    else:
        keys = {"audit": "./both.jsonl", "suppression": "both.jsonl"}
    with pytest.raises(InputError) as refused:
        forget(forget_count=2, output_dir="second", **keys)
    assert "\n" not in str(refused.value) and not Path("second").exists()


def test_the_command_says_in_one_line_what_it_cannot_do(scene, capsys):
    assert suppression.main(["remove", "none", "data/tiny/tiny.inter"]) == 2
    forget(forget_users=[SECRET_USER])
    assert suppression.main(["remove", LIST, "data/tiny/tiny.item"]) == 2
    assert suppression.main(["remove", LIST, "none.inter"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
