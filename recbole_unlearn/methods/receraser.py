"""RecEraser: shards of what is alike, aggregated by attention (Chen et al., "Recommendation Unlearning", WWW 2022)."""

from math import ceil
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.interaction import Interaction
from recbole.model.init import xavier_normal_initialization
from recbole.model.loss import BPRLoss
from recbole.utils import init_seed
from torch import nn

from recbole_unlearn.errors import InputError
from recbole_unlearn.methods.shards import Sharded, ShardEnsemble, derived_seed, fit
from recbole_unlearn.settings.config import changed

# Partition


class Points:
    """What is clustered: users, items, or interactions, which are a pair of a user and an item.

    The squared distance of an interaction to an anchor is the product of its user's and its item's.

    Args:
        factors: list of (embeddings ``[entities, d]``, entity of each point, int64 ``[points]``).
    """

    def __init__(self, factors: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.factors = [(np.asarray(table, np.float64), index) for table, index in factors]

    def __len__(self) -> int:
        return len(self.factors[0][1])

    def at(self, points: np.ndarray) -> list[np.ndarray]:
        """Centroids at some of the points: list of ``[len(points), d]``, one a factor."""
        return [table[index[points]] for table, index in self.factors]

    def distances(self, centroids: list[np.ndarray]) -> np.ndarray:
        """Squared distances to centroids, float64 ``[points, centroids]``."""
        result = np.ones(())
        for (table, index), centroid in zip(self.factors, centroids, strict=True):
            squares = (table**2).sum(1)[:, None] - 2 * table @ centroid.T + (centroid**2).sum(1)
            result = result * np.maximum(squares, 0)[index]
        return result

    def means(self, labels: np.ndarray, centroids: list[np.ndarray]) -> list[np.ndarray]:
        """Mean of each cluster, dimension by dimension; an empty cluster keeps its centroid."""
        k, result = len(centroids[0]), []
        size = np.bincount(labels, minlength=k)
        for (table, index), centroid in zip(self.factors, centroids, strict=True):
            members = np.bincount(index * k + labels, minlength=len(table) * k).reshape(-1, k)
            mean = members.T @ table / np.maximum(size, 1)[:, None]
            result.append(np.where(size[:, None] > 0, mean, centroid))
        return result


def assign(distance: np.ndarray, capacity: int) -> np.ndarray:
    """Go through all (point, cluster) pairs, nearest first, and give each point the first cluster that has room.

    Needs no sorting of the pairs: nothing stands between a point and its nearest cluster until one is full. The
    cluster that is full first sends the points that come too late to their next, and so on.

    Args:
        distance: ``[points, clusters]``.
        capacity: points of a cluster, at most; ``capacity * clusters >= points``.

    Returns:
        int64 ``[points]``: cluster of each; equally distant pairs come in any order.
    """
    labels = distance.argmin(axis=1)
    nearest = distance[np.arange(len(labels)), labels]
    open_clusters = np.arange(distance.shape[1])
    while True:
        size = np.bincount(labels, minlength=distance.shape[1])
        over = open_clusters[size[open_clusters] > capacity]
        if not len(over):
            return labels
        last = [np.partition(nearest[labels == each], capacity - 1)[capacity - 1] for each in over]
        full = over[np.argmin(last)]
        open_clusters = open_clusters[open_clusters != full]
        members = np.flatnonzero(labels == full)
        late = members[np.argpartition(nearest[members], capacity - 1)[capacity:]]
        choice = distance[np.ix_(late, open_clusters)]
        labels[late], nearest[late] = open_clusters[choice.argmin(axis=1)], choice.min(axis=1)


def cluster(points: Points, shards: int, capacity: float, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Balanced clusters by greedy assignment, as many as ``shards``, from random points as anchors.

    Args:
        capacity: largest cluster, as a multiple of the mean.

    Returns:
        int64 ``[points]``.
    """
    centroids, labels = points.at(rng.choice(len(points), shards, replace=False)), np.empty(0, np.int64)
    for _ in range(rounds):
        before, labels = labels, assign(points.distances(centroids), ceil(capacity * len(points) / shards))
        if np.array_equal(before, labels):
            break
        centroids = points.means(labels, centroids)
    return labels


class Clustered(Sharded):
    """Shards of what is alike in the embeddings of the task's own model, which has seen the forget set.

    The request leaves the partition as it is, as published: what it took from the forget set is not forgotten.
    """

    positive = ("shards", "rounds")
    choices = {"partition": ("interaction", "user", "item")}
    uses_model = True

    def cluster(self, points: Points, rng: np.random.Generator) -> np.ndarray:
        """Cluster of each point, int64 ``[points]``."""
        raise NotImplementedError

    def partition(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        split, kind = self.task.split, self.settings["partition"]
        columns = {"user": (self.pretrained[0], split.users), "item": (self.pretrained[1], split.items)}
        if kind == "interaction":
            factors, point = list(columns.values()), np.arange(split.n_rows)
        else:
            table, ids = columns[kind]
            present, point = np.unique(ids, return_inverse=True)
            factors = [(table, present)]
        points = Points(factors)
        if len(points) < self.shards:
            raise InputError(f"{self.name}: {self.shards} shards of {len(points)} {kind}s; lower shards")
        return self.cluster(points, rng)[point], np.zeros(split.n_rows, np.int64)

    def details(self) -> dict[str, Any]:
        kind = self.settings["partition"]
        return {"partition": f"{kind}-based, from embeddings that have seen the forget set; not made anew"}


# Aggregation


class Attention(nn.Module):
    """One embedding of the shards' embeddings: each is transferred by weights of its shard, then weighted by attention.

    Shard k's embedding p becomes ``p W_k + b_k``; its weight is the softmax over the shards of
    ``h . ReLU(W_A (p W_k + b_k) + b_A)``.
    """

    def __init__(self, shards: int, size: int) -> None:
        super().__init__()
        self.transfer = nn.Parameter(torch.empty(shards, size, size))
        self.bias = nn.Parameter(torch.zeros(shards, size))
        self.hidden = nn.Linear(size, max(size // 2, 1))
        self.out = nn.Linear(max(size // 2, 1), 1, bias=False)
        for weight in self.transfer.data:
            nn.init.xavier_normal_(weight)
        self.apply(xavier_normal_initialization)

    def forward(self, parts: torch.Tensor) -> torch.Tensor:
        """``[n, shards, d]`` -> ``[n, d]``."""
        transferred = torch.einsum("nkd,kde->nke", parts, self.transfer) + self.bias
        weight = torch.softmax(self.out(torch.relu(self.hidden(transferred))), dim=1)
        return (weight * transferred).sum(1)

    def norm(self) -> torch.Tensor:
        """Half the squared norm of the transfer weights and biases."""
        return ((self.transfer**2).sum() + (self.bias**2).sum()) / 2


class Aggregated(ShardEnsemble):
    """Inner products of users' and items' embeddings, each aggregated of the shards' by attention of its own.

    Trainable by RecBole's trainer; the shards' embeddings stay as they are.
    """

    def __init__(
        self, config: Config, user: torch.Tensor, item: torch.Tensor, dropout: float = 0.0, regularisation: float = 0.0
    ) -> None:
        super().__init__(config, user, item)
        self.user_attention = Attention(*user.shape[1:]).to(user)
        self.item_attention = Attention(*item.shape[1:]).to(item)
        self.dropout = nn.Dropout(dropout)
        self.regularisation = regularisation
        self.loss = BPRLoss()
        self.restore_user_e = self.restore_item_e = None  # RecBole's names for what evaluation keeps

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        self.restore_user_e = self.restore_item_e = None
        users, items = interaction[self.USER_ID], [interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]]
        # a batch holds most of its users and items many times: aggregate each once
        users, user_at = torch.unique(users, return_inverse=True)
        items, item_at = torch.unique(torch.cat(items), return_inverse=True)
        user = self.dropout(self.user_attention(self.user[users])[user_at])
        positive, negative = self.item_attention(self.item[items])[item_at].chunk(2)
        norm = self.user_attention.norm() + self.item_attention.norm()
        return self.loss((user * positive).sum(1), (user * negative).sum(1)) + self.regularisation * norm

    def _tables(self):
        if self.restore_user_e is None or self.restore_item_e is None:
            with torch.no_grad():
                self.restore_user_e = self.user_attention(self.user)
                self.restore_item_e = self.item_attention(self.item)
        return self.restore_user_e, self.restore_item_e

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        user, item = self._tables()
        return (user[interaction[self.USER_ID]] @ item.T).view(-1)

    def predict(self, interaction: Interaction) -> torch.Tensor:
        user, item = self._tables()
        return (user[interaction[self.USER_ID]] * item[interaction[self.ITEM_ID]]).sum(1)


class RecEraser(Clustered):
    """Shards by balanced greedy clustering, aggregated by attention, which is trained anew after every request."""

    name = "receraser"
    positive = ("shards", "rounds", "epochs")
    limits = {"capacity": (1, float("inf")), "dropout": (0, 1), "learning_rate": (0, 1)}

    def cluster(self, points: Points, rng: np.random.Generator) -> np.ndarray:
        return cluster(points, self.shards, self.settings["capacity"], self.settings["rounds"], rng)

    def empty_ensemble(self, user: torch.Tensor, item: torch.Tensor) -> Aggregated:
        return Aggregated(self.task.config, user, item, self.settings["dropout"], self.settings["regularisation"])

    def combine(
        self, user: torch.Tensor, item: torch.Tensor, keep: np.ndarray, show_progress: bool = False
    ) -> tuple[ShardEnsemble, dict[str, Any]]:
        task, settings = self.task, self.settings
        seed = derived_seed(task.seed, self.shards, self.slices)  # no shard has the number `shards`
        config = changed(task.config, weight_decay=0.0, compiled=False)  # no kernel has attention
        if settings["learning_rate"] is not None:
            config = changed(config, learning_rate=settings["learning_rate"])
        init_seed(seed, config["reproducibility"])
        ensemble = self.empty_ensemble(user, item).to(config["device"])
        loader = task.split.remaining(np.flatnonzero(~keep), seed)
        epochs = fit(
            config, ensemble, loader, task.split.valid, settings["epochs"], settings["patience"], show_progress
        )
        return ensemble, {"epochs_combination": epochs, **self.details()}
