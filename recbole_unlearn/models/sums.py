"""RecBole's models that score an item by a sum of embeddings and the item's: see `influence.summed_training`.

These classes alone: one derived may score otherwise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.sequential_recommender import FPMC, TransRec

from recbole_unlearn.data.histories import history_columns
from recbole_unlearn.devices import array
from recbole_unlearn.influence.summed_training import DISTANCE, OWN, PRODUCT, Part


@dataclass(frozen=True)
class _Table:
    """A part of a score, and which of its parameters have the embeddings of what.

    Attributes:
        kind: of the part.
        names: of the parameters, whose rows are the table's, one after the other.
        items: which of them is the items'.
        users, last: which are the users' and the last items', of a query.
        pulled: which is a single row that every query has, its L1 norm a term of the loss.
    """

    kind: int
    names: tuple[str, ...]
    items: int = 0
    users: int | None = None
    last: int | None = None
    pulled: int | None = None


SUMMED = {
    FPMC: (
        _Table(PRODUCT, ("UI_emb.weight", "IU_emb.weight"), items=1, users=0),
        _Table(PRODUCT, ("LI_emb.weight", "IL_emb.weight"), items=1, last=0),
    ),
    TransRec: (
        _Table(DISTANCE, ("user_embedding.weight", "item_embedding.weight", "T"), items=1, users=0, last=1, pulled=2),
        _Table(OWN, ("bias.weight",)),
    ),
}


class Sums:
    """Such a model, seen by the kernels.

    Attributes:
        parameters: of each part.
        parts: as they are now.
    """

    def __init__(self, model: AbstractRecommender) -> None:
        named, self._tables = dict(model.named_parameters()), SUMMED[type(model)]
        self.parameters: list[list[torch.Tensor]] = [[named[name] for name in table.names] for table in self._tables]
        rows = [[np.atleast_2d(array(value)) for value in part] for part in self.parameters]
        self._begins = [np.cumsum([0, *map(len, part)]) for part in rows]
        self.parts = [
            Part(table.kind, np.concatenate(part), int(begins[table.items]), self._pulled(table, begins))
            for table, part, begins in zip(self._tables, rows, self._begins, strict=True)
        ]

    def _pulled(self, table, begins):
        return Part.pulled if table.pulled is None else int(begins[table.pulled])

    def queries(self, data: Dataset) -> list[np.ndarray]:
        """Of each part, the table rows that each row of some data names, int64 ``[rows, any]``."""
        columns = data.inter_feat
        users, last = columns[data.uid_field].numpy(), last_items(data)
        found = []
        for table, begins in zip(self._tables, self._begins, strict=True):
            ids = [(table.users, users), (table.last, last), (table.pulled, np.zeros_like(users))]
            named = [begins[which] + each for which, each in ids if which is not None]
            found.append(np.array(named, np.int64).reshape(len(named), len(users)).T)
        return found


def width(model: AbstractRecommender) -> int:
    """Numbers of an item's embeddings, in all parts."""
    return sum(model.get_parameter(table.names[table.items]).shape[1] for table in SUMMED[type(model)])


def last_items(data: Dataset) -> np.ndarray:
    """Last item of each row's history, int64 ``[rows]``; 0 where it is empty."""
    columns = data.inter_feat
    lists = columns[history_columns(data)[data.iid_field]].numpy()
    ends = columns[data.item_list_length_field].numpy()
    return np.where(ends > 0, lists[np.arange(len(lists)), ends - 1], 0)
