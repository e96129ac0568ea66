"""Draws docs/fidelity.svg from results/fidelity/*.json (of fidelity.py): python benchmarks/picture.py"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "recbole_unlearn"
import matplotlib.pyplot as plt  # noqa: E402

SETS = {"count-200": "200 random interactions", "users-20": "20 whole users", "items-20": "20 whole items"}
ORDER = ("nothing done", "paper's step", "influence", "replay", "replay, all rows", "retrained")
LABELS = {"influence": "one corrected step", "replay": "replay, touched rows", "retrained": "Retrain"}
COLOURS = dict(zip(ORDER, ("#b0b0b0", "#d08770", "#5e81ac", "#7cb342", "#2e7d32", "#222222"), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="results/fidelity")
    parser.add_argument("--stem", default="ml-100k-default")
    parser.add_argument("--output", default="docs/fidelity.svg")
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(SETS), figsize=(11, 2.9), sharey=True)
    for axis, (kind, title) in zip(axes, SETS.items(), strict=True):
        results = json.loads((Path(args.results) / f"{args.stem}-{kind}.json").read_text())
        target = results["retrained"]
        axis.axvspan(
            target["forget_auc"] - 2 * target["forget_auc_sd"], target["forget_auc"] + 2 * target["forget_auc_sd"],
            color="#222222", alpha=0.12, lw=0,
        )  # fmt: skip
        for height, name in enumerate(reversed(ORDER)):
            row = results[name]
            axis.errorbar(
                row["forget_auc"], height, xerr=2 * row["forget_auc_sd"], fmt="o", color=COLOURS[name], capsize=3
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("forget-set AUC")
        axis.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(ORDER)), [LABELS.get(name, name) for name in reversed(ORDER)])
    axes[0].set_ylim(-0.6, len(ORDER) - 0.4)
    figure.tight_layout()
    figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
