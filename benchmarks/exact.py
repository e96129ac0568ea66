"""Exact forgetting against paired training by RecBole's own trainer: how near it ends, how long it takes, who feels it.

    python benchmarks/exact.py --data_path=PATH
    python benchmarks/exact.py --cases "ml-100k, defaults"

Each case trains one model by RecBole's trainer, forgets, and trains it again without the forget set, by RecBole's
trainer and the same random numbers (`train_paired`, draws that return included). *Effect* is what that changes in the
scores of the forgotten pairs, root mean square; *left* is what exact replay leaves of it. Seconds are of one
process, one after the other: RecBole's paired training, which has no validation; exact replay; replay of touched rows.
Churn is the share of the top 10 of users who asked for nothing that changes, beside that of a training by another seed.
Writes exact.md and exact.json to --output; cases that are not run stay as they are there.
"""

import json
import logging
import tempfile
from pathlib import Path

import common
import numpy as np
import pandas as pd
from common import DATA, RESULTS, option, takes

from recbole_unlearn.comparison.seeds import opened
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.evaluation.churn import churn
from recbole_unlearn.evaluation.forgetting import query_scores
from recbole_unlearn.settings.conflicts import DERIVED_FORMS
from recbole_unlearn.training.again import train_paired
from recbole_unlearn.training.fit import new_model, train
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.replay import Replay

PAPER = {"embedding_size": 8, "learning_rate": 0.01, "train_neg_sample_args": {"sample_num": 4}}
SEQUENTIAL = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "eval_step": 0}
FACTS = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
LINKED = {"load_col": {"inter": ["user_id", "item_id"], **FACTS}, "eval_step": 0}
POPULARITY = {"train_neg_sample_args": {"distribution": "popularity"}}
CASES = {
    "ml-100k, defaults": ("ml-100k", "BPR", {}, ("ratio", 0.0025)),
    "ml-100k, defaults, 5 users": ("ml-100k", "BPR", {}, ("core_users", 5)),
    "ml-100k, defaults, 20 items": ("ml-100k", "BPR", {}, ("rare_items", 300)),
    "ml-100k, K = 8, 4 negatives": ("ml-100k", "BPR", PAPER, ("ratio", 0.0025)),
    "ml-100k, by popularity": ("ml-100k", "BPR", POPULARITY, ("ratio", 0.0025)),
    "ml-100k, static, weight decay": (
        "ml-100k", "BPR", {"negatives": "static", "weight_decay": 1e-5}, ("ratio", 0.0025),
    ),
    "ml-100k, LightGCN": ("ml-100k", "LightGCN", {"epochs": 20}, ("ratio", 0.0025)),
    "ml-100k, FPMC": ("ml-100k", "FPMC", {**SEQUENTIAL, "epochs": 20}, ("ratio", 0.0025)),
    "ml-100k, TransRec": ("ml-100k", "TransRec", {**SEQUENTIAL, "epochs": 20}, ("ratio", 0.0025)),
    "ml-100k, LINE": ("ml-100k", "LINE", {"epochs": 20, "eval_step": 0}, ("ratio", 0.0025)),
    "ml-100k, CFKG": ("ml-100k", "CFKG", {**LINKED, "epochs": 20}, ("ratio", 0.0025)),
    "ml-100k, CFKG, 5 users": ("ml-100k", "CFKG", {**LINKED, "epochs": 20}, ("core_users", 5)),
    "ml-1m, defaults": ("ml-1m", "BPR", {"epochs": 12}, ("ratio", 0.0005)),
    "ml-1m, K = 8, 4 negatives": ("ml-1m", "BPR", {**PAPER, "epochs": 12}, ("ratio", 0.0005)),
    "ml-1m, LightGCN": ("ml-1m", "LightGCN", {"epochs": 1}, ("ratio", 0.0005)),
    "ml-1m, FPMC": ("ml-1m", "FPMC", {**SEQUENTIAL, "epochs": 4}, ("ratio", 0.0005)),
    "ml-1m, TransRec": ("ml-1m", "TransRec", {**SEQUENTIAL, "epochs": 4}, ("ratio", 0.0005)),
}  # fmt: skip


def scores(model, split, rows):
    """Scores of some pairs, float64 ``[n]``."""
    found = np.concatenate([each for _, each in query_scores(model, split.queries(rows))])
    return found[np.arange(len(rows)), split.items[rows]].astype(np.float64)


def compared(case, options):
    """One line of the table."""
    dataset, model, keys, (kind, value) = CASES[case]
    # both of a data set's folders: RecBole's own, and the one given
    where = {} if dataset == "ml-100k" else {"data_path": options.data_path}
    changes = {**keys, **where, "seed": options.seed}
    config, split = opened((model, dataset, options.config_files, changes))
    rows = ForgetRequest(kind, value, 2020).rows(split)
    with tempfile.TemporaryDirectory() as folder:
        config["checkpoint_dir"] = folder
        path = Path(folder) / "model.pth"
        _, trainer, _ = train(config, split, path)
        opened_again = Checkpoint.written(path, config).trained(split)
        ways = {"exact": Replay("all"), "fresh": Replay("all", "fresh")}
        if model in DERIVED_FORMS:
            ways["touched"] = Replay("touched")
        found, models = {}, {"original": opened_again.model}
        for name, way in ways.items():
            unlearner = InfluenceUnlearner(opened_again, way)
            unlearner.check()
            unlearner.warm_up()
            result = unlearner.unlearn(rows)
            unlearner.apply(rows, result)
            found[name], models[name] = result, unlearner.served(new_model(config, split))
        models["paired"], seconds = train_paired(config, split, Path(folder) / "p.pth", path, rows, options.seed)
        if options.retrained:
            again = train(config, split, Path(folder) / "r.pth", rows, options.seed + 1, log_negatives=False)
            models["another seed"] = again[0]
    before = scores(models["original"], split, rows)
    effect = {name: scores(each, split, rows) - before for name, each in models.items()}
    rms = {name: float(np.sqrt(np.mean((each - effect["paired"]) ** 2))) for name, each in effect.items()}
    epochs = opened_again.epochs

    def alike(name):
        return float(np.corrcoef(effect[name], effect["paired"])[0, 1])

    result = {
        "epochs": epochs,
        "forgotten": len(rows),
        "guard": unlearner.check().distance,
        "effect": rms["original"],
        "left": rms["exact"],
        "correlation": alike("exact"),
        "touched left": rms.get("touched"),
        "touched correlation": alike("touched") if "touched" in effect else None,
        "RecBole, s an epoch": seconds / epochs,
        **{f"{name}, s an epoch": each.seconds / epochs for name, each in found.items()},
        "churn": churn(models, split, rows),
    }
    print(case, result, flush=True)
    return result


@takes(
    **DATA,
    cases=option(None, "some of the cases, by name", nargs="+", choices=list(CASES)),
    seed=2020,
    retrained=option(False, "also train by another seed, for its churn"),
    output=RESULTS,
)
def exact(options):
    """How near exact forgetting comes to RecBole's own paired training, and how much faster it is."""
    logging.disable(logging.INFO)
    kept = options.output / "exact.json"  # of cases that are not run now
    found = json.loads(kept.read_text()) if options.cases and kept.exists() else {}
    found |= {case: compared(case, options) for case in options.cases or CASES}
    found = {case: found[case] for case in CASES if case in found}
    head = f"# Exact forgetting\n\n`{common.command(options)}` ({common.versions()}; {common.load()})\n\n"
    about = " ".join(__doc__.split("\n\n")[2].split())
    common.write(f"{head}{about}\n\n{table(found)}\n", options.output, "exact", found)


def table(found):
    """The figures as Markdown."""
    rows = {
        case: {
            "effect, rms": f"{each['effect']:.3f}",
            "left": f"{each['left'] / each['effect']:.1e}",
            "1 - correlation": f"{1 - each['correlation']:.0e}",
            "touched: left": f"{each['touched left'] / each['effect']:.2f}" if each["touched left"] else "",
            "touched: correlation": f"{each['touched correlation']:.3f}" if each["touched left"] else "",
            "RecBole, s an epoch": f"{each['RecBole, s an epoch']:.2f}",
            "exact: times faster": f"{each['RecBole, s an epoch'] / each['exact, s an epoch']:.0f}",
            **{f"churn: {name}": f"{100 * share:.1f} %" for name, share in each["churn"].items() if name != "users"},
        }
        for case, each in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").to_markdown(disable_numparse=True)


if __name__ == "__main__":
    common.run(__doc__, [exact])
