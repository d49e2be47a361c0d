"""Comparison of a base projector's weights with the checkpoint's encoder and merger.

Names of encoders differ too much to go by, so values are looked for wherever they may be: a sampled row of a matrix
among the rows and columns of all matrices, a vector or convolution as a whole, in any order, or a part of one, as
converters split what encoders merge. Positions are resized by some converters, and not compared.
"""

from collections.abc import Iterator, Set
from math import prod
from typing import Final

import numpy as np

from mode_gguf.architectures.base_gguf.files import BaseGguf
from mode_gguf.architectures.base_gguf.match import sampled_rows
from mode_gguf.architectures.base_gguf.names import is_text, layer_of
from mode_gguf.architectures.base_gguf.other_model import other_model
from mode_gguf.architectures.base_gguf.rounding import rounded
from mode_gguf.architectures.tensors import SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint

_MERGED: Final = 3
"""Q, K and V of an encoder may be one matrix and one vector there or here."""
_FEW_SLICES: Final = 4
"""Length of an axis that a converter may cut a convolution along."""
_LEFT_OUT: Final = ("position", "pos_emb", "token_embd")
_LEAST: Final = 16
"""Values that a vector must have to be compared."""


def check_projector(checkpoint: Checkpoint, base: BaseGguf, text: Set[str]) -> None:
    """Refuse a projector whose weights are not the checkpoint's.

    Args:
        text: names of checkpoint tensors that are the text model's.

    Raises:
        InputError: a tensor of the projector is another; the message names it.
    """
    if base.projector is None:
        return
    encoder = [
        source
        for source in checkpoint.tensors
        if not is_text(source) or (source not in text and layer_of(source) is None)
    ]
    different = _unknown_matrices(checkpoint, base, encoder) or _unknown_values(checkpoint, base, encoder)
    if different:
        what = f"weights of {different[0]} are none of the encoder's here"
        other_model(checkpoint, base, what, projector=True)


def _unknown_matrices(checkpoint: Checkpoint, base: BaseGguf, encoder: list[str]) -> list[str]:
    """Names of matrices of which a sampled row is no row or column of the checkpoint's."""
    wanted: dict[tuple[str, int], dict[bytes, str]] = {}
    for tensor in base.projector_tensors:
        if len(tensor.shape) == 2 and not _is_left_out(tensor):
            rows = wanted.setdefault((_type_of(base, tensor), tensor.row_width), {})
            for row in sampled_rows(tensor.shape[0]):
                rows[as_float32(tensor.read(0, slice(row, row + 1)))[0].tobytes()] = tensor.name
    for source in encoder:
        shape = checkpoint.shape(source)
        for (kind, width), rows in wanted.items():
            if rows and len(shape) > 1 and width in (shape[-1], shape[0], prod(shape[1:])):
                for values in _rows_and_columns(rounded(checkpoint.read(source), kind), width):
                    rows.pop(values.tobytes(), None)
    return sorted({name for rows in wanted.values() for name in rows.values()})


def _rows_and_columns(array: np.ndarray, width: int) -> Iterator[np.ndarray]:
    flat = array.reshape(len(array), -1)
    for matrix in (array.reshape(-1, array.shape[-1]), flat, flat.T):
        if matrix.shape[1] == width:
            yield from matrix


def _unknown_values(checkpoint: Checkpoint, base: BaseGguf, encoder: list[str]) -> list[str]:
    """Names of vectors and convolutions whose values are no tensor's of the checkpoint, nor a part of one."""
    compared = [
        tensor
        for tensor in base.projector_tensors
        if len(tensor.shape) != 2 and prod(tensor.shape) >= _LEAST and not _is_left_out(tensor)
    ]
    sizes = {prod(tensor.shape) for tensor in compared}
    types = {_type_of(base, tensor) for tensor in compared}
    known: set[bytes] = set()
    for source in encoder:
        shape = checkpoint.shape(source)
        if len(shape) == 1 or prod(shape) in sizes or len(shape) > 2:
            stored = checkpoint.read(source)
            known |= {_sorted(part) for kind in types for part in _parts(rounded(stored, kind))}
            if len(shape) == 1:
                known.add(_sorted(as_float32(stored) + 1))
    return sorted(
        tensor.name
        for tensor in compared
        if not any(
            all(_sorted(part) in known for part in parts) for parts in _as_whole_or_merged(as_float32(tensor.read(0)))
        )
    )


def _as_whole_or_merged(values: np.ndarray) -> Iterator[list[np.ndarray]]:
    yield [values]
    if values.ndim == 1 and len(values) % _MERGED == 0:
        yield np.split(values, _MERGED)


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """A tensor, and what converters cut from one like it."""
    yield values
    if values.ndim == 1 and len(values) % _MERGED == 0:
        yield from np.split(values, _MERGED)
    for axis in range(values.ndim if values.ndim > 2 else 0):
        if values.shape[axis] <= _FEW_SLICES:
            yield from np.moveaxis(values, axis, 0)


def _sorted(values: np.ndarray) -> bytes:
    return np.sort(values, axis=None).tobytes()


def _is_left_out(tensor: SourceTensor) -> bool:
    """Positions, and rows of the token embedding, which is the text model's."""
    return any(part in tensor.name for part in _LEFT_OUT)


def _type_of(base: BaseGguf, tensor: SourceTensor) -> str:
    assert base.projector is not None
    return base.projector.tensors[tensor.name].type
