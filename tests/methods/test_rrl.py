"""RRL: the Fisher information by its definition, the gradients by finite differences."""

import numpy as np
import torch

from recbole_unlearn.methods.rrl import distance, fisher, reversed_loss
from recbole_unlearn.methods.triples import curvature, logged_triples


def triples_and_tables(task, rows, epochs):
    model = task.model()
    tables = [part.weight.detach().double().numpy() for part in (model.user_embedding, model.item_embedding)]
    return model, *tables, logged_triples(task.log, rows, epochs)


def diagonal(P, Q, triples):
    """E over the model's own outcomes of the squared gradient, triple by triple: sum of s (1 - s) (dx)^2."""
    user, item = np.zeros_like(P), np.zeros_like(Q)
    for u, i, j, w in zip(triples.users, triples.pos, triples.neg, triples.weight, strict=True):
        s = 1 / (1 + np.exp(-P[u] @ (Q[i] - Q[j])))
        # the outcome is "i preferred" with probability s, and the gradient of -log p is -(1-s) dx or s dx
        expected = s * (1 - s) ** 2 + (1 - s) * s**2
        user[u] += w * expected * (Q[i] - Q[j]) ** 2
        item[i] += w * expected * P[u] ** 2
        item[j] += w * expected * P[u] ** 2
    return user, item


def test_the_closed_form_is_the_fisher_information(task, rows):
    model, P, Q, triples = triples_and_tables(task, rows, [1])
    for got, expected in zip(
        fisher(model, curvature(model, task.log, rows, [1]), 1), diagonal(P, Q, triples), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_random_probes_estimate_it_without_bias(any_model, rows):
    model, P, Q, triples = triples_and_tables(any_model, rows, [1])
    torch.manual_seed(0)
    estimate = fisher(model, curvature(model, any_model.log, rows, [1]), 3000)
    for got, expected in zip(estimate, diagonal(P, Q, triples), strict=True):
        np.testing.assert_allclose(got, expected, atol=0.1 * expected.max())


def test_the_gradient_of_the_whole_objective(task, rows):
    model, P, Q, triples = triples_and_tables(task, rows, [0, 1])
    information = [torch.rand_like(value) for value in model.parameters()]
    origin = [value.detach() + 0.1 for value in model.parameters()]
    (reversed_loss(model, triples) + 0.7 * distance(model, origin, information)).backward()

    def objective():
        x = (P[triples.users] * (Q[triples.pos] - Q[triples.neg])).sum(1)
        held = sum(
            (f.numpy() * (t - o.numpy()) ** 2).sum() for t, o, f in zip((P, Q), origin, information, strict=True)
        )
        return (triples.weight * np.log1p(np.exp(x))).sum() + 0.7 * held

    for table, part in ((P, model.user_embedding), (Q, model.item_embedding)):
        row = int(triples.users[0] if table is P else triples.neg[0])
        for k in range(3):
            table[row, k] += 1e-5
            above = objective()
            table[row, k] -= 2e-5
            below = objective()
            table[row, k] += 1e-5
            np.testing.assert_allclose(part.weight.grad[row, k], (above - below) / 2e-5, rtol=1e-3, atol=1e-5)


def test_more_strength_moves_less(task, rows, run):
    def moved(strength):
        pairs = zip(
            run("rrl", task, rows, strength=strength).model.parameters(), task.model().parameters(), strict=True
        )
        return sum(float((a - b).detach().norm() ** 2) for a, b in pairs)

    assert moved(50.0) < moved(0.5) < moved(0.0)
