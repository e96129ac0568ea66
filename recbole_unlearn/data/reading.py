"""Reads RecBole's atomic files by pandas' C engine instead of its Python engine, where both give the same table."""

import codecs
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

PIECE = 2**24  # bytes looked through at a time
EXACT = 2**53  # whole numbers below are read alike by every way of reading them

stock = pd.read_csv


def read_csv(path: Path | str, **options: Any) -> pd.DataFrame:
    """``pandas.read_csv`` with the options that RecBole's ``Dataset._load_feat`` gives it."""
    table = quick(path, **options) if options.keys() == _OPTIONS else None
    return stock(path, **options) if table is None else table


_OPTIONS = {"delimiter", "usecols", "dtype", "encoding", "engine"}


def quick(path, delimiter, usecols, dtype, encoding, engine):
    """The table, or None where the C engine might give another."""
    if engine != "python" or not _alike(path, delimiter, encoding):
        return None
    texts = {name: kind for name, kind in dtype.items() if kind is str}
    options = {"delimiter": delimiter, "usecols": usecols, "encoding": encoding, "engine": "c", "low_memory": False}
    try:
        table = stock(path, dtype=texts, **options)
    except ValueError:  # pandas' ParserError and wrong encodings too: RecBole shall say it
        return None
    # Numbers are left for the engine to tell whole ones from others, as the Python engine does before it rounds them.
    for name in dtype.keys() - texts:
        column = table[name].to_numpy()
        if dtype[name] is not np.float64 or column.dtype not in (np.int64, np.float64):
            return None
        if column.dtype == np.float64 and (np.abs(column) >= EXACT).any():
            return None
        table[name] = column.astype(np.float64)
    return table


def _alike(path, delimiter, encoding):
    """Whether both engines take the file apart alike: no quotes, no blanks before a line, no missing header."""
    if not (isinstance(delimiter, str) and len(delimiter) == 1 and delimiter.isascii()):
        return False
    if delimiter != "\t" and (delimiter.isspace() or not delimiter.isprintable()) or delimiter == '"':
        return False
    if _codec(encoding or "utf-8") not in ("utf-8", "ascii"):  # pandas' own is UTF-8
        return False
    separator, blanks = delimiter.encode(), {b" ", b"\t"} - {delimiter.encode()}
    with open(path, "rb") as file:
        head = [line.rstrip(b"\r\n").split(separator) for _ in range(3) if (line := file.readline())]
        # a first line that is longer than the header would make an index of the first column
        if any(len(line) != len(head[0]) for line in head) or len(set(head[0])) < len(head[0]):
            return False
        file.seek(0)
        while piece := file.read(PIECE):
            piece += file.readline()
            if b'"' in piece or b"\0" in piece or piece.startswith((codecs.BOM_UTF8, *blanks)):
                return False
            if any(b"\n" + blank in piece for blank in blanks):
                return False
            if b"\r" in piece and piece.count(b"\r") != piece.count(b"\r\n"):
                return False
    return True


def _codec(name):
    try:
        return codecs.lookup(name).name
    except (LookupError, TypeError):
        return None
