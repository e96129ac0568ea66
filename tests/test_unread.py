"""Whom the data set was not read with: dropped by a filter, or new in the file since the data lie with the log."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import inside, tiny_interactions, weights
from test_everywhere import contents, holders, lines, train_live, write_all

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.requests.__main__ import main
from recbole_unlearn.requests.queue import Queue
from recbole_unlearn.storage import suppression

USER, ITEM = "RAREUSER", "RAREITEM"  # of too few interactions
OLD = ("u20", "i4")  # both are known; this interaction of theirs is too old
LATE = 10**6
FILTERS = {
    "user_inter_num_interval": "[4,inf)",
    "item_inter_num_interval": "[3,inf)",
    "val_interval": {"timestamp": "[1000000,inf)"},
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}
EVERYWHERE = {"purge": True, "purge_dataset": True, "everywhere": True}


@pytest.fixture(scope="module")
def trained(make_options, tmp_path_factory):
    """A data set of which filters drop some, and a model trained on it. No test may change it."""
    rows = [each for each in tiny_interactions() if each[:2] != OLD]
    rows += [(USER, item, LATE) for item in ("i3", "i7")] + [(user, ITEM, LATE) for user in ("u17", "u23")]
    with inside(tmp_path_factory.mktemp("unread")) as start:
        write_all("data/tiny", [*rows, (*OLD, 17)])
        Path("data/tiny/tiny.kg").write_text(Path("data/tiny/tiny.kg").read_text() + "m.RARE\tr1\tt1\n")
        Path("data/tiny/tiny.link").write_text(Path("data/tiny/tiny.link").read_text() + f"{ITEM}\tm.RARE\n")
        train_live(make_options, **FILTERS, evaluate="none", epochs=2)
    return start


@pytest.fixture
def scene(trained, tmp_path, monkeypatch):
    """An own copy of it as the current folder."""
    shutil.copytree(trained, tmp_path / "scene")
    monkeypatch.chdir(tmp_path / "scene")


def forget(**keys):
    silent = {"compare": "none", "evaluate": "none", "state": "INFO"}
    given = {"checkpoint": "live/model.pth", "output_dir": "out", **silent, **EVERYWHERE, **keys}
    return run_unlearn(config_dict=given)


@pytest.mark.parametrize(
    "keys, gone",
    [
        ({"forget_users": [USER]}, USER),
        ({"forget_items": [ITEM]}, ITEM),
        ({"forget_file": "request"}, "\t".join((USER, "i7"))),
        ({"forget_file": "old"}, "\t".join(OLD)),
        ({"forget_requests": "user"}, USER),
    ],
)
def test_their_lines_go_and_the_model_stays(scene, trained, keys, gone):
    written = {"request": f"{USER}\ti7\n", "old": f"{OLD[0]}\t{OLD[1]}\n", "user": f"user,item\n{USER},\n"}
    for name, text in written.items():
        Path(name).write_text(text)
    before = weights("live/model.pth")
    plan = forget(**keys, dry_run=True, suppression="gone.list")
    assert plan["way"]["seconds"] == 0 and lines("inter") == lines("inter", trained)
    result = forget(**keys, suppression="gone.list")
    assert result["forget_set"]["interactions"] == 0 and "left" not in result
    assert all(torch.equal(value, before[name]) for name, value in weights("out/unlearned.pth").items())
    for ending in ("inter", "user", "item", "link"):
        assert lines(ending) == [line for line in lines(ending, trained) if gone not in line]
    assert result["lines"]["requested"] == len(lines("inter", trained)) - len(lines("inter")) > 0
    if gone == ITEM:
        assert not [line for line in lines("kg") if "m.RARE" in line]
    for name in written:
        Path(name).unlink()
    if gone in (USER, ITEM):
        assert holders(gone) == []
    kind, named = next((kind, each) for kind, each in (("user", USER), ("item", ITEM), ("pair", gone)) if each == gone)
    assert suppression.lists("gone.list", kind, named.split("\t"))


def test_they_go_with_others_in_one_request(scene, trained):
    Path("r.csv").write_text(f"user,item\n{USER},\nu23,\n{OLD[0]},{OLD[1]}\n,{ITEM}\n")
    stream = forget(forget_requests="r.csv", request_batch=9)
    Path("r.csv").unlink()
    assert stream["stream"]["empty"] == 3 and stream["unlearning"]["requests"] == 4
    assert holders(USER, ITEM, "\t".join(OLD)) == [] and stream["forget_set"]["users"] == 1
    assert not [line for line in lines("inter") if line.startswith("u23\t")]
    assert forget(checkpoint="out/unlearned.pth", output_dir="next", forget_items=["i4"])["unlearning"]["exact"]


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"forget_users": [USER], "everywhere": False}, "not read with 1 user of the request, which its files name"),
        ({"forget_users": [USER], "everywhere": False, "purge_dataset": False, "purge": False}, "1 user of the"),
        ({"forget_items": [ITEM, "i4"], "everywhere": False}, "not read with 1 item of the request"),
        ({"forget_requests": "r.csv", "everywhere": False}, "not read with 1 user of the request"),
        ({"forget_file": "request.tsv", "everywhere": False}, "not read with 1 pair of the request"),
        ({"forget_users": ["u1000"]}, "unknown user token 'u1000'"),
        ({"forget_users": [USER, "u1000"]}, "unknown user token 'u1000'"),
        ({"forget_file": "mixed.tsv"}, "unknown user token 'u1000'"),
        ({"forget_file": "never.tsv"}, "1 not in the data as the model read them"),
        ({"forget_users": [1000]}, "unknown user token '1000'"),
    ],
)
def test_who_is_in_no_file_or_only_there_is_refused_before_anything_changes(scene, keys, match):
    Path("r.csv").write_text(f"user,item\n{USER},\nu23,\n")
    Path("request.tsv").write_text(f"{OLD[0]}\t{OLD[1]}\nu20\ti7\n")
    Path("mixed.tsv").write_text(f"{USER}\ti7\nu1000\ti7\n")
    Path("never.tsv").write_text(f"{USER}\ti7\n{USER}\ti12\n".replace(USER, "u17").replace("i7", ITEM))
    before = sorted(contents("."))
    with pytest.raises(InputError, match=match) as refused:
        forget(**keys)
    assert "\n" not in str(refused.value) and sorted(contents(".")) == before


def test_a_pair_that_was_dropped_is_passed_over_in_a_stream_without_everywhere(scene):
    Path("r.csv").write_text(f"user,item\n{OLD[0]},{OLD[1]}\nu23,\n")
    result = forget(forget_requests="r.csv", everywhere=False)
    assert result["stream"]["empty"] == 1 and any(line.startswith("\t".join(OLD)) for line in lines("inter"))


def test_new_lines_beside_data_that_lie_with_the_log_go_too(scene):
    forget(forget_count=3, everywhere=False)
    with open("data/tiny/tiny.inter", "a") as file:
        file.write("newcomer\ti3\t2000000\n77\ti3\t2000000\n")
    keys = {"checkpoint": "out/unlearned.pth", "output_dir": "next"}
    with pytest.raises(InputError, match="token 77 was given as a number, .* quote it"):
        forget(**keys, forget_users=[77])
    forget(**keys, forget_users=["newcomer", "77"])
    assert holders("newcomer") == [] and not [line for line in lines("inter") if line.startswith("77\t")]


def test_facts_that_a_model_stays_trained_on_are_refused(trained, make_options, tmp_path, monkeypatch):
    shutil.copytree(trained / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    items = {line.split("\t")[1] for line in lines("inter")[1:]}
    tables = {"link": [f"{item}\tm.{item}" for item in items], "kg": [f"m.{item}\tr1\tt1" for item in items]}
    for ending, own in tables.items():
        Path(f"data/tiny/tiny.{ending}").write_text("\n".join([lines(ending)[0], *sorted(own)]) + "\n")
    columns = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
    keys = FILTERS | {"load_col": {**FILTERS["load_col"], **columns}, "epochs": 1, "evaluate": "none"}
    train_live(make_options, "CKE", **keys)
    before = sorted(contents("."))
    with pytest.raises(InputError, match="CKE would stay trained on facts of items that no interaction is of"):
        forget(forget_items=[ITEM])
    assert sorted(contents(".")) == before


def test_a_queue_serves_them(scene, capsys):
    kinds = {"a": ["--user", USER], "b": ["--pair", *OLD], "c": ["--item", "i9999"], "d": ["--item", ITEM]}
    for name, named in kinds.items():
        assert main(["add", "q.db", *named, "--id", name]) == 0
    keys = [f"--{key}={value}" for key, value in EVERYWHERE.items()]
    assert main(["serve", "q.db", "live/model.pth", "--output_dir=served", *keys]) == 1
    said = capsys.readouterr().out
    assert "c: failed, unknown item token" in said and "a: done, 0 interactions" in said
    with Queue("q.db") as queue:
        assert [each["state"] for each in queue.requests()] == ["done", "done", "failed", "done"]
    assert holders(USER, ITEM, "\t".join(OLD)) == []
