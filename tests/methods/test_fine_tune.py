"""Fine-tuning sees the remaining interactions only."""

import numpy as np
import pytest
import torch


@pytest.fixture
def seen(task, monkeypatch):
    """(user, positive, negative) of every triple that is trained on."""
    triples, own = set(), task.config.model_class.calculate_loss

    def calculate_loss(self, batch):
        columns = (batch[self.USER_ID], batch[self.ITEM_ID], batch[self.NEG_ITEM_ID])
        triples.update(zip(*(column.tolist() for column in columns), strict=True))
        return own(self, batch)

    monkeypatch.setattr(task.config.model_class, "calculate_loss", calculate_loss)
    return triples


def test_no_forgotten_pair_is_a_positive_and_forgotten_items_come_back_as_negatives(task, rows, run, seen):
    run("fine_tune", task, rows, epochs=8)
    split = task.split
    forgotten = set(zip(split.users[rows].tolist(), split.items[rows].tolist(), strict=True))
    kept = np.delete(np.arange(split.n_rows), rows)
    remaining = set(zip(split.users[kept].tolist(), split.items[kept].tolist(), strict=True))
    assert {(user, item) for user, item, _ in seen} == remaining
    assert forgotten & {(user, item) for user, _, item in seen}


def test_without_epochs_nothing_changes(task, rows, run):
    before, after = task.model().state_dict(), run("fine_tune", task, rows, epochs=0).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_optimiser_goes_on_where_training_ended(task, rows, run, monkeypatch):
    steps = []
    own = torch.optim.Adam.step

    def step(self, *args):
        result = own(self, *args)
        steps.append(int(self.state[self.param_groups[0]["params"][0]]["step"]))
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    run("fine_tune", task, rows, epochs=1)
    assert steps[0] == int(task.stored["optimizer"]["state"][0]["step"]) + 1
