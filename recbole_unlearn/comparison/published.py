"""UBPR's published figures, and sentences about ours beside them; every one is computed from the figures."""

import numpy as np

from recbole_unlearn.comparison.figures import ORIGINAL, RETRAIN

PROTOCOL = "uni99"
METRICS = ("hit@10", "ndcg@10")
# HR@10 and NDCG@10 of Table 3, in the order of the ratios .010, .015, .020, .025, .030, .035 %.
PUBLISHED = {
    "ml-1m": {
        "original": ((0.643,) * 6, (0.369,) * 6),
        "retrain": ((0.627, 0.623, 0.619, 0.623, 0.616, 0.615), (0.353, 0.354, 0.354, 0.355, 0.352, 0.351)),
        "sisa": ((0.598, 0.594, 0.595, 0.595, 0.595, 0.594), (0.334, 0.333, 0.334, 0.335, 0.335, 0.333)),
        "receraser": ((0.607, 0.606, 0.609, 0.609, 0.607, 0.600), (0.342, 0.340, 0.344, 0.341, 0.340, 0.337)),
        "ubpr": ((0.630, 0.625, 0.621, 0.619, 0.616, 0.614), (0.356, 0.352, 0.348, 0.345, 0.340, 0.333)),
    },
    "pinterest": {
        "original": ((0.839,) * 6, (0.510,) * 6),
        "retrain": ((0.839, 0.836, 0.838, 0.838, 0.838, 0.838), (0.506, 0.506, 0.506, 0.507, 0.506, 0.507)),
        "sisa": ((0.810, 0.811, 0.809, 0.808, 0.810, 0.809), (0.480, 0.480, 0.479, 0.478, 0.480, 0.479)),
        "receraser": ((0.838, 0.839, 0.839, 0.839, 0.838, 0.837), (0.508, 0.507, 0.508, 0.507, 0.507, 0.506)),
        "ubpr": ((0.838, 0.837, 0.837, 0.836, 0.836, 0.836), (0.508, 0.507, 0.507, 0.507, 0.506, 0.505)),
    },
}
SIZES = {"ml-1m": (6_040, 994_169), "pinterest": (55_187, 1_445_622)}  # the paper's users and training interactions
OTHERS = ("sisa", "receraser")  # whom the paper compares UBPR with


def sentences(results, summaries, dataset=None, size=None):
    """Paragraphs on a comparison over the paper's ratios.

    Args:
        results (dict): of `recbole_unlearn.comparison.figures.Comparison.run`.
        summaries (dict): ratio -> `recbole_unlearn.comparison.figures.summary` of it.
        dataset (str, optional): key of `PUBLISHED`, to write of the paper's figures too.
        size (pair of int, optional): users and training interactions of the run, with ``dataset``.
    """
    distances = from_retrain(summaries)
    ours, others = ([name for name in names if name in distances] for names in (("ubpr", "ours"), OTHERS))
    paragraphs = []
    if ours and others:
        ndcg, auc, _ = distances[ORIGINAL]
        scale = f"The original, which forgets nothing, is {ndcg:.4f} and {auc:.4f} from Retrain."
        paragraphs.append(" ".join([*(_beside_others(distances, name, others) for name in ours), scale]))
    if "ubpr" in distances:
        paragraphs.append(_solves(results))
    if dataset:
        paragraphs += [_beside_the_paper(dataset, summaries), _known(dataset, results, size)]
    return paragraphs


def from_retrain(summaries):
    """Mean over ratios: name -> (distance to Retrain in NDCG@10, in forget-set AUC, times as fast; None: original)."""
    result, keys = {}, (f"ndcg@10|{PROTOCOL}", "forget_auc")
    for name in next(iter(summaries.values())):
        if name != RETRAIN:
            cells = [figures[name] for figures in summaries.values()]
            far = (np.mean([abs(cell[key]["delta"]) for cell in cells]) for key in keys)
            speed = None if name == ORIGINAL else np.mean([cell["speed_up"]["mean"] for cell in cells])
            result[name] = (*far, speed)
    return result


def _beside_others(distances, name, others):
    """Whether a method is nearer to Retrain than the paper's others, and faster."""
    parts = []
    for place, word, form in (
        (0, "nearer to Retrain in NDCG@10", ".4f"),
        (1, "nearer in forget-set AUC", ".4f"),
        (2, "faster", ".3g"),
    ):
        own, sign = distances[name][place], -1 if word == "faster" else 1
        won = [other for other in others if sign * own < sign * distances[other][place]]
        lost = [other for other in others if other not in won]
        text = f"{word} than {' and '.join(won)}" if won else f"not {word} than {' and '.join(lost)}"
        text += f", not than {' and '.join(lost)}" if won and lost else ""
        parts.append(f"{text} ({own:{form}} against {' and '.join(f'{distances[o][place]:{form}}' for o in others)})")
    return f"{name} is {'; '.join(parts)}."


def _solves(results):
    details = [run["details"] for each in results["sets"].values() for run in each["figures"]["ubpr"]]
    residuals = [each["residual"] for each in details]
    return (
        f"Of ubpr's {len(details)} solves, conjugate gradient did not converge in "
        f"{sum(not each['converged'] for each in details)} and stopped at a direction of negative curvature in "
        f"{sum(each['negative_curvature'] for each in details)}; relative residuals {min(residuals):.2g} to "
        f"{max(residuals):.2g} where {results['settings']['ubpr']['cg_tolerance']} was asked for."
    )


def _beside_the_paper(dataset, summaries):
    paper = PUBLISHED[dataset]
    own = {
        name: [[row[name][f"{metric}|{PROTOCOL}"]["mean"] for row in summaries.values()] for metric in METRICS]
        for name in paper
        if name in next(iter(summaries.values()))
    }
    parts = [f"{name} {_mean_difference(values, paper[name])}" for name, values in own.items()]
    return (
        f"Our figures minus the paper's, mean over the ratios, in HR@10 and NDCG@10: {'; '.join(parts)}. The paper's "
        f"original minus its Retrain: {_mean_difference(paper[ORIGINAL], paper[RETRAIN])}; here: "
        f"{_mean_difference(own[ORIGINAL], own[RETRAIN])}."
    )


def _mean_difference(first, second):
    return ", ".join(f"{each:+.4f}" for each in np.mean(np.subtract(first, second), axis=1))


def _known(dataset, results, size):
    (users, interactions), (own_users, own_interactions) = SIZES[dataset], size
    epochs = [run["details"]["epochs"] for each in results["sets"].values() for run in each["figures"][RETRAIN]]
    return (
        f"What is known to differ, without how much each matters: the paper trains on {interactions:,} interactions of "
        f"{users:,} users, all but one a user, with no other data to pick the best epoch on than that one. Here they "
        f"are {own_interactions:,} of {own_users:,} users; of the two a user that paper.yaml holds out, one picks the "
        "best epoch, in full ranking, and the other is measured (best epoch of the retrained models: "
        f"{min(epochs)} to {max(epochs)}). The paper's code is not public; RecEraser is built here from its own paper, "
        "with centroids per dimension where its published code takes a scalar mean, and with the settings below, which "
        "suit 8 dimensions better than its own ([docs](../docs/shards.md))."
    )
