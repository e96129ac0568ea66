"""What ranks other than 0 do: take part in what rank 0 orders, see `distributed`."""

import logging
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from recbole_unlearn import distributed
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.given import Given
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.replay import Replay


def follow():
    """Take part until rank 0 has finished. Raises OtherRankFailed where it, or another rank, fails."""
    logging.getLogger().setLevel(logging.ERROR)
    follower = Follower()
    for name, arguments in distributed.orders():
        getattr(follower, name)(**arguments)


class Follower:
    """One method an order; it reads what rank 0 wrote, writes nothing, and returns nothing."""

    def open(self, arguments, fingerprint):
        """Read configuration and data as rank 0 has."""
        given = Given.read(*arguments)
        with ExitStack() as held:
            checkpoint = Checkpoint.open(given, held)
        self.config = checkpoint.config if checkpoint else UnlearnConfig(*given.arguments)
        self.split = checkpoint.split() if checkpoint else Split.seeded(self.config)
        if self.split.fingerprint != fingerprint:
            raise InputError(
                f"{self.config['data_path']} holds other interactions here than on rank 0; give all ranks the same data"
            )

    def train(self, path, forgotten, seed, log_negatives):
        self.config["checkpoint_dir"] = str(Path(path).parent)
        forgotten = None if forgotten is None else np.array(forgotten, np.int64)
        train(self.config, self.split, path, forgotten, seed, log_negatives)

    def open_unlearner(self, checkpoint, run_id):
        opened = Checkpoint(Path(checkpoint), self.config, *checkpoints.load(checkpoint, verify=False))
        assert opened.log
        if opened.log.run_id != run_id:
            raise InputError(
                f"checkpoint {checkpoint} is another one here than on rank 0; give all ranks the same files"
            )
        self.unlearner = InfluenceUnlearner(opened.trained(self.split), shared=True)
        self.unlearner.warm_up()

    def unlearn(self, rows, replayed):
        self.request, way = np.array(rows, np.int64), self.unlearner.way
        if isinstance(way, Replay):
            way = replace(way, rows=replayed)
        self.unlearned = self.unlearner.carry_out(way, self.request)

    def apply(self):
        self.unlearner.apply(self.request, self.unlearned)


def main():
    """A rank that rank 0's process has started."""
    try:
        with distributed.joined(timeout=int(sys.argv[1])):
            follow()
    except distributed.OtherRankFailed:
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
