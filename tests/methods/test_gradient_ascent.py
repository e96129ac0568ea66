"""Gradient ascent on the forgotten triples."""

import numpy as np
import torch

from recbole_unlearn.methods.gradient_ascent import ascent_loss
from recbole_unlearn.methods.triples import last_epochs, logged_triples


def mean_loss(P, Q, triples):
    """float64, by its definition."""
    x = ((Q[triples.pos] - Q[triples.neg]) * P[triples.users]).sum(1)
    return np.average(np.log1p(np.exp(-x)), weights=triples.weight)


def test_its_gradient_is_that_of_minus_the_mean_loss(task, rows):
    triples, model = logged_triples(task.log, rows, [0, 1]), task.model()
    ascent_loss(model, triples).backward()
    P, Q = (part.weight.detach().double().numpy() for part in (model.user_embedding, model.item_embedding))
    for part, table in ((model.user_embedding, P), (model.item_embedding, Q)):
        row = int(triples.users[0] if table is P else triples.pos[0])
        for k in range(3):
            table[row, k] += 1e-5
            above = mean_loss(P, Q, triples)
            table[row, k] -= 2e-5
            below = mean_loss(P, Q, triples)
            table[row, k] += 1e-5
            np.testing.assert_allclose(part.weight.grad[row, k], -(above - below) / 2e-5, rtol=1e-3, atol=1e-7)


def test_each_step_raises_the_loss_and_only_touched_rows_move(task, rows, run):
    forgotten = run("gradient_ascent", task, rows, steps=6)
    triples = logged_triples(task.log, rows, last_epochs(task.stored, 6))
    before, after = task.model(), forgotten.model
    tables = [
        [m.user_embedding.weight.detach().numpy(), m.item_embedding.weight.detach().numpy()] for m in (before, after)
    ]
    assert mean_loss(*tables[1], triples) > mean_loss(*tables[0], triples)
    moved = (tables[1][0] != tables[0][0]).any(1)
    assert np.array_equal(np.flatnonzero(moved), np.unique(triples.users))
    moved = (tables[1][1] != tables[0][1]).any(1)
    assert np.array_equal(np.flatnonzero(moved), np.unique([triples.pos, triples.neg]))


def test_the_negatives_are_those_of_the_epochs_that_the_weights_were_trained_for(make_trained_task, rows, run):
    task = make_trained_task(epochs=2)  # fewer than steps: they serve again
    assert len(run("gradient_ascent", task, rows, steps=5).details["losses"]) == 5
    assert torch.isfinite(task.model().user_embedding.weight).all()
