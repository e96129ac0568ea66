"""Columns of RecBole's atomic files that the data set need not have loaded: what training sees stays as it is."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from recbole.data.dataset import Dataset

from recbole_unlearn.errors import InputError


def _paths(data, ending):
    names = [data.dataset_name]
    if ending == "inter" and data.benchmark_filename_list:
        names = [f"{data.dataset_name}.{part}" for part in data.benchmark_filename_list]
    return [Path(data.dataset_path) / f"{name}.{ending}" for name in names]


def file_exists(data: Dataset, ending: str) -> bool:
    """Whether a data set has a file of this ending."""
    return _paths(data, ending)[0].exists()


def column_types(data: Dataset, ending: str) -> dict[str, str]:
    """Field -> type ('token', 'token_seq', 'float', 'float_seq') of a data set's file of this ending.

    Raises:
        InputError: no such file, or one without a header of ``field:type``.
    """
    path = _paths(data, ending)[0]
    try:
        with open(path, encoding=data.config["encoding"]) as file:
            names = file.readline().rstrip("\r\n").split(data.config["field_separator"])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the .{ending} file of data set {data.dataset_name!r}: {error}") from None
    if not all(name.count(":") == 1 for name in names):
        raise InputError(f"{path}: the first line must name the columns as field:type")
    return dict(name.split(":") for name in names)


def read_columns(data: Dataset, ending: str, fields: Sequence[str]) -> pd.DataFrame:
    """Some columns of the file, or of all its benchmark parts, as text, ``[lines, fields]``."""
    types = column_types(data, ending)
    columns = {f"{field}:{types[field]}": field for field in fields}
    # index_col: else pandas takes the first column for an index where lines are longer than the header, and shifts all
    options = {"sep": data.config["field_separator"], "encoding": data.config["encoding"], "index_col": False}
    options |= {"dtype": str, "keep_default_na": False}
    try:
        parts = [pd.read_csv(path, usecols=list(columns), **options) for path in _paths(data, ending)]
    except (OSError, ValueError) as error:  # pandas' ParserError is a ValueError
        what = f"cannot read the .{ending} file of data set {data.dataset_name!r}"
        raise InputError(f"{what}: {' '.join(str(error).split())}") from None
    return pd.concat(parts, ignore_index=True).rename(columns=columns)
