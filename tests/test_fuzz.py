"""Damage at random: whatever a file holds, it is refused in one line or gives the very same result; nothing is written.

A damaged file that is refused may leave nothing behind, and one that is not refused may change no weight.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_USER, inside
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_input import FORM, LOG, MODEL, VICTIM, scene, snapshot  # noqa: F401  (the fixture)

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.keys import KEYS as OWN
from recbole_unlearn.settings.recbole_keys import recbole_keys
from recbole_unlearn.storage import inter_file
from recbole_unlearn.storage import purging as purge
from recbole_unlearn.unlearner import InfluenceUnlearner

KEYS = {"data_path": "data", "show_progress": False, "state": "ERROR", "use_gpu": False}
QUICK = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
THOROUGH = settings(QUICK, max_examples=400, derandomize=False)


def forget():
    """The weights after a request, or None if something was refused, which must be in one line."""
    try:
        with InfluenceUnlearner.load(MODEL, None, KEYS) as session:
            return session.forget("count", 9).state_dict
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return None


@pytest.fixture(scope="module")
def place(scene, tmp_path_factory):  # noqa: F811
    """(a folder with a trained model, the weights that the request gives, content of each file)"""
    folder = tmp_path_factory.mktemp("fuzz") / "scene"
    shutil.copytree(scene, folder)
    with inside(folder):
        return folder, forget(), snapshot()


@st.composite
def damages(draw):
    """A function bytes -> other bytes: bits flipped, a part cut out, doubled, overwritten, or all cut off."""
    kind = draw(st.sampled_from(["flip", "cut off", "cut out", "double", "overwrite", "insert"]))
    at, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    other = draw(st.binary(min_size=1, max_size=20))

    def damage(content):
        start = int(at * len(content))
        end = min(start + length, len(content))
        before, part, after = content[:start], content[start:end], content[end:]
        return {
            "flip": before + bytes(byte ^ (1 << (length % 8)) for byte in part[:1]) + part[1:] + after,
            "cut off": before,
            "cut out": before + after,
            "double": before + part + part + after,
            "overwrite": before + other + content[start + len(other) :],
            "insert": before + other + part + after,
        }[kind]

    return damage


def check(place, file, damage):
    """Damage one file, ask, and put it back."""
    folder, expected, before = place
    with inside(folder):
        file.write_bytes(damage(before[file]))
        damaged = snapshot()
        result = forget()
        assert snapshot() == damaged
        file.write_bytes(before[file])
    if result is not None:
        assert all(torch.equal(result[name], expected[name]) for name in expected)


FILES = [
    MODEL,
    LOG / "metadata.json",
    *(LOG / f"{name}.npy" for name in ("users", "items", "epoch-00000", "epoch-00001", "weights-00000")),
    Path("data/tiny/tiny.inter"),
]


@QUICK
@given(file=st.sampled_from(FILES), damage=damages())
def test_a_damaged_file_is_refused_or_gives_the_same_weights(place, file, damage):
    check(place, file, damage)


@pytest.mark.slow
@THOROUGH
@given(file=st.sampled_from(FILES), damage=damages())
def test_any_damaged_file_is_refused_or_gives_the_same_weights(place, file, damage):
    check(place, file, damage)


# -- values in place of others

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, -(10**30), 0.5, -0.5, float("nan"), float("inf"), 1e308]),
    st.text(max_size=5),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-2, 2), max_size=2),
)


def places_in(value, path=()):
    """Every place in nested dicts and lists."""
    inside_it = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inside_it for found in places_in(each, (*path, key)))]


def put(whole, path, value):
    for key in path[:-1]:
        whole = whole[key]
    whole[path[-1]] = value


def check_value(place, data, file):
    """Put an odd value into metadata or checkpoint; refused, or it did not matter, or it is a valid setting."""
    folder, _, before = place
    with inside(folder):
        is_json = file.suffix == ".json"
        state = json.loads(before[file]) if is_json else torch.load(file, weights_only=True)
        path = data.draw(st.sampled_from([found for found in places_in(state) if found]), label="where")
        put(state, path, data.draw(ODD, label="what"))
        if is_json:
            file.write_text(json.dumps(state))
        else:
            torch.save(state, file)
        damaged = snapshot()
        result = forget()
        assert snapshot() == damaged
        file.write_bytes(before[file])
    if result is not None:
        assert all(torch.isfinite(value).all() for value in result.values())


@QUICK
@given(data=st.data(), file=st.sampled_from([MODEL, LOG / "metadata.json"]))
def test_an_odd_value_in_a_checkpoint_or_its_metadata_never_ends_in_another_error(place, data, file):
    check_value(place, data, file)


@pytest.mark.slow
@THOROUGH
@given(data=st.data(), file=st.sampled_from([MODEL, LOG / "metadata.json"]))
def test_no_odd_value_in_a_checkpoint_or_its_metadata_ends_in_another_error(place, data, file):
    check_value(place, data, file)


@settings(QUICK, max_examples=60)
@given(key=st.sampled_from(sorted(set(OWN) | recbole_keys())), value=ODD)
def test_a_key_with_an_odd_value_is_refused_or_taken(place, key, value):
    """Of a configuration: what only a whole run can refuse, such as tokens, is tested elsewhere."""
    with inside(place[0]):
        try:
            config = UnlearnConfig("BPR", "tiny", None, KEYS | {key: value})
        except InputError as error:
            assert str(error) and "\n" not in str(error)
            return
        assert key in config


# -- text files

REQUESTS = f"user,item,time\nu17,,5\nu20,i3,6\n{SECRET_USER},,7\n,i12,8\n".encode()
PAIRS = b"u17\ti3\nu20\ti12\n"
YAML = (
    b"epochs: 3\nforget_users: [u17, 'u20']\ntrain_neg_sample_args: {distribution: uniform, sample_num: 1}\nseed: 5\n"
)


@pytest.fixture(scope="module")
def opened(split):
    return split


@settings(QUICK, max_examples=150)
@given(kind=st.sampled_from(["requests", "file"]), damage=damages())
def test_a_damaged_file_of_requests_is_refused_or_names_rows(opened, kind, damage):
    Path("request").write_bytes(damage(REQUESTS if kind == "requests" else PAIRS))
    before = snapshot()
    try:
        rows = ForgetRequest.of(kind, "request", opened.config).rows(opened)
        assert len(rows) and rows.dtype == np.int64 and 0 <= rows.min() and rows.max() < opened.n_rows
    except InputError as error:
        assert str(error) and "\n" not in str(error)
    assert snapshot() == before


@settings(QUICK, max_examples=60)
@given(damage=damages())
def test_a_damaged_configuration_file_is_refused_or_taken(place, damage):
    with inside(place[0]):
        Path("a.yaml").write_bytes(damage(YAML))
        try:
            UnlearnConfig("BPR", "tiny", ["a.yaml"], KEYS)
        except InputError as error:
            assert str(error) and "\n" not in str(error)
        os.remove("a.yaml")


@settings(QUICK, max_examples=150)
@given(damage=damages())
def test_a_damaged_purge_journal_is_refused_or_does_what_it_says(tmp_path, damage):
    """It may lose what it would do, but do nothing else."""
    folder = tmp_path / "purged"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / VICTIM.parent).mkdir(parents=True)
    with inside(folder):
        lines = ["user_id:token\titem_id:token", "a\tb", "c\td", "e\tf"]
        VICTIM.write_text("\n".join(lines) + "\n")
        journal = {
            "inter": str(VICTIM.absolute()),
            "format": FORM,
            "pairs": [["a", "b"]],
            "seal": inter_file.seal(VICTIM),
        }
        Path(".model.pth.purge").write_bytes(damage(json.dumps(journal).encode()))
        MODEL.write_bytes(b"weights")
        before = snapshot()
        try:
            assert purge.recover(MODEL)
        except InputError as error:
            assert str(error) and "\n" not in str(error)
            assert snapshot() == before
            return
        assert set(snapshot()) == {VICTIM.parent, VICTIM}
        left = VICTIM.read_text().splitlines()
        assert left[0] == lines[0] and set(left) <= set(lines)
