"""What a kept figure depends on, so that it is measured anew when that was changed."""

import ast
import hashlib
import inspect
import json
import sys
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from recbole.config import Config

from recbole_unlearn.data.frozen_data import is_frozen
from recbole_unlearn.methods.base import Method
from recbole_unlearn.settings import keys
from recbole_unlearn.settings.shown import plain
from recbole_unlearn.storage.files import file_checksum

PACKAGE = Path(__file__).parents[1]
JUDGES = ("comparison.judged", "evaluation.geometry")


@cache
def sources(*modules: str, root: Path = PACKAGE) -> str:
    """Checksum of the sources of modules, and of all of this package that they import, directly or not.

    Args:
        modules: names below the package, such as ``methods.ours``.
        root: the package's folder.
    """
    found, left = {}, list(modules)
    while left:
        name = left.pop()
        if name not in found and (file := _file(root, name)):
            found[name] = file.read_bytes()
            left += _imported(root, name, file)
    checksum = hashlib.sha256()
    for name, source in sorted(found.items()):
        checksum.update(f"{name}\0".encode() + source + b"\0")
    return checksum.hexdigest()


def data_files(config: Config) -> dict[str, str]:
    """Checksums of all files of a configuration's data set, by name: models read facts and features too, and figures
    what is held out.
    """
    prefix = "" if is_frozen(config) else f"{config['dataset']}."
    files = (file for file in Path(config["data_path"]).iterdir() if file.name.startswith(prefix) and file.is_file())
    return {file.name: file_checksum(file) for file in files}


def own_keys(config: Config) -> dict[str, Any]:
    """This package's keys that what a method makes of a trained model may depend on; plain values."""
    return plain({key: config[key] for key in keys.KEYS if key not in keys.OF_RUNS})


def named(what: Any) -> str:
    """A short name for plain values, for a file that they determine."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _file(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imported(root: Path, name: str, file: Path) -> list[str]:
    """Names below the package that a module may import: of ``from a import b`` a.b where that is a module, else a.

    The package itself, whose name is empty, imports the modules that its names are of.
    """
    own, names = f"{PACKAGE.name}.{name}".rstrip("."), []
    package = own if file.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            whole = resolve_name("." * node.level + (node.module or ""), package)
            parts = [f"{whole}.{each.name}" for each in node.names if each.name != "__version__"]  # which is no code
            names += [part if any(_file(root, each) for each in _below([part])) else whole for part in parts]
        elif isinstance(node, ast.Import):
            names += [each.name for each in node.names]
            names += [each.name.partition(".")[0] for each in node.names if not each.asname]
    return _below(names)


def _below(names: list[str]) -> list[str]:
    """Those of full names that are this package's, as they are below it; its own is empty."""
    return [each[len(PACKAGE.name) + 1 :] for each in names if f"{each}.".startswith(f"{PACKAGE.name}.")]


def measured_by(method: type[Method] | None) -> str:
    """Checksum of what measures a method, and of the method and all that it uses; None: of an original, or a model."""
    own = [each.__module__.removeprefix(f"{PACKAGE.name}.") for each in _classes(method)]
    return sources(*JUDGES, *own)


def prepared_by(method: type[Method] | None) -> list[str]:
    """Sources of a method's own files: what it trained beforehand is kept by these alone, since that may take hours."""
    return [inspect.getsource(sys.modules[each.__module__]) for each in _classes(method)]


def _classes(method):
    return [each for each in (method.__mro__ if method else ()) if issubclass(each, Method) and each is not Method]
