"""Train, forget, retrain, compare: the only module that wires everything together."""

import logging
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from time import perf_counter

import numpy as np
from recbole.utils import init_logger, init_seed

from recbole_unlearn import audit, reporting
from recbole_unlearn import checkpoint as checkpoints
from recbole_unlearn import purge as purging
from recbole_unlearn.compat import PERSONAL_KEYS
from recbole_unlearn.compat import settings as _settings
from recbole_unlearn.config import UnlearnConfig
from recbole_unlearn.data import frozen as frozen_data
from recbole_unlearn.data import inter_file
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.frozen import Frozen
from recbole_unlearn.data.split import Split
from recbole_unlearn.data.triple_log import log_path
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.evaluation.fidelity import fidelity
from recbole_unlearn.files import is_debris, locked, remove
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
        dict: ``models`` (original, unlearned, retrained: ranking metrics, forget_auc, seconds), ``forget_set``,
        ``unlearning`` (solver report), ``speed_up``, ``verdict``, ``files``, ``settings``.

    Raises:
        InputError: anything the user gave that cannot be used, before any training.
    """
    with ExitStack() as held:
        return _run(held, model, dataset, config_file_list, config_dict, saved)


def _run(held, model, dataset, config_file_list, config_dict, saved):
    """`run_unlearn`, with the locks that it takes in ``held``."""
    config, stored, log = _configure(held, model, dataset, config_file_list, config_dict)
    request = ForgetRequest.from_config(config)
    init_seed(config["seed"], config["reproducibility"])
    split = Split(config)
    if stored:
        split = split.align(log)
    rows = request.rows(split)
    if stored:
        original, unlearner = _unlearner(config, split, stored, log)
    output = _output_folder(config)
    erasure = _erasure(config, split, rows, stored) if saved else {}
    trail = _audit_file(config, output) if saved else None
    held.enter_context(_one_line(output))
    init_logger(config)
    logger = logging.getLogger()
    logger.info(_public(config))
    logger.info(split.train._dataset)

    if config["evaluate"] == "fidelity":
        return _fidelity(config, (model, dataset, config_file_list, config_dict), request, rows, output if saved else None)

    with tempfile.TemporaryDirectory() as scratch:
        folder = _claim(held, output) if saved else Path(scratch)
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
        _save_unlearned(folder / "unlearned.pth", stored, log, unlearned, split, rows, config, erasure.get("inter"))

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
            if trail:
                result["audit"] = {"file": str(trail), "request": secrets.token_hex(8)}
            reporting.write(result, folder)
            _record_and_purge(result, config, path, stored, unlearned, erasure, trail)
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


def _configure(held, model, dataset, config_file_list, config_dict):
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
    if Path(named).is_file() or purging.pending(named):
        held.enter_context(locked(named))
        if purging.recover(named):
            raise InputError(f"checkpoint {named} was purged by a process that was killed; the purge is finished now")
    stored, log = checkpoints.load(named)
    earlier = stored["config"]
    for key, value in (("model", model), ("dataset", dataset)):
        if value is not None and value != earlier.get(key):
            raise InputError(f"checkpoint {named} was trained with {key} {earlier.get(key)!r}, not {value!r}")
    kept = {key: value for key, value in earlier.items() if key not in RUN_KEYS and key.islower()}
    if stored.get("data"):
        kept["data_path"] = str(frozen_data.folder(log.path))
    elif earlier.get("data_path"):
        kept["data_path"] = str(Path(earlier["data_path"]).parent)
    config = UnlearnConfig(earlier["model"], earlier["dataset"], config_file_list, config_dict, kept)
    return _supported(config), stored, log


def _given(key, config_file_list, config_dict):
    """``model`` or ``dataset`` where RecBole also looks for it."""
    return UnlearnConfig.peek(key, config_file_list, config_dict)


def _supported(config):
    if config["model"] not in SUPPORTED:
        raise InputError(f"model {config['model']} is not supported; {', '.join(SUPPORTED)} is")
    if config["purge_dataset"] and not config["purge"]:
        raise InputError("purge_dataset: True leaves an original that fits no data; give purge: True too")
    return config


def _output_folder(config):
    if config["output_dir"]:
        folder = Path(config["output_dir"])
        purging.tidy(folder)
        if folder.exists() and (not folder.is_dir() or not all(map(is_debris, folder.iterdir()))):
            raise InputError(f"output_dir {folder} exists and is not an empty folder; name a new one")
        return folder
    stem = f"{config['model']}-{config['dataset']}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder, n = Path(config["checkpoint_dir"]) / stem, 1
    for earlier in folder.parent.glob("*/"):
        purging.tidy(earlier)
    while folder.exists():
        n += 1
        folder = Path(config["checkpoint_dir"]) / f"{stem}-{n}"
    return folder


def _save_unlearned(path, stored, log, unlearned, split, rows, config, inter):
    """The new checkpoint and its log, in neither of which the forgotten rows occur.

    ``inter``: the user's interactions file if it loses lines; ids and split are kept with the log then, see `Frozen`.
    """
    run_id = secrets.token_hex(8)
    inter = str(inter) if inter else (stored.get("data") or {}).get("inter")
    frozen = Frozen(split, rows) if inter else None
    fingerprint = frozen.fingerprint if frozen else split.fingerprint_without(rows)

    def write_log(folder):
        log.without(rows, folder, run_id, fingerprint, unlearned.snapshots)
        if frozen:
            frozen.write(folder)

    state = {
        **stored,
        "config": _settings(config),
        "state_dict": unlearned.state_dict,
        "triple_log": {"run_id": run_id, "epochs": stored["triple_log"]["epochs"]},
    }
    if frozen:
        state["data"] = {"inter": inter}
        state["config"] |= frozen_data.settings(config)
        state["config"]["data_path"] = str(frozen_data.folder(log_path(path)) / config["dataset"])
    checkpoints.save_with_log(path, state, write_log)


def _record_and_purge(result, config, path, stored, unlearned, erasure, trail):
    """Nothing is deleted before it is on record that, and by what, it was replaced."""
    if trail:
        before = audit.model_checksums(path, stored["state_dict"])
        after = audit.model_checksums(result["files"]["unlearned"], unlearned.state_dict)
        audit.append(trail, audit.unlearned_record(result["audit"]["request"], result, config, before, after))
    if config["purge"]:
        purging.purge(path, **erasure)
        result["files"].pop("original")
        if trail:
            purged = ["checkpoint", "log", *(["data set"] if erasure else [])]
            audit.append(trail, audit.purged_record(result["audit"]["request"], purged))


def _erasure(config, split, rows, stored):
    """What `purge` is to remove from the data set: keyword arguments of it; empty without ``purge_dataset``.

    Raises:
        InputError: the original or the data set could not be purged.
    """
    erasure = {}
    if config["purge_dataset"]:
        earlier = (stored or {}).get("data")
        inter = Path(earlier["inter"]) if earlier else inter_file.plain_path(config)
        if not inter.is_file():
            raise InputError(f"purge_dataset: {inter} is not there any more; put it back, or leave purge_dataset out")
        forgotten, kept = split.pairs(rows), split.pairs(np.delete(np.arange(split.n_rows), rows))
        if both := len(set(forgotten) & set(kept)):
            raise InputError(
                f"purge_dataset: {both} forgotten pairs of user and item occur in other training interactions too, "
                "which the file does not tell apart; use forget_file, which forgets all of them"
            )
        erasure = {"inter": inter, "config": config, "pairs": forgotten}
    if config["purge"]:
        purging.check(config["checkpoint"], **erasure)
    return erasure


def _audit_file(config, output):
    """Path of the audit file, or None. Raises InputError where nothing could be appended to it."""
    if config["audit"] is None:
        return None
    path = Path(config["audit"])
    if path.name == config["audit"]:
        path = output / path
    if path.exists() and (torn := audit.read(path).torn):
        logging.getLogger().warning(f"{path}: a crash tore its last line; these {torn} bytes will be removed")
    if path.parent != output and not path.parent.is_dir():
        raise InputError(f"audit: folder {path.parent} does not exist; make it")
    if path.parent.exists() and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"audit file {path} cannot be written; give rights or name another")
    return path


def _claim(held, folder):
    """Make the output folder and keep other processes out of it; tidies up after a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("unlearned.pth", "model.pth"):
        held.enter_context(locked(folder / name))
    purging.recover(folder / "unlearned.pth")
    if not all(map(is_debris, folder.iterdir())):  # again, now that nobody else can be writing
        raise InputError(f"output_dir {folder} was filled by another process meanwhile; name a new one")
    held.enter_context(_nothing_half(folder))
    return folder


@contextmanager
def _nothing_half(folder):
    """Empty a folder of ours where the system stopped us before there was a whole checkpoint in it."""
    try:
        yield
    except OSError:
        if not any(folder.glob("*.pth")):
            for entry in folder.iterdir():
                if not entry.name.endswith(".lock"):
                    remove(entry)
        raise


@contextmanager
def _one_line(folder):
    """Say in one line what the system refused: a full disk, a read-only folder."""
    existed = folder.exists()
    try:
        yield
    except OSError as error:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        raise InputError(f"cannot write to {folder} ({what}); make room, give rights or name another output_dir") from error


def _public(config):
    """The configuration as RecBole prints it, with personal values masked."""
    kept = {key: config[key] for key in PERSONAL_KEYS if config[key] is not None}
    config.final_config_dict.update(dict.fromkeys(kept, "(given, not logged)"))
    try:
        return str(config)
    finally:
        config.final_config_dict.update(kept)
