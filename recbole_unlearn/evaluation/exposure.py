"""What spam reaches: how many users are recommended a promoted item."""

from collections.abc import Sequence

import numpy as np
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.data.split import Split
from recbole_unlearn.evaluation.forgetting import scores


def exposure(model: AbstractRecommender, split: Split, topk: Sequence[int]) -> dict[str, float]:
    """Share of the genuine users whose top-K holds an item that ``split.spam`` promotes.

    Genuine users are those who do not spread the spam; what they were trained with is not recommended to them.

    Args:
        topk: values of K.

    Returns:
        ``exposure@K`` -> share, for each K.
    """
    spam = np.isin(np.arange(split.n_rows), split.spam)
    promoted = np.unique(split.items[spam])
    users = np.setdiff1d(split.users, split.users[spam])
    start = np.searchsorted(split.users, [users, users + 1])
    better = np.empty(len(users))
    for part, batch in scores(model, users, split.train._dataset.uid_field):
        for position, row in zip(range(part.start, part.stop), batch.astype(np.float64), strict=True):
            row[0] = row[split.items[slice(*start[:, position])]] = -np.inf
            best = row[promoted].max()
            better[position] = (row > best).sum() if best > -np.inf else np.inf
    return {f"exposure@{k}": float((better < k).mean()) for k in topk}
