"""LightGCN: what `DotProduct` does, through the propagation in closed form."""

from typing import Any

import numpy as np
import torch

from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.objective import gradient, sampled_triples
from recbole_unlearn.influence.operators import DotProductCurvature
from recbole_unlearn.influence.propagated import Graph, PropagatedCurvature, batch_norms, embedding_l2
from recbole_unlearn.influence.propagated_training import WARM_UP, GraphLoss, PropagatedTraining
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.unlearners.base import Change
from recbole_unlearn.unlearners.dot_product import DotProduct
from recbole_unlearn.unlearners.influence import Influence

# Moves of the weights that replay makes in an epoch, if training made more. On ml-100k, with 40 steps an epoch, 10
# moves forget as faithfully as 40 (docs/lightgcn.md).
MOVES = 20
SECONDS_A_PRODUCT = 2e-11  # of a number with an edge: ml-100k and ML-1M on two cores (results/exact.json)


class Propagated(DotProduct):
    """A LightGCN training: the forgotten interactions leave the triples and the graph.

    Replay runs all rows again, whatever is wanted, since the graph ties them together.
    """

    name = "LightGCN"
    schedules = False

    def __init__(self, trained: Trained, shared: bool = False):
        super().__init__(trained)
        self.layers = trained.model.n_layers
        self.reg_weight, self.require_pow = float(self.config["reg_weight"]), bool(self.config["require_pow"])

    objective: Any = None  # of re-optimisation, which is for BPR only

    def served(self, model=None):
        """A model of its own with the weights as they are now, its graph without what was forgotten."""
        data = self.split.remaining_dataset(np.flatnonzero(self.absent))
        model = new_model(self.config, self.split, data=data)
        model.load_state_dict(self.state_dict)
        return model.eval()

    def warm_up_replay(self) -> None:
        one, weights = np.ones(WARM_UP + 2, np.int64), np.zeros((4, self.P.shape[1]), np.float32)  # two at once
        loss, graph = GraphLoss(self.layers), Graph(one[:1], one[:1], 2, 2, self.layers)
        training = PropagatedTraining(graph, weights, self.recorded.adam, loss, 2, stride=2)
        users, items = one.astype(self.log.users.dtype), one.astype(self.log.items.dtype)
        neg = np.zeros((len(one), self.log.negatives), self.log.dtype)
        training.epoch(users, items, Epoch(np.arange(len(one)), np.arange(len(one) + 1), neg, np.ones(len(one))))

    def warm_up_step(self, way: Influence) -> None:
        super().warm_up_step(way)
        one, weights = np.ones(1, np.int64), np.zeros((4, self.P.shape[1]), np.float32)
        Graph(one, one, 2, 2, self.layers).propagate(weights.astype(np.float64))
        Graph(one, one, 2, 2, self.layers).propagate(weights)

    def _graph(self, without):
        """The graph of the rows that earlier requests left, and ``without`` some."""
        rows = np.setdiff1d(np.flatnonzero(~self.absent), without)
        return Graph(self.log.users[rows], self.log.items[rows], len(self.P), len(self.Q), self.layers)

    def seconds_again(self) -> float:
        products = 2 * self.layers * 2 * self.log.n_rows * self.P.shape[1]
        return self.epochs * self.n_batches * products * SECONDS_A_PRODUCT + super().seconds_again()

    def touches_most(self, rows: np.ndarray) -> bool:
        """Never: the approximation moves all rows too."""
        return False

    def replayed(self, rows: np.ndarray, show_progress: bool = False) -> Change:
        """`retrained`, several steps at once."""
        return self.retrained(rows, "paired", show_progress, max(self.n_batches // MOVES, 1))

    def _all_nodes(self):
        """Users, positives and negatives, as nodes, of all triples of the last epoch that earlier requests left."""
        log, kept = self.log, ~self.absent
        users, items = (np.repeat(np.asarray(ids, np.int64)[kept], log.negatives) for ids in (log.users, log.items))
        negatives = np.asarray(log.epoch(self.epochs - 1), np.int64)[kept].ravel()
        return users, len(self.P) + items, len(self.P) + negatives

    def _embedding_l2(self, nodes, weight, everything):
        """Factors of the embeddings in the gradient of ``EmbLoss`` over some triples, in batches of all of them."""
        norms = np.ones(3)
        if not self.require_pow:
            norms = batch_norms(self.table, everything, self.split.batch_rows * self.log.negatives)
        return embedding_l2(len(self.table), nodes, weight, self.reg_weight, norms)

    def _metric(self, way):
        everything = self._all_nodes()
        factors = self._embedding_l2(everything, np.ones(len(everything[0])), everything)
        return super()._metric(way) + torch.from_numpy(np.repeat(factors, self.P.shape[1]))

    def _embedded(self, weights, without):
        return self._graph(without).propagate(weights)

    def _at(self, triples, graph, way):
        """Curvature of triples at the weights propagated over a graph."""
        E = graph.propagate(self.table)
        parts = E[: len(self.P)], E[len(self.P) :]
        return PropagatedCurvature(graph, DotProductCurvature(triples, *parts, exact=way.exact))

    def curvature(self, after: np.ndarray, way: Influence) -> tuple[Any, int]:
        triples = self._curvature_triples(after, way)
        gone = after[:0] if way.forgotten_stay else after  # nothing but the triples is gone in equation (7)
        return self._at(triples, self._graph(gone), way), len(triples)

    def lost(self, after: np.ndarray, way: Influence) -> torch.Tensor:
        """The gradient of what retraining removes, change of the graph included, minus that of what comes back."""
        rows, log, K, n_users = after, self.log, self.P.shape[1], len(self.P)
        with_them, without_them = self._graph(rows[:0]), self._graph(rows)
        W = self.table
        m = log.negatives

        def through(graph, triples):
            E = graph.propagate(W)
            g = gradient(triples, np.ascontiguousarray(E[:n_users]), np.ascontiguousarray(E[n_users:]))
            return graph.propagate(g.reshape(-1, K)).ravel()

        users, items = np.asarray(log.users, np.int64), np.asarray(log.items, np.int64)
        removed = sampled_triples(users[rows], items[rows], log.gather(rows, self.log_epochs(way)))
        z = through(with_them, removed)
        nodes = removed.users, n_users + removed.pos, n_users + removed.neg
        l2 = self._embedding_l2(nodes, removed.weight, self._all_nodes())
        z += (l2[:, None] * W).ravel() + len(rows) * m * self.weight_decay * W.ravel()
        if not way.forgotten_stay:
            triples = self._curvature_triples(rows, way)
            at = (self._at(triples, graph, way).gradient() for graph in (with_them, without_them))
            z += (next(at) - next(at)).numpy()
        if self.come_back(way.pool_return):
            z -= through(without_them, self._returned(rows, self.log_epochs(way)))
        return torch.from_numpy(z)
