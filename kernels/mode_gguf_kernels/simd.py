"""Explicit SIMD values for Numba: one float32, int32 or truth value per lane.

A kernel written with these reads like scalar code (`x * scale + offset`, `select(x > best, x, best)`) and does the
same scalar operation in every lane, in the order written: no reassociation, and no fused multiply-add but those that
are written as `fused`. That is what makes packed bytes reproducible. llvmlite emits LLVM vector operations, which LLVM
splits or legalises for the CPU.

Memory is organised in *tiles*: flat arrays in which item `i` of all lanes lies together, at `[i * LANES, i * LANES +
LANES)`. `load` and `store` address whole items; `gather` and `scatter` transpose between tiles and rows.
"""

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, models, overload, register_model

Floats: TypeAlias = Any
"""One float32 per lane. (Type checkers do not see Numba's types, so these three are for the reader.)"""
Ints: TypeAlias = Any
"""One int32 per lane."""
Mask: TypeAlias = Any
"""One truth value per lane; combine with `&` and `|`."""
Tile: TypeAlias = np.ndarray
"""A flat float32 or int32 array of n * LANES values."""


def _lanes() -> int:
    """Two AVX-512 or two AVX2 registers per value: enough independent work to hide the latency of an addition.

    Numba compiles for NUMBA_CPU_FEATURES where that is set (or implied: NUMBA_CPU_NAME=generic has none).
    """
    if config.CPU_FEATURES is not None:
        return 32 if "+avx512f" in config.CPU_FEATURES.split(",") else 16
    return 32 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 16


LANES = _lanes()
_SQUARE = 16  # rows and columns of one in-register transposition

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_INT_LANES = ir.VectorType(_INT, LANES)
_FLOAT_LANES = ir.VectorType(_FLOAT, LANES)
_MASK_LANES = ir.VectorType(ir.IntType(1), LANES)


class Vector(types.Type):  # type: ignore[misc]  # Numba is untyped
    """Numba type of one value per lane."""

    def __init__(self, kind: str, llvm: ir.VectorType) -> None:
        self.kind = kind
        self.llvm = llvm
        super().__init__(name=f"{kind}x{LANES}")

    @property
    def is_float(self) -> bool:
        return self.kind == "float32"


_floats = Vector("float32", _FLOAT_LANES)
_ints = Vector("int32", _INT_LANES)
_mask = Vector("bool", _MASK_LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


def _broadcast(context: Any, builder: Any, value: Any, numba_type: Any, wanted: Vector) -> Any:
    """`value` itself when it is a vector, else a vector with the scalar, converted, in every lane."""
    if isinstance(numba_type, Vector):
        return value
    scalar = context.cast(builder, value, numba_type, types.float32 if wanted.is_float else types.int32)
    undefined = ir.Constant(wanted.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INT_LANES, [0] * LANES))


def _elementwise(name: str, emit: Callable[[Any, Vector, Any, Any], Any], result: Vector | None = None) -> Any:
    """An intrinsic of two operands, one of which may be a scalar; `result` None means the operands' own type."""

    @intrinsic  # type: ignore[untyped-decorator]
    def operation(_typing: Any, a: Any, b: Any) -> Any:
        operand = a if isinstance(a, Vector) else b

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, y = (
                _broadcast(context, builder, value, numba_type, operand)
                for value, numba_type in zip(arguments, signature.args, strict=True)
            )
            return emit(builder, operand, x, y)

        return (result or operand)(a, b), codegen

    operation.__name__ = name
    return operation


def _overload_operator(function: Callable[..., Any], implementation: Any) -> None:
    """Let Numba's `a + b` and the like use `implementation` when a or b is a vector."""

    @overload(function, strict=False)  # type: ignore[untyped-decorator]  # strict: annotations must match the lambda
    def choose(a: Any, b: Any) -> Any:
        if isinstance(a, Vector) or isinstance(b, Vector):
            return lambda a, b: implementation(a, b)
        return None


def _define_operators() -> None:
    arithmetic = {  # LLVM's names for floats and for ints; it refuses those that make no sense
        operator.add: ("fadd", "add"),
        operator.sub: ("fsub", "sub"),
        operator.mul: ("fmul", "mul"),
        operator.truediv: ("fdiv", "fdiv"),
        operator.and_: ("and_", "and_"),
        operator.or_: ("or_", "or_"),
        operator.lshift: ("shl", "shl"),
        operator.rshift: ("ashr", "ashr"),
    }
    for function, names in arithmetic.items():

        def emit(builder: Any, operand: Vector, x: Any, y: Any, names: tuple[str, str] = names) -> Any:
            return getattr(builder, names[0 if operand.is_float else 1])(x, y)

        _overload_operator(function, _elementwise(function.__name__, emit))

    comparisons = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge}
    comparisons |= {"==": operator.eq, "!=": operator.ne}
    for symbol, function in comparisons.items():

        def compare(builder: Any, operand: Vector, x: Any, y: Any, symbol: str = symbol) -> Any:
            if not operand.is_float:
                return builder.icmp_signed(symbol, x, y)
            # As in C: with a NaN, `!=` holds and every other comparison fails.
            return (builder.fcmp_unordered if symbol == "!=" else builder.fcmp_ordered)(symbol, x, y)

        _overload_operator(function, _elementwise(function.__name__, compare, _mask))


_define_operators()


def _emit_smaller(builder: Any, _operand: Vector, x: Any, y: Any) -> Any:
    return builder.select(builder.icmp_signed("<", x, y), x, y)


def _emit_larger(builder: Any, _operand: Vector, x: Any, y: Any) -> Any:
    return builder.select(builder.icmp_signed(">", x, y), x, y)


smaller = _elementwise("smaller", _emit_smaller)
"""smaller(a, b): the smaller of two ints."""
larger = _elementwise("larger", _emit_larger)
"""larger(a, b): the larger of two ints."""
less_unsigned = _elementwise("less_unsigned", lambda b, _v, x, y: b.icmp_unsigned("<", x, y), _mask)
"""less_unsigned(a, b): a < b, both read as uint32."""
shift_in_zeros = _elementwise("shift_in_zeros", lambda b, _v, x, y: b.lshr(x, y))
"""shift_in_zeros(a, n): logical right shift; `>>` keeps the sign."""


def _unary(name: str, result: Vector, emit: Callable[[Any, Any], Any]) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def operation(_typing: Any, a: Any) -> Any:
        return result(a), lambda _context, builder, _signature, arguments: emit(builder, arguments[0])

    operation.__name__ = name
    return operation


def _llvm_function(name: str) -> Callable[[Any, Any], Any]:
    """Emit a call of LLVM's elementwise `llvm.name`."""

    def emit(builder: Any, x: Any) -> Any:
        function_type = ir.FunctionType(_FLOAT_LANES, [_FLOAT_LANES])
        function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}f32")
        return builder.call(function, [x])

    return emit


square_root = _unary("square_root", _floats, _llvm_function("sqrt"))
"""Correctly rounded square root."""
absolute = _unary("absolute", _floats, _llvm_function("fabs"))
"""Magnitude of floats."""
round_even = _unary("round_even", _floats, _llvm_function("rint"))
"""Nearest integer as a float, ties to even."""
round_away = _unary("round_away", _floats, _llvm_function("round"))
"""Nearest integer as a float, ties away from zero (C's roundf)."""
negative = _unary("negative", _floats, lambda b, x: b.fneg(x))
"""The sign flipped, of zeros too."""
bits_of = _unary("bits_of", _ints, lambda b, x: b.bitcast(x, _INT_LANES))
"""The bits of floats as ints."""
floats_from_bits = _unary("floats_from_bits", _floats, lambda b, x: b.bitcast(x, _FLOAT_LANES))
"""The inverse of `bits_of`."""
to_float = _unary("to_float", _floats, lambda b, x: b.sitofp(x, _FLOAT_LANES))
"""Ints converted to floats."""
to_int = _unary("to_int", _ints, lambda b, x: b.fptosi(x, _INT_LANES))
"""Floats truncated to ints; they must be in range."""


@intrinsic  # type: ignore[untyped-decorator]
def splat(_typing: Any, scalar: Any) -> Any:
    """splat(1.0): the same float in every lane; splat(1): the same int in every lane."""
    wanted = _floats if isinstance(scalar, types.Float) else _ints

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _broadcast(context, builder, arguments[0], signature.args[0], wanted)

    return wanted(scalar), codegen


@intrinsic  # type: ignore[untyped-decorator]
def select(_typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """select(mask, a, b): a where the mask holds, else b; a or b may be a scalar."""
    wanted = a if isinstance(a, Vector) else b

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = _broadcast(context, builder, arguments[1], signature.args[1], wanted)
        y = _broadcast(context, builder, arguments[2], signature.args[2], wanted)
        return builder.select(arguments[0], x, y)

    return wanted(mask, a, b), codegen


@intrinsic  # type: ignore[untyped-decorator]
def fused(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """fused(a, b, c): a * b + c of floats, rounded once, on any CPU."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        operands = [
            _broadcast(context, builder, value, numba_type, _floats)
            for value, numba_type in zip(arguments, signature.args, strict=True)
        ]
        function_type = ir.FunctionType(_FLOAT_LANES, [_FLOAT_LANES] * 3)
        function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fma.v{LANES}f32")
        return builder.call(function, operands)

    return _floats(a, b, c), codegen


@intrinsic  # type: ignore[untyped-decorator]
def any_lane(_typing: Any, mask: Any) -> Any:
    """Whether the mask holds in at least one lane, as a scalar."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(LANES), 0))

    return types.boolean(mask), codegen


def _check_bounds(context: Any, builder: Any, first: Any, count: Any, size: Any) -> None:
    """Emit `raise IndexError` for items [first, first + count) that do not all lie in [0, size).

    Emits nothing unless NUMBA_BOUNDSCHECK is set: Numba's own checks do not see accesses through pointers.
    """
    if context.enable_boundscheck:
        last = builder.sub(builder.add(first, count), ir.Constant(first.type, 1))
        cgutils.do_boundscheck(context, builder, first, size)
        cgutils.do_boundscheck(context, builder, last, size)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, llvm_type: Any) -> Any:
    """A pointer to `array[index]`, to be read or written as `llvm_type`, a vector of the array's items."""
    struct = context.make_array(array_type)(context, builder, array)
    _check_bounds(context, builder, index, ir.Constant(index.type, llvm_type.count), struct.nitems)
    return builder.bitcast(builder.gep(struct.data, [index]), llvm_type.as_pointer())


def _as_index(context: Any, builder: Any, value: Any, numba_type: Any) -> Any:
    return context.cast(builder, value, numba_type, types.intp)


@intrinsic  # type: ignore[untyped-decorator]
def load(_typing: Any, tile: Any, item: Any) -> Any:
    """load(tile, i): item i of every lane."""
    result = _floats if tile.dtype == types.float32 else _ints

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        index = _as_index(context, builder, arguments[1], signature.args[1])
        index = builder.mul(index, ir.Constant(index.type, LANES))
        pointer = _address(context, builder, signature.args[0], arguments[0], index, result.llvm)
        return builder.load(pointer, align=4)

    return result(tile, item), codegen


@intrinsic  # type: ignore[untyped-decorator]
def store(_typing: Any, tile: Any, item: Any, value: Any) -> Any:
    """store(tile, i, value): set item i of every lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        index = _as_index(context, builder, arguments[1], signature.args[1])
        index = builder.mul(index, ir.Constant(index.type, LANES))
        pointer = _address(context, builder, signature.args[0], arguments[0], index, signature.args[2].llvm)
        builder.store(arguments[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(tile, item, value), codegen


def _row_type(dtype: Any) -> ir.VectorType:
    """16 consecutive values of a row of `dtype`."""
    scalars = {types.float32: _FLOAT, types.int32: _INT, types.uint16: ir.IntType(16)}
    return ir.VectorType(scalars[dtype], _SQUARE)


def _as_32_bits(builder: Any, row: Any, dtype: Any) -> Any:
    """16 values of a row in 32 bits each: those of 16 bits are extended with zeros."""
    return builder.zext(row, ir.VectorType(_INT, _SQUARE)) if dtype == types.uint16 else row


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 values, rows and columns exchanged: swap ever larger square blocks across the diagonal."""
    mask_type = ir.VectorType(_INT, _SQUARE)
    for size in (1, 2, 4, 8):
        low = [i if not i & size else i - size + _SQUARE for i in range(_SQUARE)]
        high = [i + size if not i & size else i + _SQUARE for i in range(_SQUARE)]
        swapped = list(rows)
        for i in range(_SQUARE):
            if not i & size:
                pair = rows[i], rows[i + size]
                swapped[i] = builder.shuffle_vector(*pair, ir.Constant(mask_type, low))
                swapped[i + size] = builder.shuffle_vector(*pair, ir.Constant(mask_type, high))
        rows = swapped
    return rows


def _lane_starts(context: Any, builder: Any, array_type: Any, array: Any, first_lane: int) -> list[Any]:
    """The values of an index array for 16 lanes."""
    struct = context.make_array(array_type)(context, builder, array)
    first, count = (context.get_constant(types.intp, value) for value in (first_lane, _SQUARE))
    _check_bounds(context, builder, first, count, struct.nitems)
    return [builder.load(builder.gep(struct.data, [ir.Constant(first.type, first_lane + i)])) for i in range(_SQUARE)]


@intrinsic  # type: ignore[untyped-decorator]
def gather(_typing: Any, rows: Any, starts: Any, column: Any, tile: Any, item: Any) -> Any:
    """gather(rows, starts, column, tile, i): items i..i+15 of lane k become rows[starts[k] + column], and the 15
    values after it. uint16 values become 32 bits with zeros above them.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows_type, starts_type, column_type, tile_type, item_type = signature.args
        column = _as_index(context, builder, arguments[2], column_type)
        item = _as_index(context, builder, arguments[4], item_type)
        first = builder.mul(item, ir.Constant(item.type, LANES))
        row_type = _row_type(rows_type.dtype)
        for lane in range(0, LANES, _SQUARE):
            vectors = []
            for start in _lane_starts(context, builder, starts_type, arguments[1], lane):
                pointer = _address(context, builder, rows_type, arguments[0], builder.add(start, column), row_type)
                vectors.append(_as_32_bits(builder, builder.load(pointer, align=1), rows_type.dtype))
            for i, vector in enumerate(_transposed(builder, vectors)):
                index = builder.add(first, ir.Constant(item.type, i * LANES + lane))
                pointer = _address(context, builder, tile_type, arguments[3], index, vector.type)
                builder.store(vector, pointer, align=4)
        return context.get_dummy_value()

    return types.void(rows, starts, column, tile, item), codegen


@intrinsic  # type: ignore[untyped-decorator]
def scatter(_typing: Any, tile: Any, item: Any, rows: Any, starts: Any, column: Any) -> Any:
    """scatter(tile, item, rows, starts, column): the inverse of `gather`, for rows of 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_type, item_type, rows_type, starts_type, column_type = signature.args
        column = _as_index(context, builder, arguments[4], column_type)
        item = _as_index(context, builder, arguments[1], item_type)
        first = builder.mul(item, ir.Constant(item.type, LANES))
        row_type = _row_type(rows_type.dtype)
        for lane in range(0, LANES, _SQUARE):
            vectors = []
            for i in range(_SQUARE):
                index = builder.add(first, ir.Constant(item.type, i * LANES + lane))
                pointer = _address(context, builder, tile_type, arguments[0], index, row_type)
                vectors.append(builder.load(pointer, align=4))
            starts_of_lanes = _lane_starts(context, builder, starts_type, arguments[3], lane)
            for start, vector in zip(starts_of_lanes, _transposed(builder, vectors), strict=True):
                pointer = _address(context, builder, rows_type, arguments[2], builder.add(start, column), row_type)
                builder.store(vector, pointer, align=1)
        return context.get_dummy_value()

    return types.void(tile, item, rows, starts, column), codegen


@intrinsic  # type: ignore[untyped-decorator]
def copy_bytes(_typing: Any, source: Any, source_start: Any, target: Any, target_start: Any, count: Any) -> Any:
    """copy_bytes(source, i, target, j, n): n bytes from byte i of one array to byte j of another."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        size = _as_index(context, builder, arguments[4], signature.args[4])

        def pointer(array: int, start: int) -> Any:
            struct = context.make_array(signature.args[array])(context, builder, arguments[array])
            index = _as_index(context, builder, arguments[start], signature.args[start])
            _check_bounds(context, builder, index, size, builder.mul(struct.nitems, struct.itemsize))
            return builder.gep(builder.bitcast(struct.data, byte), [index])

        cgutils.raw_memcpy(builder, pointer(2, 3), pointer(0, 1), size, 1)
        return context.get_dummy_value()

    return types.void(source, source_start, target, target_start, count), codegen
