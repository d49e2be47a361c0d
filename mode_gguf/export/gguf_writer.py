"""Writing GGUF files of any size in constant memory, whole or not at all."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
from gguf import GGUFWriter

from mode_gguf.architectures import Metadata, MetadataValue
from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.artifacts import free_bytes, replaced_atomically
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.gguf.shards import COUNT_KEY, NUMBER_KEY, TENSORS_KEY, assign_to_shards, earlier_shards, shard_paths
from mode_gguf.progress import Advance, Progress, silent
from mode_gguf.quantization.types import QuantType
from mode_gguf.sizes import decimal_size

log = logging.getLogger(__name__)

_METADATA_BYTES = 64 * 2**20
"""Most bytes of everything but weights; a vocabulary of 250,000 tokens with its merges takes a quarter of it."""
_MAX_FLOAT32 = 3.4e38


@dataclass(frozen=True, slots=True)
class FileOutline:
    """A file without its weights: what llama.cpp needs to say whether it can load it.

    Attributes:
        architecture: general.architecture.
        add_keys: adds every other key to a writer.
        tensors: name, shape in weights and type of each, in file order.
    """

    architecture: str
    add_keys: Callable[[GGUFWriter], None]
    tensors: Sequence[tuple[str, tuple[int, ...], QuantType]]

    def write(self, path: Path) -> None:
        """Write the file with a hole in the place of its weights, which takes no space on most disks."""
        writer, size = GGUFWriter(None, self.architecture), 0
        self.add_keys(writer)
        for name, shape, quant_type in self.tensors:
            tensor = OutgoingTensor(name, shape, quant_type, lambda: iter(()))
            writer.add_tensor_info(name, tensor.byte_shape, np.dtype(np.uint8), tensor.nbytes, quant_type.ggml_type)
            size += writer.ggml_pad(tensor.nbytes, writer.data_alignment)
        _write(writer, path)
        with path.open("rb+") as file:
            file.truncate(writer.ggml_pad(path.stat().st_size, writer.data_alignment) + size)


@dataclass(frozen=True, slots=True)
class OutgoingTensor:
    """A tensor on its way into a file, packed while it is written; the writer needs `nbytes` and `tofile`.

    Attributes:
        name: GGUF name.
        shape: in weights, NumPy order.
        quant_type: how it is stored.
        chunks: yields the packed bytes in order, as arrays; called once, when the tensor's turn comes.
        n_chunks: how many arrays that will be, for the progress display.
        advance: counts them off.
    """

    name: str
    shape: tuple[int, ...]
    quant_type: QuantType
    chunks: Callable[[], Iterator[np.ndarray]]
    n_chunks: int = 1
    advance: Advance = lambda _: None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of the packed tensor in bytes."""
        return (*self.shape[:-1], self.quant_type.row_bytes(self.shape[-1]))

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.byte_shape))

    def tofile(self, file: BinaryIO) -> None:
        """Pack and write; NumPy's name for it, because gguf's writer expects an array."""
        written = 0
        for chunk in self.chunks():
            file.write(np.ascontiguousarray(chunk).data)
            written += chunk.nbytes
            self.advance(1)
        assert written == self.nbytes, f"{self.name}: {written} bytes packed, {self.nbytes} announced"


def add_metadata(writer: GGUFWriter, metadata: Metadata) -> None:
    """Add keys and values: int as uint32, float as float32, lists by the type of their elements.

    Raises:
        InputError: a number that this type cannot hold.
    """
    for key, value in metadata.items():
        _check_range(key, value)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _check_range(key: str, value: MetadataValue) -> None:
    in_list = isinstance(value, list)
    for one in value if isinstance(value, list) else [value]:
        fits = True
        if isinstance(one, int):
            fits = -(2**31) <= one < 2**31 if in_list else 0 <= one < 2**32
        elif isinstance(one, float):
            fits = abs(one) < _MAX_FLOAT32  # no NaN either
        if not fits:
            raise InputError(
                f"config.json: {key} would be {one!r}, expected a number that GGUF's type for it can hold; use the "
                "configuration published with the model"
            )


def write_gguf(
    path: Path,
    architecture: str,
    add_keys: Callable[[GGUFWriter], None],
    tensors: Sequence[OutgoingTensor],
    *,
    description: str,
    shard_bytes: int | None = None,
    progress: Progress = silent,
) -> None:
    """Write a GGUF file, or several; none appears under its final name before all are complete.

    Args:
        architecture: general.architecture.
        add_keys: adds every other key to the writer.
        tensors: in file order.
        description: of the work, for `progress`, which counts chunks.
        shard_bytes: most bytes of tensors in one file, unless a single one is larger; where there are more, shards are
            written, named as in `mode_gguf.gguf.shards`, and those of an earlier run in another number are removed.
            None writes one file.

    Raises:
        UsageError: there would be more shards than llama.cpp loads.
        MissingResourceError: not enough disk space.
        InputError: the file cannot be written there, or a tensor's chunks raise it.
    """
    shards = _shards(tensors, shard_bytes)
    paths = shard_paths(path, len(shards))
    check_disk_space(path, sum(tensor.nbytes for tensor in tensors))
    largest = max(tensors, key=lambda tensor: tensor.nbytes)
    if shard_bytes is not None and largest.nbytes > shard_bytes:
        log.warning(
            "tensor %s alone takes %s bytes, and the shard size is %s; tensors are not split, so its file is larger",
            largest.name,
            f"{largest.nbytes:,}",
            f"{shard_bytes:,}",
        )
    writers = [GGUFWriter(None, architecture) for _ in shards]
    add_keys(writers[0])
    for writer in writers[1:]:
        writer.kv_data[0].clear()  # general.architecture: a split model has its metadata in the first file only
    for number, (writer, shard) in enumerate(zip(writers, shards, strict=True)):
        if len(shards) > 1:
            writer.add_uint16(NUMBER_KEY, number)
            writer.add_int32(TENSORS_KEY, len(tensors))
            writer.add_uint16(COUNT_KEY, len(shards))
        for tensor in shard:
            writer.add_tensor_info(
                tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.nbytes, tensor.quant_type.ggml_type
            )
    try:
        # What was entered last is left first: the first shard, which users open, is the last that appears.
        with ExitStack() as stack:
            temporaries = [stack.enter_context(replaced_atomically(place)) for place in paths]
            with progress.step(description, sum(tensor.n_chunks for tensor in tensors)) as advance:
                for writer, temporary, shard in zip(writers, temporaries, shards, strict=True):
                    _write(writer, temporary, shard, advance)
            if shard_bytes is not None:
                for stale in earlier_shards(path):  # first ones first: from here on no old model is loaded in part
                    stale.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another place") from error


def _shards(tensors: Sequence[OutgoingTensor], shard_bytes: int | None) -> list[Sequence[OutgoingTensor]]:
    if shard_bytes is None:
        return [tensors]
    places = assign_to_shards([tensor.nbytes for tensor in tensors], shard_bytes)
    return [[tensors[index] for index in shard] for shard in places]


def header_bytes(
    architecture: str, add_keys: Callable[[GGUFWriter], None], tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> int:
    """Bytes of a file of these tensors (name, shape) without their weights, each tensor padded as much as can be."""
    writer = GGUFWriter(None, architecture)
    add_keys(writer)
    for name, shape in tensors:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        _write(writer, path)
        return path.stat().st_size + (len(tensors) + 1) * int(writer.data_alignment)


def _write(
    writer: GGUFWriter, path: Path, tensors: Sequence[OutgoingTensor] = (), advance: Advance = lambda _: None
) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(replace(tensor, advance=advance))
    finally:
        writer.close()


def finite(checkpoint: Checkpoint, tensor: SourceTensor, weights: np.ndarray) -> np.ndarray:
    """`weights`, when all of them are finite.

    Raises:
        InputError: one is NaN or infinite.
    """
    if not np.isfinite(weights).all():
        raise InputError(
            f"{checkpoint.path}: tensor {tensor.sources[0]} has weights that are NaN or infinite; "
            "download the checkpoint again"
        )
    return weights


def check_disk_space(path: Path, weight_bytes: int) -> None:
    """Refuse before hours of packing what would not fit.

    Raises:
        MissingResourceError: the disk that will hold `path` has too little room for `weight_bytes` and metadata.
    """
    needed, free = weight_bytes + _METADATA_BYTES, free_bytes(path.absolute().parent)
    if free < needed:
        raise MissingResourceError(
            f"{path}: {decimal_size(needed)} needed on disk, {decimal_size(free)} free; "
            "free some space or write to another disk"
        )
