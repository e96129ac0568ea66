"""Forget requests: which training interactions are to be forgotten."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recbole_unlearn.input_error import InputError

KINDS = ("ratio", "count", "users", "items", "file")


@dataclass(frozen=True)
class ForgetRequest:
    """What to forget, as the user says it. Select the rows with :meth:`rows`.

    Attributes:
        kind (str): 'ratio', 'count', 'users', 'items' or 'file'.
        value: share of the training interactions; their number; list of tokens; path of a file of token pairs.
        seed (int): seed of the draw for 'ratio' and 'count'.
    """

    kind: str
    value: object
    seed: int = 2020

    @classmethod
    def from_config(cls, config):
        """The one request that the ``forget_*`` keys state; ``forget_ratio``'s default yields to any other.

        Raises:
            InputError: more than one is given, or a value of the wrong type.
        """
        given = {kind: config[f"forget_{kind}"] for kind in KINDS if config[f"forget_{kind}"] is not None}
        if len(given) > 1 and "forget_ratio" not in config.external_config_dict:
            given.pop("ratio", None)
        if len(given) != 1:
            keys = " and ".join(f"forget_{kind}" for kind in given) or "none"
            raise InputError(f"give exactly one of {', '.join(f'forget_{k}' for k in KINDS)}; got {keys}")
        (kind, value), seed = given.popitem(), config["forget_seed"]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind == "ratio" and not (number and 0 < value < 1):
            raise InputError(f"forget_ratio must lie between 0 and 1, both excluded; got {value!r}")
        if kind == "count" and not (isinstance(value, int) and number and value > 0):
            raise InputError(f"forget_count must be a whole number of at least 1; got {value!r}")
        if kind in ("users", "items"):
            value = [str(v) for v in (value if isinstance(value, (list, tuple)) else str(value).split(","))]
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise InputError(f"forget_seed must be a whole number of at least 0; got {seed!r}")
        return cls(kind, value, seed)

    def rows(self, split):
        """Rows of ``split.users`` / ``split.items`` to forget: sorted int64 array.

        Raises:
            InputError: unknown tokens, pairs that are not training interactions, an empty set, or one that leaves
                no training data.
        """
        rows = getattr(self, f"_{self.kind}")(split)
        if len(rows) == 0:
            raise InputError("the forget set is empty: no training interaction matches the request")
        if len(rows) >= split.n_rows:
            raise InputError(f"the forget set is all {split.n_rows} training interactions; nothing would be left to model")
        return np.sort(rows)

    def _ratio(self, split):
        return self._draw(split, round(self.value * split.n_rows))

    def _count(self, split):
        if self.value > split.n_rows:
            raise InputError(f"forget_count is {self.value}, but there are only {split.n_rows} training interactions")
        return self._draw(split, self.value)

    def _draw(self, split, count):
        if count == 0:
            raise InputError(
                f"forget_ratio={self.value} of {split.n_rows} training interactions is less than one; "
                f"use at least {1 / split.n_rows:.2g}"
            )
        return np.random.default_rng(self.seed).choice(split.n_rows, count, replace=False)

    def _users(self, split):
        return np.flatnonzero(np.isin(split.users, _ids(split, "user", self.value)))

    def _items(self, split):
        return np.flatnonzero(np.isin(split.items, _ids(split, "item", self.value)))

    def _file(self, split):
        pairs = _read_pairs(self.value)
        users = _ids(split, "user", [user for user, _ in pairs])
        items = _ids(split, "item", [item for _, item in pairs])
        keys = split.users.astype(np.int64) * split.n_items + split.items
        wanted = users * split.n_items + items
        missing = np.flatnonzero(~np.isin(wanted, keys))
        if len(missing):
            user, item = pairs[missing[0]]
            raise InputError(
                f"{self.value}: user {user!r} and item {item!r} are no training interaction ({len(missing)} such of "
                f"{len(pairs)}; held-out interactions were never trained on); remove them from the file"
            )
        return np.flatnonzero(np.isin(keys, wanted))


def _ids(split, field, tokens):
    data = split.train._dataset
    known = data.field2token_id[data.uid_field if field == "user" else data.iid_field]
    known = {token: i for token, i in known.items() if i != 0}
    unknown = [token for token in tokens if token not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(known)[:100_000], n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != unknown[0] else ""
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(f"unknown {field} token {unknown[0]!r}{more} in data set {data.dataset_name!r}{hint}")
    return np.array([known[token] for token in tokens], dtype=np.int64)


def _read_pairs(path):
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise InputError(f"cannot read forget_file {path}: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t" if "\t" in line else ",")]
        if number == 1 and fields[0].endswith(":token"):
            continue
        if len(fields) < 2 or not fields[0] or not fields[1]:
            raise InputError(f"{path}, line {number}: expected a user token and an item token, tab- or comma-separated")
        pairs.append((fields[0], fields[1]))
    return pairs
