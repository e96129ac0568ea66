"""CEU-like: a Newton step on the regularised, perturbed loss (Wu et al., "Certified Edge Unlearning for Graph Neural
Networks", KDD 2023)."""

from time import perf_counter

import numpy as np
import torch

from recbole_unlearn.methods.base import Forgotten
from recbole_unlearn.methods.certified import certified_epsilon
from recbole_unlearn.methods.triples import (
    WITH_MARGINS,
    OfCurvature,
    add_to,
    curvature,
    last_epochs,
    lost_gradient,
    solve_on,
)


class CEU(OfCurvature):
    """``theta <- theta + (H + D)^-1 (v - b)``: v as in GIF, H of all triples with the old graph, D = L2, b Gaussian.

    The paper trains on ``L + D/2 |theta|^2 + b^T theta``, so that the noise hides what one step leaves of the gradient;
    a comparison has one original for all methods, so b enters with the request here. The certificate presumes a convex
    loss with bounded and Lipschitz derivatives, and an original at its minimum. A factorisation is not convex and
    training stops early: none of this holds, and *nothing is certified*. ``details`` hold the ``residual``, the length
    of the new objective's gradient at the new weights, and the ``epsilon`` that the certificate would state for it.

    H is the Gauss-Newton matrix, which is the paper's Hessian where the scores are linear, as in its theory.
    """

    models = WITH_MARGINS
    positive = ("damping", "delta")
    candidates = {"damping": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)}

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start, task, settings = perf_counter(), self.task, self.settings
        log, epochs = task.log, last_epochs(task.stored, settings["log_epochs"])
        before, model = task.model(), task.model(task.split.remaining_dataset(rows))
        damping = log.n_rows * log.negatives * (settings["damping"] + task.weight_decay)
        H = curvature(before, log, np.arange(log.n_rows), epochs)
        b = settings["sigma"] * torch.from_numpy(np.random.default_rng(task.seed).standard_normal(H.size))
        z = lost_gradient(before, model, log, rows, epochs) - b
        everything = torch.ones(H.size, dtype=torch.float64)
        step, report = solve_on(H, everything, damping, z, settings["cg_tolerance"], settings["cg_max_iterations"])
        add_to(model, step)
        seconds = perf_counter() - start
        residual = float((self.gradient(model, rows, epochs, damping) + b).norm())
        details = {
            "iterations": report.iterations,
            "solved_to": report.residual,
            "residual": residual,
            "epsilon": certified_epsilon(residual, settings["sigma"], settings["delta"]),
        }
        return Forgotten(model.eval(), seconds, details)

    def gradient(self, model, rows: np.ndarray, epochs: np.ndarray, damping: float) -> torch.Tensor:
        """Of the remaining triples' regularised loss, without noise."""
        kept = np.delete(np.arange(self.task.log.n_rows), rows)
        weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach().double().cpu()
        return curvature(model, self.task.log, kept, epochs).gradient() + damping * weights
