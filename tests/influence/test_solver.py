"""Conjugate gradient against direct solves in float64, and what it reports about itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_unlearn.influence.solver import batch_descent, block_jacobi, conjugate_gradient, jacobi


class Dense:
    """A dense symmetric matrix as a curvature that counts its products."""

    def __init__(self, matrix):
        self.matrix = torch.as_tensor(matrix, dtype=torch.float64)
        self.size = len(self.matrix)
        self.products = 0

    def matvec(self, v):
        self.products += 1
        return self.matrix @ v


def positive_definite(rng, n, condition=50.0):
    """Eigenvalues log-spaced from 1 to ``condition``, random eigenvectors."""
    basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return basis @ np.diag(np.geomspace(1, condition, n)) @ basis.T


def system(seed, n, condition=50.0):
    rng = np.random.default_rng(seed)
    return Dense(positive_definite(rng, n, condition)), torch.from_numpy(rng.normal(size=n))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40))
def test_agrees_with_a_direct_solve(seed, n):
    A, z = system(seed, n)
    t, report = conjugate_gradient(A, z, tolerance=1e-12)
    assert report.converged
    # error <= condition * residual = 50e-12
    expected = np.linalg.solve(A.matrix.numpy(), z.numpy())
    np.testing.assert_allclose(t, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-9])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_stops_at_the_first_iteration_within_tolerance(tolerance, preconditioned):
    A, z = system(seed=1, n=30)
    precondition = jacobi(A.matrix.diagonal(), 0.0) if preconditioned else None
    t, report = conjugate_gradient(A, z, precondition, tolerance)
    assert report.converged and not report.negative_curvature
    assert min(report.history[:-1]) > tolerance >= report.history[-1] == report.residual
    assert report.iterations == len(report.history) == A.products
    # the recursive residual drifts from the true one by rounding only, epsilon * condition * iterations
    np.testing.assert_allclose(report.residual, (A.matrix @ t - z).norm() / z.norm(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_gives_up_after_max_iterations(limit):
    A, z = system(seed=2, n=30)
    t, report = conjugate_gradient(A, z, tolerance=1e-12, max_iterations=limit)
    assert not report.converged and not report.negative_curvature
    assert report.iterations == len(report.history) == A.products == limit
    np.testing.assert_allclose(report.residual, (A.matrix @ t - z).norm() / z.norm(), rtol=1e-12)


def test_each_iterate_minimises_the_quadratic_over_its_krylov_space():
    """min 1/2 t^T A t - z^T t over span{z, Az, A^2 z}, solved directly in that basis."""
    A, z = system(seed=3, n=12)
    t, _ = conjugate_gradient(A, z, tolerance=0, max_iterations=3)
    span, _ = torch.linalg.qr(torch.stack([z, A.matrix @ z, A.matrix @ (A.matrix @ z)], dim=1))
    best = span @ torch.linalg.solve(span.T @ A.matrix @ span, span.T @ z)
    np.testing.assert_allclose(t, best, rtol=0, atol=1e-12 * best.abs().max())


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_exact_in_at_most_n_iterations(n):
    # a condition at which CG's directions stay conjugate to rounding for n iterations
    A, z = system(seed=n, n=n, condition=5.0)
    _, report = conjugate_gradient(A, z, tolerance=1e-10, max_iterations=n)
    assert report.converged


def test_one_iteration_for_each_distinct_eigenvalue():
    rng = np.random.default_rng(4)
    basis, _ = np.linalg.qr(rng.normal(size=(15, 15)))
    A = Dense(basis @ np.diag(np.repeat([1.0, 4.0, 30.0], 5)) @ basis.T)
    _, report = conjugate_gradient(A, torch.from_numpy(rng.normal(size=15)), tolerance=1e-10)
    assert report.iterations == 3


def test_zero_right_hand_side_needs_no_product():
    A, _ = system(seed=5, n=6)
    t, report = conjugate_gradient(A, torch.zeros(6, dtype=torch.float64))
    np.testing.assert_array_equal(t, np.zeros(6))
    assert A.products == report.iterations == 0
    assert report.converged and report.residual == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_right_hand_side_that_is_not_finite(value):
    A, z = system(seed=6, n=6)
    z[2] = value
    with pytest.raises(ValueError, match="not finite"):
        conjugate_gradient(A, z)


def test_right_hand_side_is_left_alone():
    A, z = system(seed=7, n=6)
    before = z.clone()
    conjugate_gradient(A, z)
    np.testing.assert_array_equal(z, before)


def test_progress_is_called_after_each_iteration():
    A, z = system(seed=8, n=20)
    seen = []
    _, report = conjugate_gradient(A, z, progress=lambda r: seen.append((r.iterations, r.residual)))
    assert seen == list(enumerate(report.history, start=1))


class TestNegativeCurvature:
    def test_at_the_first_direction_nothing_is_returned(self):
        t, report = conjugate_gradient(Dense(-np.eye(4)), torch.ones(4, dtype=torch.float64))
        np.testing.assert_array_equal(t, np.zeros(4))
        assert report.negative_curvature and not report.converged
        assert report.iterations == 1 and report.residual == 1

    def test_later_the_iterate_so_far_is_returned(self):
        """A right-hand side with little of the negative eigenvalue: CG meets it after a good start."""
        A = Dense(np.diag([1.0, 2.0, 3.0, -0.1]))
        z = torch.tensor([1.0, 1.0, 1.0, 0.05], dtype=torch.float64)
        t, report = conjugate_gradient(A, z, tolerance=1e-10)
        assert report.negative_curvature and not report.converged
        assert report.iterations == len(report.history) + 1 > 1
        assert torch.isfinite(t).all()
        before, _ = conjugate_gradient(A, z, tolerance=0, max_iterations=report.iterations - 1)
        np.testing.assert_array_equal(t, before)
        assert 0.5 * t @ A.matrix @ t - z @ t < 0  # lower than at the start

    def test_random_indefinite(self):
        rng = np.random.default_rng(9)
        basis, _ = np.linalg.qr(rng.normal(size=(20, 20)))
        A = Dense(basis @ np.diag(np.linspace(-3, 10, 20)) @ basis.T)
        t, report = conjugate_gradient(A, torch.from_numpy(rng.normal(size=20)), tolerance=1e-10)
        assert report.negative_curvature and not report.converged
        assert torch.isfinite(t).all()


def block_diagonal(rng, n, K, condition=50.0):
    return torch.stack([torch.from_numpy(positive_definite(rng, K, condition)) for _ in range(n)])


class TestBlockJacobi:
    @pytest.mark.parametrize("damping", ["none", "number", "vector"])
    def test_solves_a_block_diagonal_system_in_one_iteration(self, damping):
        rng = np.random.default_rng(10)
        blocks = block_diagonal(rng, n=5, K=3) * torch.tensor([1e-3, 1, 10, 1e3, 1e5]).double()[:, None, None]
        d = {"none": 0.0, "number": 2.5, "vector": torch.linspace(0, 7, 15).double()}[damping]
        A = Dense(torch.block_diag(*blocks) + torch.diag(torch.as_tensor(d).double().expand(15)))
        z = torch.from_numpy(rng.normal(size=15))
        t, report = conjugate_gradient(A, z, block_jacobi(blocks, d), tolerance=1e-10)
        assert report.converged and report.iterations == 1
        np.testing.assert_allclose(A.matrix @ t, z, rtol=0, atol=1e-10)

    def test_blocks_without_inverse_act_as_the_identity(self):
        """Zero (a row in no triple) and rank-deficient (a row in fewer triples than K)."""
        rng = np.random.default_rng(11)
        ranks = np.repeat(np.arange(9), 10)  # rounding makes the last pivots of some positive, of others negative
        factors = [rng.normal(size=(8, rank)) for rank in ranks]
        blocks = torch.stack(
            [torch.from_numpy(f @ f.T if f.shape[1] < 8 else positive_definite(rng, 8)) for f in factors]
        )
        r = torch.from_numpy(rng.normal(size=(len(ranks), 8)))
        result = block_jacobi(blocks, 0.0)(r.flatten()).view(r.shape)
        np.testing.assert_array_equal(result[ranks < 8], r[ranks < 8])
        whole = torch.linalg.solve(blocks[ranks == 8], r[ranks == 8])
        np.testing.assert_allclose(result[ranks == 8], whole, rtol=0, atol=1e-12)

    def test_zero_blocks_are_solved_by_their_damping(self):
        blocks = torch.zeros(3, 2, 2, dtype=torch.float64)
        r = torch.arange(1.0, 7.0, dtype=torch.float64)
        np.testing.assert_allclose(block_jacobi(blocks, 0.5)(r), 2 * r, rtol=1e-14)

    def test_only_zero_blocks(self):
        r = torch.arange(1.0, 7.0, dtype=torch.float64)
        blocks = torch.zeros(3, 2, 2, dtype=torch.float64)
        np.testing.assert_array_equal(block_jacobi(blocks, 0.0)(r), r)

    def test_singular_but_consistent_system_is_solved(self):
        """Rows in no triple have zero curvature and a zero right-hand side: their step is zero."""
        rng = np.random.default_rng(12)
        blocks = block_diagonal(rng, n=4, K=3)
        blocks[2] = 0
        z = torch.from_numpy(rng.normal(size=12))
        z[6:9] = 0
        t, report = conjugate_gradient(Dense(torch.block_diag(*blocks)), z, block_jacobi(blocks, 0.0), 1e-10)
        assert report.converged and report.iterations == 1
        np.testing.assert_array_equal(t[6:9], np.zeros(3))


class TestJacobi:
    def test_solves_a_diagonal_system_in_one_iteration(self):
        diagonal, d = torch.logspace(-4, 4, 9).double(), torch.linspace(0, 3, 9).double()
        A = Dense(torch.diag(diagonal + d))
        t, report = conjugate_gradient(A, torch.ones(9).double(), jacobi(diagonal, d), tolerance=1e-10)
        assert report.converged and report.iterations == 1
        np.testing.assert_allclose(t, 1 / (diagonal + d), rtol=1e-12)

    def test_zeros_act_as_the_identity(self):
        diagonal = torch.tensor([4.0, 0.0, 0.5], dtype=torch.float64)
        r = torch.tensor([1.0, 3.0, -2.0], dtype=torch.float64)
        np.testing.assert_array_equal(jacobi(diagonal, 0.0)(r), [0.25, 3.0, -4.0])


@pytest.mark.parametrize("kind", ["jacobi", "block_jacobi"])
def test_preconditioning_saves_iterations_on_a_badly_scaled_system(kind):
    rng = np.random.default_rng(13)
    n, K = 10, 3
    scale = np.repeat(np.geomspace(0.01, 100, n), K)
    A = Dense(scale[:, None] * positive_definite(rng, n * K, condition=5.0) * scale)
    z = torch.from_numpy(rng.normal(size=n * K))
    if kind == "jacobi":
        precondition = jacobi(A.matrix.diagonal(), 0.0)
    else:
        rows = torch.arange(n)
        precondition = block_jacobi(A.matrix.view(n, K, n, K)[rows, :, rows, :], 0.0)
    _, plain = conjugate_gradient(A, z, tolerance=1e-8, max_iterations=2000)
    t, helped = conjugate_gradient(A, z, precondition, tolerance=1e-8, max_iterations=2000)
    assert helped.converged
    assert helped.iterations < n * K < plain.iterations
    np.testing.assert_allclose(A.matrix @ t, z, rtol=0, atol=1e-7 * z.norm())


class Batched:
    """``X^T X``, a random eighth of the rows at a time; ``swell`` times as large from the ninth batch on."""

    def __init__(self, rows=4000, size=60, swell=1.0):
        rng = np.random.default_rng(11)
        self.X = torch.from_numpy(rng.normal(size=(rows, size)) * np.geomspace(1, 0.01, size))
        self.damping = torch.from_numpy(rng.uniform(20, 60, size))
        self.z = torch.from_numpy(rng.normal(size=size))
        self.swell, self.numbers = swell, []

    def __call__(self, number):
        self.numbers.append(number)
        order = np.random.default_rng(number // 8).permutation(len(self.X))[number % 8 :: 8]
        scale = 8 * (self.swell if number >= 8 else 1)
        return Dense(scale * self.X[order].T @ self.X[order])

    def solution(self, rows=slice(None), scale=1.0):
        return torch.linalg.solve(scale * self.X[rows].T @ self.X[rows] + self.damping.diag(), self.z)


class TestBatchDescent:
    def test_agrees_with_a_direct_solve_with_all_rows(self):
        system = Batched()
        t, report = batch_descent(system, system.z, system.damping)
        expected = system.solution()
        assert report.converged and report.change < 0.05
        assert (t - expected).norm() < 0.02 * expected.norm()
        assert (system.z / system.damping - expected).norm() > 0.5 * expected.norm()
        assert system.numbers == list(range(report.iterations))

    def test_finds_curvature_that_a_fixed_sample_misses(self):
        """As many directions as rows in a batch: the solution with one batch's curvature is too long."""
        system = Batched(rows=800, size=400)
        system.X = torch.from_numpy(np.random.default_rng(12).normal(size=(800, 400)))
        t, _ = batch_descent(system, system.z, system.damping)
        expected, sampled = system.solution(), system.solution(slice(0, 100), 8.0)
        assert sampled.norm() > 1.3 * expected.norm()
        assert (t - expected).norm() < 0.3 * (sampled - expected).norm()

    def test_without_curvature_it_is_the_damping_alone(self):
        z = torch.arange(1.0, 5, dtype=torch.float64)
        t, report = batch_descent(lambda _: Dense(np.zeros((4, 4))), z, 2.0)
        np.testing.assert_allclose(t, z / 2, rtol=1e-12)
        assert report.converged

    def test_a_matrix_need_not_be_positive_where_the_damping_makes_up_for_it(self):
        z, less = torch.arange(1.0, 5, dtype=torch.float64), Dense(-0.4 * np.eye(4))
        t, report = batch_descent(lambda _: less, z, 2.0)
        np.testing.assert_allclose(t, z / 1.6, rtol=0.03)
        assert report.converged
        with pytest.raises(ValueError, match="not positive definite"):
            batch_descent(lambda _: Dense(-2.2 * np.eye(4)), z, 2.0)

    def test_begins_anew_with_smaller_steps_where_it_is_not_stable(self):
        calm, wild = Batched(), Batched(swell=10.0)
        calm.damping, wild.damping = calm.damping / 20, wild.damping / 20
        first = batch_descent(calm, calm.z, calm.damping)[1]
        t, report = batch_descent(wild, wild.z, wild.damping)
        assert report.rate < first.rate and report.iterations > first.iterations
        assert torch.isfinite(t).all()
        wild.swell = 1e6
        with pytest.raises(ValueError, match="not stable"):
            batch_descent(wild, wild.z, wild.damping)

    def test_same_bits_when_run_twice_and_arguments_left_alone(self):
        system = Batched()
        z, damping = system.z.clone(), system.damping.clone()
        first, again = (batch_descent(system, system.z, system.damping)[0] for _ in range(2))
        assert torch.equal(first, again) and torch.equal(z, system.z) and torch.equal(damping, system.damping)

    def test_zero_right_hand_side_needs_no_product(self):
        t, report = batch_descent(None, torch.zeros(5, dtype=torch.float64), 1.0)
        assert torch.equal(t, torch.zeros(5, dtype=torch.float64)) and report.iterations == 0

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuses_what_is_not_finite(self, value):
        system = Batched()
        with pytest.raises(ValueError, match="right-hand side"):
            batch_descent(system, system.z + value, system.damping)
        with pytest.raises(ValueError, match="matrix"):
            batch_descent(lambda _: Dense(np.full((60, 60), value)), system.z, system.damping)

    def test_steps_and_progress(self):
        system, seen = Batched(), []
        _, report = batch_descent(system, system.z, system.damping, 30, lambda *told: seen.append(told))
        assert seen == [(n, 30) for n in range(1, 31)] and report.iterations == 38
