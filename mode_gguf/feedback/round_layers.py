"""The rounding stage with error feedback: a layer-by-layer forward, every layer packed as the samples leave it.

A layer's inputs are only known when all samples have passed the layer, and second moments of all experts
would fill the memory (2.4 GB a layer at 30B). So the inputs of the experts are kept, which take a fraction of that, and
the moments are formed expert by expert. Dense matrices add theirs up sample by sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from mode_gguf.architectures.tensors import Array, Role, SourceTensor
from mode_gguf.feedback.rounded_tensors import OUTSIDE_LAYERS, RoundedTensors, is_rounded, layer_part, part_of
from mode_gguf.feedback.second_moments import DAMPING, DOWN_DAMPING, MIN_TOKENS, Moments, feedback_of, with_shared
from mode_gguf.forward.hooks import ExpertsCall, SampleTrace
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.recorded_forward import LayerConsumer, run_recorded
from mode_gguf.forward.streaming import StreamedModel
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.token_weights import experts_entry
from mode_gguf.options import ComputeOptions, Packing
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.expert_groups import ExpertTypes, stored_tensors, stored_types
from mode_gguf.quantization.packer import matrix_name, pack_by_rows, read_matrix
from mode_gguf.quantization.types import QuantType
from mode_gguf_kernels import Feedback


@dataclass(frozen=True, slots=True)
class RoundingSettings:
    """Settings of rounding with feedback.

    Attributes:
        types: of all tensors, by GGUF name; those without feedback are left to the export.
        experts: types of single experts, where they differ within a tensor.
        importance: of the search for scales, as for packing to nearest.
        packing: how.
        token_weights: weights of tokens, float32 (N,), see `TokenWeights`; empty for all alike.
        threads: that pack.
        hidden_bytes: memory for hidden states; see `calibrate`.
    """

    types: Mapping[str, QuantType]
    importance: Importance
    packing: Packing
    token_weights: Mapping[str, np.ndarray]
    experts: ExpertTypes = field(default_factory=dict)
    threads: int = 1
    hidden_bytes: int = ComputeOptions.hidden_memory


def round_tensors(
    streamed: StreamedModel,
    inputs: Sequence[ModelInputs],
    settings: RoundingSettings,
    rounded: RoundedTensors,
    progress: Progress = silent,
) -> None:
    """Write the parts of `rounded` that are missing.

    Raises:
        InputError: model, sample or weight cannot be used.
    """
    rounder = _LayerRounder(streamed, inputs, settings, rounded)
    if not rounder.is_needed:
        return
    run_recorded(
        streamed,
        inputs,
        LayerConsumer(leave=rounder.collect, finish=rounder.finish, keep_hidden=False),
        hidden_bytes=settings.hidden_bytes,
        description="rounding",
        progress=progress,
    )


class _LayerRounder:
    """The layer's collected inputs and moments, and the rounding of its matrices."""

    def __init__(
        self,
        streamed: StreamedModel,
        inputs: Sequence[ModelInputs],
        settings: RoundingSettings,
        rounded: RoundedTensors,
    ) -> None:
        self._streamed, self._settings, self._rounded = streamed, settings, rounded
        self._stored = stored_tensors(streamed.tensors, settings.experts)
        self._types = stored_types(settings.types, settings.experts)
        chosen = [tensor for tensor in self._stored.tensors if is_rounded(tensor, self._types)]
        self._tensors = {
            part: tensors
            for part in dict.fromkeys(map(part_of, chosen))
            if (tensors := [tensor for tensor in chosen if part_of(tensor) == part]) and not rounded.has(part)
        }
        ends = np.cumsum([len(one.input_ids) for one in inputs])
        self._tokens = {id(one): slice(end - len(one.input_ids), end) for one, end in zip(inputs, ends, strict=True)}
        self._moments: dict[str, Moments] = {}
        self._routed: list[tuple[ExpertsCall, Tensor]] = []

    @property
    def is_needed(self) -> bool:
        return bool(self._tensors)

    def collect(self, trace: SampleTrace, layer: int) -> None:
        """Collect one sample's inputs of a layer's matrices; of the head's, too, after the last layer."""
        for part in self._parts_after(layer):
            for tensor in self._tensors[part]:
                if tensor.role is not Role.EXPERT:
                    call = trace.linears[str(tensor.activation)]
                    if tensor.name not in self._moments:
                        self._moments[tensor.name] = Moments(tensor.row_width, self._streamed.device)
                    self._moments[tensor.name].add(call.input, self._weights(tensor.name, trace))
        if layer_part(layer) in self._tensors and trace.experts is not None:
            self._routed.append((trace.experts, self._weights(experts_entry(layer), trace)))

    def finish(self, layer: int) -> None:
        """Round the layer that all samples have left, while its weights are loaded."""
        for part in self._parts_after(layer):
            packed: dict[str, np.ndarray] = {}
            nearest: dict[str, int] = {}
            experts = [tensor for tensor in self._tensors[part] if tensor.role is Role.EXPERT]
            for tensor in self._tensors[part]:
                if tensor.role is not Role.EXPERT:
                    feedback = _feedback(self._moments.pop(tensor.name))
                    matrix = read_matrix(tensor, 0)
                    nearest[tensor.name] = _is_nearest(matrix, feedback)
                    packed[tensor.name] = self._pack(matrix, tensor, 0, feedback)[None]
            if experts:
                self._round_experts(self._streamed.experts_module(layer), experts, packed, nearest)
            self._rounded.write(part, packed, nearest)
        self._routed.clear()

    def _parts_after(self, layer: int) -> list[str]:
        parts = [layer_part(layer)]
        if layer == len(self._streamed.layers) - 1:
            parts.append(OUTSIDE_LAYERS)
        return [part for part in parts if part in self._tensors]

    def _weights(self, name: str, trace: SampleTrace) -> Tensor:
        """Weights of a sample's tokens at a matrix's output."""
        tokens = self._tokens[id(trace.inputs)]
        weights = self._settings.token_weights.get(name)
        if weights is None:
            return torch.ones(tokens.stop - tokens.start)
        return torch.from_numpy(weights[tokens])

    def _round_experts(
        self,
        module: Any,
        experts: Sequence[SourceTensor],
        packed: dict[str, np.ndarray],
        nearest: dict[str, int],
    ) -> None:
        """Round the experts of one layer, one after the other."""
        device = self._streamed.device
        matrices_of: dict[int, list[tuple[SourceTensor, int]]] = {}
        for tensor in experts:
            for position, expert in enumerate(self._stored.experts_of(tensor)):
                matrices_of.setdefault(expert, []).append((tensor, position))
        inputs = torch.cat([call.input for call, _ in self._routed])
        index = torch.cat([call.index for call, _ in self._routed])
        routing = torch.cat([call.weight for call, _ in self._routed]).float()
        at_block = torch.cat([weights for _, weights in self._routed]).to(device)
        shared = Moments(inputs.shape[1], device)
        shared.add(inputs, at_block)
        for expert, matrices in sorted(matrices_of.items()):
            token, slot = torch.where(index == expert)
            # With weights at the block's output, an error at an expert's counts by its squared share in it.
            weight = at_block[token]
            if self._settings.token_weights:
                weight = weight * routing[token, slot].square()
            read = inputs[token]
            before = Moments(inputs.shape[1], device)
            before.add(read, weight)
            hidden = module._apply_gate(linear(read, module.gate_up_proj[expert]))
            after = Moments(hidden.shape[1], device)
            after.add(hidden, weight)
            at_hidden, at_input = _feedback(after, damping=DOWN_DAMPING), _feedback(before, shared)
            for tensor, position in matrices:
                chosen = at_hidden if tensor.projection == "down" else at_input
                original = read_matrix(tensor, position)
                nearest[tensor.name] = nearest.get(tensor.name, 0) + _is_nearest(original, chosen)
                matrix = self._pack(original, tensor, position, chosen)
                if tensor.name not in packed:
                    packed[tensor.name] = np.empty((tensor.n_experts, *matrix.shape), np.uint8)
                packed[tensor.name][position] = matrix

    def _pack(self, matrix: Array, tensor: SourceTensor, index: int, feedback: Feedback | None) -> np.ndarray:
        importance = self._stored.rows_of(tensor.name, self._settings.importance)
        return pack_by_rows(
            matrix,
            self._types[tensor.name],
            None if importance is None else importance[index],
            name=matrix_name(tensor, index),
            packing=self._settings.packing,
            threads=self._settings.threads,
            feedback=feedback,
        )


def _is_nearest(matrix: Array, feedback: Feedback | None) -> int:
    """1 for a matrix that is rounded for want of tokens; 0 with feedback, and for zeros, which need no rounding."""
    return int(feedback is None and bool(matrix.any()))


def _feedback(moments: Moments, shared: Moments | None = None, damping: float = DAMPING) -> Feedback | None:
    """Feedback of a matrix's moments; None where there were too few tokens, or their inputs were zeros."""
    if moments.effective_tokens < MIN_TOKENS or not moments.is_informative:
        return None
    sums = moments.sums if shared is None else with_shared(moments.sums, shared.sums)
    return feedback_of(sums, damping)
