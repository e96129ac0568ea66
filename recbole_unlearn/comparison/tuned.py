"""Settings of methods, chosen by one rule for all, which looks at no retrained model and at nothing that is evaluated.

Whoever deploys a method has neither: what is known is how the validation interactions rank, on which the model was not
trained. A model that has forgotten interactions drawn at random ranks them alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from recbole_unlearn.comparison.figures import Comparison, one_thread
from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds, quiet
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.forgetting import held_out_percentiles, percentiles
from recbole_unlearn.methods import METHODS, settings_of
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trainer import judge

OTHERS = 3_000_000  # seeds of the models that settings are chosen on are so far from those that are evaluated
SEEDS = 3  # of these, each with a forget set of its own
MOST_LOST = 0.01  # of the validation metric of the original


@dataclass(frozen=True)
class Trial:
    """A candidate, over models that are used for nothing else.

    Attributes:
        settings: that differ from the method's YAML.
        gap: forget-set AUC minus the AUC of the validation interactions, mean over models; NaN: it was refused.
        lost: share of the original's validation metric that is lost, mean over models.
    """

    settings: Mapping[str, Any]
    gap: float
    lost: float


def tuned(
    trained: TrainedSeeds, names: Sequence[str], evaluated: np.ndarray, seeds: int = SEEDS, show_progress: bool = True
) -> tuple[dict[str, list[Trial]], Trial]:
    """Try all candidates of methods.

    Args:
        trained: split, configuration and cache of the models; missing ones are trained.
        names: of methods.
        evaluated: rows that methods are evaluated on; others are forgotten here, as many, at random.

    Returns:
        Name -> trials of each method that has candidates, and the original itself as a trial.
    """
    config, split = trained.config, trained.split
    if not len(split.valid._dataset):
        raise InputError("settings are chosen by validation interactions, and there are none; change eval_args")
    others = np.setdiff1d(np.arange(split.n_rows), evaluated)
    if len(others) < len(evaluated):
        raise InputError(f"settings cannot be chosen beside {len(evaluated)} of {split.n_rows} rows; evaluate on fewer")
    runs = [SeedRun.original(config["seed"] + OTHERS + n) for n in range(seeds)]
    with quiet(), one_thread():
        trained.train(runs, show_progress)
        trainer = judge(config, split, new_model(config, split))
        tried = [(name, changes) for name in names for changes in candidates(name)]
        found = np.full((len(tried) + 1, seeds, 2), np.nan)
        for seed, run in enumerate(tqdm(runs, "Tune", ncols=100, disable=not show_progress)):
            rows = np.sort(np.random.default_rng(run.seed).choice(others, len(evaluated), replace=False))
            comparison = Comparison(trained, {}, 1)
            original = comparison.task(run.seed).model()
            before = _judged(trainer, original, split, rows)
            found[-1, seed] = before
            for number, (name, changes) in enumerate(tried):
                settings = settings_of(name, changes)
                method = METHODS[name](comparison.task(run.seed, name, settings), settings)
                try:
                    method.prepare()
                    found[number, seed] = _judged(trainer, method.forget(rows).model, split, rows)
                except InputError:
                    continue
            lost = before[1] - found[:, seed, 1] if config["valid_metric_bigger"] else found[:, seed, 1] - before[1]
            found[:, seed, 1] = lost / abs(before[1])
    gaps, lost = found.mean(1).T
    trials: dict[str, list[Trial]] = {}
    for (name, changes), gap, share in zip(tried, gaps, lost, strict=False):
        trials.setdefault(name, []).append(Trial(changes, float(gap), float(share)))
    return trials, Trial({}, float(gaps[-1]), 0.0)


def candidates(name: str) -> list[dict[str, Any]]:
    """What is tried of a method: the values of its one setting that says how far it goes."""
    return [{key: value} for key, values in METHODS[name].candidates.items() for value in values]


def best(trials: Sequence[Trial]) -> Trial:
    """The one whose forget set ranks most like what was held out, of those that lose at most `MOST_LOST`.

    Where all lose more, the one that loses least.
    """
    done = [trial for trial in trials if np.isfinite(trial.gap + trial.lost)]
    if not done:
        raise InputError("no candidate of this method could be tried")
    useful = [trial for trial in done if trial.lost <= MOST_LOST]
    return min(useful, key=lambda trial: abs(trial.gap)) if useful else min(done, key=lambda trial: trial.lost)


def _judged(trainer, model, split, rows):
    """(forget-set AUC minus that of the validation interactions, validation metric)"""
    own, trainer.model = trainer.model, model
    try:
        metric, _ = trainer._valid_epoch(split.valid)
    finally:
        trainer.model = own
    return percentiles(model, split, rows).mean() - held_out_percentiles(model, split).mean(), metric
