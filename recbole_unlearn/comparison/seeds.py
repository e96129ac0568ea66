"""Many seeds of a model, trained in parallel processes, each kept by what determines it."""

import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
from tqdm import tqdm

from recbole_unlearn.comparison.kept import data_files, named, sources
from recbole_unlearn.data.split import Split, pairwise_loader
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.threads import limit_threads
from recbole_unlearn.settings.config import UnlearnConfig, changed
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import locked, remove, scratch_folder, write_atomically
from recbole_unlearn.training.again import train_paired
from recbole_unlearn.training.compiled import refusal
from recbole_unlearn.training.fit import LIMIT, distance, new_model, train, training_settings
from recbole_unlearn.training.trainer import make_trainer

CHECKED_EPOCHS = 5  # of compiled training against RecBole's


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

    @classmethod
    def original(cls, seed):
        """One that methods forget from, with its log."""
        return cls(seed, (), True)

    @classmethod
    def without(cls, seed, rows, paired=False):
        """One that is trained without rows, an array."""
        return cls(seed, tuple(map(int, rows)), paired=paired)


def agreement(config, split, folder):
    """How far compiled training ends from RecBole's own, over the way of the latter, after a few epochs.

    Kept in a folder by what determines it. None: the kernels are not for this training.
    """
    config = changed(config, compiled=False)
    if refusal(make_trainer(config, new_model(config, split)), pairwise_loader(split.train)):
        return None
    data = [split.fingerprint, data_files(config)]
    what = [training_settings(config), *data, config["seed"], sources("training.compiled")]
    file = Path(folder) / f"agreement-{named(what)}.json"
    if not file.exists():
        states = [copies(new_model(config, split).state_dict())]
        with scratch_folder() as scratch, quiet():
            for compiled in (False, True):
                config = changed(config, compiled=compiled, epochs=CHECKED_EPOCHS, eval_step=0)
                model, _, _ = train(config, split, scratch / f"{compiled}.pth", [], config["seed"], False)
                states.append(copies(model.state_dict()))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"distance": distance(*states)}).encode())
    return json.loads(file.read_text())["distance"]


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

    Attributes:
        files (dict): `data_files` that the split was read from.
        agreement (float or None): where compiled training is asked for, how far it ends from RecBole's own.

    Raises:
        InputError: that is too far.
    """

    def __init__(self, arguments, folder, processes=None):
        self.arguments = arguments
        self.folder = Path(folder)
        self.processes = processes or available_cores()
        self.config, self.split = opened(arguments)
        self.files = data_files(self.config)
        self._whole: set[Path] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.agreement = agreement(self.config, self.split, self.folder) if self.config["compiled"] else None
        if self.agreement is not None and not self.agreement <= LIMIT:
            raise InputError(
                f"compiled: training ends {self.agreement:.1e} of the way from RecBole's own after {CHECKED_EPOCHS} "
                f"epochs, where at most {LIMIT} is rounding; leave compiled out"
            )

    def path(self, run):
        """Checkpoint file of a run, whether or not it exists yet."""
        settings = training_settings(self.config)
        data = self.split.fingerprint_without(list(run.forgotten))
        data.pop("of")
        what = [settings, data, self.files, run.seed, run.log_negatives, *(["paired"] if run.paired else [])]
        return self.folder / f"{self.config['model']}-{self.config['dataset']}-{named(what)}.pth"

    def seconds(self, run):
        """Training time of a finished run."""
        return json.loads(self.path(run).with_suffix(".json").read_text())["seconds"]

    def train(self, runs, show_progress=True):
        """Train what is not in the cache, or damaged there; returns the checkpoint paths, in order.

        What another process is training is waited for.
        """
        paths = [self.path(run) for run in runs]
        unknown = {path: run for path, run in zip(paths, runs, strict=True) if path not in self._whole}
        missing = {path: run for path, run in unknown.items() if not _whole(run, path)}
        if missing:
            calls = [(run, str(path), str(self.path(SeedRun.original(run.seed)))) for path, run in missing.items()]
            in_processes(_train_worker, calls, self.processes, _start_worker, (self.arguments,), show_progress)
        self._whole.update(paths)
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
    """Call a function with each of some arguments, in new processes that begin with another call; order is any.

    Raises:
        InputError: a process was ended before its work was.
    """
    end_if_starting()
    context = _context()
    begun = context.Event()
    with ProcessPoolExecutor(min(processes, len(calls)), context, _begin, (begun, begin, arguments)) as pool:
        try:
            waiting = [pool.submit(work, *call) for call in calls]
            for done in tqdm(as_completed(waiting), title, len(waiting), ncols=100, disable=not show_progress):
                done.result()
        except BrokenProcessPool:
            reason = "the system ended it, most likely for memory: give fewer processes, or more memory"
            if not begun.is_set():
                reason = 'each runs your script again to begin: put what it calls under `if __name__ == "__main__":`'
            raise InputError(f"a process that was to work beside others ended too early; {reason}") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def end_if_starting() -> None:
    """End a process that runs the caller's script to begin, and came to what starts processes itself: who started it
    says why (`in_processes`)."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)


def _context():
    """How processes start: forked from one that has imported what they all need, which takes seconds each; no thread
    of this one is in it. Each by itself where the system cannot (Windows), or its libraries may not be (macOS)."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin(begun, begin, arguments):
    begun.set()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent():
    """Who is killed cannot tell the processes that work for it, which would wait for more for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    os._exit(1)


def opened(arguments):
    """Configuration and split of ``(model, dataset, config_file_list, config_dict)``."""
    config = UnlearnConfig(*arguments)
    config["show_progress"] = False
    return config, Split.seeded(config)


def begin_worker() -> None:
    """What a process that trains beside others begins with: one thread, and errors alone in its log."""
    limit_threads(1)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)


def _start_worker(arguments):
    global _worker
    begin_worker()
    _worker = opened(arguments)


def _train_worker(run, path, original):
    config, split = _worker
    with locked(path, wait=True):
        if _whole(run, path):  # by another process, in the meantime
            return
        remove(Path(path).with_suffix(".json"))  # what is damaged is no more whole, until it is trained again
        if run.paired:
            _, seconds = train_paired(config, split, path, original, run.forgotten, run.seed)
        else:
            _, _, seconds = train(config, split, path, run.forgotten, run.seed, run.log_negatives)
        write_atomically(Path(path).with_suffix(".json"), json.dumps({"seconds": seconds, "seed": run.seed}).encode())


def _whole(run, path):
    """Whether a run was trained to its end, and its files are as they were then."""
    if not Path(path).with_suffix(".json").exists():
        return False
    try:
        checkpoints.load(path) if run.log_negatives else checkpoints.read(path, logged=False)
    except InputError:
        return False
    return True
