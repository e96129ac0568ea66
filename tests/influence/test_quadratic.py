"""On a quadratic objective one undamped influence step IS exact retraining, to rounding."""

import numpy as np
import pytest
import torch

from recbole_unlearn.influence.operators import AutogradCurvature, Damped
from recbole_unlearn.influence.solver import conjugate_gradient

N, REMOVED, PENALTY = 40, np.array([3, 4, 11, 29, 38]), 0.7


def closed_form(X, y, penalty):
    """argmin over theta of sum 0.5 (x . theta - y)^2 + 0.5 penalty ||theta||^2."""
    return np.linalg.solve(X.T @ X + penalty * np.eye(X.shape[1]), X.T @ y)


@pytest.fixture(params=["penalty of the whole", "penalty of each row"])
def ridge(request):
    """Theta before, exact theta after, the step, and the remaining objective's curvature and damping.

    The penalty either stays as it is, or (as in a mean loss with weight decay) goes with the rows that go.
    """
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(N, 6)), rng.normal(size=N)
    rest = np.setdiff1d(np.arange(N), REMOVED)
    per_row = request.param == "penalty of each row"
    after_penalty = PENALTY * len(rest) / N if per_row else PENALTY
    before, after = closed_form(X, y, PENALTY), closed_form(X[rest], y[rest], after_penalty)

    # two parameters, so that the order of the flat vector matters
    weight, bias = (torch.tensor(part, requires_grad=True) for part in (before[:4].reshape(2, 2), before[4:]))

    def loss(rows):
        theta = torch.cat([weight.flatten(), bias])
        residual = torch.from_numpy(X[rows]) @ theta - torch.from_numpy(y[rows])
        row_penalty = PENALTY / N * len(rows) if per_row else 0.0
        return 0.5 * (residual**2).sum() + 0.5 * row_penalty * (theta**2).sum()

    parameters = [weight, bias]
    remaining = AutogradCurvature(parameters, np.array_split(rest, 3), loss=loss)
    removed = AutogradCurvature(parameters, [REMOVED], loss=loss)
    damping = 0.0 if per_row else PENALTY
    step, report = conjugate_gradient(Damped(remaining, damping), removed.gradient(), tolerance=1e-13)
    assert report.converged
    return before, after, step.numpy(), remaining, damping


def test_one_step_is_exact_retraining(ridge):
    before, after, step, _, _ = ridge
    assert np.abs(after - before).max() > 0.01  # there is something to find
    np.testing.assert_allclose(before + step, after, rtol=0, atol=1e-8)


def test_step_reaches_a_stationary_point_of_the_remaining_objective(ridge):
    before, _, step, remaining, damping = ridge

    def slope(theta):
        with torch.no_grad():
            for p, part in zip(remaining.params, (theta[:4], theta[4:]), strict=True):
                p.copy_(torch.from_numpy(part).view_as(p))
        return remaining.gradient().numpy() + damping * theta

    start = np.abs(slope(before)).max()
    np.testing.assert_allclose(slope(before + step), np.zeros(6), rtol=0, atol=1e-10 * start)
    # the opposite sign, an easy mistake, doubles the gradient
    np.testing.assert_allclose(slope(before - step), 2 * slope(before), rtol=0, atol=1e-10 * start)
