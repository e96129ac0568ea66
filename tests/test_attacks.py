"""Who holds what a purge leaves, and old data or the seed besides, learns no more of the forgotten than by chance.

Each attack must succeed where it is meant to, against a setting that is not safe: else its failing would mean nothing.
"""

import hashlib
import json
import os
import random
import re
import secrets
import shutil
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import inside
from test_everywhere import contents

from recbole_unlearn.compat.recbole_models import replaced
from recbole_unlearn.data.fingerprint import rows_checksum
from recbole_unlearn.data.split import Split
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage import audit
from recbole_unlearn.storage.triple_log import Training, TripleLog, log_path, smallest_uint
from recbole_unlearn.testing import options, tiny_interactions, write_dataset
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner, load
from recbole_unlearn.unlearners.replay import Replay
from recbole_unlearn.verify import verify

DECOYS = 11
FIELDS = ("user_id", "item_id")
KEYS = {"epochs": 3, "compare": "none", "state": "ERROR"}
SEED = 2020  # of the training: RecBole's default, which everybody knows


def requested(folder, output_dir, checkpoint, **keys):
    """What the operator is left with after a request, in an own copy of his folder."""
    here = os.getcwd()
    shutil.copytree(folder / "operator", folder / output_dir)
    os.chdir(folder / output_dir)
    try:
        given = {"checkpoint": checkpoint, "output_dir": "out", "show_progress": False, **KEYS, **keys}
        run_unlearn(config_dict={key: value for key, value in given.items() if key != "epochs"})
        shutil.rmtree("log", ignore_errors=True)
    finally:
        os.chdir(here)
    return folder / output_dir / "out"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """One interaction is forgotten, with ``paired`` random numbers and by ``default``; candidates, the truth first.

    The attacker has the thinned file and what lies in the output folder, and tries a set of missing lines: where each
    stood, and its user and item.
    """
    folder = tmp_path_factory.mktemp("attacks")
    here, rng = os.getcwd(), np.random.default_rng(5)
    rows = tiny_interactions()
    write_dataset(folder / "operator/data", "tiny", rows)
    os.chdir(folder / "operator")
    try:
        run_unlearn("BPR", "tiny", None, options("data", **KEYS, forget_count=1, output_dir="live", audit=None))
        with load("live/model.pth") as opened:
            truth = opened.split.pairs(rng.choice(opened.split.n_rows, 1))[0]
            trained_on = opened.split.pairs(np.arange(opened.split.n_rows))
        for name in ("live/unlearned.triples", "log"):
            shutil.rmtree(name, ignore_errors=True)
        os.remove("live/unlearned.pth")
        Path("request.tsv").write_text("\t".join(truth) + "\n")
    finally:
        os.chdir(here)
    place = next(n for n, row in enumerate(rows) if row[:2] == truth)
    had, users, items = set(row[:2] for row in rows), *(sorted({row[n] for row in rows}) for n in (0, 1))
    candidates = [(place, rows[place])]
    while len(candidates) <= DECOYS:
        pair = str(rng.choice(users)), str(rng.choice(items))
        if pair not in had:
            candidates.append((int(rng.integers(len(rows))), (*pair, 5)))
    purged = {"forget_file": "request.tsv", "purge": True, "purge_dataset": True}
    return SimpleNamespace(
        folder=folder,
        candidates=candidates,
        thinned=[row for row in rows if row[:2] != truth],
        pairs=trained_on,
        truth=truth,
        paired=requested(folder, "paired", "live/model.pth", coupling="paired", **purged),
        default=requested(folder, "default", "live/model.pth", **purged),
    )


@pytest.fixture(scope="module")
def guesses(case, tmp_path_factory):
    """For each candidate the original as it would have been: its split, and its checkpoint, trained by the seed."""
    found = []
    for n, (place, row) in enumerate(case.candidates):
        folder = tmp_path_factory.mktemp(f"guess{n}")
        whole = [*case.thinned[:place], row, *case.thinned[place:]]
        config = UnlearnConfig(
            "BPR", "tiny", config_dict=options(write_dataset(folder / "data", "tiny", whole), **KEYS, seed=SEED)
        )
        split = Split.seeded(config)
        train(config, split, folder / "model.pth")
        pairs = split.pairs(np.arange(split.n_rows))
        missing = pairs.index(row[:2]) if row[:2] in pairs else None
        found.append(SimpleNamespace(config=config, split=split, path=folder / "model.pth", missing=missing))
    return found


def singled_out(scores):
    """Whether the truth, which is first, scores above every other candidate."""
    return scores[0] > max(scores[1:])


def shares_of_draws(guesses, out):
    """Share of the logged negatives that the seed draws, had a candidate been there."""
    left, shares = TripleLog.open(out / "unlearned.triples"), []
    for guess in guesses:
        log = TripleLog.open(log_path(guess.path))
        keep = np.ones(log.n_rows, bool)
        if guess.missing is not None:
            keep[guess.missing] = False
        same = [
            (np.asarray(log.epoch(n))[keep] == np.asarray(left.epoch(n))).mean() if keep.sum() == left.n_rows else 0.0
            for n in range(left.n_epochs)
        ]
        shares.append(float(np.mean(same)))
    return shares


def test_the_seeds_draws_tell_the_forgotten_only_if_they_are_kept(case, guesses):
    unsafe = shares_of_draws(guesses, case.paired)
    assert singled_out(unsafe) and unsafe[0] > 0.9 and max(unsafe[1:]) < 0.5
    shares = shares_of_draws(guesses, case.default)
    assert max(shares) < 0.1  # of so many items as draws hit by chance


def moment_ranks(out, rows, split):
    """How high forgotten items stand for their users among those that they never had, by averages of gradients."""
    stored = torch.load(out / "unlearned.pth", weights_only=True)["optimizer"]["state"]
    users, items = (stored[number]["exp_avg"].double().numpy() for number in (0, 1))
    seen, ranks = split.seen(), []
    for user, item in zip(split.users[rows], split.items[rows], strict=True):
        scores = items @ users[user]
        others = scores[np.setdiff1d(np.arange(1, split.n_items), seen(user))]
        ranks.append((others < scores[item]).mean() + (others == scores[item]).mean() / 2)
    return float(np.mean(ranks))


def squares(out):
    """Averages of squares of gradients, of users and items."""
    state = torch.load(out / "unlearned.pth", weights_only=True)["optimizer"]["state"]
    return [state[number]["exp_avg_sq"].numpy() for number in (0, 1)]


def unexplained(out):
    """Users who, by averages of squares, were trained on, and of whom the log that is left has nothing."""
    return np.setdiff1d(np.flatnonzero(squares(out)[0].any(1)), TripleLog.open(out / "unlearned.triples").users)


def same_squares(out, before):
    """Share of the original's averages, from which who knows the seed could tell it from another candidate's."""
    pairs = [(each, before[n]["exp_avg_sq"].numpy()) for n, each in enumerate(squares(out))]
    return np.concatenate([(new == old)[old != 0] for new, old in pairs]).mean()


@pytest.mark.parametrize("keys", [{}, {"method": "influence"}, {"replay_rows": "touched"}], ids=str)
def test_moments_tell_the_forgotten_of_approximate_results_only_before_a_purge(case, tmp_path, keys):
    """Adam's first moments, of users who are wholly forgotten: their last gradients, towards their items.

    And its second ones: that there were any, and, to the last digit, which.
    """
    shutil.copytree(case.folder / "operator", tmp_path / "operator")
    os.chdir(tmp_path / "operator")
    shutil.rmtree("live")
    run_unlearn("BPR", "tiny", None, options("data", **{**KEYS, "epochs": 12}, forget_count=1, output_dir="live"))
    with load("live/model.pth") as opened:
        split, before = opened.split, opened.trained.optimizer["state"]
        users = np.unique(split.users)[::6]
        rows = np.flatnonzero(np.isin(split.users, users))
        named = {"forget_users": [str(token) for token in split.token("user", users)], "evaluate": "none"}
    if keys:
        kept = requested(tmp_path, "kept", "live/model.pth", **named, **keys)
        assert moment_ranks(kept, rows, split) > 0.6
        assert set(users) <= set(unexplained(kept)) and same_squares(kept, before) == 1
    out = requested(tmp_path, "purged", "live/model.pth", **named, **keys, purge=True)
    assert moment_ranks(out, rows, split) == 0.5
    assert unexplained(out).size == 0 and same_squares(out, before) == 0
    for new, old in zip(squares(out), before.values(), strict=True):  # but of their size
        assert 0.3 < np.sqrt(new[1:]).mean() / old["exp_avg_sq"][1:].sqrt().mean() < 3
    with load(out / "unlearned.pth") as again:  # and it goes on being usable
        again.forget(count=2)


def test_weights_of_approximate_results_can_be_tried_and_those_of_exact_ones_not(case, guesses):
    """Which docs/production.md says: rows that a request leaves alone are the original's, to the last digit."""

    def tables(path):
        state = torch.load(path, weights_only=True)["state_dict"]
        return torch.cat([state[f"{kind}_embedding.weight"][1:] for kind in ("user", "item")])

    purged = {"forget_file": "request.tsv", "purge": True, "replay_rows": "touched"}
    touched = tables(requested(case.folder, "touched", "live/model.pth", **purged) / "unlearned.pth")
    originals = [tables(guess.path) for guess in guesses]
    assert singled_out([(each == touched).all(1).float().mean() for each in originals])
    exact = tables(case.default / "unlearned.pth")
    assert not any((each == exact).any() for each in originals)


def test_plain_checksums_tell_the_forgotten_and_keyed_ones_do_not(case, guesses, tmp_path):
    """Whoever has the old data and the seed forgets each candidate, and compares with the record."""
    (record, _) = audit.read(case.paired / "audit.jsonl").records
    with torch.no_grad():
        weights = torch.load(case.paired / "unlearned.pth", weights_only=True)["state_dict"]
    plain = audit.weights_checksum(weights)  # as records held it before
    tried, before = [], []
    for guess in guesses:
        trained = Checkpoint.written(guess.path, guess.config).trained(guess.split)
        before.append(audit.weights_checksum(trained.stored["state_dict"]))
        rows = [] if guess.missing is None else [guess.missing]
        way = Replay(rows="all", coupling="paired")
        tried.append(audit.weights_checksum(InfluenceUnlearner(trained, way).unlearn(rows).state_dict))
    assert [each == plain for each in tried] == [True] + [False] * DECOYS
    own = (case.folder / "paired/live/model.pth").exists()
    assert not own and len(set(before)) == len(before)  # of the original too, one checksum tells the candidate
    everything = "".join((case.paired / name).read_text() for name in ("audit.jsonl", "result.json", "report.html"))
    for checksum in (*tried, *before):
        digest = hashlib.sha256(checksum.encode()).hexdigest()
        assert checksum not in everything and digest not in everything
    assert record["after"]["weights"] not in tried


# -- our own


def test_the_originals_validation_score_is_not_left(case, guesses):
    """The best score of the original's training, to the last digit, singles the candidate out among few."""
    scores = [torch.load(guess.path, weights_only=True)["best_valid_score"] for guess in guesses]
    left = torch.load(case.default / "unlearned.pth", weights_only=True)
    kept = requested(case.folder, "kept", "live/model.pth", forget_file="request.tsv", coupling="fresh")
    unsafe = torch.load(kept / "unlearned.pth", weights_only=True)
    assert unsafe["best_valid_score"] == scores[0] and sum(score == scores[0] for score in scores) < len(scores) / 2
    assert left["best_valid_score"] == -np.inf and left["cur_step"] == 0


def agreeing_splits(guesses, out, seed=None):
    """For each candidate, whether the seed cuts the old file into the parts that are left."""
    left, found = out / "unlearned.triples/data/tiny", []
    tokens = {field: np.array(["", *each]) for field, each in json.loads((left / "tokens.json").read_text()).items()}
    with np.load(left / "arrays.npz") as kept:
        parts = {
            name: sorted(zip(*(tokens[field][kept[f"{name}/{field}"]] for field in FIELDS), strict=True))
            for name in ("valid", "test")
        }
    for guess in guesses:
        config = UnlearnConfig("BPR", "tiny", config_dict=options(str(guess.path.parent / "data"), **KEYS, seed=seed))
        split, same = Split.seeded(config), True
        for name in ("valid", "test"):
            data = getattr(split, name).dataset
            pairs = zip(*(data.id2token(field, data.inter_feat[field]) for field in FIELDS), strict=True)
            same &= sorted(map(tuple, pairs)) == parts[name]
        found.append(same)
    return found


def test_the_split_that_is_kept_tells_where_a_line_is_missing_to_who_knows_the_seed(case, guesses):
    """Which docs/production.md says: not mended, but by a seed that nobody knows, and that no file tells afterwards."""
    assert agreeing_splits(guesses, case.default, SEED)[0] and sum(agreeing_splits(guesses, case.default, SEED)) <= 4
    assert not any(agreeing_splits(guesses, case.default, SEED + 1))


UNKNOWN = 3_141_592_653  # a seed that is nobody's default


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "NeuMF", "SimpleX"])
def test_no_byte_of_what_is_left_tells_the_seed_that_the_data_were_cut_by(tmp_path, model):
    """With it, the attack before this one would name a few lines."""

    def holders():
        needles = [str(UNKNOWN).encode(), *(UNKNOWN.to_bytes(4, order) for order in ("little", "big"))]
        return {Path(name).parts[0] for name, content in contents(".") if any(each in content for each in needles)}

    with inside(tmp_path):
        write_dataset("data", "tiny", tiny_interactions())
        keys = options("data", **KEYS, seed=UNKNOWN, audit=None, forget_count=1, output_dir="live", evaluate="none")
        run_unlearn(model, "tiny", None, keys)
        shutil.rmtree("log")  # RecBole's: the operator's own
        assert holders() == {"live"}
        for left in ("unlearned.pth", "unlearned.triples", "result.json", "result.md", "report.html"):
            path = Path("live") / left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        purged = {"checkpoint": "live/model.pth", "purge": True, "purge_dataset": True, "evaluate": "none"}
        run_unlearn(config_dict={**purged, "forget_count": 4, "compare": "none", "output_dir": "out"})
        assert Path("log").is_dir() and holders() == set()
        with load("out/unlearned.pth") as opened:
            assert opened.guard.checked == "inherited" and opened.forget(count=2).training
        if model in ("BPR", "LightGCN"):
            assert verify("out/unlearned.pth") < 1e-4


def test_sizes_of_parts_tell_of_some_that_something_is_gone_without_a_seed(guesses):
    """Which docs/production.md says: a split by ratio cuts each user by a rule, which what is left may not fit."""
    split, shown = guesses[0].split, 0
    rule = split.train.dataset._calcu_split_ids
    held = [
        np.bincount(each.dataset.inter_feat["user_id"], minlength=split.n_users) for each in (split.valid, split.test)
    ]
    sizes = np.stack([np.bincount(split.users, minlength=split.n_users), *held], axis=1)

    def odd(sizes):
        ruled = [np.diff([0, *rule(tot=each.sum(), ratios=[0.8, 0.1, 0.1]), each.sum()]) for each in sizes]
        return [user for user, (parts, fit) in enumerate(zip(sizes, ruled, strict=True)) if (parts != fit).any()]

    assert odd(sizes) == []
    for user in np.flatnonzero(sizes[:, 0] > 1):
        left = sizes.copy()
        left[user, 0] -= 1
        assert odd(left) in ([], [user])
        shown += odd(left) == [user]
    assert 0 < shown < len(sizes) / 2


def candidates_by_checksum(guess, metadata):
    """Rows of the old training data without which a log's checksums are those of some metadata: plain ones."""
    split, found = guess.split, []
    kinds = [smallest_uint(metadata[key] - 1) for key in ("n_users", "n_items")]
    for row in range(split.n_rows):
        left = [np.delete(ids, row).astype(kind) for ids, kind in zip((split.users, split.items), kinds, strict=True)]
        checksums = {rows_checksum(*left), *(zlib.crc32(each.tobytes()) for each in left)}
        told = {metadata["fingerprint"]["rows"], metadata["crc32"]["users.npy"], metadata["crc32"]["items.npy"]}
        if len(checksums & told) > 1:
            found.append(row)
    return found


def test_checksums_tell_the_missing_row_only_of_a_log_without_a_salt(case, guesses, tmp_path):
    """To who has the old data and the metadata alone. Of who has the log itself nothing is hid: see the next test."""
    (first, *_), path = guesses, case.default / "unlearned.triples"
    log, training = TripleLog.open(path), json.loads((path / "metadata.json").read_text())
    fingerprint = first.split.fingerprint_without([first.missing])
    sizes = log.metadata["n_users"], log.metadata["n_items"], log.negatives
    plain = TripleLog.create(tmp_path / "plain", log.users, log.items, Training("plain", fingerprint, *sizes))
    assert first.missing in candidates_by_checksum(first, plain.metadata)
    assert candidates_by_checksum(first, training) == []
    for name in ("audit.jsonl", "result.json", "report.html"):
        content = (case.default / name).read_text()
        assert training["fingerprint"]["rows"] not in content and training["run_id"] not in content


def test_the_guards_checksum_of_the_weights_is_not_a_plain_one(case):
    """Of ``paired`` results, who has the old data could compute it for each candidate."""
    stored = torch.load(case.paired / "unlearned.pth", weights_only=True)["state_dict"]
    kept = json.loads((case.paired / "unlearned.triples/guard.json").read_text())
    assert audit.weights_checksum(stored) != kept["weights"]


def test_of_the_guards_distance_nothing_is_left_but_its_size(case, guesses):
    """To the last digit it is another for each candidate, as the validation score."""
    found = []
    for guess in guesses:
        unlearner = InfluenceUnlearner(Checkpoint.written(guess.path, guess.config).trained(guess.split))
        found.append(unlearner.check().distance)
    unsafe = requested(case.folder, "unpurged", "live/model.pth", forget_file="request.tsv", coupling="fresh")
    told = json.loads((unsafe / "result.json").read_text())["guard"]["distance"]
    assert [n for n, distance in enumerate(found) if distance == told] == [0]
    for name in ("result.json", "unlearned.triples/guard.json"):
        content = json.loads((case.default / name).read_text())
        kept = content.get("guard", content)["distance"]
        assert kept >= told and f"{kept:e}".startswith("1.000000e")
    assert f"{kept:.1e} of the training's way" in (case.default / "result.md").read_text()


def pairs_that_rank_so(out):
    """Pairs, that the attacker does not know, which rank in the new model as the result says that the forgotten do."""
    told = json.loads((out / "result.json").read_text())["models"]["unlearned"].get("forget_auc")
    with inside(out.parent), load("out/unlearned.pth") as opened:
        split, seen, found = opened.split, opened.split.seen(), set()
        P, Q = (opened.state_dict[f"{kind}_embedding.weight"].double().numpy() for kind in ("user", "item"))
        for user in np.unique(split.users):
            scores = Q @ P[user]
            for item in np.setdiff1d(np.arange(1, split.n_items), seen(user)):
                others = scores[np.setdiff1d(np.arange(1, split.n_items), [*seen(user), item])]
                if told is None or abs((others < scores[item]).mean() - told) < 1e-9:
                    found |= set(split.tokens(np.array([user]), np.array([item])))
    return found


def test_how_the_forgotten_ranks_in_the_new_model_is_not_left(case):
    """One interaction's percentile, which needs neither the seed nor old data: few pairs have it."""
    keys = {"forget_file": "request.tsv", "coupling": "fresh"}
    unsafe = pairs_that_rank_so(requested(case.folder, "figures", "live/model.pth", **keys))
    safe = pairs_that_rank_so(case.default)
    assert case.truth in unsafe and case.truth in safe and len(unsafe) < len(safe) / 10
    result = json.loads((case.default / "result.json").read_text())
    assert result["models"].keys() == {"unlearned"} and result["models"]["unlearned"].keys() == {"seconds"}
    assert not any(result[key] for key in ("rank_histogram", "geometry", "churn"))
    assert '"forget_auc": {}' in (case.default / "audit.jsonl").read_text()


TIMES = {"seconds", "setup_seconds", "time", "head", "previous"}  # and what follows from them
KEYED = {"before", "after"}  # nobody else has the key


@contextmanager
def same_numbers():
    """The operating system draws the same each time."""
    numbers = random.Random(8)

    def token_hex(n):
        return numbers.randbytes(n).hex()

    with replaced(secrets, randbits=numbers.getrandbits, token_bytes=numbers.randbytes, token_hex=token_hex):
        yield


def left_behind(folder):
    """All that a purge leaves in an output folder, by file, but for times and checksums by the operator's key."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if key not in TIMES | KEYED}
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, str):
            return re.sub(r"takes about \S+ s", "", value)
        return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value

    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix in (".npy", ".npz"):
            arrays = np.load(path)
            found[name] = plain(dict(arrays) if path.suffix == ".npz" else arrays)
        elif path.suffix == ".pth":
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [plain(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix not in (".html", ".md"):  # made of result.json
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "NeuMF"])
def test_two_originals_that_differ_in_what_is_forgotten_leave_the_same(tmp_path, model):
    """By the same numbers of the operating system: whatever is written, nothing of it follows from the forgotten."""
    rows = tiny_interactions()
    (user, _, time), place = rows[-1], len(rows) - 1
    had = {row[1] for row in rows if row[0] == user}
    found, distances = [], set()
    for n, item in enumerate(sorted({row[1] for row in rows[:place]} - had)[:2]):
        (tmp_path / "live").mkdir()  # of one name: checkpoints tell where their data lie
        with inside(tmp_path / "live") as folder:
            write_dataset("data", "tiny", [*rows[:place], (user, item, time), rows[place]])
            keys = options("data", **KEYS, audit=None, forget_count=1, output_dir="live", evaluate="none", seed=4)
            result = run_unlearn(model, "tiny", None, keys)
            distances.add(result["guard"]["distance"])
            Path("request.tsv").write_text(f"{user}\t{item}\n")
            purged = {"checkpoint": "live/model.pth", "purge": True, "purge_dataset": True, "compare": "none"}
            with same_numbers():
                run_unlearn(config_dict={**purged, "forget_file": "request.tsv", "output_dir": "out"})
            found.append(left_behind(folder / "out"))
            found[-1]["inter"] = Path("data/tiny/tiny.inter").read_bytes()
        (tmp_path / "live").rename(tmp_path / str(n))
    assert len(distances) == 2 or model == "NeuMF"
    first, second = found
    assert first.keys() == second.keys() and len(first) > 10
    assert [name for name in first if first[name] != second[name]] == []


def test_who_has_the_log_and_the_old_data_sees_what_is_missing(case, guesses):
    """Inherent: the log says what the model was trained on."""
    log, split = TripleLog.open(case.default / "unlearned.triples"), guesses[0].split
    left = set(zip(log.users.tolist(), log.items.tolist(), strict=True))
    rows = [
        n for n, pair in enumerate(zip(split.users.tolist(), split.items.tolist(), strict=True)) if pair not in left
    ]
    assert rows == [guesses[0].missing]
