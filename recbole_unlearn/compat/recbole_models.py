"""RecBole's model classes, and what of a model is kept and served: names of RecBole's that we rely on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isfunction
from typing import TYPE_CHECKING, Any

import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.shown import PLAIN, public

if TYPE_CHECKING:
    from recbole.trainer import Trainer


def classes_named(name: str) -> list[type]:
    """The classes of this name derived from RecBole's recommenders, wherever they were defined.

    Where some are what their modules have under their names today, these alone: a notebook's cell that is run again
    leaves the class of before alive.
    """
    found, bases = set(), [AbstractRecommender]
    while bases:
        derived = bases.pop().__subclasses__()
        bases += derived
        found |= {each for each in derived if each.__name__ == name}
    return [each for each in found if _is_defined(each)] or list(found)


def _is_defined(kind):
    """Whether a class is what its module has under its name."""
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is kind


def class_named(name: str) -> type | None:
    """The one class of this name, of `classes_named`; None: there is none. InputError: there are several."""
    found = classes_named(name)
    if len(found) > 1:
        where = sorted({f"{each.__module__}.{each.__qualname__}" for each in found})
        raise InputError(
            f"there are several classes {name} ({', '.join(where)}), and the name does not tell which was trained; "
            f"give the class to recbole_unlearn.load(..., model={name})"
        )
    return found[0] if found else None


def is_recboles(kind: type) -> bool:
    """Whether a class is RecBole's own, of which we know what it does, and not a user's."""
    return kind.__module__.partition(".")[0] == "recbole"


def runs_recboles(thing: object, *methods: str) -> bool:
    """Whether methods of an object run RecBole's code, or this package's in its place.

    They do not where a class derived from RecBole's has others, or where others were set on the object or the class.
    Whatever stands in for code of RecBole's asks this first: what is not RecBole's has to run itself.

    Args:
        methods: their names; default: all that the object has of RecBole's classes.
    """
    kinds = filter(is_recboles, type(thing).__mro__)
    names = methods or {name for kind in kinds for name, each in vars(kind).items() if isfunction(each)}
    return bool(names) and all(_written_in(getattr(thing, name)) in ("recbole", "recbole_unlearn") for name in names)


def _written_in(called):
    """The package of the code that something callable runs, whatever name it has borrowed (`functools.wraps`)."""
    code = getattr(called, "__func__", called)
    module = code.__globals__["__name__"] if isfunction(code) else type(code).__module__
    return module.partition(".")[0]


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
