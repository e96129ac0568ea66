"""Purge: after it nothing forgotten is left in any file, and the model goes on being usable."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_USER, tiny_interactions

from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import audit, checkpoints, inter_file
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.unlearner import load
from recbole_unlearn.verify import verify

GONE_USER, GONE_ITEM = "GONEUSER-57", "GONEITEM-88"


@pytest.fixture
def data(write_data):
    """An own data set in ./data, with a user of one interaction, which RecBole puts into training, of an own item."""
    rows = tiny_interactions()
    rows[100:100] = [(GONE_USER, GONE_ITEM, 5)]
    write_data("data", "tiny", rows)
    return Path("data/tiny/tiny.inter")


@pytest.fixture
def forget(make_options, data):
    """Function (**keys) -> result of a run that purges the data set too."""

    def run(checkpoint=None, **keys):
        keys = {"compare": "none", "output_dir": "out", "purge": True, "purge_dataset": True, **keys}
        if checkpoint:
            return run_unlearn(config_dict={"checkpoint": checkpoint, **keys})
        return run_unlearn("BPR", "tiny", None, make_options(data_path="data", **keys))

    return run


def everything():
    """Content of every file below, RecBole's own logs included."""
    return {str(file): file.read_bytes() for file in Path(".").rglob("*") if file.is_file()}


def holders(*texts):
    codings = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")
    return [
        name for name, content in everything().items() if any(t.encode(c) in content for t in texts for c in codings)
    ]


def test_a_user_with_nothing_left_is_named_in_no_file(forget, data):
    before = data.read_bytes().splitlines()
    forget(forget_users=[GONE_USER])
    assert holders(GONE_USER, GONE_ITEM) == ["data/tiny/tiny.item"]  # the user's own item features name the item
    assert data.read_bytes().splitlines() == [line for line in before if GONE_USER.encode() not in line]


@pytest.mark.parametrize("model", ["BPR", "FPMC"])
def test_the_names_of_whom_earlier_requests_forgot_go_too(make_options, data, model):
    """An item that histories begin with alone is among them."""
    lines = data.read_text().splitlines()
    user, item, _ = lines[1].split("\t")
    lines[2:2] = [f"{GONE_USER}\t{each}\t{n}" for n, each in enumerate(("EARLY-1", item, "EARLY-2"), 1000001)]
    lines = [line for line in lines if line.split("\t")[1:2] != [GONE_ITEM]]
    data.write_text("\n".join(lines) + "\n")
    keys = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}, "compare": "none"}
    keys |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "evaluate": "none", "data_path": "data"}
    keys["eval_args"] = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": None, "mode": "full"}
    asked = {"forget_users": [GONE_USER], "purge": True, "output_dir": "first"}
    run_unlearn(model, "tiny", None, make_options(**asked, **keys))
    assert holders(GONE_USER, "EARLY-1", "EARLY-2") == [str(data)]
    asked = {"forget_users": [user], "purge": True, "purge_dataset": True, "output_dir": "second"}
    run_unlearn(config_dict={"checkpoint": "first/unlearned.pth", "compare": "none", "evaluate": "none", **asked})
    # the line of what a history begins with, which is no row, stays with the file
    assert holders(GONE_USER) == holders("EARLY-1") == ([str(data)] if model == "FPMC" else [])
    assert holders("EARLY-2") == []


def test_forgotten_pairs_are_together_in_no_file(forget, data, make_split):
    split = make_split(data_path="data")
    rows = np.flatnonzero(split.token("user", split.users) == SECRET_USER)[:4]
    pairs = split.pairs(rows)
    ids = list(zip(split.users[rows].tolist(), split.items[rows].tolist(), strict=True))
    Path("request.tsv").write_text("".join(f"{user}\t{item}\n" for user, item in pairs))
    forget(forget_file="request.tsv", state="INFO")
    os.remove("request.tsv")
    for user, item in pairs:
        assert not [line for line in data.read_text().splitlines() if line.split("\t")[:2] == [user, item]]
        # a line, a list, a tuple: however text puts two tokens side by side
        joined = [
            f"{user}{between}{item}{end}" for between in ("\t", ",", ", ", '", "', "', '", ":") for end in "\t\n,\"'"
        ]
        assert holders(*joined) == []
    logs = list(Path(".").rglob("users.npy"))
    assert [str(file) for file in logs] == ["out/unlearned.triples/users.npy"]
    kept = set(zip(*(np.load(logs[0].with_name(f"{each}.npy")).tolist() for each in ("users", "items")), strict=True))
    assert kept and not kept & set(ids)
    for file in Path(".").rglob("*.pth"):
        assert file.name == "unlearned.pth"
        assert tensors_of_ids(torch.load(file, weights_only=True)) == []


def tensors_of_ids(value):
    """Tensors of a checkpoint that could hold ids: whole numbers, more than one."""
    if isinstance(value, dict):
        return [found for each in value.values() for found in tensors_of_ids(each)]
    if isinstance(value, (list, tuple)):
        return [found for each in value for found in tensors_of_ids(each)]
    whole = isinstance(value, torch.Tensor) and value.numel() > 1 and bool((value == value.round()).all())
    return [value] if whole else []


def test_ids_and_split_stay_those_of_the_model(forget, make_split):
    """RecBole by itself would number the users anew, and split anew, after lines are gone from the file."""
    before = make_split(data_path="data")
    forget(forget_users=[GONE_USER])
    state, log = checkpoints.load("out/unlearned.pth")
    config = {**state["config"], "data_path": str(log.path / "data")}
    after = frozen_split(config)
    gone = before.token("user", before.users) == GONE_USER
    np.testing.assert_array_equal(after.users, before.users[~gone])
    np.testing.assert_array_equal(after.items, before.items[~gone])
    assert (after.n_users, after.n_items) == (before.n_users, before.n_items)
    for field in ("user", "item"):
        ids = np.unique(getattr(after, f"{field}s"))
        assert list(after.token(field, ids)) == list(before.token(field, ids))
    for part in ("valid", "test"):
        old, new = (getattr(split, part).dataset.inter_feat for split in (before, after))
        for field in ("user_id", "item_id"):
            assert torch.equal(old[field], new[field])


def frozen_split(stored):
    from recbole_unlearn.settings.config import UnlearnConfig

    kept = {
        key: value
        for key, value in stored.items()
        if key in ("benchmark_filename", "load_col", "data_path", "eval_args")
    }
    return Split(UnlearnConfig("BPR", "tiny", config_dict=kept))


UNSHUFFLED = {"method": "replay", "replay_rows": "all", "evaluate": "none"}


def test_unshuffled_data_are_frozen_in_their_order(forget, make_split):
    """By which RecBole's own loader would train again: not in the log's, which is grouped by user."""
    split = make_split(data_path="data", shuffle=False)
    data, users = split.train.dataset.inter_feat, []
    pairs = list(zip(data["user_id"].tolist(), data["item_id"].tolist(), strict=True))
    assert pairs != sorted(pairs)
    for source, user, target in ((None, GONE_USER, "first"), ("first/unlearned.pth", SECRET_USER, "second")):
        keys = UNSHUFFLED | ({} if source else {"shuffle": False})
        assert forget(source, forget_users=[user], output_dir=target, **keys)["unlearning"]["exact"]
        users.append(split.token("user", np.arange(1, split.n_users)).tolist().index(user) + 1)
        left = [pair for pair in pairs if pair[0] not in users]
        log = TripleLog.open(f"{target}/unlearned.triples")
        own = np.argsort(log.steps(0), kind="stable")
        own = list(zip(log.users[own].tolist(), log.items[own].tolist(), strict=True))
        batches = range(0, len(left), split.batch_rows)
        assert len(own) == len(left) and len(batches) > 2
        assert all(set(own[n : n + split.batch_rows]) == set(left[n : n + split.batch_rows]) for n in batches)
        assert verify(f"{target}/unlearned.pth") < 1e-4


def test_an_order_that_an_earlier_version_did_not_freeze_is_refused(forget):
    forget(forget_users=[GONE_USER], output_dir="first", shuffle=False, **UNSHUFFLED)
    frozen = Path("first/unlearned.triples/data/tiny")
    with np.load(frozen / "arrays.npz") as kept:
        arrays = dict(kept)
    order = np.argsort(arrays["train/user_id"], kind="stable")
    np.savez(frozen / "arrays.npz", **{k: v[order] if k.startswith("train/") else v for k, v in arrays.items()})
    tables = json.loads((frozen / "tables.json").read_text())
    tables.pop("in_order", None)
    (frozen / "tables.json").write_text(json.dumps(tables))
    assert verify("first/unlearned.pth") < 1e-4  # by the log's own batches
    found = "shuffle: False trains in the order of the data, which the earlier version that froze them"
    refused(forget, found, checkpoint="first/unlearned.pth", forget_users=[SECRET_USER], output_dir="x", **UNSHUFFLED)


def test_further_requests_go_on_and_thin_the_file_out(forget, data):
    lines = len(data.read_text().splitlines())
    first = forget(forget_count=7, output_dir="first")
    second = forget("first/unlearned.pth", forget_count=9, output_dir="second")
    assert second["forget_set"]["of"] == first["forget_set"]["of"] - 7
    assert len(data.read_text().splitlines()) == lines - 16
    assert not Path("first/unlearned.pth").exists() and not Path("first/unlearned.triples").exists()
    third = forget(
        "second/unlearned.pth", forget_users=[SECRET_USER], output_dir="third", purge_dataset=False, purge=False
    )
    assert third["forget_set"]["of"] == first["forget_set"]["of"] - 16
    log = TripleLog.open("third/unlearned.triples")
    assert log.n_rows == third["forget_set"]["of"] - third["forget_set"]["interactions"]
    frozen = Path("third/unlearned.triples/data/tiny")
    with np.load(frozen / "arrays.npz") as kept:
        gone = set(log.users.tolist()) ^ set(kept["train/user_id"].tolist())
        assert len(kept["train/user_id"]) == log.n_rows and not gone
        held_out = [*kept["valid/user_id"], *kept["test/user_id"]]
    named = json.loads((frozen / "tokens.json").read_text())["user_id"].index(SECRET_USER) + 1
    assert named not in log.users and named in held_out


def lines_of(data, pairs):
    """Those of a file that name some pairs."""
    return [line for line in data.read_text().splitlines() if tuple(line.split("\t")[:2]) in set(pairs)]


@pytest.fixture
def forgotten_before(forget):
    """Pairs that first/unlearned.pth has forgotten without a purge, in request.tsv too, and some that are held out."""
    forget(forget_count=1, output_dir="zero", purge=False, purge_dataset=False)
    with load("zero/model.pth") as opened:
        pairs = opened.split.pairs(np.arange(2, 7))
        held_out = opened.split.valid.dataset.inter_feat
        held_out = opened.split.tokens(*(held_out[field].numpy()[:2] for field in ("user_id", "item_id")))
    for name, some in (("request", pairs), ("both", [*pairs, *held_out])):
        Path(f"{name}.tsv").write_text("".join(f"{user}\t{item}\n" for user, item in some))
    forget("zero/model.pth", forget_file="request.tsv", output_dir="first", purge=False, purge_dataset=False)
    return pairs, held_out


def test_purge_dataset_takes_the_lines_of_what_was_forgotten_before(forget, data, forgotten_before):
    pairs, _ = forgotten_before
    assert len(lines_of(data, pairs)) == 5
    planned = forget("first/unlearned.pth", forget_count=3, dry_run=True)
    told = "the lines of 3 forgotten interactions, and of 5 forgotten before"
    assert [each["then"] for each in planned["left"] if each["what"] == told] == ["are removed"]
    lines = len(data.read_text().splitlines())
    result = forget("first/unlearned.pth", forget_count=3, output_dir="second")
    assert result["lines"] == {"requested": 3, "earlier": 5} and "and of 5 forgotten before" in result.page
    assert audit.read("second/audit.jsonl").records[-1]["lines"] == result["lines"]
    assert lines_of(data, pairs) == [] and len(data.read_text().splitlines()) == lines - 8
    again = forget("second/unlearned.pth", forget_count=2, output_dir="third")
    assert again["lines"] == {"requested": 2, "earlier": 0} and len(data.read_text().splitlines()) == lines - 10
    stays = forget("third/unlearned.pth", forget_count=2, output_dir="fourth", purge=False, purge_dataset=False)
    assert "2 lines of tiny.inter, which no later request can tell" in stays["left"]


def test_the_lines_of_what_was_forgotten_before_can_go_alone(forget, data, forgotten_before):
    pairs, _ = forgotten_before
    before = checkpoints.load("first/unlearned.pth")[0]["state_dict"]
    result = forget("first/unlearned.pth", forget_file="request.tsv", output_dir="second")
    assert result["forget_set"]["interactions"] == 0 and result["lines"] == {"requested": 0, "earlier": 5}
    after = checkpoints.load("second/unlearned.pth")[0]["state_dict"]
    assert lines_of(data, pairs) == [] and all(torch.equal(before[name], after[name]) for name in before)


def test_a_refusal_tells_what_was_forgotten_from_what_is_held_out(forget, forgotten_before):
    found = r"7 such of 7: 5 forgotten before, 2 held-out, never trained on\)"
    nothing = {"purge": False, "purge_dataset": False, "output_dir": "x"}
    refused(forget, found, checkpoint="first/unlearned.pth", forget_file="both.tsv", **nothing)


def test_a_refusal_knows_what_histories_begin_with(make_options, data):
    keys = {"MAX_ITEM_LIST_LENGTH": 6, "hidden_size": 8, "num_layers": 1, "loss_type": "CE"}
    keys |= {"train_neg_sample_args": None, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    keys |= {"compare": "none", "evaluate": "none", "data_path": "data"}
    rows = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    user, first, _ = rows[0]
    never = next(item for _, item, _ in rows if item not in {item for name, item, _ in rows if name == user})
    Path("request.tsv").write_text(f"{user}\t{first}\n{user}\t{never}\n")
    told = "2 such of 2: 1 that histories begin with, 1 not in the data as the model read them"
    with pytest.raises(InputError, match=told):
        run_unlearn("GRU4Rec", "tiny", None, make_options(forget_file="request.tsv", **keys))


def test_held_out_pairs_go_with_everywhere(forget, data, forgotten_before):
    pairs, held_out = forgotten_before
    result = forget("first/unlearned.pth", forget_file="both.tsv", output_dir="second", everywhere=True)
    assert result["lines"] == {"requested": 2, "earlier": 5} and lines_of(data, [*pairs, *held_out]) == []
    with load("second/unlearned.pth") as opened:
        assert not set(held_out) & set(
            opened.split.tokens(*np.divmod(opened.split.held_out_pairs(), opened.split.n_items))
        )


def count_of(data):
    return len(data.read_text().splitlines())


def saved_and_said(forget, data, *arguments, **keys):
    """What dry run, result and audit record say of lines, which is how many are gone; and the result."""
    before = count_of(data)
    planned = forget(*arguments, **keys, dry_run=True)
    result = forget(*arguments, **keys)
    lines = result["lines"]
    assert before - count_of(data) == sum(lines.values())
    assert audit.read(f"{keys['output_dir']}/audit.jsonl").records[-1]["lines"] == lines
    told = [each["what"] for each in planned["left"] if each["what"].startswith("the lines of")]
    earlier = f", and of {lines['earlier']} forgotten before" if lines["earlier"] else ""
    assert told == [f"the lines of {lines['requested']} forgotten interactions{earlier}"]
    return lines, planned, result


@pytest.fixture
def again(forget, data):
    """zero/model.pth, of users who all have their first item again, last of all; returns two pairs of these."""
    lines = data.read_text().splitlines()
    firsts = {line.split("\t")[0]: line.split("\t")[1] for line in reversed(lines[1:])}
    lines += [f"{user}\t{item}\t{2000000 + n}" for n, (user, item) in enumerate(sorted(firsts.items()))]
    data.write_text("\n".join(lines) + "\n")
    keys = {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}}
    keys["load_col"] = {"inter": ["user_id", "item_id", "timestamp"]}
    forget(forget_count=1, output_dir="zero", purge=False, purge_dataset=False, **keys)
    return sorted(firsts.items())[3:5]


def test_lines_of_pairs_that_are_held_out_too(forget, data, again):
    """Of earlier requests they stay; of the request itself they go, and are said to go, and are in no log either."""
    pair, other = again
    Path("request.tsv").write_text("\t".join(pair) + "\n")
    forget("zero/model.pth", forget_file="request.tsv", output_dir="first", purge=False, purge_dataset=False)
    Path("request.tsv").write_text("\t".join(other) + "\n")
    lines, _, result = saved_and_said(
        forget, data, "first/unlearned.pth", forget_file="request.tsv", output_dir="second"
    )
    assert lines == {"requested": 2, "earlier": 0} and "left" not in result
    assert len(lines_of(data, [pair])) == 2 and not lines_of(data, [other])
    with load("second/unlearned.pth") as opened:
        held_out = opened.split.tokens(*np.divmod(opened.split.held_out_pairs(), opened.split.n_items))
    assert pair in held_out and other not in held_out


def test_with_everywhere_all_lines_are_counted(forget, data, again):
    user = again[0][0]
    lines, planned, _ = saved_and_said(
        forget, data, "zero/model.pth", forget_users=[user], output_dir="first", everywhere=True
    )
    assert lines["requested"] > 20 and any("all other lines" in each["what"] for each in planned["left"])


def test_of_pairs_no_other_lines_are_said_to_go(forget, data, forgotten_before):
    keys = {"forget_file": "both.tsv", "output_dir": "second", "everywhere": True}
    lines, planned, _ = saved_and_said(forget, data, "first/unlearned.pth", **keys)
    assert lines == {"requested": 2, "earlier": 5}
    assert not any("all other lines" in each["what"] for each in planned["left"])


def test_a_quoted_line_of_an_earlier_request_hinders_no_later_one(forget, data, forgotten_before):
    user, item = forgotten_before[0][0]
    data.write_text(data.read_text().replace(f"\n{user}\t{item}\t", f'\n"{user}"\t{item}\t'))
    lines, _, result = saved_and_said(forget, data, "first/unlearned.pth", forget_count=2, output_dir="second")
    assert lines == {"requested": 2, "earlier": 4} and f'\n"{user}"\t{item}\t' in data.read_text()
    assert "1 pair forgotten before, which tiny.inter names otherwise" in result["left"]


@pytest.mark.parametrize("changed", ["data", "log"])
def test_a_line_that_is_new_is_not_taken_for_one_that_was_forgotten(forget, data, again, changed):
    """As many rows of the same tokens: an operator took the forgotten line out, and its user came back."""
    rows = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    user, items = again[0][0], [item for _, item, _ in rows]
    own = [item for name, item, _ in rows if name == user]
    pair = user, next(item for item in own[2:-4] if items.index(item) < [name for name, *_ in rows].index(user))
    Path("request.tsv").write_text("\t".join(pair) + "\n")
    forget("zero/model.pth", forget_file="request.tsv", output_dir="first", purge=False, purge_dataset=False)
    if changed == "data":
        new = next(item for item in sorted(set(items)) if item not in own)
        kept = [line for line in data.read_text().splitlines() if tuple(line.split("\t")[:2]) != pair]
        data.write_text("\n".join([*kept, f"{user}\t{new}\t9999999"]) + "\n")
    else:  # as earlier versions wrote it
        file = Path("first/unlearned.triples/metadata.json")
        metadata = json.loads(file.read_text())
        del metadata["fingerprint"]["held_out_rows"], metadata["crc32"]["metadata.json"]
        file.write_text(json.dumps(metadata))
    before = [line for line in data.read_text().splitlines() if line.startswith(f"{user}\t")]
    forget("first/unlearned.pth", forget_count=1, output_dir="second", purge=False, purge_dataset=False)
    keys = {"forget_users": [again[1][0]], "output_dir": "third"}
    _, planned, result = saved_and_said(forget, data, "second/unlearned.pth", **keys)
    assert [line for line in data.read_text().splitlines() if line.startswith(f"{user}\t")] == before
    told = "2 lines of tiny.inter that earlier requests forgot or that are new"
    assert told in result["left"] and told in planned.page and result["lines"]["earlier"] == 0


def test_lines_that_the_data_set_does_not_read_are_said_to_stay(forget, data):
    """A filter dropped them, or they came after the data were frozen; of a pair that is forgotten they go with it."""
    lines = data.read_text().splitlines()
    user, item, _ = next(line for line in reversed(lines) if line.startswith(f"{SECRET_USER}\t")).split("\t")
    data.write_text("\n".join([*lines, f"{user}\t{item}\t5"]) + "\n")
    keys = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "val_interval": {"timestamp": "[1006000,inf)"}}
    keys["eval_args"] = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": None, "mode": "full"}
    forget(forget_count=1, output_dir="zero", evaluate="none", purge=False, purge_dataset=False, **keys)
    rows = [line.split("\t") for line in data.read_text().splitlines()[1:]]
    early = {name: sum(each == name and float(time) < 1006000 for each, _, time in rows) for name, *_ in rows}
    keys = {"forget_users": [user], "evaluate": "none", "dry_run": True}
    told = "lines of tiny.inter that this data set does not read"
    both = {"purge": False, "purge_dataset": False}
    assert f"{early[user]} {told}" in forget("zero/model.pth", **keys, **both).page
    with load("zero/model.pth") as opened:
        forgotten = (user, item) in opened.split.pairs(np.arange(opened.split.n_rows))
    early[user] -= forgotten
    assert f"{early[user]} {told}" in forget("zero/model.pth", **keys).page
    assert told not in forget("zero/model.pth", **keys, everywhere=True).page
    keys["dry_run"] = False
    left = forget("zero/model.pth", **keys, output_dir="first")["left"]
    held_out = int(left.split(" held-out")[0])
    assert f", {early[user]} {told}; everywhere: True takes" in left
    assert (
        len([line for line in data.read_text().splitlines() if line.startswith(f"{user}\t")]) == early[user] + held_out
    )
    other = next(name for name, count in early.items() if count == 2 and name != user)
    data.write_text(data.read_text() + f"{other}\tnew\t9999999\n")
    assert (
        f"3 {told}" in forget("first/unlearned.pth", **keys | {"forget_users": [other], "output_dir": "second"})["left"]
    )


def test_the_file_is_looked_through_once_for_all_requests(make_config, data, monkeypatch):
    rows = [line.split("\t")[:2] for line in data.read_text().splitlines()[1:]]
    read, plain_open = [], open
    monkeypatch.setattr(
        "builtins.open", lambda file, *more, **keys: read.append(file) or plain_open(file, *more, **keys)
    )
    asked = [{"user": [SECRET_USER]}, {"item": [rows[0][1]]}, {"user": [rows[1][0]], "item": [rows[1][1]]}, {}]
    found = inter_file.pairs_naming(data, make_config(data_path="data"), asked)
    assert read.count(data) == 2  # for quotes, too
    assert [sum(each.values()) for each in found] == [
        sum(user in each.get("user", ()) or item in each.get("item", ()) for user, item in rows) for each in asked
    ]


def test_a_moved_model_finds_its_data(forget):
    forget(forget_count=7, output_dir="first")
    os.rename("first", "moved")
    result = forget("moved/unlearned.pth", forget_count=3, output_dir="second", compare="retrain")
    assert result["models"]["retrained"]["forget_auc"] >= 0


def test_a_data_path_says_where_the_files_lie_beside_which_data_are_frozen(forget, data):
    forget(forget_count=7, output_dir="first")
    os.rename("data", "moved")
    refused(forget, "not there any more", checkpoint="first/unlearned.pth", forget_count=3, output_dir="second")
    for nowhere in ("data", "moved/tiny"):
        keys = {"checkpoint": "first/unlearned.pth", "forget_count": 3, "output_dir": "second", "data_path": nowhere}
        refused(forget, "there is no .*tiny.inter; leave data_path out", **keys)
    moved = Path("moved/tiny/tiny.inter")
    lines = len(moved.read_text().splitlines())
    with load("first/unlearned.pth", config_dict={"data_path": "moved"}) as opened:
        opened.forget(count=2)
    frozen = "first/unlearned.triples/data"
    assert forget(
        "first/unlearned.pth", forget_count=2, output_dir="b", data_path=frozen, purge=False, purge_dataset=False
    )
    forget("first/unlearned.pth", forget_count=3, output_dir="second", data_path="moved")
    assert len(moved.read_text().splitlines()) == lines - 3
    forget("second/unlearned.pth", forget_count=2, output_dir="third")  # knows by now
    assert len(moved.read_text().splitlines()) == lines - 5


@pytest.mark.parametrize(
    "keys",
    [{"forget_time": "..9"}, {"forget_category": "c1", "forget_category_field": "class"}],
    ids=lambda keys: [*keys][0],
)
def test_what_is_chosen_by_columns_is_refused_where_the_data_have_no_files(forget, keys):
    forget(forget_count=7, output_dir="first")
    with pytest.raises(InputError, match="after purge_dataset") as found:
        forget("first/unlearned.pth", output_dir="second", **keys)
    assert "\n" not in str(found.value) and not Path("second").exists()


def test_an_unlearned_model_evaluates_alike_after_the_purge(forget):
    """Not to the last digit: nobody knows any more which items to leave out of the forgotten users' candidates."""
    first = forget(forget_count=7, output_dir="first", coupling="paired")  # the same weights at every run
    again = forget("first/unlearned.pth", forget_count=1, output_dir="second", purge=False, purge_dataset=False)
    before, after = first["models"]["unlearned"]["ranking"], again["models"]["original"]["ranking"]
    for protocol, metrics in before.items():
        assert after[protocol] == pytest.approx(metrics, abs=0.01)


def test_other_columns_are_kept_as_the_model_read_them(forget, make_split):
    """Scaled by what remains, which does not tell the first time of all that is gone; not again when it is read."""
    keys = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "normalize_all": True}
    split = make_split(data_path="data", **keys)
    train, whole = (
        np.sort(each.inter_feat["timestamp"].numpy()) for each in (split.train.dataset, split.whole_dataset())
    )
    forget(forget_users=[GONE_USER], **keys)
    state, log = checkpoints.load("out/unlearned.pth")
    after = frozen_split({**state["config"], "data_path": str(log.path / "data")}).train.dataset.inter_feat
    assert whole[0] == train[0] == 0 and whole[1] > 0  # it was the first of all
    expected = (train[1:] - whole[1]) / (1 - whole[1])
    np.testing.assert_allclose(np.sort(after["timestamp"].numpy()), expected, atol=1e-5)


@pytest.mark.parametrize("model", ["BPR", "GRU4Rec"])
@pytest.mark.parametrize("unused", [[], ["tags", "sizes"]])
def test_lists_are_as_wide_as_the_longest_that_is_left(data, make_options, model, unused):
    """Else their width would say how long one was that is gone; of numbers an index beside each, and in histories."""
    head, *lines = data.read_text().splitlines()
    user, item, _ = lines[300].split("\t")
    head += "\ttags:token_seq\tsizes:float_seq"
    lines = [
        f"{line}\t{'a b c d e' if n == 300 else 'a b'}\t{'1 2 3' if n == 300 else '4'}" for n, line in enumerate(lines)
    ]
    data.write_text("\n".join([head, *lines]) + "\n")
    Path("request.tsv").write_text(f"{user}\t{item}\n")
    sequential = {"loss_type": "CE", "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 5}
    columns = {"load_col": {"inter": ["user_id", "item_id", "timestamp", "tags", "sizes"]}}
    keys = {**columns, "unused_col": {"inter": unused}, "numerical_features": ["sizes"], "output_dir": "first"}
    keys |= {"data_path": "data", "epochs": 1, "compare": "none", "forget_file": "request.tsv", "purge": True}
    keys |= {"purge_dataset": True, **(sequential if model == "GRU4Rec" else {})}
    run_unlearn(model, "tiny", None, make_options(**keys))
    widths = {"tags": (2,), "sizes": (1, 2)}
    with np.load("first/unlearned.triples/data/tiny/arrays.npz") as kept:
        for part in ("train", "valid", "test"):
            for field, shape in widths.items():
                if field not in unused:
                    assert kept[f"{part}/{field}"].shape[1:] == shape
                if model == "GRU4Rec":
                    assert kept[f"{part}/{field}_list"].shape[1:] == (5, *shape)
    lengths = json.loads(Path("first/unlearned.triples/data/tiny/tables.json").read_text())["lengths"]
    found = {field: np.ravel(lengths[column])[-1] for column in lengths for field in widths if field in column}
    assert all(widths[field][0] == length for field, length in found.items())
    asked = {"checkpoint": "first/unlearned.pth", "forget_count": 2, "compare": "none", "output_dir": "second"}
    assert run_unlearn(config_dict=asked)["unlearning"]["exact"]


@pytest.mark.parametrize("model", ["NeuMF", "GRU4Rec"])
def test_the_run_that_trains_may_purge_the_data_set(data, make_options, model):
    """By models of their own trainers, which number the rows of the data set."""
    sequential = {"loss_type": "CE", "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 5}
    keys = {"data_path": "data", "epochs": 1, "eval_step": 0, "compare": "none", "forget_count": 3, "purge": True}
    keys |= {"purge_dataset": True, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "output_dir": "first"}
    run_unlearn(model, "tiny", None, make_options(**keys, **(sequential if model == "GRU4Rec" else {})))
    asked = {"checkpoint": "first/unlearned.pth", "forget_count": 2, "compare": "none", "output_dir": "second"}
    assert run_unlearn(config_dict=asked)["unlearning"]["exact"]


def test_without_purge_dataset_the_file_stays(forget, data):
    before = data.read_bytes()
    forget(forget_count=7, purge_dataset=False)
    assert data.read_bytes() == before


# -- refusals, all before anything is written


def refused(run, match, **keys):
    before = everything()
    with pytest.raises(InputError, match=match) as error:
        run(**keys)
    assert "\n" not in str(error.value)
    assert everything() == before


def test_purge_dataset_needs_purge(forget):
    refused(forget, "purge: True", forget_count=3, purge=False)


@pytest.mark.parametrize("keys", [{}, {"purge_dataset": False}])
def test_purge_needs_a_model_that_is_kept(make_options, data, keys):
    before = everything()
    given = make_options(data_path="data", forget_count=3, purge=True, **{"purge_dataset": True, **keys})
    with pytest.raises(InputError, match="saved=False"):
        run_unlearn("BPR", "tiny", None, given, saved=False)
    assert everything() == before


def test_the_bundled_data_is_refused(make_options):
    keys = make_options(forget_count=3, output_dir="out", purge=True, purge_dataset=True, epochs=1)
    keys.pop("data_path")
    refused(lambda: run_unlearn("BPR", "ml-100k", None, keys), "own example")


def test_data_sets_not_in_plain_form_are_refused(forget):
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    refused(forget, "plain files", forget_count=3, threshold={"timestamp": 3}, LABEL_FIELD="label", load_col=columns)


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_file_with_another_name_is_refused(forget, data, how):
    os.rename(data, "real.inter")
    os.symlink(Path("real.inter").absolute(), data) if how == "symbolic" else os.link("real.inter", data)
    refused(forget, "another name", forget_count=3)


def test_a_log_behind_a_link_is_not_half_purged(forget, finished, tmp_path):
    shutil.copy(finished[1] / "model.pth", "model.pth")
    shutil.copytree(finished[1] / "model.triples", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", "model.triples")
    refused(forget, "another name", checkpoint="model.pth", forget_count=3, purge_dataset=False)


def test_a_pair_that_stays_elsewhere_is_refused(forget, data, make_split):
    """The same pair twice in training, of which a draw may take one: the file's lines do not tell them apart."""
    content = data.read_text().splitlines()
    data.write_text("\n".join([*content, *content[1:]]) + "\n")
    refused(forget, "occur in other", forget_count=3)


def test_a_checkpoint_that_names_another_file_thins_none_out(forget, data):
    """Whoever changes a checkpoint cannot have lines of files removed that are not its own."""
    forget(forget_count=3, output_dir="first")
    other = Path("elsewhere/other.inter")
    other.parent.mkdir()
    other.write_bytes(data.read_bytes())
    stored = torch.load("first/unlearned.pth", weights_only=True)
    torch.save(stored | {"data": {**stored["data"], "inter": str(other.absolute())}}, "first/unlearned.pth")
    refused(forget, "other.inter", checkpoint="first/unlearned.pth", forget_count=3, output_dir="second")


# -- removing lines


FORM = {"separator": "\t", "encoding": "utf-8", "fields": ["user_id", "item_id"]}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_all_other_bytes_stay(tmp_path, end):
    path = tmp_path / "a.inter"
    lines = [
        "user_id:token\trating:float\titem_id:token",
        "ä\t1\tß",
        "a\t1.50\tb",
        "a\t2\tbb",
        "",
        "aa\t1\tb",
        "a\t3\tb",
    ]
    path.write_bytes(end.join(lines).encode())
    path.chmod(0o640)
    inter_file.remove_pairs(path, FORM, [("a", "b")])
    kept = [lines[n] for n in (0, 1, 3, 4, 5)]
    assert path.read_bytes().decode() == end.join(kept) + end
    assert path.stat().st_mode & 0o777 == 0o640 and [file.name for file in tmp_path.glob(".*")] == []
    inter_file.remove_pairs(path, FORM, [("a", "b")])  # once more does nothing
    assert path.read_bytes().decode() == end.join(kept) + end


def test_a_pair_that_the_file_does_not_name_is_refused(make_config, tmp_path):
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\na\tb\n")
    inter_file.check(tmp_path / "a.inter", make_config(), [("a", "b")])
    with pytest.raises(InputError, match="1 of 2"):
        inter_file.check(tmp_path / "a.inter", make_config(), [("a", "b"), ("c", "b")])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a:token\tb:token\n1\t2\n"])
def test_a_file_without_the_columns_is_refused(make_config, tmp_path, content):
    (tmp_path / "a.inter").write_bytes(content)
    with pytest.raises(InputError, match="no .inter file"):
        inter_file.check(tmp_path / "a.inter", make_config(), [("a", "b")])


def test_a_damaged_token_file_is_refused_in_one_line(forget):
    forget(forget_count=7, output_dir="first")
    Path("first/unlearned.triples/data/tiny/tokens.json").write_text(json.dumps({"users": [1], "items": None}))
    refused(forget, "cannot load data set", checkpoint="first/unlearned.pth", forget_count=3, output_dir="second")


@pytest.mark.parametrize("coupling", ["auto", "paired"])
def test_what_is_left_was_drawn_anew_unless_asked_otherwise(forget, coupling):
    """Whoever knows the seed could else try which missing row leads to the weights. The new log can be trained from."""
    keys = {} if coupling == "auto" else {"coupling": coupling}
    result = forget(forget_count=2, epochs=3, **keys)
    fresh = coupling == "auto"
    assert result["unlearning"]["exact"] and result["unlearning"]["coupling"] == ("fresh" if fresh else "paired")
    log = TripleLog.open("out/unlearned.triples")
    assert (log.steps(0) is not None) == fresh  # of the original's order holes would tell
    if fresh:
        assert verify("out/unlearned.pth") < 1e-4
