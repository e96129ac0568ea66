"""Checkpoints without a log, RecBole's own above all: it is made by training again, and proved by its end.

Split, initial weights, order of the rows and negatives follow from the seed and the data. Where training again ends in
the stored weights, what it drew is what was drawn then. Where it does not, one approximate step may still be taken, if
it is asked for: from the stored weights, on negatives of the same law, as `approximate` says of the checkpoint.
"""

import shutil
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from recbole.data.dataloader import NegSampleEvalDataLoader
from tqdm import tqdm

from recbole_unlearn.compat.recbole_models import checkpoint_state
from recbole_unlearn.data.split import Split, pairwise_loader
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig, changed
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import file_checksum, in_one_line, scratch_folder
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.training import compiled
from recbole_unlearn.training.again import was_validated
from recbole_unlearn.training.fit import LIMIT, distance, nan_said, new_model
from recbole_unlearn.training.trainer import make_trainer


def adopted_path(stock: Path, folder: Path | str | None) -> Path:
    """Where the adopted form of a checkpoint lies: in a folder, or beside it."""
    return Path(folder or stock.parent) / f"{stock.stem}-adopted.pth"


def origin(path: Path, stored: dict[str, Any]) -> Path | None:
    """The file beside an adopted checkpoint that it was adopted from, if that is still so; None: it was not adopted."""
    name = _noted(stored).get("file")
    return path.parent / Path(name).name if isinstance(name, str) else None


def approximate(stored: dict[str, Any]) -> float | None:
    """How far training again ended from the weights of an adopted checkpoint that it does not reproduce; else None."""
    left = _noted(stored).get("distance")
    return left if isinstance(left, float) and not left <= LIMIT else None


def _noted(stored):
    noted = stored["triple_log"].get("adopted")
    return noted if isinstance(noted, dict) else {}


def check_origin(path: Path, stored: dict[str, Any], stock: Path) -> None:
    """Raises InputError where an adopted checkpoint was not made of this one of RecBole's."""
    if _noted(stored).get("sha256") != file_checksum(stock):
        raise InputError(
            f"{path} is there already, and was not adopted from {stock} as it is now; move it elsewhere, or give "
            "another checkpoint_dir"
        )


def check_epoch(stock: Path, stored: dict[str, Any]) -> None:
    """Raises InputError where a checkpoint was not trained for some of its epochs."""
    epoch, epochs = stored["epoch"], stored["config"].get("epochs")
    if not (type(epoch) is type(epochs) is int and 0 <= epoch < epochs):
        raise InputError(
            f"checkpoint {stock} is of epoch {epoch!r} of {epochs!r}, which no training ended with; give one of a "
            "trained model"
        )


def check(stock: Path, stored: dict[str, Any], config: UnlearnConfig, split: Split) -> None:
    """Raises InputError where a model on these data would have weights of other sizes than the stored ones."""
    now = {name: list(value.shape) for name, value in new_model(config, split).state_dict().items()}
    then = {name: list(value.shape) for name, value in stored["state_dict"].items()}
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise InputError(
                f"checkpoint {stock} was trained on other data, or by another version of its model: its {name} is "
                f"{then.get(name)}, on the data set in {config['data_path']} it is {now.get(name)}; give the data_path "
                "of the data that it was trained on"
            )


def adopt(
    stock: Path, stored: dict[str, Any], config: UnlearnConfig, split: Split, path: Path
) -> tuple[dict[str, Any], TripleLog]:
    """Write a checkpoint with a log that has the weights of one without; returns its content and its log.

    Args:
        stock: the file without a log, which stays as it is.
        stored: its content.
        config: its configuration.
        split: its data, as its seed splits them; nobody has used the train loader.
        path: of the new file.

    Raises:
        InputError: training again does not end in the stored weights, or the system refuses.
    """
    epochs, weights = stored["epoch"] + 1, stored["state_dict"]
    with in_one_line(path.parent, "checkpoint_dir"), scratch_folder() as scratch:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the work
        trainer, start = _trained(config, split, epochs, scratch / path.name, was_validated(stored))
        if trainer.triple_log is None:
            raise InputError(f"checkpoint {stock} cannot be adopted: {trainer.no_log}")
        left = distance(start, weights, copies(trainer.model.state_dict()))
        if not left <= LIMIT:
            if config["method"] != "influence" or not np.isfinite(left):
                raise InputError(
                    f"checkpoint {stock} cannot be adopted: training again by its seed on these data ends {left:.2g} "
                    f"of the way that it went from its weights, where at most {LIMIT} is fit to unlearn from; "
                    f"{_likely(left)}; give the data that it was trained on, train anew with recbole_unlearn, or take "
                    "one approximate step from its weights: method: influence"
                )
            trainer.triple_log.keep_draws_alone()  # nobody knows the course of the training that was
        state = checkpoint_state(trainer, stored["epoch"])
        # as it was trained: what is compared with it is not compiled either
        state["config"] |= {"compiled": False, "checkpoint_dir": config["checkpoint_dir"]}
        state |= {key: stored[key] for key in state if key in stored and key != "config"}
        noted = {"file": stock.name, "sha256": file_checksum(stock), "distance": left}
        log = trainer.triple_log
        state["triple_log"] = {"run_id": log.run_id, "epochs": epochs, "adopted": noted}
        if left <= LIMIT:  # else nothing is trained again
            state["triple_log"]["seconds"] = trainer.seconds
        return state, checkpoints.save_with_log(path, state, lambda folder: shutil.copytree(log.path, folder))


def _trained(config, split, epochs, path, validated):
    """A trainer that has trained for some epochs as RecBole's would have, and the weights that it began with."""
    config = changed(config, compiled=False, log_negatives=True, checkpoint_dir=str(path.parent))
    model = new_model(config, split)
    start = copies(model.state_dict())
    trainer = make_trainer(config, model)
    trainer.saved_model_file = str(path)
    config["compiled"] = compiled.refusal(trainer, pairwise_loader(split.train)) is None
    draws = _drawing(config, split) if validated else None
    for epoch in tqdm(range(epochs), "Adopt", ncols=100, disable=not config["show_progress"]):
        with nan_said(f"training again by its seed, the loss became NaN in epoch {epoch}; train anew"):
            trainer._train_epoch(split.train, epoch)
        if draws and (epoch + 1) % draws[1] == 0:
            deque(draws[0], 0)
    return trainer, start


def _drawing(config, split):
    """RecBole's validation loader, and every how many epochs it draws negatives from the stream that training draws
    from; None where it does not."""
    every = min(config["eval_step"], config["epochs"])
    if every <= 0 or config["eval_args"]["mode"]["valid"] == "full":
        return None
    return NegSampleEvalDataLoader(config, split.valid._dataset, split.valid._sampler, shuffle=False), every


def _likely(left):
    if left > 0.1:
        return "most likely the data are others, or in another order, or the seed was not set before each part"
    return "most likely the weights were changed since, or another version or device computed them"
