"""Methods audited pair by pair: populations of unlearned models against retrained ones (docs/comparison.md).

    python benchmarks/audit.py --dataset=ml-100k
    python benchmarks/audit.py --dataset=ml-1m --data_path=PATH --models=64 --methods=ours
    python benchmarks/audit.py planted            # a method that secretly keeps a share of the effect must be caught
    python benchmarks/audit.py equal              # and equal laws must not be
    python benchmarks/audit.py pages              # write the pages anew, from the JSON beside them
    python benchmarks/audit.py lds                # do predicted changes follow true ones, over forget sets?
    python benchmarks/audit.py tune               # settings of the methods, by one rule for all

What the panel saw of each model is kept in --cache; a run that was cut off goes on. Writes Markdown, JSON and a picture
of each forget set to --output; a page that is there is not replaced unless --again is given.
"""

import logging
from dataclasses import replace
from time import perf_counter

import common
import numpy as np
from common import AGAIN, CACHED, CHANGES, RESULTS, ROOT, changed_keys, option, read_json, setting, shown, takes
from scipy.stats import spearmanr
from tqdm import tqdm

from recbole_unlearn.comparison.figures import forget_sets
from recbole_unlearn.comparison.panel import Panel, Views
from recbole_unlearn.comparison.populations import AUDITED, ORACLE, ORIGINAL, Audit, audited, compared, set_names
from recbole_unlearn.comparison.seeds import quiet
from recbole_unlearn.comparison.tuned import MOST_LOST, SEEDS, best, tuned
from recbole_unlearn.errors import InputError
from recbole_unlearn.methods import METHODS, chosen, settings_of, suited
from recbole_unlearn.methods.base import Task
from recbole_unlearn.reports import per_example
from recbole_unlearn.reports.pictures.described import pair_histograms
from recbole_unlearn.reports.pictures.drawn import svg
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import scratch_folder

OPTIONS = {
    **CACHED,
    "model": "BPR",
    "cache": option("saved/audit", "folder of what is kept of each model"),
    "models": option(128, "of each population"),
    "sets": option("mixed:200", "forget sets, KIND:NUMBER, separated by commas"),
    "methods": option(help=f"separated by commas; default: those of {', '.join(AUDITED)} that are for the model"),
    "changes": CHANGES,
}


def _audit(options, names, method_args=None, ways=None, also=()):
    """An audit of methods, and ``also`` of others by name; ``ways``: of their populations these alone."""
    logging.getLogger().setLevel(logging.ERROR)
    given = {"data_path": options.data_path, **changed_keys(options)}
    arguments = options.model, options.dataset, options.config_files, given
    config = UnlearnConfig(*arguments)
    names = [*also, *(suited(AUDITED, config) if names is None else chosen(names, config))]
    own = {name: settings for name, settings in (method_args or {}).items() if name in names}
    methods = audited(names, config, own)
    if ways and (unknown := set(ways) - set(methods)):
        raise InputError(f"there are no ways {', '.join(sorted(unknown))}; there are {', '.join(methods)}")
    methods = {way: methods[way] for way in ways or methods}
    return Audit(arguments, options.cache, methods, options.models, options.processes)


@takes(
    **OPTIONS,
    settings=option(help="JSON that `tune` wrote: methods take the settings chosen there; else their own defaults"),
    ways=option(help="of all methods' populations these alone, separated by semicolons"),
    add=option(False, "add to the page that is there, or renew, what is measured; all else of it stays"),
    name=option(help="more of the files' name"),
    output=RESULTS / "audit",
    again=AGAIN,
)
def audit(options):
    start = perf_counter()
    settings = read_json(options.settings) if options.settings else {}
    title = f"{options.model} on {options.dataset}, {shown(options)}, pair by pair, {options.models} models each"
    name = f"{options.dataset}-{options.model}-{setting(options)}"
    if settings:
        title, name = f"{title}, methods' settings by one rule", f"{name}-tuned"
    name += f"-{options.name}" if options.name else ""
    before = read_json(options.output / f"{name}.json")["sets"] if options.add else {}
    if not options.add:
        common.check_new(options, name)
    found = _audit(options, options.methods, settings, options.ways and options.ways.split("; "))
    results = _added(before, found.run(set_names(options.sets, found.config)))
    options.output.mkdir(parents=True, exist_ok=True)
    print(per_example.write(results, title, found.agreement, options.output, name))
    print(f"{common.command(options)}: {(perf_counter() - start) / 60:.0f} minutes; {common.load()}")


def _added(before, results):
    """What was found before, with what is new. The originals and retrained models must be the same."""
    for name, new in results.items():
        old = before.setdefault(name, new)
        if old is new:
            continue
        for part, way in (("figures", ORIGINAL), *(("floors", n) for n in new["floors"])):
            then, now = (each[part][way]["ndcg"]["median"] if way in each[part] else None for each in (old, new))
            if then is not None and not np.isclose(then, now, rtol=1e-5):  # others would differ by some 1e-3
                raise InputError(f"{name}: models of {way} are not those of the page; measure all of it anew")
        new["figures"].pop(ORIGINAL)
        old["floors"] |= {n: floor for n, floor in new["floors"].items() if n not in old["floors"]}
        for part in ("figures", "against"):
            old[part] = {**old.get(part, {}), **new[part]}
    return before


@takes(
    **{name: each for name, each in OPTIONS.items() if name != "methods"},
    kept=option([0.0, 0.02, 0.05, 0.1], "shares of the effect that are kept", nargs="+", type=float),
)
def planted(options):
    """Exact models that secretly keep a share of what the forgotten pairs had meant: from which share on it shows."""
    found = _audit(options, ["ours"])
    for name in set_names(options.sets, found.config):
        found.run([name])
        panel = found.panel(name, found.rows(name))
        originals, oracles, exact = (found.views(panel, way) for way in (ORIGINAL, ORACLE, "exact, fresh"))
        floor, rows = compared(panel, originals, oracles), []
        paired = found.views(panel, "exact, paired")
        for share in options.kept:
            effect = (originals.margin - paired.margin) * np.float32(share)  # of that model: random numbers cancel
            cheating = Views(exact.margin + effect, exact.top)
            figures = compared(panel, originals, oracles, cheating)
            cells = {title: per_example.cell(key, figures, floor) for key, title in per_example.TELLING.items()}
            rows.append({"kept": f"{share:.0%}", **cells})
        print(f"Forget {name} of {options.dataset}\n\n{common.markdown(rows)}\n")


@takes(
    **{
        **OPTIONS,
        "sets": option(50, "how many forget sets, drawn at random"),
        "methods": option("ours", "separated by commas"),
        "models": 1,
    },
    share=option(0.005, "of the interactions, in each"),
    output=RESULTS / "lds",
    again=AGAIN,
)
def lds(options):
    """Linear datamodeling score: over forget sets, how predicted changes of a pair's margin follow those of paired
    training (Park et al., "TRAK", 2023), for one original; mean over pairs of Spearman's correlation.

    Paired training is `training.train_paired`'s law by `exact, paired`, which results/exact.md compares with RecBole's;
    of models without closed forms it is the model's own trainer's, and touched rows are no way of theirs.
    """
    common.check_new(options, stem := f"{options.dataset}-{options.model}-{setting(options)}")
    found = _audit(options, options.methods, also=["ours"])
    split, rng, margins = found.split, np.random.default_rng(1), {}
    panel = Panel(split, [])  # for all forget sets: its pairs are of all users, who lose something in some of them
    with scratch_folder() as folder, quiet():
        path, model = found.trained(folder, [], found.config["seed"], True)
        task = Task(found.config, split, found.config["seed"], *checkpoints.load(path), path, folder)
        before = panel.view(model)["margin"]
        for _ in tqdm(range(options.sets), "Forget sets", ncols=100):
            rows = np.sort(rng.choice(split.n_rows, int(options.share * split.n_rows), replace=False))
            for way, (name, settings) in found.methods.items():
                method = METHODS[name](replace(task, folder=folder / name), settings)
                if name != "ours":  # whose preparation loads kernels
                    method.prepare(rows)
                start = panel.view(method.original())["margin"] if method.has_own_original() else before
                found_by = panel.view(method.forget(rows).model)["margin"]
                margins.setdefault(way, []).append(found_by - start)
    truth, rows = np.stack(margins.pop("exact, paired")), []
    groups = {"training pairs": panel.groups["retained, other users"], "held out": panel.groups["held out"]}
    for way, predicted in margins.items():
        scores = {
            name: [_alike(truth[:, k], np.stack(predicted)[:, k]) for k in range(group.start, group.stop)]
            for name, group in groups.items()
        }
        rows.append({"way": way} | {name: common.mean_sd(each, 3) for name, each in scores.items() if each})
    title = f"{options.model} on {options.dataset}, {shown(options)}: linear datamodeling score"
    page = f"## {title}\n\n{common.markdown(rows)}\n\n`{common.command(options)}`\n"
    common.write(page, options.output, stem, rows)


def _alike(true, predicted):
    """Spearman's correlation; 0 where a method predicts the same change, such as none, for every forget set."""
    return spearmanr(true, predicted).statistic if np.ptp(true) and np.ptp(predicted) else 0.0


@takes(
    **{
        **OPTIONS,
        "cache": CACHED["cache"],
        "models": None,
        "methods": option("all", "separated by commas"),
        "sets": option("count:200", "what methods are evaluated on"),
    },
    seeds=option(SEEDS, "models to choose on, none of which is evaluated"),
    output=RESULTS / "tuned",
    again=AGAIN,
)
def tune(options):
    """Choose the settings of methods by one rule for all (docs/comparison.md): no retrained model is looked at.

    Of the sets, given in `comparison_sets` of a comparison, as many other rows are forgotten, at random.
    """
    common.check_new(options, stem := f"{options.dataset}-{options.model}-{setting(options)}")
    trained = common.trained_seeds(options, options.model, comparison_sets=options.sets, **changed_keys(options))
    names = chosen(options.methods, trained.config)
    evaluated = np.unique(np.concatenate(list(forget_sets(trained.config, trained.split).values())))
    trials, nothing = tuned(trained, names, evaluated, options.seeds)
    rows = [{"method": "nothing done", "setting": "", "gap": f"{nothing.gap:+.4f}", "lost": "0.0%", "": ""}]
    for name, each in trials.items():
        default, found = settings_of(name), best(each)
        for trial in each:
            (changed,) = (f"{key}: {value:g}" for key, value in trial.settings.items())
            marks = {"default": trial.settings.items() <= default.items(), "**chosen**": trial is found}
            notes = ", ".join(mark for mark, holds in marks.items() if holds)
            done = np.isfinite(trial.gap)
            figures = {"gap": f"{trial.gap:+.4f}" if done else "refused", "lost": f"{trial.lost:.1%}" if done else ""}
            rows.append({"method": name, "setting": changed, **figures, "": notes})
    title = f"{options.model} on {options.dataset}, {shown(options)}: settings by one rule, {options.seeds} models"
    read = (
        "Gap: forget-set AUC minus the AUC of the validation interactions; lost: share of the validation metric. "
        f"Chosen: the smallest gap of those that lose at most {MOST_LOST:.0%}; where all lose more, the least loss."
    )
    page = f"## {title}\n\n{read}\n\n{common.markdown(rows)}\n\n`{common.command(options)}`\n"
    figures = {name: dict(best(each).settings) for name, each in trials.items()}
    common.write(page, options.output, stem, figures)


@takes(
    models=option([32, 64, 128], "of each population", nargs="+", type=int),
    times=option(200, "audits of equal laws"),
    output=RESULTS,
    again=AGAIN,
)
def equal(options):
    """How often a figure is bold where unlearned and retrained models have one law, of normal margins and figures."""
    common.check_new(options, "equal")
    rng, panel, rows = np.random.default_rng(0), Equal(), []
    for models in options.models:
        bold: dict[str, int] = {}
        for _ in tqdm(range(options.times), f"{models} models", ncols=100):
            originals, oracles, unlearned = (panel.population(rng, models, effect) for effect in (2, 0, 0))
            floor = compared(panel, originals, oracles, n=models // 2)
            found = compared(panel, originals, oracles, unlearned)
            for key in per_example.TELLING.keys() | {"ndcg", "churn", "before and after, held out", "klom, held out"}:
                bold[key] = bold.get(key, 0) + per_example.outside(key, found, floor)
        titles = {key: title for key, title in (per_example.TELLING | per_example.OTHERS).items() if key in bold}
        rows.append({"models": models} | {title: f"{bold[key] / options.times:.1%}" for key, title in titles.items()})
    title = f"## How often equal laws are told apart, of {options.times} audits"
    page = f"{title}\n\n{common.markdown(rows)}\n\n`{common.command(options)}`\n"
    common.write(page, options.output, "equal", rows)


class Equal:
    """A panel of models whose margins and figures are normal, for `compared`."""

    groups = {"forgotten": slice(0, 40), "retained, touched users": slice(40, 40), "held out": slice(40, 80)}

    def population(self, rng, models, effect):
        """`Views` of models that know the forgotten pairs by so much; of a top list there is a figure each, alone."""
        margin = rng.normal(size=(models, 80))
        margin[:, self.groups["forgotten"]] += effect
        return Views(margin.astype(np.float32), rng.normal(size=(models, 2)))

    def usefulness(self, top):
        return {"ndcg": top[:, 0]}

    def churn(self, before, after):
        return after[:, 1]


@takes(results=RESULTS / "audit")
def pages(options):
    """Write the pages of audits anew, from the JSON beside them."""
    for file in sorted(options.results.glob("*.json")):
        kept = read_json(file)
        file.with_suffix(".md").write_text(
            per_example.markdown(kept["sets"], kept["title"], kept["agreement"]), "utf-8"
        )


SHOWN = ("nothing done", "ubpr", "one corrected step", "touched rows", "exact, paired", "exact, fresh")


@takes(results=RESULTS / "audit", stem="ml-100k-BPR-default", output=ROOT / "docs" / "audit.svg")
def picture(options):
    """Draw docs/audit.svg: the first forget set of an audit, some of the methods."""
    each = next(iter(read_json(options.results / f"{options.stem}.json")["sets"].values()))
    pairs = {name: found["pairs"] for name, found in each["figures"].items() if name in SHOWN}
    drawn = pair_histograms(pairs, {name: per_example.floor_of(each, name)["pairs"] for name in pairs})
    options.output.write_text(svg(drawn), "utf-8")


if __name__ == "__main__":
    common.run(__doc__, [audit, pages, planted, equal, lds, tune, picture])
