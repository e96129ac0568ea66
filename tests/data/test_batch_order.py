"""The order of batches is not stored: it is drawn again, and a checksum says whether it is the one of training."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from logs import without

from recbole_unlearn.data import orders, sampling
from recbole_unlearn.data.orders import BatchOrder, permutation
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Paired
from recbole_unlearn.influence.newton import flat
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearners.dot_product import DotProduct

BATCH = 97


@pytest.fixture(scope="module", params=[1, 3], ids=["one negative", "three negatives"])
def trained(request, make_split, tmp_path_factory):
    """A split, the checkpoint of a model trained on it, and for each epoch the (user, item) pairs of each batch."""
    negatives = {"distribution": "uniform", "sample_num": request.param, "alpha": 1.0}
    split = make_split(train_neg_sample_args=negatives, train_batch_size=BATCH, epochs=4)
    path = tmp_path_factory.mktemp("order") / "model.pth"
    seen = []
    original = sampling.PairwiseCollate.__call__

    def recorded(self, index):
        batch = original(self, index)
        rows = len(index)
        seen.append(list(zip(batch["user_id"][:rows].tolist(), batch["item_id"][:rows].tolist(), strict=True)))
        return batch

    sampling.PairwiseCollate.__call__ = recorded
    try:
        train(split.config, split, path)
    finally:
        sampling.PairwiseCollate.__call__ = original
    return split, path, seen


def order_of(split, log):
    return BatchOrder(log, split.data_row, max(BATCH // log.negatives, 1))


@pytest.mark.parametrize("held", [orders.HELD, 0], ids=["held", "drawn anew"])
def test_the_batches_are_those_that_the_model_was_trained_on(trained, held, monkeypatch):
    monkeypatch.setattr(orders, "HELD", held)
    split, path, seen = trained
    log = TripleLog.open(log_path(path))
    order = order_of(split, log)
    pairs = list(zip(split.users.tolist(), split.items.tolist(), strict=True))
    per_epoch = -(-split.n_rows // max(BATCH // log.negatives, 1))
    for epoch in [*range(log.n_epochs), 1, 0]:  # forwards, and back again
        found = [pairs[row] for row in order(epoch)]
        assert found == list(itertools.chain(*seen[epoch * per_epoch : (epoch + 1) * per_epoch]))


def test_an_order_that_is_not_the_recorded_one_is_not_used(trained):
    split, path, _ = trained
    log = TripleLog.open(log_path(path))
    batch_rows = max(BATCH // log.negatives, 1)
    assert BatchOrder(log, split.data_row, batch_rows)(0) is not None
    assert BatchOrder(log, split.data_row[::-1], batch_rows)(0) is None
    assert BatchOrder(log, split.data_row, batch_rows + 1)(0) is None
    log.metadata["order"] = [None] * log.n_epochs
    assert BatchOrder(log, split.data_row, batch_rows)(0) is None


def test_training_again_without_forgetting_anything_ends_in_the_weights(trained):
    """From the very same start, up to rounding; an order of its own ends somewhere else."""
    split, path, _ = trained
    problem = DotProduct(Checkpoint.written(path, split.config).trained(split))
    known, _ = problem.reproduction()
    end, start = flat(problem.P, problem.Q).numpy(), problem.snapshots[0].reshape(-1, problem.P.shape[1])
    another = problem.training(start, ~problem.absent)
    mixed = Paired(replace(problem.recorded, order=None), problem.absent)
    for epoch in mixed:
        another.epoch(problem.log.users, problem.log.items, epoch)
    away = np.linalg.norm(another.W.ravel() - end) / np.linalg.norm(end - start.ravel())
    assert start.dtype == np.float32 and known < 1e-4 < 1e-2 < away


def test_the_log_of_a_training_without_rows_tells_its_batches(trained, tmp_path):
    split, path, _ = trained
    log, gone = TripleLog.open(log_path(path)), [3, 5]
    opened = Checkpoint.written(path, split.config).trained(split)
    epochs = Paired(opened.recorded(), np.isin(np.arange(log.n_rows), gone))
    write = log.without, gone, tmp_path / "copy.triples", "run-2", split.fingerprint_without(gone), epochs
    copy = write[0](*write[1:])
    size, position = max(BATCH // log.negatives, 1), np.cumsum(epochs.kept) - 1
    order = BatchOrder(copy, np.arange(copy.n_rows), size)
    for number, epoch in enumerate(epochs):
        batches = [set(order(number)[start : start + size]) for start in range(0, copy.n_rows, size)]
        expected = [set(position[epoch.order[start : start + size]]) for start in range(0, copy.n_rows, size)]
        assert batches == expected and (order(number) == order(number)).all()
    assert copy.order == [None] * log.n_epochs
    hidden = log.without(gone, tmp_path / "hidden.triples", "run-3", write[4], epochs, ordered=False)
    assert [hidden.steps(number) for number in range(log.n_epochs)] == [None] * log.n_epochs
    assert order_of(split, copy) and BatchOrder(hidden, np.arange(hidden.n_rows), size)(0) is None


@pytest.mark.parametrize("entry", ["no", [], [1, 2, 3, 4], [2020, -1, 3], [2020, 10**9, 3], [2020, 0.5, 3]])
def test_metadata_with_a_bad_order_is_refused(trained, tmp_path, entry):
    _, path, _ = trained
    log = without(TripleLog.open(log_path(path)), [0], tmp_path / "bad.triples", "run-3", {})
    for order in ([entry] * log.n_epochs, [None] * (log.n_epochs + 1)):
        (log.path / "metadata.json").write_text(json.dumps({**log.metadata, "order": order}))
        with pytest.raises(InputError, match="damaged"):
            TripleLog.open(log.path)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 4097, 100_000])
def test_a_permutation_is_torchs_and_leaves_the_generator_as_torch_does(n):
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(3):
        np.testing.assert_array_equal(permutation(n, ours), torch.randperm(n, generator=theirs).numpy())
        assert torch.equal(ours.get_state(), theirs.get_state())
