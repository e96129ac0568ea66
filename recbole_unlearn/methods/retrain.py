"""Retrain: new weights on the remaining data."""

import numpy as np

from recbole_unlearn.devices import read
from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.training.fit import train


class Retrain(Method):
    """The target that all others are measured against.

    Training anew on the remaining interactions, with the model's seed and stopping rule; negatives are drawn from the
    new pool, which the forgotten items belong to again. Stays in ``task.folder``, without a log.
    """

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        task = self.task
        task.folder.mkdir(parents=True, exist_ok=True)
        path = task.folder / "retrained.pth"
        model, _, seconds = train(task.config, task.split, path, rows, task.seed, log_negatives=False)
        epoch = read(path)["epoch"]
        return Forgotten(model.eval(), seconds, {"epochs": epoch + 1})
