"""Matches between a base GGUF's tensors and a checkpoint's: found by name, believed by their values.

Names are gguf's own tables over all architectures. A match counts where sampled rows of the GGUF tensor are rows of the
checkpoint's, bit by bit once rounded to the base's type: statistics are of columns, so rows may be in another order
(Llama's Q and K), but a matrix whose columns were moved, scaled or split equals none.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final

import gguf
import numpy as np
from gguf import Keys

from mode_gguf.architectures.base_gguf.files import BaseGguf
from mode_gguf.architectures.hparams import EXPERT_COUNTS
from mode_gguf.architectures.tensors import Array, Order, Role, SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

Match = tuple[str, Order | None]

_EXPERT_COUNTS: Final = (*EXPERT_COUNTS, "moe_num_experts")
_IN_LAYER: Final = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(.+)")
_NON_TEXT_NAMES: Final = ("vision", "visual", "audio", "projector", "mm_", "connector", "vit", "vq")
"""Parts of the names of tensors beside the text model, whose layers are numbered, too."""
_ROWS: Final = 4
"""The number of rows of a matrix that are compared."""


def matched_base(checkpoint: Checkpoint, base: BaseGguf) -> BaseGguf:
    """The base with statistics for those dense matrices that the checkpoint is known to have.

    Raises:
        InputError: it is the base of another model: sizes, experts or the embedding differ.
    """
    _check_sizes(checkpoint, base)
    _check_embedding(checkpoint, base)
    _check_experts(checkpoint, base)
    return base.with_statistics(_matches(checkpoint, base))


def _text_config(checkpoint: Checkpoint) -> dict[str, object]:
    """config.json merged with its section on the text model, wherever that is."""
    settings = dict(checkpoint.config)
    for part in ("thinker_config", "text_config", "llm_config", "language_config"):
        nested = settings.get(part)
        if isinstance(nested, dict):
            settings |= nested
    return settings


def _check_sizes(checkpoint: Checkpoint, base: BaseGguf) -> None:
    config = _text_config(checkpoint)
    predicting = int(base.setting(Keys.LLM.NEXTN_PREDICT_LAYERS) or 0)
    blocks = base.setting(Keys.LLM.BLOCK_COUNT)
    experts = next((config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)), None)
    pairs = (
        ("layers", config.get("num_hidden_layers"), blocks - predicting if isinstance(blocks, int) else None),
        ("a hidden size of", config.get("hidden_size"), base.setting(Keys.LLM.EMBEDDING_LENGTH)),
        ("experts per layer:", experts, base.setting(Keys.LLM.EXPERT_COUNT)),
    )
    for what, wanted, found in pairs:
        if isinstance(wanted, int) and isinstance(found, int) and wanted != found:
            raise InputError(_other_model(checkpoint, base, f"{what} {found} there, {wanted} here"))


def _check_embedding(checkpoint: Checkpoint, base: BaseGguf) -> None:
    embedding = next(tensor for tensor in base.tensors if tensor.role is Role.EMBEDDING)
    sources = [name for name in checkpoint.tensors if _gguf_name(base, name) == embedding.name]
    for source in sources:
        if checkpoint.shape(source) != embedding.shape:
            there, here = list(embedding.shape), list(checkpoint.shape(source))
            raise InputError(_other_model(checkpoint, base, f"a vocabulary of {there} there, {source} is {here}"))
        if not _equal_rows(checkpoint, base, embedding, source, _sampled(embedding.shape[0])):
            raise InputError(_other_model(checkpoint, base, f"weights of {embedding.name} and {source} differ"))


def _check_experts(checkpoint: Checkpoint, base: BaseGguf) -> None:
    """Sampled rows of the first, a middle and the last layer's experts must be among the checkpoint's."""
    layers = sorted({tensor.layer or 0 for tensor in base.tensors if tensor.role is Role.EXPERT})
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        names = [name for name in checkpoint.tensors if _is_in_layer(name, layer)]
        for tensor in (one for one in base.tensors if one.layer == layer and one.role is Role.EXPERT):
            for expert in sorted({0, tensor.n_experts // 2, tensor.n_experts - 1}):
                _check_expert(checkpoint, base, tensor, expert, names)


def _check_expert(
    checkpoint: Checkpoint, base: BaseGguf, tensor: SourceTensor, expert: int, names: Sequence[str]
) -> None:
    wanted = [as_float32(tensor.read(expert, slice(row, row + 1)))[0] for row in _sampled(tensor.shape[1])]
    found = False
    for matrix in _expert_matrices(checkpoint, names, expert, tensor.row_width):
        rows = _rounded(matrix, _type_of(base, tensor))
        if all((rows == row).all(axis=1).any() for row in wanted):
            return
        found = True
    why = "weights differ" if found else "no tensor here is of that size"
    raise InputError(_other_model(checkpoint, base, f"{tensor.name}, expert {expert}: {why}"))


def _expert_matrices(checkpoint: Checkpoint, names: Sequence[str], expert: int, width: int) -> Iterator[Array]:
    """Matrices of a layer that may hold rows of this width of an expert: tensors of its own, or slices."""
    for name in names:
        shape = checkpoint.shape(name)
        if len(shape) == 2 and shape[1] == width and f".{expert}." in name and "expert" in name:
            yield checkpoint.read(name)
        elif len(shape) == 3 and shape[0] > expert and width in shape[1:]:
            matrix = checkpoint.read(name, expert)
            if shape[2] == width:
                yield matrix
            if shape[1] == width:
                yield np.ascontiguousarray(matrix.T)


def _matches(checkpoint: Checkpoint, base: BaseGguf) -> dict[str, Match]:
    """Checkpoint tensor and order of rows, by the GGUF name of dense matrices."""
    matrices = (tensor for tensor in base.tensors if len(tensor.shape) == 2)
    dense = {tensor.name: tensor for tensor in matrices if tensor.role in (Role.DENSE, Role.OUTPUT)}
    orders: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    matched: dict[str, Match] = {}
    for source in checkpoint.tensors:
        tensor = dense.get(_gguf_name(base, source) or "")
        if tensor is None or tensor.name in matched or checkpoint.shape(source) != tensor.shape:
            continue
        rows = _sampled(tensor.shape[0])
        if _equal_rows(checkpoint, base, tensor, source, rows):
            matched[tensor.name] = (source, None)
            continue
        if f"{source.removesuffix('.weight')}.bias" in checkpoint.tensors:
            continue  # a bias would have to move with the rows
        kind = (tensor.name.rpartition(f"blk.{tensor.layer}.")[2], tensor.shape)
        if kind not in orders:
            found = _order_of_rows(checkpoint, base, tensor, source)
            if found is None:
                continue
            orders[kind] = found
        if _equal_rows(checkpoint, base, tensor, source, rows, orders[kind]):
            matched[tensor.name] = (source, Order(rows=orders[kind]))
    return matched


def _equal_rows(
    checkpoint: Checkpoint,
    base: BaseGguf,
    tensor: SourceTensor,
    source: str,
    rows: Sequence[int],
    order: np.ndarray | None = None,
) -> bool:
    """Whether rows of a GGUF matrix are the checkpoint's at the same places, or at those that `order` says."""
    for row in rows:
        place = row if order is None else int(order[row])
        stored = _rounded(checkpoint.read(source, slice(place, place + 1)), _type_of(base, tensor))
        if not np.array_equal(as_float32(tensor.read(0, slice(row, row + 1))), stored):
            return False
    return True


def _order_of_rows(checkpoint: Checkpoint, base: BaseGguf, tensor: SourceTensor, source: str) -> np.ndarray | None:
    """Positions of a GGUF matrix's rows in the checkpoint's; None if they are not the same rows."""
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(_rounded(checkpoint.read(source), _type_of(base, tensor))):
        places.setdefault(row.tobytes(), []).append(place)
    order = []
    for row in as_float32(tensor.read(0)):
        left = places.get(row.tobytes())
        if not left:
            return None
        order.append(left.pop(0))
    return np.array(order)


def _gguf_name(base: BaseGguf, source: str) -> str | None:
    """GGUF's name for a checkpoint tensor of the text model, by gguf's tables; None if they have none."""
    if any(part in source for part in _NON_TEXT_NAMES):
        return None
    table = _name_table(base.architecture, int(base.setting(Keys.LLM.BLOCK_COUNT) or 0))
    if table is None:
        return None
    inside = _IN_LAYER.match(source)
    forms = [source, source.replace("language_model.", ""), source.replace("model.language_model.", "model.")]
    forms.append(f"model.layers.{inside[1]}.{inside[2]}" if inside else "model." + source.rpartition("model.")[2])
    names: Iterator[str | None] = (table.get_name(form, (".weight",)) for form in forms)
    return next((name for name in names if name is not None), None)


@cache
def _name_table(architecture: str, blocks: int) -> gguf.TensorNameMap | None:
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[architecture], blocks) if architecture in known else None


def _is_in_layer(source: str, layer: int) -> bool:
    inside = _IN_LAYER.match(source)
    return inside is not None and int(inside[1]) == layer and not any(part in source for part in _NON_TEXT_NAMES)


def _sampled(rows: int) -> list[int]:
    """Some rows from first to last."""
    return sorted({int(row) for row in np.linspace(0, rows - 1, _ROWS)})


def _type_of(base: BaseGguf, tensor: SourceTensor) -> str:
    return base.text.tensors[tensor.name].type


def _rounded(array: Array, type_name: str) -> np.ndarray:
    """float32, as the converter rounds to a type."""
    values = as_float32(array)
    if type_name == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if type_name == "BF16" and array.dtype != np.uint16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def _other_model(checkpoint: Checkpoint, base: BaseGguf, what: str) -> str:
    return (
        f"{base.text.files[0]}: is not made from {checkpoint.path}: {what}; convert this checkpoint with "
        "convert_hf_to_gguf.py, or give the one that the file was made from"
    )
