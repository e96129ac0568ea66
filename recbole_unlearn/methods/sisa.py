"""SISA: sharded, isolated, sliced, aggregated training (Bourtoule et al., "Machine Unlearning", S&P 2021)."""

import numpy as np

from recbole_unlearn.methods.shards import ScoreEnsemble, Sharded


class MeanScore(ScoreEnsemble):
    """Mean over the shards that have both user and item."""

    def score(self, total, shards):
        return total / shards


class SISA(Sharded):
    """Random shards of interactions, each divided at random into slices.

    Exact: what is forgotten has reached no other shard and no earlier slice.
    """

    name = "sisa"

    def __init__(self, task, settings):
        super().__init__(task, settings)
        self.check("slices", int, 1)
        self.slices = settings["slices"]

    def partition(self, rng):
        n = self.task.split.n_rows
        position = rng.permutation(n)
        largest = -(-n // self.shards)
        return position % self.shards, position // self.shards * self.slices // largest

    def empty_ensemble(self, user, item):
        return MeanScore(self.task.config, user, item)

    def combine(self, user, item, keep, show_progress=False):
        ensemble = self.empty_ensemble(user, item)
        split = self.task.split
        ensemble.set_popularity(np.bincount(split.items[keep], minlength=split.n_items))
        return ensemble.to(self.task.config["device"]), {}
