"""Many seeds of a model, trained in parallel processes, each kept by what determines it."""

import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from recbole_unlearn.data.split import Split
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage.files import write_atomically
from recbole_unlearn.training.fit import train, train_paired, training_settings


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
class SeedRun:
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
            calls = [(run, str(path), str(self.path(SeedRun(run.seed, (), True)))) for path, run in missing.items()]
            in_processes(_train_worker, calls, self.processes, _start_worker, (self.arguments,), show_progress)
        return paths


def in_processes(
    work: Callable,
    calls: Sequence[tuple],
    processes: int,
    begin: Callable,
    arguments: tuple,
    show_progress: bool,
    title: str = "Train",
) -> None:
    """Call a function with each of some arguments, in new processes that begin with another call; order is any."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(calls)), context, begin, arguments) as pool:
        waiting = [pool.submit(work, *call) for call in calls]
        try:
            for done in tqdm(as_completed(waiting), title, len(waiting), ncols=100, disable=not show_progress):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def opened(arguments):
    """Configuration and split of ``(model, dataset, config_file_list, config_dict)``."""
    config = UnlearnConfig(*arguments)
    config["show_progress"] = False
    return config, Split.seeded(config)


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
