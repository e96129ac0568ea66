"""The triple log on disk: it keeps what training drew, survives a kill, and refuses what is damaged."""

import itertools
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import paired, without

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage import triple_log
from recbole_unlearn.storage.triple_log import Training, TripleLog

PRINT = {"users": "a", "items": "b", "rows": "c"}


def anchors(rows, n_users, n_items, seed=0):
    rng = np.random.default_rng(seed)
    return np.sort(rng.integers(1, n_users, rows)), rng.integers(1, n_items, rows)


def make(path, epochs=3, rows=11, n_users=9, n_items=40, negatives=2, static=False, seed=0):
    """A log with random content, and what was put into it."""
    rng = np.random.default_rng(seed + 1)
    users, items = anchors(rows, n_users, n_items, seed)
    log = TripleLog.create(path, users, items, Training("run-1", PRINT, n_users, n_items, negatives, static, 2020))
    drawn = [rng.integers(1, n_items, (rows, negatives)) for _ in range(1 if static else epochs)]
    for epoch in range(epochs):
        log.append(drawn[0 if static else epoch])
    return log, users, items, drawn


def assert_kept_or_returned(new, old, users, items, keep):
    """Negatives ``new`` of the kept rows are the old ones, or items that their users forgot for good."""
    for at, row in enumerate(np.flatnonzero(keep)):
        own = users == users[row]
        back = set(items[own & ~keep].tolist()) - set(items[own & keep].tolist())
        changed = np.flatnonzero(new[at] != old[row])
        assert set(new[at][changed].tolist()) <= back


def edit_metadata(path, change):
    metadata = json.loads((path / "metadata.json").read_text())
    change(metadata)
    (path / "metadata.json").write_text(json.dumps(metadata))


def read_back(path):
    """All content of a log that opens and verifies."""
    log = TripleLog.open(path)
    log.verify()
    return log


def refusal(path):
    """The one-line message with which a damaged log is refused."""
    with pytest.raises(InputError) as refused:
        read_back(path)
    assert str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


# -- round trip


def test_a_reopened_log_holds_what_was_appended(tmp_path):
    _, users, items, drawn = make(tmp_path / "log")
    log = read_back(tmp_path / "log")
    assert (log.n_rows, log.n_epochs, log.negatives, log.run_id, log.static) == (11, 3, 2, "run-1", False)
    np.testing.assert_array_equal(log.users, users)
    np.testing.assert_array_equal(log.items, items)
    for epoch in range(3):
        np.testing.assert_array_equal(log.epoch(epoch), drawn[epoch])
    assert log.metadata["fingerprint"] == PRINT


def test_a_reopened_log_can_be_appended_to(tmp_path):
    _, _, _, drawn = make(tmp_path / "log", epochs=1)
    more = drawn[0] % 7 + 1
    TripleLog.open(tmp_path / "log").append(more)
    log = read_back(tmp_path / "log")
    assert log.n_epochs == 2
    np.testing.assert_array_equal(log.epoch(0), drawn[0])
    np.testing.assert_array_equal(log.epoch(1), more)


def test_gather_gives_the_negatives_of_rows_in_epochs(tmp_path):
    log, _, _, drawn = make(tmp_path / "log")
    rows = np.array([1, 4, 10])
    np.testing.assert_array_equal(log.gather(rows, [0, 2]), np.stack([drawn[0][rows], drawn[2][rows]]))
    assert log.gather(rows, np.arange(3)).shape == (3, 3, 2)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_truncate_keeps_the_first_epochs_only(tmp_path, kept):
    log, _, _, drawn = make(tmp_path / "log")
    log.truncate(kept)
    log = read_back(tmp_path / "log")
    assert log.n_epochs == kept
    assert len(list((tmp_path / "log").glob("epoch-*.npy"))) == kept
    for epoch in range(kept):
        np.testing.assert_array_equal(log.epoch(epoch), drawn[epoch])


def test_a_truncated_log_continues_at_the_next_epoch(tmp_path):
    log, _, _, drawn = make(tmp_path / "log")
    log.truncate(1)
    log.append(drawn[2])
    log = read_back(tmp_path / "log")
    assert log.n_epochs == 2
    np.testing.assert_array_equal(log.epoch(1), drawn[2])


def test_creating_a_log_over_an_older_one_leaves_none_of_its_epochs(tmp_path):
    make(tmp_path / "log", epochs=3)
    make(tmp_path / "log", epochs=1, seed=5)
    assert read_back(tmp_path / "log").n_epochs == 1
    assert len(list((tmp_path / "log").glob("epoch-*"))) == 1


@pytest.mark.parametrize(
    "largest, dtype",
    [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32"), (4294967295, "uint32")],
)
def test_columns_use_the_smallest_integer_type_that_holds_the_ids(tmp_path, largest, dtype):
    items = np.array([1, largest])
    log = TripleLog.create(tmp_path / "log", [1, 2], items, Training("r", PRINT, 3, largest + 1, 1))
    log.append([[largest], [1]])
    log = read_back(tmp_path / "log")
    assert log.items.dtype == log.epoch(0).dtype == np.dtype(dtype)
    assert log.users.dtype == np.uint8
    np.testing.assert_array_equal(log.items, items)
    np.testing.assert_array_equal(log.epoch(0).ravel(), [largest, 1])


def test_a_log_of_few_items_takes_one_byte_a_negative(tmp_path):
    _, users, items, _ = make(tmp_path / "log", epochs=1, rows=5000, negatives=4)
    assert (tmp_path / "log" / "epoch-00000.npy").stat().st_size <= 4 * 5000 + 128


def test_a_static_log_stores_its_negatives_once(tmp_path):
    _, _, _, drawn = make(tmp_path / "log", epochs=4, static=True)
    log = read_back(tmp_path / "log")
    assert log.n_epochs == 4
    assert len(list((tmp_path / "log").glob("epoch-*"))) == 1
    for epoch in range(4):
        np.testing.assert_array_equal(log.epoch(epoch), drawn[0])
    np.testing.assert_array_equal(log.gather([0, 3], [1, 2]), np.stack([drawn[0][[0, 3]]] * 2))


def test_a_truncated_static_log_keeps_its_one_file(tmp_path):
    log, _, _, drawn = make(tmp_path / "log", epochs=4, static=True)
    log.truncate(2)
    log = read_back(tmp_path / "log")
    assert log.n_epochs == 2
    np.testing.assert_array_equal(log.epoch(1), drawn[0])


@pytest.mark.parametrize("shape", [(10, 2), (11, 1), (11, 3), (22,)])
def test_append_refuses_an_epoch_of_another_shape(tmp_path, shape):
    log, *_ = make(tmp_path / "log", epochs=1)
    with pytest.raises(ValueError):
        log.append(np.ones(shape, int))
    assert read_back(tmp_path / "log").n_epochs == 1


def test_append_refuses_an_epoch_with_an_undrawn_negative(tmp_path):
    log, _, _, drawn = make(tmp_path / "log", epochs=1)
    drawn[0][5, 1] = 0
    with pytest.raises(ValueError):
        log.append(drawn[0])
    assert read_back(tmp_path / "log").n_epochs == 1


def test_anchors_that_are_not_grouped_by_user_are_refused(tmp_path):
    with pytest.raises(ValueError):
        TripleLog.create(tmp_path / "log", [2, 1], [1, 1], Training("r", PRINT, 3, 3, 1))


def test_nbytes_is_what_lies_on_disk(tmp_path):
    log, *_ = make(tmp_path / "log")
    assert log.nbytes == sum(file.stat().st_size for file in (tmp_path / "log").iterdir())


# -- weight snapshots


def weights(seed, users=9, items=40, size=3):
    rng = np.random.default_rng(seed)
    return {
        "user": rng.normal(size=(users, size)).astype("f4"),
        "item": rng.normal(size=(items, size)).astype("f4"),
    }


def flat(parameters):
    return np.concatenate([value.ravel() for value in parameters.values()]).astype(np.float16)


def test_snapshots_come_back_in_half_precision_but_for_the_start(tmp_path):
    log, *_ = make(tmp_path / "log")
    for n in (3, 0):
        log.add_snapshot(n, weights(n))
    log = read_back(tmp_path / "log")
    assert list(log.snapshots) == [0, 3]
    np.testing.assert_array_equal(log.snapshot(3), flat(weights(3)))
    start = np.concatenate([value.ravel() for value in weights(0).values()])
    assert log.snapshot(0).dtype == np.float32 and np.array_equal(log.snapshot(0), start)


def test_a_start_that_an_earlier_version_rounded_is_read(tmp_path):
    log, *_ = make(tmp_path / "log")
    log.add_snapshot(0, weights(0))
    file = tmp_path / "log" / "weights-00000.npy"
    np.save(file, np.load(file).astype(np.float16))
    log.metadata["crc32"][file.name] = triple_log.crc32(np.load(file))
    log.truncate(log.n_epochs)  # writes the metadata
    np.testing.assert_array_equal(read_back(tmp_path / "log").snapshot(0), flat(weights(0)))


def test_a_log_without_snapshots_opens(tmp_path):
    make(tmp_path / "log")
    assert list(read_back(tmp_path / "log").snapshots) == []


def test_snapshots_are_due_at_the_start_and_ever_rarer():
    due = [n for n in range(400) if triple_log.snapshot_due(n)]
    gaps = np.diff(due)
    assert due[0] == 0 and (gaps > 0).all() and (np.diff(gaps) >= 0).all()
    assert len(due) < 20 and max(b / a for a, b in zip(due[2:], due[3:], strict=False)) < 1.7


def test_truncate_drops_the_snapshots_of_the_dropped_epochs(tmp_path):
    log, *_ = make(tmp_path / "log")
    for n in range(4):
        log.add_snapshot(n, weights(n))
    log.truncate(2)
    log = read_back(tmp_path / "log")
    assert list(log.snapshots) == [0, 1, 2]
    assert len(list((tmp_path / "log").glob("weights-*"))) == 3


def test_creating_a_log_over_an_older_one_leaves_none_of_its_snapshots(tmp_path):
    make(tmp_path / "log")[0].add_snapshot(0, weights(0))
    make(tmp_path / "log")
    assert list(read_back(tmp_path / "log").snapshots) == []
    assert not list((tmp_path / "log").glob("weights-*"))


def test_without_keeps_no_snapshot_that_was_trained_on_the_forgotten_rows(tmp_path):
    log, *_ = make(tmp_path / "log")
    log.add_snapshot(0, weights(0))
    without(log, [1], tmp_path / "bare", "b", PRINT)
    assert list(read_back(tmp_path / "bare").snapshots) == []
    assert not list((tmp_path / "bare").glob("weights-*"))


def test_without_takes_the_snapshots_that_have_forgotten(tmp_path):
    log, *_ = make(tmp_path / "log")
    log.add_snapshot(0, weights(0))
    forgotten = flat(weights(8)).astype(np.float32)
    without(log, [1], tmp_path / "new", "n", PRINT, {0: forgotten, 2: forgotten * 2})
    new = read_back(tmp_path / "new")
    assert list(new.snapshots) == [0, 2]
    np.testing.assert_array_equal(new.snapshot(0), forgotten.astype(np.float16))
    np.testing.assert_array_equal(new.snapshot(2), (forgotten * 2).astype(np.float16))


# -- a killed run


def test_a_temporary_file_left_by_a_killed_run_is_not_seen(tmp_path):
    _, _, _, drawn = make(tmp_path / "log", epochs=2)
    (tmp_path / "log" / ".epoch-00002.npy.999.tmp").write_bytes(b"half")
    (tmp_path / "log" / ".metadata.json.999.tmp").write_bytes(b'{"n_epo')
    log = read_back(tmp_path / "log")
    assert log.n_epochs == 2
    np.testing.assert_array_equal(log.epoch(1), drawn[1])


@pytest.mark.parametrize("survived", [0, 1])
def test_a_run_killed_while_it_writes_leaves_the_last_complete_epoch(tmp_path, monkeypatch, survived):
    log, _, _, drawn = make(tmp_path / "log", epochs=2)
    calls, replace = [], os.replace

    def killed(*args):
        calls.append(args)
        if len(calls) > survived:  # 0: the epoch file never arrives; 1: it does, its metadata does not
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(triple_log.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.append(drawn[0] % 5 + 1)
    monkeypatch.undo()
    log = read_back(tmp_path / "log")
    assert log.n_epochs == 2
    log.append(drawn[1] % 3 + 1)
    np.testing.assert_array_equal(read_back(tmp_path / "log").epoch(2), drawn[1] % 3 + 1)


def test_a_run_killed_while_numpy_writes_leaves_the_last_complete_epoch(tmp_path, monkeypatch):
    log, _, _, drawn = make(tmp_path / "log", epochs=1)

    def killed(file, array, **_):
        file.write(b"\x93NUMPY half of an epoch")
        raise KeyboardInterrupt

    monkeypatch.setattr(triple_log.np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        log.append(drawn[0])
    monkeypatch.undo()
    assert read_back(tmp_path / "log").n_epochs == 1
    assert sorted(file.name for file in (tmp_path / "log").iterdir()) == [
        "epoch-00000.npy", "items.npy", "metadata.json", "users.npy",
    ]  # fmt: skip


# -- damage


def missing_metadata(path):
    (path / "metadata.json").unlink()


def truncated_metadata(path):
    content = (path / "metadata.json").read_bytes()
    (path / "metadata.json").write_bytes(content[: len(content) // 2])


def metadata_not_json(path):
    (path / "metadata.json").write_text("rows: 11\nnegatives: 2\n")


def metadata_not_text(path):
    (path / "metadata.json").write_bytes(bytes(range(128, 256)))


def metadata_a_list(path):
    (path / "metadata.json").write_text("[1, 2, 3]")


def metadata_deeply_nested(path):
    (path / "metadata.json").write_text("[" * 200_000)


def metadata_a_folder(path):
    (path / "metadata.json").unlink()
    (path / "metadata.json").mkdir()


def wrong_format(path):
    edit_metadata(path, lambda m: m.update(format="somebody else's log"))


def newer_version(path):
    edit_metadata(path, lambda m: m.update(version=m["version"] + 1))


def more_epochs_than_files(path):
    edit_metadata(path, lambda m: m.update(n_epochs=4))


def epochs_not_a_number(path):
    edit_metadata(path, lambda m: m.update(n_epochs="three"))


def negative_number_of_epochs(path):
    edit_metadata(path, lambda m: m.update(n_epochs=-1))


def other_number_of_rows(path):
    edit_metadata(path, lambda m: m.update(rows=12))


def unknown_dtype(path):
    edit_metadata(path, lambda m: m.update(negative_dtype="no such type"))


def object_dtype(path):
    edit_metadata(path, lambda m: m.update(negative_dtype="|O"))


def structured_dtype(path):
    edit_metadata(path, lambda m: m.update(negative_dtype={"names": ["a"], "formats": ["i4", "i4"]}))


def epoch_truncated(path):
    file = path / "epoch-00001.npy"
    file.write_bytes(file.read_bytes()[:-1])


def epoch_empty(path):
    (path / "epoch-00001.npy").write_bytes(b"")


def epoch_missing(path):
    (path / "epoch-00001.npy").unlink()


def users_missing(path):
    (path / "users.npy").unlink()


def epoch_of_wrong_shape(path):
    np.save(path / "epoch-00001.npy", np.ones((11, 3), np.uint8))


def epoch_of_wrong_dtype(path):
    np.save(path / "epoch-00001.npy", np.ones((11, 2), np.uint16))


def epoch_with_an_oversized_header(path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (11, 2), }" + b" " * 20_000 + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(22)
    (path / "epoch-00001.npy").write_bytes(data)


def flipped_byte(path):
    file = path / "epoch-00001.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def flipped_byte_in_the_users(path):
    content = bytearray((path / "users.npy").read_bytes())
    content[-1] ^= 1
    (path / "users.npy").write_bytes(content)


def epoch_of_another_epoch(path):
    shutil.copy(path / "epoch-00000.npy", path / "epoch-00001.npy")


def id_out_of_range(name, row):
    def corrupt(path, value):
        column = np.load(path / name)
        column[row] = value
        np.save(path / name, column)
        edit_metadata(path, lambda m: m["crc32"].update({name: triple_log.crc32(column)}))

    return corrupt


def item_too_large(path):
    id_out_of_range("epoch-00001.npy", (3, 1))(path, 40)


def padding_item(path):
    id_out_of_range("epoch-00001.npy", (3, 1))(path, 0)


def anchor_item_too_large(path):
    id_out_of_range("items.npy", 3)(path, 40)


def user_too_large(path):
    id_out_of_range("users.npy", 10)(path, 9)


def users_not_grouped(path):
    users = np.load(path / "users.npy")[::-1].copy()
    np.save(path / "users.npy", users)
    edit_metadata(path, lambda m: m["crc32"].update({"users.npy": triple_log.crc32(users)}))


def item_too_large_without_checksum(path):
    item_too_large(path)
    edit_metadata(path, lambda m: m["crc32"].pop("epoch-00001.npy"))


def pickled_object_array(path):
    array = np.empty((11, 2), object)
    np.save(path / "epoch-00001.npy", array, allow_pickle=True)


def file_outside_the_folder(path):
    np.save(path.parent / "outside.npy", np.ones(3, np.uint8))
    edit_metadata(path, lambda m: m["crc32"].update({"../outside.npy": triple_log.crc32(np.ones(3, np.uint8))}))


def absolute_file_name(path):
    np.save(path.parent / "outside.npy", np.ones(3, np.uint8))
    name = str(path.parent / "outside.npy")
    edit_metadata(path, lambda m: m["crc32"].update({name: triple_log.crc32(np.ones(3, np.uint8))}))


def with_snapshot(corrupt):
    """Damage to a log that holds a snapshot."""

    def corrupted(path):
        TripleLog.open(path).add_snapshot(0, weights(0))
        corrupt(path)

    corrupted.__name__ = corrupt.__name__
    return corrupted


@with_snapshot
def snapshot_missing(path):
    (path / "weights-00000.npy").unlink()


@with_snapshot
def snapshot_of_wrong_size(path):
    np.save(path / "weights-00000.npy", np.zeros(7, np.float16))


@with_snapshot
def snapshot_with_nan(path):
    column = np.load(path / "weights-00000.npy")
    column[4] = np.nan
    np.save(path / "weights-00000.npy", column)
    edit_metadata(path, lambda m: m["crc32"].update({"weights-00000.npy": triple_log.crc32(column)}))


@with_snapshot
def snapshot_flipped_byte(path):
    content = bytearray((path / "weights-00000.npy").read_bytes())
    content[-1] ^= 1
    (path / "weights-00000.npy").write_bytes(content)


@with_snapshot
def snapshot_without_checksum(path):
    edit_metadata(path, lambda m: m["crc32"].pop("weights-00000.npy"))
    np.save(path / "weights-00000.npy", np.full(9 * 3 + 40 * 3, np.nan, np.float16))


@with_snapshot
def snapshot_shapes_missing(path):
    edit_metadata(path, lambda m: m.update(parameters=None))


@with_snapshot
def snapshot_shapes_not_numbers(path):
    edit_metadata(path, lambda m: m.update(parameters=[["user", ["many", 3]]]))


def no_checksums(path):
    edit_metadata(path, lambda m: m.update(crc32=None))


CORRUPTIONS = [
    missing_metadata, truncated_metadata, metadata_not_json, metadata_not_text, metadata_a_list,
    metadata_deeply_nested, metadata_a_folder, wrong_format, newer_version, more_epochs_than_files,
    epochs_not_a_number, negative_number_of_epochs, other_number_of_rows, unknown_dtype, object_dtype,
    structured_dtype, epoch_truncated, epoch_empty, epoch_missing, users_missing, epoch_of_wrong_shape,
    epoch_of_wrong_dtype, epoch_with_an_oversized_header, flipped_byte, flipped_byte_in_the_users,
    epoch_of_another_epoch, item_too_large, padding_item, anchor_item_too_large, user_too_large,
    users_not_grouped, item_too_large_without_checksum, pickled_object_array, file_outside_the_folder,
    absolute_file_name, no_checksums, snapshot_missing, snapshot_of_wrong_size, snapshot_with_nan,
    snapshot_flipped_byte, snapshot_without_checksum, snapshot_shapes_missing, snapshot_shapes_not_numbers,
]  # fmt: skip


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_a_damaged_log_is_refused_in_one_line(tmp_path, corrupt):
    make(tmp_path / "log")
    corrupt(tmp_path / "log")
    assert "triple log" in refusal(tmp_path / "log")


METADATA_KEYS = [
    "format", "version", "run_id", "rows", "n_users", "n_items", "negatives", "static", "fingerprint",
    "user_dtype", "item_dtype", "negative_dtype", "n_epochs", "crc32", "snapshots", "parameters",
]  # fmt: skip


@pytest.mark.parametrize("key", METADATA_KEYS)
def test_metadata_without_one_of_its_keys_is_refused(tmp_path, key):
    make(tmp_path / "log")
    edit_metadata(tmp_path / "log", lambda m: m.pop(key))
    refusal(tmp_path / "log")


@pytest.mark.parametrize("file", ["metadata.json", "users.npy", "items.npy", "epoch-00000.npy"])
def test_no_single_changed_byte_crashes_reading_or_changes_a_column(tmp_path, file):
    _, users, items, drawn = make(tmp_path / "log", epochs=1)
    target = tmp_path / "log" / file
    content = target.read_bytes()
    refused = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        target.write_bytes(changed)
        try:
            log = read_back(tmp_path / "log")
        except InputError:
            refused += 1
            continue
        except Exception as error:
            pytest.fail(f"byte {position} of {file} changed: {error!r}")
        np.testing.assert_array_equal(log.users, users)
        np.testing.assert_array_equal(log.items, items)
        assert log.n_epochs == 0 or np.array_equal(log.epoch(0), drawn[0])
    assert refused > len(content) // 2


def test_a_pickle_in_place_of_a_column_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    make(tmp_path / "log")
    (tmp_path / "log" / "epoch-00001.npy").write_bytes(pickle.dumps(Hostile()))
    refusal(tmp_path / "log")
    assert not (tmp_path / "ran").exists()


def test_no_folder_is_refused(tmp_path):
    assert "train" in refusal(tmp_path / "nothing")


# -- without


def test_without_drops_the_rows_and_keeps_the_bytes_of_the_others(tmp_path):
    log, users, items, drawn = make(tmp_path / "log")
    forgotten = np.array([0, 4, 5, 10])
    keep = np.setdiff1d(np.arange(11), forgotten)
    without(log, forgotten, tmp_path / "new", "run-2", {**PRINT, "rows": "d"})
    new = read_back(tmp_path / "new")
    assert (new.n_rows, new.n_epochs, new.run_id) == (7, 3, "run-2")
    assert new.metadata["fingerprint"]["rows"] == triple_log.salted(new.salt, "d") != "d"
    assert np.asarray(new.users).tobytes() == np.asarray(log.users)[keep].tobytes()
    assert np.asarray(new.items).tobytes() == np.asarray(log.items)[keep].tobytes()
    for epoch in range(3):
        assert new.epoch(epoch).dtype == log.epoch(epoch).dtype
        assert_kept_or_returned(new.epoch(epoch), drawn[epoch], users, items, np.isin(np.arange(11), keep))


@pytest.mark.parametrize("content", [None, b"", b"x" * 31, b"x" * 32])
def test_a_salt_that_is_missing_or_another_is_refused(tmp_path, content):
    log, *_ = make(tmp_path / "log")
    without(log, [3], tmp_path / "new", "s", PRINT)
    (tmp_path / "new/salt").unlink()
    if content is not None:
        (tmp_path / "new/salt").write_bytes(content)
    refusal(tmp_path / "new")


@pytest.mark.parametrize("popularity", [None, np.array([9, 1, 2, 3, 4, 5, 6, 7.0])])
def test_forgotten_items_are_among_the_negatives_as_often_as_a_retrained_models_log_has_them(tmp_path, popularity):
    """User 1 keeps item 1 and forgets 2 and 3; the pool of retraining is then 2..7. User 2 forgets nothing.

    By popularity, 2 and 3 are then counted once less.
    """
    weight = np.ones(8) if popularity is None else popularity
    new_weight = weight if popularity is None else weight - np.isin(np.arange(8), [2, 3])
    users, items = np.array([1] * 202 + [2] * 100), np.array([2, 3, *[1] * 200, *[6] * 100])
    rng, epochs, m = np.random.default_rng(5), 20, 4
    log = TripleLog.create(tmp_path / "log", users, items, Training("r", PRINT, 3, 8, m))
    pool = np.arange(4, 8)  # what user 1 had not interacted with
    for _ in range(epochs):
        drawn = rng.choice(pool, (302, m), p=weight[pool] / weight[pool].sum())
        log.append(np.where(users[:, None] == 1, drawn, 4))
    without(log, [0, 1], tmp_path / "new", "s", PRINT, popularity=popularity)
    new = read_back(tmp_path / "new")
    negatives = np.stack([new.epoch(e) for e in range(epochs)])
    assert (negatives[:, 200:] == 4).all()
    n = epochs * 200 * m
    expected = new_weight[2:] / new_weight[2:].sum()
    found = np.bincount(negatives[:, :200].ravel(), minlength=8)[2:] / n
    np.testing.assert_allclose(found, expected, rtol=0, atol=5 * np.sqrt(expected * (1 - expected) / n).max())


def test_without_leaves_nothing_of_the_forgotten_rows(tmp_path):
    users, items = np.array([1, 1, 2, 7, 7]), np.array([3, 4, 3, 201, 202])
    log = TripleLog.create(tmp_path / "log", users, items, Training("r", PRINT, 9, 300, 1))
    log.append([[11], [12], [13], [214], [215]])
    log.append([[21], [22], [23], [224], [225]])
    without(log, [3, 4], tmp_path / "new", "s", PRINT)
    old = json.loads((tmp_path / "log" / "metadata.json").read_text())["crc32"]
    new = json.loads((tmp_path / "new" / "metadata.json").read_text())["crc32"]
    assert not set(old.values()) & set(new.values())  # a checksum of the old column would betray it
    for file in (tmp_path / "new").glob("*.npy"):
        assert np.load(file).max() < 200
    assert 7 not in np.load(tmp_path / "new" / "users.npy")
    steps = ["steps-00000.npy", "steps-00001.npy"]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(
        [*(file.name for file in (tmp_path / "log").iterdir()), *steps, "salt"]
    )


def test_without_leaves_the_log_it_came_from_alone(tmp_path):
    log, *_ = make(tmp_path / "log")
    before = {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()}
    without(log, [2], tmp_path / "new", "run-2", PRINT)
    assert {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()} == before


def test_without_of_a_static_log_is_static(tmp_path):
    log, users, items, drawn = make(tmp_path / "log", static=True)
    without(log, [2, 3], tmp_path / "new", "run-2", PRINT)
    new = read_back(tmp_path / "new")
    assert new.static and new.n_epochs == 3
    assert len(list((tmp_path / "new").glob("epoch-*"))) == 1
    assert_kept_or_returned(new.epoch(2), drawn[0], users, items, ~np.isin(np.arange(11), [2, 3]))


def test_an_interrupted_without_leaves_no_half_log(tmp_path):
    log, *_ = make(tmp_path / "log")

    def killed():
        yield from itertools.islice(paired(log, [1]), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log.without([1], tmp_path / "new", "run-2", PRINT, killed())
    assert {entry.name for entry in tmp_path.iterdir()} == {"log", "cwd"}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    n_items=st.sampled_from([2, 40, 256, 257, 70_000]),
    negatives=st.integers(1, 5),
    epochs=st.integers(1, 3),
    static=st.booleans(),
    share=st.floats(0, 1),
)
def test_any_log_and_any_part_of_it_come_back_as_written(seed, rows, n_items, negatives, epochs, static, share):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        shape = dict(epochs=epochs, rows=rows, n_items=n_items, negatives=negatives, static=static, seed=seed)
        _, users, items, drawn = make(path / "log", **shape)
        keep = np.random.default_rng(seed).random(rows) >= share
        keep[seed % rows] = True  # forgetting everything is refused before it comes to a log
        without(TripleLog.open(path / "log"), np.flatnonzero(~keep), path / "part", "p", PRINT)
        for name, kept in (("log", np.ones(rows, bool)), ("part", keep)):
            log = read_back(path / name)
            assert (log.n_rows, log.n_epochs) == (kept.sum(), epochs)
            np.testing.assert_array_equal(log.users, users[kept])
            np.testing.assert_array_equal(log.items, items[kept])
            for epoch in range(epochs):
                if static:
                    np.testing.assert_array_equal(log.epoch(epoch), drawn[0][kept])
                else:
                    assert_kept_or_returned(log.epoch(epoch), drawn[epoch], users, items, kept)
