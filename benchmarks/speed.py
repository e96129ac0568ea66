"""Measure speed and memory, each against its yardstick in the same run.

    python benchmarks/speed.py kernels                        # also: growth, forget-sets, replay: need no data
    python benchmarks/speed.py solver --data_path=PATH        # trains what is not in --cache
    python benchmarks/speed.py requests --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml
    python benchmarks/speed.py COMMAND --help

Functions that are compared take turns, so that whatever else runs on the machine slows them alike; ratios are of
neighbours. Tables show the median and, in brackets, the range. Files are written to results/speed/.
"""

import copy
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import common
import numpy as np
import pandas as pd
import torch
from common import CACHED, CLOCK, CLOCKS, DATA, RESULTS, ROOT, option, ratios, seconds, setting, spread, takes
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
from recbole.model.general_recommender.bpr import BPR
from recbole.trainer.trainer import Trainer
from recbole.utils import init_seed
from synthetic import forget_sets, growth, kernels, replay, report

from recbole_unlearn import distributed
from recbole_unlearn.comparison.seeds import opened
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.influence.coupling import Epoch
from recbole_unlearn.influence.operators import Damped
from recbole_unlearn.influence.propagated import Graph
from recbole_unlearn.influence.propagated_training import GraphLoss, PropagatedTraining
from recbole_unlearn.influence.recorded import Adam
from recbole_unlearn.influence.solver import block_jacobi, conjugate_gradient, jacobi
from recbole_unlearn.influence.threads import limit_threads
from recbole_unlearn.settings.config import changed
from recbole_unlearn.settings.given import Given
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.triple_log import log_path, snapshot_due
from recbole_unlearn.training.fit import flat_weights, new_model
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.training.trainer import BPRTrainer
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.propagated import MOVES
from recbole_unlearn.unlearners.replay import Replay

RATIO = 0.0002  # of the interactions in a request
OUTPUT = {"output": RESULTS / "speed"}


# Solver


@takes(datasets="ml-1m,pinterest", **{key: CACHED[key] for key in ("data_path", "cache", "processes")}, **OUTPUT)
def solver(options):
    """Conjugate gradient iterations to a relative residual of 1e-3, in the paper's setting."""
    kinds = {
        "none": lambda curvature, damping: None,
        "Jacobi": lambda curvature, damping: jacobi(curvature.diagonal(), damping),
        "block-Jacobi": lambda curvature, damping: block_jacobi(curvature.blocks(), damping),
    }
    rows = []
    for dataset in options.datasets.split(","):
        files = [str(ROOT / "properties/paper.yaml")]
        trained = common.trained_seeds(options, dataset=dataset, files=files, method="influence")
        (run,) = common.seed_runs(trained, 1)
        trained.train([run])
        unlearner = common.unlearner_of(trained, run)
        problem, way = unlearner.problem, unlearner.way
        for ratio in (0.0001, 0.00035):
            forgotten = ForgetRequest("ratio", ratio).rows(trained.split)
            after = problem.without(forgotten, way)
            z, (curvature, _), damping = problem.lost(after, way), problem.curvature(after, way), problem.damping(way)
            for name, make in kinds.items():
                make(curvature, damping)  # compiles
                start = perf_counter()
                precondition = make(curvature, damping)
                prepared = perf_counter() - start
                start = perf_counter()
                _, solve = conjugate_gradient(Damped(curvature, damping), z, precondition, 1e-3, 1000)
                rows.append(
                    {
                        "data set": dataset,
                        "forgotten": len(forgotten),
                        "triples": f"{len(curvature.triples):,}",
                        "preconditioner": name,
                        "its seconds": f"{prepared:.3f}",
                        "iterations": solve.iterations,
                        "seconds": f"{perf_counter() - start:.3f}",
                        "residual": f"{solve.residual:.1e}",
                    }
                )
    report("solver", rows, options, "K = 8, properties/paper.yaml, default damping.")


# Requests


def opened_seed(path, seed, files, keys):
    """As `InfluenceUnlearner.load`, of a training from another seed than the configuration's."""
    with ExitStack() as held:
        checkpoint = Checkpoint.open(Given.read(None, None, files, {**keys, "checkpoint": str(path)}), held)
        session = InfluenceUnlearner(checkpoint.trained(checkpoint.split(), seed))
        session.check()
        session.warm_up()
        session.held = held.pop_all()
    return session


def logging_cost(config, split, folder, rounds, trained):
    """What logging adds to training time: of epochs with and without, in turn, and of snapshots.

    ``trained`` epochs are a whole training: snapshots, ever rarer, come at their rate in it.

    Returns:
        (ratios minus 1, list; share of snapshots; seconds of the epochs with log, list)
    """
    trainers = {}
    for logged in (False, True):
        trainers[logged] = BPRTrainer(config, new_model(config, split, 1))
        trainers[logged].log_negatives = logged
        trainers[logged].saved_model_file = str(folder / f"speed-{logged}.pth")
    loaders = {logged: split.remaining([], 1) for logged in trainers}
    times = {False: [], True: []}
    trainers[True]._snapshot = lambda: None  # timed by themselves, below
    for epoch in range(rounds + 1):  # the first one compiles and opens the log
        for logged, trainer in list(trainers.items())[:: 1 if epoch % 2 else -1]:
            took = seconds(partial(trainer._train_epoch, loaders[logged], epoch))
            if epoch:
                times[logged].append(took)
    due = [epoch for epoch in range(trained + 1) if snapshot_due(epoch)]
    logging_one = trainers[True]
    snapshots = [seconds(lambda n=n: logging_one.triple_log.add_snapshot(n, logging_one._weights())) for n in due]
    more = [ratio - 1 for ratio in ratios(times[True], times[False])]
    return more, sum(snapshots) / (trained * median(times[False])), times[True]


def implicit_seconds(split, K, epochs, regularisation):
    """implicit's BPR (SGD, as many epochs, two threads) on the same interactions; None where it is not installed."""
    try:
        from implicit.bpr import BayesianPersonalizedRanking
    except ImportError:
        return None
    from scipy.sparse import csr_matrix

    interactions = csr_matrix((np.ones(split.n_rows, np.float32), (split.users, split.items)))
    threads = len(os.sched_getaffinity(0))
    model = BayesianPersonalizedRanking(K, regularization=regularisation, iterations=epochs, num_threads=threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return seconds(partial(model.fit, interactions, show_progress=False))


WAYS = {"exact": Replay("all"), "touched rows": Replay("touched")}
RETRAINS = {
    "stock RecBole": (None, {}),
    "this package's": (BPRTrainer, {}),
    "compiled": (BPRTrainer, {"compiled": True}),
}


@takes(
    **CACHED,
    epochs=option(3, "of each Retrain to measure"),
    logged_epochs=option(9, "to measure with and without log, in turn"),
    requests=7,
    seeds=option(1, "originals to take requests on"),
    **OUTPUT,
)
def requests(options):
    """What a request costs: against three ways to retrain, and what logging costs before.

    Everything is measured in one process, one after the other, on an otherwise idle machine: for each original
    (--seeds of them, from --cache or trained first) requests, then --epochs epochs with validation of each Retrain.
    Retrain is stock RecBole's own loader and trainer, this package's trainer, or the latter by compiled kernels; the
    median epoch, times the epochs that the configuration trains (or, under early stopping, that the original trained).
    implicit's BPR, where it is installed, trains as many epochs as the original's best one.
    """
    trained = common.trained_seeds(options, method="replay")
    config, split = trained.config, trained.split
    runs = common.seed_runs(trained, options.seeds)
    paths = trained.train(runs)

    # Each request starts from the original: what a session has forgotten is not kept here.
    openings, replayed, beside, found = [], [], [], {}
    epochs = {name: [] for name in RETRAINS}
    keys = {"data_path": options.data_path, "method": "replay", "show_progress": False}
    for run, path in zip(runs, paths, strict=True):
        start = perf_counter()
        session = opened_seed(path, run.seed, options.config_files, keys)
        openings.append(perf_counter() - start)
        replayed.append(session.problem.epochs)
        for n in range(options.requests):
            rng = np.random.default_rng(n)
            for count in (max(round(RATIO * split.n_rows), 1), 1):
                rows = np.sort(rng.choice(split.n_rows, count, replace=False))
                for name, way in WAYS.items():  # in turn, so that a slow spell of the machine meets all
                    found.setdefault((name, count), []).append(session.carry_out(way, rows).seconds)
        session.close()
        for name, (trainer, more) in RETRAINS.items():
            epochs[name] += common.epoch_seconds(changed(config, **more), split, options.epochs, trainer)
        size = session.problem.P.shape[1], session.problem.epochs * session.log.negatives
        beside.append(implicit_seconds(split, *size, config["weight_decay"]))
    log, stored = session.log, session.trained.stored
    n_epochs = min(config["epochs"], stored["epoch"] + 1 + config["stopping_step"])
    with tempfile.TemporaryDirectory() as folder:
        more, snapshots, training = logging_cost(config, split, Path(folder), options.logged_epochs, n_epochs)
    n_logged = log.n_epochs if not log.static else 1
    size = sum(f.stat().st_size for f in log_path(paths[-1]).iterdir()) / (n_logged * log.n_rows * log.negatives)
    retrain = {name: n_epochs * median(took) for name, took in epochs.items()}

    def told(times):
        return f"{median(times):.3g} s ({min(times):.3g}-{max(times):.3g})"

    figures = {"triples an epoch": f"{log.n_rows * log.negatives:,}"}
    for name, whole in retrain.items():
        figures[f"Retrain, {name}"] = f"{whole:.4g} s ({n_epochs} epochs of {median(epochs[name]):.3g} s)"
    figures["epochs replayed (up to the best one)"] = ", ".join(map(str, replayed))
    if beside[0] is not None:
        figures["implicit's BPR, as many epochs by SGD"] = told(beside)
    for (name, count), times in found.items():
        what = f"{name}, {'1 interaction' if count == 1 else f'{RATIO:.2%} of the interactions'}"
        figures[f"request, {what}"] = told(times)
        for other, whole in retrain.items():
            figures[f"times faster than Retrain, {other}; {what}"] = f"{float(f'{whole / median(times):.3g}'):g}"
    figures |= {
        "opening before the first request, kernels and guard": told(openings),
        "logging, share of training time": f"{median(more) + snapshots:+.1%} "
        f"(an epoch {min(more):+.1%} to {max(more):+.1%}, snapshots {snapshots:+.1%})",
        "log, bytes a triple": f"{size:.2f}",
        "training epoch": f"{median(training):.3g} s",
    }
    name = f"{options.dataset}-{setting(options)}"
    page = pd.Series(figures, name=name).to_markdown() + "\n"
    took = {f"{way}, {count}": times for (way, count), times in found.items()}
    data = {"figures": figures, "requests": took, "epochs": epochs, "logging": more}
    common.write(page, options.output, f"request_cost-{name}", data)


# LightGCN


def stock(config, split, steps, clock):
    """Seconds of a training epoch, and of a validation."""
    model = new_model(config, split, 1)
    trainer = Trainer(config, model)
    batches = iter(split.train)

    def step():
        batch = next(batches)
        trainer.optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        trainer.optimizer.step()

    took = [seconds(step, clock) for _ in range(min(steps, len(split.train)))]
    validation = seconds(lambda: trainer.evaluate(split.valid, load_best_model=False), clock)
    return median(took) * len(split.train), validation


def replayed_graph(config, split, rows, clock):
    """Seconds of replay's first epoch, and of a later one."""
    rng = np.random.default_rng(0)
    epochs = 3
    negatives = [rng.integers(1, split.n_items, (split.n_rows, 1)).astype(np.uint16) for _ in range(epochs)]
    start = flat_weights(new_model(config, split, 1))
    batch = config["train_batch_size"]
    stride = max(-(-split.n_rows // batch) // MOVES, 1)
    times = []

    adam, loss = (
        Adam(config["learning_rate"], 0.9, 0.999, 1e-8, 0.0),
        GraphLoss(config["n_layers"], config["reg_weight"]),
    )
    begin, kept, order = clock(), np.delete(np.arange(split.n_rows), rows), rng.permutation(split.n_rows - len(rows))
    graph = Graph(split.users[kept], split.items[kept], split.n_users, split.n_items, loss.layers)
    training = PropagatedTraining(
        graph, start.reshape(split.n_users + split.n_items, -1), adam, loss, split.n_users, stride
    )
    bounds = np.append(np.arange(0, len(kept), batch), len(kept))
    for each in negatives:
        epoch = Epoch(kept[order], bounds, each, np.full(len(bounds) - 1, adam.lr))
        training.epoch(split.users, split.items, epoch)
        times.append(clock())
    return times[0] - begin, float(np.median(np.diff(times))), stride


@takes(
    dataset=DATA["dataset"],
    data_path=DATA["data_path"],
    forget=option(200, "interactions to forget"),
    steps=option(20, "batches of stock training to measure"),
    epochs=option(50, "of the training that is compared"),
    rounds=option(5, "stock and replay in turn"),
    clock=CLOCK,
    **OUTPUT,
)
def lightgcn(options):
    """Seconds of an epoch of LightGCN: stock RecBole's training and validation, and replay's.

    Stock epochs are measured on --steps batches. Costs do not depend on the weights, so replay runs on negatives drawn
    at random.
    """
    clock = CLOCKS[options.clock]
    limit_threads(1)
    torch.set_num_threads(1)
    config, split = opened(("LightGCN", options.dataset, [], {"data_path": options.data_path}))
    logging.getLogger().setLevel(logging.ERROR)
    rows = ForgetRequest("count", options.forget, 2020).rows(split)
    rounds = []
    for _ in range(options.rounds):
        epoch, validation = stock(config, split, options.steps, clock)
        first, later, stride = replayed_graph(config, split, rows, clock)
        retrain, request = options.epochs * (epoch + validation), first + (options.epochs - 1) * later
        rounds.append(
            {
                "stock RecBole, an epoch, s": epoch,
                "a validation, s": validation,
                "replay, first epoch, s": first,
                "a later epoch, s": later,
                f"stock RecBole, {options.epochs} epochs, s": retrain,
                f"replay, {options.epochs} epochs, s": request,
                "times faster": retrain / request,
            }
        )
    found = pd.DataFrame(rounds)
    table = pd.DataFrame({"median": found.median(), "lowest": found.min(), "highest": found.max()})
    page = (
        f"`{common.command(options)}`: LightGCN on {options.dataset}, {len(rows)} interactions forgotten, stride "
        f"{stride}, {options.rounds} rounds of stock epoch and replay in turn, one thread, {options.clock} time:\n\n"
        f"{table.map(lambda x: f'{x:.3g}').to_markdown(disable_numparse=True)}\n"
    )
    common.write(page, options.output, f"lightgcn-{options.dataset}", rounds)


# Evaluation and training epochs


def train(options, keys, kind):
    """A trainer with its data, after an epoch and with the seconds of each later one and its validation."""
    config = Config("BPR", options.dataset, options.config_files, copy.deepcopy(keys))
    init_seed(config["seed"], config["reproducibility"])
    data, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    trainer = kind(config, BPR(config, data._dataset))
    marks = []
    trainer.fit(data, valid, verbose=False, saved=False, callback_fn=lambda *_: marks.append(perf_counter()))
    return trainer, test, np.diff(marks)


def evaluate(trainer, loader):
    np.random.seed(trainer.config["seed"])
    start = perf_counter()
    result = trainer.evaluate(loader, load_best_model=False)
    return perf_counter() - start, (result, np.random.random())


def compared(took):
    """Medians of stock and ours, and median, smallest and largest ratio of neighbouring measurements."""
    stock, ours = zip(*took, strict=True)
    found = ratios(stock, ours)
    figures = {"stock, s": median(stock), "ours, s": median(ours), "ratio": median(found)}
    return {name: float(x) for name, x in {**figures, "from": min(found), "to": max(found)}.items()}


@takes(**DATA, rounds=3, **OUTPUT)
def evaluation(options):
    """Evaluation and training epochs against stock RecBole at its defaults, in turns.

    Both give the same metrics, leave numpy's random stream in the same state, and train the same weights, bit for bit:
    all of it is asserted here. An epoch is a pass over the training data, with log and snapshots in ours, and a
    validation.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        keys = {"checkpoint_dir": folder, "epochs": options.rounds + 1, "show_progress": False}
        keys["data_path"] = os.path.abspath(options.data_path)
        os.chdir(folder)  # RecBole logs here
        runs = [train(options, keys, kind) for kind in (Trainer, BPRTrainer)]
        (stock, test, _), (ours, _, _) = runs
        for name, weight in stock.model.state_dict().items():
            assert torch.equal(weight, ours.model.state_dict()[name]), name
        assert stock.best_valid_result == ours.best_valid_result

        table = {"training epoch with validation": compared(zip(*(took for _, _, took in runs), strict=True))}
        sampled = copy.deepcopy(stock.config)
        sampled["test_neg_sample_args"] = {"distribution": "uniform", "sample_num": 99}
        loaders = {
            "full ranking": FullSortEvalDataLoader(stock.config, test._dataset, test._sampler),
            "99 sampled": NegSampleEvalDataLoader(sampled, test._dataset, test._sampler),
        }
        for name, loader in loaders.items():
            evaluate(ours, loader)  # compiles
            took = []
            for _ in range(options.rounds):
                (slow, expected), (fast, result) = (evaluate(trainer, loader) for trainer in (stock, ours))
                assert result == expected, (result, expected)
                took.append((slow, fast))
            table[f"evaluation, {name}"] = compared(took)
        os.chdir(ROOT)
    name = f"{options.dataset}-{setting(options)}"
    head = f"{name}, K = {stock.model.embedding_size}, {threads} threads, {options.rounds} rounds"
    lines = [head, "", "| | stock, s | ours, s | ratio |", "|:---|:---|:---|:---|"]
    for what, found in table.items():
        range_ = f"{found['ratio']:.1f} ({found['from']:.1f} to {found['to']:.1f})"
        lines.append(f"| {what} | {found['stock, s']:.3f} | {found['ours, s']:.3f} | {range_} |")
    common.write("\n".join([*lines, ""]), options.output, f"evaluation-{name}", table)


# Ranks

ASKED = {"influence": "request, influence step", "replay": "request, replay of touched rows"}
PRODUCT = "curvature product"


def of_ranks(options):
    """The trained seed that all ranks open."""
    keys = {"epochs": options.epochs, "show_progress": False, "method": "replay", "replay_rows": "touched"}
    trained = common.trained_seeds(options, **keys, use_gpu=False)
    return trained, *common.seed_runs(trained, 1)


def at_once(function, times=1):
    """Seconds of calls that all ranks begin together."""
    found = []
    for _ in range(times):
        distributed.barrier()
        found.append(seconds(function))
    return found


RANKED = {**CACHED, "cache": "saved/ranks", "epochs": 2, "products": option(10, "in each round")}


@takes(**RANKED)
def rank(options):
    """Measure whenever rank 0 reads a line, until there are no more; rank 0 answers with a line of JSON."""
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    with distributed.joined(timeout=600) as leading:
        (trained, run), unlearners = of_ranks(options), {}
        split, path = trained.split, trained.path(run)
        for method in ASKED:
            config, stored = changed(trained.config, method=method), checkpoints.load(path, verify=False)
            unlearners[method] = InfluenceUnlearner(
                Checkpoint(path, config, *stored).trained(split), shared=distributed.shared()
            )
            unlearners[method].warm_up()
        rows = np.random.default_rng(1).choice(split.n_rows, max(round(RATIO * split.n_rows), 1), replace=False)
        rows = np.sort(rows)
        curvature, n_triples = unlearners["influence"].problem.curvature(rows, unlearners["influence"].way)
        vector = torch.ones(curvature.size, dtype=torch.float64)
        functions = {PRODUCT: (partial(curvature.matvec, vector), options.products)}
        functions |= {ASKED[method]: (partial(each.unlearn, rows), 1) for method, each in unlearners.items()}
        at_once(functions[PRODUCT][0])
        about = {"triples": n_triples, "users": split.n_users, "items": split.n_items, "forgotten": len(rows)}
        while distributed.share(bool(sys.stdin.readline()) if leading else None):
            found = {name: at_once(*function) for name, function in functions.items()}
            if leading:
                print(json.dumps({"seconds": found, **about}), file=answers, flush=True)


class Group:
    """``size`` ranks on this machine, which measure when asked to."""

    def __init__(self, size, words):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.size, self.processes = size, []
        for n in range(size):
            place = {"RANK": n, "LOCAL_RANK": n, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            place |= {"OMP_NUM_THREADS": 1, "NUMBA_NUM_THREADS": 1}
            environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} if n == 0 else {}
            command = [sys.executable, "-W", "ignore", __file__, "rank", *words]
            self.processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))

    def measure(self):
        leader = self.processes[0]
        print("go", file=leader.stdin, flush=True)
        line = leader.stdout.readline()
        if not line:
            raise SystemExit(f"the group of {self.size} ranks failed")
        return json.loads(line)

    def end(self):
        self.processes[0].stdin.close()
        for process in self.processes:
            process.wait()


@takes(**RANKED, sizes=option("1,2,3", "numbers of ranks; the first is what ratios are to"), rounds=7, **OUTPUT)
def ranks(options):
    """How curvature products and requests scale over ranks: 1, 2 and 3 gloo processes of one thread each.

    Groups of 1, 2 and 3 ranks open the same checkpoint (trained for --epochs epochs, if not in --cache) and take turns:
    in each round every group computes --products curvature products, forgets the same 0.02% of the interactions by one
    influence step, and by replay of the touched rows. While one group works the others wait for a message. Seconds are
    rank 0's, from a barrier on; ratios are to one rank in the same round.
    """
    trained, run = of_ranks(options)
    trained.train([run])
    groups = [Group(int(size), common.words(options, *RANKED)) for size in options.sizes.split(",")]
    found = {group.size: [] for group in groups}
    for n in range(options.rounds + 1):
        for group in groups:
            answer = group.measure()
            if n:  # the first round loads what is loaded late
                found[group.size].append(answer)
    load = common.load()
    for group in groups:
        group.end()

    first, rows = groups[0].size, []
    for name in (PRODUCT, *ASKED.values()):
        each = {size: [median(answer["seconds"][name]) for answer in answers] for size, answers in found.items()}
        row = {"milliseconds": name}
        for size, took in each.items():
            row[f"{size} rank{'s' if size > 1 else ''}"] = spread(took, 1e-3)
        for size in list(each)[1:]:
            row[f"{first} : {size}"] = spread(ratios(each[first], each[size]))
        rows.append(row)
    cores, _, busy = load.partition(", ")
    about = (
        f"`{common.command(options)}`: curvature of {answer['triples']:,} triples, {answer['users'] - 1:,} users, "
        f"{answer['items'] - 1:,} items, K = {trained.config['embedding_size']}, {answer['forgotten']} interactions "
        f"forgotten; one thread a rank, {cores}, {options.rounds} rounds, {busy}"
    )
    page = f"{about}\n\n{common.markdown(rows)}\n"
    common.write(page, options.output, f"ranks-{options.dataset}", {"about": about, "rounds": found})


COMMANDS = [kernels, solver, growth, forget_sets, replay, lightgcn, requests, ranks, evaluation]

if __name__ == "__main__":
    common.run(__doc__, COMMANDS, [rank])
