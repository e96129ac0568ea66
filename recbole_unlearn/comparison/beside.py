"""Models whose data have another form, judged on what the compared model is judged on.

RecBole's evaluators go through the compared model's own loaders for all models: the same held-out interactions, the
same sampled negatives, the same items left out. What a model is asked with beyond user and item is added here.
"""

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

from recbole_unlearn.devices import array
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.forgetting import percentiles


def beside(name, split, own):
    """Sets the split of another model beside that of the compared one.

    Args:
        name (str): of the other model.
        split (Split): of the compared model.
        own (Split): of the other model.

    Returns:
        Beside

    Raises:
        InputError: the two do not hold the same interactions.
    """
    if own.sequential and not split.sequential:
        return _Histories(name, split, own)
    return (_Features if own.config["MODEL_TYPE"] == ModelType.CONTEXT else Beside)(name, split, own)


class Beside:
    """A model whose rows are those of the compared one.

    Attributes:
        split, own (Split): as for `beside`.
    """

    def __init__(self, name, split, own):
        self.split, self.own = split, own
        parts = ((split.valid, own.valid), (split.test, own.test))
        held_out = all(np.array_equal(_pairs(theirs), _pairs(ours)) for theirs, ours in parts)
        if not (held_out and self._same_rows()):
            raise InputError(f"compare_models: {name} has settings under which RecBole splits the data differently")

    def _same_rows(self):
        return all(self.own.fingerprint[key] == self.split.fingerprint[key] for key in ("users", "items", "rows"))

    def rows(self, rows):
        """Rows of the own split for rows of the compared model's, int64 array."""
        return rows

    def asked(self, model, forgotten=()):
        """A model that answers when it is asked with users and items only.

        Args:
            model: of the own split.
            forgotten: rows of the compared model's split that no history is to hold.
        """
        return model

    def percentiles(self, model, rows):
        """As `forgetting.percentiles`; ``rows`` are those of the compared model's split."""
        return percentiles(self.asked(model), self.split, rows)


class _Features(Beside):
    """A context-aware model."""

    def asked(self, model, forgotten=()):
        return _WithFeatures(model, self.own.test._dataset)


class _Histories(Beside):
    """A sequential model beside one that is none.

    Both are in order of time, and a user's first interaction is the target of no row of a sequential model.
    """

    def _same_rows(self):
        self.number = np.full(self.split.n_rows, -1)
        others = np.delete(np.arange(self.split.n_rows), first_rows(self.split))
        self.number[others] = np.arange(len(others))
        same = [np.array_equal(getattr(self.split, ids)[others], getattr(self.own, ids)) for ids in ("users", "items")]
        names = [self.own.fingerprint[key] == self.split.fingerprint[key] for key in ("users", "items")]
        return all(same + names)

    def rows(self, rows):
        """Without the first interactions."""
        own = self.number[rows]
        return own[own >= 0]

    def asked(self, model, forgotten=()):
        rows = self.rows(np.asarray(forgotten, np.int64))
        return _WithHistories(model, self.own.judged_without(rows).test)

    def percentiles(self, model, rows):
        return percentiles(model, self.own, self.rows(rows), self.split.seen())


def first_rows(split):
    """Row of each user's first training interaction, where the split is in order of time."""
    return np.unique(split.users, return_index=True)[1]


def _pairs(loader):
    """Users and items of held-out interactions, in order: int64 ``[2, n]``."""
    data = loader._dataset
    pairs = np.stack([data.inter_feat[field].numpy() for field in (data.uid_field, data.iid_field)])
    return pairs[:, np.lexsort(pairs[::-1])]


class _Asked(torch.nn.Module):
    """A model and the data that it is asked from."""

    def __init__(self, model, data):
        super().__init__()
        self.model, self.data = model, data
        self.device, self.n_items, self.ITEM_ID = model.device, data.item_num, data.iid_field


class _WithFeatures(_Asked):
    """A model that is asked for pairs, with the features of user and item."""

    def full_sort_predict(self, interaction):
        raise NotImplementedError  # RecBole's trainer asks for all pairs then

    def predict(self, interaction):
        ids = {field: interaction[field].cpu() for field in (self.data.uid_field, self.data.iid_field)}
        return self.model.predict(self.data.join(Interaction(ids)).to(self.device))


class _WithHistories(_Asked):
    """A sequential model that is asked with the histories of a loader that holds one row a user."""

    def __init__(self, model, loader):
        super().__init__(model, loader._dataset)
        self.transform = loader.transform
        users = self.data.inter_feat[self.data.uid_field].numpy()
        self.row = np.full(self.data.user_num, -1)
        self.row[users] = np.arange(len(users))

    def _rows(self, users, items=None):
        rows = self.data.inter_feat[torch.from_numpy(self.row[array(users)])]
        if items is not None:
            rows.update(Interaction({self.ITEM_ID: items.cpu()}))
        return self.transform(self.data, self.data.join(rows)).to(self.device)

    def full_sort_predict(self, interaction):
        return self.model.full_sort_predict(self._rows(interaction[self.data.uid_field]))

    def predict(self, interaction):
        users, items = interaction[self.data.uid_field], interaction[self.ITEM_ID]
        alone, place = torch.unique(users, return_inverse=True)
        try:  # each history goes through the model once, not once a negative
            scores = self.model.full_sort_predict(self._rows(alone)).view(len(alone), -1)
        except NotImplementedError:
            return self.model.predict(self._rows(users, items))
        return scores[place, items]
