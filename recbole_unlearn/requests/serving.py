"""What is pending in a queue, forgotten in one batch.

A batch, with a random id that is its folder's name, is in the queue before anything is done. Whether a killed process
had done it is then to be seen from the disk: done is what the audit record holds, as `runs.output` has it.
"""

import csv
import json
import os
import re
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.requests import rows_of
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.requests.queue import NOTHING_LEFT, Queue
from recbole_unlearn.runs import output
from recbole_unlearn.runs.erasure import NO_ROWS, Erasure, data_file, in_files, left_over, unknown
from recbole_unlearn.settings.given import Given, parse_value
from recbole_unlearn.settings.keys import FORGET, PATHS, PERSONAL
from recbole_unlearn.storage import audit, purging, suppression
from recbole_unlearn.storage.files import (
    Locked,
    in_one_line,
    locked,
    now,
    read_text,
    remove,
    scratch_folder,
    sweep_scratch,
    write_atomically,
)
from recbole_unlearn.storage.paths import RESULT, UNLEARNED
from recbole_unlearn.training.trained import Checkpoint

# keys that a queue sets, or that could name somebody
OURS = (*FORGET, *PERSONAL, "checkpoint", "output_dir", "audit", "request_batch", "model", "dataset")
PLACES = (*PATHS, "data_path", "checkpoint_dir")
BATCH = re.compile("[0-9a-f]{16}")


def serve(
    queue: Queue,
    output_dir: Path | str,
    trail: Path | str,
    checkpoint: Path | str | None = None,
    keys: Mapping[str, Any] | None = None,
    reset: bool = False,
) -> str:
    """Forget what is pending; returns, in words, what was done.

    Args:
        queue: it goes on from the checkpoint that its last batch made.
        output_dir: each batch gets a folder in it.
        trail: the audit file.
        checkpoint: the one to begin with.
        keys: other keys of `run_unlearn`.
        reset: whether to begin anew with ``checkpoint``, one that was trained since.

    Raises:
        InputError: as `run_unlearn` does; what could be served is pending as before.
    """
    keys = {"compare": "none", **(keys or {})}
    given = Given.read(config_dict=keys)
    taken = [key for key in given.values if key in OURS] + given.many
    if taken:
        raise InputError(f"a queue is not served with {taken[0]}; leave it out")
    if given.get("dry_run"):
        raise InputError("a queue is not served with dry_run, which forgets nothing; list tells what is pending")
    if parse_value(str(trail), "audit") is None:
        raise InputError("a queue finds out by its audit record what was done; give audit a path, or leave it out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("a queue is served by one process, which may start others: leave torchrun out, and give nproc")
    sweep_scratch()
    with locked(queue.path):
        finished = _take_up(queue)
        origin, start = _start(queue, checkpoint, reset)
        said = _batch(queue, origin, start, Path(output_dir).absolute(), Path(trail).absolute(), keys)
        queue.compact()
    return "\n".join(filter(None, [finished, said]))


def _start(queue, checkpoint, reset):
    """Paths of the checkpoint that the queue began with, and of the one to forget from."""
    origin, current = queue.checkpoints
    if checkpoint is None:
        if current is None or reset:
            raise InputError("give the checkpoint to begin with")
        return origin, current
    if current is None or reset:
        if Path(checkpoint).is_file() and queue.served(checkpoint):
            raise InputError(f"{checkpoint} knows what this queue has forgotten; give one that was trained without")
        return (os.path.abspath(checkpoint),) * 2
    if os.path.realpath(checkpoint) in map(os.path.realpath, (origin, current)):  # the same command, every night
        return origin, current
    raise InputError(
        f"this queue goes on from {current}; leave {checkpoint} out, or add --reset if it was trained anew since"
    )


def _batch(queue, origin, checkpoint, output_dir, trail, keys):
    """Serve what is pending from a checkpoint; returns what was done."""
    pending = queue.requests("pending")
    if not pending and (origin, checkpoint) == queue.checkpoints:
        return "nothing is pending"
    with ExitStack() as held:
        opened = Checkpoint.open(Given.read(config_dict={**keys, "checkpoint": checkpoint}), held)
        assert opened
        served, refused, done, left = _looked_up(queue, opened, pending)
    name = secrets.token_hex(8)
    folder = output_dir / name
    batch = {"id": name, "started": now(), "checkpoint": checkpoint, "folder": str(folder), "audit": str(trail)}
    batch |= {"before": queue.secret.checksum(checkpoint), "keys": json.dumps(_anywhere(keys, opened))}
    taken = queue.begin(batch, origin, served, refused, done, left)
    served, refused = ({name: each[name] for name in each if name in taken} for each in (served, refused))
    done = {name: reason for name, reason in done.items() if name in taken}
    said = [f"{each}: failed, {reason}" for each, reason in refused.items()]
    for each, reason in done.items():
        nothing = None if reason == NOTHING_LEFT else "nothing to forget"
        said.append(f"{each}: done, {'; '.join(filter(None, [nothing, reason]))}")
    if served:
        try:
            _forget(queue, name, {**keys, "checkpoint": checkpoint, "output_dir": str(folder), "audit": str(trail)})
        except InputError:
            if not _take_up(queue):  # nothing was done
                raise
        else:
            if not _finish(queue, queue.open_batch()):
                raise InputError(f"{folder} holds no unlearned model that {trail} records; it was changed meanwhile")
        told = {each: f"{count} interactions" for each, count in served.items()}
        said += [f"{each}: done, {'; '.join([told[each], *filter(None, [left.get(each)])])}" for each in served]
        said += [f"serve {queue.checkpoints[1]}"]
    return "\n".join(said) or f"nothing is pending; the queue goes on from {checkpoint}"


def _anywhere(keys, opened):
    """Keys that mean the same to a process in another working folder: what a killed one left is finished by them."""
    inter = data_file(opened.config, opened.stored).absolute()
    named = {key: value for key, value in keys.items() if key in PLACES and parse_value(value, key) is not None}
    found = {"data_path": str(inter.parent.parent)} if inter.is_file() else {}
    return {**keys, **{key: os.path.abspath(value) for key, value in named.items()}, **found}


def _looked_up(
    queue: Queue, opened: Checkpoint, pending: Sequence[sqlite3.Row]
) -> tuple[dict[str, int], dict[str, str], dict[str, str | None], dict[str, str]]:
    """Number of training interactions of each request to serve, why others cannot be, for which nothing is to do, and
    what is left of those that are served.

    Without naming anybody.
    """
    served, refused, done, left, forgotten = {}, {}, {}, {}, []
    config, split, listed = opened.config, opened.split(), output.suppression_list(opened.config)
    erasure, asked = Erasure(config, split, opened.stored), {}  # what is refused of no request is none's fault
    lacking = ForgetRequest("requests", _table(pending)).lacking(split) if config["everywhere"] else {}
    unread = in_files(erasure.inter, config, lacking)
    for request in pending:
        table, kind, tokens = _table([request]), request["kind"], json.loads(request["tokens"])
        asking, each = ForgetRequest("requests", table), tuple(tokens) if kind == "pair" else tokens[0]
        if each in unread.get(kind, ()):
            asked[request["id"]] = asking.without({kind: [each]}), NO_ROWS
        elif not unknown(split, _pair(request)):
            asked[request["id"]] = asking, rows_of(split, table)[0]
    notes = dict(zip(asked, left_over(erasure, asked.values(), names=False), strict=True))
    for request in pending:
        name, kind, tokens = request["id"], request["kind"], json.loads(request["tokens"])
        named, strange = {kind: tokens}, [] if name in asked else unknown(split, _pair(request))
        if strange and not _forgotten(queue, kind, tokens, listed):
            refused[name] = f"unknown {strange[0]} token"
        elif strange:
            done[name] = NOTHING_LEFT
            forgotten.append((kind, *tokens))
        else:
            asking, rows = asked[name]
            note = f"left: {notes[name]}" if notes[name] else None
            lines = config["purge_dataset"] and asking.forgotten_before(split)
            if len(rows) or lines or _beyond(config, named, listed):
                served[name] = len(rows)
                left |= {name: note} if note else {}
            else:
                done[name] = note
    if listed and forgotten:
        suppression.add(listed, forgotten)
    alone = _refused(opened, split, [request for request in pending if request["id"] in served])
    return {name: count for name, count in served.items() if name not in alone}, {**refused, **alone}, done, left


def _refused(opened, split, requests):
    """Why a run would refuse some of these requests, by id: one by one in their order, where it would all of them."""
    config = opened.config

    def check(some):
        Erasure.of(config, split, opened.stored, ForgetRequest("requests", _table(some)))

    kept, refused = [], {}
    with suppress(InputError):
        if requests:
            check(requests)
        return refused
    for request in requests:
        try:
            check([*kept, request])
            kept.append(request)
        except Locked:
            raise
        except InputError as error:
            refused[request["id"]] = str(error)
    return refused


def _beyond(config, named, listed):
    """Whether more is to be done for what is named, see `beyond_rows`, which is not done yet."""
    return any(config["everywhere"] or (listed and not suppression.lists(listed, *each)) for each in named.items())


def _forgotten(queue, kind, tokens, listed):
    """Whether the queue, or a suppression list, knows that this, or whom it is of, was forgotten as a whole."""
    covered = [(kind, tokens)] + ([("user", tokens[:1]), ("item", tokens[1:])] if kind == "pair" else [])
    return any(queue.forgotten(*each) or (listed and suppression.lists(listed, *each)) for each in covered)


def _table(requests):
    """Requests as `data.requests.read` gives them, without times."""
    return pd.DataFrame([_pair(request) for request in requests], columns=["user", "item"])


def _pair(request):
    tokens = json.loads(request["tokens"])
    return {"user": (*tokens, ""), "item": ("", *tokens)}.get(request["kind"], tokens)


def _forget(queue, batch, keys):
    """One run for all requests of a batch, which it reads from a file that is ours alone."""
    requests = queue.requests(batch=batch)
    with scratch_folder() as scratch:
        file = scratch / "requests.csv"
        write_atomically(file, _table(requests).to_csv(index=False, quoting=csv.QUOTE_ALL).encode())
        run_unlearn(config_dict={**keys, "forget_requests": str(file), "request_batch": len(requests)})


# -- what a killed process left


def _take_up(queue):
    """Finish the batch that a killed process was serving, if it had got so far; else take it back."""
    batch = queue.open_batch()
    if batch is None:
        return None
    if _finish(queue, batch):
        return f"a batch that was cut off is finished; serve {queue.checkpoints[1]}"
    folder = Path(batch["folder"])
    if not (BATCH.fullmatch(batch["id"]) and folder.name == batch["id"]):
        raise InputError(f"queue {queue.path} is damaged: {folder} is not the folder of a batch")
    if folder.exists():
        with in_one_line(folder.parent):
            remove(folder)
    queue.give_back(batch["id"])
    return None


def _finish(queue, batch) -> bool:
    """Finish a batch if its model is on record: the purge that was asked for, and the queue; whether it is."""
    path, trail = Path(batch["folder"]) / UNLEARNED, Path(batch["audit"])
    if not (trail.is_file() and path.is_file()):
        return False
    record, line = audit.record_of(trail, path, json.loads(batch["keys"]).get("audit_key"))
    if record is None:
        return False
    for folder in (path.parent, Path(batch["checkpoint"]).parent):
        purging.tidy(folder)  # a purge that was begun is finished
    _purge(queue, batch, record["request"])
    queue.done(batch["id"], _facts(batch["id"], record, line, path.parent), str(path))
    return True


def _purge(queue, batch, name):
    """What a killed process left of a purge that was asked for."""
    path, trail = Path(batch["checkpoint"]), Path(batch["audit"])
    given = Given.read(config_dict={**json.loads(batch["keys"]), "checkpoint": str(path)})
    if given.get("purge") is not True:
        return
    if path.is_file():  # it was not begun yet
        with ExitStack() as held:
            opened = Checkpoint.open(given, held)
            assert opened
            request = ForgetRequest("requests", _table(queue.requests(batch=batch["id"])))
            erasure = Erasure.of(opened.config, opened.split(), opened.stored, request)
            result = {"files": {"original": str(path)}, "audit": {"request": name}, "lines": erasure.lines}
            output.purge(result, opened.config, path, erasure, trail)


def _facts(batch, record, line, folder) -> dict[str, Any]:
    """What receipts tell of a batch: nothing of its other requests."""
    result = json.loads(read_text(folder / RESULT))
    return {
        "batch": batch,
        "time": record["time"],
        "model": record["settings"]["model"],
        "dataset": record["settings"]["dataset"],
        "method": record["method"],
        "exact": record["solver"].get("exact", False),
        "guard": {key: result["guard"][key] for key in ("checked", "sentence", "distance", "limit")},
        "audit": {"request": record["request"], "line": line},
        "weights": record["after"]["weights"],
        "versions": record["versions"],
    }
