"""Compares methods, and RecBole's other models, on one split: how near to Retrain, at what cost.

Originals and retrained models come from `TrainedSeeds`; every figure is kept in its folder, by what determines it, as
soon as it is there. A comparison that was cut off goes on where it stopped.
"""

import hashlib
import json
from contextlib import contextmanager

import numpy as np
import torch
from recbole.utils import ModelType, get_model
from tqdm import tqdm

import recbole_unlearn
from recbole_unlearn.comparison.beside import beside, first_rows
from recbole_unlearn.comparison.judged import ORIGINAL, columns, judged
from recbole_unlearn.comparison.kept import measured_by, own_keys, prepared_by
from recbole_unlearn.comparison.other_models import model_arguments, train_any
from recbole_unlearn.comparison.seeds import SeedRun, TrainedSeeds, opened, quiet
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.devices import read
from recbole_unlearn.errors import InputError, about
from recbole_unlearn.evaluation.geometry import models_distance
from recbole_unlearn.influence.threads import limited_threads
from recbole_unlearn.methods import METHODS, names_in, settings_of
from recbole_unlearn.methods.base import Forgotten, Task
from recbole_unlearn.models.support import refusal
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.shown import plain
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import Locked, scratch_folder, write_atomically
from recbole_unlearn.training.fit import new_model, training_settings
from recbole_unlearn.training.trainer import judge

RETRAIN = "retrain"
DISTANCE = "weight_distance"  # to the original; of the original, to its initialisation
SETS = ("ratio", "count", "core_users", "edge_users", "popular_items", "rare_items")  # none of which names anybody


def kind_and_number(text):
    """What a forget set's ``KIND:NUMBER`` says; ValueError where there is no number."""
    kind, _, number = text.partition(":")
    return kind, float(number) if kind == "ratio" else int(number)


def forget_sets(config, split):
    """The forget sets to compare on: those of ``comparison_sets``, else the one that the ``forget_*`` keys state.

    Returns:
        dict: name -> sorted rows of the split. No name says who or what is forgotten.

    Raises:
        InputError: what `ForgetRequest` refuses, or a kind of set that is not in `SETS`.
    """
    return {name: request.rows(split) for name, request in requests(config).items()}


def requests(config):
    """As `forget_sets`, before there is a split: name -> ForgetRequest."""
    if config["comparison_sets"] is None:
        request = ForgetRequest.from_config(config)
        shown = f" {request.value}" if request.kind in SETS else ""
        return {f"{request.kind}{shown}": request}
    result = {}
    for text in names_in(config["comparison_sets"], "comparison_sets"):
        kind, colon, _ = text.partition(":")
        if kind not in SETS or not colon:
            raise InputError(f"comparison_sets: {text!r} is not KIND:VALUE with a kind among {', '.join(SETS)}")
        try:
            _, value = kind_and_number(text)
        except ValueError:
            raise InputError(f"comparison_sets: {text!r} must name a number after the colon") from None
        result[f"{kind} {value}"] = ForgetRequest.of(kind, value, config)
    return result


class Comparison:
    """Figures of methods and models on one split.

    Args:
        trained (TrainedSeeds): split, configuration and cache.
        settings (dict): method name -> its settings, as `methods.all_settings` returns them.
        seeds (int): M, of originals, retrained models and other models; the first is the configuration's.
        show_progress (bool)
    """

    def __init__(self, trained, settings, seeds=1, show_progress=False):
        self.trained, self.settings, self.show_progress = trained, settings, show_progress
        self.config, self.split = trained.config, trained.split
        self.seeds = [self.config["seed"] + n for n in range(seeds)]
        self.folder = trained.folder / "results"
        self.folder.mkdir(exist_ok=True)
        self._tasks, self._trainer, self._wanted = {}, None, np.empty(0, np.int64)

    def run(self, sets, models=(), partial=False):
        """Measure everything that is not kept yet.

        Args:
            sets (dict): name -> sorted rows to forget.
            models: names of other RecBole models, see `other_models`.
            partial (bool): whether a method that raises InputError is left out, where others stand.

        Returns:
            dict of plain values: ``seeds``, ``settings`` of methods, ``agreement`` of compiled training with RecBole's
            (`TrainedSeeds`), and ``sets``: name -> ``interactions``, ``notes`` (sentences to read the table by),
            ``refused`` (method -> why it is left out) and ``figures``, which hold a list over seeds for 'original',
            'retrain', each method and each model, and for 'MODEL, retrained' and 'MODEL, unlearned' where ours makes
            the model forget.

        Raises:
            InputError: a model that cannot be judged on this split or these forget sets.
        """
        notes = {name: self._check_histories(models, rows) for name, rows in sets.items()}
        results = {}
        with quiet(), one_thread():
            self._wanted = np.unique(np.concatenate(list(sets.values())))
            originals = [SeedRun.original(seed) for seed in self.seeds]
            retrained = [SeedRun.without(seed, rows) for rows in sets.values() for seed in self.seeds]
            self.trained.train(originals + retrained, self.show_progress)
            for name, rows in sets.items():
                names = [ORIGINAL, RETRAIN, *(method for method in self.settings if method != RETRAIN)]
                jobs = [(method, seed) for method in names for seed in self.seeds]
                figures, refused = {method: [] for method in names}, {}
                others = len(names) > 3 or models
                for method, seed in tqdm(jobs, f"Compare on {name}", ncols=100, disable=not self.show_progress):
                    try:
                        if method not in refused:
                            figures[method].append(self._figures(method, seed, rows))
                    except InputError as error:
                        if not (partial and others) or method in (ORIGINAL, RETRAIN) or isinstance(error, Locked):
                            raise
                        refused[method] = str(error)
                for method in refused:
                    del figures[method]
                for model in models:
                    runs = [self._of_model(model, seed, rows) for seed in self.seeds]
                    figures[model] = runs
                    for part in ("retrained", "unlearned"):
                        if part in runs[0]:
                            figures[f"{model}, {part}"] = [run.pop(part) for run in runs]
                told_of = {"notes": notes[name], "refused": refused, "figures": figures}
                results[name] = {"interactions": len(rows), **told_of}
        told = {"seeds": self.seeds, "settings": self.settings, "models": list(models), "sets": results}
        return told | {"agreement": self.trained.agreement}

    # -- what is kept

    def _kept(self, what, compute):
        """Result of ``compute()``, from the file that is named by everything ``what`` (plain values) says."""
        text = json.dumps(what, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        if not file.exists():
            write_atomically(file, json.dumps(plain(compute())).encode())
        return json.loads(file.read_text())

    def _evaluated_by(self):
        """Everything beside model and method that a figure depends on."""
        others = {key: self.config[key] for key in ("seed", "metrics", "topk", "metric_decimal_place")}
        return {**own_keys(self.config), **plain(others), "version": recbole_unlearn.__version__}

    # -- methods

    def _figures(self, name, seed, rows):
        original = self.trained.path(SeedRun.original(seed)).stem
        retrained = self.trained.path(SeedRun.without(seed, rows)).stem
        settings = self.settings.get(name)
        method = METHODS.get(name)
        what = [original, retrained, name, settings, self._evaluated_by(), measured_by(method), DISTANCE]
        if settings and settings.get("ideal"):
            what.append(self._wanted.tolist())
        with about(name):
            return self._kept(what, lambda: self.measure(name, seed, rows))

    def measure(self, name, seed, rows):
        """Figures of one method on one original and forget set."""
        if name == ORIGINAL:
            run = SeedRun.original(seed)
            forgotten = Forgotten(self.task(seed).model(), self.trained.seconds(run))
            costs = {"prepare_seconds": 0.0, "seconds": forgotten.seconds}
            start = new_model(self.config, self.split, seed)
            return self._evaluate(forgotten.model, rows) | costs | {DISTANCE: models_distance(forgotten.model, start)}
        if name == RETRAIN:
            forgotten, before, prepare_seconds = self.retrained(seed, rows), {}, 0.0
        else:
            settings = self.settings[name]
            method = METHODS[name](self.task(seed, name, settings), settings)
            prepare_seconds = method.prepare(self._wanted)
            before = {ORIGINAL: self._evaluate(method.original(), rows)} if method.has_own_original() else {}
            forgotten = method.forget(rows)
        distance = {DISTANCE: models_distance(forgotten.model, self.task(seed).model())}
        return self._with_costs(forgotten, prepare_seconds, rows) | before | distance

    def _with_costs(self, forgotten, prepare_seconds, rows, other=None):
        costs = {"prepare_seconds": prepare_seconds, "seconds": forgotten.seconds, "details": forgotten.details}
        return self._evaluate(forgotten.model, rows, True, other) | costs

    def retrained(self, seed, rows, paired=False):
        """What `methods.retrain.Retrain` gives, from the cache; or the ``paired`` run, see `again.train_paired`."""
        run = SeedRun.without(seed, rows, paired)
        state = read(self.trained.path(run))
        model = new_model(self.config, self.split, seed, self.split.remaining_dataset(rows))
        model.load_state_dict(state["state_dict"])
        return Forgotten(model.eval(), self.trained.seconds(run), {"epochs": state["epoch"] + 1})

    def task(self, seed, method=ORIGINAL, settings=None):
        """The `Task` of a trained original, for a method with some settings."""
        path = self.trained.path(SeedRun.original(seed))
        if seed not in self._tasks:
            self._tasks[seed] = checkpoints.load(path)
        stored, log = self._tasks[seed]
        text = json.dumps([settings, prepared_by(METHODS.get(method))])
        folder = path.with_suffix(f".{method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
        return Task(self.config, self.split, seed, stored, log, path, folder)

    def _evaluate(self, model, rows, forgotten=False, other=None):
        if self._trainer is None:
            self._trainer = judge(self.config, self.split, new_model(self.config, self.split))
        return judged(self._trainer, self.split, model, rows, forgotten, other)

    # -- other models

    def _of_model(self, name, seed, rows):
        """Figures of another RecBole model, trained on the same split; after unlearning too where it can forget."""
        model, dataset, files, given = self.trained.arguments
        arguments = model_arguments(name, model, dataset, files, given)
        settings = training_settings(UnlearnConfig(*arguments))
        ours = METHODS["ours"] if refusal(UnlearnConfig(*arguments)) is None else None
        data = [self.split.fingerprint_without(rows), self.split.fingerprint, self.trained.files]
        what = ["model", name, settings, *data, seed, self._evaluated_by(), measured_by(ours)]
        if ours:
            what += ["retrained", settings_of("ours")]
        with about(f"compare_models: {name}"):
            return self._kept(what, lambda: self.measure_model(name, arguments, seed, rows))

    def measure_model(self, name, arguments, seed, rows):
        if refusal(UnlearnConfig(*arguments)) is None:
            return self._measure_forgetting_model(name, arguments, seed, rows)
        config, own = opened(arguments)
        other = beside(name, self.split, own)
        with scratch_folder() as scratch:
            model, seconds = train_any(config, own, seed, scratch)
        return self._evaluate(model, rows, other=other) | {"prepare_seconds": 0.0, "seconds": seconds}

    def _measure_forgetting_model(self, name, arguments, seed, rows):
        trained = TrainedSeeds(arguments, self.trained.folder, self.trained.processes)
        other = beside(name, self.split, trained.split)
        own = other.rows(rows)
        comparison = Comparison(trained, {}, 1, self.show_progress)
        run = SeedRun.original(seed)
        trained.train([run, SeedRun.without(seed, own)], self.show_progress)
        task = comparison.task(seed)
        ours = METHODS["ours"](task, settings_of("ours"))
        prepare_seconds = ours.prepare(own)
        costs = {"prepare_seconds": 0.0, "seconds": trained.seconds(run)}
        return self._evaluate(task.model(), rows, other=other) | {
            **costs,
            "retrained": self._with_costs(comparison.retrained(seed, own), 0.0, rows, other),
            "unlearned": self._with_costs(ours.forget(own), prepare_seconds, rows, other),
        }

    def _check_histories(self, models, rows):
        """What is to be known of sequential models that are compared with one that is none, as a list of sentences.

        Raises:
            InputError: nothing of the forget set, or a held-out interaction, is the first target of such a model.
        """
        names = [name for name in models if get_model(name).type == ModelType.SEQUENTIAL]
        if not names or self.split.sequential:
            return []
        which = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        trained = np.bincount(self.split.users, minlength=self.split.n_users)
        judged = [loader._dataset for loader in (self.split.valid, self.split.test)]
        judged = np.unique(np.concatenate([data.inter_feat[data.uid_field].numpy() for data in judged]))
        if short := int((trained[judged] < 2).sum()):
            raise InputError(
                f"compare_models: {which} cannot be trained on users of whom fewer than two training interactions "
                f'remain ({short} users); give --user_inter_num_interval="[4,inf)"'
            )
        first = first_rows(self.split)
        alone = np.intersect1d(first, rows)
        if len(alone) == len(rows):
            raise InputError(
                f"compare_models: the forget set holds nothing but users' first interactions, which {which} cannot "
                "forget; leave it out or choose another forget set"
            )
        left = len(np.intersect1d(self.split.users[alone], np.delete(self.split.users, rows)))
        return [
            f"{which}: asked with the history before an interaction, the validation item included when tested. Of the "
            f"{len(rows)} forgotten interactions {len(alone)} open a history: these are no target, not in the "
            f"forget-set AUC, and stay in the histories of {left} users."
        ]


@contextmanager
def one_thread():
    """All methods get one thread, as Retrain has in `TrainedSeeds`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with limited_threads(1):
            yield
    finally:
        torch.set_num_threads(before)


def summary(figures):
    """Figures of each method over seeds.

    Args:
        figures (dict): name -> list over seeds, as in ``sets`` of `Comparison.run`.

    Returns:
        dict: name -> figure -> {``mean``, ``sd`` (None for one seed)}; for the original and the methods also ``delta``
        (to the mean of Retrain) and ``z`` (delta in standard deviations of Retrain, None for one seed). Figures are
        'METRIC|PROTOCOL', 'forget_auc', 'forget_auc|original' (of methods with a model of their own, before the
        request), 'prepare_seconds', 'seconds' (of the request; of training for models that were trained) and, for
        methods, 'speed_up' over Retrain.
    """
    values = {name: columns(runs) for name, runs in figures.items()}
    reference, result = values[RETRAIN], {}
    for name, own in values.items():
        row = result[name] = {}
        for key, numbers in own.items():
            row[key] = {"mean": float(np.mean(numbers)), "sd": _sd(numbers)}
            if key in reference and "seconds" not in key and (name in METHODS or name == ORIGINAL):
                spread, delta = _sd(reference[key]), row[key]["mean"] - float(np.mean(reference[key]))
                row[key] |= {"delta": delta, "z": delta / spread if spread else None}
        if name in METHODS and name != RETRAIN:
            row["speed_up"] = {"mean": float(np.mean(reference["seconds"]) / np.mean(own["seconds"])), "sd": None}
    return result


def _sd(numbers):
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
