"""Which of RecBole's pairwise models can be unlearned from: each is trained, checked, made to forget, and retrained.

    python benchmarks/models.py --dataset=ml-100k                   # all that is not done yet
    python benchmarks/models.py --models=LightGCN,GRU4Rec --again

Every model runs in a process of its own and leaves a JSON file in ``results/models``; all of them make
``results/models.md``. Whatever the state, the table is written; a run that was cut off goes on with the rest.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

GENERAL = "BPR LightGCN NGCF SimpleX GCMC SpectralCF LINE SGL DGCF ConvNCF NCL MultiVAE MultiDAE MacridVAE RecVAE RaCT"
KNOWLEDGE = "CKE CFKG KGCN KGNNLS KTUP KGIN MCCLK KGAT"
SEQUENTIAL = (
    "GRU4Rec SASRec FPMC NARM STAMP TransRec HRM NPE FOSSIL SHAN Caser NextItNet SRGNN GCSAN HGN FEARec LightSANs SINE "
    "FDSA SASRecF GRU4RecF BERT4Rec S3Rec GRU4RecCPR SASRecCPR GRU4RecKG KSR"
)
KINDS = {
    **dict.fromkeys(GENERAL.split(), "general"),
    **dict.fromkeys(KNOWLEDGE.split(), "knowledge-aware"),
    **dict.fromkeys(SEQUENTIAL.split(), "sequential"),
}
INTERACTIONS = ["user_id", "item_id", "rating", "timestamp"]
SLOW = {"ConvNCF": {"embedding_size": 64}, "MCCLK": {}, "FEARec": {}}
DIRECTION_ROWS = 256  # rows that the Hessian product is checked on


def settings(name, dataset, epochs):
    """Configuration of one model."""
    columns = {"inter": INTERACTIONS}
    if KINDS[name] == "knowledge-aware":
        columns |= {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
    if name in ("FDSA", "SASRecF", "GRU4RecF", "S3Rec"):
        columns["item"] = ["item_id", "class"]
    chosen = {"epochs": epochs, "eval_step": 0, "load_col": columns, "show_progress": False, "state": "ERROR"}
    if KINDS[name] == "sequential":
        chosen["loss_type"] = "BPR"
        if name in ("FPMC", "TransRec", "SINE"):
            chosen["train_neg_sample_args"] = {
                "distribution": "uniform",
                "sample_num": 1,
                "alpha": 1.0,
                "dynamic": False,
            }
    return chosen | SLOW.get(name, {})


def in_double(model):
    """The model in float64, the graphs and tables that are plain attributes too."""
    import torch

    for module in model.double().modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(module, name, value.double())
            elif isinstance(value, list) and value and all(isinstance(v, torch.Tensor) for v in value):
                setattr(module, name, [v.double() if v.is_floating_point() else v for v in value])
    return model


def hessian_error(unlearner, config, split, double):
    """Relative distance of a Hessian product by differentiation from central differences of the gradient."""
    import numpy as np
    import torch

    from recbole_unlearn.influence.operators import AutogradCurvature
    from recbole_unlearn.models.view import View
    from recbole_unlearn.training import new_model

    model = new_model(config, split)
    model.load_state_dict(unlearner.state_dict)
    if double:
        torch.set_default_dtype(torch.float64)
        model = in_double(model)
    try:
        view = View(model, split.train, split.data_row)
        rows = np.arange(0, split.n_rows, max(split.n_rows // DIRECTION_ROWS, 1))
        batches = view.batches(rows, unlearner.log.epoch(0)[rows], np.ones(len(rows)))
        curvature = AutogradCurvature(view.parameters, batches, loss=view.loss)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(curvature.size, generator=generator, dtype=torch.float64)
        product, gradients, step = curvature.matvec(v), [], 1e-6 if double else 1e-3
        sizes = [p.numel() for p in view.parameters]
        start = [p.detach().clone() for p in view.parameters]
        for sign in (1, -1):
            with torch.no_grad():
                for p, s, d in zip(view.parameters, start, v.split(sizes), strict=True):
                    p.copy_(s + sign * step * d.view(p.shape))
            gradients.append(curvature.gradient())
        difference = (gradients[0] - gradients[1]) / (2 * step)
        return float((product - difference).norm() / difference.norm())
    finally:
        torch.set_default_dtype(torch.float32)


def run_one(name, dataset, epochs, count):
    """Figures of one model, as a dict; ``refused`` holds the reason where it is refused."""
    import numpy as np
    import torch
    from recbole.utils import init_seed

    from recbole_unlearn import checkpoint
    from recbole_unlearn.data.split import Split
    from recbole_unlearn.evaluation.forgetting import percentiles
    from recbole_unlearn.input_error import InputError
    from recbole_unlearn.opening import configure, open_unlearner
    from recbole_unlearn.training import new_model, train

    torch.set_num_threads(1)
    chosen = settings(name, dataset, epochs) | {"forget_count": count, "use_gpu": False, "method": "influence"}
    try:
        config, _, _ = configure(None, name, dataset, None, chosen)
    except InputError as error:
        return {"refused": str(error)}
    init_seed(config["seed"], config["reproducibility"])
    split = Split(config)
    logging.getLogger().setLevel(logging.ERROR)
    rows = np.sort(np.random.default_rng(0).choice(split.n_rows, count, replace=False))
    with tempfile.TemporaryDirectory() as folder:
        config["checkpoint_dir"] = folder
        path = Path(folder) / "model.pth"
        original, _, train_seconds = train(config, split, path)
        stored, log = checkpoint.load(path)
        _, unlearner = open_unlearner(config, split, stored, log)
        unlearner.warm_up()
        unlearned = unlearner.unlearn(rows)
        report = unlearned.report()
        report.pop("history", None)
        model = new_model(config, split, data=split.remaining_dataset(rows))
        model.load_state_dict(unlearned.state_dict)
        retrained, _, retrain_seconds = train(config, split, Path(folder) / "retrained.pth", rows, log_negatives=False)
        result = {
            "auc": {
                key: float(percentiles(each, split, rows).mean())
                for key, each in (("original", original), ("unlearned", model), ("retrained", retrained))
            },
            "seconds": {"train": train_seconds, "unlearn": unlearned.seconds, "retrain": retrain_seconds},
            "epochs": epochs,
            "report": report,
        }
        if name != "BPR":
            for double in (True, False):
                try:
                    result["hessian_error"] = hessian_error(unlearner, config, split, double)
                    result["hessian_type"] = "float64" if double else "float32"
                    break
                except (RuntimeError, ValueError, TypeError) as error:
                    result["hessian_failed"] = " ".join(str(error).split())[:200]
    return result


def table(folder, dataset):
    """The Markdown matrix of all models that have run."""
    lines = [
        "| model | kind | forget-set AUC: original | unlearned | retrained | way to retrained | seconds "
        "| Retrain, seconds | Hessian product, error | approximated, or why refused |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    works = 0
    for name, kind in KINDS.items():
        file = folder / f"{dataset}-{name}.json"
        if not file.exists():
            lines.append(f"| {name} | {kind} | | | | | | | | not run yet |")
            continue
        found = json.loads(file.read_text())
        if "auc" not in found:
            why = found.get("refused") or f"fails: {found.get('failed')}"
            lines.append(f"| {name} | {kind} | – | – | – | – | – | – | – | {why} |")
            continue
        works += 1
        auc, seconds = found["auc"], found["seconds"]
        gap = auc["original"] - auc["retrained"]
        way = f"{(auc['original'] - auc['unlearned']) / gap:.0%}" if abs(gap) > 0.002 else "–"
        error = f"{found['hessian_error']:.0e}" if "hessian_error" in found else "closed form" if name == "BPR" else "–"
        error += " (float32)" if found.get("hessian_type") == "float32" else ""
        lines.append(
            f"| {name} | {kind} | {auc['original']:.4f} | {auc['unlearned']:.4f} | {auc['retrained']:.4f} | {way} "
            f"| {seconds['unlearn']:.1f} | {seconds['retrain']:.1f} | {error} "
            f"| {'; '.join(found['report'].get('approximated', []))} |"
        )
    return works, "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--models", help="comma-separated; default: all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--count", type=int, default=200, help="interactions to forget")
    parser.add_argument("--timeout", type=int, default=900, help="seconds a model")
    parser.add_argument("--again", action="store_true", help="run models that are done, too")
    parser.add_argument("--output", default=str(Path(__file__).resolve().parent.parent / "results"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        result = run_one(arguments.one, arguments.dataset, arguments.epochs, arguments.count)
        print("RESULT " + json.dumps(result))
        return
    folder = Path(arguments.output) / "models"
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.models.split(",") if arguments.models else KINDS:
        file = folder / f"{arguments.dataset}-{name}.json"
        if file.exists() and not arguments.again and "failed" not in json.loads(file.read_text()):
            continue
        start = perf_counter()
        command = [sys.executable, __file__, "--one", name, "--dataset", arguments.dataset]
        command += ["--epochs", str(arguments.epochs), "--count", str(arguments.count)]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=arguments.timeout,
                    cwd=scratch,
                    env=os.environ | threads,
                )
                found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                last = (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
                result = json.loads(found[-1][7:]) if found else {"failed": last[:300]}
            except subprocess.TimeoutExpired:
                result = {"failed": f"not done in {arguments.timeout} s"}
        file.write_text(json.dumps(result, indent=1) + "\n")
        told = result.get("auc") or result.get("refused") or result.get("failed")
        print(f"{name} ({perf_counter() - start:.0f} s): {told}", flush=True)
        works, text = table(folder, arguments.dataset)
    works, text = table(folder, arguments.dataset)
    title = f"# RecBole's pairwise models on {arguments.dataset}: {works} work\n\n"
    note = (
        f"{arguments.count} random interactions forgotten, {arguments.epochs} epochs, one seed, one thread. *Way to "
        "retrained*: share of the change of the AUC that retraining makes; – where it makes less than .002. One seed: "
        "the noise of retraining is of the order of .005.\n\n"
        f"`python benchmarks/models.py --dataset={arguments.dataset}`\n\n"
    )
    (Path(arguments.output) / "models.md").write_text(title + note + text)


if __name__ == "__main__":
    main()
