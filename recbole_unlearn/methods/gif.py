"""GIF: an influence step by a truncated Neumann series (Wu et al., "GIF: A General Strategy for Graph Unlearning via
Influence Function", WWW 2023)."""

from time import perf_counter

import numpy as np
import torch

from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.operators import Curvature, Damped
from recbole_unlearn.methods.base import Forgotten
from recbole_unlearn.methods.triples import WITH_MARGINS, OfCurvature, add_to, curvature, last_epochs, lost_gradient


class GIF(OfCurvature):
    """``theta <- theta + H^-1 v``, H the curvature of all triples' loss with the old graph, over all parameters.

    v is the gradient of what the loss loses: the forgotten triples, and of those that the graph lets the request reach,
    the loss with the old graph minus that with the new one. For models without a graph that part is nothing. What H^-1
    does is ``iterations`` terms of its Neumann series (LiSSA), see `neumann`. On the pairwise loss; sums over triples
    on both sides, and the scaling factor is ``scale`` times their number, so that one value serves data of any size. H
    is the Gauss-Newton matrix by default (``hessian: True`` for the exact one, which is indefinite where training
    stopped early: the series then grows in those directions).
    """

    models = WITH_MARGINS
    positive = ("scale",)
    candidates = {"scale": (3e-4, 1e-3, 3e-3, 1e-2, 0.1)}

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start, task, settings = perf_counter(), self.task, self.settings
        log, epochs = task.log, last_epochs(task.stored, settings["log_epochs"])
        before, model = task.model(), task.model(task.split.remaining_dataset(rows))
        v = lost_gradient(before, model, log, rows, epochs)
        triples = log.n_rows * log.negatives
        H = curvature(before, log, np.arange(log.n_rows), epochs, settings["hessian"])
        H = Damped(H, triples * task.weight_decay)
        step, change = neumann(H, v, settings["scale"] * triples, settings["iterations"])
        if not torch.isfinite(step.float()).all():
            raise InputError(f"gif: the series grows without end at scale {settings['scale']}; give a larger one")
        add_to(model, step)
        return Forgotten(model.eval(), perf_counter() - start, {"iterations": settings["iterations"], "change": change})


def neumann(operator: Curvature, v: torch.Tensor, scale: float, iterations: int) -> tuple[torch.Tensor, float]:
    """``A^-1 v`` as ``sum over k of (1 - A / scale)^k v / scale``, up to k = ``iterations``.

    It converges where all eigenvalues of A are between 0 and 2 ``scale``. Directions of small ones come last, which is
    a damping; those of negative ones grow with every iteration.

    Returns:
        The sum, and the length of the last term as a share of the sum's.
    """
    term = v / scale
    total = term.clone()
    for _ in range(iterations):
        term = term - operator.matvec(term) / scale
        total += term
    return total, float(term.norm() / total.norm().clamp_min(torch.finfo(total.dtype).tiny))
