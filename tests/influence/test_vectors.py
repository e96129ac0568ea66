"""Vector operations inside numba kernels, against numpy."""

import numba
import numpy as np
import pytest

from recbole_unlearn.influence.vectors import (
    add_scaled,
    divide,
    dot,
    exp,
    filled,
    load,
    multiply,
    root,
    store,
    widen,
    zeros,
)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def rows(request):
    return np.random.default_rng(0).normal(size=(5, 304)).astype(request.param)


@pytest.mark.parametrize("K", [1, 2, 3, 7, 8, 10, 64, 100, 300])
def test_operations_agree_with_numpy(rows, K):
    @numba.njit
    def run(A, scale, out, wide):
        x, y = load(K, A, 1, 2), load(K, A, 4, 304 - K)
        store(out, 0, 0, multiply(x, y))
        store(out, 1, 1, add_scaled(x, scale, y))
        store(wide, 0, 0, add_scaled(zeros(K), 2.0, x))
        store(wide, 1, 0, widen(y))
        return dot(x, y)

    out, wide = np.zeros((2, K + 1), rows.dtype), np.zeros((2, K))
    inner = run(rows, 0.5, out, wide)
    x, y = rows[1, 2 : 2 + K], rows[4, 304 - K :]
    rounding = 4 * np.finfo(rows.dtype).eps
    np.testing.assert_allclose(inner, np.dot(x.astype(float), y.astype(float)), rtol=0, atol=K * rounding)
    np.testing.assert_allclose(out[0, :K], x * y, rtol=rounding)
    np.testing.assert_allclose(out[1, 1:], x + np.float32(0.5) * y, rtol=0, atol=rounding)
    assert out[0, K] == 0 and out[1, 0] == 0  # nothing beside the place is touched
    np.testing.assert_array_equal(wide, [2.0 * x.astype(float), y.astype(float)])


@pytest.mark.parametrize("K", [1, 3, 16, 64])
def test_quotients_and_roots_are_rounded_as_numpys(rows, K):
    @numba.njit
    def run(A, value, out):
        x, y = load(K, A, 1, 2), load(K, A, 4, 304 - K)
        store(out, 0, 0, divide(x, y))
        store(out, 1, 0, root(multiply(x, x)))
        store(out, 2, 0, filled(x, value))

    out = np.zeros((3, K + 1), rows.dtype)
    run(rows, rows[0, 0], out)
    x, y = rows[1, 2 : 2 + K], rows[4, 304 - K :]
    np.testing.assert_array_equal(out[:, :K], [x / y, np.sqrt(x * x), np.full(K, rows[0, 0])])
    assert not out[:, K].any()


def test_sums_of_float32_rows_are_float64():
    """1 + 2^-30 is 1 in float32."""

    @numba.njit
    def run(A, out):
        total = add_scaled(zeros(2), 1.0, load(2, A, 0, 0))
        store(out, 0, 0, add_scaled(total, 1.0, load(2, A, 1, 0)))

    out = np.empty((1, 2))
    run(np.array([[1, 1], [2**-30, 2**-30]], np.float32), out)
    np.testing.assert_array_equal(out, [[1 + 2**-30] * 2])


def test_a_vector_goes_only_into_an_array_of_its_type():
    @numba.njit
    def run(A):
        store(A, 0, 0, zeros(2))

    with pytest.raises(numba.TypingError):
        run(np.zeros((1, 2), np.float32))


def test_exponential():
    @numba.njit
    def run(x):
        out = np.empty_like(x)
        for k in range(len(x)):
            out[k] = exp(x[k])
        return out

    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    np.testing.assert_allclose(run(x), np.exp(x.astype(np.float64)), rtol=4e-7)
    assert run(np.zeros(1, np.float32))[0] == 1
    extreme = run(np.array([-1e30, -100, 89, 1e30, np.nan], np.float32))
    assert (extreme[:2] < 1e-37).all() and (extreme[2:4] == np.inf).all() and np.isnan(extreme[4])
