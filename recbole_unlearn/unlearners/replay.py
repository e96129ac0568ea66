"""Replay: influence unrolled over the recorded training, without linearising and with nothing to tune."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from recbole_unlearn.unlearners.base import Change, Problem


@dataclass(frozen=True)
class Replay:
    """Run the recorded training again, without the forgotten rows.

    Attributes:
        rows: weight rows that are run again: those 'touched' by the forget set, 'all', or 'auto': all where the touched
            ones anchor most interactions anyway. LightGCN's graph ties all of them together: always all.
    """

    name: ClassVar[str] = "replay"
    rows: str = "auto"

    def refuses(self, problem: Problem) -> str | None:
        config, log = problem.config, problem.log
        group = problem.trained.optimizer["param_groups"][0]
        if not log.snapshots or log.snapshots[0] != 0:
            return "the triple log has no weight snapshots from the start of training"
        if config["learner"] != "adam" or "betas" not in group or group.get("amsgrad"):
            return f"it runs Adam again, and the model was trained with {config['learner']}"
        if config["clip_grad_norm"]:
            return "gradients were clipped in training"
        return None

    def warm_up(self, problem: Any) -> None:
        problem.warm_up_replay()

    def forget(self, problem: Any, rows: np.ndarray, show_progress: bool = False) -> Change:
        return problem.replayed(rows, self.rows, show_progress)
