"""Weights of a stored tensor: decoded, and known to be finite."""

from functools import lru_cache
from typing import Final

import numpy as np

from mode_gguf.checkpoint import compressed_tensors, fp8
from mode_gguf.checkpoint.finite import check_finite
from mode_gguf.checkpoint.stored_tensor import Index, StoredTensor, stored_values
from mode_gguf.errors import InputError

Parts = tuple[int | slice | np.ndarray, ...]

_COMPARED_ROWS: Final = 1024
"""Rows that two tensors are compared in at a time."""


def read_weights(name: str, stored: StoredTensor, index: Index | None = None) -> np.ndarray:
    """A copy of `tensor[index]` (all of it for None); only those bytes are read.

    Returns:
        As `Checkpoint.read`.

    Raises:
        InputError: one of the weights is NaN or infinite, or the file has become shorter since it was opened.
    """
    parts: Parts = () if index is None else index if isinstance(index, tuple) else (index,)
    try:
        read = stored_values(stored, index)
        if stored.scale is not None:
            scales = stored_values(stored.scale, index if stored.is_packed else None)
            read = _decoded(stored, read, scales, parts)
        elif read.dtype == np.float64:
            with np.errstate(over="ignore"):
                read = read.astype(np.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{stored.file}: tensor {name} cannot be read ({error})") from error
    return check_finite(read, stored.file, name, stored.shape, parts)


def equal_weights(first: tuple[str, StoredTensor], second: tuple[str, StoredTensor]) -> bool:
    """Whether two tensors, with their names, have the same shape and weights; raises like `read_weights`."""
    if first[1].shape != second[1].shape:
        return False
    states = [stored.file.stat() for _, stored in (first, second)]
    return _equal(first, second, tuple((state.st_size, state.st_mtime_ns) for state in states))


@lru_cache(maxsize=16)
def _equal(
    first: tuple[str, StoredTensor], second: tuple[str, StoredTensor], states: tuple[tuple[int, int], ...]
) -> bool:
    """As `equal_weights`, remembered for files in this state: whoever opens a checkpoint asks again and again."""
    rows = first[1].shape[0] if first[1].shape else 1
    for start in range(0, rows, _COMPARED_ROWS):
        part = slice(start, start + _COMPARED_ROWS) if first[1].shape else None
        one, other = (_float32(read_weights(*tensor, part)) for tensor in (first, second))
        if not np.array_equal(one, other):
            return False
    return True


def _decoded(stored: StoredTensor, read: np.ndarray, scales: np.ndarray, parts: Parts) -> np.ndarray:
    """Weights in float32 from what is stored of `tensor[parts]`.

    Args:
        scales: of the same rows of packed weights, of all of a tensor in FP8.
    """
    assert stored.scale is not None
    of_scales = parts if stored.is_packed else ()
    in_float32 = check_finite(_float32(scales), stored.scale.file, stored.scale_name, stored.scale.shape, of_scales)
    if stored.is_packed:
        return compressed_tensors.unpacked(read, in_float32)
    return fp8.decoded(read, in_float32, stored.blocks, stored.shape, parts)


def _float32(values: np.ndarray) -> np.ndarray:
    """float32, C-contiguous; uint16 is taken for the bits of bfloat16."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
