"""What a request asks for that does not go together: refused in one line, before any work."""

import importlib.util
import sys
from typing import Any

from recbole.config import Config
from recbole.utils import ModelType

from recbole_unlearn import distributed
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.models.support import no_step, refusal
from recbole_unlearn.settings import keys, recbole_keys
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.given import Given

DERIVED_FORMS = ("BPR", "LightGCN")  # models that are forgotten by replay and in closed form
RECOMPUTED = (*DERIVED_FORMS, "FPMC", "TransRec")  # models that kernels train again on what their log holds alone
BY_KERNELS = (*RECOMPUTED, "LINE", "CFKG")  # models that are trained again by kernels
# From this share of forgotten interactions on, a step is no small change any more, and settings that were chosen for
# the data with them (the number of epochs, learning rate, size) are those of another data set; a convention.
COHORT = 0.1

# Runs, by what asks for them, and the keys that only some runs do anything with; all others serve every run.
ONE, EXPERIMENT, AUDIT, FIDELITY = "a run of one model", "experiment", "evaluate: audit", "evaluate: fidelity"
COMPARED = ("methods", "compare_models")
ONE_ALONE = (
    *("checkpoint", "method", "replay_rows", "replay_epochs", "paper", "compare", "request_batch", "drift_every"),
    *("changed_lists", "embeddings", "everywhere", "audit", "audit_key"),
)
OF_AUTO = ("exact_seconds", "coupling", "undone_limit", "reoptimise_tolerance", "reoptimise_max_iterations")
TAKEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ONE_ALONE, (ONE,)),
    **dict.fromkeys(OF_AUTO, (ONE, *COMPARED, EXPERIMENT)),  # elsewhere ours goes each of its ways, as `WAYS` say
    **dict.fromkeys(keys.FORGET, (ONE, *COMPARED, FIDELITY)),
    "forget_seed": (ONE, *COMPARED, FIDELITY, AUDIT, EXPERIMENT),
    "evaluate": (ONE, *COMPARED, FIDELITY, AUDIT),
    "fidelity_seeds": (FIDELITY,),
    "audit_models": (AUDIT,),
    "quick": (EXPERIMENT,),
    "methods": (*COMPARED, AUDIT, EXPERIMENT),
    "method_args": (*COMPARED, AUDIT, EXPERIMENT),
    "compare_models": COMPARED,
    "comparison_seeds": (*COMPARED, EXPERIMENT),
    "comparison_sets": (*COMPARED, AUDIT),
}
INSTEAD = {  # (run, key) -> the key that says it there
    **{(AUDIT, key): "comparison_sets" for key in keys.FORGET},
    **{(run, key): "method_args" for run in (*COMPARED, EXPERIMENT) for key in ("method", "replay_rows")},
}


def check_many(given: Given) -> None:
    """Raises InputError where a run is asked for what it does nothing with, or many models for what they cannot be."""
    run = given.many[0] if given.many else ONE
    for key, runs in TAKEN.items():
        if run not in runs and _asked(given, key):
            instead = f", and give {INSTEAD[run, key]}" if (run, key) in INSTEAD else ""
            raise InputError(f"{key} is for {', '.join(runs)}, not for {run}; leave {key} out{instead}")
    if run == ONE:
        return
    if _asked(given, "comparison_sets") and (asked := [key for key in keys.FORGET if _asked(given, key)]):
        raise InputError(f"comparison_sets says what is forgotten; leave it out, or {asked[0]}")
    if distributed.shared():
        raise InputError(f"{run} trains its models in processes of its own; leave torchrun and nproc out")
    if isinstance(given.model, type):
        raise InputError(f"{run} trains models by name, in other processes; give the name of a RecBole model")


def _asked(given, key):
    """Whether a key is given a value that asks for something."""
    value, default = given.get(key), keys.KEYS[key].default
    if value is None and key in given.values and "none" in keys.KEYS[key].parts:
        value = "none"
    return value is not None and (value != default or key in keys.FORGET)


def check_purge(given: Given, saved: bool) -> None:
    """Raises InputError where a purge is asked for that would not happen: nothing replaces an original."""
    asked = [key for key in ("purge", "purge_dataset") if given.get(key) is True]
    if not asked:
        return
    if many := given.many:
        raise InputError(f"{many[0]} purges nothing; leave {' and '.join(asked)} out, or {many[0]}")
    if not saved:
        raise InputError(
            f"saved=False keeps no model to replace the original; leave {' and '.join(asked)} out, or save"
        )


def check_open(given: Given) -> None:
    """Raises InputError where an open unlearner is asked for what only a run does: it would not be done."""
    asked = [key for key in keys.FORGET if given.get(key) is not None]
    if asked:
        raise InputError(f"an open unlearner is told by its forget() what to forget; leave {asked[0]} out")
    acts = ("purge", "purge_dataset", "everywhere", "dry_run", "changed_lists", "embeddings")
    asked = [key for key in acts if given.get(key)] + given.many
    if asked:
        raise InputError(f"{asked[0]} is for run_unlearn; an open unlearner writes its model alone: leave it out")


def check_dry_run(given: Given) -> None:
    """Raises InputError where a dry run is asked for of what cannot be told beforehand."""
    if given.get("dry_run") is not True:
        return
    if many := given.many:
        raise InputError(f"dry_run tells of requests to one model; leave it out, or {many[0]}")
    if given.get("checkpoint") is None:
        raise InputError("dry_run tells of a request to a model that is there; give its checkpoint")


def ranks(given: Given) -> dict[str, Any]:
    """Arguments of `distributed.joined`, from RecBole's keys and ours."""
    names = {key: key for key in ("nproc", "world_size", "ip", "port", "offset")} | {"timeout": "rank_timeout"}
    found = {name: given.get(key) for name, key in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def to_train(given: Given) -> UnlearnConfig:
    """The configuration of a request that trains its own model. InputError where that could not forget."""
    return judged(trainable(supported(UnlearnConfig(*given.arguments))), trains=True)


def judged(config: UnlearnConfig, trains: bool = False) -> UnlearnConfig:
    """The configuration. InputError where a run cannot judge its models, or validate one that it trains, as it says.

    Args:
        trains: whether it trains the original too.
    """
    if config["evaluate"] != "none" or config["drift_every"]:
        recbole_keys.check_judged(config)
    if config["eval_step"] > 0 and (trains or config["compare"] == "retrain" or config["drift_every"]):
        recbole_keys.check_validated(config, "" if trains or config["drift_every"] else ", or compare: none")
    return config


def trainable(config: UnlearnConfig) -> UnlearnConfig:
    """The configuration. InputError where training would end in nothing that can be unlearned from."""
    if not config["log_negatives"]:
        raise InputError("log_negatives: False leaves nothing to unlearn from; leave it out")
    if config["log_negatives"] == "drawn" and config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        raise InputError(
            f"log_negatives: drawn is not for {config['model']}, which draws negatives and facts in turns; leave it out"
        )
    if config["epochs"] < 1:
        raise InputError(f"epochs must be at least 1, not {config['epochs']}")
    if config["model"] in DERIVED_FORMS and config["method"] == "replay" and not plain_adam(config):
        if distributed.shared():
            raise InputError("method: replay by several ranks needs learner: adam and no clip_grad_norm; use one")
        if config["replay_rows"] == "touched":
            raise InputError("replay_rows: touched needs learner: adam and no clip_grad_norm; leave replay_rows out")
    return config


def plain_adam(config: Config) -> bool:
    """Whether a training's steps are those that kernels take: Adam's, of gradients as they are."""
    return config["learner"].lower() == "adam" and not config["clip_grad_norm"]


def unfit(config: Config, damping: str) -> str | None:
    """In words, why a step's damping does not fit the optimiser; None where it does."""
    if damping == "adam" and config["learner"] != "adam":
        return f"damping: adam does not fit learner: {config['learner']}"
    return None


def _takes_step(config):
    """Whether a request is known to take a step, not only where training again takes too long."""
    alone = config["unlearn_params"] or config["replay_rows"] == "touched" or distributed.shared()
    return config["method"] == "influence" or bool(config["method"] == "auto" and alone)


def supported(config: UnlearnConfig) -> UnlearnConfig:
    """The configuration. InputError where its model cannot forget, or not in the way that it asks for."""
    if reason := refusal(config):
        raise InputError(reason)
    if config["log_wandb"] and "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise InputError("log_wandb: True needs the package wandb, which is not installed; install it, or leave it out")
    if config["model"] not in DERIVED_FORMS or config["unlearn_params"]:
        _check_influence_only(config)
    if _takes_step(config) and (reason := unfit(config, config["damping"])):
        raise InputError(f"{reason}; use damping: scalar")
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    if config["changed_lists"] and sequential:
        raise InputError(f"changed_lists is not for sequential models such as {config['model']}; leave it out")
    if config["purge_dataset"] and not config["purge"]:
        raise InputError("purge_dataset: True leaves an original that fits no data; give purge: True too")
    if config["replay_epochs"] == "validated":
        _check_validated(config)
    if config["everywhere"] and not config["purge_dataset"]:
        raise InputError("everywhere: True leaves nothing in the data set either; give purge and purge_dataset too")
    return config


def not_validated(config: Config, rows: str, coupling: str) -> str | None:
    """In words, why validation is not to choose how many epochs a replay has; None where it may.

    Args:
        rows, coupling: of `Replay`.
    """
    if rows != "all":
        return "only training on all rows again has epochs to choose from: give replay_rows: all"
    if coupling == "paired":
        return "the original's random numbers end at its own best epoch: give coupling: fresh"
    if config["eval_step"] <= 0:
        return "with eval_step: 0 nothing was validated"
    return "it is for one process" if distributed.shared() else None


def _check_validated(config):
    """Raises InputError where validation cannot choose how many epochs are trained again."""
    reason = not_validated(config, config["replay_rows"], config["coupling"])
    if config["method"] != "replay":
        reason = f"method: {config['method']} need not train again: give method: replay"
    elif config["everywhere"]:
        reason = "with everywhere: True held-out interactions go too, which validation would use"
    if reason:
        raise InputError(f"replay_epochs: validated is not possible: {reason}, or give replay_epochs: original")


def _check_influence_only(config):
    """Raises InputError for what is there for `DERIVED_FORMS` only."""
    name, reason = config["model"], no_step(config)
    if reason and (config["method"] == "influence" or config["unlearn_params"]):
        asked = "unlearn_params" if config["unlearn_params"] else "method: influence"
        raise InputError(f"{asked} is not for {name}: {reason}; it is trained again, by method: replay")
    ways = ("auto", "influence") if config["unlearn_params"] else ("auto", "influence", "replay")
    if config["method"] not in ways:
        what = f"{name} with unlearn_params" if config["unlearn_params"] else name
        raise InputError(f"method: {config['method']} is not for {what}; use method: influence")
    if config["embeddings"] and config["model"] not in DERIVED_FORMS:
        raise InputError(f"embeddings is for {' and '.join(DERIVED_FORMS)} only, not for {name}; leave it out")
    if config["forget_spam"] is not None and config["MODEL_TYPE"] != ModelType.GENERAL:
        raise InputError(f"forget_spam is for general models only, not for {name}")


def check_sizes(config: UnlearnConfig, split: Split) -> None:
    """Raises InputError for more than the data have: a metric's cutoff, the length of lists, clusters."""
    for key, most in (("topk", max(config["topk"])), ("changed_lists", config["changed_lists"])):
        if most >= split.n_items:
            raise InputError(f"{key}: {most} is more than the {split.n_items - 1} items of {config['dataset']}")
    if config["model"] == "NCL" and config["num_clusters"] > (most := min(split.n_users, split.n_items)):
        raise InputError(f"num_clusters: {config['num_clusters']} is more than {most} users or items; lower it")
