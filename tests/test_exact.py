"""Exact forgetting as people get it: by default, settled, saved, recomputed, and how much it leaves to others."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL

import recbole_unlearn as ru
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.churn import TOP, changed_users, churn, recommended
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.conflicts import BY_KERNELS, RECOMPUTED
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.testing import flat
from recbole_unlearn.training.compiled import COMPILED, LOGGED
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.verify import main, verify

MODELS = {"BPR": {}, "LightGCN": {"n_layers": 2, "reg_weight": 1e-3}}
TRAINED = MODELS | {"FPMC": SEQUENTIAL}


@pytest.fixture(params=MODELS)
def trained(request, make_options):
    """Checkpoint of a tiny model."""
    keys = {"compare": "none", "output_dir": "out", "forget_count": 1, "epochs": 6, **MODELS[request.param]}
    run_unlearn(request.param, "tiny", config_dict=make_options(**keys))
    return "out/model.pth"


@pytest.fixture
def bpr(make_options):
    run_unlearn("BPR", "tiny", config_dict=make_options(compare="none", output_dir="out", forget_count=1, epochs=6))
    return "out/model.pth"


def tokens(unlearner):
    """The requests, in this data's tokens."""
    user, item = unlearner.split.token("user", [9])[0], unlearner.split.token("item", [7])[0]
    return [{"users": [user]}, {"count": 5}, {"items": [item]}]


def test_it_is_what_one_gets(trained):
    with ru.load(trained) as unlearner:
        for request in tokens(unlearner):
            found = unlearner.forget(**request).report()
            assert found["exact"] is True and found["coupling"] == "paired"
        assert unlearner.settled


def test_a_session_settled_is_one_exact_request_for_all_bit_for_bit(trained):
    with ru.load(trained, way=ru.Replay(rows="auto", exact_seconds=0)) as unlearner:
        for request in tokens(unlearner):
            last = unlearner.forget(**request)
        rows = unlearner.forgotten
        if "LightGCN" not in str(unlearner.config["model"]):  # of so few steps none are made at once
            assert not last.report()["exact"]
        settled = unlearner.settle()
        assert settled.report()["exact"] and unlearner.settled
        served = flat(unlearner.model.state_dict())
    with ru.load(trained) as another:
        assert torch.equal(flat(another.forget(rows=rows).state_dict), flat(settled.state_dict))
    assert torch.equal(served, flat(settled.state_dict))


def test_what_is_saved_is_settled_unless_only_touched_rows_were_asked_for(bpr):
    for rows, exact in (("auto", True), ("touched", False)):
        with ru.load(bpr, way=ru.Replay(rows=rows, exact_seconds=0)) as unlearner:
            unlearner.forget(count=3)
            assert not unlearner.settled
            unlearner.save(f"{rows}.pth")
            assert unlearner.settled is exact
        if exact:
            assert verify(f"{rows}.pth") < 1e-4
        else:
            with pytest.raises(InputError, match="forgotten approximately"):
                verify(f"{rows}.pth")


def test_a_model_that_forgot_approximately_stays_so_where_nothing_is_left_to_forget(bpr):
    """Until it is settled."""
    with ru.load(bpr, way=ru.Replay(rows="touched")) as unlearner:
        user = unlearner.split.token("user", [5])[0]
        unlearner.forget(users=[user])
        unlearner.save("touched.pth")
    keys = {"checkpoint": "touched.pth", "forget_users": [user], "suppression": "listed", "compare": "none"}
    keys |= {"evaluate": "none", "show_progress": False, "output_dir": "later"}
    assert run_unlearn(config_dict={**keys, "dry_run": True})["way"]["exact"] is False
    found = run_unlearn(config_dict=keys)
    assert found["forget_set"]["interactions"] == 0 and found["unlearning"]["exact"] is False
    assert "the model stays approximate" in found.page
    with ru.load("later/unlearned.pth") as unlearner:
        assert not unlearner.settled
        assert unlearner.settle().report()["exact"] and unlearner.settled


@pytest.mark.parametrize("purge", [False, True])
def test_of_a_model_that_forgot_approximately_nothing_is_recomputed(bpr, purge, capsys):
    """Until it forgets exactly: that training is one of its log."""
    keys = {"checkpoint": "copy.pth", "compare": "none", "evaluate": "none", "show_progress": False}
    shutil.copy(bpr, "copy.pth")
    shutil.copytree(Path(bpr).with_suffix(".triples"), "copy.triples")
    touched = {"method": "replay", "replay_rows": "touched", "output_dir": "touched", "forget_count": 3}
    run_unlearn(config_dict={**keys, **touched, "purge": purge})
    assert main(["touched/unlearned.pth"]) == 2
    assert "touched/unlearned.pth has forgotten approximately" in capsys.readouterr().err
    again = {**keys, "checkpoint": "touched/unlearned.pth", "forget_count": 2}
    run_unlearn(config_dict={**again, "method": "influence", "output_dir": "step"})
    assert main(["step/unlearned.pth"]) == 2
    if not purge:  # which keeps no order to train again in
        run_unlearn(config_dict={**again, "method": "replay", "replay_rows": "all", "output_dir": "exact"})
        assert main(["exact/unlearned.pth"]) == 0


def test_a_way_that_cannot_be_settled_says_so(bpr, make_options):
    step = {"cg_max_iterations": 1, "unlearn_params": ["user_embedding*"]}
    run_unlearn("NGCF", "tiny", config_dict=make_options(
        compare="none", output_dir="graph", forget_count=1, epochs=1, hidden_size_list=[4], evaluate="none", **step,
    ))  # fmt: skip
    with ru.load("graph/model.pth", config_dict=step) as unlearner:
        unlearner.forget(count=2)
        with pytest.raises(InputError, match="settled"):
            unlearner.settle()


def test_recboles_own_trainer_recomputes_originals_and_what_has_forgotten(trained, capsys):
    with ru.load(trained) as unlearner:
        for request in tokens(unlearner):
            unlearner.forget(**request)
        unlearner.save("forgotten.pth")
        weights = flat(unlearner.state_dict)
    assert main([trained]) == main(["forgotten.pth"]) == 0
    assert "they are that training's" in capsys.readouterr().out
    with ru.load("forgotten.pth") as unlearner:  # and the next request starts there
        assert torch.equal(flat(unlearner.state_dict), weights) and unlearner.guard.checked == "inherited"
        unlearner.forget(count=4)
        unlearner.save("later.pth")
    assert verify("later.pth") < 1e-4
    state, _ = checkpoints.load("forgotten.pth")
    state["state_dict"]["user_embedding.weight"][3] += 0.1
    checkpoints.save("forgotten.pth", state)
    assert main(["forgotten.pth"]) == 1
    assert "NOT" in capsys.readouterr().out
    assert main(["nowhere.pth"]) == 2


def test_the_command_recomputes_a_model(bpr):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recbole_unlearn.verify", bpr], capture_output=True, text=True
    )
    assert done.returncode == 0 and "they are that training's" in done.stdout, done.stderr


@pytest.mark.parametrize("negatives", ["redrawn", "static"])
def test_fresh_random_numbers_are_new_each_time_and_can_be_gone_on_from(make_options, negatives):
    keys = dict(compare="none", output_dir="out", forget_count=1, epochs=6, negatives=negatives)
    run_unlearn("BPR", "tiny", config_dict=make_options(**keys))
    found = []
    for _ in range(2):
        with ru.load("out/model.pth", way=ru.Replay("all", "fresh")) as unlearner:
            assert unlearner.forget(count=6).report()["coupling"] == "fresh"
            found.append(flat(unlearner.state_dict))
            if len(found) == 2:
                unlearner.way = ru.Replay("all", "paired")
                unlearner.forget(count=3)
                later = flat(unlearner.state_dict)
            unlearner.save(f"fresh{len(found)}.pth")
    first, second = found
    apart = (first - second).norm()
    assert apart > 0.1 * first.norm()
    assert (later - second).norm() < 0.3 * apart  # by the random numbers of the second one
    assert verify("fresh1.pth") < 1e-4 and verify("fresh2.pth") < 1e-4


def test_adams_moments_are_those_of_the_new_training(bpr):
    """Of users with nothing left they are zero, as in retraining."""
    with ru.load(bpr) as unlearner:
        user = unlearner.split.token("user", [9])[0]
        unlearner.forget(users=[user])
        unlearner.save("forgotten.pth")
    before, after = (torch.load(path, weights_only=True)["optimizer"]["state"][0] for path in (bpr, "forgotten.pth"))
    for name in ("exp_avg", "exp_avg_sq"):
        assert before[name][9].abs().max() > 0 and after[name][9].abs().max() == 0
        assert after[name].abs().max() > 0


def test_a_stream_is_settled_at_its_end(bpr, make_options, tmp_path):
    with ru.load(bpr) as unlearner:
        rows = np.arange(0, unlearner.split.n_rows, 40)
        pairs = unlearner.split.pairs(rows)
    (tmp_path / "requests.csv").write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in pairs))
    found = run_unlearn(config_dict={
        "checkpoint": bpr, "forget_requests": str(tmp_path / "requests.csv"), "exact_seconds": 0, "compare": "none",
        "evaluate": "none", "output_dir": "stream",
    })  # fmt: skip
    assert found["unlearning"]["exact"] and found["unlearning"]["settled_seconds"] > 0
    assert found["unlearning"]["coupling"] == "paired"
    with ru.load(bpr) as unlearner:
        expected = flat(unlearner.forget(rows=rows).state_dict)
    assert torch.equal(flat(torch.load("stream/unlearned.pth", weights_only=True)["state_dict"]), expected)


def test_report_and_result_say_what_it_is(bpr, make_options):
    for name, keys, words in (
        ("exact", {}, "trained again without the forget set"),
        ("touched", {"replay_rows": "touched"}, "This model is approximate"),
    ):
        given = {"checkpoint": bpr, "forget_count": 8, "output_dir": name, **keys}
        found = run_unlearn(config_dict=given)
        page = " ".join(open(f"{name}/report.html").read().split())
        assert words in page and f"Method: {name if name == 'exact' else 'approximate'}" in found.page
        assert set(found["churn"]) == {"users", "unlearned", "retrained"}
        assert json.load(open(f"{name}/result.json"))["unlearning"]["exact"] is (name == "exact")


def test_churn_counts_what_changes_for_those_who_asked_for_nothing(task, make_model):
    split, original = task.split, make_model(task.split, task.seed)
    same, users = make_model(split, task.seed), np.unique(split.users)
    rows = np.flatnonzero(np.isin(split.users, users[:5]))
    with torch.no_grad():
        same.user_embedding.weight[users[:5]] *= -1  # of those who asked alone
    assert churn({"original": original, "same": same}, split, rows) == {"users": len(users) - 5, "same": 0.0}
    with torch.no_grad():
        same.user_embedding.weight[users[5]] *= -1
    found = churn({"original": original, "other": same}, split, rows)["other"]
    assert 0 < found <= 1 / (len(users) - 5)
    assert churn({"original": original}, split, np.arange(split.n_rows)) == {}


def test_lists_are_out_of_date_of_those_whose_recommendations_change_and_of_nobody_who_is_gone(task, make_model):
    split, original = task.split, make_model(task.split, task.seed)
    other, users = make_model(split, task.seed), np.unique(split.users)
    gone = np.flatnonzero(np.isin(split.users, users[:5]))
    assert changed_users(original, other, split, gone, TOP) == []
    with torch.no_grad():
        other.user_embedding.weight[users[4:7]] *= -1  # of one who is gone, and of two who are not
    assert changed_users(original, other, split, gone, TOP) == list(split.token("user", users[5:7]))
    assert changed_users(original, other, split, gone, split.n_items - 1) == []  # all that anybody has not seen
    # an interaction that is forgotten: its item may be recommended again
    with torch.no_grad():
        (row,) = np.flatnonzero(split.users == users[9])[:1]
        for model in (original, other):
            model.item_embedding.weight[split.items[row]] = 9 * model.user_embedding.weight[users[9]]
    assert split.items[row] in recommended(original, split, np.array([row]), TOP, np.array([row]))
    assert split.items[row] not in recommended(original, split, np.array([row]), TOP)
    assert split.token("user", users[9:10])[0] in changed_users(original, other, split, np.array([row]), TOP)


def test_the_models_that_pages_call_compiled_are_those():
    assert {kind.__name__ for kind in COMPILED} == set(BY_KERNELS)
    assert {kind.__name__ for kind in LOGGED} == set(RECOMPUTED)


DECAY = {"weight_decay": 1e-4}


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        *itertools.product(TRAINED, [{}]),
        ("BPR", {"negatives": "static", **DECAY}),
        ("LightGCN", {"negatives": "static", **DECAY}),
        ("FPMC", DECAY),
    ],
)
def test_compiled_training_is_recboles_with_its_logs_and_checkpoints(make_split, tmp_path, model, keys):
    """Same draws bit for bit, same weights, moments and losses but for rounding; and it can be unlearned from."""
    found = {}
    for compiled in (False, True):
        split = make_split(model, epochs=4, checkpoint_dir=str(tmp_path), compiled=compiled, **TRAINED[model], **keys)
        path = tmp_path / f"{compiled}.pth"
        _, trainer, _ = train(split.config, split, path)
        found[compiled] = *checkpoints.load(path), trainer.train_loss_dict
    (stock, log, losses), (ours, own_log, own_losses) = found[False], found[True]
    assert stock["epoch"] == ours["epoch"]
    for epoch in range(log.n_epochs):
        assert np.array_equal(log.epoch(epoch), own_log.epoch(epoch)) and log.order == own_log.order
        assert np.array_equal(log.rates(epoch), own_log.rates(epoch))
    np.testing.assert_allclose(list(own_losses.values()), list(losses.values()), rtol=1e-5)
    way = flat(stock["state_dict"]) - torch.from_numpy(np.array(log.snapshot(0), np.float64))
    assert (flat(ours["state_dict"]) - flat(stock["state_dict"])).norm() < 1e-4 * way.norm()
    for one, other in zip(stock["optimizer"]["state"].values(), ours["optimizer"]["state"].values(), strict=True):
        assert one["step"] == other["step"]
        assert (one["exp_avg"] - other["exp_avg"]).norm() < 1e-3 * one["exp_avg"].norm()
    with ru.load(tmp_path / "True.pth") as unlearner:
        assert unlearner.forget(count=3).report()["exact"]


@pytest.mark.parametrize(
    ("model", "keys", "words"),
    [
        ("NGCF", {"hidden_size_list": [4]}, "for BPR, LightGCN, FPMC and TransRec, not for NGCF"),
        ("TransRec", SEQUENTIAL, "the loss that TransRec's trainer reports has more terms"),
        ("LINE", {}, "LINE draws more than its log holds"),
        ("BPR", {"learner": "sgd", "method": "influence", "damping": "scalar"}, "plain Adam"),
        ("BPR", {"clip_grad_norm": {"max_norm": 5}}, "plain Adam"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(make_options, model, keys, words):
    options = make_options(compiled=True, forget_count=1, output_dir="out", **keys)
    with pytest.raises(InputError, match=words):
        run_unlearn(model, "tiny", config_dict=options)


@pytest.mark.parametrize("model", TRAINED)
def test_a_compiled_training_that_diverges_ends_in_one_line(make_options, model):
    options = make_options(compiled=True, forget_count=1, output_dir="out", learning_rate=1e30, **TRAINED[model])
    with pytest.raises(InputError, match="loss became NaN after . epochs; lower learning_rate"):
        run_unlearn(model, "tiny", config_dict=options)
    assert not list(Path("out").glob("*.pth"))


def test_items_of_earlier_requests_stay_as_likely_in_later_ones(make_split, tmp_path):
    """By the same random numbers, the second request would change what the first one changed, and little else."""
    split = make_split(epochs=60, eval_step=0)
    train(split.config, split, tmp_path / "model.pth")
    user = np.bincount(split.users).argmax()
    second, first = np.flatnonzero(split.users == user)[-2:]  # the others keep their places
    items, pairs = split.items[[first, second]], []
    for row in (first, second):
        data = split.train.dataset
        tokens = data.id2token(data.uid_field, user), data.id2token(data.iid_field, split.items[row])
        pairs.append([tuple(map(str, tokens))])
    path = tmp_path / "model.pth"
    for number, pair in enumerate(pairs):
        with ru.load(path) as unlearner:
            assert unlearner.forget(pairs=pair).report()["exact"]
            path = tmp_path / f"{number}.pth"
            unlearner.save(path)
    log = TripleLog.open(log_path(path))
    own = np.flatnonzero(log.users == user)
    drawn = np.concatenate([log.epoch(epoch)[own].ravel() for epoch in range(log.n_epochs)])
    pool = split.n_items - 1 - len(own)
    expected, counts = len(drawn) / pool, [(drawn == item).sum() for item in items]
    assert expected > 50
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counts)


def test_trainings_of_other_seeds_return_items_by_other_random_numbers(make_split, tmp_path):
    split, found = make_split(epochs=2, eval_step=0), []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.pth"
        train(split.config, split, path, [], seed)
        found.append(Checkpoint.written(path, split.config).trained(split, seed).redraws)
    assert found == [(1,), (2,)]


@pytest.mark.parametrize("model", MODELS)
def test_twice_the_epochs_are_estimated_to_take_twice_as_long(make_split, tmp_path, model):
    found = []
    for epochs in (2, 4):
        split = make_split(model, epochs=epochs, eval_step=0, **MODELS[model])
        train(split.config, split, tmp_path / f"{epochs}.pth")
        opened = Checkpoint.written(tmp_path / f"{epochs}.pth", split.config).trained(split)
        found.append(ru.InfluenceUnlearner(opened).problem.seconds_again())
    assert found[1] == pytest.approx(2 * found[0])
