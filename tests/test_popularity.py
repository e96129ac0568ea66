"""Negatives by popularity: ways that do not train again count it anew too, in every user's pool."""

import numpy as np
import pytest
import torch

from recbole_unlearn.influence.coupling import Paired
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.training.fit import train
from recbole_unlearn.unlearner import load
from recbole_unlearn.unlearners.influence import Influence
from recbole_unlearn.unlearners.reoptimise import Reoptimise

POPULAR = {"distribution": "popularity", "sample_num": 2, "alpha": 0.8, "dynamic": False, "candidate_num": 0}
KEYS = {"train_neg_sample_args": POPULAR, "epochs": 3, "eval_step": 0, "learning_rate": 0.02}


def opened(make_split, model, way, **keys):
    split = make_split(model, **KEYS, **keys)
    train(split.config, split, "model.pth")
    return load("model.pth", way=way)


def loss(problem, kept, negatives, weights, layers):
    """Summed over kept rows, in float64; ``weights``: ``[users + items, K]``."""
    sizes = problem.split.n_users, problem.split.n_items
    users, items = (np.asarray(ids, int)[kept] for ids in (problem.log.users, problem.log.items))
    spread = Graph(users, items, *sizes, layers).propagate(np.eye(sum(sizes)))
    scored = torch.from_numpy(spread) @ weights
    ways = scored[sizes[0] + items][:, None] - scored[sizes[0] + negatives[kept].astype(int)]
    return torch.nn.functional.softplus(-(scored[users][:, None] * ways).sum(2)).sum()


def after(problem, rows):
    """Rows that stay, and paired retraining's negatives, epoch by epoch."""
    gone = np.isin(np.arange(problem.log.n_rows), rows)
    return np.flatnonzero(~gone), Paired(problem.recorded, gone, problem.trained.redraws)


def popular_rows(problem):
    """All of an item, and some others."""
    items = np.asarray(problem.log.items)
    return np.union1d(np.flatnonzero(items == np.bincount(items).argmax()), np.arange(20, 400, 43))


@pytest.mark.parametrize(
    ("model", "params", "layers"), [("BPR", None, 0), ("BPR", ("*",), 0), ("LightGCN", None, 2)],
    ids=["BPR", "by its own loss", "LightGCN"],
)  # fmt: skip
def test_z_has_what_exact_retraining_draws_instead(make_split, model, params, layers):
    with opened(make_split, model, Influence(params=params)) as unlearner:
        problem = unlearner.problem
        rows = popular_rows(problem)
        found, without = (
            problem.lost(problem.without(rows, way), way)
            for way in (Influence(params=params, pool_return=wanted) for wanted in (True, False))
        )
        state = problem.state_dict
        tables = [state[f"{side}_embedding.weight"].double() for side in ("user", "item")]
        weights = torch.cat(tables).requires_grad_()
        kept, paired = after(problem, rows)
        change = sum(
            loss(problem, kept, problem.log.epoch(epoch), weights, layers)
            - loss(problem, kept, paired.negatives(epoch), weights, layers)
            for epoch in range(problem.epochs)
        )
        (expected,) = torch.autograd.grad(change / problem.epochs, weights)
        assert expected.norm() > 0.05 * without.norm()
        assert (found - without - expected.ravel()).norm() < 1e-4 * expected.norm()


def test_the_objective_is_that_of_paired_retraining(make_split):
    keys = {"negatives": "static", "weight_decay": 0.01}
    with opened(make_split, "BPR", Reoptimise(), **keys) as unlearner:
        problem = unlearner.problem
        rows = popular_rows(problem)
        kept, paired = after(problem, rows)
        weights = torch.from_numpy(problem.table).double().requires_grad_()
        total = loss(problem, kept, paired.negatives(0), weights, 0)
        total += len(kept) * 2 * 0.01 * weights.square().sum() / 2
        (expected,) = torch.autograd.grad(total, weights)
        found = problem.objective(rows, True).at(problem.spread())[1]
        assert (found - expected.ravel()).norm() < 1e-5 * expected.norm()
