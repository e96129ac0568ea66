"""The triple log: every negative that training sampled, beside the interaction that anchors it.

A log is a folder: ``metadata.json``, the anchors ``users.npy`` and ``items.npy`` (shape ``[rows]``, grouped by user),
and one ``epoch-NNNNN.npy`` an epoch (shape ``[rows, negatives]``; only one if the negatives are static). All
columns use the smallest unsigned integer type that holds the ids, so 2 bytes a triple below 65,536 items.
Of an epoch that is drawn again when it is read there is ``stream-NNNNN.npy`` instead, where numpy's stream stood, and
in the metadata the checksum of its negatives.
``weights-NNNNN.npy`` are snapshots of the weights after NNNNN epochs (flat; float16, but float32 of the start), ever
rarer with time, and ``torch-NNNNN.npy`` (uint8) is where torch's random streams stood then. ``rates-NNNNN.npy`` are the
learning rates of an epoch's steps (float64), where they are not one, and ``steps-NNNNN.npy`` the batch of each row
(unsigned), where its order cannot be drawn again. The metadata is replaced last and atomically: a killed run leaves the
last complete epoch. A log from which rows were forgotten has a ``salt``, which keys all checksums, so that the metadata
alone do not tell who has the old data which rows are missing; all of its negatives are stored.
"""

import hashlib
import hmac
import json
import math
import os
import secrets
import shutil
import tokenize
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Epoch, Fresh
from recbole_unlearn.influence.recorded import marked
from recbole_unlearn.storage.files import read_whole, remove, replacing, sync_folder, temporary_path, write_atomically

FORMAT = "recbole_unlearn triple log"
VERSION = 1
MAX_METADATA_BYTES = 16 << 20
MARKS = "marks.npy"
SALT, SALT_BYTES = "salt", 32
MAX_EPOCHS = 1_000_000
DAMAGED = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)  # what np.load raises on bad files
MOST_DRAWN = 100  # epochs that another training may have drawn from a loader before, see `orders.OrderNote`
ROUNDED = 1e-5  # of a norm, by which sums and norms of the same weights may differ
STREAM = 625  # numbers that numpy's stream consists of: 624, and the place in them
KEPT = 2**28  # bytes of negatives, drawn again, that are kept for the next time
SNAPSHOT_SPACING = 1.5  # each snapshot at least this much later than the one before; 1.2 is no better (measured)


def log_path(checkpoint: Path | str) -> Path:
    """Folder of the triple log that belongs to a checkpoint file."""
    return Path(checkpoint).with_suffix(".triples")


def smallest_uint(largest: int) -> np.dtype:
    """Smallest unsigned numpy dtype that holds ``largest``."""
    return np.dtype(np.min_scalar_type(int(largest)))


def snapshot_due(n_epochs: int) -> bool:
    """Whether the weights are kept after this many epochs: 0, 1, 2, 3, 5, 8, 12, ..., 1.5 times later each."""
    due = 0
    while due < n_epochs:
        due = max(due + 1, math.ceil(due * SNAPSHOT_SPACING))
    return due == n_epochs


def start_of(parameters: Mapping[str, ArrayLike]) -> list[list[Any]]:
    """What tells weights, by name, from others, whatever rounded their last bits: sum and norm of each."""
    arrays = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    return [[name, float(value.sum()), float(np.linalg.norm(value))] for name, value in arrays.items()]


def same_start(first: list[list[Any]], second: list[list[Any]]) -> bool:
    """Whether two results of `start_of` are of the same weights."""
    if [name for name, _, _ in first] != [name for name, _, _ in second]:
        return False
    pairs = [(a, b, max(norm, other)) for (_, a, norm), (_, b, other) in zip(first, second, strict=True)]
    norms = [(norm, other) for (_, _, norm), (_, _, other) in zip(first, second, strict=True)]
    return all(abs(a - b) <= ROUNDED * size for a, b, size in pairs) and all(
        abs(norm - other) <= ROUNDED * max(norm, other) for norm, other in norms
    )


def crc32(array: np.ndarray) -> int:
    """CRC-32 of an array's numbers."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _save(path, array):
    with replacing(path) as f:
        # to a real file numpy writes through C's buffer, and does not notice when the disk is full
        np.save(SimpleNamespace(write=f.write), array, allow_pickle=False)  # pyright: ignore[reportArgumentType]
    return crc32(array)


def salt_of(path: Path | str) -> bytes:
    """What keys the checksums of a log's folder; empty where they are plain."""
    try:
        return read_whole(Path(path) / SALT, SALT_BYTES)
    except OSError:
        return b""


def salted(salt: bytes, checksum: str) -> str:
    """A checksum as a log with this salt has it."""
    return hmac.digest(salt, checksum.encode(), hashlib.sha256).hex() if salt else checksum


def _mask(salt, name):
    """What a salt turns a file's CRC-32 into, by exclusive or."""
    return int.from_bytes(hmac.digest(salt, name.encode(), hashlib.sha256)[:4], "big") if salt else 0


def _column(path):
    """An array file, memory-mapped."""
    if path.is_symlink():
        raise InputError(f"triple log: {path} is a link out of the log; put the file itself there")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("an archive of arrays")
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise InputError(f"triple log: {path} is missing or damaged ({reason}); train again to get a new log") from None
    return array


def _load(path, shape, dtype):
    array = _column(path)
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise InputError(
            f"triple log: {path} holds {array.dtype} {array.shape}, metadata.json says {dtype} {tuple(shape)}; "
            "the log is damaged or mixed from two runs: train again"
        )
    return array


def _check_metadata(metadata):
    """Raises KeyError or ValueError where a key is missing or holds what no log of ours would."""
    for key in ("rows", "n_users", "n_items", "negatives", "n_epochs"):
        if type(metadata[key]) is not int or metadata[key] < 0:
            raise ValueError(f"{key} is {metadata[key]!r}")
    for key, kind in (("run_id", str), ("fingerprint", dict), ("crc32", dict), ("snapshots", list), ("static", bool)):
        if not isinstance(metadata[key], kind):
            raise ValueError(f"{key} is {metadata[key]!r}")
    metadata["parameters"]
    if not isinstance(metadata.get("salted", False), bool):
        raise ValueError(f"salted is {metadata['salted']!r}")
    if metadata["n_epochs"] > MAX_EPOCHS:
        raise ValueError(f"n_epochs is {metadata['n_epochs']}")
    n_epochs = metadata["n_epochs"]
    known = [None] * n_epochs if metadata.get("order") is None else metadata["order"]
    if len(known) != n_epochs or not all(each is None or _is_order(each, n_epochs) for each in known):
        raise ValueError("order does not tell the epochs' orders of batches")
    drawn = metadata.get("drawn") or [None] * n_epochs
    if len(drawn) != n_epochs or not all(each is None or type(each) is int for each in drawn):
        raise ValueError("drawn does not tell the checksums of the epochs' negatives")
    rates = [None] * n_epochs if metadata.get("rates") is None else metadata["rates"]
    if len(rates) != n_epochs or not all(each is None or _is_rate(each) for each in rates):
        raise ValueError("rates does not tell the epochs' learning rates")
    for name, *numbers in metadata.get("start") or ():
        if not (isinstance(name, str) and len(numbers) == 2 and all(type(number) is float for number in numbers)):
            raise ValueError("start does not tell the first weights")
    for key in ("optimizer", "own_draws"):
        if not isinstance(metadata.get(key), (str, type(None))):
            raise ValueError(f"{key} is {metadata[key]!r}")


def _is_order(entry, n_epochs):
    """Whether this is an entry of `orders.BatchOrder`: one to three whole numbers, the second of three an epoch's."""
    fits = 1 <= len(entry) <= 3 and all(type(number) is int and number >= 0 for number in entry)
    return fits and (len(entry) < 3 or entry[1] < n_epochs + MOST_DRAWN)


def _is_rate(entry):
    """Whether this is a learning rate, None for those in a file, and a number of steps."""
    rate, steps = entry
    return type(steps) is int and steps >= 0 and (rate is None or type(rate) is float and 0 <= rate < math.inf)


@dataclass(frozen=True)
class Training:
    """What a log says of the training that it is of, besides its interactions.

    Attributes:
        run_id: its name, which is part of paths.
        fingerprint: of its data, see `data.fingerprint`.
        n_users, n_items: sizes of the id spaces, padding id 0 included.
        negatives: of a row and epoch; 0: its loss has none.
        static: whether every epoch has the same ones.
        optimizer: its class's name, such as Adam; None: not known.
        start: what `start_of` says of the first weights; None: not known.
        salt: of the checksums; empty: they are plain.
    """

    run_id: str
    fingerprint: dict[str, Any]
    n_users: int
    n_items: int
    negatives: int
    static: bool = False
    seed: int | None = None
    optimizer: str | None = None
    start: list[list[Any]] | None = None
    salt: bytes = b""


class TripleLog:
    """A triple log on disk.

    Attributes:
        users, items: anchors, memory-mapped, shape ``[rows]``; ``users`` is non-decreasing.
        marks: what tells repeated anchors apart (`data.fingerprint.marks`), uint64 ``[rows]``; None: nothing does.
        n_epochs (int): complete epochs.
        negatives (int): negatives per row and epoch; 0 where the loss has none, but a softmax over all items.
        again: draws the negatives of an epoch, ``[rows, negatives]``, from where numpy's stream stood before it
            (`sampling.DrawnAgain`); None where it cannot be. Who has the log's data sets it.
    """

    again: Callable[[int, np.ndarray], np.ndarray | None] | None = None

    def __init__(self, path: Path | str, metadata: dict[str, Any]) -> None:
        self.path = Path(path).absolute()  # columns are read when they are wanted, whatever the working folder is then
        self.metadata = metadata
        self.salt = salt_of(self.path) if metadata.get("salted") else b""
        self.n_rows = metadata["rows"]
        self.negatives = metadata["negatives"]
        self.static = metadata["static"]
        self.dtype = np.dtype(metadata["negative_dtype"])
        # read at once: a purge may take the files from who still reads
        self._streams: dict[int, np.ndarray] = {}
        self._torch_streams: dict[int, np.ndarray] = {}
        self._kept: dict[int, np.ndarray] = {}
        self.users = _load(self.path / "users.npy", [self.n_rows], np.dtype(metadata["user_dtype"]))
        self.items = _load(self.path / "items.npy", [self.n_rows], np.dtype(metadata["item_dtype"]))
        self.marks = _load(self.path / MARKS, [self.n_rows], np.dtype("<u8")) if MARKS in metadata["crc32"] else None

    @classmethod
    def create(
        cls, path: Path | str, users: ArrayLike, items: ArrayLike, training: Training, marks: ArrayLike | None = None
    ) -> "TripleLog":
        """Start an empty log. ``users`` and ``items`` (ids, ``[rows]``) must be grouped by user, ascending."""
        path, users, items = Path(path), np.asarray(users), np.asarray(items)
        if (np.diff(users.astype(np.int64)) < 0).any():
            raise ValueError("anchors must be sorted by user")
        path.mkdir(parents=True, exist_ok=True)
        for kind in ("epoch", "stream", "weights", "torch", "rates", "steps"):
            for old in path.glob(f"{kind}-*.npy"):
                old.unlink()
        (path / MARKS).unlink(missing_ok=True)
        if training.salt:
            write_atomically(path / SALT, training.salt)
        user_dtype, item_dtype = smallest_uint(training.n_users - 1), smallest_uint(training.n_items - 1)
        columns = {"users.npy": users.astype(user_dtype), "items.npy": items.astype(item_dtype)}
        columns |= {} if marks is None else {MARKS: np.asarray(marks, "<u8")}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "run_id": training.run_id,
            "rows": len(users),
            "n_users": int(training.n_users),
            "n_items": int(training.n_items),
            "negatives": int(training.negatives),
            "static": bool(training.static),
            "seed": None if training.seed is None else int(training.seed),
            "fingerprint": {
                key: salted(training.salt, value) if isinstance(value, str) else value
                for key, value in training.fingerprint.items()
            },
            **({"salted": True} if training.salt else {}),
            "user_dtype": user_dtype.str,
            "item_dtype": item_dtype.str,
            "negative_dtype": item_dtype.str,
            "n_epochs": 0,
            "order": [],
            "optimizer": training.optimizer,
            "start": training.start,
            "rates": [],
            "snapshots": [],
            "parameters": None,
            "crc32": {name: _save(path / name, each) ^ _mask(training.salt, name) for name, each in columns.items()},
        }
        log = cls(path, metadata)
        log._write_metadata()
        return log

    @classmethod
    def open(cls, path: Path | str) -> "TripleLog":
        """Open a log and check that it is whole (sizes, types, epoch files; not yet the checksums, see `verify`).

        Raises:
            InputError: no log there, or metadata or a column that is damaged.
        """
        path = Path(path)
        file = path / "metadata.json"
        try:
            if file.stat().st_size > MAX_METADATA_BYTES:
                raise InputError(f"triple log: {file} is far too large to be ours; train again to get a new log")
            metadata = json.loads(file.read_text("utf-8"))
        except OSError:
            raise InputError(
                f"triple log: none at {path}; train with recbole_unlearn so that negatives are logged"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"triple log: {file} is damaged ({error}); train again to get a new log") from None
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise InputError(
                f"triple log: {file} is not a triple log's metadata; point to the folder that training wrote"
            )
        if metadata.get("version") != VERSION:
            raise InputError(
                f"triple log: {path} has version {metadata.get('version')}, this program reads {VERSION}; train again"
            )
        try:
            _check_metadata(metadata)
            log = cls(path, metadata)
            if metadata.get("salted") and len(log.salt) != SALT_BYTES:
                raise InputError(f"triple log: {path / SALT} is missing or damaged; train again to get a new log")
            for epoch, drawn in enumerate(log.drawn):
                log._stored(epoch) if drawn is None else log._stream(epoch)
                log.rates(epoch)
            for epoch in metadata["snapshots"]:
                log.snapshot(epoch)
                log.torch_stream(epoch)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"triple log: {file} is damaged ({error!r}); train again to get a new log") from None
        return log

    @property
    def n_epochs(self) -> int:
        return self.metadata["n_epochs"]

    @property
    def run_id(self) -> str:
        return self.metadata["run_id"]

    @property
    def missing(self) -> int:
        """How many rows of the training that the log began with were forgotten from it."""
        return self.metadata["fingerprint"].get("of", self.n_rows) - self.n_rows

    @property
    def own_draws(self) -> str | None:
        """Whose code made the training's batches where it was not RecBole's alone (`sampling.own_draws`), in words.

        None: RecBole's. What is set is written with the next epoch.
        """
        return self.metadata.get("own_draws")

    @own_draws.setter
    def own_draws(self, own: str | None) -> None:
        self.metadata["own_draws"] = own

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def _file(self, epoch):
        return self._numbered("epoch", 0 if self.static else epoch)

    def _numbered(self, kind, n):
        return self.path / f"{kind}-{n:05d}.npy"

    def _held(self, epoch):
        """The file that holds an epoch."""
        return self._file(epoch) if self.drawn[epoch] is None else self._numbered("stream", epoch)

    def _save(self, file, array):
        self.metadata["crc32"][file.name] = _save(file, array) ^ _mask(self.salt, file.name)

    def _metadata_crc(self):
        """Checksum of the metadata, itself left out."""
        sums = {name: crc for name, crc in self.metadata["crc32"].items() if name != "metadata.json"}
        return zlib.crc32(json.dumps(self.metadata | {"crc32": sums}, sort_keys=True).encode())

    def _write_metadata(self):
        self.metadata["crc32"]["metadata.json"] = self._metadata_crc()
        # not indented, which json does in Python: at each of many epochs, of all before
        write_atomically(self.path / "metadata.json", json.dumps(self.metadata).encode())

    def append(
        self,
        negatives: ArrayLike,
        order: list[int] | None = None,
        rates: Sequence[float] | np.ndarray | None = None,
        steps: np.ndarray | None = None,
        stream: np.ndarray | None = None,
    ) -> None:
        """Add a complete epoch.

        Args:
            negatives: item ids ``[rows, negatives]``, none of them 0.
            order: how to recompute the order of batches, see `orders.BatchOrder`.
            rates: learning rate of each step of the optimiser, ``[steps]``.
            steps: batch of each row, ``[rows]``, where nothing tells the order.
            stream: where numpy's stream stood before, uint32 ``[625]``: kept instead of the negatives if it gives them.
        """
        self._append(negatives, order, rates, steps, stream)
        self._write_metadata()

    def _append(self, negatives, order=None, rates=None, steps=None, stream=None):
        """`append`, but for the metadata's file."""
        negatives = np.ascontiguousarray(negatives, dtype=self.dtype)
        if negatives.shape != (self.n_rows, self.negatives) or (negatives.size and negatives.min() == 0):
            raise ValueError(f"an epoch must hold {self.n_rows} x {self.negatives} negatives, all of them drawn")
        self.metadata["order"] = [*self.order, order]
        found = None if stream is None or self.again is None else self.again(self.n_epochs, stream)
        if stream is not None and found is not None and np.array_equal(found, negatives):
            self._save(self._numbered("stream", self.n_epochs), stream)
            self._streams[self.n_epochs] = stream
            self.metadata["drawn"] = [*self.drawn, crc32(negatives)]
        else:
            if not (self.static and self.n_epochs):
                self._save(self._file(self.n_epochs), negatives)
            if "drawn" in self.metadata:
                self.metadata["drawn"] = [*self.drawn, None]
        self.metadata["rates"] = [*self._rates, self._keep_rates(rates)]
        if steps is not None:
            file, kind = self._numbered("steps", self.n_epochs), smallest_uint(max(steps.max(initial=0), 0))
            self._save(file, steps.astype(kind))
        self.metadata["n_epochs"] += 1

    def _keep_rates(self, rates):
        """Entry of the metadata for an epoch's learning rates; several go to a file of their own."""
        if rates is None or not len(rates):
            return None
        rates = np.asarray(rates, np.float64)
        if (rates == rates[0]).all():
            return [float(rates[0]), len(rates)]
        file = self._numbered("rates", self.n_epochs)
        self._save(file, rates)
        return [None, len(rates)]

    def rates(self, epoch: int) -> np.ndarray | None:
        """Learning rate of each of an epoch's steps, float64 ``[steps]``; None: not known."""
        entry = self._rates[epoch]
        if entry is None:
            return None
        rate, steps = entry
        if rate is not None:
            return np.full(steps, rate)
        return _load(self._numbered("rates", epoch), [steps], np.dtype(np.float64))

    @property
    def _rates(self):
        return self.metadata.get("rates") or [None] * self.n_epochs

    def steps(self, epoch: int) -> np.ndarray | None:
        """Batch of each row in an epoch, unsigned ``[rows]``; None where `order` tells it, or nothing does."""
        file = self._numbered("steps", epoch)
        if file.name not in self.metadata["crc32"]:
            return None
        column = _column(file)
        if column.shape != (self.n_rows,) or column.dtype.kind != "u":
            raise InputError(f"triple log: {file} is not a batch of each row; train again")
        return column

    @property
    def optimizer(self) -> str | None:
        """Name of the class of the optimiser that trained; None: not known."""
        return self.metadata.get("optimizer")

    def add_snapshot(
        self, n_epochs: int, parameters: Mapping[str, np.ndarray], stream: np.ndarray | None = None
    ) -> None:
        """Keep the weights after ``n_epochs`` epochs (0: the initialisation).

        Args:
            parameters: by name, in the order of the flat vector.
            stream: where torch's random streams stand, see `devices.torch_stream`.
        """
        self._add_snapshot(n_epochs, parameters, stream)
        self._write_metadata()

    def _add_snapshot(self, n_epochs, parameters, stream=None):
        """`add_snapshot`, but for the metadata's file."""
        shapes = [[name, list(value.shape)] for name, value in parameters.items()]
        if self.metadata["parameters"] not in (None, shapes):
            raise ValueError("a snapshot must hold the same parameters as the ones before")
        self.metadata["parameters"] = shapes
        flat = np.concatenate([np.asarray(value).ravel() for value in parameters.values()])
        flat = flat.astype(np.float16 if n_epochs else np.float32)  # all of training follows from the start
        self._save(self._numbered("weights", n_epochs), flat)
        if stream is not None:
            self._save(self._numbered("torch", n_epochs), stream)
            self._torch_streams[n_epochs] = stream
        self.metadata["snapshots"] = sorted({*self.metadata["snapshots"], n_epochs})

    def snapshot(self, n_epochs: int) -> np.ndarray:
        """Weights after ``n_epochs`` epochs, memory-mapped, ``[size]``: float16, float32 of the start (from 1.1 on)."""
        size = sum(math.prod(shape) for _, shape in self.metadata["parameters"])
        file = self._numbered("weights", n_epochs)
        kind = np.float16 if n_epochs or _column(file).dtype == np.float16 else np.float32
        return _load(file, [size], np.dtype(kind))

    def torch_stream(self, n_epochs: int) -> np.ndarray | None:
        """Where torch's random streams stood after ``n_epochs`` epochs, uint8; None: not known."""
        file = self._numbered("torch", n_epochs)
        if file.name not in self.metadata["crc32"]:
            return None
        if n_epochs not in self._torch_streams:
            stream = self._torch_streams[n_epochs] = np.array(_column(file))
            if stream.ndim != 1 or stream.dtype != np.uint8:
                raise InputError(f"triple log: {file} is not where torch's streams stood; train again")
        return self._torch_streams[n_epochs]

    def named(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Flat weights of a snapshot, by name and in their shapes."""
        parts = np.split(flat, np.cumsum([math.prod(shape) for _, shape in self.metadata["parameters"]])[:-1])
        return {n: part.reshape(shape) for (n, shape), part in zip(self.metadata["parameters"], parts, strict=True)}

    @property
    def order(self) -> list[list[int] | None]:
        """For each epoch how to recompute the order of batches, see `orders.BatchOrder`; None: not known."""
        return self.metadata.get("order") or [None] * self.n_epochs

    @property
    def snapshots(self) -> list[int]:
        """Numbers of epochs after which there is a snapshot, ascending."""
        return self.metadata["snapshots"]

    def truncate(self, n_epochs: int) -> None:
        """Keep the first ``n_epochs`` only (training continued past the epoch that the checkpoint holds)."""
        kept = {self._held(epoch).name for epoch in range(min(n_epochs, self.n_epochs))}
        self.metadata["snapshots"] = [n for n in self.snapshots if n <= n_epochs]
        kept |= {
            "users.npy",
            "items.npy",
            MARKS,
            "metadata.json",
            *(self._numbered(kind, n).name for kind in ("weights", "torch") for n in self.snapshots),
        }
        kept |= {self._numbered(kind, epoch).name for epoch in range(n_epochs) for kind in ("rates", "steps")}
        if "drawn" in self.metadata:
            self.metadata["drawn"] = self.drawn[:n_epochs]
        self._kept.clear()
        self.metadata["order"] = self.order[:n_epochs]
        self.metadata["rates"] = self._rates[:n_epochs]
        self.metadata["n_epochs"] = min(n_epochs, self.n_epochs)
        self.metadata["crc32"] = {name: crc for name, crc in self.metadata["crc32"].items() if name in kept}
        self._write_metadata()
        for file in self.path.glob("*.npy"):
            if file.name not in kept:
                file.unlink()

    def keep_draws_alone(self) -> None:
        """Delete what tells the course of a training: the batches of its rows, and its weights on the way."""
        gone = [file for kind in ("weights", "torch", "steps") for file in self.path.glob(f"{kind}-*.npy")]
        for file in gone:
            self.metadata["crc32"].pop(file.name, None)
        self.metadata |= {"snapshots": [], "order": None}
        self._write_metadata()
        for file in gone:
            file.unlink()

    def epoch(self, epoch: int) -> np.ndarray:
        """Negatives of one epoch, ``[rows, negatives]``: memory-mapped, or drawn again.

        Raises:
            InputError: they cannot be drawn again.
        """
        if self.drawn[epoch] is None:
            return self._stored(epoch)
        if (found := self._kept.get(epoch)) is None:
            found = self.again and self.again(epoch, self._stream(epoch))
            if found is None or crc32(found) != self.drawn[epoch]:
                raise InputError(
                    f"triple log: {self.path} holds no negatives of epoch {epoch}, and what is drawn again is not what "
                    "was trained on; give the data, and the versions of numpy and torch, of the training"
                )
            found.flags.writeable = False
            while self._kept and (len(self._kept) + 1) * found.nbytes > KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[epoch] = found
        return found

    def epochs(self, n_epochs: int) -> Sequence[np.ndarray]:
        """Negatives of the first epochs; those that are drawn again are when they are asked for."""
        return _Epochs(self, n_epochs)

    def _stored(self, epoch):
        return _load(self._file(epoch), [self.n_rows, self.negatives], self.dtype)

    def _stream(self, epoch):
        if epoch not in self._streams:
            file = self._numbered("stream", epoch)
            self._streams[epoch] = np.array(_load(file, [STREAM], np.dtype(np.uint32)))
            if self._streams[epoch][-1] >= STREAM:
                raise InputError(f"triple log: {file} is not where numpy's stream stood; train again")
        return self._streams[epoch]

    @property
    def drawn(self) -> list[int | None]:
        """For each epoch the checksum of its negatives where they are drawn again; None: they are stored."""
        return self.metadata.get("drawn") or [None] * self.n_epochs

    def gather(self, rows: np.ndarray, epochs: Sequence[int] | np.ndarray) -> np.ndarray:
        """Negatives of some rows in some epochs, ``[len(epochs), len(rows), negatives]``."""
        if self.static:
            return np.repeat(self.epoch(0)[rows][None], len(epochs), axis=0)
        return np.stack([self.epoch(e)[rows] for e in epochs])

    def verify(self) -> None:
        """Check every column against its checksum and every id against its range.

        Raises:
            InputError: what is damaged.
        """
        epochs = {self._held(epoch).name for epoch in range(self.n_epochs)}
        needed = {"users.npy", "items.npy", *epochs, *(self._numbered("weights", n).name for n in self.snapshots)}
        needed |= {
            self._numbered("rates", epoch).name for epoch, entry in enumerate(self._rates) if entry and entry[0] is None
        }
        if missing := needed - self.metadata["crc32"].keys():
            raise InputError(f"triple log: {self.path} has no checksum of {min(missing)}; it was changed, train again")
        if (self.users[1:] < self.users[:-1]).any():
            raise InputError(f"triple log: {self.path / 'users.npy'} is not grouped by user; train again")
        for name, expected in self.metadata["crc32"].items():
            if name == "metadata.json":
                continue
            file = self.path / name
            if Path(name).name != name:
                raise InputError(f"triple log: {self.path} names a file outside itself; do not use it, train again")
            column = _column(file)
            if crc32(column) ^ _mask(self.salt, name) != expected:
                raise InputError(
                    f"triple log: {file} does not match its checksum; it was changed or damaged, train again"
                )
            if name.startswith(("weights-", "rates-")):
                if not np.isfinite(column).all():
                    raise InputError(f"triple log: {file} holds NaN or infinite {name.split('-')[0]}; train again")
                continue
            if name.startswith(("steps-", "stream-", "torch-")) or name == MARKS:
                continue
            largest = self.metadata["n_users" if name == "users.npy" else "n_items"]
            if column.size and (column.min() < 1 or column.max() >= largest):
                raise InputError(f"triple log: {file} holds ids outside 1..{largest - 1}; train again")
        if self.metadata["crc32"].get("metadata.json", self._metadata_crc()) != self._metadata_crc():  # old logs: none
            raise InputError(f"triple log: {self.path / 'metadata.json'} does not match its checksum; train again")

    def without(
        self,
        rows: np.ndarray | Sequence[int],
        path: Path | str,
        run_id: str,
        fingerprint: dict[str, Any],
        epochs: Iterable[Epoch],
        snapshots: Mapping[int, np.ndarray] | None = None,
        ordered: bool = True,
    ) -> "TripleLog":
        """Write the log of a training in which the given rows, anchors and negatives alike, do not occur.

        The copy appears under its final name only when complete.

        Args:
            epochs: of that training, see `influence.coupling`; in its negatives forgotten items are drawn for their
                users as often as any other. Left as they were, an item missing among thousands of draws would tell
                what was forgotten.
            snapshots: number of epochs -> weights that have forgotten, flat; without them the copy
                has none, since the recorded ones were trained on the forgotten rows.
            ordered: whether to keep the batch of each row, and where torch's streams stood. From these, which tell the
                seed, one may find the places where the forgotten rows were.

        Returns:
            The new log.
        """
        path = Path(path)
        keep = ~marked(self.n_rows, rows)
        building = temporary_path(path)
        remove(building)
        try:
            users, items, n_items = np.array(self.users), np.array(self.items), self.metadata["n_items"]
            sizes = self.metadata["n_users"], n_items, self.negatives
            training = Training(
                run_id, fingerprint, *sizes, self.static, None, self.optimizer,
                salt=secrets.token_bytes(SALT_BYTES),
            )  # fmt: skip
            marks = None if self.marks is None else np.array(self.marks)[keep]
            copy = TripleLog.create(building, users[keep], items[keep], training, marks)
            if self.own_draws:
                copy.own_draws = self.own_draws
            last = self.n_epochs - 1  # there may be more now
            for number, epoch in enumerate(epochs):
                steps = epoch.steps(self.n_rows)[keep] if ordered else None
                rates = None if self.rates(min(number, last)) is None else epoch.rates
                copy._append(epoch.negatives[keep], None, rates, steps)
            same = ordered and not isinstance(epochs, Fresh)
            for n_epochs, flat in (snapshots or {}).items():
                copy._add_snapshot(n_epochs, self.named(flat), self.torch_stream(n_epochs) if same else None)
            copy._write_metadata()
            remove(path)
            os.rename(building, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return TripleLog.open(path)


class _Epochs(Sequence[np.ndarray]):
    """Negatives of a log's epochs; what is stored is mapped at once, and stays so when the log is deleted."""

    def __init__(self, log, n_epochs):
        self.log, self.stored = log, [log._stored(n) if log.drawn[n] is None else None for n in range(n_epochs)]

    def __len__(self):
        return len(self.stored)

    def __getitem__(self, number: Any) -> Any:
        found = self.stored[number]
        return self.log.epoch(range(len(self))[number]) if found is None else found
