"""The text model's file: every tensor packed in the type the plan gives it, expert by expert."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from gguf import GGUFWriter

from mode_gguf.architectures import Metadata, find_family, ignored_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.gguf_writer import FileOutline, OutgoingTensor, add_metadata, finite, header_bytes, write_gguf
from mode_gguf.export.metadata import add_base_keys, add_general_keys, file_type, main_expert_type
from mode_gguf.export.tokenizer import add_tokenizer_keys
from mode_gguf.gguf.shards import assign_to_shards, shard_paths
from mode_gguf.options import Packing
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization import expert_groups
from mode_gguf.quantization.expert_groups import ExpertTypes, StoredTensors, group_name, map_name, stored_tensors
from mode_gguf.quantization.libggml import check_available, needs_importance
from mode_gguf.quantization.packer import n_chunks, packed_chunks
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES, QuantType

log = logging.getLogger(__name__)

MTP_WAY_OUT = "; `export --mtp Q8_0` writes them to a file to draft with"

ImportanceOf: TypeAlias = Callable[[str], np.ndarray | None]
"""Importance float32 (E, n) of a stored tensor, looked up when its turn comes: all of it would grow with the model."""


@dataclass(frozen=True, slots=True)
class TensorPacking:
    """Types, importance and packing of a text model's tensors.

    Attributes:
        types: of every matrix by GGUF name; norms and routers may be left out, they stay F32.
        importance: float32 (E, n) by GGUF name, as `read_imatrix` gives it; a tensor without is packed plainly.
        experts: types of single experts, where they differ within a tensor; stock llama.cpp cannot load such a file.
        packing: search settings of the packing.
        packed: sources of matrices that are packed already, by name of the stored tensor, as `packed_chunks` would
            yield them.
    """

    types: Mapping[str, QuantType]
    importance: Mapping[str, np.ndarray] | None = None
    experts: ExpertTypes = field(default_factory=dict)
    packing: Packing = EXACT
    packed: Mapping[str, Callable[[], Iterator[np.ndarray]]] = field(default_factory=dict)


def write_text_model(
    path: Path,
    checkpoint: Checkpoint,
    stored_as: TensorPacking,
    *,
    metadata: Metadata | None = None,
    shard_bytes: int | None = None,
    threads: int = 1,
    progress: Progress = silent,
) -> None:
    """Write the text model of `checkpoint` to `path`, atomically and in the memory of one expert.

    Args:
        stored_as: types, and how matrices are packed.
        metadata: further keys, such as `imatrix_keys`.
        shard_bytes: most bytes of tensors in one file; with more than that, `text_model_files` are written.
        threads: that pack one expert.

    Raises:
        InputError: the checkpoint, the types, the importance or a weight cannot be used.
        UsageError: there would be more shards than llama.cpp loads.
        MissingResourceError: not enough disk space, or no libggml for a type that it packs.
    """
    model_tensors = text_tensors(checkpoint)
    if without := ignored_tensors(checkpoint):
        more = f"{without[0]} and {len(without) - 1} more tensors are left out"
        log.info("%s%s", more, MTP_WAY_OUT if find_family(checkpoint).text.mtp else "")
    layout, stored = _stored_layout(model_tensors, stored_as.types, stored_as.experts)
    tensors, packed = layout.tensors, stored_as.packed
    importance_of = partial(layout.rows_of, arrays=stored_as.importance or {})
    _check_fit(tensors, stored)
    check_available(stored.values())
    _check_importance(tensors, stored, importance_of)
    outgoing = [
        OutgoingTensor(
            tensor.name,
            tensor.shape,
            stored[tensor.name],
            packed.get(tensor.name)
            or partial(
                tensor_chunks, checkpoint, tensor, stored[tensor.name], threads, stored_as.packing, importance_of
            ),
            tensor.n_experts if tensor.name in packed else n_chunks(tensor),
        )
        for tensor in tensors
    ]
    write_gguf(
        path,
        find_family(checkpoint).gguf_arch + (expert_groups.ARCHITECTURE_SUFFIX if layout.members else ""),
        partial(_add_keys, checkpoint, model_tensors, layout, stored, metadata or {}),
        outgoing,
        description="packing",
        shard_bytes=shard_bytes,
        progress=progress,
    )


def text_model_files(
    path: Path,
    checkpoint: Checkpoint,
    types: Mapping[str, QuantType],
    experts: ExpertTypes | None = None,
    shard_bytes: int | None = None,
) -> list[Path]:
    """The files that `write_text_model` writes with these arguments, the one that users open first; raises as it."""
    if shard_bytes is None:
        return [path]
    layout, stored = _stored_layout(text_tensors(checkpoint), types, experts or {})
    sizes = [
        tensor.n_weights // tensor.row_width * stored[tensor.name].row_bytes(tensor.row_width)
        for tensor in layout.tensors
    ]
    return shard_paths(path, len(assign_to_shards(sizes, shard_bytes)))


def _stored_layout(
    tensors: Sequence[SourceTensor], types: Mapping[str, QuantType], experts: ExpertTypes
) -> tuple[StoredTensors, dict[str, QuantType]]:
    """The tensors of the file, and their types by name."""
    layout = stored_tensors(tensors, experts)
    return layout, expert_groups.stored_types(checked_types(tensors, types), experts)


def text_outline(checkpoint: Checkpoint) -> FileOutline:
    """The text model's file without its weights, in BF16 where it is packed.

    Raises:
        InputError: the checkpoint cannot be used.
    """
    tensors = text_tensors(checkpoint)
    kept = (Role.KEEP, Role.INDEX)
    types = {tensor.name: QUANT_TYPES["F32" if tensor.role in kept else "BF16"] for tensor in tensors}
    return FileOutline(
        find_family(checkpoint).gguf_arch,
        partial(_add_keys, checkpoint, tensors, stored_tensors(tensors, {}), types, {}),
        [(tensor.name, tensor.shape, types[tensor.name]) for tensor in tensors],
    )


def metadata_bytes(checkpoint: Checkpoint, groups: int = 1) -> int:
    """Upper bound of what a text model's file holds besides weights: keys, tokenizer, tensor names and padding.

    Args:
        groups: that the experts of a layer are stored in, at most.

    Raises:
        InputError: the checkpoint cannot be used.
    """
    tensors = text_tensors(checkpoint)
    f32 = dict.fromkeys((tensor.name for tensor in tensors), QUANT_TYPES["F32"])
    add_keys = partial(_add_keys, checkpoint, tensors, stored_tensors(tensors, {}), f32, {})
    infos = [(tensor.name, tensor.shape) for tensor in tensors]
    if groups > 1:
        experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
        infos += [(group_name(tensor.name, number), tensor.shape) for tensor in experts for number in range(1, groups)]
        infos += [(map_name(layer), (1, 1)) for layer in sorted({tensor.layer or 0 for tensor in experts})]
    keys = header_bytes(find_family(checkpoint).gguf_arch, add_keys, infos)
    return keys + _FURTHER_KEYS_BYTES


_FURTHER_KEYS_BYTES = 1024
"""Most bytes of the keys that name the importance matrix and its data sets, and of those of expert groups."""


def _add_keys(
    checkpoint: Checkpoint,
    tensors: Sequence[SourceTensor],
    layout: StoredTensors,
    stored: Mapping[str, QuantType],
    metadata: Metadata,
    writer: GGUFWriter,
) -> None:
    writer.add_file_type(file_type(main_expert_type(layout.tensors, stored)))
    if layout.members:
        writer.add_uint32(expert_groups.VERSION_KEY, expert_groups.VERSION)
    if checkpoint.base is not None:
        add_base_keys(writer, checkpoint, checkpoint.base.text)
    else:
        family = find_family(checkpoint)
        vocabulary_size = next(tensor.shape[0] for tensor in tensors if tensor.role is Role.EMBEDDING)
        add_general_keys(writer, checkpoint, tensors, kind="model")
        add_metadata(writer, family.text_metadata(checkpoint))
        add_tokenizer_keys(writer, checkpoint.path, vocabulary_size, checkpoint.pre_tokenizer, family.tokenizer)
    add_metadata(writer, metadata)


def checked_types(tensors: Sequence[SourceTensor], types: Mapping[str, QuantType]) -> dict[str, QuantType]:
    """The type of every tensor of the model: the plan's, and F32 for what must stay.

    Raises:
        InputError: the plan leaves out a matrix, names an unknown tensor, or changes one that must stay F32.
    """
    unknown = types.keys() - {tensor.name for tensor in tensors}
    if unknown:
        raise InputError(f"the plan has a type for {min(unknown)}, which the model does not have; make a new plan")
    f32 = QUANT_TYPES["F32"]
    stored = {}
    for tensor in tensors:
        keep = tensor.role is Role.KEEP
        quant_type = types.get(tensor.name, f32 if keep else None)
        if quant_type is None:
            raise InputError(f"the plan has no type for {tensor.name}; make a new plan")
        if keep and quant_type != f32:
            raise InputError(f"the plan gives {tensor.name} type {quant_type.name}, but it must stay F32")
        stored[tensor.name] = quant_type
    return stored


def _check_fit(tensors: Sequence[SourceTensor], stored: Mapping[str, QuantType]) -> None:
    for tensor in tensors:
        quant_type = stored[tensor.name]
        if not quant_type.fits(tensor.row_width):
            raise InputError(
                f"the plan gives {tensor.name} type {quant_type.name}, whose blocks of {quant_type.block_size} do not "
                f"fit rows of {tensor.row_width} weights; choose a type with smaller blocks"
            )


def _check_importance(
    tensors: Sequence[SourceTensor], stored: Mapping[str, QuantType], importance_of: ImportanceOf
) -> None:
    for tensor in tensors:
        found, quant_type = importance_of(tensor.name), stored[tensor.name]
        if found is None and needs_importance(quant_type):
            raise InputError(
                f"the plan gives {tensor.name} type {quant_type.name}, which needs an importance matrix, and there is "
                "none for it; run `mode-gguf calibrate` in this work folder first, or choose another type"
            )
        expected = (tensor.n_experts, tensor.row_width)
        if found is not None and found.shape != expected:
            raise InputError(
                f"the importance matrix has shape {found.shape} for {tensor.name}, expected {expected}; "
                "use one made from this model"
            )


def tensor_chunks(
    checkpoint: Checkpoint,
    tensor: SourceTensor,
    quant_type: QuantType,
    threads: int,
    packing: Packing,
    importance_of: ImportanceOf = lambda _: None,
) -> Iterator[np.ndarray]:
    """A tensor's bytes, packed unless it stays F32; raises like `finite` and `packed_chunks`."""
    if tensor.role is Role.INDEX:
        yield tensor.read(0)
    elif tensor.role is Role.KEEP:
        yield finite(checkpoint, tensor, as_float32(tensor.read(0)))
    else:
        yield from packed_chunks(tensor, quant_type, importance_of(tensor.name), threads, packing)
