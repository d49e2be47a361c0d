"""Tensors in safetensors files: where they lie, and their bytes as they are stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mode_gguf.checkpoint import compressed_tensors, fp8

Index = int | slice | np.ndarray | tuple[int | slice, ...]

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
    fp8.DTYPE: np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""What a tensor's bytes are mapped as, by safetensors' name of its type."""

WEIGHT_DTYPES: Final = ("F32", "F16", "BF16", "F64", fp8.DTYPE)
"""Types of weights; those of `DTYPES` that are left are of parts of packed weights, and of buffers."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in a safetensors file.

    Attributes:
        shape: of the weights, unpacked.
        dtype: safetensors' name of what is stored.
        offset: counts from the file's start.
        scale: of weights in FP8 or packed in four bits (`packed_weights`), the tensor of their scales.
        blocks: of weights in FP8, the size of a scale's block in every dimension.
        scale_name: of `scale`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    scale: "StoredTensor | None" = None
    blocks: tuple[int, ...] = ()
    scale_name: str = ""

    @property
    def is_packed(self) -> bool:
        return self.scale is not None and not self.blocks

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.shape[-1] // compressed_tensors.PER_INT32) if self.is_packed else self.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * int(DTYPES[self.dtype].itemsize)


def stored_values(stored: StoredTensor, index: Index | None = None) -> np.ndarray:
    """A copy of what is stored of `tensor[index]`, in its type of `DTYPES`; only those bytes are read.

    Raises:
        OSError, ValueError: the file has become shorter, or cannot be read.
    """
    mapped = np.memmap(stored.file, DTYPES[stored.dtype], "r", stored.offset, stored.stored_shape)
    return np.array(mapped if index is None else mapped[index], order="C", subok=False)
