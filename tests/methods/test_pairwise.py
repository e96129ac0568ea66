"""Score differences of any pairwise model."""

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.loss import BPRLoss

from recbole_unlearn.errors import InputError
from recbole_unlearn.methods.triples import last_epochs, logged_triples, margins


@pytest.mark.parametrize("which", ["task", "graph_task"])
def test_margins_are_differences_of_scores(which, rows, request):
    task = request.getfixturevalue(which)
    model, triples = task.model(), logged_triples(task.log, rows, [0, 1])

    def scores(items):
        pairs = {model.USER_ID: torch.from_numpy(triples.users), model.ITEM_ID: torch.from_numpy(items)}
        return model.predict(Interaction(pairs))

    got = margins(model, triples)
    np.testing.assert_allclose(got.detach(), (scores(triples.pos) - scores(triples.neg)).detach(), rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert model.item_embedding.weight.grad.abs().sum() > 0


def test_recboles_loss_is_put_back_even_after_an_error(task, rows, monkeypatch):
    model, own = task.model(), BPRLoss.forward

    def calculate_loss(batch):
        raise RuntimeError

    monkeypatch.setattr(model, "calculate_loss", calculate_loss)
    with pytest.raises(RuntimeError):
        margins(model, logged_triples(task.log, rows, [0]))
    assert BPRLoss.forward is own


def test_a_model_with_another_loss_is_refused(task, rows, monkeypatch):
    model = task.model()
    monkeypatch.setattr(model, "calculate_loss", lambda batch: model.user_embedding.weight.sum())
    with pytest.raises(InputError, match="no loss of single triples"):
        margins(model, logged_triples(task.log, rows, [0]))


def test_the_last_epochs_are_those_of_the_weights():
    stored = {"triple_log": {"epochs": 4}}
    assert last_epochs(stored, 2).tolist() == [2, 3] and last_epochs(stored, 10).tolist() == [0, 1, 2, 3]
    assert last_epochs(stored, 0).tolist() == [3]
