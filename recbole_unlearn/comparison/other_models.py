"""RecBole's other models to compare with: which can stand beside a model, with which configuration, and their training.

Their own configuration files of RecBole choose data, split and metrics by kind of model; here all get those of the
compared model.
"""

import difflib
import importlib.util
from time import perf_counter

from recbole.utils import ModelType, get_model, get_trainer

from recbole_unlearn.data import knowledge
from recbole_unlearn.data.split import pairwise_loader
from recbole_unlearn.errors import InputError, about
from recbole_unlearn.methods import names_in
from recbole_unlearn.models.support import AUTOENCODERS, NEEDS
from recbole_unlearn.settings.config import UnlearnConfig
from recbole_unlearn.settings.conflicts import DERIVED_FORMS
from recbole_unlearn.settings.recbole_keys import known_models
from recbole_unlearn.training.fit import new_model
from recbole_unlearn.training.trainer import load_best

# Models that learn whole rows of the interaction matrix: RecBole refuses to train them with negatives.
WITHOUT_NEGATIVES = (*AUTOENCODERS, "ENMF")
PLAIN = (ModelType.GENERAL, ModelType.TRADITIONAL)  # that need interactions only
PACKAGES = {**NEEDS, "KGAT": "dgl"}
STAGES = "RecBole trains it in several runs, each of which needs the file of the one before"
VECTORS = "it needs pre-trained vectors of entities, and RecBole leaves out the items that have none"
WITHOUT_BPR = ("GRU4RecCPR", "SASRecCPR")
REFUSED = {
    **dict.fromkeys(["S3Rec", "KD_DAGFM", "RaCT"], STAGES),
    "GRU4RecKG": VECTORS,
    "KSR": VECTORS,
}
# Under these alone a sequential model has the targets of others: RecBole sorts its histories by time.
IN_TIME = "{'split': {'LS': 'valid_and_test'}, 'order': 'TO', 'group_by': 'user', 'mode': 'full'}"
SHARED = ("eval_args", "metrics", "valid_metric", "threshold", "train_neg_sample_args")


def other_models(value, model, dataset, files, given):
    """Names of the models to compare with, checked; the compared model itself is left out.

    Raises:
        InputError: an unknown name, or a model that cannot be trained on the compared model's split.
    """
    names = names_in(value, "compare_models") if value else []
    known = known_models()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise InputError(f"compare_models: RecBole has no model {name!r}; did you mean {near!r}?")
        needed = PACKAGES.get(name)
        if needed and importlib.util.find_spec(needed) is None:
            raise InputError(f"compare_models: {name} needs the package {needed}, which is not installed")
        try:
            get_model(name)
        except (ValueError, ImportError, AttributeError) as error:
            raise InputError(f"compare_models: {name} cannot be loaded from RecBole: {error}") from None
        with about(f"compare_models: {name}"):
            UnlearnConfig(*model_arguments(name, model, dataset, files, given))
    return [name for name in names if name != model]


def model_arguments(name, model, dataset, files, given):
    """``arguments`` of another model with the same data, evaluation and training keys.

    Models that do not train by gradient get no negatives: RecBole's Pop would count them as interactions.

    Raises:
        InputError: it would not have the compared model's interactions.
    """
    kind = get_model(name).type
    changes = {}
    if kind in PLAIN:
        _check_kind(name, kind, model)
        if name in WITHOUT_NEGATIVES or kind == ModelType.TRADITIONAL:
            changes = {"train_neg_sample_args": None}
    elif name != model:
        compared = UnlearnConfig(model, dataset, files, given)
        _check_kind(name, kind, model)
        if compared["forget_spam"] is not None:
            raise InputError(f"compare_models: forget_spam is for general models only, not for {name}")
        changes = {key: compared[key] for key in SHARED}
        changes |= CHANGES[kind](name, compared, (name, dataset, files, {**(given or {}), **changes}))
    kernels = {} if name in DERIVED_FORMS else {"compiled": False}
    return name, dataset, files, {**(given or {}), **changes, **kernels, "model": name}


def _check_kind(name, kind, model):
    if name in REFUSED:
        raise InputError(f"compare_models: {name} cannot be compared: {REFUSED[name]}")
    if kind not in (*PLAIN, *CHANGES):
        raise InputError(f"compare_models: {name} cannot be compared: RecBole does not train it by gradient")
    own = get_model(model).type
    if own not in PLAIN and own != kind:
        raise InputError(
            f"compare_models: {name} does not have the interactions of {model}, some of which RecBole leaves out; "
            f"give a general model as --model, such as BPR, and {model} in compare_models"
        )


def _default(arguments, *keys):
    """Values of a model's own configuration."""
    model, dataset, files, given = arguments
    config = UnlearnConfig(model, dataset, files, {**given, "repeatable": True, "train_neg_sample_args": None})
    return [config[key] for key in keys]


def _columns(compared, own):
    """``load_col``: the compared model's columns, and those of users and items that the other's has beside."""
    shared = compared["load_col"]
    return shared if shared is None else {**(own or {}), **shared}


def _knowledge(name, compared, arguments):
    if get_model(compared["model"]).type == ModelType.KNOWLEDGE:
        return {}
    fields = [f"{part}_FIELD" for part in ("HEAD_ENTITY_ID", "RELATION_ID", "TAIL_ENTITY_ID", "ENTITY_ID")]
    head, relation, tail, entity = (compared[field] for field in fields)
    columns = compared["load_col"]
    if columns is not None:
        graph = {"kg": [head, relation, tail], "link": [compared["ITEM_ID_FIELD"], entity]}
        columns = {**graph, **columns}
    return {"load_col": columns, knowledge.KEY: knowledge.checksum(compared["data_path"], compared["dataset"])}


def _sequential(name, compared, arguments):
    evaluated = compared["eval_args"]
    if evaluated["split"] != {"LS": "valid_and_test"} or evaluated["order"] != "TO":
        raise InputError(
            f"compare_models: {name} is sequential and has the held-out interactions of {compared['model']} only "
            f'where each user\'s last two are held out; give --eval_args="{IN_TIME}"'
        )
    loss, columns = _default(arguments, "loss_type", "load_col")
    changes = {"repeatable": True, "load_col": _columns(compared, columns)}
    if name in WITHOUT_BPR and loss == "BPR":
        raise InputError(f"compare_models: RecBole has no BPR loss for {name}; leave loss_type out")
    if loss == "CE" and not hasattr(get_model(name), "input_type"):
        changes["train_neg_sample_args"] = None
    return changes


def _context(name, compared, arguments):
    columns = _columns(compared, *_default(arguments, "load_col"))
    if not (isinstance(columns, dict) and isinstance(columns.get("inter"), list)):
        raise InputError(f"compare_models: {name} takes all columns for features; name those to load in load_col")
    # of an interaction that is to be predicted, no more than user and item is known
    ids = (compared["USER_ID_FIELD"], compared["ITEM_ID_FIELD"])
    unused = [column for column in columns["inter"] if column not in ids]
    return {"load_col": columns, "unused_col": {**(compared["unused_col"] or {}), "inter": unused}}


CHANGES = {ModelType.KNOWLEDGE: _knowledge, ModelType.SEQUENTIAL: _sequential, ModelType.CONTEXT: _context}


def train_any(config, split, seed, folder):
    """Train any RecBole model with RecBole's own trainer for it.

    Args:
        config (UnlearnConfig): of the model; its training is quiet and leaves files in ``folder`` only.
        split (Split): of this configuration.
        seed (int): of initialisation, order and negatives; not of the split.
        folder: for its checkpoint.

    Returns:
        (model with the best weights, seconds of ``fit``)

    Raises:
        InputError: the model fails on this data or configuration.
    """
    config["show_progress"], config["checkpoint_dir"] = False, str(folder)
    try:
        model = new_model(config, split, seed)
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        trainer.log_negatives = False
        pairwise_loader(split.train).generator.manual_seed(seed)
        start = perf_counter()
        trainer.fit(split.train, split.valid, verbose=False, saved=True, show_progress=False)
        seconds = perf_counter() - start
    except OSError:
        raise
    except Exception as error:  # a column or a size that a model needs: its own code says so in any way
        raise InputError(
            f"compare_models: {config['model']} cannot be trained on {config['dataset']} with this configuration: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    # other_parameter stays as training left it: what models keep there (matrices of neighbours, counts) has no epochs
    load_best(trainer)
    return model.eval(), seconds
