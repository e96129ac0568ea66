"""The commands of speed.py that draw their data: curvature products and replay, and the picture of their growth."""

import importlib.util
import json
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import common
import numba
import numpy as np
import torch
from common import CLOCK, CLOCKS, RESULTS, ROOT, option, ratios, spread, take_turns, takes

from recbole_unlearn.influence import replay as current
from recbole_unlearn.influence.coupling import Paired
from recbole_unlearn.influence.dot_product import DotProductTraining
from recbole_unlearn.influence.operators import AutogradCurvature, DotProductCurvature, UserTriples, logistic_curvature
from recbole_unlearn.influence.recorded import Adam, Recorded, Trajectory
from recbole_unlearn.influence.threads import threads

ML_1M = {"n_rows": 1_000_000, "n_users": 6040, "n_items": 3706}
NEGATIVES = 4
KINDS = {"Gauss-Newton": False, "Hessian": True}  # exact?
AUTOGRAD_BATCH = 2**17  # triples; larger ones are no faster
SHAPES = {  # of replayed trainings
    "K=8, 4 negatives": dict(K=8, m=4, n_rows=988_000, batch_triples=4096, forgotten=350, lr=0.01),
    "K=64, 1 negative": dict(K=64, m=1, n_rows=800_000, batch_triples=2048, forgotten=200, lr=0.001),
}
N_USERS, N_ITEMS = 6041, 3417
MILLION = 1_000_000
OUTPUT = {"clock": CLOCK, "output": RESULTS / "speed"}
PICTURE = {**OUTPUT, "picture": ROOT / "docs/growth.svg"}


def report(section, rows, options, notes):
    """Print and write a section's rows (list of dicts)."""
    machine = f"{threads()} threads, {common.load()}"
    page = f"## {section}\n\n`{common.command(options)}` ({machine})\n\n{common.markdown(rows)}\n\n{notes}\n"
    common.write(page, options.output, section, {"machine": machine, "rows": rows, "notes": notes})


def told(*arguments):
    """What a command tells in a process of its own, which imports no more than it needs."""
    found, failed = common.apart(__file__, *arguments)
    if failed:
        raise SystemExit(f"{arguments} failed: {failed}")
    return found


# Triples


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
    for start in range(0, n_rows, MILLION):
        part = slice(start, min(start + MILLION, n_rows))
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


@takes(rounds=3, **OUTPUT)
def kernels(options):
    """A curvature product against torch autograd's, and against one read of what it reads.

    Autograd's is a Hessian-vector product: double backward through the same summed loss, float32. The read streams
    through all arrays that the product reads once: item numbers, h, distinct items (and b, in the exact Hessian). The
    embeddings, which it gathers from cache, are not counted.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_triples(Path(folder), **ML_1M)
        columns = read_triples(Path(folder))
        for K in (8, 64):
            rows += kernels_at(K, columns, options.rounds, CLOCKS[options.clock])
    notes = f"{columns[2].size:,} triples. Relative error: to float32 autograd (Gauss-Newton: on an eighth)."
    report("kernels", rows, options, notes)


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
            "autograd / product": spread(ratios(far["autograd"], far[kind])),
            "MB read": f"{sum(array.nbytes for array in words[kind]) / 1e6:.0f}",
            "streaming read, ms": spread(near[f"read {kind}"], 1e-3),
            "product / read": spread(ratios(near[kind], near[f"read {kind}"])),
            "relative error": f"{((compared[kind] - answers[kind]).norm() / answers[kind].norm()).item():.0e}",
        }
        for kind in KINDS
    ]


# Growth


@takes(clock=CLOCK, folder=Path(), users=0, items=0, K=0)
def point(options):
    """Time a product over the triples in a folder."""
    clock, n_users, n_items, K = CLOCKS[options.clock], options.users, options.items, options.K
    columns = read_triples(options.folder)
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
        seconds.append(common.seconds(partial(curvature.matvec, v), clock))
    kept = curvature.triples.kept
    common.tell({"seconds": seconds, "prepared": prepared, "peak_MB": common.peak_memory(), "kept": kept})


@takes(millions=option([0.25, 1, 4, 16, 40], "of triples", type=float, nargs="+"), **PICTURE)
def growth(options):
    """Seconds and peak memory of a product in a process of its own, triples memory-mapped; draws --picture."""
    base = {"triples": 4 * MILLION, "K": 8, "users": 6040, "items": 3706}
    lines = {
        "triples, K = 8": [{**base, "triples": int(n * MILLION)} for n in options.millions],
        "triples, K = 64": [{**base, "K": 64, "triples": int(n * MILLION)} for n in options.millions],
        "K": [{**base, "K": K} for K in (2, 8, 32, 128)],
        "users": [{**base, "users": n} for n in (1000, 10_000, 100_000, MILLION)],
        "items": [{**base, "items": n} for n in (1000, 10_000, 100_000, MILLION)],
    }
    rows = []
    for line, of in ((line, of) for line, points in lines.items() for of in points):
        with tempfile.TemporaryDirectory() as folder:
            write_triples(Path(folder), of["triples"] // NEGATIVES, of["users"], of["items"])
            keys = {"clock": options.clock, "folder": folder, **{key: of[key] for key in ("users", "items", "K")}}
            found = told("point", *(f"--{key}={value}" for key, value in keys.items()))
        rows.append(
            {
                "against": line,
                **{name: f"{value:,}" for name, value in of.items()},
                "ms": spread(found["seconds"], 1e-3),
                "ns a triple": f"{np.median(found['seconds']) / of['triples'] * 1e9:.2f}",
                "preparation, s": f"{found['prepared']:.2f}",
                "peak MB": f"{found['peak_MB']:.0f}",
                "kept": "yes" if found["kept"] else "no",
            }
        )
        print(rows[-1], flush=True)
    notes = (
        "A product in a process of its own, memory-mapped triples; peak: of the whole process, interpreter, libraries "
        "and mapped pages included. Kept: grouping and h stay in memory; above 16 million triples every product makes "
        "them again, a block at a time."
    )
    report("growth", rows, options, notes)
    draw_growth(options)


# Replay


def problem(K, m, n_rows, batch_triples, forgotten, lr, epochs, seed=0):
    """What was recorded, weights by epoch, and the rows to forget.

    Users' activity and items' popularity are skewed, since what replay costs depends on how many triples hold a
    forgotten item.
    """
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


def small(shape):
    """A problem to compile with."""
    return problem(**{**shape, "n_rows": 2000, "forgotten": 20}, epochs=2)


def replayed(module, recorded, weights, rows, **options):
    return module.replay(recorded, Trajectory(list(weights), list(weights.values())), rows, **options)


def trained_again(recorded, weights, rows, progress):
    """All rows: exact retraining in random orders."""
    gone = np.isin(np.arange(len(recorded.users)), rows)
    start = np.array(weights[0], np.float32).reshape(recorded.n_users + recorded.n_items, -1)
    training = DotProductTraining(start, recorded.n_users, recorded.adam)
    for each in Paired(recorded, gone):
        training.epoch(recorded.users, recorded.pos, each)
        progress()


def version(name):
    """The replay module of a git revision or a file."""
    path = Path(name)
    if not path.is_file():
        source = subprocess.check_output(["git", "show", f"{name}:recbole_unlearn/influence/replay.py"], cwd=ROOT)
        path = Path(tempfile.mkdtemp()) / f"replay_{''.join(c if c.isalnum() else '_' for c in name)}.py"
        path.write_bytes(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@takes(
    against=option(help="git revision, or file of the same signature, that takes turns with this version"),
    epochs=option(8, "fewer than a training has, all of them alike"),
    rounds=3,
)
def replay(options):
    """Seconds of paired replay on logs of ML-1M's shape, alone or in turns with another version of replay.py."""
    modules = {"now": current} | ({options.against: version(options.against)} if options.against else {})
    for name, shape in SHAPES.items():
        for module in modules.values():
            replayed(module, *small(shape))
        arguments = problem(**shape, epochs=options.epochs)
        seconds = take_turns({of: partial(replayed, each, *arguments) for of, each in modules.items()}, options.rounds)
        triples = replayed(current, *arguments).triples / options.epochs
        best = {of: min(values) / options.epochs for of, values in seconds.items()}
        print(f"{name}: {1e3 * best['now']:.1f} ms an epoch, {triples:,.0f} triples")
        if options.against:
            other, pairs = options.against, ratios(seconds[options.against], seconds["now"])
            print(
                f"{name}: {1e3 * best[other]:.1f} ms with {other}, ratio {best[other] / best['now']:.2f} of minima, "
                f"{np.median(pairs):.2f} median of pairs",
                flush=True,
            )


@takes(clock=CLOCK, forgotten=0, shape="", all_rows=False)
def forget_set(options):
    """Time replay's epochs on one of the `SHAPES`."""
    clock, shape = CLOCKS[options.clock], SHAPES[options.shape]

    def epochs(*arguments):
        marks = [clock()]
        run = trained_again if options.all_rows else partial(replayed, current)
        run(*arguments, progress=lambda: marks.append(clock()))
        return np.diff(marks).tolist()

    epochs(*small(shape))
    first, *later = epochs(*problem(**{**shape, "forgotten": options.forgotten}, epochs=8))
    common.tell({"seconds": later, "prepared": first, "peak_MB": common.peak_memory()})


@takes(counts=option([1, 10, 100, 1000, 10_000], "interactions to forget", type=int, nargs="+"), **PICTURE)
def forget_sets(options):
    """An epoch of replay against the size of the forget set; draws --picture."""
    rows = []
    for (name, shape), way in ((each, way) for each in SHAPES.items() for way in ("touched rows", "all rows")):
        for forgotten in options.counts:
            words = [f"--clock={options.clock}", f"--forgotten={forgotten}", f"--shape={name}"]
            words += ["--all_rows"] if way == "all rows" else []
            found = told("forget-set", *words)
            rows.append(
                {
                    "against": f"forget set, {way}, K = {shape['K']}",
                    "forget set": f"{forgotten:,}",
                    "triples": f"{shape['n_rows'] * shape['m']:,}",
                    "ms": spread(found["seconds"], 1e-3),
                    "first epoch, ms": f"{1e3 * found['prepared']:.3g}",
                    "peak MB": f"{found['peak_MB']:.0f}",
                }
            )
            print(rows[-1], flush=True)
    notes = (
        "An epoch of replay in a process of its own, on synthetic triples of ML-1M's shape, random interactions "
        "forgotten; the first epoch holds the preparation. By default a request replays the touched rows where they "
        "anchor at most half of the interactions, else all rows."
    )
    report("requests", rows, options, notes)
    draw_growth(options)


# The picture


def draw_growth(options):
    """Draw what `growth` and `forget_sets` have written."""
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


if __name__ == "__main__":
    common.run(__doc__, [], [point, forget_set])
