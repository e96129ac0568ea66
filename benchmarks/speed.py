"""Measure speed and memory, each against its yardstick in the same run.

    python benchmarks/speed.py                                          # all sections that need no data
    python benchmarks/speed.py --sections=kernels
    python benchmarks/speed.py --sections=solver --data_path=PATH       # trains what is not in --cache

Functions that are compared take turns, so that whatever else runs on the machine slows them alike; ratios are of
neighbours. Tables show the median and, in brackets, the range. Each section writes <section>.json and <section>.md in
results/speed/.

kernels  A curvature product against torch autograd's Hessian-vector product (double backward through the same summed
         loss, float32), and against one streaming read of all arrays that the product reads once: item numbers, h,
         distinct items (and b, in the exact Hessian). The embeddings, which it gathers from cache, are not counted.
solver   Conjugate gradient iterations to a relative residual of 1e-3, in the paper's setting.
growth   Seconds and peak memory of a product in a process of its own, triples memory-mapped; draws docs/growth.svg.
requests The same of an epoch of replay, against the size of the forget set; draws the same picture.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import numba
import numpy as np
import pandas as pd
import replay_speed
import torch

from recbole_unlearn.influence.operators import (
    AutogradCurvature,
    Damped,
    DotProductCurvature,
    UserTriples,
    logistic_curvature,
)
from recbole_unlearn.influence.recorded import Trajectory
from recbole_unlearn.influence.replay import replay

ROOT = Path(__file__).parents[1]
ML_1M = {"n_rows": 1_000_000, "n_users": 6040, "n_items": 3706}
NEGATIVES = 4
CLOCKS = {"wall": perf_counter, "cpu": process_time}
KINDS = {"Gauss-Newton": False, "Hessian": True}  # exact?
AUTOGRAD_BATCH = 2**17  # triples; larger ones are no faster


# Measuring


def take_turns(functions, rounds, repeats=1, clock=perf_counter):
    """Seconds of each function (dict by name), ``[rounds]``: the median of ``repeats`` calls in each round."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        turns = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                start = clock()
                function()
                turns[name].append(clock() - start)
        for name, values in turns.items():
            seconds[name].append(float(np.median(values)))
    return {name: np.array(values) for name, values in seconds.items()}


def spread(values, unit=1.0, digits=3):
    """``median [smallest, largest]`` in ``unit``."""
    low, middle, high = (f"{x:.{digits}g}" for x in np.percentile(np.asarray(values) / unit, [0, 50, 100]))
    return f"{middle} [{low}, {high}]"


def report(section, rows, output, notes=""):
    """Print a section's rows (list of dicts) as a table, and write it as JSON and Markdown."""
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    command = " ".join(["python benchmarks/speed.py", f"--sections={section}", *given()])
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    machine = f"{numba.get_num_threads()} threads, {os.cpu_count()} cores, load average {load} at the end"
    page = f"## {section}\n\n`{command}` ({machine})\n\n{table}\n" + (f"\n{notes}\n" if notes else "")
    print(page, flush=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{section}.md").write_text(page)
    (output / f"{section}.json").write_text(
        json.dumps({"machine": machine, "rows": rows, "notes": notes}, indent=1) + "\n"
    )


def given():
    """The other arguments of the command line, without paths."""
    return [word for word in sys.argv[1:] if word.startswith(("--rounds", "--clock", "--datasets"))]


# Synthetic triples


def write_triples(folder, n_rows, n_users, n_items, m=NEGATIVES, seed=0):
    """Triples on disk, grouped by user, popularity of positives and activity of users skewed (Zipf), negatives uniform.

    Written a part at a time. Ids are those of the smallest type of at least 16 bits.
    """
    rng = np.random.default_rng(seed)
    activity = 1 / np.arange(1, n_users + 1) ** 0.6
    degrees = rng.multinomial(n_rows, rng.permutation(activity) / activity.sum())
    popularity = 1 / np.arange(1, n_items + 1) ** 0.8
    cumulated, names = np.cumsum(popularity / popularity.sum()), rng.permutation(n_items)
    kinds = [np.promote_types(np.uint16, np.min_scalar_type(n - 1)) for n in (n_users, n_items)]
    shapes = {"users": (n_rows,), "pos": (n_rows,), "neg": (n_rows, m)}
    columns = [
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
        for (name, shape), kind in zip(shapes.items(), (kinds[0], kinds[1], kinds[1]), strict=True)
    ]
    ends = np.cumsum(degrees)
    for start in range(0, n_rows, 1_000_000):
        part = slice(start, min(start + 1_000_000, n_rows))
        n = part.stop - part.start
        pos = names[np.minimum(np.searchsorted(cumulated, rng.random(n)), n_items - 1)]
        columns[0][part] = np.searchsorted(ends, np.arange(part.start, part.stop), "right")
        columns[1][part] = pos
        columns[2][part] = (pos[:, None] + rng.integers(1, n_items, (n, m))) % n_items  # never the positive
    for column in columns:
        column.flush()


def read_triples(folder):
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("users", "pos", "neg")]


def embeddings(n_users, n_items, K, seed=0):
    """Scores of about unit size."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, K), np.float32) / np.float32(K**0.25) for n in (n_users, n_items)]


# Kernels


@numba.njit(parallel=True, fastmath=True)
def read(arrays):
    """Stream through a tuple of arrays of 64-bit words, all threads once."""
    part = np.zeros(16, np.uint64)
    for c in numba.prange(16):
        total = np.uint64(0)
        for words in arrays:
            for k in range(c * len(words) // 16, (c + 1) * len(words) // 16):
                total += words[k]
        part[c] = total
    return part.sum()


def streams(curvature):
    """What a product reads once, from first to last, as a tuple of arrays of 64-bit words."""
    arrays = []
    for block, h, b in curvature._parts():
        distinct = block.count.sum()
        arrays += [block.row_ptr, block.count, block.pos, block.neg, h, block.dist[:distinct]]
        arrays += [b[:distinct]] if curvature.exact else []
    flat = [array.reshape(-1).view(np.uint8) for array in arrays]
    return tuple(array[: array.size // 8 * 8].view(np.uint64) for array in flat)


def autograd(users, pos, neg, P, Q, exact):
    """The same matrix by automatic differentiation, in float32."""
    params = [torch.from_numpy(part).clone().requires_grad_() for part in (P, Q)]
    columns = [torch.from_numpy(np.asarray(ids).astype(np.int64)) for ids in (users, pos, neg)]
    batches = [slice(k, k + AUTOGRAD_BATCH // NEGATIVES) for k in range(0, len(users), AUTOGRAD_BATCH // NEGATIVES)]

    def margins(rows):
        u, i, j = (ids[rows] for ids in columns)
        embed = torch.nn.functional.embedding
        p = embed(u, params[0])[:, None]
        return (p * (embed(i, params[1])[:, None] - embed(j, params[1]))).sum(-1)

    def loss(rows):
        return -torch.nn.functional.logsigmoid(margins(rows)).sum()

    def outputs(rows):
        x = margins(rows)
        return x, logistic_curvature(x)

    return AutogradCurvature(params, batches, loss, None if exact else outputs)


def kernels(options):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_triples(Path(folder), **ML_1M)
        columns = read_triples(Path(folder))
        for K in (8, 64):
            rows += kernels_at(K, columns, options.rounds, CLOCKS[options.clock])
    report(
        "kernels", rows, options.output,
        f"{columns[2].size:,} triples. Relative error: to float32 autograd (Gauss-Newton: on an eighth).",
    )  # fmt: skip


def kernels_at(K, columns, rounds, clock):
    """Rows of the table for one K."""
    sizes = ML_1M["n_users"], ML_1M["n_items"]
    P, Q = embeddings(*sizes, K)
    v = torch.from_numpy(np.random.default_rng(1).normal(size=P.size + Q.size))
    triples = UserTriples(*columns, *sizes)
    products = {kind: DotProductCurvature(triples, P, Q, exact) for kind, exact in KINDS.items()}
    words = {kind: streams(curvature) for kind, curvature in products.items()}
    turns = {kind: partial(curvature.matvec, v) for kind, curvature in products.items()}
    turns |= {f"read {kind}": partial(read, arrays) for kind, arrays in words.items()}
    near = take_turns(turns, max(rounds, 3), repeats=7, clock=clock)

    hessian = autograd(*columns, P, Q, exact=True)
    answers = {}
    turns = {kind: turns[kind] for kind in KINDS} | {"autograd": lambda: answers.update(Hessian=hessian.matvec(v))}
    far = take_turns(turns, rounds, clock=clock)
    part = [column[: len(column) // 8] for column in columns]
    answers["Gauss-Newton"] = autograd(*part, P, Q, exact=False).matvec(v)
    compared = {
        "Hessian": products["Hessian"].matvec(v),
        "Gauss-Newton": DotProductCurvature(UserTriples(*part, *sizes), P, Q).matvec(v),
    }
    return [
        {
            "K": K,
            "product": kind,
            "ms": spread(near[kind], 1e-3),
            "autograd HVP, ms": spread(far["autograd"], 1e-3),
            "autograd / product": spread(far["autograd"] / far[kind]),
            "MB read": f"{sum(array.nbytes for array in words[kind]) / 1e6:.0f}",
            "streaming read, ms": spread(near[f"read {kind}"], 1e-3),
            "product / read": spread(near[kind] / near[f"read {kind}"]),
            "relative error": f"{((compared[kind] - answers[kind]).norm() / answers[kind].norm()).item():.0e}",
        }
        for kind in KINDS
    ]


# Solver


def solver(options):
    from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds
    from recbole_unlearn.data.forget import ForgetRequest
    from recbole_unlearn.influence.solver import block_jacobi, conjugate_gradient, jacobi
    from recbole_unlearn.trained import Checkpoint
    from recbole_unlearn.unlearner import InfluenceUnlearner

    rows = []
    for dataset in options.datasets.split(","):
        settings = {"data_path": options.data_path, "method": "influence"}
        trained = TrainedSeeds(("BPR", dataset, [str(ROOT / "properties/paper.yaml")], settings), options.cache)
        config, split = trained.config, trained.split
        run = SeedRun(config["seed"], (), True)
        trained.train([run])
        unlearner = InfluenceUnlearner(Checkpoint.written(trained.path(run), config).trained(split))
        problem, way = unlearner.problem, unlearner.way
        for ratio in (0.0001, 0.00035):
            forgotten = ForgetRequest("ratio", ratio).rows(split)
            after = problem.without(forgotten, way)
            z, (curvature, _), damping = problem.lost(after, way), problem.curvature(after, way), problem.damping(way)
            kinds = {
                "none": lambda curvature, damping: None,
                "Jacobi": lambda curvature, damping: jacobi(curvature.diagonal(), damping),
                "block-Jacobi": lambda curvature, damping: block_jacobi(curvature.blocks(), damping),
            }
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
    report("solver", rows, options.output, "K = 8, properties/paper.yaml, default damping.")


# Growth


def peak_memory():
    """Peak resident MB of this process; unlike ru_maxrss, without what the parent held when it forked."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def apart(*arguments):
    """What this script prints as JSON in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_point(clock, folder, n_users, n_items, K):
    """Time a product over the triples in a folder; prints JSON. Runs in a process of its own."""
    columns = read_triples(Path(folder))
    tiny = UserTriples(*(np.array(column[:0]) for column in columns), 1, n_items)
    few = DotProductCurvature(tiny, *embeddings(1, n_items, K))
    few.matvec(torch.zeros(few.size, dtype=torch.float64))  # compiles
    P, Q = embeddings(n_users, n_items, K)
    start = clock()
    curvature = DotProductCurvature(UserTriples(*columns, n_users, n_items), P, Q)
    prepared = clock() - start
    v = torch.ones(curvature.size, dtype=torch.float64)
    seconds = []
    while len(seconds) < 3 or (sum(seconds) < 1 and len(seconds) < 15):
        start = clock()
        curvature.matvec(v)
        seconds.append(clock() - start)
    print(
        json.dumps({"seconds": seconds, "prepared": prepared, "peak_MB": peak_memory(), "kept": curvature.triples.kept})
    )


def growth(options):
    million = 1_000_000
    base = {"triples": 4 * million, "K": 8, "users": 6040, "items": 3706}
    lines = {
        "triples, K = 8": [{**base, "triples": int(n * million)} for n in (0.25, 1, 4, 16, 40)],
        "triples, K = 64": [{**base, "K": 64, "triples": int(n * million)} for n in (0.25, 1, 4, 16, 40)],
        "K": [{**base, "K": K} for K in (2, 8, 32, 128)],
        "users": [{**base, "users": n} for n in (1000, 10_000, 100_000, million)],
        "items": [{**base, "items": n} for n in (1000, 10_000, 100_000, million)],
    }
    rows = []
    for line, points in lines.items():
        for point in points:
            with tempfile.TemporaryDirectory() as folder:
                sizes = point["users"], point["items"]
                write_triples(Path(folder), point["triples"] // NEGATIVES, *sizes)
                result = apart(f"--clock={options.clock}", "--point", folder, *map(str, (*sizes, point["K"])))
            rows.append(
                {
                    "against": line,
                    **{name: f"{value:,}" for name, value in point.items()},
                    "ms": spread(result["seconds"], 1e-3),
                    "ns a triple": f"{np.median(result['seconds']) / point['triples'] * 1e9:.2f}",
                    "preparation, s": f"{result['prepared']:.2f}",
                    "peak MB": f"{result['peak_MB']:.0f}",
                    "kept": "yes" if result["kept"] else "no",
                }
            )
            print(rows[-1], flush=True)
    report(
        "growth", rows, options.output,
        "A product in a process of its own, memory-mapped triples; peak: of the whole process, interpreter, libraries "
        "and mapped pages included. Kept: grouping and h stay in memory; above 16 million triples every product makes "
        "them again, a block at a time.",
    )  # fmt: skip
    draw_growth(options)


# Requests


def measure_request(clock, forgotten, K, all_rows):
    """Time replay's epochs on synthetic triples; prints JSON. Runs in a process of its own."""
    shape = next(shape for shape in replay_speed.SHAPES.values() if shape["K"] == K)

    def run(shape, epochs):
        recorded, weights, rows = replay_speed.problem(**shape, epochs=epochs)
        marks = [clock()]
        trajectory = Trajectory(list(weights), list(weights.values()))
        replay(recorded, trajectory, rows, all_rows, progress=lambda: marks.append(clock()))
        return np.diff(marks)

    run({**shape, "n_rows": 2000, "forgotten": 20}, 2)  # compiles
    first, *later = run({**shape, "forgotten": forgotten}, 8)
    print(json.dumps({"seconds": later, "prepared": first, "peak_MB": peak_memory()}))


def requests(options):
    rows = []
    for K, shape in ((shape["K"], shape) for shape in replay_speed.SHAPES.values()):
        for way in ("touched rows", "all rows"):
            for forgotten in (1, 10, 100, 1000, 10_000):
                result = apart(f"--clock={options.clock}", "--request", str(forgotten), str(K), way)
                rows.append(
                    {
                        "against": f"forget set, {way}, K = {K}",
                        "forget set": f"{forgotten:,}",
                        "triples": f"{shape['n_rows'] * shape['m']:,}",
                        "ms": spread(result["seconds"], 1e-3),
                        "first epoch, ms": f"{1e3 * result['prepared']:.3g}",
                        "peak MB": f"{result['peak_MB']:.0f}",
                    }
                )
                print(rows[-1], flush=True)
    report(
        "requests", rows, options.output,
        "An epoch of replay in a process of its own, on synthetic triples of ML-1M's shape, random interactions "
        "forgotten; the first epoch holds the preparation. By default a request replays the touched rows where they "
        "anchor at most half of the interactions, else all rows.",
    )  # fmt: skip
    draw_growth(options)


# The picture


def draw_growth(options):
    """Draw what the sections growth and requests have written."""
    files = [options.output / f"{section}.json" for section in ("growth", "requests")]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())["rows"]]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "growth", "svg.fonttype": "none"}
    lines = {}
    for row in rows:
        lines.setdefault(row["against"], []).append(row)
    axes_of = ["triples", "K", "users", "items", "forget set"]
    figure, axes = plt.subplots(2, 5, figsize=(16, 5.5), sharey="row", sharex="col", constrained_layout=True)
    for line, points in lines.items():
        axis = line.split(",")[0]
        column = axes_of.index(axis)
        x = [int(row[axis].replace(",", "")) for row in points]
        label = line.partition(", ")[2] or None
        axes[0, column].loglog(x, [float(row["ms"].split()[0]) for row in points], "o-", label=label)
        axes[1, column].loglog(x, [float(row["peak MB"]) for row in points], "o-", label=label)
        axes[1, column].set_xlabel({"K": "embedding size K", "forget set": "interactions forgotten"}.get(axis, axis))
    for axis in (axes[0, 0], axes[1, 4]):  # where they cover nothing
        axis.legend(frameon=False, fontsize="small", loc="upper left")
    for column in range(5):
        axes[0, column].set_title("an epoch of replay" if column == 4 else "a product", fontsize="medium")
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("peak memory of the process, MB")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.suptitle(
        "A Gauss-Newton product, and an epoch of replay; where not on the axis: 4 million triples (.8 at K = 64 in "
        "replay), K = 8, 6,040 users, 3,706 items"
    )
    figure.savefig(options.picture, metadata={"Date": None})


SECTIONS = {"kernels": kernels, "solver": solver, "growth": growth, "requests": requests}
NEED_DATA = {"solver"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(name for name in SECTIONS if name not in NEED_DATA))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine, with 1 thread")
    parser.add_argument("--datasets", default="ml-1m,pinterest")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--cache", default="saved/fidelity")
    parser.add_argument("--output", type=Path, default=ROOT / "results/speed")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/growth.svg")
    parser.add_argument("--point", nargs=4, metavar=("FOLDER", "USERS", "ITEMS", "K"), help=argparse.SUPPRESS)
    parser.add_argument("--request", nargs=3, metavar=("FORGOTTEN", "K", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        forgotten, K, way = options.request
        measure_request(CLOCKS[options.clock], int(forgotten), int(K), way == "all rows")
        return
    if options.point:
        measure_point(CLOCKS[options.clock], options.point[0], *map(int, options.point[1:]))
        return
    chosen = options.sections.split(",")
    if unknown := set(chosen) - SECTIONS.keys():
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in chosen:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
