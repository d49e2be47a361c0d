"""The types that can be packed, and the two functions that do it for whole matrices."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from mode_gguf_kernels import iq4_nl, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from mode_gguf_kernels.matrix import Kernels
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.tiles import BFLOAT16, FLOAT16, FLOAT32

_SOURCE_DTYPES = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.float16): FLOAT16,
    np.dtype(np.uint16): BFLOAT16,
}


class PackingError(ValueError):
    """A matrix, importance or packed array that cannot be used."""


class NonFiniteError(PackingError):
    """A weight that is infinite or not a number; `row`, `column` and `value` say which."""

    def __init__(self, row: int, column: int, value: float) -> None:
        super().__init__(f"row {row}, column {column}: {value} found, a finite value expected")
        self.row = row
        self.column = column
        self.value = value


Effort: TypeAlias = Literal["fast", "default", "max"]
"""Search effort of a refinement."""


@dataclass(frozen=True, slots=True)
class Refinement:
    """Packing with less error than ggml's; see `refine`.

    Attributes:
        effort: how long to search.
        size_power: a weight's squared error counts importance * (variance + x^2) ^ size_power, with x the weight and
            variance its super-block's mean square. 0 minimises the importance-weighted error, 0.5 is what ggml does
            in most types, 1 favours large weights more. A multiple of one half, at least 0.
        unbiased: whether each super-block is scaled so that outputs keep their size; see `refine`.
    """

    effort: Effort = "default"
    size_power: float = 0.0
    unbiased: bool = True


TYPES: dict[str, Kernels] = {
    module.KERNELS.name: module.KERNELS
    for module in (q2_k, q3_k, q4_k, q5_k, q6_k, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl)
}


def pack(
    matrix: np.ndarray,
    type_name: str,
    importance: np.ndarray | None = None,
    *,
    refinement: Refinement | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Pack a matrix to the bytes that x86-64 libggml's `ggml_quantize_chunk` gives, or to better ones.

    Runs in the calling thread and without the GIL; to use more cores, pack slices of rows from several threads.

    Args:
        matrix: (rows, n), float32, float16, or bfloat16 as its bits in uint16; all values finite. It is widened a few
            blocks at a time. One that is not contiguous is copied first.
        type_name: a key of `TYPES`.
        importance: float32 (n,), finite and not negative: the weight of each column's squared error.
        refinement: None for libggml's bytes. Q8_0 leaves nothing to refine.
        out: uint8 (rows, row_bytes), contiguous, to write to; made if None.

    Returns:
        uint8 (rows, n / block_size * block_bytes); `out` if that was given.

    Raises:
        NonFiniteError: a value of the matrix is not finite; `out` is then partly written.
        PackingError: an argument does not fit this description.
    """
    kernels = _kernels(type_name)
    source_dtype = _SOURCE_DTYPES.get(matrix.dtype)
    if source_dtype is None:
        raise PackingError(f"a matrix of {matrix.dtype} cannot be packed: float32, float16 or uint16 expected")
    if matrix.ndim != 2:
        raise PackingError(f"shape {matrix.shape} cannot be packed: a matrix (rows, n) expected")
    rows, n = matrix.shape
    blocks_per_row = _whole_blocks(n, kernels)
    if importance is None:
        importance = np.empty(0, np.float32)
    else:
        _check_importance(importance, n)
    shape = (rows, blocks_per_row * kernels.block_bytes)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise PackingError(f"out is {out.dtype} {out.shape}: contiguous uint8 {shape} expected")
    if out.size == 0:
        return out

    source = _read_only(np.ascontiguousarray(matrix).reshape(-1).view(np.uint8))
    weights = _read_only(np.ascontiguousarray(importance))
    if refinement is None or kernels.pack_refined is None:
        n_packed = kernels.pack(source, source_dtype, weights, blocks_per_row, (), out.reshape(-1))
    else:
        search = _search(kernels, refinement)
        n_packed = kernels.pack_refined(source, source_dtype, weights, blocks_per_row, search, out.reshape(-1))
    if n_packed < rows * blocks_per_row:
        raise _non_finite_error(matrix, n_packed // blocks_per_row)
    return out


def unpack(packed: np.ndarray, type_name: str, n: int) -> np.ndarray:
    """The weights that packed bytes stand for, bit for bit those of libggml's `dequantize_row_*`.

    Args:
        packed: uint8 (rows, row_bytes).
        type_name: a key of `TYPES`.
        n: weights in a row.

    Returns:
        float32 (rows, n).

    Raises:
        PackingError: the bytes of a row are not those of n weights.
    """
    kernels = _kernels(type_name)
    row_bytes = _whole_blocks(n, kernels) * kernels.block_bytes
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != row_bytes:
        raise PackingError(
            f"{packed.dtype} {packed.shape} cannot be unpacked as {type_name}: uint8 (rows, {row_bytes}) expected"
        )
    weights = np.empty((packed.shape[0], n), np.float32)
    if weights.size:
        kernels.unpack(_read_only(np.ascontiguousarray(packed).reshape(-1)), weights.reshape(-1))
    return weights


def _kernels(type_name: str) -> Kernels:
    try:
        return TYPES[type_name]
    except KeyError:
        raise PackingError(f"no kernels for type {type_name!r}: choose from {', '.join(TYPES)}") from None


def _search(kernels: Kernels, refinement: Refinement) -> Search:
    half_powers = 2 * refinement.size_power
    if half_powers < 0 or half_powers != int(half_powers):
        raise PackingError(f"size power {refinement.size_power}: a multiple of 0.5, at least 0, expected")
    if refinement.effort not in kernels.searches:
        raise PackingError(f"effort {refinement.effort!r}: one of {', '.join(kernels.searches)} expected")
    return kernels.searches[refinement.effort]._replace(half_powers=int(half_powers), unbiased=refinement.unbiased)


def _whole_blocks(n: int, kernels: Kernels) -> int:
    blocks, rest = divmod(n, kernels.block_size)
    if rest:
        raise PackingError(
            f"rows of {n} weights do not fit {kernels.name}: a multiple of {kernels.block_size} expected"
        )
    return blocks


def _check_importance(importance: np.ndarray, n: int) -> None:
    if importance.dtype != np.float32 or importance.shape != (n,):
        raise PackingError(f"importance is {importance.dtype} {importance.shape}: float32 ({n},) expected")
    usable = np.isfinite(importance) & (importance >= 0)
    if not usable.all():
        column = int(np.argmin(usable))
        raise PackingError(
            f"importance of column {column}: {importance[column]} found, a finite value of at least 0 expected"
        )


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to, so that every caller's array has the type the kernel is compiled for."""
    view = array[:]
    view.flags.writeable = False
    return view


def _non_finite_error(matrix: np.ndarray, first_row: int) -> NonFiniteError:
    """The error for the first value from `first_row` on that is not finite."""
    for row in range(first_row, matrix.shape[0]):
        values = matrix[row]
        if values.dtype == np.uint16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            column = int(np.argmin(finite))
            return NonFiniteError(row, column, float(values[column]))
    raise AssertionError("the kernel stopped at a matrix of finite values")
