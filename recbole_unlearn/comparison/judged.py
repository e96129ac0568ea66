"""What a comparison measures of a model. Kept figures depend on this file and what it imports: see `kept.JUDGES`."""

import numpy as np
from recbole.trainer import Trainer

from recbole_unlearn.comparison.beside import Beside
from recbole_unlearn.data.split import Split
from recbole_unlearn.evaluation import ranking

ORIGINAL = "original"


def judged(trainer: Trainer, split: Split, model, rows: np.ndarray, forgotten=False, other: Beside | None = None):
    """Metrics under both protocols, always on the same negatives, and forget-set AUC.

    Args:
        trainer: of the split's model, which has seen its training data.
        forgotten (bool): whether histories that the model is asked with are to be without ``rows``.
        other: the split of a model that has one of its own.
    """
    other = other or Beside(trainer.config["model"], split, split)
    gone = rows if forgotten else rows[:0]
    asked, without = other.asked(model, gone), split.judged_without(gone)
    groups = ranking.activity(np.delete(split.users, rows), split.n_users)
    return {
        "ranking": ranking.evaluate(trainer, asked, without, trainer.config["seed"], groups=groups),
        "forget_auc": float(other.percentiles(model, rows).mean()),
    }


def columns(runs: list[dict]) -> dict[str, list]:
    """Figure -> list over seeds, of what was kept of a method or model."""
    found = {
        f"{metric}|{protocol}": [run["ranking"][protocol][metric] for run in runs]
        for protocol, metrics in runs[0]["ranking"].items()
        for metric in metrics
    }
    for key in ("forget_auc", "prepare_seconds", "seconds"):
        found[key] = [run[key] for run in runs]
    if ORIGINAL in runs[0]:
        found["forget_auc|original"] = [run[ORIGINAL]["forget_auc"] for run in runs]
    return found
