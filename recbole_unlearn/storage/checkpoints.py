"""Reading and writing checkpoints. Nothing read here can run code."""

import errno
import glob
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from recbole_unlearn import devices
from recbole_unlearn.errors import InputError
from recbole_unlearn.storage import stock
from recbole_unlearn.storage.files import remove, replacing, sync_folder
from recbole_unlearn.storage.triple_log import TripleLog, log_path


def check_finite(state_dict: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises InputError if a tensor of ``state_dict`` holds NaN or infinity."""
    for name, value in state_dict.items():
        if torch.is_floating_point(value) and not torch.isfinite(value).all():
            raise InputError(f"{what} holds NaN or infinite values in {name}; it cannot be used")


def save(path: Path | str, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; raises OSError where it cannot be written."""
    with replacing(path) as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:  # torch's own writer hides the OSError, of a full disk for instance
            raise OSError(errno.EIO, f"writing failed ({' '.join(str(error).split())[:80]})", str(path)) from error


def save_with_log(path: Path | str, state: dict[str, Any], write_log: Callable[[Path], object]) -> TripleLog:
    """Write a checkpoint and its log as one: a reader, or a crash at any moment, finds the old pair or the new one.

    The log is written beside the old one, under a name that holds its run; the checkpoint, which names the run,
    then replaces the old one. That is the moment from which on the new pair holds.

    Args:
        state: with ``state["triple_log"]["run_id"]``.
        write_log: writes a whole log to a path.

    Returns:
        The log, in its place.
    """
    path = Path(path)
    pending = _pending(path, state["triple_log"]["run_id"])
    try:
        write_log(pending)
        save(path, state)
    except BaseException:
        settle(path, read(path) if path.is_file() else None)
        raise
    settle(path, state)
    return TripleLog.open(log_path(path))


def settle(path: Path | str, state: dict[str, Any] | None = None) -> None:
    """Finish or undo a `save_with_log` that was cut off; ``state``: the checkpoint's content, None if there is none."""
    path = Path(path)
    if state is not None and (valid := _log_folder(path, state)) != log_path(path):
        remove(log_path(path))
        os.rename(valid, log_path(path))
        sync_folder(path.parent)
    for entry in sorted(_all_pending(path)):
        remove(entry)


def unsettled(path: Path | str) -> bool:
    """Whether a `save_with_log` was cut off before it had tidied up."""
    return any(_all_pending(path))


def _pending(path, run_id):
    return log_path(path).with_name(f".{log_path(path).name}.{run_id}.pending")


def _all_pending(path):
    return log_path(path).parent.glob(f".{glob.escape(log_path(path).name)}.*.pending")


def _log_folder(path, state):
    """Where a checkpoint's log lies: beside it, or still under its pending name."""
    run_id = state["triple_log"].get("run_id")
    if isinstance(run_id, str) and re.fullmatch(r"\w{1,64}", run_id):  # it becomes part of a path
        pending = _pending(path, run_id)
        if pending.is_dir() and not pending.is_symlink():
            return pending
    return log_path(path)


def read(path: Path | str, logged: bool = True) -> dict[str, Any]:
    """Content of a checkpoint file: plain values and tensors, whether this package wrote it or RecBole itself.

    Args:
        logged: whether it must have been trained with a triple log.

    Raises:
        InputError: missing, truncated, foreign or unsafe file; NaN weights; no log.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} {'is no plain file' if path.exists() else 'does not exist'}")
    try:
        _check_zip(path)
        state = _content(path)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... on bad files
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"checkpoint {path} cannot be read ({first}); it is damaged, or not of RecBole's or recbole_unlearn's "
            "training: give the .pth file that it wrote"
        ) from None
    if not isinstance(state, dict) or not {"config", "epoch", "state_dict", "optimizer"} <= state.keys():
        raise InputError(f"checkpoint {path} is no RecBole checkpoint; give the .pth file that training wrote")
    damaged = InputError(f"checkpoint {path} is damaged; give the .pth file that training wrote")
    if logged:
        _check_logged(path, state)
    weights = state["state_dict"]
    if not (
        isinstance(weights, dict)
        and all(map(_plain_tensor, weights.values()))
        and _is_optimizer(state["optimizer"])
        and isinstance(state["config"], dict)
        and all(_is_name(state["config"].get(key)) for key in ("model", "dataset"))
        and isinstance(state.get("data", {}), dict)
        and isinstance(state.get("data", {}).get("inter", ""), str)
    ):
        raise damaged
    check_finite(weights, f"checkpoint {path}")
    return state


def _content(path):
    """What a file holds, in either form."""
    if stock.wrote(path):
        return stock.read(path)
    try:
        return devices.read(path)
    except pickle.UnpicklingError:  # which says how to run what it holds
        raise pickle.UnpicklingError("it holds more than plain values and tensors") from None


def _check_logged(path, state):
    """Raises InputError where a checkpoint was not trained with a triple log."""
    tie = state.get("triple_log")
    if not isinstance(state["config"], dict) or tie is None:
        raise InputError(
            f"checkpoint {path} has no triple log; recbole_unlearn.load({str(path)!r}) adopts it, by training again, "
            "where that ends in its weights"
        )
    if isinstance(tie, dict) and isinstance(reason := tie.get("missing"), str):
        raise InputError(f"checkpoint {path} has no triple log: {reason}; train anew to get one")
    if not (isinstance(tie, dict) and type(tie.get("epochs")) is int):
        raise InputError(f"checkpoint {path} is damaged; give the .pth file that training wrote")


def _check_zip(path):
    """Raises where the file is not as torch writes it: whole, by the checksums that torch does not compare, and of
    the size that it says."""
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise zipfile.BadZipFile("a part is compressed")
        if damaged := file.testzip():
            raise zipfile.BadZipFile(f"part {damaged} does not match its checksum")


def _plain_tensor(value):
    """Whether a value is a tensor of numbers, each of which is stored."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _is_optimizer(state):
    """Whether a value is of the form of a torch optimiser's state."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return False
    groups, kept = state.get("param_groups"), state["state"].values()
    return (
        isinstance(groups, list)
        and len(groups) > 0
        and all(isinstance(group, dict) and _are_settings(group) for group in groups)
        and all(isinstance(each, dict) for each in kept)
        and all(_plain_tensor(value) for each in kept for value in each.values() if isinstance(value, torch.Tensor))
    )


def _are_settings(group):
    """Whether an optimiser's hyperparameters, those that there are, are such as torch takes."""
    betas = group.get("betas", (0, 0))
    numbers = [group.get(key, 0) for key in ("lr", "eps", "weight_decay")]
    return (
        isinstance(betas, (list, tuple))
        and len(betas) == 2
        and all(_is_number(number) for number in (*numbers, *betas))
        and max(betas) < 1
    )


def _is_number(value):
    return type(value) in (int, float) and 0 <= value < float("inf")


def _is_name(value):
    """Whether a value can be the name of a model or a data set: it becomes part of paths."""
    return isinstance(value, str) and re.fullmatch(r"[^/\\\0\n]+", value) is not None and value not in (".", "..")


def load(path: Path | str, verify: bool = True) -> tuple[dict[str, Any], TripleLog]:
    """A checkpoint that our trainer wrote, and its triple log.

    Args:
        verify: whether to compare all of the log with its checksums.

    Raises:
        InputError: missing, truncated, foreign or unsafe file; NaN weights; a log of another run.
    """
    state = read(path)
    return state, log_of(path, state, verify)


def log_of(path: Path | str, state: dict[str, Any], verify: bool) -> TripleLog:
    """The triple log of a checkpoint whose content was read.

    Raises:
        InputError: it has none, or one that is damaged or of another run.
    """
    path = Path(path)
    _check_logged(path, state)
    tie = state["triple_log"]
    log = TripleLog.open(_log_folder(path, state))
    if verify:
        log.verify()
    if tie.get("run_id") != log.run_id or not 0 < tie.get("epochs", 0) <= log.n_epochs:
        raise InputError(
            f"checkpoint {path} and {log.path} come from different runs; put back the folder that training wrote"
        )
    return log
