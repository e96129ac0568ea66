"""Fidelity over seeds, and the figures that it is made of."""

import json

import numpy as np
import pytest

from recbole_unlearn.comparison import fidelity as module
from recbole_unlearn.comparison.fidelity import Observer, Seen, ceiling, compare, overlap
from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds, agreement
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.devices import read
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.forgetting import percentiles
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.training import compiled
from recbole_unlearn.training.fit import new_model

IN_ORDER = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
}


def view(rng, shift=0.0, pairs=60):
    margin = rng.normal(size=pairs) + shift
    top = np.stack([rng.choice(40, 10, replace=False) for _ in range(5)])
    percentile = 1 / (1 + np.exp(-margin))
    return Seen(percentile, margin, rng.random(pairs), top, top.copy(), {"hit@10": rng.random()})


def test_overlap_counts_common_items_whatever_their_order():
    assert overlap(np.array([[1, 2, 3, 4]]), np.array([[4, 9, 2, 8]])) == 0.5


def test_ceiling_is_one_without_noise_and_near_the_true_correlation_with_it():
    rng = np.random.default_rng(0)
    true, seeds = rng.normal(size=4000), 6
    before = np.zeros((seeds, 4000))
    assert ceiling(before, np.tile(true, (seeds, 1))) == pytest.approx(1)
    noisy = true + 2 * rng.normal(size=(seeds, 4000))
    got = ceiling(before, noisy)
    assert got == pytest.approx(np.corrcoef(noisy[1:].mean(0), true)[0, 1], abs=0.02)


def test_membership_is_the_probability_that_a_forgotten_pair_ranks_above_a_held_out_one():
    v = Seen(np.array([0.9, 0.5]), np.zeros(2), np.array([0.5, 0.1]), None, None, {})
    assert v.membership == (1 + 1 + 0.5 + 1) / 4


def test_doing_nothing_is_farther_from_retraining_than_the_seeds_are():
    rng = np.random.default_rng(1)
    originals = [view(rng, 2.0) for _ in range(4)]
    retrained = [view(rng, 0.0) for _ in range(4)]
    figures = compare(retrained, originals, originals)
    assert figures["forget_auc_z"] > 2 and figures["ks_ratio"] > 2 and figures["wasserstein_ratio"] > 2
    assert figures["mean_change"] == 0 and figures["true_mean_change"] < -1.5
    own = compare(retrained, originals, retrained)
    assert own["forget_auc_z"] == 0 and own["ks_ratio"] == pytest.approx(1, abs=0.5)


def test_without_an_effect_nothing_agrees_with_the_truth():
    """Neither a retraining nor another model of the same law, by the noise of its own original."""
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        before, after, unlearned = ([view(rng, pairs=200) for _ in range(6)] for _ in range(3))
        found.append([compare(after, before, each)["correlation"] for each in (after, unlearned)])
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    assert (np.abs(mean) < 4 * error).all()


def test_a_cut_off_run_goes_on_and_the_tables_are_written(make_options, tmp_path):
    keys = make_options(evaluate="fidelity", fidelity_seeds=3, forget_count=20, fidelity_cache=str(tmp_path / "cache"))
    first = run_unlearn(dataset="tiny", config_dict={**keys, "output_dir": str(tmp_path / "one")})
    assert set(first["fidelity"]) == {"retrained", *module.METHODS}
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.pth")}
    assert len(times) == 6
    again = run_unlearn(dataset="tiny", config_dict={**keys, "output_dir": str(tmp_path / "two")})
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.pth")}
    for name, figures in first["fidelity"].items():
        if name == "exact, fresh":  # each time by new random numbers of the operating system
            continue
        for key in ("forget_auc", "correlation", "hit@10"):
            assert figures[key] == again["fidelity"][name][key] or np.isnan(figures[key])
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        f"fidelity.{e}" for e in ("md", "csv", "tex", "json")
    }
    json.loads((tmp_path / "one" / "fidelity.json").read_text(), parse_constant=pytest.fail)  # which NaN would be


def test_compiled_training_gives_the_same_tables_and_says_so(make_options, tmp_path):
    found = {}
    for kernels in (False, True):
        keys = make_options(evaluate="fidelity", fidelity_seeds=3, forget_count=20, epochs=4, compiled=kernels)
        keys |= {"fidelity_cache": str(tmp_path / "cache"), "output_dir": str(tmp_path / str(kernels))}
        found[kernels] = run_unlearn("BPR", "tiny", config_dict=keys)
    assert len(list((tmp_path / "cache").glob("*.pth"))) == 12  # none is taken for the other
    for name, stock in found[False]["fidelity"].items():
        if name == "exact, fresh":  # each time by new random numbers of the operating system
            continue
        for key in ("forget_auc", "forget_auc_sd", "mean_change", "overlap_affected", "hit@10"):
            assert found[True]["fidelity"][name][key] == pytest.approx(stock[key], abs=1e-4), (name, key)
    kept = json.loads((tmp_path / "True" / "fidelity.json").read_text())
    assert 0 < kept["retrained"]["agreement"] < 1e-4 and found[False]["fidelity"]["retrained"]["agreement"] is None
    assert f"ended {kept['retrained']['agreement']:.1e} of the way" in (tmp_path / "True" / "fidelity.md").read_text()
    assert "compiled" not in found[False].page


def test_a_comparison_may_be_compiled_beside_models_without_kernels(make_options, tmp_path):
    found = {}
    for kernels in (False, True):
        keys = make_options(methods="ours", compare_models="NGCF", hidden_size_list=[4], epochs=4, compiled=kernels)
        keys |= {"comparison_cache": str(tmp_path / "cache"), "output_dir": str(tmp_path / str(kernels))}
        found[kernels] = run_unlearn("BPR", "tiny", config_dict=keys)
    assert 0 < found[True]["comparison"]["agreement"] < 1e-4 and found[False]["comparison"]["agreement"] is None
    (stock,), (ours,) = (each["comparison"]["sets"].values() for each in found.values())
    for name, runs in stock["figures"].items():
        assert ours["figures"][name][0]["forget_auc"] == pytest.approx(runs[0]["forget_auc"], abs=1e-4), name
    assert "compiled kernels" in found[True].page and "compiled" not in found[False].page


def test_kernels_that_train_otherwise_are_refused(make_options, tmp_path, monkeypatch):
    def elsewhere(model, pairs, start, adam):
        return training_of(model, pairs, 1.1 * start, adam)

    training_of = compiled.training_of
    monkeypatch.setattr(compiled, "training_of", elsewhere)
    keys = make_options(evaluate="fidelity", forget_count=20, compiled=True, fidelity_cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="compiled: training ends .* leave compiled out"):
        run_unlearn("BPR", "tiny", config_dict=keys | {"output_dir": str(tmp_path / "out")})


def test_what_the_kernels_cannot_train_has_no_agreement(make_split, tmp_path):
    split = make_split(learner="sgd", method="influence", damping="scalar")
    assert agreement(split.config, split, tmp_path) is None


@pytest.mark.parametrize(("name", "keys"), [("BPR", {"compiled": True}), ("FPMC", {"loss_type": "BPR", **IN_ORDER})])
def test_each_model_is_unlearned_by_the_draws_of_its_own_seed(make_options, tmp_path, name, keys):
    """Exact, paired: as each seed's original is trained again by RecBole's trainer, returned draws included."""
    options = make_options(epochs=6, eval_step=0, **keys)
    trained = TrainedSeeds((name, "tiny", [], options), tmp_path / "cache", 1)
    config, split = trained.config, trained.split
    rows = ForgetRequest("count", 40, 2020).rows(split)
    found = module.fidelity(trained, rows, 3, {"exact, paired": module.METHODS["exact, paired"]}, False)
    changes = []
    for seed in range(config["seed"], config["seed"] + 3):
        runs = [SeedRun(seed, (), True), SeedRun(seed, tuple(map(int, rows)), paired=True)]
        margins = []
        for path in trained.train(runs, False):
            model = new_model(config, split)
            model.load_state_dict(read(path)["state_dict"])
            margins.append(Observer(config, split, rows).view(model.eval()).margin.mean())
        changes.append(margins[1] - margins[0])
    assert found["exact, paired"]["mean_change"] == pytest.approx(np.mean(changes), rel=1e-4)


def test_other_models_are_compared_in_the_ways_that_they_have(make_split):
    ways = {name: list(module.methods_for(make_split(name).config)) for name in ("BPR", "NGCF", "NeuMF")}
    exact = ["exact, paired", "exact, fresh"]
    assert ways["BPR"] == list(module.METHODS) and ways["NGCF"] == ["nothing done", "influence", *exact]
    assert ways["NeuMF"] == ["nothing done", *exact]


def test_sequential_models_are_asked_by_histories_without_what_is_forgotten(make_split):
    split = make_split("FPMC", **IN_ORDER)
    rows = ForgetRequest("count", 40, 2020).rows(split)
    model, observer = new_model(split.config, split).eval(), Observer(split.config, split, rows)
    seen = observer.view(model)
    np.testing.assert_allclose(seen.percentile, percentiles(model, split, rows))
    assert len(seen.affected) == len(np.unique(split.users[rows])) and len(seen.unaffected)
    assert seen.metrics == observer.view(model).metrics and 0 <= seen.metrics["hit@10"] <= 1
