"""The paper's own recipe (MODE's `expert_mse`): mean squared error of an expert's output on its full-precision inputs.

One forward, layer by layer. Errors are averaged over an expert's tokens of a modality and over features, without
routing weights; answers are not told apart (A = 1). A whole expert tensor's value is the sum over experts of frequency
times error, which is MODE's step 3 objective; any other matrix's value is the mean squared error of its output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.calibration.calibrate import run_watched
from mode_gguf.calibration.inputs import ModelInputs
from mode_gguf.calibration.streaming import StreamedModel
from mode_gguf.calibration.watch import TEXT, Pass
from mode_gguf.importance.groups import N_MODALITIES, group_sums
from mode_gguf.importance.measurement import Measurement, MeasurementSettings
from mode_gguf.importance.unseen import fill_unseen, unseen_experts
from mode_gguf.importance.weight_changes import PARTS, change_of_weights, expert_changes
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.libggml import is_storable


@dataclass(slots=True)
class _LayerInputs:
    """One layer's inputs on the samples so far; modality is the group, as if every answer were one kind."""

    modality: list[Tensor] = field(default_factory=list)
    linears: dict[str, list[Tensor]] = field(default_factory=dict)
    experts: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def expert_mse(
    streamed: StreamedModel, inputs: Sequence[ModelInputs], settings: MeasurementSettings, progress: Progress = silent
) -> Measurement:
    """Mean squared output error of every expert, matrix and the embedding, at every candidate type."""
    result = Measurement({}, (sum(len(one.input_ids) for one in inputs),), {})
    last = len(streamed.layers) - 1
    seen = _LayerInputs()

    def leave(passed: Pass, layer: int) -> None:
        seen.modality.append(passed.modality)
        for name, call in passed.linears.items():
            seen.linears.setdefault(name, []).append(call.input[0])
        if passed.experts is not None:
            seen.experts.append((passed.experts.input, passed.experts.index))

    def finish(layer: int) -> None:
        nonlocal seen
        modality = torch.cat(seen.modality)
        dense = streamed.layer_tensors(layer, Role.DENSE)
        if layer == last:
            dense += [tensor for tensor in streamed.tensors if tensor.role is Role.OUTPUT]
        for tensor in dense:
            x = torch.cat(seen.linears[str(tensor.activation)])
            result.arrays[f"{tensor.name}.unit"] = _matrix_error(streamed, tensor, x, modality, settings)
        if seen.experts:
            x = torch.cat([part for part, _ in seen.experts])
            index = torch.cat([part for _, part in seen.experts])
            _measure_experts(streamed, layer, x, index, modality, settings, result)
        seen = _LayerInputs()

    run_watched(
        streamed,
        inputs,
        key_ratio=settings.key_ratio,
        leave=leave,
        finish=finish,
        description="sensitivity",
        progress=progress,
    )
    for tensor in streamed.tensors:
        if tensor.role is Role.EMBEDDING:
            result.arrays[f"{tensor.name}.unit"] = _embedding_error(streamed, tensor, inputs, settings)
    return result


def _matrix_error(
    streamed: StreamedModel, tensor: SourceTensor, x: Tensor, modality: Tensor, settings: MeasurementSettings
) -> np.ndarray:
    """Mean squared error of a linear layer's output, (1, M, T)."""
    error = np.full((1, N_MODALITIES, len(settings.dense_types)), np.nan)
    for t, quant_type in enumerate(settings.dense_types):
        if is_storable(tensor, quant_type):
            change = change_of_weights(tensor, 0, quant_type, settings.importance, settings.packing, streamed.device)
            error[0, :, t] = _means(linear(x.float(), change).square().mean(-1), modality)
    return error


def _embedding_error(
    streamed: StreamedModel, tensor: SourceTensor, inputs: Sequence[ModelInputs], settings: MeasurementSettings
) -> np.ndarray:
    """Mean squared error of the embeddings of all text tokens, (1, M, T)."""
    ids = torch.cat([one.input_ids[~one.is_vision] for one in inputs]).to(streamed.device)
    error = np.full((1, N_MODALITIES, len(settings.dense_types)), np.nan)
    for t, quant_type in enumerate(settings.dense_types):
        if is_storable(tensor, quant_type):
            change = change_of_weights(tensor, 0, quant_type, settings.importance, settings.packing, streamed.device)
            error[0, :, t] = _means(change.square().mean(-1)[ids], torch.full_like(ids, TEXT))
    return error


def _measure_experts(
    streamed: StreamedModel,
    layer: int,
    inputs: Tensor,
    index: Tensor,
    modality: Tensor,
    settings: MeasurementSettings,
    result: Measurement,
) -> None:
    projections = {str(t.projection): t for t in streamed.layer_tensors(layer, Role.EXPERT)}
    module = streamed.experts_module(layer)
    n_experts, n_types = module.num_experts, len(settings.expert_types)
    error = {part: np.full((1, N_MODALITIES, n_experts, n_types), np.nan) for part in PARTS}
    weight_error = {part: np.full((n_experts, n_types), np.nan) for part in PARTS}
    for change in expert_changes(
        streamed, module, projections, settings.expert_types, settings.importance, settings.packing, inputs, index
    ):
        means = _means(change.output.square().mean(-1), modality[change.token])
        error[change.part][0, :, change.expert, change.type_index] = means
        weight_error[change.part][change.expert, change.type_index] = change.weight_error
    counts = np.stack([_counts(modality[(index == expert).any(-1)]) for expert in range(n_experts)], axis=-1)[None]
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    for part in PARTS:
        filled = fill_unseen(error[part], counts, weight_error[part], summed=False)
        name = projections[part].name if part in projections else f"blk.{layer}.ffn_exps"
        result.arrays[f"{name}.expert"] = filled
        if part in projections:
            result.arrays[f"{name}.unit"] = (share[..., None] * filled).sum(axis=2)
    result.estimated.update(unseen_experts(layer, counts, answers=("any",)))


def _counts(modality: Tensor) -> np.ndarray:
    return np.bincount(modality.cpu().numpy(), minlength=N_MODALITIES)


def _means(values: Tensor, modality: Tensor) -> np.ndarray:
    """Mean of `values` (n,) per modality, float64 (M,); zero for one without tokens."""
    means: np.ndarray = group_sums(values, modality)[0] / np.maximum(_counts(modality), 1)
    return means
