"""The numerics know nothing of recommenders."""

import ast
import sys
from pathlib import Path

import pytest

import recbole_unlearn.influence

FOLDER = Path(recbole_unlearn.influence.__file__).parent
ALLOWED = {"numpy", "torch", "numba"} | sys.stdlib_module_names


def imported(path):
    """Absolute names of everything that a source file imports, at any depth."""
    package = ["recbole_unlearn", "influence"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [node.module] if node.module else []
            yield from (".".join([*base, *module, alias.name]) for alias in node.names)


def test_sources_are_found():
    assert {"operators.py", "solver.py", "objective.py", "damping.py", "kernels.py"} <= {
        path.name for path in FOLDER.glob("*.py")
    }


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_imports_only_numerics(path):
    foreign = [
        name
        for name in imported(path)
        if name.split(".")[0] not in ALLOWED and not name.startswith("recbole_unlearn.influence")
    ]
    assert foreign == []
