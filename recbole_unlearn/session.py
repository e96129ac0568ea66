"""Many requests on one open model."""

import secrets
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from recbole.utils import init_seed

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.opening import configure, open_unlearner
from recbole_unlearn.runs.output import audit_file, in_one_line, recorded_or_gone, save_unlearned
from recbole_unlearn.storage import audit
from recbole_unlearn.storage.files import locked, sweep_scratch
from recbole_unlearn.storage.paths import check_apart, check_written
from recbole_unlearn.storage.triple_log import log_path
from recbole_unlearn.unlearners import Unlearned, guard


class UnlearnSession:
    """A trained model that forgets request after request, in memory, while it keeps serving.

    Opened once: the triple log is verified and memory-mapped, the kernels are loaded. Each request starts where the one
    before ended: with its weights, its trajectory, and without its interactions. Nothing is written before `save`. The
    checkpoint stays locked until `close`, or the end of a ``with`` block.

    Attributes:
        model: the RecBole model; BPR's weights change in place with each request, of other models it is a new object,
            whose graph and histories have forgotten too.
        guard (Guard): what is known of whether the log tells the training.
        split (Split): the training data as it was when the session was opened.
        forgotten: rows of ``split`` that the session has forgotten, sorted int64 array.
        requests (list of dict): what is on record of each request, see `audit.request_entry`.
    """

    def __init__(self, config, split, stored, log, model, unlearner, guarded=None):
        self.config, self.split = config, split
        self.stored, self.log = stored, log
        self.model, self.unlearner, self.guard = model, unlearner, guarded
        self.requests = []
        self.held = ExitStack()

    @classmethod
    def open(cls, checkpoint, config_file_list=None, config_dict=None, model=None):
        """Open a checkpoint that `run_unlearn` or our trainer wrote.

        Args:
            checkpoint: its path.
            config_file_list (list of str, optional), config_dict (dict, optional): as for `run_unlearn`.
            model (class, optional): of a model of your own.

        Raises:
            InputError: as `run_unlearn` does.
        """
        sweep_scratch()
        settings = {**(config_dict or {}), "checkpoint": str(checkpoint)}
        with ExitStack() as held:
            config, stored, log = configure(held, model, None, config_file_list, settings)
            init_seed(config["seed"], config["reproducibility"])
            split = Split(config).align(log)
            opened = open_unlearner(config, split, stored, log)
            session = cls(config, split, stored, log, *opened, guard.check(opened[1], stored, log))
            session.unlearner.warm_up()
            session.held = held.pop_all()
        return session

    def close(self):
        """Give the checkpoint free."""
        self.held.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    @property
    def forgotten(self):
        return np.flatnonzero(self.unlearner.absent)

    def forget(self, kind, value):
        """Forget some interactions, now.

        Args:
            kind (str): 'users' or 'items' with a list of tokens, 'file' with a path, or another of `forget.KINDS`.
            value: as the key ``forget_<kind>`` wants it.

        Returns:
            Unlearned: its ``state_dict`` is the model's now.

        Raises:
            InputError: unknown tokens or pairs, nothing left to forget or nothing left to model; nothing has changed.
        """
        return self.forget_rows(ForgetRequest.of(kind, value, self.config).rows(self.split))

    def forget_rows(self, rows):
        """As `forget`, for rows of ``split``."""
        rows = np.unique(rows)
        rows = rows[~self.unlearner.absent[rows]]
        if len(rows) == 0:
            raise InputError("the session has already forgotten every interaction of this request")
        if len(rows) + len(self.forgotten) >= self.split.n_rows:
            raise InputError("the request would leave no training interaction to model")
        unlearned = self.unlearner.unlearn(rows)
        self.unlearner.apply(rows, unlearned)
        self.model = self.unlearner.served(self.model)
        self.requests.append(audit.request_entry(len(rows), unlearned))
        return unlearned

    def save(self, path):
        """Write the checkpoint and the log as they are now: nothing that was forgotten is in them.

        Then a line is added to the audit file that the key ``audit`` names, a bare name in the checkpoint's folder.

        Raises:
            InputError: there is something already, another process is writing there, the audit file is damaged, or the
                system refuses.
        """
        path, rows = Path(path), self.forgotten
        _check_new(path)
        check_written("file", path, self.config["checkpoint"])
        trail = audit_file(self.config["audit"], path.parent)
        if trail:
            check_written("audit", trail, self.config["checkpoint"])
            check_apart("audit", trail, {"the new file": path, "the checkpoint": self.config["checkpoint"]})
        unlearner = self.unlearner
        now = Unlearned(unlearner.state_dict, unlearner.method, 0.0, {"chosen": unlearner.chosen}, unlearner.snapshots)
        with in_one_line(path.parent, "file"), locked(path):
            _check_new(path)  # again, now that nobody else can be writing
            before = audit.model_checksums(self.config["checkpoint"], self.stored["state_dict"]) if trail else {}
            with recorded_or_gone(path):
                save_unlearned(path, self.stored, self.log, now, self.split, rows, self.config, guarded=self.guard)
                if trail:
                    after = audit.model_checksums(path, now.state_dict)
                    result = {"forget_set": self.split.counts(rows), "unlearning": now.report(), "models": {}}
                    new = secrets.token_hex(8), result, self.config, before, after, self.requests
                    audit.append(trail, audit.unlearned_record(*new))


def _check_new(path):
    if log_path(path) == path:
        raise InputError(f"{path}: .triples is the ending of a triple log; name a .pth file")
    if path.exists() or log_path(path).exists():
        raise InputError(f"{path} exists already; name a new file")
