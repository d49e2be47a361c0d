"""The file for multi-token prediction: llama.cpp drafts tokens with it, which the model then checks all at once.

It has the model's block for that, and its own copies of embedding and head. What it says wrong costs time, never a
different answer, so that nothing in it is measured.
"""

from functools import partial
from pathlib import Path

from gguf import GGUFWriter

from mode_gguf.architectures import find_family, mtp_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import UsageError
from mode_gguf.export.gguf_writer import FileOutline, OutgoingTensor, add_metadata, write_gguf
from mode_gguf.export.metadata import add_general_keys, file_type
from mode_gguf.export.text_model import tensor_chunks
from mode_gguf.export.tokenizer import add_tokenizer_keys
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.packer import n_chunks
from mode_gguf.quantization.packing import DEFAULT_PACKING
from mode_gguf.quantization.types import QUANT_TYPES, QuantType

MTP_TYPES = ("Q8_0", "Q6_K", "Q4_K", "BF16", "F32")


def write_mtp(
    path: Path,
    checkpoint: Checkpoint,
    quant_type: str = "Q8_0",
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> None:
    """Write what `checkpoint` has for multi-token prediction to `path`, atomically and in the memory of one expert.

    Args:
        quant_type: of the matrices, one of `MTP_TYPES`; rows that it does not fit become Q8_0, or BF16.
        threads: that pack one expert.

    Raises:
        UsageError: another type.
        InputError: the checkpoint has no such block or cannot be converted, or a weight is not finite.
        MissingResourceError: not enough disk space.
    """
    outline, tensors = mtp_outline(checkpoint, quant_type), mtp_tensors(checkpoint)
    outgoing = []
    for tensor, (name, shape, stored) in zip(tensors, outline.tensors, strict=True):
        chunks = partial(tensor_chunks, checkpoint, tensor, stored, threads, DEFAULT_PACKING)
        outgoing.append(OutgoingTensor(name, shape, stored, chunks, n_chunks(tensor)))
    write_gguf(path, outline.architecture, outline.add_keys, outgoing, description="packing", progress=progress)


def mtp_outline(checkpoint: Checkpoint, quant_type: str = "Q8_0") -> FileOutline:
    """The file for multi-token prediction without its weights; arguments and errors are those of `write_mtp`."""
    if quant_type.upper() not in MTP_TYPES:
        raise UsageError(f"unknown type {quant_type!r} for multi-token prediction: choose from {', '.join(MTP_TYPES)}")
    file_quant_type = QUANT_TYPES[quant_type.upper()]
    family, tensors = find_family(checkpoint), mtp_tensors(checkpoint)
    metadata = family.mtp_metadata(checkpoint)

    def add_keys(writer: GGUFWriter) -> None:
        add_general_keys(writer, checkpoint, tensors, kind="model")
        writer.add_file_type(file_type(file_quant_type))
        add_metadata(writer, metadata)
        vocabulary_size = next(tensor.shape[0] for tensor in tensors if tensor.role is Role.EMBEDDING)
        add_tokenizer_keys(writer, checkpoint.path, vocabulary_size, checkpoint.pre_tokenizer, family.tokenizer)

    stored = [(tensor.name, tensor.shape, _stored_type(tensor, file_quant_type)) for tensor in tensors]
    return FileOutline(family.gguf_arch, add_keys, stored)


def _stored_type(tensor: SourceTensor, file_quant_type: QuantType) -> QuantType:
    if tensor.role is Role.KEEP:
        return QUANT_TYPES["F32"]
    fallbacks = (file_quant_type, QUANT_TYPES["Q8_0"], QUANT_TYPES["BF16"])
    return next(quant_type for quant_type in fallbacks if quant_type.fits(tensor.row_width))
