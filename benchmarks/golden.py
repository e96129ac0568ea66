"""Checksums of the weights that every way of forgetting ends in, to see that a change of the code changes no number.

    python benchmarks/golden.py --record=golden.json     # before the change
    python benchmarks/golden.py --check=golden.json      # after it, on the same machine and packages

All go through `run_unlearn` and `InfluenceUnlearner` on the bundled ml-100k with small models, so that
moving code changes nothing here. Other machines and packages round otherwise: keep the file beside the work, not in the
repository; where several environments share a checkout, give each a NUMBA_CACHE_DIR.
"""

import hashlib
import itertools
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import torch
from common import option, takes

from recbole_unlearn import InfluenceUnlearner, run_unlearn
from recbole_unlearn.storage.audit import weights_checksum

USUAL = {
    "epochs": 2, "embedding_size": 8, "eval_step": 0, "compare": "none", "evaluate": "none", "forget_count": 50,
    "show_progress": False, "state": "ERROR", "use_gpu": False, "cg_max_iterations": 8,
}  # fmt: skip
STEP = {"method": "influence"}
STATIC = {"negatives": "static", "weight_decay": 1e-3, "method": "reoptimise", "reoptimise_max_iterations": 3}
PAIRS = {"distribution": "uniform", "sample_num": 1}
SEQUENTIAL = {"loss_type": "BPR", "train_neg_sample_args": PAIRS, "MAX_ITEM_LIST_LENGTH": 5, "hidden_size": 8}
FEW = {"curvature_triples": 2048}
RUNS = {
    "BPR, touched rows": ("BPR", {"replay_rows": "touched"}),
    "BPR, all rows": ("BPR", {"replay_rows": "all"}),
    "BPR, auto, users": ("BPR", {"forget_count": None, "forget_users": ["1", "7"]}),
    "BPR, 4 negatives, popularity": (
        "BPR", {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 4}},
    ),
    "BPR, influence": ("BPR", {"method": "influence"}),
    "BPR, influence, hessian": ("BPR", {"method": "influence", "curvature": "hessian"}),
    "BPR, influence, scalar damping": ("BPR", {"method": "influence", "damping": "scalar"}),
    "BPR, paper": ("BPR", {"paper": True}),
    "BPR, reoptimise": ("BPR", STATIC),
    "BPR, spam": ("BPR", {"forget_count": None, "forget_spam": 5}),
    "BPR, 2 ranks": ("BPR", {"method": "influence", "nproc": 2}),
    "LightGCN, replay": ("LightGCN", {"n_layers": 2}),
    "LightGCN, influence": ("LightGCN", {"n_layers": 2, "method": "influence"}),
    "NGCF": ("NGCF", {"hidden_size_list": [8], "node_dropout": 0.0, "message_dropout": 0.0, **FEW, **STEP}),
    "SimpleX": ("SimpleX", {"history_len": 5, **FEW, **STEP}),
    "GRU4Rec": ("GRU4Rec", {**SEQUENTIAL, **FEW, **STEP}),
    "FPMC, along the training": ("FPMC", {**SEQUENTIAL, **STEP, "epochs": 3}),
    "CKE": ("CKE", {"kg_embedding_size": 8, **FEW, **STEP}),
}  # fmt: skip


COMPARED = {**USUAL, "evaluate": "comparison", "compare": "retrain", "methods": "all"}
UNTIMED = {"seconds", "prepare_seconds", "details", "speed_up"}


def figures(value):
    """What a comparison found, without what the clock says."""
    if isinstance(value, dict):
        return {key: figures(each) for key, each in value.items() if key not in UNTIMED}
    return [figures(each) for each in value] if isinstance(value, list) else value


def compared(folder):
    """Method -> checksum of its figures, of all methods on one forget set."""
    keys = {**COMPARED, "output_dir": str(folder / "compared"), "comparison_cache": str(folder / "cache")}
    result = run_unlearn("BPR", "ml-100k", None, keys)
    (found,) = result["comparison"]["sets"].values()
    for name, each in sorted(found["figures"].items()):
        yield f"method {name}", hashlib.sha256(json.dumps(figures(each), sort_keys=True).encode()).hexdigest()


def checksum(path):
    return weights_checksum(torch.load(path, weights_only=True)["state_dict"])


def ran(name, folder):
    """Checksums of the weights that a run begins and ends with, by name."""
    model, keys = RUNS[name]
    output = folder / name.replace(" ", "_").replace(",", "")
    run_unlearn(model, "ml-100k", None, {**USUAL, **keys, "output_dir": str(output)})
    return [(f"{name}, original", checksum(output / "model.pth")), (name, checksum(output / "unlearned.pth"))]


def requests(folder):
    """Two requests in a session, saved; and one from an unlearned checkpoint."""
    first = folder / "BPR_touched_rows"
    run_unlearn("BPR", "ml-100k", None, {**USUAL, "replay_rows": "touched", "output_dir": str(first)})
    request = {**{key: USUAL[key] for key in USUAL if key not in ("epochs", "embedding_size", "eval_step")}}
    request |= {"checkpoint": str(first / "unlearned.pth"), "output_dir": str(folder / "second")}
    run_unlearn(config_dict=request)
    # its log's returning negatives are drawn from the operating system's numbers: only touched rows that none is among
    with InfluenceUnlearner.load(first / "model.pth", config_dict={"replay_rows": "touched"}) as session:
        session.forget("count", 10)
        session.forget("users", ["3"])
        served = weights_checksum(session.model.state_dict())
        session.save(folder / "session.pth")
    return [("session of two requests", served), ("session, saved", checksum(folder / "session.pth"))]


def job(name):
    """One of the jobs, in a process of its own: sums of floats may depend on where earlier ones left the memory."""
    with tempfile.TemporaryDirectory() as folder:
        if name in RUNS:
            return ran(name, Path(folder))
        return list({"methods": compared, "session": requests}[name](Path(folder)))


@takes(
    record=option(help="file to write"),
    check=option(help="file to compare with; exit status 1 where a checksum differs"),
    only=option("", "runs whose names hold this"),
)
def golden(options):
    expected = json.loads(Path(options.check).read_text()) if options.check else {}
    sums, wrong = {}, []
    jobs = [name for name in (*RUNS, "methods", "session") if options.only in name]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:  # Python 3.11 or later
        for name, value in itertools.chain.from_iterable(pool.map(job, jobs)):
            sums[name] = value
            same = not options.check or expected.get(name) == value
            wrong += [] if same else [name]
            print(f"{'  ' if same else '! '}{value[:16]}  {name}", flush=True)
    if options.record:
        Path(options.record).write_text(json.dumps(sums, indent=1))
    if wrong:
        sys.exit(f"{len(wrong)} differ: {'; '.join(wrong)}")


if __name__ == "__main__":
    common.run(__doc__, [golden])
