"""Replay for models that propagate their embeddings over the user-item graph: all of training again, compiled.

Every weight moves with every batch, since the gradient is propagated too; so all rows are run again, from the recorded
start, with the recorded negatives, without the forgotten interactions in triples and graph.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np

from recbole_unlearn.influence.objective import Redraw
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.propagated_training import GraphLoss, PropagatedTraining
from recbole_unlearn.influence.recorded import Recorded


@dataclass
class Retrained:
    """Result of a replay.

    Attributes:
        weights: ``[n_users + n_items, K]``, float32; users without any triple have their initial ones.
        snapshots: number of epochs -> weights after them.
        triples: that were run through, summed over epochs.
    """

    weights: np.ndarray
    snapshots: dict[int, np.ndarray]
    triples: int


def replay_graph(
    recorded: Recorded,
    start: np.ndarray,
    forgotten: np.ndarray,
    loss: GraphLoss,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
    snapshots: Container[int] = (),
    stride: int = 1,
) -> Retrained:
    """Train again from the recorded start, without some interactions.

    Args:
        recorded: the training; its absent rows count as forgotten. Batches are drawn anew, at the optimiser's rate.
        start: initial weights, flat ``[P.ravel(), Q.ravel()]``.
        forgotten: sorted ints, rows.
        loss: as in training.
        seed: of the order of batches and the returned negatives.
        progress: called after each epoch.
        snapshots: numbers of epochs after which to keep the weights.
        stride: of `PropagatedTraining`.
    """
    users, pos, m, gone = np.asarray(recorded.users), np.asarray(recorded.pos), recorded.m, ~recorded.present()
    gone[forgotten] = True
    n_users, n_items, rng = recorded.n_users, recorded.n_items, np.random.default_rng(seed)
    redraw = Redraw(users, pos, gone, n_items, recorded.popularity, rng)
    users, pos = users[~gone].astype(np.int64), pos[~gone].astype(np.int64)
    graph = Graph(users, pos, n_users, n_items, loss.layers)
    start = np.array(start, np.float32).reshape(n_users + n_items, -1)
    training = PropagatedTraining(graph, start, recorded.optimizer, loss, n_users, stride)
    per_step = max(recorded.batch_triples // m, 1)
    bounds = np.append(np.arange(0, len(users), per_step), len(users))
    rates = np.full(len(bounds) - 1, recorded.optimizer.lr)
    kept = {0: start} if 0 in snapshots else {}
    for epoch, neg in enumerate(recorded.negatives, 1):
        neg = redraw(np.asarray(neg)[~gone])
        training.epoch(users, pos, neg, rng.permutation(len(users)), bounds, rates)
        if epoch in snapshots:
            kept[epoch] = training.W.copy()
        if progress:
            progress()
    return Retrained(training.W, kept, len(users) * m * len(recorded.negatives))
