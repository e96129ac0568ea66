"""One model forgets: open, forget, judge, write."""

import logging
import secrets
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import init_logger

from recbole_unlearn import distributed
from recbole_unlearn.data.dataset import described
from recbole_unlearn.data.forget import ForgetRequest
from recbole_unlearn.data.split import Split
from recbole_unlearn.devices import copies
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation import forgetting, ranking
from recbole_unlearn.evaluation.churn import changed_users, churn
from recbole_unlearn.evaluation.exposure import exposure
from recbole_unlearn.evaluation.geometry import embeddings, geometry
from recbole_unlearn.reports import tables
from recbole_unlearn.runs import output
from recbole_unlearn.runs.erasure import Erasure, beyond_rows, told_apart
from recbole_unlearn.runs.result import Result
from recbole_unlearn.runs.stream import Served, serve
from recbole_unlearn.settings.conflicts import check_sizes, judged, to_train
from recbole_unlearn.settings.given import Given
from recbole_unlearn.settings.shown import hidden, plain, public
from recbole_unlearn.storage.files import in_one_line, scratch_folder
from recbole_unlearn.storage.paths import MODEL, RETRAINED, UNLEARNED
from recbole_unlearn.training.again import train_paired
from recbole_unlearn.training.fit import distance, new_model, train
from recbole_unlearn.training.trained import Checkpoint, Trained, not_paired
from recbole_unlearn.training.trainer import check_listed, count_in, judge
from recbole_unlearn.unlearner import InfluenceUnlearner
from recbole_unlearn.unlearners.base import Unlearned


class Run:
    """A request that names one model: a checkpoint, or one to train.

    All that can be refused is refused when it is made, before any training, and with nothing written.

    Args:
        given: the request.
        held: takes the locks and what is to be tidied up at the end.
        saved: whether to keep checkpoints, log and results on disk.
    """

    def __init__(self, given: Given, held: ExitStack, saved: bool = True):
        self.held, self.saved = held, saved
        checkpoint = Checkpoint.open(given, held)
        self.config = config = judged(checkpoint.config) if checkpoint else to_train(given)
        self.request = ForgetRequest.from_config(config)
        self.output = output.output_folder(config, looks=config["dry_run"])
        output.check_paths(config, self.output, given.files, saved)
        self.split = checkpoint.split() if checkpoint else Split.seeded(config)
        stored = checkpoint.stored if checkpoint else None
        if saved:
            self.request = told_apart(config, self.split, stored, self.request)
        self.rows = self.request.rows(self.split, saved and beyond_rows(config))
        check_sizes(config, self.split)
        arguments = (given.model, given.dataset, None, plain(given.values))
        distributed.order("open", arguments=arguments, fingerprint=self.split.fingerprint)
        self.checkpoint = checkpoint
        adopts = checkpoint is not None and checkpoint.log is None
        self.paired = config["compare"] == "paired"
        if self.paired and distributed.shared():
            raise InputError("compare: paired trains in one process; leave torchrun and nproc out, or compare: retrain")
        self.unlearner = self._opened(checkpoint) if checkpoint and not (adopts and config["dry_run"]) else None
        self.erasure = Erasure.of(config, self.split, stored, self.request, self.rows)
        if self.unlearner and self.request.kind != "requests":
            self.erasure.check_stale(self.unlearner.will_be_exact(self.rows))
        self.lines = self.erasure.lines  # of the file as it is now
        self.left = self.erasure.left(self.request) if saved else None
        self.suppression = output.suppression_list(config) if saved else None
        if checkpoint and config["suppression"] and config["compare"] == "retrain":  # found now, not after forgetting
            left_out = "the model to compare with would be trained on them: leave it out by compare: none"
            check_listed(config, self.split.remaining_dataset(self.rows), left_out)
        self.trail = output.audit_file(config, self.output) if saved else None
        if self.unlearner and not config["dry_run"]:  # after what is found sooner
            self.unlearner.check(config["show_progress"])

    def _begin(self):
        """From here on something is written."""
        config, checkpoint = self.config, self.checkpoint
        self.held.enter_context(in_one_line(self.output))
        if self.saved:
            self.output.mkdir(parents=True, exist_ok=True)  # before RecBole makes its log: it may not be possible
        with hidden(config):
            init_logger(config)
            self.logger = logging.getLogger()
            self.logger.info(str(config))
        self.logger.info(described(self.split.train._dataset))
        if checkpoint and checkpoint.stock:
            self.logger.info(f"{checkpoint.stock}, which has no log, is adopted as {checkpoint.path}")

    def _opened(self, checkpoint):
        """The unlearner of a checkpoint, which all ranks share."""
        shared = distributed.shared()
        if shared:
            assert checkpoint.log
            distributed.order("open_unlearner", checkpoint=str(checkpoint.path), run_id=checkpoint.log.run_id)
        trained = checkpoint.trained(self.split)
        if self.paired and (reason := not_paired(trained)):
            raise InputError(f"compare: paired is not possible: {reason}; give compare: retrain")
        unlearner = InfluenceUnlearner(trained, shared=shared)
        compared = {"compare": self.config["compare"] != "none", "drift_every": self.config["drift_every"]}
        for key in filter(compared.get, compared):
            if reason := unlearner.problem.own_draws or unlearner.problem.out_of_order():
                raise InputError(f"{key}: {self.config[key]} is not possible: {reason}; leave it out (compare: none)")
        if self.request.kind != "requests":
            unlearner.expect(self.rows)
        return unlearner

    def run(self) -> Result:
        """Train if need be, forget, retrain to compare, judge all, write."""
        self._begin()
        with scratch_folder() as scratch:
            folder = output.claim(self.held, self.output) if self.saved else scratch
            self.config["checkpoint_dir"] = str(folder)
            unlearner, seconds, trainer = self._trained(folder)
            setup_seconds, unlearned, served = self._forget(unlearner, scratch)
            models, seconds = self._models(unlearner, unlearned, folder, seconds)
            files = {name: str(folder / f"{name}.pth") for name in models} if self.saved else {}
            if files:
                files["original"] = str(self.checkpoint.path if self.checkpoint else folder / "model.pth")
            result = Result(
                "run",
                {
                    "model": self.config["model"],
                    "dataset": self.config["dataset"],
                    "forget_set": {"kind": self.request.kind, **self.split.counts(self.rows)},
                    **self._judged(trainer, models, seconds, unlearner.trained),
                    "unlearning": {**unlearned.report(), "setup_seconds": setup_seconds},
                    "guard": (unlearner.check().coarse() if self.config["purge"] else unlearner.check()).report(),
                    "files": files,
                    "settings": public(self.config, seed=not self.config["purge"]),
                    **({"stream": served.report()} if served else {}),
                    **({"lines": self.lines} if self.lines else {}),
                    **({"left": self.left} if self.left else {}),
                },
            )
            if self.saved:
                self._write_for_serving(folder, models)
                self._write(result, folder, unlearner, unlearned, unlearner.requests if served else ())
        return result

    def _trained(self, folder: Path) -> tuple[InfluenceUnlearner, float | None, Any]:
        """The unlearner of the original, the seconds of its training if it was trained here, and what judges."""
        config, judges = self.config, self.config["evaluate"] != "none"
        if self.unlearner:
            unlearner, seconds = self.unlearner, None
            trainer = judge(config, self.split, unlearner.trained.model) if judges else None
        else:
            _, trainer, seconds = train(config, self.split, folder / MODEL)
            unlearner = self._opened(Checkpoint.written(folder / MODEL, config))
            unlearner.check(config["show_progress"])
            trainer.eval_collector.data_collect(self.split.train)
        return unlearner, seconds, trainer

    def _forget(self, unlearner: InfluenceUnlearner, scratch: Path) -> tuple[float, Unlearned, Served | None]:
        """Seconds to load the kernels, what came out, and how a stream of requests went."""
        start = perf_counter()
        unlearner.warm_up()
        setup_seconds = perf_counter() - start
        config, served = self.config, None
        self.erasure.rest_of(self.split)  # not before: the guard trained on all of them again
        if self.request.kind == "requests":
            unlearner.model = unlearner.trained.copy()
            together, every, progress = (config[key] for key in ("request_batch", "drift_every", "show_progress"))
            unread = sum(map(len, self.request.unread.values()))
            served = serve(unlearner, self.request.value, scratch, together, every, progress, unread)
            unlearned = served.unlearned
        else:
            unlearned = unlearner.unlearn(self.rows, show_progress=config["show_progress"])
            unlearner.apply(self.rows, unlearned)
        self.erasure.check_stale(unlearned.training is not None)
        self.logger.info(f"forgot {len(self.rows)} interactions in {unlearned.seconds:.3g} s")
        return setup_seconds, unlearned, served

    def _models(self, unlearner, unlearned, folder, seconds):
        """Original, unlearned and, if wanted, retrained model, and the seconds that each took.

        Where no row goes there is nothing to compare with: the original is what retraining would give.
        """
        models = {
            "original": unlearner.trained.model,
            "unlearned": unlearner.served(new_model(self.config, self.split)),
        }
        times = {"original": seconds, "unlearned": unlearned.seconds}
        path, trained = folder / RETRAINED, unlearner.trained
        if not len(self.rows):
            return models, times
        if self.paired:
            seed = self.config["seed"] if trained.seed is None else trained.seed
            arguments = self.config, self.split, path, trained.path, self.rows, seed
            models["retrained"], times["retrained"] = train_paired(*arguments)
        elif self.config["compare"] == "retrain":
            models["retrained"], _, times["retrained"] = train(
                self.config, self.split, path, self.rows, log_negatives=False
            )
        return models, times

    def _judged(self, trainer, models: dict[str, AbstractRecommender], seconds, trained: Trained) -> dict[str, Any]:
        """What the models are worth: figures of each, and of all together."""
        config, split, rows = self.config, self.split, self.rows
        judges, judged = config["evaluate"] != "none", split.judged_without(rows)
        evaluated, ranks = {name: {"seconds": seconds[name]} for name in models}, {}
        for name, model in models.items() if judges else ():
            if len(rows):
                ranks[name] = forgetting.percentiles(model, split, rows)
                evaluated[name] |= {"forget_auc": float(ranks[name].mean())}
            data = split if name == "original" else judged
            count_in(trainer, split, rows[:0] if name == "original" else rows)
            figures = ranking.evaluate(trainer, model, data, config["seed"], config["show_progress"])
            evaluated[name] |= {"ranking": figures}
            if len(split.spam):
                evaluated[name]["exposure"] = exposure(model, split, config["topk"])
        sentence, figures, paired = None, None, None
        compared = "retrained" in ranks
        if compared:
            before, after, goal = (ranks[name] for name in ("original", "unlearned", "retrained"))
            sentence, figures = forgetting.verdict(before, after, goal, "paired" if self.paired else "retrained")
            if self.paired:
                states = [copies(models[name].state_dict()) for name in ("original", "retrained", "unlearned")]
                paired = forgetting.paired(before, after, goal, figures["gap_closed"], distance(*states))
        return {
            "models": evaluated,
            "speed_up": seconds["retrained"] / seconds["unlearned"] if "retrained" in seconds else None,
            "verdict": sentence,
            "verdict_figures": figures,
            **({"paired": paired} if paired else {}),
            "rank_histogram": {name: forgetting.histogram(each) for name, each in ranks.items()},
            "churn": churn(models, judged, rows) if judges else {},
            # nobody waits for a map that has nothing to be compared with
            "geometry": geometry(models, trained.log, rows, trained.epochs, mapped=compared) if judges else {},
        }

    def _write_for_serving(self, folder: Path, models: dict[str, AbstractRecommender]):
        """What those who keep lists, or look for neighbours, want of the new model, where it is asked for."""
        if top := self.config["changed_lists"]:
            changed = changed_users(models["original"], models["unlearned"], self.split, self.rows, top)
            output.write_changed(folder, changed)
        if self.config["embeddings"]:
            pair = embeddings(models["unlearned"])
            assert pair
            output.write_embeddings(folder, pair, self.split, self.rows)

    def _write(self, result: Result, folder: Path, unlearner: InfluenceUnlearner, unlearned: Unlearned, requests):
        """The new model last of all: whatever fails before leaves none."""
        trained, trail, path = unlearner.trained, self.trail, folder / UNLEARNED
        with output.recorded_or_gone(path):
            inter, whole = self.erasure.removal.get("inter"), self.erasure.whole
            more = {"guarded": unlearner.guard, "whole": whole, "moments": unlearner.moments()}
            output.save_unlearned(path, trained, unlearned, self.rows, inter, **more)
            if trail:
                result["audit"] = {"file": str(trail), "request": secrets.token_hex(8)}
            tables.write(output.lasting(result), folder)
            named, unread = self.request.named(self.split), self.request.unread
            output.suppress(self.suppression, self.split, self.rows, named, unread)
            output.record(result, trained, unlearned, trail, requests)
        output.purge(result, self.config, trained.path, self.erasure, trail)
        tables.write(output.lasting(result), folder)
