"""What is written outlives what is deleted: every pair of paths of a run, through links too."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import inside
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import scene, snapshot, start  # noqa: F401  (a fixture)

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage.paths import check_kept, check_written, within
from recbole_unlearn.unlearner import InfluenceUnlearner

PURGE = "--purge=True"


def linked(name, target):
    def work():
        os.symlink(Path(target).absolute(), name)

    return work


def made(folder):
    return lambda: Path(folder).mkdir(parents=True)


def moved(source, target):
    def work():
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)

    return work


def file(path):
    def work():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("user_id:token\titem_id:token\n")

    return work


def nothing():
    pass


# what to do first, arguments, a word of the message
CASES = {
    "output in the log": (nothing, ["--output_dir=model.triples/x"], "triple log"),
    "output in the log, deep": (nothing, ["--output_dir=model.triples/x/y/z"], "triple log"),
    "output that is the log": (nothing, ["--output_dir=model.triples"], "exists"),
    "output that is the checkpoint": (nothing, ["--output_dir=model.pth"], "exists"),
    "output in the log by dots": (nothing, ["--output_dir=data/../model.triples/x"], "triple log"),
    "output in the log by a link": (
        linked("elsewhere/in", "model.triples"), ["--output_dir=elsewhere/in/x"], "triple log",
    ),
    "output that is a link into the log": (
        linked("out", "model.triples/x"), ["--output_dir=out"], "triple log",
    ),
    "output through the log to elsewhere": (
        linked("model.triples/away", "elsewhere"), ["--output_dir=model.triples/away/x"], "triple log",
    ),
    "output in another model's log": (nothing, ["--output_dir=unlearned.triples/x"], "triple log"),
    "output with the name of the purge's journal": (nothing, ["--output_dir=.model.pth.purge"], "ours"),
    "output with the name of a temporary": (nothing, ["--output_dir=.out.1.tmp"], "ours"),
    "output in a folder with the name of a temporary": (nothing, ["--output_dir=.d.99999999.tmp/x"], "ours"),
    "output with the name of the lock": (nothing, ["--output_dir=.model.pth.lock"], "exists"),
    "default output in the log": (nothing, ["--output_dir=None", "--checkpoint_dir=model.triples"], "triple log"),
    "audit in the log": (nothing, ["--audit=model.triples/audit.jsonl"], "triple log"),
    "audit that is a column of the log": (nothing, ["--audit=model.triples/users.npy"], "triple log"),
    "audit that is the checkpoint": (nothing, ["--audit=./model.pth"], "checkpoint"),
    "audit that is the journal": (nothing, ["--audit=./.model.pth.purge"], "ours"),
    "audit that is the data": (nothing, ["--audit=data/tiny/tiny.inter"], ".inter"),
    "audit that is the request": (
        file("requests.tsv"),
        ["--forget_count=None", "--forget_file=requests.tsv", "--audit=./requests.tsv"], "forget_file",
    ),
    "audit by a link to the data": (linked("log.jsonl", "data/tiny/tiny.inter"), ["--audit=./log.jsonl"], ".inter"),
    "audit that is the new model": (nothing, ["--audit=unlearned.pth"], "itself"),
    "audit that is the result": (nothing, ["--audit=result.json"], "itself"),
    "audit that is the result, by its path": (nothing, ["--audit=out/result.md"], "itself"),
    "audit that is the new log": (nothing, ["--audit=unlearned.triples"], "itself"),
    "cache in the log": (nothing, ["--comparison_cache=model.triples/cache"], "triple log"),
    "another cache in the log": (nothing, ["--fidelity_cache=model.triples/cache"], "triple log"),
    "purge of the request's file": (
        file("model.triples/requests.tsv"),
        [PURGE, "--forget_count=None", "--forget_file=model.triples/requests.tsv"], "purge would delete forget_file",
    ),
    "purge of the requests": (
        file("model.triples/requests.csv"),
        [PURGE, "--forget_count=None", "--requests=model.triples/requests.csv"], "requests",
    ),
    "purge of a configuration": (
        lambda: Path("model.triples/r.yaml").write_text("state: ERROR\n"),
        [PURGE, "--config_files=model.triples/r.yaml"], "purge would delete config file",
    ),
    "purge of the data": (
        moved("data", "model.triples/data2"), [PURGE, "--data_path=model.triples/data2"], "data_path",
    ),
    "purge of the data through a link": (
        lambda: (moved("data", "model.triples/data2")(), linked("data", "model.triples/data2")()), [PURGE], "data_path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("purge", [[], [PURGE]], ids=["", "purge"])
@pytest.mark.parametrize("name", CASES)
def test_paths_that_would_be_lost_are_refused_before_any_work(scene, tmp_path, capsys, name, purge):  # noqa: F811
    prepare, arguments, says = CASES[name]
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        prepare()
        before = snapshot()
        status = start([*arguments, *(each for each in purge if each not in arguments)])
        out, err = capsys.readouterr()
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (out, err)
        assert says in err
        assert snapshot() == before


def test_a_purge_leaves_no_content_under_another_name_and_takes_no_other_models_log(scene, tmp_path, capsys):  # noqa: F811
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        os.link("model.triples/users.npy", "elsewhere/users.npy")
        assert start([PURGE]) == 2 and "another name" in capsys.readouterr().err
        os.unlink("elsewhere/users.npy")
        shutil.copy("model.pth", "model.ckpt")
        assert start([PURGE]) == 2 and "model.ckpt" in capsys.readouterr().err
        assert Path("model.pth").is_file() and Path("model.triples").is_dir()


def test_a_purge_from_within_what_it_deletes_is_refused(scene, tmp_path, capsys):  # noqa: F811
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene/model.triples"):
        before = snapshot("..")
        arguments = [PURGE, "--checkpoint=../model.pth", "--data_path=../data", "--output_dir=../out"]
        assert start(arguments) == 2
        assert "the working folder" in capsys.readouterr().err
        assert snapshot("..") == before


def test_a_purge_beside_what_it_deletes_keeps_all_else(scene, tmp_path):  # noqa: F811
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        before = set(snapshot())
        assert start([PURGE, "--output_dir=new"]) == 0
        gone = {str(path) for path in before - set(snapshot())}
        assert gone and all(path.startswith("model.") for path in gone)
        assert Path("new/unlearned.pth").is_file()


@pytest.mark.parametrize("name", ["model.triples/v2.pth", "v2.triples", ".v2.pth.1.tmp", "model.pth"])
def test_a_session_saves_nothing_where_it_would_be_lost(scene, tmp_path, name):  # noqa: F811
    shutil.copytree(scene, tmp_path / "scene")
    with inside(tmp_path / "scene"):
        with InfluenceUnlearner.load("model.pth", config_dict={"data_path": "data"}) as session:
            session.forget("count", 2)
            before = snapshot()
            with pytest.raises(InputError):
                session.save(name)
            assert {path for path in snapshot() if not path.name.endswith(".lock")} == {
                path for path in before if not path.name.endswith(".lock")
            }
            for audit in ("model.triples/a.jsonl", "./v3.pth", "./model.pth"):
                session.config["audit"] = audit
                with pytest.raises(InputError):
                    session.save("v3.pth")
            assert not Path("v3.pth").exists()


PART = st.sampled_from(["a", "b", "..", "model.triples", ".", "link", "x.triples"])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PART, max_size=6), link=st.sampled_from(["model.triples", "a", "model.triples/a", "."]))
def test_nothing_that_ends_up_in_a_folder_is_taken_to_be_outside(tmp_path_factory, parts, link):
    """By making it: whatever is really created within the log is told beforehand to lie there."""
    with inside(tmp_path_factory.mktemp("paths")):
        for folder in ("a/b", "model.triples/a", "b"):
            Path(folder).mkdir(parents=True)
        for place in (".", "a", "model.triples/a"):
            os.symlink(os.path.relpath(link, place), Path(place) / "link")
        path = Path(*parts, "new")
        try:
            told = within(path, "model.triples")
            path.mkdir(parents=True)
        except OSError:
            return
        really = Path(os.path.realpath("model.triples")) in Path(os.path.realpath(path)).parents
        assert told or not really
        if really:
            for check in (check_written, check_kept):
                with pytest.raises(InputError):
                    check("output_dir", path, "model.pth")


@pytest.mark.parametrize("run", [{"methods": "fine_tune"}, {"evaluate": "audit"}, {"experiment": "paper"}])
def test_no_run_keeps_what_it_trains_in_a_log(run, make_options, tmp_path):
    log = tmp_path / "old.triples"
    log.mkdir()
    (log / "metadata.json").write_text("{}")
    keys = {"comparison_cache": str(log / "cache"), **run}
    with pytest.raises(InputError, match="comparison_cache .* lies in .*, a triple log"):
        run_unlearn("BPR", "tiny", config_dict=make_options(**keys))
    assert [each.name for each in log.iterdir()] == ["metadata.json"]
