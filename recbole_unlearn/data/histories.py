"""Histories that RecBole writes into the rows of a sequential data set."""

from recbole.data.dataset import Dataset

ENDS = "_list_field"  # of the attributes in which RecBole keeps the names of its columns of histories


def history_columns(data: Dataset) -> dict[str, str]:
    """Columns of histories: what they hold -> name; also of columns that ``unused_col`` drops when data are split.

    Of a data set without histories none.
    """
    named = {name.removesuffix(ENDS): column for name, column in vars(data).items() if name.endswith(ENDS)}
    return {name: column for name, column in named.items() if column in data.inter_feat.interaction}
