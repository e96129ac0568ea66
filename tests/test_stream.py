"""Streams of deletion requests: the file, and what serving it comes to."""

import json
import re

import numpy as np
import pytest
import torch

from recbole_unlearn.data import requests
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.runs.stream import advice, serve
from recbole_unlearn.settings.conflicts import COHORT
from recbole_unlearn.storage import audit
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner


@pytest.fixture
def write(tmp_path):
    """Function (lines) -> path of a request file."""

    def file(*lines):
        (tmp_path / "requests.csv").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "requests.csv")

    return file


@pytest.fixture
def pairs(split):
    """User and item tokens of the training rows."""
    return list(zip(split.token("user", split.users), split.token("item", split.items), strict=True))


def test_users_items_and_pairs_name_their_rows(write, split, pairs):
    user, item = pairs[40]
    table = requests.read(write("user,item", f"{user},{item}", f"{user},", f",{item}"))
    one, whole_user, whole_item = requests.rows_of(split, table)
    assert one.tolist() == [40]
    assert whole_user.tolist() == [k for k, (u, _) in enumerate(pairs) if u == user]
    assert whole_item.tolist() == [k for k, (_, i) in enumerate(pairs) if i == item]


def test_a_pair_that_was_never_trained_on_names_nothing(write, split, pairs):
    user = pairs[0][0]
    item = next(item for _, item in pairs if (user, item) not in pairs)
    (rows,) = requests.rows_of(split, requests.read(write("user,item", f"{user},{item}")))
    assert rows.tolist() == []


def test_requests_come_in_order_of_time_and_those_of_one_time_together(write):
    table = requests.read(write("user,item,time", "a,,2026-03-02", "b,,2026-03-01T10:00:00Z", "c,,2026-03-02"))
    assert [group["user"].tolist() for group in requests.batches(table)] == [["b"], ["a", "c"]]
    assert [group["user"].tolist() for group in requests.batches(table, 2)] == [["b", "a", "c"]]
    table = requests.read(write("user,item,time", "a,,10", "b,,9.5"))
    assert table["user"].tolist() == ["b", "a"]


def test_without_times_every_line_is_a_batch(write):
    table = requests.read(write("user,item", *[f"{n}," for n in range(5)]))
    assert [len(group) for group in requests.batches(table)] == [1] * 5
    assert [len(group) for group in requests.batches(table, 2)] == [2, 2, 1]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["user,product", "a,b"], "user,item"),
        (["a,b"], "user,item"),
        (["user,item"], "no request"),
        (["user,item", "a,", " ,", "b,c,d"], "line 4"),
        (["user,item,time", "a,,1", "b,,soon"], "line 3"),
        (["user,item", "a,b,c,d"], "line 2"),
        (["user,item", '"a,b'], "cannot read requests"),
    ],
)
def test_bad_files_are_refused(write, lines, message):
    with pytest.raises(InputError, match=message):
        requests.read(write(*lines))


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path):
    (tmp_path / "garbage").write_bytes(bytes(range(256)))
    for name in ("nothing", "garbage", ""):
        with pytest.raises(InputError, match="cannot read requests"):
            requests.read(tmp_path / name)


@pytest.fixture
def session(make_options):
    run_unlearn("BPR", "tiny", config_dict=make_options(compare="none", output_dir="out", forget_count=1, epochs=5))
    with InfluenceUnlearner.load("out/model.pth") as opened:
        yield opened


def test_serving_forgets_what_is_asked_for_in_turn(session, write, tmp_path):
    users = session.split.token("user", [3, 4, 5])
    table = requests.read(write("user,item", *[f"{user}," for user in users], f"{users[0]},"))
    served = serve(session, table, tmp_path)
    rows = [int(np.sum(session.split.users == user)) for user in (3, 4, 5)]
    assert [batch["interactions"] for batch in served.batches] == [*rows, 0]
    assert [batch["forgotten"] for batch in served.batches] == [*np.cumsum(rows).tolist(), sum(rows)]
    assert served.empty == 1 and served.drift == []
    assert sorted(set(session.split.users[session.forgotten])) == [3, 4, 5]
    state = session.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in served.unlearned.state_dict.items())


def test_an_unknown_token_anywhere_is_refused_before_anything_is_forgotten(session, write, tmp_path):
    table = requests.read(write("user,item", f"{session.split.token('user', [3])[0]},", "nobody,"))
    with pytest.raises(InputError, match="nobody"):
        serve(session, table, tmp_path)
    assert len(session.forgotten) == 0


def test_retraining_is_advised_once_much_is_forgotten(session, write, tmp_path):
    users = session.split.token("user", np.unique(session.split.users)[:10])
    few, many = (requests.read(write("user,item", *[f"{user}," for user in some])) for some in (users[:1], users))
    assert serve(session, few, tmp_path).retrain is None
    served = serve(session, many, tmp_path)
    assert len(session.forgotten) > COHORT * session.split.n_rows
    assert "of the training interactions are forgotten" in served.retrain


def test_retraining_is_advised_when_the_drift_shows(session, write, tmp_path):
    """Weights that say nothing of what was learnt: the forget set and the ranking are far from a retrained model's."""
    users = session.split.token("user", np.unique(session.split.users)[:6])
    table = requests.read(write("user,item", *[f"{user}," for user in users]))
    forget_rows = session.forget_rows

    def spoil(rows):
        unlearned = forget_rows(rows)
        session.model.user_embedding.weight.data.neg_()  # of users alone: both would leave the scores as they are
        return unlearned

    session.forget_rows = spoil
    served = serve(session, table, tmp_path, drift_every=1)
    first = next(each for each in served.drift if each["outcome"] in ("not yet", "over-forgotten"))
    assert f"after {first['requests']} requests the forget set ranks otherwise" in served.retrain


def test_advice_follows_from_the_share_the_forget_set_or_the_ranking():
    same = {"outcome": "alike", "users": 1000, "hit@10_unlearned": 0.30, "hit@10_retrained": 0.33}
    assert advice(5, 0.01) is advice(5, 0.01, same) is None
    assert "after 7 requests 20% of the training" in advice(7, 0.2, same)
    aucs = {"forget_auc_unlearned": 0.9, "forget_auc_retrained": 0.8}
    assert "AUC 0.9000" in advice(5, 0.01, {**same, **aucs, "outcome": "not yet"})
    assert "HR@10 has fallen to 0.3000" in advice(5, 0.01, {**same, "users": 10_000})  # two standard errors: 0.013
    assert advice(5, 0.01, {**same, "users": 10_000, "hit@10_unlearned": 0.36}) is None


def test_a_run_serves_a_stream_measures_drift_and_saves_the_end(make_options, write, split):
    users = split.token("user", [3, 4, 5, 6])
    path = write("user,item", *[f"{user}," for user in users])
    given = make_options(forget_requests=path, drift_every=2, output_dir="out", epochs=4)
    result = run_unlearn("BPR", "tiny", config_dict=given)
    stream = result["stream"]
    assert [each["requests"] for each in stream["drift"]] == [2, 4]
    assert all(0 <= each["forget_auc_retrained"] <= 1 for each in stream["drift"])
    assert result["forget_set"]["kind"] == "requests" and result["forget_set"]["users"] == 4
    state, log = checkpoint.load("out/unlearned.pth")
    assert not set(np.asarray(log.users)) & {3, 4, 5, 6}
    page = open("out/result.md").read()
    assert "4 requests in 4 batches" in page and "Drift" in page
    assert re.search(r"^\| +2 \|", page, re.M)  # a count is no 2.0000
    (record,) = audit.verify("out/audit.jsonl", ["out/unlearned.pth"]).records
    assert [each["interactions"] for each in record["requests"]] == [b["interactions"] for b in stream["batches"]]
    assert record["requests"][-1]["weights"] == record["after"]["weights"]
    written = json.dumps(json.load(open("out/result.json"))) + page
    assert not any(user in written for user in users) and "requests.csv" not in written
