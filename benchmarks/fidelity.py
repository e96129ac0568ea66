"""Fidelity to retraining over seeds, for random interactions, whole users and whole items.

    python benchmarks/fidelity.py --dataset=ml-100k
    python benchmarks/fidelity.py --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml \\
        --sets=ratio:0.0001
    python benchmarks/fidelity.py COMMAND --help            # ablation, reoptimise, paper-ratios, picture

Trained models are cached in --cache; a run that was cut off goes on. Writes Markdown, CSV, LaTeX and JSON to --output,
where a page that is there is not replaced unless --again is given.
"""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import common
import numpy as np
import pandas as pd
import torch
from common import AGAIN, CACHED, CHANGES, RESULTS, ROOT, changed_keys, mean_sd, option, read_json, setting, takes
from scipy.optimize import minimize

from recbole_unlearn.comparison.fidelity import METHODS
from recbole_unlearn.comparison.fidelity import fidelity as measured
from recbole_unlearn.comparison.figures import SETS, kind_and_number
from recbole_unlearn.comparison.seeds import opened
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.newton import Objective, flat, minimise, nearest_rotation
from recbole_unlearn.influence.objective import pool_return
from recbole_unlearn.influence.operators import UserTriples
from recbole_unlearn.reports.tables import write_fidelity
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.choose import Auto
from recbole_unlearn.unlearners.influence import PAPER, Influence


def forget_rows(split, kind, size, seed=2020):
    """Rows of ``size`` random interactions, users or items drawn at random, or of another kind of `ForgetRequest`."""
    if kind not in ("users", "items"):
        return ForgetRequest(kind, size, seed).rows(split)
    rng = np.random.default_rng(seed)
    users = rng.choice(np.unique(split.users), min(int(size), split.n_users), replace=False)
    items = rng.choice(np.unique(split.items), min(int(size), split.n_items), replace=False)
    return np.flatnonzero(np.isin(split.users, users) if kind == "users" else np.isin(split.items, items))


def wanted(options, stem):
    """The forget sets, each with its (kind, number) and the name of its page, which must not be there yet."""
    found = {}
    for text in options.sets.split():
        try:
            kind, number = kind_and_number(text)
            if kind not in (*SETS, "users", "items"):
                raise ValueError
        except ValueError:
            kinds = ", ".join((*SETS, "users", "items"))
            raise InputError(f"sets: {text!r} must be KIND:NUMBER with a kind among {kinds}") from None
        found[text] = (kind, number), f"{stem}-{text.replace(':', '-')}"
    common.check_new(options, *(name for _, name in found.values()))
    return found


def report(trained, options, methods, setting, sets):
    """Measure the methods on each of the `wanted` forget sets; print the tables and write them."""
    options.output.mkdir(parents=True, exist_ok=True)
    for text, (chosen, name) in sets.items():
        rows = forget_rows(trained.split, *chosen)
        results = measured(trained, rows, options.seeds, methods)
        what = f"{options.dataset}, {setting} {options.model}, forget {text} ({len(rows)} interactions)"
        title = f"{what}, {options.seeds} seeds"
        print(write_fidelity(results, title, options.output, name), flush=True)


OF_SETS = "forget sets, KIND:SIZE, separated by spaces; also popular_items, core_users, ..."
COMPILED = option(False, "train by the compiled kernels, after they were compared with RecBole's trainer")


@takes(
    model="BPR",
    **CACHED,
    sets=option("count:200 users:20 items:20", OF_SETS),
    methods=option("", f"separated by semicolons; default all: {'; '.join(METHODS)}"),
    seeds=6,
    changes=CHANGES,
    compiled=COMPILED,
    output=RESULTS / "fidelity",
    again=AGAIN,
)
def fidelity(options):
    changes, names = changed_keys(options), options.methods.split("; ") if options.methods else []
    if unknown := set(names) - set(METHODS):
        raise InputError(f"there are no methods {', '.join(sorted(unknown))}; there are {'; '.join(METHODS)}")
    words = "-".join([setting(options), *(f"{key}={value}" for key, value in changes.items())])
    model = "" if options.model == "BPR" else f"{options.model}-"
    sets = wanted(options, f"{options.dataset}-{model}{words}")
    trained = common.trained_seeds(options, options.model, compiled=options.compiled, **changes)
    report(trained, options, {name: METHODS[name] for name in names} or None, words, sets)


# Ablation

STEP = {"method": "influence"}
VARIANTS = {
    "nothing done": None,
    **{f"step, adam damping {c}": {**STEP, "damping_strength": c} for c in (0.25, 0.5, 1.0, 2.0, 4.0)},
    "step, scalar damping 1e-3": {**STEP, "damping": "scalar", "damping_strength": 1e-3},
    "step, scalar damping 1e-4": {**STEP, "damping": "scalar", "damping_strength": 1e-4},
    "step, last epoch's triples": {**STEP, "log_epochs": 1},
    "step, no negative-pool return": {**STEP, "pool_return": False},
    "touched rows": {"method": "replay", "replay_rows": "touched"},
    "exact, paired": {"method": "replay", "replay_rows": "all", "coupling": "paired"},
}


@takes(
    model="BPR",
    **CACHED,
    sets=option("count:200", OF_SETS),
    seeds=6,
    compiled=COMPILED,
    output=RESULTS / "ablation",
    again=AGAIN,
)
def ablation(options):
    """What each part of the influence step contributes, beside the replay that needs none of it tuned."""
    sets = wanted(options, options.dataset)
    trained = common.trained_seeds(options, options.model, compiled=options.compiled)
    report(trained, options, VARIANTS, setting(options), sets)


# Re-optimisation

EXACT_STEP = {"cg_tolerance": 1e-6, "cg_max_iterations": 1000}
WAYS = {
    "reoptimise": Auto(),
    "one step, equation (7)": replace(PAPER, **EXACT_STEP),
    "one step, Hessian, pool return": Influence(curvature="hessian", damping="none", **EXACT_STEP),
    "one step, Gauss-Newton, pool return": Influence(damping="none", **EXACT_STEP),
}


class Exact:
    """Objective without some rows, by automatic differentiation; values are differences from those at ``start``.

    Differences triple by triple keep what the sum of all losses would round away.
    """

    def __init__(self, log, rows, start, n_users, n_items, weight_decay):
        users, items, negatives = (np.asarray(part, np.int64) for part in (log.users, log.items, log.epoch(0)))
        keep = np.delete(np.arange(log.n_rows), rows)
        back = pool_return(users, items, rows, n_items, log.negatives)
        self.n_users, self.n_items, self.start = n_users, n_items, start
        self.n_triples = negatives[keep].size
        self.l2 = self.n_triples * weight_decay
        self.users, self.pos, self.neg, self.weight = (
            torch.from_numpy(np.concatenate(columns))
            for columns in (
                (users[keep].repeat(log.negatives), back.users),
                (items[keep].repeat(log.negatives), back.pos),
                (negatives[keep].ravel(), back.neg),
                (np.ones(self.n_triples), back.weight),
            )
        )
        self.before = self.losses(start)

    def embeddings(self, theta):
        rows = theta.reshape(self.n_users + self.n_items, -1)
        return rows[: self.n_users], rows[self.n_users :]

    def scores(self, theta):
        P, Q = self.embeddings(theta)
        return (P @ Q.T).numpy()

    def losses(self, theta):
        P, Q = self.embeddings(theta)
        return -torch.nn.functional.logsigmoid((P[self.users] * (Q[self.pos] - Q[self.neg])).sum(1))

    def __call__(self, theta):
        """Value and gradient of the summed objective, for scipy."""
        theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        value = (self.weight * (self.losses(theta) - self.before)).sum()
        value = value + self.l2 / 2 * ((theta - self.start) * (theta + self.start)).sum()
        value.backward()
        return value.item(), theta.grad.numpy()

    def mean_gradient_norm(self, theta):
        return np.linalg.norm(self(theta.numpy())[1]) / self.n_triples


def finish(log, P, Q, weight_decay):
    """Embeddings at a minimum of the whole log's objective, as float32."""
    triples = UserTriples(log.users, np.array(log.items), np.array(log.epoch(0)), len(P), len(Q))
    objective = Objective([triples], len(triples), weight_decay, (len(P), *Q.shape))
    start = perf_counter()
    P, Q, report = minimise(objective, P, Q, 1e-12, 1000)
    print(
        f"Training finished by {report.iterations} Newton steps ({report.products} products, "
        f"{perf_counter() - start:.1f} s): mean gradient norm {report.gradient_norm_before:.1e} before, "
        f"{report.gradient_norm:.1e} after.\n",
        flush=True,
    )
    return P.astype(np.float32), Q.astype(np.float32)


def rows_of_table(seed, unlearners, rows, log, weight_decay):
    """The exact minimum without some rows, and each method beside it, as Markdown rows."""
    first = next(iter(unlearners.values())).problem
    start, K = flat(first.P, first.Q), first.P.shape[1]
    exact = Exact(log, rows, start, len(first.P), len(first.Q), weight_decay)
    clock = perf_counter()
    options = {"maxcor": 50, "maxiter": 10**5, "maxfun": 10**5, "ftol": 0, "gtol": 1e-8}
    # Where K exceeds the rank of the minimum, the trained weights lie beside saddles that gradients alone do not leave.
    noise = 1e-4 * np.random.default_rng(seed).normal(size=len(start))
    found = minimize(exact, start.numpy() + noise, jac=True, method="L-BFGS-B", options=options)
    seconds = perf_counter() - clock
    reference = nearest_rotation(torch.from_numpy(found.x), start, K)
    change, scores = reference - start, exact.scores(start)
    score_change = exact.scores(reference) - scores
    yield [seed, "nothing done", "1", "", f"{exact.mean_gradient_norm(start):.1e}", "", ""]
    norm = exact.mean_gradient_norm(reference)
    yield [seed, "exact (L-BFGS-B)", "0", "1", f"{norm:.1e}", f"{seconds:.1f}", f"{found.nfev} gradients"]
    for name, unlearner in unlearners.items():
        unlearned = unlearner.unlearn(rows)
        theta = flat(*(unlearned.state_dict[f"{kind}_embedding.weight"].numpy() for kind in ("user", "item")))
        error = (nearest_rotation(theta, reference, K) - reference).norm() / change.norm()
        same = np.corrcoef((exact.scores(theta) - scores).ravel(), score_change.ravel())[0, 1]
        products = str(unlearned.details.get("products", unlearned.details["iterations"]))
        products += ", negative curvature" if unlearned.details["negative_curvature"] else ""
        norm = exact.mean_gradient_norm(theta)
        yield [seed, name, f"{error:.5f}", f"{same:.6f}", f"{norm:.1e}", f"{unlearned.seconds:.2f}", products]


@takes(
    epochs=option(20, "of RecBole's training"),
    embedding_size=8,
    weight_decay=1e-4,
    forget_count=35,
    seed=option(2020, "of training"),
    seeds=option(3, "number of forget sets"),
)
def reoptimise(options):
    """Re-optimisation of a converged, regularised model against an independent optimiser.

    BPR on RecBole's bundled ml-100k, static negatives, weight decay 1e-4 of the mean loss. RecBole trains it briefly,
    Newton steps with nothing forgotten finish the training. Then a few random interactions are forgotten, and each
    method is compared with the exact minimum without them, by scipy's L-BFGS-B on torch's automatic gradients in
    float64. Prints a Markdown table. Takes half a minute on two free cores.

    Error of change: ||theta - exact|| / ||exact - trained||, with theta turned to be nearest to exact and exact to be
    nearest to trained, since rotations of all embeddings together change nothing. Gradient norms are of the mean
    objective, at the float32 weights that a method returns.
    """
    logging.getLogger().setLevel(logging.ERROR)
    keys = {key: getattr(options, key) for key in ("embedding_size", "epochs", "weight_decay", "seed")}
    keys |= {"learning_rate": 0.01, "train_batch_size": 4096, "negatives": "static", "eval_step": 0, "state": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        config, split = opened(("BPR", "ml-100k", None, keys))
        train(config, split, path)
        trained = Checkpoint.written(path, config).trained(split)
        model, log = trained.model, trained.log
        P, Q = finish(log, *(weight.detach().numpy() for weight in model.parameters()), options.weight_decay)
        model.load_state_dict({"user_embedding.weight": torch.tensor(P), "item_embedding.weight": torch.tensor(Q)})
        unlearners = {name: InfluenceUnlearner(trained, way) for name, way in WAYS.items()}
        for unlearner in unlearners.values():
            unlearner.warm_up()
        print(f"{options.forget_count} of {log.n_rows} interactions forgotten; {unlearners['reoptimise'].chosen}.\n")
        print("| set | method | error of change | score-change correlation | gradient norm | seconds | products |")
        print("|---|---|---|---|---|---|---|")
        for seed in range(options.seeds):
            rows = ForgetRequest("count", options.forget_count, seed).rows(split)
            for row in rows_of_table(seed, unlearners, rows, log, options.weight_decay):
                print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


# The paper's ratios

PAPER_FILE = option([str(ROOT / "properties/paper.yaml")], nargs="+", type=CACHED["config_files"]["type"])


@takes(
    **{**CACHED, "dataset": "ml-1m", "config_files": PAPER_FILE},
    ratios=option([0.0001, 0.00015, 0.0002, 0.00025, 0.0003, 0.00035], nargs="+", type=float),
    seeds=3,
    retrain_epochs=3,
    output=RESULTS,
    again=AGAIN,
)
def paper_ratios(options):
    """The paper's six forget ratios: original, unlearned and retrained under both protocols.

    Training times in the cache were taken while other trainings ran beside; the last line therefore times one Retrain
    with stock RecBole (--retrain_epochs epochs of it) and the unlearning again, alone, one after the other.
    """
    common.check_new(options, name := f"paper_ratios-{options.dataset}")
    trained = common.trained_seeds(options)
    config, split = trained.config, trained.split
    requests = {ratio: ForgetRequest("ratio", ratio).rows(split) for ratio in options.ratios}
    originals = common.seed_runs(trained, options.seeds)
    retrainings = {ratio: common.seed_runs(trained, options.seeds, rows) for ratio, rows in requests.items()}
    trained.train(originals + sum(retrainings.values(), []))
    measure = common.judge(trained, "uni99", 99)

    table, seconds = {}, []
    for ratio, rows in requests.items():
        figures = {"original": [], "unlearned": [], "retrained": []}
        for run, retraining in zip(originals, retrainings[ratio], strict=True):
            unlearner = common.unlearner_of(trained, run)
            original = unlearner.trained.stored["state_dict"]
            unlearner.warm_up()
            unlearned = unlearner.unlearn(rows)
            seconds.append(unlearned.seconds)
            states = original, unlearned.state_dict, common.weights_of(trained, retraining)
            for found, state in zip(figures.values(), states, strict=True):
                found.append(measure(state, rows))
        row = {"interactions": str(len(rows))}
        for metric in figures["original"][0]:
            values = {name: np.array([each[metric] for each in found]) for name, found in figures.items()}
            row |= {f"{metric} {name}": mean_sd(each) for name, each in values.items()}
            difference = values["unlearned"].mean() - values["retrained"].mean()
            row[f"{metric} difference"] = f"{difference:+.4f}"
        row["AUC, sd from Retrain"] = f"{difference / values['retrained'].std(ddof=1):+.1f}"
        row["seconds"] = f"{np.median(seconds[-options.seeds :]):.2f}"
        table[f"{ratio:.3%}"] = row
        print(f"{ratio:.3%}", row, flush=True)
    frame = pd.DataFrame.from_dict(table, orient="index")
    epoch = sorted(common.epoch_seconds(config, split, options.retrain_epochs))[options.retrain_epochs // 2]
    total, unlearning = epoch * config["epochs"], sorted(seconds)[len(seconds) // 2]
    page = (
        f"## {options.dataset}, the paper's setting, {options.seeds} seeds\n\n"
        f"{frame.T.to_markdown(disable_numparse=True)}\n\n"
        f"Stock RecBole: {epoch:.2f} s an epoch with validation (median of {options.retrain_epochs}), {total:.0f} s "
        f"for {config['epochs']} epochs; unlearning {unlearning:.3f} s (median of all): "
        f"{total / unlearning:.0f} times faster.\n"
    )
    common.write(page, options.output, name)


# The picture

TITLES = {"count-200": "200 random interactions", "users-20": "20 whole users", "items-20": "20 whole items"}
ORDER = ("nothing done", "paper's step", "influence", "touched rows", "exact, fresh", "exact, paired", "retrained")
LABELS = {"paper's step": "UBPR's step", "influence": "one corrected step", "retrained": "Retrain"}
COLOURS = dict(zip(ORDER, ("#b0b0b0", "#d08770", "#5e81ac", "#7cb342", "#00838f", "#2e7d32", "#222222"), strict=True))


@takes(results=RESULTS / "fidelity", stem="ml-100k-default", output=ROOT / "docs/fidelity.svg")
def picture(options):
    """Draw docs/fidelity.svg from results/fidelity/*.json."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "recbole_unlearn"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TITLES), figsize=(11, 2.9), sharey=True)
    for axis, (kind, title) in zip(axes, TITLES.items(), strict=True):
        results = read_json(options.results / f"{options.stem}-{kind}.json")
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
    figure.savefig(options.output, metadata={"Date": None})


if __name__ == "__main__":
    common.run(__doc__, [fidelity, ablation, reoptimise, paper_ratios, picture])
