"""Whether two populations of models can be told apart by what they say of single pairs.

Of each pair, the margins that n unlearned models give it are compared with those that n models give it which never saw
it (oracles). All figures depend on n, and so does what equal laws would show: compare them at the same n only.

KLoM: Georgiev et al., "Attribute-to-Delete" (ICLR 2025). U-LiRA: Hayes et al., "Inexact unlearning needs more careful
evaluations" (2024), after Carlini et al. (2022). Epsilon: Triantafillou et al., "Are we making progress in
unlearning?" (2024), of the NeurIPS 2023 competition.
"""

import numpy as np

BINS = 20  # of KLoM's histograms
EMPTY = 1e-5  # what an empty bin holds, of 1: the divergence is at most log(1 / EMPTY), 11.5
DELTA = 1e-5  # of epsilon
RATES = {"tpr_1": 0.01, "tpr_01": 0.001}  # of false positives


def klom(unlearned: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """KL divergence of each pair's margins in the unlearned models from those in the oracles.

    Histograms of `BINS` equally wide bins, from the lowest to the highest of both.

    Args:
        unlearned, oracle: margins, ``[models, pairs]``.

    Returns:
        ``[pairs]``, nats.
    """
    both = np.concatenate([unlearned, oracle])
    low, wide = both.min(0), np.maximum(np.ptp(both, axis=0), np.finfo(np.float32).tiny)

    def histogram(margins):
        which = np.minimum((BINS * ((margins - low) / wide)).astype(np.int64), BINS - 1)
        places = which + BINS * np.arange(margins.shape[1])
        counts = np.bincount(places.ravel(), minlength=BINS * margins.shape[1]).reshape(-1, BINS)
        shares = np.maximum(counts / len(margins), EMPTY)
        return shares / shares.sum(1, keepdims=True)

    first, second = histogram(unlearned), histogram(oracle)
    return (first * np.log(first / second)).sum(1)


def log_ratios(unlearned: np.ndarray, oracle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U-LiRA's attack: of each model's margin, how much likelier it is unlearned than one of the oracles.

    Normal distributions, fitted to all other models: leave-one-out.

    Returns:
        Log-likelihood ratios of the unlearned models and of the oracles, shaped as these.
    """

    def of(values, own, other):
        return _density(values, *_without_each(own)) - _density(values, other.mean(0), other.var(0, ddof=1))

    return of(unlearned, unlearned, oracle), -of(oracle, oracle, unlearned)


def _without_each(values):
    """Mean and variance of all others, for each."""
    n, total, squares = len(values), values.sum(0), np.square(values - values.mean(0)).sum(0)
    mean = (total - values) / (n - 1)
    return mean, (squares - np.square(values - values.mean(0)) * n / (n - 1)) / (n - 2)


def _density(values, mean, variance):
    variance = np.maximum(variance, np.finfo(np.float32).tiny)
    return -0.5 * (np.square(values - mean) / variance + np.log(variance))


def auc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray | float:
    """Area under the ROC curve along the first axis, ties counted half."""
    n, m = len(positives), len(negatives)
    both = np.concatenate([positives, negatives])
    ranks = _ranks(both)
    return (ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m)


def _ranks(values):
    """Ranks from 1 on along the first axis, the mean of ties."""
    from scipy.stats import rankdata  # here: it costs half a second that few runs need

    return rankdata(values, axis=0)


def epsilons(unlearned: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Of each pair, the least epsilon that the worst attack by one threshold leaves, either way round.

    ``log((1 - delta - FPR) / FNR)`` and with the two rates exchanged, over all thresholds; of k errors in n models the
    rate is (k + 1/2) / (n + 1), so that n models show at most ``log(2 n + 1)``.
    """
    n, m = len(unlearned), len(oracle)
    both = np.concatenate([unlearned, oracle])
    order = np.argsort(both, axis=0, kind="stable")
    ranked = np.take_along_axis(both, order, 0)
    apart = ranked[1:] > ranked[:-1]  # no threshold is inside a tie
    below = np.cumsum(order < n, axis=0)[:-1]  # unlearned models below each threshold
    others = np.arange(1, n + m)[:, None] - below
    worst = np.zeros(unlearned.shape[1])
    for false_negative, false_positive in (
        (below, m - others),  # positive above the threshold
        (n - below, others),
    ):
        miss, alarm = (false_negative + 0.5) / (n + 1), (false_positive + 0.5) / (m + 1)
        for one, other in ((miss, alarm), (alarm, miss)):
            each = np.log(np.maximum(1 - DELTA - other, DELTA) / one)
            worst = np.maximum(worst, np.where(apart, each, 0).max(0))
    return worst


def told_apart(unlearned: np.ndarray, oracle: np.ndarray) -> dict[str, float]:
    """All figures of the forgotten pairs, from n unlearned models and n oracles.

    Args:
        unlearned, oracle: margins, ``[models, pairs]``.

    Returns:
        ``klom`` (median over pairs), ``klom_95``, ``klom_max``; of U-LiRA, pooled over pairs and models, ``lira_auc``,
        ``lira_accuracy`` and, at 1 % and .1 % of false positives, ``tpr_1`` and ``tpr_01``; ``lira_pair_95``, the 95th
        percentile of the pairs' own AUC; ``epsilon`` (median) and ``epsilon_95``.
    """
    divergence, least = klom(unlearned, oracle), epsilons(unlearned, oracle)
    own, theirs = log_ratios(unlearned, oracle)
    cuts = {name: np.quantile(theirs, 1 - rate) for name, rate in RATES.items()}
    return {
        "klom": float(np.median(divergence)),
        "klom_95": float(np.quantile(divergence, 0.95)),
        "klom_max": float(divergence.max()),
        "lira_auc": float(auc(own.ravel(), theirs.ravel())),
        "lira_accuracy": float(((own > 0).mean() + (theirs <= 0).mean()) / 2),
        **{name: float((own > cut).mean()) for name, cut in cuts.items()},
        "lira_pair_95": float(np.quantile(auc(own, theirs), 0.95)),
        "epsilon": float(np.median(least)),
        "epsilon_95": float(np.quantile(least, 0.95)),
    }


def effect_left(unlearned: np.ndarray, oracle: np.ndarray, direction: np.ndarray, spread: np.ndarray) -> float:
    """Share of what the pairs had meant to the originals that the unlearned models still show.

    The slope of (mean unlearned - mean oracle) on ``direction``, pairs weighted by the inverse variance of a model's
    margin: the most powerful figure against a method that keeps a little of everything.

    Args:
        direction: mean margin of originals minus that of oracles, of others than these, ``[pairs]``.
        spread: standard deviation of a model's margin, ``[pairs]``.
    """
    weight = direction / np.square(spread)
    return float(((unlearned.mean(0) - oracle.mean(0)) * weight).sum() / (direction * weight).sum())
