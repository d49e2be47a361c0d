"""The head of a GGUF file, read in milliseconds: metadata and tensor infos, no tensor data.

gguf-py's reader maps the whole file and builds an object per metadata value, seconds for a vocabulary of 150 k tokens,
and believes what a file says: a count of 2^60 elements keeps it busy for ever. Here nothing is allocated for what the
file does not hold, and a head has limits that no model comes near.
"""

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mode_gguf.errors import InputError
from mode_gguf.gguf.shards import COUNT_KEY, MAX_SHARDS, NUMBER_KEY, TENSORS_KEY, sibling_shards
from mode_gguf.regular_files import check_regular

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4
MAX_HEAD_BYTES: Final = 2**27
"""Size limit of metadata and tensor infos; a vocabulary of 250,000 tokens with its merges takes 16 MB."""
MAX_ELEMENTS: Final = 2**22
"""Limit of an array in the metadata."""
MAX_KEYS: Final = 2**16
MAX_TENSORS: Final = 2**20
MAX_ALIGNMENT: Final = 2**16
NUMBERS_TYPE: Final = "I32"
"""Type of the tensors that map experts to groups; they hold no weights."""

_STRING, _ARRAY = 8, 9
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the file declares it; `shape` is in NumPy order, `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int
    file: Path

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and tensors of one GGUF file; of all its shards when it is split.

    `value_types` has GGUF's type number of every value, for an array followed by that of its elements.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    value_types: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of the files on disk."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def n_weights(self) -> int:
        """Number of the model's weights; the integers of expert maps are none."""
        return sum(tensor.n_weights for tensor in self.tensors.values() if tensor.type != NUMBERS_TYPE)

    @property
    def bpw(self) -> float:
        """Bits of all tensors per weight; 0 where there are no weights."""
        return 8 * sum(tensor.size_bytes for tensor in self.tensors.values()) / max(1, self.n_weights)


def read_header(path: Path) -> GgufHeader:
    """Read `path`, and its other shards when it is the first of a split file.

    Raises:
        InputError: missing, not GGUF, truncated, or damaged; the message names the file and what was found.
    """
    metadata, tensors, value_types = _read_file(path)
    count = metadata.get(COUNT_KEY, 1)
    if not isinstance(count, int) or not 0 < count <= MAX_SHARDS:
        raise InputError(f"{path}: damaged GGUF header: {COUNT_KEY} is {count!r}")
    if count == 1:
        return GgufHeader((path,), metadata, tensors, value_types)
    files = sibling_shards(path, count)
    if files is None:
        raise InputError(f"{path}: one of {count} shards; give the first one, named ...-00001-of-{count:05d}.gguf")
    for number, shard in enumerate(files[1:], start=1):
        keys, others, _ = _read_file(shard)
        if (keys.get(NUMBER_KEY), keys.get(COUNT_KEY)) != (number, count) or not tensors.keys().isdisjoint(others):
            raise InputError(f"{shard}: does not go with {path.name}; export or download the shards again")
        tensors |= others
    expected = metadata.get(TENSORS_KEY, len(tensors))
    if expected != len(tensors):
        raise InputError(
            f"{path}: its {count} shards hold {len(tensors)} tensors, expected {expected}; export them again"
        )
    return GgufHeader(tuple(files), metadata, tensors, value_types)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo], dict[str, tuple[int, ...]]]:
    check_regular(path, "GGUF file")
    try:
        with path.open("rb") as file:
            return _Reader(path, file, path.stat().st_size).read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


class _Reader:
    """A reader of one file, front to back; every length is checked against the file's size before it is believed."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo], dict[str, tuple[int, ...]]]:
        magic = self.file.read(4)
        if magic != MAGIC:
            raise InputError(f"{self.path}: not a GGUF file (it starts with {magic!r} instead of {MAGIC!r})")
        version = self._number(_U32)
        if version not in VERSIONS:
            raise InputError(f"{self.path}: GGUF version {version} found, {VERSIONS} can be read")
        n_tensors, n_keys = self._count("tensors", MAX_TENSORS), self._count("keys", MAX_KEYS)
        metadata: dict[str, Any] = {}
        value_types: dict[str, tuple[int, ...]] = {}
        for _ in range(n_keys):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"key {key} twice")
            value_types[key], metadata[key] = self._value(self._number(_U32))
        infos = [self._tensor_info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"alignment {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, quant_type, offset in infos:
            block, block_bytes = GGML_QUANT_SIZES[quant_type]
            if shape[-1] % block or name in tensors or offset % alignment:
                raise self._damaged(f"tensor {name}")
            n_bytes = math.prod(shape) // block * block_bytes
            if start + offset + n_bytes > self.size:
                raise InputError(
                    f"{self.path}: truncated: tensor {name} ends at byte {start + offset + n_bytes} and the file at "
                    f"{self.size}; download or export it again"
                )
            tensors[name] = TensorInfo(name, shape, quant_type.name, start + offset, n_bytes, self.path)
        return metadata, tensors, value_types

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        dimensions = self._number(_U32)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} with {dimensions} dimensions")
        shape = tuple(reversed([self._number(_U64) for _ in range(dimensions)]))
        if 0 in shape:
            raise self._damaged(f"tensor {name} of shape {shape}")
        number = self._number(_U32)
        try:
            quant_type = GGMLQuantizationType(number)
        except ValueError:
            raise InputError(f"{self.path}: tensor {name} has type number {number}, which is not known here") from None
        return name, shape, quant_type, self._number(_U64)

    def _value(self, kind: int) -> tuple[tuple[int, ...], Any]:
        if kind == _STRING:
            return (kind,), self._string()
        if kind != _ARRAY:
            return (kind,), self._number(self._scalar(kind))
        element = self._number(_U32)
        count = self._count("elements", MAX_ELEMENTS)
        if element == _STRING:
            return (kind, element), [self._string() for _ in range(count)]
        layout = self._scalar(element)
        return (kind, element), [value for (value,) in layout.iter_unpack(self._bytes(count * layout.size))]

    def _scalar(self, kind: int) -> struct.Struct:
        if kind not in _SCALARS:
            raise self._damaged(f"value type {kind}")
        return _SCALARS[kind]

    def _number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self._bytes(layout.size))[0]

    def _count(self, what: str, most: int) -> int:
        count: int = self._number(_U64)
        if count > most:
            raise self._damaged(f"{count} {what}, {most} at most are read")
        return count

    def _string(self) -> str:
        # What is no UTF-8 is kept in a form that can be printed.
        return self._bytes(self._number(_U64)).decode("utf-8", "backslashreplace")

    def _bytes(self, count: int) -> bytes:
        position = self.file.tell()
        if position + count > self.size:
            raise InputError(f"{self.path}: truncated: its header ends after {self.size} bytes")
        if position + count > MAX_HEAD_BYTES:
            raise self._damaged(f"a head of more than {MAX_HEAD_BYTES} bytes")
        return self.file.read(count)

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged GGUF header at byte {self.file.tell()}: {what}")
