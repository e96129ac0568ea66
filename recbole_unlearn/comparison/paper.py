"""The paper's experiments (UBPR, 2025): its Tables 2 and 3 and its Figures 1 to 7, from one command.

Everything that is trained or measured is kept by configuration (`TrainedSeeds`, `Comparison`): an experiment that was
cut off goes on where it stopped.
"""

import os
import platform
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from recbole_unlearn.comparison.figures import DISTANCE, ORIGINAL, RETRAIN, Comparison, summary
from recbole_unlearn.comparison.published import METRICS, PROTOCOL, PUBLISHED, from_retrain, sentences
from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds, quiet
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.sampling import Played
from recbole_unlearn.evaluation.geometry import embeddings, geometry, scores, turned, weight_distance
from recbole_unlearn.methods import METHODS
from recbole_unlearn.methods.shards import MODELS as INNER_PRODUCTS
from recbole_unlearn.reports.pictures import described as draw
from recbole_unlearn.reports.pictures import drawn
from recbole_unlearn.reports.tables import READ_COMPARED, compared_table, compiled, json_text, latex
from recbole_unlearn.settings import keys
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.given import parse_value
from recbole_unlearn.settings.shown import plain
from recbole_unlearn.storage.files import write_atomically

ABOUT_DISTANCES = (
    "Weight distances: ours and UBPR's step start from the original's weights. Retrain shares only the initialisation "
    "with the original; its batches hold other rows and its negatives are others: R/O is the noise between two "
    "trainings and what was forgotten, together."
)
ABOUT_PAIRED = (
    "R paired is the original's own training again, by RecBole's trainer, without the forgotten rows: from the same "
    "initialisation, on the same batches and recorded negatives, for as many epochs as the original's weights took. "
    "R paired/O is what the forgotten rows did to the weights; ours/R paired and UBPR/R paired are how far each method "
    "is from undoing that: the original itself, which undoes nothing, is R paired/O away. 'All rows' is ours with "
    "`replay_rows: all`; by default a small request replays only the rows that it touches. Against both this counts "
    "one thing too much: a forgotten item is no recorded negative of its user, while Retrain may draw it again, which "
    "ours allows for. These pairs are of the first seed."
)
ABOUT_TURNED = (
    "Much of R paired/O is nothing that a user would see: training goes on along slightly other gradients, "
    "and all embeddings turn together, those of users and items that have nothing to forget as far as the others; this "
    "changes no score. Two panels leave it out. In one, both tables of the first model are turned (by the orthogonal "
    "matrix that brings all rows nearest to R paired's) and the distance is of the rows of the forgotten interactions' "
    "users and items; in the other, the root mean square of what the forgotten interactions' scores differ by."
)
ABOUT_SHARDS = (
    "S and E are SISA's and RecEraser's ensembles after the request, as one embedding of each user and item: RecEraser "
    "scores by those that its attention aggregates; SISA averages the shards' scores, to which the mean of their "
    "embeddings is the nearest thing. Shards start elsewhere than the original, and turning all embeddings together "
    "changes no score: S/O and E/O would be large even if nothing had to be forgotten."
)
# Figure 6: what stands against the original, as the paper writes it where it does; the original's own is the start's.
TO_ORIGINAL = {
    "original": "O/I",
    "retrain": "R/O",
    "sisa": "S/O",
    "receraser": "E/O",
    "ubpr": "UBPR/O",
    "ours": "ours/O",
}
SHORT = {"ours": "ours", "all rows": "all rows", "ubpr": "UBPR"}  # what stands against the paired run
# Panels of Figure 6.
TO_THE_ORIGINAL = "to the original"
OF_PAIRED, OF_TURNED, OF_SCORES = "of paired runs", "turned alike, of the forget set", "scores of the forget set"
# Settings of methods. RecEraser's own (shards of similar interactions, dropout .3) are for 64 dimensions: with the
# paper's 8 they rank clearly worse than these (docs/shards.md).
METHOD_ARGS = {
    "sisa": {"ideal": True},
    "receraser": {"ideal": True, "partition": "user", "dropout": 0.0},
    "ultrare": {"ideal": True},
}


@dataclass(frozen=True)
class Size:
    """How much of an experiment is run."""

    ratios: tuple
    negatives: tuple  # of Figure 7
    ratio_of_negatives: float
    users: int  # of Figures 4 and 5
    changes: dict  # to the configuration


FULL = Size((0.0001, 0.00015, 0.0002, 0.00025, 0.0003, 0.00035), (2, 4, 6, 8), 0.0002, 12, {})
QUICK = Size((0.001, 0.002), (1, 4), 0.001, 6, {"epochs": 3, "embedding_size": 8})


def paper_arguments(given, quick):
    """``arguments`` of the paper's setting; the user's files and keys come after it.

    ``method_args``, unless given, put all interactions to forget into one shard, as the paper does: `METHOD_ARGS`.
    """
    changes = {**_defaults(quick), **given.options}
    return given.model or "BPR", given.dataset or "ml-100k", ["properties/paper.yaml", *given.files], changes


class Paper:
    """The experiments on one data set.

    Args:
        trained (TrainedSeeds): as `paper_arguments` say.
        settings (dict): method -> its settings.
        seeds (int): of each model in Table 3 and Figures 1 to 3 and 7; the other figures take the first.
        quick (bool): a small version, to see that everything works.
        show_progress (bool)
    """

    def __init__(self, trained, settings, seeds=1, quick=False, show_progress=False):
        self.trained, self.settings, self.seeds, self.show_progress = trained, settings, seeds, show_progress
        self.config, self.split = trained.config, trained.split
        self.quick, self.size = quick, QUICK if quick else FULL
        self.comparison = Comparison(trained, settings, seeds, show_progress)
        self.seed = self.config["seed"]

    def run(self, folder):
        """Measure, and write ``<dataset>.md`` and the folder ``<dataset>`` with figures and tables.

        They are written as soon as there are tables, and again as figures come: the last take hours on large data.

        Returns:
            str: the page.
        """
        sets = {ratio: ForgetRequest("ratio", ratio, self.config["forget_seed"]) for ratio in self.size.ratios}
        rows = {f"{ratio:.3%}": request.rows(self.split) for ratio, request in sets.items()}
        results = self.comparison.run(rows)
        summaries = {name: summary(each["figures"]) for name, each in results["sets"].items()}
        page = ""
        for pictures in self._pictures(summaries, results["sets"], rows):
            page = self._write(Path(folder), results, summaries, pictures)
        return page

    def _write(self, folder, results, summaries, pictures):
        from recbole_unlearn.reports.pictures import interactive  # and Plotly, for which other runs need not wait

        name = self.config["dataset"]
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        for stem, picture in pictures.items():
            write_atomically(own / f"{stem}.svg", drawn.svg(picture).encode())
            drawn.write_png(picture, own / f"{stem}.png")
        interactive.write(list(pictures.values()), own / "figures.html", f"UBPR's figures on {name}")
        table = self._table_3(summaries)
        for ending, text in (("csv", table.to_csv()), ("tex", latex(table)), ("json", json_text(results))):
            write_atomically(own / f"table_3.{ending}", text.encode())
        page = self._page(results, summaries, table, pictures)
        write_atomically(folder / f"{name}.md", page.encode())
        return page

    # -- tables

    def _table_2(self, results):
        split, m = self.split, self.split.train.times
        ratios = {
            name: f"{each['interactions']:,} interactions, {each['interactions'] * m:,} triples"
            for name, each in results["sets"].items()
        }
        whole = {
            "users, items": f"{split.n_users - 1:,}, {split.n_items - 1:,}",
            "training data": f"{split.n_rows:,} interactions, {split.n_rows * m:,} triples",
        }
        return pd.DataFrame({"size": whole | ratios})

    def _table_3(self, summaries):
        return ranking_table(summaries, {} if self.quick else PUBLISHED.get(self.config["dataset"], {}))

    # -- figures

    def _pictures(self, summaries, sets, rows):
        """The pictures by name, again and again with more of them."""
        cutoffs = self.config["topk"]
        curves = {
            ratio: {name: {k: mean_and_sd(figures[name][f"ndcg@{k}|{PROTOCOL}"]) for k in cutoffs} for name in figures}
            for ratio, figures in summaries.items()
        }
        seconds = {
            name: {float(ratio.rstrip("%")): mean_and_sd(each[name]["seconds"]) for ratio, each in summaries.items()}
            for name in next(iter(summaries.values()))
            if name != ORIGINAL
        }
        pictures = {
            "figures_1_2": draw.cutoff_curves(curves),
            "figure_3": draw.ratio_curves(seconds, "seconds a request", "Running time", log=True),
        }
        yield pictures
        with quiet():
            users = self._users()
            distances = {TO_THE_ORIGINAL: distances_to_original(sets), **self._paired_distances(rows)}
        pictures |= {
            "figure_4": draw.embedding_map(users["map"]),
            "figure_5": draw.pnpr(users["pnpr"]),
            "figure_6": draw.weight_distances({panel: each for panel, each in distances.items() if each}, [OF_SCORES]),
        }
        yield pictures
        yield pictures | {"figure_7": draw.negatives_curves(self._negatives())}

    def _models(self, rows):
        """Models of the first seed: original, retrained without ``rows``, and as ours and UBPR unlearn them."""
        self.trained.train([SeedRun.original(self.seed), SeedRun.without(self.seed, rows)], self.show_progress)
        retrained = self.comparison.retrained(self.seed, rows).model
        return {"original": self._original(), "retrained": retrained, **self._unlearned(rows)}

    def _original(self):
        return self.comparison.task(self.seed).model()

    def _unlearned(self, rows):
        task = self.comparison.task(self.seed)
        return {
            name: METHODS[name](task, self.settings[name]).forget(rows).model
            for name in ("ours", "ubpr")
            if name in self.settings
        }

    def _all_rows(self, rows):
        """The first seed's model after a replay of all rows, by name; {} for models that have no choice of rows."""
        if self.config["model"] != "BPR" or "ours" not in self.settings:
            return {}
        settings = {**self.settings["ours"], "replay_rows": "all"}
        return {"all rows": METHODS["ours"](self.comparison.task(self.seed), settings).forget(rows).model}

    def _users(self):
        """PNPR and maps of users whose whole history is forgotten (Figures 4 and 5)."""
        rng = np.random.default_rng(self.config["forget_seed"])
        users = rng.choice(np.unique(self.split.users), self.size.users, replace=False)
        rows = np.flatnonzero(np.isin(self.split.users, users))
        task = self.comparison.task(self.seed)
        return geometry(self._models(rows), task.log, rows, task.stored["triple_log"]["epochs"])

    def _paired_distances(self, rows):
        """Distances to and from the original's own training again without the rows (Figure 6): panel -> pair -> ratio.

        Of the first seed. Empty where that training's batches are not all in its log.
        """
        if not Played.fits(self.split.train):
            return {}
        runs = [SeedRun.without(self.seed, each, paired=True) for each in rows.values()]
        self.trained.train(runs, self.show_progress)
        names = {name: f"{short}/R paired" for name, short in SHORT.items()} | {ORIGINAL: "R paired/O"}
        result = {}
        for ratio, each in rows.items():
            paired = self.comparison.retrained(self.seed, each, paired=True).model
            models = {ORIGINAL: self._original(), **self._unlearned(each), **self._all_rows(each)}
            for name, model in models.items():
                for panel, distance in self._from_paired(model, paired, each).items():
                    of_panel = result.setdefault(panel, {})
                    of_panel.setdefault(names[name], {})[float(ratio.rstrip("%"))] = distance
        return result

    def _from_paired(self, model, paired, rows):
        """Distances of one model to the paired one: panel of Figure 6 -> number."""
        own, other = embeddings(model), embeddings(paired)
        if own is None or other is None:
            return {}
        result = {OF_PAIRED: weight_distance(own, other)}
        if self.config["model"] in INNER_PRODUCTS:
            users, items = self.split.users[rows], self.split.items[rows]
            ids = np.unique(users), np.unique(items)
            touched = ([table[at] for table, at in zip(pair, ids, strict=True)] for pair in (turned(own, other), other))
            difference = scores(own, users, items) - scores(other, users, items)
            result |= {OF_TURNED: weight_distance(*touched), OF_SCORES: float(np.sqrt(np.mean(difference**2)))}
        return result

    def _negatives(self):
        """HR@10 and NDCG@10 against the number of negatives (Figure 7)."""
        model, dataset, files, given = self.trained.arguments
        names = [name for name in ("ubpr", "ours") if name in self.settings]
        result = {"HR@10": {}, "NDCG@10": {}}
        for number in self.size.negatives:
            sampling = {**self.config["train_neg_sample_args"], "sample_num": number}
            arguments = (model, dataset, files, {**given, "train_neg_sample_args": sampling})
            trained = TrainedSeeds(arguments, self.trained.folder, self.trained.processes)
            rows = ForgetRequest("ratio", self.size.ratio_of_negatives, self.config["forget_seed"]).rows(trained.split)
            settings = {name: self.settings[name] for name in names}
            comparison = Comparison(trained, settings, self.seeds, self.show_progress)
            figures = summary(comparison.run({"ratio": rows})["sets"]["ratio"]["figures"])
            for metric, key in (("HR@10", "hit@10"), ("NDCG@10", "ndcg@10")):
                for name in (RETRAIN, *names):
                    result[metric].setdefault(name, {})[number] = mean_and_sd(figures[name][f"{key}|{PROTOCOL}"])
        return result

    # -- page

    def _page(self, results, summaries, table, pictures):
        name = self.config["dataset"]
        published = name in PUBLISHED and not self.quick
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''} from {self.seed} on"
        command = command_of(self.trained.arguments, self.settings, self.quick)
        lines = [f"# The paper's experiments on {name}", "", f"`{command}`; {seeds}. {_hardware()}", ""]
        if self.quick:
            lines += ["A quick version, to see that everything works: its figures say nothing about the methods.", ""]
        lines += [
            "## Sizes (Table 2)",
            "",
            self._table_2(results).to_markdown(disable_numparse=True),
            "",
            "## Ranking after unlearning (Table 3)",
            "",
            f"HR@10 and NDCG@10 with 99 sampled negatives, mean{' ± standard deviation' if self.seeds > 1 else ''} "
            f"over seeds (difference to Retrain){' [the paper’s digits]' if published else ''}.",
            "",
            table.to_markdown(disable_numparse=True),
            "",
        ]
        lines += [self._nearest(summaries), ""]
        size = self.split.n_users - 1, self.split.n_rows
        for paragraph in sentences(results, summaries, name if published else None, size):
            lines += [paragraph, ""]
        for ratio, figures in summaries.items():
            lines += [f"### Forget {ratio}", "", compared_table(figures).to_markdown(disable_numparse=True), ""]
        lines += [READ_COMPARED + compiled(self.trained.agreement), ""]
        lines += [f"## Figures\n\nInteractive: [figures.html]({name}/figures.html).", ""]
        for stem, picture in pictures.items():
            lines += [f"![{picture.title}]({name}/{stem}.svg)", ""]
        if "figure_7" not in pictures:
            lines += ["Not all figures are there: the command was stopped, or is still running. Give it again.", ""]
        for paragraph in about_distances(pictures.get("figure_6")):
            lines += [paragraph, ""]
        lines += [
            "## Settings",
            "",
            "```yaml",
            (keys.properties_dir() / "paper.yaml").read_text("utf-8").strip(),
            "```",
            "",
        ]
        different = other_settings(self.trained.arguments, self.config)
        if different:
            lines += ["In this run instead:", "", "```yaml", yaml.safe_dump(different).strip(), "```", ""]
        changed = {key: value for key, value in self.settings.items() if value}
        lines += ["Methods:", "", *(f"- {key}: {_spelled(value)}" for key, value in changed.items()), ""]
        return "\n".join(lines)

    def _nearest(self, summaries):
        """In words: who is nearest to Retrain, and how much faster."""
        distances = {name: each for name, each in from_retrain(summaries).items() if name != ORIGINAL}
        shown = {
            name: {
                "mean distance to Retrain: NDCG@10": f"{gap:.4f}",
                "forget-set AUC": f"{auc:.4f}",
                "times faster": f"{speed:.3g}",
            }
            for name, (gap, auc, speed) in sorted(distances.items(), key=lambda each: each[1])
        }
        frame = pd.DataFrame.from_dict(shown, orient="index")
        text = "Mean over all ratios of the distance to Retrain, nearest in NDCG first"
        if self.seeds < 3:
            text += (
                "; with so few seeds, most of it is the noise between two retrained models, which `fidelity` measures"
            )
        return f"{text}:\n\n{frame.to_markdown(disable_numparse=True)}"


def ranking_table(summaries, published):
    """Table 3: HR@10 and NDCG@10, a row a method and a column a ratio.

    Args:
        summaries (dict): ratio -> `recbole_unlearn.comparison.figures.summary` of it.
        published (dict): of `PUBLISHED`; may be empty.

    Returns:
        pandas.DataFrame of strings.
    """
    rows = {}
    for place, metric in enumerate(METRICS):
        shown = metric.upper().replace("HIT", "HR")
        for name in next(iter(summaries.values())):
            cells = {}
            for number, (ratio, figures) in enumerate(summaries.items()):
                cell = figures[name][f"{metric}|{PROTOCOL}"]
                text = f"{cell['mean']:.4f}" + (f" ± {cell['sd']:.4f}" if cell["sd"] is not None else "")
                if "delta" in cell and name != RETRAIN:
                    text += f" ({cell['delta']:+.4f})"
                if name in published:
                    text += f" [{published[name][place][number]:.3f}]"
                cells[ratio] = text
            rows[f"{shown} {name}"] = cells
    return pd.DataFrame.from_dict(rows, orient="index")


def distances_to_original(sets):
    """Distances of all seeds' weights to their original's, by pair and ratio (Figure 6).

    Args:
        sets (dict): of the results of `Comparison.run`, named by ratio.

    Returns:
        dict: pair -> {ratio in per cent: (mean, standard deviation or None)}.
    """
    result = {}
    for name, pair in TO_ORIGINAL.items():
        for ratio, each in sets.items():
            if name in each["figures"]:
                found = [run[DISTANCE] for run in each["figures"][name]]
                spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
                result.setdefault(pair, {})[float(ratio.rstrip("%"))] = float(np.mean(found)), spread
    return result


def about_distances(picture):
    """Paragraphs on Figure 6, on what is in it; [] where there is none yet."""
    if picture is None:
        return []
    pairs = {series.name for panel in picture.panels for series in panel.series}
    said = {"R/O": ABOUT_DISTANCES, "R paired/O": ABOUT_PAIRED, "S/O": ABOUT_SHARDS, "E/O": ABOUT_SHARDS}
    texts = list(dict.fromkeys(text for pair, text in said.items() if pair in pairs))
    panels = {panel.title: panel for panel in picture.panels}
    if OF_SCORES in panels:
        found = {series.name: (np.median(series.y), max(series.y)) for series in panels[OF_SCORES].series}
        listed = "; ".join(f"{name} {median:.3g}, {largest:.3g}" for name, (median, largest) in found.items())
        texts.append(f"{ABOUT_TURNED} Of the scores, median and largest over the ratios: {listed}.")
    return texts


def mean_and_sd(cell):
    """What `pictures.described` takes: (mean, standard deviation or None)."""
    return cell["mean"], cell["sd"]


def command_of(arguments, settings, quick=False):
    """The command that measures the same; where the data lie is PATH, where the output goes is left out.

    Args:
        arguments: of `paper_arguments`.
        settings (dict): method -> its settings.
    """
    model, dataset, files, given = arguments
    given, default = ({key: parse_value(value) for key, value in each.items()} for each in (given, _defaults(quick)))
    options = {"experiment": "paper", "dataset": dataset}
    if model != "BPR":
        options["model"] = model
    if files[1:]:  # a path from the root would tell whose machine it was
        options["config_files"] = " ".join(Path(file).name if Path(file).is_absolute() else file for file in files[1:])
    if "data_path" in given:
        options["data_path"] = "PATH"
    if len(settings) < len(METHODS):
        options["methods"] = ",".join(settings)
    without = set(keys.OF_RUNS) - {"method_args", "comparison_seeds"}
    options |= {key: given[key] for key in sorted(given.keys() - without) if given[key] != default.get(key)}
    text = " ".join(f"--{key}={shlex.quote(str(value))}" for key, value in options.items())
    return f"python run_unlearn.py {text}{' --quick' if quick else ''}"


def _defaults(quick):
    """Keys that the experiment gives a run, below the user's."""
    return {**(QUICK if quick else FULL).changes, "method_args": METHOD_ARGS}


def other_settings(arguments, config):
    """Keys of a run's configuration that differ from properties/paper.yaml's, those of methods and places apart."""
    model, dataset, _, _ = arguments
    paper = plain(UnlearnConfig(model, dataset, ["properties/paper.yaml"]).final_config_dict)
    own = plain(config.final_config_dict)
    return {key: own[key] for key in own if key not in (*keys.OF_RUNS, "state") and own[key] != paper.get(key)}


def _spelled(settings):
    return ", ".join(f"{key}: {value}" for key, value in settings.items())


def _hardware():
    names = ", ".join(f"{name} {version(name)}" for name in ("recbole", "torch", "numpy", "numba"))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), one thread a training"
    return f"{machine}; Python {platform.python_version()}, {names}."
