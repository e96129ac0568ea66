"""Train, forget, retrain, compare: the only module that wires everything together."""

import logging
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from time import perf_counter

import numpy as np
from recbole.utils import init_logger, init_seed

from recbole_unlearn import checkpoint as checkpoints
from recbole_unlearn import reporting
from recbole_unlearn.compat import PERSONAL_KEYS
from recbole_unlearn.compat import settings as _settings
from recbole_unlearn.config import UnlearnConfig
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.data.triple_log import log_path
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.evaluation.exposure import exposure
from recbole_unlearn.evaluation.fidelity import fidelity
from recbole_unlearn.input_error import InputError
from recbole_unlearn.trainer import BPRTrainer
from recbole_unlearn.training import RUN_KEYS, TrainedSeeds, new_model, train
from recbole_unlearn.unlearner import SUPPORTED, InfluenceUnlearner


def run_unlearn(model=None, dataset=None, config_file_list=None, config_dict=None, saved=True):
    """Train a RecBole model (or take a checkpoint), forget, retrain to compare, evaluate all under both protocols.

    Args:
        model (str, optional): RecBole model name; default: the checkpoint's, or BPR.
        dataset (str, optional): RecBole data set name; default: the checkpoint's, or the bundled ml-100k.
        config_file_list (list of str, optional): YAML files.
        config_dict (dict, optional): keys of RecBole and of ``properties/overall.yaml``; above files in priority.
        saved (bool): whether to keep checkpoints, log and results on disk.

    Returns:
        dict: ``models`` (original, unlearned, retrained: ranking metrics, forget_auc, seconds; exposure of spam),
        ``forget_set``, ``unlearning`` (solver report), ``speed_up``, ``verdict``, ``files``, ``settings``.

    Raises:
        InputError: anything the user gave that cannot be used, before any training.
    """
    config, stored, log = _configure(model, dataset, config_file_list, config_dict)
    request = ForgetRequest.from_config(config)
    init_seed(config["seed"], config["reproducibility"])
    split = Split(config)
    if stored:
        split = split.align(log)
    rows = request.rows(split)
    if stored:
        original, unlearner = _unlearner(config, split, stored, log)
    output = _output_folder(config)
    init_logger(config)
    logger = logging.getLogger()
    logger.info(_public(config))
    logger.info(split.train._dataset)

    if config["evaluate"] == "fidelity":
        return _fidelity(config, (model, dataset, config_file_list, config_dict), request, rows, output if saved else None)

    with tempfile.TemporaryDirectory() as scratch:
        folder = output if saved else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config["checkpoint_dir"] = str(folder)
        seconds = {"original": None}
        if stored:
            path = Path(config["checkpoint"])
            trainer = BPRTrainer(config, original)
        else:
            path = folder / "model.pth"
            original, trainer, seconds["original"] = train(config, split, path)
            stored, log = checkpoints.load(path)
            original, unlearner = _unlearner(config, split, stored, log)
        trainer.eval_collector.data_collect(split.train)

        start = perf_counter()
        unlearner.warm_up()
        setup_seconds = perf_counter() - start
        unlearned = unlearner.unlearn(rows, show_progress=config["show_progress"])
        seconds["unlearned"] = unlearned.seconds
        logger.info(f"forgot {len(rows)} interactions in {unlearned.seconds:.3g} s")
        files = {"original": str(path), "unlearned": str(folder / "unlearned.pth")}
        _save_unlearned(folder / "unlearned.pth", stored, log, unlearned, split, rows, config)

        models = {"original": original, "unlearned": new_model(config, split)}
        models["unlearned"].load_state_dict(unlearned.state_dict)
        if config["compare"] == "retrain":
            files["retrained"] = str(folder / "retrained.pth")
            models["retrained"], _, seconds["retrained"] = train(
                config, split, folder / "retrained.pth", rows, log_negatives=False
            )

        evaluated, ranks = {}, {}
        for name, each in models.items():
            ranks[name] = forgetting.percentiles(each, split, rows)
            evaluated[name] = {
                "ranking": ranking.evaluate(trainer, each, split, config["seed"], config["show_progress"]),
                "forget_auc": float(ranks[name].mean()),
                "seconds": seconds[name],
            }
            if len(split.spam):
                evaluated[name]["exposure"] = exposure(each, split, config["topk"])
        sentence, figures = (None, None)
        if "retrained" in models:
            sentence, figures = forgetting.verdict(*(ranks[name] for name in ("original", "unlearned", "retrained")))
        result = {
            "model": config["model"],
            "dataset": config["dataset"],
            "forget_set": {
                "kind": request.kind,
                "interactions": len(rows),
                "of": split.n_rows,
                "users": len(np.unique(split.users[rows])),
                "items": len(np.unique(split.items[rows])),
            },
            "models": evaluated,
            "unlearning": {**unlearned.report(), "setup_seconds": setup_seconds},
            "speed_up": seconds["retrained"] / seconds["unlearned"] if "retrained" in seconds else None,
            "verdict": sentence,
            "verdict_figures": figures,
            "files": files if saved else {},
            "settings": _settings(config),
        }
        if saved:
            reporting.write(result, folder)
            if config["purge"]:
                _purge(path)
                result["files"].pop("original")
                reporting.write(result, folder)
    return result


def _fidelity(config, arguments, request, rows, folder):
    """Train the seeds, measure the methods, write the tables."""
    arguments = (config["model"], config["dataset"], *arguments[2:])
    trained = TrainedSeeds(arguments, config["fidelity_cache"] or Path(config["checkpoint_dir"]) / "fidelity")
    figures = fidelity(trained, rows, config["fidelity_seeds"], show_progress=config["show_progress"])
    title = (
        f"{config['model']} on {config['dataset']}: {len(rows)} interactions forgotten ({request.kind}), "
        f"{config['fidelity_seeds']} seeds"
    )
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        reporting.write_fidelity(figures, title, folder)
    return {"fidelity": figures, "title": title, "files": {"tables": str(folder)} if folder else {}}


def _unlearner(config, split, stored, log):
    """The model of a checkpoint, and its unlearner."""
    model = new_model(config, split)
    try:
        model.load_state_dict(stored["state_dict"])
    except RuntimeError as error:
        raise InputError(f"the checkpoint's weights do not fit the configuration: {' '.join(str(error).split())}") from None
    epochs = stored["triple_log"]["epochs"]
    return model, InfluenceUnlearner(model, log, stored["optimizer"], config, epochs, split.popularity())


def _trainable(config):
    """Raises InputError where training would end in nothing that can be unlearned from."""
    if not config["log_negatives"]:
        raise InputError("log_negatives: False leaves nothing to unlearn from; leave it out")
    if config["epochs"] < 1:
        raise InputError(f"epochs must be at least 1, not {config['epochs']}")
    if config["train_neg_sample_args"]["distribution"] == "none":
        raise InputError("train_neg_sample_args: None trains without negatives; BPR needs them")
    computed = [f"{m.lower()}@{k}" for m in config["metrics"] for k in config["topk"]]
    if config["valid_metric"].lower() not in computed:
        raise InputError(f"valid_metric {config['valid_metric']} is none of the metrics at topk: {', '.join(computed)}")
    adam = config["learner"].lower() == "adam"
    if config["method"] == "replay" and (not adam or config["clip_grad_norm"]):
        raise InputError("method: replay needs learner: adam and no clip_grad_norm; use method: influence")
    replayed = config["method"] == "auto" and adam and not config["clip_grad_norm"]
    if config["damping"] == "adam" and not adam and not replayed and config["method"] != "reoptimise":
        raise InputError(f"damping: adam does not fit learner: {config['learner']}; use damping: scalar")
    return config


def _configure(model, dataset, config_file_list, config_dict):
    """Configuration, and checkpoint and log if one was named."""
    if config_dict is not None and not isinstance(config_dict, Mapping):
        raise InputError("config_dict must be a dict")
    named = _given("checkpoint", config_file_list, config_dict)
    if named is not None and _given("evaluate", config_file_list, config_dict) == "fidelity":
        raise InputError("evaluate: fidelity trains its own seeds; leave checkpoint out")
    if named is None:
        return _trainable(_supported(UnlearnConfig(model or _given("model", config_file_list, config_dict) or "BPR",
                          dataset or _given("dataset", config_file_list, config_dict) or "ml-100k",
                          config_file_list, config_dict))), None, None  # fmt: skip
    if not isinstance(named, (str, Path)):
        raise InputError(f"checkpoint must be a path, not {named!r}")
    stored, log = checkpoints.load(named)
    earlier = stored["config"]
    for key, value in (("model", model), ("dataset", dataset)):
        if value is not None and value != earlier.get(key):
            raise InputError(f"checkpoint {named} was trained with {key} {earlier.get(key)!r}, not {value!r}")
    kept = {key: value for key, value in earlier.items() if key not in RUN_KEYS and key.islower()}
    if earlier.get("data_path"):
        kept["data_path"] = str(Path(earlier["data_path"]).parent)
    config = UnlearnConfig(earlier["model"], earlier["dataset"], config_file_list, config_dict, kept)
    return _supported(config), stored, log


def _given(key, config_file_list, config_dict):
    """``model`` or ``dataset`` where RecBole also looks for it."""
    return UnlearnConfig.peek(key, config_file_list, config_dict)


def _supported(config):
    if config["model"] not in SUPPORTED:
        raise InputError(f"model {config['model']} is not supported; {', '.join(SUPPORTED)} is")
    return config


def _output_folder(config):
    if config["output_dir"]:
        folder = Path(config["output_dir"])
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"output_dir {folder} exists and is not an empty folder; name a new one")
        return folder
    stem = f"{config['model']}-{config['dataset']}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder, n = Path(config["checkpoint_dir"]) / stem, 1
    while folder.exists():
        n += 1
        folder = Path(config["checkpoint_dir"]) / f"{stem}-{n}"
    return folder


def _save_unlearned(path, stored, log, unlearned, split, rows, config):
    """The new checkpoint and its log, in neither of which the forgotten rows occur."""
    run_id = secrets.token_hex(8)
    remaining = split.fingerprint_without(rows)
    log.without(rows, log_path(path), run_id, remaining, unlearned.snapshots, split.popularity())
    state = {
        **stored,
        "config": _settings(config),
        "state_dict": unlearned.state_dict,
        "triple_log": {"run_id": run_id, "epochs": stored["triple_log"]["epochs"]},
    }
    checkpoints.save(path, state)


def _public(config):
    """The configuration as RecBole prints it, with personal values masked."""
    kept = {key: config[key] for key in PERSONAL_KEYS if config[key] is not None}
    config.final_config_dict.update(dict.fromkeys(kept, "(given, not logged)"))
    try:
        return str(config)
    finally:
        config.final_config_dict.update(kept)


def _purge(path):
    """Delete a checkpoint and its log."""
    shutil.rmtree(log_path(path), ignore_errors=False)
    path.unlink()
