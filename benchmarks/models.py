"""Which of RecBole's pairwise models can be unlearned from: each is trained, checked, made to forget, and retrained.

    python benchmarks/models.py --dataset=ml-100k                   # all that is not done yet
    python benchmarks/models.py --models=LightGCN,GRU4Rec --again
    python benchmarks/models.py exact
    python benchmarks/models.py paired --models=SASRec,GRU4Rec,FPMC --seeds=3

Every model runs in a process of its own and leaves a JSON file in ``results/models``; all of them make
``results/models.md``. Whatever the state, the table is written; a run that was cut off goes on with the rest.
"""

import itertools
import json
import logging
import os
import shutil
import tempfile
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
    "FDSA SASRecF GRU4RecF BERT4Rec S3Rec GRU4RecCPR SASRecCPR GRU4RecKG KSR"
)
KINDS = {
    **dict.fromkeys(GENERAL.split(), "general"),
    **dict.fromkeys(KNOWLEDGE.split(), "knowledge-aware"),
    **dict.fromkeys(SEQUENTIAL.split(), "sequential"),
}
INTERACTIONS = ["user_id", "item_id", "rating", "timestamp"]
VECTORS = {"GRU4RecKG": ["ent"], "KSR": ["ent", "rel"]}  # pre-trained ones of entities and relations that they need
VECTOR_SIZE = 64
SEQUENCE = 20  # items of a history, of RecBole's default 50: two cores train some models for a quarter of an hour
SMALL_TRANSFORMER = {"hidden_size": 16, "inner_size": 64}
SMALLER = {  # than RecBole's defaults, of models that two cores would train for longer still
    # it compares all pairs of the graph's 34,000 entities in every batch, most of which stand in one fact
    "MCCLK": {"entity_kg_num_interval": "[5,inf)"},
    "ConvNCF": {"cnn_channels": [1, 8, 8, 8, 8]},
    "NextItNet": {"embedding_size": 16, "block_num": 1},
    "SINE": {"embedding_size": 16},
    **dict.fromkeys(["FEARec", "LightSANs", "GCSAN"], SMALL_TRANSFORMER),
}
DIRECTION_ROWS = 256  # rows that the Hessian product is checked on
REPEATS = 0.01  # distance of a training done again from the recorded one, over its whole way
STEP = 1e-8  # of its central differences: hardly any kink of a max or ReLU lies so near


def settings(name, dataset, epochs):
    """Configuration of one model."""
    columns = {"inter": INTERACTIONS}
    if KINDS[name] == "knowledge-aware" or name in VECTORS:
        columns |= {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
    if name in ("FDSA", "SASRecF", "GRU4RecF", "S3Rec"):
        columns["item"] = ["item_id", "class"]
    chosen = {"epochs": epochs, "eval_step": 0, "load_col": columns, "show_progress": False, "state": "ERROR"}
    chosen |= SMALLER.get(name, {})
    if KINDS[name] == "sequential":
        chosen |= {"loss_type": "BPR", "MAX_ITEM_LIST_LENGTH": SEQUENCE}
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
    "dataset": "ml-100k",
    "epochs": 2,
    "seeds": 1,
    "count": option(200, "interactions to forget"),
    "curvature_triples": option(help="fewer than the default: faster, less faithful", type=int),
}


@takes(**ASKED, model="")
def one(options):
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


def again(unlearner, rows, shift=0.0):
    """`train_paired` of an unlearner's model without some rows. ``shift``: relative noise of the initial weights."""
    import torch

    from recbole_unlearn.training import fit as training

    begin, noise = training.begin, torch.Generator().manual_seed(0)

    def shifted(model, log):
        begin(model, log)
        with torch.no_grad():
            for value in model.parameters() if shift else ():
                value.mul_(1 + shift * torch.randn(value.shape, generator=noise))

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
    chosen = settings(name, dataset, epochs) | changes | {"use_gpu": False, "seed": seed}
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
        file = kept(folder, dataset, name)
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


def kept(folder, dataset, name):
    """The file of a model's figures."""
    return folder / f"{dataset}-{name.replace(' ', '-')}.json"


def run_each(options, folder, command):
    """Run a command for each model that is not done, in a process of its own, and keep what it tells."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.models.split(","):
        file = kept(folder, options.dataset, name)
        if file.exists() and not options.again and "failed" not in json.loads(file.read_text()):
            continue
        start, words = perf_counter(), common.words(options, *ASKED)
        found, failed = common.apart(__file__, command, f"--model={name}", *words, timeout=options.timeout, threads=1)
        found = found or {"failed": (failed or "nothing printed")[:300]}  # the seeds that are done count
        common.write_json(file, found)
        told = found.get("auc") or found.get("refused") or found.get("failed")
        print(f"{name} ({perf_counter() - start:.0f} s): {told}", flush=True)


@takes(
    **ASKED,
    models=option(",".join(KINDS), "comma-separated"),
    timeout=option(900, "seconds a model"),
    again=option(False, "run models that are done, too"),
    output=RESULTS,
)
def models(options):
    folder = options.output / "models"
    run_each(options, folder, "one")
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
        f"`python benchmarks/models.py --dataset={options.dataset} --epochs={options.epochs} "
        f"--seeds={options.seeds}`\n\n"
    )
    common.write(title + note + text, options.output, "models")


# Requests against paired training

SEED = 2020
SHIFT = 1e-6  # of initial weights, relative
ONE_STEP = "one step"  # at the last weights


@contextmanager
def training(name, dataset, epochs, count, seed):
    """A training to be done again: what `opened` and `trained` return."""
    import torch

    torch.set_num_threads(1)
    chosen = settings(name, dataset, epochs) | {"use_gpu": False, "seed": seed}
    config, split, rows = opened(name, dataset, chosen, count)
    with tempfile.TemporaryDirectory() as folder:
        yield config, split, rows, *trained(config, split, folder)


def run_paired(name, dataset, epochs, count, seed, variants, check):
    """Figures of one model of one seed."""
    from recbole_unlearn.evaluation.forgetting import percentiles
    from recbole_unlearn.training.fit import new_model
    from recbole_unlearn.unlearner import InfluenceUnlearner

    with training(name, dataset, epochs, count, seed) as (config, split, rows, original, unlearner, seconds):
        found = {"train_seconds": seconds, "unlearned": {}}
        asked = {"original": percentiles(original, split, rows)}
        model = new_model(config, split, data=split.remaining_dataset(rows))
        for variant in variants:
            triples = "all" if variant == ONE_STEP else int(variant) if variant.isdecimal() else variant
            last = epochs if variant == ONE_STEP else "all"
            way = replace(unlearner.way, log_epochs=last, curvature_triples=triples)
            result = InfluenceUnlearner(unlearner.trained, way).unlearn(rows)
            model.load_state_dict(result.state_dict)
            asked[variant] = percentiles(model, split, rows)
            report = {key: value for key, value in result.report().items() if key != "history"}
            found["unlearned"][variant] = {"seconds": result.seconds, "report": report}
        start = perf_counter()
        asked["paired"] = percentiles(again(unlearner, rows), split, rows)
        found["paired_seconds"] = perf_counter() - start
        if check:
            whole = again(unlearner, rows[:0])
            found["nothing_forgotten"] = float((percentiles(whole, split, rows) - asked["original"]).mean())
    found["auc"] = {key: float(value.mean()) for key, value in asked.items()}
    truth = asked["paired"] - asked["original"]
    for variant in variants:
        change = asked[variant] - asked["original"]
        found["unlearned"][variant] |= {
            "way": float(change.mean() / truth.mean()),
            "correlation": float(np.corrcoef(change, truth)[0, 1]),
        }
    return found


def beside(name, dataset, epochs, count, seed):
    """How paired training agrees with itself where the initial weights differ by a millionth.

    Returns:
        dict: ``shift`` of the original's AUC, ``way`` of the one request's change to the other's, ``correlation``.
    """
    from recbole_unlearn.evaluation.forgetting import percentiles

    with training(name, dataset, epochs, count, seed) as (config, split, rows, original, unlearner, _):
        before = percentiles(original, split, rows)
        change = percentiles(again(unlearner, rows), split, rows) - before
        shifted, without = (percentiles(again(unlearner, gone, SHIFT), split, rows) for gone in (rows[:0], rows))
    return {
        "shift": float((shifted - before).mean()),
        "way": float((without - shifted).mean() / change.mean()),
        "correlation": float(np.corrcoef(without - shifted, change)[0, 1]),
    }


def paired_table(folder, dataset):
    """Markdown of all that has run: a row a model and variant, means and sample standard deviations over seeds."""
    lines = [
        "| model | seeds | request | forget-set AUC: original | unlearned | paired | way to paired "
        "| correlation | seconds / training's | nothing forgotten | beside: way, correlation |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in KINDS:
        files = sorted(folder.glob(f"{dataset}-{name}-*.json"))
        runs = [json.loads(file.read_text()) for file in files]
        for variant in dict.fromkeys(v for each in runs for v in each["unlearned"]):
            some = [each for each in runs if variant in each["unlearned"]]
            mine = [each["unlearned"][variant] for each in some]
            auc = {key: [each["auc"][key] for each in some] for key in ("original", variant, "paired")}
            moved, truth = (np.mean(auc[key]) - np.mean(auc["original"]) for key in (variant, "paired"))
            ratio = np.mean([each["seconds"] / run["train_seconds"] for each, run in zip(mine, some, strict=True)])
            ways = [each["way"] for each in mine]
            ways = f" ({min(ways):.0%} to {max(ways):.0%})" if len(ways) > 1 else ""
            rounding = [run["nothing_forgotten"] for run in some if "nothing_forgotten" in run]
            tried = [
                (file.stem.rpartition("-")[2], run["beside"])
                for file, run in zip(files, runs, strict=True)
                if "beside" in run
            ]
            agreement = [f"{each['way']:.0%}, {each['correlation']:.2f} ({seed})" for seed, each in tried]
            cells = [
                name, str(len(some)), variant, *(mean_sd(auc[key]) for key in auc), f"{moved / truth:.0%}{ways}",
                mean_sd([each["correlation"] for each in mine], 2), f"{ratio:.2f}",
                mean_sd(rounding) if rounding else "–", "; ".join(agreement) or "–",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@takes(
    dataset="ml-100k",
    models="SASRec,GRU4Rec,FPMC",
    epochs=5,
    count=option(200, "random interactions to forget"),
    seeds=3,
    variants=option("auto,one step", "separated by commas; numbers: see results"),
    output=RESULTS,
    beside=option("", "seeds that are done, to try paired training itself on"),
    again=option(False, "seeds that are done too"),
)
def paired(options):
    """A request against the model's own training again without the forgotten rows, with the same dropout.

    Two trainings from different random streams differ by more than a small request does. Here the second training
    has the first one's initial weights, batches, negatives and dropout masks; the places of forgotten rows in their
    batches are taken by rows from an epoch's end, and they are in no history. What is left is the effect of the
    request (and of rounding: see the column *nothing forgotten*, the training again with all rows). For the
    sequential models that need no pre-trained vectors.
    """
    folder, variants = options.output / "paired", options.variants.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.models.split(","):
        asked = name, options.dataset, options.epochs, options.count
        for seed in range(SEED, SEED + options.seeds):
            file = folder / f"{options.dataset}-{name}-{seed}.json"
            if file.exists() and not options.again:
                continue
            found = run_paired(*asked, seed, variants, seed == SEED)
            common.write_json(file, found)
            print(name, seed, found["auc"], {v: found["unlearned"][v]["correlation"] for v in variants}, flush=True)
        for seed in map(int, filter(None, options.beside.split(","))):
            file = folder / f"{options.dataset}-{name}-{seed}.json"
            found = json.loads(file.read_text())
            found["beside"] = beside(*asked, seed)
            common.write_json(file, found)
            print(name, seed, "beside", found["beside"], flush=True)
    title = f"# Requests against paired training on {options.dataset}\n\n"
    note = (
        f"{options.count} random interactions forgotten, {options.epochs} epochs, one thread, machine not idle. "
        "*Paired*: the model's own training again without the forgotten rows, with the same initial weights, batches, "
        "negatives and dropout. *Way to paired*: change of the forget-set AUC by unlearning over that by paired "
        "training, of the means over the seeds and from the lowest to the highest seed. *Correlation*: of the changes "
        "of the forgotten interactions' percentiles. *Nothing forgotten*: change of the AUC where the training is run "
        "again with all rows, one seed. *Beside* (`--beside=SEED`): the same for paired training itself, where the "
        "initial weights differ by a millionth: what any prediction can reach.\n\n"
        f"`python benchmarks/models.py paired --models=MODEL --epochs={options.epochs} --seeds=SEEDS --variants=...` "
        "(*request*: `auto` follows the training along its snapshots, `one step` takes one at the last weights, a "
        "number takes it with the curvature of so many triples)\n\n"
    )
    common.write(title + note + paired_table(folder, options.dataset), options.output, "paired")


# Exact requests of every model

POINTWISE = "DMF NeuMF NAIS NNCF RippleNet"  # general and knowledge-aware models that RecBole trains on labels
CE = [name for name in SEQUENTIAL.split() if name not in VECTORS]  # trained with cross entropy by default
EXACT = [*KINDS, *POINTWISE.split(), *(f"{name} (CE)" for name in CE)]


def exact_settings(name, dataset, epochs):
    """Configuration of one of `EXACT`, and the model's name."""
    model, _, loss = name.partition(" ")
    chosen = settings(model, dataset, epochs) if model in KINDS else {"epochs": epochs, "eval_step": 0}
    if model in KINDS and KINDS[model] == "sequential" and loss:
        chosen |= {"loss_type": "CE", "train_neg_sample_args": None}
    exact = {"method": "replay", "replay_rows": "all"}
    return model, chosen | exact | {"show_progress": False, "state": "ERROR", "use_gpu": False}


@takes(**ASKED, model="")
def one_exact(options):
    """Tells the figures of one model's exact request; ``refused`` is why it is refused."""
    import torch

    from recbole_unlearn.errors import InputError

    torch.set_num_threads(1)
    try:
        common.tell(exact_request(options.model, options.dataset, options.epochs, options.count))
    except InputError as error:
        common.tell({"refused": str(error)})


def exact_request(name, dataset, epochs, count):
    """Figures of one of `EXACT`; InputError where the model is refused, or its training cannot be run again."""
    from recbole_unlearn.evaluation.forgetting import percentiles
    from recbole_unlearn.training.fit import train

    name, chosen = exact_settings(name, dataset, epochs)
    config, split, rows = opened(name, dataset, chosen, count)
    with tempfile.TemporaryDirectory() as folder:
        original, unlearner, train_seconds = trained(config, split, folder)
        guard, judged = unlearner.check(), {"original": original}
        start = perf_counter()
        judged["exact"] = unlearner.forget(rows=rows).model
        seconds = {"train": train_seconds, "exact": perf_counter() - start}
        judged["retrained"], _, _ = train(config, split, Path(folder) / "retrained.pth", rows, 77, log_negatives=False)
        auc = {key: float(percentiles(model, split, rows).mean()) for key, model in judged.items()}
    return {"auc": auc, "guard": guard.distance, "seconds": seconds, "smaller": SMALLER.get(name, {})}


def exact_table(folder, dataset):
    """(how many work, Markdown rows of all that have run)."""
    lines = [
        "| model | guard | forget-set AUC: original | exact | retrained | exact, seconds / training's | or why not |",
        "|:--|--:|--:|--:|--:|--:|:--|",
    ]
    works = 0
    for name in EXACT:
        file = kept(folder, dataset, name)
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        if "auc" not in found:
            lines.append(f"| {name} |{' – |' * 5} {found.get('refused') or 'fails: ' + found['failed']} |")
            continue
        works += 1
        auc, seconds = found["auc"], found["seconds"]
        cells = [name, f"{found['guard']:.0e}", *(f"{auc[key]:.4f}" for key in ("original", "exact", "retrained"))]
        smaller = "".join(f"{key}: {value}; " for key, value in found["smaller"].items())
        lines.append(f"| {' | '.join(cells)} | {seconds['exact'] / seconds['train']:.2f} | {smaller} |")
    return works, "\n".join(lines) + "\n"


@takes(
    **ASKED,
    models=option(",".join(EXACT), "comma-separated"),
    timeout=option(900, "seconds a model"),
    again=option(False, "run models that are done, too"),
    output=RESULTS,
)
def exact(options):
    """Training again without the forgotten rows, of every model, by its own trainer: the guard's figure, and the cost.

    *Guard*: how far the same with nothing forgotten ends from the stored weights, over the training's way.
    """
    folder = options.output / "exact_models"
    run_each(options, folder, "one-exact")
    works, text = exact_table(folder, options.dataset)
    note = (
        f"{options.count} random interactions of {options.dataset} forgotten after {options.epochs} epochs by "
        "training again with the original's random numbers, by its own trainer (BPR and LightGCN compiled), one "
        "seed, one thread, machine not idle. *Guard*: how far the same with nothing forgotten ends from the stored "
        "weights, over the way that training moved them. *Retrained*: with other random numbers, whose noise is of the "
        "order of .005.\n\n"
        f"`python benchmarks/models.py exact --epochs={options.epochs}`\n\n"
    )
    common.write(f"# Exact requests: {works} models\n\n{note}{text}", options.output, "exact_models")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    common.run(__doc__, [models, paired, exact], [one, one_exact])
