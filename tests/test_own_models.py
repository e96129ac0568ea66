"""Models of a user's own that do what no class of RecBole's does: forgetting ends where retraining does."""

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL
from recbole.model.general_recommender import BPR
from torch.nn import Embedding, Linear, Parameter

from recbole_unlearn.data.split import Split
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import same_weights
from recbole_unlearn.unlearner import load
from recbole_unlearn.unlearners.base import Change
from recbole_unlearn.unlearners.influence import Influence
from recbole_unlearn.unlearners.replay import Replay


class Plain(BPR):
    """Draws nothing in training, and has no negatives in its loss."""

    def score(self, users, items):
        return (self.user_embedding(users) * self.item_embedding(items)).sum(1)

    def calculate_loss(self, interaction):
        score = self.score(interaction[self.USER_ID], interaction[self.ITEM_ID])
        return self.loss(score, torch.zeros_like(score))


class Remembering(Plain):
    """Keeps what it has seen: visits, a target that follows the weights, a memory, a count of steps, shortened rows."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.visits = Parameter(torch.zeros(self.n_users), requires_grad=False)
        self.target = Embedding(self.n_items, self.embedding_size).requires_grad_(False)
        self.user_embedding.max_norm = 0.1
        self.memory, self.steps = torch.zeros(self.embedding_size), 0

    def score(self, users, items):
        return super().score(users, items) + (self.user_embedding(users) * (self.target(items) + self.memory)).sum(1)

    def calculate_loss(self, interaction):
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        self.steps += 1
        with torch.no_grad():
            self.visits.index_add_(0, users, torch.ones(len(users)))
            self.target.weight.lerp_(self.item_embedding.weight, 0.1)
        loss = super().calculate_loss(interaction) * min(1, self.steps / 50)
        self.memory = self.memory.lerp(self.item_embedding(items).detach().mean(0), 0.5)
        return loss


class Popular(Plain):
    """Its items begin with how often they were taken."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        times = np.bincount(dataset.inter_feat[self.ITEM_ID].numpy(), minlength=self.n_items)
        self.popularity = Parameter(torch.log1p(torch.from_numpy(times)).float())

    def score(self, users, items):
        return super().score(users, items) + self.popularity[items]


class Factored(Plain):
    """Begins with the largest singular vectors of the matrix of interactions."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        users, values, items = np.linalg.svd(dataset.inter_matrix().toarray(), full_matrices=False)
        first = np.sqrt(values[: self.embedding_size])
        for table, vectors in ((self.user_embedding, users), (self.item_embedding, items.T)):
            table.weight.data = torch.from_numpy(vectors[:, : len(first)] * first).float()  # items: not contiguous


class Timed(Plain):
    """Items of a user's history, weighted: under the names that RecBole's SimpleX has."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.history_item_id, times, self.history_item_len = dataset.history_item_matrix("timestamp")
        self.history_item_value = (times - times.min()) / (times.max() - times.min())

    def score(self, users, items):
        taken = self.item_embedding(self.history_item_id[users]) * self.history_item_value[users].unsqueeze(-1)
        return super().score(users, items) + (taken.sum(1) * self.item_embedding(items)).sum(1)


class Counted(Plain):
    """Has the lengths of histories alone."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        *_, self.history_item_len = dataset.history_item_matrix()

    def score(self, users, items):
        return super().score(users, items) / (1 + self.history_item_len[users])


USERS = 38  # ids of the tiny data set


class Crowded(Plain):
    """Everything has as many rows as there are users, by chance."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.tastes, self.biases = Embedding(self.n_users, 8), Parameter(torch.zeros(self.n_users))
        self.items, self.entities, self.relations = (Embedding(USERS, 8) for _ in range(3))
        self.user_positions, self.user_layer = Embedding(USERS, 8), Linear(8, USERS)

    def score(self, users, items):
        user_e, some = self.tastes(users), items % USERS
        near = self.items(some) + self.entities(some) + self.relations(some % 3) + self.user_positions(some % 5)
        return (
            super().score(users, items) + (user_e * near).sum(1) + self.user_layer(user_e).sum(1) + self.biases[users]
        )


class Measured(Plain):
    """Knows its users by something else than the data, and can be built for no others."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.user_embedding.weight.data.copy_(torch.linspace(-1, 1, USERS * 8).view(USERS, 8))
        self.places = Embedding(USERS, 8)

    def score(self, users, items):
        return super().score(users, items) + (self.user_embedding(users) * self.places(items % USERS)).sum(1)


OWN = [Remembering, Popular, Factored, Timed, Counted]


@pytest.fixture
def original(make_config, tmp_path):
    """Function (class, **keys) -> checkpoint of a model trained in the order of its rows: of its seed all follows."""

    def make(model, **keys):
        columns = {"inter": ["user_id", "item_id", "timestamp"]}
        fixed = {"shuffle": False, "epochs": 3, "eval_step": 0, "load_col": columns, "checkpoint_dir": str(tmp_path)}
        config = make_config(model, **{**fixed, **keys})
        train(config, Split.seeded(config), tmp_path / "model.pth")
        return tmp_path / "model.pth"

    return make


def some(split):
    """Rows of many users, all of one and all of an item among them."""
    of = (split.users == split.users[60]) | (split.items == split.items[40])
    return np.union1d(np.arange(0, split.n_rows, 20), np.flatnonzero(of))


@pytest.mark.parametrize("model", OWN)
def test_it_ends_where_training_by_the_seed_without_the_rows_does(original, tmp_path, model):
    """To the last bit, at once and in two requests."""
    path = original(model)
    with load(path, way=Replay(), model=model) as unlearner:
        config, split, rows = unlearner.config, unlearner.split, some(unlearner.split)
        assert unlearner.guard.distance == 0
        retrained, _, _ = train(config, split, tmp_path / "retrained.pth", rows, config["seed"], False)
        assert same_weights(unlearner.unlearn(rows).state_dict, retrained.state_dict())
        for part in (rows[::2], rows[1::2]):
            found = unlearner.forget(rows=part)
            assert found.details["exact"]
        assert same_weights(found.state_dict, retrained.state_dict())
        unlearner.save(tmp_path / "new.pth")
    with load(tmp_path / "new.pth", way=Replay(coupling="fresh"), model=model) as again:
        assert again.forget(count=3).details["exact"]


@pytest.mark.parametrize("coupling", ["paired", "fresh"])
def test_a_model_sees_nothing_of_what_is_forgotten(original, coupling):
    with load(original(Remembering), way=Replay(coupling=coupling), model=Remembering) as unlearner:
        split, rows = unlearner.split, some(unlearner.split)
        visits = unlearner.forget(rows=rows).state_dict["visits"]
    times = np.bincount(np.delete(split.users, rows), minlength=split.n_users)
    assert np.array_equal(visits, 3 * times)


def test_users_who_are_as_new_after_a_step_begin_with_nothing_of_what_they_had(original):
    with load(original(Factored), way=Influence(), model=Factored) as unlearner:
        split = unlearner.split
        found = unlearner.forget(rows=np.flatnonzero(split.users == split.users[60]))
        assert found.details["users_renewed"] == 1
        torch.testing.assert_close(found.state_dict["user_embedding.weight"][split.users[60]], torch.zeros(8))


@pytest.mark.parametrize(
    ("model", "keys", "theirs"),
    [
        (Crowded, {}, {"user_embedding.weight", "tastes.weight", "biases"}),
        (Measured, {}, {"user_embedding.weight"}),
        ("SASRec", {**SEQUENTIAL, "MAX_ITEM_LIST_LENGTH": USERS, "hidden_size": 8, "inner_size": 8}, set()),
    ],
)
def test_what_is_not_the_users_is_not_renewed_with_them(original, model, keys, theirs):
    """However many rows it has; and nothing is drawn from the streams of the process."""
    with load(original(model, **keys), way=Influence(), model=None if keys else model) as unlearner:
        split, problem, before = unlearner.split, unlearner.problem, unlearner.state_dict
        assert split.n_users == USERS
        rows, stream = np.flatnonzero(split.users == split.users[60]), torch.get_rng_state()
        step = torch.zeros(sum(value.numel() for value in unlearner.model.parameters()), dtype=torch.float64)
        after = problem.moved(problem.renewed(rows, Change(step, {})).step)
    assert torch.equal(torch.get_rng_state(), stream)
    for name in before:
        changed = (after[name] != before[name]).view(len(before[name]), -1).any(1)
        assert set(np.flatnonzero(changed)) == ({split.users[60]} if name in theirs else set()), name


def test_a_step_moves_what_is_trained_alone(original):
    """Its gradients are of the model's own loss, which may move the rest of its state."""
    with load(original(Remembering), way=Influence(undone_limit=1e9), model=Remembering) as unlearner:
        before = unlearner.trained.stored["state_dict"]
        after = unlearner.forget(rows=some(unlearner.split)[:20]).state_dict
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and changed <= {"user_embedding.weight", "item_embedding.weight"}
