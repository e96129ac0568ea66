"""RecBole's model classes, and what of a model is kept and served: names of RecBole's that we rely on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.settings.shown import PLAIN, public

if TYPE_CHECKING:
    from recbole.trainer import Trainer


def class_named(name: str, base: type = AbstractRecommender) -> type | None:
    """The class of this name derived from RecBole's recommenders, wherever it was defined; None: there is none."""
    for each in base.__subclasses__():
        if found := each if each.__name__ == name else class_named(name, each):
            return found
    return None


def is_recboles(model_class: type) -> bool:
    """Whether a class is RecBole's own, of which we know what it does, and not a user's."""
    return model_class.__module__.partition(".")[0] == "recbole"


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Other attributes of an object or a class, its methods included, for a while."""
    kind = type if isinstance(owner, type) else object  # not the object's own: a module would register parameters
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    for name, value in attributes.items():
        kind.__setattr__(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            kind.__delattr__(owner, name)
        for name, value in before.items():
            kind.__setattr__(owner, name, value)


def checkpoint_state(trainer: "Trainer", epoch: int) -> dict[str, Any]:
    """What RecBole's ``Trainer._save_checkpoint`` stores, in a form that loads with ``weights_only=True``.

    RecBole pickles its ``Config`` object, which torch >= 2.6 refuses to load; here it is a plain dict. Of the
    model's ``other_parameter`` only tensors and plain values are kept: some models put whole layers, or the data
    set with all its interactions, there.
    """
    other = {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in (trainer.model.other_parameter() or {}).items()
        if isinstance(value, PLAIN) or isinstance(value, torch.Tensor)
    }
    return {
        "config": public(trainer.config),
        "epoch": int(epoch),
        "cur_step": int(trainer.cur_step),
        "best_valid_score": float(trainer.best_valid_score),
        "state_dict": {name: value.detach() for name, value in trainer.model.state_dict().items()},
        "other_parameter": other,
        "optimizer": trainer.optimizer.state_dict(),
    }


def scores_all_items(model_class: type[AbstractRecommender]) -> bool:
    """Whether a class scores all items of a user at once; of others RecBole asks for the score of each pair."""
    return model_class.full_sort_predict is not AbstractRecommender.full_sort_predict


CACHES = ("restore_user_e", "restore_item_e", "restore_entity_e")


def clear_caches(model: AbstractRecommender) -> None:
    """Drop the embeddings that graph models keep between ``full_sort_predict`` calls; they outlive a weight change."""
    for name in CACHES:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
