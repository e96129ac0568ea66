"""SISA: sharded, isolated, sliced, aggregated training (Bourtoule et al., "Machine Unlearning", S&P 2021)."""

from typing import Any

import numpy as np
import torch

from recbole_unlearn.methods.base import Task
from recbole_unlearn.methods.shards import ScoreEnsemble, Sharded, ShardEnsemble


class MeanScore(ScoreEnsemble):
    """Mean over the shards that have both user and item."""

    def score(self, total: torch.Tensor, shards: torch.Tensor) -> torch.Tensor:
        return total / shards


class SISA(Sharded):
    """Random shards of interactions, each divided at random into slices.

    Exact: what is forgotten has reached no other shard and no earlier slice.
    """

    positive = ("shards", "slices")
    name = "sisa"
    ensemble = MeanScore

    def __init__(self, task: Task, settings: dict[str, Any]) -> None:
        super().__init__(task, settings)
        self.slices = settings["slices"]

    def partition(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n = self.task.split.n_rows
        position = rng.permutation(n)
        largest = -(-n // self.shards)
        return position % self.shards, position // self.shards * self.slices // largest

    def combine(
        self, user: torch.Tensor, item: torch.Tensor, keep: np.ndarray, show_progress: bool = False
    ) -> tuple[ShardEnsemble, dict[str, Any]]:
        ensemble = self.empty_ensemble(user, item)
        split = self.task.split
        ensemble.set_popularity(np.bincount(split.items[keep], minlength=split.n_items))
        return ensemble.to(self.task.config["device"]), {}
