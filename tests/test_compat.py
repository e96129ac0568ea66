"""RecBole on versions that it was not written for: without ray, on numpy 2, on pandas 3; and RecBole 1.2.0 as 1.2.1."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.interaction import Interaction
from recbole.sampler import RepeatableSampler
from recbole.utils import get_model

ROOT = Path(__file__).resolve().parent.parent
NO_RAY = """
import sys

class NoRay:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay)
"""


def python(script, *arguments, cwd=None):
    """A script in a process where ray cannot be imported; returns the finished process."""
    command = [sys.executable, "-c", f"{NO_RAY}\nsys.path.insert(0, {str(ROOT)!r})\n{script}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


# -- ray


def test_recbole_alone_needs_ray():
    """Otherwise the tests below would show nothing."""
    done = python("import recbole.quick_start")
    assert done.returncode and "No module named" in done.stderr


OBJECTIVE = """
import json
import recbole_unlearn
from recbole.quick_start import objective_function
options = json.loads(sys.argv.pop())
print(json.dumps(objective_function({"model": "BPR", "dataset": "tiny", **options})["test_result"]))
"""


def test_the_objective_of_hyperopt_works_without_ray(make_options, tmp_path):
    done = python(OBJECTIVE, json.dumps(make_options(epochs=1)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["recall@10"] > 0


ASK = """
import recbole_unlearn
from recbole.quick_start.quick_start import tune
assert "ray" not in sys.modules
try:
    tune.run
except recbole_unlearn.InputError as error:
    print(error)
try:
    import ray
except ModuleNotFoundError:
    print("absent")
"""


def test_asking_for_ray_tune_without_ray_is_answered_in_one_line():
    done = python(ASK)
    assert done.returncode == 0, done.stderr
    line, absent = done.stdout.splitlines()
    assert "Ray Tune (run) is asked for and not installed; pip install" in line and absent == "absent"


LOADED_BEFORE = """
from types import ModuleType
ray = ModuleType("ray")
ray.tune = ModuleType("ray.tune")
sys.modules["ray"] = ray
import recbole.quick_start.quick_start as quick_start
assert quick_start.tune is ray.tune
import recbole_unlearn
assert quick_start.tune is not ray.tune and sys.modules["ray"] is ray
"""


def test_a_quick_start_that_was_loaded_before_reports_like_any():
    done = python(LOADED_BEFORE)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def reports(monkeypatch):
    """Function (report of a module ``ray.tune``) that puts this module in the place of ray."""

    def install(report):
        ray = ModuleType("ray")
        ray.tune = ModuleType("ray.tune")
        ray.tune.report = report
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.tune", ray.tune)

    return install


def test_where_ray_is_loaded_it_gets_the_report_as_its_version_wants_it(reports):
    from recbole.quick_start.quick_start import tune

    seen = []
    reports(lambda _metric=None, **kwargs: seen.append((_metric, kwargs)))
    tune.report(**{"ndcg@10": 0.5})
    reports(lambda metrics, *, checkpoint=None: seen.append((metrics, checkpoint)))
    tune.report(**{"ndcg@10": 0.25})
    assert seen == [(None, {"ndcg@10": 0.5}), ({"ndcg@10": 0.25}, None)]


def test_where_ray_is_installed_the_rest_of_it_is_there(reports):
    from recbole.quick_start.quick_start import tune

    reports(print)
    sys.modules["ray"].tune.choice = max  # pyright: ignore[reportAttributeAccessIssue]
    assert tune.choice is max


# -- numpy


def test_a_config_names_the_kinds_of_numbers_as_recbole_does(make_config):
    make_config()
    kinds = [np.bool, np.int, np.float, np.complex, np.object, np.str, np.long, np.unicode]  # pyright: ignore
    assert kinds == [np.bool_, np.int_, np.float64, np.complex128, np.object_, np.str_, np.int_, np.str_]


def test_recboles_own_config_works_too(make_options):
    assert Config("BPR", "tiny", config_dict=make_options())["embedding_size"] == 8


# -- pandas


@pytest.fixture
def holed(write_data, interactions, tmp_path):
    """Data path of the tiny data set; of its first four items each lacks some features, the last of them all."""
    path = write_data(tmp_path / "holed", "tiny", interactions)
    items = sorted({item for _, item, _ in interactions})
    rows = [f"{item}\tk{n % 3}\t{n}\ta b\t{n} 2.5" for n, item in enumerate(items)]
    rows[:4] = [f"{items[0]}\t\t0\ta\t1", f"{items[1]}\tk1\t\t\t1", f"{items[2]}\tk2\t2\tc\t"]
    head = "item_id:token\tkind:token\tprice:float\ttags:token_seq\tsizes:float_seq"
    (Path(path) / "tiny" / "tiny.item").write_text("\n".join([head, *rows]) + "\n")
    return path, items


def test_holes_in_the_data_are_filled_as_recbole_means_to(make_config, holed):
    path, items = holed
    load = {"inter": ["user_id", "item_id"], "item": ["item_id", "kind", "price", "tags", "sizes"]}
    keys = {"data_path": path, "load_col": load, "filter_inter_by_user_or_item": False, "normalize_all": False}
    dataset = create_dataset(make_config(**keys))
    dataset.build()
    features = dataset.get_item_feature()
    no_kind, no_price, no_sizes, absent, whole = dataset.token2id("item_id", items[:5])
    assert features["kind"][no_kind] == features["kind"][absent] == 0
    assert dataset.id2token("kind", features["kind"][[no_price, no_sizes, whole]].tolist()).tolist() == [
        "k1",
        "k2",
        "k1",
    ]
    mean = np.mean([n for n in range(len(items)) if n not in (1, 3)])
    prices = features["price"][[no_kind, no_price, no_sizes, absent, whole]]
    assert prices.tolist() == pytest.approx([0, mean, 2, mean, 4])
    rows = [no_kind, no_price, no_sizes, absent, whole]
    tags = [[dataset.id2token("tags", tag) for tag in tags if tag] for tags in features["tags"][rows].tolist()]
    assert tags == [["a"], [], ["c"], [], ["a", "b"]]
    assert features["sizes"][rows].tolist() == [[1, 0], [1, 0], [0, 0], [0, 0], [4, 2.5]]


# -- RecBole 1.2.0, whose forward built its dropout layers anew, always in training mode


def test_ngcf_drops_nothing_in_evaluation(make_split):
    split = make_split("NGCF", hidden_size_list=[8], node_dropout=0.0, message_dropout=0.5)
    model = get_model("NGCF")(split.config, split.train.dataset)
    drops_in_training_only(model, model.forward)
    assert model.message_dropout == 0.5


def test_gru4reckg_drops_nothing_in_evaluation(make_config, make_split, monkeypatch):
    """Beside its vectors of entities, which are made up here, it needs what GRU4Rec needs."""
    dataset = make_split("GRU4Rec", loss_type="BPR", load_col=None).train.dataset
    vectors = np.ones((dataset.num("item_id"), 8))
    monkeypatch.setattr(dataset, "get_preload_weight", lambda _: vectors, raising=False)
    model = get_model("GRU4RecKG")(make_config("GRU4RecKG", loss_type="BPR", dropout_prob=0.5), dataset)
    drops_in_training_only(model, lambda: model.forward(torch.tensor([[3, 5, 0]]), torch.tensor([2])))
    assert model.dropout == 0.5


def drops_in_training_only(model, forward):
    for training in (True, False):
        model.train(training)
        first, second = forward(), forward()
        assert torch.equal(first[0], second[0]) != training


def test_importing_a_sequential_model_leaves_anomaly_detection_off():
    """One module of RecBole's turns it on for the whole process, which would take many times as long."""
    code = (
        "import recbole_unlearn, torch; from recbole.model.sequential_recommender import GRU4Rec, SINE; "
        "assert SINE and not torch.is_anomaly_enabled()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# -- RecBole's data, faster


@pytest.mark.parametrize(
    "index",
    [
        np.array([3, 0, 3]), torch.tensor([4]), np.array([], np.int64), np.array([-1, 2]), [1, 2], slice(1, 4), 2,
        range(4, 0, -2),
        np.array([True, False, True, False, True]), torch.tensor([True, False, False, False, True]),
        np.array([2, 1], np.int32),
    ],
    ids=str,
)  # fmt: skip
def test_rows_of_an_interaction_are_recboles(index):
    held = Interaction({"user_id": torch.arange(5), "item_list": torch.arange(10).view(5, 2), "rating": torch.rand(5)})
    wanted = Interaction.__getitem__.__wrapped__(held, index)
    found = held[index]
    assert type(found) is Interaction and found.columns == wanted.columns and len(found) == len(wanted)
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in found)
    assert found["item_list"].data_ptr() != held["item_list"].data_ptr() or isinstance(index, (int, slice))


def test_rows_that_are_not_there_are_refused():
    with pytest.raises((IndexError, RuntimeError), match="range|bounds"):
        Interaction({"user_id": torch.arange(5)})[np.array([5])]


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
@pytest.mark.parametrize(("rows", "each"), [(60, 1), (60, 3), (1, 4)])
def test_repeatable_samplers_draw_as_recboles(make_split, distribution, rows, each):
    """Its own method is one that makes sets of the items and then calls `sample_by_key_ids`."""
    dataset = make_split("GRU4Rec", loss_type="BPR", load_col=None).train.dataset
    sampler = RepeatableSampler(["train"], dataset, distribution)
    items = np.random.default_rng(0).integers(1, dataset.item_num, rows)
    np.random.seed(1)
    found = sampler.sample_by_user_ids(np.ones(rows, int), items, each)
    left = np.random.random()
    np.random.seed(1)
    sampler.used_ids = np.array([{item} for item in items])
    assert torch.equal(found, sampler.sample_by_key_ids(np.arange(rows), each)) and np.random.random() == left
    assert not (found.numpy() == np.tile(items, each)).any()
