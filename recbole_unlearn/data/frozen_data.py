"""A data set as a model knows it, kept in the model's log once the ``.inter`` file has lost lines.

RecBole numbers users and items in the order in which the file names them, and splits it by its length. After lines
were removed from it, ids and split would be others, and the model's rows would belong to other users. So the split is
kept in RecBole's own form for ready splits (``benchmark_filename``), and the numbering in ``tokens.json``, in which
users and items of whom nothing is left have lost their names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.utils import FeatureType

from recbole_unlearn.data.fingerprint import tokens_checksum
from recbole_unlearn.storage.files import write_atomically

if TYPE_CHECKING:
    from recbole_unlearn.data.split import Split

PARTS = ("train", "valid", "test")


def settings(config: Config) -> dict[str, Any]:
    """The configuration under which the frozen data set is read."""
    inter = config["load_col"]["inter"]
    columns = {"inter": inter if inter == "*" else list(inter)}
    done = {"unload_col": None, "normalize_field": None, "normalize_all": None}  # the numbers are written as they are
    return {"benchmark_filename": list(PARTS), "load_col": columns, **done}


def folder(log: Path | str) -> Path:
    """``data_path`` of the data set frozen in a log's folder."""
    return Path(log) / "data"


class Frozen:
    """A split without some rows, to be written.

    Args:
        rows: the training rows to leave out, sorted.
        held_out: rows of the validation and test data to leave out too, see `Split.held_out`.

    Attributes:
        fingerprint (dict): of the training data, as the frozen data set gives it.
    """

    def __init__(self, split: "Split", rows: np.ndarray, held_out: Mapping[str, np.ndarray] | None = None) -> None:
        self.split, gone = split, held_out or {}
        data = split.train._dataset
        keep = np.delete(np.arange(split.n_rows), rows)
        # in the log's order, so that reading it gives the log's rows again
        parts = {"valid": split.valid._dataset, "test": split.test._dataset}
        kept = {name: np.delete(np.arange(len(part)), gone.get(name, [])) for name, part in parts.items()}
        self.parts = [
            _frame(data, split.data_row[keep]),
            *(_frame(part, kept[name]) for name, part in parts.items()),
        ]
        self.tokens = {}
        for name, field, forgotten in (("users", data.uid_field, split.users), ("items", data.iid_field, split.items)):
            held = (part.inter_feat[field].numpy()[gone.get(n, [])] for n, part in parts.items())
            self.tokens[name] = self._named(data, field, np.concatenate([forgotten[rows], *held]))
        named = {part: tokens_checksum(["[PAD]", *tokens]) for part, tokens in self.tokens.items()}
        self.fingerprint = {**split.fingerprint_without(rows), **named}

    def _named(self, data, field, forgotten):
        """Tokens by id, from 1 on; those that only the forgotten rows still named have lost their names."""
        left = set().union(*(part[f"{field}:token"] for part in self.parts))
        tokens = [str(token) for token in data.field2id_token[field]]
        for n in np.unique(forgotten):
            if tokens[n] not in left:
                tokens[n] = f"[forgotten {n}]"
        return tokens[1:]

    def write(self, log: Path | str) -> None:
        """Write the data set into a log's folder."""
        config = self.split.config
        target = folder(log) / config["dataset"]
        target.mkdir(parents=True)
        write_atomically(target / "tokens.json", json.dumps(self.tokens).encode())
        for name, part in zip(PARTS, self.parts, strict=True):
            text = part.to_csv(sep=config["field_separator"], index=False, lineterminator="\n")
            write_atomically(target / f"{config['dataset']}.{name}.inter", text.encode(config["encoding"] or "utf-8"))


def _frame(data, rows):
    """Some rows of a built data set as a DataFrame with typed column names: the ids' tokens, and the numbers."""
    columns = {}
    for field, values in data.inter_feat.interaction.items():
        if field in (data.uid_field, data.iid_field):
            columns[f"{field}:token"] = data.id2token(field, values.numpy()[rows])
        elif data.field2type.get(field) == FeatureType.FLOAT:
            columns[f"{field}:float"] = values.numpy()[rows].astype(float)
    return pd.DataFrame(columns)


def is_frozen(config: Config) -> bool:
    """Whether the configuration's data set is a frozen one."""
    return bool(config["benchmark_filename"]) and (Path(config["data_path"]) / "tokens.json").is_file()


class FrozenDataset(Dataset):
    """RecBole's ``Dataset`` with the ids of ``tokens.json``."""

    def _remap(self, remap_list):
        known = json.loads((Path(self.dataset_path) / "tokens.json").read_text("utf-8"))
        known = {self.uid_field: known["users"], self.iid_field: known["items"]}
        first = [(pd.DataFrame({f: known[f]}), f, kind) for _, f, kind in remap_list[:1] if f in known]
        super()._remap([*first, *remap_list])
