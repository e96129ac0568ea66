"""What a model drew at random when it was built: histories of users, neighbours in a knowledge graph."""

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.general_recommender import SimpleX
from recbole.model.knowledge_aware_recommender import KGCN, KGNNLS

from recbole_unlearn.devices import array
from recbole_unlearn.influence.objective import distinct


def keep_draws(before: AbstractRecommender, after: AbstractRecommender, dataset: Dataset) -> None:
    """Give a model built on remaining data the draws of the one that it stands for, without what is gone.

    A model that takes at most ``history_len`` items of a user (SimpleX) draws them anew whenever it is built, and two
    builds differ in most users' losses, whatever was forgotten. Here what was drawn stays, and what is gone makes room
    for items that only the new model has drawn.

    A class of the user's own is left as it is: what it has under the same names may be something else.

    Args:
        before: model on more data.
        after: model on ``dataset``, changed in place; models without draws are left as they are.
        dataset: RecBole data set.
    """
    if type(before) in (KGCN, KGNNLS):
        for name in ("adj_entity", "adj_relation"):  # of the knowledge graph, which stays
            setattr(after, name, getattr(before, name))
    if type(before) is not SimpleX:
        return
    assert isinstance(after, SimpleX)
    drawn, fresh = (array(model.history_item_id) for model in (before, after))
    users, items = (dataset.inter_feat[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
    pairs = distinct(users * dataset.item_num + items)
    keys = np.arange(len(drawn))[:, None] * dataset.item_num + drawn
    left = (drawn > 0) & np.isin(keys, pairs)
    histories = np.zeros_like(fresh)
    for user, length in enumerate(after.history_item_len.tolist()):
        kept = drawn[user][left[user]]
        new = np.setdiff1d(fresh[user, :length], kept)
        kept = np.concatenate([kept, new])[:length]
        histories[user, : len(kept)] = kept
    device = after.history_item_id.device
    after.history_item_id = torch.from_numpy(histories).to(device)
    after.history_item_len = torch.from_numpy(np.count_nonzero(histories, axis=1)).to(device)
