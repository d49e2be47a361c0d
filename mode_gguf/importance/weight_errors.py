"""Changes of weights, and of outputs through them, of a matrix stored in a candidate type.

The types are the real ones: every matrix goes through the packer with its importance, and back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from mode_gguf.architectures.experts import rows_of
from mode_gguf.architectures.tensors import SourceTensor, as_float32
from mode_gguf.forward.distributed import n_threads
from mode_gguf.forward.streaming import StreamedModel
from mode_gguf.importance.imatrix import Importance
from mode_gguf.importance.sensitivity_settings import SensitivityResult, SensitivitySettings
from mode_gguf.options import Packing
from mode_gguf.quantization.fallback_types import stored_as
from mode_gguf.quantization.ordered_parallel import ordered_parallel
from mode_gguf.quantization.packer import pack_matrix, unpack_matrix
from mode_gguf.quantization.types import QuantType

QuantizedPart: TypeAlias = str
"""Quantized part of an expert: one projection, or `expert` for all of them."""
WHOLE_EXPERT: QuantizedPart = "expert"


@dataclass(frozen=True, slots=True)
class ExpertChange:
    """One expert at one candidate type.

    Attributes:
        expert: its number in the layer.
        part: which of its projections are quantized.
        type_index: of the candidate type.
        token: (n,) positions among the tokens whose change is given.
        slot: (n,) which of their top-k choices the expert was.
        output: (n, H) change of the expert's output, before the routing weight.
        weight_error: sum of squared changes of its weights, each relative to its matrix's sum of squares.
    """

    expert: int
    part: QuantizedPart
    type_index: int
    token: Tensor
    slot: Tensor
    output: Tensor
    weight_error: float


def parts_of(projections: Mapping[str, SourceTensor]) -> tuple[QuantizedPart, ...]:
    """Parts of an expert that `expert_changes` quantizes."""
    return (*projections, WHOLE_EXPERT)


def change_of_weights(
    tensor: SourceTensor,
    expert: int,
    quant_type: QuantType,
    importance: Importance,
    packing: Packing,
    device: torch.device,
) -> Tensor:
    """Weights as unpacked from `quant_type` less the original ones, float32 (rows, n_in); rows must fit the type."""
    matrix = as_float32(tensor.read(expert))
    columns = importance[tensor.name][expert] if tensor.name in importance else None
    packed = pack_matrix(matrix, quant_type, columns, name=tensor.name, packing=packing)
    return torch.from_numpy(unpack_matrix(packed, quant_type, matrix.shape[1]) - matrix).to(device)


def matrix_changes(
    tensor: SourceTensor,
    settings: SensitivitySettings,
    importance: Importance,
    result: SensitivityResult,
    device: torch.device,
) -> Iterator[tuple[int, Tensor]]:
    """Changes of a matrix that is no expert, with the index of their type, at all dense types or their fallback types.

    Puts their size relative to the weights, `{tensor}.weight_error`, into the arrays of `result`.
    """
    errors = np.full((1, len(settings.request.dense_types)), np.nan)
    result.arrays[f"{tensor.name}.weight_error"] = errors
    stored = [stored_as(tensor, quant_type) for quant_type in settings.request.dense_types]
    fitting = [t for t, quant_type in enumerate(stored) if quant_type is not None]
    squares = _sum_of_squares(torch.from_numpy(as_float32(tensor.read(0)))) if fitting else 0.0
    last: tuple[QuantType, Tensor] | None = None
    for t in fitting:
        quant_type = stored[t]
        assert quant_type is not None
        if last is None or last[0] != quant_type:  # neighbouring candidates may share a fallback type
            last = quant_type, change_of_weights(tensor, 0, quant_type, importance, settings.request.packing, device)
        errors[0, t] = _relative(_sum_of_squares(last[1]), squares)
        yield t, last[1]


def _relative(error: float, squares: float) -> float:
    """Squared errors in parts of a matrix's squares; a matrix of zeros, which is stored as zeros, loses nothing."""
    return error / squares if squares > 0 else 0.0


def _sum_of_squares(matrix: Tensor) -> float:
    """Sum of squares of a matrix that may be too large for a copy in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=-1).double().square().sum())


def expert_changes(
    streamed: StreamedModel,
    module: Any,
    projections: Mapping[str, SourceTensor],
    types: Sequence[QuantType],
    importance: Importance,
    packing: Packing,
    inputs: Tensor,
    index: Tensor,
) -> Iterator[ExpertChange]:
    """The changes of all experts of a layer, at all types or their fallback types, on all tokens routed to them.

    Every matrix is packed once per type; several processes each pack all of them, for their own tokens. Experts without
    tokens are given, too, with n = 0.

    Args:
        module: transformers' experts module, loaded: gate_up_proj (E, 2I, H), down_proj (E, H, I), `_apply_gate`.
        projections: the layer's tensors by projection.
        inputs: (N, H) of the block; index: (N, k) chosen experts.
    """
    expert_weights = _packed_changes(projections, types, importance, packing, streamed.device)
    for expert, by_type in enumerate(expert_weights):
        token, slot = torch.where(index == expert)
        x = inputs[token].float()
        gate_up, down = module.gate_up_proj[expert].float(), module.down_proj[expert].float()
        before = linear(x, gate_up)
        hidden = module._apply_gate(before)
        rows = {name: rows_of(name, len(gate_up)) for name in projections if name != "down"}
        original = {name: gate_up[rows[name]] if name in rows else down for name in projections}
        squares = {name: float(weights.square().sum()) for name, weights in original.items()}
        for type_index, change in enumerate(by_type):
            error = {name: _relative(float(value.square().sum()), squares[name]) for name, value in change.items()}
            outputs: dict[QuantizedPart, Tensor] = {}
            after = before.clone()
            for name in (name for name in rows if name in change):
                alone, moved = before.clone(), linear(x, change[name])
                alone[:, rows[name]] += moved
                after[:, rows[name]] += moved
                outputs[name] = linear(module._apply_gate(alone) - hidden, down)
            if "down" in change:
                outputs["down"] = linear(hidden, change["down"])
            if change:  # projections whose rows no block fits stay as good as they are
                new_hidden = module._apply_gate(after)
                outputs[WHOLE_EXPERT] = linear(new_hidden - hidden, down)
                if "down" in change:
                    outputs[WHOLE_EXPERT] = outputs[WHOLE_EXPERT] + linear(new_hidden, change["down"])
            for part, output in outputs.items():
                total = sum(error.values()) if part == WHOLE_EXPERT else error[part]
                yield ExpertChange(expert, part, type_index, token, slot, output, total)


def _packed_changes(
    projections: Mapping[str, SourceTensor],
    types: Sequence[QuantType],
    importance: Importance,
    packing: Packing,
    device: torch.device,
) -> Iterator[list[dict[str, Tensor]]]:
    """Weight changes expert by expert, per type and projection, in the type then stored; packed on all cores."""
    n_experts = next(iter(projections.values())).n_experts
    stored = {name: [stored_as(tensor, quant_type) for quant_type in types] for name, tensor in projections.items()}

    def pack_expert(expert: int) -> list[dict[str, Tensor]]:
        changes = {
            (name, quant_type): change_of_weights(tensor, expert, quant_type, importance, packing, device)
            for name, tensor in projections.items()
            for quant_type in dict.fromkeys(stored[name])
            if quant_type is not None
        }
        return [
            {name: changes[name, quant_type] for name in projections if (quant_type := stored[name][t]) is not None}
            for t in range(len(types))
        ]

    return ordered_parallel(pack_expert, n_experts, n_threads())
