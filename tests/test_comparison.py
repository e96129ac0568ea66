"""Methods and other models compared from one command."""

import csv
import json
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_ITEM, SECRET_USER

import run_unlearn as command_line
from recbole_unlearn.comparison import figures as module
from recbole_unlearn.comparison import kept
from recbole_unlearn.comparison.beside import beside
from recbole_unlearn.comparison.figures import Comparison, forget_sets, summary
from recbole_unlearn.comparison.other_models import model_arguments, other_models, train_any
from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds, opened
from recbole_unlearn.errors import InputError
from recbole_unlearn.methods import METHODS, settings_of
from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.reports.tables import compared_table
from recbole_unlearn.storage.files import locked
from recbole_unlearn.storage.triple_log import log_path

KEYS = {
    "methods": "ours,fine_tune,retrain",
    "method_args": {"fine_tune": {"epochs": 2}},
    "compare_models": "LightGCN,NeuMF,ItemKNN,Pop,BPR",
    "comparison_seeds": 2,
    "forget_users": [SECRET_USER],
    "k": 10,
}


@pytest.fixture(scope="module")
def compared(make_options, tmp_path_factory):
    """(result, folder of the tables, config_dict) of one comparison."""
    folder = tmp_path_factory.mktemp("compared")
    keys = make_options(**KEYS, comparison_cache=str(folder / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_unlearn(dataset="tiny", config_dict={**keys, "output_dir": str(folder / "one")})
    return result, folder, keys


def test_every_method_and_model_stands_in_the_table(compared):
    result, folder, _ = compared
    ((name, each),) = result["comparison"]["sets"].items()
    assert name == "users" and each["interactions"] > 0
    assert list(each["figures"]) == [
        "original", "retrain", "ours", "fine_tune", "LightGCN", "LightGCN, retrained", "LightGCN, unlearned",
        "NeuMF", "NeuMF, retrained", "NeuMF, unlearned", "ItemKNN", "Pop",
    ]  # fmt: skip
    prepared = ("ours", "LightGCN, unlearned", "NeuMF, unlearned")
    for method, runs in each["figures"].items():
        assert len(runs) == 2, method
        for run in runs:
            assert set(run["ranking"]) == {"full", "uni99"} and 0 <= run["forget_auc"] <= 1
            metrics = {key: value for each in run["ranking"].values() for key, value in each.items()}
            fairness = {key: metrics.pop(key) for key in list(metrics) if key.startswith("fairness@")}
            assert all(
                0 <= value <= 1 for each in run["ranking"].values() for key, value in each.items() if key in metrics
            )
            assert fairness and all(-1 <= value <= 1 for value in fairness.values())
            assert (run.get("weight_distance", 0) > 0) == (method in ("original", "retrain", "ours", "fine_tune"))
            assert run["seconds"] > 0 and (run["prepare_seconds"] > 0) == (method in prepared)
    page = (folder / "one" / "comparison.md").read_text()
    assert page == result["page"]
    for title in ("NDCG@10 (full)", "HR@10 (uni99)", "forget-set AUC", "| ours", "| NeuMF", "| retrain"):
        assert title in page
    assert result["comparison"]["settings"]["fine_tune"] == {"epochs": 2}


def test_seeds_differ_and_models_without_training_do_not(compared):
    figures = compared[0]["comparison"]["sets"]["users"]["figures"]
    aucs = {name: [run["forget_auc"] for run in runs] for name, runs in figures.items()}
    assert aucs["original"][0] != aucs["original"][1] and aucs["NeuMF"][0] != aucs["NeuMF"][1]
    assert aucs["ItemKNN"][0] == aucs["ItemKNN"][1]


def test_a_model_that_forgets_has_its_own_retrained_model_beside(compared):
    """Trained without the rows: what is forgotten ranks lower than in the model that was trained on it."""
    figures = compared[0]["comparison"]["sets"]["users"]["figures"]
    for before, after in zip(figures["LightGCN"], figures["LightGCN, retrained"], strict=True):
        assert after["forget_auc"] < before["forget_auc"] and after["details"]["epochs"] > 0


def test_tables_come_in_four_formats(compared):
    _, folder, _ = compared
    assert {file.name for file in (folder / "one").iterdir()} == {
        f"comparison.{e}" for e in ("md", "csv", "tex", "json")
    }
    rows = list(csv.DictReader((folder / "one" / "comparison.csv").open()))
    figures = json.loads((folder / "one" / "comparison.json").read_text())["sets"]["users"]["figures"]
    (row,) = (r for r in rows if (r["method"], r["figure"]) == ("ours", "ndcg@10|full"))
    values = [run["ranking"]["full"]["ndcg@10"] for run in figures["ours"]]
    reference = [run["ranking"]["full"]["ndcg@10"] for run in figures["retrain"]]
    assert float(row["mean"]) == pytest.approx(np.mean(values))
    assert float(row["delta"]) == pytest.approx(np.mean(values) - np.mean(reference))
    tex = (folder / "one" / "comparison.tex").read_text()
    assert tex.count(r"\begin{tabular}") == 1 and "fine\\_tune" in tex


def test_nothing_forgotten_is_written(compared):
    result, folder, _ = compared
    texts = [file.read_text() for file in (*(folder / "one").iterdir(), *(folder / "cache" / "results").iterdir())]
    assert len(texts) > 4 + 8
    assert not [text for text in [*texts, json.dumps(result)] if SECRET_USER in text or SECRET_ITEM in text]


def test_a_finished_comparison_measures_and_trains_nothing_again(compared, monkeypatch):
    result, folder, keys = compared
    for name in ("measure", "measure_model"):
        monkeypatch.setattr(Comparison, name, lambda *args: pytest.fail("measured again"))
    again = run_unlearn(dataset="tiny", config_dict={**keys, "output_dir": str(folder / "again")})
    assert again["page"] == result["page"]


def test_only_what_changed_is_measured_again(compared, monkeypatch):
    _, folder, keys = compared
    measured, own = [], Comparison.measure

    def measure(self, name, seed, rows):
        measured.append(name)
        return own(self, name, seed, rows)

    monkeypatch.setattr(Comparison, "measure", measure)
    changed = {**keys, "method_args": {"fine_tune": {"epochs": 1}}, "comparison_seeds": 1}
    run_unlearn(dataset="tiny", config_dict={**changed, "output_dir": str(folder / "changed")})
    assert measured == ["fine_tune"]
    monkeypatch.setattr(module, "measured_by", lambda method: "new source" if method else kept.measured_by(None))
    run_unlearn(dataset="tiny", config_dict={**changed, "output_dir": str(folder / "source")})
    assert measured == ["fine_tune", "retrain", "ours", "fine_tune"]


def test_the_command_line_prints_the_table(compared, capsys):
    result, folder, keys = compared
    given = [f"--{key}={value}" for key, value in {**keys, "output_dir": folder / "command"}.items()]
    assert command_line.main(["--dataset=tiny", *given]) == 0
    assert result["page"] in capsys.readouterr().out


class Careless(Method):
    """Changes in place what it was given."""

    def forget(self, rows, show_progress=False):
        model, stored, log = self.task.model(), self.task.stored, self.task.log
        stored["triple_log"]["epochs"] = self.task.config["learning_rate"] = 0
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.load_state_dict(stored["optimizer"])  # torch goes on in these tensors
        for state in (*stored["state_dict"].values(), *optimizer.state[model.item_embedding.weight].values()):
            state.zero_()
        log.order.clear()
        log.snapshots.clear()
        return Forgotten(model, 1.0)


def test_no_method_spoils_what_the_next_one_starts_from(make_options, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "careless", Careless)
    settings = {"careless": {}, "fine_tune": {"epochs": 2}, "ours": settings_of("ours")}
    trained = TrainedSeeds(("BPR", "tiny", [], make_options(epochs=2)), tmp_path, 1)
    comparison, seed = Comparison(trained, settings), trained.config["seed"]
    trained.train([SeedRun.without(seed, rows), SeedRun.original(seed)], False)

    def measured(name):
        figures = comparison.measure(name, seed, rows)
        return [figures[key] for key in ("ranking", "forget_auc", "weight_distance")]

    before = measured("fine_tune"), measured("ours")
    measured("careless")
    assert (measured("fine_tune"), measured("ours")) == before


class Broken(Method):
    """Gives a model that has no scores of a user who asked for nothing."""

    def forget(self, rows, show_progress=False):
        model, users = self.task.model(), self.task.split.users
        model.user_embedding.weight.data[np.setdiff1d(users, users[rows])[0]] = torch.nan
        return Forgotten(model, 1.0)


def test_a_model_without_finite_scores_is_refused_and_nothing_of_it_kept(make_options, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "broken", Broken)
    trained = TrainedSeeds(("BPR", "tiny", [], make_options(epochs=1)), tmp_path, 1)
    comparison = Comparison(trained, {"broken": {}})
    with pytest.raises(InputError, match="^broken: the model's scores are not finite") as refused:
        comparison.run({"some": rows})
    assert "\n" not in str(refused.value)
    assert len(list((tmp_path / "results").iterdir())) == 2  # of the original and the retrained model


def test_others_stand_in_the_table_where_one_method_is_refused(make_options, tmp_path, monkeypatch):
    def refuse(self, rows, show_progress=False):
        raise InputError("it needs more than there is")

    monkeypatch.setattr(METHODS["fine_tune"], "forget", refuse)
    keys = make_options(epochs=1, methods="fine_tune,gradient_ascent", forget_count=5, output_dir="out")
    keys["comparison_cache"] = str(tmp_path)
    result = run_unlearn("BPR", "tiny", None, keys)
    (told,) = result["comparison"]["sets"].values()
    assert set(told["figures"]) == {"original", "retrain", "gradient_ascent"}
    assert told["refused"] == {"fine_tune": "fine_tune: it needs more than there is"}
    assert "| fine_tune" in result.page and "Refused: fine_tune: it needs more than there is." in result.page
    assert "fine\\_tune & refused" in Path("out/comparison.tex").read_text()
    with pytest.raises(InputError, match="^fine_tune: it needs more"):
        run_unlearn("BPR", "tiny", None, {**keys, "methods": "fine_tune", "output_dir": "alone"})


# -- figures


def runs(*values):
    return [
        {"ranking": {"full": {"ndcg@10": v}}, "forget_auc": v, "prepare_seconds": 0.0, "seconds": 10 * v}
        for v in values
    ]


def test_differences_are_to_retrains_mean_and_in_its_standard_deviations():
    got = summary({"original": runs(0.5), "retrain": runs(0.2, 0.4), "ours": runs(0.5, 0.5), "Pop": runs(0.1)})
    assert got["ours"]["forget_auc"]["delta"] == pytest.approx(0.2)
    assert got["ours"]["forget_auc"]["z"] == pytest.approx(0.2 / np.std([0.2, 0.4], ddof=1))
    assert got["ours"]["speed_up"]["mean"] == pytest.approx(0.6)
    assert got["original"]["forget_auc"]["sd"] is None
    assert "delta" not in got["Pop"]["forget_auc"] and "speed_up" not in got["Pop"]


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (["recall@10", "mrr@10", "ndcg@10", "hit@10", "precision@10"], {"NDCG@10 (full)", "HR@10 (full)"}),
        (["recall@5", "recall@10", "mrr@10"], {"Recall@10 (full)", "MRR@10 (full)"}),
        (["gauc"], {"GAUC (full)"}),
    ],
)
def test_the_metrics_that_were_asked_for_stand_in_the_table(metrics, shown):
    figures = {"ranking": {"full": dict.fromkeys([*metrics, "fairness@10"], 0.5)}}
    table = compared_table(summary({"retrain": [run | figures for run in runs(0.2, 0.4)]}))
    assert {title for title in table.columns if "(full)" in title and "minus" not in title} == shown
    assert "active users minus others, NDCG@10 (full)" in table.columns


# -- what to compare


def test_several_forget_sets(make_config, split):
    config = make_config(comparison_sets="count:20,edge_users:2,ratio:0.05")
    sets = forget_sets(config, split)
    assert list(sets) == ["count 20", "edge_users 2", "ratio 0.05"]
    assert len(sets["count 20"]) == 20 and len(np.unique(split.users[sets["edge_users 2"]])) == 2


def test_a_changed_source_is_another_key(tmp_path):
    package = Path(kept.__file__).parents[1]
    copied = shutil.copytree(package, tmp_path / "same", ignore=shutil.ignore_patterns("__pycache__"))
    anew = kept.sources.__wrapped__  # what it has found it keeps
    for method, used, unused in (
        ("ours", ("influence/solver", "unlearners/dot_product", "models/losses", "storage/triple_log"), "methods/sisa"),
        ("sisa", ("methods/shards", "methods/base", "training/fit"), "unlearners/dot_product"),
    ):
        before = kept.sources(f"methods.{method}")
        assert anew(f"methods.{method}", root=copied) == before
        for name in (*used, unused):
            file = copied / f"{name}.py"
            source = file.read_bytes()
            file.write_bytes(source + b"# changed")
            assert (anew(f"methods.{method}", root=copied) == before) == (name == unused), name
            file.write_bytes(source)


@pytest.mark.parametrize(
    "file", ["comparison/judged", "comparison/beside", "evaluation/ranking", "evaluation/geometry"]
)
def test_who_measures_is_part_of_every_key(tmp_path, file):
    package = Path(kept.__file__).parents[1]
    other = shutil.copytree(package, tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / f"{file}.py").open("a") as source:
        source.write("# changed")
    assert kept.sources(*kept.JUDGES, root=other) != kept.sources(*kept.JUDGES)


@pytest.fixture
def cut(interactions, tmp_path):
    """A data set in ready parts, with facts, and a function that replaces one of its files: (data_path, function)."""
    folder, lines = tmp_path / "data" / "tiny", ["\t".join(map(str, each)) for each in interactions]
    folder.mkdir(parents=True)
    head = "user_id:token\titem_id:token\ttimestamp:float"

    def write(name, *rows):
        (folder / f"tiny.{name}").write_text("\n".join(rows) + "\n")

    write("train.inter", head, *lines)
    write("valid.inter", head, *lines[::9])
    write("test.inter", head, *lines[1::9])
    write(
        "item", "item_id:token\tclass:token", *(f"{item}\ta" for item in sorted({item for _, item, _ in interactions}))
    )
    return str(tmp_path / "data"), lambda name: write(name, *(folder / f"tiny.{name}").read_text().splitlines()[:-3])


@pytest.mark.parametrize("file", ["test.inter", "item"])
def test_what_was_kept_of_other_data_is_made_anew(make_options, cut, tmp_path, monkeypatch, file):
    (data_path, change), measured = cut, []
    given = make_options(data_path=data_path, benchmark_filename=["train", "valid", "test"], epochs=1)

    def measure(self, name, *arguments):
        measured.append(name)
        return {"ranking": {}}

    monkeypatch.setattr(Comparison, "measure", measure)
    monkeypatch.setattr(Comparison, "measure_model", measure)
    monkeypatch.setattr(TrainedSeeds, "train", lambda *arguments: None)
    paths = []
    for _ in range(2):
        for _ in range(2):
            trained = TrainedSeeds(("BPR", "tiny", [], given), tmp_path / "cache", 1)
            Comparison(trained, {"ours": settings_of("ours")}).run({"some": np.arange(5)}, ["Pop"])
            paths.append(trained.path(SeedRun(3)))
        change(file)
    assert measured == 2 * ["original", "retrain", "ours", "Pop"]
    assert paths[0] == paths[1] != paths[2] == paths[3]


def test_what_another_process_trains_is_waited_for(make_options, tmp_path):
    run, arguments, held = SeedRun(3, (), True), ("BPR", "tiny", [], make_options(epochs=1)), ExitStack()
    (path,) = TrainedSeeds(arguments, tmp_path / "one", 1).train([run], False)
    trained = TrainedSeeds(arguments, tmp_path / "other", 1)
    held.enter_context(locked(trained.path(run)))

    def finish():
        shutil.copytree(path.parent, tmp_path / "other", dirs_exist_ok=True)
        held.close()

    threading.Timer(6, finish).start()
    (found,) = trained.train([run], False)
    assert found.stat().st_mtime_ns == path.stat().st_mtime_ns and not list((tmp_path / "other").glob(".*.lock"))


def test_what_is_damaged_is_trained_again(make_options, tmp_path):
    run, arguments = SeedRun(3, (), True), ("BPR", "tiny", [], make_options(epochs=1))
    (path,) = TrainedSeeds(arguments, tmp_path, 1).train([run], False)
    file = log_path(path) / "epoch-00000.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    TrainedSeeds(arguments, tmp_path, 1).train([run], False)
    assert file.read_bytes() == whole and not list(tmp_path.glob(".*.lock"))
    made = path.stat().st_mtime_ns
    TrainedSeeds(arguments, tmp_path, 1).train([run], False)
    assert path.stat().st_mtime_ns == made


def test_a_script_that_each_process_would_run_again_is_told_so_in_one_line(make_options, tmp_path):
    given = make_options(epochs=1, methods="ours", forget_count=5, comparison_cache=str(tmp_path / "cache"))
    script = tmp_path / "script.py"
    script.write_text(f"from recbole_unlearn import run_unlearn\nrun_unlearn('BPR', 'tiny', None, {given!r})\n")
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.count("Traceback") == 1
    assert ended.stderr.splitlines()[-1].endswith('put what it calls under `if __name__ == "__main__":`')
    assert "InputError" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    [
        "from .helping import helper",
        "from . import helping",
        "from .helping import *",
        "from ..methods import helping",
        "from ..methods.helping import helper as other",
        "import recbole_unlearn.methods.helping as other",
        "import recbole_unlearn as ru",
        "import recbole_unlearn.errors",
        "from recbole_unlearn import InfluenceUnlearner",
        "from .. import InfluenceUnlearner",
    ],
)
def test_what_a_method_imports_in_any_way_is_part_of_its_key(tmp_path, statement):
    def key(name, helper):
        root = tmp_path / name
        (root / "methods").mkdir(parents=True)
        (root / "__init__.py").write_text("def __getattr__(name):\n    from recbole_unlearn.methods import helping\n")
        (root / "errors.py").write_text("")
        (root / "methods" / "__init__.py").write_text("")
        (root / "methods" / "helping.py").write_text(helper)
        (root / "methods" / "mine.py").write_text(statement)
        return kept.sources("methods.mine", root=root)

    assert key("one", "helper = 1") == key("same", "helper = 1") != key("other", "helper = 2")


@pytest.mark.parametrize("value", ["users:u17", "count", "count:x", "time:1..2", "count:0", "ratio:2", 5])
def test_forget_sets_that_would_name_somebody_or_nothing_are_refused(make_config, split, value):
    with pytest.raises(InputError):
        forget_sets(make_config(comparison_sets=value), split)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"methods": "fine_tun"}, "did you mean 'fine_tune'"),
        ({"methods": "ours", "method_args": {"ours": {"steps": 3}}}, "ours has no setting 'steps'"),
        ({"compare_models": "LightGNC"}, "did you mean 'LightGCN'"),
        ({"compare_models": "SASRec"}, "SASRec is sequential and has the held-out"),
        ({"methods": "ours", "comparison_seeds": 0}, "comparison_seeds must be"),
        ({"methods": "ours", "forget_count": None, "comparison_sets": "users:3"}, "'users:3' is not KIND:VALUE"),
        ({"methods": "ours", "checkpoint": "model.pth"}, "leave checkpoint out"),
        ({"methods": "ours", "method_args": {"rrl": {"steps": 3}}}, "rrl is not among the methods ours"),
        ({"methods": "ours", "comparison_sets": "count:9"}, "leave it out, or forget_count"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(make_options, keys, message):
    with pytest.raises(InputError, match=message) as refused:
        run_unlearn(dataset="tiny", config_dict=make_options(**{"forget_count": 10, "output_dir": "out", **keys}))
    assert "\n" not in str(refused.value) and not Path("out").exists() and not Path("saved").exists()
    assert not torch.is_anomaly_enabled()


def test_the_model_that_is_compared_is_no_other_model(make_options):
    assert other_models("BPR,Pop, Pop", "BPR", "tiny", None, make_options()) == ["Pop"]


def test_a_model_that_learns_whole_rows_trains_too(make_options, tmp_path):
    arguments = model_arguments("MultiDAE", "BPR", "tiny", None, make_options(epochs=1))
    model, seconds = train_any(*opened(arguments), 3, tmp_path)
    assert seconds > 0 and type(model).__name__ == "MultiDAE"


def test_pop_counts_no_negatives(make_options, make_split, tmp_path):
    """RecBole's Pop counts the batches that hold an item, of whatever is in them."""
    split = make_split()
    model, _ = train_any(*opened(model_arguments("Pop", "BPR", "tiny", None, make_options())), 3, tmp_path)
    count = np.bincount(split.items, minlength=split.n_items)
    assert (model.item_cnt.view(-1).numpy() <= count).all()


def test_another_split_is_refused(make_split):
    with pytest.raises(InputError, match="Pop has settings under which RecBole splits the data differently"):
        beside("Pop", make_split(), make_split("Pop", seed=7))
