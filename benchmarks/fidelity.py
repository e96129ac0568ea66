"""Fidelity to retraining over seeds, for random interactions, whole users and whole items.

    python benchmarks/fidelity.py --dataset=ml-100k
    python benchmarks/fidelity.py --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml \\
        --sets=ratio:0.0001

Trained models are cached in --cache; a run that was cut off goes on. Writes Markdown, CSV, LaTeX and JSON to --output.
"""

import argparse
from pathlib import Path

import numpy as np

from recbole_unlearn.comparison.fidelity import METHODS, fidelity
from recbole_unlearn.comparison.seeds import TrainedSeeds
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.reports.tables import write_fidelity


def forget_rows(split, kind, size, seed=2020):
    """Rows of ``size`` random interactions, users or items drawn at random, or of another kind of `ForgetRequest`."""
    if kind not in ("users", "items"):
        return ForgetRequest(kind, size, seed).rows(split)
    rng = np.random.default_rng(seed)
    users = rng.choice(np.unique(split.users), min(int(size), split.n_users), replace=False)
    items = rng.choice(np.unique(split.items), min(int(size), split.n_items), replace=False)
    return np.flatnonzero(np.isin(split.users, users) if kind == "users" else np.isin(split.items, items))


def report(trained, args, methods, setting, stem):
    """Measure the methods on each of the forget sets in ``args.sets``; print the tables and write them."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for text in args.sets.split():
        kind, size = text.split(":")
        rows = forget_rows(trained.split, kind, float(size) if kind == "ratio" else int(size))
        results = fidelity(trained, rows, args.seeds, methods)
        title = f"{args.dataset}, {setting} {args.model}, forget {text} ({len(rows)} interactions), {args.seeds} seeds"
        print(write_fidelity(results, title, output, f"{stem}-{kind}-{size}"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="BPR")
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--config_files", default="")
    parser.add_argument(
        "--sets",
        default="count:200 users:20 items:20",
        help="forget sets, KIND:SIZE, separated by spaces; also popular_items, core_users, ...",
    )
    parser.add_argument("--methods", default="", help=f"separated by semicolons; default all: {'; '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--changes", default="", help="keys of the configuration, KEY=VALUE, separated by spaces")
    parser.add_argument("--cache", default="saved/fidelity")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--output", default="results/fidelity")
    args = parser.parse_args()
    changes = dict(change.split("=", 1) for change in args.changes.split())
    arguments = (args.model, args.dataset, args.config_files.split(), {"data_path": args.data_path, **changes})
    trained = TrainedSeeds(arguments, args.cache, args.processes)
    methods = {name: METHODS[name] for name in args.methods.split("; ")} if args.methods else None
    setting = "-".join([Path(args.config_files).stem or "default", *(f"{k}={v}" for k, v in changes.items())])
    model = "" if args.model == "BPR" else f"{args.model}-"
    report(trained, args, methods, setting, f"{args.dataset}-{model}{setting}")


if __name__ == "__main__":
    main()
