"""Matches between a base GGUF's dense matrices and a checkpoint's, for the statistics of their inputs.

Found by name, believed by their values: a match counts where sampled rows of the GGUF tensor are rows of the
checkpoint's, bit by bit once rounded to the base's type. Statistics are of columns, so rows may be in another order
(Llama's Q and K), but a matrix whose columns were moved or split has none.
"""

from collections.abc import Sequence

import numpy as np

from mode_gguf.architectures.base_gguf.files import BaseGguf
from mode_gguf.architectures.base_gguf.names import gguf_name
from mode_gguf.architectures.base_gguf.rounding import rounded
from mode_gguf.architectures.tensors import Order, Role, SourceTensor, as_float32
from mode_gguf.checkpoint.folder import Checkpoint

Match = tuple[str, Order | None]

_ROWS = 4
"""The number of rows of a matrix that are compared."""


def with_matches(checkpoint: Checkpoint, base: BaseGguf) -> BaseGguf:
    """The base with statistics for those dense matrices that the checkpoint is known to have."""
    return base.with_statistics(_matches(checkpoint, base))


def _matches(checkpoint: Checkpoint, base: BaseGguf) -> dict[str, Match]:
    """Checkpoint tensor and order of rows, by the GGUF name of dense matrices."""
    matrices = (tensor for tensor in base.tensors if len(tensor.shape) == 2)
    dense = {tensor.name: tensor for tensor in matrices if tensor.role in (Role.DENSE, Role.OUTPUT)}
    orders: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    matched: dict[str, Match] = {}
    for source in checkpoint.tensors:
        tensor = dense.get(gguf_name(base, source) or "")
        if tensor is None or tensor.name in matched or checkpoint.shape(source) != tensor.shape:
            continue
        rows = sampled_rows(tensor.shape[0])
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
        stored = rounded(checkpoint.read(source, slice(place, place + 1)), _type_of(base, tensor))
        if not np.array_equal(as_float32(tensor.read(0, slice(row, row + 1))), stored):
            return False
    return True


def _order_of_rows(checkpoint: Checkpoint, base: BaseGguf, tensor: SourceTensor, source: str) -> np.ndarray | None:
    """Positions of a GGUF matrix's rows in the checkpoint's; None if they are not the same rows."""
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(rounded(checkpoint.read(source), _type_of(base, tensor))):
        places.setdefault(row.tobytes(), []).append(place)
    order = []
    for row in as_float32(tensor.read(0)):
        left = places.get(row.tobytes())
        if not left:
            return None
        order.append(left.pop(0))
    return np.array(order)


def sampled_rows(rows: int) -> list[int]:
    """Some rows from first to last."""
    return sorted({int(row) for row in np.linspace(0, rows - 1, _ROWS)})


def _type_of(base: BaseGguf, tensor: SourceTensor) -> str:
    return base.text.tensors[tensor.name].type
