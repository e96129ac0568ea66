"""A model's own training again, with and without some rows: against the model, the log, and replay's kernels."""

import itertools
import os

import numpy as np
import pytest
import torch

from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
from recbole_unlearn.data.orders import BatchOrder
from recbole_unlearn.data.sampling import Played
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Paired
from recbole_unlearn.training.again import recorded, train_paired
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.replay import Replay

NO_ROWS = np.empty(0, np.int64)
ML_100K = {"dataset": "ml-100k", "data_path": None, "epochs": 4, "eval_step": 0}  # RecBole's own copy


def again(task, forgotten, folder):
    """State of the paired run's model, as it is stored."""
    train_paired(task.config, task.split, folder / "paired.pth", task.path, forgotten, task.seed)
    return torch.load(folder / "paired.pth", weights_only=True)["state_dict"]


def flat(state):
    return np.concatenate([state[f"{kind}_embedding.weight"].numpy().ravel() for kind in ("user", "item")])


@pytest.mark.parametrize(
    ("model", "keys"),
    [("BPR", {}), ("BPR", {"negatives": "static", "weight_decay": 1e-3}), ("LightGCN", {"n_layers": 2})],
    ids=["BPR", "static negatives", "LightGCN"],
)
def test_with_nothing_forgotten_it_is_the_training_again_bit_by_bit(make_trained_task, tmp_path, model, keys):
    task = make_trained_task(model, **keys)
    found = again(task, NO_ROWS, tmp_path)
    for name, value in task.stored["state_dict"].items():
        assert torch.equal(found[name], value), name


def test_it_stops_where_the_originals_weights_are_from(make_trained_task, tmp_path):
    """Not where the training ended: this one learns too fast, and is best before its last epoch."""
    negatives = {"distribution": "uniform", "sample_num": 2}
    task = make_trained_task("BPR", learning_rate=1.0, epochs=12, train_neg_sample_args=negatives)
    assert task.stored["triple_log"]["epochs"] < 8
    assert np.array_equal(flat(again(task, NO_ROWS, tmp_path)), flat(task.stored["state_dict"]))


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("BPR", {}),
        ("BPR", {"negatives": "static", "weight_decay": 1e-4}),
        ("LightGCN", {"reg_weight": 0.05}),
        ("LightGCN", {"reg_weight": 0.05, "require_pow": True, "n_layers": 3, "weight_decay": 1e-4}),
        pytest.param("LightGCN", {**ML_100K, "embedding_size": 64, "train_batch_size": 2048}, marks=pytest.mark.slow),
    ],
    ids=["BPR", "static negatives, weight decay", "LightGCN", "LightGCN, squares", "LightGCN, ml-100k"],
)
def test_without_rows_it_ends_where_exact_replay_does(make_trained_task, tmp_path, model, keys):
    """Two ways to the same weights, without a line in common: RecBole with autograd, and our kernels."""
    task = make_trained_task(model, **keys)
    user = np.flatnonzero(task.split.users == task.split.users[60])
    rows = np.union1d(np.arange(0, task.split.n_rows, 50), user)
    found, original = flat(again(task, rows, tmp_path)), flat(task.stored["state_dict"])
    opened = Checkpoint(task.path, task.config, task.stored, task.log).trained(task.split, task.seed)
    result = InfluenceUnlearner(opened, Replay("all")).unlearn(rows)
    assert result.details["exact"]
    ours, moved = flat(result.state_dict) - original, found - original
    assert np.linalg.norm(moved) > 0 and np.linalg.norm(ours - moved) < 1e-3 * np.linalg.norm(moved)
    assert np.corrcoef(ours, moved)[0, 1] > 0.99999


def test_batches_are_those_of_the_epochs(task):
    """And users, items and negatives are those of the rows."""
    split, log = task.split, task.log
    rows = np.flatnonzero(split.users == split.users[60])
    epochs = Paired(recorded(task.config, split, task.stored, log), np.isin(np.arange(log.n_rows), rows))
    played = Played(split.remaining(NO_ROWS, task.seed), epochs, split.data_row)
    for epoch in epochs:
        bounds = iter(itertools.pairwise(epoch.bounds))
        for batch in played:
            own = epoch.order[slice(*next(bounds))]
            users, items = (np.tile(ids[own], log.negatives) for ids in (split.users, split.items))
            expected = users, items, epoch.negatives[own].T.ravel()
            for name, column in zip(("user_id", "item_id", "neg_item_id"), expected, strict=True):
                np.testing.assert_array_equal(batch[name].numpy(), column)
        assert not list(bounds)


def test_an_order_that_nobody_knows_is_refused(task, tmp_path, monkeypatch):
    monkeypatch.setattr(BatchOrder, "__call__", lambda self, epoch: None)
    with pytest.raises(InputError, match="order of batches"):
        again(task, NO_ROWS, tmp_path)


def test_it_is_kept_beside_the_retrained_model_of_the_same_rows(make_options, tmp_path):
    trained = TrainedSeeds(("BPR", "tiny", [], make_options()), tmp_path / "cache", 1)
    runs = [SeedRun(seed, rows, paired=paired) for seed in (3, 4) for rows in ((), (4, 9)) for paired in (False, True)]
    assert len({trained.path(run) for run in [*runs, SeedRun(3, (), True)]}) == len(runs) + 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are pinned on Linux only")
def test_as_many_are_trained_at_once_as_there_are_cores_to_use(make_options, tmp_path):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert TrainedSeeds(("BPR", "tiny", [], make_options()), tmp_path / "cache").processes == 1
    finally:
        os.sched_setaffinity(0, before)
