"""The battery of `recbole_unlearn.testing` for every way, with BPR, LightGCN, and models that have no closed form."""

from typing import ClassVar

from conftest import SEQUENTIAL
from recbole.model.general_recommender import BPR

from recbole_unlearn.testing import Battery
from recbole_unlearn.unlearners.influence import PAPER, Influence
from recbole_unlearn.unlearners.reoptimise import Reoptimise
from recbole_unlearn.unlearners.replay import Replay

NO_MINIMUM = {"reoptimise": "is not for"}
# To a minimum, of which re-optimisation and the paper's Hessian are.
CONVERGED = {"negatives": "static", "weight_decay": 6e-3, "learning_rate": 0.05, "epochs": 300}
COMPILED = {**CONVERGED, "compiled": True}


class Own(BPR):
    """A model of the user's own, whose loss is another."""

    def calculate_loss(self, interaction):
        return 2 * super().calculate_loss(interaction)


class OfBPR(Battery):
    refused: ClassVar = {"reoptimise": "negatives were redrawn every epoch"}


class TestBPRTouchedRows(OfBPR):
    way = Replay("touched")
    left, apart = 0.7, 0.4


class TestBPRAllRows(OfBPR):
    way = Replay("all")
    left, apart = 0.01, 1e-3


class TestBPRInfluence(OfBPR):
    way = Influence()
    left, apart = 0.9, 0.2


class TestBPRReoptimise(Battery):
    # of 8 columns the last is hardly needed: a minimum without it is a saddle, on which some requests start
    way, keys = Reoptimise(), COMPILED
    left, apart = 0.01, 1e-3


class TestBPRPaper(Battery):
    way, keys = PAPER, COMPILED
    left = 0.6


class OfLightGCN(Battery):
    model, keys = "LightGCN", {"n_layers": 2}
    refused: ClassVar = {"reoptimise": "it is for BPR only"}


class TestLightGCNReplay(OfLightGCN):
    way = Replay()
    left, apart = 0.01, 1e-6


class TestLightGCNInfluence(OfLightGCN):
    way = Influence()
    left, apart = 0.8, 0.2


class TestLightGCNPaper(Battery):
    model, way, keys = "LightGCN", PAPER, {**COMPILED, "n_layers": 2}
    refused: ClassVar = {"reoptimise": "it is for BPR only"}


class OfNGCF(Battery):
    model, refused, rounding = "NGCF", NO_MINIMUM, 1e-3
    keys: ClassVar = {"hidden_size_list": [8], "node_dropout": 0, "message_dropout": 0}


class TestNGCFReplay(OfNGCF):
    way, rounding = Replay("all"), 0.0
    keys: ClassVar = {"hidden_size_list": [8], "node_dropout": 0, "message_dropout": 0.1}
    left, apart = 1e-6, 1e-6


class TestNGCFInfluence(OfNGCF):
    way = Influence()
    left, apart = 0.95, 0.6


class TestNGCFPaper(OfNGCF):
    way = PAPER


class OfFPMC(Battery):
    model, keys, refused = "FPMC", SEQUENTIAL, NO_MINIMUM


class TestFPMCReplay(OfFPMC):
    way = Replay("all")
    left, apart = 1e-6, 1e-6


class TestFPMCInfluence(OfFPMC):
    way, keys = Influence(), {**SEQUENTIAL, "epochs": 8}


class TestFPMCPaper(OfFPMC):
    way = PAPER


class TestOwnInfluence(Battery):
    model, way, refused = Own, Influence(), NO_MINIMUM
    left, apart = 0.95, 0.5


class TestOwnPaper(Battery):
    model, way, refused = Own, PAPER, NO_MINIMUM
    keys: ClassVar = {**CONVERGED, "weight_decay": 0.012}
    left, apart = 0.8, 0.5
