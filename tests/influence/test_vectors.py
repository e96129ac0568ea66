"""Vector operations inside numba kernels, against numpy."""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

from recbole_unlearn.influence.vectors import (
    add_scaled,
    dot,
    exp,
    load,
    multiply,
    observe,
    pass_on,
    pointer,
    prefetch,
    publish,
    put,
    root,
    spread,
    store,
    take_like,
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


@pytest.mark.parametrize("K", [1, 7, 64])
def test_arithmetic_and_pointers_agree_with_numpy(rows, K):
    element = rows.dtype.type

    @numba.njit
    def run(A, number, out):
        start = pointer(A, A.shape[1])
        prefetch(start, 5)
        numbers = spread(K, number)
        x, y = take_like(numbers, start, 3), take_like(numbers, start, A.shape[1])
        put(pointer(out, 2), 1, number * x - root(y * y) / (x + numbers))
        return start[4]

    out = np.zeros(K + 4, rows.dtype)
    assert run(rows, element(0.5), out) == rows[1, 4]
    x, y = rows[1, 3 : 3 + K], rows[2, :K]
    rounding = 16 * np.finfo(rows.dtype).eps
    np.testing.assert_allclose(out[3:-1], x / 2 - np.abs(y) / (x + element(0.5)), rtol=rounding, atol=rounding)
    assert not out[:3].any() and out[-1] == 0


def test_threads_see_what_is_published():
    @numba.njit(nogil=True)
    def run(progress, own, data):
        for k in range(1, 100):
            data[own] = k
            publish(progress, own, k)
            while observe(progress, 1 - own) < k:
                pass_on()
            if data[1 - own] < k:
                return False
        return True

    progress, data = np.zeros(2, np.int64), np.zeros(2)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, [progress] * 2, range(2), [data] * 2))


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
