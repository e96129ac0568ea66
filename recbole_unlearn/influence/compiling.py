"""How kernels are compiled, and kept on disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

FLAGS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}


def _sources() -> str:
    """Checksum of all of this room: what a kernel calls may be in any of its files."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


_SOURCES = _sources()


def _compile(function: Callable[..., Any], **more: Any) -> Any:
    kernel = numba.njit(**FLAGS, **more)(function)
    # numba takes a kernel from disk as long as its own file is the same, whatever became of what it calls in others
    kept = getattr(getattr(kernel, "_cache", None), "_cache_file", None)  # none with NUMBA_DISABLE_JIT
    if kept is not None:
        kept._source_stamp = kept._source_stamp, _SOURCES
    return kernel


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel, or take it from disk where nothing in this room has changed since."""
    return _compile(function)


def inlined(function: Callable[..., Any]) -> Any:
    """The same for a function that kernels call.

    LLVM inlines it: numba's own ``inline="always"`` would compile it anew for every caller. A call would reach other
    code in a process that compiled than in one that took the kernel from disk, with other last digits.
    """
    return _compile(function, forceinline=True)
