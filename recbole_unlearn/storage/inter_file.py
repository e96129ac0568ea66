"""Removing lines from RecBole's atomic files: interactions, and all that names users or items.

A *form* says how a file is read, and may say what lines go with the pairs that are asked for: ``whole``, tokens by name
of their column.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import recbole
from recbole.config import Config

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage.files import is_debris, replacing, sweep

Whole: TypeAlias = Mapping[str, Iterable[str]]  # tokens by ``user`` and ``item``
NOBODY: Whole = {}
PIECE = 2**24  # bytes looked through at a time
OTHERS = ("user", "item", "link", "kg")  # endings of files that may name users or items too
# Settings with which the file's rows are not simply the data set's interactions.
UNPLAIN = (
    "benchmark_filename",
    "additional_feat_suffix",
    "alias_of_user_id",
    "alias_of_item_id",
    "threshold",
    "discretization",
)


def reading(config: Config, whole: Whole = NOBODY) -> dict[str, Any]:
    """What it takes to read the file, as plain values; ``whole``: users and items all of whose lines are to go."""
    fields = {"user": config["USER_ID_FIELD"], "item": config["ITEM_ID_FIELD"]}
    gone = {fields[part]: sorted(set(tokens)) for part, tokens in whole.items() if tokens}
    return {
        "separator": config["field_separator"],
        "encoding": config["encoding"] or "utf-8",
        "fields": list(fields.values()),
        "whole": gone,
    }


def others(inter: Path, config: Config, whole: Whole) -> dict[str, dict[str, Any]]:
    """Forms of the files beside an ``.inter`` file that have lines of users or items, by ending of their name.

    Those of an item are its line in ``.item``, its link, and the triples of its entity, if no other item has that.
    """
    found = {}
    for path, form, _ in _asked(inter, config, [whole]):
        if names_any(path, form, ()):
            found[path.suffix[1:]] = form
    return found


def mentions(inter: Path, config: Config, wholes: Sequence[Whole]) -> list[dict[str, int]]:
    """As `others`, of each of ``wholes``: the files' names, and how many of their lines go; each file is read once."""
    found: list[dict[str, int]] = [{} for _ in wholes]
    for path, form, asking in _asked(inter, config, wholes):
        _count(found, path, (own for _, own in _asked_lines(path, form, asking)))
    return found


def pairs_naming(inter: Path, config: Config, wholes: Sequence[Whole]) -> list[Counter[tuple[str, ...]]]:
    """Of each of ``wholes``, in how many lines of the ``.inter`` file it is named, by the lines' (user, item) tokens.

    The file, which need not be there, is read once.
    """
    found: list[Counter[tuple[str, ...]]] = [Counter() for _ in wholes]
    for path, named, asking in _asking(inter, reading(config), _tokens(config, wholes)):
        for values, own in _asked_lines(path, named, asking):
            for n in own:
                found[n][values] += 1
    return found


def _asked_lines(path, form, asking):
    """(values, who asks for it) of each line of a file that somebody asks for, see `_asked`."""
    for _, values in lines(path, form):
        if values is not None:
            named = zip(form["fields"], values, strict=True)
            if own := set().union(*(asking[field].get(value, ()) for field, value in named)):
                yield values, own


def _count(found, path, lines):
    """Count lines of a file, each given by who asks for it, in ``found``."""
    for asking in lines:
        for n in asking:
            found[n][path.name] = found[n].get(path.name, 0) + 1


def _asked(inter, config, wholes):
    """(path, its form, who asks: number in ``wholes`` by field and token) of files that may have lines of any."""
    form = reading(config)
    (user, users), (item, items) = _tokens(config, wholes).items()
    yield from _asking(beside(inter, "user"), form, {user: users})
    for ending in ("item", "link"):
        yield from _asking(beside(inter, ending), form, {item: items})
    if any(items) and beside(inter, "link").is_file() and beside(inter, "kg").is_file():
        entity, owners = config["ENTITY_ID_FIELD"] or "entity_id", {}
        for _, values in records(beside(inter, "link"), {**form, "fields": [item, entity]}):
            if values:
                owners.setdefault(values[1], set()).add(values[0])
        ends = [config[f"{end}_ENTITY_ID_FIELD"] or f"{end.lower()}_id" for end in ("HEAD", "TAIL")]
        own = [[each for each, theirs in owners.items() if theirs <= {*some}] for some in items]
        yield from _asking(beside(inter, "kg"), form, dict.fromkeys(ends, own))


def _tokens(config, wholes):
    """Tokens of each of ``wholes``, by their field: users', then items'."""
    gone = [reading(config, whole) for whole in wholes]
    return {field: [each["whole"].get(field, []) for each in gone] for field in reading(config)["fields"]}


def _asking(path, form, tokens):
    """As `_asked`, of one file; ``tokens``: by its field, those of each who asks."""
    asking: dict[str, dict[str, list[int]]] = {field: {} for field in tokens}
    for field, each in tokens.items():
        for n, own in enumerate(each):
            for token in own:
                asking[field].setdefault(token, []).append(n)
    if any(asking.values()) and path.is_file():
        named = {**form, "fields": list(tokens), "whole": {field: sorted(own) for field, own in asking.items()}}
        _check_plain(path, named)
        yield path, named, asking


def strangers(inter: Path, config: Config, wholes: Sequence[Whole]) -> list[dict[str, int]]:
    """Of each of ``wholes``: other files in the folder, by name, and how many of their lines have a token of these.

    Whatever column it is in, alone or in a list: nobody knows how to read them, and nothing is taken out of them. Each
    file is read once.
    """
    form = reading(config)
    found: list[dict[str, int]] = [{} for _ in wholes]
    asking: dict[bytes, list[int]] = {}
    for n, whole in enumerate(wholes):
        for token in {token for tokens in whole.values() for token in tokens}:
            asking.setdefault(token.encode(form["encoding"]), []).append(n)
    separator, known = form["separator"].encode(form["encoding"]), {beside(inter, each) for each in ("inter", *OTHERS)}
    for path in sorted(inter.parent.iterdir()) if asking and inter.parent.is_dir() else ():
        if path in known or not path.is_file() or is_debris(path):
            continue
        try:
            with open(path, "rb") as file:
                values = (line.rstrip(b"\r\n").split(separator) for line in file)
                tokens = (asking.keys() & {*own, *b" ".join(own).split(b" ")} for own in values)
                _count(found, path, (set().union(*map(asking.__getitem__, own)) for own in tokens))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
    return found


def beside(inter: Path, ending: str) -> Path:
    """The data set's file with another ending."""
    return inter.with_suffix(f".{ending}")


def count(path: Path, form: Mapping[str, Any], pairs: Iterable[tuple[str, str]] = ()) -> int:
    """Lines that name one of these (user token, item token), or what a form says."""
    pairs, form = set(pairs), _quick(form)
    return sum(_named(values, form, pairs) for _, values in lines(path, form))


def plainly(path: Path, config: Config, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of some pairs that the file names, nowhere otherwise than RecBole reads it."""
    pairs, found, hidden = set(pairs), set(), set()
    for own, record in records(path, reading(config)) if pairs else ():
        (found if own == [record] else hidden).update(pairs.intersection([*own, record]))
    return sorted(found - hidden)


def _named(values, form, pairs):
    """Whether a line's values are among some pairs, or what a form of `_quick` says."""
    return values is not None and (
        values in pairs
        or any(value in form["whole"].get(field, ()) for field, value in zip(form["fields"], values, strict=True))
    )


def plain_path(config: Config) -> Path:
    """Path of the data set's ``.inter`` file.

    Raises:
        InputError: it is RecBole's own example, or not in the plain form that lines can be removed from.
    """
    path = Path(config["data_path"]) / f"{config['dataset']}.inter"
    unplain = [key for key in UNPLAIN if config[key]]
    if unplain:
        raise InputError(f"purge_dataset works on plain files only, not with {unplain[0]}; edit the data yourself")
    if not path.is_file():
        raise InputError(f"purge_dataset: {path} does not exist; check data_path")
    if Path(recbole.__path__[0]).resolve() in path.resolve().parents:
        raise InputError(
            f"purge_dataset: {path} is RecBole's own example; copy it under another name and train on that"
        )
    return path


def check(path: Path, config: Config, pairs: Iterable[tuple[str, str]], whole: Whole = NOBODY) -> None:
    """Raises InputError where lines of the file that are to go could not be removed.

    Every pair must be found, and lines of users and items as a whole be as RecBole read them.
    """
    pairs, found = set(pairs), set()
    for own, _ in records(path, reading(config)):
        found |= pairs.intersection(own)
    if found != pairs:
        raise InputError(
            f"purge_dataset: {path} does not name {len(pairs - found)} of {len(pairs)} forgotten interactions as "
            "RecBole read them (quoted fields?); edit it yourself"
        )
    _check_plain(path, reading(config, whole), pairs)


def _check_plain(path, form, pairs=()):
    """Raises InputError where RecBole reads otherwise than line by line what is to go."""
    if not _quotes(path):
        return
    pairs, form = set(pairs), _quick(form)
    others = ((own, record) for own, record in records(path, form) if own != [record])
    if torn := sum(any(_named(values, form, pairs) for values in (*own, record)) for own, record in others):
        raise InputError(
            f"purge_dataset: {path} does not name whom it is to lose in {torn} lines as RecBole read them (quoted "
            "fields?); edit it yourself"
        )


def _quotes(path):
    """Whether there are any in a file."""
    try:
        with open(path, "rb") as f:
            return any(b'"' in piece for piece in iter(partial(f.read, PIECE), b""))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def records(
    path: Path, form: Mapping[str, Any]
) -> Iterator[tuple[list[tuple[str, ...] | None], tuple[str, ...] | None]]:
    """(values of each of its lines, its values) of each record after the header, as RecBole, which knows quotes, reads.

    In quotes there may be separators and ends of lines.
    """
    if len(form["separator"]) > 1 or not _quotes(path):
        for _, values in islice(lines(path, form), 1, None):
            yield [values], values
        return
    own = []

    def texts():
        for line, values in lines(path, form):
            own.append(values)
            yield line.decode(form["encoding"])

    try:
        records = csv.reader(texts(), delimiter=form["separator"])
        names = [name.split(":")[0] for name in next(records)]
        places = [names.index(field) for field in form["fields"]]
        own.clear()
        for record in records:
            yield [*own], tuple(record[place] for place in places) if len(record) > max(places) else None
            own.clear()
    except csv.Error as error:
        raise InputError(f"{path} cannot be read ({error}; quoted fields?); edit it yourself") from None


def seal(path: Path) -> list[int]:
    """What tells this file, as it is now, from any other: its status changes by kernel's clock alone."""
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_ctime_ns]


def names_any(path: Path, form: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether the file names one of these (user token, item token), or what the form says."""
    pairs, form = set(pairs), _quick(form)
    return any(_named(values, form, pairs) for _, values in lines(path, form))


def remove_pairs(path: Path, form: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> None:
    """Replace the file, atomically, by one without the lines of these (user token, item token), and what the form says.

    All else stays. Call it holding the file's lock.

    Args:
        form: of `reading`.
    """
    pairs, form = set(pairs), _quick(form)
    sweep(path.parent)
    with replacing(path, keep_mode=True) as f:
        for line, values in lines(path, form):
            if not _named(values, form, pairs):
                f.write(line)


def _quick(form):
    """A form whose tokens are sets."""
    return {**form, "whole": {field: set(tokens) for field, tokens in (form.get("whole") or {}).items()}}


def lines(path, form):
    """(line as bytes, tuple of the form's fields) of each line, the header's being None."""
    try:
        with open(path, "rb") as f:
            header = next(f, b"")
            names = [
                name.split(":")[0] for name in header.decode(form["encoding"]).rstrip("\r\n").split(form["separator"])
            ]
            places = [names.index(field) for field in form["fields"]]
            yield header, None
            for line in f:
                fields = line.decode(form["encoding"]).rstrip("\r\n").split(form["separator"])
                yield line, tuple(fields[place] for place in places) if len(fields) > max(places) else None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError) as error:
        raise InputError(f"{path} is no {path.suffix} file of this data set ({error}); check data_path") from None
