"""Linear solves that say what happened: conjugate gradient, and descent by batches of a curvature too dear for it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from recbole_unlearn.influence.operators import BlockCurvature, Curvature, LossCurvature

Preconditioner = Callable[[torch.Tensor], torch.Tensor]  # r -> M^-1 r

BLOCK_JACOBI_UP_TO = 16  # K; beyond, K x K blocks cost more than the iterations they save

# Of `batch_descent`. At rate r and momentum b, eigenvalues below 2 (1 + b) / (1 - b) / r = 38 / r are stable.
MOMENTUM = 0.9
STABLE = 16.0  # rate times the largest eigenvalue that was seen; some batches have larger ones
STEPS = 120
REACH = 6.0  # rate times steps at most: directions without curvature are right from the start
PRODUCTS_FOR_RATE = 8
RESTARTS = 4
SETTLED = 0.5


class Space:
    """Algebra of flat vectors that this process holds whole; for vectors spread over several, see `sharding.Shard`."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Inner product, a tensor without dimensions."""
        return torch.dot(a, b)

    def norm(self, v: torch.Tensor) -> float:
        """Euclidean norm, a number."""
        return v.norm().item()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over processes."""
        return x

    def once(self, v: torch.Tensor) -> torch.Tensor:
        """The entries that count here."""
        return v

    def together(self, curvature: BlockCurvature) -> BlockCurvature:
        """The sum of the processes' curvatures."""
        return curvature


@dataclass
class SolveReport:
    """How a linear solve went.

    Attributes:
        iterations: products with the matrix.
        residual: final ``||A t - z|| / ||z||``, recursively updated as CG does.
        converged: whether the residual fell below the tolerance.
        negative_curvature: whether a direction with ``d^T A d <= 0`` was met; CG stops there.
        history: relative residual after each iteration.
    """

    iterations: int = 0
    residual: float = 0.0
    converged: bool = True
    negative_curvature: bool = False
    history: list[float] = field(default_factory=list)


def conjugate_gradient(
    operator: Curvature,
    z: torch.Tensor,
    precondition: Preconditioner | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    progress: Callable[[SolveReport], object] | None = None,
    space: Space | None = None,
) -> tuple[torch.Tensor, SolveReport]:
    """Solve ``A t = z`` for symmetric positive definite ``A``.

    On negative curvature the iterate so far is returned, as in truncated Newton methods (Steihaug 1983): zeros if it
    is met at the first direction.

    Args:
        operator: ``A``.
        z: float64 ``[size]``.
        precondition: ``r -> M^-1 r``.
        tolerance: stop at ``||r|| <= tolerance ||z||``.
        progress: called with the report after each iteration.
        space: of the vectors; default: this process holds them whole.
    """
    space = space or Space()
    precondition = precondition or (lambda r: r)
    report = SolveReport()
    t = torch.zeros_like(z)
    norm = space.norm(z)
    if norm == 0:
        return t, report
    if not norm < float("inf"):
        raise ValueError("the right-hand side of the linear solve is not finite")
    r = z.clone()
    y = precondition(r)
    d = y.clone()
    rho = space.dot(r, y)
    report.residual, report.converged = 1.0, False
    while report.iterations < max_iterations:
        Ad = operator.matvec(d)
        report.iterations += 1
        curvature = space.dot(d, Ad).item()
        if curvature != curvature:
            raise ValueError("the matrix of the linear solve is not finite")
        if curvature <= 0:
            report.negative_curvature = True
            break
        alpha = rho / curvature
        t += alpha * d
        r -= alpha * Ad
        report.residual = space.norm(r) / norm
        report.history.append(report.residual)
        if progress:
            progress(report)
        if report.residual <= tolerance:
            report.converged = True
            break
        y = precondition(r)
        rho, previous = space.dot(r, y), rho
        d = y + (rho / previous) * d
    return t, report


@dataclass
class DescentReport:
    """How a `batch_descent` went.

    Attributes:
        iterations: products with the curvature of a batch, those for the rate and of runs begun anew included.
        rate: of the first step.
        change: distance of the result from the mean of the second half of the iterates, as a share of the
            result, in the norm of the damping: noise and what is not settled yet.
        converged: whether it is at most `SETTLED`.
    """

    iterations: int = 0
    rate: float = 0.0
    change: float = 0.0
    converged: bool = True


def batch_descent(
    curvature_of: Callable[[int], Curvature],
    z: torch.Tensor,
    damping: float | torch.Tensor,
    max_iterations: int = 200,
    progress: Callable[[int, int], object] | None = None,
    steps: int = STEPS,
) -> tuple[torch.Tensor, DescentReport]:
    """Solve ``(H + D) t = z`` for an H that is known a random batch at a time, ``H + D`` positive definite.

    ``t <- t - r D^-1 m``, with m a running mean of the gradients ``(H_b + D) t - z``, and r falling to zero. Every
    batch is another, so that all of H counts at the price of a part: a fixed sample of fewer rows than H has
    directions misses curvature, and its t is too long. It starts from ``D^-1 z``: directions without curvature are
    right at once, those with much of it are soon.

    Args:
        curvature_of: number of the batch -> curvature of it, scaled to the whole: H in expectation.
        z: float64 ``[size]``.
        damping: D, above 0; ``[size]`` or a number.
        max_iterations: steps at most, of the ``steps`` that it takes.
        progress: called with the number of steps done and to do after each.
        steps: fewer will do where D is large.

    Raises:
        ValueError: z or a product is not finite, no rate that was tried is stable, or ``t'(H + D)t`` is not positive.
    """
    report = DescentReport()
    damping = torch.as_tensor(damping, dtype=z.dtype).expand_as(z)
    start = z / damping
    length = _norm(start, damping)
    if length == 0:
        return start, report
    if not length < float("inf"):
        raise ValueError("the right-hand side of the linear solve is not finite")

    def product(v: torch.Tensor) -> torch.Tensor:
        report.iterations += 1
        return curvature_of(report.iterations - 1).matvec(v)

    steps = min(steps, max_iterations)
    rate = min(STABLE / _largest(product, damping), REACH / steps)
    for _ in range(RESTARTS):
        report.rate = rate
        t, m, late, along = start, torch.zeros_like(z), torch.zeros_like(z), 0.0
        for step in range(steps):
            pull = product(t) + damping * t
            if step >= steps // 2:
                along += t.dot(pull).item()
            m = MOMENTUM * m + (1 - MOMENTUM) * (pull - z)
            t = t - rate * (1 - step / steps) * m / damping
            if not _norm(t, damping) < 2 * length:  # longer than any solution
                break
            if step >= steps // 2:
                late += t / (steps - steps // 2)
            if progress:
                progress(step + 1, steps)
        else:
            if along <= 0:
                raise ValueError("the matrix of the linear solve is not positive definite")
            report.change = _norm(t - late, damping) / _norm(t, damping)
            report.converged = report.change <= SETTLED
            return t, report
        rate /= 2
    raise ValueError("the linear solve by batches is not stable at any rate that was tried")


def _norm(v: torch.Tensor, damping: torch.Tensor) -> float:
    return (damping * v).dot(v).sqrt().item()


def _largest(product: Callable[[torch.Tensor], torch.Tensor], damping: torch.Tensor) -> float:
    """Largest eigenvalue of ``D^-1 (H_b + D)`` that the power method meets, at least 1."""
    largest = 1.0
    v = torch.randn(len(damping), generator=torch.Generator().manual_seed(0), dtype=damping.dtype) / damping.sqrt()
    for _ in range(PRODUCTS_FOR_RATE):
        v = v / _norm(v, damping)
        Hv = product(v)
        eigenvalue = 1 + v.dot(Hv).item()
        if not eigenvalue < float("inf"):
            raise ValueError("the matrix of the linear solve is not finite")
        largest = max(largest, eigenvalue)
        v = v + Hv / damping
    return largest


def preconditioner(curvature: LossCurvature, damping: float | torch.Tensor) -> Preconditioner:
    """Block-Jacobi or, where the blocks are large, Jacobi preconditioner of ``curvature + diag(damping)``."""
    blocks = getattr(curvature, "blocks", None)  # some have none
    if curvature.K <= BLOCK_JACOBI_UP_TO and blocks:
        return block_jacobi(blocks(), damping)
    return jacobi(curvature.diagonal(), damping)


def block_jacobi(blocks: torch.Tensor, d: float | torch.Tensor) -> Preconditioner:
    """Preconditioner from K x K diagonal blocks ``[n, K, K]`` and the damping diagonal ``[n K]`` (or a number).

    A block that is not positive definite even so (an embedding row in fewer triples than K, without damping) is
    replaced by the identity. The blocks come from float32 sums, so pivots below 1e-6 of the block count as zero.
    """
    n, K = blocks.shape[:2]
    d = torch.as_tensor(d, dtype=blocks.dtype).expand(n * K).reshape(n, K)
    full = blocks + torch.diag_embed(d)
    factor, info = torch.linalg.cholesky_ex(full)
    pivots = factor.diagonal(dim1=1, dim2=2) ** 2
    bad = (info != 0) | (pivots < 1e-6 * pivots.amax(1, keepdim=True)).any(1)
    factor[bad] = torch.eye(K, dtype=blocks.dtype)
    inverse = torch.cholesky_inverse(factor)
    return lambda r: torch.bmm(inverse, r.view(n, K, 1)).view(-1)


def jacobi(diagonal: torch.Tensor, d: float | torch.Tensor) -> Preconditioner:
    """Preconditioner from the diagonal ``[size]`` and the damping; zeros are replaced by one."""
    full = diagonal + d
    inverse = torch.where(full > 0, 1 / full, torch.ones_like(full))
    return lambda r: inverse * r
