"""A trainer that logs every sampled negative and is otherwise RecBole's own: the weights are bit-identical."""

import secrets
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader import TrainDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.model.general_recommender import BPR, NCL, LightGCN
from recbole.trainer.trainer import KGTrainer, NCLTrainer, Trainer
from recbole.utils import InputType, ModelType, get_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler

from recbole_unlearn import distributed
from recbole_unlearn.compat.recbole_models import checkpoint_state, classes_named, clear_caches, replaced
from recbole_unlearn.data.fingerprint import by_user, fingerprint, marks
from recbole_unlearn.data.orders import OrderNote
from recbole_unlearn.data.sampling import (
    ROW,
    DrawnAgain,
    NegativeDraw,
    PairwiseCollate,
    batches,
    drawn_by,
    interaction,
    negatives_in,
    negatives_of,
    numpy_stream,
    own_draws,
    record,
)
from recbole_unlearn.data.split import Split, batch_rows, firsts_of, pairwise_loader
from recbole_unlearn.devices import array, read, torch_stream
from recbole_unlearn.errors import InputError
from recbole_unlearn.evaluation.ranks import RankedLoader
from recbole_unlearn.models.support import refusal, refused
from recbole_unlearn.settings.recbole_keys import known_models
from recbole_unlearn.storage import suppression
from recbole_unlearn.storage.checkpoints import save
from recbole_unlearn.storage.files import remove
from recbole_unlearn.storage.triple_log import Training, TripleLog, log_path, smallest_uint, snapshot_due, start_of
from recbole_unlearn.training.compiled import CompiledEpochs


class _Recorded:
    """A train loader whose iteration also writes down which negatives each row got, and in which batch.

    Set ``keep`` to False to have it write nothing down. Of loaders that are not RecBole's own (``own``) it finds out
    whether their batches are the rows of the data, each once with its negatives: else they are ``untold``.
    """

    keep, stream, untold = True, None, False
    own: str | None = None  # as of `own_draws`

    def __init__(self, loader, position, negatives, dtype):
        self.loader = loader
        self.position = position  # row of the data set -> row of the log
        self.drawn = np.zeros((len(position), negatives), dtype)
        self.step = np.zeros(len(position), np.int32)

    def __iter__(self):
        self.stream = numpy_stream()
        left = np.ones(len(self.position), bool)
        for step, batch in enumerate(drawn_by(self.loader)):
            rows = batch.interaction.pop(ROW, None)
            if self.own and self.keep and not self.untold:
                self.untold = not self._tells(batch, rows, left)
            if self.keep and not self.untold:
                negatives = negatives_in(self.loader, batch).numpy()
                rows = rows[: negatives.shape[1]].numpy()
                record(rows, negatives, step, self.position, self.drawn, self.step)
            yield batch
        self.untold |= bool(self.own and self.keep and left.any())

    def _tells(self, batch, rows, left):
        """Whether a batch is some of the rows that are ``left``, which are taken, and their negatives."""
        loader, columns = self.loader, batch.interaction
        ids = [loader.uid_field, loader.iid_field]
        drawn = [loader.neg_item_id] if loader.dl_format == InputType.PAIRWISE else []
        if rows is None or any(name not in columns or columns[name].shape != rows.shape for name in ids + drawn):
            return False
        if len(rows) % loader.times or not (rows.view(loader.times, -1) == rows[: len(rows) // loader.times]).all():
            return False
        rows, negatives = rows[: len(rows) // loader.times], negatives_in(loader, batch)
        data = loader._dataset.inter_feat
        same = all(torch.equal(columns[name][: len(rows)], data[name][rows]) for name in ids)
        known = bool(((negatives > 0) & (negatives < loader._dataset.item_num)).all())
        new = len(torch.unique(rows)) == len(rows) and left[rows.numpy()].all()
        left[rows.numpy()] = False
        return same and known and new

    @property
    def facts_alone(self):
        """Whether nothing but facts of a knowledge graph was trained on: there would have been negatives."""
        return self.drawn.size and not self.drawn.any()

    def __len__(self):
        return len(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


class Share(_Recorded):
    """A rank's share of each batch, which records the negatives of its rows only.

    Every rank goes through the same batches, draws the negatives of all rows from the same stream, and takes every
    size-th row: none is left out, and none trained on twice, as by RecBole's sampler where sizes do not divide.
    ``weight`` is that of the share's mean loss, for which the mean over ranks is the mean over the batch.
    """

    def __init__(self, loader, position, negatives, dtype):
        super().__init__(loader, position, negatives, dtype)
        self.rank, self.size = distributed.rank_and_size()
        self.batch_rows = batch_rows(loader)
        self.weight = 1.0

    def __iter__(self):
        negatives, self.stream = self.drawn.shape[1], numpy_stream()
        for number, batch in enumerate(batches(self.loader, self.loader.collate_fn, self.batch_rows)):
            rows = batch.interaction.pop(ROW)
            self.step[self.position[rows.numpy()]] = number
            columns = batch.interaction
            n = len(columns[self.loader.neg_item_id]) // negatives
            taken = np.arange(self.rank, n, self.size)
            self.weight = len(taken) * self.size / n
            # a rank that gets nothing of a short last batch takes part with a row that has no weight
            index = torch.from_numpy((np.arange(negatives)[:, None] * n + (taken if len(taken) else [0])).ravel())
            share = Interaction({name: column[index] for name, column in columns.items()})
            if len(taken):
                drawn = share[self.loader.neg_item_id].view(negatives, -1)
                self.drawn[self.position[rows[taken].numpy()]] = drawn.t().numpy()
            yield share

    def __len__(self):
        return -(-self.loader.sample_size // self.batch_rows)

    def loss(self, whole):
        """``calculate_loss`` of a share, from that of a whole batch."""

        def weighted(batch):
            losses = whole(batch)
            if isinstance(losses, tuple):
                return tuple(loss * self.weight for loss in losses)
            return losses * self.weight

        return weighted


class _Steps:
    """Notes down what an optimiser does in an epoch: the learning rate of each step, and its other settings."""

    SETTINGS = ("betas", "eps", "weight_decay", "momentum", "amsgrad")

    def __init__(self, optimizer):
        self.optimizer, self.rates, self.settings = optimizer, [], set()

    def __enter__(self):
        self._handle = self.optimizer.register_step_pre_hook(self._note)
        return self

    def __exit__(self, *error):
        self._handle.remove()

    def _note(self, optimizer, *_):
        for group in optimizer.param_groups:
            self.settings.add((id(group), *(group.get(key) for key in self.SETTINGS)))
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


class _Logging(Trainer):
    """What makes a RecBole trainer of pairwise models keep a :class:`TripleLog` beside the checkpoint.

    Set ``log_negatives=False`` (configuration or attribute) to train without a log; ``log_negatives: drawn`` keeps what
    draws an epoch's negatives again, where it does, instead of them; ``negatives: static`` draws the negatives once
    instead of every epoch. Nothing is logged of models that cannot be unlearned from, nor by ``fit(saved=False)``.
    Where training does what a log cannot tell, the log ends there, and the checkpoint says why.

    Under torch.distributed (RecBole's ``single_spec: False``) it trains with DistributedDataParallel, on the CPU too,
    on batches and negatives that do not depend on the number of ranks. Rank 0 writes one log for all of them.
    """

    def __init__(self, config, model):
        single = config["single_spec"]
        config["single_spec"] = True  # RecBole would wrap the model here already, for a GPU, even if only to evaluate
        Path(config["checkpoint_dir"]).mkdir(parents=True, exist_ok=True)  # RecBole fails where ranks do so at once
        super().__init__(config, model)
        config["single_spec"] = single
        self.shared = not single
        self.distributed_model = None
        self.saved_model_file = _unused(self.saved_model_file)
        self.log_negatives = config["log_negatives"] is not False
        self.triple_log: Any = None  # a TripleLog, once it is opened
        self.no_log = None  # in words, why none is kept though it was wanted
        self._ended = None  # the log until then, which the checkpoint may still need
        self._source = self._position = self._table = None
        self._order, self._settings = OrderNote(), set()
        self._seconds: list[float] = []  # of each epoch
        self._compiled = None  # what trains instead of RecBole's loop, where that was asked for

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """RecBole's ``Trainer.fit``; where it saves nothing, nothing is logged either."""
        check_listed(self.config, train_data._dataset)
        logged = self.log_negatives
        self.log_negatives = logged and saved
        try:
            return super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
        finally:
            self.log_negatives = logged

    @property
    def seconds(self) -> float:
        """That an epoch took, on average."""
        return sum(self._seconds) / max(len(self._seconds), 1)

    @property
    def _logs(self):
        return self.log_negatives and not self.no_log

    def _prepare(self, train_data, own):
        """Make a loader say which row each batch entry is, and the first time open the log.

        ``own``: as of `own_draws`.
        """
        dataset = train_data._dataset
        users = dataset.inter_feat[dataset.uid_field].numpy()
        items = dataset.inter_feat[dataset.iid_field].numpy()
        order = by_user(users)
        static = self.config["negatives"] == "static"
        if self.start_epoch and self._logs and self.triple_log is None:
            self._reopen(users[order], items[order], negatives_of(train_data), static)
        elif self.triple_log and not self._continues(users[order], items[order]):
            self._give_up("it was trained on other interactions too, in a later fit")
        self._position = np.empty(len(order), np.int64)
        self._position[order] = np.arange(len(order))
        if static and self.triple_log and self.triple_log.n_epochs:
            self._table = np.asarray(self.triple_log.epoch(0), np.int64)[self._position]
        self.equip(train_data, static, own)
        if self._logs and not self.triple_log and distributed.leads():
            self._begin_log(train_data, order, static)
        if self.triple_log and own:
            self.triple_log.own_draws = own
        elif self.triple_log:
            self.triple_log.again = DrawnAgain(self.triple_log, train_data, order, batch_rows(train_data))

    def _begin_log(self, train_data, order, static):
        dataset = train_data._dataset
        if any(each.get("step", 1) > 0 for each in self.optimizer.state.values()):  # Adagrad's state is there before
            self._give_up("its optimiser had taken steps before, by a fit that saved nothing for instance")
            return
        if type(self.model) is not self.config.model_class:
            self._give_up(f"its model is a {type(self.model).__name__}; the configuration names {self.config['model']}")
            return
        training = Training(
            run_id=secrets.token_hex(8),
            fingerprint=fingerprint(train_data),
            n_users=dataset.user_num,
            n_items=dataset.item_num,
            negatives=negatives_of(train_data) or 0,
            static=static,
            seed=self.config["seed"],
            optimizer=type(self.optimizer).__name__,
            start=start_of(self._weights()),
        )
        users, items = (dataset.inter_feat[field].numpy()[order] for field in (dataset.uid_field, dataset.iid_field))
        apart = marks(dataset, order)
        self.triple_log = TripleLog.create(log_path(self.saved_model_file), users, items, training, apart)
        self._snapshot()

    def equip(self, loader: TrainDataLoader, static: bool, own: str | None = None) -> None:
        """Make a loader's batches name their rows; static negatives are those of a table, drawn now or before.

        Args:
            own: as of `own_draws`: such loaders make their batches themselves.

        Raises:
            InputError: static negatives are asked of such a loader.
        """
        if isinstance(loader.collate_fn, (PairwiseCollate, _StaticCollate)):  # of a training before
            del loader.collate_fn
        if own and static:
            raise InputError(f"negatives: static draws as RecBole does, and they come from {own}; leave it out")
        if not own and PairwiseCollate.fits(loader):
            collate = PairwiseCollate(loader, type(self.model))
            if static:
                collate.table = collate.draw_table() if self._table is None else self._table
            loader.collate_fn = collate
        else:
            loader._dataset.inter_feat.interaction[ROW] = torch.arange(len(loader._dataset))
            if static:
                loader.collate_fn = _StaticCollate(loader, self._table)

    def _continues(self, users, items):
        """Whether these are the interactions of the log."""
        return np.array_equal(self.triple_log.users, users) and np.array_equal(self.triple_log.items, items)

    def _give_up(self, reason):
        """End the log: what is trained from now on is not what it tells. It stays until its checkpoint is replaced."""
        self.no_log, self._ended, self.triple_log = reason, self.triple_log, None
        self.logger.warning(f"no triple log is kept of this training: {reason}")

    def _reopen(self, users, items, negatives, static):
        """The log of the run that goes on: it must be the one that the checkpoint was written with."""
        if self.shared:
            raise InputError("training goes on in one process only: leave torchrun and nproc out, or train anew")
        tie = read(self.saved_model_file).get("triple_log") or {}
        if "missing" in tie:
            self.no_log = tie["missing"]
            return
        path = log_path(self.saved_model_file)
        if not path.exists():
            self._give_up(f"there is none beside the checkpoint that it goes on from, at {path}")
            return
        log = TripleLog.open(path)
        log.verify()
        fits = (
            tie.get("run_id") == log.run_id
            and 0 < tie.get("epochs", 0) <= log.n_epochs
            and (log.static, log.negatives) == (static, negatives)
            and np.array_equal(log.users, users)
            and np.array_equal(log.items, items)
        )
        if not fits:
            raise InputError(f"checkpoint {self.saved_model_file} and {path} come from different runs; train again")
        log.truncate(tie["epochs"])
        self.triple_log = log

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        if self.shared:
            self.distributed_model = self.distributed_model or DistributedDataParallel(self.model)
        loader = pairwise_loader(train_data)
        if (negatives := negatives_of(loader)) is None:
            return super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)
        if self.config["compiled"] and self._compiled is None:
            self._compiled = CompiledEpochs(self, loader)
        if self.shared:
            distributed.same_draws(self.device)
        own = own_draws(train_data)
        if own and self.shared:
            raise InputError(f"ranks share the batches of RecBole's own loaders, not those of {own}; use one process")
        source = loader, loader._sampler, own
        if source != self._source or (self._logs and self.triple_log is None and distributed.leads()):
            self._prepare(loader, own)
            self._source = source
        dtype = smallest_uint(loader._dataset.item_num - 1)
        recorded = (Share if self.shared else _Recorded)(loader, self._position, negatives, dtype)
        if self.shared:
            loss_func = recorded.loss(loss_func or self.model.calculate_loss)
        else:
            recorded.keep, recorded.own = self.triple_log is not None, own
        begun, start = self._order.begin(loader), perf_counter()
        with _Steps(self.optimizer) as steps:
            if self._compiled:
                loss = self._compiled(recorded, steps.rates)
            elif loader is train_data:
                loss = super()._train_epoch(recorded, epoch_idx, loss_func, show_progress)
            else:
                with replaced(train_data, general_dataloader=recorded):
                    loss = super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)
        self._seconds.append(perf_counter() - start)
        if self.shared:
            loss = distributed.mean(loss, self.device)
            if self.log_negatives:
                distributed.gather(recorded.drawn, self.device)
        if recorded.untold:
            self._give_up(f"batches of {own} are not the rows of its data, each once with its negatives")
        elif recorded.facts_alone:
            self._order.undo()
        if self.triple_log:
            self._append(recorded, OrderNote.end(begun, recorded.step), steps)
        return loss

    def _append(self, recorded, order, steps):
        """Add an epoch to the log."""
        drawn = recorded.drawn
        if recorded.facts_alone:  # the triples are still those of before
            drawn, order = np.array(self.triple_log.epoch(self.triple_log.n_epochs - 1)), self.triple_log.order[-1]
        self._settings |= steps.settings
        if len(self._settings) > 1:
            self._give_up("the optimiser's settings changed while it trained, or are several")
            return
        again = self.config["log_negatives"] == "drawn" and drawn.size and not self.triple_log.static
        again = again and not recorded.own  # which may draw from streams of its own, and would from their next numbers
        self.triple_log.append(drawn, order, steps.rates, stream=recorded.stream if again else None)
        if again and self.triple_log.drawn[-1] is None:
            self.logger.warning("log_negatives: drawn: these negatives cannot be drawn again, and are stored")
        self._snapshot()

    def begin_epoch(self, epoch: int) -> None:
        """What RecBole's ``fit`` of this model does before an epoch."""

    def _valid_epoch(self, valid_data, show_progress=False):
        if not self.shared or _sharded(valid_data):
            return super()._valid_epoch(valid_data, show_progress)
        leads = distributed.leads()
        return distributed.share(super()._valid_epoch(valid_data, show_progress) if leads else None, self.device)

    def _map_reduce(self, result, num_sample):
        return super()._map_reduce(result, num_sample) if self._evaluates_a_part else result

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """RecBole's ``Trainer.evaluate``: the same numbers, faster where `RankedLoader` fits."""
        self._evaluates_a_part = _sharded(eval_data)
        if eval_data and RankedLoader.fits(self, eval_data):
            eval_data, show_progress = RankedLoader(self, eval_data, show_progress), False
        return super().evaluate(eval_data, load_best_model, model_file, show_progress)

    def _snapshot(self):
        sequential, number = self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL, self.triple_log.n_epochs
        if (sequential or isinstance(self.model, (BPR, LightGCN))) and snapshot_due(number):
            self.triple_log.add_snapshot(number, self._weights(), torch_stream() if sequential and number else None)

    def _weights(self):
        return {name: array(value) for name, value in self.model.named_parameters()}

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        if not self.config["single_spec"] and self.config["local_rank"] != 0:
            return
        path = Path(kwargs.pop("saved_model_file", self.saved_model_file))
        state = checkpoint_state(self, epoch)
        if self.triple_log:
            tie = {"run_id": self.triple_log.run_id, "epochs": self.triple_log.n_epochs}
            state["triple_log"] = tie | {"seconds": self.seconds}
        elif reason := self.no_log or refusal(self.config):
            state["triple_log"] = {"missing": reason}
        save(path, state)
        if self._ended:
            remove(self._ended.path)
            self._ended = None
        if verbose:
            self.logger.info(f"Saving current: {path}")


class BPRTrainer(_Logging):
    """RecBole's ``Trainer`` for general and sequential pairwise models, with a triple log; see `_Logging`."""


class KnowledgeTrainer(_Logging, KGTrainer):
    """RecBole's ``KGTrainer`` for pairwise models, with a triple log; see `_Logging`."""


class ClusterTrainer(_Logging, NCLTrainer):
    """RecBole's ``NCLTrainer``, with a triple log; see `_Logging`."""

    def begin_epoch(self, epoch):
        if epoch % self.num_m_step == 0:
            self.model.e_step()


def check_listed(config: Config, data: Dataset, instead: str | None = None) -> None:
    """Raises InputError where a training on a data set would bring back what the key ``suppression`` lists.

    Args:
        instead: as of `suppression.check`.
    """
    if config["suppression"]:
        fields = (data.uid_field, data.iid_field)
        both = zip((data.inter_feat[field].numpy() for field in fields), firsts_of([data]), strict=True)
        tokens = (data.id2token(field, np.concatenate(ids)) for field, ids in zip(fields, both, strict=True))
        suppression.check(config["suppression"], *tokens, instead=instead)


TRAINERS = {
    ModelType.GENERAL: BPRTrainer,
    ModelType.SEQUENTIAL: BPRTrainer,
    ModelType.KNOWLEDGE: KnowledgeTrainer,
}


def make_trainer(config: Config, model: AbstractRecommender, trains: bool = True) -> Trainer:
    """The trainer for a model; ``trains=False``: one that only evaluates, without an optimiser."""
    kind = _kind(config.model_class)
    assert kind
    if trains:
        return kind(config, model)
    with replaced(Trainer, _build_optimizer=lambda self, **_: None):  # torch would load its compiler: seconds
        return kind(config, model)


def judge(config: Config, split: Split, model: AbstractRecommender) -> Trainer:
    """A trainer that only evaluates, models like this one, and has seen the split's training data."""
    trainer = make_trainer(config, model, trains=False)
    trainer.eval_collector.data_collect(split.train)
    return trainer


def count_in(trainer: Trainer, split: Split, rows: np.ndarray) -> None:
    """Have metrics that count interactions (popularity, coverage), if there are any, count those without some rows."""
    collector = trainer.eval_collector
    if any(map(collector.register.need, ("data.count_items", "data.count_users"))):
        collector.data_collect(SimpleNamespace(dataset=split.remaining_dataset(rows)))


def load_best(trainer: Trainer) -> dict[str, Any]:
    """Give a trainer's model the weights of its best epoch; returns the content of its checkpoint."""
    state = read(trainer.saved_model_file)
    trainer.model.load_state_dict(state["state_dict"])
    clear_caches(trainer.model)
    return state


def trainer_of(config: Config, model: AbstractRecommender) -> Trainer:
    """The trainer that logs, for a model that can be unlearned from; what RecBole's ``get_trainer`` gives for it too.

    Args:
        config: RecBole's configuration, or ours.

    Raises:
        InputError: no trainer logs this model's training.
    """
    if reason := refusal(config):
        raise InputError(reason)
    return make_trainer(config, model)


def trainer_class(name: str) -> type[Trainer] | None:
    """The class of trainer that logs for a model of this name, RecBole's or the user's own; None where none does."""
    found = [get_model(name)] if name in known_models() else classes_named(name)
    kinds = {None if refused(each) else _kind(each) for each in found}
    return kinds.pop() if len(kinds) == 1 else None


def _kind(model_class):
    return ClusterTrainer if issubclass(model_class, NCL) else TRAINERS.get(model_class.type)


def _sharded(loader):
    """Whether this rank gets a part of the loader's data only, as RecBole's own evaluation loaders give it."""
    return isinstance(getattr(loader, "sampler", None), DistributedSampler)


def _unused(path):
    """``path``, or ``path-2``, ``-3``, …: RecBole's names have a resolution of one second, and runs may share it."""
    path = Path(path)
    candidate, n = path, 1
    while candidate.exists() or log_path(candidate).exists():
        n += 1
        candidate = path.with_stem(f"{path.stem}-{n}")
    return str(candidate)


class _StaticCollate:
    """Static negatives for loaders whose batches hold more than ids (see `PairwiseCollate.fits`)."""

    def __init__(self, loader, table):
        self.loader, self.table = loader, table
        if table is None:
            dataset, negatives = loader._dataset, negatives_of(loader) or 0
            users = dataset.inter_feat[loader.uid_field].numpy()
            self.table = NegativeDraw(loader._sampler, dataset.user_num)(users, negatives).reshape(negatives, -1).T

    def __call__(self, index):
        rows = np.array(index)
        return interaction(self.loader, rows, self.table[rows])
