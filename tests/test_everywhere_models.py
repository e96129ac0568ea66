"""Gone everywhere, of models with features, knowledge graphs and histories too, and what is left goes on."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_ITEM, SECRET_USER, inside, tiny_interactions
from test_attacks import left_behind, same_numbers
from test_everywhere import contents, forget, holders

from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import pairwise_loader
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.testing import write_dataset
from recbole_unlearn.unlearner import load

FEATURE = "SECRETTOWN"
PAIRS = ["user_id", "item_id"]
FACTS = ["head_id", "relation_id", "tail_id"]
SEQUENTIAL = {"MAX_ITEM_LIST_LENGTH": 7, "loss_type": "BPR", "load_col": {"inter": [*PAIRS, "timestamp"]}}
GRAPH = {"inter": PAIRS, "kg": FACTS, "link": ["item_id", "entity_id"]}
MODELS = {
    "NGCF": {"load_col": {"inter": PAIRS, "user": ["user_id", "age", "town"], "item": ["item_id", "class"]}},
    "CKE": {"kg_embedding_size": 8, "load_col": GRAPH},
    "GRU4Rec": {**SEQUENTIAL, "hidden_size": 8},
    "FPMC": SEQUENTIAL,
    "SASRec": {
        **SEQUENTIAL, "loss_type": "CE", "train_neg_sample_args": None, "hidden_size": 8, "inner_size": 8, "n_heads": 1,
    },
}  # fmt: skip
GRAPHS = {
    "CKE": MODELS["CKE"],
    "KTUP": {"train_rec_step": 1, "train_kg_step": 1, "load_col": GRAPH},
    "KGCN": {"neighbor_sample_size": 2, "load_col": GRAPH},
}
ONCE = "SECRETONCE"  # a user of one interaction
LINKED, PART, KIND = "i1939", "SECRETPART", "SECRETKIND"  # an item, and what its facts alone name


def write_all(folder, *facts):
    """A data set with every kind of file; all items but the secret one have an entity; more ``facts``, if any."""
    rows = tiny_interactions()
    users, items = (sorted({row[n] for row in rows}) for n in (0, 1))
    linked = [item for item in items if item != SECRET_ITEM]
    towns = [FEATURE if user == SECRET_USER else f"town{n % 4}" for n, user in enumerate(users)]
    tables = {
        "inter": ["user_id:token\titem_id:token\ttimestamp:float", *(f"{u}\t{i}\t{t}" for u, i, t in rows)],
        "user": ["user_id:token\tage:float\ttown:token", *(f"{u}\t{n + 1}\t{towns[n]}" for n, u in enumerate(users))],
        "item": ["item_id:token\tclass:token", *(f"{item}\tc{n % 5}" for n, item in enumerate(items))],
        "link": ["item_id:token\tentity_id:token", *(f"{item}\tm.{item}" for item in linked)],
        "kg": ["\t".join(f"{field}:token" for field in FACTS)]
        + [f"m.{item}\tr{n % 3}\tt{n % 7}" for n, item in enumerate(linked)]
        + [f"m.{LINKED}\t{KIND}\tt1", f"{PART}\tr1\tm.{LINKED}", f"m.{LINKED}\tr1\tm.i3", *facts],
    }
    Path(folder).mkdir(parents=True)
    for ending, lines in tables.items():
        (Path(folder) / f"tiny.{ending}").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(make_options, tmp_path_factory):
    """Function (model) -> folder with data and a trained model, made once; no test may change it."""
    made = {}

    def train(model):
        if model not in made:
            with inside(tmp_path_factory.mktemp("trained")) as folder:
                write_all("data/tiny")
                keys = make_options(data_path="data", epochs=2, compare="none", evaluate="none", audit=None)
                run_unlearn(
                    model, "tiny", None, {**keys, **(MODELS | GRAPHS)[model], "forget_count": 3, "output_dir": "live"}
                )
                for extra in ("log", "log_tensorboard", "live/unlearned.triples"):
                    shutil.rmtree(extra, ignore_errors=True)
                for file in [*Path("live").glob("re*"), Path("live/unlearned.pth")]:
                    file.unlink()
                made[model] = folder
        return made[model]

    return train


@pytest.fixture
def scene(trained, tmp_path):
    """Function (model) -> an own copy of its folder, which is the current one then."""

    def copied(model):
        shutil.copytree(trained(model), tmp_path / "scene")
        os.chdir(tmp_path / "scene")

    return copied


def columns(split):
    """What a split holds, by part and column: rows of the training data in the log's order."""
    found = {}
    for name in ("train", "valid", "test"):
        part = pairwise_loader(getattr(split, name)).dataset.inter_feat.interaction
        order = split.data_row if name == "train" else slice(None)
        found |= {(name, field): values.numpy()[order] for field, values in part.items()}
    return found


@pytest.mark.parametrize("model", MODELS)
def test_a_user_is_in_no_byte_of_any_file_and_what_is_left_goes_on(scene, model):
    scene(model)
    with load("live/model.pth") as opened:
        split, rows = opened.split, pairwise_loader(opened.split.train).dataset
        gone = int(rows.token2id("user_id", SECRET_USER))
        before = columns(split.judged_without(np.flatnonzero(split.users == gone)))
    result = forget(forget_users=[SECRET_USER])
    assert "left" not in result and result["unlearning"]["exact"]
    assert holders(SECRET_USER, *([FEATURE] if model == "NGCF" else [])) == []
    with load("out/unlearned.pth") as opened:
        after = columns(opened.split)
        kept = {name: before[name, "user_id"] != gone for name in ("train", "valid", "test")}
        assert before.keys() == after.keys() and not all(map(np.all, kept.values()))
        for (name, field), values in after.items():
            assert values.dtype == before[name, field].dtype
            order = [
                np.argsort(each, kind="stable")
                for each in (before[name, "user_id"][kept[name]], after[name, "user_id"])
            ]
            np.testing.assert_array_equal(values[order[1]], before[name, field][kept[name]][order[0]])
        assert opened.split.n_users == split.n_users and opened.split.n_items == split.n_items
        with pytest.raises(InputError, match="unknown user token"):
            opened.forget(users=[SECRET_USER])
        served = opened.forget(count=3).model
        assert served.full_sort_predict(opened.split.queries(np.arange(3))).numel() >= 3 * split.n_items
    again = forget(checkpoint="out/unlearned.pth", output_dir="next", forget_users=["u20"])
    assert again["unlearning"]["exact"] and holders("u20\t", '"u20"') == [] and not Path("out/unlearned.pth").exists()
    with load("next/unlearned.pth") as opened:
        assert opened.guard.checked == "inherited"


def test_of_those_who_are_gone_features_are_blank(scene):
    scene("NGCF")
    with load("live/model.pth") as opened:
        data = opened.split.train.dataset
        user, town = int(data.token2id("user_id", SECRET_USER)), int(data.token2id("town", FEATURE))
        before = {name: column.clone() for name, column in data.user_feat.interaction.items()}
    forget(forget_users=[SECRET_USER])
    with load("out/unlearned.pth") as opened:
        data = opened.split.train.dataset
        for name, column in data.user_feat.interaction.items():
            others = np.setdiff1d(np.arange(1, len(column)), [user])
            assert torch.equal(column[others], before[name][others])
        ages = np.delete(before["age"][1:].numpy(), user - 1)
        assert data.user_feat["age"][0] == pytest.approx(ages.mean())  # padding's: RecBole fills in the mean
        assert data.user_feat["age"][user] == 0 != before["age"][user] and data.user_feat["town"][user] == 0
        assert data.field2id_token["town"][town] == f"[forgotten {town}]"


@pytest.fixture(scope="module")
def noted(make_options, tmp_path_factory):
    """Function (model) -> folder with a trained model whose interactions have a session of their own, and words."""
    made = {}

    def train(model):
        if model not in made:
            with inside(tmp_path_factory.mktemp("noted")) as folder:
                rows = [*tiny_interactions(), (ONCE, "i3", 880000000)]
                columns = ["user_id:token", "item_id:token", "timestamp:float", "session:token", "review:token_seq"]
                lines = [f"{u}\t{i}\t{t}\tat-{u}-{i}\tall by-{u} of-{n % 40}" for n, (u, i, t) in enumerate(rows)]
                Path("data/tiny").mkdir(parents=True)
                Path("data/tiny/tiny.inter").write_text("\n".join(["\t".join(columns), *lines]) + "\n")
                keys = make_options(data_path="data", epochs=2, compare="none", evaluate="none", audit=None)
                keys |= MODELS.get(model, {}) | {"load_col": None, "forget_count": 3, "output_dir": "live"}
                run_unlearn(model, "tiny", None, keys)
                for extra in ("log", "log_tensorboard", "live/unlearned.triples"):
                    shutil.rmtree(extra, ignore_errors=True)
                for file in [*Path("live").glob("re*"), Path("live/unlearned.pth")]:
                    file.unlink()
                made[model] = folder
        return made[model]

    return train


def said_of(split):
    """(session, words) of each interaction that is left, by its user and item, as tokens."""
    data, found = pairwise_loader(split.train).dataset, {}
    for part in (pairwise_loader(each).dataset.inter_feat for each in (split.train, split.valid, split.test)):
        columns = ("user_id", "item_id", "session", "review")
        for user, item, session, words in zip(*(data.id2token(name, part[name]) for name in columns), strict=True):
            found[user, item] = session, [word for word in words if word != "[PAD]"]
    return found, {name: len(tokens) for name, tokens in data.field2id_token.items()}


@pytest.mark.parametrize("model", ["BPR", "GRU4Rec"])
@pytest.mark.parametrize("user, everywhere", [(SECRET_USER, True), (SECRET_USER, False), (ONCE, True)])
def test_tokens_that_no_interaction_has_any_more_have_no_names(noted, tmp_path, model, user, everywhere):
    """Those of what is left, held-out interactions included, keep theirs, and all keep their ids."""
    shutil.copytree(noted(model), tmp_path / "scene")
    with inside(tmp_path / "scene"):
        with load("live/model.pth") as opened:
            before, sizes = said_of(opened.split)
        forget(forget_users=[user], everywhere=everywhere)
        with load("out/unlearned.pth") as opened:
            after, sizes_after = said_of(opened.split)
        held_out = {pair for pair in after if pair[0] == user}
        assert sizes_after == sizes and after == {pair: before[pair] for pair in after}
        assert set(before) - set(after) == {pair for pair in before if pair[0] == user} - held_out
        tokens = json.loads(Path("out/unlearned.triples/data/tiny/tokens.json").read_text())
        if model == "BPR":
            assert {each for each in tokens["session"] if each[0] != "["} == {session for session, _ in after.values()}
        assert bool(held_out) is not everywhere and (f"by-{user}" in tokens["review"]) is not everywhere
        if everywhere:
            assert holders(user) == []
        forget(checkpoint="out/unlearned.pth", output_dir="next", forget_users=["u20"])
        assert holders("at-u20-", '"by-u20"') == [] and (everywhere or holders(f"by-{user}", root="next"))


def test_a_token_that_a_column_of_the_same_numbering_has_keeps_its_name(tmp_path, make_options):
    with inside(tmp_path):
        write_all("data/tiny")
        lines = Path("data/tiny/tiny.item").read_text().splitlines()
        made = [f"{line}\t{PART if line.startswith('i3' + chr(9)) else 't1'}" for line in lines[1:]]
        Path("data/tiny/tiny.item").write_text("\n".join([f"{lines[0]}\tmaker:token", *made]) + "\n")
        keys = make_options(data_path="data", epochs=2, compare="none", evaluate="none", audit=None)
        keys |= MODELS["CKE"] | {"load_col": GRAPH | {"item": ["item_id", "maker"]}, "alias_of_entity_id": ["maker"]}
        run_unlearn("CKE", "tiny", None, {**keys, "forget_count": 3, "output_dir": "live"})
        forget(forget_items=[LINKED])
        tokens = json.loads(Path("out/unlearned.triples/data/tiny/tokens.json").read_text())
        for name in ("maker", "head_id", "entity_id"):
            assert PART in tokens[name] and f"m.{LINKED}" not in tokens[name]
        assert KIND not in tokens["relation_id"] and "[UI-Relation]" in tokens["relation_id"]
        with load("out/unlearned.pth") as opened:
            assert opened.forget(count=3).training


def test_an_item_leaves_every_history(scene):
    """Of held-out rows too, that are of other items."""
    scene("GRU4Rec")
    with load("live/model.pth") as opened:
        split = opened.split
        held_out = {int(item) for part in (split.valid, split.test) for item in part.dataset.inter_feat["item_id"]}
        item = min(set(split.items.tolist()) & held_out - set(split.firsts()[1].tolist()))
        token = str(split.token("item", np.array([item]))[0])
        lists = [part.dataset.inter_feat["item_id_list"] == item for part in (split.train, split.valid, split.test)]
    assert all(each.any() for each in lists)
    forget(forget_items=[token])
    assert token not in {line.split("\t")[1] for line in Path("data/tiny/tiny.inter").read_text().splitlines()}
    frozen = Path("out/unlearned.triples/data/tiny")
    assert json.loads((frozen / "tokens.json").read_text())["item_id"][item - 1] == f"[forgotten {item}]"
    with np.load(frozen / "arrays.npz") as kept:
        columns = [name for name in kept.files if name.endswith(("/item_id", "/item_id_list"))]
        assert len(columns) == 6 and not any((kept[name] == item).any() for name in columns)
    with load("out/unlearned.pth") as opened:
        opened.forget(count=3)


def test_without_it_the_output_says_what_is_left_of_a_history(scene):
    scene("FPMC")
    left = forget(forget_users=[SECRET_USER], everywhere=False)["left"]
    assert "2 held-out interactions, 1 interaction that histories begin with, 1 line of tiny.user; " in left
    assert len([line for line in Path("data/tiny/tiny.inter").read_text().splitlines() if SECRET_USER in line]) == 3


@pytest.mark.parametrize("by", ["items", "requests"])
def test_an_item_whose_interactions_went_before_leaves_the_knowledge_graph_too(scene, by):
    """By training again: the model was trained on its facts."""
    scene("CKE")
    forget(forget_items=[LINKED], everywhere=False)
    Path("r.csv").write_text(f"user,item\n,{LINKED}\n")
    asked = {"forget_requests": "r.csv"} if by == "requests" else {"forget_items": [LINKED]}
    result = forget(checkpoint="out/unlearned.pth", output_dir="next", **asked)
    Path("r.csv").unlink()
    assert result["forget_set"]["interactions"] == 0 and result["unlearning"]["exact"]
    assert holders(LINKED, PART, KIND) == [] and "unchanged" not in result["unlearning"]
    with load("next/unlearned.pth") as opened:
        assert opened.forget(count=3).training


def test_who_has_a_line_of_features_alone_is_erased(tmp_path, make_options):
    with inside(tmp_path):
        write_all("data/tiny")
        with Path("data/tiny/tiny.user").open("a") as file:
            file.write(f"SECRETALONE\t3\t{KIND}\n")
        keys = make_options(data_path="data", epochs=2, compare="none", evaluate="none", audit=None)
        run_unlearn("NGCF", "tiny", None, {**keys, **MODELS["NGCF"], "forget_count": 3, "output_dir": "live"})
        shutil.rmtree("live/unlearned.triples")
        Path("live/unlearned.pth").unlink()
        forget(forget_users=["SECRETALONE"])
        assert holders("SECRETALONE") == [] and holders(KIND) == ["data/tiny/tiny.kg"]
        with load("out/unlearned.pth") as opened:
            assert opened.forget(count=3).training


@pytest.mark.parametrize("kind", ["items", "category", "rare_items", "time", "requests", "count"])
def test_what_histories_begin_with_is_said_of_every_kind_that_names_it(scene, kind):
    """The first interaction of a user is the target of no row, and stays where its item, time or pair is named."""
    scene("FPMC")
    lines = [line.split("\t") for line in Path("data/tiny/tiny.item").read_text().splitlines()]
    of_class = [item for item, name in lines if name == "c1"]
    with load("live/model.pth") as opened:
        split, config = opened.split, opened.config
    users, items = split.firsts()
    times, until = split.firsts("timestamp")[1], 1_010_000
    (pair,), other = split.tokens(users[:1], items[:1]), split.pairs(np.flatnonzero(split.users == users[0])[:1])[0]
    Path("r.csv").write_text("\n".join(["user,item", ",".join(pair), ",".join(other)]) + "\n")
    rare = np.unique(split.items[ForgetRequest.of("rare_items", 20, config).rows(split)])
    value, expected = {
        "items": (of_class, sum(item in of_class for item in split.token("item", items))),
        "category": ("c1", sum(item in of_class for item in split.token("item", items))),
        "rare_items": (20, np.isin(items, rare).sum()),
        "time": (f"..{until}", (times <= until).sum()),
        "requests": ("r.csv", 1),
        "count": (5, 0),
    }[kind]
    keys = {f"forget_{kind}": value, "forget_category_field": "class"}
    left = forget(**keys, purge=False, purge_dataset=False, everywhere=False).get("left")
    if kind == "count":
        assert expected == 0 and left is None
    else:
        said = f"{expected} interaction{'s' if expected > 1 else ''} that histories begin with"
        assert expected and said in left and "everywhere" not in left


@pytest.mark.parametrize("model", GRAPHS)
def test_an_item_leaves_the_knowledge_graph(scene, model):
    """Its facts, whichever end it is, and what no other fact names; entities that others name too stay."""
    scene(model)
    with load("live/model.pth") as opened:
        before = opened.split.train._dataset
        item = int(before.token2id("item_id", LINKED))
        kept = [row for row in zip(*map(list, map(before.kg_feat.__getitem__, FACTS)), strict=True) if item not in row]
    result = forget(forget_items=[LINKED])
    assert "left" not in result and result["unlearning"]["exact"]
    assert holders(LINKED, PART, KIND) == [] and len(holders("m.i3\t", '"m.i3"')) == 3
    with load("out/unlearned.pth") as opened:
        after = opened.split.train._dataset
        assert [row for row in zip(*map(list, map(after.kg_feat.__getitem__, FACTS)), strict=True)] == kept
        assert len(kept) == len(before.kg_feat) - 4 and str(after.id2token("entity_id", item)) == f"[forgotten {item}]"
        assert (
            str(after.id2token("item_id", after.token2id("item_id", "i3"))) == "i3" and opened.forget(count=3).training
        )


def test_a_knowledge_graph_leaves_nothing_of_an_item_in_what_is_trained(tmp_path, make_options):
    """Two that differ in its facts alone, by the same numbers of the operating system, to the last byte."""
    found = []
    for n, fact in enumerate(("r1\tt2", "r2\tm.i39")):
        (tmp_path / "live").mkdir()  # of one name: checkpoints tell where their data lie
        with inside(tmp_path / "live") as folder:
            write_all("data/tiny", f"m.{LINKED}\t{fact}")
            keys = make_options(data_path="data", epochs=2, eval_step=0, compare="none", evaluate="none", audit=None)
            run_unlearn("CKE", "tiny", None, {**keys, **MODELS["CKE"], "forget_count": 3, "output_dir": "live"})
            original = torch.load("live/model.pth", weights_only=True)["state_dict"]["entity_embedding.weight"]
            with same_numbers():
                forget(forget_items=[LINKED], audit=None)
            found.append((original, {**left_behind(folder / "out"), **left_behind(folder / "data")}))
        (tmp_path / "live").rename(tmp_path / str(n))
    assert not torch.equal(found[0][0], found[1][0]) and len(found[0][1]) > 10
    assert [name for name in found[0][1] if found[0][1][name] != found[1][1][name]] == []


def test_a_step_for_an_item_with_facts_is_refused_in_one_line(scene):
    scene("CKE")
    before = sorted(contents("."))
    for keys in ({"method": "influence"}, {"exact_seconds": 0.0}):
        with pytest.raises(InputError, match="stay trained on the facts of 1 of these") as refused:
            forget(forget_items=[LINKED], **keys)
        assert "\n" not in str(refused.value) and sorted(contents(".")) == before


@pytest.mark.parametrize("model, match", [("GRU4Rec", "users begin with these items")])
def test_items_that_a_model_stays_trained_on_are_refused_in_one_line(scene, model, match):
    scene(model)
    item = LINKED
    if model == "GRU4Rec":
        with load("live/model.pth") as opened:
            _, items = opened.split.firsts()
            item = str(opened.split.token("item", items[:1])[0])
    before = sorted(contents("."))
    with pytest.raises(InputError, match=match) as refused:
        forget(forget_items=[item])
    assert "\n" not in str(refused.value) and sorted(contents(".")) == before


def sequential(make_options, interactions, **keys):
    """Write a data set of its own and train on it: keys of requests to that model."""
    silent = {"compare": "none", "evaluate": "none", "audit": None}
    silent["data_path"] = write_dataset("data", "shop", interactions)
    given = make_options(**{**silent, **SEQUENTIAL, "epochs": 2, **keys})
    run_unlearn("FPMC", "shop", None, {**given, "forget_count": 1, "output_dir": "live"})
    return {"purge": True, "purge_dataset": True, **silent, "show_progress": False}


@pytest.mark.parametrize("taken, everywhere", [(True, False), (True, True), (False, False)])
def test_a_line_that_a_history_began_with_goes_when_the_user_is_named(make_options, taken, everywhere):
    """After all rows of the user went, with their lines or not: the data that lie with the log do not know the user."""
    early = [("ann", item, 900_000 + k) for k, item in enumerate(["i3", "i7", "i12"])]
    split = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "none", "mode": "full"}
    keys = sequential(make_options, early + tiny_interactions(), eval_args=split)
    Path("pairs.tsv").write_text("ann\ti7\nann\ti12\n")
    keys |= {"checkpoint": "live/model.pth", "output_dir": "first", "purge_dataset": taken, "everywhere": everywhere}
    first = run_unlearn(config_dict={**keys, "forget_file": "pairs.tsv"})
    assert first["unlearning"]["exact"] and "left" not in first
    keys |= {"checkpoint": "first/unlearned.pth", "output_dir": "second", "everywhere": False}
    keys |= {"forget_users": ["ann"], "purge_dataset": True}
    if taken:
        with pytest.raises(InputError, match="was not read with 1 user of the request, which its files name .* True"):
            run_unlearn(config_dict=keys)
    else:
        told = run_unlearn(config_dict={**keys, "dry_run": True})
        assert any("1 interaction that histories begin with; everywhere: True" in str(each) for each in told["left"])
    second = run_unlearn(config_dict={**keys, "everywhere": True})
    assert "left" not in second and second["lines"] == {"requested": 1 if taken else 3, "earlier": 0}
    assert "ann" not in Path("data/shop/shop.inter").read_text()


def test_histories_of_one_item_begin_once_a_user(make_options):
    interactions = [(user, item, time) for user, item, time in tiny_interactions() if user != "ann"]
    interactions += [("ann", item, 2_000_000 + k) for k, item in enumerate(["i3", "i7", "i12", "i4", "i9"])]
    keys = sequential(make_options, interactions, **{"MAX_ITEM_LIST_LENGTH": 1})
    with load("live/model.pth") as opened:
        users, items = opened.split.firsts()
        assert len(users) == len(set(users)) == len({user for user, *_ in interactions})
        assert ("ann", "i3") in opened.split.tokens(users, items)
    Path("pairs.tsv").write_text("ann\ti7\n")
    asked = {"checkpoint": "live/model.pth", "output_dir": "out", "forget_file": "pairs.tsv"}
    result = run_unlearn(config_dict={**keys, **asked})
    assert result["lines"] == {"requested": 1, "earlier": 0} and result["unlearning"]["exact"]
    assert "ann\ti7\t" not in Path("data/shop/shop.inter").read_text()
