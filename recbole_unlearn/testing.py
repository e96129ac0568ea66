"""Tests that every way to forget must pass with every model that it serves; pytest runs them for what derives.

::

    class TestMine(Battery):
        model = Mine
        way = Influence()
        keys = {"my_key": 3}
        refused = {"reoptimise": "is not for"}

In a conftest.py, ``pytest.register_assert_rewrite("recbole_unlearn.testing")`` lets failures show their values.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.trainer import Trainer

from recbole_unlearn.data.split import Split
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.training.again import train_paired
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import same_weights
from recbole_unlearn.unlearner import InfluenceUnlearner, load
from recbole_unlearn.unlearners.base import Way
from recbole_unlearn.unlearners.influence import PAPER, Influence
from recbole_unlearn.unlearners.reoptimise import Reoptimise
from recbole_unlearn.unlearners.replay import Replay

WAYS: tuple[Way, ...] = (Replay(), Reoptimise(), Influence(), PAPER)
N_USERS, N_ITEMS = 37, 46
SEED = 7  # not RecBole's default
BRIEF = {"seed": SEED, "train_batch_size": 10**4, "epochs": 30, "eval_step": 0}
_checkpoints: dict[Any, Path] = {}  # of trainings that batteries with the same model and keys share


def tiny_interactions() -> list[tuple[str, str, int]]:
    """About 800 interactions of 37 users and 46 items in three groups: [(user, item, timestamp)]."""
    rng = np.random.default_rng(7)
    users = [f"u{17 + 3 * n}" for n in range(N_USERS)]
    items = [f"i{n * n + 3}" for n in range(N_ITEMS)]
    rows = []
    for u, user in enumerate(users):
        taste = np.where(np.arange(N_ITEMS) % 3 == u % 3, 4.0, 1.0)
        taste[-1] = 4.0  # liked by all groups
        chosen = rng.choice(N_ITEMS, int(rng.integers(16, 28)), replace=False, p=taste / taste.sum())
        rows += [(user, items[i]) for i in chosen]
    order = rng.permutation(len(rows))
    return [(*rows[k], 1_000_000 + 60 * n) for n, k in enumerate(order)]


def write_dataset(folder: Path | str, name: str, interactions: list[tuple[str, str, int]]) -> str:
    """Write RecBole's atomic files of a data set, with an item feature; returns the ``data_path``."""
    folder = Path(folder) / name
    folder.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"{user}\t{item}\t{time}" for user, item, time in interactions]
    (folder / f"{name}.inter").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tclass:token"]
    lines += [f"{item}\tc{n % 5}" for n, item in enumerate(sorted({item for _, item, _ in interactions}))]
    (folder / f"{name}.item").write_text("\n".join(lines) + "\n")
    return str(folder.parent)


def options(data_path: str, **overrides: Any) -> dict[str, Any]:
    """A ``config_dict`` for small, quick runs on the tiny data set; batches do not divide the data evenly."""
    return {
        "data_path": data_path,
        "embedding_size": 8,
        "epochs": 3,
        "train_batch_size": 97,
        "learning_rate": 0.02,
        "topk": [5, 10],
        "valid_metric": "NDCG@10",
        "show_progress": False,
        "state": "WARNING",
        "use_gpu": False,
        "gpu_id": "",
        **overrides,
    }


class Battery:
    """What a way must do with a model, through what users call, on a training of some seconds.

    The request is four users as a whole: none of their items returns to a pool, so that retraining without them is the
    training's own batches without their rows (`train_paired`), and no noise comes between.

    Attributes:
        model: name of RecBole's, or a class of your own.
        way: the way that is tested.
        keys: of the configuration, beside `options` and `BRIEF`: a batch is all there is.
        refused: names of ways that this training is not valid for -> part of what is then said.
        left: of the way that the scores of users and items go from the original to retraining without the forgotten,
            forgetting leaves less than this share; None: no promise, or nothing to compare with.
        apart: how far scores may be after two requests from those after one for both, as a share of the move; None: no
            promise.
        rounding: how far two answers to one request may be apart, as a share of the move: 0 is to the last bit. Not so
            where a model multiplies matrices by a library whose rounding depends on where in memory they lie.
    """

    model: ClassVar[str | type] = "BPR"
    way: ClassVar[Way]
    keys: ClassVar[dict[str, Any]] = {}
    refused: ClassVar[dict[str, str]] = {}
    left: ClassVar[float | None] = None
    apart: ClassVar[float | None] = None
    rounding: ClassVar[float] = 0.0

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path, monkeypatch):
        """RecBole writes into the current folder, and reads the command line."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pytest"])

    @pytest.fixture
    def checkpoint(self, tmp_path_factory) -> Path:
        """Of the training, its log beside it; no test may change them."""
        key = self.model, repr(sorted(self.keys.items()))
        if key not in _checkpoints:
            folder = tmp_path_factory.mktemp("battery")
            given = {**BRIEF, **self.keys}
            data_path = write_dataset(folder, "tiny", tiny_interactions())
            config = UnlearnConfig(self.model, "tiny", config_dict=options(data_path, **given))
            train(config, Split.seeded(config), folder / "model.pth")
            _checkpoints[key] = folder / "model.pth"
        return _checkpoints[key]

    def load(self, checkpoint: Path | str, way: Way | None = None) -> InfluenceUnlearner:
        """Open a checkpoint for the way that is tested, or another."""
        return load(checkpoint, model=self.model if isinstance(self.model, type) else None, way=way or self.way)

    @pytest.fixture
    def unlearner(self, checkpoint) -> Iterator[InfluenceUnlearner]:
        """Before its first request."""
        with self.load(checkpoint) as opened:
            yield opened

    # -- what is forgotten, and what is not

    def test_nothing_forgotten_changes_nothing(self, unlearner):
        before = copies(unlearner.state_dict)
        assert same_weights(dict(unlearner.unlearn(np.empty(0, np.int64)).state_dict), before)
        with pytest.raises(InputError):
            unlearner.forget(rows=[])
        assert same_weights(unlearner.state_dict, before) and not unlearner.requests

    def test_weights_keep_their_shape_and_stay_finite(self, unlearner):
        before = copies(unlearner.state_dict)
        after = unlearner.forget(rows=forgotten(unlearner)).state_dict
        assert not same_weights(after, before)
        for name, value in before.items():
            assert (after[name].shape, after[name].dtype) == (value.shape, value.dtype), name
            assert after[name].isfinite().all(), name

    def test_a_request_asked_twice_has_one_answer(self, unlearner):
        """Also after another in between: before it is applied a request leaves nothing behind."""
        rows, before = forgotten(unlearner), flat(unlearner.state_dict)
        first, other, again = (flat(unlearner.unlearn(each).state_dict) for each in (rows, rows[:-1], rows))
        assert not torch.equal(first, other)
        assert (again - first).norm() <= self.rounding * (first - before).norm()

    def test_a_single_interaction_can_go(self, unlearner):
        unlearner.forget(rows=[5])
        left = np.flatnonzero(unlearner.split.users == unlearner.split.users[5])
        unlearner.forget(rows=left[-1:])
        assert len(unlearner.forgotten) == 2 and all(value.isfinite().all() for value in unlearner.state_dict.values())

    def test_what_is_served_has_the_new_weights(self, unlearner):
        gone = unlearner.forget(rows=forgotten(unlearner))
        assert gone.model is unlearner.model and gone.method == self.way.name and gone.why and gone.seconds > 0
        assert same_weights(gone.model.state_dict(), gone.state_dict)
        trainer = Trainer(unlearner.config, gone.model)
        figures = trainer.evaluate(unlearner.split.test, load_best_model=False)
        assert figures and all(0 <= value <= 1 for value in figures.values())

    def test_the_original_and_its_files_stay(self, unlearner, checkpoint):
        model = unlearner.trained.copy().state_dict()
        files = content(checkpoint.parent)
        unlearner.forget(rows=forgotten(unlearner))
        unlearner.save("later.pth")
        now = content(checkpoint.parent)
        assert {name: now[name] for name in files} == files
        assert same_weights(unlearner.trained.copy().state_dict(), model)

    def test_what_is_forgotten_is_in_no_file_that_is_saved(self, unlearner):
        split, rows = unlearner.split, forgotten(unlearner)
        unlearner.forget(rows=rows)
        weights = copies(unlearner.state_dict)
        unlearner.save("later.pth")
        user = split.token("user", split.users[rows[:1]])[0]
        left = np.delete(np.arange(split.n_rows), rows)
        with self.load("later.pth") as again:
            assert same_weights(again.state_dict, weights) and not len(again.forgotten)
            np.testing.assert_array_equal(again.log.users, split.users[left])
            np.testing.assert_array_equal(again.log.items, split.items[left])
            with pytest.raises(InputError):
                again.forget(users=[user])
            again.forget(count=3)

    # -- what is refused

    def test_other_requests_are_refused_in_one_line_and_change_nothing(self, unlearner):
        """All there is, tokens that nobody has, what is gone already, rows that are none."""
        rows = forgotten(unlearner)
        unlearner.forget(rows=rows)
        before, requests = copies(unlearner.state_dict), list(unlearner.requests)
        n = unlearner.split.n_rows
        strangers = {"users": ["nobody"]}, {"items": ["nothing"]}, {"pairs": [("nobody", "nothing")]}
        for request in ({"rows": np.arange(n)}, {"rows": rows}, {"rows": [n]}, {"rows": [-1]}, *strangers, {}):
            with pytest.raises(InputError) as refused:
                unlearner.forget(**request)
            assert "\n" not in str(refused.value)
            assert same_weights(unlearner.state_dict, before) and unlearner.requests == requests

    def test_ways_that_are_not_valid_say_why_in_one_line(self, checkpoint):
        files, said = content(checkpoint.parent), {}
        for way in WAYS:
            try:
                self.load(checkpoint, way).close()
            except InputError as error:
                said[way.name] = str(error)
        assert said.keys() == self.refused.keys()
        for name, reason in self.refused.items():
            assert reason in said[name] and "\n" not in said[name]
        assert self.way.name not in said
        now = content(checkpoint.parent)
        assert {name: now[name] for name in files} == files

    # -- where it leads

    def test_it_leads_towards_retraining(self, unlearner, checkpoint):
        if self.left is None:
            pytest.skip("nothing is promised")
        split, rows = unlearner.split, forgotten(unlearner)
        before = scores(unlearner.model, split)
        retrained, _ = train_paired(unlearner.config, split, Path("retrained.pth"), checkpoint, rows, SEED)
        goal = scores(retrained, split)
        assert (goal - before).norm() > 1e-3 * before.norm()
        after = scores(unlearner.forget(rows=rows).model, split)
        assert (goal - after).norm() < self.left * (goal - before).norm()

    def test_two_requests_end_where_one_for_both_does(self, unlearner, checkpoint):
        if self.apart is None:
            pytest.skip("nothing is promised")
        split, rows = unlearner.split, forgotten(unlearner)
        before = scores(unlearner.model, split)
        at_once = scores(unlearner.forget(rows=rows).model, split)
        unlearner.close()
        early = split.users[rows] < np.median(split.users[rows])
        with self.load(checkpoint) as again:
            for part in (rows[early], rows[~early]):
                again.forget(rows=part)
            one_by_one = scores(again.model, split)
            np.testing.assert_array_equal(again.forgotten, rows)
        assert (at_once - before).norm() > 0
        assert (one_by_one - at_once).norm() <= self.apart * (at_once - before).norm()


def flat(state_dict: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights, one after the other, in float64."""
    return torch.cat([value.ravel().double().cpu() for value in state_dict.values()])


def forgotten(unlearner: InfluenceUnlearner) -> np.ndarray:
    """Rows of the request: all of some users."""
    return np.flatnonzero(unlearner.split.users % 9 == 1)


def scores(model: AbstractRecommender, split: Split) -> torch.Tensor:
    """What a model makes of all items, float64: a row a user, or of a sequential model a row a history to be tested."""
    asked = Interaction({split.config["USER_ID_FIELD"]: torch.arange(1, split.n_users)})
    if split.sequential:
        held_out = split.test._dataset
        asked = split.test.transform(held_out, held_out[np.arange(len(held_out))])
    model.eval()
    with torch.no_grad():
        found = model.full_sort_predict(asked.to(split.config["device"]))
    return found.reshape(len(asked), -1)[:, 1:].double().cpu()


def content(folder: Path) -> dict[Path, bytes]:
    """All files below a folder."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
