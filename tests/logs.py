"""Logs without some rows, for tests that have a log and no training."""

import numpy as np

from recbole_unlearn.influence.coupling import Paired
from recbole_unlearn.influence.recorded import Adam, Recorded


def paired(log, rows, popularity=None):
    """The epochs of the paired training without some rows of a log, five rows a batch."""
    negatives = [log.epoch(epoch) for epoch in range(log.n_epochs)]
    sizes = log.metadata["n_users"], log.metadata["n_items"]
    adam, batch = Adam(0.1, 0.9, 0.999, 1e-8, 0.0), 5 * log.negatives
    recorded = Recorded(log.users, log.items, negatives, *sizes, adam, batch, popularity, static=log.static)
    return Paired(recorded, np.isin(np.arange(log.n_rows), rows))


def without(log, rows, path, run_id, fingerprint, snapshots=None, popularity=None):
    """Write the log of that training, as if it had ended in the recorded weights."""
    return log.without(rows, path, run_id, fingerprint, paired(log, rows, popularity), snapshots)
