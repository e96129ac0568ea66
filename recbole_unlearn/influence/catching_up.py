"""Weight rows that Adam moves at the cost of the steps that touch them: rows catch up. For kernels to inline.

Adam moves every row in every step. Without a gradient, j steps after step T, its moments are
``b1^j m`` and ``b2^j v``, so with ``s = sqrt(v)`` the row moves by ``m`` times

    sum_j c_j / (a_j s + eps),   c_j = rate_{T+j} b1^j,   a_j = sqrt(b2^j / (1 - b2^{T+j})).

In ``r_j = 1 / a_j`` this is an integral of ``1 / (s + eps r)`` over a measure of weights ``c_j r_j``. The r are close
to each other, so Gauss quadrature with two nodes has it for any s, as one ratio of a linear and a quadratic polynomial
in s; it is made of the moments ``sum_j c_j r_j^k``, k from 1 to 4. These are differences of sums to the end of the
block, for any number of steps. So a row that is touched takes its own step, j = 0, and all others up to its next touch
at once, with one root and one division a weight. Where two nodes do not do (the first hundred steps, unusual settings)
or there is weight decay, it takes the same steps one by one, in registers.
"""

import numpy as np

from recbole_unlearn.influence.compiling import compiled, inlined
from recbole_unlearn.influence.recorded import Adam
from recbole_unlearn.influence.vectors import LINE, columns, prefetch, put, root, take_like

NEGLIGIBLE = 1e-9  # share of the first moment that moves nothing any more
REACH = 512  # steps, at most, after which the first moment must be negligible, for rows to catch up at once
ERROR = 1e-5  # of the quadrature, relative, where it is greatest: at v = 0
NONE = np.uint32(0xFFFFFFFF)  # no row
SOON = np.uint64(6)  # rows for which memory is asked before they are needed


@compiled
def _sums(rates, before, b1, b2):
    """``[5, steps + 1]``: sum over all later steps T + j, without end, of ``c_j r_j^k`` for T each step and each k."""
    sums = np.zeros((5, len(rates) + 1))
    for s in range(len(rates) - 1, -1, -1):
        shrunk = np.sqrt(1 - b2 ** (before + s + 1))
        term = rates[s] / (1 - b1 ** (before + s + 1))
        for k in range(5):
            sums[k, s] = term + b1 / b2 ** (0.5 * k) * sums[k, s + 1]
            term *= shrunk
    return sums


@inlined
def quotients(sums, powers, s, eps, ratios):
    """Fill ``ratios`` ``[gaps, 4]``: from step ``s``, n steps together move by m times
    ``ratios[n, 0] * (s + ratios[n, 1]) / (s^2 + ratios[n, 2] * s + ratios[n, 3])``.

    Returns the greatest number of steps that this is good for.
    """
    most = min(ratios.shape[0], sums.shape[1] - s)
    bad = most
    for n in range(np.uint64(1), np.uint64(most)):
        to = np.uint64(s) + n
        total = sums[1, s] - powers[1, n] * sums[1, to]
        some = total > 0  # else all rates are zero
        share = 1 / total if some else 1.0
        mean = (sums[2, s] - powers[2, n] * sums[2, to]) * share
        square = (sums[3, s] - powers[3, n] * sums[3, to]) * share
        cube = (sums[4, s] - powers[4, n] * sums[4, to]) * share
        variance = square - mean * mean
        apart = (variance > 1e-12 * square) & (n > np.uint64(1))  # else there is one node, up to rounding
        skew = cube - mean * (3 * square - 2 * mean * mean)
        tilt = skew / variance if apart else 0.0
        product = mean * mean + mean * tilt - (variance if apart else 0.0)
        exact = (sums[0, s] - powers[0, n] * sums[0, to]) * product  # of s = 0
        wrong = some & (abs(total * (mean + tilt) - exact) > ERROR * exact)
        bad = min(bad, n if wrong else most)
        ratios[n, 0] = total
        ratios[n, 1] = eps * (mean + tilt)
        ratios[n, 2] = eps * (2 * mean + tilt)
        ratios[n, 3] = eps * eps * product if some else 1.0
    return sums.shape[1] if bad == most else bad - 1


def planned(adam: Adam, rates: np.ndarray, taken: int) -> tuple:
    """What kernels take of the steps to come, from which on rows catch up at once where that is fit.

    Args:
        rates: learning rate of each step, float64 ``[steps]``.
        taken: steps before these.
    """
    b1, b2, decay, steps = adam.beta1, adam.beta2, adam.weight_decay, len(rates)
    reach = max(1, int(np.ceil(np.log(NEGLIGIBLE) / np.log(b1)))) if b1 > 0 else 1
    at_once = decay == 0 and reach <= REACH and b1 < 0.99 * b2**2 and adam.eps >= 1e-15
    powers = (b1 / b2 ** (np.arange(5)[:, None] / 2)) ** np.arange(reach + 1 if at_once else 1)
    numbers, left = taken + 1 + np.arange(steps), np.maximum(np.arange(steps + 1) - 1, 0)
    schedule = np.zeros((steps + 1, 4), np.float32)
    schedule[:steps, 0], schedule[:steps, 1] = rates / (1 - b1**numbers), 1 / np.sqrt(1 - b2**numbers)
    schedule[:, 2], schedule[:, 3] = b1**left, b2**left
    single = tuple(np.float32(x) for x in (b1, b2, 1 - b1, 1 - b2, adam.eps, decay))
    return _sums(rates, taken, b1, b2), powers, schedule, np.uint64(reach), single


# Of rows as wide as a vector ``zero``.


@inlined
def advance(zero, table, row, gradient, s, gap, schedule, ratios, good, reach, numbers):
    """Take a weight row's own step ``s``, and those without a gradient until it is ``gap`` steps further."""
    b1, b2, rest1, rest2, eps, decay = numbers
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    L = columns(zero)
    at = three * L * np.uint64(row)
    w, m, v = take_like(zero, table, at), take_like(zero, table, at + L), take_like(zero, table, at + two * L)
    if gap <= good:
        m = b1 * m + rest1 * gradient
        v = b2 * v + rest2 * gradient * gradient
        size, n, left = root(v), four * min(gap, reach), four * gap
        w = w - ratios[n] * m * (size + ratios[n + one]) / (v + ratios[n + two] * size + ratios[n + three])
    else:
        moving = gap if decay > 0 else min(gap, reach)
        for t in range(s, s + moving):
            gradient = gradient + decay * w
            m = b1 * m + rest1 * gradient
            v = b2 * v + rest2 * gradient * gradient
            w = w - schedule[four * t] * m / (schedule[four * t + one] * root(v) + eps)
            gradient = zero
        left = four * (gap - moving + one)
    put(table, at, w)
    put(table, at + L, schedule[left + two] * m)
    put(table, at + two * L, schedule[left + three] * v)


@inlined
def catch_up(zero, table, first, rows, schedule, ratios, good, reach, numbers):
    """Take the steps of all rows until they are touched first."""
    for row in range(rows):
        if first[row]:
            gap = np.uint64(first[row])
            advance(zero, table, row, zero, np.uint64(0), gap, schedule, ratios, good, reach, numbers)


@inlined
def fetch(zero, table, row):
    """Ask for the memory of a weight row, and of its moments."""
    size = np.uint64(3) * columns(zero)
    for line in range(np.uint64(0), size, np.uint64(LINE // 4)):
        prefetch(table, size * np.uint64(row) + line)
