"""A GPU that is not there: its tensors are computed on the CPU, and torch's rules for moving them are kept.

Within ``with FakeGPU():`` torch says that it has CUDA. What is made or moved there is `OnGPU`: it names the device
``cuda``, is no numpy array, and meets no tensor of the CPU except where torch lets it: numbers, indices into what is on
the GPU, ``copy_``. RecBole and the package run on it as they are, to the same numbers as on the CPU.
"""

from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda"), torch.device("cpu")
INDEXING = ("__getitem__", "__setitem__")


class OnGPU(torch.Tensor):
    """A tensor on the GPU; what is computed from it is one too."""


class FakeGPU(TorchFunctionMode):
    """See above."""

    def __enter__(self):
        self._available = patch.object(torch.cuda, "is_available", lambda: True)
        self._available.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._available.stop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, of = func.__name__, getattr(func, "__self__", None)
        first = args[0] if args else None
        if name == "__get__" and of is torch.Tensor.device:
            return _device(first)
        if name == "__get__" and of is torch.Tensor.is_cuda:
            return _device(first) is GPU
        if name == "__get__" and of is torch.Tensor.grad:
            return func(first) if func(first) is None else func(first).as_subclass(type(first))
        if name == "to":
            return _to(first, *args[1:], **kwargs)
        if name in ("cpu", "cuda"):
            return _moved(first, torch.device(name))
        if name == "_has_compatible_shallow_copy_type":  # whether a module may keep its parameter when it moves
            return _device(first) == _device(args[1])
        if isinstance(first, OnGPU) and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if isinstance(first, OnGPU) and name == "__reduce_ex__":
            return _plain(first).__reduce_ex__(*args[1:])  # as with CUDA, a file holds no class of tensor
        if name in ("view_as", "reshape_as", "expand_as"):  # which look at the other's shape alone
            return getattr(first, name[:-3])(args[1].shape)
        if "device" in kwargs:
            asked = kwargs.pop("device")
            return func(*args, **kwargs) if asked is None else _moved(func(*args, **kwargs), torch.device(asked))
        _check(name, args, kwargs)
        return func(*args, **kwargs)


def _device(tensor):
    return GPU if isinstance(tensor, OnGPU) or hasattr(tensor, "on_gpu") else CPU


def _plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def _moved(tensor, device):
    """The tensor itself if it is there already, else a copy."""
    if _device(tensor).type == device.type:
        return tensor
    if tensor.is_sparse:  # it has no subclasses
        copied = tensor.clone()
        if device.type == "cuda":
            copied.on_gpu = True
        return copied
    return _plain(tensor).clone().as_subclass(OnGPU if device.type == "cuda" else torch.Tensor)


def _to(tensor, *wanted, **named):
    """``Tensor.to``."""
    device, dtype = named.pop("device", None), named.pop("dtype", None)
    rest = []
    for each in wanted:
        if isinstance(each, torch.Tensor):
            device, dtype = _device(each), each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, (torch.device, str)):
            device = each
        elif each is not None:
            rest.append(each)
    if device is not None:
        tensor = _moved(tensor, torch.device(device))
    return tensor.to(dtype or tensor.dtype, *rest, **named)


def _check(name, args, kwargs):
    """Raises RuntimeError where torch would: for tensors of both devices."""
    if name == "copy_":
        return
    if name in INDEXING and isinstance(args[0], OnGPU):  # by indices of either device
        args = (args[0], *args[2:])
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    on_gpu = [_device(each) is GPU for each in tensors]
    if any(on_gpu) and any(each.dim() for each, there in zip(tensors, on_gpu, strict=True) if not there):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda and cpu")
