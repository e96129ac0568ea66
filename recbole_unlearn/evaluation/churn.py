"""What others feel of a deletion: how many of their recommendations change, though they asked for nothing."""

from collections.abc import Mapping

import numpy as np
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.data.split import Split
from recbole_unlearn.evaluation.forgetting import query_scores

TOP, USERS = 10, 2000  # recommendations a user, and users to ask: a random part where there are more


def recommended(
    model: AbstractRecommender, split: Split, asked: np.ndarray, top: int = TOP, gone: np.ndarray | None = None
) -> np.ndarray:
    """The items that users would be recommended, in no order: int64 ``[asked, top]``, none of their training items.

    Args:
        asked: rows of ``split``, one of each user; a sequential model is asked for what follows the history before.
        gone: rows that are no training items any more.
    """
    own = _own(split, gone)
    found = np.empty((len(asked), top), np.int64)
    for part, scores in query_scores(model, split.queries(asked)):
        scores = scores[:, : split.n_items].copy()
        scores[:, 0] = -np.inf
        for place, user in enumerate(split.users[asked[part]]):
            scores[place, own[user]] = -np.inf
        found[part] = np.argpartition(-scores, top - 1, axis=1)[:, :top]
    return found


def _own(split, gone=None):
    """Training items of each user, but for rows that are ``gone``."""
    kept = np.delete(np.arange(len(split.users)), [] if gone is None else gone)
    users, starts = np.unique(split.users[kept], return_index=True)
    return dict(zip(users, np.split(split.items[kept], starts[1:]), strict=True))


def changed_users(
    before: AbstractRecommender, after: AbstractRecommender, split: Split, rows: np.ndarray, top: int
) -> list[str]:
    """Tokens of users whose recommendations another model changes: what was kept of these is out of date.

    Args:
        before, after: models, not sequential ones; ``after`` without some ``rows``.
        top: number of recommendations.

    Returns:
        Of users who are still there; nobody of whom all rows are gone.
    """
    kept = np.delete(np.arange(split.n_rows), rows)
    users, firsts = np.unique(split.users[kept], return_index=True)
    lists = []
    for model, gone in ((before, None), (after, rows)):
        own, found = _own(split, gone), recommended(model, split, kept[firsts], top, gone)
        # a user may have fewer items left than are asked for
        lists.append([set(items) - set(own[user]) for user, items in zip(users, found.tolist(), strict=True)])
    changed = [user for user, old, new in zip(users, *lists, strict=True) if old != new]
    return [str(token) for token in split.token("user", np.array(changed, np.int64))]


def churn(models: Mapping[str, AbstractRecommender], split: Split, rows: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Share of the recommendations of users who asked for nothing that another model than the original's changes.

    Args:
        models: name -> model, one of them the 'original'.
        rows: of ``split``, the forgotten ones.
        seed: of the choice of users, where there are many.

    Returns:
        ``users``, that were asked; name of model -> share of their items that are not the original's; empty where
        everybody asked, or there are too few items to choose from.
    """
    bystanders, asked = np.unique(split.users, return_index=True)
    asked = asked[~np.isin(bystanders, split.users[rows])]
    if len(asked) > USERS:
        asked = np.sort(np.random.default_rng(seed).choice(asked, USERS, replace=False))
    top = min(TOP, (split.n_items - 1) // 2)
    if not len(asked) or not top:
        return {}
    lists = {name: recommended(model, split, asked, top) for name, model in models.items()}
    before = lists.pop("original")
    return {"users": len(asked), **{name: float(1 - shared(before, now)) for name, now in lists.items()}}


def shared(before: np.ndarray, after: np.ndarray) -> float:
    """Share of recommended items ``[users, K]`` that are among the same users' others ``[users, K]``."""
    return (before[:, :, None] == after[:, None]).any(2).mean()
