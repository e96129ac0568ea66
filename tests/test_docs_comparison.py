"""The example of docs/comparison.md is a method that can be compared."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

import recbole_unlearn
from recbole_unlearn import methods
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.keys import properties_dir

PAGE = Path(recbole_unlearn.__file__).resolve().parents[1] / "docs" / "comparison.md"


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Does what the page says, in a copy of the properties folder."""
    example, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    properties = tmp_path / "properties"
    shutil.copytree(properties_dir(), properties)
    (properties / "method" / "push_away.yaml").write_text(settings)
    monkeypatch.setattr(methods, "properties_dir", lambda: properties)
    (tmp_path / "push_away.py").write_text(example)
    spec = importlib.util.spec_from_file_location("push_away", tmp_path / "push_away.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "push_away", module)
    for name, method in eval(f"{{{line}}}", vars(module)).items():
        monkeypatch.setitem(methods.METHODS, name, method)


def test_the_example_is_compared(added, make_options, tmp_path):
    keys = make_options(forget_count=20, methods="push_away", comparison_cache=str(tmp_path / "cache"))
    result = run_unlearn(dataset="tiny", config_dict={**keys, "output_dir": str(tmp_path / "out")})
    figures = result["comparison"]["sets"]["count 20"]["figures"]
    assert figures["push_away"][0]["forget_auc"] < figures["original"][0]["forget_auc"]
    assert figures["push_away"][0]["details"] == {"pairs": 20}
    assert "| push_away" in result["page"]
    with pytest.raises(InputError, match="did you mean 'share'"):
        run_unlearn(dataset="tiny", config_dict={**keys, "method_args": {"push_away": {"shar": 1.0}}})


def test_the_page_names_every_method():
    named = set(re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.MULTILINE))
    assert named >= set(methods.METHODS)
