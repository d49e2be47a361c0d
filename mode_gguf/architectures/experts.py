"""Routed experts: rules for their tensors, and views of single projections in the fused tensors of transformers.

H is the hidden size, I the width of an expert, E their number.
"""

from functools import partial
from typing import Literal, Protocol

from mode_gguf.architectures.hparams import expert_sizes, text_hparams
from mode_gguf.architectures.rules import LAYER, TensorRule, View, check_shape
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, transposed_copy
from mode_gguf.checkpoint.folder import Checkpoint, Index

Projection = Literal["gate", "up", "gate_up", "down"]
"""Gate and up are two tensors in most families' files, and one in others'."""


class FusedTransform(Protocol):
    """A `Transform` of fused experts, given the projection to take out of them."""

    def __call__(self, checkpoint: Checkpoint, source: str, /, projection: Projection) -> View: ...


def fused_shape(checkpoint: Checkpoint, projection: Projection) -> tuple[int, int, int]:
    """The shape that transformers multiplies with: (E, 2I, H) of gate_up_proj, or (E, H, I) of down_proj."""
    experts, hidden, width = expert_sizes(text_hparams(checkpoint))
    return (experts, hidden, width) if projection == "down" else (experts, 2 * width, hidden)


def rows_of(projection: str, n_rows: int) -> slice:
    """The rows of gate, up or both among the `n_rows` = 2I rows of transformers' gate_up_proj."""
    half = n_rows // 2
    return {"gate": slice(0, half), "up": slice(half, n_rows), "gate_up": slice(0, n_rows)}[projection]


def fused_experts(checkpoint: Checkpoint, source: str, projection: Projection, *, transposed: bool = False) -> View:
    """One projection of the fused experts as (E, rows, n_in). Gate is the first half of 2I.

    Args:
        transposed: the checkpoint stores `x @ W`, (E, H, 2I) and (E, I, H).

    Raises:
        InputError: the shape is another.
    """
    experts, rows, n_in = fused_shape(checkpoint, projection)
    check_shape(checkpoint, source, (experts, n_in, rows) if transposed else (experts, rows, n_in))
    part = slice(0, rows) if projection == "down" else rows_of(projection, rows)
    n_rows = part.stop - part.start

    def read(expert: int, rows: slice = ALL_ROWS) -> Array:
        start, end, _ = rows.indices(n_rows)
        chosen = slice(part.start + start, part.start + end)
        index: Index = (expert, slice(None), chosen) if transposed else (expert, chosen)
        matrix = checkpoint.read(source, index)
        return transposed_copy(matrix) if transposed else matrix

    return View((experts, n_rows, n_in), read)


def expert_rules(
    transform: FusedTransform = fused_experts,
    *,
    block: str = "mlp.experts",
    fused: bool = False,
    only: str | None = None,
) -> tuple[TensorRule, ...]:
    """Gate, up and down of a decoder layer's experts.

    Args:
        block: the checkpoint's name of the experts in a layer.
        fused: gate and up stay one tensor; experts are then never stored one by one.
        only: as in `TensorRule`, where some layers have no experts.
    """
    experts = f"{LAYER.source}.{block}"

    def rule(source: str, projection: Projection, activation: str) -> TensorRule:
        return TensorRule(
            source=f"{experts}.{source}",
            name=f"{LAYER.name}.ffn_{projection}_exps.weight",
            role=Role.EXPERT,
            transform=partial(transform, projection=projection),
            projection=projection,
            activation=f"{LAYER.name}.ffn_exps.{activation}",
            each=None if fused else f"{experts}.{{expert}}.{projection}_proj.weight",
            only=only,
        )

    reading: tuple[Projection, ...] = ("gate_up",) if fused else ("gate", "up")
    return (
        *(rule("gate_up_proj", projection, "input") for projection in reading),
        rule("down_proj", "down", "hidden"),
    )
