"""Re-optimisation: the weights of a converged, regularised model as they are without some triples, certified.

Where training has converged, what retraining would find is a minimum of the remaining triples' objective near the
trained weights, whatever the path of the optimiser. One influence step is the first Newton step towards it. Here
the steps go on, by a trust-region Newton method whose linear solves are truncated conjugate gradient (Steihaug, SIAM
J. Numer. Anal. 20(3), 1983; preconditioned as in Conn, Gould and Toint, Trust-Region Methods, 2000, algorithm 7.5.1),
until the gradient vanishes: its norm, which anyone can recompute, is the certificate.

The objective is not convex, and rotating P and Q together does not change it, so that the Hessian has at least
K (K - 1) / 2 zero eigenvalues at every minimum. Nothing here asks for positive definiteness. A vanishing gradient
alone does not tell a minimum from a saddle; but steps that descend, and follow negative curvature where they meet it,
do not end at a saddle unless they start on one. That they do where L2 had left P and Q a lower rank than K, and the
objective without some triples has room for one more: along columns that are 0 the gradient vanishes, at any weights.
So where a column is missing, its curvature is looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from recbole_unlearn.influence.operators import BlockCurvature, Damped, DotProductCurvature, Sum, UserTriples
from recbole_unlearn.influence.solver import Space, preconditioner

# Differences of the objective below this share of it are rounding: sums of some 1e6 float64 terms.
ROUNDING = 1e-13
# A step that lowers the objective by less than this share of what was predicted is not taken.
ACCEPTED = 0.1
PRODUCTS_PER_STEP = 1000
# A column of P and Q together counts as missing where it holds less than this share of the greatest one's squares.
MISSING = 1e-6
POWER_STEPS = 50  # of two products each, to the direction in which a missing column lowers the objective most


@dataclass
class NewtonReport:
    """How a minimisation went. Gradient norms are of the mean objective: ``||grad|| / n_triples``.

    Attributes:
        iterations: trust-region steps tried.
        products: products with the Hessian, over all steps.
        gradient_norm_before: at the start.
        gradient_norm: of the weights that are returned: the certificate.
        converged: whether it is within the tolerance.
        negative_curvature: whether a direction of negative curvature was met on the way.
        history: gradient norm after each step.
    """

    iterations: int = 0
    products: int = 0
    gradient_norm_before: float = 0.0
    gradient_norm: float = 0.0
    converged: bool = False
    negative_curvature: bool = False
    history: list[float] = field(default_factory=list)


class Objective:
    """``sum_t w_t -log sigmoid(x_t) + (l2 / 2) ||theta||^2``, with x_t = p_u . (q_i - q_j), l2 = N weight_decay.

    Args:
        triples: the sets of triples that are summed over.
        n_triples: N, by which gradient norms are divided too.
        weight_decay: of the mean over N triples, as RecBole has it.
        shape: ``(n_users, n_items, K)``.
        space: of the weights; default: this process holds them, and the triples, whole.
    """

    def __init__(
        self,
        triples: Sequence[UserTriples],
        n_triples: int,
        weight_decay: float,
        shape: tuple[int, int, int],
        space: Space | None = None,
    ) -> None:
        self.space = space or Space()
        self.triples = triples
        self.n_triples = n_triples
        self.l2 = n_triples * weight_decay
        self.n_users, self.n_items, self.K = shape

    def split(self, theta: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The user and item embeddings in a flat vector ``[P.ravel(), Q.ravel()]``, as views."""
        rows = np.asarray(theta).reshape(-1, self.K)
        return rows[: self.n_users], rows[self.n_users :]

    def at(self, theta: torch.Tensor) -> tuple[float, torch.Tensor, BlockCurvature]:
        """Value, gradient and curvature at some weights.

        In float64: with float32 embeddings, the smallest mean gradient norm that could be reached was 1e-9 to 4e-9
        (ml-100k, K = 8), since the rounding of the loss then hides what steps near the minimum gain.

        Args:
            theta: float64 ``[size]``.

        Returns:
            Value, gradient, and the exact Hessian of the loss without L2.
        """
        P, Q = self.split(theta)
        parts = [DotProductCurvature(t, P, Q, exact=True, dtype=np.float64) for t in self.triples]
        loss = self.space.together(Sum(parts))
        return loss.loss + self.l2 / 2 * float(self.space.dot(theta, theta)), loss.gradient() + self.l2 * theta, loss


def flat(P: np.ndarray, Q: np.ndarray) -> torch.Tensor:
    """Embeddings as one float64 vector ``[P.size + Q.size]``."""
    return torch.from_numpy(np.concatenate([np.ravel(P), np.ravel(Q)]).astype(np.float64))


def minimise(
    objective: Objective,
    P: np.ndarray,
    Q: np.ndarray,
    tolerance: float,
    max_iterations: int,
    progress: Callable[[NewtonReport], object] | None = None,
) -> tuple[np.ndarray, np.ndarray, NewtonReport]:
    """Minimise an objective from given embeddings.

    Of the minima that differ by a rotation of P and Q together, the one nearest to the start is returned, in float64.

    Args:
        objective: what to minimise.
        P, Q: embeddings to start at, float ``[n_users, K]`` and ``[n_items, K]``; left alone.
        tolerance: mean gradient norm to reach. Where rounding ends progress before (near 1e-15 on ml-100k),
            it stops there.
        max_iterations: trust-region steps at most.
        progress: called with the report after each step.
    """
    space = objective.space
    start = theta = flat(P, Q)
    value, gradient, loss = objective.at(theta)
    first = norm = space.norm(gradient)
    report = NewtonReport(gradient_norm_before=first / objective.n_triples, gradient_norm=first / objective.n_triples)
    target = tolerance * objective.n_triples
    precondition = radius = None
    stuck = False  # where rounding ends progress
    while report.iterations < max_iterations:
        if norm <= target or stuck:
            away = _off_saddle(objective, theta, value, loss)
            if away is None:
                break
            theta, (value, gradient, loss) = away
            precondition, radius, stuck = None, None, False
            norm = space.norm(gradient)
            report.iterations, report.negative_curvature = report.iterations + 1, True
            continue
        if precondition is None:
            precondition = preconditioner(loss, objective.l2)
        if radius is None:
            radius = space.dot(gradient, precondition(gradient)).sqrt().item()
        # accurate enough for quadratic convergence, no more than the tolerance asks for and one solve can give: below
        # some 1e-6, rounding along the rotations takes over
        accuracy = max(min(0.1, norm / first) * norm, 1e-5 * norm, target / 2)
        model = steihaug(Damped(loss, objective.l2), gradient, precondition, radius, accuracy, space)
        report.iterations += 1
        report.products += model.products
        report.negative_curvature |= model.negative_curvature
        trial = objective.at(theta + model.step)
        trial_norm = space.norm(trial[1])
        ratio = _ratio(value, trial[0], model.decrease, trial_norm < norm)
        if ratio is None:
            stuck = True
            continue
        radius = _next_radius(radius, ratio, model)
        if ratio > ACCEPTED:
            theta = theta + model.step
            value, gradient, loss = trial
            norm = trial_norm
            precondition = None
        report.gradient_norm = norm / objective.n_triples
        report.history.append(report.gradient_norm)
        if progress:
            progress(report)
    if report.iterations:
        theta = nearest_rotation(theta, start, objective.K, space)
        report.gradient_norm = space.norm(objective.at(theta)[1]) / objective.n_triples
    report.converged = report.gradient_norm <= tolerance
    return *objective.split(theta), report


def _off_saddle(objective, theta, value, loss):
    """Weights that have one column more, and the lower objective there, where one is missing and would lower it; else
    None.

    In a direction of K in which all rows are 0 the Hessian is ``[[l2, G], [G^T, l2]]``, G the gradient for the scores:
    a power iteration finds the greatest singular value of G.
    """
    space, K = objective.space, objective.K
    rows = space.once(theta).view(-1, K)
    squares, turn = torch.linalg.eigh(space.sum(rows.T @ rows))
    if squares[0] > MISSING * squares[-1]:
        return None
    z = turn[:, 0]

    def product(v):
        return ((loss.matvec(v).view(-1, K) @ z)[:, None] * z).reshape(-1)

    start = torch.randn(objective.n_items, generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    v = (torch.cat([start.new_zeros(len(theta) // K - len(start)), start])[:, None] * z).reshape(-1)
    for _ in range(POWER_STEPS):
        v = product(product(v))
        if not (length := space.norm(v)):
            return None
        v /= length
    Gv = product(v)
    v = v - Gv / space.norm(Gv)
    v /= space.norm(v)
    if space.dot(v, product(v)) + objective.l2 >= 0:
        return None
    length = space.norm(theta) / np.sqrt(K) or 1.0
    while length**2 > ROUNDING:
        away = theta + length * v
        if (found := objective.at(away))[0] < value - ROUNDING * abs(value):
            return away, found
        length /= 2
    return None


def _ratio(before: float, after: float, predicted: float, flatter: bool) -> float | None:
    """What a step gained over what was predicted; None where neither value nor gradient tells a gain from rounding."""
    gain = before - after
    if max(predicted, abs(gain)) > ROUNDING * abs(before):
        return gain / predicted
    return 1.0 if flatter else None  # the value cannot tell any more, the gradient still can


def _next_radius(radius: float, ratio: float, model: "_Step") -> float:
    if ratio < 0.25:
        return model.length / 4
    return 3 * radius if ratio > 0.75 and model.at_boundary else radius


def nearest_rotation(theta: torch.Tensor, start: torch.Tensor, K: int, space: Space | None = None) -> torch.Tensor:
    """``theta`` with all rows turned together to be nearest to ``start`` (orthogonal Procrustes): no score changes."""
    space = space or Space()
    U, _, V = torch.linalg.svd(space.sum(space.once(theta).view(-1, K).T @ space.once(start).view(-1, K)))
    return (theta.view(-1, K) @ (U @ V)).view(-1)


@dataclass
class _Step:
    """Minimiser of the quadratic model within the trust region, and what the model says about it."""

    step: torch.Tensor
    length: float  # in the norm of the preconditioner
    decrease: float
    products: int
    at_boundary: bool
    negative_curvature: bool


def steihaug(operator, gradient, precondition, radius, accuracy, space):
    """Truncated conjugate gradient on ``g.s + s.H s / 2`` within ``||s||_M <= radius``, M the preconditioner.

    Stops at a residual norm of ``accuracy``; a direction of negative curvature is followed to the boundary.
    """
    s = torch.zeros_like(gradient)
    r = gradient.clone()
    y = precondition(r)
    d = -y
    rho = space.dot(r, y).item()
    # squared M-norms of s and d and their M-product, by recurrence
    ss, sd, dd = 0.0, 0.0, rho
    decrease, products = 0.0, 0
    while products < PRODUCTS_PER_STEP:
        Hd = operator.matvec(d)
        products += 1
        curvature = space.dot(d, Hd).item()
        if curvature != curvature:
            raise ValueError("the Hessian is not finite")
        alpha = rho / curvature
        if curvature <= 0 or ss + 2 * alpha * sd + alpha**2 * dd >= radius**2:
            to_boundary = (np.sqrt(sd**2 + dd * (radius**2 - ss)) - sd) / dd
            s += to_boundary * d
            decrease += to_boundary * rho - to_boundary**2 / 2 * curvature
            return _Step(s, radius, decrease, products, True, curvature <= 0)
        s += alpha * d
        r += alpha * Hd
        decrease += alpha * rho / 2
        ss += 2 * alpha * sd + alpha**2 * dd
        if space.norm(r) <= accuracy:
            break
        y = precondition(r)
        rho, previous = space.dot(r, y).item(), rho
        beta = rho / previous
        d = beta * d - y
        sd, dd = beta * (sd + alpha * dd), rho + beta**2 * dd
    return _Step(s, np.sqrt(ss), decrease, products, False, False)
