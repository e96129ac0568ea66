"""A stream of deletion requests, one after the other on one open model."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import pandas as pd
from tqdm import tqdm

from recbole_unlearn.data.forget import ids
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.input_error import InputError
from recbole_unlearn.training import train

COLUMNS = ("user", "item", "time")
# From this share of forgotten interactions on, settings that were chosen for the data with them (the number of epochs,
# learning rate, size) are those of another data set; a convention, not a measurement.
RETRAIN_SHARE = 0.1


def read_requests(path):
    """Requests of a CSV file with the columns user, item and, if wanted, time; tokens as in the .inter file.

    An empty item means all interactions of the user, an empty user all of the item.

    Returns:
        DataFrame of str columns ``user``, ``item`` and a column ``time``, in order of time (else of lines).
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise InputError(f"cannot read requests {path}: {' '.join(str(error).split())}") from None
    if not {"user", "item"} <= set(table.columns) or set(table.columns) - set(COLUMNS):
        raise InputError(f"requests {path} must start with the line user,item or user,item,time; got {','.join(table.columns)}")
    if len(table) == 0:
        raise InputError(f"requests {path} holds no request")
    table["user"], table["item"] = table["user"].str.strip(), table["item"].str.strip()
    empty = np.flatnonzero((table["user"] == "") & (table["item"] == ""))
    if len(empty):
        raise InputError(f"requests {path}, line {empty[0] + 2}: neither a user nor an item")
    if "time" not in table:
        table["time"] = np.arange(len(table))
        return table
    times = pd.to_numeric(table["time"], errors="coerce")
    if times.isna().any():
        times = pd.to_datetime(table["time"], errors="coerce", utc=True, format="ISO8601")
    if times.isna().any():
        line = np.flatnonzero(times.isna())[0] + 2
        raise InputError(f"requests {path}, line {line}: time must be a number or an ISO date in every line")
    table["time"] = times
    return table.sort_values("time", kind="stable", ignore_index=True)


def batches(table, together=1):
    """Requests to serve at once: those of one time, and ``together`` times' worth of them.

    Returns:
        list of DataFrames.
    """
    times = table["time"].ne(table["time"].shift()).cumsum() - 1
    return [group for _, group in table.groupby(times // together)]


def rows_of(split, table):
    """Training rows that each request names: list of int64 arrays; empty for what was never trained on.

    Raises:
        InputError: a token that the data set does not know.
    """
    chosen = {}
    for field in ("user", "item"):
        named = table[field] != ""
        known = ids(split, field, table.loc[named, field].tolist())
        chosen[field] = np.zeros(len(table), np.int64)
        chosen[field][named.to_numpy()] = known
    rows = pd.DataFrame({"user": split.users, "item": split.items})
    of_user, of_item = rows.groupby("user").indices, rows.groupby("item").indices
    none = np.empty(0, np.int64)
    found = []
    for user, item in zip(chosen["user"], chosen["item"], strict=True):
        own = of_user.get(user, none) if user else of_item.get(item, none)
        found.append(own[split.items[own] == item] if user and item else own)
    return found


@dataclass
class Served:
    """Outcome of a stream.

    Attributes:
        batches (list of dict): number of ``requests``, newly forgotten ``interactions``, how many are ``forgotten`` in all,
            ``seconds``, and whether ``all_rows`` were replayed.
        drift (list of dict): comparisons with retraining.
        empty (int): requests that named nothing (left) to forget.
        retrain (str or None): why retraining is advised.
    """

    batches: list
    drift: list
    empty: int
    retrain: str | None


def serve(session, table, together=1, drift_every=0, scratch=None, show_progress=False):
    """Serve requests on an open session.

    Args:
        session (UnlearnSession): its model changes.
        table: as `read_requests` returns it.
        together (int): requests (or times) to serve at once.
        drift_every (int): compare with a retrained model whenever this many requests have been served; 0: never.
        scratch: folder for the retrained models.

    Returns:
        Served
    """
    split = session.split
    wanted = rows_of(split, table)
    result = Served([], [], 0, None)
    served, due = 0, drift_every
    for group in tqdm(batches(table, together), "Requests", ncols=100, disable=not show_progress):
        named = [wanted[k] for k in group.index]
        fresh = [rows[~session.unlearner.absent[rows]] for rows in named]
        result.empty += sum(len(rows) == 0 for rows in fresh)
        rows = np.unique(np.concatenate(fresh))
        start, all_rows = perf_counter(), False
        if len(rows):
            all_rows = session.forget_rows(rows).details.get("all_rows", False)
        served += len(group)
        result.batches.append(
            {
                "requests": len(group),
                "interactions": len(rows),
                "forgotten": len(session.forgotten),
                "seconds": perf_counter() - start,
                "all_rows": all_rows,
            }
        )
        if drift_every and served >= due:
            due += drift_every
            result.drift.append({"requests": served, **drift(session, scratch)})
    share = len(session.forgotten) / split.n_rows
    if share > RETRAIN_SHARE:
        result.retrain = (
            f"{share:.0%} of the training interactions are forgotten; the number of epochs and other settings were chosen with them"
        )
    return result


def drift(session, scratch):
    """Compare a session's model with one that is trained anew without what the session has forgotten.

    Returns:
        dict: forget-set AUC and, by full ranking, metrics of both, and the seconds of training.
    """
    config, split, rows = session.config, session.split, session.forgotten
    retrained, trainer, seconds = train(config, split, scratch / "drift.pth", rows, log_negatives=False)
    trainer.eval_collector.data_collect(split.train)
    result = {"forgotten": len(rows), "seconds_retrain": seconds}
    for name, model in (("unlearned", session.model), ("retrained", retrained)):
        result[f"forget_auc_{name}"] = float(forgetting.percentiles(model, split, rows).mean())
        metrics = ranking.evaluate(trainer, model, split, config["seed"], protocols={"full": 0})["full"]
        result |= {f"{metric}_{name}": value for metric, value in metrics.items()}
    return result
