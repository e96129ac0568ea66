"""The last epochs trained again after a step along the training: between the step and exactness."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL

from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.testing import flat
from recbole_unlearn.unlearner import InfluenceUnlearner, load
from recbole_unlearn.unlearners.choose import Auto
from recbole_unlearn.unlearners.influence import Influence
from recbole_unlearn.unlearners.replay import Replay

EPOCHS = 12
GRU4REC = {**SEQUENTIAL, "loss_type": "BPR", "hidden_size": 8, "embedding_size": 8, "dropout_prob": 0.0}


@pytest.fixture(scope="module")
def trained(make_options, tmp_path_factory):
    """Function: path of a model that was trained for some epochs, with other keys than `GRU4REC`."""

    def train(**others):
        folder = tmp_path_factory.mktemp("last")
        keys = make_options(epochs=EPOCHS, eval_step=0, learning_rate=0.01, compare="none", evaluate="none", audit=None)
        keys |= {**GRU4REC, **others, "forget_count": 5, "output_dir": str(folder / "live")}
        run_unlearn("GRU4Rec", "tiny", None, keys)
        return str(folder / "live/model.pth")

    return train


@pytest.fixture(scope="module")
def opened(trained):
    """An unlearner of such a model. No test may change it."""
    with load(trained(), way=Influence()) as unlearner:
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


def test_dropout_has_the_masks_that_it_had(trained, rows):
    with load(trained(dropout_prob=0.5), way=Influence()) as opened:
        exact, _ = unlearned(opened, Replay(rows="all"), rows)
        theirs, _ = unlearned(opened, Influence(last_epochs=9), rows)
        with patch.object(TripleLog, "torch_stream", return_value=None):
            others, _ = unlearned(opened, Influence(last_epochs=9), rows)
        assert (theirs - exact).norm() < 0.8 * (others - exact).norm()


def test_a_purge_keeps_nothing_that_the_seed_follows_from(trained, tmp_path):
    path = trained(dropout_prob=0.5)
    way = {"checkpoint": path, "method": "influence", "forget_count": 5, "compare": "none", "evaluate": "none"}
    for purge in False, True:
        run_unlearn(config_dict={**way, "purge": purge, "output_dir": str(tmp_path / str(purge))})
        left = list((tmp_path / str(purge) / "unlearned.triples").glob("torch-*.npy"))
        assert bool(left) != purge
