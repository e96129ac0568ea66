"""Deleting what still holds the forgotten: the original checkpoint, its log and, if asked, lines of the data set.

Several files cannot be deleted at one moment. A journal beside the checkpoint (``.NAME.purge``) makes it one: before it
is written, the original is whole; once it is, the original is gone, and whoever comes next finishes the deletion.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from recbole_unlearn import checkpoint as checkpoints
from recbole_unlearn.data import inter_file
from recbole_unlearn.data.triple_log import log_path
from recbole_unlearn.files import Locked, locked, remove, sweep, sync_folder, write_atomically
from recbole_unlearn.input_error import InputError


def check(path=None, inter=None, config=None, pairs=()):
    """Raises InputError where `purge` could not delete all that it should; changes nothing.

    Args:
        path (optional): checkpoint; None if it is still to be trained.
        inter, config, pairs (optional): as in `purge`.
    """
    for each in (*([Path(path), log_path(path)] if path else []), *([inter] if inter else [])):
        if each.is_symlink() or (each.is_file() and each.stat().st_nlink > 1):
            raise InputError(
                f"purge would leave the content of {each}, which has another name too; remove the link first"
            )
        if not os.access(each.absolute().parent, os.W_OK):
            raise InputError(f"purge cannot delete {each}: its folder is read-only; make it writable")
    if inter:
        if shutil.disk_usage(inter.parent).free < inter.stat().st_size:
            raise InputError(f"purge_dataset needs room for a second {inter}; free {inter.stat().st_size} bytes there")
        inter_file.check(inter, config, pairs)


def purge(path, inter=None, config=None, pairs=()):
    """Delete a checkpoint and its log; killed at any moment, `recover` finishes it.

    Args:
        path: checkpoint.
        inter (Path, optional): RecBole's interactions file that the lines of ``pairs`` leave first.
        config (optional): configuration that ``inter`` was read with.
        pairs (list of (user token, item token)): what was forgotten.
    """
    journal = {"inter": None}
    if inter:
        journal = {"inter": str(inter.resolve()), "format": inter_file.reading(config), "pairs": sorted(set(pairs))}
    write_atomically(_journal(path), json.dumps(journal).encode())
    _finish(Path(path))


def pending(path):
    """Whether a purge of this checkpoint was begun and not finished."""
    return bool(Path(path).name) and _journal(path).is_file()


def recover(path):
    """Bring a checkpoint that a killed process was working on to its old state or its new one, and tidy up.

    Call it holding the checkpoint's lock. It need not exist.

    Returns:
        bool: whether a purge was finished, that is, the checkpoint is gone now.
    """
    path = Path(path)
    sweep(log_path(path))
    purged = pending(path)
    if purged:
        _finish(path)
    tidy(path.parent)
    if checkpoints.unsettled(path):
        checkpoints.settle(path, checkpoints.read(path) if path.is_file() else None)
    return purged


def tidy(folder):
    """Finish the purges that killed processes left unfinished in a folder, and delete what they left lying about."""
    try:
        sweep(folder)
        for left in sorted([*Path(folder).glob(".*.purge"), *Path(folder).glob(".*.pth.lock")]):
            path = left.with_name(left.name[1:].rpartition(".")[0])
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
    file = _journal(path)
    try:
        journal = json.loads(file.read_text("utf-8"))
        inter, pairs = journal["inter"], [tuple(pair) for pair in journal.get("pairs", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no purge journal ({error}); delete it") from None
    if inter and Path(inter).exists():
        inter_file.remove_pairs(Path(inter), journal["format"], pairs)
    # the checkpoint first: a log alone can serve nobody; then what names interactions
    for each in (path, log_path(path) / "users.npy", log_path(path) / "items.npy", log_path(path)):
        remove(each)
    checkpoints.settle(path)
    sync_folder(path.parent)
    file.unlink()
    sync_folder(path.parent)
