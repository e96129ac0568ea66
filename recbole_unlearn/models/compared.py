"""RecBole's models whose loss is of inner products, each by its own: pointwise, in `influence.summed_training`.

What a batch compares follows from its ids, and from what the model draws of them. These classes alone: one derived may
have another loss.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.general_recommender import LINE
from recbole.model.knowledge_aware_recommender import CFKG

from recbole_unlearn.data.sampling import NegativeDraw
from recbole_unlearn.devices import array
from recbole_unlearn.influence.summed_training import PRODUCT, Part


class Compared(NamedTuple):
    """What the loss of a batch compares, in rows of one table of embeddings.

    Attributes:
        queries: those whose sum is multiplied, ints ``[rows, any]``.
        high, low: those with which that is to be great, and small, ints ``[rows]``.
        shares: of each row's loss in the batch's, float64 ``[rows]``.
    """

    queries: np.ndarray
    high: np.ndarray
    low: np.ndarray
    shares: np.ndarray


Told = Callable[[Interaction], Compared]  # draws what the model's own ``calculate_loss`` draws


class _Users:
    """Draws LINE's users of items, as its ``sampler`` does, with the membership test compiled."""

    def __init__(self, model: Any) -> None:
        self.sampling, self.used_ids = model.random_num, model.used_ids
        self._draw = NegativeDraw(self, model.n_items, model.n_users)

    def __call__(self, items: np.ndarray) -> np.ndarray:
        return self._draw(items, 1)


def _line(model: Any, begins: Sequence[int]) -> Told:
    """A user's items, or an item's users, which it draws itself; of second order the same of their contexts, too."""
    user, item, *contexts = begins
    drawn = _Users(model)

    def told(batch):
        users, items, negatives = (array(batch[name]) for name in (model.USER_ID, model.ITEM_ID, model.NEG_ITEM_ID))
        if random.random() < 0.5:
            query, high, low, among = user + users, items, negatives, [item, *contexts[1:]]
        else:
            query, high, low, among = item + items, users, drawn(items), [user, *contexts[:1]]
        shares = np.repeat([1, model.second_order_loss_weight][: len(among)], len(users)) / len(users)
        high, low = (np.concatenate([begin + ids for begin in among]) for ids in (high, low))
        return Compared(np.tile(query, len(among))[:, None], high, low, shares)

    return told


def _cfkg(model: Any, begins: Sequence[int]) -> Told:
    """The items of a user who buys, and the tails of a head and a relation, in one mean."""
    user, entity, relation = begins
    pairs = model.USER_ID, model.ITEM_ID, model.NEG_ITEM_ID
    facts = model.HEAD_ENTITY_ID, model.RELATION_ID, model.TAIL_ENTITY_ID, model.NEG_TAIL_ENTITY_ID

    def told(batch):
        users, items, negatives = (array(batch[name]) for name in pairs)
        heads, relations, tails, others = (array(batch[name]) for name in facts)
        buys = np.full_like(users, model.n_relations)  # the last relation
        starts = np.concatenate([user + users, entity + heads]), relation + np.concatenate([buys, relations])
        high, low = (entity + np.concatenate(ends) for ends in ((items, tails), (negatives, others)))
        return Compared(np.column_stack(starts), high, low, np.full(len(high), 1 / len(high)))

    return told


@dataclass(frozen=True)
class _Model:
    """How a model's loss is told.

    Attributes:
        names: of the embeddings, the table's rows, one after the other; those that a model lacks are left out.
        queries: embeddings whose sum a row's query is.
        told: what a batch compares, of a model and where each begins in the table.
        alone: of those that a batch may leave out, each one alone; all others are in every batch, and come first.
        unlike: where it is otherwise, in words; None: it is not.
    """

    names: tuple[str, ...]
    queries: int
    told: Callable[[Any, Sequence[int]], Told]
    alone: tuple[str, ...] = ()
    unlike: Callable[[Any], str | None] = lambda model: None


COMPARED = {
    LINE: _Model(
        ("user_embedding", "item_embedding", "user_context_embedding", "item_context_embedding"),
        1,
        _line,
        alone=("user_context_embedding", "item_context_embedding"),
    ),
    CFKG: _Model(
        ("user_embedding", "entity_embedding", "relation_embedding"),
        2,
        _cfkg,
        unlike=lambda model: None if model.loss_function == "inner_product" else "its loss is one of distances",
    ),
}


class Comparisons:
    """Such a model, seen by the kernels.

    Attributes:
        parameters: whose rows are the table's.
        part: that its scores are made of, as it is now.
        queries: embeddings whose sum a row's query is.
        told: what a batch compares.
        owner: number of each parameter among those that batches may leave out, for which the first is all others'.
    """

    def __init__(self, model: AbstractRecommender) -> None:
        known = COMPARED[type(model)]
        names = [name for name in known.names if hasattr(model, name)]
        self.parameters: list[torch.Tensor] = [model.get_parameter(f"{name}.weight") for name in names]
        rows = [array(value) for value in self.parameters]
        begins = np.cumsum([0, *map(len, rows)])[:-1].tolist()
        alone = [begin for name, begin in zip(names, begins, strict=True) if name in known.alone]
        self.part = Part(PRODUCT, np.concatenate(rows), begins=(0, *alone))
        self.queries = known.queries
        self.owner = (np.searchsorted(self.part.begins, begins, "right") - 1).tolist()
        self.told = known.told(model, begins)


def otherwise(model: AbstractRecommender) -> str | None:
    """Why a model's loss is not told here, in words; None where it is, or the model is none of these."""
    known = COMPARED.get(type(model))
    return known.unlike(model) if known else None
