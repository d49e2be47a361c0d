"""The projector file: vision tower and merger, for llama.cpp's --mmproj."""

import math
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, Keys, quants

from mode_gguf.architectures import find_family, projector_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, UsageError
from mode_gguf.export.gguf_writer import FileOutline, OutgoingTensor, add_metadata, finite, write_gguf
from mode_gguf.export.metadata import add_base_keys, add_general_keys, file_type
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.types import QUANT_TYPES, QuantType

PROJECTOR_TYPES = ("F16", "BF16", "F32", "Q8_0")
ARCHITECTURE = "clip"
_LIMITS = {"F16": 65520.0, "Q8_0": 127 * 65520.0}
"""Magnitudes that round to infinity in a type, or whose scale does."""


def write_projector(
    path: Path, checkpoint: Checkpoint, quant_type: str = "F16", *, progress: Progress = silent
) -> None:
    """Write the projector of `checkpoint` to `path`, atomically.

    Args:
        quant_type: of the matrices, one of `PROJECTOR_TYPES`. F16 runs everywhere and holds nearly all of BF16; norms,
            biases and positions stay F32, and rows that Q8_0 does not fit become F16, as in llama.cpp's converter.

    Raises:
        UsageError: another type.
        InputError: the checkpoint cannot be converted, or a weight is not finite or overflows F16.
        MissingResourceError: not enough disk space.
    """
    outline, tensors = projector_outline(checkpoint, quant_type), projector_tensors(checkpoint)
    outgoing = [
        OutgoingTensor(name, shape, stored, partial(_packed, checkpoint, tensor, stored))
        for tensor, (name, shape, stored) in zip(tensors, outline.tensors, strict=True)
    ]
    write_gguf(
        path, outline.architecture, outline.add_keys, outgoing, description="writing projector", progress=progress
    )


def projector_outline(checkpoint: Checkpoint, quant_type: str = "F16") -> FileOutline:
    """The projector's file without its weights.

    Raises:
        UsageError: another type than `PROJECTOR_TYPES` has.
        InputError: the checkpoint cannot be converted.
    """
    if quant_type.upper() not in PROJECTOR_TYPES:
        raise UsageError(f"unknown projector type {quant_type!r}: choose from {', '.join(PROJECTOR_TYPES)}")
    file_quant_type = QUANT_TYPES[quant_type.upper()]
    family = find_family(checkpoint)
    tensors = projector_tensors(checkpoint)

    def add_keys(writer: GGUFWriter) -> None:
        if checkpoint.base is not None and checkpoint.base.projector is not None:
            writer.add_file_type(file_type(file_quant_type))
            add_base_keys(writer, checkpoint, checkpoint.base.projector)
            return
        add_general_keys(writer, checkpoint, tensors, kind="mmproj")
        writer.add_file_type(file_type(file_quant_type))
        add_metadata(writer, {Keys.Clip.HAS_VISION_ENCODER: True, Keys.Clip.PROJECTOR_TYPE: family.projector_type})
        add_metadata(writer, family.projector_metadata(checkpoint))

    stored = [(tensor.name, tensor.shape, _stored_type(tensor, file_quant_type)) for tensor in tensors]
    return FileOutline(ARCHITECTURE, add_keys, stored)


def check_projector_weights(checkpoint: Checkpoint, quant_type: str = "F16") -> None:
    """Pack all of the projector without writing it: before hours of measuring, and it takes seconds.

    Raises:
        InputError: a weight is not finite or overflows its type.
    """
    for tensor in projector_tensors(checkpoint):
        deque(_packed(checkpoint, tensor, _stored_type(tensor, QUANT_TYPES[quant_type.upper()])), maxlen=0)


def projector_bytes(checkpoint: Checkpoint, quant_type: str = "F16") -> int:
    """Bytes of the projector's tensors; the arguments are those of `write_projector`."""
    tensors = projector_tensors(checkpoint)
    stored = (_stored_type(tensor, QUANT_TYPES[quant_type.upper()]) for tensor in tensors)
    return sum(
        math.prod(tensor.shape[:-1]) * kind.row_bytes(tensor.row_width)
        for tensor, kind in zip(tensors, stored, strict=True)
    )


def _stored_type(tensor: SourceTensor, file_quant_type: QuantType) -> QuantType:
    if tensor.role is Role.KEEP:
        return QUANT_TYPES["F32"]
    if len(tensor.shape) > 2:  # a convolution: ggml takes F16 or F32 kernels only
        return QUANT_TYPES["F16" if file_quant_type.name == "F16" else "F32"]
    return file_quant_type if file_quant_type.fits(tensor.row_width) else QUANT_TYPES["F16"]


def _packed(checkpoint: Checkpoint, tensor: SourceTensor, quant_type: QuantType) -> Iterator[np.ndarray]:
    weights = finite(checkpoint, tensor, as_float32(tensor.read(0)))
    with np.errstate(over="ignore"):
        packed = quants.quantize(weights, quant_type.ggml_type)
    largest = float(np.abs(weights).max(initial=0))
    if largest >= _LIMITS.get(quant_type.name, np.inf):
        raise InputError(
            f"{checkpoint.path}: tensor {tensor.sources[0]} has weights up to {largest:.3g}, which "
            f"overflow {quant_type.name}; write the projector with --mmproj-type BF16 or F32"
        )
    yield packed
