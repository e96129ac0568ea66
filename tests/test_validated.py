"""Exact retraining whose epoch is chosen anew: by RecBole's validation and early stopping, without the forgotten."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEQUENTIAL
from recbole.data.utils import create_samplers, get_dataloader
from recbole.trainer import Trainer

import recbole_unlearn as ru
from recbole_unlearn.data.split import Split, pairwise_loader
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.coupling import Fresh
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.config import UnlearnConfig, changed
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.testing import flat
from recbole_unlearn.training.fit import distance, new_model, train
from recbole_unlearn.unlearners.choose import problem_of
from recbole_unlearn.verify import verify

ONE = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}
MODELS = {
    "BPR": {},
    "LightGCN": {"n_layers": 2, "reg_weight": 1e-3},
    "FPMC": SEQUENTIAL,
    "TransRec": SEQUENTIAL,
    "GRU4Rec": {**SEQUENTIAL, "loss_type": "BPR", "hidden_size": 8, "dropout_prob": 0.0},
}
STOPPING = {"epochs": 40, "eval_step": 2, "stopping_step": 2, "learning_rate": 0.01, "valid_metric": "ndcg@10"}
ASKED = {"method": "replay", "replay_rows": "all", "replay_epochs": "validated"}
WAY = ru.Replay("all", "fresh", epochs="validated")


@pytest.fixture
def draws(monkeypatch):
    """The operating system's random numbers, the same in each run of the tests: ``draws(seed)``."""

    def seeded(seed):
        monkeypatch.setattr("secrets.randbits", random.Random(seed).getrandbits)

    seeded(1)
    return seeded


@pytest.fixture(scope="session")
def original(make_config, tmp_path_factory):
    """Function (name of `MODELS`, keys) -> checkpoint, trained once."""
    made = {}

    def make(name, **keys):
        if (which := (name, *keys.items())) not in made:
            folder = tmp_path_factory.mktemp("validated")
            config = make_config(name, **STOPPING | MODELS[name] | {"checkpoint_dir": str(folder)} | keys)
            train(config, Split.seeded(config), folder / "model.pth")
            made[which] = folder / "model.pth"
        return made[which]

    return make


class Batches:
    """A loader of RecBole's data without some rows whose batches are those of epochs: by a loop of its own."""

    def __init__(self, loader, rows, epochs, negatives):
        self.loader, self.epochs, self.negatives = loader, iter(epochs), negatives
        self.place = {int(row): n for n, row in enumerate(rows)}

    def __iter__(self):
        epoch = next(self.epochs)
        for start, end in itertools.pairwise(epoch.bounds):
            rows = epoch.order[start:end]
            batch = self.loader.dataset[np.array([self.place[int(row)] for row in rows])].repeat(self.negatives)
            drawn = torch.from_numpy(epoch.negatives[rows].T.astype(np.int64).ravel())
            batch.interaction[self.loader.neg_item_id] = drawn
            yield batch

    def __len__(self):
        return len(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


def by_recbole(unlearner, rows, folder):
    """RecBole's trainer, with the random numbers of a validated training but for how many epochs it has.

    Returns:
        Best epoch, how many were trained, and weights of the best one.
    """
    config, split, log, new = unlearner.config, unlearner.split, unlearner.log, unlearner.training
    assert isinstance(new.epochs, Fresh)
    gone = np.isin(np.arange(log.n_rows), rows)
    (seed,) = new.epochs.seed
    epochs = Fresh(new.epochs.recorded, gone, seed, new.epochs.draw, config["epochs"])
    loader = pairwise_loader(split.remaining(rows))
    left = np.argsort(split.data_row)
    batches = Batches(loader, left[~gone[left]], epochs, log.negatives)
    if isinstance(new.start, np.ndarray):
        model = new_model(config, split, data=loader.dataset)
        parts = torch.from_numpy(new.start).split([len(value) for value in model.parameters()])
        with torch.no_grad():
            for value, start in zip(model.parameters(), parts, strict=True):
                value.copy_(start)
    else:
        model = new_model(config, split, new.start.seed, loader.dataset)
    before = copies(model.state_dict())
    trainer = Trainer(changed(config, checkpoint_dir=str(folder)), model)
    scores = {}

    judged = split.judged_without(rows)
    parts = [loader.dataset, judged.valid.dataset, judged.test.dataset]
    _, sampler, _ = create_samplers(config, loader.dataset, parts)  # forgotten items are candidates again
    valid = get_dataloader(config, "valid")(config, parts[1], sampler, shuffle=False)

    def seen(epoch, score):
        scores[epoch] = score, copies(model.state_dict())

    trainer.fit(batches, valid, verbose=False, saved=False, callback_fn=seen)
    best = max(epoch for epoch, (score, _) in scores.items() if score == trainer.best_valid_score)
    return best + 1, len(trainer.train_loss_dict), before, scores[best][1]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_recboles_own_training_without_the_rows_early_stopping_and_all(original, draws, tmp_path, name):
    with ru.load(original(name), way=WAY) as unlearner:
        rows = np.arange(0, unlearner.split.n_rows, 9)
        found = unlearner.forget(rows=rows)
        best, trained, start, expected = by_recbole(unlearner, rows, tmp_path)
        told = found.report()
        assert (told["epochs"], told["epochs_trained"]) == (best, trained)
        assert best < trained < 40 and trained - best == (STOPPING["stopping_step"] + 1) * STOPPING["eval_step"]
        assert told["exact"] is True and told["coupling"] == "fresh"
        assert found.why == f"asked for: validation without what is forgotten chose epoch {best} of {trained}"
        assert distance(start, expected, copies(found.state_dict)) < (1e-9 if name == "GRU4Rec" else 1e-4)
        # from there a session goes on: with nothing more forgotten, by the same random numbers, it is that training
        again = unlearner.problem.retrained(rows[:0], "paired")
        assert again.details["epochs"] == best
        moved = float(np.linalg.norm(np.asarray(again.step))) / float(flat(found.state_dict).norm())
        assert moved < 1e-5


@pytest.mark.parametrize("name", ["BPR", "LightGCN", "FPMC"])
@pytest.mark.parametrize("more", [False, True])
def test_what_is_saved_is_recomputed_and_forgets_again(original, draws, tmp_path, name, more):
    """Of fewer epochs than the original had, and of more: what nothing was recorded of."""
    epochs = before = 0
    for seed in range(1, 30):
        draws(seed)
        with ru.load(original(name), way=WAY) as unlearner:
            before, epochs = unlearner.trained.epochs, unlearner.forget(count=20).details["epochs"]
            if (epochs > before) is more and epochs != before:
                unlearner.save(new := tmp_path / "new.pth")
                break
    assert (epochs > before) is more and epochs != before
    stored, log = checkpoints.load(new)
    assert log.n_epochs == epochs == stored["epoch"] + 1 == stored["triple_log"]["epochs"]
    assert stored["best_valid_score"] == unlearner.training.validated["valid_score"] and stored["cur_step"] == 0
    assert max(log.snapshots, default=0) <= epochs
    assert verify(new) < 1e-4
    with ru.load(new, way=WAY) as unlearner:
        assert unlearner.problem.epochs == epochs
        unlearner.forget(rows=[3, 40])
        second = unlearner.forget(rows=[5, 90]).details["epochs"]
        unlearner.save(tmp_path / "later.pth")
    assert TripleLog.open(tmp_path / "later.triples").n_epochs == second
    assert verify(tmp_path / "later.pth") < 1e-4
    with ru.load(tmp_path / "later.pth", way=ru.Replay("all")) as unlearner:  # as many epochs as that had
        assert unlearner.forget(count=5).details["epochs"] == second


def test_a_run_says_that_and_which(original, draws, tmp_path):
    keys = {"checkpoint": str(original("BPR")), "forget_count": 20, "compare": "none", **ASKED}
    told = run_unlearn(config_dict={**keys, "dry_run": True, "output_dir": "never"})
    way = told["way"]
    assert way["epochs"] == 40 and way["validated"] and way["coupling"] == "fresh" and way["exact"]
    assert "of as many epochs as validation chooses, at most 40" in told.page
    as_many = run_unlearn(config_dict={**keys, "replay_epochs": "original", "dry_run": True})["way"]
    assert not as_many["validated"] and way["seconds"] == pytest.approx(as_many["seconds"] * 40 / as_many["epochs"])
    done = run_unlearn(config_dict={**keys, "output_dir": "out"})
    found = done["unlearning"]
    assert 0 < found["epochs"] <= found["epochs_trained"] <= 40 and found["coupling"] == "fresh"
    words = f"validation without what is forgotten chose epoch {found['epochs']} of {found['epochs_trained']}"
    assert words in done.page and words in found["chosen"]
    assert json.loads(Path("out/result.json").read_text())["unlearning"] == json.loads(json.dumps(found))
    with ru.load("out/unlearned.pth") as unlearner:  # the next request takes it over
        assert unlearner.way.epochs == "validated"


def test_a_stream_says_it_too(original, draws):
    with ru.load(original("BPR")) as unlearner:
        pairs = unlearner.split.pairs(np.array([3, 90]))
    Path("requests.csv").write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in pairs))
    keys = {"checkpoint": str(original("BPR")), "forget_requests": "requests.csv", "evaluate": "none", **ASKED}
    done = run_unlearn(config_dict={**keys, "output_dir": "out"})
    assert done["unlearning"]["exact"] and "validation without what is forgotten chose epoch" in done.page
    assert verify("out/unlearned.pth") < 1e-4


def test_a_purge_keeps_no_figure_of_the_original(make_options, draws, data_path):
    run_unlearn("BPR", "tiny", config_dict=make_options(forget_count=1, compare="none", output_dir="one", **STOPPING))
    before = torch.load("one/model.pth", weights_only=True)
    keys = {"checkpoint": "one/model.pth", "forget_count": 20, "compare": "none", "purge": True, **ASKED}
    done = run_unlearn(config_dict={**keys, "output_dir": "out"})
    assert not Path("one/model.pth").exists() and "original" not in done["files"]
    after = torch.load("out/unlearned.pth", weights_only=True)
    assert after["best_valid_score"] == done["unlearning"]["valid_score"] != before["best_valid_score"]
    written = json.loads(Path("out/result.json").read_text())
    assert "original" not in written["models"]
    assert written["unlearning"]["valid_score"] == float(f"{done['unlearning']['valid_score']:.2g}")
    assert verify("out/unlearned.pth") < 1e-4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"coupling": "paired"}, "the original's random numbers end at its own best epoch: give coupling: fresh"),
        ({"replay_rows": "touched"}, "give replay_rows: all"),
        ({"replay_rows": "auto"}, "give replay_rows: all"),
        ({"method": "influence"}, "method: influence need not train again: give method: replay"),
        ({"method": "auto"}, "method: auto need not train again: give method: replay"),
        ({"eval_step": 0}, "with eval_step: 0 nothing was validated"),
        ({"purge": True, "purge_dataset": True, "everywhere": True, "forget_users": ["1"]}, "held-out interactions go"),
        ({"replay_epochs": "some"}, "replay_epochs must be"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(make_options, keys, words):
    count = {} if "forget_users" in keys else {"forget_count": 1}
    with pytest.raises(InputError, match="replay_epochs") as refused:
        run_unlearn("BPR", "tiny", config_dict=make_options(**{**count, "output_dir": "out", **ASKED, **keys}))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "keys", "way", "words"),
    [
        (
            "BPR",
            {},
            ru.Replay("all", "paired", epochs="validated"),
            "give coupling: fresh; give replay_epochs: original",
        ),
        (
            "FPMC",
            {},
            ru.Replay("all", "paired", epochs="validated"),
            "give coupling: fresh; give replay_epochs: original",
        ),
        (
            "BPR",
            {},
            ru.Replay("auto", "fresh", epochs="validated"),
            "give replay_rows: all; give replay_epochs: original",
        ),
        ("BPR", {"eval_step": 0}, WAY, "nothing was validated"),
        ("BPR", {"eval_args": {"split": {"RS": [9, 0, 1]}}}, WAY, "there is no validation data to choose an epoch by"),
    ],
)
def test_what_does_not_go_together_is_refused_from_python_too(make_config, tmp_path, name, keys, way, words):
    config = make_config(name, **{**MODELS[name], "epochs": 1, "checkpoint_dir": str(tmp_path), **keys})
    train(config, Split.seeded(config), tmp_path / "model.pth")
    with pytest.raises(InputError, match="method: replay is not possible") as refused:
        ru.load(tmp_path / "model.pth", way=way)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_rates_that_changed_are_refused(original):
    """Nobody knows those of epochs that were not trained."""
    with ru.load(original("BPR")) as unlearner:
        trained = unlearner.trained
        log = trained.log
        assert WAY.refuses(problem_of(trained, WAY)) is None
        rates = log.metadata["rates"]
        log.metadata["rates"] = [[0.02, rates[0][1]], *rates[1:]]
        assert "learning rate of later epochs" in str(WAY.refuses(problem_of(trained, WAY)))


def test_metrics_that_count_interactions_count_what_each_model_was_trained_on(make_options, data_path, tmp_path):
    keys = make_options(epochs=2, eval_step=0, metrics=["NDCG", "AveragePopularity"], topk=[10], compare="retrain")
    config = UnlearnConfig("BPR", "tiny", config_dict=keys)
    split = Split.seeded(config)
    popular = np.argsort(-np.bincount(split.items), kind="stable")[:5]
    rows, asked = np.flatnonzero(np.isin(split.items, popular)), {"forget_items": split.token("item", popular).tolist()}
    found = run_unlearn("BPR", "tiny", None, {**keys, **asked, "output_dir": str(tmp_path / "out")})
    for name, gone in (("original", rows[:0]), ("unlearned", rows), ("retrained", rows)):
        model = new_model(config, split)
        model.load_state_dict(torch.load(found["files"][name], weights_only=True)["state_dict"])
        trainer = Trainer(changed(config, checkpoint_dir=str(tmp_path)), model)
        trainer.eval_collector.data_collect(split.remaining(gone))
        own = trainer.evaluate(split.test, load_best_model=False, show_progress=False)["averagepopularity@10"]
        assert found["models"][name]["ranking"]["full"]["averagepopularity@10"] == pytest.approx(own, abs=1e-4)
