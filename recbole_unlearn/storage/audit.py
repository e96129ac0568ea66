"""The audit record: what was forgotten when and how, as append-only JSON lines that cannot be changed unnoticed.

Each line holds the SHA-256 of the line before. It holds counts, settings, checksums and figures, and nothing
that says who or what was forgotten. Checksums of models are keyed (see `secret`): of plain ones, whoever has old data
and the seed could try which missing interaction gives them. To check a file, and that checkpoints are those that it
records:

    python -m recbole_unlearn.storage.audit verify FILE [CHECKPOINT ...] [--audit_key=PATH]
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import recbole
import torch
from filelock import lock_descriptor
from recbole.config import Config

from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.keys import AUDITED
from recbole_unlearn.settings.shown import public
from recbole_unlearn.storage import checkpoints, secret
from recbole_unlearn.storage.files import file_checksum, now, sync_folder
from recbole_unlearn.storage.triple_log import log_path

if TYPE_CHECKING:
    from recbole_unlearn.unlearners.base import Unlearned

FORMAT = "recbole_unlearn audit 1"
GENESIS = hashlib.sha256(FORMAT.encode()).hexdigest()
# The settings that the unlearned weights depend on. A positive list: whatever else a configuration holds (paths, seeds
# of the draw, tokens, keys of the user's own) may tell what was forgotten. A model's own: see `weight_settings`.
SETTINGS = (
    "model", "dataset", "epochs", "learner", "learning_rate", "weight_decay", "train_batch_size",
    "clip_grad_norm", "embedding_size", "train_neg_sample_args", "eval_args", "user_inter_num_interval",
    "item_inter_num_interval", "valid_metric", "eval_step", "stopping_step", *AUDITED,
)  # fmt: skip


class AuditError(InputError):
    """The audit file was changed or damaged, or a checkpoint is not the one that it records."""


@dataclass
class Trail:
    """A checked audit file.

    Attributes:
        records: in order.
        head: SHA-256 of the last line; write it down elsewhere, and cutting off the end becomes visible too.
        torn: bytes of a last line that a crash cut off; 0 if there is none.
    """

    records: list[dict[str, Any]]
    head: str
    torn: int


def read(path: Path | str) -> Trail:
    """Read an audit file and check its chain.

    Raises:
        InputError: the file cannot be read.
        AuditError: a line was changed, inserted, removed or damaged. A torn last line is none: see `Trail`.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read audit file {path}: {error.strerror}") from None
    return _parse(content, path)


def _parse(content, path):
    *lines, torn = content.split(b"\n")
    records, head = [], GENESIS
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            previous = record["previous"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise AuditError(
                f"audit file {path}, line {number}: no audit record; the file was changed or damaged"
            ) from None
        if previous != head:
            what = (
                "no audit file of recbole_unlearn, or its first lines are"
                if number == 1
                else f"line {number - 1} or {number} was"
            )
            raise AuditError(f"audit file {path}: the chain breaks at line {number}: {what} changed or removed")
        records.append(record)
        head = hashlib.sha256(line).hexdigest()
    return Trail(records, head, len(torn))


def append(path: Path | str, record: Mapping[str, Any]) -> str:
    """Add a record of plain values, synced to disk. A last line that a crash had torn is removed first.

    Two processes may append to one file; each waits for the other.

    Returns:
        SHA-256 of the new line.

    Raises:
        AuditError: the file was changed or damaged before.
        OSError: it cannot be written; what was half written is taken back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a+b", buffering=0) as f:
        lock_descriptor(f.fileno(), poll_interval=0.01)  # ends with the file's closing
        f.seek(0)
        content = f.read()
        trail = _parse(content, path)
        whole = len(content) - trail.torn
        if trail.torn:
            f.truncate(whole)
            record = {**record, "removed_torn_bytes": trail.torn}
        line = json.dumps({"previous": trail.head, **record}, sort_keys=True, allow_nan=False).encode()
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[f.write(rest) :]
            os.fsync(f.fileno())
        except OSError:
            f.truncate(whole)
            raise
    if new:
        sync_folder(path.parent)
    return hashlib.sha256(line).hexdigest()


def weights_checksum(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict: of each entry's name, type, shape and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_checksums(path: Path | str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Checksums of a model: of its weights, of the checkpoint file that holds them, and of its triple log."""
    return {
        "weights": weights_checksum(state_dict),
        "file": file_checksum(path),
        "log": _log_checksum(log_path(path)),
    }


def _log_checksum(folder):
    """SHA-256 of what a log says about itself, the checksums of all its columns included."""
    return file_checksum(folder / "metadata.json")


def weight_settings(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that its weights depend on: `SETTINGS`, and what RecBole lists as its model's own."""
    file = Path(recbole.__path__[0]) / "properties" / "model" / f"{kept['model']}.yaml"
    listed = re.findall(r"^(\w+)\s*:", file.read_text("utf-8"), re.MULTILINE) if file.is_file() else []
    own = [key for key in listed if not key.endswith("path")]
    return {key: kept[key] for key in dict.fromkeys([*SETTINGS, *own]) if key in kept}


def request_entry(interactions: int, unlearned: "Unlearned") -> dict[str, Any]:
    """One of many requests on an open model, for the record of the model that is saved in the end.

    No figures of its solver: of a request for one interaction they would narrow down which.

    Args:
        interactions: newly forgotten.
        unlearned (Unlearned): its outcome.
    """
    return {
        "request": secrets.token_hex(8),
        "time": now(),
        "interactions": interactions,
        "method": unlearned.method,
        "weights": weights_checksum(unlearned.state_dict),
    }


def unlearned_record(
    request_id: str,
    result: Mapping[str, Any],
    config: Config,
    before: Mapping[str, str],
    after: Mapping[str, str],
    key: bytes,
    requests: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The record of one request. Figures are rounded: exact ones could tell which interaction a small request named.

    Args:
        request_id: free of anything personal.
        result: of ``run_unlearn``.
        config: the run's configuration.
        before, after: `model_checksums`.
        key: of all checksums that are written down.
        requests: where they were many: `request_entry` of each, in order.
    """
    unlearning = result["unlearning"]
    entries = [{**entry, "weights": secret.keyed(key, entry["weights"])} for entry in requests]
    return {
        **({"requests": entries} if requests else {}),
        "event": "unlearned",
        "key": secret.name_of(key),
        "request": request_id,
        "time": now(),
        "counts": {key: result["forget_set"][key] for key in ("interactions", "of", "users", "items")},
        "method": unlearning["method"],
        "solver": {
            key: number(coarse(value)) for key, value in unlearning.items() if _scalar(value) and key != "method"
        },
        "settings": weight_settings(public(config)),
        "before": _keyed(key, before),
        "after": _keyed(key, after),
        "forget_auc": {
            name: number(round(each["forget_auc"], 3))
            for name, each in result["models"].items()
            if "forget_auc" in each
        },
        "versions": versions(),
    }


def _keyed(key, checksums):
    return {what: secret.keyed(key, checksum) for what, checksum in checksums.items()}


def _scalar(value):
    return isinstance(value, (bool, int, float, str))


def number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def coarse(value: Any) -> Any:
    """Plain values with two significant digits of each number, those in lists and dicts too."""
    if isinstance(value, dict):
        return {key: coarse(each) for key, each in value.items()}
    if isinstance(value, list):
        return [coarse(each) for each in value]
    if isinstance(value, (bool, str)) or value is None or not math.isfinite(value):
        return value
    return type(value)(float(f"{value:.2g}"))


def purged_record(request_id: str, purged: list[str], lines: dict[str, int] | None = None) -> dict[str, Any]:
    """The record that a request's original was deleted; ``purged``: what was, ``lines``: of how many interactions."""
    told = {"lines": lines} if lines else {}
    return {"event": "purged", "request": request_id, "time": now(), "purged": purged, **told}


def versions() -> dict[str, str]:
    """Installed versions of what the result depends on."""
    from recbole_unlearn import __version__

    installed = {name: importlib.metadata.version(name) for name in ("recbole", "torch", "numpy")}
    return {"recbole_unlearn": __version__, **installed}


def key_names(trail: Trail) -> set[str]:
    """Which keys the checksums of a file's records were made with, see `secret.name_of`."""
    return {record["key"] for record in trail.records if record.get("event") == "unlearned" and "key" in record}


def check_key(trail: Trail, path: Path | str, key: Path) -> bytes | None:
    """The key of an audit file's records; None where there is none, and none is needed yet.

    Raises:
        InputError: it is damaged, another file's, or missing.
    """
    names = key_names(trail)
    if not key.exists() and not names:
        return None
    found = secret.read(key)
    if names - {secret.name_of(found)}:
        raise InputError(f"key {key} is not the one that {path} was written with; give that one (audit_key)")
    return found


def _holds(record, when, what, checksum, key):
    """Whether a record has a checksum, keyed or, as earlier versions wrote it, plain."""
    return record[when][what] == (secret.keyed(key, checksum) if key and "key" in record else checksum)


def record_of(
    path: Path | str, file: Path | str, audit_key: Path | str | None = None
) -> tuple[dict[str, Any] | None, str | None]:
    """The record of the request that led to a checkpoint, and the SHA-256 of its line; None and None: there is none.

    Raises:
        InputError: a file cannot be read, or the key is another.
    """
    trail = read(path)
    key = check_key(trail, path, secret.key_path(Path(path), audit_key))
    checksum = file_checksum(file)
    lines = [*(record["previous"] for record in trail.records), trail.head][1:]  # each line's is in the next one
    for record, line in zip(trail.records, lines, strict=True):
        if record.get("event") == "unlearned" and _holds(record, "after", "file", checksum, key):
            return record, line
    return None, None


def verify(path: Path | str, files: Iterable[Path | str] = (), audit_key: Path | str | None = None) -> Trail:
    """Check an audit file's chain, and that checkpoints are unlearned models that it records, with their logs whole.

    Args:
        audit_key: file of its key; default: beside it. Without, no checkpoints can be compared, but with records of
            earlier versions, whose checksums are plain.

    Raises:
        InputError: a file cannot be read.
        AuditError: what does not fit.
    """
    trail = read(path)
    place = secret.key_path(Path(path), audit_key)
    key = check_key(trail, path, place) if audit_key or place.exists() else None
    unlearned = [record for record in trail.records if record.get("event") == "unlearned"]

    recorded = partial(_holds, key=key)
    for file in files:
        try:
            checksum = file_checksum(file)
        except OSError as error:
            raise InputError(f"cannot read checkpoint {file}: {error.strerror}") from None
        records = [record for record in unlearned if recorded(record, "after", "file", checksum)]
        if not records:
            if any(recorded(record, "before", "file", checksum) for record in unlearned):
                raise AuditError(f"checkpoint {file} is the model from before a request that {path} records; purge it")
            if not key and key_names(trail):
                raise InputError(
                    f"the chain of {path} is whole, but checkpoints cannot be compared with it without its key, {place}"
                )
            raise AuditError(
                f"checkpoint {file} is none that {path} records; it was changed, or another file records it"
            )
        state, log = checkpoints.load(file)
        record = records[-1]
        if not recorded(record, "after", "weights", weights_checksum(state["state_dict"])):
            raise AuditError(f"checkpoint {file}: its weights are not those that {path} records")
        # records of earlier versions have none of the log
        if "log" in record["after"] and not recorded(record, "after", "log", _log_checksum(log.path)):
            raise AuditError(f"checkpoint {file}: its log is not the one that {path} records; it was changed")
    return trail


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recbole_unlearn.storage.audit", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="verify")
    command = commands.add_parser(
        "verify", help="exit status 0: all fits; 1: something was changed; 2: a file cannot be read"
    )
    command.add_argument("file", help="audit file")
    command.add_argument("checkpoints", nargs="*", help="checkpoints that it should record as unlearned")
    command.add_argument("--audit_key", help="its key (default: FILE.key); without, the chain alone is checked")
    args = parser.parse_args(argv)
    try:
        trail = verify(args.file, args.checkpoints, args.audit_key)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, AuditError) else 2
    torn = (
        f"; {trail.torn} bytes of a line that a crash cut off follow, the next request removes them"
        if trail.torn
        else ""
    )
    checked = f", {len(args.checkpoints)} checkpoints recorded and whole" if args.checkpoints else ""
    print(f"{args.file}: {len(trail.records)} records, chain whole{checked}; head {trail.head}{torn}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
