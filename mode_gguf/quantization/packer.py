"""Weights to the bytes of a GGUF tensor and back: by our kernels, by libggml, or for float types right here.

Who packs what is in the table of types. With exact packing, quantized bytes are those x86-64 libggml would write.
Everything works matrix by matrix: what is in memory at any time is a few experts, or one dense matrix.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, SourceTensor, as_float32
from mode_gguf.errors import InputError
from mode_gguf.options import Packing
from mode_gguf.quantization import libggml
from mode_gguf.quantization.ordered_parallel import ordered_parallel
from mode_gguf.quantization.packing import EXACT, refinement_of
from mode_gguf.quantization.types import Packer, QuantType
from mode_gguf_kernels import FEEDBACK_TYPES, Feedback, NonFiniteError, PackingError, pack, round_again, unpack

_CHUNK_WEIGHTS = 1 << 18  # weights of a large matrix that are read and packed at a time, or widened to float32
_ROWS_PER_TASK = 32  # fewer rows than this are not worth another task
_SOURCE_DTYPES = (np.float32, np.float16, np.uint16)


def pack_matrix(
    matrix: Array, quant_type: QuantType, importance: np.ndarray | None, *, name: str, packing: Packing = EXACT
) -> np.ndarray:
    """Pack a matrix to `quant_type`.

    Args:
        matrix: (rows, n_in); float32, float16, or bfloat16 as its bits in uint16.
        quant_type: one of `QUANT_TYPES`.
        importance: float32 (n_in,), finite and not negative; Q8_0 and the float types ignore it, IQ2_XXS and IQ2_XS
            need it.
        name: what to call the matrix in errors.
        packing: how the types are packed that leave a choice.

    Returns:
        uint8 (rows, quant_type.row_bytes(n_in)).

    Raises:
        InputError: rows do not fit the type, a value is not finite or too large for it, or the dtype or the
            importance does not fit.
        MissingResourceError: libggml packs this type, and cannot be used.
    """
    packed = _empty_packed(matrix, quant_type, name)
    _pack_into(packed, matrix, quant_type, importance, packing, name)
    return packed


def unpack_matrix(packed: np.ndarray, quant_type: QuantType, n: int) -> np.ndarray:
    """The float32 (rows, n) weights of packed uint8 (rows, row_bytes), as libggml reads them.

    Raises:
        InputError: the rows do not hold n weights of this type.
        MissingResourceError: libggml unpacks this type, and cannot be used.
    """
    if packed.ndim != 2 or not quant_type.fits(n) or packed.shape[1] != quant_type.row_bytes(n):
        raise InputError(f"packed array of shape {packed.shape}: rows of {n} weights in {quant_type.name} expected")
    contiguous = np.ascontiguousarray(packed)
    match quant_type.packer:
        case Packer.NUMPY:
            return as_float32(contiguous.view(_FLOAT_DTYPES[quant_type.name])).copy()
        case Packer.KERNELS:
            return unpack(contiguous, quant_type.name, n)
        case Packer.LIBGGML:
            return libggml.dequantize(contiguous, quant_type, n)


def packed_chunks(
    tensor: SourceTensor,
    quant_type: QuantType,
    importance: np.ndarray | None,
    threads: int,
    packing: Packing = EXACT,
) -> Iterator[np.ndarray]:
    """Read and pack a tensor chunk by chunk, in order: `n_chunks` of them, whole experts or some rows of a matrix.

    Chunks are spread over threads, with at most `threads + 1` in memory (the one last yielded included). The bytes do
    not depend on the number of threads.

    Args:
        tensor: read chunk by chunk, from several threads.
        quant_type: one of `QUANT_TYPES`.
        importance: float32 (E, n_in), or None.
        threads: at least 1.
        packing: as in `pack_matrix`.

    Yields:
        uint8 (rows, row_bytes) per chunk; a vector counts as a matrix of one row.

    Raises:
        InputError: like `pack_matrix`; the message names tensor and expert.
    """
    if importance is not None and importance.shape != (tensor.n_experts, tensor.row_width):
        raise InputError(
            f"{tensor.name}: importance of shape {(tensor.n_experts, tensor.row_width)} (experts, columns) expected, "
            f"{importance.shape} found; use an importance matrix of this model"
        )
    rows_per_chunk = _rows_per_chunk(tensor)

    def pack_chunk(number: int) -> np.ndarray:
        expert = number if tensor.role is Role.EXPERT else 0
        rows = ALL_ROWS if rows_per_chunk is None else slice(number * rows_per_chunk, (number + 1) * rows_per_chunk)
        weights = None if importance is None else importance[expert]
        matrix, name = read_matrix(tensor, expert, rows), matrix_name(tensor, expert)
        packed = _empty_packed(matrix, quant_type, name)
        _pack_into(packed, matrix, quant_type, weights, packing, name, rows.start or 0)
        return packed

    yield from ordered_parallel(pack_chunk, n_chunks(tensor), threads)


def n_chunks(tensor: SourceTensor) -> int:
    """Number of arrays that `packed_chunks` yields."""
    rows_per_chunk = _rows_per_chunk(tensor)
    return tensor.n_experts if rows_per_chunk is None else -(-tensor.shape[0] // rows_per_chunk)


def _rows_per_chunk(tensor: SourceTensor) -> int | None:
    """Rows of a large matrix that make a chunk; None for tensors whose chunks are whole matrices."""
    if tensor.role not in (Role.DENSE, Role.EMBEDDING, Role.OUTPUT) or len(tensor.shape) != 2:
        return None
    return max(1, _CHUNK_WEIGHTS // tensor.row_width)


def matrix_name(tensor: SourceTensor, index: int) -> str:
    """The name of one of a tensor's matrices in errors."""
    return f"{tensor.name}, expert {index}" if tensor.role is Role.EXPERT else tensor.name


def read_matrix(tensor: SourceTensor, index: int, rows: slice = ALL_ROWS) -> Array:
    """A tensor's matrix or a part of it, with whatever dimensions it has before the last made one.

    Raises:
        InputError: it has another shape than the tensor says.
    """
    array = tensor.read(index) if rows == ALL_ROWS else tensor.read(index, rows)
    expected = tensor.shape[1:] if tensor.role is Role.EXPERT else tensor.shape
    expected = (len(range(*rows.indices(expected[0]))), *expected[1:])
    if array.shape != expected:
        raise InputError(
            f"{matrix_name(tensor, index)}: shape {expected} expected, {array.shape} found in the checkpoint"
        )
    return array.reshape(-1, tensor.row_width)


def pack_by_rows(
    matrix: Array,
    quant_type: QuantType,
    importance: np.ndarray | None,
    *,
    name: str,
    packing: Packing = EXACT,
    threads: int = 1,
    feedback: Feedback | None = None,
) -> np.ndarray:
    """`pack_matrix` with the rows spread over threads.

    Args:
        feedback: measure of the rows' errors; levels are chosen again with it (`mode_gguf_kernels.round_again`).
            Only for types that `has_feedback`.
    """
    packed = _empty_packed(matrix, quant_type, name)
    rows = matrix.shape[0]

    step = max(_ROWS_PER_TASK, -(-rows // (4 * threads)))

    def pack_some(number: int) -> None:
        some = slice(number * step, (number + 1) * step)
        _pack_into(packed[some], matrix[some], quant_type, importance, packing, name, some.start)
        if feedback is not None:
            round_again(packed[some], quant_type.name, as_float32(matrix[some]), feedback)

    deque(ordered_parallel(pack_some, -(-rows // step), threads), maxlen=0)
    return packed


def has_feedback(quant_type: QuantType) -> bool:
    """Whether a type can be rounded with error feedback."""
    return quant_type.name in FEEDBACK_TYPES


def _empty_packed(matrix: Array, quant_type: QuantType, name: str) -> np.ndarray:
    """An uninitialised array for the packed matrix, once it is known to fit."""
    if matrix.dtype not in _SOURCE_DTYPES:
        raise InputError(f"{name}: dtype {matrix.dtype} found, float32, float16 or bfloat16 (as uint16) expected")
    rows, width = matrix.shape
    if not quant_type.fits(width):
        raise InputError(
            f"{name}: rows of {width} weights do not fit {quant_type.name}, which needs a multiple of "
            f"{quant_type.block_size}; choose another type for this tensor"
        )
    return np.empty((rows, quant_type.row_bytes(width)), np.uint8)


def _pack_into(
    packed: np.ndarray,
    matrix: Array,
    quant_type: QuantType,
    importance: np.ndarray | None,
    packing: Packing,
    name: str,
    first_row: int = 0,
) -> None:
    """Fill `packed` with the packed rows of `matrix`, the first of which errors call `first_row`."""
    if quant_type.packer is Packer.KERNELS:
        try:
            pack(matrix, quant_type.name, importance, refinement=refinement_of(packing), out=packed)
        except NonFiniteError as error:
            raise _value_error(error.value, name, first_row + error.row, error.column, quant_type.name) from error
        except PackingError as error:
            raise InputError(f"{name}: {error}") from error
        _check_large(packed, matrix, quant_type, name, first_row)
        return
    step = max(1, _CHUNK_WEIGHTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        part, target = matrix[start : start + step], packed[start : start + step]
        if quant_type.packer is Packer.NUMPY:
            stored = _convert(target, part, quant_type.name)
        else:
            stored = _pack_by_libggml(target, as_float32(part), quant_type, importance, packing, name)
        if not stored.all():
            row, column = np.unravel_index(np.argmin(stored), stored.shape)
            value = float(as_float32(part[row : row + 1, column])[0])
            raise _value_error(value, name, first_row + start + int(row), int(column), quant_type.name)


def _check_large(packed: np.ndarray, matrix: Array, quant_type: QuantType, name: str, first_row: int) -> None:
    """Make sure that weights beyond float16 are stored: scales and minima are float16, and overflow or are clipped.

    Of each block the largest weight is looked at, since scales are made for it. Ordinary matrices have no such rows.
    """
    for row in _rows_beyond_float16(matrix):
        values = as_float32(matrix[row : row + 1])
        found = unpack(np.ascontiguousarray(packed[row : row + 1]), quant_type.name, values.shape[1])
        blocks, stored = values.reshape(-1, quant_type.block_size), found.reshape(-1, quant_type.block_size)
        largest = np.abs(blocks).argmax(axis=1)[:, None]
        wanted, got = np.take_along_axis(blocks, largest, axis=1), np.take_along_axis(stored, largest, axis=1)
        lost = ~np.isfinite(stored).all(axis=1) | (np.abs(got - wanted) > np.abs(wanted) / 4)[:, 0]
        lost &= np.abs(wanted[:, 0]) > _LARGEST_HALF
        if lost.any():
            block = int(np.argmax(lost))
            column = block * quant_type.block_size + int(largest[block, 0])
            raise _value_error(float(values[0, column]), name, first_row + int(row), column, quant_type.name)


def _rows_beyond_float16(matrix: Array) -> np.ndarray:
    """Rows with a weight that float16 does not reach."""
    if matrix.dtype == np.float16:
        return np.empty(0, np.intp)
    bits = matrix.view(np.uint32 if matrix.dtype == np.float32 else np.uint16)
    sign = np.array(1 << (8 * bits.itemsize - 1), bits.dtype)
    limit = np.array([_LARGEST_HALF], np.float32).view(np.uint32) >> (32 - 8 * bits.itemsize)
    return np.flatnonzero(((bits & ~sign) > limit.astype(bits.dtype)).any(axis=1))


_LARGEST_HALF = 65504.0
_FLOAT_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_EXPONENTS: dict[str, np.uint16 | np.uint32] = {
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}
"""Bits that are all set in infinities and NaN, and in nothing else."""


def _convert(packed: np.ndarray, matrix: Array, type_name: str) -> np.ndarray:
    """Fill `packed` with weights in a float type; says which of them could be stored."""
    target = packed.view(_FLOAT_DTYPES[type_name])
    if target.dtype == matrix.dtype:
        target[...] = matrix
        exponent = _EXPONENTS[type_name]
        return np.asarray(target.view(exponent.dtype) & exponent != exponent)
    values = as_float32(matrix)
    if type_name == "BF16":
        target[...] = _bfloat16_bits(values)
    else:
        with np.errstate(over="ignore"):
            target[...] = values
    return np.asarray(np.isfinite(values) & np.isfinite(as_float32(target)))


def _pack_by_libggml(
    packed: np.ndarray,
    values: np.ndarray,
    quant_type: QuantType,
    importance: np.ndarray | None,
    packing: Packing,
    name: str,
) -> np.ndarray:
    """Fill `packed` with float32 values in one of libggml's types; says which of them could be stored."""
    magnitude = np.abs(values)
    stored = np.asarray(magnitude <= libggml.LARGEST_WEIGHT)
    if not stored.all():
        return stored
    largest = float(magnitude.max(initial=0))
    libggml.check_importance(importance, values.shape[1], quant_type, largest_weight=largest, name=name)
    libggml.quantize(np.ascontiguousarray(values), quant_type, importance, packed)
    overflowing = libggml.scale_overflows(packed, quant_type)
    if overflowing.any():  # the largest of such a block is to blame
        by_block = magnitude.reshape(*overflowing.shape, quant_type.block_size)
        blamed = overflowing[..., None] & (by_block == by_block.max(axis=-1, keepdims=True))
        stored = ~blamed.reshape(values.shape)
    elif packing.is_unbiased:
        libggml.restore_scale(packed, values, quant_type, importance)
    return stored


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16 in uint16, nearest, ties to even (ggml's `ggml_compute_fp32_to_bf16`)."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _value_error(value: float, name: str, row: int, column: int, type_name: str) -> InputError:
    way_out = (
        "choose F32 for this tensor, or candidates that hold it (sensitivity.types, sensitivity.dense_types)"
        if np.isfinite(value)
        else "the checkpoint may be damaged"
    )
    return InputError(f"{name}: {value} in row {row}, column {column} cannot be stored as {type_name}; {way_out}")
