"""A Hugging Face checkpoint folder: configuration, tensor index, and weights that are read slice by slice.

Only the safetensors headers are read on opening; weights are mapped from disk when asked for, so that reading one
expert touches that expert's bytes and nothing else. Pickled weights are never opened.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from mode_gguf.checkpoint import compressed_tensors, fp8
from mode_gguf.errors import InputError
from mode_gguf.regular_files import check_regular

if TYPE_CHECKING:
    from mode_gguf.architectures.base_gguf import BaseGguf

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

Index = int | slice | np.ndarray | tuple[int | slice, ...]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    fp8.DTYPE: np.dtype("u1"),
}
_INTEGERS = ("I32", "I64")
"""dtypes of parts of packed weights."""
_MAX_HEADER_BYTES = 2**25
"""The format allows 100 MB; 100,000 tensors in one file take 15 MB, and as Python objects twenty times as much."""
_MAX_JSON_BYTES = 2**26
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**60
"""NumPy makes no array beyond, not even where a dimension of 0 leaves nothing of it."""
_SAMPLE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in a safetensors file.

    Attributes:
        shape: of the weights, unpacked.
        dtype: safetensors' name of what is stored.
        offset: counts from the file's start.
        scale: of weights in FP8 or packed in four bits (`packed_weights`), the tensor of their scales.
        blocks: of weights in FP8, the size of a scale's block in every dimension.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    scale: "StoredTensor | None" = None
    blocks: tuple[int, ...] = ()

    @property
    def is_packed(self) -> bool:
        return self.scale is not None and not self.blocks

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.shape[-1] // compressed_tensors.PER_INT32) if self.is_packed else self.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * int(_DTYPES[self.dtype].itemsize)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint folder; make one with `Checkpoint.open`.

    Attributes:
        path: the folder.
        name: of the model: the folder's, or the repository's when the folder is a snapshot in the hub's cache.
        repository: `owner/name` when the folder is a snapshot in the hub's cache, else None.
        revision: the snapshot's commit, else None.
        config: config.json; without `quantization_config` where weights in FP8 are decoded.
        tensors: what is stored where, by checkpoint name, in the order of the index.
        fingerprint: digest of the configuration, the tensor index, and some bytes of every tensor, so that two
            finetunes of one model differ; independent of path and file times.
        base: GGUF files that names, metadata and tensors are taken from, of a model without a family; the checkpoint
            is then what the model is run from, and may be missing (no configuration and no tensors).
        pre_tokenizer: llama.cpp's name of the tokenizer's, as the user gave it; None where it is to be recognised.
    """

    path: Path
    name: str
    repository: str | None
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    fingerprint: str
    base: "BaseGguf | None" = None
    pre_tokenizer: str | None = None

    @property
    def files(self) -> set[Path]:
        """The files of the weights."""
        return {stored.file for stored in self.tensors.values()} or set(self.base.files if self.base else ())

    @classmethod
    def open(cls, folder: Path, pre_tokenizer: str | None = None) -> "Checkpoint":
        """Open a folder with config.json and one or several safetensors files.

        Raises:
            InputError: the folder, its configuration, its index or a shard's header cannot be used; nothing but
                the headers is looked at here, plus a few bytes of every tensor for the fingerprint.
        """
        _check_folder(folder)
        config = read_json(folder / "config.json")
        quantization = config.pop("quantization_config", None)
        if quantization is None:
            quantization = _text_quantization(config)
        if not isinstance(quantization, dict):
            quantization = {"quant_method": quantization}
        method = quantization.get("quant_method", "unknown") if quantization else None
        is_packed = compressed_tensors.is_supported(quantization)
        stored = _index(folder) if method in (None, fp8.METHOD) or is_packed else {}
        if method is not None and not is_packed and all(tensor.dtype != fp8.DTYPE for tensor in stored.values()):
            raise InputError(
                f"{folder}: the checkpoint is already quantized ({method}); expected full-precision weights (BF16, F16 "
                "or F32), FP8 with scales, or symmetric 4-bit groups as Kimi K2.5 has them, so point to the original "
                "model"
            )
        if is_packed:
            stored = _with_unpacked(folder, stored)
        tensors = _with_scales(folder, stored, quantization.get("weight_block_size"))
        _check_no_integers(tensors)
        repository, revision = _cached_snapshot(folder) or (None, None)
        return cls(
            path=folder,
            name=repository.rpartition("/")[2] if repository else folder.resolve().name,
            repository=repository,
            revision=revision,
            config=config,
            tensors=tensors,
            fingerprint=_fingerprint(config, stored),
            pre_tokenizer=pre_tokenizer,
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the stored tensor `name`."""
        return self._stored(name).shape

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A copy of `tensor[index]` (all of it for None); only those bytes are read.

        Returns:
            float32, float16, or for bfloat16 its raw bits in uint16, C-contiguous; float32 for FP8 and packed weights,
            of which an index selects rows.

        Raises:
            InputError: no such tensor, or the file has become shorter since the checkpoint was opened.
        """
        stored = self._stored(name)
        try:
            read = _copy(stored, index)
            if stored.scale is None:
                return read
            if stored.is_packed:
                return compressed_tensors.unpacked(read, _float32(_copy(stored.scale, index)))
            parts = () if index is None else index if isinstance(index, tuple) else (index,)
            return fp8.decoded(read, _float32(_copy(stored.scale, None)), stored.blocks, stored.shape, parts)
        except (OSError, ValueError) as error:
            raise InputError(f"{stored.file}: tensor {name} cannot be read ({error})") from error

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(
                f"{self.path}: tensor {name} is missing from the checkpoint; download it again or check config.json"
            ) from None


def _copy(stored: StoredTensor, index: Index | None) -> np.ndarray:
    mapped = np.memmap(stored.file, _DTYPES[stored.dtype], "r", stored.offset, stored.stored_shape)
    return np.array(mapped if index is None else mapped[index], order="C", subok=False)


def _float32(scales: np.ndarray) -> np.ndarray:
    if scales.dtype == np.uint16:
        return (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float32)


def _text_quantization(config: Mapping[str, Any]) -> Any:
    """quantization_config of the text model alone, as Kimi K2.5 has it."""
    text = config.get("text_config")
    return text.get("quantization_config", {}) if isinstance(text, dict) else {}


def _with_scales(folder: Path, stored: Mapping[str, StoredTensor], block: Any) -> dict[str, StoredTensor]:
    """Tensors in FP8 with their scales; scales are no tensors of the model."""
    if all(tensor.dtype != fp8.DTYPE for tensor in stored.values()):
        return dict(stored)
    if block is not None and not (_are_sizes(block) and len(block) == 2 and all(block)):
        raise InputError(f"{folder}: weight_block_size is {block!r}, expected two sizes; download config.json again")
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith((fp8.SCALE, fp8.ACTIVATION_SCALE)):
            continue
        if tensor.dtype != fp8.DTYPE:
            tensors[name] = tensor
            continue
        scales = stored.get(f"{name}{fp8.SCALE}")
        blocks = None if scales is None else fp8.scaling_blocks(tensor.shape, scales.shape, block)
        if scales is None or scales.dtype == fp8.DTYPE or blocks is None:
            found = "is missing" if scales is None else f"is {scales.dtype} {list(scales.shape)}"
            raise InputError(
                f"{folder}: tensor {name} {list(tensor.shape)} has type {fp8.DTYPE}, and {name}{fp8.SCALE} {found}; "
                "expected its scales: use the BF16 original, or download both again"
            )
        tensors[name] = replace(tensor, scale=scales, blocks=blocks)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file is missing, is too large, is not UTF-8 JSON, or holds something other than an object.
    """
    check_regular(path, "JSON file")
    try:
        if (size := path.stat().st_size) > _MAX_JSON_BYTES:
            raise InputError(f"{path}: {size:,} bytes of JSON found, {_MAX_JSON_BYTES:,} at most are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a complete Hugging Face checkpoint folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}; download it again")
    return value


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        as_hugging_face = [folder / name for name in ("config.json", INDEX_FILE, SINGLE_FILE)]
        if any(folder.glob("consolidated*.safetensors")) and not all(
            any(path.exists() for path in paths) for paths in (as_hugging_face[:1], as_hugging_face[1:])
        ):
            raise InputError(
                f"{folder}: weights in Mistral's own layout (consolidated.safetensors, params.json) found, expected "
                f"Hugging Face's (config.json and model.safetensors); download those files of the same repository"
            )
        return
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; expected a Hugging Face checkpoint folder on disk")
    check_regular(folder, "checkpoint folder")
    with folder.open("rb") as file:
        kind = "a GGUF file" if file.read(4) == b"GGUF" else "a file"
    raise InputError(
        f"{folder}: {kind} found, expected a Hugging Face checkpoint folder (config.json and safetensors); "
        "conversion starts from the original weights"
    )


def _cached_snapshot(folder: Path) -> tuple[str, str] | None:
    """`owner/name` and revision for .../models--owner--name/snapshots/<revision>, the layout of the hub's cache."""
    parents = folder.absolute().parents
    if len(parents) < 2 or parents[0].name != "snapshots" or not parents[1].name.startswith("models--"):
        return None
    return "/".join(parents[1].name.removeprefix("models--").split("--", 1)), folder.absolute().name


def _index(folder: Path) -> dict[str, StoredTensor]:
    index_path = folder / INDEX_FILE
    if index_path.exists():
        return _sharded(folder, index_path)
    if (folder / SINGLE_FILE).is_file():
        return dict(_header(folder / SINGLE_FILE))
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise InputError(
            f"{folder}: only pickled weights (.bin, .pt) found, which can run code when opened; expected "
            "safetensors: save the model again with transformers' save_pretrained"
        )
    raise InputError(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE} found; expected a complete checkpoint")


def _sharded(folder: Path, index_path: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index_path}: expected an object weight_map of tensor names to files; download it again")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors: dict[str, StoredTensor] = {}
    for name, file in weight_map.items():
        if file not in shards:
            shards[file] = dict(_header(_shard_path(folder, index_path, file)))
        if name not in shards[file]:
            raise InputError(
                f"{index_path}: tensor {name} should be in {file}, which does not hold it; download both again"
            )
        tensors[name] = shards[file][name]
    return tensors


def _shard_path(folder: Path, index_path: Path, file: str) -> Path:
    """The path of a shard, below the folder only: an index comes from the network and must not name others.

    Symbolic links are followed, wherever they lead: the hub's cache consists of them, and an index cannot make one.
    """
    readings = (PurePosixPath(file), PureWindowsPath(file))
    if any(path.is_absolute() or path.drive or ".." in path.parts for path in readings):
        raise InputError(f"{index_path}: shard {file!r} lies outside the checkpoint folder; refused")
    path = folder / file
    if not _is_file(path):
        raise InputError(f"{path}: shard listed in {INDEX_FILE} is missing; download the checkpoint again")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors of one safetensors file: 8 bytes with the header's length, the header as JSON, the data.

    Nothing is allocated for what the file does not hold: a length is compared with the file's before it is read, and
    shapes with the bytes that the tensor has.
    """
    check_regular(path, "safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
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


def _entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One tensor of a safetensors header, whose data begin at byte `data` of the file."""
    broken = InputError(f"{path}: broken safetensors header (tensor {name:.200}); download it again")
    if not isinstance(entry, dict):
        raise broken
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)):
        raise broken
    if dtype not in _DTYPES:
        hint = " (use the BF16 original)" if dtype.startswith("F8") else ""
        raise InputError(f"{path}: tensor {name:.200} has type {dtype:.200}{hint}; supported are {', '.join(_DTYPES)}")
    if len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) > _MAX_ELEMENTS:
        raise broken
    tensor = StoredTensor(path, tuple(shape), dtype, data + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise broken
    return tensor


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key twice")
    return unique


def _check_no_integers(tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype in _INTEGERS and not tensor.is_packed:
            raise InputError(
                f"{tensor.file}: tensor {name:.200} has type {tensor.dtype}; supported are "
                f"{', '.join(dtype for dtype in _DTYPES if dtype not in _INTEGERS)}"
            )


def _with_unpacked(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Packed weights under the name of what they stand for, in the place of their parts."""
    found = dict(tensors)
    for packed in tensors:
        name = compressed_tensors.packed_name(packed)
        if name is None:
            continue
        _, scale, shape = (found.pop(part, None) for part in compressed_tensors.part_names(name))
        stored, broken = tensors[packed], f"{folder}: tensor {packed:.200} cannot be unpacked"
        if scale is None or shape is None:
            raise InputError(f"{broken}, its _scale or _shape is missing; download the checkpoint again")
        size = tuple(int(n) for n in _copy(shape, None).reshape(-1))
        unpacked = StoredTensor(stored.file, size, stored.dtype, stored.offset, scale)
        whole = len(size) == 2 and stored.dtype == "I32" and stored.shape == unpacked.stored_shape
        if not whole or len(scale.shape) != 2 or scale.shape[0] != size[0] or size[1] % max(1, scale.shape[1]):
            raise InputError(
                f"{broken}: {list(stored.shape)} {stored.dtype} and scales {list(scale.shape)} found for {list(size)}; "
                "expected eight numbers per int32, rows after each other, and whole groups; use a full-precision copy"
            )
        found[name] = unpacked
    return found


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    ordered = sorted(tensors.items(), key=lambda item: (item[1].file.name, item[0]))
    for path, group in groupby(ordered, key=lambda item: item[1].file):
        with path.open("rb") as file:
            for name, tensor in group:
                middle = tensor.nbytes // 2
                file.seek(tensor.offset + middle)
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                digest.update(file.read(min(_SAMPLE_BYTES, tensor.nbytes - middle)))
    return digest.hexdigest()[:16]
