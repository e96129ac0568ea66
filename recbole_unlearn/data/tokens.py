"""RecBole tokens, as users write them, to the ids that a split uses. Tokens are text: ``12_34`` is not ``1234``."""

import ast
import difflib
import numbers
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from recbole_unlearn.errors import InputError

if TYPE_CHECKING:
    from recbole_unlearn.data.split import Split

NOBODY = ("", "none", "null", "~")  # texts, in any case, in which a key of tokens names nobody
_PIECE = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[-+.\d][\w.+:-]*)\s*""")
_NUMBER = re.compile(r"[-+.\w:]*\d[-+.\w:]*")  # what YAML or Python may read as a number, and more


class FromNumber(str):
    """A token of which only the number is known that somebody's parser made of it."""


class TakenApart(list):
    """Tokens that one text was read as; ``text`` is that text, which could be a token itself."""

    text: str | None = None

    def without(self, gone: Collection[str]) -> "TakenApart":
        """The others."""
        left = TakenApart(token for token in self if token not in gone)
        left.text = self.text
        return left


def split_list(text: str) -> list[str] | None:
    """Texts of a list as people type it, ``['a', 12_34]``: of quoted ones the content, numbers as they stand.

    Returns:
        list of str, or None where the text is no such list: ``[PAD]`` is a token.
    """
    text = text.strip()
    if not (text[:1] + text[-1:] in ("[]", "()") and len(text) > 1):
        return None
    rest, pieces = text[1:-1], []
    while rest.strip():
        piece = _PIECE.match(rest)
        if not piece or rest[piece.end() : piece.end() + 1] not in ("", ","):
            return None
        pieces.append(piece[1])
        rest = rest[piece.end() + 1 :]
    try:
        return [str(ast.literal_eval(piece)) if piece[0] in "'\"" else piece for piece in pieces]
    except (ValueError, SyntaxError):
        return None


def read_tokens(key: str, value: Any, commas: bool = True) -> TakenApart:
    """Tokens that a key names, as text.

    Args:
        key: the key's name.
        value: text of a token, or of several (a list in brackets, or with commas between); or a list, set or array of
            them.
        commas: whether commas separate.

    Raises:
        InputError: it names nobody, or holds something that is no text and no whole number.
    """
    if isinstance(value, str):
        listed = split_list(value)
        each = listed if listed is not None else value.split(",") if commas else [value]
    elif isinstance(value, (list, tuple, set, frozenset, np.ndarray, pd.Series, pd.Index)):
        each = list(value)
    else:
        each = [value]
    if not each or all(token is None for token in each) or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{key} is empty: it names nobody; name at least one token")
    tokens = TakenApart(_text(key, token) for token in each)
    if isinstance(value, str) and tokens != [value]:
        tokens.text = value
    return tokens


def _text(key, value):
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return FromNumber(int(value))
    raise InputError(f"{key} holds {value!r}, which is no text any more; put the token in quotes, as it is in the data")


def is_known(split: "Split", field: str, token: str) -> bool:
    """Whether a data set has a user (``field='user'``) or item token."""
    return _numbered(split, field).get(token, 0) != 0


def _numbered(split, field):
    """RecBole's own ids of tokens, 0 of its padding."""
    data = split.train._dataset
    return data.field2token_id[data.uid_field if field == "user" else data.iid_field]


def ids(split: "Split", field: str, tokens: Sequence[str]) -> np.ndarray:
    """Ids of user (``field='user'``) or item tokens, int64 ``[tokens]``; InputError for one that the data set lacks."""
    known = {token: i for token, i in _numbered(split, field).items() if i != 0}
    if (text := getattr(tokens, "text", None)) in known:
        raise InputError(f"{text!r} is one {field} token, and could be read as several; give a list: [{text!r}]")
    unknown = [token for token in tokens if token not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        hint, name = nearest(unknown[0], known), split.train._dataset.dataset_name
        raise InputError(f"unknown {field} token {str(unknown[0])!r}{more} in data set {name!r}{hint}")
    _check_unambiguous(field, [token for token in tokens if isinstance(token, FromNumber)], known)
    return np.array([known[token] for token in tokens], dtype=np.int64)


def _check_unambiguous(field, guessed, known):
    """Raises InputError where a number may have been another token: ``0123`` and ``12_34`` are numbers to parsers."""
    if not guessed:
        return
    wanted = {int(token) for token in guessed}
    for token in filter(_NUMBER.fullmatch, known):
        if (same := _as_numbers(token) & wanted) and token != str(number := same.pop()):
            raise InputError(
                f"the {field} token {number} was given as a number, and {field} {token!r} is that number too; put the "
                "token in quotes"
            )


def _as_numbers(token):
    """The whole numbers that YAML and Python read in a token."""
    found = set()
    for read in (yaml.safe_load, ast.literal_eval):
        try:
            value = read(token)
        except (ValueError, SyntaxError, MemoryError, RecursionError, OverflowError, yaml.YAMLError):
            continue
        if isinstance(value, (int, float)) and value == value and abs(value) != float("inf") and value == int(value):
            found.add(int(value))
    return found


def nearest(token: str, known: Iterable[str]) -> str:
    """Text that names the known token most like one that is not known, or nothing."""
    near = difflib.get_close_matches(token, list(known)[:100_000], n=1)
    return f"; did you mean {str(near[0])!r}?" if near and near[0] != token else ""
