"""Replay through a graph against torch.optim.Adam and autograd in float64, on the batches that it draws."""

from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from recbole_unlearn.influence import graph_replay as module
from recbole_unlearn.influence.graph_replay import replay_graph
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.replay import Adam

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
        return replay_graph(
            self.users, self.pos, self.negatives, self.forgotten, self.start, N_USERS, N_ITEMS, self.layers,
            batch_triples=self.batch, **{**self.settings, **changes},
        )  # fmt: skip


@pytest.fixture
def epochs(monkeypatch):
    """Lane (by its graph) -> what it was trained on, an epoch each."""
    seen = {}
    run = module._Lane.epoch

    def record(self, triples, start, shares, stride, parallel):
        seen.setdefault(id(self), (self.graph, []))[1].append((triples.copy(), start, shares, stride))
        run(self, triples, start, shares, stride, parallel)

    monkeypatch.setattr(module._Lane, "epoch", record)
    return lambda: sorted(seen.values(), key=lambda lane: -len(lane[0].neighbour))


def emb_loss(W, triples, squared):
    """RecBole's ``EmbLoss`` times the size of the batch."""
    norms = [torch.norm(W[triples[:, part]]) for part in range(3)]
    return sum(norm**2 / 2 if squared else norm for norm in norms)


def gradient(W, A, triples, share, reg_weight, squared):
    W = W.clone().requires_grad_()
    E = A @ W
    triples = torch.from_numpy(triples.astype(np.int64))
    u, i, j = triples.T
    loss = torch.nn.functional.softplus(-(E[u] * (E[i] - E[j])).sum(1)).sum() * share
    return torch.autograd.grad(loss + reg_weight * share * emb_loss(W, triples, squared), W)[0]


def reference(start, lane, adam, reg_weight=0.0, squared=False):
    """Weights after training on a lane's batches by torch.optim.Adam, a step at a time."""
    graph, epochs = lane
    A = torch.from_numpy(graph.propagate(np.eye(graph.size)))
    W = torch.tensor(start.reshape(graph.size, K), dtype=torch.float64)
    optimizer = torch.optim.Adam([W], adam.lr, (adam.beta1, adam.beta2), adam.eps, adam.weight_decay)
    for triples, begin, shares, _ in epochs:
        for s, share in enumerate(shares):
            W.grad = gradient(W, A, triples[begin[s] : begin[s + 1]], share, reg_weight, squared)
            optimizer.step()
    return W.numpy()


class TestAgainstTorch:
    @pytest.mark.parametrize("m", [1, 3])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.01])
    @pytest.mark.parametrize("reg_weight, squared", [(0.0, False), (0.05, False), (0.05, True)])
    def test_both_lanes_are_trained_as_torch_does(self, epochs, m, weight_decay, reg_weight, squared):
        adam = replace(ADAM, weight_decay=weight_decay)
        p = Problem(m, m, optimizer=adam, reg_weight=reg_weight, require_pow=squared)
        result = p.replay()
        with_them, without = (reference(p.start, lane, adam, reg_weight, squared) for lane in epochs())
        np.testing.assert_allclose(result.without, without, rtol=0, atol=FLOAT32)
        np.testing.assert_allclose(result.change, without - with_them, rtol=0, atol=2 * FLOAT32)
        assert np.abs(result.change).max() > 1000 * FLOAT32

    @pytest.mark.parametrize("layers", [1, 3])
    def test_other_numbers_of_layers(self, epochs, layers):
        p = Problem(5, layers=layers)
        result = p.replay()
        np.testing.assert_allclose(result.without, reference(p.start, epochs()[1], ADAM), rtol=0, atol=FLOAT32)

    def test_one_lane_alone_is_the_second_of_two(self):
        p = Problem(6)
        np.testing.assert_array_equal(p.replay(paired=False).without, p.replay().without)


class TestBatches:
    def test_the_first_lane_meets_every_row_once_an_epoch_in_batches_of_the_given_size(self, epochs):
        p = Problem(7, m=2)
        p.replay()
        (_, first), _ = epochs()
        for (triples, begin, shares, _), neg in zip(first, p.negatives, strict=True):
            expected = np.stack([np.repeat(p.users, 2), np.repeat(N_USERS + p.pos, 2), N_USERS + neg.ravel()], axis=1)
            assert sorted(map(tuple, triples)) == sorted(map(tuple, expected))
            np.testing.assert_array_equal(np.diff(begin), [16] * 7 + [8])
            np.testing.assert_allclose(shares, 1 / np.diff(begin))

    def test_the_second_lane_is_the_first_without_the_forgotten_and_with_returns(self, epochs):
        p = Problem(8)
        p.replay()
        (_, first), (graph, second) = epochs()
        gone = {(int(p.users[r]), N_USERS + int(p.pos[r])) for r in p.forgotten}
        rows = np.setdiff1d(np.arange(60), p.forgotten)
        kept = {(int(p.users[r]), N_USERS + int(p.pos[r])) for r in rows}
        returned = 0
        for (all_triples, begin, shares, _), (triples, own_begin, own_shares, _) in zip(first, second, strict=True):
            np.testing.assert_array_equal(shares, own_shares)
            for s in range(len(shares)):
                before = [tuple(t) for t in all_triples[begin[s] : begin[s + 1]]]
                after = [tuple(t) for t in triples[own_begin[s] : own_begin[s + 1]]]
                still = [t for t in before if t[:2] in kept]
                extra = [t for t in after if t not in still]
                returned += len(extra)
                assert [t for t in after if t in still][: len(still)] == still
                assert all((t[0], t[2]) in gone and t[:2] in kept for t in extra)
        assert returned > 0
        edges = set(
            zip(np.repeat(np.arange(graph.size), np.diff(graph.start)).tolist(), graph.neighbour.tolist(), strict=True)
        )
        assert edges == kept | {(b, a) for a, b in kept}

    def test_absent_rows_are_in_neither_lane(self, epochs):
        p = Problem(9)
        absent = np.zeros(60, bool)
        absent[::7] = True
        p.forgotten = np.setdiff1d(p.forgotten, np.flatnonzero(absent))
        p.replay(absent=absent)
        for graph, lane in epochs():
            assert len(graph.neighbour) <= 2 * (~absent).sum()
            assert all(len(triples) <= (~absent).sum() + 20 for triples, *_ in lane)
        (_, first), _ = epochs()
        assert all(len(triples) == (~absent).sum() for triples, *_ in first)


class TestStride:
    def test_moves_as_adam_would_with_the_mean_gradient(self, epochs, monkeypatch):
        monkeypatch.setattr(module, "WARM_UP", 3)
        p = Problem(10, rows=90, stride=3)
        result = p.replay()
        graph, lane = epochs()[1]
        A = torch.from_numpy(graph.propagate(np.eye(graph.size)))
        W = torch.tensor(p.start.reshape(graph.size, K), dtype=torch.float64)
        M, V, step, widths = torch.zeros_like(W), torch.zeros_like(W), 0, []
        lr, beta1, beta2, eps, _ = astuple(ADAM)
        for triples, begin, shares, stride in lane:
            first = 0
            while first < len(shares):
                steps = range(first, min(first + min(stride, 1 + step // 3), len(shares)))
                first = steps.stop
                widths.append(len(steps))
                grads = [gradient(W, A, triples[begin[s] : begin[s + 1]], shares[s], 0, False) for s in steps]
                mean = sum(grads) / len(grads)
                square = mean**2 + (grads[0] - mean) ** 2
                move = torch.zeros_like(W)
                for _ in steps:
                    step += 1
                    M, V = beta1 * M + (1 - beta1) * mean, beta2 * V + (1 - beta2) * square
                    move += lr / (1 - beta1**step) * M
                W = W - move / ((V / (1 - beta2**step)).sqrt() + eps)
        assert widths == [1, 1, 1, 2, 1, 3, 3, 3, 3]  # of 6 steps an epoch
        np.testing.assert_allclose(result.without, W, rtol=0, atol=FLOAT32)

    def test_ends_near_where_single_steps_end(self):
        p = Problem(11, rows=400, batch=10, epochs=4, forgotten=20, optimizer=replace(ADAM, lr=0.002, beta2=0.999))
        single, strided, other = p.replay(), p.replay(stride=4), p.replay(seed=12)
        assert np.linalg.norm(strided.without - single.without) < 0.5 * np.linalg.norm(other.without - single.without)


class TestResult:
    def test_snapshots_are_the_change_after_so_many_epochs(self):
        p = Problem(13)
        result = p.replay(snapshots=(0, 2, 3))
        assert set(result.snapshots) == {0, 2, 3}
        assert not result.snapshots[0].any()
        np.testing.assert_array_equal(result.snapshots[3], result.change)
        p.negatives = p.negatives[:2]
        np.testing.assert_array_equal(result.snapshots[2], p.replay().change)

    def test_nothing_forgotten_changes_nothing(self):
        p = Problem(14)
        p.forgotten = np.empty(0, np.int64)
        assert not p.replay().change.any()

    def test_untrained_users_are_named(self):
        p = Problem(15)
        p.forgotten = np.flatnonzero(p.users == p.users[20])
        result = p.replay()
        assert np.flatnonzero(result.untrained).tolist() == [p.users[20]]
        start = p.start.reshape(-1, K).astype(np.float32)
        np.testing.assert_array_equal(result.without[result.untrained], start[result.untrained])

    def test_is_reproducible(self):
        p = Problem(16)
        np.testing.assert_array_equal(p.replay().change, p.replay().change)
        assert (p.replay(seed=1).change != p.replay(seed=2).change).any()

    def test_the_graph_matters(self, monkeypatch):
        """The second lane's graph has no forgotten edges: with them, another result."""
        p = Problem(17)
        right = p.replay().without
        monkeypatch.setattr(module, "Graph", lambda users, items, *sizes: Graph(p.users, p.pos, *sizes))
        assert np.abs(p.replay().without - right).max() > 100 * FLOAT32
