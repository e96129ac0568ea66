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
from contextlib import ExitStack, suppress
from pathlib import Path

from recbole.config import Config

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage import checkpoints, inter_file
from recbole_unlearn.storage.files import (
    Locked,
    journal_path,
    lock_path,
    locked,
    remove,
    sweep,
    sync_folder,
    write_atomically,
)
from recbole_unlearn.storage.inter_file import NOBODY, Whole
from recbole_unlearn.storage.paths import CHANGED, EMBEDDINGS, UNLEARNED
from recbole_unlearn.storage.triple_log import log_path


def check(
    path: Path | str | None = None,
    inter: Path | None = None,
    config: Config | None = None,
    pairs: Iterable[tuple[str, str]] = (),
    whole: Whole = NOBODY,
) -> None:
    """Raises InputError where `purge` could not delete all that it should; changes nothing.

    Args:
        path: checkpoint; None if it is still to be trained.
        inter, config, pairs, whole: as in `purge`.
    """
    others = inter_file.others(inter, config, whole) if inter and config else {}
    thinned = [inter, *(inter_file.beside(inter, ending) for ending in others)] if inter else []
    files = [*([Path(path), log_path(path), *written_beside(path)] if path else []), *thinned]
    for each in (*files, *(log_path(path).rglob("*") if path else ())):
        if each.is_symlink() or (each.is_file() and each.stat().st_nlink > 1):
            raise InputError(
                f"purge would leave the content of {each}, which has another name too; remove the link first"
            )
    for each in files:
        if not os.access(each.absolute().parent, os.W_OK):
            raise InputError(f"purge cannot delete {each}: its folder is read-only; make it writable")
    if path:
        for other in Path(path).parent.glob(f"{glob.escape(Path(path).stem)}.*"):
            if other != Path(path) and log_path(other) == log_path(path) and zipfile.is_zipfile(other):
                raise InputError(
                    f"purge would delete the log of {other} too; move that checkpoint elsewhere, with a copy"
                )
    for file in thinned:
        if lock_path(file).exists():
            with locked(file):  # whoever holds it now may hold it then
                pass
        if shutil.disk_usage(file.parent).free < file.stat().st_size:
            raise InputError(f"purge_dataset needs room for a second {file}; free {file.stat().st_size} bytes there")
    if inter:
        inter_file.check(inter, config, pairs, whole)


def purge(
    path: Path | str,
    inter: Path | None = None,
    config: Config | None = None,
    pairs: Iterable[tuple[str, str]] = (),
    whole: Whole = NOBODY,
) -> None:
    """Delete a checkpoint and its log; killed at any moment, `recover` finishes it.

    Args:
        path: checkpoint.
        inter: RecBole's interactions file that the lines of ``pairs`` leave first.
        config: configuration that ``inter`` was read with.
        pairs: what was forgotten.
        whole: tokens of users and items whose lines leave it too, and the files beside it.
    """
    journal: dict = {"inter": None}
    if inter:
        inter = inter.resolve()
        journal = {"inter": str(inter), "format": inter_file.reading(config, whole), "pairs": sorted(set(pairs))}
        journal["others"] = {
            ending: {"format": form, "seal": inter_file.seal(inter_file.beside(inter, ending))}
            for ending, form in inter_file.others(inter, config, whole).items()
        }
        journal["seal"] = inter_file.seal(inter)
    write_atomically(journal_path(path), json.dumps(journal).encode())
    try:
        with ExitStack() as held:
            thinnings = list(_thinnings(journal))
            # all before the first changes; two requests must not undo each other's removal
            for file, _, _ in thinnings:
                held.enter_context(locked(file))
            for file, entry, _ in thinnings:
                if inter_file.seal(file) != entry["seal"]:
                    entry["seal"] = inter_file.seal(file)
                    write_atomically(journal_path(path), json.dumps(journal).encode())
            for file, entry, of in thinnings:
                inter_file.remove_pairs(file, entry["format"], of)
        _erase(Path(path))
    except Locked:
        journal_path(path).unlink()
        raise


def _thinnings(journal):
    """(file, its entry with format and seal, pairs to remove) of each file that is to lose lines, ``.inter`` last."""
    if journal["inter"] is None:
        return
    inter = Path(journal["inter"])
    for ending, entry in journal.get("others", {}).items():
        yield inter_file.beside(inter, ending), entry, []
    yield inter, journal, journal["pairs"]


def pending(path: Path | str) -> bool:
    """Whether a purge of this checkpoint was begun and not finished."""
    return Path(path).name not in ("", "..") and journal_path(path).is_file()


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


def _finish(path):
    """Finish what a killed process's journal says, if it is one."""
    file = journal_path(path)
    if path.is_dir() or path.is_symlink():
        raise InputError(f"{file} would purge {path}, which is no checkpoint file; delete {file.name}")
    journal = _read(file)
    for inter, entry, pairs in _thinnings(journal):
        if inter.is_file() and inter_file.seal(inter) == entry["seal"]:
            with locked(inter):
                inter_file.remove_pairs(inter, entry["format"], pairs)
        elif inter.is_file() and inter_file.names_any(inter, entry["format"], pairs):
            raise InputError(
                f"{file} would remove lines from {inter}, which is not as it was when a purge began here; delete "
                f"{file.name}, and if that purge was yours, ask for it again"
            )
        elif lock_path(inter).exists():
            with locked(inter):  # takes a killed process's lock away
                pass
    _erase(path)


def _read(file):
    """A journal, checked to be of the form that `purge` writes."""
    try:
        journal = json.loads(file.read_text("utf-8"))
        inter = journal["inter"]
        if inter is not None:
            journal["pairs"] = [(user, item) for user, item in journal["pairs"]]
            texts = [inter, *itertools.chain(*journal["pairs"])]
            if not (all(isinstance(text, str) for text in texts) and len(journal["format"]["fields"]) == 2):
                raise ValueError("other types than in a journal")
            _check_form(journal["format"])
            for ending, entry in journal.setdefault("others", {}).items():
                if ending not in inter_file.OTHERS:
                    raise ValueError("names a file that is none of a data set's")
                _check_form(entry["format"])
                entry["seal"]
            if Path(inter).suffix != ".inter" or "\0" in inter:
                raise ValueError("names no .inter file")
            journal["seal"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is no purge journal ({' '.join(str(error).split())}); delete it") from None
    return journal


def _check_form(form):
    """Raises ValueError or the like where a form is not as `inter_file` makes it."""
    codecs.lookup(form["encoding"])
    whole = form.get("whole", {})
    texts = [form["encoding"], form["separator"], *form["fields"], *whole, *itertools.chain(*whole.values())]
    fit = all(isinstance(tokens, list) for tokens in whole.values()) and set(whole) <= set(form["fields"])
    if not (fit and all(isinstance(text, str) for text in texts) and form["fields"] and form["separator"]):
        raise ValueError("other types than in a journal")


def written_beside(path: Path | str) -> list[Path]:
    """What a run wrote beside a new model of it that tells of its weights, and names users and items."""
    folder = Path(path).parent
    if Path(path).name != UNLEARNED:  # beside another name lies what is a user's own, or a newer model's
        return []
    vectors = [folder / EMBEDDINGS / f"{field}s.{ending}" for field in ("user", "item") for ending in ("npy", "csv")]
    return [each for each in (folder / CHANGED, *vectors) if each.exists()]


def _erase(path):
    """Delete a checkpoint, its log, and what a run wrote beside it, last of all the journal."""
    log, beside = log_path(path), written_beside(path)
    # the checkpoint first: a log alone can serve nobody; then what names interactions, unless it lies elsewhere
    for each in (path, *([] if log.is_symlink() else [log / "users.npy", log / "items.npy"]), log):
        remove(each)
    for each in beside:
        remove(each)
    with suppress(OSError):  # there is none, or something of the user's own in it
        (path.parent / EMBEDDINGS).rmdir()
    checkpoints.settle(path)
    sync_folder(path.parent)
    journal_path(path).unlink()
    sync_folder(path.parent)
