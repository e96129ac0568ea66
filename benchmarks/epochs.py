"""How many epochs retraining takes: the original's, or what validation without the forgotten rows chooses.

    python benchmarks/epochs.py
    python benchmarks/epochs.py --models LightGCN --seeds=3

For each seed a model is trained (RecBole's defaults and early stopping, by compiled kernels) and forgets 200 random
interactions: exactly, by new random numbers, with as many epochs as the original's best one had (*fresh*); with the
epoch chosen anew (*fresh, validated*, by `replay_epochs: validated`); and by training a new model of another seed
without them (*retrained*). Means over the seeds, standard deviations in parentheses; seconds are of the processor,
compiling aside. *Churn* is the share of the top 10 of users who asked for nothing that is not the original's.
Writes epochs.md and epochs.json to --output; models that are not run stay as they are there.
"""

import json
import logging
import tempfile
from pathlib import Path
from time import process_time

import common
import numpy as np
import pandas as pd
from common import DATA, RESULTS, option, takes

from recbole_unlearn.comparison.seeds import opened
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.evaluation.churn import churn
from recbole_unlearn.training.fit import train
from recbole_unlearn.training.trained import Checkpoint
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.replay import Replay

MODELS = ("BPR", "LightGCN")
WAYS = {"fresh": Replay("all", "fresh"), "fresh, validated": Replay("all", "fresh", epochs="validated")}
FIGURES = {"epochs": "", "forget-set AUC": ".4f", "NDCG@10": ".4f", "HR@10": ".4f", "churn": "%", "seconds": ""}


def measured(model, seed, options):
    """Figures of one original and of what becomes of it, by name."""
    where = {} if options.dataset == "ml-100k" else {"data_path": options.data_path}
    config, split = opened((model, options.dataset, options.config_files, {"compiled": True, **where}))
    rows = ForgetRequest("count", options.forget, 2020).rows(split)
    models, epochs, seconds, trainer = {}, {}, {}, None
    with tempfile.TemporaryDirectory() as folder:
        config["checkpoint_dir"] = folder
        path = Path(folder) / "model.pth"
        train(config, split, path, [], seed)  # what this compiles is compiled then
        trained = Checkpoint.written(path, config).trained(split, seed)
        models["original"], epochs["original"] = trained.model, trained.epochs
        for name, way in WAYS.items():
            unlearner = InfluenceUnlearner(trained, way)
            unlearner.check()
            unlearner.warm_up()
            start = process_time()
            found = unlearner.unlearn(rows)
            seconds[name] = process_time() - start
            unlearner.apply(rows, found)
            models[name], epochs[name] = unlearner.served(trained.copy()), found.details["epochs"]
        start, other = process_time(), Path(folder) / "retrained.pth"
        models["retrained"], trainer, _ = train(config, split, other, rows, seed + 1000)
        seconds["retrained"] = process_time() - start
        epochs["retrained"] = Checkpoint.written(other, config).stored["epoch"] + 1
    assert trainer
    trainer.eval_collector.data_collect(split.train)
    changed, found = churn(models, split, rows), {}
    for name, each in models.items():
        ranked = ranking.evaluate(trainer, each, split, config["seed"], protocols={"full": 0})["full"]
        found[name] = {
            "epochs": epochs[name],
            "forget-set AUC": float(forgetting.percentiles(each, split, rows).mean()),
            "NDCG@10": ranked["ndcg@10"],
            "HR@10": ranked["hit@10"],
            "churn": changed.get(name, 0.0),
            "seconds": seconds.get(name),
        }
    print(model, seed, json.dumps(found), flush=True)
    return found


def page(found):
    """The figures of all models as Markdown, with the command that measures each."""
    own = "python benchmarks/epochs.py --models"
    commands = " and ".join(f"`{own} {model} --seeds={len(seeds)}`" for model, seeds in found.items())
    about = " ".join(__doc__.split("\n\n")[2].split())
    return f"# Epochs chosen anew\n\n{commands} ({common.versions()}; {common.load()})\n\n{about}\n\n{table(found)}\n"


def table(found):
    """The table alone."""
    lines = []
    for model, seeds in found.items():
        for name in seeds[0]:
            line = {"model": f"{model}, {len(seeds)} seeds", "": name}
            for figure, form in FIGURES.items():
                values = np.array([each[name][figure] for each in seeds if each[name][figure] is not None])
                line[figure] = _told(values, form) if len(values) else ""
            lines.append(line)
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


def _told(values, form):
    mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
    if form == "%":
        return f"{100 * mean:.1f} % ({100 * spread:.1f})"
    return f"{mean:{form or '.1f'}} ({spread:{form or '.1f'}})"


@takes(
    **DATA,
    models=option(list(MODELS), "some of the models", nargs="+", choices=MODELS),
    seeds=option(5, "how many originals of each"),
    forget=option(200, "random interactions to forget"),
    output=RESULTS,
)
def epochs(options):
    """Exact retraining with the original's number of epochs, and with the one that validation chooses."""
    logging.disable(logging.INFO)
    kept = options.output / "epochs.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for model in options.models:
        found[model] = [measured(model, seed, options) for seed in range(1, options.seeds + 1)]
    found = {model: found[model] for model in MODELS if model in found}
    common.write(page(found), options.output, "epochs", found)


if __name__ == "__main__":
    common.run(__doc__, [epochs])
