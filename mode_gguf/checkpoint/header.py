"""Headers of safetensors files, which come from elsewhere and may claim anything."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from mode_gguf.checkpoint import fp8
from mode_gguf.checkpoint.stored_tensor import DTYPES, WEIGHT_DTYPES, StoredTensor
from mode_gguf.checkpoint.text_files import refuse_lfs_pointer
from mode_gguf.errors import InputError
from mode_gguf.regular_files import check_regular

_MAX_HEADER_BYTES = 2**25
"""The format allows 100 MB; 100,000 tensors in one file take 15 MB, and as Python objects twenty times as much."""
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**60
"""NumPy makes no array beyond, not even where a dimension of 0 leaves nothing of it."""


def read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors of one safetensors file: 8 bytes with the header's length, the header as JSON, the data.

    Nothing is allocated for what the file does not hold: a length is compared with the file's before it is read, and
    shapes with the bytes that the tensor has.

    Raises:
        InputError: the file is none, is cut off, or its header contradicts itself.
    """
    check_regular(path, "safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            refuse_lfs_pointer(path)
            raise InputError(f"{path}: not a safetensors file, or cut off inside its header; download it again")
        if length > _MAX_HEADER_BYTES:
            raise InputError(f"{path}: a header of {length:,} bytes found, {_MAX_HEADER_BYTES:,} at most are read")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: broken safetensors header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: broken safetensors header ({type(header).__name__} found); download it again")
    data = 8 + length
    tensors = [(name, _entry(path, name, entry, data)) for name, entry in header.items() if name != "__metadata__"]
    filled, before = data, ""
    for name, tensor in sorted(tensors, key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < filled:
            raise InputError(f"{path}: broken safetensors header (tensors {before:.200} and {name:.200} overlap)")
        filled, before = tensor.offset + tensor.nbytes, name
        if filled > size:
            raise InputError(
                f"{path}: cut off inside tensor {name:.200} ({size} bytes, {filled} expected); download it again"
            )
    yield from tensors


def are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of whole numbers, none negative."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def refuse_type(path: Path, name: str, dtype: str) -> InputError:
    """The error that says what type a tensor has that no weights have."""
    supported = ", ".join(known for known in WEIGHT_DTYPES if known != fp8.DTYPE)
    hint = " (use the BF16 original)" if dtype.startswith(("F8", "F6", "F4")) else ""
    return InputError(
        f"{path}: tensor {name:.200} has type {dtype:.200}{hint}; supported are {supported}, and {fp8.DTYPE} with "
        "scales"
    )


def _entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One tensor of a safetensors header, whose data begin at byte `data` of the file."""
    broken = InputError(f"{path}: broken safetensors header (tensor {name:.200}); download it again")
    if not isinstance(entry, dict):
        raise broken
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and are_sizes(shape) and are_sizes(offsets)):
        raise broken
    if dtype not in DTYPES:
        raise refuse_type(path, name, dtype)
    if len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        raise broken
    tensor = StoredTensor(path, tuple(shape), dtype, data + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise broken
    return tensor


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key twice")
    return unique
