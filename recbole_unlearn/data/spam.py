"""Spam to train on and then forget: existing accounts that promote some items.

Shilling attacks are often modelled by new fake users. Here existing accounts are taken over instead: they have real
tastes, ids and sizes of the data set stay, and the unlearned model loads wherever the clean one does.
"""

from typing import TYPE_CHECKING

import numpy as np

from recbole_unlearn.data.forget import rarest
from recbole_unlearn.data.tokens import ids
from recbole_unlearn.errors import InputError

if TYPE_CHECKING:
    from recbole_unlearn.data.split import Split


def draw_spam(split: "Split", accounts: int, promoted: int | list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Interactions between each of some random accounts and each of the promoted items.

    Args:
        split: clean.
        accounts: drawn among the users who have none of the items, in training or held out.
        promoted: number of rarest items, or item tokens.

    Returns:
        Users and items, int64 ``[accounts * items]`` each.

    Raises:
        InputError: unknown item, more rare items than there are, too few users.
    """
    rng = np.random.default_rng(seed)
    items = rarest(split, promoted, rng) if isinstance(promoted, int) else np.unique(ids(split, "item", promoted))
    users, seen = np.unique(split.users), split.seen()
    # a user who had every item would leave RecBole no negative to draw
    room = split.n_items - 1 - len(items)
    free = [user for user in users if not np.isin(items, seen(user)).any() and len(np.unique(seen(user))) < room]
    most = min(len(free), len(users) - 1)
    if accounts > most:
        raise InputError(
            f"forget_spam is {accounts}, but only {most} of {len(users)} users can spread spam: they must have none of "
            "the promoted items yet, and somebody must be left to see them"
        )
    chosen = rng.choice(free, accounts, replace=False)
    return np.repeat(chosen, len(items)), np.tile(items, accounts)
