"""Sensitivity as squared error of outputs on full-precision inputs, in one forward, layer by layer.

`expert-mse` is the paper's own recipe (MODE's `expert_mse`): errors of an expert's output, averaged over its tokens of
a modality and over features, without routing weights. A whole expert tensor's value is the sum over experts;
frequency comes in with the costs (MODE step 3).

`block-mse` is the error of the MoE block's output: errors are multiplied by the routing weight
before they are squared, summed over the tokens routed to an expert, and divided by all tokens of the modality in the
layer, so that frequency and routing weight are inside the sum (nothing is counted twice). For a whole expert tensor the
weighed errors of a token's experts are added before they are squared.

Any other matrix's value is the mean squared error of its output. Neither tells answer types apart (A = 1).

Several processes each take their share of the samples; sums and tokens are added before one is divided by the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.forward.distributed import gathered, sum_over_ranks
from mode_gguf.forward.hooks import SampleTrace
from mode_gguf.forward.inputs import ModelInputs
from mode_gguf.forward.modality import TEXT
from mode_gguf.forward.recorded_forward import LayerConsumer, run_recorded
from mode_gguf.forward.streaming import StreamedModel
from mode_gguf.importance.group_sums import N_MODALITIES, group_sums
from mode_gguf.importance.sensitivity_settings import SensitivityResult, SensitivitySettings
from mode_gguf.importance.unrouted_experts import fill_unrouted, unrouted_experts
from mode_gguf.importance.weight_errors import expert_changes, matrix_changes, parts_of
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.fallback_types import stored_as


@dataclass(slots=True)
class _LayerInputs:
    """One layer's inputs on the samples so far; modality is the group, as there is one answer type."""

    modality: list[Tensor] = field(default_factory=list)
    linears: dict[str, list[Tensor]] = field(default_factory=dict)
    experts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Routed:
    """A layer's routed tokens of all samples: inputs (N, H), index and weight (N, k), modality (N,)."""

    inputs: Tensor
    index: Tensor
    weight: Tensor
    modality: Tensor


def expert_mse(
    streamed: StreamedModel, inputs: Sequence[ModelInputs], settings: SensitivitySettings, progress: Progress = silent
) -> SensitivityResult:
    """Mean squared output error of every expert, matrix and the embedding, at every candidate type."""
    return _output_error(streamed, inputs, settings, progress, of_block=False)


def block_mse(
    streamed: StreamedModel, inputs: Sequence[ModelInputs], settings: SensitivitySettings, progress: Progress = silent
) -> SensitivityResult:
    """Mean squared error like `expert_mse`, but for experts their share of the MoE block's error."""
    return _output_error(streamed, inputs, settings, progress, of_block=True)


def _output_error(
    streamed: StreamedModel,
    inputs: Sequence[ModelInputs],
    settings: SensitivitySettings,
    progress: Progress,
    *,
    of_block: bool,
) -> SensitivityResult:
    result = SensitivityResult({}, (sum(gathered(sum(len(one.input_ids) for one in inputs))),), {})
    last = len(streamed.layers) - 1
    layer_inputs = _LayerInputs()

    def leave(trace: SampleTrace, layer: int) -> None:
        layer_inputs.modality.append(trace.modality)
        for name, call in trace.linears.items():
            layer_inputs.linears.setdefault(name, []).append(call.input)
        if trace.experts is not None:
            layer_inputs.experts.append((trace.experts.input, trace.experts.index, trace.experts.weight))

    def finish(layer: int) -> None:
        nonlocal layer_inputs
        modality = torch.cat(layer_inputs.modality)
        dense = [tensor for tensor in streamed.layer_tensors(layer, Role.DENSE) if tensor.activation]
        if layer == last:
            dense += [tensor for tensor in streamed.tensors if tensor.role is Role.OUTPUT and tensor.activation]
        for tensor in dense:
            x = torch.cat(layer_inputs.linears[str(tensor.activation)])
            result.arrays[f"{tensor.name}.unit"] = _matrix_error(streamed, tensor, x, modality, settings, result)
        if layer_inputs.experts:
            x, index, weight = (torch.cat(parts) for parts in zip(*layer_inputs.experts, strict=True))
            routed = _Routed(x, index, weight, modality)
            _measure_experts(streamed, layer, routed, settings, result, of_block=of_block)
        layer_inputs = _LayerInputs()

    run_recorded(
        streamed,
        inputs,
        LayerConsumer(key_tokens=settings.key_tokens, leave=leave, finish=finish),
        hidden_bytes=settings.hidden_bytes,
        description="sensitivity",
        progress=progress,
    )
    for tensor in streamed.tensors:
        if tensor.role is Role.EMBEDDING:
            result.arrays[f"{tensor.name}.unit"] = _embedding_error(streamed, tensor, inputs, settings, result)
    return result


def _matrix_error(
    streamed: StreamedModel,
    tensor: SourceTensor,
    x: Tensor,
    modality: Tensor,
    settings: SensitivitySettings,
    result: SensitivityResult,
) -> np.ndarray:
    """Mean squared error of a linear layer's output, (1, M, T)."""
    error = np.full((1, N_MODALITIES, len(settings.request.dense_types)), np.nan)
    for t, change in matrix_changes(tensor, settings, settings.importance, result, streamed.device):
        error[0, :, t] = _sums(linear(x.float(), change).square().mean(-1), modality)
    return _means(error, _counts(modality))


def _embedding_error(
    streamed: StreamedModel,
    tensor: SourceTensor,
    inputs: Sequence[ModelInputs],
    settings: SensitivitySettings,
    result: SensitivityResult,
) -> np.ndarray:
    """Mean squared error of the embeddings of all text tokens, (1, M, T)."""
    ids = torch.cat([one.input_ids[~one.is_vision] for one in inputs]).to(streamed.device)
    modality = torch.full_like(ids, TEXT)
    error = np.full((1, N_MODALITIES, len(settings.request.dense_types)), np.nan)
    for t, change in matrix_changes(tensor, settings, settings.importance, result, streamed.device):
        error[0, :, t] = _sums((streamed.embedding_scale * change).square().mean(-1)[ids], modality)
    return _means(error, _counts(modality))


def _measure_experts(
    streamed: StreamedModel,
    layer: int,
    routed: _Routed,
    settings: SensitivitySettings,
    result: SensitivityResult,
    *,
    of_block: bool,
) -> None:
    projections = {str(t.projection): t for t in streamed.layer_tensors(layer, Role.EXPERT)}
    module = streamed.experts_module(layer)
    n_experts, n_types = module.num_experts, len(settings.request.expert_types)
    counts = np.stack(
        [_counts(routed.modality[(routed.index == expert).any(-1)]) for expert in range(n_experts)], axis=-1
    )[None]
    tokens = _counts(routed.modality)
    error = {part: np.full((1, N_MODALITIES, n_experts, n_types), np.nan) for part in parts_of(projections)}
    unit = {part: np.full((1, N_MODALITIES, n_types), np.nan) for part in projections}
    weight_error = {part: np.full((n_experts, n_types), np.nan) for part in parts_of(projections)}
    for t, quant_type in enumerate(settings.request.expert_types):  # one at a time: a block's change takes N x H values
        block = {
            part: torch.zeros_like(routed.inputs, dtype=torch.float32)
            for part, tensor in projections.items()
            if of_block and stored_as(tensor, quant_type) is not None
        }
        for change in expert_changes(
            streamed,
            module,
            projections,
            (quant_type,),
            settings.importance,
            settings.request.packing,
            routed.inputs,
            routed.index,
        ):
            output, modality = change.output, routed.modality[change.token]
            if of_block:
                output = output * routed.weight[change.token, change.slot, None].float()
            if change.part in block:
                block[change.part].index_add_(0, change.token, output)
            error[change.part][0, :, change.expert, t] = _sums(output.square().mean(-1), modality)
            weight_error[change.part][change.expert, t] = change.weight_error
        for part, total in block.items():
            unit[part][0, :, t] = _sums(total.square().mean(-1), routed.modality)
    routed_counts = sum_over_ranks({"": counts})[""]
    for part in parts_of(projections):
        mean = _means(error[part], tokens[:, None] if of_block else counts)
        filled = fill_unrouted(mean, routed_counts, weight_error[part], summed=of_block)
        name = projections[part].name if part in projections else f"blk.{layer}.ffn_exps"
        result.arrays[f"{name}.expert"] = filled
        result.arrays[f"{name}.weight_error"] = weight_error[part]
        if part in projections:
            result.arrays[f"{name}.unit"] = _means(unit[part], tokens) if of_block else filled.sum(axis=2)
    result.estimated.update(unrouted_experts(layer, routed_counts, answers=("any",)))


def _counts(modality: Tensor) -> np.ndarray:
    return np.bincount(modality.cpu().numpy(), minlength=N_MODALITIES)


def _sums(values: Tensor, modality: Tensor) -> np.ndarray:
    """Sum of `values` (n,) per modality, float64 (M,)."""
    sums: np.ndarray = group_sums(values, modality)[0]
    return sums


def _means(sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Means per token of all processes' `sums` (..., T), zero where there are none; `tokens` is of shape (...)."""
    total = sum_over_ranks({"sums": sums, "tokens": tokens})
    means: np.ndarray = total["sums"] / np.maximum(total["tokens"], 1)[..., None]
    return means
