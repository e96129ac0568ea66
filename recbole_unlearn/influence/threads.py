"""Threads among which the work of kernels is shared out; how many there are does not show in any result.

Either as chunks of a loop, which know nothing of each other (`parallel`); or as columns of all weights, whose owners
take the steps of a training together (`in_step`): they exchange nothing but their parts of the scores, once a step, and
these are added in a fixed order, whoever has them.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, wraps
from itertools import pairwise
from typing import Any

import numba
import numpy as np

from recbole_unlearn.influence.compiling import compiled, inlined
from recbole_unlearn.influence.vectors import aligned, observe, pass_on, publish

SPLIT = 32  # columns from which on it pays to split them
SPINS = 4000  # looks at the others' progress before the core is offered to others

ALL: int = numba.config.NUMBA_NUM_THREADS  # pyright: ignore
_most = ALL


def threads() -> int:
    """How many kernels run on: as many as numba would take (``NUMBA_NUM_THREADS``), or fewer by `limit_threads`."""
    return _most


def limit_threads(most: int) -> None:
    """Have kernels of this process run on so many threads from now on."""
    global _most
    _most = max(1, min(most, ALL))


@contextmanager
def limited_threads(most: int) -> Iterator[None]:
    """The same for a while."""
    before = threads()
    limit_threads(most)
    try:
        yield
    finally:
        limit_threads(before)


def parallel(function: Callable[..., Any]) -> Callable[..., None]:
    """Compile a kernel ``(begin, end, *arguments)``, and have it run ``(n, *arguments)`` from 0 to n on all threads.

    Each has a part of them; none may wait for another. Not by ``numba.prange``, which takes two to four times as long
    to compile.
    """
    kernel = compiled(function)

    @wraps(function)
    def run(n, *arguments):
        parts = max(1, min(threads(), n))
        cuts = [n * part // parts for part in range(parts + 1)]
        others = []
        try:
            for ends in pairwise(cuts[1:]):
                others.append(_pool().submit(kernel, *ends, *arguments))
            kernel(0, cuts[1], *arguments)
        except BaseException:  # no thread to be had, or Ctrl-C
            _pool.cache_clear()  # what waits there for a thread must not run later
            raise
        finally:
            wait(others)  # they write into what the caller has
        for each in others:
            each.result()

    return run


@cache
def _pool():
    """The threads beside the one that asks."""
    return ThreadPoolExecutor(max(ALL - 1, 1))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # which has none of them


def halves_of(columns: int) -> int:
    """Into how many parts so many columns are split: one or two."""
    return 2 if columns >= SPLIT and columns % 2 == 0 else 1


def halved(start: np.ndarray) -> np.ndarray:
    """A table of weights ``[rows, K]`` and of two moments that are zero: float32 ``[halves, rows, 3 * K / halves]``."""
    rows, K = start.shape
    halves = halves_of(K)
    table = aligned((halves, rows, 3 * K // halves), np.float32)
    table[:, :, : K // halves] = start.reshape(rows, halves, -1).transpose(1, 0, 2)
    return table


def joined(table: np.ndarray, which: int) -> np.ndarray:
    """A copy of the weights (0) of such a table, or of its first or second moments: ``[rows, K]``."""
    part = np.split(table, 3, 2)[which]
    return np.array(part.transpose(1, 0, 2)).reshape(part.shape[1], -1)


def threads_for(most: int | None, parts: int = 2) -> int:
    """For so many parts: at most so many threads, by default as many as kernels run on."""
    return max(1, min(parts, threads() if most is None else most))


def together(
    work: Callable[..., Any], parts: Iterable[tuple], threads: int = 2, stop: Callable[[], object] = lambda: None
) -> list[Any]:
    """What ``work`` returns of each part's arguments, all computed at the same time by so many threads.

    ``stop`` is called where not all could be begun: those that were are waited for, and may wait for the others.
    """
    with ThreadPoolExecutor(threads) as pool:
        try:
            results = pool.map(work, *zip(*parts, strict=True))
        except BaseException:  # no thread to be had, or Ctrl-C
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return list(results)


def in_step(run: Callable[[int, int, np.ndarray], Any], parts: int, threads: int, steps: int) -> list[Any]:
    """Have threads take the same steps, each of its parts.

    Args:
        run: called with the parts ``begin`` to ``end`` that are a thread's, and what `meet` takes.

    Returns:
        What each call returned.
    """
    progress = aligned((8 * parts,), np.int64)
    threads = min(threads, parts)

    def stop():
        progress[:] = steps + 1

    def each(begin, end):
        try:
            return run(begin, end, progress)
        finally:
            stop()  # whatever happened, the others need not wait

    cuts = np.linspace(0, parts, threads + 1).astype(int)
    return together(each, [(int(cuts[t]), int(cuts[t + 1])) for t in range(threads)], threads, stop)


@inlined
def meet(progress, begin, end, s):
    """Wait until all parts have come to step ``s``, as ``begin`` to ``end`` have; others may need this core."""
    for part in range(begin, end):
        publish(progress, 8 * part, s + 1)
    spins = 0
    for part in range(len(progress) // 8):
        while observe(progress, 8 * part) <= s:
            spins += 1
            if spins > SPINS:
                pass_on()
