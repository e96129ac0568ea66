"""A step that undoes what training gained on what remains is no result: it is measured, refused, and not taken."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL
from recbole.data.interaction import Interaction

from recbole_unlearn.data.split import Split
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.training.fit import new_model, train
from recbole_unlearn.training.trained import same_weights
from recbole_unlearn.unlearner import load
from recbole_unlearn.unlearners.influence import PAPER, Influence

MODELS = {"BPR": {}, "LightGCN": {"n_layers": 2}, "NGCF": {"hidden_size_list": [8]}, "FPMC": SEQUENTIAL}
FAR = Influence(damping="scalar", damping_strength=1e-8)  # hardly damped: far beyond what the quadratic says
NOT_FAR = Influence(undone_limit=1e9)


@pytest.fixture(scope="module")
def original(make_config, data_path, tmp_path_factory):
    """Function name of `MODELS` -> checkpoint, trained once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("undone")
            keys = {"epochs": 6, "eval_step": 0, "data_path": data_path, "checkpoint_dir": str(folder)}
            config = make_config(name, **keys | MODELS[name])
            train(config, Split.seeded(config), folder / "model.pth")
            made[name] = folder / "model.pth"
        return made[name]

    return make


def some(split):
    return np.arange(0, split.n_rows, 15)


@pytest.mark.parametrize("name", ["BPR", "LightGCN"])
def test_it_is_the_share_of_the_training_s_gain_by_recbole_s_own_loss(original, name):
    """Of what remains, on the graph of what remains, with the negatives of the last epoch."""
    with load(original(name), way=NOT_FAR) as unlearner:
        split, rows = unlearner.split, some(unlearner.split)
        before = copies(unlearner.state_dict)
        found = unlearner.forget(rows=rows)
        kept = np.setdiff1d(np.arange(split.n_rows), rows)
        model = new_model(unlearner.config, split, data=split.remaining_dataset(rows))
        initial = copies(new_model(unlearner.config, split, unlearner.config["seed"]).state_dict())
        columns = {
            "user_id": split.users[kept],
            "item_id": split.items[kept],
            "neg_item_id": unlearner.log.epoch(5)[kept, 0],
        }
        batch = Interaction({key: torch.as_tensor(np.asarray(value, np.int64)) for key, value in columns.items()})

    def loss(state):
        model.load_state_dict(state)
        model.reg_weight = 0.0  # of LightGCN; what is predicted matters
        with torch.no_grad():
            return float(model.calculate_loss(batch))

    now, then, new = loss(before), loss(found.state_dict), loss(initial)
    assert new > now
    assert found.details["undone"] == pytest.approx((then - now) / (new - now), rel=1e-3, abs=1e-5)
    assert abs(found.details["undone"]) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_it_grows_with_the_step_from_nothing_to_all(original, name):
    with load(original(name), way=NOT_FAR) as unlearner:
        problem, way = unlearner.problem, unlearner.way
        rows = some(unlearner.split)
        after = problem.without(rows, way)
        now, new = problem.state_dict, problem.untrained
        back = [(new[n] - now[n]).double().flatten() for n, _ in unlearner.model.named_parameters()]
        back = torch.cat(back)
        shares = [problem.undone(rows, after, share * back) for share in (0.0, 0.5, 1.0)]
    assert shares[0] == 0 and shares[2] == pytest.approx(1) and 0 < shares[1] < 1


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_goes_too_far_is_refused_and_nothing_has_changed(original, name):
    with load(original(name), way=FAR) as unlearner:
        before = copies(unlearner.state_dict)
        with pytest.raises(InputError, match=r"would undo \d+% of what training gained.*use method: replay, or raise"):
            unlearner.forget(rows=some(unlearner.split))
        assert same_weights(unlearner.state_dict, before) and not len(unlearner.forgotten)


@pytest.mark.parametrize("name", ["NGCF", "FPMC"])
def test_auto_trains_again_in_its_place_and_says_why(original, name):
    keys = {"damping": "scalar", "damping_strength": 1e-8, "exact_seconds": 0.0}
    with load(original(name), config_dict=keys) as unlearner:
        assert unlearner.method == "influence"
        rows = some(unlearner.split)
        found = unlearner.forget(rows=rows)
        assert found.details["exact"] and found.method == unlearner.method == "replay"
        assert "auto: one influence step would undo" in found.why and unlearner.guard.distance < 1e-3
    with load(original(name), config_dict={"method": "replay"}) as unlearner:
        assert same_weights(unlearner.forget(rows=rows).state_dict, found.state_dict)


def test_where_training_cannot_be_run_again_either_the_step_is_refused(original, monkeypatch):
    keys = {"damping": "scalar", "damping_strength": 1e-8, "exact_seconds": 0.0}
    with load(original("FPMC"), config_dict=keys) as unlearner:
        (unlearner.log.path / "guard.json").unlink(missing_ok=True)  # what was found before
        monkeypatch.setattr(unlearner.problem, "reproduction", lambda *_: (1.0, 0.0))
        before = copies(unlearner.state_dict)
        with pytest.raises(InputError, match="would undo"):
            unlearner.forget(rows=some(unlearner.split))
        assert unlearner.method == "influence" and same_weights(unlearner.state_dict, before)


def test_a_request_of_the_command_line_says_so_and_writes_no_model(original, tmp_path):
    keys = {
        "checkpoint": str(original("BPR")),
        "forget_count": 30,
        "compare": "none",
        "output_dir": str(tmp_path / "new"),
    }
    far = {"method": "influence", "damping": "scalar", "damping_strength": 1e-8}
    with pytest.raises(InputError, match="would undo"):
        run_unlearn(config_dict={**keys, **far})
    assert not (tmp_path / "new" / "unlearned.pth").exists()
    limited = run_unlearn(config_dict={**keys, **far, "undone_limit": 1e9})
    assert limited["unlearning"]["undone"] > 0.1


def test_the_published_step_is_shown_as_it_is(original):
    with load(original("BPR"), way=PAPER) as unlearner:
        assert "undone" in unlearner.forget(rows=some(unlearner.split)).details


@pytest.mark.parametrize("name", MODELS)
def test_no_row_goes_farther_than_twice_what_training_moved_any_of_its_parameter(original, name):
    with load(original(name), way=NOT_FAR) as unlearner:
        problem, named = unlearner.problem, dict(unlearner.model.named_parameters())
        ways = {n: (value.detach().double() - problem.untrained[n].double()) for n, value in named.items()}
        sizes = [value.numel() for value in named.values()]
        rng = torch.Generator().manual_seed(1)
        step = 1e-3 * torch.randn(sum(sizes), generator=rng, dtype=torch.float64)
        assert torch.equal(problem.shortened(step)[0], step) and not problem.shortened(step)[1].any()
        first = next(iter(named))
        far = step.clone()
        far[: named[first][0].numel()] *= 1e9  # the first row of the first parameter
        found, held = problem.shortened(far)
        row = found[: named[first][0].numel()]
        assert held.sum() == held[0] == 1 and float(row.norm()) == pytest.approx(
            2 * float(ways[first].flatten(1).norm(dim=1).max())
        )
        assert torch.equal(found[len(row) :], far[len(row) :])
        assert torch.allclose(row / row.norm(), far[: len(row)] / far[: len(row)].norm())


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_hardly_anything_damps_are_held_and_counted(original, name):
    with load(original(name), way=replace(FAR, undone_limit=1e9)) as unlearner:
        problem, before = unlearner.problem, unlearner.state_dict
        found = unlearner.unlearn(some(unlearner.split))
        longest, held = {}, 0
        for n, _ in unlearner.model.named_parameters():
            way, moved = (
                (v[n] - before[n]).double().view(len(v[n]), -1) for v in (problem.untrained, found.state_dict)
            )
            longest[n] = float(moved.norm(dim=1).max() / (2 * way.norm(dim=1).max()))
            held += int((moved.norm(dim=1) > (1 - 1e-5) * 2 * way.norm(dim=1).max()).sum())
    assert held == found.details["rows_shortened"] > 0
    assert max(longest.values()) == pytest.approx(1, abs=1e-5)


def test_along_the_training_rows_are_counted_that_were_held_at_any_stop(original, monkeypatch):
    """Each once."""
    monkeypatch.setattr("recbole_unlearn.unlearners.base.FARTHEST", 0.05)
    with load(original("FPMC"), way=NOT_FAR) as unlearner:
        problem, log, before = unlearner.problem, unlearner.log, unlearner.state_dict
        found = unlearner.unlearn(some(unlearner.split))
        *between, _ = found.details["stops"]
        ends = [
            [log.named(np.asarray(each, np.float32)) for each in (log.snapshot(n), found.snapshots[n])] for n in between
        ]
        held = []
        for then, now in [*ends, (before, found.state_dict)]:
            held.append(set())
            for n, _ in unlearner.model.named_parameters():
                way = (problem.untrained[n] - before[n]).double().view(len(before[n]), -1).norm(dim=1).max()
                moved = np.linalg.norm(np.float64(now[n]) - np.float64(then[n]), axis=1)
                held[-1] |= {(n, row) for row in np.flatnonzero(moved > (1 - 1e-4) * 0.05 * float(way))}
    assert found.details["rows_shortened"] == len(set().union(*held)) > len(held[-1])


@pytest.mark.parametrize("name", MODELS)
def test_a_user_with_nothing_left_is_as_new_and_others_are_not(original, name):
    """What a step leaves of their rows would tell what they liked."""
    table = "UI_emb.weight" if name == "FPMC" else "user_embedding.weight"
    with load(original(name), way=NOT_FAR) as unlearner:
        split, log = unlearner.split, unlearner.log
        gone, other = np.unique(split.users)[[3, 8]].astype(np.int64), int(np.unique(split.users)[5])
        rows = np.flatnonzero(np.isin(split.users, gone) | (split.users == other))
        rows = np.setdiff1d(rows, np.flatnonzero(split.users == other)[:1])  # one is left of this user
        before, start = copies(unlearner.state_dict), copies(unlearner.problem.untrained)
        found = unlearner.forget(rows=rows)
        after = found.state_dict[table]
        moved = (after - before[table]).norm(dim=1)
        assert found.details["users_renewed"] == len(gone)
        # of the law of new rows, neither the trained ones nor those that training began with
        assert not torch.allclose(after[gone], start[table][gone]) and bool((moved[gone] > 0.5 * moved.max()).all())
        size = start[table].norm(dim=1).mean()
        assert 0.3 * size < after[gone].norm(dim=1).min() and after[gone].norm(dim=1).max() < 3 * size
        for number, weights in unlearner.problem.snapshots.items() if name == "FPMC" else ():
            assert np.allclose(log.named(np.array(weights, np.float32))[table][gone], after[gone]), number
        again = unlearner.unlearn(np.flatnonzero(split.users == other)[:1])  # nobody is renewed twice
        assert again.details["users_renewed"] == 1
        assert torch.allclose(again.state_dict[table][gone], after[gone], atol=1e-3)
