"""Forget requests: which training interactions are to be forgotten."""

import copy
import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from recbole.config import Config

from recbole_unlearn.data import requests
from recbole_unlearn.data.atomic_file import column_types, file_exists, read_columns
from recbole_unlearn.data.frozen_data import is_frozen
from recbole_unlearn.data.tokens import ids, is_known, nearest, read_tokens
from recbole_unlearn.errors import InputError
from recbole_unlearn.storage.files import read_text

if TYPE_CHECKING:
    from recbole_unlearn.data.split import Split

Tokens: TypeAlias = Mapping[str, list[Any]]  # by ``user`` and ``item``; by ``pair``, (user token, item token)
BEGUN, TRAINED, HELD_OUT = range(3)  # interactions: those that histories begin with, and which rows are of


@dataclass(frozen=True)
class ForgetRequest:
    """What to forget, as the user says it. Select the rows with :meth:`rows`.

    Attributes:
        kind: one of `KINDS`; the key is ``forget_<kind>``.
        value: what the key holds, as its reader in `STRATEGIES` returns it.
        seed: of every random draw.
        unread: what is named beside ``value``, that the data set was not read with and its files name.
    """

    kind: str
    value: Any
    seed: int = 2020
    unread: Tokens = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Config) -> "ForgetRequest":
        """The one request that the ``forget_*`` keys state; without any, and without a checkpoint, ``forget_ratio``'s.

        Raises:
            InputError: more than one is given, one that names nobody, or a value of the wrong type; none is given with
                a checkpoint.
        """
        keys = {kind: f"forget_{kind}" for kind in KINDS}
        asked = [kind for kind, key in keys.items() if key in config.external_config_dict]
        given = {kind: config[keys[kind]] for kind in asked if config[keys[kind]] is not None}
        if not asked and not config["checkpoint"]:
            given = {kind: config[key] for kind, key in keys.items() if config[key] is not None}  # forget_ratio's
        if len(given) == 1:
            return cls.of(*given.popitem(), config)
        if given:
            found = f"got {' and '.join(keys[kind] for kind in given)}"
        elif asked:
            found = f"{' and '.join(keys[kind] for kind in asked)} names nobody"
        else:
            found = "a checkpoint forgets nothing by itself"
        raise InputError(f"give exactly one of {', '.join(keys.values())}; {found}")

    @classmethod
    def of(cls, kind: str, value: object, config: Config) -> "ForgetRequest":
        """The request that the key ``forget_<kind>`` states with this value; InputError for a bad one."""
        if kind not in STRATEGIES:
            named = ("rows", "pairs", *(each for each in KINDS if each != "spam"))  # which a training plants
            raise InputError(f"cannot forget {kind!r}; what to forget is one of {', '.join(named)}")
        if value is None:
            raise InputError(f"forget_{kind} names nobody")
        read, _ = STRATEGIES[kind]
        return cls(kind, read(f"forget_{kind}", value, config), config["forget_seed"])

    def rows(self, split: "Split", beyond: bool = False) -> np.ndarray:
        """Rows of ``split.users`` / ``split.items`` to forget: int64, sorted.

        Args:
            beyond: whether more is done for what is named, so that it may have no row.

        Raises:
            InputError: unknown tokens, pairs that are not training interactions, an empty set, or one that leaves
                no training data.
        """
        _, select = STRATEGIES[self.kind]
        rows = select(split, self.value, np.random.default_rng(self.seed))
        if len(rows) == 0 and (self.unread or any(map(len, self.named(split).values()))):
            if beyond or (split.config["purge_dataset"] and self.forgotten_before(split)):
                return rows
            raise InputError(
                "the forget set is empty: no training interaction matches the request; what else names these is taken "
                "by run_unlearn, with purge, purge_dataset and everywhere: True"
            )
        return checked(split, rows)

    def rows_left(self, split: "Split", gone: np.ndarray) -> np.ndarray:
        """As `rows`, of a split of which some rows, bool, are gone: what is drawn or counted is so among the others.

        As it would be of a split that never had them. Who is named is named of all.
        """
        if self.kind not in COUNTED or not gone.any():
            return self.rows(split)
        left = np.flatnonzero(~gone)
        return left[self.rows(_of_rows(split, split.users[left], split.items[left]))]

    def whole(self, split: "Split") -> dict[str, np.ndarray]:
        """Users and items of whom all is to be forgotten, by ``user`` and ``item``: ids, int64, sorted."""
        named = {"user": np.empty(0, np.int64), "item": np.empty(0, np.int64)}
        if self.kind in ("users", "items"):
            named[self.kind[:-1]] = np.unique(ids(split, self.kind[:-1], self.value))  # pyright: ignore
        elif self.kind == "requests":
            named |= requests.whole(split, self.value)  # pyright: ignore
        return named

    def named(self, split: "Split") -> dict[str, np.ndarray]:
        """As `whole`, and by ``pair`` the `Split.pair_numbers` of the pairs that are named."""
        users, items = np.empty(0, np.int64), np.empty(0, np.int64)
        if self.kind == "file":
            users, items = (
                ids(split, field, own) for field, own in zip(("user", "item"), self.value.columns, strict=True)
            )
        elif self.kind == "requests":
            users, items = requests.pairs(split, self.value)  # pyright: ignore
        return {**self.whole(split), "pair": np.unique(split.pair_numbers(users, items))}

    def lacking(self, split: "Split") -> Tokens:
        """What this names that the data set, as it was read, does not know."""
        alone: dict[str, list[str]] = {}
        pairs: Iterable[tuple[str, str]] = ()
        if self.kind in ("users", "items"):
            alone[self.kind[:-1]] = self.value
        elif self.kind == "file":
            pairs = zip(*self.value.columns, strict=True)
        elif self.kind == "requests":
            alone, pairs = requests.tokens(self.value)
        found: dict[str, list[Any]] = {"pair": split.never_read(list(pairs))}
        for of, named in alone.items():
            found[of] = [each for each in named if not is_known(split, of, each)]
        return {of: sorted(set(each)) for of, each in found.items() if each}

    def without(self, unread: Tokens) -> "ForgetRequest":
        """The rest of it, with these, that its ``value`` names, in ``unread``."""
        gone = {of: set(each) for of, each in unread.items()}
        value = self.value
        if self.kind in ("users", "items"):
            value = value.without(gone.get(self.kind[:-1], ()))
        elif self.kind == "file":
            kept = [pair for pair in zip(*value.columns, strict=True) if pair not in gone.get("pair", ())]
            value = replace(value, columns=([user for user, _ in kept], [item for _, item in kept]))
        elif self.kind == "requests":
            value = requests.without(value, gone)
        return replace(self, value=value, unread=unread)

    def forgotten_before(self, split: "Split") -> int:
        """How many interactions this names that were forgotten before and are in the data set still."""
        return int(np.count_nonzero(split.among(*split.earlier, self.named(split))))

    def begun(self, split: "Split", rows: np.ndarray) -> np.ndarray:
        """Whether this names interactions that histories begin with too, see `Split.firsts`, which are in no row.

        Args:
            rows: that it names.

        Returns:
            int8, 1 where it does, 0 where not, -1 where nobody can tell.
        """
        users, items = split.firsts()
        none = np.zeros(len(users), np.int8)
        if not len(users):
            return none
        if self.kind == "time":
            return _in_window(split, self.value)[0]
        if self.kind == "category":
            return _in_category(_of_rows(split, users, items), self.value)
        if self.kind in ("popular_items", "rare_items"):
            return np.isin(items, split.items[rows]).astype(np.int8)
        if self.kind in ("users", "items", "file", "requests"):
            return split.among(users, items, self.named(split)).astype(np.int8)
        return none


def _of_rows(split, users, items):
    """A split whose rows are other interactions."""
    other = copy.copy(split)
    other.users, other.items = users, items
    return other


def checked(split: "Split", rows: np.ndarray) -> np.ndarray:
    """Rows of a split to forget, sorted. InputError where there are none, or none would be left."""
    if len(rows) == 0:
        raise InputError("the forget set is empty: no training interaction matches the request")
    if len(rows) >= split.n_rows:
        raise InputError(f"the forget set is all {split.n_rows} training interactions; nothing would be left to model")
    return np.sort(rows)


# -- readers: (key, value, config) -> checked value


def _share(key, value, config):
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1):
        raise InputError(f"{key} must lie between 0 and 1, both excluded; got {value!r}")
    return value


def _whole(key, value, config):
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} must be a whole number of at least 1; got {value!r}")
    return value


def _tokens(key, value, config):
    return read_tokens(key, value)


def _path(key, value, config):
    if not isinstance(value, (str, Path)):
        raise InputError(f"{key} must be the path of a file, not {value!r}")
    return value


@dataclass(frozen=True)
class PairsOfFile:
    """What a file names, read once: it may be gone, or another, when the model has forgotten."""

    path: str | Path
    columns: tuple[list[str], list[str]]  # tokens of users and of items


def _pairs_file(key, value, config):
    path = _path(key, value, config)
    header = f"{config['USER_ID_FIELD']}:token", f"{config['ITEM_ID_FIELD']}:token"
    pairs = _read_pairs(path, header)
    return PairsOfFile(path, ([user for user, _ in pairs], [item for _, item in pairs]))


def _table(key, value, config):
    return requests.read(_path(key, value, config))


def _categories(key, value, config):
    """(field, categories); a category may hold commas, so that several need a list."""
    return config["forget_category_field"], read_tokens(key, value, commas=False)


def _window(key, value, config):
    """(from, to) as timestamps; an open end is infinite."""
    start, dots, end = (part.strip() for part in str(value).partition(".."))
    try:
        if not dots or not (start or end):
            raise ValueError
        window = _moment(start)[0] if start else -math.inf, _moment(end)[1] if end else math.inf
    except (ValueError, OverflowError):
        raise InputError(
            f"{key} must be FROM..TO with timestamps or ISO dates, such as 1998-01-01..1998-01-31; got {value!r}"
        ) from None
    if window[0] > window[1]:
        raise InputError(f"{key} ends before it starts: {value!r}")
    return window


def _moment(text):
    """First and last second of a timestamp or an ISO date; a date without a time is its whole day (UTC)."""
    try:
        seconds = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        seconds = moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()
        if _is_day(text):
            return seconds, math.nextafter(seconds + 86_400, -math.inf)
    if not math.isfinite(seconds):
        raise ValueError
    return seconds, seconds


def _is_day(text):
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


def _spam(key, value, config):
    spammers(config)
    return value


def spammers(config: Config) -> tuple[int, int | list[str]] | None:
    """(number of accounts, promoted items) of ``forget_spam``; None where it is not given.

    The items are a number of rarest ones, or a list of tokens.
    """
    if config["forget_spam"] is None:
        return None
    items = config["spam_items"]
    if isinstance(items, str) and re.fullmatch("0|[1-9][0-9]*", items):  # any other text is a token
        items = int(items)
    if isinstance(items, int):
        items = _whole("spam_items", items, config)
    elif isinstance(items, (str, list, tuple)) and len(items):
        items = read_tokens("spam_items", items)
    else:
        raise InputError(f"spam_items must be a number of items or a list of item tokens; got {items!r}")
    return _whole("forget_spam", config["forget_spam"], config), items


# -- strategies: (split, value, random generator) -> rows of the split


def _draw_share(split, share, rng):
    count = round(share * split.n_rows)
    if count == 0:
        raise InputError(
            f"forget_ratio={share} of {split.n_rows} training interactions is less than one; "
            f"use at least {1 / split.n_rows:.2g}"
        )
    return _draw(split, count, rng)


def _draw(split, count, rng):
    if count > split.n_rows:
        raise InputError(f"forget_count is {count}, but there are only {split.n_rows} training interactions")
    return rng.choice(split.n_rows, count, replace=False)


def _of_users(split, tokens, rng):
    return np.flatnonzero(np.isin(split.users, ids(split, "user", tokens)))


def _of_items(split, tokens, rng):
    return np.flatnonzero(np.isin(split.items, ids(split, "item", tokens)))


def _of_extreme_users(split, count, rng, most):
    """Core users have the most training interactions, edge users the fewest.

    So CURE4Rec's published code selects them (Chen et al., NeurIPS 2024, github.com/xiye7lai/CURE4Rec, read.py), as
    a share of the users; here it is a number, and ties are drawn by seed instead of taken in the order of the file.
    """
    return np.flatnonzero(np.isin(split.users, _extreme("users", split.users, count, rng, most)))


def _of_extreme_items(split, count, rng, most):
    return np.flatnonzero(np.isin(split.items, _extreme("items", split.items, count, rng, most)))


def _extreme(what, ids, count, rng, most):
    """The ``count`` distinct values that occur most or least often in ``ids``, ties in random order."""
    present, occurrences = np.unique(ids, return_counts=True)
    if count > len(present):
        raise InputError(f"{count} {what} are asked for, but only {len(present)} have training interactions")
    order = rng.permutation(len(present))
    order = order[np.argsort(-occurrences[order] if most else occurrences[order], kind="stable")]
    return present[order[:count]]


def rarest(split: "Split", count: int, rng: np.random.Generator) -> np.ndarray:
    """Ids of the items with the fewest training interactions, at least one each."""
    return _extreme("items", split.items, count, rng, most=False)


def _of_category(split, value, rng):
    told = _in_category(split, value)
    if mixed := np.count_nonzero(told < 0):
        raise InputError(
            f"forget_category cannot tell {mixed} interactions apart: their users and items meet in other lines of the "
            f".inter file too, of which {value[0]} is another; name the pairs in forget_file, which forgets all of them"
        )
    return np.flatnonzero(told)


def _in_category(split, value):
    """Whether interactions are of some categories, as `_told` says it.

    Of items, users or single interactions: the one file whose column knows the categories says which.
    """
    field, categories = value
    data = split.train._dataset
    keys = {"item": [data.iid_field], "user": [data.uid_field], "inter": [data.uid_field, data.iid_field]}
    offered = {ending: _categorical(data, ending, own) for ending, own in keys.items()}
    endings = [ending for ending, types in offered.items() if field in types]
    if not endings:
        _check_there(data, "forget_category")
        found = [f"{name} ({of})" for of, types in offered.items() for name in types]
        raise InputError(
            f"forget_category_field must name a token column of the .item, .user or .inter file of data set "
            f"{data.dataset_name!r}, one of {', '.join(found) or 'none'}; got {field!r}"
        )
    found, unknown = {}, []
    for ending in endings:
        table = read_columns(data, ending, [*keys[ending], field])
        names = table[field]
        if offered[ending][field] == "token_seq":
            names = names.str.split(data.config["seq_separator"]).explode()
        known = set(names) - {""}
        if missing := [category for category in categories if category not in known]:
            near = nearest(missing[0], known)
            unknown.append(f"unknown category {missing[0]!r} in column {field} of the .{ending} file{near}")
        else:
            found[ending] = table, names
    if not found:
        raise InputError("; ".join(unknown))
    if len(found) > 1:
        both = " and ".join(f".{ending}" for ending in found)
        raise InputError(
            f"forget_category could be meant of each: column {field} of the files {both}; rename it in one of them"
        )
    ((ending, (table, names)),) = found.items()
    chosen = names.isin(categories).groupby(level=0).any()
    named = [table[key].map(data.field2token_id[key]) for key in keys[ending]]
    if ending == "inter":
        users, items = named
        there = (users.notna() & items.notna()).to_numpy()
        return _told(
            split.pair_numbers(split.users, split.items), split.pair_numbers(users[there], items[there]), chosen[there]
        )
    owners = split.items if ending == "item" else split.users
    return np.isin(owners, named[0][chosen].dropna()).astype(np.int8)


def _told(own, lines, chosen):
    """What the lines that have some key say of it, int8: 1 where all are chosen, 0 where none is, -1 of both."""
    some, other = np.isin(own, lines[chosen]), np.isin(own, lines[~chosen])
    return np.where(some & other, -1, some).astype(np.int8)


def _check_there(data, key):
    """Raises InputError where a data set has no files beside it any more, since it was frozen with a log."""
    if is_frozen(data.config):
        raise InputError(
            f"{key} reads columns of files, and after purge_dataset the model's data are those kept with "
            "its log, which have none; name users, items or pairs"
        )


def _categorical(data, ending, keys):
    """Token columns beside the keys of a file -> type; none where there is no such file."""
    if not file_exists(data, ending):
        return {}
    types = column_types(data, ending)
    if not set(keys) <= set(types):
        return {}
    return {name: kind for name, kind in types.items() if kind in ("token", "token_seq") and name not in keys}


def _of_time(split, window, rng):
    _, told = _in_window(split, window)
    if mixed := np.count_nonzero(told < 0):
        raise InputError(
            f"forget_time cannot tell {mixed} repeated interactions apart; train with rm_dup_inter: first, or name the "
            "pairs in forget_file, which forgets all of them"
        )
    return np.flatnonzero(told)


def _in_window(split, window):
    """Whether interactions lie between two times of the .inter file, as `_told` says it, -1 where nobody can tell.

    Returns:
        (of those that histories begin with, of training interactions)
    """
    data = split.train._dataset
    _check_there(data, "forget_time")
    field, types = data.time_field, column_types(data, "inter")
    if types.get(field) != "float":
        raise InputError(
            f"forget_time needs timestamps, but the .inter file of data set {data.dataset_name!r} has no float column "
            f"{field!r}; name the column in TIME_FIELD"
        )
    file = read_columns(data, "inter", [data.uid_field, data.iid_field, field])
    users, items = (file[key].map(data.field2token_id[key]) for key in (data.uid_field, data.iid_field))
    file = pd.DataFrame({"user": users, "item": items, "time": pd.to_numeric(file[field], errors="coerce")})
    file = file.dropna(subset=["user", "item"])
    lines = pd.DataFrame(
        {"pair": split.pair_numbers(file["user"], file["item"]), "time": file["time"].astype(np.float64)}
    )
    lines["inside"] = lines["time"].between(*window)
    own = _occurrences(split, field)
    told = _told(own["pair"], lines["pair"], lines["inside"])
    asked, trained = (own["part"] != HELD_OUT).to_numpy(), (own["part"] == TRAINED).to_numpy()
    if (told[asked] < 0).any():
        if "loaded" not in own:
            raise InputError(
                f"the data set repeats interactions; train with {field} in load_col, to tell them apart in time"
            )
        told[told < 0] = _told_apart(own[told < 0], lines, own["pair"], data.config["eval_args"]["order"] != "RO")
    if not told[trained].any():
        known = lines["time"][lines["pair"].isin(own["pair"][trained])]
        raise InputError(
            "no training interaction lies in forget_time; their timestamps run from "
            f"{known.min():.15g} to {known.max():.15g}, and dates count as seconds since 1970 (UTC)"
        )
    return told[own["part"] == BEGUN], told[trained]


def _occurrences(split, time):
    """All interactions, rows in the order in which they stand in the data: part, pair and, if there is, loaded time."""
    held_out = [loader._dataset for loader in (split.valid, split.test)]
    data = split.train._dataset

    def column(field, begun, trained):
        rest = [part.inter_feat[field].numpy() for part in held_out]
        return [each[:, 0] if each.ndim > 1 else each for each in (begun, trained, *rest)]  # as numerical features are

    users, items = split.firsts()
    users, items = column(data.uid_field, users, split.users), column(data.iid_field, items, split.items)
    parts = np.repeat([BEGUN, TRAINED, HELD_OUT, HELD_OUT], [len(each) for each in users])
    found = pd.DataFrame({"part": parts, "pair": split.pair_numbers(np.concatenate(users), np.concatenate(items))})
    if time in data.inter_feat.columns:
        own = data.inter_feat[time].numpy()[split.data_row]
        found["loaded"] = np.concatenate(column(time, split.firsts(time)[1], own)).astype(np.float32)
    return found


def _told_apart(own, lines, pairs, ordered):
    """As `_told`, of repeated interactions: to each the line of whose time RecBole has made the one that it loaded.

    That is rounded to float32, over a minute in Unix seconds, and with ``normalize_all`` scaled to 0..1 before. Of as
    many interactions as lines with the same one, the first is of the first line, and so on: which nobody knows where
    they were shuffled (not ``ordered``) and some are not of training.

    Args:
        pairs: of all interactions, whose lines' times are scaled.
    """
    keys, ends = ["pair", "loaded"], []
    for times in (lines["time"], lines["time"][lines["pair"].isin(pairs)]):  # what was filtered out is not scaled
        ends.append((times.min(), times.max()))
    lines = lines[lines["pair"].isin(own["pair"])].copy()
    timeless = own["pair"].isin(lines["pair"][lines["time"].isna()])  # to which RecBole gives the mean
    for low, high in ((0.0, 1.0), *ends):
        lines["loaded"] = ((lines["time"] - low) / (high - low)).astype(np.float32)
        groups = own.assign(known=ordered | (own["part"] == TRAINED)).groupby(keys)
        found = own.assign(count=groups["pair"].transform("size"), known=groups["known"].transform("all"))
        found["place"], lines["place"] = groups.cumcount(), lines.groupby(keys).cumcount()
        found = found.merge(lines[[*keys, "place", "inside"]], "left", [*keys, "place"])
        found = found.join(lines.groupby(keys)["inside"].agg(["any", "all", "size"]), on=keys)
        if (found["size"].notna() | timeless.to_numpy()).all():
            paired = np.where(found["known"] & (found["count"] == found["size"]), found["inside"], -1)
            told = np.where(found["any"] == found["all"], found["any"], paired)
            return np.where(found["size"].notna(), told, 0).astype(np.int8)
    return np.full(len(own), -1, np.int8)


def _of_spam(split, accounts, rng):
    if not len(split.spam):
        raise InputError(
            "the forget set is empty: there is no spam to forget, which forget_spam of run_unlearn plants in training; "
            "of your own data name users, items or pairs"
        )
    return split.spam


def _in_requests(split, table, rng):
    return np.unique(np.concatenate([np.empty(0, np.int64), *requests.rows_of(split, table)]))


def _in_file(split, value, rng):
    pairs = list(zip(*value.columns, strict=True))
    return rows_of_pairs(split, pairs, value.path) if pairs else np.empty(0, np.int64)


def rows_of_pairs(split, pairs, where):
    """Rows of the split that are some pairs of a user token and an item token, as they stand; ``where``: to name them.

    Raises:
        InputError: unknown tokens, or pairs that are not training interactions, unless their lines alone are to go.
    """
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
        raise InputError(f"{where} must be pairs of a user token and an item token, in a list")
    pairs = list(pairs)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{where} must be pairs of a user token and an item token")
    users = ids(split, "user", read_tokens(str(where), [user for user, _ in pairs]))
    items = ids(split, "item", read_tokens(str(where), [item for _, item in pairs]))
    keys, wanted = split.pair_numbers(split.users, split.items), split.pair_numbers(users, items)
    before = np.isin(wanted, split.pair_numbers(*split.earlier))
    held_out = np.isin(wanted, split.held_out_pairs())
    # purge_dataset removes the lines of the ones, everywhere those of the others
    served = (before & bool(split.config["purge_dataset"])) | (held_out & bool(split.config["everywhere"]))
    missing = ~np.isin(wanted, keys) & ~served
    if missing.any():
        user, item = pairs[np.flatnonzero(missing)[0]]
        begun = np.isin(wanted, split.pair_numbers(*split.firsts()))
        classes = {
            "forgotten before": before,
            "held-out, never trained on": held_out,
            "that histories begin with": begun,
        }
        left, counts = missing, {}
        for what, each in classes.items():
            counts[what], left = np.count_nonzero(each & left), left & ~each
        counts["not in the data as the model read them"] = np.count_nonzero(left)
        found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        raise InputError(
            f"{where}: user {user!r} and item {item!r} are no training interaction ({np.count_nonzero(missing)} such "
            f"of {len(pairs)}: {found}); remove them"
        )
    return np.flatnonzero(np.isin(keys, wanted))


def _read_pairs(path, header):
    """Pairs of tokens, as they stand: of lines with a tab its first two columns, else CSV. ``header``: to pass over."""
    try:
        lines = read_text(path).split("\n")  # str.splitlines ends a line where a token may go on
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read forget_file {path}: {' '.join(str(error).split())}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        try:
            fields = line.split("\t") if "\t" in line else next(csv.reader([line], strict=True, skipinitialspace=True))
        except csv.Error:
            fields = []
        if number == 1 and tuple(fields[:2]) == header:
            continue
        if len(fields) < 2 or not fields[0] or not fields[1]:
            raise InputError(f"{path}, line {number}: expected a user token and an item token, tab- or comma-separated")
        pairs.append((fields[0], fields[1]))
    return pairs


# A new strategy is one line here, its function above, and its key forget_<kind> in properties/overall.yaml.
STRATEGIES = {
    "ratio": (_share, _draw_share),
    "count": (_whole, _draw),
    "users": (_tokens, _of_users),
    "items": (_tokens, _of_items),
    "file": (_pairs_file, _in_file),
    "requests": (_table, _in_requests),
    "core_users": (_whole, partial(_of_extreme_users, most=True)),
    "edge_users": (_whole, partial(_of_extreme_users, most=False)),
    "popular_items": (_whole, partial(_of_extreme_items, most=True)),
    "rare_items": (_whole, partial(_of_extreme_items, most=False)),
    "category": (_categories, _of_category),
    "time": (_window, _of_time),
    "spam": (_spam, _of_spam),
}
KINDS = tuple(STRATEGIES)
# What is a number of what is there, and not named.
COUNTED = tuple(kind for kind, (read, _) in STRATEGIES.items() if read in (_share, _whole))
