"""What the unlearners share: their result, the epochs that count, the linear solve."""

import logging
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.solver import STEPS, batch_descent, conjugate_gradient


@dataclass
class Unlearned:
    """Result of one request.

    Attributes:
        state_dict (dict): the new weights; load them into a model of the same class.
        method (str): 'reoptimise', 'replay' or 'influence'.
        seconds (float): from the request to the weights, log reading included.
        details (dict): plain values: why this method (``chosen``), what it did, and how its solver fared.
        snapshots (dict): number of epochs -> flat weights that have forgotten, for the next request's trajectory.
    """

    state_dict: dict
    method: str
    seconds: float
    details: dict
    snapshots: dict = field(default_factory=dict)

    def report(self):
        """Everything but weights, as plain values."""
        return {"method": self.method, "seconds": self.seconds, **self.details}


def trained_epochs(log, epochs=None):
    """Epochs that a checkpoint's weights were trained for; default: all of the log. InputError if it holds fewer."""
    epochs = log.n_epochs if epochs is None else epochs
    if not 1 <= epochs <= log.n_epochs:
        raise InputError(
            f"the checkpoint was written after epoch {epochs}, the triple log holds {log.n_epochs}; train again"
        )
    return epochs


def gradient_epochs(config, epochs):
    """Numbers of the epochs that the forgotten triples come from: the last ``log_epochs`` of ``epochs``."""
    last = config["log_epochs"]
    return np.arange(0 if last == "all" else max(epochs - last, 0), epochs)


def solve(config, operator, z, precondition, show_progress=False, space=None):
    """`conjugate_gradient` as the configuration says, with progress shown."""
    with tqdm(total=config["cg_max_iterations"], desc="Unlearn", ncols=100, disable=not show_progress) as bar:

        def progress(report):
            bar.update()
            bar.set_postfix_str(f"residual {report.residual:.1e}")

        return conjugate_gradient(
            operator, z, precondition, config["cg_tolerance"], config["cg_max_iterations"], progress, space
        )


def solve_by_batches(config, curvature_of, z, damping, show_progress=False, steps=STEPS):
    """`batch_descent` as the configuration says, with progress shown.

    Raises:
        InputError: it does not come to rest.
    """
    with tqdm(total=config["cg_max_iterations"], desc="Unlearn", ncols=100, disable=not show_progress) as bar:

        def progress(done, steps):
            bar.total, bar.n = steps, done
            bar.refresh()

        try:
            found = batch_descent(curvature_of, z, damping, config["cg_max_iterations"], progress, steps)
        except ValueError as error:
            raise InputError(f"{error}; raise damping_strength or give curvature_triples a number") from error
    if not found[1].converged:
        logging.getLogger().warning(
            f"the linear solve by batches has not settled: {found[1].change:.0%} from the mean of its iterates; "
            "raise damping_strength or give curvature_triples a number"
        )
    return found


def warn_unless_converged(report):
    """Say in the log how a linear solve stopped, if not at its tolerance."""
    if not report.converged:
        logging.getLogger().warning(
            f"conjugate gradient stopped at relative residual {report.residual:.1e} after {report.iterations} "
            "iterations" + (": negative curvature" if report.negative_curvature else "")
        )
