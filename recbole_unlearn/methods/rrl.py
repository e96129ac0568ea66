"""RRL: fine-tuning on the reversed loss, held in place by the Fisher information (You et al., AAAI 2024)."""

from time import perf_counter

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.devices import placed
from recbole_unlearn.influence.objective import Triples
from recbole_unlearn.influence.operators import AutogradCurvature, DotProductCurvature
from recbole_unlearn.methods.base import Forgotten
from recbole_unlearn.methods.triples import WITH_MARGINS, OfCurvature, curvature, last_epochs, logged_triples, margins


class RRL(OfCurvature):
    """Adam on ``sum_F -ln sigmoid(s_uj - s_ui) + strength * sum_theta FIM_theta (theta - theta_0)^2``.

    Reconstructed from the paper's idea; not for digits. FIM is the diagonal of the Fisher information of the remaining
    triples of the last logged epoch. For the likelihood sigmoid(x) that is the diagonal of the Gauss-Newton matrix,
    ``sum sigmoid(x) (1 - sigmoid(x)) (dx/dtheta)^2``: in closed form for BPR, else the mean of ``probes`` unbiased
    random estimates (Hutchinson). With strength 0.5 the second term is the remaining data's own loss to second order,
    but for what lies off the diagonal. Negatives of F are those that training logged in its last epochs.
    """

    models = WITH_MARGINS
    candidates = {"steps": (3, 10, 30, 100, 300)}

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start, task, settings = perf_counter(), self.task, self.settings
        model = task.model(task.split.remaining_dataset(rows)).train()
        kept = np.delete(np.arange(task.log.n_rows), rows)
        information = fisher(model, curvature(model, task.log, kept, last_epochs(task.stored, 1)), settings["probes"])
        triples = logged_triples(task.log, rows, last_epochs(task.stored, settings["log_epochs"]))
        origin = [value.detach().clone() for value in model.parameters()]
        optimizer = torch.optim.Adam(model.parameters(), lr=task.config["learning_rate"])
        for _ in range(settings["steps"]):
            optimizer.zero_grad()
            loss = reversed_loss(model, triples) + settings["strength"] * distance(model, origin, information)
            loss.backward()
            optimizer.step()
        return Forgotten(model.eval(), perf_counter() - start, {"steps": settings["steps"]})


def reversed_loss(model: AbstractRecommender, triples: Triples) -> torch.Tensor:
    """Sum over triples of -ln sigmoid(-x): the loss as if the negative were the item that the user had chosen."""
    weight = placed(model, triples.weight)
    return -(weight * torch.nn.functional.logsigmoid(-margins(model, triples))).sum()


def distance(model: AbstractRecommender, origin: list[torch.Tensor], information: list[torch.Tensor]) -> torch.Tensor:
    """``sum_theta FIM_theta (theta - theta_0)^2``; ``origin`` and ``information`` are lists of tensors."""
    terms = zip(model.parameters(), origin, information, strict=True)
    return sum(((f * (value - first) ** 2).sum() for value, first, f in terms), torch.zeros(()))


def fisher(
    model: AbstractRecommender, operator: DotProductCurvature | AutogradCurvature, probes: int
) -> list[torch.Tensor]:
    """Diagonal of a Gauss-Newton matrix, as a list of tensors shaped like ``model.parameters()``."""
    flat = operator.diagonal() if isinstance(operator, DotProductCurvature) else operator.diagonal(probes)
    parts = torch.split(flat, [value.numel() for value in model.parameters()])
    pairs = zip(parts, model.parameters(), strict=True)
    return [part.view_as(value).to(value.device, value.dtype) for part, value in pairs]
