"""Deleting what still holds the forgotten: the original checkpoint, its log and, if asked, lines of the data set.

Several files cannot be deleted at one moment. A journal beside the checkpoint (``.NAME.purge``) makes it one: before it
is written, the original is whole; once it is, the original is gone, and whoever comes next finishes the deletion.

A journal may also come with a folder from elsewhere. It deletes nothing outside its own folder but lines of an
interactions file that it was written for on this machine: that file's seal, which nobody else can know, tells.
"""

import codecs
import glob
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from recbole.config import Config

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage import checkpoints, inter_file
from recbole_unlearn.storage.files import Locked, locked, remove, sweep, sync_folder, write_atomically
from recbole_unlearn.storage.triple_log import log_path


def check(
    path: Path | str | None = None,
    inter: Path | None = None,
    config: Config | None = None,
    pairs: Iterable[tuple[str, str]] = (),
) -> None:
    """Raises InputError where `purge` could not delete all that it should; changes nothing.

    Args:
        path: checkpoint; None if it is still to be trained.
        inter, config, pairs: as in `purge`.
    """
    for each in (*([Path(path), log_path(path)] if path else []), *([inter] if inter else [])):
        if each.is_symlink() or (each.is_file() and each.stat().st_nlink > 1):
            raise InputError(
                f"purge would leave the content of {each}, which has another name too; remove the link first"
            )
        if not os.access(each.absolute().parent, os.W_OK):
            raise InputError(f"purge cannot delete {each}: its folder is read-only; make it writable")
    if path:
        for file in log_path(path).rglob("*"):
            if file.is_symlink() or (file.is_file() and file.stat().st_nlink > 1):
                raise InputError(
                    f"purge would leave the content of {file}, which has another name too; remove the link"
                )
        for other in Path(path).parent.glob(f"{glob.escape(Path(path).stem)}.*"):
            if other != Path(path) and log_path(other) == log_path(path) and zipfile.is_zipfile(other):
                raise InputError(
                    f"purge would delete the log of {other} too; move that checkpoint elsewhere, with a copy"
                )
    if inter:
        if inter.with_name(f".{inter.name}.lock").exists():
            with locked(inter):  # whoever holds it now may hold it then
                pass
        if shutil.disk_usage(inter.parent).free < inter.stat().st_size:
            raise InputError(f"purge_dataset needs room for a second {inter}; free {inter.stat().st_size} bytes there")
        inter_file.check(inter, config, pairs)


def purge(
    path: Path | str, inter: Path | None = None, config: Config | None = None, pairs: Iterable[tuple[str, str]] = ()
) -> None:
    """Delete a checkpoint and its log; killed at any moment, `recover` finishes it.

    Args:
        path: checkpoint.
        inter: RecBole's interactions file that the lines of ``pairs`` leave first.
        config: configuration that ``inter`` was read with.
        pairs: what was forgotten.
    """
    journal: dict = {"inter": None}
    if inter:
        inter = inter.resolve()
        journal = {"inter": str(inter), "format": inter_file.reading(config), "pairs": sorted(set(pairs))}
        journal["seal"] = inter_file.seal(inter)
    write_atomically(_journal(path), json.dumps(journal).encode())
    try:
        if inter:
            with locked(inter):  # two requests must not undo each other's removal
                if inter_file.seal(inter) != journal["seal"]:
                    journal["seal"] = inter_file.seal(inter)
                    write_atomically(_journal(path), json.dumps(journal).encode())
                inter_file.remove_pairs(inter, journal["format"], journal["pairs"])
        _erase(Path(path))
    except Locked:
        _journal(path).unlink()
        raise


def pending(path: Path | str) -> bool:
    """Whether a purge of this checkpoint was begun and not finished."""
    return Path(path).name not in ("", "..") and _journal(path).is_file()


def recover(path: Path | str) -> bool:
    """Bring a checkpoint that a killed process was working on to its old state or its new one, and tidy up.

    Call it holding the checkpoint's lock. It need not exist.

    Returns:
        Whether a purge was finished, that is, the checkpoint is gone now.
    """
    path = Path(path)
    if not log_path(path).is_symlink():
        sweep(log_path(path))
    purged = pending(path)
    if purged:
        _finish(path)
    tidy(path.parent)
    if checkpoints.unsettled(path):
        checkpoints.settle(path, checkpoints.read(path) if path.is_file() else None)
    return purged


def tidy(folder: Path | str) -> None:
    """Finish the purges that killed processes left unfinished in a folder, and delete what they left lying about."""
    try:
        sweep(folder)
        for left in sorted([*Path(folder).glob(".*.purge"), *Path(folder).glob(".*.pth.lock")]):
            name = left.name[1:].rpartition(".")[0]
            if name in ("", ".", ".."):
                continue
            path = left.with_name(name)
            with suppress(Locked), locked(path):  # if it is locked, its purge is going on
                if pending(path):
                    _finish(path)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}"
        raise InputError(
            f"cannot tidy up after a killed process ({what}); give rights, or make room, in {folder}"
        ) from error


def _journal(path):
    path = Path(path)
    return path.with_name(f".{path.name}.purge")


def _finish(path):
    """Finish what a killed process's journal says, if it is one."""
    file = _journal(path)
    if path.is_dir() or path.is_symlink():
        raise InputError(f"{file} would purge {path}, which is no checkpoint file; delete {file.name}")
    journal = _read(file)
    inter = Path(journal["inter"]) if journal["inter"] is not None else None
    sealed = inter is not None and inter.is_file() and inter_file.seal(inter) == journal["seal"]
    if inter is not None and sealed:
        with locked(inter):
            inter_file.remove_pairs(inter, journal["format"], journal["pairs"])
    elif inter is not None and inter.is_file() and inter_file.names_any(inter, journal["format"], journal["pairs"]):
        raise InputError(
            f"{file} would remove lines from {inter}, which is not as it was when a purge began here; delete "
            f"{file.name}, and if that purge was yours, ask for it again"
        )
    elif inter is not None and inter.with_name(f".{inter.name}.lock").exists():
        with locked(inter):  # takes a killed process's lock away
            pass
    _erase(path)


def _read(file):
    """A journal, checked to be of the form that `purge` writes."""
    try:
        journal = json.loads(file.read_text("utf-8"))
        inter = journal["inter"]
        if inter is not None:
            form = journal["format"]
            codecs.lookup(form["encoding"])
            journal["pairs"] = [(user, item) for user, item in journal["pairs"]]
            texts = [inter, form["encoding"], form["separator"], *form["fields"], *itertools.chain(*journal["pairs"])]
            if not (all(isinstance(text, str) for text in texts) and len(form["fields"]) == 2 and form["separator"]):
                raise ValueError("other types than in a journal")
            if Path(inter).suffix != ".inter" or "\0" in inter:
                raise ValueError("names no .inter file")
            journal["seal"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is no purge journal ({' '.join(str(error).split())}); delete it") from None
    return journal


def _erase(path):
    """Delete a checkpoint and its log, last of all the journal."""
    log = log_path(path)
    # the checkpoint first: a log alone can serve nobody; then what names interactions, unless it lies elsewhere
    for each in (path, *([] if log.is_symlink() else [log / "users.npy", log / "items.npy"]), log):
        remove(each)
    checkpoints.settle(path)
    sync_folder(path.parent)
    _journal(path).unlink()
    sync_folder(path.parent)
