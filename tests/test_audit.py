"""The audit record: what it holds, what it must not hold, and that no change of it goes unnoticed."""

import hashlib
import hmac
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_ITEM, SECRET_USER

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.shown import public
from recbole_unlearn.storage import audit, secret, triple_log
from recbole_unlearn.storage import checkpoints as checkpoint


@pytest.fixture
def file(tmp_path):
    """An audit file of four records."""
    path = tmp_path / "audit.jsonl"
    for n in range(4):
        audit.append(path, {"event": "unlearned", "request": str(n), "before": {"file": "b"}, "after": {"file": "a"}})
    return path


@pytest.fixture
def recorded(finished, tmp_path):
    """Copy of a finished run's folder: its audit file and its checkpoints."""
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


# -- the chain


def test_every_line_holds_the_checksum_of_the_one_before(file):
    lines = file.read_bytes().splitlines()
    previous = [json.loads(line)["previous"] for line in lines]
    assert previous == [audit.GENESIS, *(hashlib.sha256(line).hexdigest() for line in lines[:-1])]
    trail = audit.read(file)
    assert [record["request"] for record in trail.records] == ["0", "1", "2", "3"]
    assert trail.head == hashlib.sha256(lines[-1]).hexdigest() and trail.torn == 0


def test_append_leaves_what_is_there(file):
    before = file.read_bytes()
    head = audit.append(file, {"event": "purged"})
    assert file.read_bytes().startswith(before) and audit.read(file).head == head


@pytest.mark.parametrize("n", range(4))
@pytest.mark.parametrize("how", ["change", "remove", "duplicate", "garbage", "blank"])
def test_any_change_but_at_the_end_is_found(file, n, how):
    lines = file.read_bytes().splitlines(keepends=True)
    head = audit.read(file).head
    if how == "change":
        lines[n] = lines[n].replace(b'"event": "unlearned"', b'"event": "unlearneD"')
    elif how == "remove":
        del lines[n]
    elif how == "duplicate":
        lines.insert(n, lines[n])
    else:
        lines.insert(n, b"\xff garbage\n" if how == "garbage" else b"\n")
    file.write_bytes(b"".join(lines))
    if n == 3 and how in ("change", "remove"):  # only the head, written down elsewhere, tells
        assert audit.read(file).head != head
        return
    with pytest.raises(audit.AuditError, match="line"):
        audit.read(file)
    content = file.read_bytes()
    with pytest.raises(audit.AuditError):
        audit.append(file, {"event": "purged"})
    assert file.read_bytes() == content


def test_every_changed_byte_is_found(file):
    content, head = file.read_bytes(), audit.read(file).head
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        try:
            trail = audit.read(file)
        except audit.AuditError:
            continue
        assert trail.head != head or trail.torn


def test_a_torn_last_line_is_reported_and_removed_by_the_next_append(file):
    content = file.read_bytes()
    last = len(content) - content[:-1].rfind(b"\n") - 1
    for cut in (1, 2, last // 2, last - 1):
        file.write_bytes(content[:-cut])
        trail = audit.read(file)
        assert len(trail.records) == 3 and trail.torn == last - cut
        audit.append(file, {"event": "purged"})
        trail = audit.read(file)
        assert trail.torn == 0 and trail.records[-1]["removed_torn_bytes"] == last - cut
        assert len(trail.records) == 4


@pytest.mark.parametrize(
    "content", [b"\x00" * 50 + b"\n", b"[1]\n", b"3\n", b'{"previous": 3}\n', b"{}\n", b"[" * 9999 + b"\n"]
)
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(audit.AuditError) as refused:
        audit.read(tmp_path / "a")
    assert "\n" not in str(refused.value)


def test_a_full_disk_leaves_no_part_of_a_line(file, monkeypatch):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit.os, "fsync", full)
    with pytest.raises(OSError):
        audit.append(file, {"event": "purged"})
    assert file.read_bytes() == before


def test_processes_that_append_at_the_same_time_keep_one_chain(tmp_path):
    pids = []
    for n in range(4):
        pid = os.fork()
        if pid == 0:
            for k in range(25):
                audit.append(tmp_path / "a", {"event": "purged", "request": f"{n}-{k}"})
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    records = audit.read(tmp_path / "a").records
    assert {record["request"] for record in records} == {f"{n}-{k}" for n in range(4) for k in range(25)}


# -- the record of a run


def test_a_run_is_recorded(finished):
    result, folder = finished
    trail = audit.read(folder / "audit.jsonl")
    (record,) = trail.records
    said = {key: record[key] for key in ("request", "time", "before", "after")}
    assert result["audit"] == {"file": str(folder / "audit.jsonl"), "head": trail.head, **said}
    forget = result["forget_set"]
    assert record["counts"] == {key: forget[key] for key in ("interactions", "of", "users", "items")}
    assert record["event"] == "unlearned" and record["method"] == "replay" and record["time"].endswith("+00:00")
    assert record["solver"]["epochs"] == result["unlearning"]["epochs"]
    assert record["forget_auc"] == {
        name: pytest.approx(each["forget_auc"], abs=5e-4) for name, each in result["models"].items()
    }
    assert record["versions"].keys() == {"recbole_unlearn", "recbole", "torch", "numpy"}
    key = bytes.fromhex((folder / "audit.jsonl.key").read_text())
    assert record["key"] == secret.name_of(key)
    for when, name in (("before", "model"), ("after", "unlearned")):
        assert record[when] == {what: keyed(key, plain) for what, plain in plain_sums(folder / f"{name}.pth").items()}


def keyed(key, text):
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def plain_sums(path):
    """Checksums as records of earlier versions held them."""
    return {
        "weights": audit.weights_checksum(torch.load(path, weights_only=True)["state_dict"]),
        "file": hashlib.sha256(path.read_bytes()).hexdigest(),
        "log": hashlib.sha256((path.with_suffix(".triples") / "metadata.json").read_bytes()).hexdigest(),
    }


def test_no_checksum_can_be_tried_without_the_key(finished):
    """Nothing of what a run leaves in record, result and report is a plain checksum of a model that it knew."""
    _, folder = finished
    plain = {each for name in ("model", "unlearned") for each in plain_sums(folder / f"{name}.pth").values()}
    for name in ("audit.jsonl", "result.json", "report.html", "result.md"):
        assert not any(each in (folder / name).read_text() for each in plain), name


def test_figures_are_too_coarse_to_tell_which_interaction_was_forgotten(finished):
    result, folder = finished
    (record,) = audit.read(folder / "audit.jsonl").records
    exact, kept = result["unlearning"], record["solver"]
    for key in ("rows_replayed", "triples_replayed", "step_norm", "seconds"):
        assert kept[key] == pytest.approx(exact[key], rel=0.05) and type(kept[key]) is type(exact[key])
        assert len(f"{kept[key]:e}".split("e")[0].rstrip("0").replace(".", "")) <= 2
    assert kept["triples_replayed"] != exact["triples_replayed"] and kept["step_norm"] != exact["step_norm"]
    assert all(value == round(value, 3) for value in record["forget_auc"].values())
    assert kept["chosen"] == exact["chosen"] and kept["all_rows"] is exact["all_rows"]


@pytest.mark.parametrize(
    "value, kept",
    [(0, 0), (7, 7), (1249, 1200), (True, True), (0.0, 0.0), (1.2345e-9, 1.2e-9), (-99.9, -100.0), ("a", "a")],
)
def test_two_digits_are_kept(value, kept):
    assert audit.coarse(value) == kept and type(audit.coarse(value)) is type(kept)


def test_a_figure_that_is_no_number_is_recorded_as_none():
    assert audit.number(audit.coarse(float("nan"))) is None and audit.number(audit.coarse(float("inf"))) is None


def test_settings_that_the_weights_depend_on_are_recorded(make_config):
    def of(*args, **keys):
        return audit.weight_settings(public(make_config(*args, **keys)))

    found = of("LightGCN", n_layers=3, reg_weight=1e-3, unlearn_params=["user*"], replay_rows="all")
    assert found["n_layers"] == 3 and found["reg_weight"] == 1e-3
    assert found["unlearn_params"] == ["user*"] and found["replay_rows"] == "all"
    assert "n_layers" not in of() and of("NeuMF", mf_pretrain_path="SECRET").keys() >= {"mf_train", "mlp_hidden_size"}
    assert not any("path" in key for key in of("NeuMF", mf_pretrain_path="SECRET"))


def test_the_weights_checksum_sees_every_part_of_a_state_dict():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    others = [
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].int()},
        {**base, "b": torch.tensor(2)},
        {"a": base["a"]},
        {"c": base["a"], "b": base["b"]},
    ]
    sums = {audit.weights_checksum(each) for each in (base, *others)}
    assert len(sums) == 6
    assert audit.weights_checksum(dict(reversed(base.items()))) == audit.weights_checksum(base)
    assert audit.weights_checksum({**base, "a": base["a"].t().contiguous().t()}) == audit.weights_checksum(base)


def test_the_certificate_of_a_reoptimised_model_is_recorded(make_options):
    keys = {"negatives": "static", "weight_decay": 1e-2, "method": "reoptimise", "forget_count": 5, "compare": "none"}
    keys |= {"reoptimise_tolerance": 1e-4, "epochs": 1}
    run_unlearn("BPR", "tiny", None, make_options(**keys, output_dir="out"))
    (record,) = audit.read("out/audit.jsonl").records
    assert record["method"] == "reoptimise" and record["solver"]["gradient_norm"] <= 1e-4
    assert record["solver"]["converged"] is True


@pytest.mark.parametrize("kind", ["users", "items", "file"])
def test_the_record_names_nobody_and_nothing(make_options, split, tmp_path, kind):
    value = [SECRET_USER] if kind == "users" else [SECRET_ITEM]
    if kind == "file":
        value = tmp_path / "SECRETFILE.tsv"
        row = next(n for n in range(split.n_rows) if split.token("user", split.users[n]) == SECRET_USER)
        value.write_text(f"{SECRET_USER}\t{split.token('item', split.items[row])}\n")
        value = str(value)
    keys = {f"forget_{kind}": value, "forget_seed": 987123, "output_dir": "SECRETOUT", "purge": True}
    run_unlearn("BPR", "tiny", None, make_options(**keys, compare="none", wandb_project="SECRETKEY"))
    content = Path("SECRETOUT/audit.jsonl").read_text()
    assert "SECRET" not in content and "987123" not in content and "forget_seed" not in content
    for record in map(json.loads, content.splitlines()):
        assert all(not isinstance(each, str) or "/" not in each for each in leaves(record))
    assert [record["event"] for record in audit.read("SECRETOUT/audit.jsonl").records] == ["unlearned", "purged"]


def leaves(value):
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in leaves(each)]
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list) else [value]


def test_one_file_goes_on_over_requests_and_verifies_each_model(make_options):
    common = {"compare": "none", "audit": "trail/audit.jsonl"}
    Path("trail").mkdir()
    run_unlearn("BPR", "tiny", None, make_options(forget_count=5, output_dir="first", **common))
    keys = {"checkpoint": "first/unlearned.pth", "forget_count": 5, "output_dir": "second", **common}
    run_unlearn(config_dict=keys)
    first, second = audit.verify("trail/audit.jsonl", ["first/unlearned.pth", "second/unlearned.pth"]).records
    assert first["after"] == second["before"] and first["request"] != second["request"]
    assert not Path("first/audit.jsonl").exists()


def test_a_run_can_do_without(make_options):
    result = run_unlearn(
        "BPR", "tiny", None, make_options(forget_count=5, output_dir="out", compare="none", audit="None")
    )
    assert "audit" not in result and not list(Path(".").rglob("audit.jsonl"))


def test_a_damaged_audit_file_is_refused_before_any_work(make_options, file):
    content = file.read_bytes().replace(b'"request": "1"', b'"request": "7"')
    file.write_bytes(content)
    with pytest.raises(InputError, match="line 3"):
        run_unlearn("BPR", "tiny", None, make_options(forget_count=5, output_dir="out", audit=str(file)))
    assert not Path("out").exists() and file.read_bytes() == content


@pytest.mark.parametrize("value", ["no/such/folder/audit.jsonl", "."])
def test_an_audit_file_that_cannot_be_is_refused_before_any_work(make_options, value):
    with pytest.raises(InputError) as refused:
        run_unlearn("BPR", "tiny", None, make_options(forget_count=5, output_dir="out", audit=value))
    assert "\n" not in str(refused.value) and not Path("out").exists()


# -- verify


def test_verify_accepts_the_recorded_model(recorded):
    assert len(audit.verify(recorded / "audit.jsonl", [recorded / "unlearned.pth"]).records) == 1


def test_verify_finds_the_model_that_should_be_gone(recorded):
    with pytest.raises(audit.AuditError, match="before"):
        audit.verify(recorded / "audit.jsonl", [recorded / "model.pth"])


def test_verify_finds_other_models_and_changed_ones(recorded):
    with pytest.raises(audit.AuditError, match="none that"):
        audit.verify(recorded / "audit.jsonl", [recorded / "retrained.pth"])
    content = bytearray((recorded / "unlearned.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (recorded / "unlearned.pth").write_bytes(content)
    with pytest.raises(audit.AuditError):
        audit.verify(recorded / "audit.jsonl", [recorded / "unlearned.pth"])


def test_verify_finds_a_changed_log(recorded):
    users = recorded / "unlearned.triples" / "users.npy"
    users.write_bytes(users.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError):
        audit.verify(recorded / "audit.jsonl", [recorded / "unlearned.pth"])


def edited(path):
    """Another item in the first row of a log, and checksums that fit."""
    log = triple_log.TripleLog.open(path)
    items = log.items.copy()
    items[0] = items[1]
    log.metadata["crc32"]["items.npy"] ^= triple_log.crc32(log.items) ^ triple_log.crc32(items)  # whatever its salt
    np.save(path / "items.npy", items)
    log.truncate(log.n_epochs)  # writes the metadata


def test_verify_finds_a_changed_log_whose_checksums_were_changed_too(recorded):
    edited(recorded / "unlearned.triples")
    assert checkpoint.load(recorded / "unlearned.pth")  # the log alone does not show it
    with pytest.raises(audit.AuditError, match="its log"):
        audit.verify(recorded / "audit.jsonl", [recorded / "unlearned.pth"])


def old(recorded, *lacking):
    """An audit file of an earlier version: with plain checksums, and no key."""
    (record,) = audit.read(recorded / "audit.jsonl").records
    del record["key"], record["previous"]
    for when, name in (("before", "model"), ("after", "unlearned")):
        sums = plain_sums(recorded / f"{name}.pth")
        record[when] = {what: plain for what, plain in sums.items() if what not in lacking}
    audit.append(recorded / "old.jsonl", record)
    return recorded / "old.jsonl"


@pytest.mark.parametrize("lacking", [(), ("log",)])
def test_records_of_earlier_versions_verify(recorded, lacking):
    """They are plain, and the first of them hold no checksum of the log."""
    file = old(recorded, *lacking)
    assert len(audit.verify(file, [recorded / "unlearned.pth"]).records) == 1
    with pytest.raises(audit.AuditError, match="before"):
        audit.verify(file, [recorded / "model.pth"])
    edited(recorded / "unlearned.triples")
    if not lacking:
        with pytest.raises(audit.AuditError, match="its log"):
            audit.verify(file, [recorded / "unlearned.pth"])


# -- the key


def test_the_key_is_its_owners_alone_and_stays(tmp_path):
    path = tmp_path / "a.key"
    key = secret.made(path)
    assert path.stat().st_mode & 0o777 == 0o600 and re.fullmatch("[0-9a-f]{64}\n", path.read_text())
    assert secret.made(path) == secret.read(path) == key and len(key) == 32
    assert secret.made(tmp_path / "b.key") != key and not list(tmp_path.glob(".*"))


def test_a_key_of_another_process_is_not_replaced(tmp_path, monkeypatch):
    """It is made between looking and making: both go on with one key."""
    path, theirs = tmp_path / "a.key", "5" * 64
    link = os.link
    monkeypatch.setattr(secret.os, "link", lambda *args: (path.write_text(theirs), link(*args)))
    assert secret.made(path).hex() == theirs and path.read_text() == theirs


def test_an_old_file_goes_on_with_keyed_records(recorded):
    file, checkpoint = old(recorded), recorded / "unlearned.pth"
    keys = {"compare": "none", "forget_count": 3, "audit": str(file)}
    run_unlearn(config_dict={"checkpoint": str(checkpoint), "output_dir": "second", **keys})
    assert len(audit.verify(file, [checkpoint, "second/unlearned.pth"]).records) == 2
    os.remove(f"{file}.key")
    assert len(audit.verify(file, [checkpoint]).records) == 2  # that one is plain
    with pytest.raises(InputError, match="without its key"):
        audit.verify(file, ["second/unlearned.pth"])


@pytest.mark.parametrize("how", ["missing", "damaged", "wrong", "folder"])
def test_a_key_that_does_not_fit_is_said_in_one_line_by_both(recorded, capsys, how):
    key, file = recorded / "audit.jsonl.key", recorded / "audit.jsonl"
    key.unlink()
    if how == "damaged":
        key.write_text("12\xff")
    elif how == "wrong":
        key.write_text("5" * 64)
    elif how == "folder":
        key.mkdir()
    alone = audit.main(["verify", str(file)])
    assert alone == (0 if how == "missing" else 2)
    out, err = capsys.readouterr()
    assert (out + err).count("\n") == 1 and "key" in err or not alone
    assert audit.main(["verify", str(file), str(recorded / "unlearned.pth")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "key" in err
    keys = {"checkpoint": str(recorded / "unlearned.pth"), "forget_count": 3, "output_dir": "out", "audit": str(file)}
    content = file.read_bytes()
    with pytest.raises(InputError, match="key") as refused:
        run_unlearn(config_dict=keys)
    assert "\n" not in str(refused.value) and not Path("out").exists() and file.read_bytes() == content


def test_the_key_can_lie_elsewhere(make_options, capsys):
    os.mkdir("keys")
    keys = {"compare": "none", "forget_count": 3, "audit_key": "keys/mine"}
    run_unlearn("BPR", "tiny", None, make_options(output_dir="out", **keys))
    assert sorted(os.listdir("keys")) == ["mine"] and not list(Path("out").glob("*.key"))
    command = ["verify", "out/audit.jsonl", "out/unlearned.pth"]
    assert audit.main(command) == 2 and audit.main([*command, "--audit_key=keys/mine"]) == 0
    assert "1 checkpoints recorded and whole" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["gone/key", "model.triples/key", "a.jsonl", ".a.tmp"])
def test_a_key_that_cannot_be_there_is_refused_before_any_work(finished, place):
    shutil.copy(finished[1] / "model.pth", "model.pth")
    shutil.copytree(finished[1] / "model.triples", "model.triples")
    keys = {"checkpoint": "model.pth", "forget_count": 3, "output_dir": "out", "audit": "./a.jsonl", "audit_key": place}
    with pytest.raises(InputError, match="audit_key") as refused:
        run_unlearn(config_dict=keys)
    assert "\n" not in str(refused.value) and not Path("out").exists()


@pytest.mark.parametrize(
    "case, status", [("fine", 0), ("torn", 0), ("changed", 1), ("model", 1), ("missing", 2), ("no model", 2)]
)
def test_the_command_says_it_in_one_line_and_by_its_status(recorded, capsys, case, status):
    file, checkpoint = recorded / "audit.jsonl", recorded / "unlearned.pth"
    content = file.read_bytes()
    if case == "torn":
        file.write_bytes(content + content[:40])
    elif case == "changed":
        file.write_bytes(content.replace(b"replay", b"replaY") + content)
    elif case == "model":
        checkpoint = recorded / "model.pth"
    elif case == "missing":
        file.unlink()
    elif case == "no model":
        checkpoint = recorded / "none.pth"
    assert audit.main(["verify", str(file), str(checkpoint)]) == status
    out, err = capsys.readouterr()
    assert (out + err).count("\n") == 1 and bool(err) == bool(status)
    assert not case == "torn" or "40 bytes" in out
