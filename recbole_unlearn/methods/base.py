"""What every method of a comparison works on, and what it gives back."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.data.split import Split
from recbole_unlearn.settings.config import UnlearnConfig, changed
from recbole_unlearn.storage.triple_log import TripleLog
from recbole_unlearn.training.fit import new_model


@dataclass
class Task:
    """One trained model, about to be asked to forget.

    Configuration, checkpoint and log are copies: what a method changes of them, no other one starts from.

    Attributes:
        config: of model, training and evaluation; ``config["method_args"]`` holds settings of methods.
        split: the one split that all methods share.
        seed: of the model's training, and of all that a method trains or draws.
        stored: checkpoint of the model, as `checkpoints.load` returns it; only read.
        log: its log; only read.
        path: its checkpoint file.
        folder: where methods keep what they train before a request comes.
    """

    config: UnlearnConfig
    split: Split
    seed: int
    stored: dict[str, Any]
    log: TripleLog
    path: Path
    folder: Path

    def __post_init__(self) -> None:
        self.config, self.stored = changed(self.config), copy.deepcopy(self.stored)
        self.log = TripleLog(self.log.path, copy.deepcopy(self.log.metadata))  # whose columns nobody can write to
        self.split.draws(self.log)

    @property
    def weight_decay(self) -> float:
        """Of the model's training."""
        return float(self.config["weight_decay"] or 0)

    def model(self, data: Dataset | None = None) -> AbstractRecommender:
        """The trained weights, in a model of their own.

        Args:
            data: RecBole data set that the model is built on, such as ``split.remaining_dataset(rows)``;
                graph models take their graph from it. Default: the one that it was trained on.
        """
        model = new_model(self.config, self.split, self.seed, data)
        model.load_state_dict(self.stored["state_dict"])
        return model.eval()


@dataclass
class Forgotten:
    """Result of a request.

    Attributes:
        model: RecBole model (or ensemble of them that RecBole's evaluators take for one).
        seconds: from the request to the model; all that the method had to compute for it.
        details: plain values: what was done.
    """

    model: AbstractRecommender
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


class Method(ABC):
    """One way to forget. One file a method; its settings are in ``properties/method/<name>.yaml``.

    Args:
        task: what to forget from.
        settings: of ``properties/method/<name>.yaml``, with the user's changes.

    Attributes:
        models: names of the models that it is for; None: any that `refuses` has nothing against.
        positive: settings that must be above 0; all numbers must be at least 0.
        limits: settings that must be numbers from one to another, both included; None may be a default.
        choices: settings that must be one of some words.
        candidates: the setting that says how far it goes, and five values of it, among which `comparison.tuned` chooses
            one by a rule that is the same for all; empty: it has none.
    """

    models: tuple[str, ...] | None = None
    positive: tuple[str, ...] = ()
    limits: Mapping[str, tuple[float, float]] = {}
    choices: Mapping[str, Sequence[str]] = {}
    candidates: Mapping[str, Sequence[Any]] = {}

    def __init__(self, task: Task, settings: dict[str, Any]) -> None:
        self.task, self.settings = task, settings

    @classmethod
    def refuses(cls, config: Config) -> str | None:
        """In words, why it is not for a configuration's model; None: it is."""
        known = cls.models is None or config["model"] in cls.models
        return None if known else f"it is for {' and '.join(cls.models or ())}"

    @classmethod
    def has_own_original(cls) -> bool:
        """Whether it forgets from a model of its own, that `prepare` trains, not from the task's."""
        return cls.original is not Method.original

    def prepare(self, rows: np.ndarray | None = None) -> float:
        """Train what the method needs before any request beside the model itself, or find it in ``task.folder``.

        Args:
            rows: int64, all that requests will name, which only idealised settings look at.

        Returns:
            Seconds that this took when it was done, loading of kernels included (0 where nothing is needed).
        """
        return 0.0

    def original(self) -> AbstractRecommender:
        """The method's model before any request; after `prepare`."""
        return self.task.model()

    @abstractmethod
    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        """Forget rows of ``task.split``; ``task`` and what `prepare` trained stay as they are.

        Args:
            rows: sorted int64.
        """
