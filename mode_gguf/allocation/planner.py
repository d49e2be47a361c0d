"""Makes plans: the optimal one for a budget, and uniform ones to compare it with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mode_gguf.allocation.budget import budget_bytes, check_reachable
from mode_gguf.allocation.costs import CostModel, Measurements, expert_units, tensor_units
from mode_gguf.allocation.plan import (
    ExpertGranularity,
    Plan,
    PlannedTensor,
    Provenance,
    SolverRecord,
)
from mode_gguf.allocation.solver import Solution, solve
from mode_gguf.allocation.units import AllocationUnit, CandidateTypes, fitting_types, tensor_bytes
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.quantization.packing import EXACT, Packing
from mode_gguf.quantization.types import QUANT_TYPES, QuantType, bits_per_weight, type_of_most_weights

UNDERSHOOT = 0.005
"""A plan uses at least this close to all of its budget, so that files of one name have one size."""

DENSE_FLOOR = QUANT_TYPES["Q4_K"]
"""Attention, embedding and output are never stored in less: they serve every token and weigh little."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named way of measuring and weighing; `method` is the sensitivity it needs."""

    name: str
    method: Literal["fisher", "expert-mse"]
    costs: CostModel


PRESETS: Mapping[str, Preset] = {
    "mode": Preset("mode", "fisher", CostModel()),
    # Frequency times expert error over text and key vision tokens; redundant vision tokens count for nothing.
    "paper": Preset("paper", "expert-mse", CostModel(modality_weights=(1.0, 1.0, 0.0), by_frequency=True)),
}


def optimal_plan(
    tensors: Sequence[SourceTensor],
    measured: Measurements,
    made_from: Provenance,
    *,
    bpw: float,
    types: CandidateTypes,
    preset: Preset,
    packing: Packing = EXACT,
) -> Plan:
    """The types of least cost whose bits, over all weights of the text model, are at most `bpw`.

    `packing` is how the measured candidates were packed.

    Raises:
        InfeasibleBudgetError: `bpw` is out of reach for these tensors and candidates.
    """
    reachable = check_reachable(tensors, types, bpw)
    units = tensor_units(tensors, types, measured, preset.costs)
    solution = _solve_filled(units, _unit_budget(tensors, bpw))
    chosen = {unit.name: choice for unit, choice in zip(units, solution.choices, strict=True)}
    planned = [
        PlannedTensor(
            name=tensor.name,
            type=chosen[tensor.name].quant_type.name if tensor.name in chosen else "F32",
            n_weights=tensor.n_weights,
            size_bytes=chosen[tensor.name].size_bytes if tensor.name in chosen else 4 * tensor.n_weights,
            cost=chosen[tensor.name].cost if tensor.name in chosen else None,
        )
        for tensor in tensors
    ]
    return Plan(
        made_from=made_from,
        preset=preset.name,
        packing=packing,
        target_bpw=bpw,
        solver=_record(solution),
        expert_granularity=_expert_granularity(tensors, types, measured, preset, bpw),
        reachable_bpw=(reachable.lowest_bpw, reachable.highest_bpw),
        **_sizes(tensors, planned),
    )


def uniform_plan(
    tensors: Sequence[SourceTensor], made_from: Provenance, quant_type: QuantType, packing: Packing = EXACT
) -> Plan:
    """Every expert in `quant_type`; attention, embedding and output in it too, but not below Q4_K."""
    dense = max(quant_type, DENSE_FLOOR, key=lambda candidate: candidate.bits_per_weight)
    planned = []
    for tensor in tensors:
        wanted = {Role.KEEP: QUANT_TYPES["F32"], Role.EXPERT: quant_type}.get(tensor.role, dense)
        fitting = fitting_types(tensor, (wanted,))[0]
        planned.append(
            PlannedTensor(
                name=tensor.name,
                type=fitting.name,
                n_weights=tensor.n_weights,
                size_bytes=tensor_bytes(tensor, fitting),
            )
        )
    return Plan(
        made_from=made_from,
        preset=f"uniform-{quant_type.name}",
        packing=packing,
        target_bpw=None,
        **_sizes(tensors, planned),
    )


def _unit_budget(tensors: Sequence[SourceTensor], bpw: float) -> int:
    """Bytes left for the units once routers, norms and biases have theirs."""
    return budget_bytes(tensors, bpw) - sum(4 * t.n_weights for t in tensors if t.role is Role.KEEP)


def _solve_filled(units: Sequence[AllocationUnit], budget: int) -> Solution:
    """Solve with the budget used to within `UNDERSHOOT` where tensor sizes allow it, and below it where not."""
    try:
        return solve(units, budget, floor=int(budget * (1 - UNDERSHOOT)) + 1)
    except InfeasibleBudgetError:
        return solve(units, budget)


def _expert_granularity(
    tensors: Sequence[SourceTensor], types: CandidateTypes, measured: Measurements, preset: Preset, bpw: float
) -> ExpertGranularity | None:
    """None where the types that all projections of an expert can have do not meet the budget, as with Q4_0 and Q2_K
    for rows of which some are a multiple of 32 only."""
    units = expert_units(tensors, types, measured, preset.costs)
    try:
        solution = _solve_filled(units, _unit_budget(tensors, bpw))
    except InfeasibleBudgetError:
        return None
    experts = [(u, choice) for u, choice in zip(units, solution.choices, strict=True) if u.expert is not None]
    by_layer: dict[str, list[str]] = {}
    for unit, choice in experts:
        by_layer.setdefault(str(unit.layer), []).append(choice.quant_type.name)
    return ExpertGranularity(
        record=_record(solution),
        experts_bpw=8 * sum(c.size_bytes for _, c in experts) / sum(u.n_weights for u, _ in experts),
        types=by_layer,
    )


def _record(solution: Solution) -> SolverRecord:
    return SolverRecord(solver=solution.solver, objective=solution.objective, bound=solution.bound, gap=solution.gap)


def _sizes(tensors: Sequence[SourceTensor], planned: list[PlannedTensor]) -> dict[str, Any]:
    experts = [p for t, p in zip(tensors, planned, strict=True) if t.role is Role.EXPERT]
    return {
        "tensors": planned,
        "bpw": bits_per_weight(planned),
        "experts_bpw": bits_per_weight(experts),
        "size_bytes": sum(tensor.size_bytes for tensor in planned),
        "main_type": type_of_most_weights((QUANT_TYPES[p.type], p.n_weights) for p in experts).name,
    }
