"""GIF: its series term by term, the whole step by dense float64 linear algebra, and what the graph adds."""

import numpy as np
import pytest
import torch
from test_ifru import dense

from recbole_unlearn.errors import InputError
from recbole_unlearn.methods import settings_of
from recbole_unlearn.methods.gif import neumann
from recbole_unlearn.methods.triples import curvature, last_epochs, lost_gradient


class Dense:
    def __init__(self, A):
        self.A, self.size = A, len(A)

    def matvec(self, v):
        return self.A @ v


def test_the_series_is_the_inverse_where_it_converges():
    rng = np.random.default_rng(0)
    root = torch.from_numpy(rng.standard_normal((6, 6)))
    A, v = root @ root.T + torch.eye(6), torch.from_numpy(rng.standard_normal(6))
    scale = float(torch.linalg.eigvalsh(A).max())
    total, change = neumann(Dense(A), v, scale, 3)
    power = [torch.linalg.matrix_power(torch.eye(6) - A / scale, k) for k in range(4)]
    np.testing.assert_allclose(total, sum(power) @ v / scale)
    assert change == pytest.approx(float((power[3] @ v / scale).norm() / total.norm()))
    np.testing.assert_allclose(neumann(Dense(A), v, scale, 3000)[0], torch.linalg.solve(A, v), rtol=1e-8)


@pytest.mark.parametrize("hessian", [False, True])
def test_the_step_is_the_series_of_the_dense_hessian(hessian, task, rows, run):
    forgotten = run("gif", task, rows, iterations=7, scale=0.05, hessian=hessian, log_epochs=2)
    H, v, theta = dense(task, rows, np.arange(task.log.n_rows), 2, hessian)
    scale, step = 0.05 * task.log.n_rows * task.log.negatives, v.clone()
    for _ in range(7):  # as the paper writes it
        step = v + step - H @ step / scale
    got = torch.cat([value.detach().view(-1) for value in forgotten.model.parameters()])
    np.testing.assert_allclose(got - theta, step / scale, atol=1e-4 * float((step / scale).abs().max()))


def test_a_graph_adds_the_triples_that_it_reaches(graph_task, rows):
    """Those whose gradient it does not change cancel; for BPR all do."""
    task, epochs = graph_task, last_epochs(graph_task.stored, 2)
    before, after = task.model(), task.model(task.split.remaining_dataset(rows))
    kept = np.delete(np.arange(task.log.n_rows), rows)
    direct = curvature(before, task.log, rows, epochs).gradient()
    spill = curvature(before, task.log, kept, epochs).gradient() - curvature(after, task.log, kept, epochs).gradient()
    v = lost_gradient(before, after, task.log, rows, epochs)
    np.testing.assert_allclose(v, direct + spill, atol=1e-4)
    assert spill.norm() > 0.01 * direct.norm()


def test_the_general_way_is_the_closed_form(task, rows, run, request):
    closed = run("gif", task, rows, iterations=5)
    general = run("gif", request.getfixturevalue("any_model"), rows, iterations=5)
    for first, second in zip(closed.model.parameters(), general.model.parameters(), strict=True):
        np.testing.assert_allclose(first.detach(), second.detach(), rtol=1e-3, atol=1e-4)


def test_a_scale_that_is_too_small_is_named(task, rows, run):
    with pytest.raises(InputError, match="grows without end at scale 1e-06"):
        run("gif", task, rows, scale=1e-6)
    with pytest.raises(InputError, match="gif: scale must be above 0"):
        settings_of("gif", {"scale": 0})
