"""Methods audited pair by pair: populations of unlearned models against retrained ones (docs/comparison.md).

    python benchmarks/audit.py --dataset=ml-100k
    python benchmarks/audit.py --dataset=ml-1m --data_path=PATH --models=64 --methods=ours
    python benchmarks/audit.py planted            # a method that secretly keeps a share of the effect must be caught

What the panel saw of each model is kept in --cache; a run that was cut off goes on. Writes Markdown, JSON and a picture
of each forget set to --output.
"""

import logging
from time import perf_counter

import common
import numpy as np
from common import CACHED, RESULTS, option, setting, takes

from recbole_unlearn.comparison.panel import Views
from recbole_unlearn.comparison.populations import AUDITED, ORACLE, ORIGINAL, Audit, audited, compared, set_names
from recbole_unlearn.methods import chosen
from recbole_unlearn.reports import per_example

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


if __name__ == "__main__":
    common.run(__doc__, [audit, planted])
