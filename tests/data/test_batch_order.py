"""The order of batches is not stored: it is drawn again, and a checksum says whether it is the one of training."""

import json

import numpy as np
import pytest

from recbole_unlearn.data import sampling
from recbole_unlearn.data.sampling import BatchOrder
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.newton import flat
from recbole_unlearn.influence.recorded import Recorded, Trajectory
from recbole_unlearn.influence.replay import replay
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.trained import Checkpoint
from recbole_unlearn.training import train
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
    return BatchOrder(log.order, split.data_row, max(BATCH // log.negatives, 1))


def test_the_batches_are_those_that_the_model_was_trained_on(trained):
    split, path, seen = trained
    log = TripleLog.open(log_path(path))
    order = order_of(split, log)
    pairs = list(zip(split.users.tolist(), split.items.tolist(), strict=True))
    per_epoch = -(-split.n_rows // max(BATCH // log.negatives, 1))
    for epoch in [*range(log.n_epochs), 1, 0]:  # forwards, and back again
        steps = order.steps(epoch)
        for number, batch in enumerate(seen[epoch * per_epoch : (epoch + 1) * per_epoch]):
            assert sorted(pairs[row] for row in np.flatnonzero(steps == number)) == sorted(batch)


def test_an_order_that_is_not_the_recorded_one_is_not_used(trained):
    split, path, _ = trained
    log = TripleLog.open(log_path(path))
    batch_rows = max(BATCH // log.negatives, 1)
    assert BatchOrder(log.order, split.data_row, batch_rows).steps(0) is not None
    assert BatchOrder(log.order, split.data_row[::-1], batch_rows).steps(0) is None
    assert BatchOrder(log.order, split.data_row, batch_rows + 1).steps(0) is None
    assert BatchOrder([None], split.data_row, batch_rows).steps(0) is None


def test_replaying_everything_without_forgetting_anything_is_the_training_again(trained, make_model):
    """From the very same start, up to rounding; an order of its own ends somewhere else."""
    split, path, _ = trained
    unlearner = DotProduct(Checkpoint.written(path, split.config).trained(split))
    log = unlearner.log
    start = flat(*[p.detach().numpy() for p in make_model(split).parameters()]).numpy()
    end = flat(unlearner.P, unlearner.Q).numpy()
    sizes = len(unlearner.P), len(unlearner.Q)
    epochs = unlearner.epochs
    batch = max(BATCH // log.negatives, 1) * log.negatives

    def distance(steps):
        negatives = [log.epoch(e) for e in range(epochs)]
        recorded = Recorded(log.users, log.items, negatives, *sizes, unlearner.adam(), batch, steps=steps)
        result = replay(recorded, Trajectory([0, epochs], [start, end]), np.empty(0, np.int64), all_rows=True)
        return np.linalg.norm(result.change) / np.linalg.norm(end - start)

    assert distance(unlearner.order.steps) < 1e-4 < 1e-2 < distance(None)


def test_a_log_without_the_forgotten_has_no_order(trained, tmp_path):
    split, path, _ = trained
    log = TripleLog.open(log_path(path))
    copy = log.without([3, 5], tmp_path / "copy.triples", "run-2", split.fingerprint_without([3, 5]))
    assert copy.order == [None] * log.n_epochs


@pytest.mark.parametrize("entry", ["no", [], [1, 2, 3, 4], [2020, -1, 3], [2020, 10**9, 3], [2020, 0.5, 3]])
def test_metadata_with_a_bad_order_is_refused(trained, tmp_path, entry):
    _, path, _ = trained
    log = TripleLog.open(log_path(path)).without([0], tmp_path / "bad.triples", "run-3", {})
    for order in ([entry] * log.n_epochs, [None] * (log.n_epochs + 1)):
        (log.path / "metadata.json").write_text(json.dumps({**log.metadata, "order": order}))
        with pytest.raises(InputError, match="damaged"):
            TripleLog.open(log.path)
