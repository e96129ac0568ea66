"""Several processes as one program: rank 0 runs it, the others do their share where it orders them to.

Rank 0 alone reads requests, takes locks, writes files, evaluates and reports, by the code of a single process. Where
work is shared (training, and what an unlearner computes) it publishes an order before; the other ranks wait for
orders (`follower`) and then make the same collective calls. Between ranks go JSON and tensors, no pickles.

A rank that fails says so in the store before its connections close. So one rank reports the error, and all others,
which then lose contact or find the note, end without a word of their own.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recbole_unlearn.errors import InputError

JOIN_SECONDS = 300  # at most, for all ranks to come
MAX_TIMEOUT = 366 * 86_400
MOST_A_CORE = 8  # processes of one run on a machine
LEAVE_SECONDS = 10  # for all ranks to notice that it is over, while rank 0 may hold their store
POLL_SECONDS = 5

_store: Any = None  # torch.distributed's, of the group that `joined` has joined
_joins = itertools.count()
_orders = itertools.count()


class OtherRankFailed(InputError):
    """Another rank has failed, and has said why."""


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads() -> bool:
    """Whether this is rank 0, or the only process."""
    return rank_and_size()[0] == 0


def shared() -> bool:
    """Whether `joined` holds, so that orders reach somebody."""
    return _store is not None


@contextmanager
def joined(
    nproc: int = 1,
    world_size: int = -1,
    ip: str = "localhost",
    port: str | int = "5678",
    offset: int = 0,
    timeout: int = 1800,
) -> Iterator[bool]:
    """Be one of several ranks for the length of a ``with`` block, if torchrun or the arguments say that there are any.

    Args:
        nproc, world_size, ip, port, offset: RecBole's: ranks of this machine, of all machines (-1: of this one alone),
            where rank 0 listens, and the first rank of this machine. This process becomes that one, and starts the
            others of its machine.
        timeout: seconds to wait for another rank in a collective call.

    Yields:
        Whether this process leads; if not, let it `follower.follow`.

    Raises:
        InputError: ranks that do not come, or are lost; arguments that make no sense.
        OtherRankFailed: some rank has failed and said why.
    """
    global _store, _orders
    place = _place(nproc, world_size, ip, port, offset, timeout)
    if place is None or _store is not None:
        yield leads()
        return
    if dist.is_initialized():
        raise InputError("torch.distributed has been initialised already; leave that to recbole_unlearn")
    url, rank, size = place
    children = [] if url == "env://" else [_start(offset + n, size, ip, port, timeout) for n in range(1, nproc)]
    try:
        _store, _orders = _join(url, rank, size, timeout), itertools.count()
        with _in_one_voice(rank):
            yield rank == 0
        if rank == 0:
            _publish(None)
    except BaseException:
        if rank == 0 and _store is not None:
            with suppress(RuntimeError):
                _publish({"failed": True})
        raise
    finally:
        _leave(rank, size)
        for child in children:
            try:
                child.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


def order(name: str, **arguments: Any) -> None:
    """Tell the other ranks to take part in something; nothing happens on these, or where there are none."""
    if shared() and leads():
        if _store.add("failures", 0):
            raise OtherRankFailed("another rank has failed")
        _publish({"name": name, "arguments": arguments})


def orders() -> Iterator[tuple[str, dict[str, Any]]]:
    """What rank 0 orders, as (name, arguments), until it has finished. Raises OtherRankFailed where it fails."""
    for n in itertools.count():
        key = f"order {n}"
        while True:
            try:
                _store.wait([key], timedelta(seconds=POLL_SECONDS))
                break
            except dist.DistStoreError:  # not yet
                if _store.add("failures", 0):
                    raise OtherRankFailed("another rank has failed") from None
        given = json.loads(_store.get(key))
        if given is None:
            return
        if "failed" in given:
            raise OtherRankFailed("rank 0 has failed")
        yield given["name"], given["arguments"]


def share(value: Any, device: torch.device | str = "cpu") -> Any:
    """Rank 0's value (of plain lists, dicts, numbers, strings) on every rank. Collective."""
    if not dist.is_initialized():
        return value
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor(len(text), device=device)
    dist.broadcast(length, 0)
    if not leads():
        text = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.cpu().numpy()))


def same_draws(device: torch.device | str = "cpu") -> None:
    """Go on drawing from rank 0's numpy stream on every rank. Collective."""
    state = np.random.get_state(legacy=False)
    state["state"]["key"] = state["state"]["key"].tolist()
    np.random.set_state(share(state, device))


def gather(array: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Bring an array together on rank 0, of which each rank holds some entries and zeros elsewhere. Collective."""
    if dist.is_initialized():
        as_bytes = torch.from_numpy(array.reshape(-1).view(np.uint8))
        on_device = as_bytes.to(device)
        dist.reduce(on_device, 0)
        as_bytes.copy_(on_device)
    return array


def mean(numbers: float | tuple[float, ...], device: torch.device | str = "cpu") -> float | tuple[float, ...]:
    """Mean over ranks of a number, or of a tuple of them. Collective."""
    if not dist.is_initialized():
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    total /= dist.get_world_size()
    return tuple(total.tolist()) if isinstance(numbers, tuple) else float(total)


def barrier() -> None:
    """Go on when all ranks are here. Collective."""
    if dist.is_initialized():
        dist.barrier()


def _place(nproc, world_size, ip, port, offset, timeout):
    """(rendezvous URL, rank, number of ranks), or None for a single process."""
    wholes = (("nproc", nproc, 1), ("world_size", world_size, -1), ("offset", offset, 0), ("rank_timeout", timeout, 1))
    if type(timeout) is int and timeout > MAX_TIMEOUT:
        raise InputError(f"rank_timeout must be at most {MAX_TIMEOUT} seconds, not {timeout!r}")
    for key, value, low in wholes:
        if type(value) is not int or not low <= value < 2**31:
            raise InputError(f"{key} must be a whole number of at least {low}, not {value!r}")
    if not str(port).isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"port must be a number from 1 to 65535, not {port!r}")
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if nproc > 1:
            raise InputError("torchrun has started the processes already; leave nproc out")
        return "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    most = MOST_A_CORE * (os.cpu_count() or 1)
    if nproc > most:
        raise InputError(f"nproc {nproc} is more than the {most} processes that this machine is fit for")
    size = nproc if world_size < 1 else world_size
    if offset + nproc > size:
        raise InputError(f"world_size {size} is too small for {nproc} processes from rank {offset} on")
    return (f"tcp://{ip}:{port}", offset, size) if size > 1 else None


def _start(rank, size, ip, port, timeout):
    """Start another rank of this machine, which learns all else by orders."""
    package = str(Path(__file__).resolve().parent.parent)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": ip, "MASTER_PORT": port}
    environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen([sys.executable, "-m", "recbole_unlearn.runs.follower", str(timeout)], env=environment)


def _join(url, rank, size, timeout):
    """Meet the other ranks; returns their common store."""
    wait = timedelta(seconds=min(timeout, JOIN_SECONDS))
    known = {} if url == "env://" else {"rank": rank, "world_size": size}
    try:
        store, _, _ = next(dist.rendezvous(url, timeout=wait, **known))
        store = dist.PrefixStore(f"recbole_unlearn {next(_joins)}", store)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"rank {rank} did not meet the {size - 1} others ({_first_line(error)}); start all of them, with the same "
            "world_size, ip and port"
        ) from error
    return store


def _leave(rank, size):
    """Close the connections, and keep the store until all ranks have seen what is in it."""
    global _store
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
    if _store is None:
        return
    with suppress(RuntimeError):
        _store.add("left", 1)
        until = time.monotonic() + LEAVE_SECONDS
        while rank == 0 and _store.add("left", 0) < size and time.monotonic() < until:
            time.sleep(0.02)
    _store = None


def _publish(content):
    _store.set(f"order {next(_orders)}", json.dumps(content))


@contextmanager
def _in_one_voice(rank):
    """Let the rank that fails first say why; what fails on the others is only its consequence."""
    try:
        yield
    except OtherRankFailed:
        raise
    except BaseException as error:
        if not _first_to_fail():
            raise OtherRankFailed("another rank has failed") from error
        if isinstance(error, InputError) and rank:
            raise InputError(f"rank {rank}: {error}") from error
        if _lost_contact(error):
            raise InputError(
                f"rank {rank} lost contact with another rank ({_first_line(error)}); see what that one says"
            ) from error
        raise


def _first_to_fail():
    try:
        return _store.add("failures", 1) == 1
    except RuntimeError:  # the store is gone with the process that held it
        return True


def _lost_contact(error):
    names = ("gloo", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(n in str(error) for n in names)
    )


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
