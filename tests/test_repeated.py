"""Interactions that a user and an item repeat, of which some are forgotten: a saved result tells which."""

import numpy as np
import pytest

import recbole_unlearn as ru
from recbole_unlearn.errors import InputError
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.verify import main as verify

DAY = 86_400
IN_ORDER = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": None, "mode": "full"}
MODELS = {"BPR": {}, "FPMC": {"eval_args": IN_ORDER}}
QUIET = {"state": "ERROR"}


@pytest.fixture
def repeated(tmp_path, make_options, write_data):
    """Function (name, seconds between the interactions of a user) -> folder of a model trained on repeated ones."""

    def train(name, apart=DAY, **keys):
        rng, items = np.random.default_rng(1), 8
        rows = [(f"u{u}", f"i{rng.integers(items)}", 1_000_000_000 + apart * k) for u in range(20) for k in range(12)]
        options = make_options(
            data_path=str(write_data(tmp_path / "data", "again", rows)), epochs=3, topk=[2], valid_metric="NDCG@2",
            load_col={"inter": ["user_id", "item_id", "timestamp"]}, evaluate="none", compare="none", forget_count=1,
            output_dir=str(tmp_path / "run"), **MODELS[name], **QUIET, **keys,
        )  # fmt: skip
        run_unlearn(name, "again", config_dict=options)
        return tmp_path / "run"

    return train


def earlier_of_repeated(split, number=8):
    """The first of several interactions of a user and an item, ``number`` times."""
    pairs = split.users * split.n_items + split.items
    values, first, counts = np.unique(pairs, return_index=True, return_counts=True)
    return np.sort(first[counts > 1])[:number]


def content(split):
    """Users, items and times of the rows, and histories where there are any."""
    data = split.train._dataset.inter_feat[split.data_row]
    lists = [data["item_id_list"].numpy()] if "item_id_list" in data.columns else []
    return [split.users, split.items, data["timestamp"].numpy(), *lists]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_is_told_from_what_is_gone(repeated, name):
    folder = repeated(name)
    with ru.load(folder / "model.pth", config_dict=QUIET) as unlearner:
        split = unlearner.split
        rows = earlier_of_repeated(split)
        unlearner.forget(rows=rows)
        rest = split.remaining_dataset(rows)
        unlearner.save(folder / "less.pth")
    with ru.load(folder / "less.pth", config_dict=QUIET) as unlearner:
        left = content(unlearner.split)
    expected = rest.inter_feat[split.positions_without(rows)[np.delete(np.arange(split.n_rows), rows)]]
    np.testing.assert_array_equal(left[2], expected["timestamp"].numpy())
    if name == "FPMC":
        np.testing.assert_array_equal(left[3], expected["item_id_list"].numpy())
        assert verify([str(folder / "less.pth")]) == 0
    assert (folder / "less.triples" / "marks.npy").exists()


def test_of_histories_what_cannot_be_told_is_refused_and_not_guessed(repeated):
    folder = repeated("FPMC", apart=0.001)  # of float32, as RecBole has times, all of a user are the same
    with ru.load(folder / "model.pth", config_dict=QUIET) as unlearner:
        unlearner.forget(rows=earlier_of_repeated(unlearner.split))
        unlearner.save(folder / "less.pth")
    with pytest.raises(InputError, match="tells which; train again, with their time in load_col, or set rm_dup_inter"):
        ru.load(folder / "less.pth", config_dict=QUIET)


def test_without_repeated_interactions_nothing_more_is_kept(finished):
    assert not list(finished[1].rglob("marks.npy"))
