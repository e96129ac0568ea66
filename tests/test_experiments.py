"""The paper's tables and figures, in their quick version, on RecBole's bundled ml-100k."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import run_unlearn as command_line
from recbole_unlearn.comparison import Comparison
from recbole_unlearn.experiments import PUBLISHED
from recbole_unlearn.input_error import InputError
from recbole_unlearn.quick_start import run_unlearn

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


def test_the_request_was_in_one_shard(done):
    results = json.loads((done[1] / "ml-100k" / "table_3.json").read_text())
    for each in results["sets"].values():
        assert len(each["figures"]["sisa"][0]["details"]["shards_retrained"]) == 1


def test_it_goes_on_where_it_stopped(done, monkeypatch, capsys):
    result, folder, keys = done

    def measured(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(Comparison, "_measure", measured)
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
