"""Train, forget, retrain, compare: the only module that wires everything together."""

import logging
import secrets
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from recbole.utils import init_logger, init_seed

from recbole_unlearn import distributed
from recbole_unlearn import methods as unlearning_methods
from recbole_unlearn.comparison.fidelity import fidelity
from recbole_unlearn.comparison.figures import Comparison, forget_sets, requests, summary
from recbole_unlearn.comparison.other_models import other_models
from recbole_unlearn.comparison.paper import Paper, paper_arguments
from recbole_unlearn.data.dataset import described
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.evaluation.exposure import exposure
from recbole_unlearn.evaluation.geometry import geometry
from recbole_unlearn.opening import check_cutoffs, check_purge, configure, experiment, open_unlearner, ranks
from recbole_unlearn.reports import tables as reporting
from recbole_unlearn.runs.follower import follow
from recbole_unlearn.runs.output import (
    audit_file,
    check_paths,
    claim,
    erasure_of,
    in_one_line,
    output_folder,
    purge,
    record,
    recorded_or_gone,
    save_unlearned,
)
from recbole_unlearn.runs.stream import serve
from recbole_unlearn.session import UnlearnSession
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.shown import hidden, plain, public
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import scratch_folder, sweep_scratch
from recbole_unlearn.trainer import make_trainer
from recbole_unlearn.training import TrainedSeeds, new_model, train
from recbole_unlearn.unlearners import guard


def run_unlearn(model=None, dataset=None, config_file_list=None, config_dict=None, saved=True):
    """Train a RecBole model (or take a checkpoint), forget, retrain to compare, evaluate all under both protocols.

    Args:
        model (str, optional): RecBole model name; default: the checkpoint's, or BPR.
        dataset (str, optional): RecBole data set name; default: the checkpoint's, or the bundled ml-100k.
        config_file_list (list of str, optional): YAML files.
        config_dict (dict, optional): keys of RecBole and of ``properties/overall.yaml``; above files in priority.
        saved (bool): whether to keep checkpoints, log and results on disk.

    Returns:
        dict: with ``methods`` or ``compare_models``, ``comparison`` (see `comparison.Comparison.run`) and its ``page``;
        else ``models`` (original, unlearned, retrained: ranking metrics, forget_auc, seconds; exposure of spam; with
        ``evaluate: none`` seconds only),
        ``forget_set``, ``unlearning`` (solver report), ``guard`` (whether the log tells the training), ``stream`` (of
        requests), ``speed_up``, ``verdict``, ``files``, ``settings``. None on ranks other than 0, where torchrun or
        RecBole's ``nproc`` starts several.

    Raises:
        InputError: anything the user gave that cannot be used, before any training.
    """
    with ExitStack() as held:
        if not held.enter_context(distributed.joined(**ranks(config_file_list, config_dict))):
            return follow()
        return _run(held, model, dataset, config_file_list, config_dict, saved)


def _run(held, model, dataset, config_file_list, config_dict, saved):
    """`run_unlearn`, with the locks that it takes in ``held``."""
    sweep_scratch()
    check_purge(config_file_list, config_dict, saved)
    if experiment(config_file_list, config_dict):
        return _experiment(model, dataset, config_file_list, config_dict)
    config, stored, log = configure(held, model, dataset, config_file_list, config_dict)
    if config["methods"] is not None or config["compare_models"] is not None:
        return _comparison(held, config, (config["model"], config["dataset"], config_file_list, config_dict), saved)
    request = ForgetRequest.from_config(config)
    output = output_folder(config)
    check_paths(config, output, config_file_list, saved)
    init_seed(config["seed"], config["reproducibility"])
    split = Split(config)
    if stored:
        split = split.align(log)
    rows = request.rows(split)
    check_cutoffs(config, split)
    arguments = (model, dataset, plain(config_file_list), plain(config_dict))
    distributed.order("open", arguments=arguments, fingerprint=split.fingerprint)
    if stored:
        original, unlearner = open_unlearner(config, split, stored, log, config["checkpoint"])
    erasure = erasure_of(config, split, rows, stored) if saved else {}
    trail = audit_file(config["audit"], output) if saved else None
    if stored:  # after what is found sooner
        guarded = guard.check(unlearner, stored, log, config["show_progress"])
    held.enter_context(in_one_line(output))
    if saved:
        output.mkdir(parents=True, exist_ok=True)  # before RecBole makes its log: it may not be possible
    with hidden(config):
        init_logger(config)
        logger = logging.getLogger()
        logger.info(str(config))
    logger.info(described(split.train._dataset))

    if config["evaluate"] == "fidelity":
        return _fidelity(
            config, (model, dataset, config_file_list, config_dict), request, rows, output if saved else None
        )

    with scratch_folder() as scratch:
        folder = claim(held, output) if saved else scratch
        config["checkpoint_dir"] = str(folder)
        seconds: dict = {"original": None}
        judges = config["evaluate"] != "none"
        if stored:
            path = Path(config["checkpoint"])
            trainer = make_trainer(config, original, trains=False) if judges else None
        else:
            path = folder / "model.pth"
            original, trainer, seconds["original"] = train(config, split, path)
            stored, log = checkpoints.load(path)
            original, unlearner = open_unlearner(config, split, stored, log, path)
            guarded = guard.check(unlearner, stored, log, config["show_progress"])
        if trainer:
            trainer.eval_collector.data_collect(split.train)

        start = perf_counter()
        unlearner.warm_up()
        setup_seconds = perf_counter() - start
        served = session = None
        if request.kind == "requests":
            serving = new_model(config, split)
            serving.load_state_dict(original.state_dict())
            session = UnlearnSession(config, split, stored, log, serving, unlearner)
            together, drift_every, progress = (config[k] for k in ("request_batch", "drift_every", "show_progress"))
            served = serve(session, request.value, scratch, together, drift_every, progress)
            unlearned = served.unlearned
        else:
            unlearned = unlearner.unlearn(rows, show_progress=config["show_progress"])
        seconds["unlearned"] = unlearned.seconds
        logger.info(f"forgot {len(rows)} interactions in {unlearned.seconds:.3g} s")
        files = {"original": str(path), "unlearned": str(folder / "unlearned.pth")}
        if not served:
            unlearner.apply(rows, unlearned)
        models = {"original": original, "unlearned": unlearner.served(new_model(config, split))}
        if config["compare"] == "retrain":
            files["retrained"] = str(folder / "retrained.pth")
            models["retrained"], _, seconds["retrained"] = train(
                config, split, folder / "retrained.pth", rows, log_negatives=False
            )

        evaluated, ranks, judged = {name: {"seconds": seconds[name]} for name in models}, {}, split.judged_without(rows)
        for name, each in models.items() if judges else ():
            ranks[name] = forgetting.percentiles(each, split, rows)
            evaluated[name] = {
                "ranking": ranking.evaluate(
                    trainer, each, split if name == "original" else judged, config["seed"], config["show_progress"]
                ),
                "forget_auc": float(ranks[name].mean()),
                "seconds": seconds[name],
            }
            if len(split.spam):
                evaluated[name]["exposure"] = exposure(each, split, config["topk"])
        sentence, figures = (None, None)
        if "retrained" in models:
            sentence, figures = forgetting.verdict(*(ranks[name] for name in ("original", "unlearned", "retrained")))
        result = {
            "model": config["model"],
            "dataset": config["dataset"],
            "forget_set": {"kind": request.kind, **split.counts(rows)},
            "models": evaluated,
            "unlearning": {**unlearned.report(), "setup_seconds": setup_seconds},
            "guard": guarded.report(),
            "speed_up": seconds["retrained"] / seconds["unlearned"] if "retrained" in seconds else None,
            "verdict": sentence,
            "verdict_figures": figures,
            "rank_histogram": {name: forgetting.histogram(each) for name, each in ranks.items()},
            "geometry": geometry(models, log, rows, stored["triple_log"]["epochs"]) if judges else {},
            "files": files if saved else {},
            "settings": public(config),
        }
        if served:
            result["stream"] = served.report()
        if saved:  # last of all: whatever fails before leaves no new model
            kept = unlearned, split, rows, config, erasure.get("inter"), guarded
            with recorded_or_gone(folder / "unlearned.pth"):
                save_unlearned(folder / "unlearned.pth", stored, log, *kept)
                if trail:
                    result["audit"] = {"file": str(trail), "request": secrets.token_hex(8)}
                reporting.write(result, folder)
                done = session.requests if session else None
                record(result, config, path, stored, unlearned, trail, done)
            purge(result, config, path, erasure, trail)
            reporting.write(result, folder)
    return result


def _fidelity(config, arguments, request, rows, folder):
    """Train the seeds, measure the methods, write the tables."""
    arguments = (config["model"], config["dataset"], *arguments[2:])
    trained = TrainedSeeds(arguments, config["fidelity_cache"] or Path(config["checkpoint_dir"]) / "fidelity")
    figures = fidelity(trained, rows, config["fidelity_seeds"], show_progress=config["show_progress"])
    title = (
        f"{config['model']} on {config['dataset']}: {len(rows)} interactions forgotten ({request.kind}), "
        f"{config['fidelity_seeds']} seeds"
    )
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        reporting.write_fidelity(figures, title, folder)
    return {"fidelity": figures, "title": title, "files": {"tables": str(folder)} if folder else {}}


def _comparison(held, config, arguments, saved):
    """Train originals and retrained models, measure methods and models, write the tables."""
    names = unlearning_methods.chosen(config["methods"]) if config["methods"] is not None else ["ours"]
    settings = unlearning_methods.all_settings(names, config["method_args"])
    models = other_models(config["compare_models"], *arguments)
    requests(config)
    folder = output_folder(config)
    held.enter_context(in_one_line(folder))
    with hidden(config):
        init_logger(config)
    cache = config["comparison_cache"] or Path(config["checkpoint_dir"]) / "comparison"
    trained = TrainedSeeds(arguments, cache)
    sets, seeds = forget_sets(trained.config, trained.split), config["comparison_seeds"]
    results = Comparison(trained, settings, seeds, config["show_progress"]).run(sets, models)
    summaries = {name: (each["interactions"], summary(each["figures"])) for name, each in results["sets"].items()}
    title = f"{config['model']} on {config['dataset']}, {seeds} seed{'s' if seeds > 1 else ''}"
    cutoff = 10 if 10 in config["topk"] else max(config["topk"])
    if saved:
        folder.mkdir(parents=True, exist_ok=True)
        page = reporting.write_compared(results, summaries, title, folder, cutoff)
    else:
        page = reporting.compared_markdown(results, summaries, title, cutoff)
    return {"comparison": results, "page": page, "title": title, "files": {"tables": str(folder)} if saved else {}}


def _experiment(model, dataset, config_file_list, config_dict):
    """The paper's tables and figures."""
    if distributed.shared():
        raise InputError("experiment trains its models in processes of its own; leave torchrun and nproc out")
    quick = UnlearnConfig.peek("quick", config_file_list, config_dict) in (True, "True")
    dataset = dataset or UnlearnConfig.peek("dataset", config_file_list, config_dict) or "ml-100k"
    arguments = paper_arguments(model or "BPR", dataset, config_file_list, config_dict, quick)
    config = UnlearnConfig(*arguments)
    names = unlearning_methods.chosen("all" if config["methods"] is None else config["methods"])
    settings = unlearning_methods.all_settings(names, config["method_args"])
    folder = Path(config["output_dir"] or "results")
    with in_one_line(folder):
        cache = config["comparison_cache"] or Path(config["checkpoint_dir"]) / "comparison"
        trained = TrainedSeeds(arguments, cache)
        paper = Paper(trained, settings, config["comparison_seeds"], quick, config["show_progress"])
        page = paper.run(folder)
    return {"page": page, "files": {"page": str(folder / f"{dataset}.md"), "figures": str(folder / dataset)}}
