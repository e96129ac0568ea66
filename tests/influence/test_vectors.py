"""Vector operations inside numba kernels, against numpy."""

import numba
import numpy as np
import pytest

from recbole_unlearn.influence.vectors import add_scaled, dot, exp, load, multiply, store, widen, zeros


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def rows(request):
    return np.random.default_rng(0).normal(size=(5, 12)).astype(request.param)


@pytest.mark.parametrize("K", [1, 3, 8])
def test_operations_agree_with_numpy(rows, K):
    @numba.njit
    def run(A, scale, out, wide):
        x, y = load(K, A, 1, 2), load(K, A, 4, 12 - K)
        store(out, 0, 0, multiply(x, y))
        store(out, 1, 1, add_scaled(x, scale, y))
        store(wide, 0, 0, add_scaled(zeros(K), 2.0, x))
        store(wide, 1, 0, widen(y))
        return dot(x, y)

    out, wide = np.zeros((2, K + 1), rows.dtype), np.zeros((2, K))
    inner = run(rows, 0.5, out, wide)
    x, y = rows[1, 2 : 2 + K], rows[4, 12 - K :]
    rounding = 4 * np.finfo(rows.dtype).eps
    np.testing.assert_allclose(inner, np.dot(x.astype(float), y.astype(float)), rtol=0, atol=K * rounding)
    np.testing.assert_allclose(out[0, :K], x * y, rtol=rounding)
    np.testing.assert_allclose(out[1, 1:], x + np.float32(0.5) * y, rtol=0, atol=rounding)
    assert out[0, K] == 0 and out[1, 0] == 0  # nothing beside the place is touched
    np.testing.assert_array_equal(wide, [2.0 * x.astype(float), y.astype(float)])


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


def test_exp():
    @numba.njit
    def run(x, out):
        for k in range(len(x)):
            out[k] = exp(x[k])

    x = np.linspace(-87, 88, 10_001, dtype=np.float32)
    out = np.empty_like(x)
    run(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(float)), rtol=3e-6)
    near = np.abs(x) < 10
    np.testing.assert_allclose(out[near], np.exp(x[near].astype(float)), rtol=5e-7)
    run(np.array([100, -100], np.float32), out)
    assert np.isinf(out[0]) and out[1] < 1e-37
