"""Measure how curvature products and requests scale over ranks: 1, 2 and 3 gloo processes of one thread each.

    python benchmarks/ranks.py                                              # the bundled ml-100k
    python benchmarks/ranks.py --dataset=ml-1m --data_path=PATH

Groups of 1, 2 and 3 ranks open the same checkpoint (trained for --epochs epochs, if not in --cache) and take turns:
in each round every group computes --products curvature products, forgets the same 0.02% of the interactions by one
influence step, and by replay of the touched rows. While one group works the others wait for a message. Seconds are rank
0's, from a barrier on; ratios are to one rank in the same round. Tables show the median and, in brackets, the range.
"""

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pandas as pd
import torch

from recbole_unlearn import distributed
from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
from recbole_unlearn.settings.config import changed
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner

RATIO = 0.0002
REQUESTS = {"influence": "request, influence step", "replay": "request, replay of touched rows"}
PRODUCT = "curvature product"


def open_data(args):
    settings = {"data_path": args.data_path, "epochs": args.epochs, "show_progress": False}
    settings |= {"method": "replay", "replay_rows": "touched", "use_gpu": False}
    return TrainedSeeds(("BPR", args.dataset, args.config_files.split(), settings), args.cache)


# One rank


def measure(function, times=1):
    seconds = []
    for _ in range(times):
        distributed.barrier()
        start = perf_counter()
        function()
        seconds.append(perf_counter() - start)
    return seconds


def work(args):
    """Measure whenever rank 0 reads a line, until there are no more; rank 0 answers with a line of JSON."""
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    with distributed.joined(timeout=600) as leading:
        trained, unlearners = open_data(args), {}
        split, path = trained.split, trained.path(SeedRun(trained.config["seed"], (), True))
        for method in REQUESTS:
            config, stored = changed(trained.config, method=method), checkpoints.load(path, verify=False)
            opened = Checkpoint(path, config, *stored).trained(split)
            unlearners[method] = InfluenceUnlearner(opened, shared=distributed.shared())
            unlearners[method].warm_up()
        rows = np.random.default_rng(1).choice(split.n_rows, max(round(RATIO * split.n_rows), 1), replace=False)
        rows = np.sort(rows)
        curvature, n_triples = unlearners["influence"].problem.curvature(rows, unlearners["influence"].way)
        vector = torch.ones(curvature.size, dtype=torch.float64)
        functions = {PRODUCT: (partial(curvature.matvec, vector), args.products)}
        functions |= {REQUESTS[method]: (partial(each.unlearn, rows), 1) for method, each in unlearners.items()}
        measure(functions[PRODUCT][0])
        about = {"triples": n_triples, "users": split.n_users, "items": split.n_items, "forgotten": len(rows)}
        while True:
            if not distributed.share(bool(sys.stdin.readline()) if leading else None):
                return
            found = {name: measure(*function) for name, function in functions.items()}
            if leading:
                print(json.dumps({"seconds": found, **about}), file=answers, flush=True)


# All groups


class Group:
    """``size`` ranks on this machine, which measure when asked to."""

    def __init__(self, size):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.size, self.processes = size, []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "NUMBA_NUM_THREADS": 1}
            environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} if rank == 0 else {}
            command = [sys.executable, "-W", "ignore", *sys.argv, "--worker"]
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


def spread(values, unit=1.0):
    low, high = min(values), max(values)
    return f"{median(values) / unit:.3g} [{low / unit:.3g}, {high / unit:.3g}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--config_files", default="")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cache", default="saved/ranks")
    parser.add_argument("--sizes", default="1,2,3", help="numbers of ranks; the first is what ratios are to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--products", type=int, default=10, help="in each round")
    parser.add_argument("--output", default="results/speed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.argv[1:] = [word for word in sys.argv[1:] if word != "--worker"]
    given, sys.argv[1:] = sys.argv[1:], []  # RecBole reads them
    if args.worker:
        return work(args)
    trained = open_data(args)
    trained.train([SeedRun(trained.config["seed"], (), True)])
    sys.argv[1:] = given
    groups = [Group(int(size)) for size in args.sizes.split(",")]
    found = {group.size: [] for group in groups}
    for n in range(args.rounds + 1):
        for group in groups:
            answer = group.measure()
            if n:  # the first round loads what is loaded late
                found[group.size].append(answer)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    for group in groups:
        group.end()

    first, rows = groups[0].size, []
    for name in (PRODUCT, *REQUESTS.values()):
        each = {size: [median(answer["seconds"][name]) for answer in answers] for size, answers in found.items()}
        unit, row = 1e-3, {"milliseconds": name}
        for size, seconds in each.items():
            row[f"{size} rank{'s' if size > 1 else ''}"] = spread(seconds, unit)
        for size in list(each)[1:]:
            row[f"{first} : {size}"] = spread([a / b for a, b in zip(each[first], each[size], strict=True)])
        rows.append(row)
    options = [f"--{key}={getattr(args, key)}" for key in ("dataset", "config_files", "epochs") if getattr(args, key)]
    about = (
        f"`python benchmarks/ranks.py {' '.join(options)}`: curvature of {answer['triples']:,} triples, "
        f"{answer['users'] - 1:,} users, {answer['items'] - 1:,} items, "
        f"K = {trained.config['embedding_size']}, {answer['forgotten']} interactions forgotten; one thread a rank, "
        f"{os.cpu_count()} cores, {args.rounds} rounds, load average {load} at the end"
    )
    page = f"{about}\n\n{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}\n"
    print(page)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    name = f"ranks-{args.dataset}"
    (output / f"{name}.md").write_text(page)
    (output / f"{name}.json").write_text(json.dumps({"about": about, "rounds": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
