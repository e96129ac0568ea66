"""Compiled training on scores of sums of embeddings against torch.optim.Adam and autograd."""

import itertools
from dataclasses import astuple

import numpy as np
import pytest
import torch

from recbole_unlearn.influence import summed_training as module
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.recorded import Adam
from recbole_unlearn.influence.summed_training import DISTANCE, OWN, PRODUCT, Part, SummedTraining

ADAM = Adam(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
USERS, ITEMS, ROWS, BATCH = 30, 40, 700, 32


class Problem:
    """Rows of a user, a last item and an item, in epochs of which some rows are left out and some batches empty."""

    def __init__(self, m, K=11, adam=ADAM, epochs=3):
        rng = np.random.default_rng(0)
        self.adam, self.m = adam, m
        self.users, self.last, self.pos = (rng.integers(1, n - 5, ROWS) for n in (USERS, ITEMS, ITEMS))
        sizes = {"U": (USERS, K), "E": (ITEMS, K), "L": (ITEMS, K), "F": (ITEMS, K), "T": (1, K), "b": (ITEMS, 1)}
        self.start = {name: (0.2 * rng.normal(size=shape)).astype(np.float32) for name, shape in sizes.items()}
        self.start["T"][0, : K // 2] = 0
        self.epochs = []
        for _ in range(epochs):
            bounds = np.sort(np.append(np.arange(0, ROWS - 9, BATCH), [BATCH, 4 * BATCH, ROWS - 20]))
            negatives = rng.integers(1, ITEMS, (ROWS, m)).astype(np.uint8)
            rates = adam.lr * (1 + 0.5 * np.sin(np.arange(len(bounds) - 1)))
            self.epochs.append(Epoch(rng.permutation(ROWS), bounds, negatives, rates))


class Product(Problem):
    """FPMC's score: a user's product with an item, and the last item's."""

    used = ("U", "E", "L", "F")

    def parts(self):
        tables = (np.concatenate([self.start[one], self.start[other]]) for one, other in ("UE", "LF"))
        return [Part(PRODUCT, table, items) for table, items in zip(tables, (USERS, ITEMS), strict=True)]

    def queries(self):
        return [self.users[:, None], self.last[:, None]]

    def score(self, W, users, last, items):
        return (W["U"][users] * W["E"][items]).sum(1) + (W["L"][last] * W["F"][items]).sum(1)

    def penalty(self, W):
        return 0.0


class Distance(Problem):
    """TransRec's score: a bias minus how far the item is from user and last item, which are moved by the same."""

    used = ("U", "E", "T", "b")

    def parts(self):
        table = np.concatenate([self.start[name] for name in "UET"])
        return [Part(DISTANCE, table, USERS, USERS + ITEMS), Part(OWN, self.start["b"])]

    def queries(self):
        constant = np.full(ROWS, USERS + ITEMS)
        return [np.column_stack([self.users, USERS + self.last, constant]), np.empty((ROWS, 0), int)]

    def score(self, W, users, last, items):
        return W["b"][items, 0] - (W["U"][users] + W["T"] + W["E"][last] - W["E"][items]).norm(dim=1)

    def penalty(self, W):
        return W["T"].abs().sum()


class Bias(Problem):
    """One part alone."""

    used = ("b",)

    def parts(self):
        return [Part(OWN, self.start["b"])]

    def queries(self):
        return [np.empty((ROWS, 0), int)]

    def score(self, W, users, last, items):
        return W["b"][items, 0]

    def penalty(self, W):
        return 0.0


def by_torch(problem, dtype=torch.float64):
    """Weights, moments and epochs' sums of losses."""
    W = {name: torch.tensor(problem.start[name], dtype=dtype, requires_grad=True) for name in problem.used}
    lr, beta1, beta2, eps, decay = astuple(problem.adam)
    optimizer = torch.optim.Adam(list(W.values()), lr, (beta1, beta2), eps, decay)
    users, last, pos = map(torch.from_numpy, (problem.users, problem.last, problem.pos))
    losses = []
    for epoch in problem.epochs:
        losses.append(0.0)
        for s, rate in enumerate(epoch.rates):
            rows = torch.from_numpy(epoch.order[epoch.bounds[s] : epoch.bounds[s + 1]]).repeat_interleave(problem.m)
            if not len(rows):
                continue
            drawn = torch.from_numpy(epoch.negatives.astype(int))[rows[:: problem.m]].ravel()
            positive, negative = (problem.score(W, users[rows], last[rows], ids) for ids in (pos[rows], drawn))
            loss = -torch.log(1e-10 + torch.sigmoid(positive - negative)).mean()
            losses[-1] += loss.item()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            (loss + problem.penalty(W)).backward()
            optimizer.step()
    states = [optimizer.state[value] for value in W.values()]
    values = {"W": list(W.values()), "M": [s["exp_avg"] for s in states], "V": [s["exp_avg_sq"] for s in states]}
    return {key: torch.cat([x.detach().ravel() for x in each]).numpy() for key, each in values.items()}, losses


CASES = {
    "": {},
    "several negatives": {"m": 3},
    "decay": {"adam": Adam(0.01, 0.9, 0.999, 1e-8, 1e-3)},
    "many steps": {"epochs": 12},
    "two halves": {"K": 32},
    "no momentum": {"adam": Adam(0.01, 0.0, 0.99, 1e-6, 0.0), "m": 3},
}


@pytest.mark.parametrize(
    ("kind", "case"), [*itertools.product([Product, Distance], CASES), (Bias, "several negatives"), (Bias, "decay")]
)
def test_it_trains_as_torch_does(kind, case):
    problem = kind(**{"m": 1, **CASES[case]})
    training = SummedTraining(problem.parts(), problem.adam)
    losses = [training.epoch(problem.queries(), problem.pos, epoch, with_loss=True) for epoch in problem.epochs]
    expected, theirs = by_torch(problem)
    start = np.concatenate([part.start.ravel() for part in problem.parts()])
    moved = np.linalg.norm(expected["W"] - start)
    found = {key: np.concatenate([each.ravel() for each in getattr(training, key)]) for key in expected}
    assert np.linalg.norm(found["W"] - expected["W"]) < 2e-5 * moved
    for key in ("M", "V"):
        assert np.linalg.norm(found[key] - expected[key]) < 1e-4 * np.linalg.norm(expected[key])
    np.testing.assert_allclose(losses, theirs, rtol=1e-5)
    assert training.steps == sum(np.count_nonzero(np.diff(epoch.bounds)) for epoch in problem.epochs)


@pytest.mark.parametrize("kind", [Product, Distance])
def test_how_many_rows_are_arranged_at_once_does_not_show(monkeypatch, kind):
    problem, found = kind(m=2), []
    for block in (1 << 20, 100, 1):
        monkeypatch.setattr(module, "BLOCK", block)
        training = SummedTraining(problem.parts(), problem.adam)
        for epoch in problem.epochs:
            assert training.epoch(problem.queries(), problem.pos, epoch) is None
        found.append(np.concatenate([each.ravel() for each in training.W]))
    assert np.linalg.norm(found[0] - found[1]) < 1e-6 * np.linalg.norm(found[0])
    assert np.linalg.norm(found[0] - found[2]) < 1e-6 * np.linalg.norm(found[0])


@pytest.mark.parametrize("kind", [Product, Distance])
def test_the_number_of_threads_does_not_show(kind):
    problem = kind(m=1, K=32)
    one, two = (SummedTraining(problem.parts(), problem.adam, threads) for threads in (1, 2))
    for epoch in problem.epochs:
        told = [each.epoch(problem.queries(), problem.pos, epoch, with_loss=True) for each in (one, two)]
        assert told[0] == told[1]
    for key in ("W", "M", "V"):
        for found, other in zip(getattr(one, key), getattr(two, key), strict=True):
            np.testing.assert_array_equal(found, other)


def test_scores_that_it_does_not_know_are_refused():
    parts = Distance(m=1).parts()
    for wrong in ([], [parts[0], parts[0]], [*parts, parts[1]]):
        with pytest.raises(ValueError, match="one or two parts, of which at most one is a distance"):
            SummedTraining(wrong, ADAM)


def test_the_weights_given_stay_as_they_are():
    problem = Product(m=1)
    parts = problem.parts()
    training = SummedTraining(parts, problem.adam)
    training.epoch(problem.queries(), problem.pos, problem.epochs[0])
    before = problem.parts()
    assert all(np.array_equal(one.start, other.start) for one, other in zip(parts, before, strict=True))
