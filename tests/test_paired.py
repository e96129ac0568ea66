"""A model's own training again, with and without some rows: against the model, the log, and replay's kernels."""

import os

import numpy as np
import pytest
import torch

from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
from recbole_unlearn.data.sampling import BatchOrder, Played
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.propagated_training import GraphLoss, PropagatedTraining
from recbole_unlearn.influence.recorded import Adam, Recorded, Trajectory
from recbole_unlearn.influence.replay import replay
from recbole_unlearn.training import new_model, train_paired

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
    task = make_trained_task("BPR", learning_rate=1.0, epochs=12)
    assert task.stored["triple_log"]["epochs"] < 8
    assert np.array_equal(flat(again(task, NO_ROWS, tmp_path)), flat(task.stored["state_dict"]))


def test_without_rows_it_ends_where_replay_of_all_rows_does(task, make_model, tmp_path):
    """Two ways to the same weights, without a line in common: RecBole with autograd, and our kernels."""
    split, log, config = task.split, task.log, task.config
    batch_rows = config["train_batch_size"] // log.negatives
    rows = np.random.default_rng(5).choice(split.n_rows, 7, replace=False)
    assert (split.n_rows - len(rows) - 1) // batch_rows == (split.n_rows - 1) // batch_rows  # as many batches
    found, original = flat(again(task, rows, tmp_path)), flat(task.stored["state_dict"])
    start = flat(make_model(split, task.seed).state_dict())
    absent = np.zeros(split.n_rows, bool)
    absent[rows] = True
    group, epochs = task.stored["optimizer"]["param_groups"][0], task.stored["triple_log"]["epochs"]
    recorded = Recorded(
        log.users, log.items, [log.epoch(epoch) for epoch in range(epochs)], split.n_users, split.n_items,
        Adam(group["lr"], *group["betas"], group["eps"], group["weight_decay"]), batch_rows * log.negatives,
        absent=absent, steps=BatchOrder(log.order, split.data_row, batch_rows).steps,
    )  # fmt: skip
    replayed = replay(recorded, Trajectory([0, epochs], [start, original]), NO_ROWS, all_rows=True)
    moved = np.linalg.norm(found - original)
    assert np.linalg.norm(found - replayed.without.ravel()) < 1e-3 * moved
    assert 0 < moved < np.linalg.norm(original - start)


def compiled(task, forgotten):
    """`PropagatedTraining` of a LightGCN task as `train_paired` trains it; (initial weights, the training)."""
    split, log, config = task.split, task.log, task.config
    group = task.stored["optimizer"]["param_groups"][0]
    adam = Adam(group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    loss = GraphLoss(config["n_layers"], config["reg_weight"], config["require_pow"])
    model = new_model(config, split, task.seed)
    start = np.concatenate([model.user_embedding.weight.detach(), model.item_embedding.weight.detach()])
    left = np.delete(np.arange(split.n_rows), forgotten)
    graph = Graph(log.users[left], log.items[left], split.n_users, split.n_items, loss.layers)
    training = PropagatedTraining(graph, start, adam, loss, split.n_users)
    batches = BatchOrder(log.order, split.data_row, config["train_batch_size"] // log.negatives)
    for epoch in range(task.stored["triple_log"]["epochs"]):
        step = batches.steps(epoch)
        order = left[np.argsort(step[left], kind="stable")]
        bounds = np.searchsorted(step[order], np.arange(step.max() + 2))
        rates = np.full(len(bounds) - 1, adam.lr)
        training.epoch(log.users, log.items, log.epoch(epoch), order, bounds, rates)
    return start, training


@pytest.mark.parametrize(
    "keys",
    [
        {"reg_weight": 0.05},
        {"reg_weight": 0.05, "require_pow": True, "n_layers": 3, "weight_decay": 1e-4},
        pytest.param({**ML_100K, "embedding_size": 64, "train_batch_size": 2048}, marks=pytest.mark.slow),
    ],
    ids=["norms", "squares", "ml-100k"],
)
def test_compiled_lightgcn_is_recboles_without_the_rows(make_trained_task, tmp_path, keys):
    task = make_trained_task("LightGCN", **keys)
    user = np.flatnonzero(task.split.users == task.split.users[60])
    for rows in (NO_ROWS, np.union1d(np.arange(0, task.split.n_rows, 50), user)):
        expected = flat(again(task, rows, tmp_path))
        start, training = compiled(task, rows)
        moved, found = expected - start.ravel(), training.W.ravel() - start.ravel()
        assert np.linalg.norm(found - moved) < 1e-3 * np.linalg.norm(moved)
        assert np.corrcoef(found, moved)[0, 1] > 0.9999


def test_batches_are_those_of_the_log_without_the_rows(task):
    split, log = task.split, task.log
    rows = np.flatnonzero(split.users == split.users[60])
    played = Played(split.remaining(NO_ROWS, task.seed), log, split.data_row, rows)
    order = BatchOrder(log.order, split.data_row, task.config["train_batch_size"] // log.negatives)
    kept = np.delete(np.arange(split.n_rows), rows)
    for epoch in range(2):
        steps, negatives = order.steps(epoch), log.epoch(epoch)
        for number, batch in enumerate(played):
            own = kept[steps[kept] == number]
            expected = np.stack(
                [np.repeat(split.users[own], 2), np.repeat(split.items[own], 2), negatives[own].ravel()]
            )
            columns = [batch[name].numpy() for name in ("user_id", "item_id", "neg_item_id")]
            assert sorted(zip(*columns, strict=True)) == sorted(zip(*expected, strict=True))
        assert number == steps.max()


def test_a_batch_of_which_nothing_is_left_is_passed_over(task):
    split = task.split
    played = Played(split.remaining(NO_ROWS, task.seed), task.log, split.data_row, np.arange(3, split.n_rows))
    sizes = [len(batch["user_id"]) for batch in played]
    assert sum(sizes) == 3 * task.log.negatives and min(sizes) > 0


def test_other_batches_than_the_logs_are_refused(task):
    split = task.split
    with pytest.raises(InputError, match="epoch 0 are not those"):
        list(Played(split.remaining(NO_ROWS, task.seed + 1), task.log, split.data_row, NO_ROWS))


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
