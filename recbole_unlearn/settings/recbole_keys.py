"""RecBole's keys: what each may hold, where RecBole checks late or never, and which of them a request may change.

Whatever is not `FREE` shapes a training: its weights, batches, draws or log. With a checkpoint, such a key has the
training's value or none.
"""

import codecs
import copy
import difflib
import inspect
import math
import numbers
import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import recbole
import yaml
from recbole.config import configurator as recbole_configurator
from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType, ModelType

from recbole_unlearn.errors import InputError

RECBOLE = Path(recbole_configurator.__file__).parent.parent
# fmt: off
# Keys that RecBole reads without listing them in any properties file.
EXTRA = (
    "config_files", "local_rank", "nproc", "world_size", "offset", "ip", "port", "seq_len", "preload_weight",
    "log_wandb", "model", "dataset", "encoding",
)
# RecBole's keys that a request may change: where it runs, what it shows and keeps, how it judges.
FREE = frozenset((
    "gpu_id", "use_gpu", "device", "single_spec", "local_rank", "nproc", "world_size", "offset", "ip", "port",
    "state", "show_progress", "log_wandb", "wandb_project", "loss_decimal_place", "metric_decimal_place",
    "data_path", "checkpoint_dir", "config_file", "config_files",
    "save_dataset", "dataset_save_path", "save_dataloaders", "dataloaders_save_path",
    "metrics", "topk", "eval_batch_size",
))
# RecBole's keys of one run: neither kept with a model, nor part of what names a cache.
OF_RUNS = (
    "checkpoint_dir", "device", "gpu_id", "use_gpu", "data_path", "single_spec", "local_rank", "nproc", "world_size",
    "ip", "port", "offset", "show_progress", "model", "dataset", "config_files",
)
TEXT = (
    "model", "dataset", "data_path", "checkpoint_dir", "config_file", "dataset_save_path", "dataloaders_save_path",
    "USER_ID_FIELD", "ITEM_ID_FIELD", "RATING_FIELD", "TIME_FIELD", "LABEL_FIELD", "NEG_PREFIX", "LIST_SUFFIX",
    "ITEM_LIST_LENGTH_FIELD", "POSITION_FIELD", "HEAD_ENTITY_ID_FIELD", "TAIL_ENTITY_ID_FIELD", "RELATION_ID_FIELD",
    "ENTITY_ID_FIELD", "field_separator", "seq_separator",
)
OPTIONAL_TEXT = ("config_file", "dataset_save_path", "dataloaders_save_path", "encoding")
SWITCHES = (
    "use_gpu", "reproducibility", "show_progress", "save_dataset", "save_dataloaders", "log_wandb", "shuffle",
    "require_pow", "enable_amp", "enable_scaler", "repeatable", "kg_reverse_r", "filter_inter_by_user_or_item",
)
WHOLE = {  # smallest and largest value
    "seed": (0, 2**32 - 1),
    "epochs": (0, 1_000_000),
    "train_batch_size": (1, 2**31 - 1),
    "eval_batch_size": (1, 2**62),
    "embedding_size": (1, 2**16),
    "eval_step": (0, math.inf),
    "stopping_step": (0, math.inf),
    "metric_decimal_place": (0, 16),
    "loss_decimal_place": (0, 16),
    "worker": (0, 1024),
    "MAX_ITEM_LIST_LENGTH": (1, 2**16),
}
MOST_RATE = 1e32  # of learning rate and weight decay
DISTINCT = ("USER_ID_FIELD", "ITEM_ID_FIELD", "RATING_FIELD", "TIME_FIELD", "LABEL_FIELD")
# RecBole makes these of other keys, or of the machine; whatever is given for them is passed over.
DERIVED = (
    "device", "single_spec", "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "valid_neg_sample_args",
    "test_neg_sample_args",
)
INTERVALS = (
    "user_inter_num_interval", "item_inter_num_interval", "entity_kg_num_interval", "relation_kg_num_interval",
)
CHOICES = {
    "state": ("debug", "info", "warning", "error", "critical"),
    "learner": ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam"),  # RecBole takes Adam for all others
    "rm_dup_inter": (None, "first", "last"),
    "transform": (None, "mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined"),
    "loss_type": ("BPR", "CE"),
}
# Keys of models whose default is a whole number, but need not be.
FRACTIONS = (
    "reg_weight", "dropout_prob", "hidden_dropout_prob", "attn_dropout_prob", "negative_weight", "global_ratio",
    "spatial_ratio", "w_max", "gamma", "margin",
)
# fmt: on
ANY_CASE = ("state", "learner")  # as RecBole reads them
SPLITS = ("valid_and_test", "valid_only", "test_only")
WITHOUT_CUTOFF = ("gauc",)


# -- which keys there are


@cache
def recbole_keys():
    """Every key that RecBole's own properties files and argument lists name."""
    keys = set(EXTRA)
    for group in ("general", "training", "evaluation", "dataset"):
        keys.update(getattr(recbole_configurator, f"{group}_arguments"))
    for file in (RECBOLE / "properties").rglob("*.yaml"):
        keys.update(re.findall(r"^([\w-]+)\s*:", file.read_text("utf-8"), re.MULTILINE))
    return frozenset(keys)


@cache
def _read_by_recbole():
    """Every key that RecBole's source reads from a configuration."""
    found = set()
    for file in RECBOLE.rglob("*.py"):
        found.update(re.findall(r"""config\[["']([\w-]+)["']\]""", file.read_text("utf-8")))
    return frozenset(found)


def _read_by(model_class):
    """Words in quotes in the files of a class of the user's own and its bases; None where there is no source."""
    found = set()
    for each in model_class.__mro__:
        if each.__module__.partition(".")[0] in ("builtins", "torch", "recbole", "abc"):
            continue
        try:
            text = Path(inspect.getsourcefile(each) or "").read_text("utf-8")
        except (OSError, TypeError, ValueError):
            return None
        found.update(re.findall(r"""["']([\w-]+)["']""", text))
    return found


def check_known(key, own, model_class=None):
    """Raises InputError for a key that neither RecBole, nor this package (``own``), nor the model's class reads."""
    if not isinstance(key, str):
        raise InputError(f"unknown key {key!r}; keys are text")
    known = recbole_keys() | set(own)
    if key in known or key in _read_by_recbole():
        return
    words = _read_by(model_class) if isinstance(model_class, type) else ()
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if words is None and not near or key in (words or ()):
        return
    hint = f"did you mean {near[0]!r}?" if near else "neither RecBole nor recbole_unlearn reads it; leave it out"
    raise InputError(f"unknown key {key!r}; {hint}")


@cache
def known_models():
    """Names of RecBole's models, as its properties files spell them, sorted."""
    names = {file.stem for file in (RECBOLE / "properties" / "model").glob("*.yaml")}
    return sorted(names | {"Random"})  # which has no properties


def check_model_name(name):
    """Raises InputError, with the nearest name, where RecBole has no model of this one."""
    if name not in known_models():
        spelt = {known.lower(): known for known in known_models()}
        near = difflib.get_close_matches(name.lower(), spelt, n=1)
        hint = f"did you mean {spelt[near[0]]!r}?" if near else "RecBole's documentation lists its models"
        raise InputError(f"no model named {name!r}; {hint} (a class of your own is given as itself, from Python)")


# -- what they may hold


def is_a(kind, value):
    """Whether a value is a number of this kind; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_choice(key, value, allowed):
    """Raises InputError where a value is none of those allowed."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), [word for word in allowed if word], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{key} must be one of {', '.join(map(str, allowed))}, not {value!r}{hint}")


def check_whole(key, value, low, high=math.inf):
    """Raises InputError where a value is no whole number from ``low`` to ``high``."""
    if not (is_a(numbers.Integral, value) and low <= value <= high):
        limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise InputError(f"{key} must be a whole number of {limit}, not {value!r}")


def check_switch(key, value):
    """Raises InputError where a value is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{key} must be True or False, not {value!r}")


def lower(final):
    """Spell the values of `ANY_CASE` as we compare them, in place."""
    for key in ANY_CASE:
        if isinstance(final.get(key), str):
            final[key] = final[key].lower()


def check_values(config):
    """Raises InputError where a key of RecBole holds what RecBole would fail on while it works, or pass over.

    Args:
        config (Config): RecBole's configuration; its values of `ANY_CASE` are lowered.
    """
    final = config.final_config_dict
    lower(final)
    for key in SWITCHES:
        if key in final:
            check_switch(key, final[key])
    for key, (low, high) in WHOLE.items():
        if key in final and not (key == "loss_decimal_place" and final[key] is None):
            check_whole(key, final[key], low, high)
    for key, allowed in CHOICES.items():
        # a model may have a loss of its own by default; whether it is served is said later
        own = config.internal_config_dict.get(key)
        if key in final and final[key] != own and not (key == "state" and final[key] is None):
            check_choice(key, final[key], allowed)
    for key in (*TEXT, *OPTIONAL_TEXT):
        _check_text(key, final)
    fields = [final[key] for key in DISTINCT if key in final]
    if twice := {name for name in fields if fields.count(name) > 1}:
        raise InputError(f"{', '.join(key for key in DISTINCT if final.get(key) in twice)} must be different columns")
    if not re.fullmatch(r"|\d+(,\d+)*|((GPU|MIG)-[\w-]+,?)+", str(final.get("gpu_id", ""))):
        raise InputError(f"gpu_id must be numbers of GPUs such as 0 or 0,1, or empty, not {final['gpu_id']!r}")
    for key in INTERVALS:
        if key in final and final[key] is not None:
            _check_intervals(key, final[key])
    for key, zero in (("learning_rate", False), ("weight_decay", True)):
        value = final.get(key)
        if not (is_a(numbers.Real, value) and 0 <= value < math.inf and (value or zero)):
            raise InputError(f"{key} must be a number {'of at least' if zero else 'above'} 0, not {value!r}")
        if value and not 1e-30 < value < MOST_RATE:
            raise InputError(f"{key} must be a number that float32 has room for, below {MOST_RATE:g}, not {value!r}")
    for key in ("load_col", "unload_col", "unused_col", "seq_len", "preload_weight", "val_interval", "threshold"):
        if not isinstance(final.get(key), (dict, type(None))):
            hint = "; write it as in Python: {'name': value}" if isinstance(final[key], str) else ""
            raise InputError(f"{key} must be a dict, not {final[key]!r}{hint}")
    for field, interval in (final.get("val_interval") or {}).items():
        if not isinstance(interval, (list, type(None))):
            _check_intervals(f"val_interval of {field}", interval)
    if not isinstance(final.get("normalize_all"), (bool, type(None))):
        raise InputError(f"normalize_all must be True or False, not {final['normalize_all']!r}")
    _check_clipping(final.get("clip_grad_norm"))
    _check_negatives(final["train_neg_sample_args"])
    _check_eval_args(final["eval_args"])
    _check_time(config, final)
    _check_metrics(final)
    _check_model(config)


def _check_text(key, final):
    value = final.get(key)
    if value is None and (key in OPTIONAL_TEXT or key not in final):
        return
    if not (isinstance(value, str) and value and "\0" not in value):
        raise InputError(f"{key} must be text, not {value!r}")
    if key in ("model", "dataset") and (re.search(r"[/\\\n\r]", value) or value in (".", "..")):
        raise InputError(f"{key} must be a name, not {value!r}")
    if key == "encoding":
        try:
            codecs.lookup(value)
        except LookupError:
            raise InputError(f"encoding {value!r} is not known; give one that Python knows, such as utf-8") from None


def _check_intervals(key, value):
    number = r"\s*[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf)\s*"
    parts = [re.fullmatch(rf"\s*[\[(]({number}),({number})[\])]\s*", part) for part in str(value).split(";")]
    if not all(part and float(part[1]) <= float(part[2]) for part in parts):
        raise InputError(f"{key} must be an interval such as [5,inf), not {value!r}")


def _check_clipping(value):
    if value is None:
        return
    if not (isinstance(value, dict) and is_a(numbers.Real, value.get("max_norm")) and 0 < value["max_norm"]):
        raise InputError(f"clip_grad_norm must be a dict with a max_norm above 0, not {value!r}")
    if unknown := set(value) - {"max_norm", "norm_type", "error_if_nonfinite", "foreach"}:
        raise InputError(f"clip_grad_norm has no {min(map(str, unknown))}; give max_norm and norm_type")
    if not (is_a(numbers.Real, value.get("norm_type", 2.0)) and value.get("norm_type", 2.0) > 0):
        raise InputError(f"clip_grad_norm: norm_type must be a number above 0, not {value['norm_type']!r}")


def _check_negatives(args):
    if not isinstance(args, dict):
        raise InputError(f"train_neg_sample_args must be a dict, not {args!r}")
    known = ("distribution", "sample_num", "alpha", "dynamic", "candidate_num")
    for key in args:
        if key not in known:
            raise InputError(f"train_neg_sample_args has no {key!r}; its keys are {', '.join(known)}")
    if args["distribution"] == "none":
        return
    check_whole("train_neg_sample_args: sample_num", args["sample_num"], 1, 2**20)
    check_switch("train_neg_sample_args: dynamic", args["dynamic"])
    check_whole("train_neg_sample_args: candidate_num", args["candidate_num"], 0)
    if not (is_a(numbers.Real, args["alpha"]) and math.isfinite(args["alpha"])):
        raise InputError(f"train_neg_sample_args: alpha must be a number, not {args['alpha']!r}")


def _check_eval_args(args):
    for key in args:
        if key not in ("split", "order", "group_by", "mode"):
            raise InputError(f"eval_args has no {key!r}; its keys are split, order, group_by, mode")
    split = args["split"]
    if not (isinstance(split, dict) and len(split) == 1 and set(split) <= {"RS", "LS", "TS"}):
        raise InputError(f"eval_args: split must be {{'RS': [0.8, 0.1, 0.1]}} or {{'LS': ...}}, not {split!r}")
    if "TS" in split and recbole.__version__ == "1.2.0":
        raise InputError("eval_args: split TS is not in RecBole 1.2.0, which is installed; give RS, with order: TO")
    if "LS" not in split:  # by ratio, at random or in time
        ((kind, shares),) = split.items()
        fits = isinstance(shares, (list, tuple)) and len(shares) == 3
        if not (fits and all(is_a(numbers.Real, share) and 0 <= share < math.inf for share in shares) and shares[0]):
            raise InputError(
                f"eval_args: split {kind} must be three numbers of at least 0, for training, validation and test, the "
                f"first above 0, not {shares!r}"
            )
    else:
        check_choice("eval_args: split LS", split["LS"], SPLITS)
    check_choice("eval_args: order", args["order"], ("RO", "TO"))
    check_choice("eval_args: group_by", args["group_by"], ("user", "none", None))
    for phase, mode in args["mode"].items():
        if not re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d*", mode):
            raise InputError(f"eval_args: mode of {phase} must be full, uniN or popN, not {mode!r}")


def _check_time(config, final):
    """What orders interactions must be among the columns that are loaded."""
    loaded, column = (final.get("load_col") or {}).get("inter"), final["TIME_FIELD"]
    if not isinstance(loaded, list) or column in loaded:
        return
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    if sequential or final["eval_args"]["order"] == "TO":
        who = config["model"] if sequential else "eval_args: order TO"
        columns = {"inter": [*loaded, column]}
        raise InputError(
            f"{who} orders interactions by {column}, which load_col does not load; give load_col: {columns}"
        )


def _check_metrics(final):
    metrics, topk = final["metrics"], final["topk"]
    if not (isinstance(topk, list) and topk):
        raise InputError(f"topk must be a list of whole numbers, not {topk!r}")
    for k in topk:
        check_whole("topk", k, 1)
    if not (isinstance(metrics, list) and metrics):
        raise InputError(f"metrics must be a list of names, not {metrics!r}")
    ratio = final.get("tail_ratio")  # of TailPercentage
    if ratio is not None and not (is_a(numbers.Real, ratio) and 0 < ratio < math.inf):
        raise InputError(f"tail_ratio must be a number above 0, not {ratio!r}")
    if not isinstance(final["valid_metric"], str):
        raise InputError(f"valid_metric must be a metric at a cutoff such as NDCG@10, not {final['valid_metric']!r}")


def _check_model(config):
    """A model's own keys hold what is of the kind of RecBole's default."""
    for key, default in model_defaults(config.model_class).items():
        value = config.final_config_dict.get(key)
        if key in WHOLE or key in CHOICES or key in SWITCHES or default is None:
            continue
        if isinstance(default, bool):
            check_switch(key, value)
        elif isinstance(default, int) and key not in FRACTIONS:
            check_whole(key, value, min(default, 0))
        elif isinstance(default, numbers.Real):
            if not (is_a(numbers.Real, value) and math.isfinite(value)):
                raise InputError(f"{key} must be a number, not {value!r}")
        elif isinstance(default, list):
            if not isinstance(value, (list, tuple)):
                raise InputError(f"{key} must be a list, not {value!r}")
        elif isinstance(default, str) and not isinstance(value, (str, type(None))):
            raise InputError(f"{key} must be text, not {value!r}")


def model_defaults(model_class):
    """RecBole's properties of a model, or of the one that a class of the user's own is derived from."""
    file = RECBOLE / "properties" / "model" / f"{recbole_name(model_class)}.yaml"
    return defaults_in(file) if file.is_file() else {}


def defaults_in(file: Path) -> dict[str, Any]:
    """What a file of defaults says, as RecBole reads it; it is parsed again where it has changed since."""
    stat = file.stat()
    return copy.deepcopy(_parsed(file, stat.st_mtime_ns, stat.st_size))


@cache
def _parsed(file, *_):
    return yaml.load(file.read_text("utf-8"), Loader=yaml.FullLoader) or {}  # with RecBole's floats: 1e-05 is one


def recbole_name(model_class):
    """Name of the RecBole model that a class is, or is derived from; its own where there is none."""
    names = [each.__name__ for each in getattr(model_class, "__mro__", ()) if each.__module__.startswith("recbole.")]
    known = [name for name in names if (RECBOLE / "properties" / "model" / f"{name}.yaml").is_file()]
    return known[0] if known else model_class.__name__


def check_judged(config):
    """Raises InputError where models are to be judged by what says nothing of a ranking."""
    instead = "evaluate: none" + (" without drift_every" if config["drift_every"] else "")
    for name in config["metrics"]:
        if metric_types[name.lower()] != EvaluatorType.RANKING:
            raise InputError(
                f"metrics: {name} judges predicted values, not a ranking; give Recall, NDCG, Hit or the like, or "
                f"{instead}"
            )
    for phase, mode in config["eval_args"]["mode"].items():
        if mode == "labeled":
            raise InputError(
                f"eval_args: mode of {phase} is labeled, which judges values; give full, uniN or popN, or {instead}"
            )


def check_validated(config, instead=""):
    """Raises InputError where RecBole's validation would miss the metric that it chooses the best epoch by.

    Args:
        instead: what else may be given, to end the line with.
    """
    names = [metric.lower() for metric in config["metrics"]]
    values = {name for name in names if metric_types[name] == EvaluatorType.VALUE} | set(WITHOUT_CUTOFF)
    computed = dict.fromkeys(name if name in values else f"{name}@{k}" for name in names for k in config["topk"])
    if config["valid_metric"].lower() not in computed:
        raise InputError(
            f"valid_metric {config['valid_metric']} is none of the metrics at topk: {', '.join(computed)}; give it "
            f"among them{instead}"
        )


def validating(config):
    """RecBole's keys of a validation that computes ``valid_metric`` alone, whatever a request has models judged by."""
    name, _, cutoff = config["valid_metric"].partition("@")
    if name.lower() not in metric_types:  # a training that never validated may name any
        return {}
    topk = {"topk": [int(cutoff)]} if cutoff.isdecimal() else {}
    return {"metrics": [name], "eval_type": metric_types[name.lower()], **topk}


def alike(key, first, second):
    """Whether two values of a key are one to RecBole: 1 like 1.0, a metric in any case, shares by their ratio."""
    return same(_canonical(key, first), _canonical(key, second))


def _canonical(key, value: Any):
    """A value in the one form in which equal ones are equal."""
    if key == "valid_metric" and isinstance(value, str):
        return value.lower()
    if key == "encoding":
        return codecs.lookup(value or "utf-8").name
    if key in INTERVALS and value is not None:
        return [
            [part.strip()[:1], *map(float, part.strip()[1:-1].split(",")), part.strip()[-1:]]
            for part in str(value).split(";")
        ]
    if key == "clip_grad_norm" and isinstance(value, dict):
        return {"norm_type": 2.0, **value}
    if key in ("load_col", "unload_col", "unused_col") and isinstance(value, dict):
        return {file: sorted(map(str, names)) if isinstance(names, list) else names for file, names in value.items()}
    if key == "eval_args":
        args: dict = {**cast(dict, value)}
        if isinstance(shares := args["split"].get("RS"), (list, tuple)):
            args["split"] = {"RS": [round(share / sum(shares), 12) for share in shares]}
        return args
    return value


def same(first, second):
    """Whether two plain values are equal; 1 is 1.0, and True neither."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second and isinstance(first, bool) == isinstance(second, bool)
