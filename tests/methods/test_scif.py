"""SCIF against a dense solve in float64, and its general way against its closed form."""

import numpy as np
import torch

from recbole_unlearn.methods.triples import last_epochs, logged_triples


def test_each_target_user_takes_the_newton_step_of_the_cleaned_history(task, rows, run):
    forgotten, model = run("scif", task, rows, damping=0.3, log_epochs=3), task.model()
    P, Q = (part.weight.detach().double() for part in (model.user_embedding, model.item_embedding))
    epochs, users = last_epochs(task.stored, 3), np.asarray(task.log.users)
    expected = P.clone()

    def loss(p, chosen):
        triples = logged_triples(task.log, chosen, epochs)
        x = (Q[torch.from_numpy(triples.pos)] - Q[torch.from_numpy(triples.neg)]) @ p
        return -(torch.from_numpy(triples.weight) * torch.nn.functional.logsigmoid(x)).sum()

    for user in np.unique(users[rows]):
        full = np.flatnonzero(users == user)
        cleaned = np.setdiff1d(full, rows)
        H = torch.autograd.functional.hessian(lambda p, full=full: loss(p, full), P[user])
        before, after = (
            torch.autograd.functional.jacobian(lambda p, part=part: loss(p, part), P[user]) for part in (full, cleaned)
        )
        expected[user] += torch.linalg.solve(H + 0.3 * torch.eye(len(H)), before - after)
    got = forgotten.model.user_embedding.weight.detach()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    untouched = np.setdiff1d(np.arange(len(P)), users[rows])
    assert torch.equal(got[untouched], model.user_embedding.weight[untouched])
    assert torch.equal(forgotten.model.item_embedding.weight, model.item_embedding.weight)


def test_the_general_way_is_the_closed_form(task, rows, run, request):
    closed = run("scif", task, rows, damping=0.3)
    general = run("scif", request.getfixturevalue("any_model"), rows, damping=0.3, cg_tolerance=1e-8)
    assert general.details["residual"] <= 1e-8
    for first, second in zip(closed.model.parameters(), general.model.parameters(), strict=True):
        np.testing.assert_allclose(first.detach(), second.detach(), rtol=1e-3, atol=1e-4)
