"""The paper's tables and figures, in their quick version, on RecBole's bundled ml-100k."""

import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

import run_unlearn as command_line
from recbole_unlearn.comparison import seeds
from recbole_unlearn.comparison.figures import Comparison, summary
from recbole_unlearn.comparison.paper import (
    ABOUT_DISTANCES,
    ABOUT_PAIRED,
    ABOUT_SHARDS,
    ABOUT_TURNED,
    OF_SCORES,
    about_distances,
    command_of,
    distances_to_original,
    mean_and_sd,
    other_settings,
    paper_arguments,
    ranking_table,
)
from recbole_unlearn.comparison.published import PUBLISHED, sentences
from recbole_unlearn.errors import InputError
from recbole_unlearn.methods import METHODS
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.reports.pictures import described as draw
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.given import Given

RESULTS = Path(__file__).parent.parent / "results"
FIGURES = ("figures_1_2", "figure_3", "figure_4", "figure_5", "figure_6", "figure_7")
KEYS = {"experiment": "paper", "quick": True, "methods": "retrain,sisa,ubpr,ours", "show_progress": False}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(result, output folder, config_dict) of a whole experiment."""
    folder = tmp_path_factory.mktemp("paper")
    keys = {**KEYS, "comparison_cache": str(folder / "cache"), "output_dir": str(folder / "results")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_unlearn(config_dict=keys)
    return result, folder / "results", keys


def test_every_table_and_figure_is_there(done):
    result, folder, _ = done
    page = (folder / "ml-100k.md").read_text()
    assert page == result["page"]
    for title in ("Sizes (Table 2)", "(Table 3)", "HR@10 sisa", "NDCG@10 ours", "Settings", "A quick version"):
        assert title in page
    for name in FIGURES:
        assert ElementTree.parse(folder / "ml-100k" / f"{name}.svg").getroot().tag.endswith("svg")
        assert f"(ml-100k/{name}.svg)" in page
    assert (folder / "ml-100k" / "figures.html").stat().st_size > 1 << 20  # plotly.js is in it
    results = json.loads((folder / "ml-100k" / "table_3.json").read_text())
    assert set(results["sets"]) == {"0.100%", "0.200%"}
    for each in results["sets"].values():
        assert set(each["figures"]) == {"original", "retrain", "sisa", "ubpr", "ours"}


def test_the_page_says_what_this_run_had(done):
    page = done[1].joinpath("ml-100k.md").read_text()
    command = re.search("`(python run_unlearn.py .*?)`", page)[1]
    assert command.endswith("--dataset=ml-100k --methods=retrain,sisa,ubpr,ours --quick")
    different = re.search("In this run instead:\n\n```yaml\n(.*?)```", page, re.DOTALL)[1]
    assert yaml.safe_load(different) == {"epochs": 3}
    assert "Of ubpr's 2 solves, conjugate gradient did not converge in" in page
    assert "ubpr is " in page and "ours is " in page and "minus the paper's" not in page


def test_the_request_was_in_one_shard(done):
    results = json.loads((done[1] / "ml-100k" / "table_3.json").read_text())
    for each in results["sets"].values():
        assert len(each["figures"]["sisa"][0]["details"]["shards_retrained"]) == 1


def test_weight_distances_are_of_paired_runs_too(done):
    """What the rows did is less than what another training does, and ours undoes some of it.

    By default it replays all rows at the second ratio, of which most are touched.
    """
    page, drawn = ((done[1] / name).read_text() for name in ("ml-100k.md", "ml-100k/figure_6.svg"))
    numbers = re.findall(r"(\w[\w ]*/\w[\w ]*) (\d[\d.e-]*) to (\d[\d.e-]*)[,.]", drawn)
    found = {}
    for pair, first, last in numbers:
        found.setdefault(pair, []).append((float(first), float(last)))
    assert {pair: len(each) for pair, each in found.items()} == {
        "O/I": 1, "R/O": 1, "S/O": 1, "UBPR/O": 1, "ours/O": 1,
        "R paired/O": 3, "ours/R paired": 3, "all rows/R paired": 3, "UBPR/R paired": 3,
    }  # fmt: skip
    (other_training,) = found["R/O"]
    for at in (0, 1):
        pairs = "all rows/R paired", "ours/R paired", "R paired/O"
        whole, turned, scores = list(zip(*(found[pair] for pair in pairs), strict=True))
        assert 0 < whole[1][at] < whole[2][at]
        for all_rows, ours, original in (turned, scores):
            assert 0 < all_rows[at] <= ours[at] < original[at]
        assert turned[2][at] < whole[2][at] < other_training[at]
    for paragraph in (ABOUT_DISTANCES, ABOUT_PAIRED, ABOUT_TURNED, ABOUT_SHARDS):
        assert page.count(paragraph) == 1


def test_it_goes_on_where_it_stopped(done, monkeypatch, capsys):
    result, folder, keys = done

    def measured(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(Comparison, "measure", measured)
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", measured)
    arguments = [f"--{key}={value}" for key, value in keys.items() if key != "quick"]
    assert command_line.main([*arguments, "--quick", "-d", "ml-100k"]) == 0
    assert result["page"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"forget_count": 5}, "forget_count"),
        ({"checkpoint": "model.pth"}, "checkpoint"),
        ({"compare_models": "Pop"}, "compare_models"),
        ({"methods": "retrein"}, "retrain"),
        ({"experiment": "papper"}, "paper"),
        ({"quick": "perhaps"}, "quick"),
        ({"method_args": {"sisa": {"shardz": 3}}}, "shards"),
    ],
)
def test_bad_input_ends_before_any_work(changes, says):
    with pytest.raises(InputError, match=says):
        run_unlearn(config_dict={**KEYS, **changes})
    assert not any(Path().rglob("*.pth")) and not Path("results").exists()


def test_the_papers_digits_are_those_of_six_ratios():
    for methods in PUBLISHED.values():
        assert set(methods) == {"original", "retrain", "sisa", "receraser", "ubpr"}
        assert all(len(row) == 6 for rows in methods.values() for row in rows)


# -- words and tables, from figures


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist has no results/")
@pytest.mark.parametrize("dataset", PUBLISHED)
def test_the_published_page_says_what_its_figures_say(dataset):
    page = (RESULTS / f"{dataset}.md").read_text()
    results = json.loads((RESULTS / dataset / "table_3.json").read_text())
    summaries = {ratio: summary(each["figures"]) for ratio, each in results["sets"].items()}
    size = [
        int(re.search(rf"{row} *\| ([\d,]+)", page)[1].replace(",", "")) for row in ("users, items", "training data")
    ]
    for paragraph in [*sentences(results, summaries, dataset, size), ABOUT_DISTANCES]:
        assert f"\n\n{paragraph}\n\n" in page
    for line in ranking_table(summaries, PUBLISHED[dataset]).to_markdown(disable_numparse=True).splitlines():
        assert line in page
    given = {"data_path": "/somebody/else"}
    assert f"`{command_of(('BPR', dataset, ['properties/paper.yaml'], given), results['settings'])}`" in page


def runs(*values, **details):
    """One run a value, every figure of which is that value."""
    return [
        {
            "ranking": {"uni99": {"hit@10": value, "ndcg@10": value}},
            "forget_auc": value,
            "prepare_seconds": 0.0,
            "seconds": value,
            "details": details,
        }
        for value in values
    ]


def compared(**figures):
    results = {"settings": {"ubpr": {"cg_tolerance": 0.001}}, "sets": {"0.1%": {"figures": figures}}}
    return results, {"0.1%": summary(figures)}


def test_who_is_nearer_and_faster_is_computed():
    solve = {"converged": False, "negative_curvature": True, "residual": 0.5}
    trained = {"original": runs(0.5), "retrain": runs(0.4, epochs=3)}
    better, solves = sentences(*compared(**trained, sisa=runs(0.7), receraser=runs(0.9), ubpr=runs(0.45, **solve)))
    assert "ubpr is nearer to Retrain in NDCG@10 than sisa and receraser (0.0500 against 0.3000 and 0.5000)" in better
    assert "faster than sisa and receraser" in better and "nothing, is 0.1000 and 0.1000 from" in better
    assert "did not converge in 1 and stopped at a direction of negative curvature in 1" in solves
    solve |= {"converged": True, "negative_curvature": False}
    worse, solves = sentences(*compared(**trained, sisa=runs(0.3), receraser=runs(0.9), ubpr=runs(0.6, **solve)))
    assert "ubpr is nearer to Retrain in NDCG@10 than receraser, not than sisa (0.2000" in worse
    assert "faster than receraser, not than sisa" in worse
    assert "did not converge in 0 and stopped at a direction of negative curvature in 0" in solves
    worst, _ = sentences(*compared(**trained, sisa=runs(0.4), ubpr=runs(0.9, **solve)))
    assert "ubpr is not nearer to Retrain in NDCG@10 than sisa" in worst and "not faster than sisa" in worst


def test_several_seeds_show_their_spread():
    _, summaries = compared(original=runs(0.5, 0.7), retrain=runs(0.3, 0.5), ours=runs(0.4, 0.4))
    table = ranking_table(summaries, {})
    assert table.loc["HR@10 original", "0.1%"] == "0.6000 ± 0.1414 (+0.2000)"
    assert table.loc["NDCG@10 retrain", "0.1%"] == "0.4000 ± 0.1414"
    seconds = {"retrain": {0.1: mean_and_sd(summaries["0.1%"]["retrain"]["seconds"])}}
    (chart,) = draw.ratio_curves(seconds, "seconds", "Running time").panels
    assert chart.series[0].low == pytest.approx([0.4 - 0.1414], abs=1e-4)
    assert chart.series[0].high == pytest.approx([0.4 + 0.1414], abs=1e-4)
    _, summaries = compared(original=runs(0.5), retrain=runs(0.3))
    assert ranking_table(summaries, {}).loc["HR@10 original", "0.1%"] == "0.5000 (+0.2000)"


def test_distances_to_the_original_have_their_spread_and_are_explained():
    sets = {
        ratio: {
            "figures": {name: [{"weight_distance": n * k} for n in (1.0, 3.0)] for name in ("retrain", "receraser")}
        }
        for ratio, k in (("0.010%", 1), ("0.020%", 2))
    }
    found = distances_to_original(sets)
    assert found == {pair: {0.01: (2.0, 2**0.5), 0.02: (4.0, 2 * 2**0.5)} for pair in ("R/O", "E/O")}
    picture = draw.weight_distances({"to the original": found})
    assert picture.panels[0].y.log and about_distances(picture) == [ABOUT_DISTANCES, ABOUT_SHARDS]
    assert about_distances(None) == []
    scores = draw.weight_distances({OF_SCORES: {"R paired/O": {0.01: 0.5, 0.02: 0.25}}}, [OF_SCORES])
    assert about_distances(scores) == [
        ABOUT_PAIRED,
        f"{ABOUT_TURNED} Of the scores, median and largest over the ratios: R paired/O 0.375, 0.5.",
    ]
    assert "scores" in scores.panels[0].y.label and "weights" in picture.panels[0].y.label
    nothing = draw.weight_distances({"to the original": {"R/O": {0.01: 0.0, 0.02: (1.0, None)}}})
    assert not nothing.panels[0].y.log and about_distances(nothing) == [ABOUT_DISTANCES]


def test_the_printed_command_asks_for_the_same(tmp_path):
    changes = {
        "data_path": "/home/me/data", "output_dir": "/home/me/out", "comparison_seeds": "3", "seed": 7,
        "method_args": {"sisa": {"shards": 3}}, "experiment": "paper",
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text("topk: [10]")
    arguments = paper_arguments(Given.read("LightGCN", "ml-1m", [str(tmp_path / "own.yaml")], changes), False)
    command = command_of(arguments, METHODS)
    assert "/home" not in command and str(tmp_path) not in command and "--quick" not in command
    options = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(command)[2:])
    assert options == {
        "experiment": "paper", "dataset": "ml-1m", "model": "LightGCN", "data_path": "PATH", "config_files": "own.yaml",
        "comparison_seeds": "3", "seed": "7", "method_args": "{'sisa': {'shards': 3}}",
    }  # fmt: skip


def test_settings_that_differ_from_the_papers_are_known(tmp_path):
    (tmp_path / "own.yaml").write_text("topk: [10]\nmetrics: [Hit, NDCG]")
    changes = {"learning_rate": 0.02, "data_path": str(tmp_path)}
    arguments = paper_arguments(Given.read("BPR", "ml-100k", [str(tmp_path / "own.yaml")], changes), False)
    assert other_settings(arguments, UnlearnConfig(*arguments)) == {"topk": [10], "learning_rate": 0.02}
