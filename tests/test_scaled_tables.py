"""Numbers of users and items that RecBole scales, or fills in, by all lines of their file, when some lines go."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_USER, inside, tiny_interactions
from test_everywhere import train_live

from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.runs.erasure import Erasure
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.unlearner import load

SCALED = [
    {},
    {"normalize_all": True},
    {"normalize_field": ["price"]},
    {"normalize_all": True, "numerical_features": ["price", "age"]},
]
COLUMNS = {
    "inter": ["user_id", "item_id", "timestamp"],
    "user": ["user_id", "age"],
    "item": ["item_id", "price", "class"],
}
FIRSTS = {user: item for user, item, _ in reversed(tiny_interactions())}
DEAR = max({item for _, item, _ in tiny_interactions()} - {*FIRSTS.values()})  # no history begins with it
GRU4RECF = {
    "loss_type": "BPR",
    "MAX_ITEM_LIST_LENGTH": 5,
    "selected_features": ["price"],
    "numerical_features": ["price"],
    "normalize_all": True,
    "hidden_size": 8,
    "embedding_size": 8,
}


def write_all(folder, without=()):
    """A data set of which one user and one item have the extreme numbers, and others none; without lines of some."""
    rows = tiny_interactions()
    users, items = (sorted({row[n] for row in rows}) for n in (0, 1))
    ages = {user: "" if n % 5 == 0 else 20 + n for n, user in enumerate(users)} | {SECRET_USER: 97}
    prices = {item: "" if n % 7 == 0 else 3 * n for n, item in enumerate(items)} | {DEAR: 1000}
    kinds = {item: "a b" if n % 2 else "b" for n, item in enumerate(items)} | {DEAR: "a b c d"}
    tables = {
        "inter": ["user_id:token\titem_id:token\ttimestamp:float", *(f"{u}\t{i}\t{t}" for u, i, t in rows)],
        "user": ["user_id:token\tage:float", *(f"{user}\t{ages[user]}" for user in users[:-1])],
        "item": ["item_id:token\tprice:float\tclass:token_seq", *(f"{i}\t{prices[i]}\t{kinds[i]}" for i in items)],
    }
    Path(folder).mkdir(parents=True)
    for ending, lines in tables.items():
        left = [line for line in lines if not {*line.split("\t")} & {*without}]
        (Path(folder) / f"tiny.{ending}").write_text("\n".join(left) + "\n")


def numbers(data, name, owner):
    """A column of a table by the owner's token, padding's too; no tokens that are gone."""
    table, tokens = getattr(data, f"{owner}_feat"), data.field2id_token[f"{owner}_id"]
    return {str(token): value.numpy() for token, value in zip(tokens, table[name], strict=True)}


def made(folder, make_options, model="BPR", **keys):
    given = make_options(data_path=str(folder), load_col=COLUMNS, **keys)
    return Split.seeded(UnlearnConfig(model, "tiny", config_dict=given))


@pytest.mark.parametrize("scaled", SCALED, ids=["missing", "all", "one", "numerical"])
def test_tables_are_those_that_recbole_makes_of_what_remains(tmp_path, make_options, scaled):
    gone = {"user": SECRET_USER, "item": DEAR}
    write_all(tmp_path / "all/tiny")
    write_all(tmp_path / "rest/tiny", gone.values())
    split, rest = (made(tmp_path / name, make_options, **scaled) for name in ("all", "rest"))
    before = split.train.dataset
    ids = {of: np.array([before.field2token_id[f"{of}_id"][token]]) for of, token in gone.items()}
    Erasure(split.config, split, None, whole=ids).rest_of(split)
    after = split.remaining_dataset(
        np.flatnonzero(np.isin(split.users, ids["user"]) | np.isin(split.items, ids["item"]))
    )
    for owner, name in (("user", "age"), ("item", "price")):
        want, got, old = (numbers(data, name, owner) for data in (rest.train.dataset, after, before))
        assert want.keys() == got.keys() - {gone[owner]} and len(want) > 30
        for token, value in want.items():
            np.testing.assert_allclose(got[token].ravel()[0], value.ravel()[0], rtol=1e-5, atol=1e-7)
        assert any(abs(old[token].ravel()[0] - want[token].ravel()[0]) > 0.01 for token in want)
    assert made(tmp_path / "all", make_options, **scaled).remaining_dataset(np.arange(3)).item_feat is not None


@pytest.fixture(scope="module")
def trained(make_options, tmp_path_factory):
    """A model that reads the prices, and its data. No test may change them."""
    with inside(tmp_path_factory.mktemp("scaled")) as start:
        write_all("data/tiny")
        train_live(make_options, "GRU4RecF", load_col=COLUMNS, evaluate="none", epochs=2, **GRU4RECF)
    return start


@pytest.fixture
def scene(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "scene")
    monkeypatch.chdir(tmp_path / "scene")


def forget(**keys):
    silent = {"compare": "none", "evaluate": "none", "audit": None, "state": "ERROR", "show_progress": False}
    given = {"checkpoint": "live/model.pth", "output_dir": "out", **silent, "forget_items": [DEAR]}
    return run_unlearn(config_dict=given | {"purge": True, "purge_dataset": True, "everywhere": True, **keys})


def test_what_is_kept_does_not_tell_the_numbers_of_an_item_that_went(scene, make_options):
    assert forget()["unlearning"]["exact"]
    with load("out/unlearned.pth") as opened:
        kept, model = opened.split.train.dataset, opened.model
        write_all("thin/tiny", [DEAR])
        want = numbers(made("thin", make_options, **GRU4RECF).train.dataset, "price", "item")
        got = numbers(kept, "price", "item")
        assert want.keys() == {token for token in got if not token.startswith("[forgotten")}
        for token, value in want.items():
            np.testing.assert_allclose(got[token][0], value[0], rtol=1e-5, atol=1e-7)
        assert kept.item_feat["class"].shape[1] == 2  # the longest list that is left
        read = model.feature_embed_layer.item_feat["price"]
        assert torch.equal(read, kept.item_feat["price"])
        assert opened.check().distance == 0
        again = str(opened.split.token("user", opened.split.users[:1])[0])
    keys = {"checkpoint": "out/unlearned.pth", "output_dir": "next", "forget_items": None}
    assert forget(**keys, forget_users=[again])["unlearning"]["exact"]


def test_a_step_that_would_keep_them_is_refused_before_anything_changes(scene):
    with pytest.raises(InputError, match="GRU4RecF would stay trained on features scaled by those of these") as refused:
        forget(method="influence")
    assert "\n" not in str(refused.value) and Path("live/model.pth").exists() and not Path("out").exists()
