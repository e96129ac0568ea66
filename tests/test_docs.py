"""What the pages say of the package is there: links, files, names, tables, rooms, and the README's example."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import recbole_unlearn
from recbole_unlearn.quick_start import run_unlearn

PACKAGE = Path(recbole_unlearn.__file__).resolve().parent
ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / "results").glob("README.md")]
# From the top of the house down, as docs/house.md has it; those of one floor use each other.
FLOORS = [
    ["requests"], ["quick_start"], ["runs"], ["comparison"], ["methods"], ["unlearner"], ["unlearners"], ["training"],
    ["evaluation"], ["models"], ["data", "settings", "storage", "compat"],
]  # fmt: skip
STAIRS = {("unlearner.py", "runs"), ("settings/conflicts.py", "models"), ("compat/patches.py", "training")}
OF_EXAMPLES = {"recbole_unlearn/methods/push_away.py"}  # that docs/comparison.md makes up


def anchors(page):
    """Names that GitHub gives the headings of a page."""
    for line in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-")


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="a source distribution has no results")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_names_of_the_package_are_there(page):
    text = page.read_text("utf-8")
    for file in set(re.findall(r"`((?:\w+/)+\w+\.py)`", text)) - OF_EXAMPLES:
        assert (ROOT / file).exists() or (PACKAGE / file).exists(), file
    for name in set(re.findall(r"`(\w+\.py)`", text)):
        assert any(folder.rglob(name) for folder in (PACKAGE, ROOT / "benchmarks")) or (ROOT / name).exists(), name
    for name in re.findall(r"\bru\.(\w+)", text):
        assert hasattr(recbole_unlearn, name), name
    for module, names in re.findall(r"^from (recbole_unlearn[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        for name in names.split(", "):
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"


def test_the_house_has_every_room_and_flat_module():
    named = set(re.findall(r"^\| `([\w.]+)/?` \|", (ROOT / "docs" / "house.md").read_text("utf-8"), re.MULTILINE))
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    flat = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert rooms | flat <= named | {"properties"}
    assert {name for name in named if name.endswith(".py")} <= flat


def test_imports_point_down_the_house():
    floor = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
    up = set()
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE)
        room = path.parts[0].removesuffix(".py")
        for name in imported(file):
            if room in floor and floor.get(name, len(FLOORS)) < floor[room]:
                up.add((path.as_posix(), name))
    assert up == STAIRS


def imported(file):
    """Rooms that a file imports from, at any depth of it, those for annotations alone left out."""
    tree = ast.parse(file.read_text("utf-8"))
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = {each for node in typed for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in left_out:
            for alias in node.names:
                name = f"{node.module}.{alias.name}".split(".")
                if name[0] == "recbole_unlearn":
                    yield name[1]


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="a source distribution has no results")
def test_the_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # for what all benchmarks share
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for name in tables.PAGES:
        assert (ROOT / name).read_text("utf-8") == tables.filled(name), "run: python benchmarks/tables.py"


def test_the_examples_of_the_readme_run(make_options, monkeypatch, tmp_path):
    example, service = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    options = {key: value for key, value in make_options().items() if key != "state"}
    monkeypatch.setattr("sys.argv", ["example"])
    user, item = "u20", "i4"
    tiny = example.replace('"BPR", "ml-100k"', f'"BPR", "tiny", config_dict={options!r}').replace('"42"', f'"{user}"')
    found = {}
    exec(tiny, found)
    split, done = found["unlearner"].split, found["done"]
    assert (done.method, done.model) == ("replay", found["unlearner"].model)
    assert len(found["unlearner"].forgotten) == (split.users == split.train.dataset.token2id("user_id", user)).sum()
    assert run_unlearn(config_dict={"checkpoint": "forgotten.pth", "forget_count": 1, "compare": "none"})
    service = service.replace("saved/RUN/model.pth", "forgotten.pth").replace('"forgotten.pth")  #', '"next.pth")  #')
    exec(service.replace('"42"', '"u23"').replace('"50"', f'"{item}"'), {"ru": recbole_unlearn})
    assert Path("next.pth").is_file()
