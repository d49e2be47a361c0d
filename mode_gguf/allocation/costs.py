"""From what was measured to what the programme minimises: the cost of every unit at every candidate type.

Fisher sensitivity is already a KL divergence, summed over the tokens each expert really serves, so it is used as it
is. The paper's recipe multiplies the mean squared error of an expert's output by the frequency of its use (MODE
equation 4), both per modality. The other combinations are what both are compared with.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from mode_gguf.allocation.units import AllocationUnit, Candidate, CandidateTypes, tensor_bytes
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InputError, UsageError
from mode_gguf.quantization.types import QuantType

Combination: TypeAlias = Literal["sensitivity", "product", "frequency", "pmq", "random"]
"""How an expert's cost is made of sensitivity d, frequency f and weight error (relative, squared) e, per modality:

`sensitivity`: d; `product`: f d, the paper's; `frequency`: f e; `pmq`: f w^1.5 d with w the share of routing weight,
both over all tokens alike (MC-MoE's PMQ, whose squared error is d of expert-mse); `random`: a random number times e.
"""

PMQ_WEIGHT_POWER = 1.5
"""MC-MoE's beta; its alpha is 1 and its gamma 2, the latter in the squared error."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """How a sensitivity table becomes costs.

    Attributes:
        combination: what an expert's cost is made of.
        answer_weights: importance of text answers and of image answers.
        modality_weights: importance of text, key vision and redundant vision tokens.
        pooled: frequencies count all tokens of weighted modalities alike instead of each modality by itself.
        frequency_floor: least frequency of an expert, in parts of the layer's mean; 0 for none.
        seed: of `random`.
    """

    combination: Combination = "sensitivity"
    answer_weights: tuple[float, float] = (1.0, 1.0)
    modality_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pooled: bool = False
    frequency_floor: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option, weights in (("answer", self.answer_weights), ("modality", self.modality_weights)):
            if not all(0 <= weight < np.inf for weight in weights) or not any(weights):
                raise UsageError(
                    f"{option} weights {weights} are not usable: none may be negative, one must be positive"
                )
        if not 0 <= self.frequency_floor <= 1:
            raise UsageError(
                f"frequency floor {self.frequency_floor:g} is out of range: choose a part of the mean, 0 to 1"
            )


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """How one layer's experts were used: routed tokens and sums of routing weights, both (M, E)."""

    counts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Measurements:
    """The sensitivity arrays (docs/DESIGN.md), the types their last axis stands for, and expert use by layer."""

    arrays: Mapping[str, np.ndarray]
    expert_types: tuple[str, ...]
    dense_types: tuple[str, ...]
    use: Mapping[int, ExpertUse]


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
        # Where there is no choice, nothing need have been measured.
        known = _tensor_costs(tensor, measured, model) if len(offered) > 1 else np.zeros(0)
        costs = _offered(known, axis, offered, tensor.name)
        candidates = tuple(
            Candidate(offer, tensor_bytes(tensor, offer), cost) for offer, cost in zip(offered, costs, strict=True)
        )
        is_expert = tensor.role is Role.EXPERT
        units.append(
            AllocationUnit(tensor.name, (tensor.name,), tensor.n_weights, candidates, tensor.layer, is_expert=is_expert)
        )
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
            units.append(AllocationUnit(name, tensor_names, n_weights, candidates, layer, expert, True))
    return units


def cost_of_types(
    tensors: Sequence[SourceTensor],
    chosen: Mapping[str, Sequence[QuantType]],
    measured: Measurements,
    model: CostModel,
) -> float:
    """The cost of storing tensors in these types: one per tensor, or one for each of its experts in order.

    What was not measured in any type, such as rows that fit none, costs nothing, as in planning.

    Raises:
        InputError: a tensor was measured, but not in its type.
    """
    total = 0.0
    for layer in dict.fromkeys(tensor.layer for tensor in tensors):
        members = [tensor for tensor in tensors if tensor.layer == layer and is_measured(tensor)]
        by_expert = {t.name: chosen[t.name] for t in members if t.role is Role.EXPERT and len(chosen[t.name]) > 1}
        total += sum(
            _cost_at(_tensor_costs(tensor, measured, model), chosen[tensor.name], tensor, measured)
            for tensor in members
            if tensor.name not in by_expert
        )
        if by_expert and layer is not None:
            experts = [tensor for tensor in members if tensor.name in by_expert]
            # Projections in the same types were measured together.
            together = len(set(map(tuple, by_expert.values()))) == 1
            names = [f"blk.{layer}.ffn_exps"] if together else [tensor.name for tensor in experts]
            for name, tensor in zip(names, experts, strict=False):
                total += _cost_at(_combined(name, layer, measured, model), chosen[tensor.name], tensor, measured)
    return total


def is_measured(tensor: SourceTensor) -> bool:
    """Whether its cost is known: not of what stays F32, nor of matrices that calibration says nothing about."""
    unseen = tensor.role in (Role.DENSE, Role.OUTPUT) and tensor.activation is None
    return tensor.role is not Role.KEEP and not unseen


def _cost_at(costs: np.ndarray, types: Sequence[QuantType], tensor: SourceTensor, measured: Measurements) -> float:
    """Sum of costs (E, T) or (T,) at the types of the experts, or at that of the tensor."""
    if not np.isfinite(costs).any():
        return 0.0
    axis = measured.expert_types if tensor.role is Role.EXPERT else measured.dense_types
    rows = np.atleast_2d(costs)
    found = [row[axis.index(one.name)] if one.name in axis else np.nan for row, one in zip(rows, types, strict=True)]
    if not np.isfinite(found).all():
        raise InputError(f"sensitivity: {tensor.name} was not measured at {', '.join(sorted({t.name for t in types}))}")
    return float(np.maximum(found, 0).sum())


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
    if len(free) == len(projections):
        return _combined(f"blk.{layer}.ffn_exps", layer, measured, model)
    parts = [_combined(tensor.name, layer, measured, model) for tensor in free or projections]
    return np.asarray(np.sum(parts, axis=0))


def _tensor_costs(tensor: SourceTensor, measured: Measurements, model: CostModel) -> np.ndarray:
    """Cost of the whole tensor per type, (T,)."""
    if tensor.role is Role.EXPERT and tensor.layer is not None and model.combination != "sensitivity":
        return np.asarray(_combined(tensor.name, tensor.layer, measured, model).sum(axis=0))
    if model.combination == "random":
        error = _array(measured, f"{tensor.name}.weight_error")[0]
        return np.asarray(_random(tensor.name, 1, model.seed) * error)
    return _answers_and_modalities(_array(measured, f"{tensor.name}.unit"), model)


def _combined(name: str, layer: int, measured: Measurements, model: CostModel) -> np.ndarray:
    """Costs of the experts of `name`, a tensor or a layer's projections together, (E, T)."""
    match model.combination:
        case "sensitivity":
            return _answers_and_modalities(_array(measured, f"{name}.expert"), model)
        case "product":
            share = expert_frequency(measured.use[layer].counts, model)
            return _answers_and_modalities(_array(measured, f"{name}.expert") * share[None, :, :, None], model)
        case "pmq":
            use = measured.use[layer]
            counts, weights = (_share(array.sum(axis=0, keepdims=True)) for array in (use.counts, use.weights))
            tokens = use.counts / np.maximum(use.counts.sum(axis=0), 1)
            error = np.einsum("me,amet->et", tokens, _array(measured, f"{name}.expert"))
            return np.asarray((counts * weights**PMQ_WEIGHT_POWER)[0, :, None] * error)
        case "frequency":
            share = expert_frequency(measured.use[layer].counts, model)
            weight = np.asarray(model.modality_weights) @ share
            return np.asarray(weight[:, None] * _array(measured, f"{name}.weight_error"))
        case "random":
            error = _array(measured, f"{name}.weight_error")
            return np.asarray(_random(name, len(error), model.seed)[:, None] * error)


def expert_frequency(counts: np.ndarray, model: CostModel) -> np.ndarray:
    """f_m(l, e), MODE's step 1: routed tokens (M, E) normalised per modality, with the model's floor and pooling.

    Where a modality has no tokens its row is zero.
    """
    if model.pooled:
        counted = np.asarray(model.modality_weights) > 0
        pooled = counts[counted].sum(axis=0)
        counts = np.where(counted[:, None], pooled, 0)
    share = _share(counts)
    floored = np.maximum(share, model.frequency_floor / counts.shape[1]) * (share.sum(axis=1, keepdims=True) > 0)
    return _share(floored)


def _share(values: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; rows of zeros stay."""
    total = values.sum(axis=1, keepdims=True)
    return np.asarray(values / np.where(total > 0, total, 1))


def _random(name: str, count: int, seed: int) -> np.ndarray:
    """Uniform numbers in (0, 1] that belong to a name, whatever else is drawn."""
    return 1 - np.random.default_rng([seed, zlib.crc32(name.encode())]).random(count)


def _answers_and_modalities(sensitivity: np.ndarray, model: CostModel) -> np.ndarray:
    """Sum answers and modalities out: (A, M, ..., T) to (..., T)."""
    answers = np.asarray(model.answer_weights[: sensitivity.shape[0]])
    modalities = np.asarray(model.modality_weights)
    return np.asarray(np.einsum("a,m,am...->...", answers, modalities, sensitivity))


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
