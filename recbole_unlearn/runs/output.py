"""What a run writes, where, and in which order, so that a crash at any moment leaves nothing half."""

import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recbole_unlearn.data import frozen_data
from recbole_unlearn.data.frozen_data import Frozen
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Fresh, Paired
from recbole_unlearn.influence.recorded import marked
from recbole_unlearn.runs.erasure import NOTHING, Erasure, all_named
from recbole_unlearn.settings.config import is_bare
from recbole_unlearn.settings.keys import PATHS
from recbole_unlearn.settings.shown import public
from recbole_unlearn.storage import audit, checkpoints, paths, purging, secret, suppression
from recbole_unlearn.storage.files import is_debris, locked, remove, replacing, write_atomically
from recbole_unlearn.storage.paths import CHANGED, EMBEDDINGS, MODEL, RESULTS, UNLEARNED
from recbole_unlearn.storage.triple_log import log_path
from recbole_unlearn.training import adoption
from recbole_unlearn.training.fit import magnitude
from recbole_unlearn.training.trained import Trained, seed_of
from recbole_unlearn.unlearners import guard
from recbole_unlearn.unlearners.base import Unlearned


def output_folder(config, looks=False):
    """The folder that a run writes into, not made yet; ``looks``: nothing is tidied up."""
    if config["output_dir"]:
        folder = Path(config["output_dir"])
        if not looks:
            purging.tidy(folder)
        if folder.exists() and (not folder.is_dir() or not all(map(is_debris, folder.iterdir()))):
            raise InputError(f"output_dir {folder} exists and is not an empty folder; name a new one")
        return folder
    stem = f"{config['model']}-{config['dataset']}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder, n = Path(config["checkpoint_dir"]) / stem, 1
    for earlier in folder.parent.glob("*/") if not looks else ():
        purging.tidy(earlier)
    while folder.exists():
        n += 1
        folder = Path(config["checkpoint_dir"]) / f"{stem}-{n}"
    return folder


def cache_folder(config, kind):
    """Where 'fidelity' or 'comparison' keeps what it trains."""
    return Path(config[f"{kind}_cache"] or Path(config["checkpoint_dir"]) / kind)


def check_paths(config, output, config_file_list, saved):
    """Raises InputError where one path of a run would overwrite, or be deleted with, another.

    Args:
        output (Path): the run's folder.
        config_file_list (list of str or None): that the configuration was read from.
    """
    checkpoint, purged = config["checkpoint"], config["purge"] and saved
    given = {"forget_file": config["forget_file"], "forget_requests": config["forget_requests"]}
    given |= {f"config file {file}": file for file in config_file_list or []}
    data = Path(config["data_path"])
    frozen = checkpoint and data.resolve().is_relative_to(frozen_data.folder(log_path(checkpoint)).resolve())
    if saved:
        paths.check_written("output_dir" if config["output_dir"] else "checkpoint_dir", output, checkpoint)
        others = {"checkpoint": checkpoint, ".inter": data / f"{config['dataset']}.inter"}
        _check_audit(config, output, {**given, **others, "suppression": config["suppression"]})
        if config["suppression"]:
            paths.check_written("suppression", config["suppression"], checkpoint)
            paths.check_apart("suppression", config["suppression"], given | others)
    if purged and checkpoint:
        given |= {"the working folder": Path.cwd()} | ({} if frozen else {"data_path": data})
        for key, path in given.items():
            if path is not None:
                paths.check_kept(key, path, checkpoint)
    for key in ("fidelity_cache", "comparison_cache"):
        if config[key]:
            paths.check_written(key, config[key], checkpoint)


def _audit_path(config, output):
    """The key ``audit``, a bare name in ``output``."""
    return Path(output, config["audit"]) if is_bare("audit", config["audit"]) else Path(config["audit"])


def _check_audit(config, output, others):
    if config["audit"] is None:
        return
    path = _audit_path(config, output)
    ours = os.path.realpath(path.parent) == os.path.realpath(output)
    if ours and (path.name in paths.OUTPUT_NAMES or path.suffix == ".triples"):
        raise InputError(f"audit {path}: the run writes a file of this name itself; name another")
    key = secret.key_path(path, config["audit_key"])
    for name, written, apart in (("audit", path, {}), ("audit_key", key, {"audit": path})):
        paths.check_written(name, written, config["checkpoint"])
        paths.check_apart(name, written, others | apart)


def claim(held, folder):
    """Make the output folder and keep other processes out of it; tidies up after a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (UNLEARNED, MODEL):
        held.enter_context(locked(folder / name))
    purging.recover(folder / UNLEARNED)
    if not all(map(is_debris, folder.iterdir())):  # again, now that nobody else can be writing
        raise InputError(f"output_dir {folder} was filled by another process meanwhile; name a new one")
    held.enter_context(_nothing_half(folder))
    return folder


@contextmanager
def _nothing_half(folder):
    """Empty a folder of ours where the system, or the input, stopped us before there was a whole checkpoint in it."""
    try:
        yield
    except Exception:
        if not any(folder.glob("*.pth")):
            for entry in folder.iterdir():
                if not entry.name.endswith(".lock"):
                    remove(entry)
        raise


def save_unlearned(
    path: Path,
    trained: Trained,
    unlearned: Unlearned,
    rows: np.ndarray,
    inter: Path | str | None = None,
    guarded: guard.Guard | None = None,
    whole: Mapping[str, np.ndarray] | None = None,
    moments: dict[int, dict[str, torch.Tensor]] | None = None,
) -> None:
    """The new checkpoint and its log, in neither of which the forgotten rows occur.

    Args:
        inter: the user's interactions file if it loses lines; ids and split are kept with the log then, see `Frozen`.
        guarded: what is known of the original's log.
        whole: as of an `Erasure`, of whom nothing is kept.
        moments: state of the optimiser that is kept instead of the original's, where no new training has one.
    """
    config, split, stored, log = trained.config, trained.split, trained.stored, trained.log
    run_id = secrets.token_hex(8)
    # absolute: the next request may come from another working folder
    inter = os.path.abspath(inter) if inter else (stored.get("data") or {}).get("inter")
    frozen = Frozen(split, rows, whole) if inter else None
    new = unlearned.training
    epochs = new.epochs if new else _approximate(trained, rows)
    fingerprint = frozen.fingerprint if frozen else split.logged_without(rows)

    def write_log(folder):
        # where no row goes, batches tell of none
        ordered = isinstance(epochs, Fresh) or not config["purge"] or (not len(rows) and trained.recorded().ordered())
        log.without(rows, folder, run_id, fingerprint, epochs, unlearned.snapshots, ordered=ordered)
        surroundings = frozen.surroundings if frozen else partial(split.surroundings, rows)
        guard.inherit(guarded, folder, unlearned.state_dict, surroundings)
        if frozen:
            frozen.write(folder)

    tie: dict[str, Any] = {"run_id": run_id, "epochs": len(epochs)}
    if not config["purge"]:  # which leaves nothing of them
        parents = stored["triple_log"].get("parents")
        tie["parents"] = [*(parents if isinstance(parents, list) else []), stored["triple_log"]["run_id"]]
    if "seconds" in stored["triple_log"]:
        tie["seconds"] = stored["triple_log"]["seconds"]
    if not new and (len(rows) or stored["triple_log"].get("approximate")):
        tie["approximate"] = True
    if left := adoption.approximate(stored):
        tie["adopted"] = {"distance": magnitude(left)}
    seed, kept = _seed(stored, new), new.optimizer if new else moments
    if seed is not None and not frozen:  # else the original's cuts the data into parts
        tie["seed"] = seed
    state = {
        **stored,
        # where files of this run lie is nobody's business
        "config": {**public(config), **dict.fromkeys(PATHS), **({"seed": seed} if seed is not None and frozen else {})},
        "state_dict": unlearned.state_dict,
        "optimizer": stored["optimizer"] | ({} if kept is None else {"state": kept}),
        "epoch": len(epochs) - 1,
        # else of the original's training; who tries candidates could compare it
        **({"best_valid_score": -np.inf, "cur_step": 0} if config["purge"] else {}),
        **({"best_valid_score": new.validated["valid_score"], "cur_step": 0} if new and new.validated else {}),
        "other_parameter": {},  # of the original: propagated embeddings, and what the seed draws again
        "triple_log": tie,
    }
    if frozen:
        state["data"] = {"inter": inter}
        state["config"] |= frozen_data.SETTINGS
        state["config"]["data_path"] = str(frozen_data.folder(log_path(path)) / config["dataset"])
    elif os.path.abspath(config["data_path"]) != (now := split.train._dataset.dataset_path):
        state["config"]["data_path"] = now  # the working folder is another than where it was opened
    checkpoints.save_with_log(path, state, write_log)


def write_changed(folder: Path, users: list[str]) -> None:
    """Write changed_users.csv."""
    write_atomically(folder / CHANGED, pd.DataFrame({"user": users}).to_csv(index=False).encode())


def write_embeddings(folder: Path, pair: tuple[np.ndarray, np.ndarray], split: Split, rows: np.ndarray) -> None:
    """Write users.npy and items.npy, and whose each row is: of those alone of whom training interactions are left."""
    folder = folder / EMBEDDINGS
    folder.mkdir()
    kept = np.delete(np.arange(split.n_rows), rows)
    for field, table, ids in (("user", pair[0], split.users), ("item", pair[1], split.items)):
        left = np.unique(ids[kept])
        with replacing(folder / f"{field}s.npy") as file:
            np.save(file, table[left])
        tokens = pd.DataFrame({field: split.token(field, left)})
        write_atomically(folder / f"{field}s.csv", tokens.to_csv(index=False).encode())


def _seed(stored, new):
    """Seed that a model is to be built by which is not the original's; None: there is none."""
    if new is not None and new.seed is not None:
        return new.seed
    return secrets.randbits(32) if new and isinstance(new.epochs, Fresh) else seed_of(stored)


def _approximate(trained, rows):
    """What a model that forgot otherwise than by training again would have been trained on."""
    # by secret random numbers: with the seed, returned items could be told from drawn ones
    return Paired(trained.recorded(), marked(trained.log.n_rows, rows), secrets.randbits(128))


def audit_file(config, output):
    """Path of the audit file, or None. InputError where nothing could be appended to it."""
    if config["audit"] is None:
        return None
    path = _audit_path(config, output)
    if path.exists() and not path.is_file():
        raise InputError(f"audit {path} is no plain file; name another")
    trail = audit.read(path) if path.exists() else audit.Trail([], audit.GENESIS, 0)
    if trail.torn:
        logging.getLogger().warning(f"{path}: a crash tore its last line; these {trail.torn} bytes will be removed")
    if path.parent != output and not path.parent.is_dir():
        raise InputError(f"audit: folder {path.parent} does not exist; make it")
    if path.parent.exists() and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"audit file {path} cannot be written; give rights or name another")
    key = secret.key_path(path, config["audit_key"])
    if audit.check_key(trail, path, key) is None and key.parent != output and not os.access(key.parent, os.W_OK):
        raise InputError(f"audit_key {key} cannot be made: there is no folder {key.parent} that can be written to")
    return path


@contextmanager
def recorded_or_gone(path):
    """Take a new model, and results that were not there before, away where something fails before it is on record.

    Nothing may be purged within: the original is what is left then.
    """
    before = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
    try:
        yield
    except Exception:
        for name in (path.name, log_path(path).name, *RESULTS, CHANGED, EMBEDDINGS):
            if name not in before:
                remove(path.parent / name)
        raise


def lasting(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's result may be written where the original is purged; all of it where it stays.

    No figure that was measured on the original, which who tries candidates could compare with those of a training with
    each; nor on the forgotten, which who has the new model could compare with those of any pair; of others two digits.
    """
    if not result["settings"].get("purge"):
        return dict(result)
    models = {name: {"seconds": each["seconds"]} for name, each in result["models"].items() if name != "original"}
    solver = {key: each if type(each) is int else audit.coarse(each) for key, each in result["unlearning"].items()}
    solver |= {key: audit.coarse(each) for key, each in solver.items() if key.endswith(("_replayed", "_changed"))}
    solver.pop("step_norm", None)
    left = {"models": models, "unlearning": solver, "rank_histogram": {}, "churn": {}, "geometry": {}}
    if result["verdict"]:
        outcome = {"outcome": result["verdict_figures"]["outcome"]}
        left |= {"verdict": f"{result['verdict'].partition(':')[0]}.", "verdict_figures": outcome}
    if "stream" in result:
        left["stream"] = {**result["stream"], "drift": [], "retrain": None}
    return {key: each for key, each in {**result, **left}.items() if key != "paired"}


def append_record(trail: Path, request: str, result, trained: Trained, path: Path, state_dict, requests):
    """Write down by what a model was replaced. Returns the record, and the SHA-256 of its line.

    Args:
        trail: audit file.
        request: its id.
        path, state_dict: the new model.
        requests: of a stream.
    """
    before = audit.model_checksums(trained.path, trained.stored["state_dict"])
    after = audit.model_checksums(path, state_dict)
    key = secret.made(secret.key_path(trail, trained.config["audit_key"]))  # not before what may fail
    entry = audit.unlearned_record(request, result, trained.config, before, after, key, requests)
    return entry, audit.append(trail, entry)


def record(result: dict, trained: Trained, unlearned: Unlearned, trail: Path | None, requests=()) -> None:
    """Write down by what a model was replaced: nothing is deleted before. ``requests``: of a stream."""
    if trail:
        path, request = Path(result["files"]["unlearned"]), result["audit"]["request"]
        entry, head = append_record(trail, request, lasting(result), trained, path, unlearned.state_dict, requests)
        result["audit"] |= {**{key: entry[key] for key in ("time", "before", "after")}, "head": head}
        result["versions"] = entry["versions"]


def suppression_list(config):
    """Path of the suppression list, or None. InputError where nothing could be added to it."""
    if config["suppression"] is None:
        return None
    path = Path(config["suppression"])
    if any(suppression.read(path).values()):
        secret.read(secret.key_path(path))
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"suppression list {path} cannot be written: make its folder, or give rights")
    return path


def suppress(path, split, rows, named, unread=NOTHING):
    """Put what was forgotten on the suppression list: what was named (`ForgetRequest.named`, ``unread``), pairs of
    other rows."""
    if path is None:
        return
    entries = [(field, token) for field, tokens in all_named(split, named, unread).items() for token in tokens]
    others = rows[~split.among(split.users[rows], split.items[rows], {**named, "user": named.get("user", [])})]
    numbers = split.pair_numbers(split.users[others], split.items[others])
    pairs = [*split.pairs_of(np.union1d(numbers, named.get("pair", numbers[:0]))), *unread.get("pair", ())]
    suppression.add(path, [*entries, *(("pair", *pair) for pair in pairs)])


def purge(result, config, path, erasure: Erasure, trail):
    """Delete the original, if asked for, and write that down too."""
    if config["purge"]:
        purging.purge(path, **erasure.removal)
        result["files"].pop("original")
        if trail:
            purged = ["checkpoint", "log", *(["data set"] if erasure.removal else [])]
            audit.append(trail, audit.purged_record(result["audit"]["request"], purged, result.get("lines")))
