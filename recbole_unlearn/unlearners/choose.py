"""Which way serves which problem, and why."""

import logging
from dataclasses import dataclass
from typing import Any

from recbole.model.general_recommender import BPR, LightGCN

from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.trained import Trained
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
    "curvature", "damping", "damping_strength", "pool_return", "log_epochs", "curvature_triples", "cg_tolerance",
    "cg_max_iterations",
)  # fmt: skip


@dataclass(frozen=True)
class Auto:
    """Re-optimisation where the model has converged, else replay, else one influence step: the first that is valid."""

    reoptimise: Reoptimise = Reoptimise()
    replay: Replay = Replay()
    influence: Influence = Influence()


def wanted(config: UnlearnConfig) -> "Auto | Reoptimise | Replay | Influence":
    """The way that a configuration asks for, with its settings."""
    params = config["unlearn_params"]
    step: dict[str, Any] = {key: config[key] for key in STEP}
    step["params"] = params if params is None else (params,) if isinstance(params, str) else tuple(params)
    ways: dict[str, Any] = {
        "reoptimise": Reoptimise(
            config["reoptimise_tolerance"], config["reoptimise_max_iterations"], config["pool_return"]
        ),
        "replay": Replay(config["replay_rows"]),
        "influence": Influence(**step, forgotten_stay=bool(config["paper"])),
    }
    method = "influence" if config["paper"] else config["method"]
    return Auto(ways["reoptimise"], ways["replay"], ways["influence"]) if method == "auto" else ways[method]


def problem_of(trained: Trained, way: "Auto | Way", shared: bool = False) -> Problem:
    """The problem that a training is; ``shared``: whether every rank has such a one, see `DotProduct`."""
    step = way.influence if isinstance(way, Auto) else way
    params = step.params if isinstance(step, Influence) else None
    if params or type(trained.model) not in IN_CLOSED_FORM:
        return AnyLoss(trained, params)
    return IN_CLOSED_FORM[type(trained.model)](trained, shared)


def choose(problem: Problem, way: "Auto | Way") -> tuple[Way, str]:
    """The way to go, and in words why.

    Raises:
        InputError: the one that was asked for is not valid for this problem.
    """
    auto = isinstance(way, Auto)
    if problem.only_influence:
        way = way.influence if isinstance(way, Auto) else way
        if not isinstance(way, Influence):
            raise InputError(f"method: {way.name} is not for {problem.name}; use method: influence")
        way.refuses(problem)
        return way, problem.only_influence
    if isinstance(way, Influence):
        way.refuses(problem)
        return way, "asked for"
    if isinstance(way, Replay):
        if reason := way.refuses(problem):
            raise InputError(f"method: replay is not possible: {reason}; use method: influence")
        return way, "asked for"
    reoptimise = way.reoptimise if isinstance(way, Auto) else way
    assert isinstance(reoptimise, Reoptimise)
    no_reoptimise = reoptimise.refuses(problem)
    if no_reoptimise and not auto:
        raise InputError(f"method: reoptimise is not possible: {no_reoptimise}; use method: auto")
    if not no_reoptimise:
        converged, found = reoptimise.converged(problem)
        if not (auto or converged):
            logging.getLogger().warning(f"{found}: re-optimisation will also finish the model's training")
        if converged or not auto:
            return reoptimise, f"{'auto' if auto else 'asked for'}: {found}"
        no_reoptimise = found
    assert isinstance(way, Auto)
    if no_replay := way.replay.refuses(problem):
        way.influence.refuses(problem)
        return way.influence, f"auto: {no_reoptimise}; {no_replay}"
    return way.replay, f"auto: {no_reoptimise}"
