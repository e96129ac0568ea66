"""What models of one split are asked: every user, or with sequential models each pair by the history before it."""

from dataclasses import dataclass

import numpy as np
import torch
from recbole.data.interaction import Interaction, cat_interactions

from recbole_unlearn.data.split import Split

NOTHING = np.empty(0, np.int64)


@dataclass
class Asked:
    """Queries whose answers, scores of all items, hold those of fixed pairs, and fixed users' recommendations.

    Attributes:
        queries: Interaction of ``n`` rows.
        users: of each, int64 ``[n]``.
        pairs: the query that has each pair's score, int64 ``[pairs]``.
        lists: the query that has each listed user's recommendations, int64 ``[listed users]``.
    """

    queries: Interaction
    users: np.ndarray
    pairs: np.ndarray
    lists: np.ndarray

    def __post_init__(self) -> None:
        self._ordered = [np.argsort(of, kind="stable") for of in (self.pairs, self.lists)]

    def pairs_in(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that some queries have the scores of, and which of these queries each one's is."""
        return self._in(part, self.pairs, self._ordered[0])

    def lists_in(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Listed users that some queries have the recommendations of, by number, and which of these queries."""
        return self._in(part, self.lists, self._ordered[1])

    @staticmethod
    def _in(part, of, ordered):
        found = ordered[slice(*np.searchsorted(of[ordered], [part.start, part.stop]))]
        return found, of[found] - part.start


def listable(split: Split) -> np.ndarray:
    """Users who have recommendations: everybody; of sequential models, whoever a test history is there of."""
    if not split.sequential:
        return np.arange(1, split.n_users)
    data = split.test._dataset
    return np.unique(data.inter_feat[data.uid_field].numpy())


def asked(
    split: Split,
    rows: np.ndarray,
    held_out: np.ndarray = NOTHING,
    listed: np.ndarray = NOTHING,
    gone: np.ndarray = NOTHING,
) -> Asked:
    """What to ask for some training and held-out pairs, and for the recommendations of some users.

    Args:
        rows: of the training interactions, pairs to ask for.
        held_out: of the validation and the test interactions, one after the other, pairs that follow these.
        listed: `listable` users; of sequential models, of their last test history.
        gone: training rows that are in no history.
    """
    held = [loader._dataset for loader in (split.valid, split.test)]
    field = held[1].uid_field
    owners = np.concatenate([data.inter_feat[field].numpy() for data in held])
    pairs = np.concatenate([split.users[rows], owners[held_out]])
    if not split.sequential:
        users = np.unique(np.concatenate([pairs, listed]))
        queries = Interaction({field: torch.from_numpy(users)})
        return Asked(queries, users, np.searchsorted(users, pairs), np.searchsorted(users, listed))
    places, last = np.unique(owners[len(held[0]) :][::-1], return_index=True)
    last = len(owners) - 1 - last[np.searchsorted(places, listed)]
    some, parts = np.concatenate([held_out, last]), []
    if len(rows):
        parts.append(split.queries(rows, gone))
    if len(some):
        judged = split.judged_without(gone)
        held = [loader._dataset for loader in (judged.valid, judged.test)]
        whole = cat_interactions([data.inter_feat for data in held])
        parts.append(judged.test.transform(held[1], whole[torch.from_numpy(some)]))
    ends = np.cumsum([0, len(pairs), len(listed)])
    return Asked(
        cat_interactions(parts), np.concatenate([pairs, listed]), np.arange(ends[1]), np.arange(ends[1], ends[2])
    )
