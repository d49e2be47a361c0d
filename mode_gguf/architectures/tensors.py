"""GGUF tensors that are still in a checkpoint: their roles, sources and readers."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
"""Weights as read from a checkpoint: float32, float16, or bfloat16 as its raw bits in uint16."""


ALL_ROWS = slice(None)
_STRIP = 64


class Reader(Protocol):
    """Reads a tensor from the checkpoint, no more of it than is asked for."""

    def __call__(self, index: int, rows: slice = ALL_ROWS, /) -> Array:
        """Rows (n, n_in) of matrix `index` of an expert tensor; of any other, whose index is 0, a slice of its first
        dimension."""
        ...


class Role(StrEnum):
    """Roles of tensors: whether one is measured, planned and quantized, or stays as it is."""

    EXPERT = "expert"
    """Routed experts of one layer and projection, (E, rows, n_in): the tensors the method is about."""
    DENSE = "dense"
    """Any other matrix of the text model that a linear layer applies, (rows, n_in)."""
    EMBEDDING = "embedding"
    """The token embedding, (vocabulary, n)."""
    OUTPUT = "output"
    """The output head, (vocabulary, n_in)."""
    ABSORBED = "absorbed"
    """Parts of a matrix of latent attention that llama.cpp applies head by head, (heads, rows, n_in), to something that
    the checkpoint's own model never computes: neither measured nor planned (`architectures.mla`)."""
    KEEP = "keep"
    """Routers, norms, biases: always stored as F32."""
    INDEX = "index"
    """A table of where a layer's experts are stored: integers, and no weights (`quantization.expert_groups`)."""


_MEASURED = frozenset({Role.EXPERT, Role.DENSE, Role.EMBEDDING, Role.OUTPUT})


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a GGUF matrix, seen from the torch module's: its row i is the module's row `rows[i]`.

    None for rows or columns that are where the module has them.
    """

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the GGUF file, still in the checkpoint.

    Attributes:
        name: GGUF name, such as `blk.0.ffn_gate_exps.weight`.
        shape: in NumPy order; (E, rows, n_in) for experts. The last dimension is the one that is quantized along.
        role: what may happen to it.
        sources: checkpoint names it is made from; a dense tensor's first source less `.weight` is its torch module.
        activation: name under which calibration keeps the statistics of its input; None when it has none.
        layer: decoder layer, None outside the layers.
        projection: of experts `gate`, `up` and `down`, or `gate_up` (gate's rows first) and `down`; None otherwise.
        read: read(e) gives expert e's (rows, n_in) matrix, read(0) the whole of any other tensor, and with a slice a
            part of them; lazy.
        order: of a dense tensor, where it is not the torch module's; `read` is in this order.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[str, ...]
    read: Reader
    activation: str | None = None
    layer: int | None = None
    projection: str | None = None
    order: Order | None = field(default=None, compare=False)

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.shape))

    @property
    def row_width(self) -> int:
        return self.shape[-1]

    @property
    def is_measured(self) -> bool:
        """Whether candidate types are compared: not for what stays F32, nor without statistics of what is read."""
        unseen = self.role in (Role.DENSE, Role.OUTPUT) and self.activation is None
        return self.role in _MEASURED and not unseen

    @property
    def n_experts(self) -> int:
        """Matrices that are packed one by one: E for experts, 1 otherwise."""
        return self.shape[0] if self.role is Role.EXPERT else 1


def as_float32(array: Array) -> np.ndarray:
    """`array` in float32; uint16 is taken for the bits of bfloat16."""
    if array.dtype == np.uint16:
        bits = array.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return array.astype(np.float32, copy=False)


def transposed_copy(matrix: Array) -> Array:
    """A C-contiguous copy of `matrix.T`.

    Strip by strip, which keeps to few cache lines at a time: up to eight times as fast as `np.ascontiguousarray` where
    columns are a power of two long.
    """
    rows, columns = matrix.shape
    copy = np.empty((columns, rows), matrix.dtype)
    for start in range(0, rows, _STRIP):
        copy[:, start : start + _STRIP] = matrix[start : start + _STRIP].T
    return copy
