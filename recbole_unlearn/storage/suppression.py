"""The suppression list: who and what was forgotten, as keyed hashes, so that later trainings refuse it.

Without the key, which lies beside the list, nobody can try who is on it. To take what was brought back out of a file:

    python -m recbole_unlearn.storage.suppression remove LIST FILE.inter
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage import inter_file, secret
from recbole_unlearn.storage.files import locked, read_text, replacing, write_atomically

KINDS = ("user", "item", "pair")
ITSELF = "python -m recbole_unlearn.storage.suppression"


def read(path: Path | str) -> dict[str, set[str]]:
    """Hashes of a list by kind; empty ones where there is no list yet.

    Raises:
        InputError: it cannot be read, or is none.
    """
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    try:
        for line in read_text(path).splitlines():
            entry = json.loads(line)
            if not re.fullmatch("[0-9a-f]{64}", entry["hash"]):
                raise ValueError("no hash")
            found[entry["of"]].add(entry["hash"])
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"cannot read suppression list {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no suppression list, or damaged; put it back") from None
    return found


def add(path: Path | str, forgotten: Iterable[tuple[str, ...]]) -> None:
    """Put users, items and pairs on a list: of each its kind, and its token or two."""
    path = Path(path)
    with locked(path):
        known, key = read(path), secret.made(secret.key_path(path))
        for kind, *tokens in forgotten:
            known[kind].add(_hash(key, kind, *tokens))
        lines = [json.dumps({"of": kind, "hash": each}) for kind in KINDS for each in sorted(known[kind])]
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def lists(path: Path | str, kind: str, tokens: Iterable[str]) -> bool:
    """Whether a list names a user, an item or a pair; not what follows from others that it names."""
    known = read(path)[kind]
    return bool(known) and _hash(secret.read(secret.key_path(Path(path))), kind, *tokens) in known


def suppressed(path: Path | str, users: Iterable[str], items: Iterable[str]) -> np.ndarray:
    """Which interactions, given as tokens of users and items, a list names: bool ``[interactions]``."""
    known, users, items = read(path), list(map(str, users)), list(map(str, items))
    if not any(known.values()):
        return np.zeros(len(users), bool)
    key = secret.read(secret.key_path(Path(path)))
    gone = {}
    for kind, tokens in (("user", users), ("item", items)):
        gone[kind] = {token for token in set(tokens) if known[kind] and _hash(key, kind, token) in known[kind]}
    return np.array([
        user in gone["user"]
        or item in gone["item"]
        or (len(known["pair"]) > 0 and _hash(key, "pair", user, item) in known["pair"])
        for user, item in zip(users, items, strict=True)
    ])  # fmt: skip


def check(path: Path | str, users: Iterable[str], items: Iterable[str], instead: str | None = None) -> None:
    """Raises InputError where a training on interactions, given as `suppressed` takes them, would bring some back.

    Args:
        instead: what to do; default: take them out of the file.
    """
    found = suppressed(path, users, items)
    if found.any():
        instead = instead or f"take them out of the data: {ITSELF} remove {path} FILE.inter"
        raise InputError(
            f"{found.sum()} of {len(found)} training interactions bring back what {path} says was forgotten; {instead}"
        )


def _hash(key, *texts):
    return secret.keyed(key, json.dumps(texts))


def remove(path: Path | str, inter: Path | str, form: dict) -> int:
    """Take out of an ``.inter`` file, atomically, the lines that a list names; how many. All else stays.

    Raises:
        InputError: RecBole reads otherwise than line by line what is to go, as in `inter_file.check`.
    """
    inter = Path(inter)
    with locked(inter):
        records = list(inter_file.records(inter, form))
        pairs = sorted({pair for own, record in records for pair in (*own, record) if pair})
        gone = set(compress(pairs, suppressed(path, *zip(*pairs, strict=True)))) if pairs else set()
        if torn := sum(not gone.isdisjoint((*own, record)) for own, record in records if own != [record]):
            raise InputError(
                f"{inter} does not name what {path} lists in {torn} lines as RecBole reads them (quoted fields?); edit "
                "it yourself"
            )
        lines = list(inter_file.lines(inter, form))
        kept = [line for line, pair in lines if pair not in gone]
        with replacing(inter, keep_mode=True) as f:
            f.writelines(kept)
    return len(lines) - len(kept)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=ITSELF, description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="remove")
    command = commands.add_parser("remove", help="take what was brought back out of an .inter file")
    command.add_argument("list", help="suppression list, its key beside it")
    command.add_argument("file", help=".inter file")
    for name, default in (("separator", "\t"), ("encoding", "utf-8"), ("user", "user_id"), ("item", "item_id")):
        command.add_argument(f"--{name}", default=default, help=f"of the file (default: {default!r})")
    args = parser.parse_args(argv)
    form = {"separator": args.separator, "encoding": args.encoding, "fields": [args.user, args.item]}
    try:
        if not Path(args.list).exists():
            raise InputError(f"suppression list {args.list} does not exist")
        print(f"{args.file}: {remove(args.list, args.file, form)} lines removed")
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
