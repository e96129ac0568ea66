"""What is written must outlive what is deleted: no path of a run lies in, is, or leads into what a purge takes away."""

import os
from collections.abc import Mapping
from pathlib import Path

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage.files import TEMPORARY, is_debris, journal_path, lock_path
from recbole_unlearn.storage.triple_log import log_path

# Names of what a run writes into its folder: no audit file can have them.
MODEL, UNLEARNED, RETRAINED = "model.pth", "unlearned.pth", "retrained.pth"
RESULT = "result.json"
RESULTS = (RESULT, "result.md", "report.html")
CHANGED, EMBEDDINGS = "changed_users.csv", "embeddings"
OUTPUT_NAMES = (MODEL, UNLEARNED, RETRAINED, *RESULTS, CHANGED, EMBEDDINGS)


def check_path(key: str, path: object) -> None:
    """Raises InputError where something is no path of a file."""
    if not (isinstance(path, (str, os.PathLike)) and Path(path).name):
        raise InputError(f"{key} must be the path of a file, not {path!r}")


def check_written(key: str, path: Path | str, checkpoint: Path | str | None = None) -> None:
    """Raises InputError where something written at ``path`` would be part of a checkpoint or a log, or be swept away.

    Args:
        key: what the path was given as.
        path: of a file or folder to be written, which need not exist.
        checkpoint: the one that the run starts from.
    """
    path = Path(path)
    for part in {*Path(os.path.abspath(path)).parts, *Path(os.path.realpath(path)).parts}:
        if is_debris(Path(part)) or TEMPORARY.fullmatch(part) or (part[:1] == "." and part.endswith(".purge")):
            raise InputError(
                f"{key} {path}: what is named like {part} is ours, and deleted as left behind; name another"
            )
    for owned, what in _owned(checkpoint):
        if within(path, owned):
            raise InputError(f"{key} {path} lies in {owned}, {what}, and would be deleted with it; name another place")
    for folder in {*Path(os.path.abspath(path)).parents, *Path(os.path.realpath(path)).parents, path}:
        if folder.suffix == ".triples" and (folder / "metadata.json").is_file():
            raise InputError(f"{key} {path} lies in {folder}, a triple log; name another place")


def check_kept(key: str, path: Path | str, checkpoint: Path | str) -> None:
    """Raises InputError where a purge of ``checkpoint`` would take ``path`` away, which is not its own to delete."""
    for owned, what in _owned(checkpoint):
        if within(path, owned):
            raise InputError(f"purge would delete {key} {path}: it lies in {owned}, {what}; move it elsewhere")


def check_apart(key: str, path: Path | str, others: Mapping[str, Path | str | None]) -> None:
    """Raises InputError where two paths are one file.

    Args:
        others: what each was given as -> path, or None.
    """
    for other, theirs in others.items():
        if theirs is not None and _same(path, theirs):
            raise InputError(f"{key} {path} is {other} too; name another file")


def _owned(checkpoint):
    """What is a checkpoint's own: (path, what it is)."""
    if checkpoint is None:
        return []
    checkpoint = Path(checkpoint)
    return [
        (checkpoint, "the checkpoint"),
        (log_path(checkpoint), "its triple log"),
        (journal_path(checkpoint), "the journal of its purge"),
        (lock_path(checkpoint), "its lock"),
    ]


def within(path: Path | str, owner: Path | str) -> bool:
    """Whether a path is another one or lies in it: as it is written, through links, or under another name."""
    for spell in (os.path.abspath, os.path.realpath):
        if Path(spell(path)).is_relative_to(spell(owner)):
            return True
    real = Path(os.path.realpath(path))
    return any(_same(each, owner) for each in (real, *real.parents))


def _same(first, second):
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them does not exist
        return os.path.realpath(first) == os.path.realpath(second)
