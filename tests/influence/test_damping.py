"""The optimiser's metric against what torch's Adam really does."""

import numpy as np
import pytest
import torch

from recbole_unlearn.influence.damping import adam

LR, BETA2, EPS, N = 0.02, 0.97, 1e-3, 250


def run_adam(gradients, beta1):
    """Feeds gradients ``[steps, size]`` to torch's Adam: its state dict and the last change of theta."""
    theta = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = torch.optim.Adam([theta], lr=LR, betas=(beta1, BETA2), eps=EPS)
    for g in torch.from_numpy(gradients):
        before = theta.detach().clone()
        theta.grad = g.clone()
        optimizer.step()
    return optimizer.state_dict(), (theta.detach() - before).numpy()


def metric(optimizer_state):
    state, group = optimizer_state["state"][0], optimizer_state["param_groups"][0]
    return adam(state["exp_avg_sq"].numpy(), int(state["step"]), group["betas"][1], group["eps"], group["lr"], N)


@pytest.mark.parametrize("steps", [1, 2, 25])
class TestAgainstTorch:
    def gradients(self, steps):
        """Of magnitudes from far below eps to far above it."""
        return np.random.default_rng(steps).normal(size=(steps, 7)) * np.logspace(-6, 1, 7)

    def test_formula(self, steps):
        gradients = self.gradients(steps)
        state, _ = run_adam(gradients, beta1=0.9)
        age = np.arange(steps)[::-1, None]
        mean_square = (BETA2**age * gradients**2).sum(0) / (BETA2**age).sum()
        expected = N * (np.sqrt(mean_square) + EPS) / (LR * steps)
        np.testing.assert_allclose(metric(state), expected, rtol=1e-12)

    def test_is_what_adam_divides_the_gradient_by(self, steps):
        """Without momentum a step is -lr g / (sqrt(v) + eps), that is, -N g / (steps D)."""
        gradients = self.gradients(steps)
        state, moved = run_adam(gradients, beta1=0.0)
        np.testing.assert_allclose(moved, -N * gradients[-1] / (steps * metric(state)), rtol=1e-10)


def test_never_updated_parameters_are_damped_by_eps():
    metric = adam(np.zeros(3), 50, BETA2, EPS, LR, N)
    np.testing.assert_allclose(metric, np.full(3, N * EPS / (LR * 50)), rtol=1e-15)


def test_float32_state_is_used_in_float64():
    """What torch saves is float32; no digit more is lost."""
    state = np.logspace(-40, 3, 20).astype(np.float32)
    result = adam(state, 1000, 0.999, EPS, LR, N)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, adam(state.astype(np.float64), 1000, 0.999, EPS, LR, N))


def test_says_how_far_each_direction_has_converged():
    """Adam on 0.5 c theta^2 with noisy gradients: the share of the way gone is about N c / (N c + D).

    Early stopping gives 1 - exp(-x), its Tikhonov form x / (1 + x); they differ by .204 at most.
    """
    curvature, steps, lr, start = np.array([0.05, 0.15, 0.4, 1.0, 2.5, 6.0]), 1000, 1e-3, 0.2
    copies = 500  # of each curvature, to average the noise away
    generator = torch.Generator().manual_seed(0)
    c = torch.from_numpy(curvature)[:, None]
    theta = torch.nn.Parameter(torch.full((len(curvature), copies), start, dtype=torch.float64))
    optimizer = torch.optim.Adam([theta], lr=lr)
    for _ in range(steps):
        theta.grad = c * theta.detach() + torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    gone = 1 - theta.detach().mean(1).numpy() / start
    state = optimizer.state_dict()["state"][0]
    D = adam(state["exp_avg_sq"].numpy(), steps, 0.999, 1e-8, lr, N).mean(1)
    predicted = N * curvature / (N * curvature + D)
    assert (np.diff(gone) > 0).all() and (np.diff(predicted) > 0).all()
    assert gone[0] < 0.15 and gone[-1] > 0.9  # both ends are there to be told apart
    np.testing.assert_allclose(predicted, gone, rtol=0, atol=0.204 + 0.03)
    # the form that Tikhonov's approximates is met to the noise of the averages
    np.testing.assert_allclose(-np.expm1(-N * curvature / D), gone, rtol=0, atol=0.04)
