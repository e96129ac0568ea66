"""The guard: whether a training did what its log tells. Forgetting from a log that does not is silently wrong.

One check covers a schedule that was not noted down, weights that were changed on the way, hooks, mixed precision,
another machine's arithmetic: **replay of all rows with nothing forgotten must give the stored weights**. It is made at
the first request, once a log, and kept beside it: at the end of each training it would cost a part of the training even
where nobody ever asks to be forgotten (benchmarks/guard.py). Where a model is not replayed, or not in the order of its
training, what the log says of itself is checked: optimiser, learning rates, numbers of steps.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from recbole.utils import ModelType

from recbole_unlearn.errors import InputError
from recbole_unlearn.storage import audit
from recbole_unlearn.storage.files import file_checksum, read_whole, write_atomically
from recbole_unlearn.storage.triple_log import salt_of, salted, same_start, start_of
from recbole_unlearn.training import adoption
from recbole_unlearn.training.fit import LIMIT, magnitude
from recbole_unlearn.unlearners.base import Way
from recbole_unlearn.unlearners.influence import Influence

if TYPE_CHECKING:
    from recbole_unlearn.unlearner import InfluenceUnlearner

FILE = "guard.json"  # in a log's folder
OPTIMIZERS = {
    "adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop",
    "sparse_adam": "SparseAdam",
}  # fmt: skip
DRAWN = "its negatives are drawn by their law, not known to be those of its training; approximate"
CHANGED = "; features, facts or histories that training reads have changed since the log was checked: put them back"
LEFT = "train anew, or take one approximate step: method: influence"


@dataclass(frozen=True)
class Guard:
    """What is known of whether a log tells its training.

    Attributes:
        checked (str): 'replayed' (see ``distance``), 'inherited' (by the log of an unlearned model, from its
            original's), 'recorded' (what the log says of itself), or 'not'.
        sentence (str): the same in words.
        distance (float or None): of the replay with nothing forgotten from the stored weights, over the way that
            training moved them.
        limit (float or None): up to which the log is replayed.
        seconds (float): that the check took now; 0 where it had been made before.
    """

    checked: str
    sentence: str
    distance: float | None = None
    limit: float | None = None
    seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def coarse(self) -> "Guard":
        """With the distance's power of ten alone: who knows the seed could train with each candidate, and compare."""
        if self.distance is None or self.limit is None:
            return self
        distance = min(magnitude(self.distance), self.limit)
        return replace(self, distance=distance, sentence=_sentence(distance))


class NotReproduced(InputError):
    """Training again with nothing forgotten does not give the weights, or nobody can try; ``reason`` in words."""

    def __init__(self, reason: str, instead: str) -> None:
        super().__init__(f"{reason}; {instead}")
        self.reason = reason


def known(unlearner: "InfluenceUnlearner", way: Way) -> Guard | None:
    """What is known without a replay; None: a replay must tell. Raises InputError as `check` does."""
    return _known(unlearner, way)[0]


def _known(unlearner, way):
    """(As `known`; what has changed since the log was checked, in words.)"""
    trained, log = unlearner.trained, unlearner.log
    if reason := _contradiction(trained, way, unlearner.problem.schedules):
        raise InputError(f"the triple log does not tell what training did: {reason}; train anew")
    left = adoption.approximate(trained.stored)
    if left is not None and way.name != "replay":
        return Guard("not", f"adopted, and training again by its seed ends {left:.2g} of the way off: {DRAWN}"), ""
    if way.name != "replay":
        if log.optimizer is None:
            return Guard("not", "the log is of an earlier version"), ""
        how = f"optimiser, learning rates and steps are those of the log; {way.name} is not checked by replay"
        return Guard("recorded", how), ""
    kept, current = _kept(trained)
    if kept is None and trained.unlearned_before and not (log.path / FILE).exists():
        how = "not guarded: what forgot before (a step, or an earlier version) kept no replay of the log"
        return Guard("not", how), ""
    return (kept, "") if kept is None or current else (None, CHANGED)


def check(unlearner: "InfluenceUnlearner", way: Way, show_progress: bool = False) -> Guard:
    """Raises InputError where forgetting from a log would be wrong, because training did what it does not tell.

    Args:
        unlearner: before its first request in this way.
    """
    found_before, since = _known(unlearner, way)
    if found_before is not None:
        return found_before
    trained, log = unlearner.trained, unlearner.log
    problem: Any = unlearner.problem
    start = perf_counter()
    found = problem.reproduction(show_progress)
    if found is None:
        raise NotReproduced(
            "the triple log cannot be checked by replay: the order of its batches is not known (its train loader was "
            f"used elsewhere, a purge left it out, or an earlier version wrote it){since}",
            LEFT,
        )
    distance, rounding = found
    limit = LIMIT + rounding
    if not distance <= limit:
        raise NotReproduced(
            "the triple log does not tell what training did (weights changed by other means than its steps, or a rate "
            f"at which rounding grows): its replay with nothing forgotten ends {distance:.2g} of the way from the "
            f"stored weights, where at most {limit:.2g} is fit to replay{since}",
            LEFT,
        )
    guard = Guard("replayed", _sentence(distance), distance, limit, perf_counter() - start)
    _keep(log.path, trained.stored["state_dict"], guard, trained.split.surroundings())
    return guard


def inherit(
    guard: Guard | None, folder: Path | str, state_dict: dict[str, Any], surroundings: Callable[[], str]
) -> None:
    """Keep in the folder of an unlearned model's log what was known of its original's, but for the digits.

    ``surroundings``: `Split.surroundings` of the data that are left.
    """
    if guard and guard.distance is not None:
        _keep(folder, state_dict, replace(guard.coarse(), checked="inherited"), surroundings())


def _sentence(distance):
    return f"replay of the log with nothing forgotten ends {distance:.1e} of the training's way from the stored weights"


def _contradiction(trained, way, schedules):
    """In words, what of the training the log or the checkpoint says otherwise than the settings; None: nothing.

    ``schedules``: of the problem.
    """
    config, log = trained.config, trained.log
    expected = OPTIMIZERS[config["learner"]]
    if log.optimizer not in (None, expected):
        return f"its optimiser was {log.optimizer}, not {expected}"
    start = log.metadata.get("start")
    if start and trained.initial and not same_start(start, start_of(trained.initial)):
        return (
            "it did not begin with the weights that its seed gives, but went on from others, which may know what is to "
            "be forgotten (init_seed belongs right before the model is built)"
        )
    decay = trained.optimizer["param_groups"][0].get("weight_decay", 0)
    if way.name != "replay" and decay != (config["weight_decay"] or 0):
        return f"its optimiser's weight_decay was {decay}, not {config['weight_decay']}"
    epochs = range(trained.epochs)
    rates = [log.rates(epoch) for epoch in epochs]
    if any(each is None for each in rates):
        return None
    values = np.unique(np.concatenate(rates))
    metric = isinstance(way, Influence) and way.damping == "adam"  # of one rate
    if len(values) > 1 and (metric or way.name == "replay" and not schedules):
        return f"its learning rate went from {rates[0][0]:.3g} to {rates[-1][-1]:.3g}, and {way.name} takes one"
    steps = -(-log.n_rows // trained.split.batch_rows)
    if not trained.unlearned_before and config["MODEL_TYPE"] != ModelType.KNOWLEDGE:
        if odd := {len(each) for each in rates} - {steps}:
            return f"an epoch had {min(odd)} steps, where its settings make {steps} batches"
    return None


def _keep(folder, state_dict, guard, surroundings):
    """Write down what was found, tied to weights, log and data; in a folder that we may only read, nothing."""
    folder = Path(folder)
    content = {"checked": guard.checked, "distance": guard.distance, "limit": guard.limit}
    content |= _ties(state_dict, folder, surroundings)
    with suppress(OSError):
        write_atomically(folder / FILE, json.dumps(content).encode())


def _ties(state_dict, folder, surroundings):
    """By what the log's own fingerprint does not tell too: the log is checked anew where facts or features differ."""
    weights, log = audit.weights_checksum(state_dict), file_checksum(folder / "metadata.json")
    found = {"weights": weights, "log": log, "surroundings": surroundings}
    return {name: salted(salt_of(folder), checksum) for name, checksum in found.items()}


def _kept(trained):
    """(What was found before for these weights and this log, or None; whether for these data too).

    None too, where it is damaged, or of others.
    """
    try:
        content = json.loads(read_whole(trained.log.path / FILE, 1 << 16))
        ties = {key: content[key] for key in ("weights", "log")}
        distance, limit, checked = float(content["distance"]), float(content["limit"]), content["checked"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None, False
    own = _ties(trained.stored["state_dict"], trained.log.path, trained.split.surroundings())
    current = content.get("surroundings") in (None, own.pop("surroundings"))  # earlier versions kept none
    if ties != own or checked not in ("replayed", "inherited") or not 0 <= distance <= limit:
        return None, False
    return Guard(checked, _sentence(distance), distance, limit), current
