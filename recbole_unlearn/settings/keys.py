"""Our own keys, as properties/overall.yaml declares them: each once, with default, what it holds, and whose it is."""

import math
import numbers
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recbole_unlearn.errors import InputError
from recbole_unlearn.settings import recbole_keys
from recbole_unlearn.settings.recbole_keys import check_choice, check_switch, check_whole, is_a

FLAGS = ("of the training", "of the model", "personal", "audited")
LIMITED = re.compile(r"(int|float) >= (\d+)")


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name, default, kind, meaning: as they are declared; ``kind`` is what it holds.
        flags: some of `FLAGS`, as the head of the file explains them.
    """

    name: str
    default: Any
    kind: str
    flags: tuple[str, ...]
    meaning: str

    @property
    def parts(self) -> list[str]:
        """What a kind such as ``int >= 1 | all`` allows."""
        return self.kind.split(" | ")

    @property
    def verbatim(self) -> bool:
        """Whether its values stay as they are written, even where they look like numbers."""
        return self.parts[-1] in ("tokens", "path", "text")

    def checked(self, value: Any) -> Any:
        """The value as it is used. InputError where the key cannot hold it; what names the forgotten is read later."""
        name, parts, limited = self.name, self.parts, LIMITED.fullmatch(self.parts[0])
        if self.kind == "path":
            if value is not None and not (isinstance(value, str) and value and "\0" not in value):
                raise InputError(f"{name} must be a path, not {value!r}")
        elif parts[0] == "bool":
            if value not in parts[1:]:
                check_switch(name, value)
        elif limited and len(parts) > 1:
            if value not in parts[1:] and not (is_a(int, value) and value >= int(limited[2])):
                allowed = ", ".join(map(repr, parts[1:]))
                raise InputError(f"{name} must be {allowed} or a whole number of at least {limited[2]}, not {value!r}")
        elif limited and limited[1] == "float":
            if not (is_a(numbers.Real, value) and int(limited[2]) <= value < math.inf):
                raise InputError(f"{name} must be a number of at least {limited[2]}, not {value!r}")
        elif limited:
            check_whole(name, value, int(limited[2]))
        elif len(parts) > 1 and not self.verbatim:
            value = "none" if value is None and "none" in parts else value
            check_choice(name, value, parts)
        return value


def properties_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in a source checkout."""
    here = Path(__file__).resolve().parents[1]
    return here / "properties" if (here / "properties").is_dir() else here.parent / "properties"


def _declared() -> dict[str, Key]:
    text = (properties_dir() / "overall.yaml").read_text("utf-8")
    defaults, found = yaml.safe_load(text), {}
    for name, kind, flags, meaning in re.findall(r"^(\w+):[^#\n]*# \(([^;)]*)(?:; ([^)]*))?\) (.*)$", text, re.M):
        found[name] = Key(name, defaults[name], kind, tuple(flags.split(", ")) if flags else (), meaning.strip())
    if defaults.keys() != found.keys() or any(set(key.flags) - set(FLAGS) for key in found.values()):
        raise ValueError("properties/overall.yaml does not say of every key what it holds and whose it is")
    return found


KEYS = _declared()
OWN = frozenset(KEYS) - {"eval_batch_size"}  # which is RecBole's, with another default
FORGET = tuple(name for name in KEYS if re.fullmatch("forget_(?!seed|category_field)\\w+", name))


def _having(flag: str) -> tuple[str, ...]:
    return tuple(name for name, key in KEYS.items() if flag in key.flags)


OF_TRAINING = _having("of the training")
PERSONAL = _having("personal")
AUDITED = _having("audited")
OF_RUNS = (
    *(name for name, key in KEYS.items() if not {"of the training", "of the model"} & set(key.flags)),
    *recbole_keys.OF_RUNS,
)
PATHS = tuple(name for name, key in KEYS.items() if key.kind == "path")
VERBATIM = tuple(name for name, key in KEYS.items() if key.verbatim)
# Where an empty text is none.
NOBODY = tuple(name for name in VERBATIM if name in PERSONAL and name != "forget_time")
