"""A thousand single requests, one after the other, against retraining without them, over seeds.

    python benchmarks/stream.py --dataset=ml-1m --data_path=PATH --config_files=properties/paper.yaml

Trained models are cached in --cache, together with those of the other benchmarks.
"""

import common
import numpy as np
import pandas as pd
from common import CACHED, RESULTS, mean_sd, takes
from tqdm import tqdm

from recbole_unlearn.data.forget import ForgetRequest


@takes(**CACHED, requests=1000, seeds=3, output=RESULTS / "stream")
def stream(options):
    trained = common.trained_seeds(options)
    rows = ForgetRequest("count", options.requests).rows(trained.split)
    order = np.random.default_rng(1).permutation(rows)
    originals = common.seed_runs(trained, options.seeds)
    retrainings = common.seed_runs(trained, options.seeds, rows)
    trained.train(originals + retrainings)
    measure = common.judge(trained, "full", 0)

    figures, seconds, replays = {"original": [], "unlearned": [], "retrained": []}, [], []
    for original, retrained in zip(originals, retrainings, strict=True):
        session = common.unlearner_of(trained, original)
        session.warm_up()
        replays.append(0)
        for row in tqdm(order, "Requests", ncols=100):
            served = session.forget_rows([row])
            seconds.append(served.seconds)
            replays[-1] += served.details["all_rows"]
        states = session.trained.stored["state_dict"], session.state_dict, common.weights_of(trained, retrained)
        for found, state in zip(figures.values(), states, strict=True):
            found.append(measure(state, rows))
    table = {}
    for name in ("forget-set AUC", "HR@10", "NDCG@10"):
        values = {of: np.array([each[name] for each in found]) for of, found in figures.items()}
        table[name] = {of: mean_sd(each) for of, each in values.items()}
        gap, sd = values["unlearned"].mean() - values["retrained"].mean(), values["retrained"].std(ddof=1)
        table[name]["sd from Retrain"] = f"{gap / sd:+.1f}"
    setting = common.setting(options)
    page = (
        f"## {options.dataset}, {setting} BPR, {options.requests} requests one by one, {options.seeds} seeds\n\n"
        f"{pd.DataFrame(table).T.to_markdown()}\n\n"
        f"Seconds a request: {np.median(seconds):.3g} (median), {np.max(seconds):.3g} (longest); all rows replayed "
        f"{np.mean(replays):.1f} times in a stream.\n"
    )
    common.write(page, options.output, f"{options.dataset}-{setting}")


if __name__ == "__main__":
    common.run(__doc__, [stream])
