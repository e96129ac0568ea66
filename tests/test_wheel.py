"""``python -m build`` ships the files of the repository and nothing else; an installed wheel runs without them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("results/", ".ci/", ".gitignore")
MADE = {"PKG-INFO", "setup.cfg"}  # which setuptools adds to an sdist
STALE = ("build/lib/recbole_unlearn/stale.py", "dist/stale.txt", "saved/stale.pth", "tests/__pycache__/stale.pyc")


def tracked():
    """The files of the repository, by git, or, in an unpacked sdist, by its own list."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0:
        return [name for name in git.stdout.splitlines() if (ROOT / name).is_file()]
    listed = (ROOT / "recbole_unlearn.egg-info" / "SOURCES.txt").read_text().splitlines()
    return [name for name in listed if "egg-info" not in name]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository in which an older version was built, run and tested."""
    folder = tmp_path_factory.mktemp("source") / "recbole_unlearn"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in STALE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stale = True\n")
    return folder


def build(source, out, *options):
    command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "would be ignored" not in done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """The folder with the sdist and the wheel that was built from it."""
    return build(source, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    return file


def of_the_wheel(name):
    """Where the wheel keeps a file of the repository; None: nowhere."""
    if name.startswith("properties/"):
        return f"recbole_unlearn/{name}"
    return name if name.startswith("recbole_unlearn/") or name == "run_unlearn.py" else None


def shipped(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_sdist_holds_the_files_of_the_repository_and_no_others(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {each.name.partition("/")[2] for each in archive.getmembers() if each.isfile()}
    made = {name for name in names if name in MADE or name.startswith("recbole_unlearn.egg-info/")}
    assert names - made == {name for name in tracked() if not name.startswith(LEFT_OUT)} - MADE


def test_the_wheel_holds_the_modules_and_yaml_files_and_no_others(wheel):
    assert shipped(wheel) == {of_the_wheel(name) for name in tracked()} - {None}


def test_a_wheel_built_in_place_has_nothing_of_an_earlier_build(source, wheel, tmp_path):
    build(source, tmp_path, "--wheel")
    (file,) = tmp_path.glob("*.whl")
    assert shipped(file) == shipped(wheel)


def test_the_unpacked_wheel_trains_forgets_and_compares(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    command = [sys.executable, "-m", "run_unlearn", "--epochs=2", "--learner=adamw", "--show_progress=False"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| forget-set AUC" in done.stdout
    (checkpoint,) = work.glob("saved/*/unlearned.pth")
    audit = checkpoint.with_name("audit.jsonl")
    command = [sys.executable, "-m", "recbole_unlearn.storage.audit", "verify", str(audit), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "chain whole" in done.stdout
