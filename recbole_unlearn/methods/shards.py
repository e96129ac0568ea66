"""What the methods share that train one model a shard of the data, and retrain only the shards that a request hits."""

import hashlib
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader import AbstractDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.model.abstract_recommender import AbstractRecommender, GeneralRecommender
from recbole.sampler import Sampler
from recbole.utils import InputType
from tqdm import tqdm

from recbole_unlearn.data.split import Split, eval_loader
from recbole_unlearn.devices import read
from recbole_unlearn.errors import InputError
from recbole_unlearn.influence.recorded import marked
from recbole_unlearn.methods.base import Forgotten, Method, Task
from recbole_unlearn.settings.config import changed
from recbole_unlearn.storage import checkpoints
from recbole_unlearn.storage.files import locked, scratch_folder, sweep
from recbole_unlearn.training.fit import new_model, training_settings
from recbole_unlearn.training.trainer import BPRTrainer, load_best

MODELS = ("BPR", "LightGCN")  # scores are inner products of a user's and an item's embedding
ADVICE = "delete it: what it held will be computed again"


# Training one shard


class ShardSampler(Sampler):
    """RecBole's training sampler, of a shard: draws among the shard's items those that its user has not there."""

    def __init__(self, dataset: Dataset, distribution: str = "uniform", alpha: float = 1.0) -> None:
        self.pool = np.unique(dataset.inter_feat[dataset.iid_field].numpy())
        super().__init__(["train"], [dataset], distribution, alpha)

    def _uni_sampling(self, sample_num):
        return self.pool[np.random.randint(0, len(self.pool), sample_num)]


def trainable(split: Split, rows: np.ndarray) -> np.ndarray:
    """Those of a shard's rows that have a negative in the shard: of users who do not have all of the shard's items."""
    rows = np.asarray(rows, np.int64)
    while len(rows):
        users, items = split.users[rows], split.items[rows]
        had = np.bincount(np.unique(users * split.n_items + items) // split.n_items)
        short = had[users] < len(np.unique(items))
        if short.all():
            break
        rows = rows[short]
    return rows


def subset(split: Split, rows: np.ndarray) -> Dataset:
    """RecBole data set of some training rows; ids and sizes stay."""
    data = split.train._dataset
    return data.copy(data.inter_feat[torch.from_numpy(np.sort(split.data_row[rows]))])


def shard_loader(config: Config, data: Dataset) -> AbstractDataLoader:
    """Training loader of a shard's data set, with shard-local negatives."""
    args = config["train_neg_sample_args"]
    sampler = ShardSampler(data, args["distribution"], args["alpha"]).set_phase("train")
    return get_dataloader(config, "train")(config, data, sampler, shuffle=config["shuffle"])


def shard_validation(config: Config, split: Split, data: Dataset) -> AbstractDataLoader | None:
    """Validation data of a shard's users, None if they have none.

    The items left out of the ranking are those that the user has in this shard: nothing of another shard, not even
    by way of early stopping, reaches the weights.
    """
    held_out = split.valid._dataset
    users = (part.inter_feat[part.uid_field].numpy() for part in (held_out, data))
    own = np.flatnonzero(np.isin(*users))
    if not len(own):
        return None
    held_out = held_out.copy(held_out.inter_feat[torch.from_numpy(own)])
    sampler = Sampler(["train", "valid"], [data, held_out]).set_phase("valid")
    args = getattr(split.valid, "neg_sample_args", None)
    return eval_loader(config, held_out, sampler, args["sample_num"] if args else 0)


def fit(
    config: Config,
    model: AbstractRecommender,
    loader: AbstractDataLoader,
    valid: AbstractDataLoader | None,
    epochs: int,
    patience: int | None = None,
    show_progress: bool = False,
) -> int:
    """Train with the one trainer and stopping rule; ``model`` ends with the weights of its best epoch.

    Args:
        valid: validation loader; None keeps the last epoch.
        patience: epochs without improvement before it stops; default: ``stopping_step``.

    Returns:
        Epochs up to the best one.
    """
    trainer = BPRTrainer(config, model)
    trainer.log_negatives = False
    trainer.epochs = epochs
    trainer.eval_step = min(trainer.eval_step, epochs)
    trainer.stopping_step = trainer.stopping_step if patience is None else patience
    with scratch_folder() as folder:
        trainer.saved_model_file = str(folder / "best.pth")
        trainer.fit(loader, valid, verbose=False, show_progress=show_progress)
        return load_best(trainer)["epoch"] + 1


def train_shard(
    config: Config,
    split: Split,
    rows: np.ndarray,
    seed: int,
    epochs: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Train a model on some rows and nothing else of the training data.

    Args:
        rows: int64 array, `trainable`.
        seed: of initialisation, order and negatives.
        weights: state_dict to start from.

    Returns:
        Its state_dict.
    """
    config = changed(config, seed=seed)
    data = subset(split, rows)
    model = new_model(config, split, seed, data)
    if weights is not None:
        model.load_state_dict(weights)
    fit(config, model, shard_loader(config, data), shard_validation(config, split, data), epochs)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def derived_seed(*parts: int) -> int:
    """A seed that differs for each tuple of non-negative ints."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


@torch.no_grad()
def embeddings(model: AbstractRecommender) -> tuple[torch.Tensor, torch.Tensor]:
    """Final user and item embeddings on the CPU, ``[n_users, d]``, ``[n_items, d]``; scores are inner products."""
    if hasattr(model, "norm_adj_matrix"):
        user, item = model.eval().forward()
    else:
        user, item = model.user_embedding.weight, model.item_embedding.weight
    return user.detach().clone().cpu(), item.detach().clone().cpu()


@torch.no_grad()
def shard_embeddings(
    config: Config, split: Split, rows: np.ndarray, weights: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`embeddings` of a shard's trained model, zero for users and items without a row in the shard."""
    if not len(rows):
        size = config["embedding_size"]
        return torch.zeros(split.n_users, size), torch.zeros(split.n_items, size)
    model = config.model_class(config, subset(split, rows)).to(config["device"])
    model.load_state_dict(weights)
    for table, ids in zip(found := embeddings(model), (split.users[rows], split.items[rows]), strict=True):
        absent = torch.ones(len(table), dtype=torch.bool)
        absent[torch.from_numpy(ids)] = False
        table[absent] = 0
    return found


# The ensemble


class ShardEnsemble(GeneralRecommender):
    """Embeddings of all shards and a rule that makes scores of them; to RecBole's evaluators a model like any other.

    Args:
        config: that names the fields and the device.
        user, item: ``[n_users, shards, d]`` and ``[n_items, shards, d]``, zero where a shard has no interaction.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Config, user: torch.Tensor, item: torch.Tensor) -> None:
        AbstractRecommender.__init__(self)
        self.USER_ID, self.ITEM_ID = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        self.NEG_ITEM_ID = config["NEG_PREFIX"] + self.ITEM_ID
        self.n_users, self.n_items, self.device = len(user), len(item), config["device"]
        self.register_buffer("user", user)
        self.register_buffer("item", item)

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of all items for a batch of users, flat ``[users * n_items]``."""
        raise NotImplementedError

    def predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of pairs, ``[pairs]``."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the ensemble atomically; `load` reads it back."""
        state = {name: value.detach() for name, value in self.state_dict().items()}
        checkpoints.save(path, {"ensemble": type(self).__name__, "state_dict": state})

    @classmethod
    def load(cls, path: str | Path, config: Config) -> "ShardEnsemble":
        """An ensemble that `save` wrote, ready to score.

        Raises:
            InputError: missing, damaged or foreign file; NaN.
        """
        stored = _read(path, "give the file that the ensemble was saved to")
        state = stored.get("state_dict")
        if stored.get("ensemble") != cls.__name__ or not isinstance(state, dict):
            raise InputError(f"{path} holds no {cls.__name__} ensemble; give the file that it was saved to")
        checkpoints.check_finite(state, str(path))
        try:
            model = cls(config, state["user"], state["item"])
            model.load_state_dict(state)
        except (KeyError, RuntimeError, AttributeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:80]}); save it again") from None
        return model.to(config["device"]).eval()


class ScoreEnsemble(ShardEnsemble):
    """Adds up the shards' scores; the popularity of the item where no shard has both user and item.

    Popularity, log(1 + interactions), is shifted and scaled to mean and spread of the scores within the shards.
    """

    def __init__(self, config: Config, user: torch.Tensor, item: torch.Tensor) -> None:
        super().__init__(config, user, item)
        for name, table in (("user_in", user), ("item_in", item)):
            self.register_buffer(name, table.abs().amax(dim=2).gt(0).to(table.dtype))
        self.weight = torch.nn.Parameter(torch.ones_like(user[0, :, 0]))  # of each shard
        self.register_buffer("fallback", torch.zeros_like(item[:, 0, 0]))

    def score(self, total: torch.Tensor, shards: torch.Tensor) -> torch.Tensor:
        """Scores from the weighted sum over the shards, and the number of shards that have the pair (at least 1)."""
        return total

    @torch.no_grad()
    def set_popularity(self, count: np.ndarray) -> None:
        """Make the fallback from the number of interactions of each item, ``[n_items]``."""
        popularity = torch.log1p(torch.as_tensor(count, dtype=torch.float64))
        mean, spread = self._moments()
        scale = spread / popularity[1:].std() if popularity[1:].std() > 0 else 0.0
        self.fallback = (mean + scale * (popularity - popularity[1:].mean())).to(self.item)

    def _moments(self):
        """Mean and standard deviation of the scores of all pairs within the shards."""
        user, item = self.user.double() * self.weight.double()[:, None], self.item.double()
        pairs = (self.user_in.double().sum(0) * self.item_in.double().sum(0)).sum().clamp(min=1)
        mean = (user.sum(0) * item.sum(0)).sum() / pairs
        second_moments = (torch.einsum("nkd,nke->kde", table, table) for table in (user, item))
        square = torch.mul(*second_moments).sum() / pairs
        return mean.item(), (square - mean**2).clamp(min=0).sqrt().item()

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        user = interaction[self.USER_ID]
        total = (self.user[user] * self.weight[:, None]).flatten(1) @ self.item.flatten(1).T
        shards = self.user_in[user] @ self.item_in.T
        return torch.where(shards > 0, self.score(total, shards.clamp(min=1)), self.fallback).view(-1)

    def predict(self, interaction: Interaction) -> torch.Tensor:
        user, item = interaction[self.USER_ID], interaction[self.ITEM_ID]
        total = (self.user[user] * self.weight[:, None] * self.item[item]).sum((1, 2))
        shards = (self.user_in[user] * self.item_in[item]).sum(1)
        return torch.where(shards > 0, self.score(total, shards.clamp(min=1)), self.fallback[item])


# The method


class Sharded(Method):
    """A model for each shard; a request retrains the shards that it hits, then how they are combined.

    A method says how it partitions (`partition`) and how it combines (`combine`). Shards, each with its own
    checkpoint, and the combination's are kept in a folder of their own under ``task.folder``, named by all that
    determines them; a preparation that was cut off goes on where it stopped.

    Attributes (after `prepare`):
        shard: shard of each row of ``task.split``, int64 ``[rows]``.
        slice: slice of each row in its shard, int64 ``[rows]``.
        folder (Path): of the checkpoints.
        pretrained: embeddings of the task's own model, where the partition is made from them.
    """

    models = MODELS
    positive = ("shards",)
    name: str
    ensemble: type[ShardEnsemble]
    slices = 1
    uses_model = False  # whether the partition is made from the trained model's embeddings

    def __init__(self, task: Task, settings: dict[str, Any]) -> None:
        super().__init__(task, settings)
        self.shards = settings["shards"]
        self.pretrained: tuple = ()

    def partition(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Divide ``task.split``'s rows.

        Returns:
            Shard and slice of each row, int64 ``[rows]``.
        """
        raise NotImplementedError

    def combine(
        self, user: torch.Tensor, item: torch.Tensor, keep: np.ndarray, show_progress: bool = False
    ) -> tuple[ShardEnsemble, dict[str, Any]]:
        """Combine the shards.

        Args:
            user, item: embeddings, as `ShardEnsemble` takes them.
            keep: bool ``[rows]``, the rows that remain.

        Returns:
            The ensemble, on the configuration's device, and what was done, in plain values.
        """
        raise NotImplementedError

    def empty_ensemble(self, user: torch.Tensor, item: torch.Tensor) -> ShardEnsemble:
        """The method's ensemble before `combine` has fitted anything."""
        return self.ensemble(self.task.config, user, item)

    def prepare(self, rows: np.ndarray | None = None) -> float:
        """Train the shards and their combination, or find them in ``task.folder``.

        Args:
            rows: the forget set, where the setting ``ideal`` asks for it.

        Returns:
            Seconds that this took when it was done.

        Raises:
            InputError: ``ideal`` without rows; a damaged file; another process at work in the same folder.
        """
        rows = self._ideal_rows(rows)
        self.pretrained = embeddings(self.task.model()) if self.uses_model else ()
        self.folder = Path(self.task.folder) / f"{self.name}-{self._key(rows)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "partition.pth"):
            sweep(self.folder)
            return self._prepare(rows)

    def _prepare(self, ideal):
        everything = np.ones(self.task.split.n_rows, bool)
        show_progress = bool(self.task.config["show_progress"])
        made, seconds = self._kept("partition.pth", self._partition, ideal)
        self.shard, self.slice = (column.numpy() for column in made)
        self._embeddings = []
        for shard in tqdm(range(self.shards), "Shards", ncols=100, disable=not show_progress):
            weights = {}
            for number in range(self.slices):
                name = _slice_file(shard, number)
                weights, more = self._kept(name, self._train_slice, shard, number, weights, everything)
                seconds += more
            self._embeddings.append(self._embed(shard, weights, everything))
        tables = [torch.stack(table, dim=1) for table in zip(*self._embeddings, strict=True)]
        state, more = self._kept("ensemble.pth", self._combined, *tables, everything, show_progress)
        self._original = self.empty_ensemble(*tables)
        self._original.load_state_dict({**state, "user": tables[0], "item": tables[1]})
        self._original.to(self.task.config["device"]).eval()
        return seconds + more

    def original(self) -> ShardEnsemble:
        return self._original

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start = perf_counter()
        rows = np.asarray(rows, np.int64)
        keep = ~marked(self.task.split.n_rows, rows)
        found, hit = list(self._embeddings), np.unique(self.shard[rows])
        slices = rows_trained = 0
        for shard in tqdm(hit, "Shards", ncols=100, disable=not show_progress):
            first = int(self.slice[rows[self.shard[rows] == shard]].min())
            weights = _read(self.folder / _slice_file(shard, first - 1), ADVICE)["made"] if first else {}
            for number in range(first, self.slices):
                before, weights = weights, self._train_slice(shard, number, weights, keep)
                if weights is not before:  # else nothing of the slice is left
                    rows_trained += int((keep & (self.shard == shard) & (self.slice <= number)).sum())
                    slices += 1
            found[shard] = self._embed(shard, weights, keep)
        trained = perf_counter()
        user, item = (torch.stack(table, dim=1) for table in zip(*found, strict=True))
        model, details = self.combine(user, item, keep, show_progress)
        end = perf_counter()
        return Forgotten(
            model.eval(),
            end - start,
            {
                "shards": self.shards,
                "shards_retrained": [int(shard) for shard in hit],
                "slices_retrained": slices,
                "rows_retrained": rows_trained,
                "seconds_shards": trained - start,
                "seconds_combination": end - trained,
                **details,
            },
        )

    # Pieces

    def _ideal_rows(self, rows):
        if not self.settings["ideal"]:
            return np.empty(0, np.int64)
        if rows is None or not len(rows):
            raise InputError(f"{self.name}: ideal needs the forget set before training; give prepare its rows")
        return np.asarray(rows, np.int64)

    def _key(self, ideal):
        """Hash of all that determines the shards."""
        data = {key: value for key, value in self.task.split.fingerprint.items() if key != "of"}
        plain = json.dumps([training_settings(self.task.config), data, self.task.seed, self.settings], sort_keys=True)
        digest = hashlib.sha256(plain.encode())
        for array in (ideal, *(table.numpy() for table in self.pretrained)):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def _partition(self, ideal):
        shard, number = self.partition(np.random.default_rng([self.task.seed, self.shards]))
        if len(ideal):  # where most of them lie already
            shard[ideal] = np.bincount(shard[ideal]).argmax()
        return [torch.from_numpy(shard), torch.from_numpy(number)]

    def _combined(self, user, item, keep, show_progress):
        """State of the combination, without the embeddings, which the shards' own checkpoints hold."""
        model, _ = self.combine(user, item, keep, show_progress)
        return {name: value for name, value in model.state_dict().items() if name not in ("user", "item")}

    def _shard_rows(self, shard, number, keep):
        return trainable(self.task.split, np.flatnonzero(keep & (self.shard == shard) & (self.slice <= number)))

    def _train_slice(self, shard, number, weights, keep):
        """Weights of a shard after training on its slices up to ``number``, from those before; {}: none yet."""
        rows = self._shard_rows(shard, number, keep)
        new = keep & (self.shard == shard) & (self.slice == number)
        if not len(rows) or (weights and not new.any()):
            return weights
        task, seed = self.task, derived_seed(self.task.seed, int(shard), number)
        # as many steps in all as without slices (section V of the paper)
        epochs = max(1, round(task.config["epochs"] * 2 / (self.slices + 1)))
        return train_shard(task.config, task.split, rows, seed, epochs, weights or None)

    def _embed(self, shard, weights, keep):
        rows = self._shard_rows(shard, self.slices - 1, keep)
        return shard_embeddings(self.task.config, self.task.split, rows if weights else rows[:0], weights)

    def _kept(self, name, make, *arguments):
        """What ``make`` returns and the seconds that it took, from the folder if it is there."""
        if not (self.folder / name).is_file():
            start = perf_counter()
            made = make(*arguments)
            checkpoints.save(self.folder / name, {"made": made, "seconds": perf_counter() - start})
        stored = _read(self.folder / name, ADVICE)
        return stored["made"], stored["seconds"]


def _slice_file(shard, number):
    return f"shard-{shard}-slice-{number}.pth"


def _read(path, advice):
    """A file of tensors and plain values."""
    try:
        state = read(path)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... on bad files
        raise InputError(f"{path} cannot be read ({type(error).__name__}); {advice}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} is damaged; {advice}")
    return state
