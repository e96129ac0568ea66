"""Damping diagonals. In the scaling of a SUM over N triples, like the curvature that they are added to."""

import numpy as np


def adam(
    exp_avg_sq: np.ndarray, step: int, beta2: float, eps: float, learning_rate: float, n_triples: float
) -> np.ndarray:
    """The metric of early stopping under Adam: ``N (sqrt(v) + eps) / (lr * steps)``.

    Adam preconditions the mean gradient with ``1 / (sqrt(v) + eps)``; after ``steps`` steps of size lr, a direction of
    curvature c has converged by about ``1 - exp(-lr steps c / sqrt(v))``, of which ``c / (c + sqrt(v) / (lr steps))``
    is the Tikhonov form.

    Args:
        exp_avg_sq: Adam's running mean of squared gradients, flat ``[size]``.
        step: steps taken.
        n_triples: N, triples of an epoch.

    Returns:
        float64 ``[size]``.
    """
    v = np.asarray(exp_avg_sq, np.float64) / (1 - beta2**step)
    return n_triples * (np.sqrt(v) + eps) / (learning_rate * step)
