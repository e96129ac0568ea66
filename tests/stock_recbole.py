"""Trains models as RecBole alone does, in a process that has never loaded recbole_unlearn; writes FOLDER/NAME.pth.

python stock_recbole.py FOLDER < {"NAME": ["MODEL", {"key": value, ...}], ...}
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import dok_matrix

torch.set_num_threads(1)
# what people do to run RecBole 1.2 on today's packages
for name, kind in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_), ("bool8", np.bool_)):
    if not hasattr(np, name):
        setattr(np, name, kind)
if not hasattr(dok_matrix, "_update"):
    dok_matrix._update = lambda self, values: self._dict.update(values)

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.model.general_recommender.bpr import BPR  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402


class Mine(BPR):
    """A class of the user's own."""


def main(folder, trainings):
    for name, (model, options) in trainings.items():
        kind = Mine if model == "Mine" else get_model(model)
        config = Config(Mine if model == "Mine" else model, "tiny", config_dict=options)
        init_seed(config["seed"], config["reproducibility"])
        train, valid, _ = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], config["reproducibility"])
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, kind(config, train._dataset).to(config["device"]))
        trainer.fit(train, valid, verbose=False)
        os.replace(trainer.saved_model_file, folder / f"{name}.pth")
    assert not any(module.startswith("recbole_unlearn") for module in sys.modules)


if __name__ == "__main__":
    main(Path(sys.argv.pop()), json.load(sys.stdin))
