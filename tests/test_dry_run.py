"""A dry run says what a request would do, as the request then does it, and writes nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SECRET_USER

import run_unlearn as command_line
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.unlearners import guard


@pytest.fixture
def scene(finished, data_path):
    """An own copy of data and of a training that nobody has asked anything yet."""
    shutil.copytree(data_path, "data")
    Path("live").mkdir()
    shutil.copy(finished[1] / "model.pth", "live/model.pth")
    shutil.copytree(finished[1] / "model.triples", "live/model.triples")
    Path("live/model.triples", guard.FILE).unlink()


def everything():
    """Every file and folder below, with a file's content and time; that of a folder changes with every lock."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in Path(".").rglob("*")
    }


def asked(**keys):
    """The result of a dry run, which must leave all as it is."""
    before = everything()
    result = run_unlearn(config_dict={"checkpoint": "live/model.pth", "data_path": "data", "dry_run": True, **keys})
    assert everything() == before
    return result


@pytest.mark.parametrize("keys", [{}, {"purge": True, "purge_dataset": True}, {"coupling": "fresh"}])
def test_it_says_what_the_request_then_does(scene, keys):
    keys = {"forget_users": [SECRET_USER], "output_dir": "out", "compare": "none", **keys}
    told = asked(**keys)
    done = run_unlearn(config_dict={"checkpoint": "live/model.pth", "data_path": "data", **keys})
    assert told["forget_set"] == done["forget_set"]
    for key in ("method", "chosen", "exact", "coupling"):
        assert told["way"][key] == done["unlearning"][key]
    assert 0 < told["way"]["seconds"] <= 10 and told["way"]["memory"] is None
    left = {each["what"]: each for each in told["left"]}
    for what in ("the original checkpoint", "its log"):
        assert Path(left[what]["where"]).exists() != left[what]["then"].startswith("is deleted")
    assert Path(left["the audit record"]["where"]).read_bytes().count(b"\n") == int(
        left["the audit record"]["then"].split()[1]
    )


def test_a_stream_of_steps_that_comes_to_a_cohort_is_told_to_be_trained_again(data_path, make_options):
    """Each of its requests is a small one."""
    keys = make_options(epochs=1, compare="none", evaluate="none", output_dir="out")
    run_unlearn("NGCF", "tiny", config_dict={**keys, "forget_count": 1})
    users = sorted({line.split("\t")[0] for line in Path(data_path, "tiny", "tiny.inter").read_text().splitlines()[1:]})
    Path("requests.csv").write_text("\n".join(["user,item", *(f"{user}," for user in users[: len(users) // 4])]) + "\n")
    asked = {"checkpoint": "out/model.pth", "forget_requests": "requests.csv", "request_batch": 8, "exact_seconds": 0}
    asked |= {"compare": "none", "evaluate": "none", "output_dir": "second"}
    told = run_unlearn(config_dict={**asked, "dry_run": True})
    done = run_unlearn(config_dict=asked)
    assert "a step is no way" in told["way"]["chosen"] and "This is retraining" in told.page
    assert told["way"]["exact"] == done["unlearning"]["exact"] is True
    assert told["way"]["method"] == done["unlearning"]["method"] == "replay"


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_both_say_that_a_cohort_is_retraining(scene, share):
    keys = {"forget_ratio": share, "output_dir": "out", "compare": "none"}
    told = asked(**keys)
    done = run_unlearn(config_dict={"checkpoint": "live/model.pth", "data_path": "data", **keys})
    assert told["way"]["exact"] and done["unlearning"]["exact"]
    assert ("This is retraining: 40% of the training interactions are to be" in told.page) == (share > 0.1)
    said = "This is retraining: 40% of the training interactions are forgotten, and no less leads there. It took "
    for page in ("result.md", "report.html"):
        assert (said in Path("out", page).read_text()) == (share > 0.1)


def test_held_out_interactions_of_those_named_are_counted(scene, split):
    told = asked(forget_users=[SECRET_USER])
    user = split.train.dataset.field2token_id["user_id"][SECRET_USER]
    held_out = sum(int((each.dataset.inter_feat["user_id"] == user).sum()) for each in (split.valid, split.test))
    assert held_out and any(each["what"].startswith(f"{held_out} held-out interactions; ") for each in told["left"])
    assert not any("held-out" in each["what"] for each in asked(forget_count=3)["left"])


def test_what_nobody_knows_is_unknown(scene):
    told = asked(forget_count=3, method="influence")
    assert told["way"]["seconds"] is None and told["way"]["exact"] is False
    assert "Seconds of forgetting itself: unknown. Memory: unknown." in told.page
    told = asked(forget_count=3, replay_rows="touched")
    assert told["way"]["seconds"] is None and told["way"]["exact"] is False and told["way"]["coupling"] is None


def test_a_stream_is_told_as_a_whole(scene, split):
    one = split.pairs(np.array([5, 60]))
    Path("r.csv").write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in one))
    told = asked(forget_requests="r.csv")
    assert told["forget_set"]["interactions"] == 2 and told["way"]["exact"] is True
    assert told["way"]["seconds"] == pytest.approx(2 * asked(forget_count=1)["way"]["seconds"])


def test_an_earlier_check_of_the_log_is_told(scene):
    assert "not checked yet" in asked(forget_count=3).page
    run_unlearn(config_dict={"checkpoint": "live/model.pth", "data_path": "data", "forget_count": 3}, saved=False)
    assert "replay of the log with nothing forgotten ends" in asked(forget_count=3).page


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"checkpoint": None, "dataset": "tiny"}, "give its checkpoint"),
        ({"methods": "ours"}, "leave it out, or methods"),
        ({"experiment": "paper"}, "leave it out, or experiment"),
        ({"forget_users": ["nobody"]}, "unknown user token"),
        ({"dry_run": "maybe"}, "dry_run"),
        ({"output_dir": "live"}, "not an empty folder"),
    ],
)
def test_what_the_request_would_be_refused_for_is_refused(scene, keys, match):
    before = everything()
    given = {"checkpoint": "live/model.pth", "data_path": "data", "dry_run": True, "forget_count": 3, **keys}
    if "forget_users" in keys:
        given.pop("forget_count")
    with pytest.raises(InputError, match=match) as refused:
        run_unlearn(config_dict=given)
    assert "\n" not in str(refused.value) and everything() == before


def test_a_purge_that_was_cut_off_is_not_finished(scene):
    Path("live/.model.pth.purge").write_text('{"inter": null}')
    before = everything()
    with pytest.raises(InputError, match="leave dry_run out"):
        asked(forget_count=3)
    assert everything() == before


def test_the_command_ends_well(scene, capsys):
    assert (
        command_line.main(["--checkpoint=live/model.pth", "--data_path=data", "--forget_count=3", "--dry_run=True"])
        == 0
    )
    assert "# Dry run: BPR on tiny" in capsys.readouterr().out
