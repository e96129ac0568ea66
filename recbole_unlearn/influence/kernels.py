"""Compiled loops over triples of a dot-product model, grouped by user.

For user u, x_t = p_u . (q_i - q_j). Along a direction (v^P, v^Q), dx_t = e_i - e_j with the scalar
e_k = v_u . q_k + p_u . v_k a (user, item), so each distinct item of a user is gathered once, the triples of the
user only touch scalars, and one last pass over the distinct items scatters the result. Loops are parallel over
a fixed number of user chunks, each with its own accumulator, so results do not depend on the number of threads.

Kernels are specialised on K (a compile-time constant) and cached on disk by numba. Scores and scalars have the type of
the embeddings (float32 or float64); sums are float64.
"""

from functools import cache

import numba
import numpy as np

FLAGS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}}


@numba.njit(**{**FLAGS, "parallel": True})
def distinct_items(row_ptr, pos, neg, chunk_ptr, n_items, ptr, out):
    """Distinct items of each user's triples; fills ``out`` by ``ptr``, or only the counts ``ptr[1:]`` if it is empty."""
    fill = len(out) > 0
    for c in numba.prange(len(chunk_ptr) - 1):
        mark = np.full(n_items, -1, np.int32)
        for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
            n = 0
            start = ptr[u]
            for r in range(row_ptr[u], row_ptr[u + 1]):
                k = pos[r]
                if mark[k] != u:
                    mark[k] = u
                    if fill:
                        out[start + n] = k
                    n += 1
                for t in range(neg.shape[1]):
                    k = neg[r, t]
                    if mark[k] != u:
                        mark[k] = u
                        if fill:
                            out[start + n] = k
                        n += 1
            if not fill:
                ptr[u + 1] = n


@cache
def linearise(K):
    """Kernel ``(P, Q, row_ptr, pos, neg, weight, dist_ptr, dist, chunk_ptr, n_items, h, a, b) -> loss``.

    At the scores x of the current weights it fills, with s = sigmoid(-x):
    ``h[r, t] = w s (1 - s)``, and for each distinct (user, item) ``a = sum h`` over the triples that hold the item
    and ``b = sum +-w s`` (plus where it is the positive). Returns the weighted loss ``sum -w log sigmoid(x)``.
    """

    @numba.njit(**{**FLAGS, "parallel": True})
    def kernel(P, Q, row_ptr, pos, neg, weight, dist_ptr, dist, chunk_ptr, n_items, h, a, b):
        n_chunks = len(chunk_ptr) - 1
        loss = np.zeros(n_chunks)
        for c in numba.prange(n_chunks):
            e = np.empty(n_items, P.dtype)
            sum_h = np.zeros(n_items, np.float64)
            sum_s = np.zeros(n_items, np.float64)
            total = 0.0
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                for d in range(dist_ptr[u], dist_ptr[u + 1]):
                    k = dist[d]
                    x = np.float32(0)
                    for f in range(K):
                        x += P[u, f] * Q[k, f]
                    e[k] = x
                    sum_h[k] = 0.0
                    sum_s[k] = 0.0
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    i = pos[r]
                    w = weight[r]
                    for t in range(neg.shape[1]):
                        j = neg[r, t]
                        x = e[i] - e[j]
                        q = np.exp(-abs(x))
                        s = (q if x > 0 else np.float32(1)) / (1 + q)
                        total += w * (np.log1p(q) + max(-x, np.float32(0)))
                        curve = w * s * (1 - s)
                        h[r, t] = curve
                        sum_h[i] += curve
                        sum_h[j] += curve
                        sum_s[i] += w * s
                        sum_s[j] -= w * s
                for d in range(dist_ptr[u], dist_ptr[u + 1]):
                    a[d] = sum_h[dist[d]]
                    b[d] = sum_s[dist[d]]
            loss[c] = total
        return loss.sum()

    return kernel


@cache
def curvature_product(K, exact):
    """Kernel ``(P, VP, QV, row_ptr, pos, neg, h, dist_ptr, dist, b, chunk_ptr, n_items, out_P, out_Q)``.

    ``QV`` is ``[n_items, 2K]``: q_k and v_k side by side. ``out_Q`` is ``[chunks, n_items, K]``, to be summed over
    chunks. With ``exact`` the coupling s I of p_u with q_i and q_j is included, else the product is Gauss-Newton.
    """

    @numba.njit(**{**FLAGS, "parallel": True})
    def kernel(P, VP, QV, row_ptr, pos, neg, h, dist_ptr, dist, b, chunk_ptr, n_items, out_P, out_Q):
        for c in numba.prange(len(chunk_ptr) - 1):
            e = np.empty(n_items, P.dtype)
            acc = np.zeros(n_items, np.float64)
            out = out_Q[c]
            out[:] = 0
            p = np.empty(K, P.dtype)
            v = np.empty(K, P.dtype)
            sum_u = np.empty(K, np.float64)
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                for f in range(K):
                    p[f] = P[u, f]
                    v[f] = VP[u, f]
                    sum_u[f] = 0.0
                for d in range(dist_ptr[u], dist_ptr[u + 1]):
                    k = dist[d]
                    x = np.float32(0)
                    for f in range(K):
                        x += v[f] * QV[k, f] + p[f] * QV[k, K + f]
                    e[k] = x
                    acc[k] = 0.0
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    ei = e[pos[r]]
                    total = 0.0
                    for t in range(neg.shape[1]):
                        j = neg[r, t]
                        w = h[r, t] * (ei - e[j])
                        acc[j] -= w
                        total += w
                    acc[pos[r]] += total
                for d in range(dist_ptr[u], dist_ptr[u + 1]):
                    k = dist[d]
                    g = acc[k]
                    if exact:
                        s = b[d]
                        for f in range(K):
                            sum_u[f] += g * QV[k, f] - s * QV[k, K + f]
                            out[k, f] += g * p[f] - s * v[f]
                    else:
                        for f in range(K):
                            sum_u[f] += g * QV[k, f]
                            out[k, f] += g * p[f]
                for f in range(K):
                    out_P[u, f] = sum_u[f]

    return kernel


@cache
def gradient(K):
    """Kernel ``(P, Q, dist_ptr, dist, b, chunk_ptr, out_P, out_Q)``: gradient of the loss that `linearise` returns.

    ``out_P`` is ``[n_users, K]``; ``out_Q`` is ``[chunks, n_items, K]``, to be summed over chunks.
    """

    @numba.njit(**{**FLAGS, "parallel": True})
    def kernel(P, Q, dist_ptr, dist, b, chunk_ptr, out_P, out_Q):
        for c in numba.prange(len(chunk_ptr) - 1):
            out = out_Q[c]
            out[:] = 0
            sum_u = np.empty(K, np.float64)
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                sum_u[:] = 0
                for d in range(dist_ptr[u], dist_ptr[u + 1]):
                    k = dist[d]
                    for f in range(K):
                        sum_u[f] -= b[d] * Q[k, f]
                        out[k, f] -= b[d] * P[u, f]
                for f in range(K):
                    out_P[u, f] = sum_u[f]

    return kernel


@cache
def gauss_newton_blocks(K):
    """Kernel that fills the K x K diagonal blocks of the Gauss-Newton matrix.

    ``(P, Q, row_ptr, pos, neg, h, dist_ptr, dist, a, chunk_ptr, n_items, block_P, block_Q)``;
    ``block_Q`` is ``[chunks, n_items, K, K]``. Only the lower triangles are filled. A negative must not be the
    positive of its row.
    """

    @numba.njit(**{**FLAGS, "parallel": True})
    def kernel(P, Q, row_ptr, pos, neg, h, dist_ptr, dist, a, chunk_ptr, n_items, block_P, block_Q):
        for c in numba.prange(len(chunk_ptr) - 1):
            out = block_Q[c]
            out[:] = 0
            mean = np.empty(K, np.float64)
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                own = block_P[u]
                own[:] = 0
                for d in range(dist_ptr[u], dist_ptr[u + 1]):
                    k = dist[d]
                    for f in range(K):
                        qa, pa = a[d] * Q[k, f], a[d] * P[u, f]
                        for g in range(f + 1):
                            own[f, g] += qa * Q[k, g]
                            out[k, f, g] += pa * P[u, g]
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    for f in range(K):
                        mean[f] = 0.0
                    for t in range(neg.shape[1]):
                        for f in range(K):
                            mean[f] += h[r, t] * Q[neg[r, t], f]
                    i = pos[r]
                    for f in range(K):
                        for g in range(f + 1):
                            own[f, g] -= Q[i, f] * mean[g] + mean[f] * Q[i, g]

    return kernel


@cache
def gauss_newton_diagonal(K):
    """Kernel like `gauss_newton_blocks` for the diagonal alone: ``diag_P`` ``[n_users, K]``, ``diag_Q`` ``[chunks, n_items, K]``."""

    @numba.njit(**{**FLAGS, "parallel": True})
    def kernel(P, Q, row_ptr, pos, neg, h, dist_ptr, dist, a, chunk_ptr, n_items, diag_P, diag_Q):
        for c in numba.prange(len(chunk_ptr) - 1):
            out = diag_Q[c]
            out[:] = 0
            mean = np.empty(K, np.float64)
            for u in range(chunk_ptr[c], chunk_ptr[c + 1]):
                own = diag_P[u]
                own[:] = 0
                for d in range(dist_ptr[u], dist_ptr[u + 1]):
                    k = dist[d]
                    for f in range(K):
                        own[f] += a[d] * Q[k, f] * Q[k, f]
                        out[k, f] += a[d] * P[u, f] * P[u, f]
                for r in range(row_ptr[u], row_ptr[u + 1]):
                    for f in range(K):
                        mean[f] = 0.0
                    for t in range(neg.shape[1]):
                        for f in range(K):
                            mean[f] += h[r, t] * Q[neg[r, t], f]
                    for f in range(K):
                        own[f] -= 2 * Q[pos[r], f] * mean[f]

    return kernel


@numba.njit(**FLAGS)
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
