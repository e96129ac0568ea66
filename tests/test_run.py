"""End to end: train, forget, retrain, compare; once from Python and once from the command line."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_ITEM, SECRET_USER, inside, weights
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.general_recommender.bpr import BPR
from recbole.trainer.trainer import Trainer
from recbole.utils import init_logger, init_seed

import recbole_unlearn
import run_unlearn as command_line
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.reports.tables import markdown
from recbole_unlearn.runs import many, output
from recbole_unlearn.runs import run as one
from recbole_unlearn.settings.keys import KEYS
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.training.trained import Trained, same_weights
from recbole_unlearn.unlearner import InfluenceUnlearner

ROOT = Path(recbole_unlearn.__file__).resolve().parents[1]
RECBOLE_LOGS = {"log", "log_tensorboard"}


@pytest.fixture
def run(make_options):
    """Function (**keys) -> result of a run that does not retrain, into ./out unless told otherwise."""

    def start(saved=True, files=None, **keys):
        given = make_options(**{"compare": "none", "output_dir": "out", **keys})
        if "epochs" not in keys and ("checkpoint" in keys or files):
            given.pop("epochs")  # the checkpoint's
        return run_unlearn("BPR", "tiny", files, given, saved=saved)

    return start


@pytest.fixture
def trained(finished, tmp_path):
    """A copy of a finished run's folder, free to be changed."""
    shutil.copytree(finished[1], tmp_path / "trained")
    return tmp_path / "trained"


def test_the_metrics_that_were_asked_for_stand_in_the_table(run):
    run(forget_count=5, metrics=["Recall", "MRR"], valid_metric="MRR@10", output_dir="out")
    for page in (Path("out/result.md").read_text(), Path("out/report.html").read_text().replace("<wbr>", "")):
        assert all(f"{name} (full)" in page for name in ("Recall@5", "Recall@10", "MRR@5", "MRR@10"))
        assert "NDCG@5 (full)" not in page


def content(folder):
    """Bytes of every file under a folder."""
    return {file.relative_to(folder): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def written(folder="."):
    """Names in a folder apart from RecBole's own logs."""
    return {entry.name for entry in Path(folder).iterdir()} - RECBOLE_LOGS


def log_rows(folder, name="unlearned"):
    log = TripleLog.open(Path(folder) / f"{name}.triples")
    return list(zip(log.users.tolist(), log.items.tolist(), strict=True))


def unlearner_of(folder, make_split, make_model, **keys):
    """(unlearner, model, split) on a trained folder's model."""
    state, log = checkpoint.load(Path(folder) / "model.pth")
    split = make_split(epochs=6, **keys)
    model = make_model(split)
    model.load_state_dict(state["state_dict"])
    return (
        InfluenceUnlearner(Trained(model, split.config, split, log, state, Path(folder) / "model.pth")),
        model,
        split,
    )


# -- the result


def test_a_run_returns_models_forget_set_solver_verdict_and_files(finished):
    result, folder = finished
    documented = {"models", "forget_set", "unlearning", "speed_up", "verdict", "files", "settings"}
    assert documented <= result.keys()
    assert (result["model"], result["dataset"]) == ("BPR", "tiny")
    assert list(result["models"]) == ["original", "unlearned", "retrained"]
    for figures in result["models"].values():
        assert set(figures["ranking"]) == {"full", "uni99"}
        assert figures["ranking"]["full"].keys() == figures["ranking"]["uni99"].keys()
        assert "ndcg@10" in figures["ranking"]["full"] and "hit@5" in figures["ranking"]["full"]
        assert 0 <= figures["forget_auc"] <= 1 and figures["seconds"] > 0
    forget = result["forget_set"]
    assert (forget["kind"], forget["interactions"]) == ("count", 25)
    assert 0 < forget["users"] <= 25 and 0 < forget["items"] <= 25 < forget["of"]
    assert result["verdict"].startswith("The forget set")
    seconds = {name: figures["seconds"] for name, figures in result["models"].items()}
    assert result["speed_up"] == pytest.approx(seconds["retrained"] / seconds["unlearned"])
    assert result["settings"]["forget_count"] == 25 and result["settings"]["embedding_size"] == 8


def test_a_run_writes_checkpoints_logs_and_results(finished):
    result, folder = finished
    assert written(folder) == {
        "model.pth", "model.triples", "unlearned.pth", "unlearned.triples", "retrained.pth", "result.json",
        "result.md", "report.html", "audit.jsonl", "audit.jsonl.key",
    }  # fmt: skip
    assert {name: Path(path) for name, path in result["files"].items()} == {
        "original": folder / "model.pth",
        "unlearned": folder / "unlearned.pth",
        "retrained": folder / "retrained.pth",
    }


def strict_json(path):
    """JSON as other programs read it: without NaN and Infinity."""

    def refuse(constant):
        pytest.fail(f"{path} holds {constant}, which is no JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def test_result_json_is_the_returned_result(finished):
    result, folder = finished
    assert strict_json(folder / "result.json") == result


def test_result_json_of_a_single_forgotten_interaction_is_json_too(run):
    result = run(forget_count=1, compare="retrain")
    assert strict_json("out/result.json")["forget_set"]["interactions"] == 1
    assert "too small" in result["verdict"]


def test_result_md_shows_every_model(finished):
    result, folder = finished
    page = (folder / "result.md").read_text()
    assert page == markdown(result)
    for text in ("original", "unlearned", "retrained", "NDCG@10 (full)", "HR@5 (uni99)", result["verdict"]):
        assert text in page
    assert f"{result['models']['retrained']['ranking']['full']['ndcg@10']:.4f}" in page


def test_the_unlearned_model_differs_from_both_others(finished):
    _, folder = finished
    original, unlearned, retrained = (weights(folder / f"{name}.pth") for name in ("model", "unlearned", "retrained"))
    for first, second in ((original, unlearned), (unlearned, retrained), (original, retrained)):
        assert not same_weights(first, second)
    for value in unlearned.values():
        assert torch.isfinite(value).all()


def test_the_original_is_what_stock_recbole_trains(finished, make_options, tmp_path):
    options = make_options(epochs=6, checkpoint_dir=str(tmp_path / "stock"))
    config = Config("BPR", "tiny", config_dict=options)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    trainer = Trainer(config, BPR(config, train.dataset))
    trainer.fit(train, valid, verbose=False)
    metrics = dict(trainer.evaluate(test))
    result, folder = finished
    assert same_weights(dict(trainer.model.state_dict()), weights(folder / "model.pth"))
    assert result["models"]["original"]["ranking"]["full"] == metrics


def test_without_retraining_there_is_no_verdict(run):
    result = run(forget_count=5)
    assert list(result["models"]) == ["original", "unlearned"]
    assert result["verdict"] is None and result["speed_up"] is None
    assert written("out") == {
        "model.pth", "model.triples", "unlearned.pth", "unlearned.triples", "result.json", "result.md",
        "report.html", "audit.jsonl", "audit.jsonl.key",
    }  # fmt: skip
    assert strict_json("out/result.json") == result


def test_without_an_output_folder_every_run_gets_its_own(run):
    folders = {Path(run(forget_count=5, output_dir=None, epochs=1)["files"]["unlearned"]).parent for _ in range(3)}
    assert len(folders) == 3
    for folder in folders:
        assert folder.parent == Path("saved") and (folder / "result.json").is_file()


@pytest.mark.parametrize(
    "keys", [{"forget_ratio": 0.02}, {"forget_users": [SECRET_USER]}, {"forget_items": [SECRET_ITEM]}]
)
@pytest.mark.parametrize("method", ["replay", "influence"])
def test_the_forgotten_rows_are_in_no_log_of_the_unlearned_model(run, make_config, make_split, keys, method):
    from recbole_unlearn.data.forget import ForgetRequest

    result = run(method=method, **keys)
    assert result["unlearning"]["method"] == method
    split = make_split()
    rows = ForgetRequest.from_config(make_config(**keys)).rows(split)
    kept = np.setdiff1d(np.arange(split.n_rows), rows)
    assert len(rows) == result["forget_set"]["interactions"] > 0
    log = TripleLog.open("out/unlearned.triples")
    log.verify()
    np.testing.assert_array_equal(log.users, split.users[kept])
    np.testing.assert_array_equal(log.items, split.items[kept])
    original = TripleLog.open("out/model.triples")
    forgotten = set(zip(split.users[rows].tolist(), split.items[rows].tolist(), strict=True))
    for epoch in range(log.n_epochs):
        row, column = np.nonzero(log.epoch(epoch) != original.epoch(epoch)[kept])
        users, returned = split.users[kept][row], log.epoch(epoch)[row, column]
        assert set(zip(users.tolist(), returned.tolist(), strict=True)) <= forgotten  # drawable again, as in retraining


def test_static_negatives_and_several_of_them_run_end_to_end(run):
    args = {"distribution": "popularity", "sample_num": 3}
    result = run(forget_count=10, negatives="static", train_neg_sample_args=args)
    log = TripleLog.open("out/unlearned.triples")
    assert log.static and log.negatives == 3
    assert 0 <= result["models"]["unlearned"]["forget_auc"] <= 1


@pytest.mark.parametrize("damping", ["adam", "scalar", "none"])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_every_influence_setting_runs(run, damping, curvature):
    """'none' needs the strength of weight decay to be solvable at all."""
    keys = {"weight_decay": 1e-3} if damping == "none" else {}
    result = run(method="influence", damping=damping, curvature=curvature, forget_count=10, **keys)
    assert result["unlearning"]["method"] == "influence" and result["unlearning"]["step_norm"] > 0
    assert (result["settings"]["damping"], result["settings"]["curvature"]) == (damping, curvature)


def test_the_papers_method_runs(run):
    result = run(paper=True, forget_count=10, weight_decay=1e-3)
    settings = result["settings"]
    assert result["unlearning"]["method"] == "influence"
    assert (settings["curvature"], settings["damping"], settings["pool_return"]) == ("hessian", "none", False)
    assert not same_weights(weights("out/model.pth"), weights("out/unlearned.pth"))
    assert checkpoint.load("out/unlearned.pth")[0]["config"]["paper"] is True


# -- what must not change


def test_config_dict_is_not_changed(make_options):
    given = make_options(compare="none", output_dir="out", forget_users=[SECRET_USER], epochs=1)
    before = copy.deepcopy(given)
    run_unlearn("BPR", "tiny", None, given)
    assert given == before


def test_rows_of_uninvolved_users_stay_when_replaying(finished, make_split, make_model):
    unlearner, model, split = unlearner_of(finished[1], make_split, make_model, method="replay")
    unlearned = unlearner.unlearn(np.array([0, 1])).state_dict["user_embedding.weight"]
    before = model.state_dict()["user_embedding.weight"]
    changed = (unlearned != before).any(1)
    assert changed[split.users[0]] and changed.sum() < split.n_users


@pytest.mark.parametrize("method", ["replay", "influence"])
def test_the_same_seed_gives_the_same_bits(run, method):
    for name in ("a", "b"):
        run(output_dir=name, forget_count=12, method=method)
    run(output_dir="c", forget_count=12, method=method, forget_seed=1)
    first, again, other = (weights(f"{name}/unlearned.pth") for name in "abc")
    assert same_weights(first, again) and not same_weights(first, other)
    assert same_weights(weights("a/model.pth"), weights("c/model.pth"))


def test_unlearning_from_a_checkpoint_gives_the_bits_of_unlearning_at_once(finished, trained, run):
    result = run(checkpoint=str(trained / "model.pth"), forget_count=25)
    assert same_weights(weights("out/unlearned.pth"), weights(finished[1] / "unlearned.pth"))
    assert result["models"]["original"]["ranking"] == finished[0]["models"]["original"]["ranking"]
    assert result["models"]["unlearned"]["ranking"] == finished[0]["models"]["unlearned"]["ranking"]
    assert result["models"]["original"]["seconds"] is None
    assert not Path("out/model.pth").exists()


def test_a_checkpoint_to_unlearn_from_is_not_changed(trained, run):
    before = content(trained)
    run(checkpoint=str(trained / "model.pth"), forget_count=5)
    assert content(trained) == before


def test_a_checkpoint_may_be_named_in_a_config_file(trained, run, tmp_path):
    (tmp_path / "c.yaml").write_text(f"checkpoint: {trained / 'model.pth'}\n")
    result = run(files=[str(tmp_path / "c.yaml")], forget_count=5)
    assert result["models"]["original"]["seconds"] is None
    assert not Path("out/model.pth").exists()


def test_a_checkpoint_brings_its_own_model_data_and_settings(trained):
    given = {"checkpoint": str(trained / "model.pth"), "forget_count": 3, "compare": "none", "output_dir": "out"}
    result = run_unlearn(config_dict=given)
    assert (result["model"], result["dataset"]) == ("BPR", "tiny")
    assert result["settings"]["embedding_size"] == 8 and result["settings"]["topk"] == [5, 10]


# -- the unlearned model


def test_the_unlearned_checkpoint_loads_into_stock_recbole(finished, make_options, tmp_path):
    result, folder = finished
    config = Config("BPR", "tiny", config_dict=make_options(epochs=6, checkpoint_dir=str(tmp_path / "stock")))
    init_seed(config["seed"], config["reproducibility"])
    train, _, test = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, BPR(config, train.dataset))
    trainer.eval_collector.data_collect(train)
    metrics = trainer.evaluate(test, model_file=str(folder / "unlearned.pth"))
    assert same_weights(dict(trainer.model.state_dict()), weights(folder / "unlearned.pth"))
    assert dict(metrics) == result["models"]["unlearned"]["ranking"]["full"]


@pytest.mark.parametrize("method", ["replay", "influence"])
def test_a_second_request_forgets_other_pairs_too(run, split, tmp_path, method):
    run(forget_count=20, method=method, output_dir="first")
    first = log_rows("first")
    wanted = [5, 50, 300]
    tokens = [(str(split.token("user", first[n][0])), str(split.token("item", first[n][1]))) for n in wanted]
    (tmp_path / "f.tsv").write_text("".join(f"{user}\t{item}\n" for user, item in tokens))
    result = run(checkpoint="first/unlearned.pth", forget_file=str(tmp_path / "f.tsv"), output_dir="second")
    assert result["forget_set"]["interactions"] == 3 and result["forget_set"]["of"] == len(first)
    assert log_rows("second") == [pair for n, pair in enumerate(first) if n not in wanted]
    assert not same_weights(weights("first/unlearned.pth"), weights("second/unlearned.pth"))
    third = run(checkpoint="second/unlearned.pth", forget_count=4, output_dir="third")
    assert third["forget_set"]["of"] == len(first) - 3
    assert len(log_rows("third")) == len(first) - 7


def test_a_second_request_is_compared_with_retraining_without_both(run, make_split):
    """The comparison model must not see again what an earlier request had removed."""
    run(forget_count=20, output_dir="first")
    second = run(checkpoint="first/unlearned.pth", forget_count=9, output_dir="second", compare="retrain")
    assert second["forget_set"]["of"] == len(log_rows("first"))
    kept = log_rows("second")
    users = weights("second/retrained.pth")
    split = make_split()
    rows = list(zip(split.users.tolist(), split.items.tolist(), strict=True))
    gone = np.array([n for n, pair in enumerate(rows) if pair not in set(kept)])
    assert len(gone) == 29
    from recbole_unlearn.training.fit import train

    train(split.config, split, Path("expected.pth"), gone, log_negatives=False)
    assert same_weights(users, weights("expected.pth"))


@pytest.mark.parametrize("kind", ["file", "users", "items"])
def test_what_was_forgotten_cannot_be_forgotten_again(run, split, tmp_path, kind):
    if kind == "file":
        pair = str(split.token("user", split.users[9])), str(split.token("item", split.items[9]))
        (tmp_path / "f.tsv").write_text("\t".join(pair))
        request = {"forget_file": str(tmp_path / "f.tsv")}
    else:
        request = {f"forget_{kind}": [SECRET_USER if kind == "users" else SECRET_ITEM]}
    run(output_dir="first", **request)
    with pytest.raises(InputError) as refused:
        run(checkpoint="first/unlearned.pth", output_dir="second", **request)
    assert "\n" not in str(refused.value)
    assert not Path("second").exists()


# -- what is kept


def test_saved_false_writes_nothing(run):
    result = run(saved=False, forget_count=5, compare="retrain", output_dir=None)
    assert written() == set()
    assert result["files"] == {} and result["models"]["unlearned"]["forget_auc"] >= 0


def test_saved_false_does_not_even_make_the_output_folder(run):
    run(saved=False, forget_count=5)
    assert written() == set()


def test_purge_removes_the_original_that_was_trained(run):
    result = run(forget_count=5, purge=True)
    assert written("out") == {
        "unlearned.pth", "unlearned.triples", "result.json", "result.md", "report.html",
        "audit.jsonl", "audit.jsonl.key",
    }  # fmt: skip
    assert set(result["files"]) == {"unlearned"}
    kept = strict_json("out/result.json")
    assert kept == output.lasting(result) and kept["models"] == {
        "unlearned": {"seconds": kept["models"]["unlearned"]["seconds"]}
    }
    assert result["models"]["original"]["forget_auc"] >= 0 and "forget_auc" not in Path("out/result.json").read_text()
    assert "figures of the models were shown" in Path("out/result.md").read_text() and "NDCG" in result.page


def test_purge_removes_the_checkpoint_that_was_given_and_its_log(trained, run):
    run(checkpoint=str(trained / "model.pth"), forget_count=5, purge=True)
    assert not (trained / "model.pth").exists() and not (trained / "model.triples").exists()
    assert (trained / "unlearned.pth").exists()
    assert Path("out/unlearned.pth").exists()


def test_without_purge_the_original_stays(run):
    run(forget_count=5)
    assert Path("out/model.pth").exists() and Path("out/model.triples").exists()


@pytest.fixture
def recbole_log(monkeypatch):
    """Let RecBole's logger write its file; pytest's own log handlers keep it from that."""
    root, added = logging.getLogger(), []

    def basic_config(level, handlers):
        root.setLevel(level)
        for handler in handlers:
            root.addHandler(handler)
        added.extend(handlers)

    level = root.level
    monkeypatch.setattr(logging, "basicConfig", basic_config)
    yield
    root.setLevel(level)
    for handler in added:
        root.removeHandler(handler)
        handler.close()


def holders(secret):
    """Files and folders below whose name or content has the secret in it, in any usual coding."""
    found = []
    for entry in Path(".").rglob("*"):
        data = entry.read_bytes() if entry.is_file() else b""
        if secret in entry.name or any(secret.encode(coding) in data for coding in ("utf-8", "utf-16-le", "utf-32-le")):
            found.append(str(entry))
    return found


@pytest.mark.parametrize("kind", ["users", "items", "file"])
@pytest.mark.parametrize("purge", [False, True])
def test_the_names_of_the_forgotten_are_written_nowhere(run, split, tmp_path, recbole_log, kind, purge):
    secrets = [SECRET_USER] if kind == "users" else [SECRET_ITEM]
    request = {f"forget_{kind}": secrets}
    if kind == "file":
        row = np.flatnonzero(split.token("user", split.users) == SECRET_USER)[0]
        pair = [SECRET_USER, str(split.token("item", split.items[row]))]
        file = tmp_path / "SECRETFILE.tsv"
        file.write_text("\t".join(pair))
        request, secrets = {"forget_file": str(file)}, [SECRET_USER, "SECRETFILE"]
    run(state="INFO", compare="retrain", purge=purge, **request)
    logs = list(Path("log").rglob("*.log"))
    assert len(logs) == 1 and b"forgot" in logs[0].read_bytes()  # the log is written, so it is searched
    for secret in secrets:
        assert holders(secret) == []


def test_the_names_of_the_forgotten_are_written_nowhere_by_a_second_request(trained, run, recbole_log):
    run(state="INFO", checkpoint=str(trained / "unlearned.pth"), forget_users=[SECRET_USER], compare="retrain")
    assert holders(SECRET_USER) == []


class Enough(Exception):
    """Ends a run once what the test is about has happened."""


@pytest.mark.parametrize("keys", [{}, {"methods": "ours", "compare": "retrain"}])
def test_the_names_of_logs_do_not_tell_who_is_forgotten(run, split, tmp_path, monkeypatch, keys):
    """RecBole hashes all values of the configuration into the name: one token could be found by trying all."""

    def start(config):
        init_logger(config)
        raise Enough

    for module in (many, one):
        monkeypatch.setattr(module, "init_logger", start)
    hashes = []
    for n, user in enumerate((SECRET_USER, str(split.token("user", 5)))):
        (tmp_path / str(n)).mkdir()
        with inside(tmp_path / str(n)), pytest.raises(Enough):
            run(saved=False, forget_users=[user], **keys)
        (log,) = (tmp_path / str(n)).rglob("*.log")
        hashes.append(log.stem.rpartition("-")[2])
    assert hashes[0] == hashes[1]


# -- bad requests


def bad_requests():
    return {
        "unknown user": {"forget_users": ["nobody"]},
        "unknown item": {"forget_items": ["nothing"]},
        "ratio": {"forget_ratio": 2},
        "count": {"forget_count": 10**6},
        "two requests": {"forget_count": 3, "forget_users": [SECRET_USER]},
        "no forget file": {"forget_file": "no-such-file.tsv"},
        "misspelt key": {"forget_ratoi": 0.1},
        "wrong choice": {"damping": "lots"},
        "missing checkpoint": {"checkpoint": "no-such.pth"},
        "empty checkpoint": {"checkpoint": ""},
        "numeric checkpoint": {"checkpoint": 5},
        "no data": {"data_path": "/no/such/path"},
        "log switched off": {"log_negatives": False},
        "damping of another optimiser": {"learner": "sgd", "method": "influence"},
        "touched rows of another optimiser": {"learner": "sgd", "method": "replay", "replay_rows": "touched"},
        "touched rows of clipped gradients": {
            "clip_grad_norm": {"max_norm": 1},
            "method": "replay",
            "replay_rows": "touched",
        },
        "no epochs": {"epochs": 0},
        "metric that is not computed": {"valid_metric": "MRR@20"},
        "no negatives": {"train_neg_sample_args": None},
    }


@pytest.mark.parametrize("what", bad_requests())
def test_a_bad_request_is_refused_before_anything_is_written(run, what):
    with pytest.raises(InputError) as refused:
        run(**bad_requests()[what])
    assert str(refused.value) and "\n" not in str(refused.value)
    assert written() == set()


@pytest.mark.parametrize(
    "keys",
    [{"embedding_size": 16}, {"seed": 1}, {"eval_args": {"split": {"RS": [0.7, 0.1, 0.2]}}}],
    ids=lambda keys: next(iter(keys)),
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(trained, run, keys):
    with pytest.raises(InputError) as refused:
        run(checkpoint=str(trained / "model.pth"), forget_count=5, **keys)
    assert "\n" not in str(refused.value)
    assert written() == set()


def test_replay_is_refused_where_the_log_has_no_snapshots(run, trained):
    run(checkpoint=str(trained / "model.pth"), forget_count=5, method="influence", output_dir="first")
    before = written()
    with pytest.raises(InputError, match="replay"):
        run(checkpoint="first/unlearned.pth", forget_count=5, method="replay", output_dir="second")
    assert written() == before


def test_another_data_set_than_the_checkpoints_is_refused(trained, write_data, interactions, tmp_path):
    path = write_data(tmp_path, "other", interactions)
    given = {"checkpoint": str(trained / "model.pth"), "data_path": path, "output_dir": "out"}
    for model, dataset in (("BPR", "other"), ("LightGCN", "tiny")):
        with pytest.raises(InputError):
            run_unlearn(model, dataset, None, given)
    assert written() == set()


@pytest.mark.parametrize("model", ["MultiDAE", "CDAE"])  # the latter's default loss_type is one that no other has
def test_an_unsupported_model_is_refused(make_options, model):
    with pytest.raises(InputError, match=f"{model} is not supported"):
        run_unlearn(model, "tiny", None, make_options(output_dir="out", train_neg_sample_args=None))
    assert written() == set()


def test_a_used_output_folder_is_refused_and_left_alone(run):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    with pytest.raises(InputError, match="output_dir"):
        run(forget_count=5)
    assert content("out") == {Path("mine.txt"): b"keep"}


def test_a_file_in_place_of_the_output_folder_is_refused(run):
    Path("out").write_text("keep")
    with pytest.raises(InputError, match="output_dir"):
        run(forget_count=5)
    assert Path("out").read_text() == "keep"


def test_an_empty_output_folder_is_used(run):
    Path("out").mkdir()
    run(forget_count=5)
    assert Path("out/result.json").exists()


def test_an_output_folder_whose_name_is_a_number_is_used(run):
    """`--output_dir=5` arrives as a number."""
    run(forget_count=5, output_dir="5")
    assert Path("5/result.json").exists()


@pytest.mark.parametrize("config_dict", [[("epochs", 3)], "epochs=3", 3])
def test_a_config_dict_that_is_no_dict_is_refused(config_dict):
    with pytest.raises(InputError, match="config_dict"):
        run_unlearn("BPR", "tiny", None, config_dict)


# -- command line


def as_arguments(options):
    return [f"--{key}={value}" for key, value in options.items()]


def test_help_lists_every_own_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name, key in KEYS.items():
        assert f"--{name}={'' if key.default is None else key.default}" in shown
        assert key.meaning in shown


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--forget_ratoi=0.1"], "forget_ratio"),
        (["--forget_ratio=2"], "forget_ratio"),
        (["--forget_users=nobody"], "nobody"),
        (["--forget_ratio", "0.1"], "--key=value"),
        (["forget_ratio=0.1"], "--key=value"),
        (["-x"], "--key=value"),
        (["--=5"], "--key=value"),
        (["--forget_count=3", "--forget_count=4"], "twice"),
        (["--config_files=no.yaml"], "no.yaml"),
        (["--checkpoint=no.pth"], "no.pth"),
        (["--model=MultiDAE", "--train_neg_sample_args=None"], "MultiDAE"),
        (["--model=Nonsense"], "Nonsense"),
        (["--damping=lots"], "damping"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_status_2(capsys, make_options, arguments, says):
    model = [] if arguments[0].startswith("--model") else ["-m", "BPR"]
    status = command_line.main([*model, "-d", "tiny", *as_arguments(make_options(output_dir="out")), *arguments])
    out, err = capsys.readouterr()
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert out == "" and written() == set()


def test_the_command_line_beats_config_files(capsys, make_options, tmp_path):
    (tmp_path / "a.yaml").write_text("forget_count: 3\nepochs: 1\ncompare: none\n")
    (tmp_path / "b.yaml").write_text("forget_count: 4\n")
    options = make_options(output_dir="out", forget_count=6)
    options.pop("epochs")
    files = f"--config_files={tmp_path / 'a.yaml'} {tmp_path / 'b.yaml'}"
    assert command_line.main(["-m", "BPR", "-d", "tiny", files, *as_arguments(options)]) == 0
    result = json.loads(Path("out/result.json").read_text())
    assert result["forget_set"]["interactions"] == 6 and result["settings"]["epochs"] == 1
    out = capsys.readouterr().out
    assert "forget-set AUC" in out and f"unlearned: {result['files']['unlearned']}" in out


def test_the_program_runs_from_a_shell(make_options):
    """A fresh process: nothing that the tests set up can help it."""
    options = make_options(forget_users=SECRET_USER, output_dir="out", purge=True, state="INFO")
    program = [
        sys.executable,
        str(ROOT / "run_unlearn.py"),
        "--model=BPR",
        "--dataset=tiny",
        *as_arguments(options),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("out/result.json").read_text())
    assert "retrained" in result["models"] and f"{result['verdict'][:-1]}: forget-set AUC 0." in done.stdout
    assert "Traceback" not in done.stderr
    assert list(Path("log").rglob("*.log"))
    assert holders(SECRET_USER) == []
