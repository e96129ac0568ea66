"""What a request takes out of the data set beside the rows that are forgotten, and what it leaves there."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.data.interaction import Interaction

from recbole_unlearn.data import frozen_data
from recbole_unlearn.data.forget import ForgetRequest, Tokens
from recbole_unlearn.data.knowledge import own_entities
from recbole_unlearn.data.scaling import tables_without
from recbole_unlearn.data.split import Split
from recbole_unlearn.data.tokens import FromNumber, is_known
from recbole_unlearn.errors import InputError
from recbole_unlearn.models.support import reads_tables
from recbole_unlearn.storage import inter_file, purging

NOBODY: Mapping[str, np.ndarray] = {}
NOTHING: Tokens = {}
NO_ROWS = NO_PAIRS = np.empty(0, np.int64)


def beyond_rows(config) -> bool:
    """Whether a run does more for users and items as a whole than to forget what was trained on."""
    return bool(config["everywhere"] or config["suppression"])


class Erasure:
    """What becomes of a request's interactions in the files of the data set: found before anything is written.

    Args:
        stored: content of the checkpoint, None of one that is to be trained.
        rows: of the split, that are forgotten.
        whole: of what nothing is to stay: ids by ``user`` and ``item``, `Split.pair_numbers` by ``pair``.
        unread: of what nothing is to stay that the data set does not know, as of `ForgetRequest`.

    Attributes:
        inter (Path): the user's interactions file, which need not be there.
        removal (dict): what `purging.purge` is to take out of it, as keyword arguments; empty without
            ``purge_dataset``.

    Raises:
        InputError: the original or the data set could not be purged.
    """

    def __init__(
        self,
        config,
        split: Split,
        stored: Mapping[str, Any] | None,
        rows: np.ndarray = NO_ROWS,
        whole: Mapping[str, np.ndarray] = NOBODY,
        unread: Tokens = NOTHING,
    ) -> None:
        self.config, self.split, self.rows, self.whole, self.unread = config, split, rows, whole, unread
        self.inter = data_file(config, stored)
        self.removal = self._removal(bool((stored or {}).get("data"))) if config["purge_dataset"] else {}
        if config["purge"]:
            purging.check(config["checkpoint"], **self.removal)

    @classmethod
    def of(
        cls,
        config,
        split: Split,
        stored: Mapping[str, Any] | None,
        request: ForgetRequest,
        rows: np.ndarray | None = None,
    ) -> "Erasure":
        """That of a request by the keys of its run; ``rows``: that it names, where it has been told apart.

        Raises:
            InputError: nobody is named as a whole, though that is asked for, nothing would be left of a part of the
                data, or the original or the data set could not be purged.
        """
        if rows is None:
            request = told_apart(config, split, stored, request)
            rows = request.rows(split, beyond_rows(config))
        return cls(config, split, stored, rows, _whole_of(config, split, request, rows), request.unread)

    def _removal(self, frozen):
        inter, split = self.inter, self.split
        if not frozen:
            inter_file.plain_path(self.config)
        if inter.name != f"{self.config['dataset']}.inter":  # what a checkpoint from elsewhere may say
            raise InputError(f"purge_dataset: {inter} is not {self.config['dataset']}.inter; leave purge_dataset out")
        if not inter.is_file():
            raise InputError(
                f"purge_dataset: {inter} is not there any more; put it back, give the data_path where it lies "
                "now, or leave purge_dataset out"
            )
        if both := len(np.intersect1d(_numbers(split, self.rows), self._kept)):
            raise InputError(
                f"purge_dataset: {both} forgotten pairs of user and item occur in other training interactions too, "
                "which the file does not tell apart; use forget_file, which forgets all of them"
            )
        earlier = inter_file.plainly(inter, self.config, split.pairs_of(self.before))
        pairs, whole = [*self._own, *earlier], all_named(split, self.whole, self.unread)
        return {"inter": inter, "config": self.config, "pairs": pairs, "whole": whole}

    @cached_property
    def before(self) -> np.ndarray:
        """Numbers of the pairs that earlier requests forgot, one for each interaction whose line may still be there.

        Not those that are trained on all the same, or held out: the file does not tell them apart.
        """
        split = self.split
        earlier = split.pair_numbers(*split.earlier)
        if not len(earlier):
            return earlier
        held_out = split.held_out_pairs()
        if self.whole:
            held_out = held_out[~split.among(*np.divmod(held_out, split.n_items), self.whole)]
        return earlier[~np.isin(earlier, np.concatenate([self._kept, held_out]))]

    @cached_property
    def _own(self):
        """Pairs of tokens that the request itself takes out of the data file."""
        held_out = np.intersect1d(self.whole.get("pair", NO_PAIRS), self.split.held_out_pairs())
        return [*self.split.pairs(self.rows), *self.split.pairs_of(held_out), *self.unread.get("pair", ())]

    @cached_property
    def _kept(self):
        """Numbers of the pairs that are trained on without the rows, or that histories begin with."""
        split, (users, items) = self.split, self.split.firsts()
        stay = ~np.isin(users, self.whole.get("user", []))
        trained = _numbers(split, np.delete(np.arange(split.n_rows), self.rows))
        return np.concatenate([trained, split.pair_numbers(users[stay], items[stay])])

    @cached_property
    def unlinked(self) -> np.ndarray:
        """Ids of entities whose facts are to go with the items of ``whole``, that no other item has."""
        items = self.split.token("item", self.whole.get("item", NO_ROWS))
        return own_entities(self.split.train._dataset, map(str, items))

    @cached_property
    def stale(self) -> bool:
        """Whether the model was trained on what goes of the tables beside interactions: facts, or features of others
        that are scaled, or filled in, by the numbers of these."""
        return len(self.unlinked) > 0 or (reads_tables(self.config.model_class) and bool(self.tables))

    @cached_property
    def tables(self) -> dict[str, Interaction]:
        """The tables of users and items whose numbers are others without the lines that go."""
        return tables_without(self.config, self.split.train._dataset, self.whole, self._given)

    def _given(self, part, column):
        """Tokens of users or items with a number in a column of their file; None: it cannot be read any more."""
        path, form = inter_file.beside(self.inter, part), inter_file.reading(self.config)
        form["fields"] = [form["fields"][part == "item"], column]
        try:
            lines = [values for _, values in inter_file.records(path, form) if values]
        except InputError:
            return None
        table = pd.DataFrame(lines, columns=["token", "number"])
        return set(table["token"][pd.to_numeric(table["number"], errors="coerce").notna()])

    def rest_of(self, split: Split) -> None:
        """Have what remains of a split be without these lines and facts, too."""
        split.tables, split.unlinked, split.stale = self.tables, self.unlinked, self.stale

    def check_stale(self, exact: bool) -> None:
        """Raises InputError where a model would stay trained on what is to go."""
        if self.stale and not exact:
            facts, scaled = f"the facts of {len(self.unlinked)} of these items", "features scaled by those of these"
            raise InputError(
                f"everywhere: True: {self.config['model']} would stay trained on "
                f"{facts if len(self.unlinked) else scaled}, since this request is not served by training again; give "
                "method: replay and replay_rows: all"
            )

    @cached_property
    def lines(self) -> dict[str, int] | None:
        """How many lines the file loses, of this request and of earlier ones alone; None: nothing is taken out."""
        if not self.removal:
            return None
        form = inter_file.reading(self.config, self.removal["whole"])
        own, pairs = set(self._own), set(self.removal["pairs"])
        requested = inter_file.count(self.inter, form, own)
        earlier = inter_file.count(self.inter, form, pairs) - requested if pairs > own else 0
        return {"requested": requested, "earlier": earlier}

    def times_read(self, pairs: Collection[tuple[str, str]]) -> np.ndarray:
        """How many interactions of the data as read each pair of (user token, item token) is, int64."""
        numbers, counts = self._read
        wanted = self.split.numbers_of(pairs)
        places = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
        return np.where(numbers[places] == wanted, counts[places], 0)

    @cached_property
    def _read(self):
        return np.unique(self.split.pairs_read(), return_counts=True)

    def left(self, request: ForgetRequest) -> str | None:
        """In words, what there still is of those whom a request names, and of earlier requests'; None: nothing."""
        [own] = left_over(self, [(request, self.rows)])
        return "; ".join(filter(None, [own, self._untold()])) or None

    def _untold(self):
        """In words, what of earlier requests the file keeps though it is to lose it; None: nothing."""
        if not self.removal:
            return None
        name, kept = self.inter.name, []
        if hidden := len(set(self.split.pairs_of(self.before)) - set(self.removal["pairs"])):
            kept.append(
                f"{_many(hidden, 'pair')} forgotten before, which {name} names otherwise than RecBole read it (quotes?)"
            )
        if doubtful := self.split.doubtful:
            kept.append(
                f"{_many(doubtful, 'line')} of {name} that earlier requests forgot or that are new, which the "
                "model's log does not tell (it is of an earlier version, or the data have changed since)"
            )
        return "; ".join(kept) or None


def told_apart(config, split: Split, stored: Mapping[str, Any] | None, request: ForgetRequest) -> ForgetRequest:
    """A request whose `ForgetRequest.unread` is what it names that the files have and the data set was not read with.

    That was dropped by a filter, or is new since. Its lines go with ``everywhere``, and such a request is refused
    without, where it names somebody of whom there is nothing else.

    Raises:
        InputError: as said; or a model would stay trained on facts of such items.
    """
    lacking = request.lacking(split)
    if request.kind == "requests" and not config["everywhere"]:  # passes over what nobody trained on
        lacking = {of: [each for each in own if of != "pair" or unknown(split, each)] for of, own in lacking.items()}
    inter = data_file(config, stored)
    unread = in_files(inter, config, lacking)
    if not unread:
        return request
    if not config["everywhere"]:
        many = " and ".join(_many(len(each), of) for of, each in unread.items())
        raise InputError(
            f"the data set was not read with {many} of the request, which its files name (dropped by a filter, or new "
            "since); purge, purge_dataset and everywhere: True take their lines"
        )
    if guessed := [each for own in unread.values() for each in own if isinstance(each, FromNumber)]:
        raise InputError(f"the token {guessed[0]} was given as a number, and the data set does not know it; quote it")
    facts = inter_file.beside(inter, "kg").name
    if hasattr(split.train._dataset, "kg_feat") and any(
        facts in each for each in inter_file.mentions(inter, config, [{"item": unread.get("item", [])}])
    ):
        raise InputError(
            f"everywhere: True: {config['model']} would stay trained on facts of items that no interaction is of; take "
            "their lines out of the files yourself, and train anew"
        )
    return request.without(unread)


def unknown(split: Split, pair: tuple[str, str]) -> list[str]:
    """Fields, ``user`` and ``item``, of a pair's token that the data set does not know; an empty one names nobody."""
    each = zip(("user", "item"), pair, strict=True)
    return [field for field, token in each if token and not is_known(split, field, token)]


def in_files(inter: Path, config, named: Tokens) -> Tokens:
    """Of tokens, by ``user`` and ``item``, and pairs of tokens, by ``pair``, those that files of the data set name."""
    asked = [(of, each) for of, tokens in named.items() for each in tokens]
    wholes = [{"user": each[:1]} if of == "pair" else {of: [each]} for of, each in asked]
    lines, files = inter_file.pairs_naming(inter, config, wholes), inter_file.mentions(inter, config, wholes)
    found: dict[str, list[Any]] = {}
    for (of, each), pairs, others in zip(asked, lines, files, strict=True):
        if each in pairs if of == "pair" else pairs or others:
            found.setdefault(of, []).append(each)
    return found


def all_named(split: Split, whole: Mapping[str, np.ndarray], unread: Tokens) -> dict[str, list[str]]:
    """Tokens of users and items: those of ids, and those that the data set does not know."""
    known = split.named(whole)
    return {of: [*known.get(of, []), *unread.get(of, [])] for of in ("user", "item")}


def data_file(config, stored: Mapping[str, Any] | None) -> Path:
    """The user's interactions file, which need not be there."""
    earlier = (stored or {}).get("data")
    return Path(earlier["inter"]) if earlier else Path(config["data_path"]) / f"{config['dataset']}.inter"


def _whole_of(config, split, request, rows):
    """Of what nothing is to stay, as `ForgetRequest.named` has it: with ``everywhere`` of what is named.

    With ``purge_dataset`` of the pairs of rows that are held out too, whose lines the file does not tell apart.
    """
    both = _held_out_too(config, split, rows)
    whole = _named_whole(config, split, request) if config["everywhere"] else {}
    if len(both):
        whole |= {"pair": np.union1d(whole.get("pair", NO_PAIRS), both)}
    for name, gone in split.held_out(whole).items() if whole else ():
        if 0 < len(gone) == len(getattr(split, name)._dataset):
            raise InputError(
                f"{'everywhere' if config['everywhere'] else 'purge_dataset'}: True would leave no {name} interaction; "
                "leave it out, or train anew"
            )
    return whole


def _named_whole(config, split, request):
    """As `_whole_of`, with ``everywhere``: what is named."""
    whole = request.named(split)
    if not (request.unread or any(map(len, whole.values()))):
        raise InputError(
            "everywhere: True takes users and items as a whole, and pairs that are named: forget_users, forget_items, "
            "forget_file or forget_requests"
        )
    users, items = split.firsts()
    histories = np.union1d(split.users, split.held_out_pairs() // split.n_items)
    begun = users[split.among(users, items, {**whole, "user": []}) & np.isin(users, histories)]
    if begun := len(np.setdiff1d(begun, whole["user"])):
        raise InputError(
            f"everywhere: True: the histories of {begun} users begin with these items, in no row of its own that could "
            f"be forgotten, so that {config['model']} stays trained on them; leave it out, or train anew without them"
        )
    return whole


def _held_out_too(config, split, rows):
    """Numbers of the pairs of rows that are held out too, where the file loses their lines."""
    if not (config["purge_dataset"] and len(rows)):
        return NO_PAIRS
    return np.intersect1d(_numbers(split, rows), split.held_out_pairs())


def left_over(
    erasure: Erasure, asked: Collection[tuple[ForgetRequest, np.ndarray]], names: bool = True
) -> list[str | None]:
    """In words, what each request leaves of whom or what it names beside its rows; None: nothing.

    Of what is named all; of other requests what histories begin with, of users who are trained on. With
    ``everywhere`` what files of others may say.

    Args:
        erasure: of all of them, or of none.
        asked: requests, each with its rows. What lies in files is looked up for all of them at once.
        names: whether to name files which the data set is not read from.
    """
    config, split, inter = erasure.config, erasure.split, erasure.inter
    tokens = [all_named(split, request.whole(split), request.unread) for request, _ in asked]
    if config["everywhere"]:
        return [_by_others(each, names) for each in inter_file.strangers(inter, config, tokens)]
    mentions = _found(inter_file.mentions, erasure, tokens, f"the files beside {inter.name} say")
    naming = _found(inter_file.pairs_naming, erasure, tokens, f"{inter.name} says")
    each = zip(asked, naming, mentions, strict=True)
    return [_left(erasure, request, rows, *found) for (request, rows), *found in each]


def _found(look, erasure, tokens, what):
    """What files have of each request's ``tokens``; in words, where they cannot be read: nobody asked for them."""
    try:
        return look(erasure.inter, erasure.config, tokens)
    except InputError:
        return [f"what {what}, which cannot be read" if any(own.values()) else {} for own in tokens]


def _by_others(found, names):
    """In words, what `inter_file.strangers` has found for a request."""
    if not found:
        return None
    said = ", ".join(_lines(found if names else {"other files": sum(found.values())}))
    return f"{said}, which may name them and which this data set is not read from"


def _lines(found):
    return [found] if isinstance(found, str) else [f"{_many(n, 'line')} of {name}" for name, n in found.items()]


def _left(erasure, request, rows, naming, mentions):
    """As `left_over` without ``everywhere``, of one request, in whose name files have lines: see `_found`."""
    config, split, inter = erasure.config, erasure.split, erasure.inter
    named, (users, _) = request.named(split), split.firsts()
    begun, of_users = request.begun(split, rows), np.isin(users, named["user"])
    begun = np.where(of_users | np.isin(users, np.delete(split.users, rows)), begun, 0)
    gone = _held_out_too(config, split, rows)
    going = split.held_out({"pair": gone})
    held_out = (np.setdiff1d(own, going[name]) for name, own in split.held_out(named).items())
    counts = [
        ("held-out interaction", sum(map(len, held_out)), ""),
        ("interaction", np.count_nonzero(begun > 0), " that histories begin with"),
        ("first interaction", np.count_nonzero(begun < 0), " of histories of which nobody can tell"),
    ]
    found = [f"{_many(count, what)}{which}" for what, count, which in counts if count]
    found += _unread(erasure, {*split.pairs(rows), *split.pairs_of(gone)}, naming) + _lines(mentions)
    taken = "" if begun[~of_users].any() else "; everywhere: True takes them too"
    left = [f"{', '.join(found)}{taken}"] if found else []
    if frozen_data.is_frozen(config) and len(rows) and not config["purge_dataset"]:
        left.append(
            f"{_many(len(rows), 'line')} of {inter.name}, which no later request can tell: purge_dataset does now"
        )
    return "; ".join(left) or None


def _unread(erasure, own, naming):
    """In words, how many lines of the file, of `_found` in it, the data set does not read: filtered, or new since.

    Those of ``own`` pairs go with these where the file loses lines.
    """
    if isinstance(naming, str):
        return [naming]
    gone = {*own, *erasure.removal["pairs"]} if erasure.removal else set()
    left = {pair: lines for pair, lines in naming.items() if pair not in gone}
    more = np.fromiter(left.values(), np.int64, len(left)) - erasure.times_read(left)
    count = int(np.maximum(more, 0).sum())
    return [f"{_many(count, 'line')} of {erasure.inter.name} that this data set does not read"] if count else []


def _many(count, what):
    return f"{count} {what}{'' if count == 1 else 's'}"


def _numbers(split, rows):
    return split.pair_numbers(split.users[rows], split.items[rows])
