"""From what was measured to what the programme minimises: the cost of every unit at every candidate type.

Fisher sensitivity is already a KL divergence, summed over the tokens each expert really serves, so it is used as it
is. The paper's recipe multiplies the mean squared error of an expert's output by the frequency of its use (MODE
equation 4), both per modality.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mode_gguf.allocation.units import AllocationUnit, Candidate, CandidateTypes, tensor_bytes
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InputError
from mode_gguf.quantization.types import QuantType


@dataclass(frozen=True, slots=True)
class CostModel:
    """How a sensitivity table becomes costs.

    Attributes:
        answer_weights: importance of text answers and of image answers.
        modality_weights: importance of text, key vision and redundant vision tokens.
        by_frequency: multiply an expert's sensitivity by its share of the modality's routed tokens in the layer.
    """

    answer_weights: tuple[float, float] = (1.0, 1.0)
    modality_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    by_frequency: bool = False


@dataclass(frozen=True, slots=True)
class Measurements:
    """The sensitivity arrays (docs/DESIGN.md), the types their last axis stands for, and expert use per layer.

    `frequency[layer]` is (M, E), each modality's row summing to one.
    """

    arrays: Mapping[str, np.ndarray]
    expert_types: tuple[str, ...]
    dense_types: tuple[str, ...]
    frequency: Mapping[int, np.ndarray]


def tensor_units(
    tensors: Sequence[SourceTensor], types: CandidateTypes, measured: Measurements, model: CostModel
) -> list[AllocationUnit]:
    """One unit per tensor of the text model but those that always stay F32."""
    units = []
    for tensor in tensors:
        if tensor.role is Role.KEEP:
            continue
        offered = types.of(tensor)
        axis = measured.expert_types if tensor.role is Role.EXPERT else measured.dense_types
        costs = _offered(_tensor_costs(tensor, measured, model), axis, offered, tensor.name)
        candidates = tuple(
            Candidate(offer, tensor_bytes(tensor, offer), cost) for offer, cost in zip(offered, costs, strict=True)
        )
        units.append(AllocationUnit(tensor.name, (tensor.name,), tensor.n_weights, candidates, tensor.layer))
    return units


def expert_units(
    tensors: Sequence[SourceTensor], types: CandidateTypes, measured: Measurements, model: CostModel
) -> list[AllocationUnit]:
    """One unit per (layer, expert), its projections tied; other tensors as in `tensor_units`.

    A projection whose rows fit no candidate keeps its fallback, whatever the others of its expert take.
    """
    units = tensor_units([tensor for tensor in tensors if tensor.role is not Role.EXPERT], types, measured, model)
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    for layer in sorted({tensor.layer for tensor in experts if tensor.layer is not None}):
        projections = [tensor for tensor in experts if tensor.layer == layer]
        free = [tensor for tensor in projections if len(types.of(tensor)) > 1]
        shared = set.intersection(*(set(types.of(tensor)) for tensor in free or projections))
        offered = sorted(shared, key=lambda quant_type: quant_type.bits_per_weight)
        costs = _expert_costs(layer, projections, free, measured, model)
        for expert in range(projections[0].n_experts):
            name = f"blk.{layer}.expert.{expert}"
            choices = zip(offered, _offered(costs[expert], measured.expert_types, offered, name), strict=True)
            candidates = tuple(
                Candidate(offer, sum(_expert_bytes(tensor, offer, types) for tensor in projections), cost)
                for offer, cost in choices
            )
            tensor_names = tuple(tensor.name for tensor in projections)
            n_weights = sum(tensor.n_weights // tensor.n_experts for tensor in projections)
            units.append(AllocationUnit(name, tensor_names, n_weights, candidates, layer, expert))
    return units


def _expert_bytes(tensor: SourceTensor, offer: QuantType, types: CandidateTypes) -> int:
    offered = types.of(tensor)
    return tensor_bytes(tensor, offer if offer in offered else offered[0]) // tensor.n_experts


def _expert_costs(
    layer: int,
    projections: Sequence[SourceTensor],
    free: Sequence[SourceTensor],
    measured: Measurements,
    model: CostModel,
) -> np.ndarray:
    """Cost of every expert of a layer per type, (E, T): its projections measured together where all have a choice."""
    share = _share(measured, model, layer)
    if len(free) == len(projections):
        return _weighted(_array(measured, f"blk.{layer}.ffn_exps.expert"), model, share)
    parts = [_weighted(_array(measured, f"{tensor.name}.expert"), model, share) for tensor in free or projections]
    return np.asarray(np.sum(parts, axis=0))


def _tensor_costs(tensor: SourceTensor, measured: Measurements, model: CostModel) -> np.ndarray:
    """Cost of the whole tensor per type, (T,)."""
    if tensor.role is Role.EXPERT and model.by_frequency:
        share = _share(measured, model, tensor.layer)
        per_expert = _weighted(_array(measured, f"{tensor.name}.expert"), model, share)
        return np.asarray(per_expert.sum(axis=0))
    return _weighted(_array(measured, f"{tensor.name}.unit"), model, None)


def _share(measured: Measurements, model: CostModel, layer: int | None) -> np.ndarray | None:
    return measured.frequency[layer] if model.by_frequency and layer is not None else None


def _weighted(sensitivity: np.ndarray, model: CostModel, share: np.ndarray | None) -> np.ndarray:
    """Sum answers and modalities out: (A, M, T) to (T,), (A, M, E, T) to (E, T), the latter times `share` (M, E)."""
    answers = np.asarray(model.answer_weights[: sensitivity.shape[0]])
    modalities = np.asarray(model.modality_weights)
    if share is not None:
        sensitivity = sensitivity * share[None, :, :, None]
    weighted: np.ndarray = np.einsum("a,m,am...->...", answers, modalities, sensitivity)
    return weighted


def _array(measured: Measurements, name: str) -> np.ndarray:
    if name not in measured.arrays:
        raise InputError(f"sensitivity: {name} is missing; measure it again with the model and types of this plan")
    return measured.arrays[name]


def _offered(costs: np.ndarray, axis: Sequence[str], offered: Sequence[QuantType], name: str) -> list[float]:
    """Costs of the offered types; where there is no choice the cost does not matter and need not be known."""
    if len(offered) == 1:
        return [0.0]
    missing = [offer.name for offer in offered if offer.name not in axis]
    if missing:
        raise InputError(
            f"sensitivity: {name} was not measured at {', '.join(missing)}, only at {', '.join(axis)}; "
            "measure it again with these types"
        )
    return [max(float(costs[axis.index(offer.name)]), 0.0) for offer in offered]
