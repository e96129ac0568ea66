"""CEU-like: the step against a dense solve, its noise, and what its certificate would say."""

import math

import numpy as np
import pytest
import torch

from recbole_unlearn.errors import InputError
from recbole_unlearn.methods import settings_of
from recbole_unlearn.methods.triples import curvature, last_epochs, lost_gradient


def flat(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double()


def dense(operator):
    """A matrix from its products, float64."""
    return torch.stack([operator.matvec(column) for column in torch.eye(operator.size, dtype=torch.float64)])


@pytest.mark.parametrize("which", ["task", "graph_task"])
def test_the_step_solves_the_perturbed_newton_system(which, rows, run, request):
    task = request.getfixturevalue(which)
    keys = {"damping": 0.02, "sigma": 0.3, "log_epochs": 2}
    forgotten = run("ceu", task, rows, **keys, cg_tolerance=1e-8)
    log, epochs = task.log, last_epochs(task.stored, 2)
    before, after = task.model(), task.model(task.split.remaining_dataset(rows))
    H, D = dense(curvature(before, log, np.arange(log.n_rows), epochs)), 0.02 * log.n_rows * log.negatives
    b = 0.3 * torch.from_numpy(np.random.default_rng(task.seed).standard_normal(len(H)))
    step = torch.linalg.solve(H + D * torch.eye(len(H)), lost_gradient(before, after, log, rows, epochs) - b)
    np.testing.assert_allclose(flat(forgotten.model) - flat(before), step, atol=1e-3 * float(step.abs().max()))
    kept = np.delete(np.arange(log.n_rows), rows)
    left = curvature(forgotten.model, log, kept, epochs).gradient() + D * flat(forgotten.model) + b
    assert forgotten.details["residual"] == pytest.approx(float(left.norm()), rel=1e-4)
    expected = math.sqrt(2 * math.log(1.5 / 1e-4)) * forgotten.details["residual"] / 0.3
    assert forgotten.details["epsilon"] == pytest.approx(expected)


def test_without_noise_nothing_would_be_certified(task, rows, run):
    assert run("ceu", task, rows, sigma=0.0).details["epsilon"] is None


def test_the_general_way_is_the_closed_form(task, rows, run, request):
    closed = run("ceu", task, rows, damping=0.02, cg_tolerance=1e-8)
    general = run("ceu", request.getfixturevalue("any_model"), rows, damping=0.02, cg_tolerance=1e-8)
    for first, second in zip(closed.model.parameters(), general.model.parameters(), strict=True):
        np.testing.assert_allclose(first.detach(), second.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key", ["damping", "delta"])
def test_settings_that_must_be_positive(key):
    with pytest.raises(InputError, match=f"ceu: {key} must be above 0"):
        settings_of("ceu", {key: 0.0})
