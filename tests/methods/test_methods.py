"""What holds for every method, and how methods and their settings are named."""

import copy
import re
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
import torch

from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.forgetting import percentiles
from recbole_unlearn.methods import METHODS, all_settings, chosen, settings_of
from recbole_unlearn.settings.keys import properties_dir
from recbole_unlearn.training.trained import same_weights

ON_GRAPHS = ("retrain", "fine_tune", "gradient_ascent", "rrl", "scif", "ifru", "gif", "ceu")


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def plain(state):
    """A nested dict with lists of numbers for tensors."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if torch.is_tensor(state) else state


def files(folder):
    """Of a log, but for what is written down when it was compared with its training."""
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != "guard.json"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_forgets_and_leaves_the_task_as_it_is(name, task, rows, run):
    before, stored = weights(task.model()), copy.deepcopy(task.stored)
    log = files(task.log.path)
    forgotten = run(name, task, rows)
    assert forgotten.seconds > 0 and not forgotten.model.training
    assert plain(task.stored) == plain(stored)
    assert same_weights(weights(task.model()), before) and files(task.log.path) == log
    # UBPR's undamped Hessian may have no positive curvature to go along at all; it says so
    assert not same_weights(weights(forgotten.model), before) or forgotten.details["negative_curvature"]
    auc = [percentiles(model, task.split, rows).mean() for model in (task.model(), forgotten.model)]
    # more epochs teach a model as small as this more about all items
    assert auc[1] < auc[0] or name in ("fine_tune", "ubpr")


@pytest.mark.parametrize("name", ["ours", "ubpr", "ifru", "gif", "ceu", "certified", "rrl"])
def test_preparation_is_timed(name, task):
    start = perf_counter()
    seconds = METHODS[name](task, settings_of(name)).prepare()
    assert 0 < seconds <= perf_counter() - start


def test_ours_compares_the_log_with_the_training_before_any_request_comes(task):
    other = replace(task, stored={**task.stored, "state_dict": dict(task.model().state_dict())})
    other.stored["state_dict"]["item_embedding.weight"] += 0.1  # which the log does not tell
    with pytest.raises(InputError, match="log"):
        METHODS["ours"](other, settings_of("ours") | {"method": "replay"}).prepare()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_bits_again(name, task, rows, run):
    first, _ = run(name, task, rows), torch.manual_seed(5)
    np.random.seed(5)
    assert same_weights(weights(first.model), weights(run(name, task, rows).model))


@pytest.mark.parametrize("name", ON_GRAPHS)
def test_a_graph_model_forgets_the_edges_too(name, graph_task, rows, run):
    model = run(name, graph_task, rows).model
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if name != "retrain":  # `train` builds the graph of retrained models itself
        edges = 2 * (graph_task.split.n_rows - len(rows))
        assert model.norm_adj_matrix._nnz() == edges


# -- names and settings


def test_all_names_every_method_and_one_name_may_be_repeated():
    assert chosen("all") == list(METHODS)
    assert chosen("ours, fine_tune,ours") == ["ours", "fine_tune"]


@pytest.mark.parametrize("given, near", [("fine_tun", "fine_tune"), ("gradient", "gradient_ascent"), ("UPBR", "ubpr")])
def test_an_unknown_name_is_refused_with_the_nearest_one(given, near):
    with pytest.raises(InputError, match=f"unknown method '{given}'; did you mean '{near}'") as refused:
        chosen(f"ours,{given}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["", "ours,,scif", 3, [1], {"ours": 1}])
def test_what_is_no_list_of_names_is_refused(value):
    with pytest.raises(InputError, match="methods must be names"):
        chosen(value)


SEQUENTIAL = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
}
KINDS = {
    "of pairs": ("NGCF", {}),
    "of a loss of its own": ("LINE", {}),
    "of labels": ("NeuMF", {}),
    "of histories": ("FPMC", {"loss_type": "BPR", **SEQUENTIAL}),
    "of a softmax": ("GRU4Rec", {"loss_type": "CE", "train_neg_sample_args": None, **SEQUENTIAL}),
    "of a knowledge graph": ("CFKG", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_methods_that_are_for_a_model_can_forget_and_others_are_refused(kind, make_trained_task, linked_path, run):
    """With fewer of what is slow; the shards are for two models, of which their own tests tell."""
    model, keys = KINDS[kind]
    task = make_trained_task(
        model, **{"epochs": 2, "data_path": linked_path, "eval_step": 0, "cg_max_iterations": 2, **keys}
    )
    for name in METHODS:
        if name in chosen("all", task.config):
            changes = {"steps": 2} if name in ("rrl", "gradient_ascent") else {}
            changes |= {"cg_max_iterations": 2} if name in ("scif", "ifru", "ceu") else {}
            changes |= {"iterations": 2, "scale": 1.0} if name == "gif" else {}
            forgotten = run(name, task, np.arange(0, 30, 3), **changes)
            assert not forgotten.model.training and forgotten.seconds > 0, name
        else:
            with pytest.raises(InputError, match=f"method {name} is not for {model}: .*; choose another method"):
                chosen(f"ours,{name}", task.config)
    found = set(chosen("all", task.config))
    assert {"retrain", "fine_tune", "ours"} <= found
    assert found >= {"gif", "scif"} if kind == "of pairs" else not found & {"gif", "scif"}


def test_every_method_has_a_yaml_file_that_explains_each_setting():
    folder = properties_dir() / "method"
    assert {file.stem for file in folder.glob("*.yaml")} >= set(METHODS)
    for file in folder.glob("*.yaml"):
        for line in filter(None, file.read_text().splitlines()):
            assert re.match(r"#|\s|[a-z_]+: .*# \(\w+( or \w+)?\) [A-Z].*\.$", line), (file.name, line)


def test_changes_replace_single_settings():
    assert settings_of("rrl", {"steps": 3})["steps"] == 3
    assert settings_of("rrl", {"strength": 2})["strength"] == 2
    assert all_settings(["rrl", "ours"], {"rrl": {"steps": 3}})["rrl"] == settings_of("rrl") | {"steps": 3}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"fine_tune": {"epoch": 5}}, "fine_tune has no setting 'epoch'; did you mean 'epochs'"),
        ({"retrain": {"epochs": 5}}, "retrain has no setting 'epochs'; it has none"),
        ({"fine_tune": {"epochs": 0.5}}, "epochs must be of the kind of 5, not 0.5"),
        ({"fine_tune": {"epochs": -1}}, "epochs must be of the kind of 5, not -1"),
        ({"ifru": {"hessian": 1}}, "hessian must be of the kind of False, not 1"),
        ({"scif": {"damping": float("nan")}}, "damping must be of the kind of 0.01, not nan"),
        ({"sisa": {"shards": 0}}, "sisa: shards must be above 0"),
        ({"sisa": {"slices": 1.5}}, "slices must be"),
        ({"sisa": {"ideal": 3}}, "ideal must be"),
        (
            {"receraser": {"partition": "users"}},
            "receraser: partition must be one of interaction, user, item, not 'users'",
        ),
        ({"ultrare": {"partition": "nobody"}}, "ultrare: partition must be one of"),
        ({"receraser": {"capacity": 0.9}}, "capacity must be a number of at least 1"),
        ({"receraser": {"dropout": 1.5}}, "dropout must be a number from 0 to 1, not 1.5"),
        ({"receraser": {"learning_rate": "fast"}}, "learning_rate must be a number"),
        ({"ultrare": {"entropy": 0}}, "entropy must be a number of at least 0.0001"),
        ({"ultrare": {"ridge": -1.0}}, "ridge must be"),
        ({"ultrare": {"rounds": 0}}, "rounds must be above 0"),
        ({"fine_tun": {}}, "did you mean 'fine_tune'"),
        ({"fine_tune": 5}, "fine_tune must hold settings"),
        (5, "method_args must be"),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(given, message):
    with pytest.raises(InputError, match=message) as refused:
        all_settings(list(METHODS), given)
    assert "\n" not in str(refused.value)
