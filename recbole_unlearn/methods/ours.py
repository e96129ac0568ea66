"""Ours: replay of the recorded training, re-optimisation or an influence step, whichever is valid (docs/method.md)."""

from time import perf_counter

from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.settings.config import changed
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner


class Ours(Method):
    """This package's unlearner with ``method: auto``: nothing of the request is looked at before it comes."""

    unlearner = None

    def changes(self):
        """Keys of the configuration that differ for this method."""
        return {"paper": False, **self.settings}

    def prepare(self, rows=None):
        """Open the log, load the kernels, and compare the log with the training, as before a log's first request."""
        start = perf_counter()
        self._open().check()
        return perf_counter() - start

    def _open(self):
        task = self.task
        config = changed(task.config, **self.changes())
        opened = Checkpoint(task.path, config, task.stored, task.log)
        self.unlearner = InfluenceUnlearner(opened.trained(task.split, task.seed))
        self.unlearner.warm_up()
        return self.unlearner

    def forget(self, rows, show_progress=False):
        unlearner = self.unlearner or self._open()
        start = perf_counter()
        unlearned = unlearner.unlearn(rows, show_progress)
        unlearner.apply(rows, unlearned)
        model = unlearner.served(self.task.model())
        self.unlearner = None  # the next forget set starts from the original
        details = {key: value for key, value in unlearned.report().items() if key not in ("seconds", "history")}
        return Forgotten(model.eval(), perf_counter() - start, details)
