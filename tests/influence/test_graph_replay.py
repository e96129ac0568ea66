"""Replay through a graph against torch.optim.Adam and autograd in float64, on the batches that it draws."""

from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from recbole_unlearn.influence import graph_replay as module
from recbole_unlearn.influence import propagated_training
from recbole_unlearn.influence.graph_replay import replay_graph
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.propagated_training import GraphLoss, PropagatedTraining
from recbole_unlearn.influence.recorded import Adam, Recorded

ADAM = Adam(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.0)
FLOAT32 = 1e-5
N_USERS, N_ITEMS, K = 9, 13, 4


class Problem:
    def __init__(self, seed=0, m=1, rows=60, forgotten=6, epochs=3, batch=16, layers=2, **settings):
        rng = np.random.default_rng(seed)
        possible = (N_USERS - 1) * (N_ITEMS - 1)
        pairs = np.sort(rng.choice(possible, rows, replace=rows > possible))
        self.users = (1 + pairs // (N_ITEMS - 1)).astype(np.uint8)
        self.pos = (1 + pairs % (N_ITEMS - 1)).astype(np.uint16)
        ahead = rng.integers(1, N_ITEMS - 1, (epochs, rows, m))
        self.negatives = list((1 + (self.pos[:, None] - 1 + ahead) % (N_ITEMS - 1)).astype(np.uint16))
        self.start = rng.normal(size=(N_USERS + N_ITEMS) * K).astype(np.float16)
        self.forgotten = np.sort(rng.choice(rows, forgotten, replace=False))
        self.batch, self.layers, self.settings = batch, layers, {"optimizer": ADAM, "seed": seed, **settings}

    def replay(self, **changes):
        settings = {**self.settings, **changes}
        adam = settings.pop("optimizer")
        loss = GraphLoss(self.layers, settings.pop("reg_weight", 0.0), settings.pop("require_pow", False))
        absent = settings.pop("absent", None)
        recorded = Recorded(self.users, self.pos, self.negatives, N_USERS, N_ITEMS, adam, self.batch, absent=absent)
        return replay_graph(recorded, self.start, self.forgotten, loss, **settings)


@pytest.fixture
def trained(monkeypatch):
    """Function -> the graph and, for each epoch, what the model was trained on: triples of nodes, where steps begin."""
    seen = []

    class Recording(PropagatedTraining):
        def __init__(self, graph, *arguments):
            super().__init__(graph, *arguments)
            self.of = graph

        def epoch(self, users, pos, negatives, order, bounds, rates, with_loss=False):
            m = negatives.shape[1]
            columns = np.repeat(users[order], m), np.repeat(pos[order], m), negatives[order].ravel()
            seen.append((self.of, np.stack(columns, axis=1) + [0, N_USERS, N_USERS], m * bounds))
            return super().epoch(users, pos, negatives, order, bounds, rates, with_loss)

    monkeypatch.setattr(module, "PropagatedTraining", Recording)
    return lambda: (seen[0][0], [epoch for _, *epoch in seen])


def emb_loss(W, triples, squared):
    """RecBole's ``EmbLoss`` times the size of the batch."""
    norms = [torch.norm(W[triples[:, part]]) for part in range(3)]
    return sum(norm**2 / 2 if squared else norm for norm in norms)


def gradient(W, A, triples, reg_weight=0.0, squared=False):
    W = W.clone().requires_grad_()
    E = A @ W
    triples = torch.from_numpy(triples.astype(np.int64))
    u, i, j = triples.T
    loss = torch.nn.functional.softplus(-(E[u] * (E[i] - E[j])).sum(1)).sum()
    return torch.autograd.grad((loss + reg_weight * emb_loss(W, triples, squared)) / len(triples), W)[0]


def reference(start, graph, epochs, adam, reg_weight=0.0, squared=False):
    """Weights after training on the same batches by torch.optim.Adam, a step at a time."""
    A = torch.from_numpy(graph.propagate(np.eye(graph.size)))
    W = torch.tensor(start.reshape(graph.size, K), dtype=torch.float64)
    optimizer = torch.optim.Adam([W], adam.lr, (adam.beta1, adam.beta2), adam.eps, adam.weight_decay)
    for triples, begin in epochs:
        for s in range(len(begin) - 1):
            W.grad = gradient(W, A, triples[begin[s] : begin[s + 1]], reg_weight, squared)
            optimizer.step()
    return W.numpy()


class TestAgainstTorch:
    @pytest.mark.parametrize("m", [1, 3])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.01])
    @pytest.mark.parametrize("reg_weight, squared", [(0.0, False), (0.05, False), (0.05, True)])
    def test_is_trained_as_torch_does(self, trained, m, weight_decay, reg_weight, squared):
        adam = replace(ADAM, weight_decay=weight_decay)
        p = Problem(m, m, optimizer=adam, reg_weight=reg_weight, require_pow=squared)
        result = p.replay()
        expected = reference(p.start, *trained(), adam, reg_weight, squared)
        np.testing.assert_allclose(result.weights, expected, rtol=0, atol=FLOAT32)
        assert np.abs(expected - p.start.reshape(expected.shape)).max() > 1000 * FLOAT32

    @pytest.mark.parametrize("layers", [1, 3])
    def test_other_numbers_of_layers(self, trained, layers):
        p = Problem(5, layers=layers)
        np.testing.assert_allclose(p.replay().weights, reference(p.start, *trained(), ADAM), rtol=0, atol=FLOAT32)


class TestBatches:
    def test_every_remaining_row_once_an_epoch_in_batches_of_the_given_size(self, trained):
        p = Problem(7, m=2)
        p.forgotten = np.flatnonzero(p.users == p.users[20])  # nothing comes back from a user without rows
        p.replay()
        _, epochs = trained()
        kept = np.setdiff1d(np.arange(60), p.forgotten)
        users, pos = p.users[kept], N_USERS + p.pos[kept]
        assert len(epochs) == len(p.negatives)
        for (triples, begin), neg in zip(epochs, p.negatives, strict=True):
            expected = np.stack([np.repeat(users, 2), np.repeat(pos, 2), N_USERS + neg[kept].ravel()], axis=1)
            assert sorted(map(tuple, triples)) == sorted(map(tuple, expected))
            np.testing.assert_array_equal(begin, [*range(0, 2 * len(kept), 16), 2 * len(kept)])

    def test_the_order_is_another_in_each_epoch_and_for_each_seed(self, trained):
        p = Problem(7)
        p.negatives[1] = p.negatives[0]
        p.replay()
        p.replay(seed=8)
        _, epochs = trained()
        orders = [tuple(triples[:, :2].ravel()) for triples, _ in epochs]
        assert len(set(orders)) == len(orders)

    def test_forgotten_items_return_as_negatives_as_often_as_retraining_would_draw_them(self, trained):
        p = Problem(8, epochs=400, forgotten=2, batch=1000, optimizer=replace(ADAM, lr=1e-6))
        p.replay()
        _, epochs = trained()
        for row in p.forgotten:
            user, item = p.users[row], p.pos[row]
            others = np.setdiff1d(np.flatnonzero(p.users == user), p.forgotten)
            pool = N_ITEMS - 1 - len(others)
            recorded = sum((neg[others] == item).sum() for neg in p.negatives)
            found = sum(((t[:, 0] == user) & (t[:, 2] == N_USERS + item)).sum() for t, _ in epochs)
            draws, chance = len(others) * 400, 1 / pool
            expected = draws * chance + (1 - chance) * recorded
            assert abs(found - expected) < 4 * np.sqrt(draws * chance)

    def test_the_graph_is_that_of_the_remaining_rows(self, trained):
        p = Problem(9)
        p.replay()
        graph, _ = trained()
        rows = np.setdiff1d(np.arange(60), p.forgotten)
        kept = {(int(p.users[r]), N_USERS + int(p.pos[r])) for r in rows}
        nodes = np.repeat(np.arange(graph.size), np.diff(graph.start)).tolist()
        assert set(zip(nodes, graph.neighbour.tolist(), strict=True)) == kept | {(b, a) for a, b in kept}


class TestStride:
    def test_moves_as_adam_would_with_the_mean_gradient(self, trained, monkeypatch):
        monkeypatch.setattr(propagated_training, "WARM_UP", 3)
        p = Problem(10, rows=90, forgotten=0, stride=3)
        result = p.replay()
        graph, epochs = trained()
        A = torch.from_numpy(graph.propagate(np.eye(graph.size)))
        W = torch.tensor(p.start.reshape(graph.size, K), dtype=torch.float64)
        M, V, step, widths = torch.zeros_like(W), torch.zeros_like(W), 0, []
        lr, beta1, beta2, eps, _ = astuple(ADAM)
        for triples, begin in epochs:
            first = 0
            while first < len(begin) - 1:
                steps = range(first, min(first + min(3, 1 + step // 3), len(begin) - 1))
                first = steps.stop
                widths.append(len(steps))
                grads = [gradient(W, A, triples[begin[s] : begin[s + 1]]) for s in steps]
                mean = sum(grads) / len(grads)
                square = mean**2 + (grads[0] - mean) ** 2
                move = torch.zeros_like(W)
                for _ in steps:
                    step += 1
                    M, V = beta1 * M + (1 - beta1) * mean, beta2 * V + (1 - beta2) * square
                    move += lr / (1 - beta1**step) * M
                W = W - move / ((V / (1 - beta2**step)).sqrt() + eps)
        assert widths == [1, 1, 1, 2, 1, 3, 3, 3, 3]  # of 6 steps an epoch
        np.testing.assert_allclose(result.weights, W, rtol=0, atol=FLOAT32)

    def test_ends_near_where_single_steps_end(self):
        p = Problem(11, rows=400, batch=10, epochs=4, forgotten=20, optimizer=replace(ADAM, lr=0.002, beta2=0.999))
        single, strided, other = p.replay(), p.replay(stride=4), p.replay(seed=12)
        assert np.linalg.norm(strided.weights - single.weights) < 0.5 * np.linalg.norm(other.weights - single.weights)


class TestResult:
    def test_snapshots_are_the_weights_after_so_many_epochs(self):
        p = Problem(13)
        result = p.replay(snapshots=(0, 2, 3))
        assert set(result.snapshots) == {0, 2, 3}
        np.testing.assert_array_equal(result.snapshots[0].ravel(), p.start.astype(np.float32))
        np.testing.assert_array_equal(result.snapshots[3], result.weights)
        p.negatives = p.negatives[:2]
        np.testing.assert_array_equal(result.snapshots[2], p.replay().weights)

    def test_users_without_rows_keep_their_initial_embedding(self):
        p = Problem(15)
        p.forgotten = np.flatnonzero(p.users == p.users[20])
        start = p.start.reshape(-1, K).astype(np.float32)
        same = (p.replay().weights == start).all(axis=1)
        assert np.flatnonzero(same).tolist() == [0, p.users[20], N_USERS]  # and the paddings

    def test_is_reproducible(self):
        p = Problem(16)
        np.testing.assert_array_equal(p.replay().weights, p.replay().weights)
        assert (p.replay(seed=1).weights != p.replay(seed=2).weights).any()

    def test_absent_rows_are_as_good_as_forgotten(self):
        p = Problem(18)
        expected = p.replay().weights
        absent = np.isin(np.arange(60), p.forgotten[:3])
        p.forgotten = p.forgotten[3:]
        np.testing.assert_array_equal(p.replay(absent=absent).weights, expected)
        assert (p.replay().weights != expected).any()

    def test_the_graph_matters(self, monkeypatch):
        p = Problem(17)
        right = p.replay().weights
        monkeypatch.setattr(module, "Graph", lambda users, items, *sizes: Graph(p.users, p.pos, *sizes))
        assert np.abs(p.replay().weights - right).max() > 100 * FLOAT32
