"""Two threads that own half of the columns of all weights each, and take the steps of a training together.

They exchange nothing but their parts of the scores, once a step. Halves are added in a fixed order, whoever has them:
the number of threads does not show in the result.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from recbole_unlearn.influence.vectors import FLAGS, aligned, observe, pass_on, publish, threads

SPLIT = 32  # columns from which on it pays to split them
SPINS = 4000  # looks at the other thread's progress before the core is offered to others


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


def threads_for(most: int | None) -> int:
    """One or two: at most so many, by default as many as numba has."""
    return max(1, min(2, threads() if most is None else most))


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


def in_step(run: Callable[[int, int, np.ndarray], Any], halves: int, threads: int, steps: int) -> list[Any]:
    """Have threads take the same steps, each of its halves.

    Args:
        run: called with the halves ``begin`` to ``end`` that are a thread's, and what `meet` takes.

    Returns:
        What each call returned.
    """
    progress = aligned((16,), np.int64)
    threads = min(threads, halves)

    def stop():
        progress[:] = steps + 1

    def each(begin, end):
        try:
            return run(begin, end, progress)
        finally:
            stop()  # whatever happened, the other one need not wait

    cuts = np.linspace(0, halves, threads + 1).astype(int)
    return together(each, [(int(cuts[t]), int(cuts[t + 1])) for t in range(threads)], threads, stop)


@numba.njit(**FLAGS, inline="always")
def meet(progress, own, s):
    """Wait until the other of two threads has come to step ``s``; it may need this core."""
    publish(progress, 8 * own, s + 1)
    spins = 0
    while observe(progress, 8 * (1 - own)) <= s:
        spins += 1
        if spins > SPINS:
            pass_on()
