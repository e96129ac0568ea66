"""Losses of single rows out of any pairwise model of RecBole.

A model's own ``calculate_loss`` runs unchanged, but for its loss modules: they return one value a triple instead of
the mean, so that the sum that the model makes of them is one value a triple too. Terms that belong to no triple
(norms of whole tables, knowledge graph losses) stay scalars and are added to every triple: the mean is as in training.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.compat.recbole_models import replaced
from recbole_unlearn.devices import torch_streams
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.operators import logistic_curvature

KINK = 0.02  # bandwidth of the kernel that a hinge's kink is smoothed with, in cosines


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """All that draws at random inside draws the same every time, and nothing outside notices."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch_streams(seed):
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Convex(NamedTuple):
    """A part of a loss that is convex, or taken as convex, in outputs of the model."""

    x: torch.Tensor  # outputs, [n] or [n, d]
    value: torch.Tensor  # of the function, [n]
    second: torch.Tensor  # its second derivative by each output, at least 0; broadcasts to x


class Unreduced:
    """The loss modules of a model, made to return one value a triple within ``with unreduced.of(n):``.

    Args:
        model: RecBole model.
        train_batch: triples of a batch in training; of sums, in the mean.
        sums: whether the loss is a sum over the batch.

    Attributes:
        knowledge (int): facts of the knowledge graph in the next batch.
        convex (list of Convex): parts of the loss, in order of the calls of loss modules since `of` was entered.
    """

    def __init__(self, model: AbstractRecommender, train_batch: float, sums: bool = False) -> None:
        self.model, self.train_batch, self.sums = model, train_batch, sums
        self.knowledge = 0
        self.norms: list[float] = []  # mean squared norm of what each EmbLoss call sees, in order of the calls
        self.convex: list[Convex] = []
        self.calibrating = False

    @contextmanager
    def of(self, n: int) -> Iterator["Unreduced"]:
        """``n`` triples; the model's loss modules are its own again afterwards."""
        self.n, self.convex, self.calls = n, [], 0
        with ExitStack() as patches:
            for module in self.model.modules():
                forward = getattr(self, f"_{type(module).__name__}", None)
                if module is not self.model and forward:
                    patches.enter_context(replaced(module, forward=_bind(forward, module)))
            patches.enter_context(replaced(F, normalize=_normalize))
            patches.enter_context(replaced(torch.Tensor, norm=_norm))
            special = getattr(self, f"_model_{type(self.model).__name__}", None)
            if special:
                special(patches)
            yield self

    def _logistic(self, x):
        loss = -F.logsigmoid(x)
        if len(x) != self.knowledge:  # what facts alone weigh is left out of the curvature
            self.convex.append(Convex(x, loss, logistic_curvature(x)))
        return loss

    def _softmax(self, scores, loss):
        """The curvature by scores is ``diag(p) - p p'``: by their distances from their mean under p, ``diag(p)``."""
        p = scores.detach().softmax(1)
        self.convex.append(Convex(scores - (p * scores).sum(1, keepdim=True), loss, p))
        return loss

    def _fold(self, loss):
        """One value a triple from what a loss module saw: the triples, both halves of them, or facts as well."""
        n, k = self.n, self.knowledge
        if len(loss) == n:
            return loss
        if len(loss) == 2 * n:
            return loss.view(2, n).mean(0)
        if len(loss) == n + k:
            return (loss[:n] + loss[n:].mean()) / 2
        return loss.mean()

    # Each method is named after the class of the loss module whose `forward` it stands in for.

    def _BPRLoss(self, module, positive, negative):
        margin = torch.atleast_1d(positive - negative)  # FPMC gives a lone triple's scores as scalars
        return self._fold(self._logistic(margin.view(-1) if margin.numel() == len(margin) else margin))

    def _ConvNCFBPRLoss(self, module, positive, negative):
        return self._logistic(positive - negative)

    def _NegSamplingLoss(self, module, sign, score):
        return self._logistic(sign * score)

    def _BCEWithLogitsLoss(self, module, score, target):
        return self._fold(self._logistic(torch.where(target > 0.5, score, -score)))

    def _CrossEntropyLoss(self, module, scores, target):
        if scores.shape == (self.n, getattr(self.model, "n_items", 0)):
            return self._softmax(scores, F.cross_entropy(scores, target, reduction="none"))
        if scores.dim() != 2 or scores.shape[1] != 2:
            return type(module).forward(module, scores, target)
        own = scores.gather(1, target[:, None]).squeeze(1)
        return self._fold(self._logistic(2 * own - scores.sum(1)))

    def _InnerProductLoss(self, module, anchor, positive, negative):
        losses = [self._logistic((anchor * side).sum(1)) for side in (positive, -negative)]
        return self._fold(losses[0] + losses[1])

    def _TripletMarginLoss(self, module, anchor, positive, negative):
        return self._fold(F.triplet_margin_loss(anchor, positive, negative, module.margin, module.p, reduction="none"))

    def _EmbLoss(self, module, *embeddings, require_pow=False):
        """L2 as a sum over triples. RecBole's unsquared norm over a batch is none: its gradient is that of a quadratic
        whose weight, 1 / norm over the batch, hardly varies between batches. It is fixed here (see `norms`)."""
        total = 0
        for embedding in embeddings:
            rows = len(embedding)
            if module.norm != 2 or not (rows in (self.n, 2 * self.n) or 0 < rows == self.knowledge):
                total = total + type(module).forward(module, embedding, require_pow=require_pow) * (
                    rows / len(embeddings[-1])
                )
                continue
            squares = embedding.reshape(rows, -1).square().sum(1)
            if not require_pow:
                if self.calibrating:
                    self.norms.append(float(squares.detach().mean()))
                per_triple = 1 if rows == self.knowledge else rows / self.n
                norm = (self.train_batch * per_triple * self.norms[self.calls]) ** 0.5
                self.calls += 1
                squares = squares / max(norm, 1e-12)
            total = total + self._fold(squares) / 2
        return total / self.train_batch if self.sums else total

    # What else a model reduces, or draws, on its own.

    def _attraction(self, first, second):
        """``1 - cos`` of two embeddings: half the squared distance of the normalised ones, which is convex in their
        difference. Its second derivative by either alone is the cosine, and not 1: they move on a sphere."""
        difference = F.normalize(first, dim=1) - F.normalize(second, dim=1)
        value = difference.square().sum(1) / 2
        self.convex.append(Convex(difference, value, (1 - value.detach()).clamp(min=0)[:, None]))
        return value

    def _hinge(self, x):
        """``max(x, 0)``. It has a kink and no curvature; its mean over random x has that of the density of x at the
        kink, here by a normal kernel."""
        value = torch.relu(x)
        kernel = torch.exp(-(x.detach() / KINK).square() / 2) / (KINK * (2 * torch.pi) ** 0.5)
        self.convex.append(Convex(x, value, kernel))
        return value

    def _model_SimpleX(self, patches):
        def forward(user, positive, history, history_length, negatives):
            model = self.model
            embeddings = (
                model.user_emb(user),
                model.item_emb(positive),
                model.item_emb(history),
                model.item_emb(negatives),
            )
            user_e = model.dropout(model.get_UI_aggregation(embeddings[0], embeddings[2], history_length))
            near = self._attraction(user_e, embeddings[1])
            far = self._hinge(model.get_cos(user_e, embeddings[3]) - model.margin).mean(1) * model.negative_weight
            return near + far + model.reg_weight * model.reg_loss(*embeddings, require_pow=model.require_pow)

        patches.enter_context(replaced(self.model, forward=forward))

    def _model_SGL(self, patches):
        """Both contrastive views are the full graph, as dropout in evaluation leaves everything in."""
        model = self.model

        def supervised(user_e, item_e, user, positive, negative):
            margin = (user_e[user] * (item_e[positive] - item_e[negative])).sum(1)
            own = model.user_embedding(user), model.item_embedding(positive), model.item_embedding(negative)
            return self._logistic(margin) + model.reg_weight * model.reg_loss(*own)

        def contrast(ids, first, second):
            first, everyone = F.normalize(first[ids], dim=1), F.normalize(second, dim=1)
            same = (first * everyone[ids]).sum(1) / model.ssl_tau
            return torch.logsumexp(first @ everyone.T / model.ssl_tau, 1) - same

        def contrastive(user, item, user_1, user_2, item_1, item_2):
            return model.ssl_weight * (contrast(user, user_1, user_2) + contrast(item, item_1, item_2))

        views = {"sub_graph1": model.train_graph, "sub_graph2": model.train_graph}
        patches.enter_context(replaced(model, calc_bpr_loss=supervised, calc_ssl_loss=contrastive, **views))

    def _model_ConvNCF(self, patches):
        whole = self.model.reg_loss
        patches.enter_context(replaced(self.model, reg_loss=lambda: whole() / self.train_batch))

    def _model_LINE(self, patches):
        order = np.random.default_rng(0).permutation(np.arange(1, self.model.n_users))
        patches.enter_context(replaced(self.model, random_list=order, random_pr=0))


# torch's own have NaN for a second derivative at a row of zeros (an entity without facts, in KGIN and MCCLK).
_torch_norm, _torch_normalize, TINY = torch.Tensor.norm, F.normalize, 1e-12


def _norm(self, p: Any = "fro", dim=None, keepdim=False, dtype=None):
    if p not in ("fro", 2) or dim is None or dtype is not None:
        return _torch_norm(self, p, dim, keepdim, dtype)
    return self.square().sum(dim, keepdim=keepdim).clamp(min=TINY * TINY).sqrt()


def _normalize(input, p=2.0, dim=1, eps=TINY, out=None):
    if p != 2 or out is not None:
        return _torch_normalize(input, p, dim, eps, out)
    return input * input.square().sum(dim, keepdim=True).clamp(min=eps * eps).rsqrt()


def _bind(forward, module):
    return lambda *args, **named: forward(module, *args, **named)


def one_a_triple(loss: torch.Tensor | tuple[torch.Tensor, ...], n: int, name: str) -> torch.Tensor:
    """What ``calculate_loss`` returned as one value a triple, ``[n]``; InputError where it is not."""
    loss = reduce(add, loss) if isinstance(loss, tuple) else loss
    if loss.shape != (n,):
        raise InputError(f"model {name} is not supported: its loss cannot be taken apart into those of single triples")
    return loss
