"""Runs that train many models: fidelity over seeds, methods and models side by side, the paper's experiments."""

from contextlib import ExitStack
from pathlib import Path

from recbole.utils import init_logger

from recbole_unlearn import methods
from recbole_unlearn.comparison.fidelity import fidelity
from recbole_unlearn.comparison.figures import Comparison, forget_sets, requests, summary
from recbole_unlearn.comparison.other_models import other_models
from recbole_unlearn.comparison.paper import Paper, paper_arguments
from recbole_unlearn.comparison.populations import AUDITED, Audit, set_names
from recbole_unlearn.comparison.populations import audited as audit_methods
from recbole_unlearn.comparison.seeds import TrainedSeeds
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.reports import per_example, tables
from recbole_unlearn.runs import output
from recbole_unlearn.runs.result import Result
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.conflicts import AUDIT, EXPERIMENT, FIDELITY, check_sizes, to_train
from recbole_unlearn.settings.given import Given
from recbole_unlearn.settings.shown import hidden
from recbole_unlearn.storage.files import in_one_line


def run(given: Given, held: ExitStack, saved: bool) -> Result:
    """The run that is asked for."""
    runs = {EXPERIMENT: paper, AUDIT: audited, FIDELITY: measured}
    return runs.get(given.many[0], compared)(given, held, saved)


def measured(given: Given, held: ExitStack, saved: bool) -> Result:
    """Train the seeds, measure the methods, write the tables."""
    config = to_train(given)
    request = ForgetRequest.from_config(config)
    split = Split.seeded(config)
    rows = request.rows(split)
    check_sizes(config, split)
    folder = _begun(given, held, config, saved)
    trained = TrainedSeeds(given.arguments, output.cache_folder(config, "fidelity"))
    figures = fidelity(trained, rows, config["fidelity_seeds"], show_progress=config["show_progress"])
    title = (
        f"{config['model']} on {config['dataset']}: {len(rows)} interactions forgotten ({request.kind}), "
        f"{config['fidelity_seeds']} seeds"
    )
    files = _files(folder, saved)
    if saved:
        tables.write_fidelity(figures, title, folder)
    return Result("fidelity", {"fidelity": figures, "title": title, "files": files})


def compared(given: Given, held: ExitStack, saved: bool) -> Result:
    """Train originals and retrained models, measure methods and models, write the tables."""
    config = to_train(given)
    names = methods.chosen(["ours"] if config["methods"] is None else config["methods"], config)
    settings = methods.all_settings(names, config["method_args"])
    models = other_models(config["compare_models"], *given.arguments)
    requests(config)
    folder = _begun(given, held, config, saved)
    trained = TrainedSeeds(given.arguments, output.cache_folder(config, "comparison"))
    sets, seeds = forget_sets(trained.config, trained.split), config["comparison_seeds"]
    results = Comparison(trained, settings, seeds, config["show_progress"]).run(sets, models, partial=True)
    summaries = {name: (each["interactions"], summary(each["figures"])) for name, each in results["sets"].items()}
    title = f"{config['model']} on {config['dataset']}, {seeds} seed{'s' if seeds > 1 else ''}"
    cutoff = 10 if 10 in config["topk"] else max(config["topk"])
    files = _files(folder, saved)
    if saved:
        page = tables.write_compared(results, summaries, title, folder, cutoff)
    else:
        page = tables.compared_markdown(results, summaries, title, cutoff)
    return Result("comparison", {"comparison": results, "title": title, "files": files}, page)


def audited(given: Given, held: ExitStack, saved: bool) -> Result:
    """Train populations of models, tell each method's from retrained ones pair by pair, write tables and pictures."""
    config = to_train(given)
    names = methods.suited(AUDITED, config) if config["methods"] is None else methods.chosen(config["methods"], config)
    chosen, sets = audit_methods(names, config, config["method_args"]), set_names(config["comparison_sets"], config)
    folder = _begun(given, held, config, saved)
    cache, models = output.cache_folder(config, "comparison"), config["audit_models"]
    audit = Audit(given.arguments, cache, chosen, models, show_progress=config["show_progress"])
    results = audit.run(sets)
    title = f"{config['model']} on {config['dataset']}, pair by pair, {models} models each"
    files = _files(folder, saved)
    if saved:
        page = per_example.write(results, title, audit.agreement, folder)
    else:
        page = per_example.markdown(results, title, audit.agreement)
    return Result("audit", {"audit": results, "title": title, "files": files}, page)


def _begun(given, held, config, saved):
    """The run's folder, not made yet; from here on something is written."""
    folder = output.output_folder(config)
    output.check_paths(config, folder, given.files, saved)
    held.enter_context(in_one_line(folder))
    with hidden(config):
        init_logger(config)
    return folder


def _files(folder, saved):
    """What a result says of its files, whose folder is made."""
    if not saved:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    return {"tables": str(folder)}


def paper(given: Given, held: ExitStack, saved: bool) -> Result:
    """The paper's tables and figures, which are always written."""
    quick = given.get("quick") is True
    arguments = paper_arguments(given, quick)
    config = UnlearnConfig(*arguments)
    names = methods.chosen("all" if config["methods"] is None else config["methods"], config)
    changes = config["method_args"]
    if given.get("method_args") is None:  # the experiment's own are for all methods
        changes = {name: changes[name] for name in names if name in changes}
    settings = methods.all_settings(names, changes)
    folder, dataset = Path(config["output_dir"] or "results"), config["dataset"]
    output.check_paths(config, folder, given.files, True)
    with in_one_line(folder):
        trained = TrainedSeeds(arguments, output.cache_folder(config, "comparison"))
        experiment = Paper(trained, settings, config["comparison_seeds"], quick, config["show_progress"])
        page = experiment.run(folder)
    return Result("paper", {"files": {"page": str(folder / f"{dataset}.md"), "figures": str(folder / dataset)}}, page)
