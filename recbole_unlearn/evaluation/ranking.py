"""RecBole's own evaluators on the held-out interactions, under full and sampled ranking."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.data.split import Split

if TYPE_CHECKING:
    from recbole.trainer import Trainer

SAMPLED = 99  # negatives a held-out item, as in the NCF and UBPR papers
PROTOCOLS = {"full": 0, f"uni{SAMPLED}": SAMPLED}


def evaluate(
    trainer: "Trainer",
    model: AbstractRecommender,
    split: Split,
    seed: int,
    show_progress: bool = False,
    protocols: Mapping[str, int] = PROTOCOLS,
) -> dict[str, dict[str, float]]:
    """Metrics of ``model`` on the test data under each protocol.

    RecBole redraws the sampled negatives at every call; here numpy's stream is set to ``seed`` before and restored
    after, so all models meet the same negatives.

    Args:
        trainer: a RecBole trainer of the same configuration; its ``evaluate`` does the work.
        protocols: name -> sampled negatives a held-out item, 0 for full ranking.

    Returns:
        Protocol -> {metric: value}; empty where nothing was held out for the test.
    """
    if not len(split.test._dataset):
        return {}
    own_model, stream = trainer.model, np.random.get_state()
    results = {}
    try:
        trainer.model = model
        for name, sampled in protocols.items():
            np.random.seed(seed)
            loader = split.test_loader(sampled)
            results[name] = dict(trainer.evaluate(loader, load_best_model=False, show_progress=show_progress))
    finally:
        trainer.model = own_model
        np.random.set_state(stream)
    return {name: {metric: float(value) for metric, value in result.items()} for name, result in results.items()}
