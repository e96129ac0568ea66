"""Rows of embeddings as LLVM vectors inside numba kernels, and a fast exponential.

Numba makes scalar code of short constant loops, and keeps in memory what belongs in registers. A `Vector` is a value:
a variable of it that a loop accumulates into stays in registers.
"""

import operator
import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import extending, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global

from recbole_unlearn.influence.compiling import inlined

ir = cgutils.ir  # llvmlite's
LLVM_FLAGS = ("reassoc", "contract", "nsz")


LINE = 64  # bytes of a cache line


def aligned(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    """An array of zeros that begins with a cache line: numpy's own may not, and rows take two then."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + LINE, np.uint8)  # of large ones numpy asks for large pages, of zeros it does not
    raw[:] = 0
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(dtype).reshape(shape)


class Vector(types.Type):
    """Numba type of a row of ``length`` numbers, float32 or float64."""

    def __init__(self, length: int, element: types.Type) -> None:
        self.length, self.element = length, element
        super().__init__(f"Vector({length}, {element})")


@extending.register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = ir.FloatType() if vector.element == types.float32 else ir.DoubleType()
        super().__init__(manager, vector, ir.VectorType(element, vector.length))


def _pointer(context, builder, kind, array, row, column, vector):
    """LLVM pointer to a vector that starts at ``array[row, column]``, ``array`` C-contiguous."""
    view = context.make_array(kind)(context, builder, array)
    place = builder.add(builder.mul(row, builder.extract_value(view.shape, 1)), column)
    return builder.bitcast(builder.gep(view.data, [place]), context.get_value_type(vector).as_pointer())


def intrinsic(*function: Callable, **options: Any) -> Any:
    """numba's own, whose annotations would have a call pass the typing context too."""
    return extending.intrinsic(*function, **options)


@intrinsic(prefer_literal=True)
def load(typing, length, array, row, column):
    """``array[row, column : column + length]`` of a C-contiguous float array; ``length`` a constant."""
    vector = Vector(length.literal_value, array.dtype)

    def emit(context, builder, signature, args):
        _, place, row, column = args
        pointer = _pointer(context, builder, array, place, row, column, vector)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return vector(length, array, types.int64, types.int64), emit


@intrinsic
def load_like(typing, x, array, row, column):
    """`load` of as many numbers as a vector ``x`` has: for functions whose callers are of several widths."""

    def emit(context, builder, signature, args):
        _, place, row, column = args
        pointer = _pointer(context, builder, array, place, row, column, x)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return x(x, array, types.int64, types.int64), emit


@intrinsic
def store(typing, array, row, column, x):
    """``array[row, column : column + len(x)] = x``, of the same type."""

    def emit(context, builder, signature, args):
        place, row, column, value = args
        pointer = _pointer(context, builder, array, place, row, column, x)
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)

    if array.dtype != x.element:
        raise numba.TypingError(f"a vector of {x.element} does not go into an array of {array.dtype}")
    return types.void(array, types.int64, types.int64, x), emit


def _everywhere(builder, number, vector):
    """LLVM vector of a number, again and again."""
    one = builder.insert_element(vector(ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, vector(ir.Undefined), ir.VectorType(ir.IntType(32), vector.count)(None))


@intrinsic(prefer_literal=True)
def zeros(typing, length):
    """A vector of float64 zeros, to accumulate into."""
    vector = Vector(length.literal_value, types.float64)
    return vector(length), lambda context, builder, signature, args: context.get_value_type(vector)(None)


@intrinsic(prefer_literal=True)
def spread(typing, length, number):
    """A vector of a number, again and again."""
    vector = Vector(length.literal_value, number)

    def emit(context, builder, signature, args):
        return _everywhere(builder, args[1], context.get_value_type(vector))

    return vector(length, number), emit


@intrinsic
def widen(typing, x):
    """The same numbers in float64."""
    vector = Vector(x.length, types.float64)

    def emit(context, builder, signature, args):
        return builder.fpext(args[0], context.get_value_type(vector)) if x != vector else args[0]

    return vector(x), emit


@intrinsic
def multiply(typing, x, y):
    """Entrywise product of two vectors of the same type."""
    return x(x, x), lambda context, builder, signature, args: builder.fmul(*args, LLVM_FLAGS)


@intrinsic
def dot(typing, x, y):
    """Inner product of two vectors of the same type."""

    def emit(context, builder, signature, args):
        product = builder.fmul(*args, LLVM_FLAGS)
        element = product.type.element
        name = f"llvm.vector.reduce.fadd.v{x.length}f{x.element.bitwidth}"
        kind = ir.FunctionType(element, [element, product.type])
        add = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(add, [element(0), product], fastmath=LLVM_FLAGS)

    return x.element(x, x), emit


@intrinsic
def add_scaled(typing, x, scale, y):
    """``x + scale * y``, in the type of ``x``; ``scale`` a number, ``y`` of the same type or narrower."""

    def emit(context, builder, signature, args):
        x_value, scale_value, y_value = args
        vector = x_value.type
        if y != x:
            y_value = builder.fpext(y_value, vector)
        scales = _everywhere(builder, scale_value, vector)
        return builder.fadd(x_value, builder.fmul(scales, y_value, LLVM_FLAGS), LLVM_FLAGS)

    return x(x, x.element, y), emit


def _arithmetic(symbol: Callable, instruction: str) -> None:
    """Have numba know an operator of two vectors of the same type, or of one and a number of its elements' type."""

    @infer_global(symbol)  # pyright: ignore
    class _Typed(AbstractTemplate):  # not `extending.overload`, which compiles a function for each pair of types
        def generic(self, args, kws):
            kinds = [part for part in args if isinstance(part, Vector)]
            if kinds:
                kind = kinds[0]
                return kind(*(kind if isinstance(part, Vector) else kind.element for part in args))
            return None

    def emit(context, builder, signature, args):
        vector = context.get_value_type(signature.return_type)
        values = [value if value.type == vector else _everywhere(builder, value, vector) for value in args]
        return getattr(builder, instruction)(*values, LLVM_FLAGS)

    for kinds in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        extending.lower_builtin(symbol, *kinds)(emit)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@intrinsic
def root(typing, x):
    """Entrywise square root."""

    def emit(context, builder, signature, args):
        kind = args[0].type
        name = f"llvm.sqrt.v{x.length}f{x.element.bitwidth}"
        sqrt = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)
        return builder.call(sqrt, args)

    return x(x), emit


# Inlined functions that are called for each row take pointers: of arrays numba counts the references at each call.


@intrinsic
def pointer(typing, array, place):
    """Pointer to ``array.flat[place]``, ``array`` C-contiguous; its items are read and written by ``[index]``."""

    def emit(context, builder, signature, args):
        return builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])

    return types.CPointer(array.dtype)(array, types.int64), emit


@intrinsic
def onward(typing, start, place):
    """Pointer to the ``place``-th item after a pointer."""
    return start(start, types.int64), lambda context, builder, signature, args: builder.gep(args[0], [args[1]])


@intrinsic
def take_like(typing, x, start, place):
    """As many numbers as a vector ``x`` has, from the ``place``-th on after a pointer."""

    def emit(context, builder, signature, args):
        where = builder.bitcast(builder.gep(args[1], [args[2]]), args[0].type.as_pointer())
        return builder.load(where, align=start.dtype.bitwidth // 8)

    return x(x, start, types.int64), emit


@intrinsic
def columns(typing, x):
    """How many numbers a vector has."""
    return types.uint64(x), lambda context, builder, signature, args: ir.IntType(64)(x.length)


@intrinsic
def put(typing, start, place, x):
    """Write a vector from the ``place``-th number after a pointer on."""

    def emit(context, builder, signature, args):
        where = builder.bitcast(builder.gep(args[0], [args[1]]), context.get_value_type(x).as_pointer())
        builder.store(args[2], where, align=start.dtype.bitwidth // 8)

    return types.void(start, types.int64, x), emit


@intrinsic
def prefetch(typing, start, place):
    """Have the processor fetch the cache line of the ``place``-th number after a pointer."""

    def emit(context, builder, signature, args):
        where = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [where.type, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch")
        builder.call(fetch, [where, number(0), number(3), number(1)])

    return types.void(start, types.int64), emit


@intrinsic
def publish(typing, array, index, value):
    """``array[index] = value``, of an int64 array, seen by other threads after all that was written before."""

    def emit(context, builder, signature, args):
        view = context.make_array(array)(context, builder, args[0])
        builder.store_atomic(args[2], builder.gep(view.data, [args[1]]), "release", 8)

    return types.void(array, types.int64, types.int64), emit


@intrinsic
def observe(typing, array, index):
    """``array[index]`` of an int64 array, after which all is seen that was written before it was published."""

    def emit(context, builder, signature, args):
        view = context.make_array(array)(context, builder, args[0])
        return builder.load_atomic(builder.gep(view.data, [args[1]]), "acquire", 8)

    return types.int64(array, types.int64), emit


@intrinsic
def pass_on(typing):
    """Let another thread run on this core."""

    def emit(context, builder, signature, args):
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])

    return types.void(), emit


@inlined
def exp(x):
    """exp of a float32 to 3e-7, infinite from 88.4 on; inlined, where a call would empty the registers."""
    x = max(min(x, np.float32(88.5)), np.float32(-87))
    n = np.floor(x * np.float32(1.442695) + np.float32(0.5))
    x -= n * np.float32(0.6931472)
    series = np.float32(1 / 5040)
    series = series * x + np.float32(1 / 720)
    series = series * x + np.float32(1 / 120)
    series = series * x + np.float32(1 / 24)
    series = series * x + np.float32(1 / 6)
    series = series * x + np.float32(1 / 2)
    series = series * x + np.float32(1)
    series = series * x + np.float32(1)
    return series * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
