"""An installed wheel runs without the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_the_yaml_files_and_the_command(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "run_unlearn.py",
        "recbole_unlearn/properties/overall.yaml",
        "recbole_unlearn/properties/paper.yaml",
        "recbole_unlearn/properties/method/ours.yaml",
        "recbole_unlearn/methods/ours.py",
        "recbole_unlearn/py.typed",
    } <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_the_unpacked_wheel_trains_forgets_and_compares(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    command = [sys.executable, "-m", "run_unlearn", "--epochs=2", "--embedding_size=4", "--show_progress=False"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| forget-set AUC" in done.stdout
    assert list(work.glob("saved/*/unlearned.pth"))
