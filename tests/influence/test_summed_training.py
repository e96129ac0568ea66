"""Compiled training on scores of sums of embeddings against torch.optim.Adam and autograd."""

import itertools
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from recbole_unlearn.influence import summed_training as module
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.recorded import Adam
from recbole_unlearn.influence.summed_training import DISTANCE, OWN, POINTWISE, PRODUCT, Part, SummedTraining

ADAM = Adam(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
USERS, ITEMS, ROWS, BATCH = 30, 40, 700, 32


class Problem:
    """Rows of a user, a last item and an item, in epochs of which some rows are left out and some batches empty."""

    def __init__(self, m, K=8, adam=ADAM, epochs=3):
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
    "several negatives": {"m": 3, "K": 11},
    "decay": {"adam": Adam(0.01, 0.9, 0.999, 1e-8, 1e-3)},
    "many steps": {"epochs": 12},
    "two halves": {"K": 32},
    "no momentum": {"adam": Adam(0.01, 0.0, 0.99, 1e-6, 0.0), "m": 3, "K": 11},
}


@pytest.mark.parametrize(
    ("kind", "case"), [*itertools.product([Product, Distance], CASES), (Bias, "several negatives"), (Bias, "decay")]
)
def test_it_trains_as_torch_does(kind, case):
    problem = kind(**{"m": 3 if kind is Bias else 1, **CASES[case]})
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
    problem, found = kind(m=3, K=11), []
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


class Pointwise:
    """Rows of two embeddings that are added, and of others, in tables of which a batch leaves out some."""

    def __init__(self, m=1, K=8, adam=ADAM, n_epochs=3):
        rng = np.random.default_rng(0)
        self.adam, self.m, sizes = adam, m, {"A": USERS, "B": ITEMS, "C": ITEMS, "D": USERS}
        self.start = {name: (0.2 * rng.normal(size=(n, K))).astype(np.float32) for name, n in sizes.items()}
        begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
        self.begins = (0, int(begins["C"]), int(begins["D"]))  # A and B are in every batch
        self.epochs, self.absent = [], []
        for number in range(n_epochs):
            bounds = np.sort(np.append(np.arange(0, ROWS + 1, BATCH), [5 * BATCH, ROWS]))
            others = rng.choice(["C", "D"], len(bounds) - 1) if number else np.full(len(bounds) - 1, "C")
            table = np.repeat(others, np.diff(bounds))
            ends = np.array([[begins[t] + rng.integers(sizes[t]) for _ in range(1 + m)] for t in table])
            queries = np.column_stack([rng.integers(USERS, size=ROWS), begins["B"] + rng.integers(ITEMS, size=ROWS)])
            rates = adam.lr * (1 + 0.5 * np.sin(np.arange(len(bounds) - 1)))
            shares = rng.random(ROWS) / BATCH
            self.epochs.append((queries, ends[:, 0], Epoch(np.arange(ROWS), bounds, ends[:, 1:], rates), shares))

    def training(self, threads=None):
        part = Part(PRODUCT, np.concatenate(list(self.start.values())), begins=self.begins)
        return SummedTraining([part], self.adam, threads, POINTWISE)

    def trained(self, training):
        """Losses of its epochs."""
        return [
            training.epoch([queries], pos, epoch, with_loss=True, shares=shares)
            for queries, pos, epoch, shares in self.epochs
        ]

    def by_torch(self):
        """Losses, parameters and torch's optimiser."""
        cuts = [*self.begins, sum(map(len, self.start.values()))]
        whole = np.concatenate(list(self.start.values()))
        W = [
            torch.tensor(whole[one:two], dtype=torch.float64, requires_grad=True)
            for one, two in itertools.pairwise(cuts)
        ]
        lr, beta1, beta2, eps, decay = astuple(self.adam)
        optimizer, losses = torch.optim.Adam(W, lr, (beta1, beta2), eps, decay), []

        def rows_of(ids, which):
            return W[which][torch.from_numpy(ids - cuts[which])]

        for queries, pos, epoch, shares in self.epochs:
            losses.append(0.0)
            for s, (start, stop) in enumerate(itertools.pairwise(epoch.bounds)):
                if start == stop:
                    continue
                which = int(np.searchsorted(self.begins, pos[start], "right")) - 1
                q = rows_of(queries[start:stop].ravel(), 0).view(stop - start, 2, -1).sum(1)
                scores = [(q * rows_of(pos[start:stop], which)).sum(1)]
                scores += [-(q * rows_of(low, which)).sum(1) for low in epoch.negatives[start:stop].T]
                each = sum(torch.nn.functional.softplus(-score) for score in scores)
                loss = (torch.from_numpy(shares[start:stop]) * each).sum()
                losses[-1] += loss.item()
                optimizer.param_groups[0]["lr"] = epoch.rates[s]
                optimizer.zero_grad()  # to None: what a batch leaves out is not stepped
                loss.backward()
                optimizer.step()
        return losses, W, optimizer


@pytest.mark.parametrize("case", CASES)
def test_of_single_scores_it_trains_as_torch_does_and_leaves_alone_what_a_batch_leaves_out(case):
    keys = dict(CASES[case])
    problem = Pointwise(**{"n_epochs": keys.pop("epochs", 3), **keys})
    training = problem.training()
    losses, expected = problem.trained(training), problem.by_torch()
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    states = [expected[2].state[value] for value in expected[1]]
    assert list(training.taken) == [int(state["step"]) for state in states]
    assert training.taken[0] == training.taken[1:].sum() == training.steps
    theirs = {"W": expected[1], "M": [s["exp_avg"] for s in states], "V": [s["exp_avg_sq"] for s in states]}
    theirs = {key: torch.cat(each).detach().numpy() for key, each in theirs.items()}
    moved = np.linalg.norm(theirs["W"] - np.concatenate(list(problem.start.values())))
    assert np.linalg.norm(training.W[0] - theirs["W"]) < 2e-5 * moved
    for key in ("M", "V"):
        assert np.linalg.norm(getattr(training, key)[0] - theirs[key]) < 1e-4 * np.linalg.norm(theirs[key])


def test_of_single_scores_neither_blocks_nor_threads_show(monkeypatch):
    problem, found = Pointwise(m=1, K=32), []
    for block, threads in ((1 << 20, 1), (1 << 20, 2), (100, 2)):
        monkeypatch.setattr(module, "BLOCK", block)
        training = problem.training(threads)
        found.append((problem.trained(training), training.W[0]))
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])
    assert np.linalg.norm(found[0][1] - found[2][1]) < 1e-6 * np.linalg.norm(found[0][1])


def test_without_shares_it_is_the_mean_of_a_batch():
    problem, losses = Pointwise(), []
    queries, pos, epoch, _ = problem.epochs[0]
    mean = np.repeat(1 / np.diff(epoch.bounds).clip(1), np.diff(epoch.bounds))
    for shares in (None, mean):
        losses.append(problem.training().epoch([queries], pos, epoch, with_loss=True, shares=shares))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="of the pairwise loss, a batch's mean is taken"):
        product = Product(m=1)
        training = SummedTraining(product.parts(), ADAM)
        training.epoch(product.queries(), product.pos, product.epochs[0], shares=np.ones(ROWS))


def test_scores_that_it_does_not_know_are_refused():
    parts = Distance(m=1).parts()
    for wrong in ([], [parts[0], parts[0]], [*parts, parts[1]]):
        with pytest.raises(ValueError, match="one or two parts, of which at most one is a distance"):
            SummedTraining(wrong, ADAM)
    with pytest.raises(ValueError, match="of a score of one part alone"):
        SummedTraining([replace(parts[0], begins=(0, USERS)), parts[1]], ADAM)


def test_the_weights_given_stay_as_they_are():
    problem = Product(m=1)
    parts = problem.parts()
    training = SummedTraining(parts, problem.adam)
    training.epoch(problem.queries(), problem.pos, problem.epochs[0])
    before = problem.parts()
    assert all(np.array_equal(one.start, other.start) for one, other in zip(parts, before, strict=True))
