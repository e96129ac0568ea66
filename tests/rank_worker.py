"""One rank of a test, started as ``python rank_worker.py job.json`` with torchrun's environment variables.

The job names what to do: "unlearn" a list of cases by `run_unlearn`, or "train" and write down what this rank used.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from recbole.utils import init_seed

import recbole_unlearn  # noqa: F401
from recbole_unlearn import distributed
from recbole_unlearn.data.split import Split
from recbole_unlearn.quick_start import run_unlearn
from recbole_unlearn.runs.follower import follow
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.training import trainer as trainer_module
from recbole_unlearn.training.fit import new_model


def unlearn(job):
    """All cases in one group: joining costs more than they do."""
    with distributed.joined(timeout=60) as leading:
        if not leading:
            return follow()
        for case in job["cases"]:
            run_unlearn(config_dict=case)


class Watched(trainer_module.Share):
    """Notes the triples that the loss is given and counts: one array [n, 2 + negatives] a batch."""

    used = []

    def loss(self, whole):
        def watched(batch):
            if self.weight:
                users, items, drawn = (
                    batch[name].view(self.drawn.shape[1], -1) for name in ("user_id", "item_id", "neg_item_id")
                )
                assert (users == users[0]).all() and (items == items[0]).all()
                self.used.append(torch.cat([users[:1], items[:1], drawn]).T.numpy())
            return whole(batch)

        return super().loss(watched)


def train(job):
    """Train on every rank; each saves its weights and the triples that its loss was given, epoch by epoch."""
    trainer_module.Share = Watched
    with distributed.joined(timeout=60):
        rank, _ = distributed.rank_and_size()
        for name, options in job["cases"].items():
            config = UnlearnConfig("BPR", "tiny", config_dict={**options, "checkpoint_dir": str(Path(name).resolve())})
            init_seed(config["seed"], config["reproducibility"])
            split = Split(config)
            model = new_model(config, split, config["seed"] + 7 * rank)  # rank 0's weights and draws must win
            trainer, epochs = trainer_module.BPRTrainer(config, model), []
            one_epoch = trainer._train_epoch

            def noting(*args, one_epoch=one_epoch, epochs=epochs, **keywords):
                loss = one_epoch(*args, **keywords)
                epochs.append(np.concatenate(Watched.used))
                Watched.used.clear()
                if job.get("die") and rank == 1:
                    os._exit(9)
                return loss

            trainer._train_epoch = noting
            best = trainer.fit(split.train, split.valid, verbose=False)
            found = {key: value.numpy() for key, value in model.state_dict().items()}
            found |= {f"epoch{n}": used for n, used in enumerate(epochs)}
            if trainer.triple_log:
                found["log"] = np.array(str(trainer.triple_log.path))
            np.savez(f"{name}-{rank}.npz", best=best[0], losses=list(trainer.train_loss_dict.values()), **found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.argv = sys.argv[:1]
    {"unlearn": unlearn, "train": train}[job["what"]](job)
