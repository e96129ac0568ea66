"""Gone everywhere: no byte of any file names who asked for it, whenever the process is killed."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SECRET_ITEM, SECRET_USER, inside, tiny_interactions
from test_crash import KILLED, Dying, forked, strided

from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage import checkpoints as checkpoint
from recbole_unlearn.storage import inter_file, purging, suppression
from recbole_unlearn.storage.files import locked
from recbole_unlearn.unlearner import load
from recbole_unlearn.verify import main

FILES = ("inter", "user", "item", "link", "kg")
ENTITY, SHARED = "m.SECRETENTITY", "m.SHAREDENTITY"


def write_all(folder, rows):
    """A data set with every kind of file that may name users or items."""
    users, items = (sorted({row[n] for row in rows}) for n in (0, 1))
    links = [(SECRET_ITEM, ENTITY), (SECRET_ITEM, SHARED), (items[-1], SHARED)]
    links += [(item, f"m.{item}") for item in items[1:9] if item != SECRET_ITEM]
    facts = [(ENTITY, "r1", "t1"), ("t2", "r1", ENTITY), (SHARED, "r2", "t1"), ("m.other", "r1", "t2")]
    tables = {
        "inter": ["user_id:token\titem_id:token\ttimestamp:float", *(f"{u}\t{i}\t{t}" for u, i, t in rows)],
        "user": ["user_id:token\tage:float", *(f"{user}\t{n}" for n, user in enumerate(users))],
        "item": ["item_id:token\tclass:token", *(f"{item}\tc{n % 5}" for n, item in enumerate(items))],
        "link": ["item_id:token\tentity_id:token", *map("\t".join, links)],
        "kg": ["head_id:token\trelation_id:token\ttail_id:token", *map("\t".join, facts)],
    }
    Path(folder).mkdir(parents=True)
    for ending, lines in tables.items():
        (Path(folder) / f"tiny.{ending}").write_text("\n".join(lines) + "\n")


def train_live(make_options, model="BPR", **keys):
    """Train a model on the data set in the current folder: `live/model.pth`, and nothing of what the run forgot."""
    given = make_options(data_path="data", forget_count=3, output_dir="live", compare="none", audit=None, **keys)
    run_unlearn(model, "tiny", None, given)
    for extra in ("log", "log_tensorboard", "live/unlearned.triples"):
        shutil.rmtree(extra, ignore_errors=True)
    os.remove("live/unlearned.pth")


@pytest.fixture(scope="module")
def trained(make_options, tmp_path_factory):
    """A data set with every file, and a model trained on it. No test may change it."""
    with inside(tmp_path_factory.mktemp("everywhere")) as start:
        write_all("data/tiny", tiny_interactions())
        train_live(make_options)
    return start


@pytest.fixture
def scene(trained, tmp_path):
    """An own copy of it as the current folder."""
    shutil.copytree(trained, tmp_path / "scene")
    os.chdir(tmp_path / "scene")


def forget(**keys):
    given = {"checkpoint": "live/model.pth", "output_dir": "out", "compare": "none"}
    given |= {"purge": True, "purge_dataset": True, "everywhere": True, "state": "INFO", **keys}
    return run_unlearn(config_dict=given)


def contents(root):
    """(name, bytes) of every file, and of what archives hold."""
    for file in (file for file in Path(root).rglob("*") if file.is_file()):
        content = file.read_bytes()
        yield str(file), content
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                yield from ((f"{file}/{name}", archive.read(name)) for name in archive.namelist())
        if file.suffix == ".npy" and np.load(file).dtype.kind in "US":
            yield f"{file} as text", "\n".join(np.load(file).ravel().tolist()).encode()


def holders(*texts, root="."):
    needles = [text.encode(coding) for text in texts for coding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")]
    return sorted({name for name, content in contents(root) for needle in needles if needle in content})


def lines(ending, root="."):
    return (Path(root) / f"data/tiny/tiny.{ending}").read_text().splitlines()


def test_the_search_finds_what_is_there(scene):
    assert {"data/tiny/tiny.inter", "data/tiny/tiny.user"} == set(holders(SECRET_USER))
    np.save("a.npy", np.array([SECRET_USER]))
    with zipfile.ZipFile("a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.pkl", SECRET_USER * 9)
    assert {"a.npy", "a.pth/data.pkl"} <= set(holders(SECRET_USER))


def test_vectors_and_lists_of_the_model_from_before_go_with_it(scene):
    written = {"embeddings": True, "changed_lists": 20}
    forget(forget_items=["i4"], everywhere=False, purge_dataset=False, **written)
    assert {"out/changed_users.csv", "out/embeddings/users.csv"} <= set(holders(SECRET_USER, root="out"))
    Path("out/embeddings/mine.txt").write_text("of the user's own")
    again = {"checkpoint": "out/unlearned.pth", "forget_users": [SECRET_USER], "output_dir": "later", **written}
    told = {each["where"] for each in forget(**again, dry_run=True)["left"] if each["then"] == "is deleted"}
    assert {"out/changed_users.csv", "out/embeddings/items.npy"} <= told
    forget(**again)
    assert not holders(SECRET_USER)
    assert [file.name for file in Path("out/embeddings").iterdir()] == ["mine.txt"]
    assert Path("later/embeddings/users.npy").exists() and not Path("out/changed_users.csv").exists()


@pytest.mark.parametrize("by", ["users", "requests"])
def test_a_user_is_in_no_byte_of_any_file(scene, trained, by):
    keys = {"forget_users": [SECRET_USER]}
    if by == "requests":
        Path("r.csv").write_text(f"user,item\n{SECRET_USER},\n")
        keys = {"forget_requests": "r.csv"}
    result = forget(**keys)
    Path("r.csv").unlink(missing_ok=True)
    assert holders(SECRET_USER) == [] and "left" not in result
    for ending in FILES:
        assert lines(ending) == [line for line in lines(ending, trained) if SECRET_USER not in line]
    assert len(lines("user")) == len(lines("user", trained)) - 1
    assert not list(Path("live").glob("model*"))


def test_an_item_goes_with_its_link_and_its_entitys_triples(scene, trained):
    forget(forget_items=[SECRET_ITEM])
    assert holders(SECRET_ITEM, ENTITY) == []
    assert lines("kg") == [line for line in lines("kg", trained) if ENTITY not in line]
    assert any(SHARED in line for line in lines("link")) and any(SHARED in line for line in lines("kg"))
    assert len(lines("item")) == len(lines("item", trained)) - 1 and lines("user") == lines("user", trained)


def test_what_is_left_goes_on(scene, trained, make_split):
    """Ids stay, the user's rows of all parts are missing, and the next request is served."""
    split = make_split(data_path=str(trained / "data"))
    forget(forget_users=[SECRET_USER])
    gone = split.train.dataset.field2token_id["user_id"][SECRET_USER]
    with load("out/unlearned.pth") as again:
        for name in ("train", "valid", "test"):
            old, new = (getattr(each, name).dataset.inter_feat for each in (split, again.split))
            kept = old["user_id"] != gone
            pairs = [sorted(zip(e["user_id"].tolist(), e["item_id"].tolist(), strict=True)) for e in (old[kept], new)]
            assert 0 < len(new) < len(old) and pairs[0] == pairs[1]
        with pytest.raises(InputError, match="unknown user token"):
            again.forget(users=[SECRET_USER])
        again.forget(count=3)
    assert forget(checkpoint="out/unlearned.pth", output_dir="next", forget_items=[SECRET_ITEM])["files"]
    assert holders(SECRET_USER, SECRET_ITEM, ENTITY) == []


def test_without_it_the_output_says_what_is_left(scene, trained, make_split):
    split = make_split(data_path=str(trained / "data"))
    user = split.train.dataset.field2token_id["user_id"][SECRET_USER]
    held_out = sum(int((each.dataset.inter_feat["user_id"] == user).sum()) for each in (split.valid, split.test))
    result = forget(forget_users=[SECRET_USER], everywhere=False)
    assert result["left"] == f"{held_out} held-out interactions, 1 line of tiny.user; everywhere: True takes them too"
    assert f"Left: {result['left']}." in Path("out/result.md").read_text().splitlines()
    assert len([line for line in lines("inter") if SECRET_USER in line]) == held_out
    frozen = Path("out/unlearned.triples/data/tiny")
    assert holders(SECRET_USER, root="out") == [str(frozen / "tokens.json")]  # its name; by its id the two parts
    with np.load(frozen / "arrays.npz") as kept:
        parts = [int((kept[f"{name}/user_id"] == user).sum()) for name in ("train", "valid", "test")]
    assert parts[0] == 0 and min(parts[1:]) > 0 and sum(parts) == held_out


@pytest.mark.parametrize("keys", [{}, {"evaluate": "none"}, {"compare": "retrain"}, {"by": "requests"}])
def test_who_is_held_out_alone_is_erased_without_a_training(scene, keys):
    """Their training interactions went before, in a request that left the rest."""
    forget(forget_users=[SECRET_USER], everywhere=False)
    before = checkpoint.load("out/unlearned.pth")[0]["state_dict"]
    asked = {"forget_users": [SECRET_USER]}
    if "by" in keys:
        Path("r.csv").write_text(f"user,item\n{SECRET_USER},\n")
        asked = {"forget_requests": "r.csv"}
    given = {"checkpoint": "out/unlearned.pth", "output_dir": "b", "suppression": "gone.jsonl"}
    given |= asked | {key: value for key, value in keys.items() if key != "by"}
    with pytest.raises(InputError, match="forget set is empty.*everywhere") as refused:
        forget(**given | {"everywhere": False, "suppression": None})
    assert "\n" not in str(refused.value)
    plan = forget(**given, dry_run=True)
    assert plan["way"]["exact"] and plan["way"]["seconds"] == 0 and holders(SECRET_USER, root="out")
    result = forget(**given)
    Path("r.csv").unlink(missing_ok=True)
    assert holders(SECRET_USER) == [] and "left" not in result and result["unlearning"]["exact"]
    assert "No training interaction was among" in result.page and set(result["models"]) == {"original", "unlearned"}
    assert suppression.lists("gone.jsonl", "user", [SECRET_USER])
    after = checkpoint.load("b/unlearned.pth")[0]["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["b/unlearned.pth"]) == 0
    assert forget(checkpoint="b/unlearned.pth", output_dir="next", forget_items=[SECRET_ITEM])["unlearning"]["exact"]


def test_files_that_the_data_set_is_not_read_from_are_said_to_stay(scene):
    lines = ["iid:token\tlike:token_seq", f"i1\ti3 {SECRET_ITEM}", f"{SECRET_ITEM}\ti2", "i4\t"]
    Path("data/tiny/tiny.vectors").write_text("\n".join(lines))
    Path("data/tiny/notes.txt").write_text(f"{SECRET_ITEM}x\n")
    found = forget(forget_items=[SECRET_ITEM])
    assert found["left"] == "2 lines of tiny.vectors, which may name them and which this data set is not read from"
    assert found["left"] in found.page and SECRET_ITEM not in found.page
    assert holders(SECRET_ITEM) == ["data/tiny/notes.txt", "data/tiny/tiny.vectors"]


def test_of_an_item_all_files_are_counted(scene):
    result = forget(forget_items=[SECRET_ITEM], everywhere=False)
    assert "1 line of tiny.item, 2 lines of tiny.link, 2 lines of tiny.kg; " in result["left"]
    assert "left" not in forget(checkpoint="out/unlearned.pth", output_dir="b", forget_count=2, everywhere=False)


def test_files_that_cannot_be_read_stop_only_who_asks_for_them(scene):
    Path("data/tiny/tiny.user").write_bytes(b"\xff\xfe")
    before = sorted(contents("."))
    with pytest.raises(InputError, match="no .user file") as refused:
        forget(forget_users=[SECRET_USER])
    assert "\n" not in str(refused.value) and sorted(contents(".")) == before
    assert "cannot be read" in forget(forget_users=[SECRET_USER], everywhere=False)["left"]


@pytest.mark.parametrize(
    "keys, match",
    [
        ({"forget_count": 3}, "as a whole"),
        ({"forget_users": [SECRET_USER], "purge_dataset": False}, "purge and purge_dataset"),
        ({"forget_users": [SECRET_USER], "purge_dataset": False, "purge": False}, "purge and purge_dataset"),
    ],
)
def test_what_cannot_be_kept_is_not_promised(scene, keys, match):
    before = sorted(contents("."))
    with pytest.raises(InputError, match=match) as refused:
        forget(**keys)
    assert "\n" not in str(refused.value) and sorted(contents(".")) == before


@pytest.mark.parametrize("where", ["held out", "a name", "a line end", "a separator before", "an open quote"])
def test_what_quotes_hide_is_refused_before_anything_changes(scene, where):
    """RecBole reads fields in quotes, and goes on in the next line in them; lines are removed as they stand."""
    kind, token, ending = "items", SECRET_ITEM, "item"
    if where == "held out":
        kind, token, ending = "users", SECRET_USER, "inter"
        with load("live/model.pth") as opened:
            data = opened.split.test.dataset
            mine = data.inter_feat["user_id"] == data.token2id("user_id", token)
            item = str(data.id2token("item_id", int(data.inter_feat["item_id"][mine][0])))
        old, new = f"{token}\t{item}\t", f'"{token}"\t{item}\t'
    elif where == "a name":
        kind, token, ending = "users", SECRET_USER, "user"
        old, new = f"{token}\t", f'"{token}"\t'
    elif where == "a separator before":
        old, new = "item_id:token\tclass:token", "class:token\titem_id:token"
    else:
        old, new = f"{token}\tc", f'{token}\t"one\nother {"" if where == "an open quote" else chr(34)}c'
    file = Path(f"data/tiny/tiny.{ending}")
    text = file.read_text()
    assert text.count(old) == 1
    text = text.replace(old, new)
    if where == "a separator before":
        first, *rest = text.splitlines()
        text = "\n".join([first, *(f'"c\t1"\t{line.split(chr(9))[0]}' for line in rest)]) + "\n"
    file.write_text(text)
    before = sorted(contents("."))
    with pytest.raises(InputError, match="quoted fields") as refused:
        forget(**{f"forget_{kind}": [token]})
    assert "\n" not in str(refused.value) and token not in str(refused.value) and sorted(contents(".")) == before


def test_quotes_that_hide_nothing_of_what_goes_are_no_hindrance(scene):
    quoted = {
        "item": [(f"{SECRET_ITEM}\tc", f'{SECRET_ITEM}\t"of" 7" c')],
        "user": [("u20\t", '"u20"\t')],
        "link": [(f"\t{name}", f'\t"{name}"') for name in (ENTITY, SHARED)],
    }
    for ending, changes in quoted.items():
        file = Path(f"data/tiny/tiny.{ending}")
        for change in changes:
            file.write_text(file.read_text().replace(*change))
    forget(forget_items=[SECRET_ITEM])
    left = {ending: Path(f"data/tiny/tiny.{ending}").read_text() for ending in FILES}
    assert not any(SECRET_ITEM in text or ENTITY in text for text in left.values())
    assert SHARED in left["kg"] and '"u20"' in left["user"]


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_user_file_with_another_name_is_refused(scene, how):
    os.rename("data/tiny/tiny.user", "real")
    (os.symlink if how == "symbolic" else os.link)(Path("real").absolute(), "data/tiny/tiny.user")
    with pytest.raises(InputError, match="another name"):
        forget(forget_users=[SECRET_USER])
    assert Path("live/model.pth").exists() and not Path("out").exists()


# -- killed


def small(folder, make_config):
    """A folder in which a purge deletes a checkpoint and thins out every file; arguments of the purge."""
    shutil.rmtree(folder, ignore_errors=True)
    write_all(folder / "data/tiny", tiny_interactions()[:200] + [(SECRET_USER, SECRET_ITEM, 1)])
    os.chdir(folder)
    Path("model.pth").write_bytes(b"weights")
    Path("model.triples").mkdir()
    np.save("model.triples/users.npy", np.arange(3))
    whole = {"user": [SECRET_USER], "item": [SECRET_ITEM]}
    return Path("model.pth"), Path("data/tiny/tiny.inter"), make_config(), [(SECRET_USER, SECRET_ITEM)], whole


def state(before):
    """Which state the next start found: the old one or the new one, and nothing between."""
    with locked("model.pth"):
        purging.recover("model.pth")
    purging.tidy("data/tiny")
    assert [str(file) for file in Path(".").rglob(".*")] == []
    now = {ending: lines(ending) for ending in FILES}
    if Path("model.pth").exists():
        assert now == before and Path("model.triples/users.npy").exists()
        return "old"
    assert holders(SECRET_USER, SECRET_ITEM, ENTITY) == [] and not Path("model.triples").exists()
    gone = (SECRET_USER, SECRET_ITEM, ENTITY)
    assert now == {e: [line for line in each if not any(g in line for g in gone)] for e, each in before.items()}
    return "new"


@strided(2)
def test_killed_at_any_step_the_files_are_all_old_or_all_new(make_config, tmp_path, stride):
    found, n, status = [], 1 - stride, KILLED
    while status == KILLED:
        n += stride
        arguments = small(tmp_path / "small", make_config)
        before = {ending: lines(ending) for ending in FILES}

        def purge(n=n, arguments=arguments):
            Dying(n).start()
            purging.purge(*arguments)

        status = forked(purge)
        assert status in (0, KILLED)
        found.append(state(before))
    assert status == 0 and found == sorted(found, key=["old", "new"].index) and {"old", "new"} == set(found)
    assert len(found) > 25 // stride


def test_a_file_that_another_process_holds_leaves_all_as_it_was(make_config, tmp_path):
    arguments = small(tmp_path / "small", make_config)
    before = {ending: lines(ending) for ending in FILES}
    with locked("data/tiny/tiny.inter"), pytest.raises(InputError, match="another process"):
        purging.purge(*arguments)
    assert {ending: lines(ending) for ending in FILES} == before and state(before) == "old"


@pytest.mark.parametrize("change", [{"user": {}}, {"pth": "user"}, {"user": "all"}, []])
def test_a_forged_journal_is_refused(make_config, tmp_path, change):
    """It may name no other kinds of files, and needs the seal of each."""
    arguments = small(tmp_path / "small", make_config)
    form = inter_file.reading(arguments[2])
    seals = {"format": form, "seal": [1, 2, 3]}
    journal = {"inter": str(arguments[1].resolve()), "pairs": [], "others": change, **seals}
    if change == {"pth": "user"}:
        journal["others"] = {"pth": seals}
    elif change == {"user": "all"}:
        whole = {"user_id": [SECRET_USER]}
        journal["others"] = {"user": {**seals, "format": {**form, "fields": ["user_id"], "whole": whole}}}
    Path(".model.pth.purge").write_text(json.dumps(journal))
    before = dict(contents("."))
    with locked("model.pth"), pytest.raises(InputError):
        purging.recover("model.pth")
    assert dict(contents(".")) == {**before, ".model.pth.lock": b""} or dict(contents(".")) == before
