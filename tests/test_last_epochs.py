"""The last epochs trained again after a step along the training: between the step and exactness."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL

from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.testing import flat
from recbole_unlearn.unlearner import InfluenceUnlearner, load
from recbole_unlearn.unlearners.choose import Auto
from recbole_unlearn.unlearners.influence import Influence
from recbole_unlearn.unlearners.replay import Replay

EPOCHS = 12
GRU4REC = {**SEQUENTIAL, "loss_type": "BPR", "hidden_size": 8, "embedding_size": 8, "dropout_prob": 0.0}


@pytest.fixture(scope="module")
def opened(make_options, tmp_path_factory):
    """An unlearner of a model that was trained for some epochs. No test may change it."""
    folder = tmp_path_factory.mktemp("last")
    keys = make_options(epochs=EPOCHS, eval_step=0, learning_rate=0.01, compare="none", evaluate="none", audit=None)
    run_unlearn("GRU4Rec", "tiny", None, {**keys, **GRU4REC, "forget_count": 5, "output_dir": str(folder / "live")})
    with load(str(folder / "live/model.pth"), way=Influence()) as unlearner:
        yield unlearner


@pytest.fixture(scope="module")
def rows(opened):
    return np.sort(np.random.default_rng(1).choice(opened.split.n_rows, 40, replace=False))


def unlearned(opened, way, rows):
    """Weights, flat, and details of a request."""
    found = InfluenceUnlearner(opened.trained, way).unlearn(rows)
    return flat(found.state_dict), found.details


def test_the_more_epochs_are_trained_the_nearer_the_step_is_to_exactness(opened, rows):
    exact, _ = unlearned(opened, Replay(rows="all"), rows)
    before, left = flat(opened.trained.model.state_dict()), []
    for last in (0, 5, 9):
        weights, details = unlearned(opened, Influence(last_epochs=last), rows)
        assert details.get("last_epochs", 0) <= last and details["stops"][-1] == EPOCHS
        left.append(float((weights - exact).norm() / (exact - before).norm()))
    assert details["last_epochs"] == 9
    assert left[2] < left[1] < left[0] and left[2] < 0.7 * left[0]


def test_auto_trains_as_many_as_there_is_time_for(opened, rows):
    way = Auto(replay=Replay(exact_seconds=0.99 * opened.problem.seconds_again()))
    weights, details = unlearned(opened, way, rows)
    assert 2 <= details["last_epochs"] < EPOCHS / 2 and "exact" not in details  # each is trained twice
    asked, _ = unlearned(opened, Influence(last_epochs=details["last_epochs"]), rows)
    assert torch.equal(weights, asked)
    _, details = unlearned(opened, replace(way, replay=Replay(exact_seconds=0.0)), rows)
    assert "last_epochs" not in details


def test_a_later_request_goes_on_from_there(opened, rows):
    twice = InfluenceUnlearner(opened.trained, Influence(last_epochs=9))
    for part in np.array_split(rows, 2):
        found = twice.forget(rows=part)
        assert found.details["last_epochs"] == 9 and found.snapshots.keys() >= {0, 3, 5, 8}
    exact, _ = unlearned(opened, Replay(rows="all"), rows)
    step, _ = unlearned(opened, Influence(), rows)
    assert (flat(found.state_dict) - exact).norm() < 0.8 * (step - exact).norm()


def test_where_some_parameters_alone_may_change_nothing_is_trained(opened, rows):
    _, details = unlearned(opened, Influence(last_epochs=9, params=("item_embedding.weight",)), rows)
    assert "last_epochs" not in details
