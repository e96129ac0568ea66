"""From a trained RecBole model, its log and a forget set to weights that have forgotten.

`bpr`: replay and closed forms. `lightgcn`: the same through its propagation. `pairwise`: any other model, one influence
step by automatic differentiation.
"""

from recbole_unlearn.unlearners.any_loss import PairwiseUnlearner
from recbole_unlearn.unlearners.common import Unlearned
from recbole_unlearn.unlearners.dot_product import InfluenceUnlearner
from recbole_unlearn.unlearners.propagated import LightGCNUnlearner

SUPPORTED = ("BPR", "LightGCN")  # by replay and in closed form
__all__ = ["SUPPORTED", "InfluenceUnlearner", "LightGCNUnlearner", "PairwiseUnlearner", "Unlearned", "unlearner_of"]


def unlearner_of(model, config, split, stored, log, shared=False):
    """The unlearner for a model with the weights of a checkpoint."""
    optimizer, epochs = stored["optimizer"], stored["triple_log"]["epochs"]
    if config["model"] == "LightGCN" and not config["unlearn_params"]:
        return LightGCNUnlearner(model, log, optimizer, config, split, epochs)
    if config["model"] != "BPR" or config["unlearn_params"]:
        return PairwiseUnlearner(model, log, optimizer, config, split, epochs)
    return InfluenceUnlearner(model, log, optimizer, config, epochs, split.popularity(), split.data_row, shared)
