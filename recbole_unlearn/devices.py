"""Where tensors pass between the CPU, on which logs, kernels and solvers work, and the device that a model is on.

Everything else names no device: it makes tensors beside others (``zeros_like``, ``.to(other)``), or through this.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import AbstractRecommender


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy array, whatever its device; of one on the CPU the same memory."""
    return tensor.detach().cpu().numpy()


def copies(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU of all tensors of a state dict, by name; of an optimiser's, numbers stay what they are."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in state_dict.items()
    }


def placed(model: AbstractRecommender, values: np.ndarray) -> torch.Tensor:
    """An array as float32 tensor on a model's device."""
    return torch.from_numpy(values).to(model.device, torch.float32)


def read(path: Path | str) -> Any:
    """The content of a file that this package wrote, on the CPU: ``load_state_dict`` takes it to a model's device.

    So what was trained on a GPU is read where there is none.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)  # also of the line that asks for them
        with torch.sparse.check_sparse_tensor_invariants():  # indices that point elsewhere would be read all the same
            return torch.load(path, map_location="cpu", weights_only=True)


def torch_stream() -> np.ndarray:
    """Where torch's random streams stand, of the CPU and of the GPU in use, one after the other: uint8."""
    stands = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        stands.append(torch.cuda.get_rng_state())
    return torch.cat(stands).numpy()


def set_torch_stream(stands: np.ndarray) -> None:
    """Put torch's random streams where `torch_stream` found them; of a GPU, where both are of one.

    Raises:
        ValueError: these are no such streams.
    """
    both, size = torch.from_numpy(np.array(stands)), len(torch.get_rng_state())
    cpu, gpu = both[:size], both[size:]
    try:
        torch.set_rng_state(cpu)
        if len(gpu) and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(gpu)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"no state of torch's random streams: {error}") from None


@contextmanager
def torch_streams(seed: int) -> Iterator[None]:
    """torch's random streams as after ``torch.manual_seed(seed)``; those before come back, the GPUs' too.

    Streams of GPUs that nothing has used yet are left alone: to look at them would start CUDA.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN's recurrent layers have no second derivatives, and in evaluation not even first ones; torch's own have."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
