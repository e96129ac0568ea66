"""Gradient ascent on the forget set."""

from time import perf_counter

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender

from recbole_unlearn.devices import placed
from recbole_unlearn.influence.objective import Triples
from recbole_unlearn.methods.base import Forgotten, Method
from recbole_unlearn.methods.triples import WITH_MARGINS, last_epochs, logged_triples, margins


class GradientAscent(Method):
    """A few steps of Adam that raise the mean loss of the forgotten triples, with the negatives that training logged.

    Each step takes another of the last epochs' negatives. Adam starts anew, at the learning rate of training, so that
    only rows which the forgotten triples touch move. The loss has no upper bound: the number of steps alone decides
    how far it goes.
    """

    models = WITH_MARGINS
    candidates = {"steps": (3, 10, 30, 100, 300)}

    def forget(self, rows: np.ndarray, show_progress: bool = False) -> Forgotten:
        start, task = perf_counter(), self.task
        model = task.model(task.split.remaining_dataset(rows)).train()
        epochs = last_epochs(task.stored, self.settings["steps"])
        optimizer = torch.optim.Adam(model.parameters(), lr=task.config["learning_rate"])
        losses = []
        for step in range(self.settings["steps"]):
            triples = logged_triples(task.log, rows, epochs[[-1 - step % len(epochs)]])
            optimizer.zero_grad()
            loss = ascent_loss(model, triples)
            loss.backward()
            optimizer.step()
            losses.append(-float(loss.detach()))
        return Forgotten(model.eval(), perf_counter() - start, {"steps": self.settings["steps"], "losses": losses})


def ascent_loss(model: AbstractRecommender, triples: Triples) -> torch.Tensor:
    """Minus the mean loss of triples."""
    weight = placed(model, triples.weight / np.sum(triples.weight))
    return (weight * torch.nn.functional.logsigmoid(margins(model, triples))).sum()
