"""Which way serves which problem, and why."""

import logging
from dataclasses import dataclass, replace
from typing import Any

from recbole.model.general_recommender import BPR, LightGCN

from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.training.compiled import plain_steps
from recbole_unlearn.training.trained import Trained
from recbole_unlearn.unlearners.any_loss import AnyLoss
from recbole_unlearn.unlearners.base import Problem, Way
from recbole_unlearn.unlearners.dot_product import DotProduct
from recbole_unlearn.unlearners.influence import Influence
from recbole_unlearn.unlearners.propagated import Propagated
from recbole_unlearn.unlearners.reoptimise import Reoptimise
from recbole_unlearn.unlearners.replay import Replay

IN_CLOSED_FORM = {BPR: DotProduct, LightGCN: Propagated}  # these classes alone: one derived may score otherwise
# Keys of a step that have the name of `Influence`'s settings.
STEP = (
    "curvature",
    "damping",
    "damping_strength",
    "pool_return",
    "log_epochs",
    "curvature_triples",
    "undone_limit",
    "last_epochs",
    "cg_tolerance",
    "cg_max_iterations",
)


@dataclass(frozen=True)
class Auto:
    """Re-optimisation where the model has converged, else replay, else one influence step: the first that is valid.

    Of models without closed forms, replay where it takes no longer than its ``exact_seconds``, else one step.
    """

    reoptimise: Reoptimise = Reoptimise()
    replay: Replay = Replay()
    influence: Influence = Influence()


def wanted(config: UnlearnConfig) -> "Auto | Reoptimise | Replay | Influence":
    """The way that a configuration asks for, with its settings."""
    params, coupling = config["unlearn_params"], config["coupling"]
    if coupling == "auto":  # whoever knows the seed has the original's random numbers, and could try who is missing
        coupling = "fresh" if config["purge"] or config["replay_epochs"] == "validated" else "paired"
    step: dict[str, Any] = {key: config[key] for key in STEP}
    step["params"] = params if params is None else (params,) if isinstance(params, str) else tuple(params)
    ways: dict[str, Any] = {
        "reoptimise": Reoptimise(
            config["reoptimise_tolerance"], config["reoptimise_max_iterations"], config["pool_return"]
        ),
        "replay": Replay(config["replay_rows"], coupling, config["exact_seconds"], config["replay_epochs"]),
        "influence": Influence(**step, forgotten_stay=bool(config["paper"])),
    }
    method = "influence" if config["paper"] else config["method"]
    return Auto(ways["reoptimise"], ways["replay"], ways["influence"]) if method == "auto" else ways[method]


def problem_of(trained: Trained, way: "Auto | Way", shared: bool = False) -> Problem:
    """The problem that a training is; ``shared``: whether every rank has such a one, see `DotProduct`.

    What kernels cannot train again, since its steps were others, its own trainer does, as of any model.
    """
    step = way.influence if isinstance(way, Auto) else way
    params = step.params if isinstance(step, Influence) else None
    form = IN_CLOSED_FORM.get(type(trained.model))
    again = isinstance(way, (Auto, Replay)) and not plain_steps(trained.config, trained.optimizer["param_groups"][0])
    if form is None or params or (again and not shared):
        return AnyLoss(trained, params, step if isinstance(step, Influence) else Influence())
    return form(trained, shared)


def choose(problem: Problem, way: "Auto | Way") -> tuple[Way, str]:
    """The way to go, and in words why.

    Raises:
        InputError: the one that was asked for is not valid for this problem.
    """
    chosen, why = _chosen(problem, way)
    if isinstance(chosen, Influence):
        problem.check(chosen)
    return chosen, why


def _chosen(problem, way):
    if not problem.derived:
        return _of_any_loss(problem, way)
    if isinstance(way, Auto):
        return _first_valid(problem, way)
    if reason := way.refuses(problem):
        raise InputError(f"method: {way.name} is not possible: {reason}; {_instead(problem, way)}")
    if not isinstance(way, Reoptimise):
        return way, "asked for"
    converged, found = way.converged(problem)
    if not converged:
        logging.getLogger().warning(f"{found}: re-optimisation will also finish the model's training")
    return way, f"asked for: {found}"


def _instead(problem, way):
    """What to do in place of a way that is refused."""
    if isinstance(way, Replay) and way.epochs == "validated" and not replace(way, epochs="original").refuses(problem):
        return "give replay_epochs: original"
    if isinstance(way, Influence) and not problem.no_step:
        return "use damping: scalar, or method: replay"
    other = "auto" if isinstance(way, Reoptimise) else "influence" if isinstance(way, Replay) else "replay"
    return f"use method: {other}"


def _of_any_loss(problem, way):
    if isinstance(way, Auto):
        no_step = way.influence.refuses(problem)
        if reason := way.replay.refuses(problem):
            if no_step:
                raise InputError(f"{problem.name} cannot forget: {reason}; and no step is there for it: {no_step}")
            return way.influence, f"auto: {reason}"
        seconds = problem.seconds_again()
        exact = way.replay.rows == "all" or seconds <= way.replay.exact_seconds
        known = (
            f"training takes about {seconds:.2g} s"
            if seconds < float("inf")
            else "nobody knows how long training takes"
        )
        if no_step and not exact:
            longer = f"{known}, longer than exact_seconds, but no step is there for {problem.name}: {no_step}"
            return replace(way.replay, rows="all"), f"auto: {longer}"
        if exact:
            return way.replay, f"auto: {known}"
        there_is_time_for = int(problem.epochs * way.replay.exact_seconds / seconds / 2)  # with the rows and without
        last = max(way.influence.last_epochs, there_is_time_for)
        return replace(way.influence, last_epochs=last), f"auto: {known}"
    if isinstance(way, Reoptimise):
        raise InputError(f"method: {way.name} is not for {problem.name}; use method: replay or influence")
    if reason := way.refuses(problem):
        raise InputError(f"method: {way.name} is not possible: {reason}; {_instead(problem, way)}")
    if isinstance(way, Replay):
        way = replace(way, rows="all")
    return way, "asked for"


def _first_valid(problem, auto):
    why = auto.reoptimise.refuses(problem)
    if not why:
        converged, why = auto.reoptimise.converged(problem)
        if converged:
            return auto.reoptimise, f"auto: {why}"
    if no_replay := auto.replay.refuses(problem):
        return auto.influence, f"auto: {why}; {no_replay}"
    return auto.replay, f"auto: {why}"
