"""Certified removal: each user's problem by torch in float64, its minimum, the Newton step, and what is certified."""

import math

import numpy as np
import pytest
import torch

from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.methods import METHODS, chosen, settings_of
from recbole_unlearn.methods.base import Task
from recbole_unlearn.methods.certified import UserProblem
from recbole_unlearn.methods.triples import last_epochs, logged_triples
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.training.fit import train

KEYS = {"regularisation": 0.4, "sigma": 0.2, "log_epochs": 3}


def noise(task, shape):
    return 0.2 * torch.from_numpy(np.random.default_rng(task.seed).standard_normal(shape))


def objective(task, Q, user, b, without=()):
    """Of a user's vector, in float64."""
    own = np.setdiff1d(np.flatnonzero(task.log.users == user), without)
    triples = logged_triples(task.log, own, last_epochs(task.stored, 3))
    d, weight = Q[triples.pos] - Q[triples.neg], torch.from_numpy(triples.weight)

    def value(p):
        return -(weight * torch.nn.functional.logsigmoid(d @ p)).sum() + 0.2 * p @ p + b @ p

    return value


def test_the_original_is_at_each_users_minimum(task):
    method = METHODS["certified"](task, settings_of("certified", KEYS))
    assert method.prepare() > 0
    P, Q = (part.weight.detach().double() for part in (method.original().user_embedding, task.model().item_embedding))
    b = noise(task, P.shape)
    for user in np.unique(task.log.users)[::9]:
        value = objective(task, Q, user, b[user])
        gradient = torch.autograd.functional.jacobian(value, P[user])
        H = torch.autograd.functional.hessian(value, P[user])
        assert torch.linalg.eigvalsh(H).min() >= 0.39  # convex, by the regularisation at least
        assert torch.linalg.solve(H, gradient).norm() < 1e-5 * P[user].norm()
    assert torch.equal(P[0], task.model().user_embedding.weight[0].double())  # of the padding


def test_a_user_who_was_never_there_and_one_who_is_gone_have_one_law(task):
    """Of the same noise they are even the same vector: what `populations` compares a forgotten user with."""
    user, split = 7, task.split
    gone = np.flatnonzero(split.users == user)
    forgotten = METHODS["certified"](task, settings_of("certified", KEYS)).forget(gone).model
    path = task.path.with_name("never.pth")
    train(task.config, split, path, gone, task.seed)
    stored, log = checkpoints.load(path)
    rest = Split.of(task.config, split.remaining(gone), split.valid, split.test)
    never = METHODS["certified"](
        Task(task.config, rest, task.seed, stored, log, path, task.folder), settings_of("certified", KEYS)
    )
    both = [model.user_embedding.weight[user] for model in (forgotten, never.original())]
    assert torch.allclose(*both, atol=1e-6) and both[0].norm() > 0


def test_a_request_is_one_newton_step_on_what_remains(task, rows, run):
    method = METHODS["certified"](task, settings_of("certified", KEYS))
    method.prepare()
    forgotten, before, Q = method.forget(rows), torch.from_numpy(method.fitted), task.model().item_embedding.weight
    b, left, expected = noise(task, before.shape), 0.0, before.clone()
    for user in np.unique(task.log.users[rows]):
        value = objective(task, Q.detach().double(), user, b[user], rows)
        gradient, H = (
            f(value, before[user]) for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
        )
        expected[user] -= torch.linalg.solve(H, gradient)
        left += float((torch.autograd.functional.jacobian(value, expected[user]) ** 2).sum())
    got = forgotten.model.user_embedding.weight.detach()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(forgotten.model.item_embedding.weight, Q)
    assert forgotten.details["residual"] == pytest.approx(math.sqrt(left), rel=1e-6)
    assert forgotten.details["epsilon"] == pytest.approx(math.sqrt(2 * math.log(1.5e4) * left) / 0.2, rel=1e-6)
    again = run("certified", task, rows, **KEYS)  # from the minimum each time
    assert torch.equal(again.model.user_embedding.weight, forgotten.model.user_embedding.weight)


def test_the_step_leaves_a_gradient_of_second_order(task):
    """The residual of a quarter of the step is about a sixteenth: what the certificate rests on."""
    rng = np.random.default_rng(0)
    d, p = rng.standard_normal((40, 4)), rng.standard_normal(4)
    problem = UserProblem(d, np.ones(40), 0.3, np.zeros(4))
    best = problem.minimum(p)
    left = []
    for size in (1.0, 0.25):  # of what is forgotten: a triple, or a quarter of it
        weight = np.ones(40)
        weight[0] -= size
        rest = UserProblem(d, weight, 0.3, np.zeros(4))
        gradient, H = rest.derivatives(best)
        left.append(np.linalg.norm(rest.derivatives(best - np.linalg.solve(H, gradient))[0]))
    assert 10 < left[0] / left[1] < 26


def test_who_keeps_nothing_has_the_minimum_of_nothing(task, run):
    user = task.log.users[0]
    forgotten = run("certified", task, np.flatnonzero(task.log.users == user), **KEYS)
    b = noise(task, forgotten.model.user_embedding.weight.shape)
    np.testing.assert_allclose(forgotten.model.user_embedding.weight[user].detach(), -b[user] / 0.4, rtol=1e-5)
    assert forgotten.details["residual"] < 1e-12


def test_newton_reaches_the_minimum_from_far_away():
    rng = np.random.default_rng(1)
    problem = UserProblem(rng.standard_normal((30, 5)), np.ones(30), 1e-3, rng.standard_normal(5))
    found = [problem.minimum(start * np.ones(5)) for start in (0.0, 50.0)]
    np.testing.assert_allclose(*found, rtol=1e-6)
    assert np.linalg.norm(problem.derivatives(found[0])[0]) < 1e-8


def test_it_is_for_models_whose_users_are_convex_problems(graph_task, make_config):
    with pytest.raises(InputError, match="certified is not for LightGCN: it is for BPR"):
        chosen("scif,certified", graph_task.config)
    assert "certified" not in chosen("all", graph_task.config) and chosen("all", make_config()) == list(METHODS)
    with pytest.raises(InputError, match="certified: regularisation must be above 0"):
        settings_of("certified", {"regularisation": 0})
