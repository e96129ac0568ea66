"""Files that a crash cannot halve: replaced whole, locked while in use, swept after killed processes."""

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from filelock import lock_descriptor

from recbole_unlearn.errors import InputError

WINDOWS = os.name == "nt"
STARTED = time.time()
TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
SCRATCH = f".recbole_unlearn.{platform.node()}."  # other machines, whose processes we cannot see, may share the folder


WAIT = 0.2  # seconds between looks at a lock
MAX_BYTES = 1 << 30  # of a file that a user hands us to be read whole


class Locked(InputError):
    """Another process is working on a file."""


def temporary_path(path: Path | str) -> Path:
    """Name beside ``path`` under which this process builds it; `sweep` knows it by its form."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def lock_path(path: Path | str) -> Path:
    """The file by which `locked` keeps others off ``path``; it is there while somebody does."""
    path = Path(path)
    return path.with_name(f".{path.name}.lock")


def journal_path(path: Path | str) -> Path:
    """The journal of a checkpoint's purge, see `purging`."""
    path = Path(path)
    return path.with_name(f".{path.name}.purge")


def sync_folder(folder: Path | str) -> None:
    """Make renames and deletions in a folder survive a power cut."""
    if WINDOWS:  # which opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path | str, keep_mode: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write that takes the place of ``path`` on leaving: a reader, or a crash, sees old or new.

    Args:
        keep_mode: whether the new file takes over the permissions of the one that it replaces.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep_mode:
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write ``data`` (bytes) so that a reader, or a crash, sees the old file or the new one, never half of it."""
    with replacing(path) as f:
        f.write(data)


def check_regular(path: Path | str) -> None:
    """Raises OSError where a path is there and is no plain file: a device has no end, a pipe waits for ever."""
    mode = os.stat(path).st_mode  # of what a link points to
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no plain file", str(path))


def file_checksum(path: Path | str) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def now() -> str:
    """The time, UTC, in ISO's form."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_whole(path: Path | str, limit: int = MAX_BYTES) -> bytes:
    """Content of a plain file, bytes.

    Raises:
        OSError: it is missing, no plain file, or larger than ``limit`` bytes.
    """
    check_regular(path)
    with open(path, "rb") as f:
        content = f.read(limit + 1)  # what its status says of its size may be wrong: of /proc's files it is 0
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB", str(path))
    return content


def read_text(path: Path | str, limit: int = MAX_BYTES) -> str:
    """As `read_whole`: text in UTF-8, with or without a byte order mark; UnicodeDecodeError for other bytes."""
    return read_whole(path, limit).decode("utf-8-sig")


def remove(path: Path | str) -> None:
    """Delete a file or a folder, if it is there; a link is deleted itself, never what it points to."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path | str) -> None:
    """Delete what killed processes left half built (``.NAME.PID.tmp``)."""
    for entry in _left_behind(folder):
        remove(entry)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder among the system's temporary ones, deleted on leaving; by `sweep_scratch` if we are killed."""
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH, suffix=f".{os.getpid()}.tmp"))
    try:
        yield folder
    finally:
        remove(folder)


def sweep_scratch() -> None:
    """Delete the `scratch_folder`s of killed processes: models and logs may lie in them, forgotten rows included."""
    with suppress(OSError):  # no temporary folder at all: whoever needs one will say so
        for entry in _left_behind(tempfile.gettempdir(), SCRATCH):
            with suppress(OSError):  # another user's, or another process is sweeping too
                remove(entry)


def is_debris(entry: Path) -> bool:
    """Whether a folder's entry is nothing to be kept: a temporary, a lock, a log that never got its checkpoint."""
    return entry.name.startswith(".") and entry.name.endswith((".tmp", ".lock", ".pending"))


def _entries(folder):
    try:
        return list(Path(folder).iterdir())
    except OSError:
        return []


def _left_behind(folder, prefix="."):
    """Entries that processes which no longer run were building."""
    for entry in _entries(folder):
        match = TEMPORARY.fullmatch(entry.name)
        if match and entry.name.startswith(prefix) and not _alive(int(match[1]), entry):
            yield entry


def _alive(pid, entry):
    """Whether the process that built ``entry`` still runs."""
    if pid == os.getpid():  # or did, before us, under the same number, as is usual in containers
        return entry.lstat().st_mtime >= STARTED
    if WINDOWS:  # where signal 0, by which others are asked, is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def locked(path: Path | str, wait: bool = False) -> Iterator[None]:
    """Keep every other process off ``path`` (a checkpoint; it need not exist yet).

    The kernel drops the lock when its process ends, however it ends, so a killed one locks nobody out.

    Args:
        wait: until another process that is working on it has finished.

    Raises:
        Locked: another process is working on it.
    """
    path = Path(path).resolve()
    descriptor, name = _lock(path, wait)
    try:
        yield
    finally:
        if name and not WINDOWS:
            name.unlink(missing_ok=True)  # while it is still locked: see _lock
        if descriptor is not None:
            os.close(descriptor)
        if name and WINDOWS:  # which deletes no open file, ours or the next holder's
            with suppress(OSError):
                name.unlink()


def _lock(path, wait):
    """(descriptor, lock file to delete afterwards or None).

    Not `filelock.FileLock`: it leaves its file there, and cannot lock a checkpoint that may only be read.
    """
    name = lock_path(path)
    while True:
        own = name
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError:  # a folder that we may only read: the checkpoint itself will not be replaced, so lock that
            if WINDOWS or not path.is_file():  # a file that is locked on Windows cannot be read
                return None, None
            descriptor, own = os.open(path, os.O_RDONLY), None
        try:
            free = lock_descriptor(descriptor, blocking=False)
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None, None
        if not free:
            os.close(descriptor)
            if wait:
                time.sleep(WAIT)
                continue
            raise Locked(f"another process is working on {path}; wait until it has finished")
        # the holder before us may have deleted the file between our opening and our locking it
        try:
            if not own or os.path.samestat(os.fstat(descriptor), os.stat(own)):
                return descriptor, own
        except FileNotFoundError:
            pass
        os.close(descriptor)


@contextmanager
def in_one_line(folder, other="output_dir"):
    """Say in one line what the system refused: a full disk, a read-only folder. ``other``: what to name instead."""
    existed = folder.exists()
    try:
        yield
    except (OSError, InputError) as error:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if isinstance(error, InputError):
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        raise InputError(
            f"cannot write to {folder} ({what}); make room, give rights or name another {other}"
        ) from error
