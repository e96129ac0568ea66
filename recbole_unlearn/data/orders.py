"""The order in which training goes through its rows: drawn as torch draws it, noted down, and drawn again."""

import sys
import zlib
from functools import cache

import numba
import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader

from recbole_unlearn.storage.triple_log import MOST_DRAWN, TripleLog

EVERY = torch.iinfo(torch.int64).min  # numbers from here on: all 64 bits
HELD = 1 << 28  # bytes of orders, at most, that are held once they are drawn: 80 epochs of ML-1M


def next_order(n, generator):
    """Rows in the order of an epoch, drawn from a loader's generator as torch's single-process iterator does.

    That is a base seed, the permutation, and one more permutation of which ``RandomSampler`` uses nothing. Without a
    generator, as RecBole leaves its loaders after it has saved them, base seed and the seed of an own generator come
    from the process's stream.
    """
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    order = permutation(n, generator)
    pass_over(n, generator)
    return order


def pass_over(n: int, generator: torch.Generator) -> None:
    """Leave a generator where `permutation` would."""
    _draws(n - 1, generator) if _as_torch(n) else torch.randperm(n, generator=generator)


def permutation(n: int, generator: torch.Generator) -> np.ndarray:
    """``torch.randperm(n, generator=generator)``, int64 ``[n]``, in a third of its time."""
    if not _as_torch(n):
        return torch.randperm(n, generator=generator).numpy()
    return _shuffled(_draws(n - 1, generator)).astype(np.int64)


def _draws(n, generator):
    """The generator's next outputs, uint32 ``[n]``: two at a time, the first of them above."""
    draws = np.empty(n, np.uint32)
    pairs = torch.empty(n // 2, dtype=torch.int64).random_(EVERY, None, generator=generator)
    draws[: n - n % 2] = pairs.numpy().view(np.uint32).reshape(-1, 2)[:, ::-1].ravel()
    if n % 2:  # its lowest bits are all that the last one is asked for
        draws[-1] = int(torch.empty((), dtype=torch.int32).random_(generator=generator))
    return draws


@numba.njit(nogil=True, cache=True)
def _shuffled(draws):
    """Fisher and Yates' shuffle of one number more than there are draws, as in torch: int32."""
    order = np.arange(len(draws) + 1).astype(np.int32)
    for i in range(len(draws)):
        other = i + draws[i] % np.uint32(len(order) - i)
        order[i], order[other] = order[other], order[i]
    return order


def _as_torch(n):
    """Whether this version of torch permutes so many numbers as `permutation` does; it has other ways for very many."""
    return 1 < n < 2**27 and _agrees()


@cache
def _agrees():
    ours, theirs = (torch.Generator() for _ in range(2))
    for n in (3000, 3001) if sys.byteorder == "little" else ():
        ours.manual_seed(n)
        theirs.manual_seed(n)
        if not np.array_equal(_shuffled(_draws(n - 1, ours)), torch.randperm(n, generator=theirs).numpy()):
            return False
    return sys.byteorder == "little" and torch.equal(ours.get_state(), theirs.get_state())


def _own_seed():
    """Seed of the generator that `next_order` will make where there is none; nothing is drawn."""
    state = torch.get_rng_state()
    _, seed = (torch.empty((), dtype=torch.int64).random_() for _ in range(2))
    torch.set_rng_state(state)
    return int(seed)


class OrderNote:
    """Notes down, epoch by epoch, how to draw the order of batches again: entries of `BatchOrder`."""

    def __init__(self) -> None:
        self._generator, self._seed, self._drawn = None, None, 0

    def begin(self, loader: TrainDataLoader) -> list[int] | None:
        """Before an epoch of a loader: what its order will be drawn from."""
        generator = loader.generator
        if not loader.shuffle:
            return []
        if generator is None:
            return [_own_seed()]
        if generator is not self._generator or generator.initial_seed() != self._seed:
            self._generator, self._seed = generator, generator.initial_seed()
            self._drawn = _epochs_drawn(loader.sample_size, generator)
        if self._drawn is None:
            return None
        self._drawn += 1
        return [generator.initial_seed(), self._drawn - 1]

    def undo(self) -> None:
        """After an epoch that drew no order."""
        self._drawn = self._drawn and self._drawn - 1

    @staticmethod
    def end(begun: list[int] | None, steps: np.ndarray) -> list[int] | None:
        """The entry, after the epoch: ``steps`` is the batch of each row, int32 ``[rows]``."""
        return None if begun is None else [*begun, zlib.crc32(steps.data)]


def _epochs_drawn(n, generator):
    """How many epochs' orders have been drawn from a generator since it was seeded; None: none of the first ones."""
    again, state = torch.Generator(), generator.get_state()
    again.manual_seed(generator.initial_seed())
    for drawn in range(MOST_DRAWN):
        if torch.equal(again.get_state(), state):
            return drawn
        next_order(n, again)
    return None


class BatchOrder:
    """The order in which rows were trained on, epoch by epoch: mostly not stored, since it can be drawn again.

    The first ones are held in memory: drawing them is a third of what an epoch of BPR costs the kernels.

    Args:
        log: says of each epoch ``[seed, epochs drawn before with it, checksum of the batches]``, or without the epochs
            where the seed was its own, or without the seed where rows came in order; or stores the batch of each row.
        data_row: row in RecBole's training data of each row, ``[rows]``.
        batch_rows: rows of a batch.
    """

    def __init__(self, log: TripleLog, data_row: np.ndarray, batch_rows: int) -> None:
        self.log, self.data_row, self.batch_rows = log, data_row, batch_rows
        self._row = np.empty_like(data_row)
        self._row[data_row] = np.arange(len(data_row))
        self._generator, self._drawn = None, 0
        self._held: dict[int, np.ndarray] = {}

    def __call__(self, epoch: int) -> np.ndarray | None:
        """Rows in the order of an epoch, int32 ``[rows]``, read-only; None where it cannot be told.

        Where only batches are known, rows are in random order within, the same each time.
        """
        if (order := self._held.get(epoch)) is not None or (order := self._drawn_again(epoch)) is None:
            return order
        order = order.astype(np.int32, copy=False)
        order.flags.writeable = False
        if (len(self._held) + 1) * order.nbytes <= HELD:
            self._held[epoch] = order
        return order

    def _drawn_again(self, epoch):
        if (stored := self.log.steps(epoch)) is not None:
            mixed = np.random.default_rng(epoch).permutation(len(stored))
            return mixed[np.argsort(stored[mixed], kind="stable")]
        if (recorded := self.log.order[epoch]) is None:
            return None
        *drawn_from, checksum = recorded
        order = self._row[self._order(*drawn_from)]
        steps = np.empty(len(order), np.int32)
        steps[order] = np.arange(len(order), dtype=np.int32) // self.batch_rows
        return order if zlib.crc32(steps.data) == checksum else None

    def _order(self, seed=None, drawn=None):
        n = len(self.data_row)
        if seed is None:
            return np.arange(n)
        if drawn is None:  # torch draws no base seed from a generator of the sampler's own
            generator = torch.Generator()
            generator.manual_seed(seed)
            return permutation(n, generator)
        if self._generator is None or self._generator.initial_seed() != seed or drawn < self._drawn:
            self._generator, self._drawn = torch.Generator(), 0
            self._generator.manual_seed(seed)
        while self._drawn <= drawn:
            order = next_order(n, self._generator)
            self._drawn += 1
        return order
