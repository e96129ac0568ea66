"""Lint, format and types, by the settings in pyproject.toml; and that tests go through public names."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recbole_unlearn

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "lint": ["ruff", "check"],
    "format": ["ruff", "format", "--check"],
    "types": ["pyright", "--pythonpath", sys.executable],
}
# RecBole's private methods and attributes, and one of scipy's, that the package has too
THEIRS = {"_dataset", "_load_feat", "_save_checkpoint", "_train_epoch", "_update", "_valid_epoch"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_code_is_clean(name):
    tool, *arguments = COMMANDS[name]
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed; pip install '.[test]' brings it")
    command = [sys.executable, "-m", tool, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def private_names(tree):
    """Names of one leading underscore that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
        else:
            continue
        if re.match("_[^_]", name):
            yield name


def names_read(tree):
    """Names that a module reads of others: attributes, imports, and what it has ``setattr`` replace."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            yield from (str(each.value).split(".")[-1] for each in node.args[:2] if isinstance(each, ast.Constant))


def test_tests_read_no_private_names_of_the_package():
    package = Path(recbole_unlearn.__file__).parent
    ours = {name for file in package.rglob("*.py") for name in private_names(ast.parse(file.read_text("utf-8")))}
    for file in Path(__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        assert not (ours - THEIRS - set(private_names(tree))) & set(names_read(tree)), file.name
