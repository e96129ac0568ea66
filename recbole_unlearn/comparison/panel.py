"""What is looked at of each of very many models of one split and forget set: fixed pairs, and every user's top ten."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse

from recbole_unlearn.comparison.asked import asked, listable
from recbole_unlearn.data.split import Split
from recbole_unlearn.evaluation.churn import shared
from recbole_unlearn.evaluation.forgetting import query_scores
from recbole_unlearn.evaluation.ranking import activity

TOP = 10
EACH = 1000  # pairs of each group, at most, beside the forgotten
EDGE = 0.2  # share of the users, or of the interactions, that are at an edge
SEED = 2020


@dataclass
class Views:
    """What a population of models says.

    Attributes:
        margin: of the panel's pairs, float32 ``[models, pairs]``.
        top: each user's top items, ``[models, users, TOP]``.
    """

    margin: np.ndarray
    top: np.ndarray


class Panel:
    """Looks at models of one split and forget set, always at the same pairs and users.

    Sequential models are asked for each pair by the history before it, and for recommendations by each user's last test
    history, both without the forget set.

    Attributes:
        users, items: of the pairs, in the order of ``groups``.
        groups (dict): name -> slice of the pairs: ``forgotten``, ``retained, touched users``, ``retained, other
            users`` and ``held out``.
        test: users and items of test interactions, of users who keep something, ``[2, n]``; of sequential models, of
            each user the last.
        touched: bool ``[n_users]``.
    """

    def __init__(self, split: Split, rows: np.ndarray) -> None:
        rng, self.split = np.random.default_rng(SEED), split
        self.rows = np.asarray(rows, np.int64)
        kept = np.setdiff1d(np.arange(split.n_rows), self.rows)
        self.touched = np.zeros(split.n_users, bool)
        self.touched[split.users[self.rows]] = True
        near = self.touched[split.users[kept]]
        held = [loader._dataset for loader in (split.valid, split.test)]
        pairs = [np.stack([d.inter_feat[d.uid_field].numpy(), d.inter_feat[d.iid_field].numpy()]) for d in held]
        self._listed = listable(split)
        judged = pairs[1]
        if split.sequential:
            judged = judged[:, judged.shape[1] - 1 - np.unique(judged[0, ::-1], return_index=True)[1]]
        self.test = judged[:, np.isin(judged[0], split.users[kept])]
        own = np.stack([split.users, split.items])
        trained = {
            "forgotten": self.rows,
            "retained, touched users": _some(rng, kept[near]),
            "retained, other users": _some(rng, kept[~near]),
        }
        held_out = _some(rng, np.arange(pairs[1].shape[1]))
        asked_for = np.concatenate(list(trained.values())), len(held[0]) + held_out, self._listed
        self._asked = asked(split, *asked_for, gone=self.rows)
        chosen = {name: own[:, some] for name, some in trained.items()} | {"held out": pairs[1][:, held_out]}
        self.users, self.items = np.concatenate(list(chosen.values()), axis=1)
        ends = np.cumsum([0, *(each.shape[1] for each in chosen.values())])
        self.groups = {name: slice(a, b) for name, a, b in zip(chosen, ends, ends[1:], strict=False)}
        self._seen = _matrix(split, np.concatenate([own, *pairs], axis=1))
        self._masked = _matrix(split, np.concatenate([own[:, kept], pairs[0]], axis=1))
        counts = np.bincount(split.users, minlength=split.n_users)
        there = np.unique(split.users)
        by_count = there[np.argsort(counts[there], kind="stable")]
        edge = max(int(EDGE * len(there)), 1)
        self.core, self.edge = (np.isin(np.arange(split.n_users), some) for some in (by_count[-edge:], by_count[:edge]))
        self.active, self.inactive = activity(split.users[kept], split.n_users)
        popularity = np.bincount(split.items, minlength=split.n_items)
        by_popularity = np.argsort(-popularity, kind="stable")
        share = np.cumsum(popularity[by_popularity]) / popularity.sum()
        self.popular, self.rare = (
            np.isin(np.arange(split.n_items), by_popularity[which]) for which in (share <= EDGE, share > 1 - EDGE)
        )

    @cached_property
    def checksum(self) -> str:
        """Of all that it looks at."""
        found = hashlib.sha256(self.users.tobytes() + self.items.tobytes() + self.rows.tobytes())
        return found.hexdigest()

    def view(self, model) -> dict[str, np.ndarray]:
        """``margin`` of the pairs, float32, each a score minus the mean of the items that its user never had; and
        ``top`` of every user, training and validation items left out.
        """
        split, asked = self.split, self._asked
        margin, top = np.empty(len(self.users), np.float32), np.zeros((split.n_users, TOP), np.int32)
        for part, found in query_scores(model, asked.queries):
            found = found[:, : split.n_items].astype(np.float64)
            seen = self._seen[asked.users[part]].toarray() > 0
            seen[:, 0] = True
            mean = np.where(seen, 0, found).sum(1) / np.maximum((~seen).sum(1), 1)
            pairs, own = asked.pairs_in(part)
            margin[pairs] = found[own, self.items[pairs]] - mean[own]
            listed, own = asked.lists_in(part)
            users, found = self._listed[listed], found[own]
            found[self._masked[users].toarray() > 0] = -np.inf
            found[:, 0] = -np.inf
            some = np.argpartition(-found, TOP, axis=1)[:, :TOP]
            best = np.argsort(-np.take_along_axis(found, some, 1), axis=1, kind="stable")
            top[users] = np.take_along_axis(some, best, 1)
        return {"margin": margin, "top": top}

    def churn(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Share of the top items of users who asked for nothing that changed, of each pair of models.

        Args:
            before, after: ``[models, users, TOP]``.
        """
        others = self._listed[~self.touched[self._listed]]
        return np.array([1 - shared(one[others], other[others]) for one, other in zip(before, after, strict=True)])

    def usefulness(self, top: np.ndarray) -> dict[str, np.ndarray]:
        """NDCG@10 of the test items of users who keep something, of each model: of all, and of each group.

        Of groups of items it is the mean gain of a test interaction.
        """
        users, items = self.test
        hits = top[:, users] == items[:, None]  # [models, pairs, TOP]
        gain = (hits / np.log2(np.arange(2, TOP + 2))).sum(2)
        number = np.bincount(users, minlength=self.split.n_users)
        ideal = np.concatenate([[1], np.cumsum(1 / np.log2(np.arange(2, TOP + 2)))])[np.minimum(number, TOP)]

        def ndcg(group):
            some = group[users]
            return (gain[:, some] / ideal[users[some]]).sum(1) / max(np.unique(users[some]).size, 1)

        everyone = np.ones(self.split.n_users, bool)
        return {
            "ndcg": ndcg(everyone),
            "ndcg, untouched users": ndcg(~self.touched),
            "ndcg, core users": ndcg(self.core),
            "ndcg, edge users": ndcg(self.edge),
            "fairness": ndcg(self.active) - ndcg(self.inactive),
            "gain, popular items": gain[:, self.popular[items]].mean(1),
            "gain, rare items": gain[:, self.rare[items]].mean(1),
        }


def _some(rng, which):
    return np.sort(rng.choice(which, min(EACH, len(which)), replace=False))


def _matrix(split, pairs):
    shape = (split.n_users, split.n_items)
    return scipy.sparse.csr_matrix((np.ones(pairs.shape[1], np.int32), tuple(pairs)), shape=shape)
