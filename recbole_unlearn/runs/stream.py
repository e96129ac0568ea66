"""A stream of deletion requests, one after the other on one open model."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
from tqdm import tqdm

from recbole_unlearn.data.requests import batches, rows_of
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.settings.conflicts import COHORT
from recbole_unlearn.training.fit import train
from recbole_unlearn.unlearners.base import Unlearned

STANDARD_ERRORS = 2  # by which ranking may be worse than a retrained model's; as in `forgetting.verdict`


@dataclass
class Served:
    """Outcome of a stream.

    Attributes:
        unlearned (Unlearned): the weights at the end, with the seconds of all batches together.
        batches (list of dict): number of ``requests``, newly forgotten ``interactions``, how many are ``forgotten`` in
            all, ``seconds``, and whether ``all_rows`` were replayed.
        drift (list of dict): comparisons with retraining, see `drift`.
        empty (int): requests that named nothing, or nothing any more, to forget.
        retrain (str or None): why retraining is advised, and from which request on, see `advice`.
    """

    unlearned: Unlearned
    batches: list
    drift: list
    empty: int
    retrain: str | None

    def report(self):
        """Everything but weights, as plain values."""
        return {"batches": self.batches, "drift": self.drift, "empty": self.empty, "retrain": self.retrain}


def serve(unlearner, table, scratch, together=1, drift_every=0, show_progress=False, unread=0):
    """Serve requests on an open model, one after the other.

    Args:
        unlearner (InfluenceUnlearner): its model changes.
        table: as `data.requests.read` returns it.
        scratch (Path): folder for retrained models.
        together (int): requests (or times) to serve at once.
        drift_every (int): compare with a retrained model whenever this many requests have been served; 0: never.
        unread (int): requests beside these, which name nothing that the data set was read with.

    Returns:
        Served
    """
    split = unlearner.split
    wanted = rows_of(split, table)
    served, drifts, empty, n_served, retrain, last = [], [], unread, unread, None, None
    groups = list(batches(table, together))
    unlearner.hurry(len(groups))
    for group in tqdm(groups, "Requests", ncols=100, disable=not show_progress):
        fresh = [rows[~unlearner.problem.absent[rows]] for rows in (wanted[k] for k in group.index)]
        empty += sum(len(rows) == 0 for rows in fresh)
        rows = np.unique(np.concatenate(fresh))
        start, all_rows = perf_counter(), False
        if len(rows):
            last = unlearner.forget_rows(rows)
            all_rows = last.details.get("all_rows", False)
        figures = {"requests": len(group), "interactions": len(rows), "forgotten": len(unlearner.forgotten)}
        served.append({**figures, "seconds": perf_counter() - start, "all_rows": all_rows})
        before, n_served = n_served, n_served + len(group)
        if drift_every and before // drift_every < n_served // drift_every:
            drifts.append({"requests": n_served, **drift(unlearner, scratch)})
            retrain = retrain or advice(n_served, len(unlearner.forgotten) / split.n_rows, drifts[-1])
        retrain = retrain or advice(n_served, len(unlearner.forgotten) / split.n_rows)
    seconds, settled = [batch["seconds"] for batch in served], unlearner.settle_if_wanted(show_progress)
    last = settled or last
    details = {
        "requests": n_served,
        "batches": len(served),
        "median_seconds": float(np.median(seconds or [0.0])),
        "longest_seconds": max(seconds, default=0.0),
        "replays_of_all_rows": sum(batch["all_rows"] for batch in served),
        "settled_seconds": settled.seconds if settled else None,
        "exact": unlearner.settled,
        "coupling": last.details.get("coupling") if last and unlearner.settled else None,
    }
    total = sum(seconds) + (settled.seconds if settled else 0)
    return Served(unlearner.now(total, details), served, drifts, empty, retrain)


def advice(requests, share, comparison=None):
    """Why, and since which request, it is time to train anew: one sentence without its full stop; None if it is not.

    Args:
        requests (int): served so far.
        share (float): of the training interactions that are forgotten.
        comparison (dict, optional): of `drift`.
    """
    reason = None
    if share > COHORT:
        reason = (
            f"{share:.0%} of the training interactions are forgotten, and the number of epochs and other settings were "
            "chosen with them"
        )
    elif comparison and comparison["outcome"] in ("not yet", "over-forgotten"):
        own, other = (comparison[f"forget_auc_{name}"] for name in ("unlearned", "retrained"))
        reason = f"the forget set ranks otherwise than after retraining: AUC {own:.4f} instead of {other:.4f}"
    elif comparison and (worse := _worse(comparison)):
        reason = worse
    return reason and f"train anew soon: after {requests} requests {reason}"


def _worse(comparison):
    """That it recommends worse than the retrained model, by more than the choice of test users explains; or None."""
    for name in (key.removesuffix("_unlearned") for key in comparison if key.startswith("hit@")):
        if name.endswith("_retrained"):
            continue
        own, other = comparison[f"{name}_unlearned"], comparison[f"{name}_retrained"]
        error = ((own * (1 - own) + other * (1 - other)) / comparison["users"]) ** 0.5
        if other - own > STANDARD_ERRORS * error:
            return f"{name.replace('hit', 'HR')} has fallen to {own:.4f}, of a retrained model it is {other:.4f}"
    return None


def drift(unlearner, scratch):
    """Compare the model with one that is trained anew without what it has forgotten.

    Returns:
        dict: forget-set AUC and, by full ranking, metrics of both, the ``outcome`` of `forgetting.verdict`, the
        number of test ``users``, and the seconds of training.
    """
    config, split, rows = unlearner.config, unlearner.split, unlearner.forgotten
    judged = split.judged_without(rows)
    retrained, trainer, seconds = train(config, split, scratch / "drift.pth", rows, log_negatives=False)
    original = unlearner.trained.copy()
    models = {"original": original, "unlearned": unlearner.model, "retrained": retrained}
    ranks = {name: forgetting.percentiles(model, split, rows) for name, model in models.items()}
    _, figures = forgetting.verdict(ranks["original"], ranks["unlearned"], ranks["retrained"])
    result = {
        "forgotten": len(rows),
        "seconds_retrain": seconds,
        "users": len(np.unique(judged.test._dataset.inter_feat[config["USER_ID_FIELD"]])),
        "outcome": figures["outcome"],
    }
    for name in ("unlearned", "retrained"):
        result[f"forget_auc_{name}"] = float(ranks[name].mean())
        found = ranking.evaluate(trainer, models[name], judged, config["seed"], protocols={"full": 0}).get("full", {})
        result |= {f"{metric}_{name}": value for metric, value in found.items()}
    return result
