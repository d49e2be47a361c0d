"""Comparison of two files of one model: types, sizes, and the error of one's weights relative to the other's."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mode_gguf.artifacts import Record
from mode_gguf.errors import InputError, MissingResourceError
from mode_gguf.gguf.header import GgufHeader, read_header
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.gguf_weights import ModelTensor, model_tensors
from mode_gguf.quantization.ordered_parallel import ordered_parallel

_CHUNK_WEIGHTS = 1 << 20  # of each file, unpacked at a time in a thread


class ComparedFile(Record):
    """One of the two; of a split file all shards together, under the first one's name."""

    name: str
    size_bytes: int
    bpw: float


class TensorDifference(Record):
    """One tensor that both files have; `types` count matrices (experts) by type, the first file's first.

    Attributes:
        error: sum of squared differences over the sum of the first one's squared weights; None where `note` says why.
    """

    name: str
    n_weights: int
    types: tuple[dict[str, int], dict[str, int]]
    size_bytes: tuple[int, int]
    error: float | None
    note: str | None = None


class Total(Record):
    """Tensors added up; `error` is over all weights together that could be compared."""

    tensors: int
    n_weights: int
    size_bytes: tuple[int, int]
    error: float | None


class PairTotal(Total):
    """Tensors stored as `types` in the first and the second file, `mixed` where experts differ."""

    types: tuple[str, str]


class Comparison(Record):
    """The result of `mode-gguf inspect A B`; `only` names tensors that one file alone has, the first file's first."""

    files: tuple[ComparedFile, ComparedFile]
    tensors: list[TensorDifference]
    only: tuple[list[str], list[str]]
    by_types: list[PairTotal]
    total: Total


@dataclass(slots=True)
class _Sums:
    """Sums over the chunks of one tensor."""

    difference: float = 0.0
    square: float = 0.0
    note: str | None = None

    @property
    def error(self) -> float | None:
        if self.note:
            return None
        return self.difference / self.square if self.square else 0.0


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of a tensor in both files; `number` is the tensor's among those compared."""

    number: int
    first: ModelTensor
    second: ModelTensor
    start: int
    stop: int


def compare(first: Path, second: Path, *, threads: int | None = None, progress: Progress = silent) -> Comparison:
    """Compare `second` with `first`, tensor by tensor; a few megabytes per thread are in memory.

    Args:
        first, second: GGUF files; of a split one, the first shard. Experts may be in groups.

    Raises:
        InputError: one is no GGUF file, or they have no tensor in common.
    """
    headers = read_header(first), read_header(second)
    first_tensors, second_tensors = (model_tensors(header) for header in headers)
    shared = [name for name in first_tensors if name in second_tensors]
    if not shared:
        raise InputError(f"{first} and {second} have no tensor of the same name; give two files of one model")
    pairs = [(first_tensors[name], second_tensors[name]) for name in shared]
    sums = [_Sums(note=None if a.shape == b.shape else f"shapes {a.shape} and {b.shape}") for a, b in pairs]
    chunks = [
        chunk for number, pair in enumerate(pairs) if sums[number].note is None for chunk in _chunks(number, *pair)
    ]
    with progress.step("comparing", sum(one.n_weights for one, _ in pairs), "weights") as advance:
        advance(sum(one.n_weights for (one, _), found in zip(pairs, sums, strict=True) if found.note))
        for chunk, (difference, square, note) in zip(
            chunks,
            ordered_parallel(lambda index: _compared(chunks[index]), len(chunks), threads or os.cpu_count() or 1),
            strict=True,
        ):
            total = sums[chunk.number]
            total.difference += difference
            total.square += square
            total.note = total.note or note
            advance((chunk.stop - chunk.start) * chunk.first.shape[-1])
    for one in sums:
        if one.note is None and not one.square and one.difference:
            one.note = f"all zero in {first.name}"
    return Comparison(
        files=(_file(first, headers[0]), _file(second, headers[1])),
        tensors=[_difference(*pair, one) for pair, one in zip(pairs, sums, strict=True)],
        only=(
            [name for name in first_tensors if name not in second_tensors],
            [name for name in second_tensors if name not in first_tensors],
        ),
        by_types=_by_types(pairs, sums),
        total=_total(pairs, sums),
    )


def _chunks(number: int, first: ModelTensor, second: ModelTensor) -> Iterable[_Chunk]:
    step = max(1, _CHUNK_WEIGHTS // first.shape[-1])
    for start in range(0, first.n_rows, step):
        yield _Chunk(number, first, second, start, min(start + step, first.n_rows))


def _compared(chunk: _Chunk) -> tuple[float, float, str | None]:
    """Sums of squared differences and of squared weights, or why there are none."""
    try:
        first_weights = chunk.first.rows(chunk.start, chunk.stop)
        second_weights = chunk.second.rows(chunk.start, chunk.stop)
    except MissingResourceError:
        raise
    except InputError as error:
        return 0.0, 0.0, str(error)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = (second_weights - first_weights).ravel()
        sums = float(np.dot(difference, difference)), float(np.dot(first_weights.ravel(), first_weights.ravel()))
    if not all(map(math.isfinite, sums)):
        return 0.0, 0.0, "weights that are not finite"
    return *sums, None


def _difference(first: ModelTensor, second: ModelTensor, sums: _Sums) -> TensorDifference:
    return TensorDifference(
        name=first.name,
        n_weights=first.n_weights,
        types=(first.types, second.types),
        size_bytes=(first.size_bytes, second.size_bytes),
        error=sums.error,
        note=sums.note,
    )


def _by_types(pairs: Sequence[tuple[ModelTensor, ModelTensor]], sums: Sequence[_Sums]) -> list[PairTotal]:
    groups: dict[tuple[str, str], list[int]] = {}
    for number, (first, second) in enumerate(pairs):
        groups.setdefault((_type(first), _type(second)), []).append(number)
    totals = [
        PairTotal(types=types, **_total([pairs[n] for n in numbers], [sums[n] for n in numbers]).model_dump())
        for types, numbers in groups.items()
    ]
    return sorted(totals, key=lambda total: -total.n_weights)


def _type(tensor: ModelTensor) -> str:
    return next(iter(tensor.types)) if len(tensor.types) == 1 else "mixed"


def _total(pairs: Sequence[tuple[ModelTensor, ModelTensor]], sums: Sequence[_Sums]) -> Total:
    compared = [one for one in sums if one.note is None]
    together = _Sums(sum(one.difference for one in compared), sum(one.square for one in compared))
    return Total(
        tensors=len(pairs),
        n_weights=sum(first.n_weights for first, _ in pairs),
        size_bytes=(sum(first.size_bytes for first, _ in pairs), sum(second.size_bytes for _, second in pairs)),
        error=together.error if compared else None,
    )


def _file(path: Path, header: GgufHeader) -> ComparedFile:
    return ComparedFile(name=path.name, size_bytes=header.size_bytes, bpw=header.bpw)
