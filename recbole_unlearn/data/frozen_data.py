"""A data set as it was built, kept in the model's log once the data set's files have lost lines.

RecBole numbers users, items and all other tokens in the order in which the files name them, and splits interactions by
their number. After lines were removed, ids and split would be others, and the model's rows would belong to other users.
So the built data set is kept: its columns in ``arrays.npz``, rows in the order in which RecBole had them, what they are
in ``tables.json``, and the numbering in ``tokens.json``, in which users and items of whom nothing is left, and tokens
that no row has, have lost their names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import recbole.data.dataset as recbole_datasets
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType, ModelType

from recbole_unlearn.compat.recbole_models import is_recboles
from recbole_unlearn.data.fingerprint import HELD_OUT, by_user, held_out_checksum, surroundings, tokens_checksum
from recbole_unlearn.data.histories import ENDS, history_columns
from recbole_unlearn.data.sampling import ROW
from recbole_unlearn.data.scaling import NAMELESS
from recbole_unlearn.storage.files import replacing, write_atomically

if TYPE_CHECKING:
    from recbole_unlearn.data.split import Split

PARTS = ("train", "valid", "test")
SETTINGS = {"benchmark_filename": list(PARTS)}  # by which it is read: RecBole's key for ready splits
TOKENS, TABLES, ARRAYS = "tokens.json", "tables.json", "arrays.npz"
CLASSES = {
    ModelType.GENERAL: Dataset,
    ModelType.KNOWLEDGE: KnowledgeBasedDataset,
    ModelType.SEQUENTIAL: SequentialDataset,
}
INTERACTS = "[UI-Relation]"  # RecBole's own relation, which is in no row
NOBODY = np.empty(0, np.int64)
LISTS = (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ)
PAIRED = ("item2entity", "entity2item")  # attributes that name tokens


def folder(log: Path | str) -> Path:
    """``data_path`` of the data set frozen in a log's folder."""
    return Path(log) / "data"


class Frozen:
    """A split without some rows, to be written.

    Args:
        rows: the training rows to leave out, sorted; in histories neither.
        whole: ids of users and items, by ``user`` and ``item``, of whom nothing held out, and no name, is left either.

    Attributes:
        fingerprint (dict): of the training data, as the frozen data set gives it.
        tokens (dict): by field, of each id from 1 on.
    """

    def __init__(self, split: "Split", rows: np.ndarray, whole: Mapping[str, np.ndarray] | None = None) -> None:
        self.split, self.data, out = split, split.train._dataset, split.held_out(whole) if whole else {}
        rest, places = split.remaining_dataset(rows, out), split.positions_without(rows)
        judged = split.judged_without(rows, out)
        # in the data's order, by which training without shuffling goes; each user's rows in the log's, so that reading
        # gives the log's rows again, where of equal interactions some are gone too
        order = np.empty(len(rest), np.int64)
        order[by_user(rest.inter_feat[self.data.uid_field].numpy())] = places[places >= 0]
        self.tables = {"train": _columns(rest.inter_feat, order)}
        for name in PARTS[1:]:
            part = getattr(judged, name)._dataset
            self.tables[name] = _columns(part.inter_feat, np.delete(np.arange(len(part)), out.get(name, [])))
        self.lengths = dict(self.data.field2seqlen)
        nameless = {
            field: np.union1d(self._nameless(field), (whole or {}).get(part, NOBODY))
            for part, field in (("user", self.data.uid_field), ("item", self.data.iid_field))
        }
        self.tokens = {
            field: [str(token) for token in tokens[1:]] for field, tokens in self.data.field2id_token.items()
        }
        for name in self.data.feat_name_list:
            if name != "inter_feat":
                self._take_table(name, rest, nameless)
        if is_recboles(split.config.model_class):  # a user's own may have weights for as many as there are
            self._narrow()
        for fields in self._numberings():
            gone = self._unnamed(fields, nameless)
            for field in fields:
                for n in gone[gone <= len(self.tokens[field])]:
                    self.tokens[field][n - 1] = NAMELESS.format(n)
        named = {
            part: tokens_checksum(["[PAD]", *self.tokens[field]])
            for part, field in (("users", self.data.uid_field), ("items", self.data.iid_field))
        }
        self.fingerprint = {**split.fingerprint_without(rows), **named}
        if HELD_OUT in self.fingerprint:
            left = np.concatenate([self.tables[name][self.data.iid_field] for name in PARTS[1:]])
            self.fingerprint |= held_out_checksum(np.bincount(left, minlength=self.data.item_num))

    def surroundings(self) -> str:
        """As of the split that reading it gives, see `Split.surroundings`."""
        tables = {name: self.tables[name] for name in self.tables.keys() - PARTS[1:]}
        order = by_user(tables["train"][self.data.uid_field])
        tables["train"] = {name: column[order] for name, column in tables["train"].items()}
        return surroundings(self.data, tables)

    def _nameless(self, field):
        """Ids of which there was something in the data as read and nothing is left, in histories neither."""
        parts = [getattr(self.split, name)._dataset.inter_feat.interaction for name in PARTS]
        parts.append(self.split.lacked)  # by earlier requests
        return np.setdiff1d(self._ids([field], parts), self._ids([field], self.tables.values()))

    def _narrow(self):
        """Cut lists that tables have in columns, and histories of these, to the longest that is left.

        Else their width would tell how many entries one had that is gone.
        """
        data = self.data
        histories = {column: name for name, column in history_columns(data).items()}
        together: dict[str, dict[str, int]] = {}  # field -> its columns, with the axis of the list's entries
        for column in self.tables["train"]:
            if isinstance(data.field2seqlen.get(column), tuple):
                together.setdefault(histories[column], {})[column] = 2
            elif column not in histories and data.field2type.get(column) in LISTS:
                together.setdefault(column, {})[column] = 1
        for axes in together.values():
            found = [_longest(self.tables[part][column], axis) for part in PARTS for column, axis in axes.items()]
            width = max(1, *found)
            for column, axis in axes.items():
                for part in PARTS:
                    self.tables[part][column] = self.tables[part][column].take(range(width), axis)
                self.lengths[column] = (self.lengths[column][0], width) if axis == 2 else width
        for name in self.tables.keys() - PARTS:
            for column, values in self.tables[name].items():
                if data.field2type.get(column) == FeatureType.TOKEN_SEQ:  # of numbers it gives weights their shape
                    self.lengths[column] = max(1, _longest(values, 1))
                    self.tables[name][column] = values[:, : self.lengths[column]]

    def _ids(self, fields, tables):
        """What tables have in some columns, and in the histories of these: ids, without padding."""
        histories = history_columns(self.data)
        columns = {*fields, *(histories[field] for field in fields if field in histories)}
        found = [np.ravel(table[column]) for table in tables for column in columns if column in table]
        return np.setdiff1d(np.concatenate([NOBODY, *found]), [0])

    def _numberings(self):
        """Fields that have tokens, those of one numbering together."""
        shared = [{*map(str, fields)} for fields in self.data.alias.values()]
        for fields in shared:
            if getattr(self.data, "head_entity_field", None) in fields:
                fields.add(self.data.entity_field)
        alone = self.tokens.keys() - set().union(*shared)
        return [fields & self.tokens.keys() for fields in (*shared, *({field} for field in alone))]

    def _unnamed(self, fields, nameless):
        """Ids of a numbering that lose their names: no row that is left has them in any of its fields."""
        data = self.data
        for owner in fields & nameless.keys():
            return np.setdiff1d(nameless[owner], self._ids(fields - {owner}, self.tables.values()))
        size = max((len(self.tokens[field]) for field in fields), default=0)
        gone = np.setdiff1d(np.arange(1, size + 1), self._ids(fields, self.tables.values()))
        if getattr(data, "relation_field", None) in fields:
            return gone[np.array(self.tokens[data.relation_field])[gone - 1] != INTERACTS]
        if getattr(data, "head_entity_field", None) in fields:  # items are entities too, by the same ids
            return np.union1d(gone[gone >= data.item_num], nameless[data.iid_field])
        return gone

    def _take_table(self, name, rest, nameless):
        """A table of users, items or facts; of those who have lost their names it says nothing."""
        columns = _columns(getattr(rest, name), slice(None))
        owner = {"user_feat": self.data.uid_field, "item_feat": self.data.iid_field}.get(name)
        for field, values in columns.items() if owner else ():
            if field != owner:
                values[nameless[owner]] = 0
        self.tables[name] = columns

    def write(self, log: Path | str) -> None:
        """Write the data set into a log's folder."""
        target, data = folder(log) / self.split.config["dataset"], self.data
        target.mkdir(parents=True)
        known = set(self.tokens[data.iid_field])
        linked, links = (getattr(data, name, {}) for name in PAIRED)
        pairs = {
            PAIRED[0]: {item: entity for item, entity in linked.items() if item in known},
            PAIRED[1]: {entity: item for entity, item in links.items() if item in known},
        }
        facts = {
            "types": {field: kind.value for field, kind in data.field2type.items()},
            "sources": {field: getattr(source, "value", source) for field, source in data.field2source.items()},
            "lengths": self.lengths,
            "buckets": dict(data.field2bucketnum),
            "alias": {name: list(map(str, fields)) for name, fields in data.alias.items()},
            "rest": list(map(str, data._rest_fields)),
            "tables": list(data.feat_name_list),
            "lists": {name: value for name, value in vars(data).items() if name.endswith(ENDS)},
            "preloaded": list(data._preloaded_weight),
            "in_order": self.split.in_order,
            **(pairs if any(pairs.values()) else {}),
        }
        write_atomically(target / TOKENS, json.dumps(self.tokens).encode())
        write_atomically(target / TABLES, json.dumps(facts).encode())
        arrays = {
            f"{name}/{field}": values for name, columns in self.tables.items() for field, values in columns.items()
        }
        with replacing(target / ARRAYS) as file:
            np.savez(file, **arrays, **{f"preloaded/{field}": each for field, each in data._preloaded_weight.items()})


def _columns(table, rows):
    """Copies of a table's columns as arrays, some rows of them; not the numbers that a trainer gives to rows."""
    return {name: np.array(column.numpy()[rows]) for name, column in table.interaction.items() if name != ROW}


def _longest(values, axis):
    """Entries of the longest list, padded with zeros along an axis."""
    there = np.flatnonzero(values.any(axis=tuple(set(range(values.ndim)) - {axis})))
    return int(there[-1]) + 1 if len(there) else 0


def is_frozen(config: Config) -> bool:
    """Whether the configuration's data set is a frozen one."""
    return bool(config["benchmark_filename"]) and (Path(config["data_path"]) / TOKENS).is_file()


def frozen_dataset(config: Config) -> Dataset:
    """RecBole's data set of a model, as it was frozen."""
    own = getattr(recbole_datasets, f"{config['model']}Dataset", CLASSES[config["MODEL_TYPE"]])
    return type(own.__name__, (_Restored, own), {})(config)


class _Restored(Dataset):
    """What a frozen data set does otherwise than RecBole's: nothing is loaded, filtered or numbered.

    Attributes:
        in_order: whether its rows are in the order in which RecBole had them; earlier versions kept the log's.
    """

    def _from_scratch(self):
        self._get_preset()
        self._get_field_from_config()
        source = Path(self.dataset_path)
        facts, tokens = (json.loads((source / name).read_text("utf-8")) for name in (TABLES, TOKENS))
        self.field2id_token = {field: np.array(["[PAD]", *known]) for field, known in tokens.items()}
        self.field2token_id = {
            field: {token: n for n, token in enumerate(known)} for field, known in self.field2id_token.items()
        }
        kinds, sources = {kind.value for kind in FeatureSource}, facts["sources"]
        self.field2type = {field: FeatureType(kind) for field, kind in facts["types"].items()}
        self.field2source = {field: FeatureSource(each) if each in kinds else each for field, each in sources.items()}
        lengths = facts["lengths"]
        self.field2seqlen = {field: tuple(n) if isinstance(n, list) else n for field, n in lengths.items()}
        self.field2bucketnum = facts["buckets"]
        self.alias = {name: np.array(fields) for name, fields in facts["alias"].items()}
        self._rest_fields, self.feat_name_list = np.array(facts["rest"]), facts["tables"]
        self.in_order = facts.get("in_order", False)
        for name, value in [*facts["lists"].items(), *((name, facts.get(name, {})) for name in PAIRED)]:
            setattr(self, name, value)
        self.user_feat = self.item_feat = None
        with np.load(source / ARRAYS, allow_pickle=False) as arrays:
            tables = {name: _table(arrays, name) for name in (*PARTS, *self.feat_name_list) if name != "inter_feat"}
            self._preloaded_weight = {field: arrays[f"preloaded/{field}"] for field in facts["preloaded"]}
        self.file_size_list = [len(tables[name]) for name in PARTS]
        joined = {name: torch.cat([tables[part][name] for part in PARTS]) for name in tables["train"].interaction}
        self.inter_feat = Interaction(joined)
        for name in set(self.feat_name_list) - {"inter_feat"}:
            setattr(self, name, tables[name])

    def _change_feat_format(self):
        pass

    def _benchmark_presets(self):
        pass


def _table(arrays, name):
    """A table of the archive."""
    columns = [key for key in arrays.files if key.startswith(f"{name}/") and key != f"{name}/{ROW}"]  # once kept
    return Interaction({key.partition("/")[2]: torch.from_numpy(arrays[key]) for key in columns})
