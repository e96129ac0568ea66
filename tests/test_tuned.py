"""Settings of methods by one rule for all, which looks at no retrained model and at nothing that is evaluated."""

import numpy as np
import pytest
from recbole.trainer import Trainer

from recbole_unlearn.comparison.figures import Comparison
from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
from recbole_unlearn.comparison.tuned import OTHERS, Trial, best, candidates, tuned
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.forgetting import held_out_percentiles, percentiles
from recbole_unlearn.methods import METHODS, settings_of

APPROXIMATE = ("scif", "ifru", "gif", "ceu", "certified", "rrl", "gradient_ascent", "fine_tune")


def test_every_approximate_method_has_as_many_candidates_its_default_among_them():
    assert {name for name in METHODS if candidates(name)} == set(APPROXIMATE)
    for name in APPROXIMATE:
        tried, default = candidates(name), settings_of(name)
        assert len(tried) == 5 and len({key for each in tried for key in each}) == 1
        assert any(each.items() <= default.items() for each in tried), name
        assert all(settings_of(name, each) | each == settings_of(name, each) for each in tried)


def test_the_rule():
    near, useless, over, refused = (Trial({"a": n}, *each) for n, each in enumerate(
        [(0.02, 0.004), (0.001, 0.3), (-0.03, 0.0), (np.nan, np.nan)]
    ))  # fmt: skip
    assert best([over, useless, refused, near]) is near
    assert best([Trial({}, -0.01, 0.01), near]).gap == -0.01  # over-forgotten as bad as not forgotten
    assert best([useless, Trial({}, 0.2, 0.02), refused]).lost == 0.02
    with pytest.raises(InputError, match="no candidate"):
        best([refused])


@pytest.fixture
def trained(make_options, tmp_path):
    options = make_options(epochs=6, learning_rate=0.05, show_progress=False)
    return TrainedSeeds(("BPR", "tiny", None, options), tmp_path / "cache", 1)


def test_trials_are_of_other_models_and_other_rows(trained, monkeypatch):
    split, forgotten = trained.split, []
    own = METHODS["gradient_ascent"].forget

    def forget(self, rows, show_progress=False):
        forgotten.append((self.task.seed, rows))
        return own(self, rows, show_progress)

    monkeypatch.setattr(METHODS["gradient_ascent"], "forget", forget)
    monkeypatch.delattr(SeedRun, "without")
    evaluated = np.arange(0, 60, 2)
    trials, nothing = tuned(trained, ["gradient_ascent", "ours"], evaluated, 2, False)
    seeds = {trained.config["seed"] + OTHERS + n for n in range(2)}
    assert list(trials) == ["gradient_ascent"] and {seed for seed, _ in forgotten} == seeds
    assert all(len(rows) == len(evaluated) and not np.isin(rows, evaluated).any() for _, rows in forgotten)
    gaps = [trial.gap for trial in trials["gradient_ascent"]]
    assert nothing.gap > gaps[0] > gaps[2] and nothing.lost == 0  # more steps, less that ranks like what was trained on
    assert trials["gradient_ascent"][-1].lost > trials["gradient_ascent"][0].lost
    comparison, found = Comparison(trained, {}, 1), []
    for seed, rows in dict(forgotten).items():
        model = comparison.task(seed).model()
        found.append(percentiles(model, split, rows).mean() - held_out_percentiles(model, split).mean())
    assert nothing.gap == pytest.approx(np.mean(found))


@pytest.mark.parametrize(("metric", "lost"), [("NDCG@10", -1), ("GiniIndex@10", 1)])
def test_what_is_lost_of_the_validation_metric_is_for_the_worse(metric, lost, make_options, tmp_path, monkeypatch):
    options = make_options(epochs=1, valid_metric=metric, metrics=["NDCG", "GiniIndex"], topk=[10])
    trained, values = TrainedSeeds(("BPR", "tiny", None, options), tmp_path / "cache", 1), iter([1.0, *[2.0] * 9])
    trained.train([SeedRun(trained.config["seed"] + OTHERS, (), True)], False)
    monkeypatch.setattr(Trainer, "_valid_epoch", lambda *_, **__: (next(values), {}))
    trials, _ = tuned(trained, ["gradient_ascent"], np.arange(30), 1, False)
    assert {trial.lost for trial in trials["gradient_ascent"]} == {lost}


def test_what_a_candidate_keeps_is_in_a_folder_of_its_own(trained, monkeypatch):
    folders = []

    def prepare(self, rows=None):
        folders.append((self.task.folder, self.settings))
        return 0.0

    monkeypatch.setattr(METHODS["gradient_ascent"], "prepare", prepare)
    tuned(trained, ["gradient_ascent"], np.arange(30), 1, False)
    assert len({folder for folder, _ in folders}) == len(folders) == len(candidates("gradient_ascent"))


def test_what_was_held_out_ranks_as_its_scores_say(make_split, make_model):
    split = make_split()
    model, held = make_model(split, 3), split.valid.dataset.inter_feat
    found = held_out_percentiles(model, split)
    for pair in (0, len(found) // 2, len(found) - 1):
        user, item = int(held["user_id"][pair]), int(held["item_id"][pair])
        scores = (model.user_embedding.weight[user] @ model.item_embedding.weight.T).detach().numpy()
        others = np.setdiff1d(np.arange(1, split.n_items), split.seen()(user))
        assert found[pair] == pytest.approx((scores[others] < scores[item]).mean(), abs=1e-6)


def test_there_must_be_other_rows(trained):
    with pytest.raises(InputError, match="evaluate on fewer"):
        tuned(trained, ["scif"], np.arange(trained.split.n_rows - 3), 1, False)
