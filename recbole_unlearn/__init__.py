"""recbole_unlearn: make a trained RecBole pairwise recommender forget, as if retrained.

Importing the package makes trainers that log known to RecBole's own ``get_trainer``, for every model that can be
unlearned from. They and the names below are loaded when they are first asked for, since numba takes seconds to load.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from recbole_unlearn.errors import InputError

if TYPE_CHECKING:
    from recbole_unlearn.quick_start import run_unlearn
    from recbole_unlearn.runs.result import Result
    from recbole_unlearn.training.trained import Trained
    from recbole_unlearn.training.trainer import BPRTrainer, trainer_of
    from recbole_unlearn.unlearner import InfluenceUnlearner, UnlearnSession, load
    from recbole_unlearn.unlearners.base import Unlearned
    from recbole_unlearn.unlearners.choose import Auto
    from recbole_unlearn.unlearners.influence import PAPER, Influence
    from recbole_unlearn.unlearners.reoptimise import Reoptimise
    from recbole_unlearn.unlearners.replay import Replay

__version__ = "0.1.0"
_MODULES = {
    "run_unlearn": "quick_start",
    "Result": "runs.result",
    "Trained": "training.trained",
    "BPRTrainer": "training.trainer",
    "trainer_of": "training.trainer",
    "InfluenceUnlearner": "unlearner",
    "load": "unlearner",
    "UnlearnSession": "unlearner",
    "Unlearned": "unlearners.base",
    "Auto": "unlearners.choose",
    "Influence": "unlearners.influence",
    "PAPER": "unlearners.influence",
    "Reoptimise": "unlearners.reoptimise",
    "Replay": "unlearners.replay",
}
__all__ = [  # noqa: F822  (those of `_MODULES` are loaded when they are first asked for)
    "Auto",
    "BPRTrainer",
    "Influence",
    "InfluenceUnlearner",
    "InputError",
    "PAPER",
    "Reoptimise",
    "Replay",
    "Result",
    "Trained",
    "UnlearnSession",
    "Unlearned",
    "load",
    "run_unlearn",
    "trainer_of",
]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})


def _recbole_trainer(name):
    """What RecBole's ``get_trainer`` finds as the trainer of a model: ours, for those that can be unlearned from.

    It asks for ``recbole.trainer.<model>Trainer`` first; models that RecBole has a trainer for never come here.
    """
    kinds = import_module(f"{__name__}.training.trainer") if name.endswith("Trainer") else None
    trainer = kinds and kinds.trainer_class(name.removesuffix("Trainer"))
    if not trainer:
        raise AttributeError(f"module 'recbole.trainer' has no attribute {name!r}")
    return trainer


def register() -> None:
    """What importing the package does; the queue, which can do without RecBole and torch, leaves it until it serves."""
    from recbole_unlearn.compat import imports

    imports.import_recbole()
    import recbole.trainer

    from recbole_unlearn.compat import moved, patches

    if getattr(recbole.trainer, "__getattr__", None) is not _recbole_trainer:
        patches.apply()
        moved.apply()
        recbole.trainer.__getattr__ = _recbole_trainer


if not (sys.argv[:1] == ["-m"] and f"{__name__}.requests" in sys.orig_argv):  # Python is about to run that
    register()
