"""Re-optimisation: Newton steps to a minimum of the objective without the forgotten rows, certified by its gradient."""

import logging
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from recbole_unlearn.influence.newton import Objective, flat, minimise
from recbole_unlearn.unlearners.base import Change

# Gradient of the whole objective, as a share of its L2 part's, up to which a model counts as converged. At a minimum
# the loss and L2 pull equally hard and the share is 0; where training stopped early it is of order 1. The flattest
# directions of a minimum have a curvature near weight_decay / 10 (measured, ml-100k, K = 8), so that the weights
# are then within some 10 times this share of their norm, .1 %, from the minimum: less than forgetting moves them.
CONVERGED = 1e-4


@dataclass(frozen=True)
class Reoptimise:
    """For models that were trained to convergence on one objective (static negatives) with L2.

    Attributes:
        tolerance: norm of the mean gradient to reach.
        max_iterations: Newton steps after which it stops in any case.
        pool_return: whether forgotten items return to their users' negative pool, as in retraining.
    """

    name: ClassVar[str] = "reoptimise"
    tolerance: float = 1e-9
    max_iterations: int = 200
    pool_return: bool = True

    def refuses(self, problem: Any) -> str | None:
        if getattr(problem, "objective", None) is None:
            return "it is for BPR only"
        if not problem.log.static:
            return "negatives were redrawn every epoch, so that no one objective was minimised"
        if not problem.weight_decay > 0:
            return "weight_decay is 0, so that the objective has no minimum"
        return None

    def converged(self, problem: Any) -> tuple[bool, str]:
        """Whether the training had converged, see `CONVERGED`, and that in words."""
        objective = problem.objective(np.empty(0, np.int64), self.pool_return)
        theta = problem.spread()
        share = problem.norm(objective.at(theta)[1]) / (objective.l2 * problem.norm(theta))
        found = share <= CONVERGED
        return found, f"{'' if found else 'not '}converged, the gradient is {share:.1e} of its L2 part"

    def warm_up(self, problem: Any) -> None:
        row = np.ones((1, problem.P.shape[1]), np.float32)
        minimise(Objective([problem.one_row()], 1, 1.0, (1, 1, row.size)), row, row, 0.1, 1)

    def forget(self, problem: Any, rows: np.ndarray, show_progress: bool = False) -> Change:
        """The change to a minimum of the objective without the rows, and the certificate that it is one.

        It is that of float64 weights; ``gradient_norm_stored`` is that of the model's own type, which anyone can
        recompute from a checkpoint.
        """
        objective, own = problem.objective(rows, self.pool_return), problem.shard.users
        with tqdm(total=self.max_iterations, desc="Unlearn", ncols=100, disable=not show_progress) as bar:

            def progress(report):
                bar.update()
                bar.set_postfix_str(f"gradient {report.gradient_norm:.1e}")

            P, Q, report = minimise(objective, problem.P[own], problem.Q, self.tolerance, self.max_iterations, progress)
        if not report.converged:
            logging.getLogger().warning(
                f"re-optimisation stopped at a mean gradient norm of {report.gradient_norm:.1e}, above "
                f"reoptimise_tolerance, after {report.iterations} iterations"
            )
        stored = flat(P.astype(problem.P.dtype), Q.astype(problem.Q.dtype))
        step = problem.shard.whole(flat(P - problem.P[own], Q - problem.Q))
        details = {
            "triples": objective.n_triples,
            "step_norm": float(step.norm()),
            "gradient_norm_stored": problem.norm(objective.at(stored)[1]) / objective.n_triples,
        }
        return Change(step, {**details, **asdict(report)})
