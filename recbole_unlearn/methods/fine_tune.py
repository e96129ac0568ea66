"""Fine-tuning on the remaining data."""

import copy
from time import perf_counter

import numpy as np

from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.training.trainer import make_trainer


class FineTune(Method):
    """Training goes on for a few epochs on the remaining interactions and their negative pool.

    With the optimiser, its state and its learning rate as the checkpoint holds them, and no validation: what was
    learned of the forgotten interactions fades as far as a few epochs let it.
    """

    candidates = {"epochs": (1, 2, 5, 10, 20)}

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start, task = perf_counter(), self.task
        loader = task.split.remaining(rows, task.seed)
        model = task.model(loader._dataset)
        trainer = make_trainer(task.config, model)
        trainer.log_negatives = False
        trainer.optimizer.load_state_dict(copy.deepcopy(task.stored["optimizer"]))  # torch would go on in our tensors
        for epoch in range(self.settings["epochs"]):
            loss = trainer._train_epoch(loader, epoch, show_progress=show_progress)
        details = {"epochs": self.settings["epochs"]}
        if self.settings["epochs"]:
            details["loss"] = float(sum(loss) if isinstance(loss, tuple) else loss)
        return Forgotten(model.eval(), perf_counter() - start, details)
