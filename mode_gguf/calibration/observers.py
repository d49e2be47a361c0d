"""The observer that adds up calibration's sums from the records of each decoder layer."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.calibration.statistics import EXPERTS_HIDDEN, EXPERTS_INPUT
from mode_gguf.forward.hooks import ExpertsCall, SampleTrace
from mode_gguf.forward.modality import MODALITIES

N_MODALITIES = len(MODALITIES)


class Observer:
    """Adds up counts, routing weights and sums of squares (float64) over samples, per modality and expert.

    Sums of the current layer lie on the model's device; `finish_layer` moves them to `arrays`.
    """

    def __init__(self, tensors: Sequence[SourceTensor], device: torch.device) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._experts = {tensor.layer: tensor.n_experts for tensor in tensors if tensor.role is Role.EXPERT}

    def observe(self, trace: SampleTrace, layer: int) -> None:
        """Add one sample's records of one decoder layer (the last one's includes the output head)."""
        for activation, call in trace.linears.items():
            self._add_squares(activation, trace.modality, call.input.double().square(), groups=1)
        if trace.experts is not None:
            self._add_experts(trace.experts, trace.modality, layer)

    def finish_layer(self) -> dict[str, np.ndarray]:
        """Move the sums to `arrays`; returns those of the layer, in the order in which its activations were read."""
        finished = {name: tensor.cpu().numpy() for name, tensor in self._sums.items()}
        self.arrays |= finished
        self._sums.clear()
        return finished

    def _add_experts(self, call: ExpertsCall, modality: Tensor, layer: int) -> None:
        n_experts, squares = self._experts[layer], call.input.double().square()
        for slot in range(call.index.shape[1]):
            group = modality * n_experts + call.index[:, slot]
            self._add_squares(EXPERTS_INPUT.format(layer=layer), group, squares, groups=n_experts)
            weight = call.weight[:, slot].double()
            for name, value in (("weight", weight), ("weight2", weight.square())):
                total = self._sum(f"blk.{layer}.ffn_exps.{name}", (N_MODALITIES, n_experts))
                total.view(-1).index_add_(0, group, value)
        for expert, token, hidden in call.hidden:
            group = modality[token] * n_experts + expert
            self._add_squares(EXPERTS_HIDDEN.format(layer=layer), group, hidden.double().square(), groups=n_experts)

    def _add_squares(self, activation: str, group: Tensor, squares: Tensor, *, groups: int) -> None:
        """Add `squares` (S, n) float64 and counts to group `modality * groups + expert` of each token."""
        width = squares.shape[1]
        sums = self._sum(f"{activation}.sum2", (N_MODALITIES, groups, width))
        sums.view(-1, width).index_add_(0, group, squares)
        counts = self._sum(f"{activation}.count", (N_MODALITIES, groups), torch.int64)
        counts.view(-1).add_(torch.bincount(group, minlength=counts.numel()))

    def _sum(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._sums[name]


def unobserved_activations(arrays: Mapping[str, np.ndarray], tensors: Sequence[SourceTensor]) -> list[str]:
    """Activations of `tensors` that no token reached; an empty list means that every one was recorded."""
    expected = {tensor.activation for tensor in tensors if tensor.activation is not None}
    return sorted(
        activation
        for activation in expected
        if f"{activation}.count" not in arrays or not arrays[f"{activation}.count"].any()
    )
