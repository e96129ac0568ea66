"""A token is text: whatever it looks like, whichever way it comes, the user of that name is forgotten, nobody else."""

import json

import numpy as np
import pytest
import yaml
from conftest import inside, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recbole.utils import init_seed

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.data.tokens import FromNumber, read_tokens, split_list
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig

LIKE_NUMBERS = [
    "12_34",
    "1234",
    "1.10",
    "1.1",
    "0123",
    "123",
    "83",
    "1e5",
    "100000.0",
    "0x10",
    "16",
    "1:30",
    "90",
    "-7",
]
LIKE_WORDS = [
    "true",
    "yes",
    "~",
    "None",
    "2020-01-01",
    "[x]",
    "x",
    "a b",
    "a",
    " a",
    "a,b",
    "b",
    "o'hara",
    "#1",
    "a: b",
    "*",
    "é",
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory, write_data):
    """A split of users with odd names."""
    rng = np.random.default_rng(3)
    users = LIKE_NUMBERS + LIKE_WORDS
    rows = [(user, f"i{item}", 0) for user in users for item in rng.choice(30, 12, replace=False)]
    folder = tmp_path_factory.mktemp("odd")
    with inside(folder):
        config = UnlearnConfig("BPR", "odd", None, options(write_data(folder, "odd", rows)))
        init_seed(config["seed"], config["reproducibility"])
        return Split(config)


@pytest.fixture
def names(odd):
    """Those of them that RecBole reads as names: of None it makes a hole."""
    return set(odd.token("user", np.unique(odd.users)).tolist())


def forgotten(odd, config):
    rows = ForgetRequest.from_config(config).rows(odd)
    return set(odd.token("user", odd.users[rows]).tolist()), rows


def by_command_line(token, folder):
    return None, {"forget_users": repr([token])}


def by_python(token, folder):
    return None, {"forget_users": [token]}


def by_yaml_list(token, folder):
    (folder / "r.yaml").write_text(f"forget_users: {json.dumps([token], ensure_ascii=False)}\n")
    return [str(folder / "r.yaml")], {}


def by_plain_yaml(token, folder):
    """Unquoted where YAML lets it stand so: numbers, dates and switches among them."""
    text = f"forget_users:\n- {token}\n"
    try:
        plain = yaml.compose(text).value[0][1].value[0]
        stands = isinstance(plain, yaml.ScalarNode) and plain.value == token and not plain.tag.endswith(":null")
    except (yaml.YAMLError, IndexError):
        stands = False
    (folder / "r.yaml").write_text(text if stands else f"forget_users:\n- {json.dumps(token)}\n")
    return [str(folder / "r.yaml")], {}


WAYS = [by_command_line, by_python, by_yaml_list, by_plain_yaml]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_user_of_any_name_is_forgotten_and_nobody_else(odd, names, tmp_path, way):
    for token in names:
        files, keys = way(token, tmp_path)
        users, rows = forgotten(odd, UnlearnConfig("BPR", "odd", files, options("x", **keys)))
        assert users == {token}
        assert len(rows) == np.sum(odd.users == odd.users[rows[0]])


@pytest.mark.parametrize("token", ["12_34", "1234", "1.10", "1.1", "0123", "123", "1e5", "0x10", "16", "1:30", "true"])
def test_a_bare_token_on_the_command_line_is_as_typed(odd, token):
    users, _ = forgotten(odd, UnlearnConfig("BPR", "odd", None, options("x", forget_users=token)))
    assert users == {token}
    users, _ = forgotten(odd, UnlearnConfig("BPR", "odd", None, options("x", forget_users=f"{token},90")))
    assert users == {token, "90"}
    if token != "true":
        users, _ = forgotten(odd, UnlearnConfig("BPR", "odd", None, options("x", forget_users=f"[{token}, 90]")))
        assert users == {token, "90"}


@pytest.mark.parametrize("kind", ["forget_file", "forget_requests"])
def test_a_user_of_any_name_is_forgotten_by_a_file(odd, names, tmp_path, kind):
    for token in names:
        item = str(odd.token("item", odd.items[odd.users == odd.train.dataset.token2id("user_id", token)][:1])[0])
        if kind == "forget_file":
            text = f"{token}\t{item}\n"
        else:
            text = f'user,item\n"{token}",{item}\n'
        (tmp_path / "file").write_text(text, "utf-8")
        users, rows = forgotten(odd, UnlearnConfig("BPR", "odd", None, options("x", **{kind: str(tmp_path / "file")})))
        assert users == {token} and len(rows) == 1


@pytest.mark.parametrize("value", [1.1, [1.1], True, [True], b"a", {"a": 1}, ["a", None], [["a"]], float("nan")])
def test_what_is_no_text_any_more_is_refused_with_what_to_do(odd, value):
    with pytest.raises(InputError) as refused:
        forgotten(odd, UnlearnConfig("BPR", "odd", None, options("x", forget_users=value)))
    assert "quotes" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("number, other", [(1234, "12_34"), (83, "0123"), (16, "0x10"), (90, "1:30")])
def test_a_number_that_may_have_been_another_users_name_is_refused(odd, number, other):
    """YAML reads both names as this number: whose parser did cannot be told."""
    with pytest.raises(InputError, match="quotes") as refused:
        forgotten(odd, UnlearnConfig("BPR", "odd", None, options("x", forget_users=[number])))
    assert repr(other) in str(refused.value)
    with pytest.raises(InputError, match="unknown user token '100000'"):  # 1e5 and 100000.0 are users
        forgotten(odd, UnlearnConfig("BPR", "odd", None, options("x", forget_users=[100000])))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_a_list_of_texts_is_read_back_from_how_python_writes_it(texts):
    assert split_list(repr(texts)) == texts


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1).filter(lambda text: text.strip() and "," not in text and split_list(text) is None))
def test_any_other_text_without_commas_is_one_token(text):
    assert read_tokens("forget_users", text) == [text]
    assert not isinstance(read_tokens("forget_users", text)[0], FromNumber)


@pytest.mark.parametrize("text, apart", [("a,b", ["a", "b"]), ("(12)", ["12"]), ("['12']", ["12"])])
def test_a_text_that_is_a_token_itself_is_not_taken_apart(tmp_path_factory, write_data, text, apart):
    folder = tmp_path_factory.mktemp("apart")
    rows = [(user, f"i{(9 * k + n) % 40}", n) for k, user in enumerate((text, *apart, "y", "z")) for n in range(15)]
    with inside(folder):
        config = UnlearnConfig("BPR", "apart", None, options(write_data(folder, "apart", rows), forget_users=text))
        init_seed(config["seed"], config["reproducibility"])
        split = Split(config)
    with pytest.raises(InputError, match="give a list"):
        ForgetRequest.from_config(config).rows(split)
    for token in (text, *apart):
        given = UnlearnConfig("BPR", "apart", None, options("x", forget_users=[token]))
        found = ForgetRequest.from_config(given).rows(split)
        assert set(split.token("user", split.users[found]).tolist()) == {token}


# -- nobody

NOBODY = [None, "", "None", "none", "null", "NULL", "~", " ", [], (), set(), "[]", "()", [None], np.array([]), " None "]


@pytest.mark.parametrize("value", NOBODY, ids=repr)
@pytest.mark.parametrize("key", ["forget_users", "forget_items", "forget_category", "forget_count"])
@pytest.mark.parametrize("checkpoint", [None, "model.pth"])
def test_a_request_that_names_nobody_is_refused(key, value, checkpoint):
    config = UnlearnConfig("BPR", "odd", None, options("x", **{key: value, "checkpoint": checkpoint}))
    with pytest.raises(InputError) as refused:
        ForgetRequest.from_config(config)
    assert key in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("value", ["", "None", "~", None])
@pytest.mark.parametrize("key", ["forget_file", "forget_requests", "forget_time"])
def test_a_request_by_no_file_and_of_no_time_is_refused(key, value):
    with pytest.raises(InputError, match=key):
        ForgetRequest.from_config(UnlearnConfig("BPR", "odd", None, options("x", **{key: value})))


@pytest.mark.parametrize("text", ["", "~", "null", "[]", "''", '""', "[~]", "None"])
def test_a_yaml_file_that_names_nobody_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(f"forget_users: {text}\n")
    with pytest.raises(InputError, match="forget_users"):
        ForgetRequest.from_config(UnlearnConfig("BPR", "odd", [str(tmp_path / "r.yaml")], options("x")))


def test_a_checkpoint_forgets_nothing_by_itself():
    with pytest.raises(InputError, match="a checkpoint forgets nothing by itself"):
        ForgetRequest.from_config(UnlearnConfig("BPR", "odd", None, options("x", checkpoint="model.pth")))
    assert ForgetRequest.from_config(UnlearnConfig("BPR", "odd", None, options("x"))).kind == "ratio"


def test_a_key_that_is_given_twice_in_a_file_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("forget_users: [a]\nforget_users: [b]\n")
    with pytest.raises(InputError, match="forget_users is given twice"):
        UnlearnConfig("BPR", "odd", [str(tmp_path / "r.yaml")])


def test_a_path_that_looks_like_a_number_is_a_path():
    config = UnlearnConfig("BPR", "odd", None, options("x", output_dir="1e5", checkpoint="2020", forget_file="0123"))
    assert (config["output_dir"], config["checkpoint"], config["forget_file"]) == ("1e5", "2020", "0123")
