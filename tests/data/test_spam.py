"""Spam: injected into the training data only, forgotten again, and seen in the exposure of the promoted items."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.exposure import exposure
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.training.trained import same_weights

ACCOUNTS, PROMOTED = 9, "SECRETITEM-41"


@pytest.fixture
def rare(split):
    """Token of an item with few training interactions."""
    items, counts = np.unique(split.items, return_counts=True)
    return str(split.token("item", items[counts.argmin()]))


@pytest.fixture
def run(make_options):
    def start(**keys):
        given = make_options(**{"compare": "none", "output_dir": "out", "forget_spam": ACCOUNTS, **keys})
        return run_unlearn("BPR", "tiny", None, given)

    return start


@pytest.fixture
def refusal(make_split):
    def refused(**keys):
        with pytest.raises(InputError) as error:
            make_split(**keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


def rows_of(split):
    return list(zip(split.users.tolist(), split.items.tolist(), strict=True))


# -- injection


def test_spam_is_added_to_the_training_data_and_nowhere_else(make_split, split, rare):
    spammed = make_split(forget_spam=ACCOUNTS, spam_items=[rare])
    assert spammed.n_rows == split.n_rows + ACCOUNTS == split.n_rows + len(spammed.spam)
    assert rows_of(split) == [pair for row, pair in enumerate(rows_of(spammed)) if row not in spammed.spam]
    assert (spammed.n_users, spammed.n_items) == (split.n_users, split.n_items)
    assert set(split.token("item", spammed.items[spammed.spam])) == {rare}
    for clean, dirty in ((split.valid, spammed.valid), (split.test, spammed.test)):
        for field in ("user_id", "item_id"):
            assert torch.equal(clean.dataset.inter_feat[field], dirty.dataset.inter_feat[field])


def test_no_account_had_a_promoted_item_before(make_split, split):
    spammed = make_split(forget_spam=4, spam_items=3)
    users, items = np.unique(spammed.users[spammed.spam]), np.unique(spammed.items[spammed.spam])
    assert (len(users), len(items), len(spammed.spam)) == (4, 3, 12)
    seen = split.seen()
    assert not any(np.isin(items, seen(user)).any() for user in users)


def test_a_number_of_items_means_the_rarest(make_split, split):
    spammed = make_split(forget_spam=4, spam_items=3)
    items, counts = np.unique(split.items, return_counts=True)
    promoted = np.isin(items, spammed.items[spammed.spam])
    assert promoted.sum() == 3 and counts[promoted].max() <= counts[~promoted].min()


def test_promoted_items_are_no_negatives_of_the_accounts_and_their_history_is_masked(make_split, rare):
    spammed = make_split(forget_spam=ACCOUNTS, spam_items=[rare])
    (item,) = np.unique(spammed.items[spammed.spam])
    for user in spammed.users[spammed.spam]:
        for loader in (spammed.train, spammed.valid, spammed.test):
            assert item in loader._sampler.used_ids[user]


def test_the_request_is_exactly_the_spam(make_split, make_config, rare):
    keys = {"forget_spam": ACCOUNTS, "spam_items": [rare]}
    spammed = make_split(**keys)
    np.testing.assert_array_equal(ForgetRequest.from_config(make_config(**keys)).rows(spammed), spammed.spam)


def test_the_seed_decides_on_the_accounts(make_split, rare):
    keys = {"forget_spam": ACCOUNTS, "spam_items": [rare]}
    first, again, other = (make_split(**keys, forget_seed=seed) for seed in (1, 1, 2))
    assert rows_of(first) == rows_of(again) and first.fingerprint == again.fingerprint
    assert set(first.users[first.spam]) != set(other.users[other.spam])


def test_ratings_and_times_of_the_spam_are_those_of_the_accounts(make_split, rare):
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    spammed = make_split(forget_spam=ACCOUNTS, spam_items=[rare], load_col=columns)
    times = spammed.train.dataset.inter_feat["timestamp"].numpy()[spammed.data_row]
    for row in spammed.spam:
        others = np.setdiff1d(np.flatnonzero(spammed.users == spammed.users[row]), row)
        assert times[row] in times[others]


def test_popularity_counts_the_spam(make_split, rare):
    args = {"distribution": "popularity", "sample_num": 1}
    clean, spammed = (
        make_split(train_neg_sample_args=args, **keys) for keys in ({}, {"forget_spam": ACCOUNTS, "spam_items": [rare]})
    )
    more = spammed.popularity() - clean.popularity()
    assert more.sum() == more[spammed.items[spammed.spam[0]]] == ACCOUNTS


# -- refusals


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many", [3]])
def test_a_number_of_accounts_that_is_none_is_refused(refusal, value):
    assert "forget_spam" in refusal(forget_spam=value)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, [], "", {"a": 1}, None])
def test_promoted_items_that_are_none_are_refused(refusal, value):
    assert "spam_items" in refusal(forget_spam=3, spam_items=value)


def test_too_many_accounts_are_refused_and_their_number_told(refusal, make_split, rare):
    message = refusal(forget_spam=1000, spam_items=[rare])
    most = int(message.split("only ")[1].split()[0])
    assert len(make_split(forget_spam=most, spam_items=[rare]).spam) == most
    assert f"only {most}" in refusal(forget_spam=most + 1, spam_items=[rare])


def test_an_unknown_promoted_item_is_refused_with_the_nearest(refusal, rare):
    assert f"did you mean {rare!r}?" in refusal(forget_spam=3, spam_items=[rare + "x"])


def test_more_rare_items_than_there_are_are_refused(refusal):
    assert "10000 items" in refusal(forget_spam=3, spam_items=10_000)


def test_bad_spam_is_refused_before_anything_is_written(run):
    for keys in ({"forget_spam": 1000}, {"spam_items": ["nothing"]}, {"spam_items": 0}, {"forget_count": 3}):
        with pytest.raises(InputError):
            run(**keys)
    assert not list(Path().iterdir())


# -- exposure


class Fixed(torch.nn.Module):
    """A model whose scores are given."""

    device = "cpu"

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.from_numpy(scores)

    def full_sort_predict(self, interaction):
        return self.scores[interaction["user_id"]]


def test_exposure_is_the_share_of_other_users_who_get_a_promoted_item(make_split):
    spammed = make_split(forget_spam=6, spam_items=2)
    spam = set(spammed.spam)
    accounts = {int(spammed.users[row]) for row in spam}
    promoted = {int(spammed.items[row]) for row in spam}
    scores = np.random.default_rng(0).normal(size=(spammed.n_users, spammed.n_items)).astype(np.float32)
    scores[:, 0] = 99  # padding is never recommended
    shown = {k: [] for k in (1, 3, 10)}
    for user in sorted(set(spammed.users.tolist()) - accounts):
        had = {int(spammed.items[row]) for row in np.flatnonzero(spammed.users == user)}
        ranked = [item for item in np.argsort(-scores[user]).tolist() if item and item not in had]
        for k, hits in shown.items():
            hits.append(bool(set(ranked[:k]) & promoted))
    expected = {f"exposure@{k}": np.mean(hits) for k, hits in shown.items()}
    assert exposure(Fixed(scores), spammed, [1, 3, 10]) == pytest.approx(expected)
    assert 0 < expected["exposure@1"] < expected["exposure@10"] < 1


def test_a_user_who_was_trained_with_all_promoted_items_is_not_exposed(make_split):
    spammed = make_split(forget_spam=3, spam_items=["SECRETITEM-41"])
    item = spammed.items[spammed.spam[0]]
    had = len(set(spammed.users[spammed.items == item])) - 3
    genuine = len(np.unique(spammed.users)) - 3
    scores = np.zeros((spammed.n_users, spammed.n_items), np.float32)
    scores[:, item] = 1
    assert exposure(Fixed(scores), spammed, [1]) == {"exposure@1": pytest.approx(1 - had / genuine)}


# -- end to end


@pytest.fixture
def shop(write_data, tmp_path):
    """data_path of 'shop': 90 users with some of 60 items, the first items more often; one item has only two users."""
    rng = np.random.default_rng(3)
    taste = 1 / np.arange(3, 63)
    rows = [(f"u{u}", f"i{i}", u) for u in range(90) for i in rng.choice(60, 12, replace=False, p=taste / taste.sum())]
    return write_data(tmp_path, "shop", [*rows, ("u5", "promoted", 0), ("u6", "promoted", 0)])


def test_spam_is_trained_on_forgotten_and_compared_with_the_clean_model(run, make_options, shop):
    keys = {"data_path": shop, "epochs": 25, "eval_step": 0, "topk": [3, 10]}
    spam = {"forget_spam": 45, "spam_items": ["promoted"], "compare": "retrain"}
    result = run_unlearn("BPR", "shop", None, make_options(output_dir="out", **keys, **spam))
    forget = result["forget_set"]
    assert (forget["kind"], forget["interactions"], forget["users"], forget["items"]) == ("spam", 45, 45, 1)
    exposed = {name: figures["exposure"]["exposure@10"] for name, figures in result["models"].items()}
    assert exposed["original"] > 0.5 > exposed["unlearned"]
    assert abs(exposed["unlearned"] - exposed["retrained"]) < 0.2
    page = Path("out/result.md").read_text()
    assert "spam exposure@3" in page and f"{exposed['original']:.4f}" in page and "in their top K" in page
    assert json.loads(Path("out/result.json").read_text()) == result
    clean = run_unlearn("BPR", "shop", None, make_options(compare="none", output_dir="clean", **keys))
    assert "exposure" not in clean["models"]["original"]
    assert same_weights(weights("out/retrained.pth"), weights("clean/model.pth"))
    assert not same_weights(weights("out/model.pth"), weights("clean/model.pth"))


def test_the_unlearned_model_needs_no_spam_to_go_on_but_the_original_does(run, make_split, rare):
    run(spam_items=[rare])
    with pytest.raises(InputError, match="other training interactions"):
        run(checkpoint="out/model.pth", forget_spam=None, forget_count=3, output_dir="a")
    with pytest.raises(InputError, match="forget_spam, spam_items and forget_seed"):
        run(checkpoint="out/model.pth", spam_items=[rare], forget_seed=5, output_dir="a")
    with pytest.raises(InputError, match="empty"):
        run(checkpoint="out/unlearned.pth", spam_items=[rare], output_dir="a")
    again = run(checkpoint="out/model.pth", spam_items=[rare], output_dir="again")
    assert again["models"]["original"]["exposure"].keys() == {"exposure@5", "exposure@10"}
    assert same_weights(weights("again/unlearned.pth"), weights("out/unlearned.pth"))
    more = run(checkpoint="out/unlearned.pth", forget_spam=None, forget_count=3, output_dir="more")
    assert more["forget_set"]["of"] == make_split().n_rows


def test_no_promoted_item_is_in_a_log_or_result(run, split):
    run(forget_spam=4, spam_items=[PROMOTED], state="INFO", compare="retrain")
    item = int(np.flatnonzero(split.token("item", np.arange(split.n_items)) == PROMOTED)[0])
    log = TripleLog.open("out/unlearned.triples")
    assert np.count_nonzero(np.asarray(log.items) == item) == np.count_nonzero(split.items == item)
    for file in Path().rglob("*"):
        if file.is_file():
            assert PROMOTED.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "keys",
    [
        {"forget_core_users": 3}, {"forget_edge_users": 3}, {"forget_popular_items": 2}, {"forget_rare_items": 4},
        {"forget_category": "c3", "forget_category_field": "class"}, {"forget_time": "1000000..1003000"},
    ],
    ids=lambda keys: next(iter(keys)),
)  # fmt: skip
def test_every_other_strategy_runs_end_to_end_and_says_so(run, keys):
    result = run(forget_spam=None, epochs=1, **keys)
    kind = next(iter(keys)).removeprefix("forget_")
    assert result["forget_set"]["kind"] == kind and f"({kind})" in Path("out/result.md").read_text()
    assert "exposure" not in result["models"]["original"]
    written = json.loads(Path("out/result.json").read_text())["settings"]
    assert "forget_category" not in written and "forget_time" not in written
    again = run(checkpoint="out/unlearned.pth", forget_spam=None, epochs=1, forget_count=2, output_dir="again")
    assert again["forget_set"]["of"] == result["forget_set"]["of"] - result["forget_set"]["interactions"]
