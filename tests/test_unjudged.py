"""``evaluate: none``: the same forgetting, without the judging, which every file then says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAME

from recbole_unlearn import run_unlearn
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import forgetting, geometry, ranking
from recbole_unlearn.reports.tables import NOT_JUDGED, markdown
from recbole_unlearn.storage import audit


@pytest.fixture
def unjudged(finished, make_options, monkeypatch):
    """Result of a request to the finished run's model, and its folder."""

    def judge(*_, **__):
        pytest.fail("judged")

    for module, name in ((ranking, "evaluate"), (forgetting, "percentiles"), (geometry, "geometry")):
        monkeypatch.setattr(module, name, judge)
    monkeypatch.setattr("recbole_unlearn.runs.run.geometry", judge)
    checkpoint = str(finished[1] / "model.pth")
    keys = {"checkpoint": checkpoint, "forget_count": 25, "evaluate": "none", "output_dir": "unjudged"}
    return run_unlearn(config_dict=keys), Path("unjudged")


def test_it_forgets_as_ever(unjudged, finished):
    theirs, ours = (torch.load(folder / "unlearned.pth", weights_only=True) for folder in (finished[1], unjudged[1]))
    assert all(torch.equal(theirs["state_dict"][name], weight) for name, weight in ours["state_dict"].items())


def test_result_pages_and_record_say_that_nothing_was_judged(unjudged):
    result, folder = unjudged
    assert list(result["models"]) == ["original", "unlearned"]
    assert all(set(each) == {"seconds"} for each in result["models"].values())
    assert result["verdict"] is None and result["rank_histogram"] == {} and result["geometry"] == {}
    assert json.loads((folder / "result.json").read_text())["models"]["unlearned"]["seconds"] > 0
    page = (folder / "result.md").read_text()
    assert NOT_JUDGED in page and "AUC" not in page and "NDCG" not in page and page == markdown(result)
    report = (folder / "report.html").read_text()
    assert "No model was judged (<code>evaluate: none</code>)" in report and "HR@" not in report
    (record,) = audit.read(folder / "audit.jsonl").records
    assert record["forget_auc"] == {} and record["counts"]["interactions"] == 25
    assert audit.main(["verify", str(folder / "audit.jsonl"), str(folder / "unlearned.pth")]) == 0


def test_the_next_request_is_judged_again(unjudged):
    """It belongs to the run, not to the model."""
    keys = {"checkpoint": "unjudged/unlearned.pth", "forget_count": 3, "compare": "none"}
    with pytest.raises(pytest.fail.Exception, match="judged"):
        run_unlearn(config_dict=keys)


def test_a_training_run_without_judging(make_options):
    keys = make_options(forget_count=9, evaluate="none", epochs=2)
    result = run_unlearn("BPR", NAME, config_dict=keys)
    assert list(result["models"]) == ["original", "unlearned"] and result["speed_up"] is None
    assert np.isfinite(result["models"]["original"]["seconds"])


def test_a_stream_and_spam_without_judging(make_options, tmp_path, interactions):
    users = {user for user, _, _ in interactions[:3]}
    (tmp_path / "requests.csv").write_text("user,item\n" + "".join(f"{user},\n" for user in users))
    for keys in ({"forget_requests": str(tmp_path / "requests.csv")}, {"forget_spam": 2}):
        result = run_unlearn("BPR", NAME, config_dict=make_options(evaluate="none", epochs=2, **keys))
        assert NOT_JUDGED in markdown(result)


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"compare": "retrain"}, "compare"),
        ({"methods": "ours,retrain"}, "methods"),
        ({"compare_models": "Pop"}, "compare_models"),
    ],
)
def test_what_is_to_be_compared_contradicts_it(make_options, keys, named):
    with pytest.raises(InputError, match=f"evaluate: none judges no model; leave it out, or leave out {named}"):
        run_unlearn(config_dict=make_options(forget_count=3, evaluate="none", **keys))
