"""The last epochs trained again after a step along the training: between the step and exactness."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL

from recbole_unlearn.influence.coupling import Paired
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.testing import flat
from recbole_unlearn.training.again import Beginning, Onward, trained_again
from recbole_unlearn.unlearner import InfluenceUnlearner, load
from recbole_unlearn.unlearners.choose import Auto
from recbole_unlearn.unlearners.influence import Influence
from recbole_unlearn.unlearners.replay import Replay

EPOCHS = 12
NPE = {**SEQUENTIAL, "loss_type": "BPR", "embedding_size": 8, "dropout_prob": 0.0, "train_batch_size": 256}


@pytest.fixture(scope="module")
def trained(make_options, tmp_path_factory):
    """Function: path of a model that was trained for some epochs, with other keys than `NPE`."""

    def train(**others):
        folder = tmp_path_factory.mktemp("last")
        keys = make_options(epochs=EPOCHS, eval_step=0, learning_rate=0.02, compare="none", evaluate="none", audit=None)
        keys |= {**NPE, **others, "forget_count": 5, "output_dir": str(folder / "live")}
        run_unlearn("NPE", "tiny", None, keys)
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


def test_a_training_that_is_taken_up_where_it_was_ends_where_it_did(trained):
    """With the masks of dropout that it had: torch's streams are kept with the snapshots."""
    with load(trained(dropout_prob=0.5), way=Influence()) as opened, load(trained(dropout_prob=0.5, epochs=5)) as half:
        whole, log = opened.trained, opened.trained.log
        ends = []
        for stream in log.torch_stream(5), None:
            then = Onward(5, half.trained.stored["state_dict"], half.trained.optimizer, stream)
            beginning = replace(Beginning.of(whole.seed, whole.stored, log), onward=then)
            epochs = Paired(whole.recorded(), np.zeros(log.n_rows, bool))
            ends.append(flat(trained_again(opened.config, opened.split, epochs, beginning).trainer.model.state_dict()))
        assert torch.equal(ends[0], flat(whole.model.state_dict())) and not torch.equal(*ends)


def test_a_purge_keeps_nothing_that_the_seed_follows_from(trained, tmp_path):
    path = trained(dropout_prob=0.5)
    way = {"checkpoint": path, "method": "influence", "forget_count": 5, "compare": "none", "evaluate": "none"}
    for purge in False, True:
        run_unlearn(config_dict={**way, "purge": purge, "output_dir": str(tmp_path / str(purge))})
        left = list((tmp_path / str(purge) / "unlearned.triples").glob("torch-*.npy"))
        assert bool(left) != purge
