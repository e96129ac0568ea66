"""Methods audited pair by pair: populations of unlearned models against retrained ones (docs/comparison.md).

    python benchmarks/audit.py --dataset=ml-100k
    python benchmarks/audit.py --dataset=ml-1m --data_path=PATH --models=64 --methods=ours
    python benchmarks/audit.py planted            # a method that secretly keeps a share of the effect must be caught
    python benchmarks/audit.py lds                # do predicted changes follow true ones, over forget sets?

What the panel saw of each model is kept in --cache; a run that was cut off goes on. Writes Markdown, JSON and a picture
of each forget set to --output.
"""

import json
import logging
from time import perf_counter

import common
import numpy as np
from common import CACHED, RESULTS, ROOT, option, setting, takes
from scipy.stats import spearmanr
from tqdm import tqdm

from recbole_unlearn.comparison.panel import Panel, Views
from recbole_unlearn.comparison.populations import AUDITED, ORACLE, ORIGINAL, Audit, audited, compared, set_names
from recbole_unlearn.comparison.seeds import quiet
from recbole_unlearn.methods import METHODS, chosen
from recbole_unlearn.methods.base import Task
from recbole_unlearn.reports import per_example
from recbole_unlearn.reports.pictures.described import pair_histograms
from recbole_unlearn.reports.pictures.drawn import svg
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import scratch_folder

OPTIONS = {
    **CACHED,
    "model": "BPR",
    "cache": option("saved/audit", "folder of what is kept of each model"),
    "models": option(128, "of each population"),
    "sets": option("mixed:200", "forget sets, KIND:NUMBER, separated by commas"),
    "methods": option(",".join(AUDITED), "separated by commas"),
    "changes": option("", "keys of the configuration, KEY=VALUE, separated by spaces"),
}


def _audit(options, methods):
    logging.getLogger().setLevel(logging.ERROR)
    given = {"data_path": options.data_path, **dict(change.split("=", 1) for change in options.changes.split())}
    arguments = options.model, options.dataset, options.config_files, given
    return Audit(arguments, options.cache, methods, options.models, options.processes)


@takes(**OPTIONS, output=RESULTS / "audit")
def audit(options):
    start, sets = perf_counter(), set_names(options.sets)
    found = _audit(options, audited(chosen(options.methods)))
    results = found.run(sets)
    title = f"{options.model} on {options.dataset}, {setting(options)}, pair by pair, {options.models} models each"
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"{options.dataset}-{options.model}-{setting(options)}"
    print(per_example.write(results, title, found.agreement, options.output, name))
    print(f"{common.command(options)}: {(perf_counter() - start) / 60:.0f} minutes; {common.load()}")


@takes(**OPTIONS, kept=option("0 .02 .05 .1", "shares of the effect that are kept, separated by spaces"))
def planted(options):
    """Exact models that secretly keep a share of what the forgotten pairs had meant: from which share on it shows."""
    found = _audit(options, audited(["ours"]))
    for name in set_names(options.sets):
        found.run([name])
        panel = found.panel(name, found.rows(name))
        originals, oracles, exact = (found.views(panel, way) for way in (ORIGINAL, ORACLE, "exact, fresh"))
        floor, rows = compared(panel, originals, oracles), []
        paired = found.views(panel, "exact, paired")
        for share in map(float, options.kept.split()):
            effect = (originals.margin - paired.margin) * np.float32(share)  # of that model: random numbers cancel
            cheating = Views(exact.margin + effect, exact.top)
            figures = compared(panel, originals, oracles, cheating)
            cells = {title: per_example.cell(key, figures, floor) for key, title in per_example.TELLING.items()}
            rows.append({"kept": f"{share:.0%}", **cells})
        print(f"Forget {name} of {options.dataset}\n\n{common.markdown(rows)}\n")


@takes(
    **{**OPTIONS, "sets": option(50, "how many forget sets, drawn at random"), "methods": None, "models": 1},
    share=option(0.005, "of the interactions, in each"),
    output=RESULTS / "lds",
)
def lds(options):
    """Linear datamodeling score: over forget sets, how predicted changes of a pair's margin follow those of paired
    training (Park et al., "TRAK", 2023), for one original; mean over pairs of Spearman's correlation.

    Paired training is `training.train_paired`'s law by `exact, paired`, which results/exact.md compares with RecBole's.
    """
    found = _audit(options, audited(["ours"]))
    split, rng, margins = found.split, np.random.default_rng(1), {}
    panel = Panel(split, [])
    with scratch_folder() as folder, quiet():
        path, model = found.trained(folder, [], found.config["seed"], True)
        task = Task(found.config, split, found.config["seed"], *checkpoints.load(path), path, folder)
        before = panel.view(model)["margin"]
        for _ in tqdm(range(options.sets), "Forget sets", ncols=100):
            rows = np.sort(rng.choice(split.n_rows, int(options.share * split.n_rows), replace=False))
            for way, (method, settings) in found.methods.items():
                after = METHODS[method](task, settings).forget(rows).model
                margins.setdefault(way, []).append(panel.view(after)["margin"] - before)
    truth, rows = np.stack(margins.pop("exact, paired")), []
    for way, predicted in margins.items():
        scores = {
            name: [spearmanr(truth[:, k], np.stack(predicted)[:, k]).statistic for k in range(group.start, group.stop)]
            for name, group in panel.groups.items()
        }
        rows.append({"way": way} | {name: common.mean_sd(each, 3) for name, each in scores.items() if each})
    title = f"{options.model} on {options.dataset}: linear datamodeling score"
    page = f"## {title}\n\n{common.markdown(rows)}\n\n`{common.command(options)}`\n"
    common.write(page, options.output, f"{options.dataset}-{options.model}-{setting(options)}", rows)


SHOWN = ("nothing done", "ubpr", "one corrected step", "touched rows", "exact, paired", "exact, fresh")


@takes(results=RESULTS / "audit", stem="ml-100k-BPR-default", output=ROOT / "docs" / "audit.svg")
def picture(options):
    """Draw docs/audit.svg: the first forget set of an audit, some of the methods."""
    each = next(iter(json.loads((options.results / f"{options.stem}.json").read_text())["sets"].values()))
    pairs = {name: found["pairs"] for name, found in each["figures"].items() if name in SHOWN}
    drawn = pair_histograms(pairs, next(iter(each["floors"].values()))["pairs"])
    options.output.write_text(svg(drawn), "utf-8")


if __name__ == "__main__":
    common.run(__doc__, [audit, planted, lds, picture])
