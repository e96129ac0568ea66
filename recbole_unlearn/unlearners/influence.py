"""One influence-function step: the weights where the loss of what remains would be flat, to first order."""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.operators import Damped
from recbole_unlearn.influence.solver import STEPS, batch_descent, conjugate_gradient
from recbole_unlearn.settings.config import PAPER as EQUATION_7
from recbole_unlearn.settings.conflicts import unfit
from recbole_unlearn.unlearners.base import Change, Problem


class Undone(InputError):
    """A step after which what remains is far worse predicted than training had left it; ``reason`` in words."""

    def __init__(self, undone: float, limit: float) -> None:
        self.reason = (
            f"one influence step would undo {undone:.0%} of what training gained on what remains, more than "
            f"undone_limit, {limit:.0%}: the loss is no quadratic so far out"
        )
        super().__init__(f"{self.reason}; use method: replay, or raise damping_strength")


@dataclass(frozen=True)
class Influence:
    """``theta* = theta + (H + D)^-1 z`` (UBPR, equation (7), corrected).

    H is the curvature of the loss summed over the remaining triples, D the damping, and z the gradient of what
    retraining removes (the forgotten rows' triples and their share of the L2 term) minus what it adds (forgotten items
    drawn as negatives).

    A linear prediction may be far off: of rows whose gradients have died out, nothing but a vanishing damping holds the
    step. Rows go no farther than training could have moved them (`Problem.shortened`), and what the step should hardly
    change, the loss of what remains, tells whether it is one at all (`Problem.undone`).

    Attributes: as the keys of properties/overall.yaml; ``params`` is ``unlearn_params``.
        last_epochs: of a step along the training, how many of the last epochs may be trained after it.
        forgotten_stay: whether the forgotten triples stay in H, and their edges in the graph, as in equation (7).
    """

    name: ClassVar[str] = "influence"
    curvature: str = "gauss_newton"
    damping: str = "adam"
    damping_strength: float = 1.0
    pool_return: bool = True
    log_epochs: int | str = "all"
    curvature_triples: int | str = "auto"
    params: tuple[str, ...] | None = None
    cg_tolerance: float = 1e-3
    cg_max_iterations: int = 200
    undone_limit: float = 0.25
    last_epochs: int = 0
    forgotten_stay: bool = False

    @property
    def exact(self) -> bool:
        """Whether the curvature is the Hessian."""
        return self.curvature == "hessian"

    def refuses(self, problem: Problem) -> str | None:
        """Whether there is a step for the model and its optimiser; whether it can be made, `Problem.check` says."""
        return problem.no_step or unfit(problem.config, self.damping)

    def warm_up(self, problem: Any) -> None:
        problem.warm_up_step(self)

    def forget(self, problem: Any, rows: np.ndarray, show_progress: bool = False) -> Change:
        """Raises Undone where the step is none that training without ``rows`` could have made."""
        after = problem.without(rows, self)
        change = self._change(problem, after, show_progress)
        if problem.own_draws:
            drawn = f"negatives instead of forgotten ones: by train_neg_sample_args, but {problem.own_draws}"
            approximated = [*change.details.get("approximated", ()), drawn]
            change = replace(change, details={**change.details, "approximated": approximated})
        undone = problem.undone(rows, after, change.step)
        change = replace(change, details={**change.details, "undone": undone})
        if self.forgotten_stay:  # equation (7) is shown as it is
            return change
        if undone is not None and undone > self.undone_limit:
            raise Undone(undone, self.undone_limit)
        return problem.renewed(rows, change)

    def _change(self, problem, after, show_progress):
        if stops := problem.stops(self):
            return problem.follow(stops, after, self, show_progress)
        z = problem.lost(after, self)
        step, report, n_triples = problem.solve(after, z, self, show_progress)
        step, held = (step, torch.zeros(0)) if self.forgotten_stay else problem.shortened(step)
        details = {"curvature_triples": n_triples, "step_norm": float(step.norm()), "gradient_norm": problem.norm(z)}
        details |= {"rows_shortened": int(held.sum())} if held.any() else {}
        return Change(step, {**problem.details(after, step), **details, **asdict(report)})


# As published: nothing of design beyond the paper.
PAPER = Influence(**{key: value for key, value in EQUATION_7.items() if key != "method"}, forgotten_stay=True)


def conjugate(way: Influence, curvature, damping, z, precondition, show_progress=False, space=None):
    """`conjugate_gradient` on ``curvature + damping`` as the settings say, with progress shown."""
    with tqdm(total=way.cg_max_iterations, desc="Unlearn", ncols=100, disable=not show_progress) as bar:

        def progress(report):
            bar.update()
            bar.set_postfix_str(f"residual {report.residual:.1e}")

        step, report = conjugate_gradient(
            Damped(curvature, damping), z, precondition, way.cg_tolerance, way.cg_max_iterations, progress, space
        )
    return step, report


def warn_unless_converged(report) -> None:
    """Say in the log how a linear solve stopped, if not at its tolerance."""
    if not report.converged:
        logging.getLogger().warning(
            f"conjugate gradient stopped at relative residual {report.residual:.1e} after {report.iterations} "
            "iterations" + (": negative curvature" if report.negative_curvature else "")
        )


def descended(way: Influence, curvature_of, z: torch.Tensor, damping, show_progress=False, steps: int = STEPS):
    """`batch_descent` as the settings say, with progress shown.

    Raises:
        InputError: it does not come to rest.
    """
    with tqdm(total=way.cg_max_iterations, desc="Unlearn", ncols=100, disable=not show_progress) as bar:

        def progress(done, steps):
            bar.total, bar.n = steps, done
            bar.refresh()

        try:
            found = batch_descent(curvature_of, z, damping, way.cg_max_iterations, progress, steps)
        except ValueError as error:
            raise InputError(f"{error}; raise damping_strength or give curvature_triples a number") from error
    if not found[1].converged:
        logging.getLogger().warning(
            f"the linear solve by batches has not settled: {found[1].change:.0%} from the mean of its iterates; "
            "raise damping_strength or give curvature_triples a number"
        )
    return found
