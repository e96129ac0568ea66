"""Time paired replay on synthetic logs of ML-1M's shape, alone or in turns with another version of replay.py.

    python benchmarks/replay_speed.py                    # seconds for each shape
    python benchmarks/replay_speed.py --against HEAD~1   # or a file, of the same signature; the two take turns

Users' activity and items' popularity are skewed, since what replay costs depends on how many triples hold a
forgotten item. Fewer epochs than a training has, all of them alike.
"""

import argparse
import importlib.util
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from recbole_unlearn.influence import replay as current
from recbole_unlearn.influence.recorded import Adam, Recorded, Trajectory

ROOT = Path(__file__).parents[1]
SHAPES = {
    "K=8, 4 negatives": dict(K=8, m=4, n_rows=988_000, batch_triples=4096, forgotten=350, lr=0.01),
    "K=64, 1 negative": dict(K=64, m=1, n_rows=800_000, batch_triples=2048, forgotten=200, lr=0.001),
}
N_USERS, N_ITEMS = 6041, 3417


def version(name):
    """The replay module of a git revision or a file."""
    if Path(name).is_file():
        path = Path(name)
    else:
        file = f"{name}:recbole_unlearn/influence/replay.py"
        source = subprocess.check_output(["git", "show", file], cwd=ROOT)
        path = Path(tempfile.mkdtemp()) / f"replay_{''.join(c if c.isalnum() else '_' for c in name)}.py"
        path.write_bytes(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(K, m, n_rows, batch_triples, forgotten, lr, epochs, seed=0):
    """What was recorded, weights by epoch, and the rows to forget."""
    rng = np.random.default_rng(seed)
    activity = rng.lognormal(0, 1, N_USERS - 1)
    users = np.sort(1 + rng.choice(N_USERS - 1, n_rows, p=activity / activity.sum()))
    popularity = 1 / (np.arange(1, N_ITEMS) + 100)
    pos = 1 + rng.choice(rng.permutation(N_ITEMS - 1), n_rows, p=popularity / popularity.sum())
    negatives = [rng.integers(1, N_ITEMS, (n_rows, m)).astype(np.uint16) for _ in range(epochs)]
    snapshots = range(0, epochs + 1, epochs // 2)  # of a whole training, one in four epochs has one
    weights = {n: (0.3 * rng.normal(size=(N_USERS + N_ITEMS) * K)).astype(np.float16) for n in snapshots}
    rows = np.sort(rng.choice(n_rows, forgotten, replace=False))
    adam = Adam(lr, 0.9, 0.999, 1e-8, 0.0)
    return Recorded(users, pos, negatives, N_USERS, N_ITEMS, adam, batch_triples), weights, rows


def run(module, recorded, weights, rows):
    trajectory = Trajectory(list(weights), list(weights.values()))
    start = perf_counter()
    result = module.replay(recorded, trajectory, rows)
    return perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="git revision or file of the version to compare with")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    modules = [current] if options.against is None else [version(options.against), current]
    for name, shape in SHAPES.items():
        for module in modules:  # compile
            run(module, *problem(**{**shape, "n_rows": 2000, "forgotten": 20}, epochs=2))
        arguments = problem(**shape, epochs=options.epochs)
        rounds = range(options.rounds)
        seconds = np.array([[run(module, *arguments)[0] for module in modules] for _ in rounds])
        triples = run(current, *arguments)[1].triples / options.epochs
        best = seconds.min(0) / options.epochs
        print(f"{name}: {1e3 * best[-1]:.1f} ms an epoch, {triples:,.0f} triples")
        if len(modules) == 2:
            ratios = best[0] / best[1], np.median(seconds[:, 0] / seconds[:, 1])
            print(
                f"{name}: {1e3 * best[0]:.1f} ms with {options.against}, ratio {ratios[0]:.2f} of minima, "
                f"{ratios[1]:.2f} median of pairs"
            )


if __name__ == "__main__":
    main()
