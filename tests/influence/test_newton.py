"""Re-optimisation against scipy's optimisers and automatic differentiation, all in float64."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import minimize as scipy_minimize

from recbole_unlearn.influence import solver
from recbole_unlearn.influence.newton import Objective, flat, minimise, nearest_rotation, steihaug
from recbole_unlearn.influence.objective import pool_return
from recbole_unlearn.influence.operators import UserTriples
from recbole_unlearn.influence.solver import Space

WEIGHT_DECAY = 2e-3
FORGOTTEN = np.array([3, 17, 18, 40, 71])


@dataclass
class Problem:
    """Rows ``users``, ``pos`` ``[rows]`` and ``neg`` ``[rows, m]``, and start embeddings in float64."""

    users: np.ndarray
    pos: np.ndarray
    neg: np.ndarray
    P: np.ndarray
    Q: np.ndarray

    def objective(self, forgotten=()):
        """The package's objective without some rows, and the same as a function of flat tensors."""
        keep = np.setdiff1d(np.arange(len(self.users)), forgotten)
        sizes = len(self.P), len(self.Q)
        back = pool_return(self.users, self.pos, np.asarray(forgotten, int), sizes[1], self.neg.shape[1])
        sets = [
            UserTriples(self.users[keep], self.pos[keep], self.neg[keep].astype(np.uint16), *sizes),
            UserTriples(back.users, back.pos, back.neg[:, None].astype(np.uint16), *sizes, back.weight),
        ]
        n, K = len(keep) * self.neg.shape[1], self.P.shape[1]

        def independent(theta):
            P, Q = theta[: self.P.size].view(-1, K), theta[self.P.size :].view(-1, K)
            value = n * WEIGHT_DECAY / 2 * (theta**2).sum()
            kept = self.users[keep], self.pos[keep], self.neg[keep], 1.0
            returned = back.users, back.pos, back.neg[:, None], torch.from_numpy(np.float32(back.weight))[:, None]
            for users, pos, neg, weight in (kept, returned):
                x = (P[users][:, None] * (Q[pos][:, None] - Q[neg])).sum(-1)
                value = value - (weight * torch.nn.functional.logsigmoid(x)).sum()
            return value

        return Objective(sets, n, WEIGHT_DECAY, (*sizes, K)), independent


def random_problem(seed=0, n_users=12, n_items=16, K=3, m=2, rows=90, scale=1.0):
    """Two groups of users, each with an item group of its own, so that the optimum is not zero; item 0 is unused."""
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(1, n_users, rows))
    liked = 1 + (rng.integers(0, n_items // 2, rows) * 2 + users) % (n_items - 1)
    other = 1 + (liked[:, None] + rng.integers(0, n_items - 2, (rows, m))) % (n_items - 1)
    P, Q = (scale * rng.normal(size=(n, K)) for n in (n_users, n_items))
    return Problem(users, liked, other, P, Q)


def value_and_gradient(function, theta):
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    value = function(theta)
    (gradient,) = torch.autograd.grad(value, theta)
    return value.item(), gradient.numpy()


def gradient_norm(function, P, Q):
    return np.linalg.norm(value_and_gradient(function, flat(P, Q).numpy())[1])


@pytest.fixture(scope="module")
def trained():
    """A problem whose embeddings are a minimum of the whole objective, to rounding."""
    problem = random_problem()
    objective, _ = problem.objective()
    problem.P, problem.Q, report = minimise(objective, problem.P, problem.Q, 1e-14, 300)
    assert report.converged and np.linalg.norm(problem.P) > 1
    return problem


def test_value_gradient_and_hessian_are_those_of_autograd(trained):
    objective, independent = trained.objective(FORGOTTEN)
    rng = np.random.default_rng(1)
    theta = torch.from_numpy(rng.normal(size=trained.P.size + trained.Q.size))
    value, gradient, loss = objective.at(theta)
    expected = value_and_gradient(independent, theta.numpy())
    hessian = torch.autograd.functional.hessian(independent, theta)
    v = torch.from_numpy(rng.normal(size=len(theta)))
    np.testing.assert_allclose(value, expected[0], rtol=1e-13)
    np.testing.assert_allclose(gradient, expected[1], rtol=0, atol=1e-13 * np.abs(expected[1]).max())
    product = loss.matvec(v) + objective.l2 * v
    np.testing.assert_allclose(product, hessian @ v, rtol=0, atol=1e-12 * np.abs(hessian @ v).max())


def relative_error(found, reference, start):
    """Error of the change. Optimisers may drift along the rotations, which change nothing: these are undone."""
    K = start[0].shape[1]
    start = flat(*start)
    reference = nearest_rotation(reference, start, K)
    found = nearest_rotation(found, reference, K)
    return float((found - reference).norm() / (reference - start).norm())


@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-krylov"])
def test_the_change_is_that_of_an_independent_optimiser(trained, method):
    objective, independent = trained.objective(FORGOTTEN)
    start = flat(trained.P, trained.Q)

    def product(theta, v):
        return torch.autograd.functional.hvp(independent, torch.from_numpy(theta), torch.from_numpy(v))[1].numpy()

    options = {
        "L-BFGS-B": {"options": {"maxcor": 50, "maxiter": 20000, "maxfun": 20000, "ftol": 0, "gtol": 1e-10}},
        "trust-krylov": {"hessp": product, "options": {"gtol": 1e-8}},
    }[method]
    reference = scipy_minimize(
        lambda theta: value_and_gradient(independent, theta), start.numpy(), jac=True, method=method, **options
    ).x
    assert np.linalg.norm(value_and_gradient(independent, reference)[1]) < 1e-6
    P, Q, report = minimise(objective, trained.P, trained.Q, 1e-12, 100)
    assert report.converged
    assert relative_error(flat(P, Q), torch.from_numpy(reference), (trained.P, trained.Q)) < 1e-5
    scores = reference[: P.size].reshape(P.shape) @ reference[P.size :].reshape(Q.shape).T
    change = np.linalg.norm(scores - trained.P @ trained.Q.T)
    assert np.linalg.norm(P @ Q.T - scores) < 1e-5 * change


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-12])
def test_the_certificate_is_the_gradient_norm(trained, tolerance):
    objective, independent = trained.objective(FORGOTTEN)
    P, Q, report = minimise(objective, trained.P, trained.Q, tolerance, 100)
    before = gradient_norm(independent, trained.P, trained.Q) / objective.n_triples
    assert report.gradient_norm_before == pytest.approx(before, rel=1e-9)
    after = gradient_norm(independent, P, Q) / objective.n_triples
    assert report.gradient_norm == pytest.approx(after, rel=1e-3, abs=1e-15)
    assert report.converged and after <= tolerance


def test_nothing_forgotten_moves_nothing(trained):
    objective, _ = trained.objective()
    P, Q, report = minimise(objective, trained.P, trained.Q, 1e-12, 100)
    np.testing.assert_array_equal(P, trained.P)
    np.testing.assert_array_equal(Q, trained.Q)
    assert report.converged and report.iterations == report.products == 0
    assert report.gradient_norm == report.gradient_norm_before


def test_input_is_left_alone_and_the_result_is_float64(trained):
    objective, _ = trained.objective(FORGOTTEN)
    P, Q = trained.P.astype(np.float32), trained.Q.astype(np.float32)
    kept = P.copy(), Q.copy()
    new_P, new_Q, report = minimise(objective, P, Q, 1e-12, 100)
    assert report.converged and report.iterations > 0
    assert len(report.history) == report.iterations and report.history[-1] <= min(report.history)
    np.testing.assert_allclose(report.history[-1], report.gradient_norm, rtol=1e-2, atol=1e-14)
    assert (new_P.dtype, new_Q.dtype) == (np.float64, np.float64)
    np.testing.assert_array_equal(P, kept[0])
    np.testing.assert_array_equal(Q, kept[1])


def test_a_user_without_triples_ends_at_zero(trained):
    """L2 alone acts on it; the same holds for ids that never had triples, such as the padding."""
    user = trained.users[FORGOTTEN[0]]
    objective, _ = trained.objective(np.flatnonzero(trained.users == user))
    assert np.abs(trained.P[user]).max() > 0.1
    P, Q, report = minimise(objective, trained.P, trained.Q, 1e-13, 100)
    assert report.converged
    np.testing.assert_allclose(P[user], 0, atol=1e-9)
    np.testing.assert_allclose(P[0], 0, atol=1e-9)


@pytest.mark.parametrize(("most", "n_users"), [(3, 12), (0, 3)], ids=["block-Jacobi", "Jacobi"])
def test_it_leaves_a_saddle_by_negative_curvature(monkeypatch, most, n_users, K=3):
    """Zero weights are a saddle; close to them the Hessian is indefinite."""
    monkeypatch.setattr(solver, "BLOCK_JACOBI_UP_TO", most)
    problem = random_problem(n_users=n_users, K=K, scale=1e-4)
    objective, independent = problem.objective()
    P, Q, report = minimise(objective, problem.P, problem.Q, 1e-10, 300)
    assert report.converged and report.negative_curvature
    saddle = value_and_gradient(independent, np.zeros(P.size + Q.size))[0]
    assert value_and_gradient(independent, flat(P, Q).numpy())[0] < 0.9 * saddle
    hessian = torch.autograd.functional.hessian(independent, flat(P, Q))
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]
    rank = np.linalg.matrix_rank(P, tol=1e-3)
    assert rank == min(n_users - 1, K)  # user 0 is the padding
    assert (eigenvalues < 1e-6 * eigenvalues[-1]).sum() == rank * (rank - 1) // 2 + rank * (K - rank)  # rotations


@pytest.mark.parametrize("missing", [0.0, 1e-7])
def test_it_leaves_a_saddle_on_which_it_starts(missing):
    """A minimum of two columns is one of three where L2 is large, else a saddle."""
    problem = random_problem(n_users=12, K=3)
    problem.P[:, 2], problem.Q[:, 2] = missing * problem.P[:, 2], missing * problem.Q[:, 2]
    objective, independent = problem.objective()
    lower = copy.copy(objective)
    lower.space, lower.K = Space(), 2
    P, Q, report = minimise(lower, problem.P[:, :2], problem.Q[:, :2], 1e-12, 300)
    assert report.converged
    start = [np.hstack([each, own[:, 2:]]) for each, own in zip((P, Q), (problem.P, problem.Q), strict=True)]
    before = value_and_gradient(independent, flat(*start).numpy())[0]
    P, Q, report = minimise(objective, *start, 1e-9, 300)
    after, eigenvalues = (
        value_and_gradient(independent, flat(P, Q).numpy())[0],
        torch.linalg.eigvalsh(torch.autograd.functional.hessian(independent, flat(P, Q))),
    )
    assert report.converged and report.negative_curvature and after < before * (1 - 1e-4)
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1] and np.linalg.matrix_rank(P, tol=1e-3) == 3


def test_a_rank_that_l2_leaves_stays(trained):
    objective, _ = trained.objective(FORGOTTEN)
    objective.l2 *= 100
    P, Q, report = minimise(objective, trained.P, trained.Q, 1e-12, 300)
    again = minimise(objective, P, Q, 1e-12, 300)
    assert report.converged and again[2].converged and again[2].iterations == 0
    np.testing.assert_array_equal(again[0], P)


def test_the_iteration_limit_stops_it_unconverged(trained):
    objective, independent = trained.objective(FORGOTTEN)
    steps = []
    P, Q, report = minimise(objective, trained.P, trained.Q, 1e-12, 1, lambda r: steps.append(r.iterations))
    assert not report.converged and report.iterations == 1 and steps == [1]
    after = gradient_norm(independent, P, Q) / objective.n_triples
    assert report.gradient_norm == pytest.approx(after, rel=1e-6)


def test_it_stops_where_rounding_ends_progress(trained):
    objective, _ = trained.objective(FORGOTTEN)
    _, _, report = minimise(objective, trained.P, trained.Q, 0.0, 300)
    assert not report.converged and report.iterations < 30
    assert report.gradient_norm < 1e-15


def test_nearest_rotation_undoes_a_rotation(trained):
    K = trained.P.shape[1]
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(K, K)))[0]
    start = flat(trained.P, trained.Q)
    turned = flat(trained.P @ turn, trained.Q @ turn)
    np.testing.assert_allclose(nearest_rotation(turned, start, K), start, atol=1e-13)


class Dense:
    def __init__(self, matrix):
        self.matrix = matrix

    def matvec(self, v):
        return self.matrix @ v


@pytest.mark.parametrize("lowest", [0.5, -0.5], ids=["definite", "indefinite"])
@pytest.mark.parametrize("radius", [0.05, 1e3], ids=["short", "long"])
def test_a_step_is_as_long_and_gains_as_much_as_it_says(lowest, radius):
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    H = torch.from_numpy(basis @ np.diag([lowest, 1, 2, 3, 4, 5]) @ basis.T)
    g, M = torch.from_numpy(rng.normal(size=6)), torch.from_numpy(rng.uniform(0.5, 2, 6))
    found = steihaug(Dense(H), g, lambda r: r / M, radius, 1e-10, Space())
    s = found.step
    assert found.length == pytest.approx(float((s * M * s).sum().sqrt()))
    assert found.decrease == pytest.approx(float(-(g @ s) - s @ H @ s / 2))
    boundary = radius < 1 or lowest < 0
    assert found.at_boundary == boundary
    assert found.negative_curvature == (lowest < 0 and radius > 1)
    if boundary:
        assert found.length == pytest.approx(radius)
    else:
        np.testing.assert_allclose(s, torch.linalg.solve(H, -g), atol=1e-9)
