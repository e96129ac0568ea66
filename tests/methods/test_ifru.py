"""IFRU: importance by its definition, the step by a dense solve, spillover by finite differences."""

import numpy as np
import pytest
import torch

from recbole_unlearn.methods.ifru import importance
from recbole_unlearn.methods.triples import curvature, last_epochs, logged_triples


def test_importance_spreads_one_hop():
    rng = np.random.default_rng(0)
    users, items = np.sort(rng.integers(1, 7, 30)), rng.integers(1, 9, 30)
    gone = np.array([3, 4, 17])
    neighbours, degree, count = {}, {}, {}
    for row, pair in enumerate(zip([("u", u) for u in users], [("i", i) for i in items], strict=True)):
        for v, w in (pair, pair[::-1]):
            neighbours.setdefault(v, []).append(w)
            degree[v] = degree.get(v, 0) + 1
            count[v] = count.get(v, 0) + (row in gone)
    first = {v: count[v] / degree[v] for v in degree}
    second = {v: (first[v] + sum(first[w] for w in neighbours[v])) / degree[v] for v in degree}
    got = importance(users, items, gone, 7, 9)
    for kind, values in zip("ui", got, strict=True):
        assert values == pytest.approx([second.get((kind, n), 0) for n in range(len(values))])


def dense(task, rows, kept, log_epochs, hessian):
    """(H summed over the triples of the kept rows, v, theta) of BPR, in float64 by automatic differentiation."""
    model, epochs = task.model(), last_epochs(task.stored, log_epochs)
    P, Q = (part.weight.detach().double() for part in (model.user_embedding, model.item_embedding))
    theta = torch.cat([P.reshape(-1), Q.reshape(-1)])

    def parts(chosen):
        triples = logged_triples(task.log, chosen, epochs)
        ids = [torch.from_numpy(column) for column in (triples.users, triples.pos, triples.neg)]
        return ids, torch.from_numpy(triples.weight)

    def x(theta, ids):
        P_, Q_ = theta[: P.numel()].view_as(P), theta[P.numel() :].view_as(Q)
        return (P_[ids[0]] * (Q_[ids[1]] - Q_[ids[2]])).sum(1)

    def loss(theta, chosen):
        ids, weight = parts(chosen)
        return -(weight * torch.nn.functional.logsigmoid(x(theta, ids))).sum()

    v = torch.autograd.functional.jacobian(lambda t: loss(t, rows), theta)
    if hessian:
        return torch.autograd.functional.hessian(lambda t: loss(t, kept), theta, vectorize=True), v, theta
    ids, weight = parts(kept)
    J = torch.autograd.functional.jacobian(lambda t: x(t, ids), theta, vectorize=True)
    s = torch.sigmoid(x(theta, ids))
    return J.T @ ((weight * s * (1 - s))[:, None] * J), v, theta


@pytest.mark.parametrize("hessian", [False, True])
def test_the_step_solves_the_restricted_system(hessian, task, rows, run):
    """With enough damping for the exact Hessian to be positive definite."""
    damping = 0.3
    forgotten = run("ifru", task, rows[:4], damping=damping, hessian=hessian, log_epochs=2, cg_tolerance=1e-7)
    log = task.log
    H, v, theta = dense(task, rows[:4], np.delete(np.arange(log.n_rows), rows[:4]), 2, hessian)
    users, items = importance(log.users, log.items, rows[:4], log.metadata["n_users"], log.metadata["n_items"])
    free = np.repeat(np.concatenate([users, items]) > 0, task.config["embedding_size"])
    assert 0 < free.sum() < len(free) and forgotten.details["users"] == (users > 0).sum()
    n_triples = (log.n_rows - 4) * log.negatives
    A = H[free][:, free] + n_triples * damping * torch.eye(int(free.sum()))
    expected = theta.clone()
    expected[free] += torch.linalg.solve(A, v[free])
    got = torch.cat([value.detach().view(-1) for value in forgotten.model.parameters()])
    np.testing.assert_allclose(got - theta, expected - theta, atol=1e-3 * float((expected - theta).abs().max()))


def test_the_general_way_is_the_closed_form(task, rows, request):
    """Without a graph, what the remaining triples' gradients owe to it is nothing."""
    model, log, epochs = task.model(), task.log, [0, 1]
    kept = np.delete(np.arange(log.n_rows), rows)
    closed = [curvature(model, log, part, epochs) for part in (rows, kept)]
    v = torch.randn(closed[0].size, dtype=torch.float64)
    model = request.getfixturevalue("any_model").model()
    whole, *general = [curvature(model, log, part, epochs) for part in (np.arange(log.n_rows), rows, kept)]
    np.testing.assert_allclose(whole.gradient() - general[1].gradient(), closed[0].gradient(), atol=1e-4)
    for one, other in zip(closed, general, strict=True):
        np.testing.assert_allclose(one.matvec(v), other.matvec(v), rtol=1e-4, atol=1e-3)


def test_spillover_is_the_change_of_the_gradient_by_the_graph(graph_task, rows):
    """v, direct and spillover, is the derivative of the loss with the old graph minus that with the new."""
    task = graph_task
    epochs, kept = last_epochs(task.stored, 2), np.delete(np.arange(task.log.n_rows), rows)
    data = task.split.remaining_dataset(rows)
    before, after = task.model(), task.model(data)
    v = curvature(before, task.log, np.arange(task.log.n_rows), epochs).gradient()
    v -= curvature(after, task.log, kept, epochs).gradient()

    def value(model, chosen, theta):
        model = model.double()
        model.norm_adj_matrix = model.norm_adj_matrix.double()
        torch.nn.utils.vector_to_parameters(theta, model.parameters())
        triples = logged_triples(task.log, chosen, epochs)
        users, items = model.forward()
        x = (users[triples.users] * (items[triples.pos] - items[triples.neg])).sum(1)
        return -float((torch.from_numpy(triples.weight) * torch.nn.functional.logsigmoid(x)).sum().detach())

    theta = torch.nn.utils.parameters_to_vector(before.parameters()).detach().double()
    direction = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = [
        value(before, np.arange(task.log.n_rows), theta + h * direction) - value(after, kept, theta + h * direction)
        for h in (1e-5, -1e-5)
    ]
    np.testing.assert_allclose(float(v @ direction), (change[0] - change[1]) / 2e-5, rtol=2e-3)
    untouched = np.setdiff1d(np.arange(task.split.n_users), task.split.users[rows])
    assert v.view(-1, task.config["embedding_size"])[untouched[1:]].abs().max() > 0  # spillover reaches other users
