"""Replay: influence unrolled over the recorded training, without linearising and with nothing to tune."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from recbole_unlearn.settings.conflicts import not_validated
from recbole_unlearn.unlearners.base import Change, Problem


@dataclass(frozen=True)
class Replay:
    """Run the recorded training again, without the forgotten rows: by kernels that fit it or by its trainer.

    Attributes:
        rows: weight rows that are run again. 'all' is retraining, exactly; those 'touched' by the forget set are faster
            and approximate (of LightGCN, whose graph ties all together: several steps at once). 'auto': all where that
            takes at most ``exact_seconds``, or where the touched ones anchor most interactions anyway. Models other
            than these two are trained again as a whole.
        coupling: random numbers of exact retraining: 'paired', the original's as far as they fit, or 'fresh' ones.
        exact_seconds: estimated, of two cores; of other models, from what their epochs took.
        epochs: of exact retraining: as many as the 'original' has, or, where all rows are run again by fresh random
            numbers, as many as RecBole's validation chooses without the forgotten rows, 'validated'.
    """

    name: ClassVar[str] = "replay"
    rows: str = "auto"
    coupling: str = "paired"
    exact_seconds: float = 10.0
    epochs: str = "original"

    def refuses(self, problem: Problem) -> str | None:
        if problem.own_draws:
            return problem.own_draws
        if self.epochs == "validated":
            asked = not_validated(problem.config, self.rows, self.coupling)
            return asked or problem.not_replayed(self.rows) or problem.out_of_order() or problem.not_validated()
        return problem.not_replayed(self.rows) or (problem.out_of_order() if self.rows != "touched" else None)

    def warm_up(self, problem: Any) -> None:
        problem.warm_up_replay()

    def forget(self, problem: Any, rows: np.ndarray, show_progress: bool = False) -> Change:
        if self.epochs == "validated":
            return problem.retrained(rows, "fresh", show_progress, validated=True)
        if self.exact(problem, rows):
            return problem.retrained(rows, self.coupling, show_progress)
        return problem.replayed(rows, show_progress)

    def exact(self, problem: Any, rows: np.ndarray) -> bool:
        """Whether ``rows`` are forgotten by training again."""
        if self.rows != "auto":
            return self.rows == "all"
        return problem.seconds_again() <= self.exact_seconds or problem.touches_most(rows)
