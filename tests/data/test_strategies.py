"""Forget sets by popularity, category and time: each selects what its key says, or says why it cannot."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import recbole_unlearn
from recbole_unlearn.data.forget import KINDS, ForgetRequest
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.keys import KEYS

EXTREMES = ["core_users", "edge_users", "popular_items", "rare_items"]


@pytest.fixture
def select(split, make_config):
    """Function (split=the tiny one, **forget keys) -> rows."""

    def rows(of=split, **keys):
        return ForgetRequest.from_config(make_config(**keys)).rows(of)

    return rows


@pytest.fixture
def refusal(select):
    """Function (like select) -> the one-line message of the refusal."""

    def refused(*args, **keys):
        with pytest.raises(InputError) as error:
            select(*args, **keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


def pairs(split, rows):
    """Counted (user token, item token) of some rows."""
    users, items = split.token("user", split.users[rows]), split.token("item", split.items[rows])
    return Counter(zip(users, items, strict=True))


def test_every_kind_is_a_documented_key():
    documented = set(KEYS)
    assert {f"forget_{kind}" for kind in KINDS} <= documented
    page = (Path(recbole_unlearn.__file__).resolve().parents[1] / "docs" / "forget_sets.md").read_text()
    for kind in KINDS:
        assert f"`forget_{kind}`" in page


# -- core and edge users, popular and rare items


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("count", [1, 5, 20])
def test_extremes_select_all_of_the_most_or_the_least_frequent(select, split, kind, count):
    column = split.users if kind.endswith("users") else split.items
    most = kind in ("core_users", "popular_items")
    rows = select(**{f"forget_{kind}": count})
    chosen = np.unique(column[rows])
    assert len(chosen) == count
    np.testing.assert_array_equal(rows, np.flatnonzero(np.isin(column, chosen)))
    frequency = Counter(column.tolist())
    inside = [frequency[value] for value in chosen]
    outside = [frequency[value] for value in frequency if value not in chosen]
    assert min(inside) >= max(outside) if most else max(inside) <= min(outside)


@pytest.mark.parametrize("kind", EXTREMES)
def test_ties_are_drawn_by_seed_and_a_larger_set_holds_the_smaller(select, kind):
    key = f"forget_{kind}"
    np.testing.assert_array_equal(select(**{key: 4}), select(**{key: 4}))
    assert set(select(**{key: 4})) < set(select(**{key: 5}))


def test_among_equals_the_seed_decides(make_split, select, write_data, tmp_path):
    """Everybody has everything but one item: all users tie, all items tie."""
    rows = [(f"u{n}", f"i{m}", n * m) for n in range(20) for m in range(20) if n != m]
    even = make_split(
        dataset="even", data_path=write_data(tmp_path, "even", rows), eval_args={"split": {"LS": "valid_and_test"}}
    )
    chosen = {tuple(select(even, forget_core_users=2, forget_seed=seed)) for seed in range(6)}
    assert len(chosen) > 3


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("count", [0, -3, 2.5, True, "many", [3]])
def test_a_number_of_users_or_items_that_is_none_is_refused(refusal, kind, count):
    assert f"forget_{kind}" in refusal(**{f"forget_{kind}": count})


@pytest.mark.parametrize("kind", EXTREMES)
def test_more_than_there_are_is_refused_and_their_number_told(refusal, split, kind):
    what = kind.split("_")[1]
    there = len(np.unique(getattr(split, what)))
    assert f"{there + 1} {what} are asked for, but only {there}" in refusal(**{f"forget_{kind}": there + 1})
    assert f"all {split.n_rows}" in refusal(**{f"forget_{kind}": there})


# -- category


@pytest.fixture
def films(make_split, write_data, interactions, tmp_path):
    """Function (text of the .item file) -> split of the tiny interactions with it."""

    def build(text):
        path = write_data(tmp_path, "films", interactions)
        (tmp_path / "films" / "films.item").write_text(text)
        return make_split(dataset="films", data_path=path)

    return build


def item_file(header, lines):
    return "\n".join(["\t".join(header), *("\t".join(line) for line in lines)]) + "\n"


def test_a_category_selects_all_interactions_with_its_items(select, split, interactions):
    wanted = {item for n, item in enumerate(sorted({item for _, item, _ in interactions})) if n % 5 == 3}
    rows = select(forget_category="c3", forget_category_field="class")
    assert len(rows) > 20
    items = split.token("item", split.items)
    assert list(rows) == [row for row, item in enumerate(items) if item in wanted]


def test_several_categories_select_their_union(select):
    one, other = (select(forget_category=name, forget_category_field="class") for name in ("c1", "c4"))
    both = select(forget_category=["c1", "c4"], forget_category_field="class")
    np.testing.assert_array_equal(both, np.union1d(one, other))


def test_an_item_of_several_categories_belongs_to_each(films, select, interactions):
    items = sorted({item for _, item, _ in interactions})
    genres = {item: ["Drama", "Film-Noir", "Children's"][: 1 + n % 3] for n, item in enumerate(items)}
    lines = [(item, " ".join(genres[item]), str(1990 + n % 3)) for n, item in enumerate(items)]
    split = films(item_file(["item_id:token", "class:token_seq", "year:token"], lines))
    for genre in ("Film-Noir", "Children's"):
        rows = select(split, forget_category=genre, forget_category_field="class")
        assert {str(item) for item in split.token("item", split.items[rows])} == {
            i for i in items if genre in genres[i]
        }
    rows = select(split, forget_category=1991, forget_category_field="year")
    assert {str(i) for i in split.token("item", split.items[rows])} == {i for n, i in enumerate(items) if n % 3 == 1}


def test_items_of_the_file_that_nobody_has_do_not_matter(films, select, interactions):
    items = sorted({item for _, item, _ in interactions})
    lines = [("unheard-of", "rock"), *((item, "rock" if n < 4 else "") for n, item in enumerate(items))]
    split = films(item_file(["item_id:token", "class:token"], lines))
    rows = select(split, forget_category="rock", forget_category_field="class")
    assert {str(item) for item in split.token("item", split.items[rows])} == set(items[:4])


def test_a_line_with_more_columns_than_the_header_does_not_shift_them(films, select, interactions):
    items = sorted({item for _, item, _ in interactions})
    split = films(
        item_file(["item_id:token", "class:token"], [(item, f"c{n % 3}", "c9") for n, item in enumerate(items)])
    )
    rows = select(split, forget_category="c2", forget_category_field="class")
    assert {str(item) for item in split.token("item", split.items[rows])} == set(items[2::3])


def test_reading_the_categories_loads_no_item_features(split, select):
    before = set(split.train.dataset.field2type)
    select(forget_category="c3", forget_category_field="class")
    data = split.train.dataset
    assert data.item_feat is None and set(data.field2type) == before and "class" not in before


def test_an_unknown_category_is_refused_with_the_nearest(refusal, films, interactions):
    message = refusal(forget_category="cc3", forget_category_field="class")
    assert "'cc3'" in message and "did you mean 'c3'?" in message
    items = sorted({item for _, item, _ in interactions})
    split = films(item_file(["item_id:token", "class:token_seq"], [(item, "Comedy Drama") for item in items]))
    assert "did you mean 'Comedy'?" in refusal(split, forget_category="Comdy", forget_category_field="class")
    assert "Comedy Drama" in refusal(split, forget_category="Comedy Drama", forget_category_field="class")


@pytest.mark.parametrize("field", [None, "clas", "item_id", 3])
def test_another_field_is_refused_and_the_fields_told(refusal, field):
    message = refusal(forget_category="c3", forget_category_field=field)
    assert "one of class" in message and repr(field) in message


def test_a_column_of_numbers_is_no_category(refusal, films, interactions):
    items = sorted({item for _, item, _ in interactions})
    split = films(item_file(["item_id:token", "price:float", "kind:token"], [(item, "1.5", "a") for item in items]))
    assert "one of kind (item); got 'price'" in refusal(split, forget_category="1.5", forget_category_field="price")


@pytest.mark.parametrize("text", ["", "item_id\tclass\n", "class:token\nc1\n", "item_id:token\tclass:token:x\n"])
def test_a_damaged_item_file_is_refused(refusal, films, text):
    assert refusal(films(text), forget_category="c1", forget_category_field="class")


def test_a_data_set_without_item_file_is_refused(refusal, films):
    split = films("")
    os.remove(Path(split.train.dataset.dataset_path) / "films.item")
    assert ".inter file of data set 'films'" in refusal(split, forget_category="c1", forget_category_field="class")


def test_a_category_of_users_selects_all_of_theirs(films, select, refusal, interactions):
    users, items = (sorted({line[n] for line in interactions}) for n in (0, 1))
    split = films(item_file(["item_id:token", "class:token"], [(item, "c1") for item in items]))
    lines = [(user, "land" if n % 4 else "sea", "c1") for n, user in enumerate(users)]
    file = Path(split.train.dataset.dataset_path) / "films.user"
    file.write_text(item_file(["user_id:token", "home:token", "class:token"], lines))
    rows = select(split, forget_category="sea", forget_category_field="home")
    assert list(rows) == [row for row, user in enumerate(split.token("user", split.users)) if user in users[::4]]
    assert len(select(split, forget_count=split.n_rows - 1)) == split.n_rows - 1
    assert "the files .item and .user" in refusal(split, forget_category="c1", forget_category_field="class")
    assert "home (user)" in refusal(split, forget_category="sea", forget_category_field="hame")
    assert "of the .user file; did you mean" in refusal(split, forget_category="seas", forget_category_field="home")


@pytest.fixture
def sourced(make_split, write_data, interactions, tmp_path):
    """Function (sources of some more lines) -> split of the tiny interactions, every third of them from the web."""

    def build(more=()):
        path = write_data(tmp_path, "films", interactions)
        file = tmp_path / "films" / "films.inter"
        lines = [line.split("\t") for line in file.read_text().splitlines()]
        told = [[*lines[0], "source:token"]]
        told += [[*line, "web" if n % 3 == 0 else "app"] for n, line in enumerate(lines[1:])]
        told += [[*told[at][:3], source] for at, source in more]
        file.write_text("\n".join("\t".join(line) for line in told) + "\n")
        return make_split(dataset="films", data_path=path), {tuple(line[:2]) for line in told if line[3] == "web"}

    return build


def test_a_category_of_interactions_is_a_source(sourced, select, refusal):
    split, web = sourced()
    rows = select(split, forget_category="web", forget_category_field="source")
    tokens = zip(split.token("user", split.users), split.token("item", split.items), strict=True)
    assert list(rows) == [row for row, pair in enumerate(tokens) if pair in web]
    assert "of the .inter file; did you mean 'web'?" in refusal(
        split, forget_category="wob", forget_category_field="source"
    )


def test_a_column_of_several_files_is_the_one_that_knows_the_category(sourced, select, refusal, interactions, tmp_path):
    """Not the first of them: a source of users of the same name would have all of theirs forgotten."""
    split, _ = sourced()
    asked = {"forget_category": "web", "forget_category_field": "source"}
    expected = select(split, **asked)
    users = sorted({line[0] for line in interactions})
    lines = [(user, "shop" if n % 2 else "app") for n, user in enumerate(users)]
    (tmp_path / "films" / "films.user").write_text(item_file(["user_id:token", "source:token"], lines))
    assert list(select(split, **asked)) == list(expected)
    assert "files .user and .inter" in refusal(split, **{**asked, "forget_category": "app"})
    message = refusal(split, **{**asked, "forget_category": "wob"})
    assert "of the .user file" in message and "of the .inter file; did you mean 'web'?" in message


@pytest.mark.parametrize(("first", "refused"), [(1, False), (2, True)])  # lines of the web, and of the app
def test_interactions_of_several_sources_are_refused(sourced, select, refusal, first, refused):
    split, _ = sourced([(line, "web") for line in range(first, 90, 3)])
    given = {"forget_category": "web", "forget_category_field": "source"}
    assert "cannot tell" in refusal(split, **given) if refused else len(select(split, **given))


def test_an_empty_list_of_categories_is_refused(refusal):
    assert "empty" in refusal(forget_category=[], forget_category_field="class")


# -- time


START = 881_250_949  # Unix seconds, where float32 is 64 seconds coarse: 1997-12-04 15:55:49 UTC


@pytest.fixture
def timed(make_split, write_data, tmp_path):
    """Function ([(user, item, time)], **keys) -> split of these interactions."""

    def build(rows, **keys):
        keys = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "dataset": "timed", **keys}
        return make_split(data_path=write_data(tmp_path, keys["dataset"], rows), **keys)

    return build


@pytest.fixture
def every_second(interactions):
    return [(user, item, START + n) for n, (user, item, _) in enumerate(interactions)]


@pytest.mark.parametrize("normalize_all", [False, True])
@pytest.mark.parametrize("load_col", [["user_id", "item_id", "timestamp"], ["user_id", "item_id"]])
def test_a_window_selects_to_the_second(timed, select, every_second, normalize_all, load_col):
    split = timed(every_second, normalize_all=normalize_all, load_col={"inter": load_col})
    low, high = START + 101, START + 203
    rows = select(split, forget_time=f"{low}..{high}")
    inside = {(user, item) for user, item, time in every_second if low <= time <= high}
    trained = set(pairs(split, np.arange(split.n_rows)))
    assert set(pairs(split, rows)) == inside & trained and len(rows) > 50


def test_an_open_end_is_the_end_of_time(timed, select, every_second):
    split = timed(every_second)
    before, after = select(split, forget_time=f"..{START + 99}"), select(split, forget_time=f"{START + 100}..")
    np.testing.assert_array_equal(np.sort(np.concatenate([before, after])), np.arange(split.n_rows))


@pytest.mark.parametrize(
    "window, low, high",
    [
        ("1997-12-04T16:00:00..1997-12-04 16:01", 251, 311),
        ("1997-12-04T16:00:00Z .. 1997-12-04T17:01:00+01:00", 251, 311),
        ("1997-12-04..1997-12-04", 0, 10**6),
    ],
)
def test_dates_are_utc_and_a_day_is_the_whole_day(timed, select, refusal, every_second, window, low, high):
    split = timed(
        every_second + [(user, f"later{n}", START + 90_000) for n, (user, _, _) in enumerate(every_second[::9])]
    )
    inside = {(user, item) for n, (user, item, _) in enumerate(every_second) if low <= n <= high}
    assert set(pairs(split, select(split, forget_time=window))) == inside & set(pairs(split, np.arange(split.n_rows)))


@pytest.mark.parametrize("normalize_all", [False, True])
def test_repeated_interactions_are_told_apart(timed, select, every_second, normalize_all):
    """Half of the interactions happen again a month later; a window over the first month leaves these."""
    month = 30 * 86_400
    rows = every_second + [(user, item, time + month) for user, item, time in every_second[::2]]
    split = timed(rows, normalize_all=normalize_all)
    time = split.train.dataset.inter_feat["timestamp"].numpy()[split.data_row]
    middle = 0.5 if normalize_all else START + month / 2
    np.testing.assert_array_equal(select(split, forget_time=f"..{START + 10_000}"), np.flatnonzero(time < middle))


def test_repeated_interactions_need_the_timestamp_loaded(timed, refusal, every_second):
    rows = every_second + [(user, item, time + 9_999) for user, item, time in every_second]
    split = timed(rows, load_col={"inter": ["user_id", "item_id"]})
    assert "train with timestamp in load_col" in refusal(split, forget_time=f"..{START + 5_000}")


@pytest.mark.parametrize(
    ("normalize_all", "model", "gap"),  # RecBole's times are 64 seconds coarse
    [(False, "BPR", 20), (False, "FPMC", 100), (True, "BPR", 100), (True, "FPMC", 20)],
)
def test_each_of_repeated_interactions_has_a_line_of_its_own(timed, select, every_second, normalize_all, model, gap):
    """Some happen twice within seconds; each window takes the rows of its lines, however near the others are."""
    begin = START - 100_000
    twice = [(user, item, begin + 2 * gap * n) for n, (user, item, _) in enumerate(every_second[::40])]
    twice += [(user, item, time + gap) for user, item, time in twice]
    rows = [each for n, each in enumerate(every_second) if n % 40] + twice
    keys = {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}}
    split = timed(rows, normalize_all=normalize_all, model=model, **keys)
    seen = np.zeros(split.n_rows, int)
    for user, item, time in twice:
        try:
            chosen = select(split, forget_time=f"{time}..{time + gap - 1}")
        except InputError as error:  # of what histories begin with
            assert "no training interaction" in str(error)
        else:
            assert pairs(split, chosen) == {(user, item): 1}
            seen[chosen] += 1
    assert 10 < seen.sum() == seen[select(split, forget_time=f"..{START - 1}")].sum() and seen.max() == 1


def test_repeated_interactions_that_were_shuffled_are_told_apart_or_refused(timed, select, refusal, every_second):
    """Of one rounded time, whether a line is of training or held out nobody knows then."""
    (user, item, _), rest = every_second[0], every_second[1:]
    near = START + 64_000 - START % 64
    rows = [*rest, *((user, item, near + n) for n in range(20))]
    keys = {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "mode": "full"}}
    split = timed(rows, **keys)
    trained = pairs(split, np.arange(split.n_rows))[user, item]
    assert 0 < trained < 20
    assert len(select(split, forget_time=f"{near}..{near + 19}")) == trained
    assert f"cannot tell {trained} repeated" in refusal(split, forget_time=f"{near}..{near + 4}")
    rows = [*rest, *((user, item, near + 640 * n) for n in range(20))]
    split = timed([(f"{user} again", item, time) for user, item, time in rows], dataset="apart", **keys)
    loaded = split.train.dataset.inter_feat["timestamp"].numpy()[split.data_row]
    chosen = select(split, forget_time=f"{near}..{near + 640 * 4}")
    np.testing.assert_array_equal(chosen, np.flatnonzero((loaded >= near) & (loaded <= near + 640 * 4)))


def test_a_window_without_interactions_is_refused_and_their_time_told(refusal, timed, every_second):
    message = refusal(timed(every_second), forget_time="2005-01-01..2006-01-01")
    assert str(START)[:6] in message and "seconds since 1970" in message


def test_a_data_set_without_timestamps_is_refused(refusal, make_split, write_data, interactions, tmp_path):
    path = Path(write_data(tmp_path, "timeless", interactions))
    file = path / "timeless" / "timeless.inter"
    file.write_text("\n".join("\t".join(line.split("\t")[:2]) for line in file.read_text().splitlines()) + "\n")
    split = make_split(dataset="timeless", data_path=str(path))
    message = refusal(split, forget_time="1990-01-01..2020-01-01")
    assert "timestamp" in message and "TIME_FIELD" in message


@pytest.mark.parametrize(
    "window",
    [
        "", "..", 5, "1998-01-01", "yesterday..today", "1998-13-01..", "1998-01-32..1998-02-01", "nan..5",
        "..inf", "1..2..3", "1998-01..1998-02", ["1..2"], True,
    ],
)  # fmt: skip
def test_a_window_that_cannot_be_read_is_refused(refusal, window):
    message = refusal(forget_time=window)
    assert "forget_time must be FROM..TO" in message and repr(window) in message


def test_a_window_that_ends_before_it_starts_is_refused(refusal):
    assert "ends before" in refusal(forget_time="1998-02-01..1998-01-01")


# -- as any request


@pytest.mark.parametrize(
    "keys",
    [
        {"forget_core_users": 3, "forget_edge_users": 3},
        {"forget_category": "c1", "forget_count": 3},
        {"forget_time": "1..2", "forget_spam": 5},
    ],
    ids=lambda keys: "+".join(keys),
)
def test_two_requests_at_once_are_refused_and_named(refusal, keys):
    message = refusal(**keys)
    for key in keys:
        assert key in message


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("forget_category: Comedy\nforget_category_field: class\n", "category", ("class", ["Comedy"])),
        ("forget_category: [Comedy, 1995]\nforget_category_field: class\n", "category", ("class", ["Comedy", "1995"])),
        ("forget_time: 881250949..881250950\n", "time", (881250949, 881250950)),
        ("forget_time: 1970-01-02..\n", "time", (86400, float("inf"))),
        ("forget_core_users: 7\n", "core_users", 7),
    ],
)
def test_a_request_may_come_from_a_file(tmp_path, text, kind, value):
    (tmp_path / "a.yaml").write_text(text)
    request = ForgetRequest.from_config(UnlearnConfig("BPR", "tiny", [str(tmp_path / "a.yaml")]))
    assert (request.kind, request.value) == (kind, value)


def test_the_choice_is_the_same_in_another_process(select, make_options, interactions):
    """Ties are drawn from the seed, not from the order of a set of strings."""
    program = (
        "import sys, json, torch; from recbole.utils import init_seed\n"
        "from recbole_unlearn.settings.config import UnlearnConfig; from recbole_unlearn.data.split import Split\n"
        "from recbole_unlearn.data.forget import ForgetRequest\n"
        "config = UnlearnConfig('BPR', 'tiny', config_dict=json.loads(sys.argv[1])); init_seed(2020, True)\n"
        "print('ROWS', *ForgetRequest.from_config(config).rows(Split(config)))"
    )
    keys = {"forget_rare_items": 9}
    environment = {**os.environ, "PYTHONPATH": str(Path(recbole_unlearn.__file__).resolve().parents[1])}
    command = [sys.executable, "-c", program, json.dumps(make_options(**keys))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = next(line for line in done.stdout.splitlines() if line.startswith("ROWS")).split()[1:]
    np.testing.assert_array_equal(np.array(rows, int), select(**keys))
