"""Removing interactions from RecBole's ``.inter`` file."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import recbole
from recbole.config import Config

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage.files import replacing, sweep

# Settings with which the file's rows are not simply the data set's interactions.
UNPLAIN = (
    "benchmark_filename",
    "additional_feat_suffix",
    "alias_of_user_id",
    "alias_of_item_id",
    "threshold",
    "discretization",
)


def reading(config: Config) -> dict[str, Any]:
    """What it takes to read the file, as plain values."""
    return {
        "separator": config["field_separator"],
        "encoding": config["encoding"] or "utf-8",
        "fields": [config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]],
    }


def plain_path(config: Config) -> Path:
    """Path of the data set's ``.inter`` file.

    Raises:
        InputError: it is RecBole's own example, or not in the plain form that lines can be removed from.
    """
    path = Path(config["data_path"]) / f"{config['dataset']}.inter"
    unplain = [key for key in UNPLAIN if config[key]]
    features = sorted(set(config["load_col"] or {"every file": 0}) - {"inter"})
    if unplain or features:
        what = unplain[0] if unplain else f"load_col of {features[0]}"
        raise InputError(f"purge_dataset works on a plain .inter file only, not with {what}; edit the data yourself")
    if not path.is_file():
        raise InputError(f"purge_dataset: {path} does not exist; check data_path")
    if Path(recbole.__path__[0]).resolve() in path.resolve().parents:
        raise InputError(
            f"purge_dataset: {path} is RecBole's own example; copy it under another name and train on that"
        )
    return path


def check(path: Path, config: Config, pairs: Iterable[tuple[str, str]]) -> None:
    """Raises InputError unless every pair is found in the file: a pair that is not found could not be removed."""
    pairs, found = set(pairs), set()
    for _, pair in _lines(path, reading(config)):
        if pair in pairs:
            found.add(pair)
    if found != pairs:
        raise InputError(
            f"purge_dataset: {path} does not name {len(pairs - found)} of {len(pairs)} forgotten interactions as "
            "RecBole read them (quoted fields?); edit it yourself"
        )


def seal(path: Path) -> list[int]:
    """What tells this file, as it is now, from any other: its status changes by kernel's clock alone."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_ctime_ns]


def names_any(path: Path, form: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether the file names one of these (user token, item token)."""
    pairs = set(pairs)
    return any(pair in pairs for _, pair in _lines(path, form))


def remove_pairs(path: Path, form: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> None:
    """Replace the file, atomically, by one without the lines of these (user token, item token); all else stays.

    Call it holding the file's lock.

    Args:
        form: of `reading`.
    """
    pairs = set(pairs)
    sweep(path.parent)
    with replacing(path, keep_mode=True) as f:
        for line, pair in _lines(path, form):
            if pair not in pairs:
                f.write(line)


def _lines(path, form):
    """(line as bytes, (user token, item token)) of each line, the header's pair being None."""
    try:
        with open(path, "rb") as f:
            header = next(f, b"")
            names = [
                name.split(":")[0] for name in header.decode(form["encoding"]).rstrip("\r\n").split(form["separator"])
            ]
            user, item = (names.index(field) for field in form["fields"])
            yield header, None
            for line in f:
                fields = line.decode(form["encoding"]).rstrip("\r\n").split(form["separator"])
                yield line, (fields[user], fields[item]) if len(fields) > max(user, item) else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError) as error:
        raise InputError(f"{path} is no .inter file of this data set ({error}); check data_path") from None
