"""Recompute a model from its log by RecBole's own trainer: ``python -m recbole_unlearn.verify MODEL``.

A log holds all that a training drew: its initial weights, orders and negatives. So whoever has an original, or a model
that has forgotten exactly, and its log, can train it again, without this package's kernels, and see that it ends in the
weights that are served, and that nothing else than the log's interactions was trained on.
"""

import argparse
import logging
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from recbole_unlearn.data.sampling import Played
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.given import Given
from recbole_unlearn.storage.paths import check_path
from recbole_unlearn.training.again import begin, train_paired
from recbole_unlearn.training.compiled import LOGGED
from recbole_unlearn.training.fit import LIMIT, distance, new_model
from recbole_unlearn.training.trained import Checkpoint, inexact, seed_of


def verify(checkpoint: Path | str, model: type | None = None) -> float:
    """Train a checkpoint's model again from its log, by RecBole's own trainer.

    Args:
        checkpoint: its path, the triple log beside it.
        model: of a class of your own.

    Returns:
        How far that ends from the stored weights, over how far training moved them.

    Raises:
        InputError: no log, a damaged one, or one that does not tell all that was drawn; a model that is approximate.
    """
    check_path("checkpoint", checkpoint)
    with ExitStack() as held, tempfile.TemporaryDirectory() as folder:
        opened = Checkpoint.open(Given.read(model, None, None, {"checkpoint": str(checkpoint)}), held)
        assert opened
        if reason := inexact(opened.stored):
            raise InputError(f"{checkpoint} {reason}: no training ends in its weights, and none can be recomputed")
        config, split = opened.config, opened.split()  # of the rows that it has not forgotten
        if config.model_class not in LOGGED and not Played.fits(split.train):
            raise InputError(f"{config['model']} trains on more than its log holds; it cannot be recomputed from it")
        result = opened.log is not None and opened.log.steps(0) is not None  # an original's can be drawn again
        if config.model_class not in LOGGED and result:
            known = ", ".join(each.__name__ for each in LOGGED)
            raise InputError(
                f"{config['model']} may draw in training (dropout), of which a result's log holds nothing; only "
                f"originals, and results of {known}, can be recomputed"
            )
        config["show_progress"], config["checkpoint_dir"] = False, folder
        nothing, seed = np.empty(0, np.int64), seed_of(opened.stored)
        seed = config["seed"] if seed is None else seed
        again, _ = train_paired(config, split, Path(folder) / "again.pth", checkpoint, nothing, seed)
        start = new_model(config, split, seed)
        begin(start, opened.log)
    return distance(copies(start.state_dict()), opened.stored["state_dict"], copies(again.state_dict()))


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if the weights are those of the log's training, 1 if not, 2 where nobody can tell."""
    parser = argparse.ArgumentParser(
        prog="python -m recbole_unlearn.verify", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", help="checkpoint, its .triples folder beside it")
    logging.disable(logging.INFO)
    path = parser.parse_args(arguments).model
    try:
        left = verify(path)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    same = left <= LIMIT
    print(
        f"{path}: RecBole's own trainer, on the log's interactions and draws alone, ends {left:.1e} of the "
        f"training's way from the stored weights (at most {LIMIT:g} is rounding): "
        + ("they are that training's." if same else "they are NOT that training's.")
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
