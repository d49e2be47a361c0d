"""The weights of a GGUF file as the model knows them: whole tensors, read row by row as float32.

Where the experts of a layer are stored in groups (docs/design/per-expert-layout.md), they are put together again.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from mode_gguf.errors import InputError
from mode_gguf.gguf.header import GgufHeader, TensorInfo
from mode_gguf.quantization.expert_groups import ARCHITECTURE_SUFFIX, group_name, map_name
from mode_gguf.quantization.packer import unpack_matrix
from mode_gguf.quantization.types import INDEX, QUANT_TYPES

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.weight")
_LATER_GROUP = re.compile(r"blk\.\d+\.ffn_\w+_exps\.\d+\.weight")


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` rows of a stored tensor from `first` on."""

    info: TensorInfo
    first: int
    rows: int

    @property
    def row_bytes(self) -> int:
        return self.info.size_bytes * self.info.shape[-1] // self.info.n_weights

    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8 (stop - start, row_bytes), counted within the piece."""
        offset = self.info.offset + (self.first + start) * self.row_bytes
        raw = np.fromfile(self.info.file, np.uint8, (stop - start) * self.row_bytes, offset=offset)
        if raw.size != (stop - start) * self.row_bytes:
            raise InputError(f"{self.info.file}: tensor {self.info.name} ends early; download or export the file again")
        return raw.reshape(stop - start, self.row_bytes)


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One tensor of the model. `shape` is in NumPy order; `pieces` hold its rows in order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1]))

    @property
    def n_weights(self) -> int:
        return self.n_rows * self.shape[-1]

    @property
    def size_bytes(self) -> int:
        return sum(piece.rows * piece.row_bytes for piece in self.pieces)

    @property
    def types(self) -> dict[str, int]:
        """Number of pieces by type; one piece unless experts are in groups."""
        return dict(Counter(piece.info.type for piece in self.pieces))

    def parts(self, start: int, stop: int) -> list[tuple[Piece, int, int]]:
        """The pieces that rows `start` to `stop` lie in, each with its rows."""
        found, place = [], 0
        for piece in self.pieces:
            first, last = max(start - place, 0), min(stop - place, piece.rows)
            if first < last:
                found.append((piece, first, last))
            place += piece.rows
        return found

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 (stop - start, n).

        Raises:
            InputError: the file is shorter than its head says, or nothing here unpacks the type.
            MissingResourceError: libggml unpacks this type, and cannot be used.
        """
        width = self.shape[-1]
        return np.concatenate(
            [unpacked(piece.read(first, last), piece.info, width) for piece, first, last in self.parts(start, stop)]
        )


def unpacked(raw: np.ndarray, info: TensorInfo, n: int) -> np.ndarray:
    """float32 (rows, n) of a tensor's packed uint8 (rows, row_bytes)."""
    if info.type in QUANT_TYPES:
        return unpack_matrix(raw, QUANT_TYPES[info.type], n)
    try:
        weights = gguf.dequantize(raw, gguf.GGMLQuantizationType[info.type])
    except NotImplementedError:
        raise InputError(f"{info.file}: tensor {info.name} has type {info.type}, which nothing here unpacks") from None
    return np.asarray(weights, np.float32).reshape(len(raw), n)


def model_tensors(header: GgufHeader) -> dict[str, ModelTensor]:
    """The tensors of the model in the order of the file, by name.

    Raises:
        InputError: groups of experts do not make up whole tensors.
    """
    grouped = str(header.metadata.get("general.architecture", "")).endswith(ARCHITECTURE_SUFFIX)
    found = {}
    for name, info in header.tensors.items():
        match = _EXPERTS.fullmatch(name) if grouped else None
        places = header.tensors.get(map_name(int(match[1]))) if match else None
        if places is not None:
            found[name] = _joined_groups(name, _read_map(places), header.tensors)
        elif not (grouped and (info.type == INDEX.name or _LATER_GROUP.fullmatch(name))):
            rows = info.n_weights // info.shape[-1]
            found[name] = ModelTensor(name, info.shape, (Piece(info, 0, rows),))
    return found


def _read_map(info: TensorInfo) -> np.ndarray:
    """int32 (groups, E): numbers of experts within their groups, -1 in all others."""
    if info.type != INDEX.name or len(info.shape) not in (1, 2):
        raise InputError(f"{info.file}: {info.name} is {info.type} of shape {info.shape}, no map of experts")
    return np.fromfile(info.file, np.int32, info.n_weights, offset=info.offset).reshape(-1, info.shape[-1])


def _joined_groups(name: str, places: np.ndarray, stored: Mapping[str, TensorInfo]) -> ModelTensor:
    groups = [stored.get(group_name(name, number)) for number in range(len(places))]
    sizes = [0 if group is None or len(group.shape) != 3 else group.shape[0] for group in groups]
    inside = (places >= 0) & (places < np.array(sizes)[:, None])
    alike = {group.shape[1:] for group in groups if group is not None}
    if len(alike) != 1 or not (inside.sum(axis=0) == 1).all() or ((places >= 0) != inside).any():
        raise InputError(f"{name}: its groups and their map do not make up all experts once; export the file again")
    rows, width = alike.pop()
    pieces = []
    for expert in range(places.shape[1]):
        number = int(np.argmax(inside[:, expert]))
        group = groups[number]
        assert group is not None
        pieces.append(Piece(group, int(places[number, expert]) * rows, rows))
    return ModelTensor(name, (len(pieces), rows, width), tuple(pieces))
