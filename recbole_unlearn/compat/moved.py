"""Old places of modules that the documentation told users to import or to run, for one version, with a warning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType

PACKAGE = "recbole_unlearn"
MOVED = {
    "adoption": "training.adoption",
    "audit": "storage.audit",
    "compiled": "training.compiled",
    "input_error": "errors",
    "pictures": "reports.pictures",
    "pictures.figures": "reports.pictures.described",
    "pictures.interactive": "reports.pictures.interactive",
    "pictures.png": "reports.pictures.drawn",
    "pictures.svg": "reports.pictures.drawn",
    "reporting": "reports.tables",
    "trained": "training.trained",
    "trainer": "training.trainer",
}
RENAMED = {"pictures.png": {"write": "write_png"}, "pictures.svg": {"draw": "svg"}}  # functions: old name -> new


class _Moved(Loader):
    """Finds modules by their old names and fills them with what is in the new ones."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        old = name.removeprefix(f"{PACKAGE}.")
        known = old != name and old in MOVED
        return spec_from_loader(name, self, is_package=old == "pictures") if known else None

    def create_module(self, spec: ModuleSpec) -> None:
        """None: an empty one."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        content = vars(import_module(_new(module.__name__)))
        vars(module).update({name: value for name, value in content.items() if not name.startswith("__")})
        vars(module).update({name: content[new] for name, new in RENAMED.get(old, {}).items()})

    def get_code(self, name: str) -> CodeType:
        """For ``python -m``."""
        new = _new(name)
        return getattr(find_spec(new), "loader").get_code(new)  # noqa: B009  (neither can be None)


def _new(name):
    """The new name of a module; says so, to whoever imports the old one."""
    new = f"{PACKAGE}.{MOVED[name.removeprefix(f'{PACKAGE}.')]}"
    warnings.warn(f"{name} is now {new}; the old name goes with the next version", FutureWarning, stacklevel=3)
    return new


def apply() -> None:
    """Let Python's import find them, where it finds nothing else."""
    sys.meta_path.append(_Moved())
