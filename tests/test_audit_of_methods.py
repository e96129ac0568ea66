"""``evaluate: audit``: populations of models, pair by pair."""

import json

import numpy as np
import pytest

from recbole_unlearn.comparison.panel import TOP, Panel
from recbole_unlearn.comparison.populations import AUDITED, Audit, audited, set_names
from recbole_unlearn.errors import InputError
from recbole_unlearn.methods import METHODS, suited
from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.reports.per_example import outside
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.training.fit import new_model

EXACT = ("exact, paired", "exact, fresh")
IN_ORDER = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, make_options):
    """An audit of few models: (result, its folder, its cache)."""
    base = tmp_path_factory.mktemp("audit")

    def again(**changes):
        options = make_options(
            evaluate="audit", audit_models=16, comparison_sets="items:4", methods="gradient_ascent,sisa,ours",
            method_args={"sisa": {"shards": 2}}, epochs=15, learning_rate=0.02, eval_step=0,
            comparison_cache=str(base / "cache"), show_progress=False, **changes,
        )  # fmt: skip
        options.pop("forget_count", None)
        return run_unlearn("BPR", "tiny", config_dict=options)

    return again(output_dir=str(base / "out")), base, again


@pytest.mark.parametrize("key, bold", [("ndcg", 1.5), ("churn", 1.5), ("klom", 1.1), ("klom, held out", 1.1)])
def test_a_mean_over_models_is_another_by_more_than_the_errors_of_both_populations(key, bold):
    def of(value):
        return {key: {"low": value - 1, "median": value, "high": value + 1}}

    for value in (0, 0.9, 1.1, 1.3, 1.5, -1.3, -1.5):
        assert outside(key, of(value), of(0)) == (abs(value) >= bold)


def test_what_an_audit_says(found):
    result, base, _ = found
    ((name, each),) = result["audit"].items()
    figures, floor = each["figures"], each["floors"]["8"]
    assert name == "items:4" and list(figures)[0] == "nothing done" and set(EXACT) < set(figures)
    assert figures["nothing done"]["effect left"]["median"] == pytest.approx(1, abs=0.15)
    assert abs(figures["exact, paired"]["effect left"]["median"]) < 0.1  # of one seed, always the same
    fresh = figures["exact, fresh"]["effect left"]  # of other numbers each time: within four standard errors
    assert abs(fresh["median"]) < fresh["high"] - fresh["low"] < 0.4
    for way in EXACT:
        assert figures[way]["lira_auc"]["median"] < figures["nothing done"]["lira_auc"]["median"]
    assert floor["effect left"]["low"] < 0 < floor["effect left"]["high"]
    assert figures["nothing done"]["churn"]["median"] == 0 < figures["exact, fresh"]["churn"]["median"]
    page = (base / "out" / "audit.md").read_text("utf-8")
    assert page == result.page and "| nothing done" in page and "retrained" in page
    assert "Trained by the compiled kernels" in page
    assert json.loads((base / "out" / "audit.json").read_text())["sets"]["items:4"]["interactions"] > 0
    assert (base / "out" / "audit-items-4.svg").read_text().startswith("<svg")


def test_an_audit_goes_on_where_it_stopped(found):
    result, base, again = found
    kept = sorted((base / "cache").glob("*.npz"))
    before = {file: file.stat().st_mtime_ns for file in kept}
    lost = kept[::7]
    for file in lost:
        file.unlink()
    repeated = again(output_dir=str(base / "again"))
    assert repeated["audit"].keys() == result["audit"].keys()
    assert all(file.exists() for file in kept)
    assert all(file.stat().st_mtime_ns == before[file] for file in kept if file not in lost)
    paired = [each["audit"]["items:4"]["figures"]["exact, paired"] for each in (result, repeated)]
    assert paired[0] == paired[1]  # of which nothing is drawn anew


def test_another_key_has_methods_measured_anew_and_nothing_else(make_options, tmp_path):
    def views(**changes):
        arguments = "BPR", "tiny", [], make_options(epochs=3, learning_rate=0.02, eval_step=0, **changes)
        way = "one corrected step"
        ways = {way: audited(["ours"], UnlearnConfig(*arguments))[way]}
        audit = Audit(arguments, tmp_path, ways, 16, show_progress=False)
        audit.run(["users:3"])
        return audit.views(audit.panel("users:3", audit.rows("users:3")), way).margin

    first, before = views(), {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.npz")}
    assert np.abs(views(damping_strength=1000.0) - first).max() > 0.01
    assert len(list(tmp_path.glob("*.npz"))) == len(before) + 16
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())


class Careless(Method):
    """Changes in place what it was given."""

    def forget(self, rows, show_progress=False):
        for value in self.task.stored["state_dict"].values():
            value.zero_()
        return Forgotten(self.task.model(), 1.0)


def test_no_method_of_an_audit_spoils_what_the_next_one_starts_from(make_options, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "careless", Careless)
    ways, found = {"careless": ("careless", {}), "fine_tune": ("fine_tune", {"epochs": 1})}, []
    arguments = "BPR", "tiny", [], make_options(epochs=2)
    for wanted in (["fine_tune"], ["careless", "fine_tune"]):
        folder = tmp_path / str(len(wanted))
        folder.mkdir()
        Audit(arguments, folder, ways, 16).unlearn(0, {"some": rows}, [("some", way) for way in wanted])
        found.append({file.name: np.load(file)["margin"] for file in folder.glob("*.npz")})
    ((name, margin),) = found[0].items()
    assert len(found[1]) == 2
    np.testing.assert_array_equal(found[1][name], margin)


class Broken(Method):
    """Gives a model that has no scores of some item."""

    def forget(self, rows, show_progress=False):
        model = self.task.model()
        model.item_embedding.weight.data[3] = self.settings["value"]
        return Forgotten(model, 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_without_finite_scores_is_refused_and_nothing_of_it_kept(
    make_options, rows, tmp_path, monkeypatch, value
):
    monkeypatch.setitem(METHODS, "broken", Broken)
    audit = Audit(("BPR", "tiny", [], make_options(epochs=1)), tmp_path, {"broken": ("broken", {"value": value})}, 16)
    with pytest.raises(InputError, match="^broken: the model's scores are not finite"):
        audit.unlearn(0, {"some": rows}, [("some", "nothing done"), ("some", "broken")])
    assert len(list(tmp_path.glob("*.npz"))) == 1  # of the original


def test_a_panel_sees_margins_and_lists(make_split, make_model):
    split = make_split()
    rows, model = np.arange(0, 40, 3), make_model(split, 1)
    panel = Panel(split, rows)
    seen, view = split.seen(), panel.view(model)
    users, items = (value.detach().numpy() for value in (model.user_embedding.weight, model.item_embedding.weight))
    scores = users @ items.T
    for pair in range(0, len(panel.users), 17):
        user, item = panel.users[pair], panel.items[pair]
        others = np.setdiff1d(np.arange(1, split.n_items), seen(user))
        assert view["margin"][pair] == pytest.approx(scores[user, item] - scores[user, others].mean(), abs=1e-5)
    np.testing.assert_array_equal(panel.users[panel.groups["forgotten"]], split.users[rows])
    kept = np.setdiff1d(np.arange(split.n_rows), rows)
    for user in (1, 5, 9):
        trained = split.items[kept[split.users[kept] == user]]
        assert len(set(view["top"][user])) == TOP and not np.isin(view["top"][user], trained).any()
        assert (np.diff(scores[user, view["top"][user]]) <= 0).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"comparison_sets": "users"}, "KIND:NUMBER"),
        ({"comparison_sets": "everybody:3"}, "no kind 'everybody'"),
        ({"comparison_sets": "items:0"}, "items:0: .* at least 1"),
        ({"comparison_sets": "mixed:0"}, "mixed:0: .* at least 1"),
        ({"comparison_sets": "vulnerable:0"}, "vulnerable:0: .* at least 1"),
        ({"comparison_sets": "users:-3"}, "users:-3: .* at least 1"),
        ({"comparison_sets": "core_users:0"}, "core_users:0: .* at least 1"),
        ({"comparison_sets": "ratio:2.0"}, "ratio:2.0: .* between 0 and 1"),
        ({"comparison_sets": "mixed:4,users:100000"}, "users:100000: only [0-9]+ users have training interactions"),
        ({"comparison_sets": "mixed:4,items:46"}, "items:46: .* nothing would be left"),
        ({"comparison_sets": "mixed:100000"}, "mixed:100000: .* only [0-9]+ training interactions"),
        ({"comparison_sets": "vulnerable:100000"}, "vulnerable:100000: .* only [0-9]+ training interactions"),
        ({"comparison_sets": "count:100000"}, "count:100000: .* only [0-9]+ training interactions"),
        ({"forget_seed": -1}, "forget_seed must be a whole number of at least 0"),
        ({"audit_models": 4}, "at least 16"),
        ({"compare_models": "Pop"}, "leave compare_models out"),
        ({"methods": "magic"}, "unknown method"),
        ({"methods": "sisa", "model": "NeuMF"}, "sisa is not for NeuMF: it is for BPR and LightGCN"),
        ({"methods": "scif,ours", "model": "DMF"}, "scif is not for DMF"),
        ({"methods": "ubpr", "model": "DMF"}, "ubpr is not for DMF: it is trained on labels"),
        ({"methods": "ultrare", "method_args": {"ultrare": {"shards": 0}}}, "shards must be above 0"),
        ({"methods": "sisa", "method_args": {"sisa": {"slices": 0}}}, "slices must be above 0"),
        ({"checkpoint": "model.pth"}, "leave checkpoint out"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(make_options, tmp_path, changes, said):
    options = make_options(evaluate="audit", comparison_cache=str(tmp_path / "cache"), **changes)
    options.pop("forget_count", None)
    with pytest.raises(InputError, match=said) as refused:
        run_unlearn(options.pop("model", "BPR"), "tiny", config_dict=options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "cache").exists()


def test_forget_sets_are_drawn_by_the_forget_seed(make_options, tmp_path):
    def audit(**changes):
        return Audit(("BPR", "tiny", [], make_options(epochs=1, eval_step=0, **changes)), tmp_path, {}, 16)

    first, other = audit(), audit(forget_seed=7)
    split, vulnerable = first.split, first.rows("vulnerable:10")

    def drawn(some, size):
        return np.random.default_rng(2020).choice(some, size, replace=False)

    rest = np.setdiff1d(np.arange(split.n_rows), vulnerable)
    for name, rows in {
        "users:5": np.flatnonzero(np.isin(split.users, drawn(np.unique(split.users), 5))),
        "items:5": np.flatnonzero(np.isin(split.items, drawn(np.unique(split.items), 5))),
        "count:20": np.sort(drawn(split.n_rows, 20)),
        "mixed:20": np.union1d(vulnerable, drawn(rest, 10)),
    }.items():
        np.testing.assert_array_equal(first.rows(name), rows, name)
        assert not np.array_equal(other.rows(name), rows), name
    np.testing.assert_array_equal(other.rows("vulnerable:10"), vulnerable)


def test_ours_is_the_ways_that_a_model_has_and_the_default_set_is_mixed(make_split):
    whole, labels = (make_split(model).config for model in ("BPR", "NeuMF"))
    factorised = make_split("FPMC", **IN_ORDER).config
    assert set(audited(["ours", "retrain"], whole)) == {"one corrected step", "touched rows", *EXACT}
    assert set(audited(["ours"], factorised)) == {"one corrected step", *EXACT}
    assert set(audited(["ours"], labels)) == set(EXACT)
    assert suited(AUDITED, whole) == AUDITED and suited(AUDITED, labels) == ["fine_tune", "ours"]
    assert set_names(None, whole) == ["mixed:200"]


def test_a_panel_tells_active_users_from_others(make_split, make_model):
    split = make_split()
    panel = Panel(split, np.arange(0, 40, 3))
    users, items = panel.test
    top = np.zeros((1, split.n_users, TOP), np.int64)
    top[0, users[panel.active[users]], 0] = items[panel.active[users]]  # a hit at the first place for each of them
    found = panel.usefulness(top)
    assert found["fairness"][0] > 0 and found["fairness"][0] >= found["ndcg"][0] > 0
    assert not (panel.active & panel.inactive).any() and panel.active.sum() < panel.inactive.sum()


def test_a_panel_asks_sequential_models_by_histories_without_what_is_forgotten(make_split):
    split = make_split("FPMC", **IN_ORDER)
    rows = np.arange(0, split.n_rows, 3)
    model, panel, seen = new_model(split.config, split), Panel(split, rows), split.seen()
    view, rest, judged = panel.view(model), split.remaining_dataset(rows), split.judged_without(rows)

    def asked(queries, user, item):
        """(scores, margin) of a pair."""
        scores = model.full_sort_predict(queries).detach().numpy().ravel()
        others = np.setdiff1d(np.arange(1, split.n_items), seen(user))
        return scores, scores[item] - scores[others].mean(dtype=float)

    def pairs(data):
        return data.inter_feat[data.uid_field].numpy(), data.inter_feat[data.iid_field].numpy()

    for group, data in (("retained, touched users", rest), ("held out", judged.test._dataset)):
        users, items = pairs(data)
        for pair in range(panel.groups[group].start, panel.groups[group].stop, 7):
            user, item = panel.users[pair], panel.items[pair]
            (place,) = np.flatnonzero((users == user) & (items == item))[:1]
            scores, margin = asked(split.test.transform(data, data.inter_feat[[place]]), user, item)
            assert view["margin"][pair] == pytest.approx(margin, abs=1e-5), group
            if group == "held out":
                had = np.concatenate([of[1][of[0] == user] for of in map(pairs, (rest, judged.valid._dataset))])
                best, free = view["top"][user], np.setdiff1d(np.arange(1, split.n_items), had)
                assert scores[best[0]] == scores[free].max() and not np.isin(best, had).any()
                assert (np.diff(scores[best]) <= 0).all()
    queries = split.queries(rows)
    for pair, (row, history) in enumerate(zip(rows, queries["item_id_list"].numpy(), strict=True)):
        user = split.users[row]
        assert not np.isin(history, split.items[rows][split.users[rows] == user]).any()
        _, margin = asked(queries[[pair]], user, split.items[row])
        assert view["margin"][pair] == pytest.approx(margin, abs=1e-5)


def test_an_audit_of_a_sequential_model(make_options, tmp_path):
    options = make_options(epochs=8, learning_rate=0.02, eval_step=0, loss_type="BPR", **IN_ORDER)
    arguments = "FPMC", "tiny", [], options
    ways = audited(["fine_tune", "ours"], UnlearnConfig(*arguments))
    assert ways.pop("one corrected step")  # dear
    audit = Audit(arguments, tmp_path, ways, 16, show_progress=False)
    (each,) = audit.run(["users:3"]).values()
    figures = each["figures"]
    assert set(figures) == {"nothing done", "fine_tune", *EXACT}
    for way in EXACT:
        assert abs(figures[way]["effect left"]["median"]) < 0.3 < figures["nothing done"]["effect left"]["median"]
    assert figures["nothing done"]["churn"]["median"] == 0 < figures["exact, fresh"]["churn"]["median"]
    audit.scout(0)  # of which 48 find what is vulnerable
    with np.load(next(tmp_path.glob("scout-*"))) as found:
        assert np.isfinite(found["margin"]).all() and 0 < found["hidden"].mean() < 0.5
        assert found["margin"][~found["hidden"]].mean() > found["margin"][found["hidden"]].mean()


def test_methods_that_train_their_own_models_are_compared_with_their_own_training(found):
    result, _, _ = found
    each = result["audit"]["items:4"]
    figures, against = each["figures"], each["against"]
    assert against == dict.fromkeys(["sisa, nothing done", "sisa"], "sisa, retrained")
    assert figures["sisa, nothing done"]["effect left"]["median"] > 0.7  # of what the items mean to shards
    assert abs(figures["sisa"]["effect left"]["median"]) < 0.3 and figures["sisa"]["n"] == 8
    assert figures["sisa"]["churn"]["median"] > 0 == figures["sisa, nothing done"]["churn"]["median"]
    first = [line.split("|")[1].strip() for line in result.page.splitlines() if line.startswith("| ")]
    at = first.index("sisa, retrained")
    assert first[at : at + 3] == ["sisa, retrained", "sisa, nothing done", "sisa"]


def test_no_oracle_has_an_ideal_partition(make_split):
    with pytest.raises(InputError, match="leave ideal out"):
        audited(["sisa"], make_split().config, {"sisa": {"ideal": True}})
