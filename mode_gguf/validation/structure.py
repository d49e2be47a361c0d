"""Checks of a GGUF file that need no llama.cpp, and the description that `mode-gguf inspect` shows."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from mode_gguf.errors import ValidationError
from mode_gguf.gguf.header import GgufHeader, TensorInfo, read_header
from mode_gguf.quantization.types import QuantType, bits_per_weight

MAX_SHOWN: Final = 16
"""Metadata arrays longer than this (vocabularies) are described by their length."""
_EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps(\.\d+)?\.weight")


def check_structure(path: Path, planned: Mapping[str, QuantType] | None = None) -> GgufHeader:
    """Check that the file holds what was planned, byte for byte of the layout.

    Args:
        path: of a split file, the first shard.
        planned: type of every tensor; without it only the file's own consistency is checked.

    Raises:
        InputError: not GGUF, truncated or damaged.
        ValidationError: a tensor is missing, was not planned, has another type, or overlaps another.
    """
    header = read_header(path)
    if not header.tensors:
        raise ValidationError(f"{path}: holds no tensors")
    if planned is not None:
        _check_plan(path, header, planned)
    by_place = sorted(header.tensors.values(), key=lambda info: (str(info.file), info.offset))
    for first, second in pairwise(by_place):
        if first.file == second.file and first.offset + first.size_bytes > second.offset:
            raise ValidationError(f"{first.file}: tensors {first.name} and {second.name} overlap")
    return header


def describe(path: Path) -> dict[str, Any]:
    """Description of a GGUF file, as JSON-able values.

    Keys: `files`, `size_bytes`, `n_weights`, `bpw`, `experts_bpw` (None without experts), `types` (type -> tensors,
    weights, bytes), `metadata`, and `tensors` (name, shape in NumPy order, type, n_weights, size_bytes, bpw).

    Raises:
        InputError: not GGUF, truncated or damaged.
    """
    header = read_header(path)
    return {
        "files": [str(file) for file in header.files],
        "size_bytes": header.size_bytes,
        "n_weights": header.n_weights,
        "bpw": header.bpw if header.tensors else None,
        "experts_bpw": experts_bpw(header),
        "types": _by_type(header.tensors.values()),
        "metadata": {key: _shown(value) for key, value in header.metadata.items()},
        "tensors": [
            {
                "name": info.name,
                "shape": list(info.shape),
                "type": info.type,
                "n_weights": info.n_weights,
                "size_bytes": info.size_bytes,
                "bpw": bits_per_weight([info]),
            }
            for info in header.tensors.values()
        ],
    }


def experts_bpw(header: GgufHeader) -> float | None:
    """Bits per weight of the routed experts' tensors, None where there are none."""
    experts = [info for name, info in header.tensors.items() if _EXPERTS.fullmatch(name)]
    return bits_per_weight(experts) if experts else None


def _check_plan(path: Path, header: GgufHeader, planned: Mapping[str, QuantType]) -> None:
    missing = sorted(planned.keys() - header.tensors.keys())
    if missing:
        raise ValidationError(f"{path}: {len(missing)} planned tensors are missing, the first is {missing[0]}")
    extra = sorted(header.tensors.keys() - planned.keys())
    if extra:
        raise ValidationError(f"{path}: {len(extra)} tensors were not planned, the first is {extra[0]}")
    for name, quant_type in planned.items():
        found = header.tensors[name]
        if found.type != quant_type.name:
            raise ValidationError(f"{path}: tensor {name} has type {found.type}, the plan says {quant_type.name}")
        expected = found.n_weights // found.shape[-1] * quant_type.row_bytes(found.shape[-1])
        if found.size_bytes != expected:
            raise ValidationError(f"{path}: tensor {name} takes {found.size_bytes} bytes, {expected} expected")


def _by_type(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    totals: dict[str, Counter[str]] = {}
    for info in tensors:
        of_type = totals.setdefault(info.type, Counter())
        of_type.update(tensors=1, n_weights=info.n_weights, size_bytes=info.size_bytes)
    return {name: dict(found) for name, found in sorted(totals.items(), key=lambda item: -item[1]["size_bytes"])}


def _shown(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_SHOWN:
        return f"array of {len(value)} values"
    return value
