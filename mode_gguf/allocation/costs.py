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
    """One unit per tensor that has a choice; tensors with a single possible type are not units."""
    units = []
    for tensor in tensors:
        offered = types.of(tensor)
        if tensor.role is Role.KEEP:
            continue
        costs = _tensor_costs(tensor, measured, model)
        axis = measured.expert_types if tensor.role is Role.EXPERT else measured.dense_types
        candidates = tuple(
            Candidate(offer, tensor_bytes(tensor, offer), _cost(costs, axis, offer, tensor.name)) for offer in offered
        )
        units.append(AllocationUnit(tensor.name, (tensor.name,), tensor.n_weights, candidates, tensor.layer))
    return units


def expert_units(
    tensors: Sequence[SourceTensor], types: CandidateTypes, measured: Measurements, model: CostModel
) -> list[AllocationUnit]:
    """One unit per (layer, expert), its projections tied; other tensors as in `tensor_units`."""
    units = tensor_units([t for t in tensors if t.role is not Role.EXPERT], types, measured, model)
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    for layer in sorted({tensor.layer for tensor in experts if tensor.layer is not None}):
        projections = [tensor for tensor in experts if tensor.layer == layer]
        # Types must suit all projections; a width that fits none of them falls back as a tensor would.
        common = set.intersection(*(set(types.of(tensor)) for tensor in projections)) or set(
            types.of(max(projections, key=lambda tensor: len(types.of(tensor))))
        )
        offered = sorted(common, key=lambda quant_type: quant_type.bits_per_weight)
        per_expert = _weighted(measured.arrays[f"blk.{layer}.ffn_exps.expert"], model, _share(measured, model, layer))
        for expert, costs in enumerate(per_expert):
            candidates = tuple(
                Candidate(
                    offer,
                    sum(tensor_bytes(tensor, offer) // tensor.n_experts for tensor in projections),
                    _cost(costs, measured.expert_types, offer, f"blk.{layer} expert {expert}"),
                )
                for offer in offered
            )
            names = tuple(tensor.name for tensor in projections)
            n_weights = sum(tensor.n_weights // tensor.n_experts for tensor in projections)
            units.append(AllocationUnit(f"blk.{layer}.expert.{expert}", names, n_weights, candidates, layer, expert))
    return units


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


def _cost(costs: np.ndarray, axis: Sequence[str], offer: QuantType, name: str) -> float:
    if offer.name not in axis:
        raise InputError(
            f"sensitivity: {name} was not measured at {offer.name}, only at {', '.join(axis)}; measure it again"
        )
    return float(max(costs[axis.index(offer.name)], 0.0))
