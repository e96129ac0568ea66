"""Training through a graph against torch: its sparse graph, its autograd and torch.optim.Adam."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.propagated_training import GraphLoss, PropagatedTraining
from recbole_unlearn.influence.recorded import Adam

N_USERS, N_ITEMS, ROWS = 30, 41, 400
FLOAT32 = 2e-6  # what float32 may be off by, of the way that the weights go; a float64 copy is what it is off from
BOUNDS = np.array([3, 60, 60, 61, 190, 340, 340])  # empty batches, one of a single row, and rows left out on both sides
RATES = np.array([0.02, 9.0, 0.005, 0.03, 0.01, 9.0])  # an empty batch makes no step, whatever its rate


class Problem:
    def __init__(self, K=8, m=1, layers=2, reg_weight=0.0, require_pow=False, weight_decay=0.0, spread=0.3):
        rng = np.random.default_rng(K + m)
        self.users, self.pos = rng.integers(1, N_USERS, ROWS), rng.integers(1, N_ITEMS, ROWS)
        self.epochs = [(rng.integers(1, N_ITEMS, (ROWS, m)).astype(np.uint8), rng.permutation(ROWS)) for _ in range(4)]
        self.start = (spread * rng.normal(size=(N_USERS + N_ITEMS, K))).astype(np.float32)
        self.adam = Adam(1.0, 0.9, 0.99, 1e-5, weight_decay)  # the rate is each step's own
        self.loss = GraphLoss(layers, reg_weight, require_pow)
        self.graph = Graph(self.users, self.pos, N_USERS, N_ITEMS, layers)

    def train(self, with_loss=True, **settings):
        """The training after all epochs, and the losses."""
        training = PropagatedTraining(self.graph, self.start, self.adam, self.loss, N_USERS, **settings)
        return training, [
            training.epoch(self.users, self.pos, Epoch(order, BOUNDS, negatives, RATES), with_loss)
            for negatives, order in self.epochs
        ]

    def adjacency(self, dtype):
        """As RecBole makes it."""
        A = np.zeros((N_USERS + N_ITEMS,) * 2)
        A[self.users, N_USERS + self.pos] = A[N_USERS + self.pos, self.users] = 1
        root = np.diag((A.sum(1) + 1e-7) ** -0.5)
        return torch.from_numpy(root @ A @ root).to(dtype)

    def batch_loss(self, W, A, u, i, j):
        """RecBole's: `LightGCN.calculate_loss`, `BPRLoss`, `EmbLoss`."""
        layers = [W]
        for _ in range(self.loss.layers):
            layers.append(A @ layers[-1])
        E = torch.stack(layers).mean(0)
        score = (E[u] * E[i]).sum(1) - (E[u] * E[j]).sum(1)
        norms = [torch.norm(W[nodes]) for nodes in (u, i, j)]
        regular = sum(norm**2 / 2 if self.loss.require_pow else norm for norm in norms) / len(u)
        return -torch.log(1e-10 + torch.sigmoid(score)).mean() + self.loss.reg_weight * regular

    def reference(self, dtype):
        """Weights, Adam's state, and losses by torch."""
        A, adam = self.adjacency(dtype), self.adam
        W = torch.tensor(self.start, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.Adam([W], 1.0, (adam.beta1, adam.beta2), adam.eps, adam.weight_decay)
        losses = []
        for negatives, order in self.epochs:
            losses.append(0.0)
            for begin, end, rate in zip(BOUNDS[:-1], BOUNDS[1:], RATES, strict=True):
                if begin == end:
                    continue
                rows, m = order[begin:end], negatives.shape[1]
                columns = np.tile(self.users[rows], m), np.tile(self.pos[rows], m) + N_USERS
                nodes = [*columns, negatives[rows].T.reshape(-1).astype(np.int64) + N_USERS]  # RecBole's layout
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                loss = self.batch_loss(W, A, *map(torch.from_numpy, nodes))
                loss.backward()
                optimizer.step()
                losses[-1] += loss.item()
        return W.detach().numpy(), optimizer.state[W], losses


REGULARISED = {"reg_weight": 0.3}
PROBLEMS = [
    {"K": 5},
    {"K": 8},
    {"K": 64},
    {"K": 20, "m": 3},  # two blocks of columns, one not full
    {"K": 8, "m": 3, **REGULARISED},
    {"K": 64, "m": 3, **REGULARISED, "require_pow": True},
    {"K": 5, **REGULARISED, "require_pow": True, "weight_decay": 0.05},
    {"layers": 1, "weight_decay": 0.05},
    {"layers": 3, "m": 3, **REGULARISED, "weight_decay": 0.05},
    {"layers": 0, **REGULARISED},
    {"spread": 6.0, **REGULARISED},  # scores so far apart that the 1e-10 in the loss counts
]


@pytest.mark.parametrize("settings", [*PROBLEMS, pytest.param({"K": 1}, marks=pytest.mark.slow)], ids=str)
class TestAgainstTorch:
    def test_weights_moments_and_losses_in_float64(self, settings):
        problem = Problem(**settings)
        training, losses = problem.train()
        expected, state, expected_losses = problem.reference(torch.float64)
        way = np.linalg.norm(expected - problem.start)
        assert np.linalg.norm(training.W - expected) < FLOAT32 * way + 1e-7 * np.linalg.norm(expected)
        assert np.linalg.norm(training.M - state["exp_avg"].numpy()) < 1e-5 * state["exp_avg"].norm()
        assert np.linalg.norm(training.V - state["exp_avg_sq"].numpy()) < 1e-5 * state["exp_avg_sq"].norm()
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        assert training.steps == state["step"] == 16

    def test_is_as_near_to_float64_as_torch_in_float32(self, settings):
        problem = Problem(**settings)
        exact, single = (problem.reference(dtype)[0] for dtype in (torch.float64, torch.float32))
        ours = np.linalg.norm(problem.train()[0].W - exact)
        assert ours < 3 * np.linalg.norm(single - exact) + 1e-8 * np.linalg.norm(exact)

    def test_is_the_same_on_any_number_of_threads(self, settings):
        """And however often a loss is asked for."""
        problem = Problem(**settings)
        one, two = problem.train(threads=1)[0], problem.train(threads=2, with_loss=False)[0]
        for name in ("W", "M", "V"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_what_the_settings_do_is_seen():
    """Else the tests above could not fail."""
    weights = [Problem(**{**settings, "K": 8, "m": 1}).train()[0].W for settings in PROBLEMS[3:]]
    for k, one in enumerate(weights):
        for other in weights[:k]:
            assert np.linalg.norm(one - other) > 1000 * FLOAT32 * np.linalg.norm(one)


def test_an_epoch_goes_on_where_the_last_one_ended():
    """In halves, with a change of the weights between them that counts, all is what it is in one."""
    problem = Problem(K=20, m=3, **REGULARISED)
    (negatives, order), whole = problem.epochs[0], PropagatedTraining(
        problem.graph, problem.start, problem.adam, problem.loss, N_USERS
    )  # fmt: skip
    halves = PropagatedTraining(problem.graph, problem.start, problem.adam, problem.loss, N_USERS)
    data, epoch = (problem.users, problem.pos), Epoch(order, BOUNDS, negatives, RATES)
    total = whole.epoch(*data, epoch, True)
    parts = [
        halves.epoch(*data, replace(epoch, bounds=BOUNDS[a:b], rates=RATES[a : b - 1]), True)
        for a, b in ((0, 4), (3, 7))
    ]
    np.testing.assert_allclose(sum(parts), total, rtol=1e-12)
    np.testing.assert_array_equal(halves.W, whole.W)
    halves.W[:] = problem.start
    assert halves.epoch(*data, replace(epoch, bounds=BOUNDS[:2], rates=RATES[:1])) is None
    moved = np.linalg.norm(halves.W - problem.start)
    assert 0 < moved < 0.5 * np.linalg.norm(whole.W - problem.start)


def test_the_start_is_left_alone_and_no_batch_is_no_step():
    problem = Problem()
    start = problem.start.copy()
    training, _ = problem.train()
    np.testing.assert_array_equal(problem.start, start)
    before = training.W.copy()
    negatives, order = problem.epochs[0]
    assert training.epoch(problem.users, problem.pos, Epoch(order, BOUNDS[1:3], negatives, RATES[1:2]), True) == 0
    np.testing.assert_array_equal(training.W, before)
    assert training.steps == 16
