"""The queue of deletion requests: taken in, served, receipted, through its command line, and killed on the way."""

import json
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_USER, inside
from test_crash import KILLED, Dying, distinctive
from test_crash_stream import exit_status

import recbole_unlearn
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.requests import serving
from recbole_unlearn.requests.__main__ import main
from recbole_unlearn.requests.queue import APPLICATION, SCHEMA, Queue
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage import audit, purging, secret, suppression
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage.files import now
from recbole_unlearn.training.trained import same_weights

QUIET = ("--evaluate=none", "--show_progress=False", "--state=WARNING", "--coupling=paired")
SERVE = ["serve", "q.db", "model.pth", "--output_dir=served", *QUIET]
PURGE = ["--purge=True", "--purge_dataset=True"]


@pytest.fixture(scope="module")
def scene(make_options, data_path, tmp_path_factory):
    """A folder with data and a trained model, and its split."""
    start = tmp_path_factory.mktemp("scene")
    shutil.copytree(data_path, start / "data")
    with inside(start):
        keys = make_options(data_path="data", epochs=2, compare="none", evaluate="none", audit=None)
        run_unlearn("BPR", "tiny", config_dict={**keys, "forget_count": 5, "output_dir": "trained"})
        for name in ("model.pth", "model.triples"):
            os.rename(Path("trained") / name, name)
        for name in ("trained", "log", "log_tensorboard"):
            shutil.rmtree(name, ignore_errors=True)
        split = Split.seeded(UnlearnConfig("BPR", "tiny", config_dict=keys))
    return start, split


@pytest.fixture
def here(scene, tmp_path, monkeypatch):
    """The test's own copy of that folder, as the current one; returns the split."""
    shutil.copytree(scene[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    yield scene[1]
    logging.disable(logging.NOTSET)


@pytest.fixture
def command(capsys):
    """Function (argument, ..., status=0) -> what the command prints."""

    def run(*arguments, status=0):
        assert main([str(each) for each in arguments]) == status
        out, error = capsys.readouterr()
        if status == 2:
            assert not out and error.startswith("error: ") and error.count("\n") == 1
        return error if status == 2 else out

    return run


def in_queue(name="q.db"):
    """All bytes of the queue's files: journals, logs and shared memory too."""
    return b"".join(path.read_bytes() for path in Path(".").glob(f"{name}*"))


def state_of(name, db="q.db"):
    with Queue(db) as queue:
        return queue.request(name)["state"]


def state_of_all(db="q.db"):
    with Queue(db) as queue:
        return [each["state"] for each in queue.requests()]


# -- taken in


def test_a_request_is_taken_in_once(here, command):
    assert "a: added, due" in command("add", "q.db", "--user", "u20", "--id", "a")
    assert "added before, pending" in command("add", "q.db", "--user", "u20", "--id", "a")
    assert "another request" in command("add", "q.db", "--user", "u23", "--id", "a", status=2)
    assert "another request" in command("add", "q.db", "--item", "u20", "--id", "a", status=2)
    command("add", "q.db", "--pair", "u20", "i4")
    command("add", "q.db", "--pair", "u20", "i4")
    with Queue("q.db") as queue:
        assert [each["kind"] for each in queue.requests()] == ["user", "pair", "pair"]
        assert len({each["mark"] for each in queue.requests()}) == 3  # who is in two requests is not to be seen


def test_nobody_else_may_read_queue_and_key(here, command):
    os.umask(before := os.umask(0))
    try:
        os.umask(0)
        command("add", "q.db", "--user", "u20")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(os.stat(name).st_mode) for name in ("q.db", "q.db.key")] == [0o600, 0o600]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--user", ""], "names nobody"),
        (["--pair", "u20", " "], "names nobody"),
        (["--user", "u20", "--id", "a b"], "id 'a b'"),
        (["--user", "u20", "--id", ""], "id ''"),
        (["--user", "u20", "--id", "u20"], "the id is the token"),
        (["--pair", "u20", "i4", "--id", "i4"], "the id is the token"),
        (["--user", "u20", "--due", "-1"], "due"),
        (["--user", "u20", "--due", "99999999999999"], "due"),
    ],
)
def test_a_request_that_cannot_be_is_refused(here, command, arguments, said):
    assert said in command("add", "q.db", *arguments, status=2)
    assert "holds no request" in command("receipt", "q.db", "a", status=2)


def test_the_list_names_nobody_unasked_and_marks_what_is_overdue(here, command):
    command("add", "q.db", "--user", SECRET_USER, "--id", "late", "--due", 0)
    command("add", "q.db", "--item", "i4", "--id", "other")
    with sqlite3.connect("q.db") as connection:
        connection.execute("UPDATE requests SET due = '2020-01-01T00:00:00+00:00' WHERE id = 'late'")
    connection.close()
    head, late, other = command("list", "q.db").splitlines()
    assert head.split() == ["id", "kind", "received", "due", "state"]
    assert "OVERDUE" in late and "OVERDUE" not in other and SECRET_USER not in late
    assert SECRET_USER in command("list", "q.db", "--show")
    assert len(command("list", "q.db", "--state", "done").splitlines()) == 1


def test_a_request_on_paper_is_due_since_it_came(here, command):
    assert "due 2024-03-30T00:00:00" in command("add", "q.db", "--user", "u20", "--id", "a", "--received", "2024-02-29")
    assert "OVERDUE" in command("list", "q.db")
    command("add", "q.db", "--user", "u23", "--id", "today", "--received", date.today().isoformat())
    with Queue("q.db") as queue:
        assert queue.request("today")["received"] <= now()
    for wrong in ("2024-02-30", "9999-01-01", "29.2.2024", "", "2024-02-29T10:00"):
        assert "such as 2026-01-31" in command("add", "q.db", "--user", "u20", "--received", wrong, status=2)


def test_what_is_pending_or_failed_can_be_withdrawn_and_that_stays_on_record(here, command):
    command("add", "q.db", "--user", SECRET_USER, "--id", "mine", "--due", 0)
    command("add", "q.db", "--user", "nobody-99", "--id", "wrong")
    command("add", "q.db", "--item", "i4", "--id", "other")
    assert "mine: withdrawn at" in command("remove", "q.db", "mine")
    assert SECRET_USER.encode() not in in_queue()
    command(*SERVE, status=1)
    assert [state_of(name) for name in ("mine", "wrong", "other")] == ["withdrawn", "failed", "done"]
    command("remove", "q.db", "wrong")
    assert b"nobody-99" not in in_queue()
    head, *lines = command("list", "q.db").splitlines()
    assert [line.split()[0] for line in lines] == ["mine", "wrong", "other"]
    assert "pending until 20" in lines[0] and "failed until 20" in lines[1] and "OVERDUE" not in "".join(lines)
    assert len(command("list", "q.db", "--state", "withdrawn").splitlines()) == 3
    for name, said in (("mine", "is withdrawn"), ("other", "is done"), ("none", "holds no request")):
        assert said in command("remove", "q.db", name, status=2)
    assert "name another" in command("add", "q.db", "--user", SECRET_USER, "--id", "mine", status=2)
    assert "is withdrawn" in command("receipt", "q.db", "mine", status=2)
    assert "nothing is pending" in command(*SERVE)


def test_what_is_being_served_cannot_be_withdrawn(here, command, monkeypatch):
    command("add", "q.db", "--user", "u20", "--id", "a")
    with monkeypatch.context() as patch:
        patch.setattr(serving, "run_unlearn", lambda **_: None)
        command(*SERVE, status=2)
    assert "serve first" in command("remove", "q.db", "a", status=2)
    assert state_of("a") == "pending"


def test_it_is_a_command(here):
    environment = {**os.environ, "PYTHONPATH": str(Path(recbole_unlearn.__file__).parents[1])}
    argv = [sys.executable, "-m", "recbole_unlearn.requests", "list", "none.db"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "") and "none.db does not exist" in done.stderr


def test_the_queue_starts_without_torch(here):
    """But where it serves, and RecBole is patched as ever."""
    for arguments in (["add", "q.db", "--user", "u20"], ["list", "q.db"]):
        argv = [sys.executable, "-X", "importtime", "-m", "recbole_unlearn.requests", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(recbole_unlearn.__file__).parents[1])}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
        assert done.returncode == 0 and "sqlite3" in imported
        assert not imported & {"torch", "recbole", "numpy", "pandas", "matplotlib", "numba"}
    argv = [sys.executable, "-m", "recbole_unlearn.requests", *SERVE]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and state_of_all("q.db") == ["done"], done.stderr


# -- served


def test_what_is_pending_is_forgotten_and_the_next_batch_goes_on(here, command):
    command("add", "q.db", "--user", "u20", "--id", "a")
    command("add", "q.db", "--item", "i4", "--id", "b")
    command("add", "q.db", "--user", "nobody", "--id", "c")
    said = command(*SERVE, status=1)
    assert "c: failed, unknown user token\n" in said and "nobody" not in said and "a: done" in said
    first = Path(said.splitlines()[-1].removeprefix("serve "))
    assert [state_of(name) for name in "abc"] == ["done", "done", "failed"]
    user, item = (here.train.dataset.token2id(*each) for each in (("user_id", "u20"), ("item_id", "i4")))
    rows = np.flatnonzero((here.users == user) | (here.items == item))
    log = checkpoint.load(first)[1]
    assert log.n_rows == here.n_rows - len(rows) and user not in log.users and item not in log.items
    assert "nothing is pending" in command(*SERVE)

    command("add", "q.db", "--user", "u23", "--id", "c")  # the one that had failed
    command("add", "q.db", "--user", "u20", "--id", "again")
    said = command(*SERVE)  # with the checkpoint that the queue began with
    assert "again: done, nothing to forget" in said and "c: done" in said
    log = checkpoint.load(second := Path(said.splitlines()[-1].removeprefix("serve ")))[1]
    assert here.train.dataset.token2id("user_id", "u23") not in log.users and user not in log.users
    records = audit.verify("q.db.audit.jsonl", [second]).records
    assert [record["event"] for record in records] == ["unlearned"] * 2
    assert records[1]["before"] == records[0]["after"]

    assert "goes on from" in command(*SERVE[:2], first, *SERVE[3:], status=2)
    command("add", "q.db", "--user", "u26")
    assert "knows what this queue has forgotten" in command(*SERVE, "--reset", status=2)
    assert len(list(Path("served").iterdir())) == 2


@pytest.mark.parametrize("anew", [False, True])
def test_a_second_request_after_a_purge_of_the_data_is_done_and_an_unknown_one_is_not(here, command, anew):
    """By the queue itself, or, had another queue served the first one, by the suppression list."""
    purge = ["--purge=True", "--purge_dataset=True", "--everywhere=True", "--suppression=gone.list"]
    command("add", "q.db", "--user", SECRET_USER, "--id", "first")
    model = command(*SERVE, *purge).splitlines()[-1].removeprefix("serve ")
    db, rest = ("new.db", ["serve", "new.db", model]) if anew else ("q.db", SERVE[:3])
    command("add", db, "--user", SECRET_USER, "--id", "again")
    command("add", db, "--pair", SECRET_USER, "i4", "--id", "pair")
    command("add", db, "--pair", "u20", SECRET_USER, "--id", "wrong-pair")
    command("add", db, "--item", SECRET_USER, "--id", "wrong-kind")
    command("add", db, "--user", "nobody", "--id", "never")
    keys = [each for each in purge if each != "--everywhere=True" and (anew or "suppression" not in each)]
    said = command(*rest, *SERVE[3:], *keys, status=1)
    assert "again: done, nothing of it was left" in said and "pair: done, nothing of it was left" in said
    assert "never: failed, unknown user token" in said and "wrong-kind: failed, unknown item token" in said
    assert state_of("wrong-pair", db) == "failed"
    for name in ("wrong-pair", "wrong-kind"):  # which keep their tokens
        command("remove", db, name)
    assert SECRET_USER.encode() not in in_queue(db)
    assert "nothing of it was left" in command("list", db)
    assert json.loads(command("receipt", db, "again"))["receipt"]["request"]["interactions"] == 0


EVERYWHERE = [*PURGE, "--everywhere=True", "--suppression=gone.list"]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("keys", [EVERYWHERE, EVERYWHERE[-1:]], ids=["everywhere", "suppression"])
def test_whose_training_rows_went_before_is_erased_and_listed_too(here, command, alone, keys):
    """What is held out of them would come back by a later training with another split."""
    command("add", "q.db", "--user", SECRET_USER, "--id", "before")
    command(*SERVE, *PURGE)
    command("add", "q.db", "--user", SECRET_USER, "--id", "again")
    if not alone:
        command("add", "q.db", "--user", "u20", "--id", "other")
    said = command(*SERVE, *keys)
    model = said.splitlines()[-1].removeprefix("serve ")
    assert "again: done, 0 interactions" in said and audit.verify("q.db.audit.jsonl", [Path(model)])
    assert suppression.lists("gone.list", "user", [SECRET_USER]) and state_of("again") == "done"
    if "--everywhere=True" in keys:
        files = [file for file in Path(".").rglob("*") if file.is_file() and SECRET_USER.encode() in file.read_bytes()]
        assert not files
    command("add", "q.db", "--user", SECRET_USER, "--id", "twice")
    assert "twice: done, nothing" in command(*SERVE, *keys)
    assert json.loads(command("receipt", "q.db", "again"))["receipt"]["exact"]


def test_who_is_unknown_by_now_and_in_a_file_again_goes_from_there(here, command):
    users = f"user_id:token\tage:float\n{SECRET_USER}\t3\nu20\t4\n"
    Path("data/tiny/tiny.user").write_text(users)
    command("add", "q.db", "--user", SECRET_USER, "--id", "first")
    command(*SERVE, *EVERYWHERE[:-1])
    with Path("data/tiny/tiny.user").open("a") as file:
        file.write(f"{SECRET_USER}\t3\n")
    for name, said in (("again", "0 interactions"), ("twice", "nothing")):
        command("add", "q.db", "--user", SECRET_USER, "--id", name)
        assert command(*SERVE, *EVERYWHERE).startswith(f"{name}: done, {said}")
        assert suppression.lists("gone.list", "user", [SECRET_USER])
        assert Path("data/tiny/tiny.user").read_text() == users.replace(f"{SECRET_USER}\t3\n", "")


def test_an_unfinished_purge_of_who_is_held_out_alone_is_made_up_for(here, command, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    command("add", "q.db", "--user", SECRET_USER, "--id", "before")
    command(*SERVE, *PURGE)
    command("add", "q.db", "--user", SECRET_USER, "--id", "again")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(purging, "purge", stop)
        main([*SERVE, *EVERYWHERE])
    assert SECRET_USER in Path("data/tiny/tiny.inter").read_text()
    assert "cut off is finished" in command(*SERVE)
    assert SECRET_USER not in Path("data/tiny/tiny.inter").read_text() and state_of("again") == "done"


def test_a_batch_names_the_users_whose_lists_are_out_of_date_and_writes_the_embeddings_that_are_left(here, command):
    command("add", "q.db", "--user", "u20")
    command("add", "q.db", "--pair", *here.pairs(np.array([0]))[0])
    said = command(*SERVE, "--changed_lists=5", "--embeddings=True")
    model = Path(said.splitlines()[-1].removeprefix("serve "))
    everybody = {*here.token("user", np.unique(here.users))}
    head, *users = model.with_name("changed_users.csv").read_text().split()
    assert head == "user" and users and set(users) <= everybody - {"u20"} and len(set(users)) == len(users)
    state = checkpoint.load(model)[0]["state_dict"]
    for field, left in (("user", everybody - {"u20"}), ("item", {*here.token("item", np.unique(here.items))})):
        vectors = np.load(model.parent / "embeddings" / f"{field}s.npy")
        head, *tokens = (model.parent / "embeddings" / f"{field}s.csv").read_text().split()
        assert head == field and set(tokens) == left and len(vectors) == len(tokens)
        ids = here.train.dataset.token2id(f"{field}_id", tokens)
        assert (vectors == state[f"{field}_embedding.weight"].numpy()[ids]).all()


def test_a_queue_begins_anew_with_a_model_that_was_trained_since(here, command, scene, make_options, capsys):
    command("add", "q.db", "--user", "u20")
    command(*SERVE)
    keys = make_options(data_path="data", epochs=1, forget_count=1, output_dir="new", evaluate="none", compare="none")
    run_unlearn("BPR", "tiny", config_dict=keys)
    capsys.readouterr()  # torch may have warned
    assert "trained anew" in command("serve", "q.db", "new/model.pth", *SERVE[3:], status=2)
    assert "goes on from" in command("serve", "q.db", "new/model.pth", *SERVE[3:], "--reset")
    command("add", "q.db", "--user", "u23")
    command("serve", "q.db", *SERVE[3:])
    last = audit.read("q.db.audit.jsonl").records[-1]
    key = secret.read(Path("q.db.audit.jsonl.key"))
    assert last["before"]["file"] == secret.keyed(key, audit.file_checksum("new/model.pth"))


def test_tokens_are_in_no_file_of_the_queue_once_they_are_done(here, command):
    """Long ones too, which SQLite spreads over pages of their own."""
    long = "nobody-" + "x" * 20_000
    for name in range(40):
        command("add", "q.db", "--pair", long, f"nothing-{name}", "--id", f"long-{name}")
    command("add", "q.db", "--user", SECRET_USER, "--id", "a")
    assert SECRET_USER.encode() in in_queue() and b"xxxx" in in_queue()
    command(*SERVE, status=1)
    assert SECRET_USER.encode() not in in_queue() and b"xxxx" in in_queue()
    for name in range(40):  # corrected
        command("add", "q.db", "--pair", SECRET_USER, f"i{name * name + 3}", "--id", f"long-{name}")
    command(*SERVE)
    assert SECRET_USER.encode() not in in_queue() and b"xxxx" not in in_queue()
    assert {path.name for path in Path(".").glob("*q.db*")} == {
        "q.db", "q.db.key", "q.db.audit.jsonl", "q.db.audit.jsonl.key",
    }  # fmt: skip
    assert "added before, done" in command("add", "q.db", "--user", SECRET_USER, "--id", "a")
    assert "another request" in command("add", "q.db", "--user", "u20", "--id", "a", status=2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--forget_users=['u20']"], "forget_users"),
        (["--spam_items=i4"], "spam_items"),
        (["--checkpoint=model.pth"], "checkpoint"),
        (["--methods=all"], "methods"),
        (["--evaluate=fidelity"], "fidelity"),
        (["--experiment=paper"], "experiment"),
        (["--learning_rate=0.5"], "learning_rate"),
        (["--no_such_key=1"], "no_such_key"),
        (["--purge"], "--key=value"),
        (["--dry_run=True"], "dry_run"),
        (["--audit=None"], "audit"),
    ],
)
def test_keys_that_a_queue_cannot_be_served_with_are_refused(here, command, arguments, said):
    command("add", "q.db", "--user", "u20", "--id", "a")
    command("add", "q.db", "--user", "nobody", "--id", "unknown")
    argv = [each for each in SERVE if each.partition("=")[0] != arguments[0].partition("=")[0]]
    assert said in command(*argv, *arguments, status=2)
    assert state_of("a") == state_of("unknown") == "pending" and not Path("served").exists()


def test_a_queue_needs_a_checkpoint_once(here, command):
    assert "does not exist" in command(*SERVE, status=2)
    command("add", "q.db", "--user", "u20")
    assert "checkpoint to begin with" in command("serve", "q.db", "--output_dir=served", status=2)
    assert "does not exist" in command("serve", "q.db", "none.pth", "--output_dir=served", status=2)
    command(*SERVE)
    assert "nothing is pending" in command("serve", "q.db", "--output_dir=served")


def test_what_fails_before_any_work_leaves_all_pending(here, command):
    command("add", "q.db", "--user", "u20", "--id", "a")
    Path("served").write_text("no folder")
    assert "served" in command(*SERVE, status=2)
    assert state_of("a") == "pending" and not Path("q.db.audit.jsonl").exists()
    Path("served").unlink()
    assert "a: done" in command(*SERVE)


def test_a_request_that_no_run_could_serve_fails_and_the_others_go_on(here, command):
    """Here RecBole reads a name in quotes, in a line that a purge would leave."""
    inter = Path("data/tiny/tiny.inter")
    inter.write_text(inter.read_text().replace("\nu20\t", '\n"u20"\t', 1))
    for user in ("u20", "u23"):
        command("add", "q.db", "--user", user, "--id", f"id-{user}")
    said = command(*SERVE, *EVERYWHERE[:-1], status=1)
    assert "id-u20: failed, purge_dataset: " in said and "quoted" in said and "id-u23: done" in said
    assert '"u20"' in inter.read_text() and "u23\t" not in inter.read_text()
    command("remove", "q.db", "id-u20")


def test_pairs_alone_are_served_as_in_company_where_all_of_users_is_to_go(here, command):
    user, item = here.pairs(np.array([0]))[0]
    command("add", "q.db", "--pair", user, item, "--id", "a")
    assert "a: done, 1 interactions" in command(*SERVE, *EVERYWHERE)
    assert f"{user}\t{item}\t" not in Path("data/tiny/tiny.inter").read_text()


def held_out_pair(split):
    """Tokens of a validation interaction."""
    data = split.valid.dataset.inter_feat
    return split.tokens(data["user_id"][:1].numpy(), data["item_id"][:1].numpy())[0]


def lines_of(pair):
    return [line for line in Path("data/tiny/tiny.inter").read_text().splitlines() if line.split("\t")[:2] == [*pair]]


@pytest.mark.parametrize("alone", [True, False])
def test_of_a_held_out_pair_it_is_said_that_its_line_is_left(here, command, alone):
    pair, told = held_out_pair(here), "left: 1 held-out interaction; everywhere: True takes them too"
    command("add", "q.db", "--pair", *pair, "--id", "a")
    if not alone:
        command("add", "q.db", "--user", "u20", "--id", "other")
    assert f"a: done, nothing to forget; {told}\n" in command(*SERVE, *PURGE) + "\n" and lines_of(pair)
    assert told in command("list", "q.db")
    assert json.loads(command("receipt", "q.db", "a"))["receipt"]["request"]["note"] == told
    command("receipt", "q.db", "a", "--out", "a.html")
    assert told in Path("a.html").read_text()


def test_files_of_others_are_read_once_for_all_and_have_no_name_in_receipts(here, command, monkeypatch):
    Path("data/tiny/customers.csv").write_text("u20\nu23\nu23\t1\nu2\n")
    for name, user in (("a", "u20"), ("b", "u23"), ("c", "u26")):
        command("add", "q.db", "--user", user, "--id", name)
    read, plain_open = [], open

    def noted(file, *arguments, **keys):
        read.append(Path(file).name) if isinstance(file, (str, Path)) else None
        return plain_open(file, *arguments, **keys)

    monkeypatch.setattr("builtins.open", noted)
    said = command(*SERVE, *EVERYWHERE)
    assert read.count("customers.csv") == 2  # by the queue, and by the run
    told = "of other files, which may name them and which this data set is not read from"
    notes = [json.loads(command("receipt", "q.db", name))["receipt"]["request"].get("note") for name in "abc"]
    assert notes == [f"left: 1 line {told}", f"left: 2 lines {told}", None]
    assert "customers" not in said + command("list", "q.db")


def test_a_quoted_line_of_what_was_forgotten_before_leaves_no_request_pending(here, command):
    pair = here.pairs(np.array([0]))[0]
    command("add", "q.db", "--pair", *pair, "--id", "before")
    command(*SERVE)
    file = Path("data/tiny/tiny.inter")
    file.write_text(file.read_text().replace("\n{}\t{}\t".format(*pair), '\n"{}"\t{}\t'.format(*pair)))
    command("add", "q.db", "--user", "u20", "--id", "a")
    assert "a: done" in command(*SERVE, *PURGE) and '\n"{}"\t{}\t'.format(*pair) in file.read_text()
    assert any("forgotten before, which tiny.inter" in each.read_text() for each in Path("served").glob("*/result.md"))


def test_a_held_out_pair_goes_with_everywhere(here, command):
    command("add", "q.db", "--pair", *(pair := held_out_pair(here)), "--id", "a")
    assert "a: done, 0 interactions\n" in command(*SERVE, *EVERYWHERE) and not lines_of(pair)
    assert suppression.lists("gone.list", "pair", pair) and "left" not in command("list", "q.db")


def test_the_line_of_a_pair_that_was_forgotten_before_goes_with_purge_dataset(here, command):
    pair = here.pairs(np.array([0]))[0]
    command("add", "q.db", "--pair", *pair, "--id", "a")
    command(*SERVE)
    assert lines_of(pair)
    command("add", "q.db", "--pair", *pair, "--id", "b")
    assert "b: done, 0 interactions\n" in command(*SERVE, *PURGE) and not lines_of(pair)
    assert audit.read("q.db.audit.jsonl").records[-1]["lines"] == {"requested": 0, "earlier": 1}


def test_what_a_run_refuses_can_be_withdrawn_at_once(here, command):
    command("add", "q.db", "--user", "u20", "--id", "a")
    Path("served").write_text("no folder")
    command(*SERVE, status=2)
    command("remove", "q.db", "a")
    assert state_of("a") == "withdrawn"


def test_what_is_withdrawn_while_a_batch_is_made_up_stays_so(here, command, monkeypatch, capsys):
    for name, user in (("a", "u20"), ("b", "u23"), ("c", "nobody")):
        command("add", "q.db", "--user", user, "--id", name)
    begin = Queue.begin

    def late(self, *arguments):
        for name in "bc":
            assert main(["remove", "q.db", name]) == 0
        return begin(self, *arguments)

    monkeypatch.setattr(Queue, "begin", late)
    said = command(*SERVE)
    assert "a: done" in said and "b: done" not in said and "failed" not in said
    assert state_of_all() == ["done", "withdrawn", "withdrawn"]
    here_still = here.train.dataset.token2id("user_id", "u23")
    assert here_still in checkpoint.load(Path(said.splitlines()[-1].removeprefix("serve ")))[1].users


def test_a_batch_whose_audit_line_was_torn_is_served_anew(here, command, monkeypatch):
    def tear(path, _):
        Path(path).write_bytes(b'{"previous": ')
        raise KeyboardInterrupt

    command("add", "q.db", "--user", "u20", "--id", "a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(audit, "append", tear)
        main(SERVE)
    (unrecorded,) = Path("served").glob("*/unlearned.pth")
    assert "a: done" in command(*SERVE) and not unrecorded.exists()
    (record,) = audit.read("q.db.audit.jsonl").records
    assert record["removed_torn_bytes"] == 13 and state_of("a") == "done"


def test_a_purge_that_was_not_begun_is_made_up_for(here, command, monkeypatch):
    """Stopped when the new model is on record, before anything is deleted."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    command("add", "q.db", "--user", "u20", "--id", "a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(purging, "purge", stop)
        main([*SERVE, *PURGE])
    assert Path("model.pth").exists() and "u20" in Path("data/tiny/tiny.inter").read_text()
    held_out = [loader.dataset.inter_feat.interaction["user_id"] for loader in (here.valid, here.test)]
    held_out = int((torch.cat(held_out) == here.train.dataset.token2id("user_id", "u20")).sum())
    assert "cut off is finished" in command(*SERVE)  # as it was asked for then
    assert not Path("model.pth").exists() and not Path("model.triples").exists()
    assert Path("data/tiny/tiny.inter").read_text().count("u20\t") == held_out
    records = audit.read("q.db.audit.jsonl").records
    assert [record["event"] for record in records] == ["unlearned", "purged"]
    assert records[0]["request"] == records[1]["request"] and state_of("a") == "done"


def test_the_data_are_those_of_the_first_batch_whatever_folder_a_later_one_is_served_in(here, command, monkeypatch):
    """A purge that was not begun is made up for in them too, though others lie here at the same relative path."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    home, other = Path.cwd(), Path.cwd() / "other"
    shutil.copytree("data", other / "data")
    before = (other / "data/tiny/tiny.inter").read_bytes()
    argv = ["serve", home / "q.db", f"--output_dir={home / 'served'}", *QUIET, *PURGE]
    command("add", "q.db", "--user", "u20", "--id", "a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(purging, "purge", stop)
        main([*SERVE, *PURGE])
    start = Path("data/tiny/tiny.inter").read_text().count("\n")
    monkeypatch.chdir(other)
    for said, user in (("cut off is finished", "u23"), ("done", "u26")):
        assert said in command(*argv)
        left = (home / "data/tiny/tiny.inter").read_text().count("\n")
        assert left < start
        start = left
        command("add", home / "q.db", "--user", user)
    assert (other / "data/tiny/tiny.inter").read_bytes() == before


def test_a_queue_deletes_no_folder_but_that_of_its_batch(here, command, monkeypatch):
    command("add", "q.db", "--user", "u20", "--id", "a")
    with monkeypatch.context() as patch:
        patch.setattr(serving, "run_unlearn", lambda **_: None)
        assert "no unlearned model" in command(*SERVE, status=2)
    connection = sqlite3.connect("q.db")
    connection.execute("UPDATE batches SET folder = ?", [str(Path("data").absolute())])
    connection.commit()
    connection.close()
    assert "damaged" in command(*SERVE, status=2)
    assert Path("data/tiny/tiny.inter").exists()


# -- queues and keys that are none


def foreign(statement="CREATE TABLE things (name TEXT)"):
    connection = sqlite3.connect("q.db")
    connection.execute(statement)
    connection.commit()
    connection.close()


def later():
    main(["add", "q.db", "--user", "u20"])
    foreign(f"PRAGMA user_version={SCHEMA + 1}")


def halved():
    for name in range(40):
        main(["add", "q.db", "--user", "u20", "--id", f"{name}"])
    os.truncate("q.db", os.path.getsize("q.db") // 2 // 4096 * 4096)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: None, "does not exist"),
        (lambda: Path("q.db").write_text("user,item\n" * 1000), "not a database"),
        (lambda: Path("q.db").write_text(""), "is empty"),
        (lambda: Path("q.db").mkdir(), "no plain file"),
        (lambda: os.mkfifo("q.db"), "no plain file"),
        (lambda: foreign(f"PRAGMA application_id={APPLICATION}"), "no such table"),
        (foreign, "no queue of recbole_unlearn"),
        (later, "later version"),
        (halved, "malformed"),
    ],
)
def test_a_file_that_is_no_queue_is_refused_in_one_line(here, command, capsys, make, said):
    make()
    before = Path("q.db").read_bytes() if Path("q.db").is_file() else None
    capsys.readouterr()
    for arguments in (["list", "q.db"], SERVE):
        assert said in command(*arguments, status=2)
    assert (Path("q.db").read_bytes() if Path("q.db").is_file() else None) == before


def test_a_key_file_that_is_missing_another_or_damaged_is_refused(here, command):
    command("add", "q.db", "--user", "u20", "--id", "a")
    command("add", "other.db", "--user", "u20", "--id", "a")
    for arguments in (["add", "q.db", "--user", "u20"], ["receipt", "q.db", "a"]):
        assert "not the key file" in command(*arguments, "--key_file=other.db.key", status=2)
        assert "key none.key does not exist" in command(*arguments, "--key_file=none.key", status=2)
        assert "no key of ours" in command(*arguments, "--key_file=data/tiny/tiny.item", status=2)
    assert not Path("none.key").exists()


# -- receipts


@pytest.fixture
def served(here, command):
    command("add", "q.db", "--user", SECRET_USER, "--id", "mine")
    command("add", "q.db", "--item", "i4", "--id", "theirs")
    command(*SERVE)
    return here


@pytest.mark.parametrize("ending", ["html", "json"])
def test_a_receipt_tells_of_its_own_request_and_shows_every_change(served, command, capsys, ending):
    command("receipt", "q.db", "mine", "--out", file := Path(f"mine.{ending}"))
    text = file.read_text()
    line = audit.read("q.db.audit.jsonl").head
    rows = int((served.users == served.train.dataset.token2id("user_id", SECRET_USER)).sum())
    assert line in text and "mine" in text and str(rows) in text
    assert "theirs" not in text and "i4" not in text and SECRET_USER not in text
    assert "exact" in text and "replay of the log with nothing forgotten" in text
    public = command("verify-receipt", file).split("signed by ")[1].split(";")[0]
    assert "compare" not in command("verify-receipt", file, "--key", public)
    assert "NOT" in command("verify-receipt", file, "--key", "0" * 64, status=1)
    content = bytearray(file.read_bytes())
    for place in range(0, len(content), 23):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert main(["verify-receipt", str(file), "--key", public]) in (1, 2)
    capsys.readouterr()
    file.write_bytes(content[: len(content) // 2])
    assert "no receipt" in command("verify-receipt", file, status=2)


def test_what_a_json_receipt_says_is_what_the_queue_and_the_record_say(served, command):
    content = json.loads(command("receipt", "q.db", "mine"))["receipt"]
    (record,) = audit.read("q.db.audit.jsonl").records
    assert content["audit"]["request"] == record["request"] and content["weights"] == record["after"]["weights"]
    assert (content["method"], content["exact"]) == ("replay", True)
    assert content["request"]["received"] <= content["request"]["done"] == record["time"] < content["request"]["due"]
    assert content["guard"]["distance"] <= content["guard"]["limit"]


def test_only_who_has_the_token_gets_it_into_a_receipt(served, command):
    assert SECRET_USER in command("receipt", "q.db", "mine", "--user", SECRET_USER)
    assert "others than" in command("receipt", "q.db", "mine", "--user", "u20", status=2)
    assert "others than" in command("receipt", "q.db", "mine", "--item", SECRET_USER, status=2)


def test_a_receipt_escapes_what_it_names(here, command):
    command("add", "q.db", "--user", token := "<script>alert(1)</script>", "--id", "a")
    with Queue("q.db") as queue:
        queue.begin({"id": "0" * 16, "checkpoint": "model.pth"}, "model.pth", {}, {}, {"a": None}, {})
    command("receipt", "q.db", "a", "--user", token, "--out", "a.html")
    assert "<script" not in Path("a.html").read_text() and "&lt;script&gt;alert(1)" in Path("a.html").read_text()
    assert "nothing" in Path("a.html").read_text()


def test_receipts_are_for_what_is_done_and_into_new_files(served, command):
    command("add", "q.db", "--user", "nobody", "--id", "wrong")
    assert "wrong is pending" in command("receipt", "q.db", "wrong", status=2)
    command(*SERVE, status=1)
    assert "wrong is failed: unknown user token" in command("receipt", "q.db", "wrong", status=2)
    assert ".html or .json" in command("receipt", "q.db", "mine", "--out=mine.txt", status=2)
    command("receipt", "q.db", "mine", "--out=mine.json")
    assert "exists already" in command("receipt", "q.db", "mine", "--out=mine.json", status=2)
    assert "cannot write" in command("receipt", "q.db", "mine", "--out=none/a.json", status=2)


def test_without_cryptography_there_are_no_receipts_but_all_else(here, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    command("add", "q.db", "--user", "u20", "--id", "a")
    command(*SERVE)
    assert "recbole-unlearn[receipts]" in command("receipt", "q.db", "a", status=2)


# -- killed


class DyingInSqlite(Dying):
    """SQLite's own changes of the disk, which Python does not see, count too: statements, and ends of transactions."""

    def start(self):
        super().start()
        real, self.commits, self.all = sqlite3.connect, [], self.left

        def connect(*args, **kwargs):
            connection = real(*args, **kwargs)
            connection.set_trace_callback(self.statement)
            return connection

        sqlite3.connect = connect

    def statement(self, text):
        if text.startswith(("INSERT", "UPDATE", "DELETE", "CREATE", "COMMIT", "VACUUM")):
            if text.startswith(("COMMIT", "VACUUM")):
                self.commits.append(self.all - self.left + 1)
            if self.due():
                os._exit(KILLED)


def run(folder, temporary, argv, n=None):
    """A command in a process of its own, which dies at the n-th change of the disk; returns its exit status."""
    return exit_status(_run, folder, temporary, argv, n)


def _run(argv, n):
    dying = DyingInSqlite(n or 10**6)
    dying.start()
    status = main(argv)
    dying.left = 10**6 - (dying.all - dying.left)  # never again
    Path(tempfile.gettempdir(), "changes.json").write_text(json.dumps([10**6 - dying.left, dying.commits]))
    os._exit(status)


class Killed:
    """A queue that can be served again and again, and what it comes to if nobody kills it."""

    def __init__(self, scene, folder):
        self.folder, self.temporary, self.start = folder / "here", folder / "temporary", folder / "start"
        self.temporary.mkdir()
        shutil.copytree(scene[0], self.start)
        rows = distinctive(scene[1])
        self.pairs = scene[1].pairs(rows[3::60])
        with inside(self.start):
            for number, pair in enumerate(self.pairs):
                assert main(["add", "q.db", "--pair", *pair, "--id", f"r{number}"]) == 0
        self.argv = [*SERVE, *PURGE]
        self.fresh()
        assert self.serve() == 0
        self.changes, self.commits = json.loads((self.temporary / "changes.json").read_text())
        self.weights = self.check()

    def fresh(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.start, self.folder)

    def serve(self, n=None):
        return run(self.folder, self.temporary, self.argv, n)

    def check(self):
        """All is served, once, and nothing is left of it; returns the weights."""
        with inside(self.folder):
            with Queue("q.db") as queue:
                assert {each["state"] for each in queue.requests()} == {"done"}
                assert queue.open_batch() is None
                model = Path(queue.checkpoints[1])
            assert [model.parent.parent.name, model.name] == ["served", "unlearned.pth"]
            assert [each.name for each in Path("served").iterdir()] == [model.parent.name]
            records = audit.verify("q.db.audit.jsonl", [model]).records
            assert [record["event"] for record in records].count("unlearned") == 1
            assert records[0]["counts"]["interactions"] == len(self.pairs)
            assert not Path("model.pth").exists() and not Path("model.triples").exists()
            assert [each for each in Path(".").rglob(".*") if each.name != "."] == []
            lines = Path("data/tiny/tiny.inter").read_text().splitlines()
            assert not {"\t".join(pair) for pair in self.pairs} & {"\t".join(line.split("\t")[:2]) for line in lines}
            assert not any(item.encode() in in_queue() for _, item in self.pairs)
            return checkpoint.load(model)[0]["state_dict"]

    def left(self):
        return [each for each in self.temporary.rglob("*.csv")]

    def killed_at(self, n):
        """Die at the n-th change of the disk; returns whether it was done then, and was not begun anew."""
        self.fresh()
        assert self.serve(n) == KILLED
        trail, served = self.folder / "q.db.audit.jsonl", self.folder / "served"
        recorded = trail.is_file() and len(audit.read(trail).records) > 0
        before = [each.name for each in served.iterdir()] if served.is_dir() else []
        assert self.serve() == 0
        assert same_weights(self.check(), self.weights) and self.left() == []
        again = [each.name for each in served.iterdir()] == before
        assert again == recorded
        return recorded


@pytest.fixture(scope="module")
def killed(scene, tmp_path_factory):
    return Killed(scene, tmp_path_factory.mktemp("killed"))


def test_killed_while_it_serves_nothing_is_lost_and_nothing_served_twice(killed):
    points = {n + after for n in killed.commits for after in (0, 1)} | set(range(20, killed.changes, 80))
    found = [killed.killed_at(n) for n in sorted(points) if n <= killed.changes]
    assert set(found) == {False, True} and found == sorted(found)


@pytest.mark.slow
def test_killed_at_any_change_of_the_disk_nothing_is_lost_and_nothing_served_twice(killed):
    found = [killed.killed_at(n) for n in range(1, killed.changes + 1)]
    assert set(found) == {False, True} and found == sorted(found)


def test_killed_while_it_takes_a_request_in_the_request_is_there_or_not(scene, tmp_path):
    argv, states = ["add", "q.db", "--user", "u20", "--id", "a"], []
    status, n = KILLED, 0
    while status == KILLED:
        n += 1
        for name in tmp_path.glob("q.db*"):
            name.unlink()
        status = run(tmp_path, tmp_path, argv, n)
        assert status in (0, KILLED)
        with inside(tmp_path):
            try:
                states.append(state_of("a"))
            except InputError:
                states.append(None)
        assert run(tmp_path, tmp_path, argv) == 0
        with inside(tmp_path):
            assert state_of("a") == "pending"
    assert states == sorted(states, key=[None, "pending"].index) and None in states and n > 8
