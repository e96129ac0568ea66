"""Re-optimisation of a model that RecBole trained to convergence, and how the method is chosen."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.reoptimise import CONVERGED

WEIGHT_DECAY = 3e-3
# All of the data in one batch: with several, Adam at a constant rate goes on jittering about the minimum.
TO_CONVERGENCE = {
    "negatives": "static",
    "weight_decay": WEIGHT_DECAY,
    "train_batch_size": 10**4,
    "learning_rate": 0.01,
    "epochs": 2000,
    "eval_step": 0,
}
EARLY = {**TO_CONVERGENCE, "epochs": 20}


@pytest.fixture(scope="module")
def train_once(tmp_path_factory, make_options):
    """Function (keys) -> folder of a run with these keys, which nobody may change."""

    def start(**keys):
        before = os.getcwd()
        os.chdir(tmp_path_factory.mktemp("reoptimise"))
        try:
            given = make_options(compare="none", forget_count=9, output_dir=str(Path("out").resolve()), **keys)
            return run_unlearn("BPR", "tiny", None, given), Path("out").resolve()
        finally:
            os.chdir(before)

    return start


@pytest.fixture(scope="module")
def converged(train_once):
    return train_once(**TO_CONVERGENCE)


@pytest.fixture(scope="module")
def early(train_once):
    return train_once(**EARLY)


@pytest.fixture
def unlearner_of(make_split, make_model):
    """Function (folder, keys) -> InfluenceUnlearner on the folder's model."""

    def make(folder, **keys):
        state, log = checkpoint.load(folder / "model.pth")
        split = make_split(**{**TO_CONVERGENCE, **keys})
        model = make_model(split)
        model.load_state_dict(state["state_dict"])
        return InfluenceUnlearner(Trained(model, split.config, split, log, state, folder / "model.pth"))

    return make


def mean_gradient_norm(state_dict, log, rows, n_items):
    """Of the objective without some rows, by its definition, in float64."""
    P, Q = (torch.tensor(state_dict[f"{n}_embedding.weight"].numpy().astype(np.float64)) for n in ("user", "item"))
    P.requires_grad_(), Q.requires_grad_()
    users, items = np.asarray(log.users).astype(int), np.asarray(log.items).astype(int)
    negatives = np.asarray(log.epoch(0)).astype(int)[:, 0]
    kept = np.setdiff1d(np.arange(len(users)), rows)
    triples = [(users[n], items[n], negatives[n], 1.0) for n in kept]
    for row in rows:
        rest = items[kept][users[kept] == users[row]]
        rate = 1 / (n_items - 1 - len(set(rest)))  # negatives a positive, times the chance of this item
        triples += [(users[row], i, items[row], rate) for i in rest]
    u, i, j, weight = (torch.tensor(np.array(column)) for column in zip(*triples, strict=True))
    x = (P[u] * (Q[i] - Q[j])).sum(1)
    loss = -(weight * torch.nn.functional.logsigmoid(x)).sum()
    loss = loss + len(kept) * WEIGHT_DECAY / 2 * ((P**2).sum() + (Q**2).sum())
    gradients = torch.autograd.grad(loss, (P, Q))
    return float(sum((g**2).sum() for g in gradients).sqrt()) / len(kept)


# -- choosing


def test_auto_reoptimises_a_converged_model(converged):
    result, folder = converged
    found = result["unlearning"]
    assert found["method"] == "reoptimise" and found["converged"]
    assert found["chosen"].startswith("auto: converged, the gradient is ")
    assert found["gradient_norm"] <= result["settings"]["reoptimise_tolerance"] < found["gradient_norm_before"]
    assert "re-optimisation" in (folder / "result.md").read_text()


def test_auto_replays_a_model_that_was_stopped_early(early):
    result, _ = early
    assert result["unlearning"]["method"] == "replay"
    assert result["unlearning"]["chosen"].startswith("auto: not converged, the gradient is ")


def test_the_gradient_is_compared_with_its_l2_part(converged, early, unlearner_of):
    for (_, folder), below in ((converged, True), (early, False)):
        unlearner = unlearner_of(folder)
        theta = unlearner.problem.spread().numpy()
        norm = mean_gradient_norm(unlearner.state_dict, unlearner.log, np.array([], int), unlearner.split.n_items)
        share = norm / (WEIGHT_DECAY * np.linalg.norm(theta))
        assert (share <= CONVERGED) == below
        assert f"{share:.1e} of its L2 part" in unlearner.chosen


def test_auto_trains_again_what_no_kernels_can_replay(early, unlearner_of):
    unlearner = unlearner_of(early[1], clip_grad_norm={"max_norm": 1})
    assert (unlearner.method, unlearner.problem.derived) == ("replay", False)
    asked = unlearner_of(early[1], clip_grad_norm={"max_norm": 1}, method="reoptimise")
    assert (asked.method, asked.problem.derived) == ("reoptimise", True)


@pytest.mark.parametrize("method", ["replay", "influence"])
def test_another_method_can_be_asked_for(converged, unlearner_of, method):
    unlearner = unlearner_of(converged[1], method=method)
    assert (unlearner.method, unlearner.chosen) == (method, "asked for")
    assert unlearner.unlearn([5]).details["chosen"] == "asked for"


def test_it_can_be_asked_for_without_convergence_and_warns(early, unlearner_of, caplog):
    with caplog.at_level(logging.WARNING):
        unlearner = unlearner_of(early[1], method="reoptimise")
    assert "not converged" in caplog.text
    unlearned = unlearner.unlearn([5, 6])
    assert unlearned.details["chosen"].startswith("asked for: not converged")
    assert unlearned.details["converged"]


# -- refusals


@pytest.mark.parametrize("keys", [{"negatives": "redrawn"}, {"weight_decay": 0}], ids=lambda keys: next(iter(keys)))
def test_without_one_regularised_objective_it_is_refused_before_training(make_options, keys):
    given = make_options(**{**EARLY, "method": "reoptimise", "forget_count": 5, "output_dir": "out", **keys})
    with pytest.raises(InputError, match=f"{next(iter(keys))}.*use method: auto") as refused:
        run_unlearn("BPR", "tiny", None, given)
    assert "\n" not in str(refused.value) and not Path("out").exists()


def test_a_log_of_redrawn_negatives_is_refused(finished, unlearner_of):
    with pytest.raises(InputError, match="reoptimise is not possible: negatives were redrawn.*use method: auto"):
        unlearner_of(finished[1], method="reoptimise")


@pytest.mark.parametrize(
    "key, value",
    [("reoptimise_tolerance", -1), ("reoptimise_tolerance", "small"), ("reoptimise_max_iterations", 0),
     ("reoptimise_max_iterations", 1.5)],
)  # fmt: skip
def test_bad_settings_are_refused(make_config, key, value):
    with pytest.raises(InputError, match=key):
        make_config(**{key: value})


# -- the result


def test_the_certificate_can_be_recomputed_from_the_checkpoint(converged, unlearner_of, split):
    rows = np.array([3, 4, 90, 301, 302, 555])
    unlearner = unlearner_of(converged[1])
    unlearned = unlearner.unlearn(rows)
    found = unlearned.details
    norm = mean_gradient_norm(unlearned.state_dict, unlearner.log, rows, split.n_items)
    before = mean_gradient_norm(unlearner.state_dict, unlearner.log, rows, split.n_items)
    assert found["gradient_norm_before"] == pytest.approx(before, rel=1e-6)
    assert found["gradient_norm_stored"] == pytest.approx(norm, rel=1e-3, abs=1e-13)
    assert found["gradient_norm"] <= 1e-9 and found["gradient_norm_stored"] < 1e-4 * before
    assert found["triples"] == unlearner.log.n_rows - len(rows)
    assert unlearned.snapshots == {}


def test_without_the_return_to_the_pool_there_are_fewer_triples(converged, unlearner_of):
    rows = np.array([3, 4, 90])
    unlearner = unlearner_of(converged[1], pool_return=False)
    assert len(unlearner.problem.objective(rows, returns=False).triples) == 1
    whole, alone = unlearner_of(converged[1]).unlearn(rows), unlearner.unlearn(rows)
    weight = "user_embedding.weight"
    assert alone.details["converged"] and not torch.equal(whole.state_dict[weight], alone.state_dict[weight])


def test_a_user_that_is_forgotten_as_a_whole_ends_at_zero(converged, unlearner_of, split):
    unlearner = unlearner_of(converged[1])
    user = split.users[0]
    weight = unlearner.unlearn(np.flatnonzero(split.users == user)).state_dict["user_embedding.weight"]
    assert np.abs(unlearner.problem.P[user]).max() > 0.1 and weight[user].abs().max() < 1e-6


def test_too_few_iterations_are_reported(converged, unlearner_of, caplog):
    unlearner = unlearner_of(converged[1], reoptimise_max_iterations=1)
    with caplog.at_level(logging.WARNING):
        found = unlearner.unlearn(np.arange(0, 600, 20)).details
    assert not found["converged"] and found["iterations"] == 1 and found["gradient_norm"] > 1e-9
    assert "re-optimisation stopped" in caplog.text


def test_a_second_request_starts_from_the_first(converged, make_options, tmp_path):
    shutil.copytree(converged[1], tmp_path / "first")
    given = {
        "checkpoint": str(tmp_path / "first/unlearned.pth"), "compare": "none", "forget_count": 4,
        "method": "reoptimise", "output_dir": "second", "show_progress": False, "state": "WARNING",
    }  # fmt: skip
    found = run_unlearn(None, None, None, given)["unlearning"]
    assert found["method"] == "reoptimise" and found["converged"]
    first = TripleLog.open(tmp_path / "first/unlearned.triples")
    assert first.snapshots == [] and found["triples"] == first.n_rows - 4
