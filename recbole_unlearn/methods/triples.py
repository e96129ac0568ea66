"""Triples of any pairwise RecBole model: batches, score differences, and the curvature of their loss."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.loss import BPRLoss

from recbole_unlearn.devices import array, placed
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.objective import Triples, sampled_triples
from recbole_unlearn.influence.operators import (
    AutogradCurvature,
    Curvature,
    DotProductCurvature,
    UserTriples,
    logistic_curvature,
)
from recbole_unlearn.influence.solver import SolveReport, conjugate_gradient, preconditioner
from recbole_unlearn.methods.base import Method
from recbole_unlearn.storage.triple_log import TripleLog

# Models whose loss holds one BPRLoss, of triples of a user and two items; and of these, those with a row for each.
WITH_ROWS = ("BPR", "LightGCN", "NGCF", "SpectralCF", "DGCF", "KTUP")
WITH_MARGINS = (*WITH_ROWS, "KGIN")
BATCH = 2**17  # triples that automatic differentiation takes at once


def logged_triples(log: TripleLog, rows: np.ndarray, epochs: Sequence[int] | np.ndarray) -> Triples:
    """Triples that some rows anchor, averaged over the last logged epochs.

    Args:
        rows: sorted int array of rows of the log.
        epochs: numbers of the epochs.
    """
    users, items = np.asarray(log.users[rows], np.int64), np.asarray(log.items[rows], np.int64)
    return sampled_triples(users, items, log.gather(rows, epochs))


def last_epochs(stored: dict[str, Any], count: int) -> np.ndarray:
    """Numbers of the last ``count`` epochs of those that a checkpoint's weights were trained for."""
    trained = stored["triple_log"]["epochs"]
    return np.arange(max(trained - max(count, 1), 0), trained)


def batch(model: AbstractRecommender, triples: Triples) -> Interaction:
    """RecBole's Interaction of triples."""
    columns = {model.USER_ID: triples.users, model.ITEM_ID: triples.pos, model.NEG_ITEM_ID: triples.neg}
    return Interaction({name: torch.from_numpy(np.asarray(ids, np.int64)) for name, ids in columns.items()}).to(
        model.device
    )


def margins(model: AbstractRecommender, triples: Triples) -> torch.Tensor:
    """Score differences x of triples, ``[n]``, differentiable; the loss of each is -log sigmoid(x).

    RecBole's models only return the mean loss. What they hand to its ``BPRLoss`` is caught on the way, so that this
    holds for every model that uses it.

    Raises:
        InputError: the model does not.
    """
    caught = []

    def forward(self, pos_score, neg_score):
        caught.append(pos_score - neg_score)
        return caught[0].sum()

    own, BPRLoss.forward = BPRLoss.forward, forward
    try:
        model.calculate_loss(batch(model, triples))
    finally:
        BPRLoss.forward = own
    if len(caught) != 1 or caught[0].numel() != len(triples):
        raise InputError(f"model {type(model).__name__} has no loss of single triples that this method could use")
    return caught[0].view(-1)


def curvature(
    model: AbstractRecommender,
    log: TripleLog,
    rows: np.ndarray,
    epochs: Sequence[int] | np.ndarray,
    exact: bool = False,
) -> DotProductCurvature | AutogradCurvature:
    """Curvature and gradient of the loss, summed over some rows' triples, over ``model.parameters()`` as one vector.

    Without L2, or other terms of the model's loss. In closed form for BPR, by automatic differentiation for others.

    Args:
        rows: sorted int array of rows of the log; may be empty.
        epochs: logged epochs that the triples are averaged over.
        exact: the Hessian; else its Gauss-Newton part.
    """
    if type(model).__name__ == "BPR":
        P, Q = (array(part.weight) for part in (model.user_embedding, model.item_embedding))
        negatives = np.concatenate([log.epoch(epoch)[rows] for epoch in epochs], axis=1)
        triples = UserTriples(log.users[rows], log.items[rows], negatives, len(P), len(Q), 1 / len(epochs))
        return DotProductCurvature(triples, P, Q, exact)
    triples = logged_triples(log, rows, epochs)
    ends = range(0, max(len(triples), 1), BATCH)
    parts = [
        Triples(*(column[n : n + BATCH] for column in (triples.users, triples.pos, triples.neg, triples.weight)))
        for n in ends
    ]
    parts = [part for part in parts if len(part)]

    def weight(part):
        return placed(model, part.weight)

    def loss(part):
        return -(weight(part) * torch.nn.functional.logsigmoid(margins(model, part))).sum()

    def outputs(part):
        x = margins(model, part)
        return x, logistic_curvature(x, weight(part))

    return AutogradCurvature(list(model.parameters()), parts, loss, None if exact else outputs)


def lost_gradient(
    before: AbstractRecommender,
    after: AbstractRecommender,
    log: TripleLog,
    rows: np.ndarray,
    epochs: Sequence[int] | np.ndarray,
) -> torch.Tensor:
    """What the gradient of the summed loss loses with some rows: of all triples before, minus of those kept after.

    That is the forgotten triples' gradient, and what the others' owe to the graph; those that it does not reach cancel.

    Args:
        before, after: the same weights, a graph model's with the graph before and after.
    """
    if type(before).__name__ == "BPR":  # no graph: all others cancel
        return curvature(before, log, rows, epochs).gradient()
    everything = np.arange(log.n_rows)
    kept = np.delete(everything, rows)
    return curvature(before, log, everything, epochs).gradient() - curvature(after, log, kept, epochs).gradient()


class OfCurvature(Method):
    """A method that takes the curvature of triples, and trains nothing beforehand."""

    def prepare(self, rows: np.ndarray | None = None) -> float:
        """Load (or, the very first time, compile) the kernels, so that a request is timed without."""
        start, exact = perf_counter(), self.settings.get("hessian", False)
        operator = curvature(self.task.model(), self.task.log, np.zeros(1, np.int64), [0], exact)
        if isinstance(operator, DotProductCurvature):
            operator.matvec(operator.gradient())
            operator.diagonal()
            preconditioner(operator, 1.0)
        return perf_counter() - start


class Restricted:
    """A curvature on some entries of the vector only: ``mask C mask + damping`` there, ``damping`` elsewhere."""

    def __init__(self, curvature: Curvature, mask: torch.Tensor, damping: float) -> None:
        self.curvature, self.mask, self.damping = curvature, mask, damping
        self.size = curvature.size

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.mask * self.curvature.matvec(self.mask * v) + self.damping * v


def solve_on(
    curvature: DotProductCurvature | AutogradCurvature,
    mask: torch.Tensor,
    damping: float,
    z: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, SolveReport]:
    """Solve ``(C + damping) t = z`` restricted to the entries where ``mask`` is 1; the others are 0.

    Args:
        mask: float64 ``[size]`` of zeros and ones, the same within an embedding row.
        damping: added to the diagonal.
    """
    closed = isinstance(curvature, DotProductCurvature)
    precondition = preconditioner(curvature, damping) if closed else None
    operator = Restricted(curvature, mask, damping)
    return conjugate_gradient(operator, mask * z, precondition, tolerance, max_iterations)


def embedding_mask(
    model: AbstractRecommender, users: Sequence[int] | np.ndarray, items: Sequence[int] | np.ndarray
) -> torch.Tensor:
    """1 at the entries of some users' and items' embedding rows, 0 elsewhere: float64, flat over the parameters.

    Raises:
        InputError: the model has no such embeddings.
    """
    named = dict(model.named_parameters())
    if not {"user_embedding.weight", "item_embedding.weight"} <= named.keys():
        raise InputError(f"model {type(model).__name__} has no embedding row a user and an item that could be changed")
    masks = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in named.items()}
    masks["user_embedding.weight"][torch.as_tensor(users, dtype=torch.int64)] = 1
    masks["item_embedding.weight"][torch.as_tensor(items, dtype=torch.int64)] = 1
    return torch.cat([mask.view(-1) for mask in masks.values()])


@torch.no_grad()
def add_to(model: AbstractRecommender, step: torch.Tensor) -> None:
    """Add a flat float64 vector to ``model.parameters()``."""
    parts = torch.split(step, [value.numel() for value in model.parameters()])
    for value, part in zip(model.parameters(), parts, strict=True):
        value.copy_((value.double().cpu() + part.view_as(value)).to(value.dtype))
