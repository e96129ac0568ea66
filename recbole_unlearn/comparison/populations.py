"""An audit of methods, one example at a time: can many unlearned models be told from many that never saw a pair?

N originals are trained with the forget set, N oracles without it and with other random numbers; every method unlearns
from each original. What is said of a pair by these populations is compared (`evaluation.per_example`), beside a floor,
oracles against oracles, and a ceiling, nothing done. No model of these is used to unlearn, nor to choose what is
forgotten: what is *vulnerable* is found on models of their own.

Methods whose own original has another law (shards; certified removal) are compared with that law: with models that they
train without the forget set from the start, partition and all. Against retraining of the one model, they would be told
by what they are.
"""

from pathlib import Path
from typing import Any

import numpy as np
from recbole.config import Config

from recbole_unlearn.comparison.asked import asked
from recbole_unlearn.comparison.figures import SETS, kind_and_number
from recbole_unlearn.comparison.kept import data_files, measured_by, named, own_keys, sources
from recbole_unlearn.comparison.panel import Panel, Views
from recbole_unlearn.comparison.seeds import agreement, available_cores, begin_worker, in_processes, opened, quiet
from recbole_unlearn.comparison.ways import ways_of
from recbole_unlearn.data.forget import ForgetRequest, checked
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError, about
from recbole_unlearn.evaluation.forgetting import query_scores
from recbole_unlearn.evaluation.per_example import auc, effect_left, klom, log_ratios, told_apart
from recbole_unlearn.methods import METHODS, all_settings, names_in
from recbole_unlearn.methods.base import Task
from recbole_unlearn.methods.shards import Sharded
from recbole_unlearn.settings.config import changed
from recbole_unlearn.settings.keys import KEYS
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import replacing, scratch_folder
from recbole_unlearn.training.fit import LIMIT, train, training_settings

ORIGINAL, ORACLE = "nothing done", "retrained"
AUDITED = ["ubpr", "scif", "ifru", "rrl", "gradient_ascent", "fine_tune", "ours"]  # those for the model, by default
FEWER, FEW = 8, 16  # times fewer models of methods that train many beforehand; but so many, where there are
OTHERS = 1_000_000  # seeds of oracles, and of the models that find what is vulnerable, are so far from the originals'
SCOUTED = 1 << 15  # rows that these are asked for at once
SCOUTS, HIDDEN = 48, 0.2  # models that find what is vulnerable; share of the interactions that each never sees
BY_VULNERABILITY = ("mixed", "vulnerable")  # kinds of forget sets
HALVES = 100  # random choices of n models of each population
INTERVAL = (0.025, 0.975)


def audited(names: list[str], config: Config, method_args: dict | None = None) -> dict[str, tuple[str, dict]]:
    """What is audited: name in the tables -> (name of the method, its settings). Of ours each of `ways_of` a model; of
    other methods the settings of properties/method hold.

    Raises:
        InputError: settings that no model can have which never saw the forget set, or settings of ours.
    """
    found = {}
    for name, settings in all_settings([name for name in names if name != "retrain"], method_args).items():
        if settings.get("ideal"):
            raise InputError(f"{name}: an audit has models that never saw what is forgotten; leave ideal out")
        if name == "ours" and (method_args or {}).get(name):
            raise InputError("method_args: an audit has ours in each way that the model has; leave ours out")
        own = ways_of(config) if name == "ours" else {name: settings}
        found |= {way: (name, keys) for way, keys in own.items()}
    return found


def set_names(value: object, config: Config) -> list[str]:
    """Names of the forget sets to audit on: ``mixed:N`` (half of them at random, half vulnerable), ``vulnerable:N``,
    ``users:N``, ``items:N`` (at random), or a kind of `SETS`.

    Raises:
        InputError: another kind, or no number that there can be.
    """
    names = names_in(value if value is not None else "mixed:200", "comparison_sets")
    for name in names:
        _request(name, config)
    return names


def _request(name, config):
    """(kind, `ForgetRequest`) of a forget set's name; of an audit's own kinds, a request for a count."""
    try:
        kind, number = kind_and_number(name)
    except ValueError:
        raise InputError(f"comparison_sets: {name!r} must be KIND:NUMBER") from None
    if kind not in (*SETS, *BY_VULNERABILITY, "users", "items"):
        raise InputError(f"comparison_sets: there is no kind {kind!r} to audit on")
    with about(f"comparison_sets: {name}"):
        return kind, ForgetRequest.of(kind if kind in SETS else "count", number, config)


class Audit:
    """Trains the populations, and compares them.

    A run that was cut off goes on where it stopped: of each model, what the panel saw is kept, and nothing else.

    Args:
        arguments: ``(model, dataset, config_file_list, config_dict)``.
        folder: where it is kept.
        methods: as `audited` returns them.
        models: N, at least 16.
        processes: trained at once, one thread each; default: `available_cores`.
        show_progress: a bar.
    """

    def __init__(self, arguments, folder, methods, models=128, processes=None, show_progress=True):
        model, dataset, files, given = arguments
        self.arguments = (model, dataset, files, dict(given or {}))
        self.config, self.split = opened(self.arguments)
        self.compiled = False
        self.folder, self.methods, self.models = Path(folder), methods, models
        self.processes, self.show_progress = processes or available_cores(), show_progress
        data = [self.split.fingerprint, data_files(self.config)]
        self.data = [training_settings(self.config), *data, self.config["seed"], self.compiled]
        self.agreement = None  # of compiled training with RecBole's; None: the latter trains
        self._panels: dict[str, Panel] = {}
        # Methods that train a model of their own beforehand -> populations of what it is before a request, and of what
        # it is where the forget set never was.
        own = [way for way, (name, _) in methods.items() if METHODS[name].has_own_original()]
        self.own = {way: (f"{way}, {ORIGINAL}", f"{way}, {ORACLE}") for way in own}
        self._way = {each: way for way, both in self.own.items() for each in both} | {way: way for way in methods}

    def run(self, names):
        """Audit all methods on forget sets, by name (`set_names`).

        Returns:
            dict: name -> ``interactions``; ``figures``, `compared` of the original and of each method, and of its own
            original where it has one; ``floors``, of the oracles for each n (as text) that occurs there, the greatest
            first, and of a method's own oracles under their name; ``against``, which of these is the floor of a method
            that has its own, or of its original.

        Raises:
            InputError: too few models for the figures, or a set that the data do not have.
        """
        KEYS["audit_models"].checked(self.models)
        for name in names:
            self.at_random(name)  # before anything is trained
        with quiet():
            found = agreement(self.config, self.split, self.folder)
            self.compiled = self.data[-1] = found is not None and found <= LIMIT
            self.agreement = found if self.compiled else None
            sets = {name: self.rows(name) for name in names}
            panels = {name: self.panel(name, rows) for name, rows in sets.items()}
            jobs = []
            for seed in range(self.models):
                unlearned, oracles = (
                    [(name, way) for name in names for way in some if not self._file(panels[name], way, seed).exists()]
                    for some in (self._of(seed), self._oracles(seed))
                )
                jobs += [("unlearned", seed, sets, unlearned)] if unlearned else []
                for name in sets:
                    wanted = [each for each in oracles if each[0] == name]
                    jobs += [("oracle", seed, sets, wanted)] if wanted else []
            self._work(jobs, "Audit")
            return {name: self._result(panels[name]) for name in names}

    def _of(self, seed):
        """Populations that have a model of the original of this number."""
        own = [before for way, (before, _) in self.own.items() if self._has(way, seed)]
        return [ORIGINAL, *own, *(way for way in self.methods if self._has(way, seed))]

    def _oracles(self, seed):
        """Populations that have a model of the oracle of this number."""
        return [ORACLE, *(own for way, (_, own) in self.own.items() if self._has(way, seed))]

    def _has(self, way, seed):
        """Whether a method has a model of this number."""
        many = issubclass(METHODS[self.methods[way][0]], Sharded)
        return not many or seed < max(self.models // FEWER, min(FEW, self.models))

    # -- what is forgotten

    def at_random(self, name):
        """Sorted rows of a forget set; of one that goes by vulnerability, for which models are trained, as many others.

        Raises:
            InputError: more than the data have.
        """
        split, (kind, request) = self.split, _request(name, self.config)
        with about(f"comparison_sets: {name}"):
            if kind not in ("users", "items"):
                return request.rows(split)
            ids = split.users if kind == "users" else split.items
            there, rng = np.unique(ids), np.random.default_rng(request.seed)
            if request.value > len(there):
                raise InputError(f"only {len(there)} {kind} have training interactions; ask for fewer")
            return checked(split, np.flatnonzero(np.isin(ids, rng.choice(there, request.value, replace=False))))

    def rows(self, name):
        """Sorted rows of a forget set."""
        found, (kind, request) = self.at_random(name), _request(name, self.config)
        if kind not in BY_VULNERABILITY:
            return found
        order = np.argsort(-self._vulnerability(), kind="stable")
        if kind == "vulnerable":
            return np.sort(order[: request.value])
        chosen = order[: request.value // 2]
        rest, rng = np.setdiff1d(np.arange(self.split.n_rows), chosen), np.random.default_rng(request.seed)
        return np.sort(np.concatenate([chosen, rng.choice(rest, request.value - len(chosen), replace=False)]))

    def _vulnerability(self):
        """Of each interaction, how much its margin falls where a model has not seen it, in standard deviations."""
        jobs = [("scout", seed, {}, []) for seed in range(SCOUTS) if not self._scout(seed).exists()]
        self._work(jobs, "What is vulnerable")
        sums = np.zeros((2, 3, self.split.n_rows))
        for seed in range(SCOUTS):
            with np.load(self._scout(seed)) as kept:
                margin, hidden = kept["margin"].astype(np.float64), kept["hidden"]
            for power in range(3):
                sums[0, power] += np.where(hidden, 0, margin**power)
                sums[1, power] += np.where(hidden, margin**power, 0)
        number = np.maximum(sums[:, 0], 1)
        mean = sums[:, 1] / number
        variance = np.maximum(sums[:, 2] / number - mean**2, 0).sum(0)
        change = mean[0] - mean[1]
        return np.where(sums[1, 0] >= 3, change / np.sqrt(variance + np.median(variance)), -np.inf)

    def _scout(self, seed):
        return self.folder / f"scout-{named([*self.data, SCOUTS, HIDDEN])}-{seed}.npz"

    # -- populations

    def _file(self, panel, way, seed):
        """Where a view is kept."""
        name, settings = self.methods.get(self._way.get(way, way), (None, None))
        method = [measured_by(METHODS[name]), own_keys(self.config)] if name else None
        judge = sources("comparison.panel", "evaluation.forgetting", "training.fit")
        what = [*self.data, panel.checksum, way, settings, judge, method]
        return self.folder / f"{named(what)}-{seed}.npz"

    def _work(self, jobs, title):
        """Do jobs, in processes of their own."""
        if jobs:
            self.folder.mkdir(parents=True, exist_ok=True)
            plain = self.arguments, self.folder, self.methods, self.models, self.compiled
            in_processes(_do, jobs, self.processes, _begin, plain, self.show_progress, title)

    def views(self, panel, way):
        """`Views` of a population."""
        last = [seed for seed in range(self.models) if way in (*self._of(seed), *self._oracles(seed))]
        kept = []
        for seed in last:
            with np.load(self._file(panel, way, seed)) as file:
                kept.append((file["margin"], file["top"]))
        return Views(*(np.stack(each) for each in zip(*kept, strict=True)))

    def _result(self, panel):
        originals, oracles = self.views(panel, ORIGINAL), self.views(panel, ORACLE)
        ways = (way for way in (ORIGINAL, *self.methods) if way not in self.own)
        figures = {way: compared(panel, originals, oracles, self.views(panel, way)) for way in ways}
        numbers = sorted({found["n"] for found in figures.values()}, reverse=True)
        floors, against = {str(n): compared(panel, originals, oracles, n=n) for n in numbers}, {}
        for way, (before, oracle) in self.own.items():
            originals, oracles = self.views(panel, before), self.views(panel, oracle)
            for each in (before, way):
                figures[each] = compared(panel, originals, oracles, self.views(panel, each))
                against[each] = oracle
            floors[oracle] = compared(panel, originals, oracles, n=figures[way]["n"])
        return {"interactions": len(panel.rows), "figures": figures, "floors": floors, "against": against}

    def panel(self, name, rows):
        """The `Panel` of a forget set."""
        if name not in self._panels:
            self._panels[name] = Panel(self.split, rows)
        return self._panels[name]

    # -- one model

    def trained(self, folder, rows, seed, log):
        """(checkpoint, model) of a training without some rows."""
        config = changed(self.config, compiled=self.compiled)
        path = Path(folder) / "model.pth"
        model, _, _ = train(config, self.split, path, rows, seed, log)
        return path, model.eval()

    def unlearn(self, seed, sets, wanted):
        """Train an original, unlearn by each method, and keep what the panel sees."""
        seed_of_model = self.config["seed"] + seed
        with scratch_folder() as folder:
            path, model = self.trained(folder, [], seed_of_model, True)
            stored, log = checkpoints.load(path)
            for name, way in wanted:
                panel = self.panel(name, sets[name])
                if way == ORIGINAL:
                    self._keep(panel, way, seed, model)
                    continue
                with about(way):
                    method = self._method(way, self.split, seed_of_model, stored, log, path, folder)
                    if self.methods[self._way[way]][0] != "ours":  # whose preparation loads kernels
                        method.prepare(sets[name])
                    found = method.forget(sets[name]).model if way in self.methods else method.original()
                    self._keep(panel, way, seed, found)

    def retrain(self, seed, sets, wanted):
        """Train oracles of one forget set, with random numbers of their own."""
        ((name, _), *_), ways = wanted, [way for _, way in wanted]
        panel, rows, seed_of_model = self.panel(name, sets[name]), sets[name], self.config["seed"] + OTHERS + seed
        own = [way for way in ways if way != ORACLE]
        with scratch_folder() as folder:
            path, model = self.trained(folder, rows, seed_of_model, bool(own))
            if ORACLE in ways:
                self._keep(panel, ORACLE, seed, model)
            if own:
                stored, log = checkpoints.load(path)
                rest = Split.of(self.config, self.split.remaining(rows), self.split.valid, self.split.test)
            for way in own:
                with about(way):
                    method = self._method(way, rest, seed_of_model, stored, log, path, folder)
                    method.prepare(rows[:0])
                    self._keep(panel, way, seed, method.original())

    def _method(self, way, split, seed, stored, log, path, folder):
        """The method of a population, about to forget; one with models of its own trains them as the original was."""
        method, settings = self.methods[self._way[way]]
        config = changed(self.config, compiled=self.compiled) if self._way[way] in self.own else self.config
        return METHODS[method](Task(config, split, seed, stored, log, path, folder / method), settings)

    def scout(self, seed):
        """Train without a random share, and keep every interaction's margin."""
        split, rng = self.split, np.random.default_rng([self.config["seed"], seed])
        hidden = rng.random(split.n_rows) < HIDDEN
        with scratch_folder() as folder:
            _, model = self.trained(folder, np.flatnonzero(hidden), self.config["seed"] + 2 * OTHERS + seed, False)
        margin = np.empty(split.n_rows, np.float32)
        size = SCOUTED if split.sequential else split.n_rows  # of sequential models, each row has a history
        for start in range(0, split.n_rows, size):
            rows = np.arange(start, min(start + size, split.n_rows))
            questions = asked(split, rows)
            for part, found in query_scores(model, questions.queries):
                pairs, own = questions.pairs_in(part)
                margin[rows[pairs]] = found[own, split.items[rows[pairs]]] - found.mean(1)[own]
        with replacing(self._scout(seed)) as file:
            np.savez(file, margin=margin, hidden=hidden)

    def _keep(self, panel, way, seed, model):
        with replacing(self._file(panel, way, seed)) as file:
            np.savez_compressed(file, **panel.view(model))


def _begin(arguments, folder, methods, models, compiled):
    global _audit
    begin_worker()
    _audit = Audit(arguments, folder, methods, models, 1, False)
    _audit.compiled = _audit.data[-1] = compiled


def _do(kind, seed, sets, wanted):
    if kind == "scout":
        _audit.scout(seed)
    elif kind == "oracle":
        _audit.retrain(seed, sets, wanted)
    else:
        _audit.unlearn(seed, sets, wanted)


# -- comparing


def compared(
    panel: Panel, originals: Views, oracles: Views, unlearned: Views | None = None, n: int | None = None
) -> dict[str, Any]:
    """Figures of a method, over `HALVES` random choices of n models of each population.

    Args:
        panel: whose pairs they are.
        originals, oracles, unlearned: ``unlearned[i]`` from ``originals[i]``; None: the floor, oracles against others
            of them.
        n: default: as many as there are, at most half of the oracles.

    Returns:
        dict: figure -> ``median``, and the ``low`` and ``high`` end of the interval that holds 95 % of the choices;
        ``n``; ``pairs``, U-LiRA's AUC of each forgotten pair in the first of the choices.
    """
    rng, floor = np.random.default_rng(0), unlearned is None
    population = oracles if unlearned is None else unlearned
    n = n or min(len(population.margin), len(oracles.margin) // 2)
    each, forgotten, found, pairs = _of_each(panel, originals, population), panel.groups["forgotten"], [], []
    for _ in range(HALVES):
        order = rng.permutation(len(oracles.margin))
        theirs, rest = order[:n], order[n:]
        own = rest[:n] if floor else rng.permutation(len(population.margin))[:n]
        figures = _apart(panel, originals, oracles, population, own, theirs, None if floor else rest)
        found.append(figures | {key: float(values[own].mean()) for key, values in each.items()})
        if not pairs:
            chosen = (population.margin[own], oracles.margin[theirs])
            ratios = log_ratios(*(margin[:, forgotten].astype(np.float64) for margin in chosen))
            pairs = np.round(auc(*ratios), 4).tolist()
    values = {key: np.array([figures[key] for figures in found]) for key in found[0]}
    return {key: _interval(value) for key, value in values.items()} | {"n": n, "pairs": pairs}


def _interval(values):
    low, middle, high = np.quantile(values, (INTERVAL[0], 0.5, INTERVAL[1]))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def _of_each(panel, originals, population):
    """Figures of single models: figure -> ``[models]``."""
    forgotten = panel.groups["forgotten"]
    number = min(len(population.margin), len(originals.margin))
    change = originals.margin[:number] - population.margin[:number]
    figures = panel.usefulness(population.top)
    figures["churn"] = panel.churn(originals.top[:number], population.top[:number])
    for name in ("retained, touched users", "held out"):
        group = panel.groups[name]
        if group.stop > group.start:
            told = [auc(one[forgotten], one[group]) for one in change]
            figures[f"before and after, {name}"] = np.array(told)
    return figures


def _apart(panel, originals, oracles, population, own, theirs, rest):
    """Figures of one choice of models; ``rest``: other oracles, if any."""
    forgotten = panel.groups["forgotten"]
    first, second = population.margin[own].astype(np.float64), oracles.margin[theirs].astype(np.float64)
    figures = told_apart(first[:, forgotten], second[:, forgotten])
    for name, group in panel.groups.items():
        if name != "forgotten" and group.stop > group.start:
            figures[f"klom, {name}"] = float(np.median(klom(first[:, group], second[:, group])))
    # of models that are not compared: what these share by chance with the direction would count as an effect
    before = np.arange(len(originals.margin)) if rest is None else np.setdiff1d(np.arange(len(originals.margin)), own)
    away = np.arange(len(oracles.margin)) if rest is None else rest
    direction = originals.margin[before][:, forgotten].mean(0) - oracles.margin[away][:, forgotten].mean(0)
    spread = oracles.margin[:, forgotten].std(0, ddof=1)
    figures["effect left"] = effect_left(first[:, forgotten], second[:, forgotten], direction, spread)
    return figures
