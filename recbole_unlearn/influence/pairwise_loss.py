"""RecBole's ``BPRLoss``, ``-log(gamma + sigmoid(difference))``, and the logistic loss, for kernels to inline."""

import numpy as np

from recbole_unlearn.influence.compiling import inlined
from recbole_unlearn.influence.recorded import GAMMA
from recbole_unlearn.influence.vectors import exp

GAMMA32 = np.float32(GAMMA)


@inlined
def slope(difference, scale):
    """Derivative of RecBole's ``BPRLoss`` of one triple, times ``-scale``, by the difference of its two scores."""
    e = exp(min(difference, np.float32(40)))
    return scale * e / ((np.float32(1) + e) * (e + GAMMA32 * (np.float32(1) + e)))


@inlined
def total_loss(scores, begin, end):
    """Sum of the losses of some triples."""
    loss = 0.0
    for c in range(begin, end):
        score = 0.0
        for h in range(len(scores)):
            score += scores[h, c]
        loss -= np.log(GAMMA + 1 / (1 + np.exp(-score)))
    return loss


@inlined
def sigmoid(x):
    """Derivative of `softplus`."""
    return np.float32(1) / (np.float32(1) + exp(-x))


@inlined
def softplus(x):
    """``log(1 + exp(x))``, float64."""
    return max(np.float64(x), 0.0) + np.log1p(np.exp(-abs(np.float64(x))))
