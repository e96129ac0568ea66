"""The operator's key: with it, checksums of what personal data led to are such that nobody else can try candidates."""

import hmac
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage.files import read_whole, sweep, sync_folder, temporary_path


def key_path(trail: Path, named: str | Path | None = None) -> Path:
    """Where the key of an audit file lies: beside it, unless another place is named."""
    return Path(named) if named else Path(f"{trail}.key")


def read(path: Path) -> bytes:
    """The key of a file. InputError where there is none."""
    try:
        text = read_whole(path, 1 << 10).decode("ascii").strip()
    except FileNotFoundError:
        raise InputError(f"key {path} does not exist; put it back") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read key {path}: {' '.join(str(error).split())}") from None
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise InputError(f"key {path} is damaged, or no key of ours: it holds no 64 hexadecimal digits; put it back")
    return bytes.fromhex(text)


def made(path: Path) -> bytes:
    """The key of a file, which is made where it is not there: readable by its owner alone, and whole at any moment."""
    sweep(path.parent)
    if path.exists():
        return read(path)
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
            f.write(secrets.token_hex(32).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)  # unlike a renaming, never over one that another process has made
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return read(path)


def keyed(key: bytes, text: str) -> str:
    """HMAC-SHA256 of a text, in hexadecimal digits."""
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def name_of(key: bytes) -> str:
    """What tells a key from others, and nothing else about it."""
    return keyed(key, "recbole_unlearn key")[:16]
