"""Killed at every step of unlearn, save, record and purge: the next start finds the old state or the new one."""

import builtins
import errno
import json
import os
import resource
import shutil
import signal
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import lock_descriptor
from logs import without
from recbole.utils import init_seed

from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.reports import tables as reporting
from recbole_unlearn.runs import output
from recbole_unlearn.runs import run as run_module
from recbole_unlearn.runs.erasure import Erasure
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage import audit, checkpoints, files, purging
from recbole_unlearn.storage.files import locked, scratch_folder
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.training.trained import Checkpoint, same_weights
from recbole_unlearn.unlearner import InfluenceUnlearner

KILLED, FAILED = 9, 3
MODEL, UNLEARNED, INTER = Path("model.pth"), Path("out/unlearned.pth"), Path("data/tiny/tiny.inter")


@pytest.fixture(scope="module")
def scene(make_options, data_path, tmp_path_factory):
    """A folder with data and a trained model, and what it takes to unlearn from it without training anything."""
    start = tmp_path_factory.mktemp("scene")
    shutil.copytree(data_path, start / "data")
    before = os.getcwd()
    os.chdir(start)
    try:
        keys = {"data_path": "data", "epochs": 1, "compare": "none", "audit": None}
        result = run_unlearn("BPR", "tiny", None, make_options(**keys, forget_count=5, output_dir="trained"))
        for name in MODEL, MODEL.with_suffix(".triples"):
            os.rename(Path("trained") / name, name)
        shutil.rmtree("trained")
        keys |= {"checkpoint": "model.pth", "purge": True, "purge_dataset": True}
        config = UnlearnConfig("BPR", "tiny", config_dict=make_options(**keys))
        init_seed(config["seed"], config["reproducibility"])
        split = Split(config)
        rows = distinctive(split)[3::30]
        unlearned = InfluenceUnlearner(Checkpoint.written("model.pth", config).trained(split)).unlearn(rows)
    finally:
        os.chdir(before)
    result = json.loads(json.dumps({**result, "files": {"original": "model.pth", "unlearned": str(UNLEARNED)}}))
    return {"start": start, "config": config, "split": split, "rows": rows, "unlearned": unlearned, "result": result}


def distinctive(split):
    """Rows whose item token is not the beginning of another one, so that a search for it finds nothing else."""
    tokens = [str(token) for token in split.token("item", np.arange(split.n_items))]
    alone = [n for n, token in enumerate(tokens) if sum(other.startswith(token) for other in tokens) == 1]
    return np.flatnonzero(np.isin(split.items, alone))


def forget(scene, ready=lambda: None):
    """What run_unlearn does once the new weights are there; ``ready`` is called when nothing is written yet."""
    config, split, rows = scene["config"], scene["split"], scene["rows"]
    trained = Checkpoint.written(MODEL, config).trained(split)
    result = {**scene["result"], "files": dict(scene["result"]["files"]), "audit": {"request": "5" * 16}}
    ready()
    with ExitStack() as held:
        held.enter_context(locked(MODEL))
        erasure = Erasure(config, split, trained.stored, rows)
        folder = output.claim(held, UNLEARNED.parent)
        output.save_unlearned(UNLEARNED, trained, scene["unlearned"], rows, erasure.inter)
        reporting.write(result, folder)
        output.record(result, trained, scene["unlearned"], folder / "audit.jsonl")
        output.purge(result, config, MODEL, erasure, folder / "audit.jsonl")
        reporting.write(result, folder)


def strided(stride):
    """Killed at each so-many-th change of the disk, and where time does not matter at every one."""
    return pytest.mark.parametrize("stride", [stride, pytest.param(1, marks=pytest.mark.slow)])


class Dying:
    """Kills this process at the n-th change of the disk: before it, or, of a write, after half of it."""

    CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "truncate", "ftruncate")

    def __init__(self, n):
        self.left = n

    def start(self):
        os.fsync = lambda descriptor: None  # a killed process, unlike a power cut, loses nothing that was written
        for name in self.CALLS:
            setattr(os, name, self._wrap(getattr(os, name)))
        real = builtins.open

        def open_(file, mode="r", *args, **kwargs):
            opened = real(file, mode, *args, **kwargs)
            return HalfWritten(opened, self) if set(mode) & set("wax+") else opened

        builtins.open = open_

    def _wrap(self, real):
        def call(*args, **kwargs):
            if self.due():
                os._exit(KILLED)
            return real(*args, **kwargs)

        return call

    def due(self):
        self.left -= 1
        return self.left == 0


class HalfWritten:
    """A file whose first write counts as a change of the disk."""

    def __init__(self, file, dying):
        self.__dict__.update(file=file, dying=dying, first=True)

    def write(self, data):
        if self.first:
            self.first = False
            if self.dying.due():
                self.file.write(bytes(data)[: len(data) // 2])
                self.file.flush()
                os._exit(KILLED)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)


def forked(work):
    """Exit status of a child process that runs ``work``."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the parent's other threads are not here, and would be waited for
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def next_start():
    """What every run does first, with this checkpoint and this output folder."""
    purging.tidy(UNLEARNED.parent)
    for path in (MODEL, UNLEARNED):
        if path.parent.exists():
            with locked(path):
                purging.recover(path)


def forgotten_traces(root, scene):
    """Every place under ``root`` where a forgotten pair of user and item can be read."""
    split, rows = scene["split"], scene["rows"]
    pairs, found = split.pairs(rows), []
    ids = set(zip(split.users[rows].tolist(), split.items[rows].tolist(), strict=True))
    texts = [
        form.format(*pair) for pair in pairs for form in ("{}\t{}", "{},{}", '"{}", "{}"', "{} {}", "('{}', '{}')")
    ]
    needles = [text.encode(coding) for text in texts for coding in ("utf-8", "utf-16-le", "utf-32-le")]
    for file in (file for file in Path(root).rglob("*") if file.is_file()):
        content = file.read_bytes()
        found += [(str(file), needle) for needle in needles if needle in content]
        tables = []
        if file.name == "users.npy":
            tables = [(np.load(file), np.load(file.with_name("items.npy")))]
        elif file.suffix == ".npz":
            held = dict(np.load(file))
            names = [name.removesuffix("user_id") for name in held if name.endswith("user_id")]
            tables = [(held[f"{name}user_id"], held[f"{name}item_id"]) for name in names if f"{name}item_id" in held]
        for users, items in tables:
            found += [(str(file), pair) for pair in zip(users.tolist(), items.tolist(), strict=True) if pair in ids]
        if content[:4] == b"PK\x03\x04" and file.suffix != ".npz":
            found += [(str(file), name) for name in integer_tensors(torch.load(file, weights_only=True))]
    return found


def integer_tensors(value, name=""):
    """Names of the tensors in a checkpoint that could hold ids."""
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in integer_tensors(each, f"{name}.{key}")]
    if isinstance(value, (list, tuple)):
        return [found for n, each in enumerate(value) for found in integer_tensors(each, f"{name}.{n}")]
    return [name] if isinstance(value, torch.Tensor) and value.numel() > 1 and not value.is_floating_point() else []


def check(scene):
    """The invariants after the next start; returns which state it found."""
    start, rows = scene["start"], scene["rows"]
    hidden = [str(file) for file in Path(".").rglob(".*") if file.name != "."]
    assert hidden == []
    if Path("out/audit.jsonl").exists():
        records = audit.read("out/audit.jsonl").records
    else:
        records = []
    if UNLEARNED.exists():
        state, log = checkpoints.load(UNLEARNED)
        assert same_weights(state["state_dict"], scene["unlearned"].state_dict)
        assert log.n_rows == scene["split"].n_rows - len(rows)
        assert forgotten_traces("out", scene) == []
    else:
        assert not Path("out/unlearned.triples").exists() and records == []
    if MODEL.exists():
        state, _ = checkpoints.load(MODEL)
        assert same_weights(state["state_dict"], torch.load(start / MODEL, weights_only=True)["state_dict"])
        assert INTER.read_bytes() == (start / INTER).read_bytes()
        return "both" if UNLEARNED.exists() else "old"
    assert UNLEARNED.exists() and [record["event"] for record in records][:1] == ["unlearned"]
    assert forgotten_traces(".", scene) == []
    assert not Path("model.triples").exists()
    left = (start / INTER).read_text().splitlines()
    gone = {"\t".join(pair) for pair in scene["split"].pairs(rows)}
    assert INTER.read_text().splitlines() == [line for line in left if "\t".join(line.split("\t")[:2]) not in gone]
    return "new"


def fresh(scene, tmp_path):
    """An own copy of the scene as the current folder."""
    folder = tmp_path / "scene"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scene["start"], folder)
    for extra in ("log", "log_tensorboard"):
        shutil.rmtree(folder / extra, ignore_errors=True)
    os.chdir(folder)


def test_the_search_for_traces_finds_what_is_there(scene, tmp_path):
    fresh(scene, tmp_path)
    found = {Path(file).name for file, _ in forgotten_traces(".", scene)}
    assert found == {"tiny.inter", "users.npy"}
    user, item = scene["split"].pairs(scene["rows"])[0]
    Path("a.json").write_bytes(json.dumps([user, item]).encode("utf-16"))
    torch.save({"a": [torch.arange(4)]}, "a.pth")
    row = scene["rows"][0]
    np.savez("a.npz", **{"train/user_id": scene["split"].users[[row]], "train/item_id": scene["split"].items[[row]]})
    assert {"a.json", "a.pth", "a.npz"} <= {Path(file).name for file, _ in forgotten_traces(".", scene)}


@strided(3)
def test_killed_at_any_step_the_next_start_finds_the_old_state_or_the_new_one(scene, tmp_path, stride):
    found, n, status = [], 1 - stride, KILLED
    while status == KILLED:
        n += stride
        fresh(scene, tmp_path)
        status = forked(lambda n=n: forget(scene, Dying(n).start))
        assert status in (0, KILLED), f"failed instead of dying, at step {n}"
        next_start()
        found.append(check(scene))
        if found[-1] != "new" and len(found) % 8 == 0:  # the same request again, in a new folder, ends the job
            shutil.rmtree("out", ignore_errors=True)
            assert forked(lambda: forget(scene)) == 0
            assert check(scene) == "new"
    assert status == 0 and found[-1] == "new"
    assert found == sorted(found, key=["old", "both", "new"].index)  # never back
    assert {"old", "both", "new"} == set(found) and len(found) > 100 // stride


@strided(2)
def test_killed_while_finishing_a_purge_the_next_start_finishes_it(scene, tmp_path, stride):
    def stop(*_):
        os._exit(KILLED)

    n, status = 1 - stride, KILLED
    while status == KILLED:
        n += stride
        fresh(scene, tmp_path)

        def first():
            purging.inter_file.remove_pairs = stop
            forget(scene)

        def second(n=n):
            Dying(n).start()
            next_start()

        assert forked(first) == KILLED and purging.pending(MODEL)
        status = forked(second)
        assert status in (0, KILLED)
        next_start()
        assert check(scene) == "new"
    assert n > 20


def test_a_run_after_a_killed_purge_says_that_it_finished_it(scene, tmp_path, monkeypatch):
    fresh(scene, tmp_path)

    def dying():
        purging.remove = lambda *_: os._exit(KILLED)
        forget(scene)

    assert forked(dying) == KILLED
    with pytest.raises(InputError, match="purged.*finished"):
        run_unlearn(config_dict={"checkpoint": str(MODEL), "forget_count": 3, "output_dir": "again"})
    assert not Path("again").exists()
    purging.tidy("out")
    assert check(scene) == "new"


@pytest.mark.parametrize("name", ["out/unlearned.pth", "other.pth"])
def test_a_run_on_a_neighbour_finishes_a_killed_purge_too(scene, tmp_path, name):
    fresh(scene, tmp_path)
    shutil.copy(MODEL, "other.pth")
    shutil.copytree("model.triples", "other.triples")

    def dying():
        purging.remove = lambda *_: os._exit(KILLED)
        forget(scene)

    assert forked(dying) == KILLED
    if name.startswith("out"):
        os.rename(MODEL, "out/model.pth")
        os.rename("model.triples", "out/model.triples")
        os.rename(".model.pth.purge", "out/.model.pth.purge")
    with locked(name):
        purging.recover(name)
    assert not MODEL.exists() and not Path("out/model.pth").exists()
    assert not list(Path(".").rglob("model.triples")) and not list(Path(".").rglob("*.purge"))
    checkpoints.load(name)


@strided(2)
def test_a_checkpoint_replaced_in_place_is_the_old_or_the_new_one(scene, tmp_path, stride):
    """A checkpoint and its log are two; a reader must never find one of each."""
    old = torch.load(scene["start"] / MODEL, weights_only=True)
    new = {**old, "state_dict": scene["unlearned"].state_dict, "triple_log": {"run_id": "ab12", "epochs": 1}}

    def work(n):
        log = checkpoints.load(MODEL)[1]
        Dying(n).start()
        checkpoints.save_with_log(MODEL, new, lambda path: without(log, [3], path, "ab12", log.metadata["fingerprint"]))

    n, status, found = 1 - stride, KILLED, []
    while status == KILLED:
        n += stride
        fresh(scene, tmp_path)
        status = forked(lambda n=n: work(n))
        assert status in (0, KILLED)
        reader = checkpoints.load(MODEL)[0]["triple_log"]["run_id"]  # even before anybody tidied up
        with locked(MODEL):
            purging.recover(MODEL)
        state, log = checkpoints.load(MODEL)
        assert state["triple_log"]["run_id"] == reader == log.run_id
        assert same_weights(state["state_dict"], (new if reader == "ab12" else old)["state_dict"])
        assert sorted(file.name for file in Path(".").iterdir()) == ["data", "model.pth", "model.triples"]
        found.append(reader)
    assert found[0] == old["triple_log"]["run_id"] and found[-1] == "ab12" and len(set(found)) == 2


# -- full disks, folders that cannot be written


@contextmanager
def files_up_to(size):
    """No file can grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 500, 3000, 12000])
def test_a_full_disk_is_one_error_and_leaves_the_original_alone(scene, tmp_path, limit):
    """A limit on the size of files is what the kernel offers to stop writes half way."""
    fresh(scene, tmp_path)
    before = {file: file.read_bytes() for file in Path(".").rglob("*") if file.is_file()}

    keys = {"checkpoint": str(MODEL), "forget_count": 25, "output_dir": "out", "compare": "none", "purge": True}
    with files_up_to(limit), pytest.raises(InputError) as refused:
        run_unlearn(config_dict=keys)
    assert "\n" not in str(refused.value) and "out" in str(refused.value)
    for extra in ("log", "log_tensorboard"):
        shutil.rmtree(extra, ignore_errors=True)
    assert {file: file.read_bytes() for file in Path(".").rglob("*") if file.is_file()} == before
    assert not Path("out").exists()


def test_a_full_disk_in_training_leaves_no_half_log(make_options):
    with files_up_to(3000), pytest.raises(InputError):
        run_unlearn("BPR", "tiny", None, make_options(output_dir="out", forget_count=3))
    assert not Path("out").exists()


@pytest.mark.parametrize("key, value", [("output_dir", "/proc/out"), ("audit", "/proc/none/audit.jsonl")])
def test_a_folder_that_cannot_be_written_is_one_error(scene, tmp_path, key, value):
    fresh(scene, tmp_path)
    keys = {"checkpoint": str(MODEL), "forget_count": 3, "compare": "none", "output_dir": "out", key: value}
    with pytest.raises(InputError) as refused:
        run_unlearn(config_dict=keys)
    assert "\n" not in str(refused.value) and "/proc" in str(refused.value)
    assert not Path("out").exists() and checkpoints.load(MODEL)


def test_an_audit_file_that_cannot_be_extended_keeps_the_original(scene, tmp_path, monkeypatch):
    fresh(scene, tmp_path)

    def full(path, record):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(output.audit, "append", full)
    keys = {"checkpoint": str(MODEL), "forget_count": 3, "compare": "none", "output_dir": "out", "purge": True}
    with pytest.raises(InputError, match="No space"):
        run_unlearn(config_dict=keys)
    assert checkpoints.load(MODEL) and not UNLEARNED.exists()  # of which there would be no record


# -- concurrent processes


@pytest.fixture
def holder():
    """Function path -> pid of a process that holds its lock."""
    pids = []

    def hold(path):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with locked(path):
                os.write(writer, b"1")
                signal.pause()
        pids.append(pid)
        assert os.read(reader, 1) == b"1"
        return pid

    yield hold
    for pid in pids:
        kill(pid)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_a_checkpoint_in_use_is_refused_until_its_process_is_killed(scene, tmp_path, holder):
    fresh(scene, tmp_path)
    pid = holder(MODEL)
    keys = {"checkpoint": str(MODEL), "forget_count": 3, "compare": "none", "output_dir": "out"}
    with pytest.raises(InputError, match="another process") as refused:
        run_unlearn(config_dict=keys)
    assert "\n" not in str(refused.value) and not Path("out").exists()
    kill(pid)
    run_unlearn(config_dict=keys)
    assert not [file for file in Path(".").rglob(".*") if file.name.endswith(".lock")]


def test_a_checkpoint_is_locked_under_all_its_names(scene, tmp_path, holder):
    fresh(scene, tmp_path)
    holder(MODEL)
    os.symlink("model.pth", "link.pth")
    for name in ("link.pth", "./model.pth", Path("model.pth").absolute()):
        with pytest.raises(InputError, match="another process"), locked(name):
            pass


def test_other_checkpoints_in_the_folder_are_free(scene, tmp_path, holder):
    fresh(scene, tmp_path)
    holder(MODEL)
    with locked("other.pth"):
        pass


def test_an_output_folder_in_use_is_refused(scene, tmp_path, holder):
    fresh(scene, tmp_path)
    Path("out").mkdir()
    holder(UNLEARNED)
    with pytest.raises(InputError, match="another process"):
        run_unlearn(config_dict={"checkpoint": str(MODEL), "forget_count": 3, "compare": "none", "output_dir": "out"})


def test_in_a_read_only_folder_the_checkpoint_itself_is_locked(scene, tmp_path, holder, monkeypatch):
    fresh(scene, tmp_path)
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    holder(MODEL)
    with pytest.raises(InputError, match="another process"), locked(MODEL):
        pass


def test_where_the_file_system_has_no_locks_work_goes_on_without(tmp_path, monkeypatch):
    def refuse(descriptor, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock_descriptor", refuse)
    with locked(tmp_path / "a.pth"), locked(tmp_path / "a.pth"):
        pass


def test_where_open_files_cannot_be_deleted_the_lock_is_closed_first(tmp_path, monkeypatch):
    """As on Windows."""
    real, opened = Path.unlink, []

    def unlink(path, missing_ok=False):
        if any(os.path.samestat(os.fstat(each), path.stat()) for each in opened if is_open(each)):
            raise PermissionError(13, "used by another process", str(path))
        real(path, missing_ok)

    def lock(descriptor, blocking):
        opened.append(descriptor)
        return lock_descriptor(descriptor, blocking=blocking)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "lock_descriptor", lock)
    monkeypatch.setattr(Path, "unlink", unlink)
    with locked(tmp_path / "a.pth"):
        with pytest.raises(InputError, match="another process"), locked(tmp_path / "a.pth"):
            pass
        assert list(tmp_path.glob(".*"))
    assert len(opened) == 2 and not list(tmp_path.glob(".*"))


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_a_lock_is_never_held_twice_however_fast_it_changes_hands(tmp_path):
    """The lock file is deleted on release: an opener of the deleted file must not believe to hold it."""
    os.chdir(tmp_path)
    Path("inside").mkdir()

    def contend():
        taken = 0
        while taken < 100:
            try:
                with locked("a.pth"):
                    os.mkdir("inside/one")  # fails if another is inside
                    os.rmdir("inside/one")
                    taken += 1
            except InputError:
                continue

    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                contend()
            except BaseException:
                traceback.print_exc()
                os._exit(FAILED)
            os._exit(0)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert not list(Path(".").glob(".*"))


def test_what_is_half_built_is_swept_if_its_process_is_dead(tmp_path):
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for name in (f".a.pth.{dead}.tmp", f".a.pth.{os.getppid()}.tmp", "a.tmp", ".a.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / f".a.triples.{dead}.tmp").mkdir()
    (tmp_path / f".a.triples.{dead}.tmp" / "users.npy").write_text("x")
    old = tmp_path / f".b.pth.{os.getpid()}.tmp"  # of a process before us with our number
    old.write_text("x")
    os.utime(old, (1, 1))
    ours = tmp_path / f".c.pth.{os.getpid()}.tmp"
    ours.write_text("x")
    purging.tidy(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {f".a.pth.{os.getppid()}.tmp", "a.tmp", ".a.tmp", ours.name, "cwd"}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An own folder in the place of the system's temporary one."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_what_a_killed_run_without_files_left_is_swept_by_the_next(scene, tmp_path, temporary, monkeypatch):
    """Its temporary folder holds a model and a log with the rows that are to be forgotten."""

    def die(config, *_, **__):
        (Path(config["checkpoint_dir"]) / "model.pth").touch()
        os._exit(KILLED)

    fresh(scene, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "judge", die)
        keys = {"checkpoint": str(MODEL), "forget_count": 3, "compare": "none"}
        assert forked(lambda: run_unlearn(config_dict=keys, saved=False)) == KILLED
    (left,) = temporary.iterdir()
    assert left.stat().st_mode & 0o77 == 0 and (left / "model.pth").exists()
    with pytest.raises(InputError):
        run_unlearn(config_dict={"checkpoint": "none.pth"})
    assert not list(temporary.iterdir())


def test_temporary_folders_of_living_processes_and_of_others_stay(temporary):
    def die():
        with scratch_folder():
            os._exit(KILLED)

    assert forked(die) == KILLED
    (dead,) = temporary.iterdir()
    pid = dead.name.split(".")[-2]
    elsewhere = dead.name.replace(files.SCRATCH, ".recbole_unlearn.another-machine.")
    others = {f".editor.{pid}.tmp", elsewhere, dead.name.replace(pid, str(os.getppid()))}
    for name in others:
        (temporary / name).mkdir()
    with scratch_folder() as ours:
        files.sweep_scratch()
        assert {each.name for each in temporary.iterdir()} == others | {ours.name}
    assert not ours.exists()


def test_the_log_of_the_scene_is_that_of_the_checkpoint(scene):
    """The scene's own premise."""
    log = TripleLog.open(scene["start"] / "model.triples")
    assert log.n_rows == scene["split"].n_rows
