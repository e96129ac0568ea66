"""Files of deletion requests."""

import csv
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from recbole_unlearn.data.tokens import ids
from recbole_unlearn.errors import InputError
from recbole_unlearn.storage.files import read_text

if TYPE_CHECKING:
    from recbole_unlearn.data.split import Split


def read(path: Path | str) -> pd.DataFrame:
    """Requests of a CSV file with the columns user, item and, if wanted, time; tokens as in the .inter file.

    They are taken as they stand: spaces after a comma aside, and those only outside quotes.

    An empty item means all interactions of the user, an empty user all of the item.

    Returns:
        Columns of text ``user``, ``item`` and a column ``time``, in order of time (else of lines).
    """
    try:
        text = io.StringIO(read_text(path), newline="")  # csv knows the ends of lines; str.splitlines has others too
        lines = list(csv.reader(text, strict=True, skipinitialspace=True))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"cannot read requests {path}: {' '.join(str(error).split())}") from None
    header = [name.strip() for name in lines[0]] if lines else []
    if header not in (["user", "item"], ["user", "item", "time"]):
        raise InputError(
            f"requests {path} must start with the line user,item or user,item,time; got {','.join(header)!r}"
        )
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not any(field.strip() for field in line):
            continue
        if len(line) != len(header) or not (line[0] or line[1]):
            raise InputError(
                f"requests {path}, line {number}: expected {','.join(header)}, with a user or an item at least"
            )
        rows.append([number, *line])
    if not rows:
        raise InputError(f"requests {path} holds no request")
    table = pd.DataFrame(rows, columns=["line", *header])
    if "time" not in table:
        table["time"] = np.arange(len(table))
        return table.drop(columns="line")
    times = pd.to_numeric(table["time"], errors="coerce")
    if times.isna().all():
        times = pd.to_datetime(table["time"], errors="coerce", utc=True, format="ISO8601")
    if times.isna().any():
        line = table["line"][times.isna()].iloc[0]
        raise InputError(f"requests {path}, line {line}: time must be a number or an ISO date, the same in every line")
    table["time"] = times
    return table.drop(columns="line").sort_values("time", kind="stable", ignore_index=True)


def batches(table: pd.DataFrame, together: int = 1) -> list[pd.DataFrame]:
    """Requests to serve at once: those of one time, and ``together`` times' worth of them."""
    times = table["time"].ne(table["time"].shift()).cumsum() - 1
    return [group for _, group in table.groupby(times // together)]


def whole(split: "Split", table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Users and items that a request names alone, by ``user`` and ``item``: ids, int64, sorted."""
    alone, _ = tokens(table)
    return {field: np.unique(ids(split, field, named)) for field, named in alone.items()}


def pairs(split: "Split", table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Users and items of the pairs that a request names: ids, int64."""
    _, named = tokens(table)
    return ids(split, "user", [user for user, _ in named]), ids(split, "item", [item for _, item in named])


def tokens(table: pd.DataFrame) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Tokens of users and items that requests name alone, by ``user`` and ``item``, and the pairs that they name."""
    alone = {"user": table["item"] == "", "item": table["user"] == ""}
    pairs = table[~(alone["user"] | alone["item"])]
    named = {field: table.loc[own, field].tolist() for field, own in alone.items()}
    return named, list(zip(pairs["user"], pairs["item"], strict=True))


def without(table: pd.DataFrame, gone: Mapping[str, Collection[Any]]) -> pd.DataFrame:
    """The requests that name none of these: tokens by ``user`` and ``item``, (user token, item token) by ``pair``."""
    nothing = {(token, "") for token in gone.get("user", ())} | {("", token) for token in gone.get("item", ())}
    nothing |= set(gone.get("pair", ()))
    kept = [pair not in nothing for pair in zip(table["user"], table["item"], strict=True)]
    return table[np.array(kept, bool)].reset_index(drop=True)


def rows_of(split: "Split", table: pd.DataFrame) -> list[np.ndarray]:
    """Training rows that each request names, int64; empty for what was never trained on.

    Raises:
        InputError: a token that the data set does not know.
    """
    chosen = {}
    for field in ("user", "item"):
        named = table[field] != ""
        known = ids(split, field, table.loc[named, field].tolist())
        chosen[field] = np.zeros(len(table), np.int64)
        chosen[field][named.to_numpy()] = known
    rows = pd.DataFrame({"user": split.users, "item": split.items})
    of_user, of_item = rows.groupby("user").indices, rows.groupby("item").indices
    none = np.empty(0, np.int64)
    found = []
    for user, item in zip(chosen["user"], chosen["item"], strict=True):
        own = of_user.get(user, none) if user else of_item.get(item, none)
        found.append(own[split.items[own] == item] if user and item else own)
    return found
