"""SCIF: one influence step on the target users' own rows (Li et al., "Selective and collaborative influence function
for efficient recommendation unlearning", ESWA 2023)."""

from time import perf_counter

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.devices import array
from recbole_unlearn.influence.recorded import marked
from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.methods.triples import (
    WITH_ROWS,
    add_to,
    curvature,
    embedding_mask,
    last_epochs,
    logged_triples,
    solve_on,
)
from recbole_unlearn.storage.triple_log import TripleLog


class SCIF(Method):
    """``theta_u <- theta_u + (H_u + D)^-1 [grad l(F) - grad l(F')]`` for each user of whom something is forgotten.

    For BPR, F is the user's full history and F' the history without what is forgotten. Only the users' embedding rows
    change; items keep what they learned. H_u is the Hessian of the user's full history (for dot-product models the
    Gauss-Newton matrix is that Hessian, since x is linear in a user's row); D is weight decay's share and ``damping``,
    which keeps H_u invertible for users with fewer triples than dimensions. Reconstructed for the pairwise loss: the
    paper has pointwise labels; sums over triples on both sides; no forgotten item returns to the negative pool.
    """

    models = WITH_ROWS
    candidates = {"damping": (1e-4, 1e-2, 0.1, 1.0, 10.0)}

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start, task, settings = perf_counter(), self.task, self.settings
        log, epochs = task.log, last_epochs(task.stored, settings["log_epochs"])
        users = np.unique(log.users[rows]).astype(np.int64)
        model = task.model(task.split.remaining_dataset(rows))
        damping = settings["damping"] + log.n_rows * log.negatives * task.weight_decay
        if type(model).__name__ == "BPR":
            change_users(model, log, users, rows, epochs, damping)
            details = {}
        else:
            history = np.flatnonzero(np.isin(log.users, users))
            full = curvature(task.model(), log, history, epochs)
            z = full.gradient() - curvature(model, log, np.setdiff1d(history, rows), epochs).gradient()
            mask = embedding_mask(model, users, [])
            step, report = solve_on(full, mask, damping, z, settings["cg_tolerance"], settings["cg_max_iterations"])
            add_to(model, step)
            details = {"iterations": report.iterations, "residual": report.residual}
        return Forgotten(model.eval(), perf_counter() - start, {"users": len(users), **details})


@torch.no_grad()
def change_users(
    model: AbstractRecommender, log: TripleLog, users: np.ndarray, rows: np.ndarray, epochs: np.ndarray, damping: float
) -> None:
    """The step for BPR, user by user: no user's row is in another's Hessian."""
    P, Q = (array(part.weight).astype(np.float64) for part in (model.user_embedding, model.item_embedding))
    gone = marked(log.n_rows, rows)
    for user in users:
        own = np.arange(*np.searchsorted(log.users, [user, user + 1]))
        triples = logged_triples(log, own, epochs)
        d = Q[triples.pos] - Q[triples.neg]  # dx/dp_u
        s = 1 / (1 + np.exp(d @ P[user]))  # sigmoid(-x)
        removed = np.tile(np.repeat(gone[own], log.negatives), len(epochs))
        z = -(triples.weight * s * removed) @ d
        H = (d.T * (triples.weight * s * (1 - s))) @ d + damping * np.eye(len(P[user]))
        model.user_embedding.weight[user] += torch.from_numpy(np.linalg.solve(H, z)).to(model.user_embedding.weight)
