"""Costs: the objective of the integer programme, per unit and candidate type, from sensitivity and expert use.

Fisher sensitivity is already a KL divergence, summed over the tokens each expert really serves, so it is used as it
is. The paper's recipe multiplies the mean squared error of an expert's output by the frequency of its use (MODE
equation 4), both per modality. The other combinations are what both are compared with.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mode_gguf.allocation.units import AllocationUnit, Candidate, CandidateTypes, tensor_bytes
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InputError, UsageError
from mode_gguf.options import CostOptions
from mode_gguf.quantization.fallback_types import stored_as
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from mode_gguf.vocabulary import Combination

PMQ_WEIGHT_POWER = 1.5
"""MC-MoE's beta; its alpha is 1 and its gamma 2, the latter in the squared error."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Weights and formula that make costs of a sensitivity table.

    Attributes:
        combination: the formula of an expert's cost.
        answer_weights: importance of text answers and of image answers.
        modality_weights: importance of text, key vision and redundant vision tokens.
        pooled: frequencies count all tokens of weighted modalities alike instead of each modality by itself.
        frequency_floor: least frequency of an expert, in parts of the layer's mean; 0 for none.
        seed: of `random`.
    """

    combination: Combination = CostOptions.combination
    answer_weights: tuple[float, float] = CostOptions.answer_weights
    modality_weights: tuple[float, float, float] = CostOptions.modality_weights
    pooled: bool = CostOptions.pooled
    frequency_floor: float = CostOptions.frequency_floor
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
    """Use of one layer's experts: routed tokens and sums of routing weights, both (M, E)."""

    counts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class MeasuredCosts:
    """Sensitivity arrays (docs/design/artefacts.md), the types their last axis stands for, and expert use by layer."""

    arrays: Mapping[str, np.ndarray]
    expert_types: tuple[str, ...]
    dense_types: tuple[str, ...]
    use: Mapping[int, ExpertUse]


def tensor_units(
    tensors: Sequence[SourceTensor], types: CandidateTypes, measured: MeasuredCosts, model: CostModel
) -> list[AllocationUnit]:
    """One unit per tensor of the text model but those that always stay F32."""
    units = []
    for tensor in tensors:
        if tensor.role is Role.KEEP:
            continue
        offered: Sequence[QuantType] = types.of(tensor)
        is_expert = tensor.role is Role.EXPERT
        axis = _measured_types(tensor, measured)
        if tensor.is_measured:
            offered = _worth_offering(offered, measured, tensor.name, slice(None))
            costs = _offered_costs(_tensor_costs(tensor, measured, model), axis, offered, tensor.name, always=is_expert)
        else:
            costs = [0.0]
        candidates = tuple(
            Candidate(offer, tensor_bytes(tensor, offer), cost) for offer, cost in zip(offered, costs, strict=True)
        )
        units.append(
            AllocationUnit(tensor.name, (tensor.name,), tensor.n_weights, candidates, tensor.layer, is_expert=is_expert)
        )
    return units


def expert_units(
    tensors: Sequence[SourceTensor], types: CandidateTypes, measured: MeasuredCosts, model: CostModel
) -> list[AllocationUnit]:
    """One unit per (layer, expert), its projections tied; other tensors as in `tensor_units`.

    An expert's candidate names what its projections take whose rows fit it; `CandidateTypes.stored_as` says what the
    others take with it. Of candidates that come to the same, there is one.
    """
    units = tensor_units([tensor for tensor in tensors if tensor.role is not Role.EXPERT], types, measured, model)
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    for layer in sorted({tensor.layer for tensor in experts if tensor.layer is not None}):
        projections = [tensor for tensor in experts if tensor.layer == layer]
        offered = _tied_candidates(projections, types)
        axis = [QUANT_TYPES[asked] for asked in measured.expert_types]
        costs = _combined(f"blk.{layer}.ffn_exps", layer, measured, model)
        sizes = [
            sum(tensor_bytes(tensor, types.stored_as(tensor, offer)) // tensor.n_experts for tensor in projections)
            for offer in offered
        ]
        for expert in range(projections[0].n_experts):
            name = f"blk.{layer}.expert.{expert}"
            own = _offered_costs(costs[expert], axis, [*offered.values()], name, always=True)
            worth = _worth_offering([*offered], measured, f"blk.{layer}.ffn_exps", expert)
            candidates = tuple(map(Candidate, worth, sizes, own))  # the smallest ones, which come first
            tensor_names = tuple(tensor.name for tensor in projections)
            n_weights = sum(tensor.n_weights // tensor.n_experts for tensor in projections)
            units.append(AllocationUnit(name, tensor_names, n_weights, candidates, layer, expert, True))
    return units


def cost_of_types(
    tensors: Sequence[SourceTensor],
    chosen: Mapping[str, Sequence[QuantType]],
    measured: MeasuredCosts,
    model: CostModel,
) -> float:
    """The cost of storing tensors in these types: one per tensor, or one for each of its experts in order.

    What was not measured in any type, such as rows that fit none, costs nothing, as in planning.

    Raises:
        InputError: a tensor was measured, but not in its type.
    """
    total = 0.0
    for layer in dict.fromkeys(tensor.layer for tensor in tensors):
        members = [tensor for tensor in tensors if tensor.layer == layer and tensor.is_measured]
        by_expert = {t.name: chosen[t.name] for t in members if t.role is Role.EXPERT and len(chosen[t.name]) > 1}
        total += sum(
            _cost_at(_tensor_costs(tensor, measured, model), chosen[tensor.name], tensor, measured)
            for tensor in members
            if tensor.name not in by_expert
        )
        if by_expert and layer is not None:
            experts = [tensor for tensor in members if tensor.name in by_expert]
            # Projections in the types that go together were measured together.
            of_experts = list(zip(*by_expert.values(), strict=True))
            tied_types = list(zip(*(_measured_types(tensor, measured) for tensor in experts), strict=True))
            if set(of_experts) <= set(tied_types):
                costs = _combined(f"blk.{layer}.ffn_exps", layer, measured, model)
                total += _sum_at(costs, [tied_types.index(types) for types in of_experts], experts[0].name)
            else:
                for tensor in experts:
                    costs = _combined(tensor.name, layer, measured, model)
                    total += _cost_at(costs, chosen[tensor.name], tensor, measured)
    return total


def _cost_at(costs: np.ndarray, types: Sequence[QuantType], tensor: SourceTensor, measured: MeasuredCosts) -> float:
    """Sum of costs (E, T) or (T,) at the types of the experts, or at that of the tensor."""
    if not np.isfinite(costs).any():
        return 0.0
    axis = _measured_types(tensor, measured)
    if not set(types) <= set(axis):
        raise InputError(f"sensitivity: {tensor.name} was not measured at {', '.join(sorted({t.name for t in types}))}")
    return _sum_at(costs, [axis.index(one) for one in types], tensor.name)


def _sum_at(costs: np.ndarray, columns: Sequence[int], name: str) -> float:
    """Sum of costs (E, T) or (T,), of every row at its column."""
    found = np.array([row[column] for row, column in zip(np.atleast_2d(costs), columns, strict=True)])
    if not np.isfinite(found).all():
        raise InputError(f"sensitivity: {name} was not measured in all of its types; measure it again with them")
    return float(np.maximum(found, 0).sum())


def _measured_types(tensor: SourceTensor, measured: MeasuredCosts) -> list[QuantType]:
    """Types that the columns of a tensor's costs were measured in, from the names of the types asked for."""
    names = measured.expert_types if tensor.role is Role.EXPERT else measured.dense_types
    return [stored_as(tensor, QUANT_TYPES[name]) or QUANT_TYPES[name] for name in names]


def _tied_candidates(projections: Sequence[SourceTensor], types: CandidateTypes) -> dict[QuantType, QuantType]:
    """Candidates of an expert's tied projections, each with the type that it was measured by.

    Two differ only where projections' rows do not fit the type that all of them were asked for.
    """
    shared: dict[tuple[QuantType, ...], QuantType] = {}
    for asked in sorted(types.offered(Role.EXPERT), key=lambda quant_type: quant_type.bits_per_weight):
        shared.setdefault(tuple(types.stored_as(tensor, asked) for tensor in projections), asked)
    return {stored[0] if len(set(stored)) == 1 else asked: asked for stored, asked in shared.items()}


def _tensor_costs(tensor: SourceTensor, measured: MeasuredCosts, model: CostModel) -> np.ndarray:
    """Cost of the whole tensor per type, (T,)."""
    if tensor.role is Role.EXPERT and tensor.layer is not None and model.combination != "sensitivity":
        return np.asarray(_combined(tensor.name, tensor.layer, measured, model).sum(axis=0))
    if model.combination == "random":
        error = _array(measured, f"{tensor.name}.weight_error")[0]
        return np.asarray(_random(tensor.name, 1, model.seed) * error)
    return _answers_and_modalities(_array(measured, f"{tensor.name}.unit"), model)


def _combined(name: str, layer: int, measured: MeasuredCosts, model: CostModel) -> np.ndarray:
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


def _array(measured: MeasuredCosts, name: str) -> np.ndarray:
    if name not in measured.arrays:
        raise InputError(f"sensitivity: {name} is missing; measure it again with the model and types of this plan")
    return measured.arrays[name]


def _worth_offering(
    offered: Sequence[QuantType], measured: MeasuredCosts, name: str, expert: int | slice
) -> Sequence[QuantType]:
    """The offered types, smallest first; of a matrix that all of them store exactly, one of zeros, the smallest alone.

    Else a budget that is to be used up would be spent on it where nothing else can take more.
    """
    errors = measured.arrays.get(f"{name}.weight_error")
    if errors is None or len(offered) == 1:
        return offered
    known = errors[expert][np.isfinite(errors[expert])]
    return offered[:1] if known.size and not known.any() else offered


def _offered_costs(
    costs: np.ndarray, axis: Sequence[QuantType], offered: Sequence[QuantType], name: str, *, always: bool
) -> list[float]:
    """Costs of the offered types; where there is no choice the cost decides nothing and need not be known.

    `always`: where it is known it counts all the same, so that plans by tensor and by expert, which have no choice
    about different things, can be compared.
    """
    if len(offered) == 1:
        known = always and offered[0] in axis and np.isfinite(costs[axis.index(offered[0])])
        if not known:
            return [0.0]
    missing = [offer.name for offer in offered if offer not in axis]
    if missing:
        raise InputError(
            f"sensitivity: {name} was not measured at {', '.join(missing)}, only at "
            f"{', '.join(dict.fromkeys(one.name for one in axis))}; measure it again with these types"
        )
    return [max(float(costs[axis.index(offer)]), 0.0) for offer in offered]
