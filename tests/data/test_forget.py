"""Forget requests select the rows that they name, and refuse what cannot be forgotten."""

import numpy as np
import pytest

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.errors import InputError


@pytest.fixture
def select(split, make_config):
    """Function (**forget keys) -> rows of the tiny split."""
    return lambda **keys: ForgetRequest.from_config(make_config(**keys)).rows(split)


@pytest.fixture
def refusal(select):
    """Function (**forget keys) -> the one-line message of the refusal."""

    def refused(**keys):
        with pytest.raises(InputError) as error:
            select(**keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


@pytest.fixture
def pairs(split):
    """(user token, item token) of every training interaction, in row order."""
    return list(zip(split.token("user", split.users), split.token("item", split.items), strict=True))


def held_out_pair(split):
    data = split.test.dataset
    features = data.inter_feat
    user, item = int(features[data.uid_field][0]), int(features[data.iid_field][0])
    return str(split.token("user", user)), str(split.token("item", item))


def absent_pair(interactions):
    """A user and an item of the data set that never met."""
    pairs = {(user, item) for user, item, _ in interactions}
    users, items = sorted({user for user, _ in pairs}), sorted({item for _, item in pairs})
    return next((user, item) for user in users for item in items if (user, item) not in pairs)


# -- selection


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, "0.1"])
def test_a_ratio_selects_that_share_of_the_training_rows(select, split, ratio):
    rows = select(forget_ratio=ratio)
    assert len(rows) == len(set(rows)) == round(float(ratio) * split.n_rows)
    assert rows.min() >= 0 and rows.max() < split.n_rows
    np.testing.assert_array_equal(rows, np.sort(rows))


@pytest.mark.parametrize("count", [1, 17, "17"])
def test_a_count_selects_that_many_distinct_rows(select, split, count):
    rows = select(forget_count=count)
    assert len(rows) == len(set(rows)) == int(count)
    assert rows.min() >= 0 and rows.max() < split.n_rows


def test_all_but_one_row_can_be_forgotten(select, split):
    assert len(select(forget_count=split.n_rows - 1)) == split.n_rows - 1


@pytest.mark.parametrize("keys", [{"forget_ratio": 0.05}, {"forget_count": 20}], ids=["ratio", "count"])
def test_the_same_seed_draws_the_same_rows_and_another_seed_others(select, keys):
    first = select(**keys, forget_seed=3)
    np.testing.assert_array_equal(first, select(**keys, forget_seed=3))
    assert set(first) != set(select(**keys, forget_seed=4))


def test_the_draw_does_not_depend_on_nor_change_numpys_stream(select):
    np.random.seed(1)
    first = select(forget_count=20)
    after = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    np.testing.assert_array_equal(first, select(forget_count=20))


def test_without_a_request_the_default_ratio_applies(select, split):
    assert len(select()) == round(0.0025 * split.n_rows)


def test_users_select_all_their_training_rows_and_no_others(select, pairs):
    chosen = [pairs[0][0], pairs[-1][0]]
    rows = select(forget_users=chosen)
    assert len(rows) > 20
    assert list(rows) == [row for row, (user, _) in enumerate(pairs) if user in chosen]


def test_items_select_all_their_training_rows_and_no_others(select, pairs):
    chosen = [pairs[0][1], pairs[1][1]]
    rows = select(forget_items=chosen)
    assert list(rows) == [row for row, (_, item) in enumerate(pairs) if item in chosen]
    assert {pairs[row][1] for row in rows} == set(chosen)


def test_users_can_be_given_as_one_comma_separated_string(select, pairs):
    users = [pairs[0][0], pairs[-1][0]]
    np.testing.assert_array_equal(select(forget_users=",".join(users)), select(forget_users=users))


def test_a_single_token_needs_no_list(select, pairs):
    np.testing.assert_array_equal(select(forget_items=pairs[3][1]), select(forget_items=[pairs[3][1]]))


@pytest.mark.parametrize("given", [17, "17", [17], "17,17"])
def test_numeric_tokens_select_whether_given_as_numbers_or_text(make_split, make_config, write_data, tmp_path, given):
    rows = [(str(user), str(item), user * item) for user in range(10, 30) for item in range(10, 30) if user % item]
    numeric = make_split(dataset="numeric", data_path=write_data(tmp_path, "numeric", rows))
    request = ForgetRequest.from_config(make_config(forget_users=given))
    rows = request.rows(numeric)
    assert len(rows) > 5
    assert set(numeric.token("user", numeric.users[rows])) == {"17"}


@pytest.mark.parametrize("separator", ["\t", ",", ", "])
@pytest.mark.parametrize("header", ["", "user_id:token{}item_id:token\n"], ids=["no header", "header"])
def test_a_file_selects_its_pairs(select, pairs, tmp_path, separator, header):
    wanted = [40, 3, 77]
    file = tmp_path / "forget.txt"
    lines = "".join(f"{pairs[row][0]}{separator}{pairs[row][1]}\n" for row in wanted)
    file.write_text(header.format(separator) + lines)
    np.testing.assert_array_equal(select(forget_file=str(file)), sorted(wanted))


@pytest.mark.parametrize(
    "text",
    [
        "{u}\t{i}\n\n   \n",
        "{u}\t{i}",
        "\ufeff{u}\t{i}\n",
        "{u}\t{i}\r\n",
        "{u}\t{i}\t1000\tmore\n",
        "{u}\t{i}\n" * 3,
    ],
    ids=[
        "blank lines",
        "no final newline",
        "byte order mark",
        "Windows line ends",
        "more columns",
        "repeated",
    ],
)
def test_a_file_may_come_from_any_editor(select, pairs, tmp_path, text):
    file = tmp_path / "forget.csv"
    file.write_bytes(text.format(u=pairs[7][0], i=pairs[7][1]).encode())
    np.testing.assert_array_equal(select(forget_file=str(file)), [7])


def test_a_pair_that_occurs_twice_in_the_data_is_forgotten_twice(
    make_split, make_config, write_data, interactions, tmp_path
):
    doubled = interactions + [(user, item, time + 1) for user, item, time in interactions]
    split = make_split(dataset="doubled", data_path=write_data(tmp_path, "doubled", doubled))
    tokens = list(zip(split.token("user", split.users), split.token("item", split.items), strict=True))
    pair = next(pair for pair in tokens if tokens.count(pair) == 2)
    (tmp_path / "forget.tsv").write_text("\t".join(pair))
    rows = ForgetRequest.from_config(make_config(forget_file=str(tmp_path / "forget.tsv"))).rows(split)
    assert [tokens[row] for row in rows] == [pair, pair]


def test_no_request_ever_selects_a_held_out_interaction(select, split, pairs):
    """Held-out interactions are no rows of the split at all, and no selected pair is one of them."""
    held_out = set()
    for loader in (split.valid, split.test):
        data = loader.dataset
        features = data.inter_feat
        held_out |= set(zip(features[data.uid_field].tolist(), features[data.iid_field].tolist(), strict=True))
    user = pairs[0][0]
    item = str(split.token("item", next(iter(held_out))[1]))
    for keys in ({"forget_ratio": 0.9}, {"forget_users": [user]}, {"forget_items": [item]}):
        rows = select(**keys)
        chosen = set(zip(split.users[rows].tolist(), split.items[rows].tolist(), strict=True))
        assert chosen and not chosen & held_out


# -- refusals


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0, 1.5, -0.1, float("nan"), "abc", "1e", True, [0.1], {"a": 1}])
def test_a_ratio_outside_0_to_1_is_refused(refusal, ratio):
    assert "forget_ratio" in refusal(forget_ratio=ratio)


def test_a_ratio_below_one_interaction_is_refused_and_the_least_ratio_told(refusal, select, split):
    message = refusal(forget_ratio=1e-9)
    least = float(message.split()[-1])
    assert len(select(forget_ratio=least)) >= 1


@pytest.mark.parametrize("count", [0, -3, 2.5, 2.0, True, "many", [3]])
def test_a_count_that_is_no_positive_whole_number_is_refused(refusal, count):
    assert "forget_count" in refusal(forget_count=count)


def test_a_count_above_the_training_rows_is_refused_and_their_number_told(refusal, split):
    assert str(split.n_rows) in refusal(forget_count=split.n_rows + 1)


def test_forgetting_everything_is_refused(refusal, split, pairs):
    assert str(split.n_rows) in refusal(forget_count=split.n_rows)
    assert str(split.n_rows) in refusal(forget_users=sorted({user for user, _ in pairs}))


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True, None])
def test_a_seed_that_is_no_whole_number_is_refused(refusal, seed):
    assert "forget_seed" in refusal(forget_count=3, forget_seed=seed)


@pytest.mark.parametrize("kind", ["users", "items"])
def test_an_unknown_token_is_refused_with_the_nearest_known_one(refusal, pairs, kind):
    known = str(pairs[0][kind == "items"])
    message = refusal(**{f"forget_{kind}": [known + "x"]})
    assert repr(known + "x") in message and f"did you mean {known!r}?" in message


@pytest.mark.parametrize("token", ["", "[PAD]", "u1\nu2", "nobody at all"])
def test_a_token_of_nobody_is_refused(refusal, token):
    assert "unknown user" in refusal(forget_users=[token])


def test_an_unknown_token_in_a_file_is_refused(refusal, pairs, tmp_path):
    (tmp_path / "f.tsv").write_text(f"{pairs[0][0]}\t{pairs[0][1]}\n{pairs[1][0]}x\t{pairs[1][1]}\n")
    assert repr(pairs[1][0] + "x") in refusal(forget_file=str(tmp_path / "f.tsv"))


def test_a_held_out_pair_in_a_file_is_refused(refusal, split, pairs, tmp_path):
    user, item = held_out_pair(split)
    (tmp_path / "f.tsv").write_text(f"{pairs[0][0]}\t{pairs[0][1]}\n{user}\t{item}\n")
    message = refusal(forget_file=str(tmp_path / "f.tsv"))
    assert repr(user) in message and repr(item) in message and "held-out" in message


def test_a_pair_that_is_not_in_the_data_is_refused(refusal, interactions, tmp_path):
    user, item = absent_pair(interactions)
    (tmp_path / "f.tsv").write_text(f"{user}\t{item}\n")
    message = refusal(forget_file=str(tmp_path / "f.tsv"))
    assert repr(user) in message and repr(item) in message


@pytest.mark.parametrize("content", ["", "\n\n", "user_id:token\titem_id:token\n"])
def test_a_file_without_pairs_is_refused(refusal, tmp_path, content):
    (tmp_path / "f.tsv").write_text(content)
    assert "empty" in refusal(forget_file=str(tmp_path / "f.tsv"))


@pytest.mark.parametrize("line", ["u17", "u17\t", "\ti3", "u17;i3", "u17 i3", ",", ",i3"])
def test_a_bad_line_in_a_file_is_refused_with_its_number(refusal, pairs, tmp_path, line):
    (tmp_path / "f.tsv").write_text(f"{pairs[0][0]}\t{pairs[0][1]}\n\n{line}\n")
    message = refusal(forget_file=str(tmp_path / "f.tsv"))
    assert "line 3" in message and "f.tsv" in message


@pytest.mark.parametrize("name", ["nothing.tsv", ".", "image.png"])
def test_a_file_that_cannot_be_read_is_refused(refusal, tmp_path, name):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    assert str(tmp_path / name) in refusal(forget_file=str(tmp_path / name))


def test_a_number_in_place_of_a_file_is_refused(refusal):
    assert "forget_file" in refusal(forget_file=5)


def test_an_empty_list_of_users_is_refused(refusal):
    assert "empty" in refusal(forget_users=[])


@pytest.mark.parametrize(
    "keys",
    [
        {"forget_count": 3, "forget_users": ["u17"]},
        {"forget_ratio": 0.1, "forget_count": 3},
        {"forget_items": ["i3"], "forget_users": ["u17"]},
    ],
    ids=lambda keys: "+".join(keys),
)
def test_two_requests_at_once_are_refused_and_named(refusal, keys):
    message = refusal(**keys)
    for key in keys:
        assert key in message


def test_no_request_at_all_is_refused(refusal):
    assert "exactly one" in refusal(forget_ratio=None)


def test_a_file_is_read_once(split, tmp_path):
    """It may be gone, or another, by the time that the model has forgotten."""
    pairs, path = split.pairs(np.array([3, 40, 77])), tmp_path / "f.tsv"
    path.write_text("".join(f"{user}\t{item}\n" for user, item in pairs))
    request = ForgetRequest.of("file", path, split.config)
    path.unlink()
    rows = request.rows(split)
    assert sorted(split.pairs(rows)) == sorted(pairs)
    numbers = split.pair_numbers(split.users[rows], split.items[rows])
    np.testing.assert_array_equal(request.named(split)["pair"], np.sort(numbers))
