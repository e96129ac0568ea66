"""A dry run: what a request would forget, in which way, and what it would leave where. Nothing is written."""

from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_unlearn.data.requests import batches
from recbole_unlearn.runs import output
from recbole_unlearn.runs.result import Result
from recbole_unlearn.settings.conflicts import COHORT
from recbole_unlearn.storage import purging
from recbole_unlearn.storage.triple_log import log_path
from recbole_unlearn.unlearner import UNTRAINED, InfluenceUnlearner
from recbole_unlearn.unlearners import guard
from recbole_unlearn.unlearners.replay import Replay

if TYPE_CHECKING:
    from recbole_unlearn.runs.run import Run

UNKNOWN = "unknown"


def planned(run: "Run") -> Result:
    """What a request that was found possible would do: figures by name, None where nobody knows."""
    config = run.config
    values = {
        "model": config["model"],
        "dataset": config["dataset"],
        "forget_set": {"kind": run.request.kind, **run.split.counts(run.rows)},
        "way": _way(run, run.unlearner) if run.unlearner else _adopted(run),
        "left": _left(run),
    }
    return Result("dry_run", values, _page(values))


def _way(run, unlearner: InfluenceUnlearner) -> dict[str, Any]:
    """Which way would be taken, whether that is exact, and about how long it takes."""
    problem: Any = unlearner.problem
    stream, served, rows = run.request.kind == "requests", 1, run.rows
    if stream:
        served = len(batches(run.request.value, run.config["request_batch"]))
        unlearner.hurry(served)
        unlearner.expect(run.rows)  # of all of them: from a cohort on, what comes is trained again
        rows = np.empty(0, np.int64)  # what each touches is found when its turn comes
    way: Any = unlearner.way
    replay = isinstance(way, Replay)
    at_once = replay and way.exact(problem, rows)
    settled = replay and stream and way.rows != "touched"
    seconds = served * problem.seconds_again() if at_once else np.inf
    validated, epochs = replay and way.epochs == "validated", problem.epochs
    if validated:  # stops at the latest
        seconds, epochs = seconds * run.config["epochs"] / epochs, run.config["epochs"]
    found = guard.known(unlearner, way)
    told = {
        "method": way.name,
        "chosen": unlearner.chosen,
        "exact": at_once or settled,
        "coupling": way.coupling if replay and (at_once or settled) else None,
        "epochs": epochs if at_once or settled else None,
        "validated": validated,
        "seconds": float(seconds) if np.isfinite(seconds) else None,
        "memory": None,
        "guard": found.sentence if found else None,
    }
    if len(run.rows) or run.erasure.stale or settled and not unlearner.settled:
        return told
    stays = {"chosen": UNTRAINED, "exact": unlearner.settled, "validated": False, "seconds": 0.0}
    return told | dict.fromkeys(("coupling", "epochs")) | stays


def _adopted(run):
    """Of a checkpoint without a log, nothing is known before it is adopted."""
    chosen = f"{run.checkpoint.stock} is adopted first, that is trained again by its seed"
    unknown = ("method", "exact", "coupling", "epochs", "validated", "seconds", "memory", "guard")
    return dict.fromkeys(unknown) | {"chosen": chosen}


def _left(run) -> list[dict[str, str]]:
    """What there is of the forgotten, where, and what becomes of it."""
    config, path, purge = run.config, run.checkpoint.path, run.config["purge"]
    deleted = "is deleted" if purge else "stays (purge: True deletes it)"
    erasure = run.erasure
    counts = erasure.lines or {"requested": len(run.rows), "earlier": len(erasure.before)}
    lines = f"the lines of {counts['requested']} forgotten interactions"
    lines += f", and of {counts['earlier']} forgotten before" if counts["earlier"] else ""
    named = any(len(erasure.whole.get(field, ())) for field in ("user", "item"))  # pairs have lines in one file alone
    found = [
        ("the original checkpoint", path, deleted),
        ("its log", log_path(path), deleted),
        *(("a list or vectors beside it", each, deleted) for each in purging.written_beside(path)),
        (lines, erasure.inter, "are removed" if erasure.removal else "stay (purge_dataset: True removes them)"),
        *([(run.left, erasure.inter.parent, "stay")] if run.left else []),
        *([("all other lines that name them", erasure.inter.parent, "are removed")] if named else []),
        ("the request, and copies of data and models elsewhere", "wherever you keep them", "stay; they are yours"),
    ]
    if run.checkpoint.stock:
        found.insert(0, ("the checkpoint without a log", run.checkpoint.stock, "stays; it is yours"))
    if run.saved:
        found.append(("the new model, its log, results", config["output_dir"] or "a new folder", "are written"))
    if run.trail:
        found.append(("the audit record", run.trail, f"gets {1 + purge} line{'s' * bool(purge)} without names"))
    if run.suppression:
        found.append(("the suppression list", run.suppression, "gets keyed hashes of what is forgotten"))
    caches = (output.cache_folder(config, kind) for kind in ("fidelity", "comparison"))
    found += [("a cache of trained models", path, "stays") for path in caches if path.is_dir()]
    return [{"what": what, "where": str(where), "then": then} for what, where, then in found]


def _page(values):
    """The same in words, as Markdown."""
    forget, way = values["forget_set"], values["way"]
    exact = {True: "exact: as retraining without them", False: "approximate", None: f"{UNKNOWN} whether exact"}
    coupled = f", by {way['coupling']} random numbers" if way["coupling"] else ""
    if way["validated"]:
        coupled += f", of as many epochs as validation chooses, at most {way['epochs']}"
    most = "validation aside, at most " * bool(way["validated"])
    seconds = f"{most}about {way['seconds']:.2g}" if way["seconds"] is not None else UNKNOWN
    share = forget["interactions"] / forget["of"]
    cohort = way["exact"] and share > COHORT
    checked = way["guard"] or "the log is not checked yet; where it does not tell its training, this is refused"
    return "\n".join([
        f"# Dry run: {values['model']} on {values['dataset']}, nothing is written",
        "",
        f"Forgotten would be {forget['interactions']} of {forget['of']} training interactions ({forget['kind']}), "
        f"{forget['users']} users, {forget['items']} items.",
        "",
        f"Way: {way['method'] or UNKNOWN}, {exact[way['exact']]}{coupled} ({way['chosen']}).",
        *([f"This is retraining: {share:.0%} of the training interactions are to be forgotten."] if cohort else []),
        f"Seconds of forgetting itself: {seconds}. Memory: {UNKNOWN}.",
        f"Guard: {checked}.",
        "",
        *(f"- {each['what']} ({each['where']}): {each['then']}" for each in values["left"]),
        "",
    ])  # fmt: skip
