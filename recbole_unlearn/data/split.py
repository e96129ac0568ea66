"""One frozen split of a RecBole data set, and what remains of it without a forget set."""

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import (
    FullSortEvalDataLoader,
    KnowledgeBasedDataLoader,
    NegSampleEvalDataLoader,
    TrainDataLoader,
)
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction, cat_interactions
from recbole.data.utils import create_samplers, get_dataloader
from recbole.sampler import KGSampler, RepeatableSampler, Sampler
from recbole.sampler.sampler import AbstractSampler
from recbole.utils import ModelType, init_seed

from recbole_unlearn.compat.recbole_models import runs_recboles
from recbole_unlearn.data.dataset import faster
from recbole_unlearn.data.fingerprint import (
    HELD_OUT,
    HELD_OUT_ROWS,
    by_user,
    fingerprint,
    marks,
    rows_checksum,
    surroundings,
    told,
)
from recbole_unlearn.data.forget import spammers
from recbole_unlearn.data.frozen_data import frozen_dataset, is_frozen
from recbole_unlearn.data.histories import history_columns
from recbole_unlearn.data.knowledge import KEY, LinkedDataset, drop_facts
from recbole_unlearn.data.sampling import DrawnAgain
from recbole_unlearn.data.scaling import Limits, check_scaled, limits, rescale, scaled, value
from recbole_unlearn.data.spam import draw_spam
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.recorded import marked
from recbole_unlearn.settings.config import changed
from recbole_unlearn.storage.files import check_regular, scratch_folder
from recbole_unlearn.storage.triple_log import TripleLog, salted

EvalLoader: TypeAlias = FullSortEvalDataLoader | NegSampleEvalDataLoader


def eval_loader(config: Config, dataset: Dataset, sampler: AbstractSampler, sampled: int = 0) -> EvalLoader:
    """A RecBole evaluation loader: full ranking, or ``sampled`` uniform negatives a positive.

    Either way a batch holds at most ``eval_batch_size`` scores (RecBole's own rule would give one user a batch in
    full ranking, and ``users x items`` scores without limit in sampled ranking). The metrics do not depend on it.
    """
    config = changed(config, single_spec=True)  # else every rank would get a part, padded with users that count twice
    if not sampled:
        with faster():
            return FullSortEvalDataLoader(config, dataset, sampler, shuffle=False)
    config[f"{sampler.phase}_neg_sample_args"] = {"distribution": "uniform", "sample_num": sampled}
    users = max(config["eval_batch_size"] // dataset.item_num, 1)
    config["eval_batch_size"] = users * (1 + sampled)
    with faster():
        return NegSampleEvalDataLoader(config, dataset, sampler, shuffle=False)


def pairwise_loader(loader: TrainDataLoader | KnowledgeBasedDataLoader) -> TrainDataLoader:
    """The loader of users, items and negatives: of knowledge-aware models' two the first, else the one there is."""
    return getattr(loader, "general_dataloader", loader)


def batch_rows(loader: TrainDataLoader) -> int:
    """Rows of a full training batch, of all ranks: no more than there are, whatever ``train_batch_size`` would hold."""
    return max(min(loader.config["train_batch_size"] // loader.times, len(loader._dataset)), 1)


def rebuild_histories(part: SequentialDataset, data: SequentialDataset, rows: np.ndarray, gone: np.ndarray) -> None:
    """Take from histories what is gone, in place.

    RecBole writes histories into the rows (``item_id_list`` and the like) before it splits the data. A user's
    sequence is the history of the first row, and then the rows' own items; of what has no column of its own, the ends
    of the histories of the rows after them. A history is the end of what is before its row: only rows that follow
    something gone that closely have another.

    Args:
        part: RecBole sequential data set that holds some rows of another, in tensors of its own.
        data: the other one.
        rows: which these are.
        gone: which rows of ``data`` are gone, bool array.
    """
    columns, whole, limit = part.inter_feat.interaction, data.inter_feat, data.max_item_list_len
    histories, lengths = history_columns(data), data.item_list_length_field
    place = np.full(len(whole), -1)
    place[rows] = np.arange(len(rows))
    owner = whole[data.uid_field].numpy()
    by_user = np.argsort(owner, kind="stable")
    touched = np.unique(owner[gone])
    begins, stops = (np.searchsorted(owner[by_user], touched, side) for side in ("left", "right"))
    for begin, stop in zip(begins, stops, strict=True):
        own = by_user[begin:stop]
        prefix, kept, ends = int(whole[lengths][own[0]]), ~gone[own], whole[lengths][own[1:]] - 1
        sequences = {}
        for name, field in histories.items():
            # the last of all is in no history
            each = whole[name][own] if name in columns else whole[field][torch.from_numpy(own[1:]), ends]
            sequences[field] = torch.cat([whole[field][own[0], :prefix], each[kept[: len(each)]]])
        ends = prefix + np.cumsum(kept) - kept  # items before each row that are not gone
        before = np.concatenate([[0], np.cumsum(~kept)])
        other = np.flatnonzero(before[:-1] > before[np.maximum(np.arange(len(own)) - limit, 0)])
        places = place[own[other]]
        here, ends = torch.from_numpy(places[places >= 0]), torch.from_numpy(ends[other[places >= 0]])
        starts = (ends - limit).clamp(min=0)
        columns[lengths][here] = (ends - starts).to(columns[lengths].dtype)
        for field, sequence in sequences.items():
            at = torch.arange(columns[field].shape[1]) + starts[:, None]
            padded = torch.cat([torch.zeros_like(sequence[:1]), sequence])
            columns[field][here] = padded[torch.where(at < ends[:, None], at + 1, 0)]


class Split:
    """Training, validation and test data of one run, built once and kept.

    Attributes:
        train, valid, test: RecBole loaders.
        users, items: training interactions, int64 ``[rows]``, grouped by user as in the triple log.
        data_row: row in RecBole's training data set of each of these, int64 ``[rows]``.
        spam: rows that ``forget_spam`` added to the training data, int64; they come last of their user.
        n_users, n_items: sizes of the id spaces, padding id 0 included.
        tables: of users and items, by attribute of a data set, that what remains has instead of those that were read.
        unlinked: ids of entities of which what remains (`remaining`, `remaining_dataset`) has no facts, int64.
        stale: whether the model was trained on what goes with these lines and facts.
        lacked: columns of the training interactions that are in the data as read and that the model's log lacks.
        earlier: users and items, ids, of those that were forgotten before.
        doubtful: how many interactions the model lacks of which nobody can tell whether they were forgotten or are new.
    """

    tables: Mapping[str, Interaction] = {}
    unlinked: np.ndarray = np.empty(0, np.int64)
    stale: bool = False
    lacked: Mapping[str, torch.Tensor] = {}
    earlier: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty(0, np.int64))
    doubtful: int = 0

    @faster()
    def __init__(self, config: Config) -> None:
        self.config = config
        with scratch_folder() as empty:
            # RecBole unpickles data set and loader caches that it finds in checkpoint_dir: show it an empty one
            changed = {"checkpoint_dir": str(empty), "dataset_save_path": None, "dataloaders_save_path": None}
            changed |= {"save_dataset": False, "save_dataloaders": False}
            kept = {key: config[key] for key in changed}
            config.final_config_dict.update(changed)
            try:
                for file in filter(Path.exists, Path(config["data_path"]).glob(f"{config['dataset']}.*")):
                    check_regular(file)  # RecBole would wait for a pipe for ever
                own = frozen_dataset if is_frozen(config) else LinkedDataset if KEY in config else create_dataset
                dataset = own(config)
                for field, vectors in dataset._preloaded_weight.items():  # float64, which KSR cannot multiply
                    dataset._preloaded_weight[field] = vectors.astype(np.float32)
                self.train, valid, test = data_preparation(config, dataset)
            except InputError:
                raise
            except Exception as error:  # RecBole raises anything from KeyError to zipfile errors here
                raise InputError(
                    f"cannot load data set {config['dataset']!r} from {config['data_path']}: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}; check dataset and data_path"
                ) from error
            finally:
                config.final_config_dict.update(kept)
        self._take(valid, test)
        if spam := spammers(config):
            accounts, promoted = spam
            self._add(*draw_spam(self, accounts, promoted, config["forget_seed"]))
            self.fingerprint = fingerprint(pairwise_loader(self.train))

    @classmethod
    def seeded(cls, config, log=None):
        """The data as the configuration's seed splits them, without what a log (of an unlearned model) lacks."""
        init_seed(config["seed"], config["reproducibility"])
        split = cls(config)
        return split.align(log) if log else split

    @classmethod
    @faster()
    def of(cls, config, train, valid, test):
        """The split that RecBole's ``data_preparation`` has made: its loaders."""
        split = cls.__new__(cls)
        split.config, split.train = config, train
        split._take(valid, test)
        return split

    def _take(self, valid, test):
        """Derive what is known from the training loader and those of held-out data."""
        data = self.train._dataset
        data.dataset_path = os.path.abspath(data.dataset_path)  # some requests read its files, wherever we work then
        check_scaled(self.config, data)
        self.valid, self.test = self._resized(valid), self._resized(test)
        self._test_loaders = {}
        self.n_users, self.n_items = data.user_num, data.item_num
        self._take_rows()
        self.spam = np.empty(0, np.int64)
        self.fingerprint = fingerprint(pairwise_loader(self.train))

    def _take_rows(self):
        data = self.train._dataset
        users = data.inter_feat[data.uid_field].numpy()
        self.data_row = by_user(users)
        self.users = users[self.data_row]
        self.items = data.inter_feat[data.iid_field].numpy()[self.data_row]

    def _resized(self, loader, sampler=None, dataset=None):
        args = getattr(loader, "neg_sample_args", None)
        sampled = args["sample_num"] if args else 0
        if sampled == "none":
            return loader
        return eval_loader(self.config, dataset or loader._dataset, sampler or loader._sampler, sampled)

    def _add(self, users, items):
        """Add training interactions, in all but the item like the user's last one; ids, sizes, held-out data stay."""
        data, held_out = self.train._dataset, (self.valid._dataset, self.test._dataset)
        real = data.inter_feat.interaction
        copied = torch.from_numpy(self.data_row[np.searchsorted(self.users, users, "right") - 1])
        spam = {name: column[copied] for name, column in real.items()} | {data.iid_field: torch.from_numpy(items)}
        spammed = data.copy(Interaction({name: torch.cat([column, spam[name]]) for name, column in real.items()}))
        train, valid, test = create_samplers(self.config, spammed, [spammed, *held_out])
        facts = getattr(self.train, "kg_dataloader", None)
        samplers = (train, facts._sampler) if facts else (train,)
        loader = get_dataloader(self.config, "train")
        self.train = loader(self.config, spammed, *samplers, shuffle=self.config["shuffle"])
        self.valid, self.test = self._resized(self.valid, valid), self._resized(self.test, test)
        self._take_rows()
        self.spam = np.flatnonzero(self.data_row >= len(data))

    @property
    def n_rows(self) -> int:
        return len(self.users)

    def test_loader(self, sampled: int) -> EvalLoader:
        """The test data under full ranking (``sampled=0``) or against ``sampled`` negatives; built once."""
        if sampled not in self._test_loaders:
            self._test_loaders[sampled] = eval_loader(self.config, self.test._dataset, self.test._sampler, sampled)
        return self._test_loaders[sampled]

    def token(self, field: str, ids: np.ndarray) -> np.ndarray:
        """RecBole tokens of user (``field='user'``) or item ids."""
        data = self.train._dataset
        return data.id2token(data.uid_field if field == "user" else data.iid_field, ids)

    def named(self, whole: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
        """Tokens of users and items that are given by ids, by ``user`` and ``item``; pairs have none of their own."""
        fields = (field for field in whole if field != "pair")
        return {field: [str(token) for token in self.token(field, whole[field])] for field in fields}

    def pairs(self, rows: np.ndarray) -> list[tuple[str, str]]:
        """(user token, item token) of training rows."""
        return self.tokens(self.users[rows], self.items[rows])

    def tokens(self, users: np.ndarray, items: np.ndarray) -> list[tuple[str, str]]:
        """(user token, item token) of interactions, given by ids."""
        tokens = self.token("user", users), self.token("item", items)
        return [(str(user), str(item)) for user, item in zip(*tokens, strict=True)]

    def pair_numbers(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """A number of each pair of ids, int64."""
        return users.astype(np.int64) * self.n_items + items.astype(np.int64)

    def pairs_of(self, numbers: np.ndarray) -> list[tuple[str, str]]:
        """(user token, item token) of `pair_numbers`."""
        return self.tokens(*np.divmod(numbers.astype(np.int64), self.n_items))

    def numbers_of(self, pairs: Collection[tuple[str, str]]) -> np.ndarray:
        """`pair_numbers` of (user token, item token); of unknown ones a number that no interaction has."""
        data = self.train._dataset
        users, items = (data.field2token_id[field] for field in (data.uid_field, data.iid_field))
        found = [(users.get(user, 0), items.get(item, 0)) for user, item in pairs]
        return self.pair_numbers(*np.array(found, np.int64).reshape(-1, 2).T)

    def among(self, users: np.ndarray, items: np.ndarray, named: Mapping[str, np.ndarray]) -> np.ndarray:
        """Which interactions are of what is named: ids by ``user`` and ``item``, `pair_numbers` by ``pair``."""
        columns = {"user": users, "item": items, "pair": self.pair_numbers(users, items)}
        return np.logical_or.reduce([np.isin(columns[field], each) for field, each in named.items()])

    @faster()
    def remaining(self, forgotten: np.ndarray, seed: int | None = None) -> TrainDataLoader | KnowledgeBasedDataLoader:
        """A new training loader without some rows, with the negative pool that retraining would have.

        Ids, sizes, validation and test data stay; the forgotten items become drawable negatives of their users.

        Args:
            forgotten: rows (of `users`, `items`); may be empty.
            seed: of the order of the rows; default: the configuration's.
        """
        config = changed(self.config, seed=self.config["seed"] if seed is None else seed)
        rest = self.remaining_dataset(forgotten)
        args = self.config["train_neg_sample_args"]
        sampler = pairwise_loader(self.train)._sampler
        if isinstance(sampler, Sampler):  # a repeatable one leaves out each row's own item alone
            built = [rest, self.valid._dataset, self.test._dataset]
            sampler = Sampler(["train", "valid", "test"], built, args["distribution"], args["alpha"]).set_phase("train")
        elif args["distribution"] == "popularity":
            counted = _joined([rest, self.valid._dataset, self.test._dataset])
            sampler = RepeatableSampler(["train"], counted, args["distribution"], args["alpha"]).set_phase("train")
        facts = getattr(self.train, "kg_dataloader", None)
        samplers = (sampler, KGSampler(rest) if len(self.unlinked) else facts._sampler) if facts else (sampler,)
        return get_dataloader(config, "train")(config, rest, *samplers, shuffle=config["shuffle"])

    def remaining_dataset(self, forgotten: np.ndarray, held_out: Mapping[str, np.ndarray] | None = None) -> Dataset:
        """RecBole data set of the training interactions without some rows, in histories neither.

        Args:
            forgotten: rows; may be empty.
            held_out: as of `judged_without`.
        """
        gone = marked(self.n_rows, self.data_row[forgotten])
        return self._part(np.flatnonzero(~gone), gone, held_out)

    def with_another_user(self) -> Dataset:
        """RecBole data set of the training interactions, and of one user more, who is as the last row's."""
        data = self.train._dataset
        field, tokens = data.uid_field, data.field2id_token[data.uid_field]

        def longer(feat):
            last = feat[len(feat) - 1 :]
            return cat_interactions([feat, Interaction({**last.interaction, field: 0 * last[field] + self.n_users})])

        wider = data.copy(longer(data.inter_feat))
        wider.user_feat = None if data.user_feat is None else longer(data.user_feat)
        wider.field2id_token = {  # columns that name users too have the same tokens
            name: np.append(each, "another user") if each is tokens else each
            for name, each in data.field2id_token.items()
        }
        wider._preloaded_weight = {
            name: np.concatenate([each, each[-1:]]) if name == field else each
            for name, each in data._preloaded_weight.items()
        }
        return wider

    def positions_without(self, forgotten: np.ndarray) -> np.ndarray:
        """Row of `remaining_dataset` of each row of the log, int64 ``[rows]``; -1 of the forgotten ones."""
        keep = ~marked(self.n_rows, self.data_row[forgotten])
        return np.where(keep, np.cumsum(keep) - 1, -1)[self.data_row]

    def counts(self, rows: np.ndarray) -> dict[str, int]:
        """How much some rows are: ``interactions``, ``of`` how many, of how many ``users`` and ``items``."""
        users, items = (len(np.unique(ids[rows])) for ids in (self.users, self.items))
        return {"interactions": len(rows), "of": self.n_rows, "users": users, "items": items}

    def held_out(self, whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of the validation and test data sets that are of some users or items, by ``valid`` and ``test``.

        Args:
            whole: as of `among`.
        """
        found = {}
        for name in ("valid", "test"):
            data = getattr(self, name)._dataset
            users, items = (data.inter_feat[field].numpy() for field in (data.uid_field, data.iid_field))
            found[name] = np.flatnonzero(self.among(users, items, whole))
        return found

    def held_out_pairs(self) -> np.ndarray:
        """`pair_numbers` of the validation and test interactions."""
        parts = [(loader._dataset, loader._dataset.inter_feat) for loader in (self.valid, self.test)]
        return np.concatenate(
            [self.pair_numbers(own[data.uid_field].numpy(), own[data.iid_field].numpy()) for data, own in parts]
        )

    def pairs_read(self) -> np.ndarray:
        """`pair_numbers` of all interactions in the data as read, each as often as it is there, forgotten ones too."""
        lacked = self._without_a_log()
        own = (lacked.inter_feat[field].numpy() for field in (lacked.uid_field, lacked.iid_field))
        read = ((self.users, self.items), own, self.firsts())
        return np.concatenate([self.held_out_pairs(), *(self.pair_numbers(*each) for each in read)])

    def never_read(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of some (user token, item token) that are no interactions of the data as read, nor forgotten before."""
        if not pairs:
            return []
        known = np.concatenate([self.pairs_read(), self.pair_numbers(*self.earlier)])
        return [pair for pair, there in zip(pairs, np.isin(self.numbers_of(pairs), known), strict=True) if not there]

    def _without_a_log(self):
        """Data set of the training interactions that the model's log lacks."""
        data = self.train._dataset
        return data.copy(Interaction(self.lacked) if self.lacked else data.inter_feat[:0])

    def whole_dataset(self) -> Dataset:
        """One RecBole data set of all interactions: training, validation, test."""
        return _joined([loader._dataset for loader in (self.train, self.valid, self.test)])

    @faster()
    def judged_without(self, forgotten: np.ndarray, held_out: Mapping[str, np.ndarray] | None = None) -> "Split":
        """This split with nothing of some rows in its validation and test data: in histories, and in what is scaled.

        Itself where nothing of them is in there.

        Args:
            forgotten: rows.
            held_out: rows of the validation and test data, see `held_out`, that are to be in no histories either.
        """
        gone = self._gone(marked(self.n_rows, self.data_row[forgotten]), held_out)
        before, after = self._limits(np.zeros_like(gone)), self._limits(gone)
        if not (gone.any() and self.sequential) and before == after:
            return self
        parts = [loader._dataset for loader in (self.train, self.valid, self.test)]
        ends = np.cumsum([len(part) for part in parts])
        whole, split = self.whole_dataset(), copy.copy(self)
        split._test_loaders = {}
        for name, part, end in zip(("valid", "test"), parts[1:], ends[1:], strict=True):
            judged = part.copy(part.inter_feat[torch.arange(len(part))])
            if self.sequential:
                rebuild_histories(judged, whole, np.arange(end - len(part), end), gone)
            rescale(judged, before, after)
            setattr(split, name, self._resized(getattr(self, name), dataset=judged))
        return split

    def validation_without(self, forgotten: np.ndarray, rest: Dataset) -> EvalLoader:
        """The validation data as RecBole makes them of what remains: what is forgotten is ranked like any other item.

        Args:
            forgotten: rows.
            rest: their `remaining_dataset`.
        """
        judged, sampler = self.judged_without(forgotten), self.valid._sampler
        if not (len(forgotten) and isinstance(sampler, AbstractSampler) and runs_recboles(sampler)):
            return judged.valid
        built = [rest, judged.valid._dataset, judged.test._dataset]
        counted = _joined(built) if self.repeatable else rest  # which that sampler alone looks at
        _, sampler, _ = create_samplers(self.config, counted, built)
        return self._resized(judged.valid, sampler)

    def first_items_kept(self, forgotten: np.ndarray) -> int:
        """Users whose histories begin, in the row of no target, with an item of which all rows are forgotten."""
        wholly = np.setdiff1d(self.items[forgotten], np.delete(self.items, forgotten))
        users, items = firsts_of([self.train._dataset])
        return len(np.intersect1d(users[np.isin(items, wholly)], np.delete(self.users, forgotten)))

    def firsts(self, field: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(users, items) of the interactions that histories begin with, which are the target of no row.

        One of each user, whose rows may all have been forgotten before: its line is still there.

        Args:
            field: column of which to give what they have, instead of the items.
        """
        parts = [loader._dataset for loader in (self.train, self.valid, self.test)]
        return firsts_of([*parts, self._without_a_log()], field)

    def queries(self, rows: np.ndarray, without: np.ndarray | None = None) -> Interaction:
        """Interactions to score some rows by, had they never been: the users, with what else is in their histories.

        Args:
            without: rows that are in no history; default: these.

        Returns:
            As many rows.
        """
        data = self.train._dataset
        if not self.sequential:
            return Interaction({data.uid_field: torch.from_numpy(self.users[rows])})
        gone = marked(self.n_rows, self.data_row[rows if without is None else without])
        part, order = np.unique(self.data_row[rows], return_inverse=True)
        part = self._part(part, gone)
        return self.test.transform(part, part[order])

    def _gone(self, gone, held_out):
        """Rows of `whole_dataset` that are gone: of training, bool array, and those that are held out."""
        sizes = [len(loader._dataset) for loader in (self.valid, self.test)]
        parts = [gone, *(np.zeros(size, bool) for size in sizes)]
        for name, part in zip(("valid", "test"), parts[1:], strict=True):
            part[(held_out or {}).get(name, np.empty(0, np.int64))] = True
        return np.concatenate(parts)

    def _limits(self, gone: np.ndarray) -> Limits:
        """Smallest and largest value of the columns that RecBole scales, without rows of `whole_dataset`, bool array.

        The first value of a user whose rows hold histories is in these alone, and goes with all rows of the user.
        """
        parts = [loader._dataset.inter_feat for loader in (self.train, self.valid, self.test)]
        names = scaled(self.config, self.train._dataset)

        def left(name):
            return np.concatenate([value(part[name].numpy()) for part in parts])[~gone]

        def values(name):
            users, firsts = self.firsts(name)
            return np.concatenate([left(name), value(firsts)[np.isin(users, left(self.train._dataset.uid_field))]])

        return limits((name, values(name)) for name in names)

    @faster()
    def _part(self, rows, gone, held_out=None):
        """The data set with some rows of the training data only, and histories without those that are ``gone``."""
        data = self.train._dataset
        whole = len(rows) == len(data)  # of which nothing is copied
        kept = Interaction(dict(data.inter_feat.interaction)) if whole else data.inter_feat[torch.from_numpy(rows)]
        part = data.copy(kept)
        if self.sequential and gone.any():
            rebuild_histories(part, data, rows, gone)
        gone = self._gone(gone, held_out)
        rescale(part, self._limits(np.zeros_like(gone)), self._limits(gone))
        for name, table in self.tables.items():
            setattr(part, name, table)
        if len(self.unlinked):
            drop_facts(part, self.unlinked)
        return part

    @property
    def sequential(self) -> bool:
        """Whether rows hold the history before their item."""
        return self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL

    @property
    def terms(self) -> int:
        """Terms of the loss of a row: one with each negative, or a single one without any."""
        return pairwise_loader(self.train).times

    @property
    def batch_rows(self) -> int:
        """Rows of a full training batch."""
        return batch_rows(pairwise_loader(self.train))

    @property
    def in_order(self) -> bool:
        """Whether rows of the training data are in RecBole's order; earlier versions froze them in another."""
        return getattr(self.train._dataset, "in_order", True)

    def draws(self, log: TripleLog) -> None:
        """Let a log draw again, from these data, the negatives that it does not hold."""
        if log.again is None and any(each is not None for each in log.drawn):
            log.again = DrawnAgain(log, pairwise_loader(self.train), self.data_row, self.batch_rows)

    @property
    def repeatable(self) -> bool:
        """Whether an item that a user has is drawn as this user's negative too: RecBole's ``repeatable``."""
        return not isinstance(pairwise_loader(self.train)._sampler, Sampler)

    def fingerprint_without(self, forgotten: np.ndarray | Sequence[int]) -> dict[str, Any]:
        """Fingerprint of the training data without some rows; remembers of how many.

        Their checksum would tell what is forgotten: of a single interaction by trying all.
        """
        keep = np.delete(np.arange(self.n_rows), forgotten)
        of = self.fingerprint.get("of", self.n_rows)
        return {**self.fingerprint, "rows": rows_checksum(self.users[keep], self.items[keep]), "of": of}

    def logged_without(self, forgotten: np.ndarray) -> dict[str, Any]:
        """As `fingerprint_without`, for a log: by the held-out data, too, `align` tells forgotten rows from new ones.

        Their checksum tells nothing of the forgotten, of which nothing is held out but what stays so.
        """
        found = self.fingerprint_without(forgotten)
        return found if self.doubtful else {**found, HELD_OUT_ROWS: self._held_out_checksum()}

    def _held_out_checksum(self):
        return rows_checksum(*np.divmod(np.sort(self.held_out_pairs()), self.n_items))

    def surroundings(self, forgotten: np.ndarray | None = None) -> str:
        """Checksum of what else training without some rows reads, see `fingerprint.surroundings`."""
        data, order = self.train._dataset, self.data_row
        if forgotten is not None and len(forgotten):
            data, order = self.remaining_dataset(forgotten), self.positions_without(forgotten)

        def columns(table):
            return {name: column.numpy() for name, column in table.interaction.items()}

        order, own = order[order >= 0], columns(data.inter_feat)
        tables = {name: columns(getattr(data, name)) for name in data.feat_name_list if name != "inter_feat"}
        return surroundings(data, {**tables, "train": {name: own[name][order] for name in told(data) & own.keys()}})

    def align(self, log: TripleLog) -> "Split":
        """This split without the rows that were already forgotten, according to the log of an unlearned model.

        Raises:
            InputError: the log belongs to another data set, to another split of it, or to another popularity.
        """
        theirs = log.metadata["fingerprint"]
        name = self.config["dataset"]
        for part, what in (("users", "user tokens"), ("items", "item tokens")):
            if theirs.get(part) != salted(log.salt, self.fingerprint[part]):
                raise InputError(
                    f"the triple log {log.path} was written for another data set: its {what} are not those of {name}; "
                    "check dataset, data_path and the filtering keys"
                )
        counts = self.fingerprint.get(HELD_OUT)
        if counts and theirs.get(HELD_OUT) not in (None, salted(log.salt, counts)):
            raise InputError(
                f"the triple log {log.path} was written beside other held-out interactions than {name} now has, and "
                "popularity, by which its negatives were drawn, counts them: put them back, or train anew"
            )
        if theirs.get("rows") == salted(log.salt, self.fingerprint["rows"]):
            return self
        kept = _match(log, self) if theirs.get("of") == self.n_rows else None
        if kept is None or (kept < 0).any():
            spam = ", and the forget_spam, spam_items and forget_seed of its training" if len(self.spam) else ""
            raise InputError(
                f"the triple log {log.path} was written for other training interactions than {name} now gives; "
                f"use the same .inter file, seed and eval_args as in training{spam}"
            )
        forgotten = np.setdiff1d(np.arange(self.n_rows), kept)
        split = copy.copy(self.judged_without(forgotten))
        split.train = self.remaining(forgotten)
        split.users, split.items = self.users[kept], self.items[kept]
        split.spam = np.flatnonzero(np.isin(kept, self.spam))
        real = np.setdiff1d(forgotten, self.spam)
        split.lacked = self.train._dataset.inter_feat[torch.from_numpy(self.data_row[real])].interaction
        # a line that was taken out and another one in its stead give as many rows, of which the log lacks one too
        if theirs.get(HELD_OUT_ROWS) == salted(log.salt, self._held_out_checksum()):
            split.earlier = self.users[real], self.items[real]
        else:
            split.doubtful = len(real)
        # rows of the remaining data set are numbered anew, in its own order
        split.data_row = np.argsort(np.argsort(self.data_row[kept]))
        split.fingerprint = self.fingerprint_without(forgotten)
        return split

    def popularity(self) -> np.ndarray | None:
        """Interactions of each item id, by which negatives are drawn, ``[n_items]``; None where they are uniform."""
        if self.config["train_neg_sample_args"]["distribution"] != "popularity":
            return None
        parts = (loader._dataset.inter_feat[loader._dataset.iid_field].numpy() for loader in (self.valid, self.test))
        return np.bincount(np.concatenate([self.items, *parts]), minlength=self.n_items)

    def seen(self) -> Callable[[int], np.ndarray]:
        """Items of each user in training, validation and test.

        Returns:
            User id -> ids of that user's items.
        """
        users, items = [self.users], [self.items]
        for loader in (self.valid, self.test):
            data = loader._dataset
            users.append(data.inter_feat[data.uid_field].numpy())
            items.append(data.inter_feat[data.iid_field].numpy())
        users, items = np.concatenate(users), np.concatenate(items)
        order = np.argsort(users, kind="stable")
        ptr = np.searchsorted(users[order], np.arange(self.n_users + 1))
        items = items[order]
        return lambda user: items[ptr[user] : ptr[user + 1]]


def _joined(parts):
    """One RecBole data set of the interactions of several, one after the other, in the columns of the last."""
    columns = [part.inter_feat.interaction for part in parts]
    return parts[0].copy(Interaction({name: torch.cat([each[name] for each in columns]) for name in columns[-1]}))


def _match(log, whole):
    """Row of ``whole`` for each row of a log, pairing equal interactions; -1: none.

    Raises:
        InputError: of interactions that are repeated some are gone, and nothing tells which.
    """
    apart = None if log.marks is None else marks(whole.train._dataset, whole.data_row)

    def frame(rows, found):
        pairs = pd.DataFrame({"user": np.asarray(rows.users, np.int64), "item": np.asarray(rows.items, np.int64)})
        return pairs if found is None else pairs.assign(mark=found)

    theirs, ours = frame(log, None if apart is None else np.array(log.marks)), frame(whole, apart)
    same = list(ours)
    counts = ours.groupby(same).size().rename("ours").to_frame()
    counts["theirs"] = theirs.groupby(same).size()
    # of a model without histories, interactions that nothing tells apart are one as good as the other
    if (counts["theirs"] < counts["ours"]).any() and (apart is None or whole.sequential):
        raise InputError(
            f"the triple log {log.path} lacks one of several interactions of the same user and item, and nothing that "
            "is loaded of them tells which; train again, with their time in load_col, or set rm_dup_inter: first"
        )
    for pairs in (ours, theirs):
        pairs["occurrence"] = pairs.groupby(same).cumcount()
    found = theirs.merge(ours.reset_index(), how="left", on=[*same, "occurrence"])
    return found["index"].fillna(-1).to_numpy(np.int64)


def firsts_of(parts: Sequence[Dataset], field: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """As `Split.firsts`, of data sets that hold parts of the rows; of those without histories nothing.

    Histories that hold one item do not tell where they begin: a user's earliest row does.
    """
    data, found = parts[0], []
    if not isinstance(data, SequentialDataset):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    for part in parts:
        alone = part.inter_feat[data.item_list_length_field] == 1
        lists = part.inter_feat[history_columns(data)[field or data.iid_field]]
        times = part.inter_feat.interaction.get(data.time_field, alone)
        found.append([each[alone].numpy() for each in (part.inter_feat[data.uid_field], lists[:, 0], times)])
    users, values, times = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.lexsort([times, users]) if data.max_item_list_len == 1 else np.argsort(users, kind="stable")
    firsts = np.sort(order[np.unique(users[order], return_index=True)[1]])
    return users[firsts], values[firsts]
