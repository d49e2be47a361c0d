"""A decoder layer run with quantized weights: the base's, and each variant's change added where it differs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mode_gguf.architectures.experts import rows_of
from mode_gguf.architectures.tensors import Role
from mode_gguf.forward.streaming import StreamedModel
from mode_gguf.importance.variants import TypeChanges, Variant


@dataclass(frozen=True, slots=True)
class VariantRow:
    """A batch row of a variant whose weights differ from the base's in this layer.

    Attributes:
        variant: the model of this row.
        mask: (S,) bool, tokens that pass through the weights that differ.
    """

    variant: Variant
    mask: Tensor


class QuantizedLayer:
    """A loaded layer with the base's weights.

    Several models run through it as one batch: the layer computes what the base does, and hooks on its linear layers
    and its experts add, for the tokens of a row's mask, what its own weights give more.
    """

    def __init__(self, streamed: StreamedModel, index: int, changes: TypeChanges) -> None:
        """Put the base's weights in place; they go when the layer is freed."""
        self._layer = streamed.layers[index]
        self._changes = changes
        linears = streamed.recorded_linears()
        self._linears: dict[str, Any] = {
            tensor.name: linears[str(tensor.activation)] for tensor in streamed.layer_tensors(index, Role.DENSE)
        }
        self._projections = {str(t.projection): t.name for t in streamed.layer_tensors(index, Role.EXPERT)}
        self._experts: Any = streamed.experts_module(index) if self._projections else None
        for (name, expert), change in changes.base.items():
            weight = self._linears[name].weight if name in self._linears else self._expert_weights(expert)[name]
            weight += change

    def __call__(self, hidden: Tensor, options: Mapping[str, Any], rows: Sequence[VariantRow | None]) -> Tensor:
        """Outputs (R, S, H) of inputs (R, S, H), one row per model, None for one as the base.

        Args:
            options: of the layer's call, as for a batch of one.
        """
        with self._differing(rows):
            # Not the module itself: its own hooks belong to the full-precision forwards.
            output: Tensor = self._layer.forward(hidden, **options)
        return output

    @contextmanager
    def _differing(self, rows: Sequence[VariantRow | None]) -> Iterator[None]:
        differing = [(number, row.variant, row.mask) for number, row in enumerate(rows) if row is not None]

        def add_to_linear(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                x, result = (one.view(len(rows), -1, one.shape[-1]) for one in (arguments[0], output))
                for number, variant, mask in differing:
                    change = self._changes.of(variant, name)
                    if change is not None:
                        added = linear(x[number, mask].float(), change)
                        result[number, mask] += added.to(output.dtype)

            return hook

        def add_to_experts(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            by_row = [argument.view(len(rows), -1, argument.shape[-1]) for argument in (*arguments, output)]
            for number, variant, mask in differing:
                x, index, weight, result = (part[number] for part in by_row)
                self._add_experts(variant, mask, x, index, weight, result)

        with ExitStack() as hooks:
            for name, module in self._linears.items():
                hooks.enter_context(module.register_forward_hook(add_to_linear(name)))
            if self._experts is not None:
                hooks.enter_context(self._experts.register_forward_hook(add_to_experts))
            yield

    def _add_experts(
        self, variant: Variant, mask: Tensor, x: Tensor, index: Tensor, weight: Tensor, result: Tensor
    ) -> None:
        """Add to `result` (S, H) the variant's experts' outputs less the base's."""
        for expert in range(self._experts.num_experts):
            differing = {
                projection: change
                for projection, name in self._projections.items()
                if (change := self._changes.of(variant, name, expert)) is not None
            }
            token, slot = torch.where((index == expert) & mask[:, None])
            if not differing or not len(token):
                continue
            gate_up, down = self._experts.gate_up_proj[expert].float(), self._experts.down_proj[expert].float()
            before = linear(x[token].float(), gate_up)
            hidden = self._experts._apply_gate(before)
            moved = linear(hidden, differing["down"]) if "down" in differing else 0.0
            if differing.keys() - {"down"}:
                after = before.clone()
                for projection, change in differing.items():
                    if projection != "down":
                        after[:, rows_of(projection, len(gate_up))] += linear(x[token].float(), change)
                new_hidden = self._experts._apply_gate(after)
                moved = linear(new_hidden, down + differing.get("down", 0.0)) - linear(hidden, down)
            result.index_add_(0, token, (moved * weight[token, slot, None]).to(result.dtype))

    def _expert_weights(self, expert: int) -> dict[str, Tensor]:
        """Views of one expert's matrices, by tensor name."""
        gate_up, down = self._experts.gate_up_proj[expert], self._experts.down_proj[expert]
        return {
            name: down if projection == "down" else gate_up[rows_of(projection, len(gate_up))]
            for projection, name in self._projections.items()
        }
