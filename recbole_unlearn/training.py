"""Training runs: one model, or many seeds of it in parallel processes, each kept by what determines it."""

import hashlib
import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from recbole.utils import init_seed
from tqdm import tqdm

from recbole_unlearn import distributed
from recbole_unlearn.compat.recbole_models import checkpoint_state
from recbole_unlearn.data.forget import KINDS
from recbole_unlearn.data.sampling import Played
from recbole_unlearn.data.split import Split
from recbole_unlearn.devices import read
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig, own_options
from recbole_unlearn.settings.shown import plain
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import remove, write_atomically
from recbole_unlearn.storage.triple_log import TripleLog, log_path
from recbole_unlearn.trainer import make_trainer

# Keys of a configuration that belong to one run, not to the model that it trains.
RUN_KEYS = (
    "checkpoint", "checkpoint_dir", "output_dir", "device", "gpu_id", "use_gpu", "compare", "evaluate", "purge",
    "data_path", "purge_dataset", "audit", "single_spec", "local_rank",
    "nproc", "world_size", "ip", "port", "offset", "rank_timeout", "show_progress", "model", "dataset", "config_files",
    "forget_category_field", "spam_items", "request_batch", "drift_every",
    "methods", "method_args", "compare_models", "comparison_sets", "comparison_seeds", "comparison_cache",
    "experiment", "quick",
    *(f"forget_{kind}" for kind in KINDS),
)  # fmt: skip


def new_model(config, split, seed=None, data=None):
    """A freshly initialised model, as RecBole's run_recbole makes it, on ``data`` (default: the split's training data).

    Graphs and histories that a model holds are those of ``data``.
    """
    data = split.train._dataset if data is None else data
    init_seed(config["seed"] if seed is None else seed, config["reproducibility"])
    try:
        return config.model_class(config, data).to(config["device"])
    except (TypeError, ValueError, RuntimeError, AssertionError, MemoryError, ZeroDivisionError, IndexError) as error:
        if config.model_class.__module__.partition(".")[0] != "recbole":
            raise  # a fault of the user's own class is shown whole
        raise InputError(
            f"{config['model']} cannot be built with this configuration: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; check the keys of the model"
        ) from error


def train(config, split, path, forgotten=None, seed=None, log_negatives=True):
    """Train with early stopping on the validation data and keep the best epoch in ``path``.

    Args:
        forgotten (int array, optional): rows to leave out; None trains on ``split.train`` itself.
        seed (int, optional): of initialisation, order and negatives; default: the configuration's.
        log_negatives (bool): whether to write the triple log beside ``path``.

    Returns:
        (model with the best weights, trainer, seconds of ``fit``)
    """
    rows = None if forgotten is None else _rows(forgotten).tolist()
    distributed.order("train", path=str(path), forgotten=rows, seed=seed, log_negatives=log_negatives)
    loader = split.train if forgotten is None and seed is None else split.remaining(_rows(forgotten), seed)
    model = new_model(config, split, seed, loader._dataset)
    trainer = make_trainer(config, model)
    trainer.saved_model_file = str(path)
    trainer.log_negatives = log_negatives and trainer.log_negatives
    start = perf_counter()
    valid = split.judged_without(_rows(forgotten)).valid
    try:
        trainer.fit(loader, valid, verbose=True, saved=True, show_progress=config["show_progress"])
    except ValueError as error:
        if str(error) != "Training loss is nan":  # RecBole's words
            raise
        for each in (Path(path), log_path(path)):
            remove(each)
        raise InputError(
            f"the training's loss became NaN after {len(trainer.train_loss_dict)} epochs; lower learning_rate"
        ) from None
    seconds = perf_counter() - start
    if not config["single_spec"]:
        distributed.barrier()  # rank 0 has written the best weights
    state = read(path)
    model.load_state_dict(state["state_dict"])
    if trainer.triple_log:
        TripleLog.open(log_path(path)).truncate(state["epoch"] + 1)
    return model, trainer, seconds


def train_paired(config, split, path, original, forgotten, seed):
    """A model's own training again, without some rows: the same initialisation, batches and recorded negatives.

    It takes as many epochs as the model's weights did, and no validation data picks another. By RecBole's trainer, not
    by our replay. With nothing left out it ends in the model's weights.

    Args:
        path: file for the new weights.
        original: checkpoint of the model, its log beside it.
        forgotten (int array): rows to leave out.
        seed (int): of the model's training.

    Returns:
        (model with the new weights, seconds of training)

    Raises:
        InputError: no or a damaged original; batches that are not those of its log.
    """
    stored, log = checkpoints.load(original)
    epochs, rows = stored["triple_log"]["epochs"], _rows(forgotten)
    model = new_model(config, split, seed, split.remaining_dataset(rows))
    trainer = make_trainer(config, model)
    start = perf_counter()
    played = Played(split.remaining(_rows(None), seed), log, split.data_row, rows)
    for epoch in range(epochs):
        trainer._train_epoch(played, epoch)  # is RecBole's for a loader like this one, which there is no log of
    seconds = perf_counter() - start
    checkpoints.save(path, checkpoint_state(trainer, epochs - 1))
    return model, seconds


def training_settings(config):
    """The part of a configuration that decides, with data and seed, what weights training ends in; plain values."""
    own = {key for key, _, _ in own_options()} - {"negatives"}
    skipped = own | set(RUN_KEYS) | {"seed", "metrics", "topk", "metric_decimal_place", "state"}
    return {key: value for key, value in plain(config.final_config_dict).items() if key not in skipped}


def _rows(forgotten):
    return np.empty(0, np.int64) if forgotten is None else np.asarray(forgotten, np.int64)


@contextmanager
def quiet():
    """Only errors in the log."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Run:
    """One model to train: a seed, the rows to leave out (sorted tuple; empty: the original), and whether to log.

    A ``paired`` one is `train_paired` with the seed's original, which must be there already.
    """

    seed: int
    forgotten: tuple = ()
    log_negatives: bool = False
    paired: bool = False


def available_cores():
    """Cores that this process may use: fewer than the machine has where it was pinned (taskset, batch systems)."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class TrainedSeeds:
    """Trained models on one frozen split, cached in a folder by configuration, data and seed.

    A run that was cut off goes on where it stopped: what is finished is not trained again.

    Args:
        arguments: ``(model, dataset, config_file_list, config_dict)`` of :class:`UnlearnConfig`.
        folder: of the cache.
        processes (int, optional): trained at once, one thread each; default: `available_cores`.
    """

    def __init__(self, arguments, folder, processes=None):
        self.arguments = arguments
        self.folder = Path(folder)
        self.processes = processes or available_cores()
        self.config, self.split = opened(arguments)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, run):
        """Checkpoint file of a run, whether or not it exists yet."""
        settings = training_settings(self.config)
        data = self.split.fingerprint_without(list(run.forgotten))
        data.pop("of")
        what = [settings, data, run.seed, run.log_negatives, *(["paired"] if run.paired else [])]
        text = json.dumps(what, sort_keys=True)
        name = f"{self.config['model']}-{self.config['dataset']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return self.folder / f"{name}.pth"

    def seconds(self, run):
        """Training time of a finished run."""
        return json.loads(self.path(run).with_suffix(".json").read_text())["seconds"]

    def train(self, runs, show_progress=True):
        """Train what is not in the cache; returns the checkpoint paths, in order."""
        paths = [self.path(run) for run in runs]
        missing = {path: run for path, run in zip(paths, runs, strict=True) if not path.with_suffix(".json").exists()}
        if missing:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.processes, context, _start_worker, (self.arguments,)) as pool:
                jobs = [
                    pool.submit(_train_worker, run, str(path), str(self.path(Run(run.seed, (), True))))
                    for path, run in missing.items()
                ]
                for job in tqdm(as_completed(jobs), "Train", len(jobs), ncols=100, disable=not show_progress):
                    job.result()
        return paths


def opened(arguments):
    """Configuration and split of ``(model, dataset, config_file_list, config_dict)``."""
    config = UnlearnConfig(*arguments)
    config["show_progress"] = False
    init_seed(config["seed"], config["reproducibility"])
    return config, Split(config)


def _start_worker(arguments):
    global _worker
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    _worker = opened(arguments)


def _train_worker(run, path, original):
    config, split = _worker
    if run.paired:
        _, seconds = train_paired(config, split, path, original, run.forgotten, run.seed)
    else:
        _, _, seconds = train(config, split, path, run.forgotten, run.seed, run.log_negatives)
    write_atomically(Path(path).with_suffix(".json"), json.dumps({"seconds": seconds, "seed": run.seed}).encode())
