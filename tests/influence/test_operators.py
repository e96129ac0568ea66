"""Every curvature operator against a dense matrix that autograd builds in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_unlearn.influence.objective import Triples
from recbole_unlearn.influence.objective import gradient as objective_gradient
from recbole_unlearn.influence.operators import (
    AutogradCurvature,
    Damped,
    DotProductCurvature,
    Sum,
    UserTriples,
    logistic_curvature,
)
from recbole_unlearn.influence.solver import block_jacobi, conjugate_gradient, jacobi
from recbole_unlearn.influence.threads import limited_threads, threads

# The closed form keeps embeddings, h and the scalars e in float32 (epsilon 1.2e-7), sums in float64. A score
# of magnitude 10 is then off by some 1e-6 and so, relatively, is its h.
FLOAT32 = 3e-6
FLOAT64 = 1e-13


@dataclass
class Problem:
    """``users``, ``pos`` and ``weight`` ``[rows]``, ``neg`` ``[rows, m]``, and embeddings in float32."""

    users: np.ndarray
    pos: np.ndarray
    neg: np.ndarray
    weight: np.ndarray
    P: np.ndarray
    Q: np.ndarray

    @property
    def theta(self):
        return torch.from_numpy(np.concatenate([self.P.ravel(), self.Q.ravel()])).double()

    def closed_form(self, exact=False, dtype=np.uint16, embeddings=np.float32):
        triples = UserTriples(
            self.users, self.pos.astype(dtype), self.neg.astype(dtype), len(self.P), len(self.Q), self.weight
        )
        return DotProductCurvature(triples, self.P, self.Q, exact, embeddings)

    def autograd(self, exact=False):
        """``AutogradCurvature`` in float64 over batches of uneven size."""
        params = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in (self.P, self.Q)]

        def weight(rows):
            return torch.from_numpy(self.weight[rows])[:, None]

        def loss(rows):
            return -(weight(rows) * torch.nn.functional.logsigmoid(margins_of(*params, self, rows))).sum()

        def outputs(rows):
            x = margins_of(*params, self, rows)
            return x, logistic_curvature(x, weight(rows))

        batches = np.array_split(np.arange(len(self.users)), 3)
        return AutogradCurvature(params, batches, loss, None if exact else outputs)

    def triples(self):
        m = self.neg.shape[1]
        return Triples(
            np.repeat(self.users, m), np.repeat(self.pos, m), self.neg.reshape(-1), np.repeat(self.weight, m)
        )


def margins_of(P, Q, problem, rows=slice(None)):
    users, pos, neg = (torch.from_numpy(ids[rows]) for ids in (problem.users, problem.pos, problem.neg))
    return (P[users][:, None] * (Q[pos][:, None] - Q[neg])).sum(-1)


def dense(problem, exact):
    """The whole matrix from its definition, float64 ``[size, size]``."""
    shapes = problem.P.shape, problem.Q.shape
    weight = torch.from_numpy(problem.weight)[:, None]

    def margins(theta):
        P, Q = torch.split(theta, [problem.P.size, problem.Q.size])
        return margins_of(P.view(shapes[0]), Q.view(shapes[1]), problem)

    if exact:
        return torch.autograd.functional.hessian(
            lambda theta: -(weight * torch.nn.functional.logsigmoid(margins(theta))).sum(), problem.theta
        )
    jacobian = torch.autograd.functional.jacobian(margins, problem.theta).flatten(0, 1)
    x = margins(problem.theta)
    h = weight * torch.sigmoid(x) * torch.sigmoid(-x)
    return jacobian.T @ (h.reshape(-1, 1) * jacobian)


def columns(operator):
    return torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)], dim=1)


def assert_close(actual, desired, tolerance):
    """Entrywise, relative to the largest entry of ``desired``."""
    desired = np.asarray(desired)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * np.abs(desired).max(initial=0))


def random_problem(seed, n_users, n_items, K, m, rows):
    rng = np.random.default_rng(seed)
    users = np.sort(rng.choice(rng.integers(n_users, size=n_users), rows))  # leaves users without rows
    pos = rng.integers(n_items, size=rows)
    # never the row's own positive, but repeated, and positive in other rows of the same user
    neg = (pos[:, None] + rng.integers(1, n_items, size=(rows, m))) % n_items
    weight = rng.choice([0.0, 0.25, 1.0, 3.0], rows)
    P, Q = (rng.normal(size=(n, K)).astype(np.float32) for n in (n_users, n_items))
    return Problem(users, pos, neg, weight, P, Q)


@pytest.fixture(params=[2, 3], ids=["2 negatives", "3 negatives"])
def small(request):
    """7 users, of which 1, 3, 4 and 6 have no rows; 11 items; K = 3."""
    m = request.param
    problem = random_problem(seed=m, n_users=7, n_items=11, K=3, m=m, rows=6)
    problem.users = np.array([0, 0, 2, 2, 2, 5])
    problem.neg[1] = problem.neg[1, 0]
    problem.weight = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 0.3])
    return problem


@pytest.mark.parametrize("exact", [False, True], ids=["gauss-newton", "hessian"])
class TestAgainstDenseMatrix:
    def test_closed_form(self, small, exact):
        assert_close(columns(small.closed_form(exact)), dense(small, exact), FLOAT32)

    def test_autograd(self, small, exact):
        operator = small.autograd(exact)
        assert_close(columns(operator), dense(small, exact), FLOAT64)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32 - 1),
        n_users=st.integers(1, 9),
        n_items=st.integers(2, 12),
        shape=st.sampled_from([(1, 3), (3, 2), (3, 3), (8, 3), (8, 1)]),  # each is compiled
        rows=st.integers(1, 30),
    )
    def test_random_sizes(self, exact, seed, n_users, n_items, shape, rows):
        problem = random_problem(seed, n_users, n_items, *shape, rows)
        matrix = dense(problem, exact)
        v = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=len(matrix)))
        scale = np.abs(matrix).max() * v.norm()
        closed_form, autograd = problem.closed_form(exact), problem.autograd(exact)
        np.testing.assert_allclose(closed_form.matvec(v), matrix @ v, rtol=0, atol=FLOAT32 * scale)
        np.testing.assert_allclose(autograd.matvec(v), matrix @ v, rtol=0, atol=FLOAT64 * scale)

    def test_closed_form_is_symmetric(self, small, exact):
        matrix = columns(small.closed_form(exact))
        assert_close(matrix.T, matrix, FLOAT32)

    def test_damped_adds_the_diagonal(self, small, exact):
        undamped = small.closed_form(exact)
        matrix = columns(undamped)
        d = torch.linspace(0.1, 7, undamped.size, dtype=torch.float64)
        assert_close(columns(Damped(undamped, d)), matrix + torch.diag(d), FLOAT64)
        assert_close(columns(Damped(undamped, 2.5)), matrix + 2.5 * torch.eye(len(matrix)), FLOAT64)

    def test_no_rows(self, exact):
        operator = random_problem(seed=0, n_users=4, n_items=5, K=3, m=2, rows=0).closed_form(exact)
        np.testing.assert_array_equal(columns(operator), np.zeros((27, 27)))
        assert operator.loss == 0


def test_weight_may_be_one_number(small):
    small.weight = np.full(len(small.users), 0.7)
    triples = UserTriples(
        small.users, small.pos.astype(np.uint16), small.neg.astype(np.uint16), len(small.P), len(small.Q), 0.7
    )
    assert_close(columns(DotProductCurvature(triples, small.P, small.Q)), dense(small, exact=False), FLOAT32)


def test_gauss_newton_is_positive_semidefinite_and_the_hessian_is_not(small):
    gauss_newton = torch.linalg.eigvalsh(columns(small.closed_form()))
    hessian = torch.linalg.eigvalsh(columns(small.closed_form(exact=True)))
    assert gauss_newton[0] >= -FLOAT32 * gauss_newton[-1]
    assert hessian[0] < -0.01 * hessian[-1]


def test_gauss_newton_vanishes_along_joint_rotations(small):
    """Turning P and Q together changes no score: K (K - 1) / 2 directions without curvature."""
    operator = small.closed_form()
    generator = np.array([[0, 1, -2], [-1, 0, 0.5], [2, -0.5, 0]])
    v = torch.from_numpy(np.concatenate([(small.P @ generator).ravel(), (small.Q @ generator).ravel()]))
    scale = dense(small, exact=False).abs().max() * v.norm()
    np.testing.assert_allclose(operator.matvec(v), np.zeros(operator.size), atol=FLOAT32 * scale)


def test_hessian_is_the_derivative_of_the_gradient(small):
    rng = np.random.default_rng(0)
    P, Q = small.P.astype(np.float64), small.Q.astype(np.float64)
    VP, VQ = rng.normal(size=P.shape), rng.normal(size=Q.shape)
    step = 1e-5  # truncation ~step^2, rounding ~1e-16 / step: both far below 1e-8
    ahead = objective_gradient(small.triples(), P + step * VP, Q + step * VQ)
    behind = objective_gradient(small.triples(), P - step * VP, Q - step * VQ)
    slope = (ahead - behind) / (2 * step)
    v = torch.from_numpy(np.concatenate([VP.ravel(), VQ.ravel()]))
    assert_close(small.autograd(exact=True).matvec(v), slope, 1e-8)
    assert_close(small.closed_form(exact=True).matvec(v), slope, FLOAT32)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, FLOAT32), (np.float64, FLOAT64)])
def test_float64_is_exact_and_the_gradient_is_that_of_autograd(wide, small, dtype, tolerance):
    for problem in (wide[0], small):
        problem.weight = problem.weight.astype(np.float32).astype(np.float64)  # as triples store it
        operator = problem.closed_form(exact=True, embeddings=dtype)
        reference = problem.autograd(exact=True)
        v = torch.from_numpy(np.random.default_rng(1).normal(size=operator.size))
        assert_close(operator.gradient(), reference.gradient(), tolerance)
        product = reference.matvec(v)
        np.testing.assert_allclose(operator.matvec(v), product, rtol=0, atol=tolerance * v.norm() * product.abs().max())


def test_a_sum_is_the_operator_of_all_triples(wide):
    """Rows split between two parts, forgotten rows in neither."""
    problem, v = wide
    parts = []
    for part in range(2):
        chosen = np.arange(len(problem.users)) % 2 == part
        rows = (problem.users[chosen], problem.pos[chosen], problem.neg[chosen], problem.weight[chosen])
        parts.append(Problem(*rows, problem.P, problem.Q).closed_form(exact=True))
    whole, total = problem.closed_form(exact=True), Sum(parts)
    assert total.size == whole.size and total.K == whole.K
    np.testing.assert_allclose(total.loss, whole.loss, rtol=1e-12)
    for name in ("gradient", "diagonal", "blocks"):
        assert_close(getattr(total, name)(), getattr(whole, name)(), FLOAT32)
    assert_close(total.matvec(v), whole.matvec(v), FLOAT32)


def test_loss_is_the_weighted_sum(small):
    x = margins_of(*(torch.from_numpy(part).double() for part in (small.P, small.Q)), small).numpy()
    direct = (small.weight[:, None] * np.log1p(np.exp(-x))).sum()
    np.testing.assert_allclose(small.closed_form().loss, direct, rtol=1e-6)


def test_large_margins_stay_finite(small):
    """exp(200) overflows in float32; the loss of such a triple is the margin itself."""
    small.P *= 200
    x = margins_of(*(torch.from_numpy(part).double() for part in (small.P, small.Q)), small)
    assert x.abs().max() > 200
    operator = small.closed_form(exact=True)
    direct = (torch.from_numpy(small.weight)[:, None] * torch.nn.functional.softplus(-x)).sum()
    np.testing.assert_allclose(operator.loss, direct, rtol=1e-6)
    # h = s (1 - s) of a margin of 100 has an absolute error of float32's epsilon, times |p|^2 = 1e5
    error = 1.2e-7 * np.abs(small.P).max() ** 2 * small.weight.max()
    np.testing.assert_allclose(columns(operator), dense(small, exact=True), rtol=1e-4, atol=error)


def test_gradients_agree(small):
    closed_form = objective_gradient(small.triples(), small.P.astype(np.float64), small.Q.astype(np.float64))
    assert_close(small.autograd().gradient(), closed_form, FLOAT64)


@pytest.mark.parametrize("K", [pytest.param(1, marks=pytest.mark.slow), 3, 8])
def test_diagonal_and_blocks_are_those_of_the_gauss_newton_matrix(K):
    problem = random_problem(seed=K, n_users=7, n_items=11, K=K, m=3, rows=13)
    matrix = dense(problem, exact=False)
    rows = len(problem.P) + len(problem.Q)
    blocks = matrix.view(rows, K, rows, K)[torch.arange(rows), :, torch.arange(rows), :]
    for exact in (False, True):  # the preconditioner stays positive semi-definite with the exact Hessian
        operator = problem.closed_form(exact)
        assert_close(operator.diagonal(), matrix.diagonal(), FLOAT32)
        assert_close(operator.blocks(), blocks, FLOAT32)


def test_diagonal_by_automatic_differentiation_is_unbiased():
    problem = random_problem(seed=1, n_users=5, n_items=7, K=2, m=1, rows=30)
    expected = dense(problem, exact=False).diagonal()
    operator = problem.autograd()
    estimate = operator.diagonal(probes=4000)
    assert (estimate - expected).abs().max() < 0.1 * expected.max()
    assert torch.equal(operator.diagonal(), operator.diagonal())
    operator.batches = [[row] for row in range(30)]  # of one output each: the sign drops out
    assert_close(operator.diagonal(), expected, FLOAT64)


def everything(problem, v):
    """All that the closed form computes, as bits."""
    operators = [problem.closed_form(exact) for exact in (False, True)]
    pieces = [part for o in operators for part in (o.matvec(v), o.diagonal(), o.blocks().flatten())]
    return np.concatenate([*pieces, [operators[0].loss]])


@pytest.fixture
def wide():
    """Enough users for every chunk to hold some."""
    problem = random_problem(seed=4, n_users=61, n_items=23, K=3, m=3, rows=307)
    return problem, torch.from_numpy(np.random.default_rng(5).normal(size=problem.P.size + problem.Q.size))


def test_same_bits_when_run_twice(wide):
    problem, v = wide
    np.testing.assert_array_equal(everything(problem, v), everything(problem, v))


def test_products_leave_nothing_behind(wide):
    problem, v = wide
    operator = problem.closed_form()
    first = operator.matvec(v)
    kept = first.clone()
    operator.matvec(-3 * v.flip(0))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(operator.matvec(v), kept)


@pytest.mark.skipif(threads() < 2, reason="one thread only")
def test_same_bits_for_any_number_of_threads(wide):
    results = []
    for n in (1, 2):
        with limited_threads(n):
            results.append(everything(*wide))
    np.testing.assert_array_equal(*results)


def test_width_of_the_ids_does_not_matter(wide):
    problem, v = wide
    short, long = (problem.closed_form(exact=True, dtype=dtype) for dtype in (np.uint16, np.uint32))
    assert short.loss == long.loss
    np.testing.assert_array_equal(short.matvec(v), long.matvec(v))
    np.testing.assert_array_equal(short.diagonal(), long.diagonal())


def in_blocks(problem, exact, folder=None, embeddings=np.float32, **sizes):
    """The closed form with blocks of a size to be given; memory-mapped from a folder if there is one."""
    arrays = problem.users, problem.pos.astype(np.uint16), problem.neg.astype(np.uint16)
    if folder is not None:
        for name, array in zip("upn", arrays, strict=True):
            np.save(folder / f"{name}.npy", array)
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "upn"]
    triples = UserTriples(*arrays, len(problem.P), len(problem.Q), problem.weight, **sizes)
    return DotProductCurvature(triples, problem.P, problem.Q, exact, embeddings)


@pytest.mark.parametrize("exact", [False, True], ids=["gauss-newton", "hessian"])
class TestBlocksOfUsers:
    def test_many_blocks_sum_to_the_whole(self, wide, exact):
        problem, v = wide
        whole, parts = problem.closed_form(exact), in_blocks(problem, exact, block_triples=100)
        assert len(whole.triples.bounds) == 2 and len(parts.triples.bounds) > 4
        np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-12)
        for name in ("gradient", "diagonal", "blocks"):
            assert_close(getattr(parts, name)(), getattr(whole, name)(), FLOAT64)
        assert_close(parts.matvec(v), whole.matvec(v), FLOAT64)

    def test_streaming_a_memory_mapped_log_gives_the_same_bits_and_keeps_no_triples(self, wide, exact, tmp_path):
        problem, v = wide
        kept = in_blocks(problem, exact, block_triples=100)
        streamed = in_blocks(problem, exact, tmp_path, block_triples=100, kept_triples=0)
        assert kept.triples.kept and not streamed.triples.kept
        for _ in range(2):
            np.testing.assert_array_equal(streamed.matvec(v), kept.matvec(v))
        for name in ("gradient", "diagonal", "blocks"):
            np.testing.assert_array_equal(getattr(streamed, name)(), getattr(kept, name)())
        assert streamed.loss == kept.loss
        assert not streamed.triples.neg.flags.owndata and not streamed.triples.neg.flags.writeable  # still the file

    def test_a_user_larger_than_a_block_is_not_split(self, wide, exact):
        problem, v = wide
        whole, parts = problem.closed_form(exact), in_blocks(problem, exact, block_triples=1)
        counts = np.bincount(problem.users)
        assert len(parts.triples.bounds) - 1 <= (counts > 0).sum() + 1
        assert_close(parts.matvec(v), whole.matvec(v), FLOAT64)


def test_many_negatives_to_a_row():
    """The loss takes one logarithm of a product over up to 512 negatives, whose factors go up to 2."""
    problem = random_problem(seed=8, n_users=3, n_items=40, K=3, m=1300, rows=5)
    problem.weight[:] = 1
    x = margins_of(*(torch.from_numpy(part).double() for part in (problem.P, problem.Q)), problem)
    direct = torch.nn.functional.softplus(-x).sum()
    np.testing.assert_allclose(problem.closed_form(embeddings=np.float64).loss, direct, rtol=1e-13)
    problem.P[:] = 0  # every factor is 2
    np.testing.assert_allclose(problem.closed_form().loss, 5 * 1300 * np.log(2), rtol=1e-13)


@pytest.mark.parametrize("exact", [False, True], ids=["gauss-newton", "hessian"])
def test_wide_embeddings(exact, K=64):
    problem = random_problem(seed=K, n_users=5, n_items=9, K=K, m=3, rows=20)
    problem.P /= np.sqrt(K)
    matrix = dense(problem, exact)
    v = torch.from_numpy(np.random.default_rng(1).normal(size=len(matrix)))
    assert_close(problem.closed_form(exact).matvec(v), matrix @ v, 2 * FLOAT32)


@pytest.mark.parametrize("exact", [False, True], ids=["gauss-newton", "hessian"])
@pytest.mark.parametrize("kind", ["jacobi", "block-jacobi"])
def test_preconditioned_conjugate_gradient_agrees_with_a_dense_solve(wide, exact, kind):
    """The system that one influence step solves, end to end."""
    problem, z = wide
    problem.P *= 0.1  # small enough that the damped Hessian is positive definite
    problem.Q *= 0.1
    d = torch.linspace(5, 50, len(z), dtype=torch.float64)
    matrix = dense(problem, exact) + torch.diag(d)
    assert torch.linalg.eigvalsh(matrix)[0] > 0
    operator = problem.closed_form(exact)
    precondition = jacobi(operator.diagonal(), d) if kind == "jacobi" else block_jacobi(operator.blocks(), d)
    step, report = conjugate_gradient(Damped(operator, d), z, precondition, tolerance=1e-10)
    assert report.converged
    expected = torch.linalg.solve(matrix, z)
    np.testing.assert_allclose(step, expected, rtol=0, atol=1e-5 * expected.abs().max())


class TestAutograd:
    def test_parameters_without_curvature_get_zeros(self):
        """One parameter that the loss is linear in, one that it does not hold."""
        used, linear, unused = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (2, 3, 2))

        def loss(factor):
            return factor * (used**3).sum() + linear.sum()

        operator = AutogradCurvature([used, linear, unused], [5.0], loss=loss)
        expected = np.diag([30.0, 30.0, 0, 0, 0, 0, 0])
        np.testing.assert_allclose(columns(operator), expected, rtol=1e-15)
        np.testing.assert_allclose(operator.gradient(), [15, 15, 1, 1, 1, 0, 0], rtol=1e-15)

    def test_linear_loss_has_no_curvature(self):
        theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
        operator = AutogradCurvature([theta], [None], loss=lambda _: theta.sum())
        np.testing.assert_array_equal(columns(operator), np.zeros((3, 3)))

    def test_outputs_without_the_parameters_have_no_gauss_newton_matrix(self):
        """The loss holds the parameter, outside of what it is convex in: as an L2 term does."""
        theta, other = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

        def outputs(_):
            return 2 * other, torch.ones(2, dtype=torch.float64)

        operator = AutogradCurvature([theta], [None], lambda _: other.exp().sum() + (theta**2).sum(), outputs)
        np.testing.assert_array_equal(columns(operator), np.zeros((2, 2)))
        np.testing.assert_array_equal(operator.diagonal(), np.zeros(2))

    def test_diagonal_needs_outputs(self):
        theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match="needs outputs"):
            AutogradCurvature([theta], [None], lambda _: (theta**2).sum()).diagonal()

    def test_parameters_are_left_alone(self, small):
        for exact in (True, False):
            operator = small.autograd(exact)
            before = [p.detach().clone() for p in operator.params]
            operator.matvec(torch.ones(operator.size, dtype=torch.float64))
            operator.gradient()
            for p, kept in zip(operator.params, before, strict=True):
                assert torch.equal(p, kept) and p.grad is None
