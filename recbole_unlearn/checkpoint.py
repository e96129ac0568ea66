"""Reading and writing checkpoints. Nothing read here can run code."""

import os
from pathlib import Path

import torch

from recbole_unlearn.compat import checkpoint_state, plain  # noqa: F401
from recbole_unlearn.data.triple_log import TripleLog, log_path
from recbole_unlearn.input_error import InputError


def check_finite(state_dict, what):
    """Raises InputError if a tensor of ``state_dict`` holds NaN or infinity."""
    for name, value in state_dict.items():
        if torch.is_floating_point(value) and not torch.isfinite(value).all():
            raise InputError(f"{what} holds NaN or infinite values in {name}; it cannot be used")


def save(path, state):
    """Write a checkpoint atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """A checkpoint that our trainer wrote, and its triple log.

    Returns:
        (dict, TripleLog)

    Raises:
        InputError: missing, truncated, foreign or unsafe file; NaN weights; a log of another run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... on bad files
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"checkpoint {path} cannot be read ({first}); it is damaged, or RecBole wrote it without recbole_unlearn: "
            "train with recbole_unlearn imported"
        ) from None
    if not isinstance(state, dict) or not {"config", "epoch", "state_dict", "optimizer"} <= state.keys():
        raise InputError(f"checkpoint {path} is no RecBole checkpoint; give the .pth file that training wrote")
    if not isinstance(state["config"], dict) or "triple_log" not in state:
        raise InputError(f"checkpoint {path} has no triple log; train with recbole_unlearn and log_negatives: True")
    weights, tie = state["state_dict"], state["triple_log"]
    if not (
        isinstance(weights, dict)
        and all(isinstance(value, torch.Tensor) for value in weights.values())
        and isinstance(state["optimizer"], dict)
        and isinstance(tie, dict)
        and isinstance(tie.get("epochs"), int)
        and all(isinstance(state["config"].get(key), str) for key in ("model", "dataset"))
    ):
        raise InputError(f"checkpoint {path} is damaged; give the .pth file that training wrote")
    check_finite(weights, f"checkpoint {path}")
    log = TripleLog.open(log_path(path))
    log.verify()
    if tie.get("run_id") != log.run_id or not 0 < tie.get("epochs", 0) <= log.n_epochs:
        raise InputError(f"checkpoint {path} and {log.path} come from different runs; put back the folder that training wrote")
    return state, log
