"""Histories that RecBole writes into the rows of a sequential data set."""

from recbole.data.dataset import SequentialDataset

ENDS = "_list_field"  # of the attributes in which RecBole keeps the names of its columns of histories


def history_columns(data: SequentialDataset) -> dict[str, str]:
    """Columns of histories: what they hold -> name; also of columns that ``unused_col`` drops when data are split."""
    named = {name.removesuffix(ENDS): column for name, column in vars(data).items() if name.endswith(ENDS)}
    return {name: column for name, column in named.items() if column in data.inter_feat.interaction}
