"""Reading by pandas' C engine gives the table that RecBole's call gives, to the last bit, or leaves it to that call."""

import codecs

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_unlearn.data import reading

HEAD = ["user_id:token", "item_id:token", "rating:float", "tags:token_seq"]
KINDS = dict(zip(HEAD, (str, str, np.float64, str), strict=True))


def call(path, delimiter="\t", encoding="utf-8", columns=HEAD):
    """The options of RecBole's ``Dataset._load_feat``."""
    kinds = {name: KINDS.get(name, str) for name in columns}
    return {"delimiter": delimiter, "usecols": columns, "dtype": kinds, "encoding": encoding, "engine": "python"}


def both(path, **changes):
    """(table or error of RecBole's call, ours, whether the C engine gave ours)."""
    options = call(path, **changes)
    found = []
    for read in (pd.read_csv, reading.read_csv):
        try:
            found.append(read(path, **options))
        except Exception as error:  # whatever pandas raises, ours must raise
            found.append(error)
    return *found, reading.quick(path, **options) is not None


def assert_same(stock, ours):
    if isinstance(stock, Exception):
        assert type(ours) is type(stock) and str(ours) == str(stock)
        return
    pd.testing.assert_frame_equal(ours, stock, check_exact=True)
    for name in stock:
        if stock[name].dtype == np.float64:  # the sign of zero too
            np.testing.assert_array_equal(ours[name].to_numpy().view(np.int64), stock[name].to_numpy().view(np.int64))


def write(path, lines, head=HEAD, end="\n"):
    path.write_bytes((end.join(["\t".join(head), *lines]) + end).encode())
    return path


PLAIN = [
    ("u1\ti1\t5\ta b", "u2\ti2\t3.5\t", "u1\ti2\t\tc"),
    ("007\t1e3\t1\tx", "7\t1000\t2\tNaN", "NA\tnull\t3\tNone"),
    ("u\ti\t4.35\tx", "u\ti\t0.1\t", "u\ti\t1e-300\t", "u\ti\t-0.0\t", "u\ti\t123456789.987654321\t"),
    ("u\ti\t978300760\tx", "u\ti\t978302109\t"),
    ("ü\té✓\t1\t日本", "'a\tb'\t2\t#c"),
    ("u\ti\tnan\tx", "u\ti\tNULL\tx", "u\ti\t2\t"),
    ("u \ti i\t1 \ta", "u\t i\t2\tb"),
]


@pytest.mark.parametrize("lines", PLAIN)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain_files_are_read_by_the_c_engine(tmp_path, lines, end):
    stock, ours, quick = both(write(tmp_path / "x.inter", lines, end=end))
    assert quick
    assert_same(stock, ours)


UNUSUAL = {
    "quotes": ['"u\t1"\ti1\t5\ta', "u2\ti2\t3\tb"],
    "a quote in a token": ['u"1\ti1\t5\ta'],
    "an open quote": ["u1\ti1\t5\ta", '"u2\ti2\t4\tb'],
    "a blank before a line": [" u1\ti1\t5\ta", "u2\ti2\t4\tb"],
    "a carriage return in a line": ["u\r1\ti1\t5\ta"],
    "a NUL": ["u\0\ti1\t5\ta"],
    "first line longer than the header": ["u1\ti1\t5\ta\tmore", "u2\ti2\t4\tb"],
    "a longer line after blank ones": ["", "", "u1\ti1\t5\ta\tmore"],
    "first line shorter than the header": ["u1\ti1", "u2\ti2\t4\tb"],
    "words for numbers": ["u1\ti1\tfive\ta"],
    "truth for numbers": ["u1\ti1\tTrue\ta", "u1\ti1\tFalse\ta"],
    "whole numbers beyond floats, among others": ["u\ti\t1700000000123456789\ta", "u\ti\t0.5\ta"],
    "infinity": ["u\ti\tinf\ta", "u\ti\t-Infinity\ta"],
    "hexadecimal and underscores": ["u\ti\t0x10\ta", "u\ti\t1_000\ta"],
    "no lines": [],
}


@pytest.mark.parametrize("lines", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_files_are_left_to_recboles_call(tmp_path, lines):
    stock, ours, quick = both(write(tmp_path / "x.inter", lines))
    assert not quick
    assert_same(stock, ours)


def test_nanoseconds_are_rounded_as_whole_numbers(tmp_path):
    """The Python engine tells whole numbers first, and rounds them once; read digit by digit they would differ."""
    lines = [f"u\ti\t{1_700_000_000_123_456_789 + 7919 * n}\ta" for n in range(200)]
    stock, ours, quick = both(write(tmp_path / "x.inter", lines))
    assert quick
    assert_same(stock, ours)


def test_later_lines_of_other_lengths(tmp_path):
    lines = ["u\ti\t1\ta", "u\ti\t2\tb", "u\ti", "u\ti\t3\tc\tmore\tmore", "u", "", "u\ti\t4\td"]
    assert_same(*both(write(tmp_path / "x.inter", lines))[:2])
    for columns in (HEAD[:2], HEAD[2:], [HEAD[0], HEAD[2]]):
        assert_same(*both(tmp_path / "x.inter", columns=columns)[:2])


@pytest.mark.parametrize("delimiter", [",", "|", ";", " ", "::", r"\s+", '"', "\\"])
def test_separators(tmp_path, delimiter):
    path = tmp_path / "x.inter"
    text = "\n".join([*("\t".join(HEAD), "u1\ti1\t5\ta", "u2\ti2\t3.5\tb"), ""])
    path.write_text(text.replace("\t", "  " if delimiter == r"\s+" else delimiter))
    stock, ours, quick = both(path, delimiter=delimiter)
    assert quick == (delimiter in ",|;\\")
    assert_same(stock, ours)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", None, "latin-1", "utf-16", "no such"])
def test_encodings(tmp_path, encoding):
    path = tmp_path / "x.inter"
    text = "\n".join(["\t".join(HEAD), "ü1\té\t5\ta", "u2\ti2\t3.5\tb", ""])
    path.write_bytes(text.encode("utf-8" if encoding in (None, "no such") else encoding))
    stock, ours, quick = both(path, encoding=encoding)
    assert quick == (encoding in ("utf-8", "UTF8", None))
    assert_same(stock, ours)


def test_wrong_encoding_and_byte_order_mark(tmp_path):
    path = tmp_path / "x.inter"
    path.write_bytes("\n".join(["\t".join(HEAD), "ü\ti\t5\ta", ""]).encode("latin-1"))
    assert_same(*both(path)[:2])
    path.write_bytes(codecs.BOM_UTF8 + "\n".join(["\t".join(HEAD), "u\ti\t5\ta", ""]).encode())
    stock, ours, quick = both(path)
    assert not quick
    assert_same(stock, ours)


def test_pieces_end_with_lines(tmp_path, monkeypatch):
    """What is looked for lies across the borders of the pieces that a file is looked through in."""
    path = write(tmp_path / "x.inter", ["u1\ti1\t5\ta", "u2\ti2\t5\ta", " u3\ti3\t5\ta"], end="\r\n")
    for size in range(1, path.stat().st_size + 2):
        monkeypatch.setattr(reading, "PIECE", size)
        assert reading.quick(path, **call(path)) is None
    write(path, ["u1\ti1\t5\ta", "u2\ti2\t5\ta", "u3\ti3\t5\ta"], end="\r\n")
    for size in range(1, path.stat().st_size + 2):
        monkeypatch.setattr(reading, "PIECE", size)
        assert reading.quick(path, **call(path)) is not None


CELL = st.one_of(
    st.sampled_from(
        ["", " ", "NA", "nan", "null", "1", "01", "-0", "1.50", "1e5", ".5", "5.", "+3", "1e400", "x y", "'"]
    ),
    st.floats(allow_nan=False).map(repr),
    st.integers(-(2**70), 2**70).map(str),
    st.text("ab \"'\\#,.-\r\0é✓\u2028\x1f", max_size=4),
)


@settings(max_examples=400, deadline=None)
@given(
    lines=st.lists(st.lists(CELL, min_size=1, max_size=5).map("\t".join), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    columns=st.sets(st.sampled_from(HEAD), min_size=1).map(sorted),
)
def test_any_file_is_read_alike(tmp_path_factory, lines, end, columns):
    path = write(tmp_path_factory.mktemp("fuzz") / "x.inter", lines, end=end)
    assert_same(*both(path, columns=[name for name in HEAD if name in columns])[:2])


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.one_of(st.floats(0, 1e10).map(repr), st.integers(0, 10**10).map(str)), min_size=1, max_size=30)
)
def test_numbers_are_read_to_the_last_bit(tmp_path_factory, numbers):
    path = write(tmp_path_factory.mktemp("fuzz") / "x.inter", [f"u{n}\ti\t{x}\ta" for n, x in enumerate(numbers)])
    stock, ours, quick = both(path)
    assert quick
    assert_same(stock, ours)
