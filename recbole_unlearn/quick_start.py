"""`run_unlearn`: one call, or one command, from a request to what is written."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from recbole_unlearn import distributed
from recbole_unlearn.comparison.seeds import end_if_starting
from recbole_unlearn.runs import many
from recbole_unlearn.runs.follower import follow
from recbole_unlearn.runs.plan import planned
from recbole_unlearn.runs.result import Result
from recbole_unlearn.runs.run import Run
from recbole_unlearn.settings.conflicts import check_dry_run, check_many, check_purge, ranks
from recbole_unlearn.settings.given import Files, Given
from recbole_unlearn.storage.files import sweep_scratch
from recbole_unlearn.unlearner import in_turn


@in_turn()
def run_unlearn(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Files = None,
    config_dict: Mapping[str, Any] | None = None,
    saved: bool = True,
) -> Result | None:
    """Train a RecBole model (or take a checkpoint), forget, retrain to compare, evaluate all under both protocols.

    Args:
        model: RecBole model name, or a class of your own; default: the checkpoint's, or BPR.
        dataset: RecBole data set name; default: the checkpoint's, or the bundled ml-100k.
        config_file_list: YAML files.
        config_dict: keys of RecBole and of ``properties/overall.yaml``; above files in priority.
        saved: whether to keep checkpoints, log and results on disk.

    Returns:
        What was found, a dict. None on ranks other than 0, where torchrun or RecBole's ``nproc`` starts several.

    Raises:
        InputError: anything the user gave that cannot be used, before any training.
    """
    end_if_starting()
    given = Given.read(model, dataset, config_file_list, config_dict)
    with ExitStack() as held:
        if not held.enter_context(distributed.joined(**ranks(given))):
            return follow()
        sweep_scratch()
        check_dry_run(given)
        check_purge(given, saved)
        check_many(given)
        if given.many:
            return many.run(given, held, saved)
        run = Run(given, held, saved)
        return planned(run) if run.config["dry_run"] else run.run()
