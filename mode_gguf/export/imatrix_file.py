"""Importance matrices in llama.cpp's GGUF format, so that stock llama-quantize reads ours and we read stock ones.

A tensor T has `T.in_sum2`, the sums of squares of its inputs, and `T.counts`, how many tokens are in each sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, Keys

from mode_gguf.artifacts import replaced_atomically
from mode_gguf.errors import InputError
from mode_gguf.gguf.header import GgufHeader, TensorInfo, read_header

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class ImatrixHeader:
    """Metadata of an importance matrix; `chunk_size` in tokens."""

    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    n_entries: int


def write_imatrix(
    path: Path,
    entries: Mapping[str, tuple[np.ndarray, np.ndarray]],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Write an importance matrix, atomically.

    Args:
        entries: by GGUF tensor name: in_sum2 (E, n) and counts (E,), with E = 1 for other tensors than experts.
            Counts are whole: llama-quantize rounds them before it divides, so that others would change the values.
        datasets: where the samples came from.

    Raises:
        InputError: sums or counts that are negative, not finite, misshapen, or counts that are not whole.
    """
    writer = GGUFWriter(None, "")  # no general.architecture, as in the files of llama-imatrix
    writer.add_type("imatrix")
    writer.add_array(Keys.IMatrix.DATASETS, list(datasets) or ["unknown"])
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, chunk_count)
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, chunk_size)
    for name, (in_sum2, counts) in entries.items():
        sums32, counts32 = np.asarray(in_sum2, np.float32), np.asarray(counts, np.float32).reshape(-1, 1)
        _check(path, name, sums32, counts32)
        if (counts32 != np.rint(counts32)).any():
            raise InputError(f"{path}: counts of {name} are not whole numbers, and llama-quantize would round them")
        writer.add_tensor(name + _SUMS, sums32)
        writer.add_tensor(name + _COUNTS, counts32)
    with replaced_atomically(path) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_imatrix(path: Path) -> Mapping[str, np.ndarray]:
    """Importance of every input channel by GGUF tensor name: float32 (E, n), the mean of squares.

    All of it is checked here; what a tensor needs is read and divided when it is asked for, as an importance matrix
    takes megabytes per layer.

    Divides as llama-quantize does, so that packing gives the same bytes: float32 sums by counts rounded to whole
    numbers; 1 for an expert whose count is 0.

    Raises:
        InputError: not an importance matrix, or sums and counts that do not belong together.
    """
    return _Quotients(read_sums(path))


def read_sums(path: Path) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of squares (E, n) and counts (E, 1) by GGUF tensor name, float32 as mapped; raises like `read_imatrix`."""
    header, _ = _open(path)
    mapped = np.memmap(path, np.uint8, "r")
    arrays = {name: _array(mapped, info) for name, info in header.tensors.items() if name.endswith((_SUMS, _COUNTS))}
    entries = {}
    for name in (name.removesuffix(_SUMS) for name in arrays if name.endswith(_SUMS)):
        if name + _COUNTS not in arrays:
            raise InputError(f"{path}: {name + _SUMS} has no {name + _COUNTS}; make the importance matrix again")
        sums, counts = arrays[name + _SUMS], arrays[name + _COUNTS].reshape(-1, 1)
        sums = sums.reshape(-1, sums.shape[-1])
        _check(path, name, sums, counts)
        entries[name] = (sums, counts)
    return entries


class _Quotients(Mapping[str, np.ndarray]):
    """Sums divided by counts, out of arrays that are mapped from the file."""

    def __init__(self, entries: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> np.ndarray:
        sums, counts = self._entries[name]
        # In float64: above 2^23 float32 has no halves, and adding one would round odd counts up.
        whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)
        return np.where(whole > 0, sums / np.maximum(whole, 1), np.float32(1)).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_imatrix_header(path: Path) -> ImatrixHeader:
    """Data sets and sizes of an importance matrix; raises like `read_imatrix`."""
    return _open(path)[1]


def _open(path: Path) -> tuple[GgufHeader, ImatrixHeader]:
    if not path.exists():
        raise InputError(f"{path}: no such file; expected an importance matrix (imatrix GGUF)")
    header = read_header(path)
    values = []
    for key, kind in ((Keys.IMatrix.DATASETS, list), (Keys.IMatrix.CHUNK_COUNT, int), (Keys.IMatrix.CHUNK_SIZE, int)):
        if not isinstance(header.metadata.get(key), kind):
            raise InputError(f"{path}: key {key} is missing or wrong; expected an importance matrix in GGUF format")
        values.append(header.metadata[key])
    datasets, chunk_count, chunk_size = values
    n_entries = sum(name.endswith(_SUMS) for name in header.tensors)
    return header, ImatrixHeader(tuple(map(str, datasets)), chunk_count, chunk_size, n_entries)


def _array(mapped: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The tensor as it lies in the mapped file, float32."""
    if info.type != "F32":
        raise InputError(
            f"{info.file}: {info.name} has type {info.type}, expected F32; make the importance matrix again"
        )
    return mapped[info.offset : info.offset + info.size_bytes].view("<f4").reshape(info.shape)


def _check(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> None:
    if sums.ndim != 2 or len(sums) != len(counts):
        raise InputError(f"{path}: {name} has sums {sums.shape} and {len(counts)} counts; expected one count per row")
    for what, values in (("sums", sums), ("counts", counts)):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            kind = "negative" if (values < 0).any() else "not finite"
            raise InputError(
                f"{path}: {what} of {name} are {kind}; make the importance matrix again, of a model whose activations "
                "stay within float32"
            )
