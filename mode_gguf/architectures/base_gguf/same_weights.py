"""Comparison of a base GGUF's weights with the checkpoint's, tensor by tensor of what both have.

The file is made of the base's weights, so those of a fine-tune must not meet the base of its original. Values are
compared bit by bit once rounded to the base's type. What a converter is known to do is allowed: rows or columns in
another order, other shapes, matrices merged or split, norms with 1 added, decays negated and exponentiated. Nothing
else is, so that a tensor whose values are not the checkpoint's is another model's.

Routed experts, which are nearly all of a model, are compared by sampled rows of every one of them, everything else as a
whole.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Final

import numpy as np

from mode_gguf.architectures.base_gguf.files import EXPERTS, FLOAT_TYPES, BaseGguf
from mode_gguf.architectures.base_gguf.match import sampled_rows
from mode_gguf.architectures.base_gguf.names import gguf_name, layer_of
from mode_gguf.architectures.base_gguf.other_model import other_model
from mode_gguf.architectures.base_gguf.rounding import rounded
from mode_gguf.architectures.base_gguf.same_projector import check_projector
from mode_gguf.architectures.tensors import Array, Role, SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.gguf.header import TensorInfo

_CHUNK: Final = 1 << 24  # values that are compared at a time
_COLUMNS: Final = 64
"""Columns of an expert's rows that are compared where the checkpoint stores it by columns."""

_HEAD: Final = "output.weight"
_EMBEDDING: Final = "token_embd.weight"
_CHANGES: Final[tuple[Callable[[np.ndarray], np.ndarray], ...]] = (
    lambda values: values,
    lambda values: values + 1,
    lambda values: -np.exp(values),
)
"""What converters do to values: nothing, norms centred on 0, decays of recurrent layers."""

_PARTS: Final = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "attn_kv_b": ("attn_k_b", "attn_v_b")}
"""Matrices that some converters merge or split."""


def check_weights(checkpoint: Checkpoint, base: BaseGguf) -> None:
    """Refuse a base whose weights are not the checkpoint's.

    Raises:
        InputError: a tensor of the text model or the projector is another; the message names it.
    """
    sources: dict[str, list[str]] = {}  # blocks for multi-token prediction are called like layers
    for source in checkpoint.tensors:
        if (name := gguf_name(base, source)) is not None:
            sources.setdefault(name, []).append(source)
    for name, found in sorted(sources.items(), key=lambda pair: pair[0] != _EMBEDDING):
        info = base.text.tensors.get(name)
        if info is not None and EXPERTS.fullmatch(name) is None:
            _check_tensor(checkpoint, base, found, info)
    by_name = {name: found[0] for name, found in sources.items()}
    _check_head(checkpoint, base, by_name)
    _check_parts(checkpoint, base, by_name)
    _check_experts(checkpoint, base)
    check_projector(checkpoint, base, set(by_name.values()))


# --- tensors of one name ----------------------------------------------------------------------------------------------


def _check_tensor(checkpoint: Checkpoint, base: BaseGguf, sources: Sequence[str], info: TensorInfo) -> None:
    """Refuse a tensor that none of the checkpoint's of that name and size equals."""
    shape = checkpoint.shape(sources[0])
    if info.name in (_EMBEDDING, _HEAD) and shape != info.shape:
        other_model(checkpoint, base, f"a vocabulary of {list(info.shape)} there, {sources[0]} is {list(shape)}")
    # Those of other sizes are merged with others, or parts of them.
    comparable = [source for source in sources if prod(checkpoint.shape(source)) == prod(info.shape)]
    if comparable and not any(_is_same(checkpoint, source, info) for source in comparable):
        other_model(checkpoint, base, f"weights of {info.name} and {comparable[0]} differ")


def _is_same(checkpoint: Checkpoint, source: str, info: TensorInfo) -> bool:
    """Whether a tensor has the values of a checkpoint tensor of as many, in any order."""
    if _is_equal(checkpoint, source, info):
        return True
    found, stored = _values(info), checkpoint.read(source)
    expected = rounded(stored, info.type)
    if len(info.shape) > 1:
        if found.shape == expected.shape and _rows_of([found]) == _rows_of([expected]):
            return True
        return np.array_equal(np.sort(found, axis=None), np.sort(expected, axis=None))
    values = as_float32(stored).ravel()
    there = np.sort(found, axis=None)
    changed = (np.sort(rounded(change(values), info.type)) for change in _CHANGES)
    return any(np.allclose(there, one, rtol=_tolerance(info), atol=0) for one in changed)


def _is_equal(checkpoint: Checkpoint, source: str, info: TensorInfo) -> bool:
    """Whether the values are the same in the same order; read some rows at a time, up to the first difference."""
    shape = checkpoint.shape(source)
    step = max(1, _CHUNK // max(1, prod(shape[1:])))
    there = _mapped(info).reshape(shape)
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        if not np.array_equal(as_float32(there[rows]), rounded(checkpoint.read(source, rows), info.type)):
            return False
    return True


def _tolerance(info: TensorInfo) -> float:
    """Relative difference that rounding twice, and another library's exponential, can make."""
    return {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}[info.type]


def _check_head(checkpoint: Checkpoint, base: BaseGguf, by_name: Mapping[str, str]) -> None:
    """A head on one side alone is the embedding."""
    embedding, head = base.text.tensors.get(_EMBEDDING), base.text.tensors.get(_HEAD)
    stored, tied = by_name.get(_HEAD), by_name.get(_EMBEDDING)
    if head is None and embedding and stored and not _has_same_rows(checkpoint, stored, embedding):
        other_model(checkpoint, base, f"the embedding is the output head there, {stored} is another here")
    if head and stored is None and tied and not _has_same_rows(checkpoint, tied, head):
        other_model(checkpoint, base, f"{_HEAD} is not the embedding, which is the output head here")


def _has_same_rows(checkpoint: Checkpoint, source: str, info: TensorInfo) -> bool:
    return checkpoint.shape(source) == info.shape and _is_equal(checkpoint, source, info)


# --- matrices that are merged on one side -----------------------------------------------------------------------------


def _check_parts(checkpoint: Checkpoint, base: BaseGguf, here: Mapping[str, str]) -> None:
    there = base.text.tensors
    for name in sorted({*there, *here}):
        place, _, suffix = name.rpartition(".")
        layer, _, kind = place.rpartition(".")
        if kind not in _PARTS or (name in there) == (name in here):
            continue
        parts = [f"{layer}.{part}.{suffix}" for part in _PARTS[kind]]
        split: Mapping[str, object] = here if name in there else there
        if not all(part in split for part in parts):
            continue
        infos = [there[part] for part in ([name] if name in there else parts)]
        sources = [here[part] for part in (parts if name in there else [name])]
        if sum(prod(info.shape) for info in infos) != sum(prod(checkpoint.shape(one)) for one in sources):
            continue
        found = [_values(info) for info in infos]
        expected = [rounded(checkpoint.read(one), infos[0].type) for one in sources]
        if len({array.shape[-1] for array in (*found, *expected)}) == 1 and _rows_of(found) == _rows_of(expected):
            continue
        if not np.array_equal(_sorted(found), _sorted(expected)):
            other_model(checkpoint, base, f"weights of {infos[0].name} and {', '.join(sources)} differ")


def _sorted(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate([array.ravel() for array in arrays]))


def _rows_of(matrices: Iterable[np.ndarray]) -> Counter[bytes]:
    """Rows, in no order, with how often each occurs."""
    return Counter(row.tobytes() for matrix in matrices for row in matrix.reshape(-1, matrix.shape[-1]))


# --- routed experts ---------------------------------------------------------------------------------------------------


def _check_experts(checkpoint: Checkpoint, base: BaseGguf) -> None:
    """Sampled rows of every expert must be among the checkpoint's."""
    by_layer: dict[int, list[str]] = {}
    for source in checkpoint.tensors:
        if (layer := layer_of(source)) is not None:
            by_layer.setdefault(layer, []).append(source)
    for tensor in base.tensors:
        if tensor.role is Role.EXPERT:
            for expert in range(tensor.n_experts):
                _check_expert(checkpoint, base, tensor, expert, by_layer.get(tensor.layer or 0, []))


def _check_expert(
    checkpoint: Checkpoint, base: BaseGguf, tensor: SourceTensor, expert: int, names: Sequence[str]
) -> None:
    if any(_has_rows(checkpoint, base, tensor, expert, name) for name in names):
        return
    wanted = [as_float32(tensor.read(expert, slice(row, row + 1)))[0] for row in sampled_rows(tensor.shape[1])]
    kind, found = base.text.tensors[tensor.name].type, False
    for matrix in _expert_matrices(checkpoint, names, expert, tensor.row_width):
        rows = rounded(matrix, kind)
        if all((rows == row).all(axis=1).any() for row in wanted):
            return
        found = True
    why = "weights differ" if found else "no tensor here is of that size"
    other_model(checkpoint, base, f"{tensor.name}, expert {expert}: {why}")


def _has_rows(checkpoint: Checkpoint, base: BaseGguf, tensor: SourceTensor, expert: int, name: str) -> bool:
    """Whether a checkpoint tensor has an expert's sampled rows where converters take them from."""
    kind = base.text.tensors[tensor.name].type
    for row in sampled_rows(tensor.shape[1]):
        wanted = as_float32(tensor.read(expert, slice(row, row + 1)))[0]
        stored = (rounded(one, kind) for one in _stored_rows(checkpoint, tensor, expert, name, row))
        if not any(np.array_equal(one, wanted[: len(one)]) for one in stored):
            return False
    return True


def _stored_rows(checkpoint: Checkpoint, tensor: SourceTensor, expert: int, name: str, row: int) -> Iterator[Array]:
    """What may be a row of an expert in a checkpoint tensor, or its first columns; few bytes are read for each."""
    shape, (_, rows, width) = checkpoint.shape(name), tensor.shape
    merged = (row, row + rows, 2 * row, 2 * row + 1)  # gate's rows first, or in turn with up's
    if len(shape) == 2 and shape == (rows, width) and _is_of_expert(name, expert):
        yield checkpoint.read(name, slice(row, row + 1))[0]
    elif len(shape) == 3 and shape[0] > expert and shape[2] == width and shape[1] in (rows, 2 * rows):
        for place in merged if shape[1] > rows else (row,):
            yield checkpoint.read(name, (expert, slice(place, place + 1)))[0]
    elif len(shape) == 3 and shape[0] > expert and shape[1] == width and shape[2] in (rows, 2 * rows):
        some = checkpoint.read(name, (expert, slice(min(_COLUMNS, width))))
        for place in merged if shape[2] > rows else (row,):
            yield np.ascontiguousarray(some[:, place])


def _is_of_expert(name: str, expert: int) -> bool:
    return f".{expert}." in name and "expert" in name


def _expert_matrices(checkpoint: Checkpoint, names: Sequence[str], expert: int, width: int) -> Iterator[Array]:
    """Matrices of a layer that may hold rows of this width of an expert: tensors of its own, or slices."""
    for name in names:
        shape = checkpoint.shape(name)
        if len(shape) == 2 and shape[1] == width and _is_of_expert(name, expert):
            yield checkpoint.read(name)
        elif len(shape) == 3 and shape[0] > expert and width in shape[1:]:
            matrix = checkpoint.read(name, expert)
            if shape[2] == width:
                yield matrix
            if shape[1] == width:
                yield np.ascontiguousarray(matrix.T)


# --- reading ----------------------------------------------------------------------------------------------------------


def _mapped(info: TensorInfo) -> Array:
    """The tensor's weights as they lie on disk."""
    try:
        return np.memmap(info.file, FLOAT_TYPES[info.type], "r", info.offset, info.shape)
    except (OSError, ValueError) as error:
        raise InputError(f"{info.file}: tensor {info.name} cannot be read ({error})") from error


def _values(info: TensorInfo) -> np.ndarray:
    """The tensor in float32."""
    return as_float32(np.array(_mapped(info), subok=False))
