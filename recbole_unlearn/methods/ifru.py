"""IFRU: one influence step on the important rows (Zhang et al., "Recommendation unlearning via influence function",
TORS 2025)."""

from time import perf_counter

import numpy as np

from recbole_unlearn.methods.base import Forgotten
from recbole_unlearn.methods.triples import (
    WITH_ROWS,
    OfCurvature,
    add_to,
    curvature,
    embedding_mask,
    last_epochs,
    lost_gradient,
    solve_on,
)


class IFRU(OfCurvature):
    """``theta <- theta + (H + D)^-1 v``, H and the step restricted to the embedding rows that the request matters to.

    v is the gradient of the forgotten triples (direct influence) and, for models with a graph, what the others'
    gradient owes to the forgotten edges (spillover): together, the gradient of all triples with the old graph minus
    that of the remaining ones with the new. Importance of a user or item spreads one hop, see `importance`; rows with
    more than 0 are kept, for graph models those above the percentile ``graph_percentile``. On the pairwise loss.

    Corrected: sums over triples on both sides. H is the remaining triples' Gauss-Newton matrix by default
    (``hessian: True`` for the exact one, which is indefinite where training stopped early), and D holds
    weight decay's share and ``damping``, per triple.
    """

    models = WITH_ROWS
    candidates = {"damping": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start, task, settings = perf_counter(), self.task, self.settings
        log, epochs = task.log, last_epochs(task.stored, settings["log_epochs"])
        kept = np.delete(np.arange(log.n_rows), rows)
        before, model = task.model(), task.model(task.split.remaining_dataset(rows))
        graph = type(model).__name__ != "BPR"
        H = curvature(model, log, kept, epochs, settings["hessian"])
        z = lost_gradient(before, model, log, rows, epochs)
        users, items = importance(log.users, log.items, rows, log.metadata["n_users"], log.metadata["n_items"])
        least = np.percentile(np.concatenate([users, items]), settings["graph_percentile"]) if graph else 0
        mask = embedding_mask(model, np.flatnonzero(users > least), np.flatnonzero(items > least))
        damping = len(kept) * log.negatives * (settings["damping"] + task.weight_decay)
        step, report = solve_on(H, mask, damping, z, settings["cg_tolerance"], settings["cg_max_iterations"])
        add_to(model, step)
        details = {
            "users": int((users > least).sum()),
            "items": int((items > least).sum()),
            "iterations": report.iterations,
            "residual": report.residual,
            "negative_curvature": report.negative_curvature,
        }
        return Forgotten(model.eval(), perf_counter() - start, details)


def importance(
    users: np.ndarray, items: np.ndarray, forgotten: np.ndarray, n_users: int, n_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """How much a request matters to each user and item, after one hop along the interactions.

    ``I_0(v) = forgotten interactions of v / deg(v)``, ``I_1(w) = sum of I_0 over w and its neighbours / deg(w)``.

    Args:
        users, items: interactions before forgetting, ``[rows]``.
        forgotten: rows of them.

    Returns:
        Float64 ``[n_users]`` and ``[n_items]``.
    """
    user_degree, item_degree = (
        np.maximum(np.bincount(ids, minlength=n), 1) for ids, n in ((users, n_users), (items, n_items))
    )
    first_users = np.bincount(users[forgotten], minlength=n_users) / user_degree
    first_items = np.bincount(items[forgotten], minlength=n_items) / item_degree
    return (
        (first_users + np.bincount(users, first_items[items], n_users)) / user_degree,
        (first_items + np.bincount(items, first_users[users], n_items)) / item_degree,
    )
