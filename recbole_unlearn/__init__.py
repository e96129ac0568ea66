"""recbole_unlearn: make a trained RecBole pairwise recommender forget, as if retrained.

Importing the package makes :class:`recbole_unlearn.trainer.BPRTrainer` known as ``recbole.trainer.BPRTrainer``, the
name under which RecBole's own ``get_trainer`` looks for BPR's trainer first. It and the names below are loaded when
they are first asked for, since numba takes seconds to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from recbole_unlearn import late

late.import_recbole()

import recbole.trainer  # noqa: E402

from recbole_unlearn import compat  # noqa: E402
from recbole_unlearn.input_error import InputError  # noqa: E402

if TYPE_CHECKING:
    from recbole_unlearn.quick_start import run_unlearn
    from recbole_unlearn.session import UnlearnSession
    from recbole_unlearn.trainer import BPRTrainer
    from recbole_unlearn.unlearners import InfluenceUnlearner

__version__ = "0.1.0"
__all__ = ["BPRTrainer", "InfluenceUnlearner", "InputError", "UnlearnSession", "run_unlearn"]

_MODULES = {
    "BPRTrainer": "trainer",
    "InfluenceUnlearner": "unlearners",
    "UnlearnSession": "session",
    "run_unlearn": "quick_start",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})


def _recbole_trainer(name):
    if name != "BPRTrainer":
        raise AttributeError(f"module 'recbole.trainer' has no attribute {name!r}")
    return __getattr__(name)


compat.apply()
recbole.trainer.__getattr__ = _recbole_trainer
