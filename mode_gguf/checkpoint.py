"""A Hugging Face checkpoint folder: configuration, tensor index, and weights that are read slice by slice.

Only the safetensors headers are read on opening; weights are mapped from disk when asked for, so that reading one
expert touches that expert's bytes and nothing else. Pickled weights are never opened.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from mode_gguf.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

Index = int | slice | tuple[int | slice, ...]

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_SAMPLE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `dtype` is safetensors' name (F32, F16, BF16), `offset` counts from the file's start."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(_DTYPES[self.dtype].itemsize)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint folder; make one with `Checkpoint.open`.

    Attributes:
        path: the folder.
        name: of the model: the folder's, or the repository's when the folder is a snapshot in the hub's cache.
        repository: `owner/name` when the folder is a snapshot in the hub's cache, else None.
        config: config.json.
        tensors: what is stored where, by checkpoint name, in the order of the index.
        fingerprint: digest of the configuration, the tensor index, and some bytes of every tensor, so that two
            finetunes of one model differ; independent of path and file times.
    """

    path: Path
    name: str
    repository: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open a folder with config.json and one or several safetensors files.

        Raises:
            InputError: the folder, its configuration, its index or a shard's header cannot be used; nothing but
                the headers is looked at here, plus a few bytes of every tensor for the fingerprint.
        """
        _check_folder(folder)
        config = read_json(folder / "config.json")
        if "quantization_config" in config:
            method = config["quantization_config"]
            method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
            raise InputError(
                f"{folder}: the checkpoint is already quantized ({method}); expected full-precision weights "
                "(BF16, F16 or F32), so point to the original model"
            )
        tensors = _index(folder)
        repository = _cached_repository(folder)
        return cls(
            path=folder,
            name=repository.rpartition("/")[2] if repository else folder.resolve().name,
            repository=repository,
            config=config,
            tensors=tensors,
            fingerprint=_fingerprint(config, tensors),
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the stored tensor `name`."""
        return self._stored(name).shape

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A copy of `tensor[index]` (all of it for None); only those bytes are read.

        Returns:
            float32, float16, or for bfloat16 its raw bits in uint16, C-contiguous.

        Raises:
            InputError: no such tensor, or the file has become shorter since the checkpoint was opened.
        """
        stored = self._stored(name)
        try:
            mapped = np.memmap(stored.file, _DTYPES[stored.dtype], "r", stored.offset, stored.shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{stored.file}: tensor {name} cannot be read ({error})") from error
        return np.array(mapped if index is None else mapped[index], order="C", subok=False)

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(
                f"{self.path}: tensor {name} is missing from the checkpoint; download it again or check config.json"
            ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file is missing, is not UTF-8 JSON, or holds something other than an object.
    """
    try:
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
        return
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; expected a Hugging Face checkpoint folder on disk")
    with folder.open("rb") as file:
        kind = "a GGUF file" if file.read(4) == b"GGUF" else "a file"
    raise InputError(
        f"{folder}: {kind} found, expected a Hugging Face checkpoint folder (config.json and safetensors); "
        "conversion starts from the original weights"
    )


def _cached_repository(folder: Path) -> str | None:
    """`owner/name` for .../models--owner--name/snapshots/<revision>, the layout of the hub's cache."""
    parents = folder.absolute().parents
    if len(parents) < 2 or parents[0].name != "snapshots" or not parents[1].name.startswith("models--"):
        return None
    return "/".join(parents[1].name.removeprefix("models--").split("--", 1))


def _index(folder: Path) -> dict[str, StoredTensor]:
    index_path = folder / INDEX_FILE
    if index_path.exists():
        return _sharded(folder, index_path)
    if (folder / SINGLE_FILE).exists():
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
    """Only files below the folder: an index comes from the network and must not name others."""
    readings = (PurePosixPath(file), PureWindowsPath(file))
    if any(path.is_absolute() or path.drive or ".." in path.parts for path in readings):
        raise InputError(f"{index_path}: shard {file!r} lies outside the checkpoint folder; refused")
    path = folder / file
    if not path.is_file():
        raise InputError(f"{path}: shard listed in {INDEX_FILE} is missing; download the checkpoint again")
    return path


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors of one safetensors file: 8 bytes with the header's length, the header as JSON, the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise InputError(f"{path}: not a safetensors file, or cut off inside its header; download it again")
        try:
            header = json.loads(file.read(length))
            entries = [
                (name, str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise InputError(f"{path}: broken safetensors header ({error!r}); download it again") from error
    data = 8 + length
    for name, dtype, shape, *offsets in entries:
        if dtype not in _DTYPES:
            hint = " (an fp8 checkpoint: use the BF16 original)" if dtype.startswith("F8") else ""
            raise InputError(f"{path}: tensor {name} has type {dtype}{hint}; supported are {', '.join(_DTYPES)}")
        if len(offsets) != 2 or any(n < 0 for n in (*shape, *offsets)):
            raise InputError(f"{path}: broken safetensors header (tensor {name}); download it again")
        begin, end = offsets
        tensor = StoredTensor(path, shape, dtype, data + begin)
        if end - begin != tensor.nbytes:
            raise InputError(f"{path}: broken safetensors header (tensor {name}); download it again")
        if data + end > size:
            raise InputError(
                f"{path}: cut off inside tensor {name} ({size} bytes, {data + end} expected); download it again"
            )
        yield name, tensor


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
