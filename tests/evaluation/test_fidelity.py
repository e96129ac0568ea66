"""Fidelity over seeds, and the figures that it is made of."""

import json

import numpy as np
import pytest

from recbole_unlearn.comparison import fidelity as module
from recbole_unlearn.comparison.fidelity import Seen, ceiling, compare, overlap
from recbole_unlearn.quick_start import run_unlearn


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
    assert got == pytest.approx(np.corrcoef(noisy.mean(0), true)[0, 1], abs=0.02)


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
    json.loads((tmp_path / "one" / "fidelity.json").read_text())
