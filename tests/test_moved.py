"""What earlier documentation told users to import or to run still works, and says where it is now."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from recbole_unlearn.compat.moved import MOVED
from recbole_unlearn.errors import InputError
from recbole_unlearn.reports.pictures import described, drawn


@pytest.fixture(autouse=True)
def _as_if_never_imported(monkeypatch):
    for name in MOVED:
        monkeypatch.delitem(sys.modules, f"recbole_unlearn.{name}", raising=False)


@pytest.mark.parametrize("old, new", MOVED.items())
def test_an_old_name_is_the_new_module_with_a_warning(old, new):
    with pytest.warns(FutureWarning, match=f"recbole_unlearn.{old} is now recbole_unlearn.{new};"):
        module = import_module(f"recbole_unlearn.{old}")
    public = {name: value for name, value in vars(import_module(f"recbole_unlearn.{new}")).items() if name[0] != "_"}
    assert public.items() <= vars(module).items()


def test_the_lines_of_the_old_pages_run():
    names = {"": "reporting", ".pictures": "figures, interactive, png, svg", ".input_error": "InputError"}
    found = {}
    with pytest.warns(FutureWarning) as warned:
        exec("\n".join(f"from recbole_unlearn{old} import {each}" for old, each in names.items()), found)
    assert {each.filename for each in warned} == {"<string>"}  # who imports is told
    assert found["InputError"] is InputError and callable(found["reporting"].html)
    curves = found["figures"].running_times({"ours": [0.8, 0.9], "retrain": 312})
    assert found["svg"].draw(curves) == drawn.svg(described.running_times({"ours": [0.8, 0.9], "retrain": 312}))
    found["png"].write(curves, "times.png")
    assert Path("times.png").stat().st_size > 0


def test_what_never_was_there_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="recbole_unlearn.nowhere"):
        import_module("recbole_unlearn.nowhere")


def test_operators_scripts_still_verify(tmp_path):
    command = [sys.executable, "-m", "recbole_unlearn.audit", "verify", str(tmp_path / "nowhere.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert "FutureWarning: recbole_unlearn.audit is now recbole_unlearn.storage.audit" in done.stderr
    assert done.returncode == 2 and "nowhere.jsonl" in done.stderr
