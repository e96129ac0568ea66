"""Certified removal of each user's own vector (Guo et al., "Certified Data Removal from Machine Learning Models",
ICML 2020)."""

from math import log, sqrt
from time import perf_counter

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.devices import array
from recbole_unlearn.influence.recorded import marked
from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.methods.triples import last_epochs, logged_triples

TOLERANCE = 1e-9  # length of a gradient that counts as none
NEWTON_STEPS = 100


class CertifiedRemoval(Method):
    """``p_u <- p_u - H'_u^-1 g'_u``: one Newton step on the user's remaining triples, of a model that is made for it.

    With the items' vectors fixed, BPR is a logistic regression for each user, on differences of items, without labels
    to guess: ``L_u(p) = sum -log sigmoid(p . (q_i - q_j)) + regularisation/2 |p|^2 + b_u . p`` with b_u ~ N(0,
    sigma^2). `prepare` finds each user's minimum, and the method's own original has these vectors. The step leaves a
    gradient of some length, the ``residual`` of ``details`` over all users, which b hides: the users' vectors are
    (``epsilon``, delta)-certified, *given the items' vectors*. Those were trained on what is forgotten, and stay.

    The paper's linear model on a public extractor, the items' vectors being the extractor. A user of whom nothing
    remains has the minimum of what is left, ``-b_u / regularisation``, exactly. Regularisation is not multiplied by
    the number of triples, so that this minimum exists.
    """

    models = ("BPR",)
    positive = ("regularisation", "delta")
    candidates = {"regularisation": (0.1, 0.3, 1.0, 3.0, 10.0)}
    fitted: np.ndarray | None = None

    def prepare(self, rows: np.ndarray | None = None) -> float:
        start = perf_counter()
        self._fit()
        return perf_counter() - start

    def _fit(self):
        """Each user's vector at the minimum, ``[n_users, K]``; of the same request always the same.

        Who has no triple is at the noise's own minimum, as one who has lost all: so the two cannot be told apart.
        """
        model = self.task.model()
        self.items, found = (_table(part) for part in (model.item_embedding, model.user_embedding))
        self.epochs = last_epochs(self.task.stored, self.settings["log_epochs"])
        self.noise = self.settings["sigma"] * np.random.default_rng(self.task.seed).standard_normal(found.shape)
        gone = np.zeros(self.task.log.n_rows, bool)
        for user in range(1, len(found)):  # but the padding
            found[user] = self.problem(user, gone).minimum(found[user])
        self.fitted = found
        return found

    def problem(self, user: int, gone: np.ndarray) -> "UserProblem":
        """That of a user without the rows that are ``gone``, bool ``[rows]``."""
        log = self.task.log
        own = np.arange(*np.searchsorted(log.users, [user, user + 1]))
        triples = logged_triples(log, own[~gone[own]], self.epochs)
        differences = self.items[triples.pos] - self.items[triples.neg]
        return UserProblem(differences, triples.weight, self.settings["regularisation"], self.noise[user])

    def original(self) -> AbstractRecommender:
        return self._model(self._fit() if self.fitted is None else self.fitted)

    @torch.no_grad()
    def _model(self, users):
        model = self.task.model()
        model.user_embedding.weight.copy_(torch.from_numpy(users))
        return model.eval()

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        found = (self._fit() if self.fitted is None else self.fitted).copy()
        start, settings, log = perf_counter(), self.settings, self.task.log
        gone = marked(log.n_rows, rows)
        users, left = np.unique(log.users[rows]), 0.0
        for user in users:
            remaining = self.problem(user, gone)
            gradient, hessian = remaining.derivatives(found[user])
            found[user] -= np.linalg.solve(hessian, gradient)
            left += float((remaining.derivatives(found[user])[0] ** 2).sum())
        model, residual = self._model(found), sqrt(left)
        details = {
            "users": len(users),
            "residual": residual,
            "epsilon": certified_epsilon(residual, settings["sigma"], settings["delta"]),
        }
        return Forgotten(model, perf_counter() - start, details)


class UserProblem:
    """Logistic regression of one user's vector p: ``sum w -log sigmoid(d . p) + regularisation/2 |p|^2 + b . p``.

    Args:
        d: what each triple's score difference is the inner product with, ``[triples, K]``.
        weight: of each triple.
        b: ``[K]``.
    """

    def __init__(self, d: np.ndarray, weight: np.ndarray, regularisation: float, b: np.ndarray) -> None:
        self.d, self.weight, self.regularisation, self.b = d, np.asarray(weight, np.float64), regularisation, b

    def value(self, p: np.ndarray) -> float:
        loss = np.logaddexp(0, -(self.d @ p)) @ self.weight
        return float(loss + self.regularisation / 2 * p @ p + self.b @ p)

    def derivatives(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Hessian."""
        s = np.exp(-np.logaddexp(0, self.d @ p))  # sigmoid(-x)
        gradient = self.regularisation * p + self.b - (self.weight * s) @ self.d
        hessian = (self.d.T * (self.weight * s * (1 - s))) @ self.d
        hessian[np.diag_indices_from(hessian)] += self.regularisation
        return gradient, hessian

    def minimum(self, p: np.ndarray) -> np.ndarray:
        """Newton's method from p, each step halved until it does not lead up."""
        for _ in range(NEWTON_STEPS):
            gradient, hessian = self.derivatives(p)
            if np.linalg.norm(gradient) <= TOLERANCE:
                break
            step, value = np.linalg.solve(hessian, gradient), self.value(p)
            while self.value(p - step) > value and np.linalg.norm(step) > TOLERANCE:
                step /= 2
            p = p - step
        return p


def certified_epsilon(residual: float, sigma: float, delta: float) -> float | None:
    """Epsilon for a gradient that is left and noise of a standard deviation (Theorem 3 of the paper); None: without."""
    return sqrt(2 * log(1.5 / delta)) * residual / sigma if sigma else None


def _table(part):
    return array(part.weight).astype(np.float64)
