"""How close unlearning comes to retraining, read against how far two retrained models are from each other.

M seeds each of the original and of the retrained model are trained on one frozen split. Every method then unlearns
from each of the M originals. Nothing of a retrained model is used to unlearn.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from recbole_unlearn.comparison.asked import asked, listable
from recbole_unlearn.comparison.seeds import SeedRun, quiet
from recbole_unlearn.comparison.ways import STEP, WAYS, ways_of
from recbole_unlearn.devices import read
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.churn import shared
from recbole_unlearn.evaluation.forgetting import query_scores, rank_percentile
from recbole_unlearn.evaluation.ranking import evaluate
from recbole_unlearn.settings.config import PAPER, changed
from recbole_unlearn.settings.conflicts import DERIVED_FORMS
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.training.trainer import judge
from recbole_unlearn.unlearner import InfluenceUnlearner

# Settings of each row of the table; the paper's step is UBPR's equation (7), all else is ours.
METHODS = {
    "nothing done": None,
    "paper's step": {"paper": True, **PAPER},
    "influence": WAYS[STEP],
    **{name: settings for name, settings in WAYS.items() if name != STEP},
}
TOP_K = 10
UNAFFECTED_USERS = 500


def methods_for(config):
    """`METHODS` that a configuration's model has."""
    has = ["nothing done", *(["paper's step"] if config["model"] in DERIVED_FORMS else []), *ways_of(config)]
    return {name: settings for name, settings in METHODS.items() if (STEP if name == "influence" else name) in has}


@dataclass
class Seen:
    """What is compared of one model.

    Attributes:
        percentile: rank percentile of each forgotten pair among the items its user never had, ``[pairs]``.
        margin: score of each forgotten pair minus the mean score of these items, ``[pairs]``.
        held_out: percentile of each matched held-out pair, ``[pairs]``.
        affected, unaffected: top-K items of the users with and of users without forgotten pairs, ``[users, K]``.
        metrics (dict): HR@10, NDCG@10, ... on the held-out items, full ranking.
    """

    percentile: np.ndarray
    margin: np.ndarray
    held_out: np.ndarray
    affected: np.ndarray
    unaffected: np.ndarray
    metrics: dict

    @property
    def auc(self):
        """Forget-set AUC."""
        return float(self.percentile.mean())

    @property
    def membership(self):
        """AUC of telling forgotten pairs from matched held-out pairs by their percentile; 0.5 is chance."""
        ranks = pd.Series(np.concatenate([self.held_out, self.percentile])).rank().to_numpy()
        n, m = len(self.percentile), len(self.held_out)
        return float((ranks[m:].sum() - n * (n + 1) / 2) / (n * m))


class Observer:
    """Looks at models of one split and forget set, always at the same pairs and users."""

    def __init__(self, config, split, rows):
        self.config, self.split, self.judged = config, split, split.judged_without(rows)
        self.users, self.items = split.users[rows], split.items[rows]
        rng = np.random.default_rng(0)
        affected = np.unique(self.users)
        others = np.setdiff1d(np.intersect1d(split.users, listable(split)), affected)
        self.affected = np.intersect1d(affected, listable(split))
        self.others = np.sort(rng.choice(others, min(UNAFFECTED_USERS, len(others)), replace=False))
        held_out, self.held_items = self._matched(rng)
        self.asked = asked(split, rows, held_out, np.concatenate([self.affected, self.others]), rows)
        self.seen = split.seen()
        users, items = np.delete(split.users, rows), np.delete(split.items, rows)
        ptr = np.searchsorted(users, np.arange(split.n_users + 1))
        self.trained = lambda user: items[ptr[user] : ptr[user + 1]]
        self.trainer = judge(config, split, new_model(config, split))

    def _matched(self, rng):
        """A held-out pair for each forgotten one: of the same user if possible, of the nearest item popularity.

        Returns:
            (its number among the validation and test interactions, its item) of each.
        """
        split = self.split
        popularity = np.bincount(split.items, minlength=split.n_items)
        held = [loader._dataset.inter_feat for loader in (split.valid, split.test)]
        data = split.test._dataset
        users = np.concatenate([h[data.uid_field].numpy() for h in held])
        items = np.concatenate([h[data.iid_field].numpy() for h in held])
        found = np.empty(len(self.users), np.int64)
        for pair, (user, item) in enumerate(zip(self.users, self.items, strict=True)):
            own = np.flatnonzero(users == user)
            pool = own if len(own) else rng.integers(0, len(users), 50)
            found[pair] = pool[np.argmin(np.abs(np.log1p(popularity[items[pool]]) - np.log1p(popularity[item])))]
        return found, items[found]

    def view(self, model):
        """Look at a model."""
        split, n, m = self.split, len(self.users), len(self.affected)
        percentile, margin, items = np.empty(2 * n), np.empty(2 * n), np.concatenate([self.items, self.held_items])
        top = np.empty((m + len(self.others), TOP_K), np.int64)
        for part, batch in query_scores(model, self.asked.queries):
            (pairs, of_pairs), (lists, of_lists) = self.asked.pairs_in(part), self.asked.lists_in(part)
            for place, (user, row) in enumerate(zip(self.asked.users[part], batch, strict=True)):
                unseen = np.ones(split.n_items, bool)
                unseen[0] = False
                unseen[self.seen(user)] = False
                others = np.sort(row[unseen].astype(np.float64))
                own = pairs[of_pairs == place]
                percentile[own] = rank_percentile(others, row[items[own]])
                margin[own] = row[items[own]] - others.mean()
                row = row.copy()
                row[0] = -np.inf
                row[self.trained(user)] = -np.inf
                top[lists[of_lists == place]] = np.argpartition(-row, TOP_K)[:TOP_K]
        metrics = evaluate(self.trainer, model, self.judged, self.config["seed"], protocols={"full": 0})["full"]
        return Seen(percentile[:n], margin[:n], percentile[n:], top[:m], top[m:], metrics)


def overlap(a, b):
    """Mean share of common items in two arrays of top-K lists ``[users, K]``."""
    if len(a) == 0:
        return float("nan")
    return float(shared(a, b))


def ceiling(before, after):
    """Highest correlation with the other seeds' mean change that its noise over seeds allows, from split halves.

    Args:
        before, after: margins of the original and retrained models, ``[seeds, pairs]``.

    Returns:
        float: the square root of the reliability of a mean over all seeds but one, by Spearman-Brown from the mean
        correlation of the changes of two halves of the seeds.
    """
    n = len(after)
    halves = [list(half) for half in itertools.combinations(range(n), n // 2)]
    values = []
    for half in halves:
        rest = [i for i in range(n) if i not in half]
        one, two = (after[part].mean(0) - before[part].mean(0) for part in (half, rest))
        values.append(np.corrcoef(one, two)[0, 1])
    r, times = max(float(np.mean(values)), 0.0), 2 * (n - 1) / n
    return float(np.sqrt(times * r / (1 + (times - 1) * r)))


def compare(retrained, originals, unlearned):
    """Figures of one method.

    Args:
        retrained, originals, unlearned: lists of `Seen`, one a seed.

    Returns:
        dict of floats. ``*_sd`` are standard deviations over seeds, ``*_z`` distances to the retrained mean in standard
        deviations of the retrained models; ``*_ratio`` distances to retrained models over the median distance of two.
    """
    from scipy.stats import ks_2samp, wasserstein_distance  # here: it costs half a second that few runs need

    result = {}

    def against(name, value, reference):
        got, want = np.array([value(v) for v in unlearned]), np.array([value(v) for v in reference])
        result[name], result[f"{name}_sd"] = float(got.mean()), float(got.std(ddof=1))
        spread = want.std(ddof=1)
        result[f"{name}_z"] = float((got.mean() - want.mean()) / spread) if spread else float("nan")

    against("forget_auc", lambda v: v.auc, retrained)
    against("membership_auc", lambda v: v.membership, retrained)
    for metric in unlearned[0].metrics:
        against(metric, lambda v, metric=metric: v.metrics[metric], retrained)
    pairs = list(itertools.combinations(retrained, 2))
    cross = [(u, r) for i, u in enumerate(unlearned) for j, r in enumerate(retrained) if i != j]
    for name, distance in (("ks", lambda a, b: ks_2samp(a, b).statistic), ("wasserstein", wasserstein_distance)):
        floor = np.median([distance(a.percentile, b.percentile) for a, b in pairs])
        result[f"{name}_ratio"] = float(np.mean([distance(u.percentile, r.percentile) for u, r in cross]) / floor)
    for name in ("affected", "unaffected"):
        result[f"overlap_{name}"] = float(np.mean([overlap(getattr(u, name), getattr(r, name)) for u, r in cross]))
        result[f"overlap_{name}_floor"] = float(
            np.mean([overlap(getattr(a, name), getattr(b, name)) for a, b in pairs])
        )
    before = np.array([v.margin for v in originals])
    after = np.array([v.margin for v in retrained])
    predicted = np.array([v.margin for v in unlearned]) - before
    change = after - before
    limit = ceiling(before, after)
    # with the others' change: its own original is in what a model changed, and would make it agree by its noise alone
    others = [np.delete(change, k, 0).mean(0) for k in range(len(predicted))]
    single = [np.corrcoef(p, t)[0, 1] if p.std() else float("nan") for p, t in zip(predicted, others, strict=True)]
    result |= {
        "mean_change": float(predicted.mean()),
        "true_mean_change": float(change.mean()),
        "correlation": float(np.mean(single)),
        "correlation_sd": float(np.std(single, ddof=1)),
        "ceiling": limit,
        "of_ceiling": float(np.mean(single)) / limit if limit else float("nan"),
    }
    return result


def fidelity(trained, rows, seeds=6, methods=None, show_progress=True):
    """Measure methods on one forget set.

    Args:
        trained (TrainedSeeds): split and cache of the models; missing ones are trained.
        rows: sorted int array of rows to forget.
        seeds (int): M, at least 3.
        methods (dict, optional): name -> settings that differ from the configuration, or None for doing nothing;
            default: METHODS.

    Returns:
        dict: method -> figures of `compare` plus ``seconds`` and ``details`` of its solver; 'retrained' likewise, with
        the ``agreement`` of compiled training with RecBole's (`TrainedSeeds`).
    """
    if seeds < 3:
        raise InputError(f"fidelity needs at least 3 seeds, not {seeds}")
    config, split = trained.config, trained.split
    numbers = range(config["seed"], config["seed"] + seeds)
    originals = [SeedRun.original(seed) for seed in numbers]
    retrainings = [SeedRun.without(seed, rows) for seed in numbers]
    trained.train(originals + retrainings, show_progress)
    with quiet():
        observer = Observer(config, split, rows)
        remaining = split.remaining_dataset(rows)

        def trained_model(run):
            """As it was trained: some models draw at random, when they are built, what they hold of the data."""
            model = new_model(config, split, run.seed, remaining if run.forgotten else None)
            model.load_state_dict(read(trained.path(run))["state_dict"])
            return model

        before, after = ([observer.view(trained_model(run)) for run in runs] for runs in (originals, retrainings))
        results = {"retrained": compare(after, before, after) | {"agreement": trained.agreement}}
        results["retrained"]["seconds"] = float(np.median([trained.seconds(run) for run in retrainings]))
        methods = methods or methods_for(config)
        for name in tqdm(methods, "Methods", ncols=100, disable=not show_progress):
            views, seconds, details = [], [], []
            for run, view in zip(originals, before, strict=True):
                if methods[name] is None:
                    views.append(view)
                    continue
                model, setting = trained_model(run), changed(config, **methods[name])
                stored, log = checkpoints.load(path := trained.path(run))
                unlearner = InfluenceUnlearner(Trained(model, setting, split, log, stored, path, seed=run.seed))
                unlearner.check()
                unlearner.warm_up()
                unlearned = unlearner.unlearn(rows)
                seconds.append(unlearned.seconds)
                report = unlearned.report()
                report.pop("history", None)
                details.append(report)
                unlearner.apply(rows, unlearned)
                views.append(observer.view(unlearner.served(model)))
            results[name] = compare(after, before, views)
            results[name]["seconds"] = float(np.median(seconds)) if seconds else 0.0
            results[name]["details"] = details
    return results
