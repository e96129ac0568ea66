"""Which of RecBole's models can be unlearned from, and what is special about some of them."""

import importlib.util
from dataclasses import dataclass

from recbole.config import Config
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import InputType, ModelType

from recbole_unlearn.compat.recbole_models import is_recboles
from recbole_unlearn.data.frozen_data import is_frozen
from recbole_unlearn.settings.recbole_keys import recbole_name


@dataclass(frozen=True)
class Traits:
    """What a model needs beyond the usual.

    Attributes:
        sums: its loss is a sum over the batch, where RecBole's usual one is a mean.
        draws: its loss draws at random in evaluation mode too: number of fixed seeds to average over.
        row_loss: the loss of a row takes all its negatives together; otherwise it is a sum over them.
        batch: its loss ties the rows of a batch together, or is too large for more: use batches as in training.
        curvature_triples: default of the key of that name, where a product is dear.
        approximated: what of its training is not accounted for exactly.
    """

    sums: bool = False
    draws: int = 1
    row_loss: bool = False
    batch: bool = False
    curvature_triples: int | None = None
    approximated: tuple[str, ...] = ()


GRAPH_NOISE = "random edges and neighbours: the full graph or fixed draws"
BATCH_NORM = "batch norm: statistics of the original training"
BATCH_L2 = "L2 norms over a batch: of the batches that unlearning takes"
KNOWLEDGE = "knowledge graph loss: a fixed sample of it, not in the curvature"
CONTRASTIVE = "contrastive terms within a batch: of the batches that unlearning takes; not in the curvature"

TRAITS = {
    "SimpleX": Traits(
        row_loss=True,
        curvature_triples=16_384,
        approximated=("kinks of the loss: smoothed", "draws of the histories: those of the original"),
    ),
    "SGL": Traits(sums=True, approximated=(GRAPH_NOISE, "contrastive terms: not in the curvature")),
    "ConvNCF": Traits(sums=True, batch=True, curvature_triples=2048),
    "LINE": Traits(draws=2, approximated=("sampled users of an item: two fixed draws",)),
    "DGCF": Traits(draws=2, curvature_triples=4096, approximated=("correlation loss: two fixed draws",)),
    "CKE": Traits(approximated=(KNOWLEDGE,)),
    "CFKG": Traits(approximated=(KNOWLEDGE,)),
    "KGNNLS": Traits(batch=True, approximated=("negatives of the label table: drawn anew",)),
    "KTUP": Traits(
        draws=2,
        approximated=(
            "knowledge graph epochs: left out",
            "Gumbel noise: two fixed draws",
            "hard choices of preferences: derivatives of the soft ones",
        ),
    ),
    "KGIN": Traits(draws=2, curvature_triples=4096, approximated=(GRAPH_NOISE,)),
    "MCCLK": Traits(
        draws=2,
        batch=True,
        curvature_triples=2048,
        approximated=(GRAPH_NOISE, "graph of similar items: without derivatives, as in training", CONTRASTIVE),
    ),
    "FEARec": Traits(draws=2, batch=True, curvature_triples=2048, approximated=(CONTRASTIVE,)),
    "FOSSIL": Traits(batch=True, approximated=(BATCH_L2,)),
    "SHAN": Traits(batch=True, approximated=(BATCH_L2,)),
    "HGN": Traits(batch=True, approximated=(BATCH_L2,)),
}

AUTOENCODERS = ("MultiVAE", "MultiDAE", "MacridVAE", "RecVAE", "RaCT", "CDAE", "DiffRec", "LDiffRec")
REFUSED = {
    **dict.fromkeys(AUTOENCODERS, "it is an autoencoder of whole user histories and has no negatives"),
    "ENMF": "it is trained on whole user histories, which RecBole goes through user by user, without negatives",
    "KGAT": "it needs dgl, which does not run with the versions of torch that this package is tested with",
    "MKR": "RecBole trains it by turns on two losses, for which no trainer keeps a log",
    "S3Rec": "it starts from weights pre-trained on the histories, which know what is to be forgotten",
    "DIEN": "it draws negatives beside histories when the data are read, which no log holds and nobody could draw anew",
    "NCEPLRec": "RecBole computes it when it is built, and trains nothing: build it anew on the data that remain",
}
LABELS = "it is trained on labels of single items; a step is for pairs and for softmaxes over all items"
NO_STEP = {  # models that are trained again only, and why
    "BERT4Rec": "it masks histories at random in every batch",
    "NCL": "its clusters of users and items are made anew in every epoch",
    **dict.fromkeys(("GRU4RecCPR", "SASRecCPR"), "it reduces its loss on its own"),
    "RepeatNet": "it reduces its loss on its own",
}
DENSE = "learner: sparse_adam takes sparse ones alone; take another learner"
KINDS = (ModelType.GENERAL, ModelType.KNOWLEDGE, ModelType.SEQUENTIAL)
FEATURED = ("DIN", "FDSA", "GRU4RecF", "SASRecF")  # read the tables of users and items
NEEDS = {"NCL": "faiss", "KGIN": "torch_scatter", "MCCLK": "torch_scatter"}
PRELOADED = {"GRU4RecKG": ("ent_id",), "KSR": ("ent_id", "rel_id")}


def traits(model: AbstractRecommender) -> Traits:
    """`Traits` of a model."""
    return TRAITS.get(recbole_name(type(model)), Traits())


def refused(model_class: type[AbstractRecommender]) -> bool:
    """Whether a class of model can be unlearned from under no configuration."""
    lists = getattr(model_class, "input_type", None) == InputType.LISTWISE
    return recbole_name(model_class) in REFUSED or lists or model_class.type not in KINDS


def reads_tables(model_class: type[AbstractRecommender]) -> bool:
    """Whether models of a class may compute by features of users or items."""
    return recbole_name(model_class) in FEATURED or not is_recboles(model_class)


def no_step(config: Config) -> str | None:
    """In words, why no influence step is there for a configuration's model, which is trained again; None: there is."""
    labels = config["MODEL_INPUT_TYPE"] == InputType.POINTWISE and not _softmax(config)
    return NO_STEP.get(recbole_name(config.model_class), LABELS if labels else None)


def _softmax(config):
    return config["MODEL_TYPE"] == ModelType.SEQUENTIAL and config["train_neg_sample_args"]["distribution"] == "none"


def refusal(config: Config) -> str | None:
    """In one line, why a configuration's model cannot be unlearned from; None if it can."""
    reason = _refusal(config, recbole_name(config.model_class), config["MODEL_TYPE"])
    return reason and f"model {config['model']} is not supported: {reason}"


def _refusal(config, name, kind):
    if name in REFUSED:
        return REFUSED[name]
    if config["MODEL_INPUT_TYPE"] == InputType.LISTWISE:
        return "RecBole trains it on whole lists of items"
    if kind not in KINDS:
        return "its kind of model is none of general, knowledge-aware and sequential"
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        return f"it needs the package {NEEDS[name]}, which is not installed"
    preloaded = config["preload_weight"] or {}
    if missing := [field for field in PRELOADED.get(name, ()) if field not in preloaded]:
        return f"it needs pre-trained vectors of {' and '.join(missing)} (RecBole's preload_weight)"
    if str(config["learner"]).lower() == "sparse_adam" and is_recboles(config.model_class):
        return f"its gradients are dense, and {DENSE}"
    negatives = config["train_neg_sample_args"]
    if config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE and negatives["distribution"] == "none":
        return "train_neg_sample_args: None trains without negatives; pairwise models need them"
    if negatives.get("dynamic"):
        return "dynamic negatives depend on the weights of the moment; leave train_neg_sample_args dynamic out"
    if kind == ModelType.SEQUENTIAL:
        if config["negatives"] == "static":
            return "negatives: static is for general models"
        if config["benchmark_filename"] and not is_frozen(config):
            return "benchmark_filename holds finished histories, from which nothing can be taken out"
    if not config["single_spec"] and config["model"] != "BPR":
        return "models other than BPR are trained by one process"
    return None
