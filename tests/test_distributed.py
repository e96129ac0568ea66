"""Several gloo ranks do what one process does: the same training, the same log, the same weights after forgetting."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import inside, weights

import recbole_unlearn
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.testing import flat
from recbole_unlearn.training.trainer import BPRTrainer

PACKAGE = Path(recbole_unlearn.__file__).resolve().parent.parent
SIZES = (pytest.param(2, marks=pytest.mark.slow), 3)
SECONDS = 240  # until a test gives up ranks; a hang would be longer

# Each with all ranks on one checkpoint: (name of the checkpoint, keys).
CASES = {
    "replay": ("redrawn", {"method": "replay", "replay_rows": "touched"}),
    "replay of all rows": ("redrawn", {"method": "replay", "replay_rows": "all"}),
    "Gauss-Newton": ("redrawn", {"method": "influence"}),
    "few triples": (
        "redrawn",
        {"method": "influence", "curvature_triples": 900, "damping": "scalar", "damping_strength": 0.5},
    ),
    "Hessian": ("redrawn", {"method": "influence", "curvature": "hessian", "damping_strength": 3.0}),
    "one user": ("redrawn", {"method": "influence", "forget_count": None, "forget_core_users": 1}),
    "re-optimisation": ("static", {"method": "reoptimise", "reoptimise_tolerance": 1e-11}),
}
TRAINED = {
    "redrawn": {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3, "alpha": 1.0}},
    "static": {"negatives": "static", "weight_decay": 0.01, "epochs": 30, "train_batch_size": 10**4},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(rank, size, port):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": 1, "NUMBA_NUM_THREADS": 1}
    path = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **{key: str(value) for key, value in {**place, **threads}.items()}, "PYTHONPATH": path}


def start(commands, folders=None, missing=()):
    """Run one command a rank; returns [(exit status, stderr)]."""
    port, size = free_port(), len(commands)
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, command)],
            env=environment(rank, size, port),
            cwd=folders[rank] if folders else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
        if rank not in missing
    ]
    try:
        return [(each.communicate(timeout=SECONDS)[1], each.returncode)[::-1] for each in running]
    finally:
        for each in running:
            each.kill()


def work(size, job, folder):
    """Run a job of `rank_worker` on so many ranks, in ``folder``."""
    file = Path(folder) / "job.json"
    file.write_text(json.dumps(job))
    return start([[Path(__file__).parent / "rank_worker.py", file]] * size, [folder] * size)


def well(ended):
    assert [status for status, _ in ended] == [0] * len(ended), "\n".join(text for _, text in ended)


# -- unlearning


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_options):
    """Holds a trained model of each kind, and what one process makes of it, case by case. Read only."""
    with inside(tmp_path_factory.mktemp("ranks")) as place:
        for name, keys in TRAINED.items():
            run_unlearn("BPR", "tiny", None, make_options(compare="none", output_dir=str(place / name), **keys))
        for name in CASES:
            run_unlearn(config_dict=case(name, place, make_options, "1"))
    return place


def case(name, folder, make_options, output):
    checkpoint, keys = CASES[name]
    given = make_options(compare="none", forget_count=40, checkpoint=str(folder / checkpoint / "model.pth"))
    trained = TRAINED[checkpoint].keys() | {"epochs", "train_batch_size", "learning_rate", "embedding_size"}
    given = {key: value for key, value in given.items() if key not in trained}
    return {**given, "output_dir": str(folder / output / name), **keys}


@pytest.fixture(scope="module", params=SIZES)
def by_ranks(request, folder, make_options):
    """Folder of the cases' results by several ranks."""
    cases = [case(name, folder, make_options, str(request.param)) for name in CASES]
    well(work(request.param, {"what": "unlearn", "cases": cases}, folder))
    return folder / str(request.param)


@pytest.mark.parametrize("name", CASES)
def test_several_ranks_forget_as_one_process_does(name, folder, by_ranks):
    before = flat(weights(folder / CASES[name][0] / "model.pth"))
    alone, together = (flat(weights(where / name / "unlearned.pth")) for where in (folder / "1", by_ranks))
    change = (alone - before).norm()
    assert change > 1e-3 * before.norm()
    assert (together - alone).norm() <= 1e-5 * change
    if name.startswith("replay"):  # the same triples in the same order
        assert torch.equal(together, alone)


@pytest.mark.parametrize("name", CASES)
def test_several_ranks_report_what_one_process_reports(name, folder, by_ranks):
    alone, together = (
        json.loads((place / name / "result.json").read_text())["unlearning"] for place in (folder / "1", by_ranks)
    )
    assert together.pop("ranks") == int(by_ranks.name)
    assert together.pop("bytes_summed_a_rank") >= 0
    assert together.keys() == alone.keys()
    for key in ("iterations", "products", "converged", "triples_replayed", "rows_replayed", "curvature_triples"):
        assert together.get(key) == alone.get(key)


def test_only_sums_over_items_move(folder, by_ranks):
    """For a Gauss-Newton step: a sum for z, one a product, K for the preconditioner, and the step itself at the end."""
    found = json.loads((by_ranks / "Gauss-Newton" / "result.json").read_text())["unlearning"]
    log, K = TripleLog.open(folder / "redrawn" / "model.triples"), 8
    item_part, whole = 8 * K * log.metadata["n_items"], 8 * K * (log.metadata["n_items"] + log.metadata["n_users"])
    expected = item_part * (1 + found["iterations"] + K) + whole
    scalars = 8 * (4 * found["iterations"] + 8)
    assert expected <= found["bytes_summed_a_rank"] <= expected + scalars


def test_only_rank_0_writes(folder, by_ranks):
    for name in CASES:
        assert {entry.name for entry in (by_ranks / name).iterdir()} == {
            entry.name for entry in (folder / "1" / name).iterdir()
        }


# -- training

EARS = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3, "alpha": 1.0}}
FEATURES = {"load_col": {"inter": ["user_id", "item_id"], "item": ["item_id", "class"]}}


def trainings(n_rows):
    """Keys of the trainings; one has a last batch of a single row, of which all ranks but one get nothing."""
    step = max(step for step in range(2, 200) if n_rows % step == 1)
    return {
        "uneven": EARS,
        "drawn": {**EARS, "log_negatives": "drawn"},
        "single": {
            "train_batch_size": step,
            "train_neg_sample_args": {**EARS["train_neg_sample_args"], "sample_num": 1},
        },
        "static": {"negatives": "static", "weight_decay": 0.01},
        "features": {**FEATURES, **EARS},
        "sampled": {
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "RO", "group_by": "user", "mode": "uni20"},
        },
    }


@pytest.fixture(scope="module", params=SIZES)
def trained(request, tmp_path_factory, make_options, split):
    """(number of ranks, folder of what each rank noted)."""
    cases = {name: make_options(epochs=3, **keys) for name, keys in trainings(split.n_rows).items()}
    place = tmp_path_factory.mktemp("trained")
    well(work(request.param, {"what": "train", "cases": cases}, place))
    return request.param, place


NAMES = ("uneven", "drawn", "single", "static", "features", "sampled")


def noted(trained, name):
    size, folder = trained
    return [np.load(folder / f"{name}-{rank}.npz") for rank in range(size)]


def ordered(triples):
    return triples[np.lexsort(triples.T[::-1])]


@pytest.mark.parametrize("name", NAMES)
def test_the_log_holds_what_the_ranks_trained_on(name, trained, make_split, split):
    ranks = noted(trained, name)
    log = TripleLog.open(str(ranks[0]["log"]))
    log.verify()
    assert all((entry is not None) == (name == "drawn") for entry in log.drawn)  # stored, or drawn again
    make_split(epochs=3, **trainings(split.n_rows)[name]).draws(log)
    assert log.n_epochs == 3
    assert not any("log" in rank for rank in ranks[1:])
    for epoch in range(log.n_epochs):
        shares = [rank[f"epoch{epoch}"] for rank in ranks]
        logged = np.column_stack([log.users, log.items, log.epoch(epoch)]).astype(np.int64)
        np.testing.assert_array_equal(ordered(np.concatenate(shares)), ordered(logged))
        sizes = [len(share) for share in shares]
        assert min(sizes) > 0 and sum(sizes) == log.n_rows  # every row once


@pytest.mark.parametrize("name", NAMES)
def test_ranks_train_as_one_process_does(name, trained, make_split, make_model, split):
    keys = trainings(split.n_rows)[name]
    alone = make_split(epochs=3, **keys)
    model = make_model(alone)
    trainer = BPRTrainer(alone.config, model)
    best = trainer.fit(alone.train, alone.valid, verbose=False)[0]
    ranks = noted(trained, name)
    log = TripleLog.open(str(ranks[0]["log"]))
    alone.draws(log)
    for epoch in range(3):
        np.testing.assert_array_equal(log.epoch(epoch), trainer.triple_log.epoch(epoch))
    for key, value in model.state_dict().items():
        for rank in ranks:
            np.testing.assert_array_equal(rank[key], ranks[0][key])
        off = np.linalg.norm(ranks[0][key] - value.numpy())
        assert off <= 1e-5 * np.linalg.norm(value.numpy())
    np.testing.assert_allclose(ranks[0]["losses"], list(trainer.train_loss_dict.values()), rtol=1e-5)
    assert all(float(rank["best"]) == best for rank in ranks)


# -- what goes wrong


def one_voice(ended, *words):
    """Exactly one rank has said one line, and all have ended with status 2."""
    assert [status for status, _ in ended] == [2] * len(ended), "\n".join(text for _, text in ended)
    lines = [line for _, text in ended for line in text.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines


def command_line(options, **keys):
    given = {key: value for key, value in {**options, **keys}.items() if value != ""}
    return [PACKAGE / "run_unlearn.py", "--dataset=tiny", *(f"--{key}={value}" for key, value in given.items())]


def test_bad_input_ends_all_ranks_with_one_line(make_options, tmp_path):
    command = command_line(make_options(forget_users="['nobody']", output_dir=tmp_path / "out"))
    one_voice(start([command] * 2), "nobody")
    assert not (tmp_path / "out").exists()


def test_a_rank_with_other_data_ends_all_ranks_with_one_line(make_options, tmp_path, write_data, interactions):
    for place, rows in (("a", interactions), ("b", interactions[:-40])):
        write_data(tmp_path / place / "data", "tiny", rows)
    command = command_line(make_options(data_path="data", forget_count=5, output_dir=tmp_path / "out"))
    one_voice(start([command] * 2, [tmp_path / "a", tmp_path / "b"]), "rank 1", "same data")
    assert not list(tmp_path.rglob("*.pth"))


def test_a_rank_that_dies_ends_the_others(make_options, tmp_path):
    cases = {"dying": make_options()}
    ended = work(3, {"what": "train", "cases": cases, "die": True}, tmp_path)
    assert ended[1][0] == 9
    others = [text for rank, (_, text) in enumerate(ended) if rank != 1]
    assert all(status == 1 for rank, (status, _) in enumerate(ended) if rank != 1)  # rank_worker has no main of ours
    lost = ["lost contact with another rank" in text for text in others]
    told = ["OtherRankFailed" in text for text in others]
    # who notices first tells the other, who may have noticed by then
    assert any(lost) and all(each ^ other for each, other in zip(lost, told, strict=True))


def test_a_rank_that_never_comes_is_given_up(make_options, tmp_path):
    command = command_line(make_options(forget_count=5, rank_timeout=3, output_dir=tmp_path / "out"))
    one_voice(start([command] * 2, missing={1}), "did not meet")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"nproc": 0}, "nproc must be"),
        ({"nproc": 2.5}, "nproc must be"),
        ({"nproc": 3, "world_size": 2}, "world_size 2 is too small"),
        ({"nproc": 1, "world_size": 2, "offset": 2}, "world_size 2 is too small"),
        ({"nproc": 2, "port": "http"}, "port must be"),
        ({"nproc": 2, "rank_timeout": 0}, "rank_timeout must be"),
    ],
)
def test_senseless_places_are_refused(keys, words, make_options):
    with pytest.raises(recbole_unlearn.InputError, match=words):
        run_unlearn("BPR", "tiny", None, make_options(forget_count=5, **keys))


def test_fidelity_is_refused(make_options, tmp_path):
    command = command_line(make_options(forget_count=5, evaluate="fidelity", output_dir=tmp_path / "out"))
    one_voice(start([command] * 2), "fidelity")


# -- from the command line


def test_nproc_starts_the_other_ranks(folder, make_options, tmp_path):
    """RecBole's keys, with a stream of requests: two in a row, on one open unlearner."""
    tokens = [
        line.split("\t")[:2] for line in Path(make_options()["data_path"], "tiny/tiny.inter").read_text().split("\n")
    ]
    (tmp_path / "requests.csv").write_text("user,item\n" + "\n".join(f"{tokens[n][0]}," for n in (5, 300)) + "\n")
    given = make_options(compare="none", forget_requests=str(tmp_path / "requests.csv"))
    results = {}
    for name, more in (("one", {}), ("two", {"nproc": 2, "port": free_port()})):
        results[name] = run_unlearn(
            "BPR", "tiny", None, {**given, **more, "method": "influence", "output_dir": str(tmp_path / name)}
        )
    assert len(results["two"]["stream"]["batches"]) == 2
    one, two = (flat(weights(tmp_path / name / "unlearned.pth")) for name in ("one", "two"))
    assert (one - two).norm() <= 1e-5 * one.norm()


@pytest.mark.slow
def test_torchrun_on_ml_100k(tmp_path):
    def run(name, *launcher):
        keys = ("--epochs=2", f"--output_dir={name}", "--show_progress=False", "--state=WARNING")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE)}
        command = [sys.executable, *launcher, str(PACKAGE / "run_unlearn.py"), *keys]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "result.json").read_text())

    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    one, two = run("one"), run("two", *launcher)
    assert two["unlearning"]["ranks"] == 2
    for name in ("model", "unlearned", "retrained"):
        first, second = (flat(weights(tmp_path / folder / f"{name}.pth")) for folder in ("one", "two"))
        assert (first - second).norm() <= 1e-5 * first.norm()
    for model, figures in one["models"].items():
        assert two["models"][model]["forget_auc"] == pytest.approx(figures["forget_auc"], abs=1e-4)
