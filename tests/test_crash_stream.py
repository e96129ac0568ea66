"""Killed while it serves a stream of requests: the next start finds the old state or the new one, no other."""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import inside
from recbole.utils import init_seed
from test_crash import KILLED, MODEL, UNLEARNED, Dying, check, distinctive, forgotten_traces, fresh, next_start

from recbole_unlearn.data.split import Split
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import sweep_scratch

# Numba's threads, which other tests have started in our process, do not survive a fork: a fresh process forks for us.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["recbole_unlearn.quick_start", "recbole_unlearn.unlearners.dot_product", "torch._dynamo"])


def run(folder, temporary, keys, n=None):
    """``run_unlearn`` in a process of its own, which dies at the n-th change of the disk; returns its exit status."""
    return exit_status(_run, folder, temporary, keys, n)


def exit_status(work, folder, temporary, *arguments):
    """Of a process of its own that does some work in a folder, with another for temporary files."""
    process = FRESH.Process(target=_settled, args=(work, str(folder), str(temporary), arguments))
    process.start()
    process.join()
    return process.exitcode


def _settled(work, folder, temporary, arguments):
    sys.argv = ["pytest"]  # RecBole reads them
    os.chdir(folder)
    tempfile.tempdir = temporary
    torch.set_num_threads(1)
    work(*arguments)


def _run(keys, n):
    if n:
        Dying(n).start()
    run_unlearn(config_dict=keys)


class Stream:
    """A stream of requests that can be served again and again, and what it comes to if nobody kills it."""

    def __init__(self, make_options, data_path, folder):
        self.scene = {"start": folder / "start"}
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        shutil.copytree(data_path, folder / "start" / "data")
        keys = {"model": "BPR", "dataset": "tiny", "epochs": 2, "compare": "none", "forget_count": 5}
        keys = make_options(data_path="data", **keys)
        assert run(folder / "start", self.temporary, {**keys, "output_dir": "trained"}) == 0
        with inside(folder / "start"):
            for name in MODEL, MODEL.with_suffix(".triples"):
                os.rename(Path("trained") / name, name)
            shutil.rmtree("trained")
            config = UnlearnConfig("BPR", "tiny", config_dict=keys)
            init_seed(config["seed"], config["reproducibility"])
            split = Split(config)
        rows = distinctive(split)[3::40]
        pairs = split.pairs(rows)
        lines = [f"{user},{item}" for user, item in [*pairs, pairs[0]]]  # the last one again: nothing is left of it
        (folder / "requests.csv").write_text("\n".join(["user,item", *lines]) + "\n")
        self.keys = {
            "checkpoint": str(MODEL),
            "forget_requests": str(folder / "requests.csv"),
            "request_batch": 4,
            "drift_every": 12,
            "compare": "none",
            "output_dir": str(UNLEARNED.parent),
            "purge": True,
            "coupling": "paired",  # weights that can be compared
            "purge_dataset": True,
            "show_progress": False,
            "state": "WARNING",
        }
        fresh(self.scene, folder)
        with inside(folder / "scene"):
            assert run(".", self.temporary, self.keys) == 0
            stream = json.loads(Path("out/result.json").read_text())["stream"]
            assert stream["empty"] == 1 and len(stream["batches"]) > 2 and stream["drift"] == []  # which is not kept
            weights = checkpoints.load(UNLEARNED)[0]["state_dict"]
        self.scene |= {"split": split, "rows": rows, "unlearned": SimpleNamespace(state_dict=weights)}

    def left(self):
        """What lies in the folder for temporary files that is not an empty one of torch's."""
        return [each.name for each in self.temporary.iterdir() if not each.name.startswith("torchinductor")]

    def killed_at(self, n, folder):
        """Serve, die at the n-th change of the disk, start again; returns (state found, what lay in the scratch)."""
        fresh(self.scene, folder)
        status = run(".", self.temporary, self.keys, n)
        assert status in (0, KILLED), f"failed instead of dying, at step {n}"
        scratch = {file.name for file in self.temporary.rglob("*")}
        next_start()
        sweep_scratch()
        assert self.left() == []
        assert forgotten_traces("out", self.scene) == []
        return check(self.scene), scratch, status == 0

    def ends(self):
        """The same request again, in a new folder, ends the job."""
        shutil.rmtree("out", ignore_errors=True)
        assert run(".", self.temporary, self.keys) == 0
        assert check(self.scene) == "new" and self.left() == []


@pytest.fixture(scope="module")
def stream(make_options, data_path, tmp_path_factory):
    return Stream(make_options, data_path, tmp_path_factory.mktemp("stream"))


def kill_at(stream, folder, points, again_every, monkeypatch):
    """States, and what lay in the temporary folder, after each kill; ends with the first run that nobody killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(stream.temporary))
    states, left = [], set()
    for number, point in enumerate(points):
        state, scratch, finished = stream.killed_at(point, folder)
        states.append(state)
        left |= scratch
        if state != "new" and number % again_every == 0:
            stream.ends()
        if finished:
            break
    assert "drift.pth" in left  # a kill met a retrained model
    return states


def test_killed_in_a_stream_the_next_start_finds_the_old_state_or_the_new_one(stream, tmp_path, monkeypatch):
    states = kill_at(stream, tmp_path, (100, 178), 3, monkeypatch)
    assert states[0] == "old" and states == sorted(states, key=["old", "both", "new"].index)


@pytest.mark.slow
def test_killed_at_any_step_of_a_stream_the_next_start_finds_the_old_state_or_the_new_one(
    stream, tmp_path, monkeypatch
):
    """About a quarter of an hour."""
    states = kill_at(stream, tmp_path, range(1, 1000), 20, monkeypatch)
    assert set(states) == {"old", "both", "new"} and len(states) > 100
    assert states == sorted(states, key=["old", "both", "new"].index)  # never back
