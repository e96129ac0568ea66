"""Kernels come from disk in a new process: else every request would wait for the compiler. They compute the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from recbole_unlearn import influence

PROGRAM = """
import gc
import hashlib
import numpy as np
import torch
from numba.core.dispatcher import Dispatcher
from recbole_unlearn.influence import propagated_training
from recbole_unlearn.influence import replay as replaying
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.dot_product import DotProductTraining
from recbole_unlearn.influence.operators import DotProductCurvature, UserTriples
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.recorded import Adam, Recorded, Trajectory
from recbole_unlearn.influence.summed_training import PRODUCT, Part, SummedTraining

for weight in (np.ones(2), 1.0):  # for which nothing is compiled twice
    triples = UserTriples([0, 0], np.array([0, 1], np.uint16), np.array([[1], [2]], np.uint16), 1, 3, weight)
    operator = DotProductCurvature(triples, np.ones((1, 8)), np.ones((3, 8)), exact=True)
operator.matvec(torch.ones(operator.size, dtype=torch.float64))
operator.gradient(), operator.diagonal(), operator.blocks()

one, ends = np.zeros(1, int), Trajectory([0, 1], [np.zeros(24, np.float32)] * 2)
recorded = Recorded(one, one, [np.zeros((1, 1), np.uint16)], 1, 2, Adam(0.1, 0.9, 0.999, 1e-8, 0.0), 1)
replaying.replay(recorded, ends, one)

rng = np.random.default_rng(0)
users, pos = rng.integers(1, 30, 500), rng.integers(1, 40, 500)
epoch = rng.permutation(500), np.arange(0, 501, 50), rng.integers(1, 40, (500, 1)).astype(np.uint16), np.full(10, 0.01)
start, epoch = rng.normal(size=(70, 16)).astype(np.float32), Epoch(*epoch)
loss, optimizer = propagated_training.GraphLoss(2, 0.01), recorded.optimizer
trained = propagated_training.PropagatedTraining(Graph(users, pos, 30, 40, 2), start, optimizer, loss, 30)
trained.epoch(users, pos, epoch, True)
found = [trained.W]
trained = DotProductTraining(start, 30, optimizer, 2)
trained.epoch(users, pos, epoch)
trained.epoch(users, pos, epoch)
found.append(trained.W)
trained = SummedTraining([Part(PRODUCT, start, 30)], optimizer)
trained.epoch([users[:, None]], pos, epoch)
trained.epoch([users[:, None]], pos, epoch)
found += trained.W
print(*(hashlib.sha1(weights.tobytes()).hexdigest() for weights in found))
used = [each for each in gc.get_objects() if isinstance(each, Dispatcher) and each.signatures]
print(sum(len(kernel.stats.cache_misses) for kernel in used), sum(len(kernel.stats.cache_hits) for kernel in used))
"""


def test_a_second_process_compiles_nothing_and_computes_the_same_digits():
    said = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        said.append(run.stdout.splitlines())
    assert said[0][0] == said[1][0]
    assert said[1][1].split() == ["0", "18"]


def test_a_change_of_what_a_kernel_calls_reaches_it(tmp_path):
    folder = tmp_path / "recbole_unlearn"
    shutil.copytree(Path(influence.__file__).parent, folder / "influence", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "__init__.py").touch()
    program = (
        "import numpy\nfrom recbole_unlearn.influence.pairwise_loss import sigmoid\nprint(sigmoid(numpy.float32(0)))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": "."}

    def said():
        command = [sys.executable, "-W", "ignore", "-c", program]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert run.returncode == 0, run.stderr
        return float(run.stdout)

    assert said() == said() == 0.5
    file = folder / "influence" / "vectors.py"
    source = file.read_text("utf-8")
    assert source.count("    return series * ") == 1
    file.write_text(source.replace("    return series * ", "    return np.float32(3) * series * "), "utf-8")
    assert said() == 0.25
