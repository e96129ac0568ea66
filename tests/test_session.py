"""Requests one after the other on one open model."""

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inside
from numba.core.dispatcher import Dispatcher

from recbole_unlearn.errors import InputError
from recbole_unlearn.influence import dot_product, kernels, replay
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import audit, secret
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage.files import file_checksum
from recbole_unlearn.testing import flat
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.replay import Replay
from recbole_unlearn.verify import verify

# Where a batch is all there is, the order of batches, which is drawn anew for each log, says nothing.
WHOLE_BATCH = {"train_batch_size": 5000, "epochs": 8}


@pytest.fixture
def trained(make_options):
    """Function (**keys) -> checkpoint of the tiny model."""

    def train(**keys):
        run_unlearn(
            "BPR",
            "tiny",
            config_dict=make_options(**{"compare": "none", "output_dir": "out", "forget_count": 1, **keys}),
        )
        return "out/model.pth"

    return train


def compiled():
    """Each of our kernels that is compiled or loaded, with its signatures and the module that it is of."""
    alive = (each for each in gc.get_objects() if type(each) not in weakref.ProxyTypes)
    found = [each for each in alive if isinstance(each, Dispatcher) and each.signatures]
    return {(each, *each.signatures): each.py_func.__module__ for each in found}


def forget_kernels():
    """Have those that are made for a number of columns loaded again, as in a new process."""
    for module in (dot_product, kernels, replay):
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()


@pytest.mark.parametrize("keys", [{}, {"method": "influence"}, {"method": "replay", "replay_rows": "touched"}])
def test_a_request_does_what_the_unlearner_does_and_the_model_serves_it(trained, make_model, keys):
    path = trained(**keys)
    session = InfluenceUnlearner.load(path)
    before = flat(session.model.state_dict()).clone()
    unlearned = session.forget("count", 9)
    alone = InfluenceUnlearner(Checkpoint.written(path, session.config).trained(session.split))
    expected = alone.unlearn(session.forgotten).state_dict
    assert torch.equal(flat(unlearned.state_dict), flat(expected))
    assert torch.equal(flat(session.model.state_dict()), flat(expected))
    assert not torch.equal(before, flat(expected))


@pytest.mark.parametrize(
    ("keys", "module"),
    [
        ({"method": "replay", "replay_rows": "touched"}, replay),
        ({"method": "replay", "replay_rows": "all"}, dot_product),
        ({"method": "influence"}, kernels),
    ],
)
def test_no_request_waits_for_the_compiler(trained, keys, module):
    path = trained(method="influence", train_neg_sample_args={"distribution": "uniform", "sample_num": 3})
    forget_kernels()
    session = InfluenceUnlearner.load(path, None, keys)
    loaded = compiled()
    session.forget("count", 9)
    assert compiled() == loaded and module.__name__ in loaded.values()


@pytest.mark.parametrize("keys", [{"replay_rows": "touched"}, {"replay_rows": "all"}, {"method": "influence"}])
def test_requests_add_up_as_they_do_through_files(trained, keys):
    """What is saved, loaded and asked again must be what stays open, but for the rounding of saved snapshots."""
    path = trained(**WHOLE_BATCH, **keys)
    session = InfluenceUnlearner.load(path)
    users = session.split.token("user", [3, 8])
    start = flat(session.model.state_dict()).clone()
    session.forget("users", [users[0]])
    session.save("first.pth")
    first = flat(session.model.state_dict()).clone()
    session.forget("users", [users[1]])
    again = InfluenceUnlearner.load("first.pth")
    assert torch.equal(flat(again.model.state_dict()), first)
    again.forget("users", [users[1]])
    second, through_files = flat(session.model.state_dict()), flat(again.model.state_dict())
    moved = (second - first).norm()
    assert moved > 0.02 * start.norm()
    assert (second - through_files).norm() < 0.02 * moved


def test_what_is_saved_holds_nothing_forgotten(trained):
    session = InfluenceUnlearner.load(trained())
    user, item = session.split.token("user", [5])[0], session.split.token("item", [7])[0]
    session.forget("users", [user])
    session.forget("items", [item])
    session.save("later.pth")
    state, log = checkpoint.load("later.pth")
    assert torch.equal(flat(state["state_dict"]), flat(session.model.state_dict()))
    assert 5 not in log.users and 7 not in log.items
    left = np.delete(np.arange(session.split.n_rows), session.forgotten)
    np.testing.assert_array_equal(log.users, session.split.users[left])
    unchanged = log.epoch(0) == session.log.epoch(0)[left]
    assert unchanged.mean() > 0.9 and (np.asarray(log.epoch(0))[~unchanged] == 7).all()  # item 7 is drawable again
    again = InfluenceUnlearner.load("later.pth")
    assert again.split.n_rows == len(left) and len(again.forgotten) == 0


@pytest.mark.parametrize(
    "request_",
    [{"ratio": 0.2}, {"count": 40}, {"core_users": 3}, {"edge_users": 2}, {"popular_items": 2}, {"rare_items": 4}],
)
def test_what_is_drawn_or_counted_is_so_of_what_is_left(trained, request_):
    """Whether it was saved in between or not; the same request again forgets as much again."""
    with InfluenceUnlearner.load(trained()) as session:
        session.forget(**request_)
        before = session.forgotten
        session.save("saved.pth")
        session.forget(**request_)
        more, split = np.setdiff1d(session.forgotten, before), session.split
        left = np.delete(np.arange(split.n_rows), before)
    with InfluenceUnlearner.load("saved.pth") as session:
        session.forget(**request_)
        np.testing.assert_array_equal(left[session.forgotten], more)
    ((kind, count),) = request_.items()
    column = {"users": split.users, "items": split.items}.get(kind.rpartition("_")[2])
    expected = round(count * len(left)) if kind == "ratio" else count
    assert len(more if column is None else np.unique(column[more])) == expected


def test_what_is_saved_is_on_record_request_by_request(trained):
    path = trained(audit="trail.jsonl")
    before = [*audit.read("out/trail.jsonl").records]
    with InfluenceUnlearner.load(path, config_dict={"audit": "trail.jsonl"}) as session:
        users = session.split.token("user", [5, 6])
        weights = []
        for user in users:
            session.forget("users", [user])
            weights.append(audit.weights_checksum(session.model.state_dict()))
        session.save("out/later.pth")
    trail = audit.verify("out/trail.jsonl", ["out/later.pth"])
    key = secret.read(Path("out/trail.jsonl.key"))
    weights = [secret.keyed(key, each) for each in weights]
    assert trail.records[:-1] == before
    record = trail.records[-1]
    rows = [int(np.sum(session.split.users == user)) for user in (5, 6)]
    assert [each["interactions"] for each in record["requests"]] == rows
    assert [each["weights"] for each in record["requests"]] == weights
    assert record["after"]["weights"] == weights[-1] != record["before"]["weights"]
    assert record["counts"]["interactions"] == sum(rows) and record["counts"]["users"] == 2
    assert len({record["request"], *(each["request"] for each in record["requests"])}) == 3


def test_nothing_is_saved_that_could_not_be_recorded(trained):
    with InfluenceUnlearner.load(trained(), config_dict={"audit": "nowhere/trail.jsonl"}) as session:
        session.forget("count", 3)
        with pytest.raises(InputError, match="nowhere does not exist"):
            session.save("later.pth")
    assert not Path("later.pth").exists()


def test_nothing_is_forgotten_or_saved_once_it_is_closed(trained):
    """The lock is gone: the checkpoint may be purged or replaced by another process."""
    with InfluenceUnlearner.load(trained()) as session:
        session.forget("count", 3)
    weights, forgotten = flat(session.state_dict).clone(), session.forgotten
    calls = (lambda: session.forget("count", 3), lambda: session.forget(rows=[5]), session.settle)
    for call in (*calls, lambda: session.save("later.pth")):
        with pytest.raises(InputError, match="is closed") as refused:
            call()
        assert "\n" not in str(refused.value)
    assert torch.equal(flat(session.state_dict), weights) and np.array_equal(session.forgotten, forgotten)
    assert not Path("later.pth").exists()


def test_requests_of_several_threads_wait_for_each_other(trained):
    """Each must begin with what the other left: else the last one's model still knows whom the others forgot."""
    with InfluenceUnlearner.load(trained(replay_rows="all")) as session:
        users, start = session.split.token("user", range(1, 5)), threading.Barrier(4)

        def forget(user):
            start.wait()
            session.forget(users=[user])

        threads = [threading.Thread(target=forget, args=(user,)) for user in users]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = np.flatnonzero(np.isin(session.split.users, range(1, 5)))
        np.testing.assert_array_equal(session.forgotten, expected)
        session.save("later.pth")
    assert verify("later.pth") < 1e-3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_is_open_is_not_copied(trained, copied):
    """Two that change one model would each be wrong about it."""
    with InfluenceUnlearner.load(trained()) as session, pytest.raises(InputError, match="save it, and load"):
        copied(session)


def test_a_file_is_never_overwritten(trained):
    session = InfluenceUnlearner.load(trained())
    session.forget("count", 3)
    with pytest.raises(InputError, match="exists already"):
        session.save("out/model.pth")


@pytest.mark.parametrize(
    "keys",
    [
        {"forget_users": ["u20"]},
        {"forget_count": 3},
        {"purge": True},
        {"purge": True, "purge_dataset": True, "everywhere": True},
        {"dry_run": True},
        {"changed_lists": 5},
        {"embeddings": True},
        {"methods": "all"},
        {"evaluate": "audit"},
        {"experiment": "paper"},
    ],
)
def test_what_only_a_run_does_is_refused_not_passed_over(trained, keys):
    """Who asks for a purge, and gets none, would believe that the original is gone."""
    with pytest.raises(InputError, match="open unlearner") as refused:
        InfluenceUnlearner.load(trained(), config_dict=keys)
    assert next(reversed(keys)) in str(refused.value) or next(iter(keys)) in str(refused.value)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (None, "must be pairs"),
        (5, "must be pairs"),
        ("u20", "must be pairs"),
        ([("u20",)], "must be pairs"),
        ([], "names nobody"),
        ([("u20", None)], "names nobody"),
        ([(1, 2)], "unknown user token '1'"),
        ([("u20", 1.5)], "1.5"),
    ],
)
def test_pairs_that_name_nobody_end_in_one_line(trained, pairs, said):
    with InfluenceUnlearner.load(trained()) as session:
        with pytest.raises(InputError, match=said):
            session.forget(pairs=pairs)
        assert not len(session.forgotten)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"rows": []}, "rows is empty"),
        ({"rows": [[1, 2], [3, 4]]}, "one flat list"),
        ({"rows": [[1], [3, 4]]}, "one flat list"),
        ({"rows": [1.5]}, "one flat list"),
        ({"rows": [10**6]}, "one flat list"),
        ({"spam": 3}, "no spam to forget"),
        ({"nonsense": 3}, "what to forget is one of rows, pairs, ratio, (?!.*spam)"),
    ],
)
def test_a_request_that_cannot_be_ends_in_one_line(trained, request_, said):
    with InfluenceUnlearner.load(trained()) as session:
        with pytest.raises(InputError, match=said) as refused:
            session.forget(**request_)
        assert "\n" not in str(refused.value) and not len(session.forgotten)


def test_who_is_held_out_alone_is_sent_to_what_takes_them(trained):
    """An open unlearner itself has no keys of purges."""
    with InfluenceUnlearner.load(trained()) as session:
        session.forget(users=[user := str(session.split.token("user", [5])[0])])
        session.save("later.pth")
    with InfluenceUnlearner.load("later.pth") as session:
        with pytest.raises(InputError, match="is taken by run_unlearn, with purge"):
            session.forget(users=[user])


@pytest.mark.parametrize("path", ["", ".", None, 5])
def test_what_is_no_path_ends_in_one_line(trained, path):
    with pytest.raises(InputError, match="must be the path of a file"):
        InfluenceUnlearner.load(path)
    with InfluenceUnlearner.load(trained()) as session:
        session.forget("count", 3)
        with pytest.raises(InputError, match="must be the path of a file"):
            session.save(path)


def test_small_requests_that_touch_most_of_the_data_together_end_in_a_replay_of_all_rows(trained):
    """All rows are then as after one request for everything: what single requests leave undone does not add up."""
    path = trained(**WHOLE_BATCH, exact_seconds=0)
    with InfluenceUnlearner.load(path) as session:
        chosen = [session.forget("count", n).details["all_rows"] for n in range(1, 30)]
    last = chosen.index(True) + 1
    assert 1 < last < len(chosen) and not chosen[last]
    with InfluenceUnlearner.load(path) as session:
        for n in range(1, last + 1):
            session.forget("count", n)
    at_once = InfluenceUnlearner.load(path, way=Replay("all"))
    expected = flat(at_once.forget(rows=session.forgotten).state_dict)
    torch.testing.assert_close(flat(session.model.state_dict()), expected, rtol=0, atol=1e-6)


def test_a_checkpoint_names_its_parents(trained):
    path, known = trained(), []
    for name in ("one.pth", "two.pth"):
        tie = checkpoint.load(path)[0]["triple_log"]
        assert tie.get("parents", []) == known
        known.append(tie["run_id"])
        with InfluenceUnlearner.load(path) as session:
            session.forget("count", 2)
            session.save(name)
        path = name
    tie = checkpoint.load(path)[0]["triple_log"]
    assert tie["parents"] == known and len({*known, tie["run_id"]}) == 3


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("BPR", {"method": "influence"}),
        ("SASRec", {"coupling": "paired", "n_layers": 1, "n_heads": 1, "inner_size": 8, "hidden_size": 8}),
        ("GRU4Rec", {"coupling": "paired", "hidden_size": 8, "num_layers": 1}),
    ],
)
def test_what_was_opened_stays_what_it_was_when_the_working_folder_is_another(
    tmp_path, write_data, interactions, make_options, model, keys
):
    """As in a notebook: two projects of one layout, whose models are trained on the same data by other seeds."""
    (tmp_path / "elsewhere").mkdir()
    own = {key: value for key, value in keys.items() if key not in ("coupling", "method")}
    timed = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    own |= {} if model == "BPR" else {"train_neg_sample_args": None, **timed}
    for seed, project in enumerate("ab"):
        write_data(tmp_path / project / "data", "tiny", interactions)
        with inside(tmp_path / project):
            once = {"forget_count": 1, "output_dir": "out", "evaluate": "none", "seed": seed, **own}
            run_unlearn(model, "tiny", config_dict=make_options(data_path="data", **once))
    items = tmp_path / "b" / "data" / "tiny" / "tiny.item"
    items.write_text(items.read_text().replace("\tc0", "\tc1"))  # of which the other project knows nothing

    def opened(**more):
        given = {key: keys[key] for key in ("coupling", "method") if key in keys}
        return InfluenceUnlearner.load("out/model.pth", config_dict={**given, "forget_category_field": "class", **more})

    with inside(tmp_path / "a"):
        with opened() as session:
            session.forget(category=["c0"])
            expected = flat(session.model.state_dict()).clone()
        session = opened(audit="trail/audit.jsonl", suppression="listed")
        Path("trail").mkdir()
    with inside(tmp_path / "b"), session:
        session.forget(category=["c0"])
        assert torch.equal(flat(session.model.state_dict()), expected)
        session.save(tmp_path / "elsewhere" / "new.pth")
        assert not Path("listed").exists() and not Path("trail").exists()
        InfluenceUnlearner.load(tmp_path / "elsewhere" / "new.pth").close()
    trail, listed = (tmp_path / "a" / name for name in ("trail/audit.jsonl", "listed"))
    audit.verify(trail, [tmp_path / "elsewhere" / "new.pth"])
    key, before = secret.read(secret.key_path(trail)), audit.read(trail).records[0]["before"]
    assert before["file"] == secret.keyed(key, file_checksum(tmp_path / "a" / "out" / "model.pth"))
    assert listed.exists()


def test_a_model_that_cannot_be_saved_leaves_no_key(trained):
    with InfluenceUnlearner.load(trained()) as session:
        session.forget("count", 3)
        Path("out/model.pth").rename("moved.pth")
        Path("new").mkdir()
        with pytest.raises(InputError, match="cannot write"):
            session.save("new/forgotten.pth")
        assert not [entry.name for entry in Path("new").iterdir() if not entry.name.startswith(".")]
