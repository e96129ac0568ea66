"""Kernels come from disk in a new process: else every request would wait for the compiler."""

import subprocess
import sys

PROGRAM = """
import gc
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

training = propagated_training.PropagatedTraining(
    Graph(one, one, 1, 2, 1), np.ones((3, 8), np.float32), recorded.optimizer, propagated_training.GraphLoss(1), 1
)
epoch = Epoch(one, np.array([0, 1]), np.ones((1, 1), np.uint16), np.ones(1))
training.epoch(one, one, epoch)
DotProductTraining(np.ones((3, 8), np.float32), 1, recorded.optimizer, 2).epoch(one, one, epoch)
SummedTraining([Part(PRODUCT, np.ones((3, 8), np.float32), 1)], recorded.optimizer).epoch([one[:, None]], one, epoch)
used = [each for each in gc.get_objects() if isinstance(each, Dispatcher) and each.signatures]
print(sum(len(kernel.stats.cache_misses) for kernel in used), sum(len(kernel.stats.cache_hits) for kernel in used))
"""


def test_a_second_process_compiles_nothing():
    for _ in range(2):
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0", "18"]
