"""What each part of the influence step contributes, beside the replay that needs none of it tuned.

    python benchmarks/ablation.py --dataset=ml-100k --cache=saved/fidelity

Shares its cache of trained seeds with fidelity.py.
"""

import argparse

from fidelity import report

from recbole_unlearn.comparison.seeds import TrainedSeeds

STEP = {"method": "influence"}
VARIANTS = {
    "nothing done": None,
    **{f"step, adam damping {c}": {**STEP, "damping_strength": c} for c in (0.25, 0.5, 1.0, 2.0, 4.0)},
    "step, scalar damping 1e-3": {**STEP, "damping": "scalar", "damping_strength": 1e-3},
    "step, scalar damping 1e-4": {**STEP, "damping": "scalar", "damping_strength": 1e-4},
    "step, last epoch's triples": {**STEP, "log_epochs": 1},
    "step, no negative-pool return": {**STEP, "pool_return": False},
    "replay": {"method": "replay"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="BPR")
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--sets", default="count:200")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--cache", default="saved/fidelity")
    parser.add_argument("--output", default="results/ablation")
    args = parser.parse_args()
    trained = TrainedSeeds((args.model, args.dataset, [], {"data_path": args.data_path}), args.cache)
    report(trained, args, VARIANTS, "default", args.dataset)


if __name__ == "__main__":
    main()
