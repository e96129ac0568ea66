"""RecBole's own evaluators on the held-out interactions, under full and sampled ranking."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from recbole.evaluator.metrics import NDCG
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.compat.recbole_models import replaced
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError

if TYPE_CHECKING:
    from recbole.trainer import Trainer

SAMPLED = 99  # negatives a held-out item, as in the NCF and UBPR papers
PROTOCOLS = {"full": 0, f"uni{SAMPLED}": SAMPLED}
ACTIVE = 0.05  # share of the users that CURE4Rec calls active: those with most training interactions
FAIRNESS = "fairness"  # CURE4Rec's: NDCG of active users minus that of all others


def check_scores(scores: torch.Tensor) -> None:
    """Raises InputError where scores are NaN or infinite; minus infinity is what evaluators leave out."""
    if not (scores < torch.inf).all():
        raise InputError(
            "the model's scores are not finite, and rank nothing; train it, or have it forget, in smaller steps, or "
            "leave it out"
        )


def activity(users: np.ndarray, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Which users are active and which are not, bool ``[n_users]`` each; who has no interactions is neither.

    Args:
        users: of each training interaction that remains.
    """
    counts = np.bincount(users, minlength=n_users)
    there = int((counts > 0).sum())
    first = np.argsort(-counts, kind="stable")[: max(int(ACTIVE * there), 1)]
    active = np.isin(np.arange(n_users), first)
    return active, (counts > 0) & ~active


def evaluate(
    trainer: "Trainer",
    model: AbstractRecommender,
    split: Split,
    seed: int,
    show_progress: bool = False,
    protocols: Mapping[str, int] = PROTOCOLS,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of ``model`` on the test data under each protocol.

    RecBole redraws the sampled negatives at every call; here numpy's stream is set to ``seed`` before and restored
    after, so all models meet the same negatives.

    Args:
        trainer: a RecBole trainer of the same configuration; its ``evaluate`` does the work.
        protocols: name -> sampled negatives a held-out item, 0 for full ranking.
        groups: two groups of users, bool ``[n_users]``, as `activity` tells them: under full ranking ``fairness@K`` is
            the first one's NDCG@K minus the second one's, where both have held-out items.

    Returns:
        Protocol -> {metric: value}; empty where nothing was held out for the test.

    Raises:
        InputError: scores, under full ranking, that are not finite.
    """
    if not len(split.test._dataset):
        return {}
    own_model, stream, evaluator = trainer.model, np.random.get_state(), trainer.evaluator
    results, watched, ask = {}, _Watched(evaluator), trainer._full_sort_batch_eval

    def asked(batch):
        answer = ask(batch)
        check_scores(answer[1])
        return answer

    try:
        trainer.model, trainer.evaluator = model, watched
        with replaced(trainer, _full_sort_batch_eval=asked):  # `RankedLoader` has it rank whomever it finds NaN of
            for name, sampled in protocols.items():
                np.random.seed(seed)
                loader = split.test_loader(sampled)
                results[name] = dict(trainer.evaluate(loader, load_best_model=False, show_progress=show_progress))
                if groups and not sampled and watched.hits is not None:
                    results[name] |= _fairness(trainer.config, watched.hits, _users(loader), groups)
    finally:
        trainer.model, trainer.evaluator = own_model, evaluator
        np.random.set_state(stream)
    return {name: {metric: float(value) for metric, value in result.items()} for name, result in results.items()}


class _Watched:
    """An evaluator that keeps which of each user's best items were held out."""

    def __init__(self, evaluator):
        self.evaluator, self.hits = evaluator, None

    def evaluate(self, struct):
        self.hits = struct["rec.topk"].numpy() if "rec.topk" in struct else None
        return self.evaluator.evaluate(struct)


def _users(loader):
    """User of each row of ``rec.topk``."""
    data = loader._dataset
    return (loader.uid_list if hasattr(loader, "uid_list") else data.inter_feat[data.uid_field]).numpy()


def _fairness(config, hits, users, groups):
    first, second = (group[users] for group in groups)
    if not (first.any() and second.any()):
        return {}
    ndcg = NDCG(config).metric_info(hits[:, :-1].astype(bool), hits[:, -1])
    return {f"{FAIRNESS}@{k}": ndcg[first, k - 1].mean() - ndcg[second, k - 1].mean() for k in config["topk"]}
