"""Propagation, its curvature and its L2 part against dense matrices and autograd in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_unlearn.influence.operators import DotProductCurvature, UserTriples
from recbole_unlearn.influence.propagated import EPSILON, Graph, PropagatedCurvature, batch_norms, embedding_l2


def random_edges(seed, n_users=7, n_items=9, edges=30):
    """Interactions grouped by user, some of them twice; user and item 0 have none."""
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(1, n_users, edges))
    return users, rng.integers(1, n_items, edges)


def dense(users, items, n_users, n_items, layers):
    """``A_bar`` from its definition."""
    B = np.zeros((n_users + n_items, n_users + n_items))
    B[users, n_users + items] = B[n_users + items, users] = 1
    root = np.diag((B.sum(0) + EPSILON) ** -0.5)
    A = root @ B @ root
    return sum(np.linalg.matrix_power(A, power) for power in range(layers + 1)) / (layers + 1)


class TestGraph:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**32 - 1),
        K=st.sampled_from([1, 3, 8]),
        layers=st.integers(0, 4),
        edges=st.integers(1, 60),
    )
    def test_is_the_mean_of_the_powers_of_the_adjacency(self, seed, K, layers, edges):
        users, items = random_edges(seed, edges=edges)
        graph = Graph(users, items, 7, 9, layers)
        X = np.random.default_rng(seed).normal(size=(16, K))
        expected = dense(users, items, 7, 9, layers) @ X
        np.testing.assert_allclose(graph.propagate(X), expected, rtol=0, atol=1e-12)
        single = graph.propagate(X.astype(np.float32))
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, expected, rtol=0, atol=1e-5)

    def test_room_that_is_given_is_used_and_its_content_does_not_matter(self):
        graph = Graph(*random_edges(1), 7, 9, 3)
        X = np.random.default_rng(1).normal(size=(16, 4))
        out, scaled = np.full_like(X, np.nan), np.full((2, *X.shape), np.nan)
        assert graph.propagate(X, out, scaled) is out
        np.testing.assert_array_equal(out, graph.propagate(X))

    def test_equals_recbole(self):
        """What RecBole's LightGCN would do with its sparse matrix; written out, since influence/ knows no RecBole."""
        users, items = random_edges(2)
        X = torch.from_numpy(np.random.default_rng(2).normal(size=(16, 4)))
        A = torch.from_numpy(dense(users, items, 7, 9, 1) * 2 - np.eye(16)).to_sparse()
        layers = [X]
        for _ in range(2):
            layers.append(torch.sparse.mm(A, layers[-1]))
        expected = torch.stack(layers, dim=1).mean(dim=1)
        np.testing.assert_allclose(Graph(users, items, 7, 9, 2).propagate(X.numpy()), expected, rtol=0, atol=1e-12)

    def test_more_nodes_than_sixteen_bits_count(self):
        graph = Graph([70_000, 1], [2, 2], 70_001, 3, 1)
        X = np.zeros((70_004, 1))
        X[70_000] = 1
        out = graph.propagate(X)
        np.testing.assert_allclose(out[[70_000, 70_003]].ravel(), [0.5, 0.5 / np.sqrt(2)], rtol=1e-6)
        assert np.count_nonzero(out) == 2


class Problem:
    """A small loss in the embeddings, by torch and by our operators."""

    def __init__(self, seed=0, K=3, m=2, n_users=7, n_items=9, layers=2):
        rng = np.random.default_rng(seed)
        self.users, self.items = random_edges(seed, n_users, n_items)
        ahead = rng.integers(1, n_items - 1, (len(self.users), m))
        self.neg = (1 + (self.items[:, None] - 1 + ahead) % (n_items - 1)).astype(np.uint16)
        self.weight = rng.uniform(0.1, 2, len(self.users)).astype(np.float32)
        self.W = rng.normal(size=(n_users + n_items, K))
        self.n_users, self.n_items, self.K = n_users, n_items, K
        self.graph = Graph(self.users, self.items, n_users, n_items, layers)
        self.A = torch.from_numpy(dense(self.users, self.items, n_users, n_items, layers))

    def curvature(self, exact):
        triples = UserTriples(self.users, self.items, self.neg, self.n_users, self.n_items, self.weight)
        E = self.graph.propagate(self.W)
        inner = DotProductCurvature(triples, E[: self.n_users], E[self.n_users :], exact, np.float64)
        return PropagatedCurvature(self.graph, inner)

    def margins(self, theta):
        E = self.A @ theta.view(-1, self.K)
        P, Q = E[: self.n_users], E[self.n_users :]
        user, item = torch.from_numpy(self.users), torch.from_numpy(self.items)
        score = (P[user] * Q[item]).sum(1, keepdim=True)
        return score - (P[user][:, None] * Q[torch.from_numpy(self.neg.astype(np.int64))]).sum(2)

    def loss(self, theta):
        return (torch.from_numpy(self.weight)[:, None] * torch.nn.functional.softplus(-self.margins(theta))).sum()

    @property
    def theta(self):
        return torch.from_numpy(self.W.ravel().copy())

    def gauss_newton(self):
        J = torch.autograd.functional.jacobian(self.margins, self.theta).reshape(-1, self.W.size)
        s = torch.sigmoid(-self.margins(self.theta)).reshape(-1)
        w = torch.from_numpy(np.repeat(self.weight.astype(np.float64), self.neg.shape[1]))
        return J.T @ ((w * s * (1 - s))[:, None] * J)


def matrix(operator):
    return torch.stack([operator.matvec(row) for row in torch.eye(operator.size, dtype=torch.float64)])


class TestCurvature:
    @pytest.mark.parametrize("layers", [0, 1, 3])
    def test_hessian_equals_autograds(self, layers):
        p = Problem(layers, layers=layers)
        expected = torch.autograd.functional.hessian(p.loss, p.theta)
        torch.testing.assert_close(matrix(p.curvature(True)), expected, rtol=0, atol=1e-8)

    @pytest.mark.parametrize("K", [1, 4])
    def test_gauss_newton_equals_autograds_and_is_positive_semi_definite(self, K):
        p = Problem(5, K)
        found = matrix(p.curvature(False))
        torch.testing.assert_close(found, p.gauss_newton(), rtol=0, atol=1e-8)
        assert torch.linalg.eigvalsh(found).min() > -1e-9

    def test_gradient_and_loss_equal_autograds_and_finite_differences(self):
        p = Problem(6)
        curvature, theta = p.curvature(True), p.theta.requires_grad_()
        loss = p.loss(theta)
        (expected,) = torch.autograd.grad(loss, theta)
        assert curvature.loss == pytest.approx(loss.item(), rel=1e-10)
        torch.testing.assert_close(curvature.gradient(), expected, rtol=0, atol=1e-10)
        along = torch.randn(p.W.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        step = 1e-5
        ahead, back = Problem(6), Problem(6)
        ahead.W = p.W + step * along.numpy().reshape(p.W.shape)
        back.W = p.W - step * along.numpy().reshape(p.W.shape)
        difference = (ahead.curvature(True).gradient() - back.curvature(True).gradient()) / (2 * step)
        torch.testing.assert_close(curvature.matvec(along), difference, rtol=0, atol=1e-6)

    def test_diagonal_estimates_that_of_the_propagated_diagonal(self, monkeypatch):
        monkeypatch.setattr("recbole_unlearn.influence.propagated.PROBES", 4000)
        p = Problem(7)
        inner = p.curvature(False).inner.diagonal().reshape(p.W.shape)
        expected = ((p.A**2) @ inner).ravel()
        found = p.curvature(False).diagonal()
        torch.testing.assert_close(found, expected, rtol=0.15, atol=1e-9)

    def test_a_product_does_not_change_an_earlier_one(self):
        p = Problem(8)
        curvature = p.curvature(False)
        first = curvature.matvec(p.theta)
        kept = first.clone()
        curvature.matvec(2 * p.theta)
        torch.testing.assert_close(first, kept, rtol=0, atol=0)


class TestEmbeddingL2:
    def batch(self):
        rng = np.random.default_rng(3)
        return rng.normal(size=(8, 4)), [rng.integers(0, 8, 20) for _ in range(3)]

    def gradient(self, W, nodes, squared):
        """As RecBole's ``EmbLoss`` on one batch, times the batch."""
        W = torch.from_numpy(W).requires_grad_()
        norms = [torch.norm(W[torch.from_numpy(rows)]) for rows in nodes]
        return torch.autograd.grad(sum(norm**2 / 2 if squared else norm for norm in norms), W)[0].numpy()

    @pytest.mark.parametrize("squared", [False, True])
    def test_is_exact_on_one_batch(self, squared):
        W, nodes = self.batch()
        factors = embedding_l2(8, nodes, np.ones(20), 0.3, np.ones(3) if squared else batch_norms(W, nodes, 20))
        np.testing.assert_allclose(factors[:, None] * W, 0.3 * self.gradient(W, nodes, squared), rtol=0, atol=1e-12)

    def test_not_squared_it_is_close_for_many_batches(self):
        rng = np.random.default_rng(4)
        W, nodes = rng.normal(size=(8, 4)), [rng.integers(0, 8, 2000) for _ in range(3)]
        batches = np.split(np.arange(2000), 20)
        expected = sum(self.gradient(W, [rows[batch] for rows in nodes], False) for batch in batches)
        found = embedding_l2(8, nodes, np.ones(2000), 1.0, batch_norms(W, nodes, 100))[:, None] * W
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0)
