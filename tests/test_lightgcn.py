"""LightGCN from RecBole's own training to a model that has forgotten."""

import copy

import numpy as np
import pytest
import torch

from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.any_loss import AnyLoss
from recbole_unlearn.unlearners.propagated import Propagated

FULL_BATCH = 10_000  # one step an epoch: the order of rows, which is not logged, does not matter
ROWS = np.arange(20, 400, 19)


def trained(make_split, path, **settings):
    split = make_split("LightGCN", reg_weight=0.01, learning_rate=0.01, **settings)
    model, _, _ = train(split.config, split, path / "model.pth")
    return split, model, *checkpoints.load(path / "model.pth")


@pytest.fixture(scope="module")
def setting(make_split, tmp_path_factory):
    """(split, model, checkpoint, log) of one training; no test may change them."""
    return trained(make_split, tmp_path_factory.mktemp("lightgcn"), epochs=4)


def unlearner(setting, **changes):
    split, model, stored, log = setting
    config = copy.copy(split.config)
    config.final_config_dict = {**split.config.final_config_dict, **changes}
    return InfluenceUnlearner(Trained(model, config, split, log, stored, log.path))


def weights(state):
    return np.concatenate([state[f"{side}_embedding.weight"].numpy() for side in ("user", "item")])


@pytest.mark.parametrize("size", [98, FULL_BATCH])  # 7 full ones, and one of all
def test_l2_weighs_a_row_by_the_norms_of_training_whoever_else_goes(make_split, tmp_path, size):
    split, *rest = setting = trained(make_split, tmp_path, epochs=1, train_batch_size=size, eval_step=0)
    ways = [unlearner(setting, method="influence", reg_weight=weight) for weight in (1.0, 0.0)]

    def part(rows):
        """Of EmbLoss in z."""
        with_it, without = (each.problem.lost(rows, each.way) for each in ways)
        return with_it - without

    torch.testing.assert_close(part(ROWS[:1]) + part(ROWS[1:]), part(ROWS), rtol=0, atol=1e-9)
    # RecBole's, of all rows in batches of a random order
    W, negatives = torch.from_numpy(ways[0].problem.table).double(), rest[2].epoch(0)[:, 0].astype(int)
    nodes = torch.from_numpy(np.stack([split.users, split.n_users + split.items, split.n_users + negatives]))
    order, expected = torch.randperm(split.n_rows, generator=torch.Generator().manual_seed(0)), torch.zeros_like(W)
    for batch in order.split(size):
        for each in nodes[:, batch]:
            expected.index_add_(0, each, W[each] / W[each].norm())
    found = part(np.arange(split.n_rows)).view(W.shape)
    assert (found - expected).norm() < 0.03 * expected.norm()


class TestReplay:
    @pytest.mark.parametrize("require_pow", [False, True])
    def test_of_nothing_is_what_recbole_trained(self, make_split, tmp_path, require_pow):
        """Loss, EmbLoss, graph, Adam and negatives are RecBole's: nothing is forgotten, all is run again."""
        settings = {"train_batch_size": FULL_BATCH, "require_pow": require_pow, "epochs": 6, "eval_step": 0}
        split, model, stored, log = trained(make_split, tmp_path, **settings)
        replayer = unlearner((split, model, stored, log), method="replay")
        change = replayer.way.forget(replayer.problem, np.empty(0, np.int64))
        moved = np.abs(weights(stored["state_dict"]) - log.snapshot(0).reshape(-1, 8)).max()
        assert np.abs(change.step).max() < 1e-4 * moved
        # snapshots but for the start are kept in float16
        np.testing.assert_allclose(change.snapshots[5], log.snapshot(5), rtol=0, atol=5e-3 * moved)
        assert change.details["epochs"] == 6

    def test_forgets(self, setting):
        replayer = unlearner(setting, method="replay")
        replayer.warm_up()
        result = replayer.unlearn(ROWS)
        before, after = weights(setting[2]["state_dict"]), weights(result.state_dict)
        assert result.method == "replay"
        assert 0 < np.linalg.norm(after - before) < np.linalg.norm(before)
        assert set(result.snapshots) == set(setting[3].snapshots)
        np.testing.assert_array_equal(weights(replayer.unlearn(ROWS).state_dict), after)

    def test_a_user_without_rows_has_the_initial_embedding(self, setting):
        split, _, _, log = setting
        user = split.users[30]
        result = unlearner(setting, method="replay").unlearn(np.flatnonzero(split.users == user))
        start = log.snapshot(0).astype(np.float32).reshape(-1, 8)[user]
        np.testing.assert_allclose(result.state_dict["user_embedding.weight"][user], start, rtol=0, atol=1e-6)

    def test_goes_on_from_request_to_request(self, setting):
        replayer = unlearner(setting, method="replay")
        replayer.apply(ROWS[:10], replayer.unlearn(ROWS[:10]))
        together = unlearner(setting, method="replay").unlearn(ROWS)
        assert len(replayer.served(setting[1]).interaction_matrix.row) == setting[0].n_rows - 10
        one_by_one = replayer.unlearn(ROWS[10:])
        np.testing.assert_allclose(weights(one_by_one.state_dict), weights(together.state_dict), rtol=0, atol=1e-6)


class TestInfluence:
    def test_right_hand_side_and_curvature_are_those_of_recboles_own_loss(self, make_split, tmp_path):
        """Against autograd through RecBole's model, on the original and on the remaining graph."""
        split, model, stored, log = trained(make_split, tmp_path, epochs=2, negatives="static")
        settings = {"method": "influence", "pool_return": False, "damping": "none", "curvature": "hessian"}
        ours = unlearner((split, model, stored, log), **settings)
        ours.problem.reg_weight = 0.0
        model.reg_weight = 0.0
        way, theirs = ours.way, AnyLoss(ours.trained)
        after = theirs.without(ROWS, way)
        after.view.model.reg_weight = 0.0
        z = theirs.lost(after, way)
        found = ours.problem.lost(ROWS, way)
        assert (found - z).norm() < 1e-3 * z.norm()
        curvature, n_triples = theirs.curvature(after, way)
        assert n_triples == split.n_rows - len(ROWS)
        v = torch.randn(len(z), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = curvature.matvec(v)
        assert (ours.problem.curvature(ROWS, way)[0].matvec(v) - expected).norm() < 1e-3 * expected.norm()

    @pytest.mark.parametrize("settings", [{}, {"damping": "scalar"}, {"paper": True, "damping": "scalar"}])
    def test_forgets(self, setting, settings):
        stepper = unlearner(setting, method="influence", **settings)
        stepper.warm_up()
        result = stepper.unlearn(ROWS)
        assert result.details["residual"] <= stepper.config["cg_tolerance"]
        assert result.details["step_norm"] > 0


class TestEndToEnd:
    @pytest.mark.parametrize("method, chosen", [("auto", "replay"), ("influence", "influence")])
    def test_run_writes_a_model_that_can_forget_again(self, make_options, method, chosen):
        settings = make_options(forget_count=25, epochs=3, output_dir="out", compare="none", method=method)
        result = run_unlearn("LightGCN", "tiny", config_dict=settings)
        assert result["unlearning"]["method"] == chosen
        assert {"original", "unlearned"} == set(result["models"])
        with InfluenceUnlearner.load("out/unlearned.pth") as session:
            assert len(session.model.interaction_matrix.row) == session.split.n_rows
            before = session.split.n_rows
            session.forget("count", 5)
            assert len(session.model.interaction_matrix.row) == before - 5

    def test_a_choice_of_parameters_goes_through_autograd(self, setting):
        assert isinstance(unlearner(setting).problem, Propagated)
        chosen = unlearner(setting, unlearn_params=["item_embedding.weight"], method="influence")
        assert isinstance(chosen.problem, AnyLoss)
