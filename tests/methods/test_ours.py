"""Ours and UBPR are `InfluenceUnlearner` with the settings that they say."""

import copy

import numpy as np
import torch

from recbole_unlearn.methods.triples import logged_triples
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.unlearner import InfluenceUnlearner


def by_hand(task, rows, **keys):
    config = copy.copy(task.config)
    config.final_config_dict = {**task.config.final_config_dict, **keys}
    trained = Trained(task.model(), config, task.split, task.log, task.stored, task.path)
    return InfluenceUnlearner(trained).unlearn(rows)


def test_ours_is_the_unlearner_of_this_package(task, rows, run):
    forgotten, other = run("ours", task, rows), by_hand(task, rows, method="auto")
    assert forgotten.details["method"] == other.method == "replay"
    for name, value in other.state_dict.items():
        assert torch.equal(value, forgotten.model.state_dict()[name])


def test_ours_takes_settings(task, rows, run):
    assert run("ours", task, rows, method="influence").details["method"] == "influence"


def test_ours_makes_other_models_forget_too(graph_task, rows, run):
    forgotten = run("ours", graph_task, rows)
    before, after = graph_task.model().state_dict(), forgotten.model.state_dict()
    assert type(forgotten.model).__name__ == "LightGCN"
    assert not torch.equal(before["user_embedding.weight"], after["user_embedding.weight"])


def test_ubpr_is_equation_7_by_a_dense_solve(make_trained_task, rows, run):
    """H of the last epoch's triples, forgotten ones included, L2 in it; no damping, no returning negatives."""
    task = make_trained_task(weight_decay=0.05, learning_rate=0.01)
    forgotten = run("ubpr", task, rows, cg_tolerance=1e-8)
    model = task.model()
    P, Q = (part.weight.detach().double() for part in (model.user_embedding, model.item_embedding))
    theta, last = torch.cat([P.reshape(-1), Q.reshape(-1)]), [task.stored["triple_log"]["epochs"] - 1]
    everything, gone = (logged_triples(task.log, r, last) for r in (np.arange(task.log.n_rows), rows))
    decay = 0.05

    def loss(theta, triples):
        P_, Q_ = theta[: P.numel()].view_as(P), theta[P.numel() :].view_as(Q)
        users, pos, neg = (torch.from_numpy(ids) for ids in (triples.users, triples.pos, triples.neg))
        x = (P_[users] * (Q_[pos] - Q_[neg])).sum(1)
        return -torch.nn.functional.logsigmoid(x).sum() + len(triples) * decay / 2 * (theta**2).sum()

    H = torch.autograd.functional.hessian(lambda t: loss(t, everything), theta, vectorize=True)
    z = torch.autograd.functional.jacobian(lambda t: loss(t, gone), theta)
    assert torch.linalg.eigvalsh(H).min() > 0
    expected = theta + torch.linalg.solve(H, z)
    got = torch.cat([forgotten.model.state_dict()[f"{kind}_embedding.weight"].view(-1) for kind in ("user", "item")])
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
    assert not forgotten.details["negative_curvature"]
