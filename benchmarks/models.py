"""Which of RecBole's models can be unlearned from, and how well: each is trained, made to forget, and trained again.

    python benchmarks/models.py                                      # as RecBole trains them by default; hours
    python benchmarks/models.py --models=FPMC,GRU4Rec --device=cuda --processes=8
    python benchmarks/models.py exact                                # two epochs: is each trained again, bit by bit?
    python benchmarks/models.py smoke --models=LightGCN,GRU4Rec      # two epochs, and the Hessian product

Every training runs in a process of its own; a run that was cut off goes on with the rest.
"""

import itertools
import json
import logging
import os
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import common
import numpy as np
import pandas as pd
import scipy.sparse.linalg
from common import RESULTS, mean_sd, option, takes

GENERAL = "BPR LightGCN NGCF SimpleX GCMC SpectralCF LINE SGL DGCF ConvNCF NCL MultiVAE MultiDAE MacridVAE RecVAE RaCT"
KNOWLEDGE = "CKE CFKG KGCN KGNNLS KTUP KGIN MCCLK KGAT"
SEQUENTIAL = (
    "GRU4Rec SASRec FPMC NARM STAMP TransRec HRM NPE FOSSIL SHAN Caser NextItNet SRGNN GCSAN HGN FEARec LightSANs SINE "
    "FDSA SASRecF GRU4RecF BERT4Rec S3Rec GRU4RecCPR SASRecCPR RepeatNet GRU4RecKG KSR"
)
KINDS = {
    **dict.fromkeys(GENERAL.split(), "general"),
    **dict.fromkeys(KNOWLEDGE.split(), "knowledge-aware"),
    **dict.fromkeys(SEQUENTIAL.split(), "sequential"),
}
INTERACTIONS = ["user_id", "item_id", "rating", "timestamp"]
VECTORS = {"GRU4RecKG": ["ent"], "KSR": ["ent", "rel"]}  # pre-trained ones of entities and relations that they need
VECTOR_SIZE = 64
DATASET = "ml-100k"
SEQUENCE = 20  # items of a history, of RecBole's default 50: two cores train some models for a quarter of an hour
SMALL_TRANSFORMER = {"hidden_size": 16, "inner_size": 64}
SMALLER = {  # than RecBole's defaults, of models that two cores would train for longer still
    # it compares all pairs of the graph's 34,000 entities in every batch, most of which stand in one fact
    "MCCLK": {"entity_kg_num_interval": "[5,inf)"},
    "NCL": {"num_clusters": 100},  # of 1,000, more than ml-100k has users
    "ConvNCF": {"cnn_channels": [1, 8, 8, 8, 8]},
    "NextItNet": {"embedding_size": 16, "block_num": 1},
    "SINE": {"embedding_size": 16},
    **dict.fromkeys(["FEARec", "LightSANs", "GCSAN"], SMALL_TRANSFORMER),
}
DIRECTION_ROWS = 256  # rows that the Hessian product is checked on
REPEATS = 0.01  # distance of a training done again from the recorded one, over its whole way
STEP = 1e-8  # of its central differences: hardly any kink of a max or ReLU lies so near


def settings(name, epochs, smaller=None, items=SEQUENCE):
    """Configuration of one model; ``smaller``: keys instead of those of `SMALLER`."""
    columns = {"inter": INTERACTIONS}
    if KINDS[name] == "knowledge-aware" or name in VECTORS:
        columns |= {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
    if name in ("FDSA", "SASRecF", "GRU4RecF", "S3Rec"):
        columns["item"] = ["item_id", "class"]
    chosen = {"epochs": epochs, "eval_step": 0, "load_col": columns, "show_progress": False, "state": "ERROR"}
    chosen |= SMALLER.get(name, {}) if smaller is None else smaller
    if KINDS[name] == "sequential":
        chosen |= {"loss_type": "BPR", "MAX_ITEM_LIST_LENGTH": items}
    if name in VECTORS:
        which = VECTORS[name]
        columns |= {f"{each}_vectors": [f"{each}_id", f"{each}_vector"] for each in which}
        chosen |= {
            "additional_feat_suffix": [f"{each}_vectors" for each in which],
            # RecBole's defaults for its bundled data sets and sequential models
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "repeatable": True,
            "preload_weight": {f"{each}_id": f"{each}_vector" for each in which},
            "alias_of_entity_id": ["ent_id"],
            "alias_of_relation_id": ["rel_id"] if "rel" in which else None,
        }
    return chosen


def write_vectors(dataset, folder):
    """A copy of RecBole's bundled data set in a folder, with vectors of its knowledge graph from an SVD; its name."""
    import recbole

    source = Path(recbole.__file__).parent / "dataset_example" / dataset
    name = f"{dataset}-vectors"  # RecBole takes its own files for the name of a bundled data set
    target = Path(folder) / name
    target.mkdir()
    for file in source.iterdir():
        shutil.copy(file, target / f"{name}{file.suffix}")
    graph = pd.read_csv(target / f"{name}.kg", sep="\t")
    heads, tails = graph["head_id:token"], graph["relation_id:token"] + " " + graph["tail_id:token"]
    relations = graph["relation_id:token"]
    entities = pd.Index(np.unique([*heads, *graph["tail_id:token"]]))
    kinds, facts = pd.Index(np.unique(relations)), pd.Index(np.unique(tails))
    ones = np.ones(len(graph))
    at = entities.get_indexer(heads), facts.get_indexer(tails)
    table = scipy.sparse.coo_matrix((ones, at), (len(entities), len(facts))).tocsr()
    left, values, right = scipy.sparse.linalg.svds(table, k=VECTOR_SIZE, v0=np.ones(min(table.shape)))
    sums = pd.DataFrame(right.T).groupby([fact.split(" ")[0] for fact in facts]).mean()
    for each, names, vectors in (("ent", entities, left * np.sqrt(values)), ("rel", kinds, sums.loc[kinds].to_numpy())):
        lines = [f"{each}_id:token\t{each}_vector:float_seq"]
        lines += [f"{n}\t{' '.join(f'{x:.6g}' for x in vector)}" for n, vector in zip(names, vectors, strict=True)]
        (target / f"{name}.{each}_vectors").write_text("\n".join(lines) + "\n")
    return name


@contextmanager
def double_precision():
    """float64 by default, also where models ask for float32 by name."""
    import torch

    from recbole_unlearn.compat.recbole_models import replaced

    torch.set_default_dtype(torch.float64)
    try:
        with (
            replaced(torch, FloatTensor=torch.DoubleTensor, cfloat=torch.cdouble),
            replaced(torch.sparse, FloatTensor=torch.sparse.DoubleTensor),
            patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


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


def hold_graphs(model, gradient):
    """Have a model keep the graphs of similar items that it builds of its weights without derivatives (MCCLK).

    Else differences of the gradient would hold what no derivative holds. ``gradient`` is called once, to build them.
    """
    builders = [module for module in model.modules() if hasattr(module, "build_adj")]
    for builder in builders:
        built, build = [], builder.build_adj

        def record(*arguments, built=built, build=build):
            built.append(build(*arguments).detach())
            return built[-1]

        builder.build_adj = record
        gradient()
        again = itertools.cycle(built)
        builder.build_adj = lambda *_, again=again: next(again)


def hessian_error(unlearner, config, split):
    """Relative distance of a Hessian product by differentiation from central differences of the gradient."""
    import torch

    from recbole_unlearn.influence.operators import AutogradCurvature
    from recbole_unlearn.models.view import View
    from recbole_unlearn.training.fit import new_model

    with double_precision():
        model = new_model(config, split)
        model.load_state_dict(unlearner.state_dict)
        view = View(in_double(model), split.train, split.data_row)
        rows = np.arange(0, split.n_rows, max(split.n_rows // DIRECTION_ROWS, 1))
        batches = view.batches(rows, unlearner.log.epoch(0)[rows], np.ones(len(rows)))
        curvature = AutogradCurvature(view.parameters, batches, loss=view.loss)
        hold_graphs(model, curvature.gradient)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(curvature.size, generator=generator, dtype=torch.float64)
        sizes = [p.numel() for p in view.parameters]
        for table in model.modules():  # padding rows are no parameters: they get no gradient
            if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
                for p, part in zip(view.parameters, v.split(sizes), strict=True):
                    if p is table.weight:
                        part.view(p.shape)[table.padding_idx] = 0
        product, gradients = curvature.matvec(v), []
        start = [p.detach().clone() for p in view.parameters]
        for sign in (1, -1):
            with torch.no_grad():
                for p, s, d in zip(view.parameters, start, v.split(sizes), strict=True):
                    p.copy_(s + sign * STEP * d.view(p.shape))
            gradients.append(curvature.gradient())
        difference = (gradients[0] - gradients[1]) / (2 * STEP)
        return float((product - difference).norm() / difference.norm())


ASKED = {
    "dataset": DATASET,
    "epochs": 2,
    "seeds": 1,
    "count": option(200, "interactions to forget"),
    "curvature_triples": option(help="fewer than the default: faster, less faithful", type=int),
}


@takes(**ASKED, model="")
def one_smoke(options):
    """Tells figures of one model, means over the seeds so far, after each; ``refused`` is why it is refused."""
    changes = {"curvature_triples": options.curvature_triples} if options.curvature_triples else {}
    found = []
    for n in range(options.seeds):
        found.append(run_seed(options.model, options.dataset, options.epochs, options.count, 2020 + n, changes))
        common.tell(means_of(found))
        if "refused" in found[0]:
            return


def means_of(found):
    """One dict of those of the seeds."""
    if "refused" in found[0]:
        return found[0]
    shared = [key for key in found[0]["auc"] if all(key in each["auc"] for each in found)]
    auc = {key: [each["auc"][key] for each in found] for key in shared}
    seconds = {key: sum(each["seconds"][key] for each in found) / len(found) for key in found[0]["seconds"]}
    means = {key: sum(values) / len(found) for key, values in auc.items()}
    return found[0] | {"auc": means, "auc_of_seeds": auc, "seconds": seconds}


def opened(name, dataset, chosen, count):
    """Configuration, split, and rows to forget; InputError where the model is refused."""
    from recbole.utils import init_seed

    from recbole_unlearn.data.split import Split
    from recbole_unlearn.settings.config import UnlearnConfig
    from recbole_unlearn.settings.conflicts import supported

    with tempfile.TemporaryDirectory() as folder:
        if name in VECTORS:
            dataset, chosen = write_vectors(dataset, folder), chosen | {"data_path": folder}
        keys = {"method": "influence", **chosen, "forget_count": count}
        config = supported(UnlearnConfig(name, dataset, None, keys))
        init_seed(config["seed"], config["reproducibility"])
        split = Split(config)
    logging.getLogger().setLevel(logging.ERROR)
    return config, split, np.sort(np.random.default_rng(0).choice(split.n_rows, count, replace=False))


def trained(config, split, folder):
    """A model trained in a folder, its unlearner, and the seconds of training."""
    from recbole_unlearn.training.fit import train
    from recbole_unlearn.training.trained import Checkpoint
    from recbole_unlearn.unlearner import InfluenceUnlearner

    config["checkpoint_dir"] = folder
    path = Path(folder) / "model.pth"
    original, _, seconds = train(config, split, path)
    unlearner = InfluenceUnlearner(Checkpoint.written(path, config).trained(split))
    unlearner.warm_up()
    return original, unlearner, seconds


def again(unlearner, rows, shift=0.0, masks=None):
    """`train_paired` of an unlearner's model without some rows.

    ``shift``: relative noise of the initial weights; ``masks``: seed of what training draws itself, such as dropout.
    """
    import torch

    from recbole_unlearn.training import again as training

    begin, noise = training.begin, torch.Generator().manual_seed(0)

    def shifted(model, log):
        begin(model, log)
        with torch.no_grad():
            for value in model.parameters() if shift else ():
                value.mul_(1 + shift * torch.randn(value.shape, generator=noise))
        if masks is not None:
            torch.manual_seed(masks)

    path, seed = unlearner.trained.path, unlearner.config["seed"]
    with patch.object(training, "begin", shifted):
        return training.train_paired(unlearner.config, unlearner.split, f"{path}.paired", path, rows, seed)[0]


def repeats(unlearner):
    """How far training again without anything forgotten is from the weights, over their way; None: nobody can tell."""
    found = unlearner.problem.reproduction()
    return None if found is None else found[0]


def run_seed(name, dataset, epochs, count, seed, changes):
    """Figures of one model of one seed; the Hessian product of the first."""
    import torch

    from recbole_unlearn.errors import InputError
    from recbole_unlearn.evaluation.forgetting import percentiles
    from recbole_unlearn.training.fit import new_model, train

    torch.set_num_threads(1)
    chosen = settings(name, epochs) | changes | {"use_gpu": False, "seed": seed}
    try:
        config, split, rows = opened(name, dataset, chosen, count)
    except InputError as error:
        return {"refused": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        original, unlearner, train_seconds = trained(config, split, folder)
        unlearned = unlearner.unlearn(rows)
        report = unlearned.report()
        report.pop("history", None)
        model = new_model(config, split, data=split.remaining_dataset(rows))
        model.load_state_dict(unlearned.state_dict)
        retrained, _, retrain_seconds = train(config, split, Path(folder) / "retrained.pth", rows, log_negatives=False)
        judged = {"original": original, "unlearned": model, "retrained": retrained}
        distance = repeats(unlearner)
        if distance is not None and distance < REPEATS:
            judged["paired"] = again(unlearner, rows)
        result = {
            "auc": {key: float(percentiles(each, split, rows).mean()) for key, each in judged.items()},
            "repeats": distance,
            "seconds": {"train": train_seconds, "unlearn": unlearned.seconds, "retrain": retrain_seconds},
            "epochs": epochs,
            "sequence": SEQUENCE if KINDS[name] == "sequential" else None,
            "smaller": SMALLER.get(name, {}),
            "report": report,
        }
        if name != "BPR" and seed == 2020:
            try:
                result["hessian_error"] = hessian_error(unlearner, config, split)
            except (RuntimeError, ValueError, TypeError) as error:
                result["hessian_failed"] = " ".join(str(error).split())[:200]
    return result


def way(auc, to, least):
    """Change of the AUC by unlearning over that by another training, where the latter is large enough to tell."""
    change = auc["original"] - auc.get(to, auc["original"])
    return f"{(auc['original'] - auc['unlearned']) / change:.0%}" if abs(change) > least else "–"


def table(folder, dataset):
    """The Markdown matrix of all models that have run."""
    lines = [
        "| model | kind | forget-set AUC: original | unlearned | retrained | way to retrained | paired | way to paired "
        "| seconds | Retrain, seconds | Hessian product, error | approximated, or why refused |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    works = 0
    for name, kind in KINDS.items():
        file = folder / f"{dataset}-{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        if "auc" not in found:
            why = found.get("refused") or f"fails: {found.get('failed')}"
            lines.append(f"| {name} | {kind} |{' – |' * 9} {why} |")
            continue
        works += 1
        auc, seconds = found["auc"], found["seconds"]
        ways = {key: way(auc, key, least) for key, least in (("retrained", 0.002), ("paired", 0.0005))}
        if "auc_of_seeds" in found and len(found["auc_of_seeds"]["original"]) > 1:
            auc = {key: mean_sd(values) for key, values in found["auc_of_seeds"].items()}
            kind += f", {len(found['auc_of_seeds']['original'])} seeds"
        else:
            auc = {key: f"{value:.4f}" for key, value in auc.items()}
        error = f"{found['hessian_error']:.0e}" if "hessian_error" in found else "closed form" if name == "BPR" else "–"
        if KINDS[name] == "sequential":
            kind += f", {found.get('sequence', 50)} items"
        kind += "".join(f", {key}: {value}" for key, value in found.get("smaller", {}).items())
        approximated = list(found["report"].get("approximated", []))
        if triples := found["report"].get("curvature_triples"):
            stops = len(found["report"].get("stops", []))
            approximated.append(f"curvature: of {triples:,} triples" + (f", along {stops} snapshots" if stops else ""))
        lines.append(
            f"| {name} | {kind} | {auc['original']} | {auc['unlearned']} | {auc['retrained']} "
            f"| {ways['retrained']} | {auc.get('paired', '–')} | {ways['paired']} "
            f"| {seconds['unlearn']:.1f} | {seconds['retrain']:.1f} | {error} "
            f"| {'; '.join(approximated)} |"
        )
    return works, "\n".join(lines) + "\n"


@takes(
    **ASKED,
    models=option(",".join(KINDS), "comma-separated"),
    timeout=option(900, "seconds a model"),
    again=option(False, "run models that are done, too"),
    output=RESULTS,
)
def smoke(options):
    """Two epochs: does the step work, and is its Hessian product that of differences?"""
    folder = options.output / "smoke"
    for name in options.models.split(","):
        file = folder / f"{options.dataset}-{name}.json"
        if file.exists() and not options.again and "failed" not in json.loads(file.read_text()):
            continue
        start, words = perf_counter(), [f"--model={name}", *common.words(options, *ASKED)]
        found, failed = common.apart(__file__, "one-smoke", *words, timeout=options.timeout, threads=1)
        found = found or {"failed": (failed or "nothing printed")[:300]}  # the seeds that are done count
        common.write_json(file, found)
        told = found.get("auc") or found.get("refused") or found.get("failed")
        print(f"{name} ({perf_counter() - start:.0f} s): {told}", flush=True)
    works, text = table(folder, options.dataset)
    title = f"# RecBole's pairwise models on {options.dataset}: {works} work\n\n"
    note = (
        f"{options.count} random interactions forgotten, {options.epochs} epochs, one seed where a row names no "
        "other number, one thread, machine not idle. *Way to retrained*: share of the change of the AUC that "
        "retraining makes; – where that is less than .002. The noise of retraining is of the order of .005 a seed. "
        "*Paired*: the original's own training again without the forgotten rows, with the same initial weights, "
        "batches, dropout, and negatives, except that forgotten items are back in the pool: the only such noise. – of "
        "models whose training does not repeat to within a hundredth. *Way to paired*: – where it changes the AUC by "
        "less than .0005.\n\n"
        f"`python benchmarks/models.py smoke --dataset={options.dataset} --epochs={options.epochs} "
        f"--seeds={options.seeds}`\n\n"
    )
    common.write(title + note + text, options.output, "smoke")


# Full trainings

SHIFT = 1e-6  # of initial weights, relative
SEED = 2020
STEPS = "along the training", "and the last third", "one step"  # the first is the default, with snapshots
LAW = 2  # of steps: since the second one they take back the mean gradient, and the last epochs have their masks
AS_BEFORE = ("BPR", "LightGCN", "SGL", "ConvNCF")  # whose steps are those of the first
POINTWISE = "DMF NeuMF NAIS FISM NNCF RippleNet"  # general and knowledge-aware models that RecBole trains on labels
ONLY_CE = ("BERT4Rec", "GRU4RecCPR", "SASRecCPR", "RepeatNet")  # sequential models that RecBole has no BPR loss for,
ONLY_BPR = ("FPMC", "TransRec", *VECTORS)  # or no cross entropy, which is the default of all others
CE = [name for name in SEQUENTIAL.split() if name not in ONLY_BPR]
TRAINED = [*(name for name in KINDS if name not in ONLY_CE), *POINTWISE.split(), *(f"{name} (CE)" for name in CE)]
EVERY = [*TRAINED, "NCEPLRec", "ENMF", "MKR", "DiffRec", "LDiffRec"]
PAIRS_ALWAYS = ("SINE",)  # has negatives drawn, whatever its loss, as RecBole trains it
LONGER = 50  # items of a history: RecBole's default


def full_settings(name, epochs, device, items=LONGER):
    """Configuration of one of `TRAINED` as RecBole trains it by default, and the model's name."""
    model, _, loss = name.partition(" ")
    chosen = {"epochs": epochs, "show_progress": False, "state": "ERROR"}
    if model in KINDS:
        chosen = settings(model, epochs, {} if device == "cuda" and model != "MCCLK" else None, items)
        if loss:
            chosen |= {"loss_type": "CE"} | ({} if model in PAIRS_ALWAYS else {"train_neg_sample_args": None})
        del chosen["eval_step"]
    return model, chosen | {"gpu_id": "0" if device == "cuda" else ""}


FULL = {
    "dataset": DATASET,
    "data_path": "",
    "epochs": option(60, "at most; validation stops training before, as RecBole does by default"),
    "count": option(200, "random interactions to forget"),
    "device": option("cpu", choices=["cuda", "cpu"]),
    "items": option(LONGER, "longest history"),
}


@takes(**FULL, model="", seed=SEED, guarded=False, beside=False, only_exact=False)
def one(options):
    """Tells the figures of one training of one model, after each part of the work all that are known by then."""
    import torch

    from recbole_unlearn.errors import InputError
    from recbole_unlearn.evaluation.forgetting import percentiles
    from recbole_unlearn.training.compiled import COMPILED
    from recbole_unlearn.training.fit import new_model
    from recbole_unlearn.unlearner import InfluenceUnlearner
    from recbole_unlearn.unlearners.influence import Influence
    from recbole_unlearn.unlearners.replay import Replay

    torch.set_num_threads(1)
    name, chosen = full_settings(options.model, options.epochs, options.device, options.items)
    smaller = {key: chosen[key] for key in SMALLER.get(name, {}) if key in chosen}
    found = {"on": common.versions(options.device), "smaller": smaller}
    chosen |= {"seed": options.seed} | ({"data_path": options.data_path} if options.data_path else {})
    config, split, rows = opened(name, options.dataset, {"method": "auto", **chosen}, options.count)
    with tempfile.TemporaryDirectory() as folder:
        original, unlearner, seconds = trained(config, split, folder)
        training, before = unlearner.trained, percentiles(original, split, rows)
        found |= {"train_seconds": seconds, "epochs": unlearner.log.n_epochs, "original": float(before.mean())}
        common.tell(found)
        model, changes = new_model(config, split, data=split.remaining_dataset(rows)), {}

        def judge(state):
            model.load_state_dict(state)
            return percentiles(model, split, rows) - before

        n = unlearner.log.n_epochs
        ways = dict(zip(STEPS, ({}, {"last_epochs": max(n // 3, 1)}, {"log_epochs": n}), strict=True))
        for step, settings in () if options.only_exact else ways.items():
            way = replace(Influence(), **settings)
            if step != STEPS[-1] and not unlearner.problem.stops(way):
                continue
            try:
                result = InfluenceUnlearner(training, way).unlearn(rows)
            except InputError as refused:
                found["no_step"] = str(refused)
                break
            report = {key: value for key, value in result.report().items() if key != "history"}
            changes[step] = judge(result.state_dict)
            unlearned = float((before + changes[step]).mean())
            steps = found.setdefault("steps", {})
            steps[step] = {"seconds": result.seconds, "unlearned": unlearned, "report": report, "law": LAW}
            common.tell(found)
        exact = InfluenceUnlearner(training, replace(Replay(), rows="all"))
        exact.warm_up()
        result = exact.unlearn(rows)
        truth = judge(result.state_dict)
        unlearned, kernels = float((before + truth).mean()), type(model) in COMPILED
        found["exact"] = {"seconds": result.seconds, "unlearned": unlearned, "kernels": kernels}
        for step, change in changes.items():
            found["steps"][step] |= common.toward(change, truth)
        common.tell(found)
        if options.guarded:
            found["guard"] = exact.check().distance
            common.tell(found)
        others = {"beside": {"shift": SHIFT}} if options.beside else {}
        if others and any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
            others["masks"] = {"masks": SEED + 1}
        for key, changed in others.items():
            whole, without = (judge(again(unlearner, gone, **changed).state_dict()) for gone in (rows[:0], rows))
            found[key] = {"shift": float(whole.mean()), **common.toward(without - whole, truth)}
            common.tell(found)


def full_table(runs):
    """(how many models work, Markdown) of what has run: model -> seed -> figures. Means, and ranges over the seeds."""
    lines = [
        "| model | seeds | epochs | forget-set AUC: original | exact | guard | exact, seconds / training's | step "
        "| way to exact | correlation | step, seconds / training's | exact with itself: way, correlation "
        "| with other masks | or why not |",
        "|:--|--:|--:|--:|--:|--:|--:|:--|--:|--:|--:|--:|--:|:--|",
    ]
    works = 0

    def ranged(values, form):
        low, high = format(min(values), form), format(max(values), form)
        return format(np.mean(values), form) + (f" ({low} to {high})" if low != high else "")

    for name in filter(runs.get, TRAINED):
        done = [each for each in runs[name].values() if "exact" in each]
        why = next((each["failed"] for each in runs[name].values() if "failed" in each), "")
        if not done:
            lines.append(f"| {name} |{' – |' * 12} {why} |")
            continue
        works += 1
        beside, masks = (
            "; ".join(f"{each[key]['way']:.0%}, {each[key]['correlation']:.3f}" for each in done if key in each) or "–"
            for key in ("beside", "masks")
        )
        shared = [
            name, str(len(done)), ranged([each["epochs"] for each in done], ".0f"),
            mean_sd([each["original"] for each in done]), mean_sd([each["exact"]["unlearned"] for each in done]),
            "; ".join(f"{each['guard']:.0e}" for each in done if each.get("guard") is not None) or "–",
            f"{np.mean([each['exact']['seconds'] / each['train_seconds'] for each in done]):.2f}",
        ]  # fmt: skip
        remarks = [f"{key}: {value}" for key, value in done[0]["smaller"].items()]
        remarks += [done[0]["no_step"]] if "no_step" in done[0] else []
        for step in STEPS:
            steps = [(each["steps"][step], each["train_seconds"]) for each in done if step in each.get("steps", {})]
            if steps:
                figures = [
                    ranged([each["way"] for each, _ in steps], ".0%"),
                    ranged([each["correlation"] for each, _ in steps], ".2f"),
                    f"{np.mean([each['seconds'] / seconds for each, seconds in steps]):.2f}",
                ]
                old = name not in AS_BEFORE and any(each.get("law") != LAW for each, _ in steps)
                cells = [*shared, step + " (before)" * old, *figures, beside, masks, "; ".join(remarks)]
                lines.append(f"| {' | '.join(cells)} |")
        if not any(each.get("steps") for each in done):
            lines.append(f"| {' | '.join([*shared, *['–'] * 4, beside, masks, '; '.join(remarks)])} |")
    return works, "\n".join(lines) + "\n"


def carried_out(options, file, jobs, flags=()):
    """Trainings, (seed, model) each, that are not done yet: all that are known then, model -> seed -> figures."""
    file = options.output / f"{file}.json"
    runs = json.loads(file.read_text()) if file.exists() else {}
    ends, lock = perf_counter() + 60 * options.minutes, threading.Lock()
    guarded, beside = getattr(options, "guarded", SEED), getattr(options, "beside", 0)

    def done(name, seed):
        found = runs.get(name, {}).get(str(seed), {})
        return "exact" in found and "failed" not in found and (seed != beside or "beside" in found)

    def run(job):
        (seed, name), left = job, ends - perf_counter()
        if left < 1 or done(name, seed) and not options.again:
            return
        words = [f"--model={name}", f"--seed={seed}", *common.words(options, *FULL), *flags]
        words += ["--guarded"] * (seed == guarded) + ["--beside"] * (seed == beside)
        start = perf_counter()
        found, failed = common.apart(__file__, "one", *words, timeout=min(options.timeout, left), threads=1)
        found |= {"failed": failed.removeprefix("recbole_unlearn.errors.InputError: ")[:400]} if failed else {}
        with lock:
            runs.setdefault(name, {})[str(seed)] = found
            common.write_json(file, runs)
        steps = {
            step: (round(each["way"], 3), round(each["correlation"], 3))
            for step, each in found.get("steps", {}).items()
            if "way" in each
        }
        print(f"{name} {seed} ({perf_counter() - start:.0f} s): {steps} {failed or ''}", flush=True)

    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(run, jobs))
    return runs


def exact_table(runs):
    """(how many models work, Markdown) of what has run: model -> seed -> figures."""
    from recbole_unlearn.training.fit import LIMIT

    lines = [
        "| model | trained again by | guard | forget-set AUC: original | exact | exact, seconds / training's "
        "| or why not |",
        "|:--|:--|--:|--:|--:|--:|:--|",
    ]
    works = 0
    for name in filter(runs.get, EVERY):
        found = runs[name][str(SEED)]
        if "exact" not in found:
            lines.append(f"| {name} |{' – |' * 5} {found['failed']} |")
            continue
        exact, guard = found["exact"], found.get("guard")
        works += guard is not None and guard <= LIMIT
        cells = [name, "kernels" if exact["kernels"] else "its trainer", "–" if guard is None else f"{guard:.0e}"]
        cells += [f"{found['original']:.4f}", f"{exact['unlearned']:.4f}"]
        cells += [f"{exact['seconds'] / found['train_seconds']:.2f}"]
        why = found.get("failed") or ("" if guard is not None else "nobody knows the order of its batches")
        cells += ["; ".join([*(f"{key}: {value}" for key, value in found["smaller"].items()), *([why] if why else [])])]
        lines.append(f"| {' | '.join(cells)} |")
    return works, "\n".join(lines) + "\n"


RUNS = {
    "processes": option(1, "trainings at once"),
    "minutes": option(600.0, "after which nothing is begun, and what runs is cut off"),
    "timeout": option(7200, "seconds a training with its requests"),
    "again": option(False, "what is done, too"),
    "output": RESULTS,
}


@takes(**{**FULL, "epochs": 2, "items": SEQUENCE}, models=option(",".join(EVERY), "comma-separated"), **RUNS)
def exact(options):
    """Two epochs of every model: is it trained again without what is forgotten, and does that tell its training?"""
    name = f"models-exact-{options.dataset}"
    runs = carried_out(options, name, [(SEED, model) for model in options.models.split(",")], ["--only_exact"])
    works, text = exact_table(runs)
    note = (
        f"{options.count} random interactions forgotten after {options.epochs} epochs (histories of "
        f"{options.items} items; sequential models with BPR's loss, and with cross entropy where that is said), by "
        "training again without them (`method: replay`). *Guard*: how far the same with nothing forgotten ends from "
        "the stored weights, over the training's way: 0 is bit by bit. After so few epochs the AUC says that something "
        "was forgotten, no more. Seconds of training are with validation, of two epochs: a request's constant parts "
        "weigh more than in a whole training.\n\n"
        f"`python benchmarks/models.py exact --dataset={options.dataset} --epochs={options.epochs}`\n\n"
    )
    title = f"# Training again, every model of RecBole, on {options.dataset}: {works} of {len(runs)}\n\n"
    common.write(title + note + text, options.output, name)


@takes(
    **FULL,
    models=option(",".join(TRAINED), "comma-separated"),
    seeds=3,
    guarded=option(SEED, "seed of the trainings that are also run again with nothing forgotten"),
    beside=option(0, "seed of the trainings whose paired training is also compared with itself"),
    **RUNS,
)
def models(options):
    """Each model as RecBole trains it by default: exact requests, and influence steps beside them."""
    jobs = [(SEED + n, name) for n in range(options.seeds) for name in options.models.split(",")]
    runs = carried_out(options, f"models-{options.dataset}", jobs)
    works, text = full_table(runs)
    note = (
        f"{options.count} random interactions forgotten after RecBole's default training of at most {options.epochs} "
        "epochs with validation and early stopping (sequential models with BPR's loss, and with cross entropy where "
        "that is said). *Exact* (`method: replay`): training again without the forgotten rows, with the original's "
        "random numbers, by its own trainer (BPR, LightGCN, FPMC, TransRec, LINE and CFKG by kernels). *Guard*: how "
        "far the same with nothing forgotten ends from the stored weights, over the training's way. *Step* (`method: "
        "influence`): what is taken where exactness would last too long; *and the last third*: with at most so many "
        "of the last epochs trained again after it (`last_epochs`); *(before)*: by the law before the mean gradient "
        "was taken back (CHANGELOG), not measured anew. *Way to exact*: change of the forget-set AUC "
        "by the step over that by the exact request; *correlation*: of the changes of the forgotten interactions' "
        "percentiles. *Exact with itself*: the same of training again from initial weights a millionth away, what any "
        "prediction can reach; *with other masks*: with other dropout, whose root is what can be reached by what does "
        "not know the masks. Seconds of training are with validation.\n\n"
        f"`{common.command(options)}`\n\n"
    )
    title = f"# Every model of RecBole that is trained row by row, on {options.dataset}: {works} of {len(runs)}\n\n"
    common.write(title + note + text, options.output, f"models-{options.dataset}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    common.run(__doc__, [models, exact, smoke], [one, one_smoke])
