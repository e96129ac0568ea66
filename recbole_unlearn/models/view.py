"""A model on one data set: the losses of rows of the triple log, as a function of its parameters."""

from collections.abc import Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from functools import reduce
from operator import add

import numpy as np
import torch
from recbole.data.dataloader import KnowledgeBasedDataLoader, TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType

from recbole_unlearn.compat.recbole_models import clear_caches
from recbole_unlearn.data.sampling import interaction, negatives_of
from recbole_unlearn.data.split import batch_rows, pairwise_loader
from recbole_unlearn.devices import without_cudnn
from recbole_unlearn.errors import InputError
from recbole_unlearn.models.losses import Unreduced, fixed_randomness, one_a_triple
from recbole_unlearn.models.support import no_step, traits

FACTS = 255  # of the knowledge graph in each batch
LARGE_BATCH = 32_768  # triples; graph models propagate once a batch
LEAST_BATCH = 512  # triples of sequential models, whose histories need room: fewer cost as much

Batch = tuple[Interaction, torch.Tensor]  # rows, and the weight of each one's loss


class View:
    """A model, in evaluation mode, and the training data whose graph and histories it holds.

    Two calls with the same arguments give the same: nothing is dropped out, and what draws at random even so draws
    from fixed seeds.

    Args:
        model: RecBole model; its parameters are not changed.
        loader: RecBole training loader of the same data.
        position: row of the loader's data set of each row of the log, int64 ``[rows]``; -1 where there is none.
        parameters: patterns of parameter names, as ``unlearn_params``; None: all that are trained.
        like: another view, as whose L2 terms those of this one are to weigh.
    """

    def __init__(
        self,
        model: AbstractRecommender,
        loader: TrainDataLoader | KnowledgeBasedDataLoader,
        position: np.ndarray,
        parameters: str | Sequence[str] | None = None,
        like: "View | None" = None,
    ) -> None:
        self.model, self.position = model.eval(), position
        self.loader = pairwise_loader(loader)
        self.dataset = loader._dataset
        self.traits = traits(model)
        self.named = chosen_parameters(model, parameters)
        self.parameters = list(self.named.values())
        config, rows = self.loader.config, batch_rows(self.loader)
        terms = 1 if self.traits.row_loss else self.loader.times
        sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        if self.traits.batch or (sequential and not negatives_of(self.loader)):  # a softmax scores every item
            self.batch_rows = rows
        else:
            least = max(LEAST_BATCH, rows * self.loader.times) if sequential else LARGE_BATCH
            self.batch_rows = max(least // self.loader.times, 1)
        self.facts = self._facts(loader, rows * terms)
        # what a sum over a batch has once comes as often as there are batches, the last one too: their mean size
        size = len(self.dataset) / -(-len(self.dataset) // rows) if self.traits.sums else rows
        self.unreduced = Unreduced(model, like.unreduced.train_batch if like else size * terms, self.traits.sums)
        if like:
            self.unreduced.norms = like.unreduced.norms
        elif not no_step(config):
            self._calibrate(rows)

    def load(self, weights: Mapping[str, torch.Tensor | np.ndarray]) -> None:
        """Set the model's parameters, by name."""
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(torch.as_tensor(weights[name]))

    def of_all(self) -> "View":
        """The same view, of all parameters that are trained."""
        view = copy(self)
        view.named = chosen_parameters(self.model)
        view.parameters = list(view.named.values())
        return view

    def _facts(self, loader, batch):
        """A fixed sample of the knowledge graph, with corrupted tails."""
        if not hasattr(loader, "kg_dataloader"):
            return {}
        with fixed_randomness(0):
            n = min(FACTS, batch - 1, len(loader._dataset.kg_feat))
            index = np.random.choice(len(loader._dataset.kg_feat), n, replace=False)
            return loader.kg_dataloader.collate_fn(index).interaction

    def _calibrate(self, rows):
        """Learn how large embeddings are in a batch of training, for the norms in L2 terms."""
        present = np.flatnonzero(self.position >= 0)
        with fixed_randomness(0), torch.no_grad():
            rows = np.sort(np.random.choice(present, min(rows, len(present)), replace=False))
            drawn = len(rows), negatives_of(self.loader) or 0
            negatives = np.random.randint(1, self.dataset.item_num, drawn)
            self.unreduced.calibrating = True
            self._losses(self.interaction(rows, negatives), len(rows))
            self.unreduced.calibrating = False

    def interaction(self, rows: np.ndarray, negatives: np.ndarray) -> Interaction:
        """A batch as RecBole's loader would make it: log rows ``[B]`` with negatives ``[B, m]``."""
        batch = interaction(self.loader, self.position[rows], negatives)
        n = len(rows) if self.traits.row_loss else negatives.size
        facts = {name: value[int(len(value) == n) :] for name, value in self.facts.items()}  # never as many as triples
        columns = {**batch.interaction, **facts}
        return Interaction(columns).to(self.model.device)

    def batches(self, rows: np.ndarray, negatives: np.ndarray, weight: np.ndarray) -> list[Batch]:
        """``[(interaction, weight)]`` of all rows; ``weight``: float ``[rows]``, of a row's loss in a sum."""
        kind = self.parameters[0]
        result = []
        for start in range(0, len(rows), self.batch_rows):
            part = slice(start, start + self.batch_rows)
            w = torch.as_tensor(weight[part], dtype=kind.dtype, device=kind.device)
            result.append((self.interaction(rows[part], negatives[part]), w))
        return result

    def _losses(self, interaction, rows):
        """Loss of each row, ``[rows]``: a sum over its negatives; its convex parts are left in ``unreduced``."""
        n = rows if self.traits.row_loss else rows * self.loader.times
        clear_caches(self.model)
        self.unreduced.knowledge = next((len(interaction[name]) for name in self.facts), 0)
        with self.unreduced.of(n):
            loss = self.model.calculate_loss(interaction)
        loss = one_a_triple(loss, n, type(self.model).__name__)
        return loss if self.traits.row_loss else loss.view(-1, rows).sum(0)

    def _draws(self, interaction, rows):
        """Losses ``[rows]`` and their convex parts, one pair a fixed seed."""
        for seed in range(self.traits.draws):
            with fixed_randomness(seed):
                # models may change the batch: FEARec adds to it, HRM cuts lengths in place
                copy = Interaction({name: value.clone() for name, value in interaction.interaction.items()})
                with without_cudnn():
                    losses = self._losses(copy, rows)
                yield losses, self.unreduced.convex

    def losses(self, interaction: Interaction, rows: int) -> torch.Tensor:
        """Loss of each row, ``[rows]``, averaged over the draws."""
        return reduce(add, (loss for loss, _ in self._draws(interaction, rows))) / self.traits.draws

    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted sum over a batch of `batches`: a scalar."""
        interaction, weight = batch
        return (weight * self.losses(interaction, len(weight))).sum()

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """``(x, c)``: what `loss` is a convex function of and its second derivative by each, for Gauss-Newton matrices.

        How much each weighs in the loss comes by differentiating the loss by the value of each convex function.
        """
        interaction, weight = batch
        found, curvatures = [], []
        for loss, convex in self._draws(interaction, len(weight)):
            total = (weight * loss).sum() / self.traits.draws
            if not convex:
                continue
            grads = torch.autograd.grad(total, [c.value for c in convex], retain_graph=True, allow_unused=True)
            for (x, _, second), grad in zip(convex, grads, strict=True):
                weights = torch.zeros(1) if grad is None else grad.view(*grad.shape, *[1] * (x.dim() - grad.dim()))
                found.append(x.reshape(-1))
                curvatures.append((weights.to(x) * second).expand_as(x).reshape(-1))
        if not found:  # a loss without curvature in its outputs
            zero = reduce(add, ((p * 0).sum() for p in self.parameters)).view(1)
            return zero, torch.zeros_like(zero)
        return torch.cat(found), torch.cat(curvatures)


def chosen_parameters(
    model: AbstractRecommender, patterns: str | Sequence[str] | None = None
) -> dict[str, torch.nn.Parameter]:
    """Trained parameters by name, in the model's order, whose names match one of the patterns.

    Raises:
        InputError: a pattern matches no parameter.
    """
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if patterns is None:
        return named
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, str(pattern)) for name in named):
            raise InputError(f"unlearn_params: {pattern!r} is no parameter of this model; it has {', '.join(named)}")
    return {name: value for name, value in named.items() if any(fnmatchcase(name, str(p)) for p in patterns)}
