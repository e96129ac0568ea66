"""Small tasks for the methods that train shards."""

import copy

import numpy as np
import pytest
import yaml

from recbole_unlearn import checkpoint
from recbole_unlearn.config import properties_dir
from recbole_unlearn.methods.base import Task
from recbole_unlearn.training import train


@pytest.fixture(scope="session")
def trained_tasks(tmp_path_factory, make_split):
    """Function model -> Task of a short training on the tiny data set, trained once a session."""
    made = {}

    def make(model):
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            with pytest.MonkeyPatch.context() as patch:
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
