"""Training again as the way of every model: against a loop over the log, the original, one request for two, and files.

The knowledge graph, histories, dropout and negatives of all of them; see `training.again.trained_again`.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL
from recbole.data.interaction import Interaction
from recbole.quick_start import load_data_and_model

from recbole_unlearn.data.split import Split, pairwise_loader
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Paired
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.testing import flat
from recbole_unlearn.training.again import recorded, train_paired
from recbole_unlearn.training.fit import new_model, train
from recbole_unlearn.training.trained import Trained, same_weights
from recbole_unlearn.unlearner import load
from recbole_unlearn.unlearners.any_loss import AnyLoss
from recbole_unlearn.unlearners.influence import Influence
from recbole_unlearn.unlearners.replay import Replay
from recbole_unlearn.verify import verify

ONE = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}
TWO = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}}
SOFTMAX = {**SEQUENTIAL, "loss_type": "CE", "train_neg_sample_args": None, "hidden_size": 8, "inner_size": 8}
FACTS = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
GRAPH = {"load_col": {"inter": ["user_id", "item_id"], **FACTS}, **TWO}
CLIPPED = {"learner": "rmsprop", "damping": "scalar", "clip_grad_norm": {"max_norm": 1.0}}  # no kernel does this
NGCF = {"hidden_size_list": [8], "message_dropout": 0.2, **TWO}
MODELS = {
    "FPMC": SEQUENTIAL,
    "FPMC, popularity": SEQUENTIAL | {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1}},
    "TransRec": SEQUENTIAL,
    "GRU4Rec": {**SEQUENTIAL, "hidden_size": 8, "dropout_prob": 0.3},
    "GRU4Rec, no dropout": {**SEQUENTIAL, "hidden_size": 8, "dropout_prob": 0.0},
    "GRU4Rec, CE": {**SOFTMAX, "dropout_prob": 0.3},
    "SASRec, CE": SOFTMAX,
    "GRU4Rec, CE, no dropout": {**SOFTMAX, "dropout_prob": 0.0},
    "GRU4Rec, CE, in order": {**SOFTMAX, "dropout_prob": 0.0, "shuffle": False},
    "BERT4Rec, CE": {**SOFTMAX, "mask_ratio": 0.4},
    "BERT4Rec, CE, validated": {**SOFTMAX, "mask_ratio": 0.4, "eval_step": 1},  # masks of validation are drawn too
    "NeuMF": {"mlp_hidden_size": [8], **TWO},
    "NeuMF, static": {"mlp_hidden_size": [8], "negatives": "static", "dropout_prob": 0.0, **TWO},
    "NCL": {"num_clusters": 5, "warm_up_step": 1, "n_layers": 1, **ONE},
    "NGCF": NGCF,
    "NGCF, no dropout": {**NGCF, "message_dropout": 0.0},
    "NGCF, popularity": {
        **NGCF,
        "message_dropout": 0.0,
        "train_neg_sample_args": {"distribution": "popularity", "sample_num": 1},
    },
    "NGCF, static": {**NGCF, "negatives": "static", **CLIPPED},
    "CKE": GRAPH,
    "LINE": TWO,
    "LINE, first order": {"order": 1, **ONE},
    "LINE, static, decay": {"negatives": "static", "second_order_loss_weight": 0.3, "weight_decay": 1e-3, **ONE},
    "CFKG": {**GRAPH, **ONE},
    "CFKG, two negatives, decay": {**GRAPH, "weight_decay": 1e-3},
    "CFKG, distances": {**GRAPH, "loss_function": "transe"},
    "KTUP": {**GRAPH, "train_rec_step": 1, "train_kg_step": 1},  # every second epoch is of facts alone
    "KTUP, validated": {**GRAPH, "eval_step": 1},
    "SimpleX": {"history_len": 5, **TWO},
    "KGCN": {**GRAPH, "neighbor_sample_size": 2},
    "BPR, descent": {"learner": "sgd", "learning_rate": 0.5, **TWO},
    "LightGCN, clipped": {"n_layers": 2, "clip_grad_norm": {"max_norm": 0.01}, **ONE},
    "DMF": {"user_hidden_size_list": [8], "item_hidden_size_list": [8], **ONE},
}
LOGGED = ["FPMC", "TransRec"]
DRAWING = ["LINE", "LINE, first order", "LINE, static, decay", "CFKG", "CFKG, two negatives, decay"]
COMPILED = LOGGED + DRAWING  # the latter draw more than a log holds


@pytest.fixture(scope="session")
def original(make_config, linked_path, tmp_path_factory):
    """Function name of `MODELS` -> checkpoint, trained once."""
    made = {}

    def make(name):
        if name == "NCL":
            pytest.importorskip("faiss")
        if name not in made:
            folder = tmp_path_factory.mktemp("again")
            keys = {"epochs": 3, "eval_step": 0, "data_path": linked_path, "checkpoint_dir": str(folder)}
            config = make_config(name.partition(",")[0], **keys | MODELS[name])
            train(config, Split.seeded(config), folder / "model.pth")
            made[name] = folder / "model.pth"
        return made[name]

    return make


def some(split):
    """Rows of many users, all of one among them, and neighbours in histories."""
    return np.union1d(np.arange(0, split.n_rows, 20), np.flatnonzero(split.users == split.users[60]))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*COMPILED, "FPMC, popularity")])
def test_with_nothing_forgotten_it_ends_in_the_weights_to_the_last_bit(original, name):
    """Facts, dropout and all: the guard measures it before anything is claimed, once."""
    with load(original(name), way=Replay()) as unlearner:
        assert unlearner.guard.checked == "replayed" and unlearner.guard.distance == 0
        assert unlearner.guard.limit == 0.001
    with load(original(name), way=Replay()) as unlearner:
        assert unlearner.guard.seconds == 0 and unlearner.guard.distance == 0


@pytest.mark.parametrize("name", [*LOGGED, "FPMC, popularity"])
def test_kernels_end_where_recboles_trainer_does_but_for_rounding(original, name, tmp_path):
    """The guard, a request, and what is made of it; by RecBole's trainer it is the weights to the last bit."""
    with load(original(name)) as unlearner:
        assert unlearner.method == "replay" and 0 < unlearner.guard.distance < 1e-5
        rows, before = some(unlearner.split), unlearner.trained
        found = unlearner.forget(rows=rows)
        assert found.details["exact"] and found.details["parameters"] == len(flat(found.state_dict))
        unlearner.save(tmp_path / "forgotten.pth")
        unlearner.forget(rows=np.setdiff1d(np.arange(30), rows))
        unlearner.save(tmp_path / "again.pth")
    again = {}
    for each in ([], rows):
        path = tmp_path / f"{len(each)}.pth"
        again[len(each)], _ = train_paired(
            before.config, before.split, path, original(name), each, before.config["seed"]
        )
    assert same_weights(again[0].state_dict(), before.model.state_dict())
    effect = flat(again[len(rows)].state_dict()) - flat(before.model.state_dict())
    left = flat(found.state_dict) - flat(again[len(rows)].state_dict())
    assert 0 < left.norm() < 1e-4 * effect.norm()
    assert verify(tmp_path / "forgotten.pth") < 1e-5 and verify(tmp_path / "again.pth") < 1e-5


@pytest.mark.parametrize("name", DRAWING)
def test_kernels_draw_what_the_model_and_its_facts_do(original, name, tmp_path):
    """Weights, moments and numbers of steps of a request, and of the next one, are those of RecBole's trainer."""
    with load(original(name), way=Replay()) as unlearner:
        assert 0 < unlearner.guard.distance < 1e-5 and unlearner.problem.seconds_again() < 1
        split, rows, before = unlearner.split, some(unlearner.split), unlearner.trained
        epochs = Paired(before.recorded(), np.isin(np.arange(split.n_rows), rows), before.config["seed"])
        kept, negatives = epochs.kept, before.recorded().negatives
        assert not np.array_equal(epochs.negatives(1)[kept], negatives[1][kept])  # forgotten items return
        gone = np.setdiff1d(split.users[rows], split.users[kept])
        assert len(gone) == 1
        found = unlearner.forget(rows=rows)
        assert found.details["exact"] and found.details["parameters"] == len(flat(found.state_dict))
        moments = unlearner.training.optimizer
        more = np.setdiff1d(np.arange(30), rows)
        again = unlearner.forget(rows=more)
        unlearner.save(tmp_path / "again.pth")
    for gone, ours in ((rows, found), (np.union1d(rows, more), again)):
        path = tmp_path / "paired.pth"
        theirs, _ = train_paired(before.config, split, path, original(name), gone, before.config["seed"])
        effect = flat(theirs.state_dict()) - flat(before.model.state_dict())
        assert 0 < (flat(ours.state_dict) - flat(theirs.state_dict())).norm() < 1e-4 * effect.norm()
        if ours is found:
            states = torch.load(path, weights_only=True)["optimizer"]["state"]
            assert moments.keys() == states.keys()
            for number, state in states.items():
                assert float(moments[number]["step"]) == float(state["step"])
                for key in ("exp_avg", "exp_avg_sq"):
                    assert (moments[number][key] - state[key]).norm() < 1e-4 * state[key].norm()
    with load(tmp_path / "again.pth", way=Replay()) as later:
        assert later.guard.checked == "inherited" and later.forget(count=3).details["exact"]
    with pytest.raises(InputError, match="trains on more than its log holds|only originals"):
        verify(tmp_path / "again.pth")


def test_the_loss_of_distances_is_left_to_recboles_trainer(original):
    with load(original("CFKG, distances"), way=Replay()) as unlearner:
        assert unlearner.guard.distance == 0


@pytest.mark.parametrize(
    "name", ["GRU4Rec, no dropout", "NGCF, no dropout", "NGCF, popularity", "GRU4Rec, CE, no dropout"]
)
def test_it_ends_where_a_loop_over_the_log_without_the_rows_does(original, name):
    """A loop written for this test: the model's loss on the rows that are left, and an optimiser of torch's."""
    with load(original(name), way=Replay()) as unlearner:
        config, split, log, rows = unlearner.config, unlearner.split, unlearner.log, some(unlearner.split)
        found = unlearner.forget(rows=rows)
        gone = np.isin(np.arange(log.n_rows), rows)
        epochs = Paired(recorded(config, split, unlearner.trained.stored, log), gone, config["seed"])
        data = split.remaining_dataset(rows)
        model = new_model(config, split, data=data)
        with torch.no_grad():
            for value, start in zip(model.parameters(), new_model(config, split).parameters(), strict=True):
                value.copy_(start)
    left = np.flatnonzero(~gone[np.argsort(split.data_row)])  # rows of the whole data set, in its order
    place = {int(row): n for n, row in enumerate(left)}
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    model.train()
    for epoch in epochs:
        assert not gone[epoch.order].any() and len(epoch.order) == log.n_rows - len(rows)
        for start in range(0, len(epoch.order), epochs.recorded.batch_rows):
            own = epoch.order[start : start + epochs.recorded.batch_rows]
            batch = data[np.array([place[int(split.data_row[row])] for row in own])].repeat(max(log.negatives, 1))
            if log.negatives:
                drawn = torch.from_numpy(epoch.negatives[own].T.astype(np.int64).ravel())
                batch.interaction[pairwise_loader(split.train).neg_item_id] = drawn
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()
    assert same_weights(model.state_dict(), found.state_dict)
    assert found.details["exact"] and found.details["epochs"] == 3 and found.details["coupling"] == "paired"


@pytest.mark.parametrize("coupling", ["paired", "fresh"])
def test_rows_that_are_not_shuffled_stay_in_their_order(original, coupling, tmp_path):
    """RecBole's ``shuffle: False``: but for the weights that it begins with, nothing of this training is random."""
    name = "GRU4Rec, CE, in order"
    with load(original(name), way=Replay(coupling=coupling)) as unlearner:
        config, split, rows = unlearner.config, unlearner.split, some(unlearner.split)
        found = unlearner.forget(rows=rows)
    if coupling == "paired":
        model, _, _ = train(config, split, tmp_path / "retrained.pth", rows, config["seed"], False)
        assert same_weights(model.state_dict(), found.state_dict)
    (epoch, *others) = found.training.epochs
    left = split.data_row[epoch.order]
    assert (np.diff(left) > 0).all() and len(left) == split.n_rows - len(rows)
    assert all(np.array_equal(each.order, epoch.order) for each in others)


@pytest.mark.parametrize("name", ["GRU4Rec", "GRU4Rec, CE"])
def test_histories_do_not_know_what_is_forgotten(original, name):
    """Of its batches neither: the item of a row that is gone is in no history of what the new model trained on."""
    with load(original(name), way=Replay()) as unlearner:
        rows = np.flatnonzero(unlearner.split.items == unlearner.split.items[40])
        unlearner.forget(rows=rows)
        item, dataset = unlearner.split.items[40], unlearner.problem.view.dataset
        own = torch.from_numpy(np.unique(unlearner.split.users[rows]))
        histories = dataset.inter_feat["item_id_list"][torch.isin(dataset.inter_feat["user_id"], own)]
        assert not (histories == item).any() or unlearner.split.first_items_kept(rows)


@pytest.mark.parametrize("name", ["BPR, descent", "LightGCN, clipped"])
def test_steps_that_kernels_do_not_take_are_taken_again_by_recboles_trainer(original, name, tmp_path):
    """By default, and with no setting of a step: nothing of it is approximate."""
    with load(original(name)) as unlearner:
        before, rows = unlearner.trained, some(unlearner.split)
        found = unlearner.forget(rows=rows)
        assert (found.method, found.details["exact"], unlearner.guard.distance) == ("replay", True, 0)
        unlearner.save(tmp_path / "forgotten.pth")
    paired, _ = train_paired(
        before.config, before.split, tmp_path / "paired.pth", original(name), rows, before.config["seed"]
    )
    assert same_weights(paired.state_dict(), found.state_dict)
    assert verify(tmp_path / "forgotten.pth") < 1e-5  # sums in another order
    with load(tmp_path / "forgotten.pth", way=Replay(coupling="fresh")) as unlearner:
        assert unlearner.forget(count=3).details["exact"]
        unlearner.save(tmp_path / "fresh.pth")
    assert verify(tmp_path / "fresh.pth") < 1e-5
    with load(original(name), config_dict={"method": "influence", "damping": "scalar"}) as unlearner:
        assert unlearner.problem.derived  # its closed forms are as right as ever
        assert unlearner.method == "influence"


@pytest.mark.parametrize("requests", [1, 100])
def test_where_damping_does_not_fit_the_optimiser_no_step_is_taken(original, requests):
    name = "BPR, descent"
    with load(original(name), config_dict={"exact_seconds": 0.0 if requests == 1 else 10.0}) as unlearner:
        if requests == 1:
            assert unlearner.chosen.endswith("no step is there for BPR: damping: adam does not fit learner: sgd")
        unlearner.hurry(10**6 if requests > 1 else 1)
        assert unlearner.forget(count=3).details["exact"]
    for keys in ({"method": "influence"}, {"unlearn_params": "*user*"}, {"replay_rows": "touched"}):
        with pytest.raises(InputError, match="damping: adam does not fit learner: sgd; use damping: scalar"):
            load(original(name), config_dict=keys)
    with pytest.raises(InputError, match="damping: adam does not fit learner: sgd; use damping: scalar, or method"):
        load(original(name), way=Influence())


@pytest.mark.parametrize("name", ["BERT4Rec, CE", "NeuMF", "NCL"])
def test_models_without_a_step_are_trained_again_however_long_it_takes(original, name):
    with load(original(name), config_dict={"exact_seconds": 0.0}) as unlearner:
        assert unlearner.method == "replay" and "longer than exact_seconds, but no step" in unlearner.chosen
        rows = some(unlearner.split)
        before, change = copies(unlearner.state_dict), unlearner.forget(rows=rows)
        assert change.details["exact"] and not same_weights(change.state_dict, before)
        nothing = unlearner.problem.retrained(rows[:0], "paired")  # what has been forgotten stays so
        assert same_weights(nothing.state_dict, change.state_dict)
    with pytest.raises(InputError, match="method: influence is not"):
        load(original(name), config_dict={"method": "influence"})
    with pytest.raises(InputError, match="method: influence is not possible"):
        load(original(name), way=Influence())


def test_labels_that_are_trained_on_again_are_those_of_a_loop_over_the_log(original):
    """Batches of items that were taken, label 1, and the logged negatives after them, label 0."""
    with load(original("NeuMF, static"), way=Replay()) as unlearner:
        config, split, log, rows = unlearner.config, unlearner.split, unlearner.log, some(unlearner.split)
        found = unlearner.forget(rows=rows)
        gone = np.isin(np.arange(log.n_rows), rows)
        epochs = Paired(recorded(config, split, unlearner.trained.stored, log), gone, config["seed"])
        model = new_model(config, split).train()
    optimizer, size = torch.optim.Adam(model.parameters(), lr=config["learning_rate"]), config["train_batch_size"] // 3
    for epoch in epochs:
        for start in range(0, len(epoch.order), size):
            own = epoch.order[start : start + size]
            items = np.concatenate([split.items[own], *epoch.negatives[own].T])
            columns = {"user_id": np.tile(split.users[own], 3), "item_id": items}
            columns["label"] = np.repeat(np.float32([1, 0, 0]), len(own))
            batch = Interaction(
                {
                    key: torch.as_tensor(np.asarray(value, np.float32 if key == "label" else np.int64))
                    for key, value in columns.items()
                }
            )
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()
    assert same_weights(model.state_dict(), found.state_dict)


@pytest.mark.parametrize("name", ["GRU4Rec", "GRU4Rec, CE", "CKE", "SimpleX"])
def test_two_requests_are_one_and_so_are_steps_that_are_settled(original, name, tmp_path):
    with load(original(name), way=Replay()) as unlearner:
        rows = some(unlearner.split)
        before = copies(unlearner.state_dict)
        at_once = copies(unlearner.forget(rows=rows).state_dict)
        assert not same_weights(at_once, before)
    with load(original(name), way=Replay()) as unlearner:
        for part in (rows[::2], rows[1::2]):
            unlearner.forget(rows=part)
        assert same_weights(unlearner.state_dict, at_once) and unlearner.settled
    with load(original(name), way=Influence(cg_max_iterations=2)) as unlearner:
        unlearner.forget(rows=rows)
        assert not unlearner.settled and not same_weights(unlearner.state_dict, at_once)
        settled = unlearner.settle()
        assert settled.details["exact"] and unlearner.settled and unlearner.guard.distance == 0
        assert same_weights(unlearner.state_dict, at_once) and same_weights(settled.model.state_dict(), at_once)


def test_a_step_is_damped_by_the_steps_that_rows_took(original):
    """Every second of KTUP's epochs is of facts alone: they train items too, and no row pulls."""
    with load(original("KTUP"), way=Influence()) as unlearner:
        problem, optimizer = unlearner.problem, unlearner.trained.optimizer
        named = dict(unlearner.trained.model.named_parameters())
        users, items = (optimizer["state"][list(named).index(f"{side}_embedding.weight")] for side in ("user", "item"))
        assert items["step"] > users["step"]
        sizes = [value.numel() for value in named.values()]
        found = dict(zip(named, problem.damping(unlearner.way).split(sizes), strict=True))["item_embedding.weight"]
        squares, group = items["exp_avg_sq"].double().flatten(), optimizer["param_groups"][0]
        roots = (squares / (1 - group["betas"][1] ** int(items["step"]))).sqrt() + group["eps"]
        expected = problem.n_triples * roots / (group["lr"] * int(users["step"]))
        torch.testing.assert_close(found[squares > 0], expected[squares > 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["FPMC", "GRU4Rec, CE, no dropout"])
def test_what_is_saved_is_that_training(original, tmp_path, name):
    """Weights, the optimiser's state, and the log without the rows: from which the next request goes on."""
    with load(original(name), way=Replay()) as unlearner:
        rows = some(unlearner.split)
        unlearner.forget(rows=rows)
        state, optimizer = copies(unlearner.state_dict), unlearner.training.optimizer
        unlearner.save(tmp_path / "new.pth")
        left = len(unlearner.split.users) - len(rows)
    with load(tmp_path / "new.pth", way=Replay()) as again:
        assert same_weights(again.state_dict, state) and again.guard.checked == "inherited"
        assert TripleLog.open(again.log.path).n_rows == left
        kept = again.trained.optimizer["state"]
        assert all(torch.equal(kept[n]["exp_avg_sq"], optimizer[n]["exp_avg_sq"]) for n in optimizer)
        distance, _ = again.problem.reproduction()
        assert distance < 1e-5  # of its log: the order within a batch is another, which is rounding
        assert again.forget(count=3).details["exact"]


@pytest.mark.parametrize("name", ["SimpleX", "KGCN", "DMF"])
def test_what_is_read_again_scores_as_the_model_that_was_trained(original, tmp_path, name):
    """Histories and neighbours are those that its own training drew, and nothing kept is the original's."""

    def scores(model, split):
        users, items = np.divmod(np.arange(5 * (split.n_items - 1)), split.n_items - 1)
        with torch.no_grad():
            asked = {"user_id": torch.from_numpy(users + 1), "item_id": torch.from_numpy(items + 1)}
            return model.eval().predict(Interaction(asked)).numpy().ravel()

    with load(original(name), way=Replay(coupling="fresh")) as unlearner:
        before = scores(unlearner.model, unlearner.split)
        served = scores(unlearner.forget(rows=some(unlearner.split)).model, unlearner.split)
        assert np.abs(served - before).max() > 0.01
        unlearner.save(tmp_path / "new.pth")
    with load(tmp_path / "new.pth") as again:
        np.testing.assert_allclose(scores(again.model, again.split), served, atol=1e-6)
        assert again.forget(count=3).training
    found = load_data_and_model(str(tmp_path / "new.pth"))
    np.testing.assert_allclose(scores(found[1], again.split), served, atol=1e-6)
    kept = torch.load(tmp_path / "new.pth", weights_only=True)["other_parameter"]
    assert kept == {}


@pytest.mark.parametrize("name", ["FPMC", "GRU4Rec, CE"])
def test_fresh_random_numbers_are_gone_on_from(original, name):
    """The next request is paired with the training that was fresh: with nothing forgotten it is that, bit by bit."""
    with load(original(name), way=Replay(coupling="fresh")) as unlearner:
        rows = some(unlearner.split)
        first = flat(unlearner.unlearn(rows).state_dict)
        assert (first - flat(unlearner.unlearn(rows).state_dict)).norm() > 0.1 * first.norm()
        now = copies(unlearner.forget(rows=rows).state_dict)
        assert same_weights(unlearner.problem.retrained(rows[:0], "paired").state_dict, now)


@pytest.mark.parametrize("name", ["FPMC", "GRU4Rec, CE", "NGCF, no dropout", "CKE", "NGCF, static"])
def test_moments_that_a_purge_keeps_of_approximate_results_are_measured_on_what_remains(original, tmp_path, name):
    """As large as the original's, without a number of it; other optimisers keep nothing."""
    shutil.copytree(original(name).parent, tmp_path / "old")
    path, step = tmp_path / "old/model.pth", {"method": "influence", "cg_max_iterations": 2}
    before = torch.load(path, weights_only=True)["optimizer"]["state"]
    asked = {"checkpoint": str(path), "forget_ratio": 0.05, "purge": True, "output_dir": str(tmp_path / "out")}
    run_unlearn(config_dict={**asked, **step, "compare": "none", "evaluate": "none"})
    after = torch.load(tmp_path / "out/unlearned.pth", weights_only=True)["optimizer"]
    assert len(after["state"]) == (0 if name == "NGCF, static" else len(before)) and not path.exists()
    for n, state in after["state"].items():
        assert state["step"] == before[n]["step"] and not state["exp_avg"].any()
        new, old = (each["exp_avg_sq"] for each in (state, before[n]))
        assert new.shape == old.shape and new.dtype == old.dtype and not ((new == old) & (old != 0)).any()
        assert 0.3 < new.sqrt().mean() / old.sqrt().mean() < 3
    with load(tmp_path / "out/unlearned.pth", config_dict=step) as again:
        again.forget(count=3)


def test_moments_are_measured_of_what_a_step_was_told_to_leave_too(original, tmp_path):
    """The next request may change it: what has none would count as never trained, and stay."""
    shutil.copytree(original("GRU4Rec, CE, no dropout").parent, tmp_path / "old")
    step = {"method": "influence", "cg_max_iterations": 2, "log_epochs": 1, "curvature_triples": 128}
    asked = {"checkpoint": str(tmp_path / "old/model.pth"), "purge": True, "output_dir": str(tmp_path / "out")}
    some_of_it = {"forget_ratio": 0.05, "unlearn_params": "item_*", "compare": "none", "evaluate": "none"}
    run_unlearn(config_dict={**asked, **step, **some_of_it})
    with load(tmp_path / "out/unlearned.pth", config_dict={**step, "unlearn_params": None}) as again:
        before = copies(again.state_dict)
        after = again.forget(count=3).state_dict
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_auto_takes_it_where_training_is_short(original):
    with load(original("NGCF, no dropout"), config_dict={"cg_max_iterations": 2}) as unlearner:
        assert unlearner.method == "replay" and "training takes about" in unlearner.chosen
        unlearner.hurry(10**9)
        assert unlearner.forget(rows=[3]).details["exact"] is False and not unlearner.settled
        assert unlearner.settle_if_wanted().details["exact"]
    with load(original("NGCF, no dropout"), config_dict={"exact_seconds": 0.0}) as unlearner:
        assert unlearner.method == "influence" and "training takes about" in unlearner.chosen
    opened = unlearner.trained
    opened.stored["triple_log"].pop("seconds")
    assert AnyLoss(opened).seconds_again() == np.inf


def test_auto_takes_no_step_for_a_cohort(original):
    """However long training takes, and also where many requests come to more than a tenth."""
    path, keys = original("NGCF, no dropout"), {"exact_seconds": 0.0, "cg_max_iterations": 2}
    with load(path, config_dict=keys) as unlearner:
        n = unlearner.split.n_rows
        found = unlearner.forget(rows=np.arange(0, n, 12))
        assert found.method == "influence" and not found.details.get("exact")
        found = unlearner.forget(rows=np.arange(1, n, 12))
        assert found.method == "replay" and found.details["exact"]
        assert found.details["chosen"] == "auto: a step is no way to forget 17% of the interactions"
        assert unlearner.guard.distance is not None and unlearner.settled
    with load(path, config_dict=keys) as at_once:
        both = np.sort(np.concatenate([np.arange(0, n, 12), np.arange(1, n, 12)]))
        assert same_weights(at_once.forget(rows=both).state_dict, found.state_dict)
    with load(path, config_dict={"method": "influence", "cg_max_iterations": 2}) as asked:
        assert asked.forget(rows=np.arange(0, n, 5)).method == "influence"


def test_what_cannot_be_repeated_is_not_called_exact(original, monkeypatch):
    """A request for it ends in one line, and auto takes a step, which says why."""
    path = original("NGCF")
    (TripleLog.open(_log(path)).path / "guard.json").unlink(missing_ok=True)
    honest = Trained.recorded
    monkeypatch.setattr(Trained, "recorded", lambda self: _other(honest(self)))
    with pytest.raises(InputError, match="with nothing forgotten ends .* of the way") as refused:
        load(path, way=Replay())
    assert "\n" not in str(refused.value)
    with load(path) as unlearner:
        assert unlearner.method == "influence" and "with nothing forgotten" in unlearner.chosen
        with pytest.raises(InputError, match="with nothing forgotten"):
            unlearner.settle()


@pytest.mark.parametrize(
    ("name", "way", "said"),
    [
        ("FPMC", Replay("touched"), "as a whole"),
        ("FPMC", {"method": "replay", "unlearn_params": "item*"}, "unlearn_params"),
    ],
)
def test_what_training_again_cannot_do_is_refused(original, name, way, said):
    asked = {"config_dict": way} if isinstance(way, dict) else {"way": way}
    with pytest.raises(InputError, match=said):
        load(original(name), **asked)


def test_results_that_may_have_drawn_in_training_are_not_called_wrong(original):
    assert verify(original("NGCF")) == 0
    with load(original("NGCF")) as unlearner:
        unlearner.forget(rows=[3])
        unlearner.save("later.pth")
    with pytest.raises(InputError, match="only originals"):
        verify("later.pth")


def _log(path):
    return path.with_suffix(".triples")


def _other(found):
    """A training that was recorded with other negatives than it had."""
    first, *rest = found.negatives
    return replace(found, negatives=[np.roll(first, 1, 0), *rest])
