"""How the forget set ranks: two-sided evidence of forgetting."""

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_unlearn.compat import clear_caches


@torch.no_grad()
def scores(model, users, field, batch=256):
    """Scores of all items for some users, float32 ``[len(users), n_items]``, a batch of users at a time.

    Yields:
        (slice, array): positions in ``users`` and their scores.
    """
    model.eval()
    clear_caches(model)
    for start in range(0, len(users), batch):
        part = slice(start, min(start + batch, len(users)))
        interaction = Interaction({field: torch.as_tensor(users[part])}).to(model.device)
        try:
            batch_scores = model.full_sort_predict(interaction)
        except NotImplementedError:  # models that only score single pairs, such as NeuMF
            pairs = interaction.repeat_interleave(model.n_items)
            items = torch.arange(model.n_items, device=model.device).repeat(len(interaction))
            pairs.update(Interaction({model.ITEM_ID: items}))
            batch_scores = model.predict(pairs)
        yield part, batch_scores.view(part.stop - part.start, -1).cpu().numpy()


def percentiles(model, split, rows):
    """Rank percentile of each forgotten pair among the items that its user never had.

    1 means that the forgotten item scores above all of them, 0.5 is chance. The mean over the pairs is the
    forget-set AUC. Higher than after retraining means not forgotten; lower means over-forgotten, which gives
    the deletion away just as well.

    Args:
        rows: rows of ``split`` (before forgetting).

    Returns:
        float64 ``[len(rows)]``, ties counted half.
    """
    users, items = split.users[rows], split.items[rows]
    result = np.empty(len(rows))
    unique, inverse = np.unique(users, return_inverse=True)
    seen = split.seen()
    for part, batch in scores(model, unique, split.train._dataset.uid_field):
        for position, row_scores in zip(range(part.start, part.stop), batch, strict=True):
            unseen = np.ones(split.n_items, bool)
            unseen[0] = False
            unseen[seen(unique[position])] = False
            others = np.sort(row_scores[unseen])
            pairs = np.flatnonzero(inverse == position)
            own = row_scores[items[pairs]]
            low, high = np.searchsorted(others, own, "left"), np.searchsorted(others, own, "right")
            result[pairs] = (low + high) / 2 / len(others)
    return result


def histogram(ranks, bins=20):
    """Number of percentiles in each of equally wide bins from 0 to 1, as a list."""
    return np.histogram(ranks, bins, (0, 1))[0].tolist()


def verdict(original, unlearned, retrained):
    """One sentence: whether the forget set now looks like the retrained model's.

    The unlearned and the retrained percentiles are compared pair by pair; they look alike if their mean difference
    is within two standard errors. Retraining once more would differ by noise of this kind too.

    Args:
        original, unlearned, retrained: percentiles of the same pairs.

    Returns:
        (str, dict): the sentence, and the figures in it, with ``outcome``: 'alike', 'not yet', 'over-forgotten' or
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
    numbers = f"forget-set AUC {auc[1]:.4f} against {auc[2]:.4f} retrained and {auc[0]:.4f} before"
    if abs(effect) <= noise(original, retrained):
        outcome = "too small"
        text = (
            f"The forget set is too small to tell: {numbers}; even doing nothing would be within two standard errors."
        )
    elif abs(gap) <= bound:
        outcome = "alike"
        text = f"The forget set now looks like the retrained model's: {numbers}."
    elif gap * effect > 0:
        outcome = "not yet"
        text = f"The forget set does not yet look like the retrained model's: {numbers} ({closed:.0%} of the way)."
    else:
        outcome = "over-forgotten"
        text = f"The forget set is over-forgotten compared with the retrained model: {numbers}."
    return text, {**figures, "outcome": outcome}
