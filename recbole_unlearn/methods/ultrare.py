"""UltraRE: shards by optimal transport, combined by logistic regression (Li et al., "UltraRE", NeurIPS 2023)."""

from math import ceil
from typing import Any

import numba
import numpy as np
import torch

from recbole_unlearn.data.sampling import NegativeDraw
from recbole_unlearn.methods.receraser import Clustered, Points, assign
from recbole_unlearn.methods.shards import ScoreEnsemble, ShardEnsemble, derived_seed
from recbole_unlearn.models.losses import fixed_randomness

NEWTON_STEPS, TOLERANCE = 100, 1e-8  # of the logistic regression: at most; share of the loss that is no gain

# Partition


def transport(
    kernel: np.ndarray, scale: np.ndarray, iterations: int = 200, tolerance: float = 1e-3
) -> tuple[np.ndarray, float]:
    """Sinkhorn's iterations, for a plan ``row_i * kernel_ij * scale_j`` with equal row sums and equal column sums.

    Args:
        kernel: exp(-cost / entropy) ``[points, clusters]``; a row may have any factor.
        scale: where to start, ``[clusters]``.
        tolerance: relative error of the column sums at which it stops.

    Returns:
        Scale and relative error.
    """
    for _ in range(iterations):
        column = scale * (kernel.T @ (1 / (kernel @ scale))) * len(scale) / len(kernel)
        error = np.abs(column - 1).max()
        if error < tolerance:
            break
        scale = scale / np.maximum(column, 1e-100)
        scale = np.maximum(scale / scale.max(), 1e-100)
    return scale, error


def transport_clusters(
    points: Points, shards: int, entropy: float, rounds: int, rng: np.random.Generator
) -> np.ndarray:
    """Balanced clusters by entropic optimal transport to centroids, which are the means of their members.

    The plan gives each point a probability of each cluster; the most certain are assigned first, until a cluster has
    its share, one part in ``shards``.

    Args:
        entropy: weight of the plan's entropy, as a share of the mean cost.

    Returns:
        int64 ``[points]``.
    """
    centroids, labels = points.at(rng.choice(len(points), shards, replace=False)), np.empty(0, np.int64)
    scale = np.ones(shards)
    for _ in range(rounds):
        cost = points.distances(centroids)
        cost /= max(entropy * cost.mean(), 1e-300)
        cost -= cost.min(axis=1, keepdims=True)
        scale, _ = transport(np.exp(-cost), scale)
        cost -= np.log(scale)
        cost -= cost.min(axis=1, keepdims=True)
        cost += np.log(np.exp(-cost).sum(axis=1, keepdims=True))  # minus the logarithm of the probability
        before, labels = labels, assign(cost, ceil(len(points) / shards))
        if np.array_equal(before, labels):
            break
        centroids = points.means(labels, centroids)
    return labels


# Combination


@numba.njit(cache=True, nogil=True)
def pair_scores(user, item, users, items):
    """Each shard's score of pairs: embeddings ``[n, shards, d]``, ids ``[pairs]`` -> float64 ``[pairs, shards]``."""
    shards, size = user.shape[1:]
    result = np.empty((len(users), shards))
    for pair in range(len(users)):
        u, i = users[pair], items[pair]
        for k in range(shards):
            total = 0.0
            for d in range(size):
                total += user[u, k, d] * item[i, k, d]
            result[pair, k] = total
    return result


def logistic_regression(features: np.ndarray, labels: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """Minimise the summed logistic loss + ridge / 2 * |weights|^2 by Newton's method; the intercept is free.

    Args:
        features: float64 ``[n, f]``.
        labels: bool ``[n]``.

    Returns:
        Weights ``[f]`` and intercept.
    """
    x = np.column_stack([features, np.ones(len(features))])
    penalty = np.full(x.shape[1], float(ridge))
    penalty[-1] = 0
    sign = np.where(labels, -1.0, 1.0)

    def objective(w):
        return np.logaddexp(0, sign * (x @ w)).sum() + penalty @ w**2 / 2

    w = np.zeros(x.shape[1])
    value = objective(w)
    for _ in range(NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = x.T @ (probability - labels) + penalty * w
        # the last term keeps the system solvable where a shard is empty and ridge is 0
        curvature = (x.T * (probability * (1 - probability))) @ x + np.diag(penalty + 1e-9)
        step, length = np.linalg.solve(curvature, gradient), 1.0
        while (new := objective(w - length * step)) > value and length > 1e-6:
            length /= 2
        gained = value - new
        if gained > 0:
            w, value = w - length * step, new
        if gained <= TOLERANCE * max(value, 1):
            break
    return w[:-1], w[-1]


class WeightedScore(ScoreEnsemble):
    """Sum of the shards' scores, each times its weight."""


class UltraRE(Clustered):
    """Shards by optimal transport; logistic regression on their scores tells interactions from sampled negatives."""

    name = "ultrare"
    ensemble = WeightedScore

    limits = {"entropy": (1e-4, float("inf"))}

    def cluster(self, points: Points, rng: np.random.Generator) -> np.ndarray:
        return transport_clusters(points, self.shards, self.settings["entropy"], self.settings["rounds"], rng)

    def combine(
        self, user: torch.Tensor, item: torch.Tensor, keep: np.ndarray, show_progress: bool = False
    ) -> tuple[ShardEnsemble, dict[str, Any]]:
        split, seed = self.task.split, derived_seed(self.task.seed, self.shards, self.slices)
        users, items = split.users[keep], split.items[keep]
        sampler = split.remaining(np.flatnonzero(~keep))._sampler
        with fixed_randomness(seed):
            negatives = NegativeDraw(sampler, split.n_users)(users, 1)
        tables = user.numpy(), item.numpy()
        scores = [pair_scores(*tables, users, candidates) for candidates in (items, negatives)]
        labels = np.repeat([True, False], len(users))
        weight, intercept = logistic_regression(np.concatenate(scores), labels, self.settings["ridge"])
        ensemble = self.empty_ensemble(user, item)
        ensemble.weight.data.copy_(torch.from_numpy(weight))
        ensemble.set_popularity(np.bincount(items, minlength=split.n_items))
        return ensemble.to(self.task.config["device"]), {"weights": [float(w) for w in weight], **self.details()}
