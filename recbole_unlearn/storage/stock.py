"""Reading checkpoints as RecBole itself writes them, a pickle that holds its ``Config``. Nothing read can run code.

``torch.load(weights_only=True)`` refuses such a file. Here no name that a pickle gives is ever looked up: each stands
for something of this module, and what may be called among these makes plain values, or tensors of numbers that lie in
the file.
"""

import io
import pickle
import pickletools
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAX_PICKLE = 4 << 20  # bytes; RecBole's have some thousand, and their tensors lie elsewhere
MAX_TUPLES = 20_000  # of a pickle: Python's hash of one in one in one goes as deep as they do
MAX_VALUES, MAX_DEPTH = 1_000_000, 40
MAX_PLACES = 1 << 20  # of what a pickle remembers: more than values fit into it
CONFIG = ("recbole.config.configurator", "Config")
GLOBAL = f"c{CONFIG[0]}\n{CONFIG[1]}\n"
ENUMS = "recbole.utils.enum_type"
# What a pickle of RecBole is made of, in its protocol or in torch's, in which others write it anew. None of these takes
# from the registry of extensions; places in memory that the pickle chooses are below `MAX_PLACES`.
OPCODES = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 STACK_GLOBAL NEWOBJ REDUCE BUILD BINPERSID "
    "GLOBAL BINPUT LONG_BINPUT".split()
)
DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
SCALARS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


def wrote(path: Path | str) -> bool:
    """Whether a file of torch's holds a pickle that names RecBole's ``Config``; ours hold plain values."""
    with zipfile.ZipFile(path) as file:
        contents = [file.read(name) for name in _pickles(file)]
    # torch's protocol, in which ours are, names in another way than it writes text, which may say anything
    return len(contents) == 1 and (CONFIG[0] if contents[0][1:2] > b"\x03" else GLOBAL).encode() in contents[0]


def read(path: Path | str) -> dict[str, Any]:
    """Content of such a file in the form in which this package keeps it: plain values and tensors, ``config`` a dict.

    Raises:
        pickle.UnpicklingError: it names what no checkpoint of RecBole needs, or does more than these do.
        Exception: whatever else a damaged file causes.
    """
    with zipfile.ZipFile(path) as file:
        (name,) = _pickles(file)
        root, content = name.partition("/")[0], file.read(name)
        if f"{root}/byteorder" in file.namelist() and file.read(f"{root}/byteorder") != b"little":
            raise pickle.UnpicklingError("it was written on a machine of another byte order")
        _check_opcodes(content)
        reader = _Reader(content, file, root)
        try:
            state = reader.load()
        except pickle.UnpicklingError as error:
            made = sorted(str(each) for each in reader.unknown if not str(each).startswith("recbole."))
            if not (made and str(error).startswith("NEWOBJ")):  # of a name, which is no class here
                raise
            raise pickle.UnpicklingError(
                f"it holds objects such as {made[-1]}, as those of models do that RecBole computes and does not train "
                "(EASE, ItemKNN): these cannot be unlearned from, build them anew on the data that remain"
            ) from None
    config = state.get("config") if isinstance(state, dict) else None
    if not isinstance(config, _Config):
        raise pickle.UnpicklingError("it holds no configuration of RecBole")
    if stray := reader.unknown - {config.state.get("model_class")}:
        raise pickle.UnpicklingError(f"it names {min(map(str, stray))}")
    values = _Plain()
    return values({**state, "config": config.state["final_config_dict"]})


def _pickles(file):
    return [name for name in file.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]


def _check_opcodes(content):
    if len(content) > MAX_PICKLE:
        raise pickle.UnpicklingError("its pickle is larger than RecBole's are")
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in OPCODES or opcode.name == "LONG_BINPUT" and int(argument or 0) > MAX_PLACES:
            raise pickle.UnpicklingError(f"its pickle has {opcode.name}, which RecBole's have not")
        tuples += "TUPLE" in opcode.name
    if tuples > MAX_TUPLES:
        raise pickle.UnpicklingError("its pickle is more nested than RecBole's are")


class _Name:
    """A class or function that a pickle names, never looked up; it can be neither called nor changed."""

    __slots__ = ("text",)

    def __init__(self, module, name):
        self.text = f"{module}.{name}"

    def __str__(self):
        return self.text

    def __call__(self, *_):
        raise pickle.UnpicklingError(f"it calls {self.text}")

    def __setstate__(self, _):
        raise pickle.UnpicklingError(f"it changes {self.text}")


class _Callable(_Name):
    """One that may be called: what is done is of this module."""

    __slots__ = ("call",)

    def __init__(self, module, name, call):
        super().__init__(module, name)
        self.call = call

    def __call__(self, *arguments):
        return self.call(*arguments)


class _Config:
    """Stands for a configuration of RecBole: holds its attributes, as a dict."""

    __slots__ = ("state",)

    def __setstate__(self, state):
        if type(state) is not dict or not isinstance(state.get("final_config_dict"), dict):
            raise pickle.UnpicklingError("its configuration is none of RecBole's")
        self.state = state


class _Dict(dict):
    """Stands for an OrderedDict, without what torch hangs on it."""

    __slots__ = ()

    def __setstate__(self, _):
        pass


class _Numbers:
    """Holds a tensor, which a pickle could change in place."""

    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor

    def __setstate__(self, _):
        raise pickle.UnpicklingError("it changes a tensor")


class _Kind:
    """Stands for a dtype of numpy: a number, little-endian."""

    __slots__ = ("kind",)

    def __init__(self, code, *_):
        if code not in SCALARS:
            raise pickle.UnpicklingError("it holds numbers of a kind that RecBole's have not")
        self.kind = np.dtype(f"<{code}")

    def __setstate__(self, state):
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError("it holds numbers of another byte order")


class _Reader(pickle.Unpickler):
    """An unpickler to whom names are names."""

    def __init__(self, content, file, root):
        super().__init__(io.BytesIO(content))
        self.file, self.root = file, root
        self.storages = {}
        self.unknown = set()  # names without a meaning here: a model's class, of RecBole or the user's own
        self.known: dict[tuple[str, str], Any] = {CONFIG: _Config}
        for module, name in (("yaml.loader", "FullLoader"), *(("torch", name) for name in DTYPES)):
            self.known[module, name] = _Name(module, name)
        for module, name, call in (
            ("collections", "OrderedDict", lambda: _Dict()),
            ("torch", "device", _device),
            ("torch._utils", "_rebuild_tensor_v2", _tensor),
            ("torch._utils", "_rebuild_parameter", lambda tensor, *_: tensor),
            ("_codecs", "encode", _bytes),
            ("numpy", "dtype", _Kind),
            ("numpy.core.multiarray", "scalar", _scalar),
            ("numpy._core.multiarray", "scalar", _scalar),
        ):
            self.known[module, name] = _Callable(module, name, call)

    def find_class(self, module, name):
        """What a name stands for."""
        if (module, name) in self.known:
            return self.known[module, name]
        if module == ENUMS:
            return self.known.setdefault((module, name), _Callable(module, name, lambda value: f"{name}.{value}"))
        self.unknown.add(named := self.known.setdefault((module, name), _Name(module, name)))
        return named

    def persistent_load(self, pid):
        """The numbers of a tensor, one-dimensional."""
        what, kind, key, _, size = pid
        dtype = DTYPES[str(kind).removeprefix("torch.")]
        if what != "storage" or type(key) is not str or not key.isdecimal() or type(size) is not int:
            raise pickle.UnpicklingError("it refers to what is no tensor's")
        if (key, dtype) not in self.storages:
            content = bytearray(self.file.read(f"{self.root}/data/{key}"))
            self.storages[key, dtype] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        if len(numbers := self.storages[key, dtype]) != size:
            raise pickle.UnpicklingError("a tensor is not of the size that it says")
        return _Numbers(numbers)


def _device(kind, index=None):
    return f"{kind}" if index is None else f"{kind}:{index}"


def _bytes(text, encoding):
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it holds bytes that are none")
    return text.encode(encoding)


def _scalar(kind, content):
    if not isinstance(kind, _Kind) or type(content) is not bytes or len(content) != kind.kind.itemsize:
        raise pickle.UnpicklingError("it holds a number that is none")
    return np.frombuffer(content, kind.kind)[0].item()


def _tensor(storage, offset, size, stride, *_):
    whole = all(type(each) is int and each >= 0 for each in (offset, *size, *stride))
    if not (whole and isinstance(storage, _Numbers) and len(size) == len(stride) <= 8):
        raise pickle.UnpicklingError("it holds a tensor that is none")
    numbers = storage.tensor.reshape(-1)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if prod(size) and (last >= len(numbers) or prod(size) > len(numbers)):
        raise pickle.UnpicklingError("a tensor is larger than its numbers are many")
    return _Numbers(numbers.as_strided(size, stride, offset) if prod(size) else numbers.new_empty(size))


class _Plain:
    """Copies plain values, as long as they are not too many."""

    def __init__(self):
        self.left = MAX_VALUES

    def __call__(self, value, depth=0) -> Any:
        self.left -= 1
        if depth > MAX_DEPTH or self.left < 0:
            raise pickle.UnpicklingError("its values are nested too deeply, or too many")
        if isinstance(value, _Numbers):
            return value.tensor
        if value is None or type(value) in (str, bool, float):
            return value
        if type(value) is int and abs(value) < 1 << 64:
            return value
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            return {self(key, depth + 1): self(each, depth + 1) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self(each, depth + 1) for each in value)
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, where RecBole's have plain values")
