"""How the forget set ranks: two-sided evidence of forgetting."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.compat.recbole_models import clear_caches
from recbole_unlearn.data.split import Split
from recbole_unlearn.devices import array
from recbole_unlearn.evaluation.ranking import check_scores
from recbole_unlearn.evaluation.ranks import DEFAULT_BATCH
from recbole_unlearn.models.losses import fixed_randomness


@torch.no_grad()
def scores(
    model: AbstractRecommender, users: np.ndarray, field: str, batch: int = 256
) -> Iterator[tuple[slice, np.ndarray]]:
    """Scores of all items for some users, float32 ``[len(users), n_items]``, a batch of users at a time.

    Yields:
        (slice, array): positions in ``users`` and their scores.
    """
    yield from query_scores(model, Interaction({field: torch.as_tensor(users)}), batch)


@torch.no_grad()
def query_scores(
    model: AbstractRecommender, queries: Interaction, batch: int = 256
) -> Iterator[tuple[slice, np.ndarray]]:
    """As `scores`, for an Interaction of users (with their histories, for sequential models).

    Raises:
        InputError: scores that are not finite.
    """
    model.eval()
    clear_caches(model)
    for start in range(0, len(queries), batch):
        part = slice(start, min(start + batch, len(queries)))
        interaction = queries[part].to(model.device)
        with fixed_randomness(0):
            try:
                found = model.full_sort_predict(interaction)
            except NotImplementedError:  # some models score pairs only
                found = _by_pairs(model, interaction)
        found = found.reshape(part.stop - part.start, -1)
        check_scores(found[:, 1:].abs())  # nobody looks at padding's
        yield part, array(found)


def _by_pairs(model, interaction):
    """Scores ``[users, n_items]`` of a model without ``full_sort_predict``."""
    rows, step = [], max(DEFAULT_BATCH // model.n_items, 1)
    for start in range(0, len(interaction), step):
        some = interaction[start : start + step]
        each = some.repeat_interleave(model.n_items)
        each.update(Interaction({model.ITEM_ID: torch.arange(model.n_items, device=model.device).repeat(len(some))}))
        rows.append(model.predict(each).view(len(some), -1))
    return torch.cat(rows)


def percentiles(
    model: AbstractRecommender, split: Split, rows: np.ndarray, seen: Callable[[int], np.ndarray] | None = None
) -> np.ndarray:
    """Rank percentile of each forgotten pair among the items that its user never had.

    1 means that the forgotten item scores above all of them, 0.5 is chance. The mean over the pairs is the
    forget-set AUC. Higher than after retraining means not forgotten; lower means over-forgotten, which gives
    the deletion away just as well. A sequential model is asked for what followed the history before the pair,
    without what is forgotten.

    Args:
        rows: rows of ``split`` (before forgetting).
        seen: items that each user had, as `Split.seen` returns it; default: those of ``split``.

    Returns:
        float64 ``[len(rows)]``, ties counted half.
    """
    users, items = split.users[rows], split.items[rows]
    return _percentiles(model, split, split.queries(rows), users, items, seen)


def held_out_percentiles(model: AbstractRecommender, split: Split) -> np.ndarray:
    """As `percentiles`, of the validation interactions: where pairs rank that the model was not trained on."""
    data = split.valid._dataset
    users, items = (data.inter_feat[field].numpy() for field in (data.uid_field, data.iid_field))
    return _percentiles(model, split, data.inter_feat, users, items)


def _percentiles(model, split, queries, users, items, seen=None):
    """Of pairs, each with its query; those of a user are one, but where each has its own history."""
    if split.sequential:
        asked = inverse = np.arange(len(users))
    else:
        _, asked, inverse = np.unique(users, return_index=True, return_inverse=True)
    result, seen = np.empty(len(users)), seen or split.seen()
    for part, batch in query_scores(model, queries[asked]):
        for position, row_scores in zip(range(part.start, part.stop), batch, strict=True):
            unseen = np.ones(split.n_items, bool)
            unseen[0] = False
            unseen[seen(users[asked[position]])] = False
            others = np.sort(row_scores[: split.n_items][unseen])
            pairs = np.flatnonzero(inverse == position)
            result[pairs] = rank_percentile(others, row_scores[items[pairs]])
    return result


def rank_percentile(others: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Share of sorted scores that are below each of some, ties counted half."""
    return (np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")) / 2 / len(others)


def histogram(ranks: np.ndarray, bins: int = 20) -> list[int]:
    """Number of percentiles in each of equally wide bins from 0 to 1."""
    return np.histogram(ranks, bins, (0, 1))[0].tolist()


def paired(
    original: np.ndarray, unlearned: np.ndarray, trained: np.ndarray, way: float | None, distance: float
) -> dict[str, Any]:
    """How near forgetting came to paired training.

    Args:
        original, unlearned, trained: percentiles of the same pairs, ``trained`` those of the paired training.
        way: from the original to it that the unlearned model went, by forget-set AUC; None: it did not move.
        distance: of the unlearned model's weights from those of it, over the original's.

    Returns:
        ``way``, ``distance``, ``correlation`` of the percentiles' changes (None where there are none), ``sentence``.
    """
    changes = unlearned - original, trained - original
    alike = float(np.corrcoef(*changes)[0, 1]) if len(original) > 1 and all(map(np.ptp, changes)) else None
    went = (
        "there was no way to go" if way is None else f"the unlearned model went {way:.0%} of the way (forget-set AUC)"
    )
    changed = "" if alike is None else f", the interactions' changes correlate by {alike:.2f}"
    sentence = (
        "The retrained model is the paired one: the model's own trainer trained again without the forget set, by the "
        f"original's random numbers as far as they fit. From the original to it {went}{changed}; "
        f"the weights end {distance:.1e} of the way's length from it."
    )
    return {"way": way, "distance": distance, "correlation": alike, "sentence": sentence}


def verdict(
    original: np.ndarray, unlearned: np.ndarray, retrained: np.ndarray, word: str = "retrained"
) -> tuple[str, dict[str, Any]]:
    """One sentence: whether the forget set now looks like the retrained model's.

    The unlearned and the retrained percentiles are compared pair by pair; they look alike if their mean difference
    is within two standard errors. Retraining once more would differ by noise of this kind too.

    Args:
        original, unlearned, retrained: percentiles of the same pairs.
        word: for the retrained model.

    Returns:
        The sentence, and the figures in it, with ``outcome``: 'alike', 'not yet', 'over-forgotten' or
        'too small'.
    """
    auc = [float(np.mean(x)) for x in (original, unlearned, retrained)]

    def noise(a, b):
        return 2 * float(np.std(a - b, ddof=1)) / np.sqrt(len(a)) if len(a) > 1 else float("inf")

    gap, effect = auc[1] - auc[2], auc[0] - auc[2]
    bound = noise(unlearned, retrained)
    closed = 1 - gap / effect if effect else float("nan")
    figures = {
        "gap": gap,
        "gap_bound": bound if np.isfinite(bound) else None,
        "effect": effect,
        "gap_closed": closed if np.isfinite(closed) else None,
    }
    numbers = f"forget-set AUC {auc[1]:.4f} against {auc[2]:.4f} {word} and {auc[0]:.4f} before"
    if abs(effect) <= noise(original, retrained):
        outcome = "too small"
        text = (
            f"The forget set is too small to tell: {numbers}; even doing nothing would be within two standard errors."
        )
    elif abs(gap) <= bound:
        outcome = "alike"
        text = f"The forget set now looks like the {word} model's: {numbers}."
    elif gap * effect > 0:
        outcome = "not yet"
        text = f"The forget set does not yet look like the {word} model's: {numbers} ({closed:.0%} of the way)."
    else:
        outcome = "over-forgotten"
        text = f"The forget set is over-forgotten compared with the {word} model: {numbers}."
    return text, {**figures, "outcome": outcome}
