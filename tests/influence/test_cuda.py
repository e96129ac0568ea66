"""The curvature operators on a GPU against those on the CPU."""

import numpy as np
import pytest
import torch

from recbole_unlearn.influence.operators import AutogradCurvature, DotProductCurvature, UserTriples, logistic_curvature

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
N_USERS, N_ITEMS, K, ROWS, M = 61, 83, 8, 1003, 3


@pytest.mark.parametrize("exact", [False, True])
def test_the_products_agree_with_the_closed_form(exact):
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, N_USERS, ROWS)).astype(np.int32)
    pos, neg = rng.integers(0, N_ITEMS, ROWS), rng.integers(0, N_ITEMS, (ROWS, M))
    P, Q = (rng.normal(size=(n, K)).astype(np.float32) for n in (N_USERS, N_ITEMS))
    closed = DotProductCurvature(
        UserTriples(users, pos.astype(np.uint16), neg.astype(np.uint16), N_USERS, N_ITEMS), P, Q, exact
    )
    params = [torch.tensor(part, device="cuda", requires_grad=True) for part in (P, Q)]
    u, i, j = (torch.as_tensor(ids, device="cuda", dtype=torch.int64) for ids in (users, pos, neg))

    def margins(rows):
        return (params[0][u[rows], None] * (params[1][i[rows], None] - params[1][j[rows]])).sum(-1)

    def loss(rows):
        return -torch.nn.functional.logsigmoid(margins(rows)).sum()

    def outputs(rows):
        x = margins(rows)
        return x, logistic_curvature(x)

    batches = np.array_split(np.arange(ROWS), 3)
    operator = AutogradCurvature(params, batches, loss, None if exact else outputs)
    v = torch.from_numpy(rng.normal(size=operator.size))
    expected = closed.matvec(v)
    torch.testing.assert_close(operator.matvec(v), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    gradient = operator.gradient()
    torch.testing.assert_close(gradient, closed.gradient(), rtol=0, atol=1e-5 * float(gradient.abs().max()))
