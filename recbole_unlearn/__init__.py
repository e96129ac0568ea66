"""recbole_unlearn: make a trained RecBole pairwise recommender forget, as if retrained.

Importing the package registers :class:`recbole_unlearn.trainer.BPRTrainer` as ``recbole.trainer.BPRTrainer``, the
name under which RecBole's own ``get_trainer`` looks for BPR's trainer first.
"""

import recbole.trainer

from recbole_unlearn import compat

compat.apply()

from recbole_unlearn.input_error import InputError  # noqa: E402
from recbole_unlearn.trainer import BPRTrainer  # noqa: E402

recbole.trainer.BPRTrainer = BPRTrainer

__version__ = "0.1.0"
__all__ = ["BPRTrainer", "InputError"]
