"""Compiled training of BPR on dot products against torch.optim.Adam and autograd."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_unlearn.influence import dot_product as module
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.dot_product import DotProductTraining
from recbole_unlearn.influence.recorded import Adam
from recbole_unlearn.influence.threads import in_step

ADAM = Adam(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
N_USERS, N_ITEMS = 60, 80
RATES = {
    "constant": lambda t: np.ones(len(t)),
    "wave": lambda t: 1 + 0.8 * np.sin(t / 20),
    "warm": lambda t: np.minimum(t / 50, 1) ** 3,  # the first ones are zero
    "halved": lambda t: 0.5 ** (t // 40),
}


class Problem:
    """Users and items of which some are never touched, batches with holes, empty ones, and rows that are left out."""

    def __init__(self, K, m, adam=ADAM, rows=1500, batch=32, epochs=3, rates="constant", scale=0.1, seed=0):
        rng = np.random.default_rng(seed)
        self.adam = adam
        self.start = (scale * rng.normal(size=(N_USERS + N_ITEMS, K))).astype(np.float32)
        law = 1 / np.arange(1, N_ITEMS - 10) ** 1.2
        self.users = rng.integers(1, N_USERS - 20, rows).astype(np.uint8)
        self.pos = (1 + rng.choice(len(law), rows, p=law / law.sum())).astype(np.uint16)
        self.epochs = []
        for _ in range(epochs):
            ahead = rng.integers(1, len(law), (rows, m))
            negatives = 1 + (self.pos[:, None].astype(int) - 1 + ahead) % len(law)
            sizes = rng.integers(1, batch, 3 * rows // batch) * (rng.random(3 * rows // batch) > 0.1)
            bounds = np.minimum(np.append(0, np.cumsum(sizes)), rows - 10)
            rate = adam.lr * RATES[rates](np.arange(len(sizes)))
            self.epochs.append(Epoch(rng.permutation(rows), bounds, negatives.astype(np.uint16), rate))

    def train(self, threads=2, with_loss=False):
        training = DotProductTraining(self.start, N_USERS, self.adam, threads)
        losses = [training.epoch(self.users, self.pos, epoch, with_loss) for epoch in self.epochs]
        return training, losses

    def by_torch(self, dtype=torch.float64):
        """Weights, moments, losses, and the number of steps."""
        W = torch.tensor(self.start, dtype=dtype, requires_grad=True)
        lr, beta1, beta2, eps, decay = astuple(self.adam)
        optimizer = torch.optim.Adam([W], lr, (beta1, beta2), eps, decay)
        losses, steps = [], 0
        for epoch in self.epochs:
            losses.append(0.0)
            for s, rate in enumerate(epoch.rates):
                rows = epoch.order[epoch.bounds[s] : epoch.bounds[s + 1]]
                if not len(rows):
                    continue
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                user, item = W[self.users[rows].astype(int)], W[N_USERS + self.pos[rows].astype(int)]
                others = W[N_USERS + epoch.negatives[rows].astype(int)]
                scores = (user * item).sum(1)[:, None] - (user[:, None] * others).sum(2)
                loss = -torch.log(1e-10 + torch.sigmoid(scores)).mean()
                loss.backward()
                optimizer.step()
                losses[-1] += loss.item()
                steps += 1
        state = optimizer.state[W]
        return W.detach().numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(), losses, steps


def assert_trained(problem, tolerance):
    """By all measures like torch in float64, relative to the way that the weights went; returns the training."""
    training, losses = problem.train(with_loss=True)
    W, M, V, expected, steps = problem.by_torch()
    way = np.abs(W - problem.start).max()
    assert np.abs(training.W - W).max() < tolerance * way
    assert np.abs(training.M - M).max() < 10 * tolerance * np.abs(M).max()
    assert np.abs(training.V - V).max() < 10 * tolerance * np.abs(V).max()
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert training.steps == steps
    return training


@pytest.mark.parametrize(("K", "m"), [(1, 1), (7, 4), (8, 1), (8, 4), (32, 4), (64, 1)])
def test_like_torch(K, m):
    assert_trained(Problem(K, m), 1e-5)


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_schedules_and_weight_decay(rates, decay):
    assert_trained(Problem(64, 1, replace(ADAM, weight_decay=decay), rates=rates), 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": 1e-3},
        {"eps": 1e-5},  # about as large as the root of the second moment
        {"eps": 1e-20, "beta1": 0.0},
        {"beta1": 0.5, "beta2": 0.9},
        {"beta1": 0.9, "beta2": 0.9},
        {"beta1": 0.99},
        {"beta2": 0.99},
    ],
    ids=str,
)
def test_other_settings_of_adam(changes):
    assert_trained(Problem(8, 1, replace(ADAM, **changes)), 1e-5)


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1e-3])
def test_rows_catch_up_after_hundreds_of_steps(eps):
    """Batches of one or two rows, so that most weight rows wait for long."""
    problem = Problem(64, 1, replace(ADAM, lr=0.001, eps=eps), batch=3, epochs=2)
    training = assert_trained(problem, 2e-5)
    assert training.steps > 1500


def test_as_close_to_float64_as_torch_in_float32():
    problem = Problem(64, 1, replace(ADAM, lr=0.001), rows=4000, batch=16)
    W, W32 = problem.by_torch()[0], problem.by_torch(torch.float32)[0]
    ours = problem.train()[0].W
    assert np.sqrt(np.mean((ours - W) ** 2)) < 2 * np.sqrt(np.mean((W32 - W) ** 2))


def test_large_scores():
    """Where the sigmoid is below 1e-10, RecBole's loss has no slope any more."""
    problem = Problem(8, 1, scale=4.0)
    user, item, other = problem.users, N_USERS + problem.pos, N_USERS + problem.epochs[0].negatives[:, 0]
    assert ((problem.start[user] * (problem.start[item] - problem.start[other])).sum(1) < -30).any()
    assert_trained(problem, 1e-4)


@pytest.mark.parametrize(("K", "m", "decay"), [(64, 1, 0.0), (32, 4, 0.01), (8, 4, 0.0)])
def test_the_number_of_threads_does_not_show(K, m, decay):
    problem = Problem(K, m, replace(ADAM, weight_decay=decay))
    (one, losses), (two, same_losses) = problem.train(1, with_loss=True), problem.train(2, with_loss=True)
    assert losses == same_losses
    for name in "WMV":
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("K", [8, 64])  # of 8 columns one thread arranges blocks ahead
def test_blocks_are_like_one(monkeypatch, K):
    problem = Problem(K, 1, rows=4000, batch=8)
    whole, _ = problem.train()
    monkeypatch.setattr(module, "BLOCK", 1)  # so that they are of four times the number of weight rows
    parts, _ = problem.train()
    np.testing.assert_array_equal(problem.train(threads=1)[0].W, parts.W)
    way = np.abs(whole.W - problem.start).max()
    assert 0 < np.abs(whole.W - parts.W).max() < 1e-5 * way


def test_untouched_rows_stay_and_what_is_given_is_not_changed(tmp_path):
    problem = Problem(64, 1)
    given, start = problem.epochs[0].negatives.copy(), problem.start.copy()
    np.save(tmp_path / "negatives.npy", given)
    before, _ = problem.train()
    problem.epochs[0] = replace(problem.epochs[0], negatives=np.load(tmp_path / "negatives.npy", mmap_mode="r"))
    mapped, _ = problem.train()
    np.testing.assert_array_equal(before.W, mapped.W)
    np.testing.assert_array_equal(problem.start, start)
    np.testing.assert_array_equal(problem.epochs[0].negatives, given)
    touched = np.append(problem.users, [N_USERS + problem.pos, N_USERS + problem.epochs[0].negatives[:, 0]])
    never = np.setdiff1d(np.arange(N_USERS, N_USERS + 1), touched)  # the padding item
    np.testing.assert_array_equal(before.W[never], start[never])
    assert len(never) == 1 and not before.M[never].any() and not before.V[never].any()


def test_an_epoch_without_a_batch_is_no_step():
    problem = Problem(8, 1)
    training = DotProductTraining(problem.start, N_USERS, ADAM)
    empty = replace(problem.epochs[0], bounds=np.zeros(2, int), rates=np.ones(1))
    assert training.epoch(problem.users, problem.pos, empty, with_loss=True) == 0
    none = replace(empty, bounds=np.zeros(1, int), rates=np.empty(0))
    assert training.epoch(problem.users, problem.pos, none) is None
    assert training.steps == 0
    np.testing.assert_array_equal(training.W, problem.start)


def test_a_thread_that_fails_does_not_leave_the_other_waiting(monkeypatch):
    problem = Problem(64, 1)
    problem.train()
    kernel = module.train_steps(32, 1)

    def fail(begin, *rest):
        if begin == 1:
            raise MemoryError
        kernel(begin, *rest)

    monkeypatch.setattr(module, "train_steps", lambda L, m: fail)
    began = time.perf_counter()
    with pytest.raises(MemoryError):
        problem.train()
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_thread_that_cannot_be_started_does_not_leave_the_other_waiting(monkeypatch, error):
    start, began = threading.Thread.start, time.perf_counter()

    def refused(thread):
        if thread.name.endswith("_1"):
            raise error
        start(thread)

    def run(begin, end, progress):
        while progress[8 * (1 - begin)] <= 0 and time.perf_counter() - began < 10:
            time.sleep(0.01)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(error):
        in_step(run, 2, 2, 1)
    assert time.perf_counter() - began < 10


def in_another_process(program):
    """Run a program; returns the words that it prints."""
    command, here = [sys.executable, "-W", "ignore", "-c", program], Path(module.__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=here)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can not be chosen here")
def test_two_threads_on_one_core():
    """They wait for each other without taking the core from each other."""
    program = """
import os, time
import numpy as np
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from recbole_unlearn.influence.dot_product import DotProductTraining
from recbole_unlearn.influence.recorded import Adam
from recbole_unlearn.influence.coupling import Epoch
rng = np.random.default_rng(0)
start = rng.normal(size=(2000, 64)).astype(np.float32)
users, pos = rng.integers(0, 1000, (2, 20000))
negatives = rng.integers(0, 1000, (20000, 1)).astype(np.uint16)
epoch = Epoch(np.arange(20000), np.arange(0, 20001, 100), negatives, np.full(200, 0.01))
for threads in (1, 2):
    training = DotProductTraining(start, 1000, Adam(0.01, 0.9, 0.999, 1e-8, 0.0), threads)
    for repeat in range(2):
        began = time.perf_counter()
        training.epoch(users, pos, epoch)
    print(time.perf_counter() - began)
"""
    one, two = map(float, in_another_process(program))
    assert two < 20 * one + 1
