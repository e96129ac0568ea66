"""A tiny RecBole data set, and what the tests build on it. Every test runs in its own empty folder."""

import contextlib
import copy
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from recbole.model.general_recommender.bpr import BPR
from recbole.utils import init_seed

import recbole_unlearn  # noqa: F401  (registers the trainer, patches RecBole for the installed versions)
from recbole_unlearn import testing
from recbole_unlearn.data.split import Split
from recbole_unlearn.methods import METHODS, settings_of
from recbole_unlearn.methods.base import Task
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.keys import properties_dir
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.testing import options, write_dataset
from recbole_unlearn.training.fit import new_model, train

NAME = "tiny"
FACTS = 200  # of the knowledge graph
SECRET_USER, SECRET_ITEM = "SECRETUSER-93", "SECRETITEM-41"

SEQUENTIAL = {
    "loss_type": "BPR",
    "MAX_ITEM_LIST_LENGTH": 6,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
}

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a killed process, unlike a power cut, loses nothing that was written


def tiny_interactions():
    """Those of `testing`, the last user and item with tokens that can be searched for."""
    secret = {"u125": SECRET_USER, "i2028": SECRET_ITEM}
    return [(secret.get(user, user), secret.get(item, item), time) for user, item, time in testing.tiny_interactions()]


@contextlib.contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield Path(folder)
    finally:
        os.chdir(before)


def weights(path):
    """The state dict in a checkpoint."""
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """RecBole writes log/, log_tensorboard/ and saved/ into the current folder, and reads sys.argv."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    numpy_stream, torch_stream = np.random.get_state(), torch.get_rng_state()
    yield
    np.random.set_state(numpy_stream)
    torch.set_rng_state(torch_stream)


@pytest.fixture(scope="session")
def interactions():
    return tiny_interactions()


@pytest.fixture(scope="session")
def data_path(tmp_path_factory, interactions):
    return write_dataset(tmp_path_factory.mktemp("data"), NAME, interactions)


@pytest.fixture(scope="session")
def write_data():
    """Function (folder, name, [(user, item, timestamp)]) -> data_path."""
    return write_dataset


@pytest.fixture(scope="session")
def linked_path(tmp_path_factory, write_data, interactions):
    """``data_path`` of the tiny data set with a knowledge graph that knows half of the items."""
    path = write_data(tmp_path_factory.mktemp("linked"), "tiny", interactions)
    items, rng = sorted({item for _, item, _ in interactions})[::2], np.random.default_rng(5)
    heads, tails = rng.choice(items, FACTS), rng.integers(9, size=FACTS)
    facts = [f"m.{head}\tr{n % 3}\tt{tail}" for n, (head, tail) in enumerate(zip(heads, tails, strict=True))]
    links = [f"{item}\tm.{item}" for item in items]
    folder = Path(path) / "tiny"
    (folder / "tiny.kg").write_text("\n".join(["head_id:token\trelation_id:token\ttail_id:token", *facts]) + "\n")
    (folder / "tiny.link").write_text("\n".join(["item_id:token\tentity_id:token", *links]) + "\n")
    return path


@pytest.fixture(scope="session")
def make_options(data_path):
    """Function (**overrides) -> config_dict."""
    return lambda **overrides: options(overrides.pop("data_path", data_path), **overrides)


@pytest.fixture(scope="session")
def make_config(make_options):
    """Function (model='BPR', dataset='tiny', **overrides) -> UnlearnConfig."""

    def make(model="BPR", dataset=NAME, **overrides):
        return UnlearnConfig(model, dataset, config_dict=make_options(**overrides))

    return make


@pytest.fixture(scope="session")
def make_split(make_config):
    """Function (like make_config) -> Split, as run_unlearn makes it."""

    def make(*args, **overrides):
        config = make_config(*args, **overrides)
        init_seed(config["seed"], config["reproducibility"])
        return Split(config)

    return make


@pytest.fixture(scope="session")
def split(make_split, tmp_path_factory):
    """A split that no test may change (do not train on its loaders)."""
    with inside(tmp_path_factory.mktemp("split")):
        return make_split()


@pytest.fixture(scope="session")
def make_model():
    """Function (split, seed=None) -> BPR model of the split's configuration, untrained."""
    return lambda split, seed=None: new_model(split.config, split, seed)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, make_options):
    """One complete run, retraining included: (result, its folder). No test may change the folder."""
    from recbole_unlearn.quick_start import run_unlearn

    with inside(tmp_path_factory.mktemp("finished")) as cwd:
        result = run_unlearn(
            "BPR", NAME, config_dict=make_options(forget_count=25, epochs=6, output_dir=str(cwd / "out"))
        )
    return result, cwd / "out"


# -- for methods of a comparison


class AnyModel(BPR):
    """BPR under another name: methods take it for a model that they have no closed form for."""


@pytest.fixture(scope="session")
def make_trained_task(make_split, tmp_path_factory):
    """Function (model='BPR', **keys) -> Task of a model trained on the tiny data set. No test may change its files."""
    made = {}

    def make(model="BPR", **keys):
        name = f"{model}-{sorted(keys.items())}"
        if name not in made:
            folder = tmp_path_factory.mktemp("task")
            negatives = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3}}
            with inside(folder):
                split = make_split(model, **{"epochs": 6, "checkpoint_dir": str(folder), **negatives, **keys})
                train(split.config, split, folder / "model.pth", seed=split.config["seed"])
            stored, log = checkpoint.load(folder / "model.pth")
            made[name] = Task(
                split.config, split, split.config["seed"], stored, log, folder / "model.pth", folder / "x"
            )
        return made[name]

    return make


@pytest.fixture
def task(make_trained_task):
    return make_trained_task()


@pytest.fixture
def graph_task(make_trained_task):
    return make_trained_task("LightGCN", n_layers=2)


@pytest.fixture(scope="session")
def rows(split):
    """Rows to forget: some at random, and all of one user."""
    chosen = np.random.default_rng(3).choice(split.n_rows, 15, replace=False)
    return np.union1d(chosen, np.flatnonzero(split.users == split.users[100]))


@pytest.fixture(scope="session")
def run():
    """Function (name, task, rows, **settings) -> Forgotten."""

    def start(name, task, rows, **settings):
        method = METHODS[name](task, settings_of(name, settings))
        method.prepare()
        return method.forget(rows)

    return start


@pytest.fixture
def any_model(task, monkeypatch):
    """The trained BPR as a model without closed form: (task)."""
    monkeypatch.setattr(task.config, "model_class", AnyModel)
    return task


@pytest.fixture(scope="session")
def trained_tasks(tmp_path_factory, make_split):
    """Function model -> Task of a short training on the tiny data set, trained once a session."""
    made = {}

    def make(model):
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            with pytest.MonkeyPatch.context() as patch, torch.enable_grad():  # whatever the test runs under
                patch.chdir(folder)
                extra = {"n_layers": 2, "reg_weight": 1e-4} if model == "LightGCN" else {}
                split = make_split(model, epochs=2, **extra)
                train(split.config, split, folder / "model.pth")
                stored, log = checkpoint.load(folder / "model.pth")
            made[model] = Task(split.config, split, 7, stored, log, folder / "model.pth", folder)
        return made[model]

    return make


@pytest.fixture
def make_shard_task(trained_tasks, tmp_path):
    """Function (model='BPR', **overrides of the configuration) -> Task whose folder is the test's own."""

    def make(model="BPR", **overrides):
        task = copy.copy(trained_tasks(model))
        task.config = copy.copy(task.config)
        task.config.final_config_dict = {**task.config.final_config_dict, **overrides}
        task.folder = tmp_path / "kept"
        return task

    return make


@pytest.fixture(scope="session")
def make_settings():
    """Function (method, **changes) -> settings of a method, as its YAML file says."""

    def make(name, **changes):
        settings = yaml.safe_load((properties_dir() / "method" / f"{name}.yaml").read_text("utf-8"))
        assert changes.keys() <= settings.keys()
        return {**settings, **changes}

    return make


@pytest.fixture
def content():
    """Function folder -> {name: bytes} of its files, to see whether anything changed."""
    return lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def some_rows():
    """Function (method, shard, count, slice=None) -> sorted rows of a shard of a prepared method."""

    def draw(method, shard, count, number=None):
        own = method.shard == shard
        if number is not None:
            own &= method.slice == number
        return np.sort(np.random.default_rng(3).choice(np.flatnonzero(own), count, replace=False))

    return draw
