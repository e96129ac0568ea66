"""Compiled loops over triples of a dot-product model, grouped by user.

For user u, x_t = p_u . (q_i - q_j). Along a direction (v^P, v^Q), dx_t = e_i - e_j with the scalar
e_k = v_u . q_k + p_u . v_k a (user, item), so each distinct item of a user is gathered once, the triples of the
user only touch scalars, and one last pass over the distinct items scatters the result. Triples name an item by its
number among the user's distinct items, so that these scalars are few and near. Loops are parallel over a fixed number
of user chunks, each with its own accumulator, so results do not depend on the number of threads.

Kernels are specialised on K (a compile-time constant) and cached on disk by numba. Scores and scalars have the type of
the embeddings (float32 or float64); sums are float64.

A block of users is passed as ``(row_ptr, pos, neg, count, dist, chunk_ptr)``: the rows of user u are
``row_ptr[u] : row_ptr[u + 1]``; ``pos`` ``[rows]`` and ``neg`` ``[rows, m]`` number the user's distinct items, whose
``count[u]`` ids begin at ``dist[(1 + m) row_ptr[u]]``, where no user before can reach; chunk c has the users
``chunk_ptr[c] : chunk_ptr[c + 1]``. Accumulators over items, ``out_Q`` ``[chunks, n_items, K]``, are
added to, and to be summed over chunks.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from recbole_unlearn.influence.compiling import compiled
from recbole_unlearn.influence.threads import parallel
from recbole_unlearn.influence.vectors import (
    add_scaled,
    dot,
    exp,
    load,
    multiply,
    store,
    widen,
    zeros,
)


@parallel
def number_items(begin, end, row_ptr, pos, neg, count, dist, chunk_ptr, n_items):
    """``(chunks, *block, n_items)``: turn item ids in ``pos`` and ``neg`` into numbers among a user's distinct items.

    Fills ``count`` and ``dist``.
    """
    for c in range(begin, end):
        number = np.full(n_items, -1, np.int64)  # counted on over the users of the chunk, so never reset
        before = 0
        for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
            n = 0
            first = (1 + neg.shape[1]) * row_ptr[u]
            for r in range(row_ptr[u], row_ptr[u + 1]):
                for t in range(-1, neg.shape[1]):
                    k = pos[r] if t < 0 else neg[r, t]
                    # without a branch, it would be mispredicted often
                    new = number[k] < before
                    at = n if new else number[k] - before
                    number[k] = before + at
                    dist[first + n] = k
                    n += new
                    if t < 0:
                        pos[r] = at
                    else:
                        neg[r, t] = at
            count[u] = n
            before += n


@cache
def linearise(K: int, single: bool) -> Callable[..., None]:
    """Kernel ``(chunks, P, Q, *block, weight, h, b, loss)``, ``single`` for float32.

    At the scores x of the current weights it fills, with s = sigmoid(-x):
    ``h[r, t] = w s (1 - s)``, and for each distinct (user, item) ``b = sum +-w s`` over the triples that hold the item
    (plus where it is the positive). ``loss`` ``[chunks]`` is the weighted loss ``sum -w log sigmoid(x)`` of each chunk.
    """

    @parallel
    def kernel(begin, end, P, Q, row_ptr, pos, neg, count, dist, chunk_ptr, weight, h, b, loss):
        m = neg.shape[1]
        longest = count.max() if len(count) else 0
        for c in range(begin, end):
            e = np.empty(longest, P.dtype)
            acc = np.empty(longest, np.float64)
            total = 0.0
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                first = (1 + m) * row_ptr[u]
                p = load(K, P, u, 0)
                for d in range(count[u]):
                    e[d] = dot(p, load(K, Q, dist[first + d], 0))
                    acc[d] = 0.0
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    ei = e[pos[r]]
                    w = weight[r]
                    row_s, row_loss, product = 0.0, 0.0, 1.0
                    for t in range(m):
                        j = neg[r, t]
                        x = ei - e[j]
                        # not chosen once outside: a function in the closure would defeat the cache on disk
                        q = exp(-abs(x)) if single else np.exp(-abs(x))
                        inverse = 1 / (1 + q)
                        s = w * (q * inverse if x > 0 else inverse)
                        h[r, t] = w * q * inverse * inverse
                        acc[j] -= s
                        row_s += s
                        # log(1 + q) summed as the log of a product, which stays below 2^513
                        product *= 1.0 + q
                        row_loss += max(-x, 0)
                        if t & 511 == 511:
                            row_loss += np.log(product)
                            product = 1.0
                    acc[pos[r]] += row_s
                    total += w * (row_loss + np.log(product))
                for d in range(count[u]):
                    b[first + d] = acc[d]
            loss[c] = total

    return kernel


@cache
def curvature_product(K: int, exact: bool) -> Callable[..., None]:
    """Kernel ``(chunks, VP, QV, *block, h, b, out_P, out_Q)``.

    ``VP`` is ``[n_users, 2K]``: v_u and p_u side by side, ``QV`` is ``[n_items, 2K]``: q_k and v_k. With ``exact`` the
    coupling s I of p_u with q_i and q_j is included, else the product is Gauss-Newton.
    """
    both = 2 * K

    @parallel
    def kernel(begin, end, VP, QV, row_ptr, pos, neg, count, dist, chunk_ptr, h, b, out_P, out_Q):
        m = neg.shape[1]
        longest = count.max() if len(count) else 0
        for c in range(begin, end):
            e = np.empty(longest, VP.dtype)
            acc = np.empty(longest, np.float64)
            out = out_Q[c]
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                first = (1 + m) * row_ptr[u]
                vp = load(both, VP, u, 0)
                for d in range(count[u]):
                    e[d] = dot(vp, load(both, QV, dist[first + d], 0))
                    acc[d] = 0.0
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    ei = e[pos[r]]
                    total = 0.0
                    for t in range(m):
                        j = neg[r, t]
                        w = h[r, t] * (ei - e[j])
                        acc[j] -= w
                        total += w
                    acc[pos[r]] += total
                p, v = widen(load(K, VP, u, K)), widen(load(K, VP, u, 0))
                sum_u = zeros(K)
                for d in range(count[u]):
                    k = dist[first + d]
                    sum_k = add_scaled(load(K, out, k, 0), acc[d], p)
                    sum_u = add_scaled(sum_u, acc[d], load(K, QV, k, 0))
                    if exact:
                        sum_k = add_scaled(sum_k, -b[first + d], v)
                        sum_u = add_scaled(sum_u, -b[first + d], load(K, QV, k, K))
                    store(out, k, 0, sum_k)
                store(out_P, u, 0, sum_u)

    return kernel


@cache
def gradient(K: int) -> Callable[..., None]:
    """Kernel ``(chunks, P, Q, *block, b, out_P, out_Q)``: gradient of the loss that `linearise` returns."""

    @parallel
    def kernel(begin, end, P, Q, row_ptr, pos, neg, count, dist, chunk_ptr, b, out_P, out_Q):
        for c in range(begin, end):
            out = out_Q[c]
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                first = (1 + neg.shape[1]) * row_ptr[u]
                p = widen(load(K, P, u, 0))
                sum_u = zeros(K)
                for d in range(count[u]):
                    k = dist[first + d]
                    sum_u = add_scaled(sum_u, -b[first + d], load(K, Q, k, 0))
                    store(out, k, 0, add_scaled(load(K, out, k, 0), -b[first + d], p))
                store(out_P, u, 0, sum_u)

    return kernel


@cache
def gauss_newton_blocks(K: int) -> Callable[..., None]:
    """Kernel ``(chunks, P, Q, *block, h, out_P, out_Q)``: the K x K diagonal blocks of the Gauss-Newton matrix.

    ``out_P`` is ``[n_users, K, K]`` and ``out_Q`` ``[chunks, n_items, K, K]``. A negative must not be the positive of
    its row.
    """

    @parallel
    def kernel(begin, end, P, Q, row_ptr, pos, neg, count, dist, chunk_ptr, h, out_P, out_Q):
        m = neg.shape[1]
        longest = count.max() if len(count) else 0
        for c in range(begin, end):
            own = out_P.reshape(-1, K)
            out = out_Q[c].reshape(-1, K)
            a = np.empty(longest, np.float64)
            outer = np.empty((K, K), np.float64)
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                first = (1 + m) * row_ptr[u]
                for f in range(K):
                    store(outer, f, 0, add_scaled(zeros(K), P[u, f], load(K, P, u, 0)))
                    store(own, K * u + f, 0, zeros(K))
                a[: count[u]] = 0.0
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    total = 0.0
                    q = load(K, Q, dist[first + pos[r]], 0)
                    for t in range(m):
                        w = h[r, t]
                        k = dist[first + neg[r, t]]
                        difference = add_scaled(q, -1, load(K, Q, k, 0))
                        for f in range(K):
                            scale = w * (Q[dist[first + pos[r]], f] - Q[k, f])
                            store(own, K * u + f, 0, add_scaled(load(K, own, K * u + f, 0), scale, difference))
                        a[neg[r, t]] += w
                        total += w
                    a[pos[r]] += total
                for d in range(count[u]):
                    k = dist[first + d]
                    for f in range(K):
                        changed = add_scaled(load(K, out, K * k + f, 0), a[d], load(K, outer, f, 0))
                        store(out, K * k + f, 0, changed)

    return kernel


@cache
def gauss_newton_diagonal(K: int) -> Callable[..., None]:
    """Kernel like `gauss_newton_blocks` for the diagonal alone: one dimension K less."""

    @parallel
    def kernel(begin, end, P, Q, row_ptr, pos, neg, count, dist, chunk_ptr, h, out_P, out_Q):
        m = neg.shape[1]
        longest = count.max() if len(count) else 0
        for c in range(begin, end):
            out = out_Q[c]
            a = np.empty(longest, np.float64)
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                first = (1 + m) * row_ptr[u]
                a[: count[u]] = 0.0
                sum_u = zeros(K)
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    total = 0.0
                    q = load(K, Q, dist[first + pos[r]], 0)
                    for t in range(m):
                        difference = add_scaled(q, -1, load(K, Q, dist[first + neg[r, t]], 0))
                        sum_u = add_scaled(sum_u, h[r, t], multiply(difference, difference))
                        a[neg[r, t]] += h[r, t]
                        total += h[r, t]
                    a[pos[r]] += total
                p = widen(load(K, P, u, 0))
                square = multiply(p, p)
                for d in range(count[u]):
                    k = dist[first + d]
                    store(out, k, 0, add_scaled(load(K, out, k, 0), a[d], square))
                store(out_P, u, 0, sum_u)

    return kernel


@compiled
def triple_gradient(P, Q, users, pos, neg, weight, grad_P, grad_Q):
    """Adds the gradient of ``sum w -log sigmoid(x)`` over a plain list of triples; returns the loss."""
    loss = 0.0
    for t in range(len(users)):
        u, i, j = users[t], pos[t], neg[t]
        x = 0.0
        for f in range(P.shape[1]):
            x += P[u, f] * (Q[i, f] - Q[j, f])
        q = np.exp(-abs(x))
        s = weight[t] * (q if x > 0 else 1.0) / (1 + q)
        loss += weight[t] * (np.log1p(q) + max(-x, 0.0))
        for f in range(P.shape[1]):
            grad_P[u, f] -= s * (Q[i, f] - Q[j, f])
            grad_Q[i, f] -= s * P[u, f]
            grad_Q[j, f] += s * P[u, f]
    return loss
