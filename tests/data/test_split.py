"""The frozen split: what remains without a forget set is what retraining would see; nothing else changes."""

import json
import pickle

import numpy as np
import pytest
import torch
from logs import without
from recbole.sampler import Sampler

from recbole_unlearn.data.fingerprint import marks, rows_checksum
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.recorded import popularity_weights
from recbole_unlearn.storage.triple_log import Training, TripleLog


def pairs_of(loader):
    """(user, item) ids of the interactions behind a loader, in order."""
    data = loader.dataset
    features = data.inter_feat
    return list(zip(features[data.uid_field].tolist(), features[data.iid_field].tolist(), strict=True))


def rows_of(split):
    return list(zip(split.users.tolist(), split.items.tolist(), strict=True))


def epoch(loader):
    """(users, items, negatives) that one epoch of a training loader gives."""
    batches = [(b["user_id"], b["item_id"], b["neg_item_id"]) for b in loader]
    return [torch.cat(column).numpy() for column in zip(*batches, strict=True)]


def drawn(loader, epochs=60):
    """Set of (user, negative) over many epochs."""
    found = set()
    for _ in range(epochs):
        users, _, negatives = epoch(loader)
        found |= set(zip(users.tolist(), negatives.tolist(), strict=True))
    return found


def make_log(split, path, rows=()):
    """An original's log without ``rows``, as an unlearned model carries it."""
    training = Training("original", split.fingerprint, split.n_users, split.n_items, negatives=1)
    apart = marks(split.train._dataset, split.data_row)
    log = TripleLog.create(path / "log", split.users, split.items, training, apart)
    log.append(split.items[:, None] % (split.n_items - 1) + 1)
    if not len(rows):
        return log
    return without(log, np.asarray(rows), path / "unlearned", "unlearned", split.fingerprint_without(rows))


# -- the split


def test_rows_are_the_training_interactions_grouped_by_user(split):
    assert sorted(rows_of(split)) == sorted(pairs_of(split.train))
    assert (np.diff(split.users) >= 0).all()
    assert rows_of(split) == [pairs_of(split.train)[row] for row in split.data_row]


def test_training_validation_and_test_together_are_the_file(split, interactions):
    ids = [pair for loader in (split.train, split.valid, split.test) for pair in pairs_of(loader)]
    tokens = [(str(split.token("user", user)), str(split.token("item", item))) for user, item in ids]
    assert sorted(tokens) == sorted((user, item) for user, item, _ in interactions)


def test_the_same_configuration_gives_the_same_split_and_another_seed_another(make_split, split):
    assert rows_of(make_split()) == rows_of(split)
    assert rows_of(make_split(seed=7)) != rows_of(split)


def test_seen_gives_every_item_of_a_user(split):
    everything = pairs_of(split.train) + pairs_of(split.valid) + pairs_of(split.test)
    seen = split.seen()
    for user in range(1, split.n_users):
        assert sorted(seen(user).tolist()) == sorted(item for u, item in everything if u == user)


# -- remaining


@pytest.fixture
def forgotten(split):
    return np.sort(np.random.default_rng(3).choice(split.n_rows, 60, replace=False))


def test_remaining_drops_exactly_the_rows(split, forgotten):
    rest = split.remaining(forgotten)
    kept = np.setdiff1d(np.arange(split.n_rows), forgotten)
    assert sorted(pairs_of(rest)) == sorted(rows_of(split)[row] for row in kept)


def test_remaining_of_an_empty_forget_set_is_the_whole(split):
    assert pairs_of(split.remaining(np.array([], int))) == pairs_of(split.train)


def test_remaining_keeps_ids_and_sizes(split):
    """Even where a user or an item loses all its interactions."""
    rest = split.remaining(np.flatnonzero((split.users == 5) | (split.items == 7)))
    assert (rest.dataset.user_num, rest.dataset.item_num) == (split.n_users, split.n_items)
    assert 5 not in {user for user, _ in pairs_of(rest)}


def test_remaining_leaves_the_original_training_data_alone(split, forgotten):
    before = pairs_of(split.train)
    split.remaining(forgotten)
    assert pairs_of(split.train) == before


def test_forgotten_items_become_drawable_negatives_of_their_users_and_remaining_ones_do_not(split, forgotten):
    kept = {rows_of(split)[row] for row in np.setdiff1d(np.arange(split.n_rows), forgotten)}
    returned = {rows_of(split)[row] for row in forgotten}
    found = drawn(split.remaining(forgotten))
    users_left = {user for user, _ in kept}
    assert {pair for pair in returned if pair[0] in users_left} <= found
    assert not found & kept
    assert not drawn(split.remaining([]), 3) & (kept | returned)


def test_the_padding_item_is_never_drawn(split, forgotten):
    negatives = {negative for _, negative in drawn(split.remaining(forgotten), 20)}
    assert 0 not in negatives
    assert len(negatives) == split.n_items - 1  # all others are


def test_remaining_draws_as_a_sampler_built_without_the_rows(split, forgotten):
    """Same stream, same negatives as stock RecBole on a data set that never held the rows."""
    rest = split.remaining(forgotten)
    sampler = Sampler(["train", "valid", "test"], [rest.dataset, split.valid.dataset, split.test.dataset])
    sampler = sampler.set_phase("train")
    np.random.seed(11)
    users, _, negatives = epoch(rest)
    np.random.seed(11)
    expected = []
    for start in range(0, len(users), rest.step):
        part = users[start : start + rest.step]
        expected.append(sampler.sample_by_user_ids(part, None, 1).numpy())
    np.testing.assert_array_equal(negatives, np.concatenate(expected))


def test_validation_and_test_loaders_are_unchanged(make_split):
    split = make_split()

    def content():
        batches = []
        for loader in (split.valid, split.test):
            for users, (history_u, history_i), positive_u, positive_i in loader:
                batches += [users["user_id"], history_u, history_i, positive_u, positive_i]
        return batches

    before, loaders = content(), (split.valid, split.test)
    split.remaining(np.arange(50))
    assert (split.valid, split.test) == loaders
    after = content()
    assert len(before) == len(after) > 0
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


TIMES = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
UNUSED = {"unused_col": {"inter": ["timestamp"]}}
HISTORIES = {**TIMES, "MAX_ITEM_LIST_LENGTH": 6, "loss_type": "CE", "train_neg_sample_args": None}


@pytest.mark.parametrize("model", ["BPR", "GRU4Rec"])
@pytest.mark.parametrize("end", [np.argmin, np.argmax])
def test_columns_are_scaled_by_what_remains(make_split, model, end):
    """As if RecBole's ``normalize_all`` had never seen the rows: in validation data and histories too."""
    keys = TIMES if model == "BPR" else HISTORIES
    plain, split = make_split(model, **keys), make_split(model, normalize_all=True, **keys)
    times = plain.train.dataset.inter_feat["timestamp"].numpy()[plain.data_row]
    user = plain.users[end(times)]  # whose rows all go, and who is in no other part then
    rows, out = np.flatnonzero(plain.users == user), plain.held_out({"user": [user]})
    raw, found = ([each.remaining_dataset(rows, out).inter_feat] for each in (plain, split))
    for each, tables in ((plain, raw), (split, found)):
        judged = each.judged_without(rows, out)
        for name in ("valid", "test"):
            table = getattr(judged, name).dataset.inter_feat
            tables.append(table[torch.from_numpy(np.delete(np.arange(len(table)), out[name]))])
    known = [torch.cat([each["timestamp"], *_first_times(each)]) for each in raw]
    low, high = min(map(torch.min, known)), max(map(torch.max, known))
    assert (low, high) != (times.min(), times.max())
    for before, after in zip(raw, found, strict=True):
        np.testing.assert_allclose(after["timestamp"], (before["timestamp"] - low) / (high - low), atol=1e-6)
        if model == "GRU4Rec":
            lists = before["timestamp_list"]
            expected = torch.where(before["item_id_list"] > 0, (lists - low) / (high - low), 0.0)
            np.testing.assert_allclose(after["timestamp_list"], expected, atol=1e-6)


def _first_times(table):
    """Of histories of a single item, which may be in no row of its own."""
    return [table["timestamp_list"][table["item_length"] == 1, 0]] if "item_length" in table.columns else []


@pytest.mark.parametrize("model", ["BPR", "GRU4Rec"])
@pytest.mark.parametrize("end", [np.argmin, np.argmax])
def test_of_numerical_features_the_value_is_scaled_and_the_index_stays(make_split, model, end):
    keys = {"normalize_field": ["timestamp"], **(TIMES if model == "BPR" else HISTORIES)}
    plain, pairs = make_split(model, **keys), make_split(model, numerical_features=["timestamp"], **keys)
    rows = np.flatnonzero(plain.users == plain.users[end(plain.train.dataset.inter_feat["timestamp"][plain.data_row])])
    out = plain.held_out({"user": plain.users[rows[:1]]})
    for one, other in zip(tables_without(plain, rows, out), tables_without(pairs, rows, out), strict=True):
        assert torch.equal(one["timestamp"], other["timestamp"][:, 0]) and (other["timestamp"][:, 1] == 1).all()
        if model == "GRU4Rec":
            assert torch.equal(one["timestamp_list"], other["timestamp_list"][:, :, 0])
            assert torch.equal(one["item_id_list"] > 0, other["timestamp_list"][:, :, 1] == 1)


def tables_without(split, rows, held_out=None):
    """Columns of training, validation and test interactions without rows of the first."""
    judged = split.judged_without(rows, held_out)
    parts = split.remaining_dataset(rows, held_out), judged.valid.dataset, judged.test.dataset
    return [part.inter_feat for part in parts]


def test_histories_of_columns_that_rows_lack_are_rebuilt(make_split, tmp_path):
    """RecBole's ``unused_col`` takes a column from the rows and leaves it in their histories."""
    whole, lacking = make_split("GRU4Rec", **HISTORIES), make_split("GRU4Rec", **UNUSED, **HISTORIES)
    assert "timestamp" not in lacking.train.dataset.inter_feat.columns
    rows = np.random.default_rng(3).choice(whole.n_rows, 60, replace=False)
    rows = np.union1d(rows, np.flatnonzero(whole.users == whole.users[100]))
    aligned = [split.align(make_log(split, tmp_path / str(n), rows)) for n, split in enumerate((whole, lacking))]
    for (one, other), gone in (((whole, lacking), rows), (aligned, rows[:0]), (aligned, np.arange(0, 500, 7))):
        for expected, found in zip(tables_without(one, gone), tables_without(other, gone), strict=True):
            for column in ("item_id_list", "item_length", "timestamp_list"):
                assert torch.equal(expected[column], found[column].to(expected[column].dtype))


@pytest.mark.parametrize("scaled", [{"normalize_all": True}, {"normalize_field": ["timestamp"]}])
def test_scaled_histories_of_columns_that_rows_lack_are_refused(make_split, scaled):
    with pytest.raises(InputError, match="unused_col drops timestamp") as caught:
        make_split("GRU4Rec", **UNUSED, **HISTORIES, **scaled)
    assert "\n" not in str(caught.value)
    make_split(**UNUSED, **TIMES, **scaled)


@pytest.mark.parametrize("parts", [{"LS": "valid_only"}, {"LS": "test_only"}, {"RS": [0.8, 0.2, 0]}, {"RS": [1, 0, 0]}])
def test_histories_are_rebuilt_where_a_part_is_empty(make_split, tmp_path, parts):
    arguments = {"split": parts, "order": "TO", "group_by": "user", "mode": "full"}
    split = make_split("GRU4Rec", eval_args=arguments, **HISTORIES)
    log = make_log(split, tmp_path, np.arange(0, 300, 5))
    aligned = split.align(log)
    check_aligned(aligned, log)
    assert [len(part.dataset) for part in (aligned.valid, aligned.test)] == [
        len(part.dataset) for part in (split.valid, split.test)
    ]


def test_what_is_scaled_by_rows_that_stay_is_as_it_was(make_split, forgotten):
    split = make_split(normalize_all=True, **TIMES)
    times = split.train.dataset.inter_feat["timestamp"].numpy()[split.data_row]
    rows = np.setdiff1d(forgotten, [times.argmin(), times.argmax()])
    kept = split.positions_without(rows)
    assert np.array_equal(
        split.remaining_dataset(rows).inter_feat["timestamp"].numpy()[kept[kept >= 0]], times[kept >= 0]
    )
    assert split.judged_without(rows) is split


def test_forgotten_items_stay_masked_when_the_test_data_is_ranked(split, forgotten):
    """Else the retrained model would be judged on other candidates than the original."""
    split.remaining(forgotten)
    masked = set()
    for users, (history_u, history_i), _, _ in split.test_loader(0):
        masked |= set(zip(users["user_id"][history_u].tolist(), history_i.tolist(), strict=True))
    assert {rows_of(split)[row] for row in forgotten} <= masked


def test_another_seed_orders_the_remaining_rows_differently(split, forgotten):
    first, again, other = (epoch(split.remaining(forgotten, seed=seed))[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert sorted(first) == sorted(other) and list(first) != list(other)
    assert split.config["seed"] == 2020


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_popularity_weighs_items_as_the_sampler_does(make_split, distribution):
    args = {"distribution": distribution, "sample_num": 1, "alpha": 0.7}
    split = make_split(train_neg_sample_args=args)
    if distribution == "uniform":
        assert split.popularity() is None
        return
    weights = popularity_weights(split.popularity(), 0.7)
    everything = [item for loader in (split.train, split.valid, split.test) for _, item in pairs_of(loader)]
    expected = np.bincount(everything, minlength=split.n_items) ** 0.7
    np.testing.assert_allclose(weights, expected)
    assert weights[0] == 0
    np.random.seed(5)
    drawn = split.train._sampler.sampling(60_000)
    frequency = np.bincount(drawn, minlength=split.n_items) / len(drawn)
    np.testing.assert_allclose(frequency, weights / weights.sum(), atol=0.004)


def test_popularity_is_counted_anew_where_a_users_own_items_are_drawn_too(make_split):
    """RecBole's ``repeatable``: by all interactions, held-out ones too, but for the forgotten."""
    split = make_split(train_neg_sample_args={"distribution": "popularity", "sample_num": 1}, repeatable=True)
    item = np.bincount(split.items).argmax()
    rows = np.flatnonzero(split.items == item)
    expected = split.popularity().astype(float)
    expected[item] -= len(rows)
    np.random.seed(5)
    drawn = split.remaining(rows)._sampler.sampling(60_000)
    frequency = np.bincount(drawn, minlength=split.n_items) / len(drawn)
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=0.004)


# -- align


def check_aligned(aligned, log):
    """The split has the log's rows in the log's order, and knows where each lies in its training data."""
    np.testing.assert_array_equal(aligned.users, log.users)
    np.testing.assert_array_equal(aligned.items, log.items)
    data = pairs_of(aligned.train)
    assert [data[row] for row in aligned.data_row] == rows_of(aligned)
    assert sorted(aligned.data_row) == list(range(len(data)))


def test_a_split_aligned_to_the_original_log_is_itself(make_split, tmp_path):
    split = make_split()
    aligned = split.align(make_log(split, tmp_path))
    check_aligned(aligned, TripleLog.open(tmp_path / "log"))
    assert aligned.n_rows == split.n_rows


def test_a_split_aligned_to_an_unlearned_log_has_its_rows(make_split, forgotten, tmp_path):
    log = make_log(make_split(), tmp_path, forgotten)
    fresh = make_split()
    aligned = fresh.align(log)
    check_aligned(aligned, log)
    assert aligned.n_rows == fresh.n_rows - len(forgotten)
    assert (aligned.n_users, aligned.n_items) == (fresh.n_users, fresh.n_items)


def test_an_aligned_split_draws_what_was_forgotten_before_as_negatives(make_split, forgotten, tmp_path):
    split = make_split()
    aligned = make_split().align(make_log(split, tmp_path, forgotten))
    kept = set(rows_of(aligned))
    found = drawn(aligned.train)
    assert {rows_of(split)[row] for row in forgotten if split.users[row] in aligned.users} <= found
    assert not found & kept


def test_remaining_of_an_aligned_split_drops_the_right_rows(make_split, forgotten, tmp_path):
    aligned = make_split().align(make_log(make_split(), tmp_path, forgotten))
    second = np.arange(0, aligned.n_rows, 9)
    rest = aligned.remaining(second)
    expected = [pair for row, pair in enumerate(rows_of(aligned)) if row not in set(second.tolist())]
    assert sorted(pairs_of(rest)) == sorted(expected)


def test_a_second_generation_aligns_to_the_same_file(make_split, forgotten, tmp_path):
    split = make_split()
    first = make_log(split, tmp_path, forgotten)
    aligned = make_split().align(first)
    second = np.arange(0, aligned.n_rows, 11)
    log = without(first, second, tmp_path / "second", "second", aligned.fingerprint_without(second))
    check_aligned(make_split().align(log), log)


@pytest.mark.parametrize("seed", range(4))
def test_aligning_works_where_interactions_occur_twice(make_split, write_data, interactions, tmp_path, seed):
    rng = np.random.default_rng(seed)
    again = [interactions[n] for n in rng.choice(len(interactions), 300)]
    doubled = interactions + [(user, item, time + 7) for user, item, time in again]
    path = write_data(tmp_path, "doubled", [doubled[n] for n in rng.permutation(len(doubled))])
    split = make_split(dataset="doubled", data_path=path)
    assert len(set(rows_of(split))) < split.n_rows - 100
    forgotten = np.sort(rng.choice(split.n_rows, 150, replace=False))
    log = make_log(split, tmp_path, forgotten)
    aligned = make_split(dataset="doubled", data_path=path).align(log)
    check_aligned(aligned, log)
    second = np.sort(rng.choice(aligned.n_rows, 80, replace=False))
    rest = aligned.remaining(second)
    kept = set(range(aligned.n_rows)) - set(second.tolist())
    assert sorted(pairs_of(rest)) == sorted(rows_of(aligned)[row] for row in kept)
    log2 = without(log, second, tmp_path / "second", "second", aligned.fingerprint_without(second))
    check_aligned(make_split(dataset="doubled", data_path=path).align(log2), log2)


def test_a_log_of_the_same_data_under_another_seed_is_refused(make_split, forgotten, tmp_path):
    for n, rows in enumerate(([], forgotten)):
        log = make_log(make_split(seed=7), tmp_path / str(n), rows)
        with pytest.raises(InputError, match="seed") as refused:
            make_split().align(log)
        assert "\n" not in str(refused.value)


def test_no_checksum_in_a_log_tells_what_is_forgotten(split, tmp_path):
    """A single pair would be found by trying all."""
    log = make_log(split, tmp_path, [3])
    users, items = np.array(log.users, np.int64), np.array(log.items, np.int64)
    told = json.dumps(log.metadata["fingerprint"])
    whole = rows_checksum(np.insert(users, 3, split.users[3]), np.insert(items, 3, split.items[3]))
    assert whole == split.fingerprint["rows"] and whole not in told


@pytest.mark.parametrize("changed", ["user", "item", "row"])
def test_a_log_of_another_data_set_is_refused(make_split, write_data, interactions, tmp_path, changed):
    if changed == "row":
        other = interactions[:-1]
    else:
        column = 0 if changed == "user" else 1
        token = interactions[0][column]
        other = [tuple("renamed" if field == token else field for field in row) for row in interactions]
    log = make_log(make_split(data_path=write_data(tmp_path, "tiny", other)), tmp_path)
    with pytest.raises(InputError) as refused:
        make_split().align(log)
    assert "\n" not in str(refused.value)


# -- pickles


@pytest.mark.parametrize(
    "name, keys",
    [
        ("tiny-Dataset.pth", {}),
        ("tiny-for-BPR-dataloader.pth", {}),
        ("elsewhere.pth", {"dataset_save_path": "{folder}/elsewhere.pth"}),
        ("elsewhere.pth", {"dataloaders_save_path": "{folder}/elsewhere.pth"}),
    ],
    ids=["default data set cache", "default loader cache", "dataset_save_path", "dataloaders_save_path"],
)
def test_no_pickled_cache_is_loaded(make_split, split, tmp_path, name, keys):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Hostile()))
    pickle.loads((folder / name).read_bytes()).close()
    assert (tmp_path / "ran").exists()  # the trap works
    (tmp_path / "ran").unlink()
    keys = {key: value.format(folder=folder) for key, value in keys.items()}
    loaded = make_split(checkpoint_dir=str(folder), **keys)
    assert not (tmp_path / "ran").exists()
    assert rows_of(loaded) == rows_of(split)
    assert loaded.config["checkpoint_dir"] == str(folder)


def test_no_cache_is_written(make_split, tmp_path):
    make_split(checkpoint_dir=str(tmp_path / "saved"), save_dataset=True, save_dataloaders=True)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    "keys",
    [
        {"dataset": "no-such-set"},
        {"data_path": "/no/such/path"},
        {"load_col": {"inter": ["user_id", "no_column"]}},
    ],
    ids=["data set", "data_path", "column"],
)
def test_data_that_cannot_be_loaded_is_refused_in_one_line(make_split, keys):
    with pytest.raises(InputError) as refused:
        make_split(**keys)
    assert "\n" not in str(refused.value)
