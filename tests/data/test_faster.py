"""Data sets, samplers and loaders built without loops over single rows are stock RecBole's, column by column."""

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import recbole
import torch
from conftest import NAME, tiny_interactions
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

from recbole_unlearn.data import reading
from recbole_unlearn.data.dataset import Ragged, UsedItems, described, faster
from recbole_unlearn.data.split import eval_loader, pairwise_loader
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.testing import N_ITEMS, options, write_dataset

KG = ["head_id", "relation_id", "tail_id"]
LEAVE_ONE_OUT = {"order": "TO", "group_by": "user"}


@dataclass(frozen=True)
class Built:
    data: list
    loaders: list
    random: tuple
    said: list


@pytest.fixture(scope="module")
def messy_path(tmp_path_factory):
    """Repeated interactions, users with one to three, missing users and numbers, features with quotes and lists."""
    rng = np.random.default_rng(3)
    rows = tiny_interactions()
    rows += [rows[n] for n in rng.integers(0, len(rows), 60)]
    rows += [("once", "i3", 5), ("twice", "i3", 7), ("twice", "i4", 7), ("thrice", "i7", 9), ("thrice", "i12", 8)]
    rows += [("thrice", "i19", 8), ("", "i3", 1), ("u17", "", 1), ("NA", "i3", 2), ("007", "i3", 3)]
    path = write_dataset(tmp_path_factory.mktemp("messy"), NAME, rows)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\ttags:token_seq\tweights:float_seq"]
    for n, (user, item, time) in enumerate(rows):
        rating = "" if n % 17 == 0 else f"{1 + n % 5}{'.5' if n % 3 else ''}"
        lines.append(f"{user}\t{item}\t{rating}\t{time}\t{' '.join('abc'[: n % 4])}\t{' '.join(['0.5', '2'][: n % 3])}")
    folder = tmp_path_factory.getbasetemp() / path / NAME
    (folder / f"{NAME}.inter").write_text("\n".join(lines) + "\n")
    people = [f'u{17 + 3 * n}\t{n if n % 4 else ""}\t"a ""{n % 3}"""' for n in range(30)]
    (folder / f"{NAME}.user").write_text("user_id:token\tage:float\tname:token\n" + "\n".join(people) + "\n")
    graph = [f"e{n}\tr{n % 3}\te{(5 * n + 1) % N_ITEMS}" for n in range(N_ITEMS)]
    (folder / f"{NAME}.kg").write_text("head_id:token\trelation_id:token\ttail_id:token\n" + "\n".join(graph) + "\n")
    links = [f"i{n * n + 3}\te{n}" for n in range(0, N_ITEMS - 1, 2)]
    (folder / f"{NAME}.link").write_text("item_id:token\tentity_id:token\n" + "\n".join(links) + "\n")
    return path


def built(model, path, settings, quick, caplog):
    columns = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    config = UnlearnConfig(model, NAME, None, options(path, **columns | settings))
    caplog.clear()
    with caplog.at_level(logging.INFO), faster() if quick else _stock():
        init_seed(config["seed"], config["reproducibility"])
        data = create_dataset(config)
        loaders = data_preparation(config, data)
        loaders = [*loaders, *(eval_loader(config, x.dataset, x._sampler) for x in loaders[1:] if x._sampler)]
        return Built(
            [data, *(pairwise_loader(loader).dataset for loader in loaders[:3])],
            loaders,
            (np.random.random(), torch.rand(1).item()),
            [record.getMessage() for record in caplog.records],
        )


class _stock:
    """Of `eval_loader` too, which is quick of itself."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("recbole_unlearn.data.dataset.QUICK", {})

    def __exit__(self, *_):
        self.patch.undo()


def assert_same_interactions(ours, stock):
    assert ours.columns == stock.columns and len(ours) == len(stock)
    for name in stock.columns:
        assert ours[name].dtype == stock[name].dtype and torch.equal(ours[name], stock[name]), name


def assert_same_data(ours, stock):
    assert type(ours) is type(stock)
    for name in ("field2type", "field2source", "field2seqlen", "field2bucketnum", "field2token_id"):
        assert getattr(ours, name) == getattr(stock, name), name
    for field, tokens in stock.field2id_token.items():
        np.testing.assert_array_equal(ours.field2id_token[field], tokens)
    for feat in stock.feat_name_list:
        if isinstance(getattr(stock, feat), Interaction):
            assert_same_interactions(getattr(ours, feat), getattr(stock, feat))
    assert described(ours) == str(stock)


def plain(value):
    """What an attribute of a loader holds, whatever it holds it in."""
    if isinstance(value, (Ragged, np.ndarray)) and (isinstance(value, Ragged) or value.dtype == object):
        return [None if each is None else each if isinstance(each, slice) else sorted(each.tolist()) for each in value]
    return value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value


def assert_same_loader(ours, stock):
    assert type(ours) is type(stock) and len(ours) == len(stock)
    names = ["uid_list", "uid2items_num", "uid2index", "uid2positive_item", "uid2history_item", "sample_size", "step"]
    names += ["_batch_size", "times", "uid_field", "iid_field", "is_sequential", "neg_sample_args"]
    for name in names:
        assert hasattr(ours, name) == hasattr(stock, name), name
        assert plain(getattr(ours, name, None)) == plain(getattr(stock, name, None)), name
    if getattr(stock, "user_df", None) is not None:
        assert_same_interactions(ours.user_df, stock.user_df)


def assert_same_sampler(ours, stock):
    assert type(ours) is type(stock)
    if stock is not None:
        assert list(ours.used_ids) == list(stock.used_ids)
        users = np.arange(1, len(stock.used_ids))
        for each in (3, np.int64(4), users[::2], users.tolist(), torch.tensor([2, 5])):
            found = ours.used_ids[each], stock.used_ids[each]
            assert (found[0] == found[1]) if np.ndim(each) == 0 else list(found[0]) == list(found[1])


CASES = {
    "leave one out": ("BPR", {"eval_args": {"split": {"LS": "valid_and_test"}, **LEAVE_ONE_OUT}}),
    "leave one out, validation only": ("BPR", {"eval_args": {"split": {"LS": "valid_only"}, **LEAVE_ONE_OUT}}),
    "leave one out, test only": ("BPR", {"eval_args": {"split": {"LS": "test_only"}, **LEAVE_ONE_OUT}}),
    "ratio by user": ("BPR", {"eval_args": {"split": {"RS": [8, 1, 1]}, "group_by": "user", "order": "RO"}}),
    "ratio by user, uneven": ("BPR", {"eval_args": {"split": {"RS": [0.5, 0.2, 0.3]}, "group_by": "user"}}),
    "ratio, an empty part": ("BPR", {"eval_args": {"split": {"RS": [9, 0, 1]}, "group_by": "user"}}),
    "ratio of all": ("BPR", {"eval_args": {"split": {"RS": [8, 1, 1]}, "group_by": None, "order": "TO"}}),
    "in time": ("BPR", {"eval_args": {"split": {"TS": [8, 1, 1]}, **LEAVE_ONE_OUT}}),
    "sampled": ("BPR", {"eval_args": {"mode": {"valid": "uni20", "test": "uni99"}}}),
    "popular negatives": ("BPR", {"eval_args": {"mode": {"valid": "pop20", "test": "full"}}}),
    "popular training negatives": ("BPR", {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 2}}),
    "all columns": ("BPR", {"load_col": None}),
    "features": ("BPR", {"load_col": {"inter": "*", "user": "*", "item": "*"}, "normalize_all": True}),
    "filtered by number": ("BPR", {"user_inter_num_interval": "[3,inf)", "item_inter_num_interval": "[10,30]"}),
    "filtered by value": ("BPR", {"load_col": {"inter": "*"}, "val_interval": {"rating": "[2,inf)"}}),
    "without repetitions": ("BPR", {"rm_dup_inter": "last"}),
    "unused column": ("BPR", {"load_col": {"inter": "*"}, "unused_col": {"inter": ["rating", "tags"]}}),
    "repeatable": ("BPR", {"repeatable": True}),
    "graph": ("LightGCN", {}),
    "context": ("FM", {"load_col": {"inter": "*", "user": "*"}, "threshold": {"rating": 3}}),
    "sequential": ("GRU4Rec", {"loss_type": "BPR", "MAX_ITEM_LIST_LENGTH": 7, "eval_args": LEAVE_ONE_OUT}),
    "sequential, sampled": ("SASRec", {"loss_type": "BPR", "eval_args": {**LEAVE_ONE_OUT, "mode": "uni20"}}),
    "knowledge": ("CKE", {"load_col": {"inter": ["user_id", "item_id"], "kg": KG, "link": ["item_id", "entity_id"]}}),
    "autoencoder": ("MultiVAE", {"train_neg_sample_args": None}),
}
if recbole.__version__ == "1.2.0":
    del CASES["in time"]  # which it has not


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_built_data_are_stock_recboles(messy_path, case, caplog):
    model, settings = case
    ours, stock = (built(model, messy_path, settings, quick, caplog) for quick in (True, False))
    for pair in zip(ours.data, stock.data, strict=True):
        assert_same_data(*pair)
    for our, their in zip(ours.loaders, stock.loaders, strict=True):
        assert_same_loader(our, their)
        if not hasattr(their, "general_dataloader"):
            assert_same_sampler(our._sampler, their._sampler)
    assert ours.random == stock.random
    assert ours.said == stock.said


def test_what_loaders_give_is_stock_recboles(messy_path, caplog):
    """Batches drawn by RecBole's own code from our samplers and lists: the same but for the order within a history."""
    settings = {"eval_args": {"mode": {"valid": "uni20", "test": "full"}}, "eval_batch_size": 300}
    ours, stock = (built("BPR", messy_path, settings, quick, caplog) for quick in (True, False))
    for our, their in zip(ours.loaders, stock.loaders, strict=True):
        np.random.seed(1)
        batches = list(our)
        np.random.seed(1)
        expected = list(their)
        assert len(batches) == len(expected)
        for batch, stock_batch in zip(batches, expected, strict=True):
            if not isinstance(their, (FullSortEvalDataLoader, NegSampleEvalDataLoader)):
                assert_same_interactions(batch, stock_batch)
                continue
            assert_same_interactions(batch[0], stock_batch[0])
            if isinstance(their, NegSampleEvalDataLoader):
                assert all(map(torch.equal, batch[1:], stock_batch[1:]))
                continue
            for rows, expected_rows in zip((batch[1], batch[2:]), (stock_batch[1], stock_batch[2:]), strict=True):
                pairs = (sorted(zip(*(x.tolist() for x in each), strict=True)) for each in (rows, expected_rows))
                assert next(pairs) == next(pairs)


def test_the_quick_ways_are_taken(messy_path, caplog, monkeypatch):
    monkeypatch.setattr(reading, "stock", _only_c(reading.stock))
    monkeypatch.delattr(Dataset, "_get_illegal_ids_by_inter_num")
    quick = built("BPR", messy_path, {}, True, caplog)
    assert isinstance(quick.loaders[0]._sampler.used_ids, UsedItems)
    assert isinstance(quick.loaders[2].uid2history_item, Ragged)


def _only_c(read):
    def checked(*arguments, engine, **options):
        assert engine == "c"
        return read(*arguments, engine=engine, **options)

    return checked


def test_a_user_with_all_items_is_refused_as_recbole_does(tmp_path, caplog):
    rows = [("all", f"i{n}", n) for n in range(12)] + [(f"u{n}", f"i{n}", n) for n in range(12)]
    path = write_dataset(tmp_path, NAME, rows)
    said = []
    for quick in (True, False):
        with pytest.raises(ValueError, match="interacted with all items") as error:
            built("BPR", path, {}, quick, caplog)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", [object, str, "string", float])
def test_values_are_counted_as_by_pythons_counter(kind):
    column = pd.Series([2, 1, 2, 3, 2, 1], dtype=int).astype(kind)
    stock = Counter(column.values)
    with faster():
        ours, *none = (
            recbole.data.dataset.dataset.Counter(*each) for each in ([column.values], [], [column.values[:0]])
        )
    assert ours == stock and type(ours) is Counter and none == [Counter(), Counter()]
    assert [*map(type, ours)] == [*map(type, stock)] or kind is float


def test_the_count_of_missing_values_is_subtracted():
    """RecBole filters by number until nothing is left to drop: for ever, if a missing token's count stays."""
    column = pd.Series(["a", np.nan, "a"], dtype=object)
    with faster():
        count = recbole.data.dataset.dataset.Counter(column.values)
        count -= recbole.data.dataset.dataset.Counter(column[column.isin(set(count))].values)
    assert not count


def test_recbole_is_its_own_again_afterwards():
    before = Dataset._load_feat, Interaction.__getitem__, FullSortEvalDataLoader.__init__, dict(vars(Dataset))
    with pytest.raises(KeyError), faster(), faster():
        assert Dataset._load_feat is not before[0]
        raise KeyError
    assert before == (
        Dataset._load_feat, Interaction.__getitem__, FullSortEvalDataLoader.__init__, dict(vars(Dataset))
    )  # fmt: skip


def test_threads_share_it():
    """The first to leave does not take it from the others, and the last one takes it away."""
    stock = Dataset._load_feat
    first, second = faster(), faster()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Dataset._load_feat is not stock
    second.__exit__(None, None, None)
    assert Dataset._load_feat is stock


def test_rows_by_index():
    feat = Interaction({"a": torch.arange(10), "b": torch.rand(10, 3)})
    for index in (
        np.array([3, 1, 1, -1]), torch.tensor([2, 9]), np.array([], np.int64), range(2, 7), range(7, 2, -2), [1, 2],
        slice(2, 5), 4, np.arange(10) % 2 == 0, torch.arange(10) > 6, np.array(3),
        np.array([1, 2], np.uint8), torch.tensor([1, 0], dtype=torch.uint8), np.array([1, 2], np.int32),
    ):  # fmt: skip
        with faster():
            ours = feat[index]
        assert_same_interactions(ours, feat[index])
        if len(ours.a.shape):
            assert ours.a.data_ptr() != feat.a.data_ptr() or isinstance(index, slice)
