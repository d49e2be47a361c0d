"""Makes plans: the optimal one for a budget, and uniform ones to compare it with."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mode_gguf.allocation.budget import Budget, ReachableSizes, check_reachable, effective_types
from mode_gguf.allocation.costs import MeasuredCosts, expert_units, tensor_units
from mode_gguf.allocation.plan import (
    Plan,
    PlannedTensor,
    Provenance,
    SolverRecord,
    sizes_of,
)
from mode_gguf.allocation.presets import Preset
from mode_gguf.allocation.reachable import greatest_size
from mode_gguf.allocation.solver import SizeRange, Solution, solve, solve_layers
from mode_gguf.allocation.units import (
    AllocationUnit,
    Candidate,
    CandidateTypes,
    absorbed_type,
    tensor_bytes,
    type_or_any,
)
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.options import Packing
from mode_gguf.quantization.expert_groups import map_bytes
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES, QuantType, type_of_most_weights

UNDERSHOOT = 0.005
"""Largest part of its budget that a plan leaves unused, so that files of one name have one size."""

DENSE_FLOOR = QUANT_TYPES["Q4_K"]
"""Uniform plans never store attention, embedding and output in less: they serve every token and weigh little."""

FIXED_DENSE = tuple(QUANT_TYPES[name] for name in ("Q4_K", "Q3_K", "Q2_K"))
"""Types of attention, embedding and output where they are not measured: all take the first that meets the budget.
MODE keeps attention at 4 bits."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A planning problem: candidates as the budget and the preset leave them, and bytes for all tensors."""

    tensors: Sequence[SourceTensor]
    measured: MeasuredCosts
    preset: Preset
    types: CandidateTypes
    reach: ReachableSizes

    @classmethod
    def of(
        cls,
        tensors: Sequence[SourceTensor],
        measured: MeasuredCosts,
        *,
        budget: Budget,
        types: CandidateTypes,
        preset: Preset,
        overhead: int = 0,
    ) -> "Problem":
        """The problem of a budget and a preset.

        Raises:
            InfeasibleBudgetError: the budget is out of reach for these tensors and candidates.
        """
        return cls(tensors, measured, preset, *reachable_candidates(tensors, types, budget, preset, overhead))

    def tensor_units(self) -> list[AllocationUnit]:
        """One unit per tensor."""
        return tensor_units(self.tensors, self.types, self.measured, self.preset.costs)

    def expert_types(self, units: Sequence[AllocationUnit], solution: Solution) -> dict[str, tuple[QuantType, ...]]:
        """Per matrix the type of each of its experts (one for any other), as chosen for `expert_units`."""
        chosen: dict[str, list[QuantType]] = {
            tensor.name: [] for tensor in self.tensors if tensor.role is not Role.KEEP
        }
        by_name = {tensor.name: tensor for tensor in self.tensors}
        for unit, choice in zip(units, solution.choices, strict=True):
            for name in unit.tensors:
                chosen[name].append(self.types.stored_as(by_name[name], choice.quant_type))
        return {name: tuple(types) for name, types in chosen.items()}

    def expert_units(self) -> list[AllocationUnit]:
        """One unit per expert, and one per other tensor."""
        return expert_units(self.tensors, self.types, self.measured, self.preset.costs)

    @property
    def unit_bytes(self) -> int:
        """Bytes left for the units once routers, norms and biases have theirs."""
        return self.reach.budget - sum(4 * t.n_weights for t in self.tensors if t.role is Role.KEEP)

    def solve(self, units: Sequence[AllocationUnit], reserved: int = 0) -> Solution:
        """The choice of least cost.

        Args:
            reserved: bytes of the budget that are not for units.

        Raises:
            InfeasibleBudgetError: no choice meets the budget.
        """
        if self.preset.scope == "model":
            floor, budget = self._range(units, self.unit_bytes - reserved)
            try:
                return solve(units, budget, floor=max(floor, int(budget * (1 - UNDERSHOOT)) + 1))
            except InfeasibleBudgetError:
                return solve(units, budget)
        return solve_layers(units, self._layer_ranges(units, self.unit_bytes - reserved))

    def _range(self, units: Sequence[AllocationUnit], budget: int) -> SizeRange:
        """Range of bytes of units with this budget: at most all of it, or exactly the most there is to take."""
        if self.preset.equality and (most := greatest_size(units, budget)) is not None:
            return SizeRange(most, most)
        return SizeRange(0, budget)

    def _layer_ranges(self, units: Sequence[AllocationUnit], budget: int) -> dict[int | None, SizeRange]:
        """A range per layer: the size of its other tensors, and equal bits per weight for all layers' experts."""
        layers: dict[int | None, list[AllocationUnit]] = {}
        for unit in units:
            layers.setdefault(unit.layer, []).append(unit)
        experts = {layer: [u for u in members if u.is_expert] for layer, members in layers.items()}
        others = {layer: _smallest(u for u in members if not u.is_expert) for layer, members in layers.items()}
        for_experts = budget - sum(others.values())
        n_weights = sum(unit.n_weights for members in experts.values() for unit in members)
        ranges: dict[int | None, SizeRange] = {}
        left_over = 0
        for layer, members in experts.items():
            share = left_over + for_experts * sum(unit.n_weights for unit in members) // n_weights
            floor, most = self._range(members, share)
            ranges[layer] = SizeRange(others[layer] + floor, others[layer] + most)
            # Three tensors can hardly ever use a layer's share exactly; the next layer gets what is left of it.
            left_over = share - most
        return ranges


def reachable_candidates(
    tensors: Sequence[SourceTensor], types: CandidateTypes, budget: Budget, preset: Preset, overhead: int = 0
) -> tuple[CandidateTypes, ReachableSizes]:
    """The candidates that a preset leaves under a budget, and what they reach; needs shapes only.

    Raises:
        InfeasibleBudgetError: the budget is out of reach.
    """
    if preset.dense == "measured":
        offered = effective_types(types, budget)
        return offered, check_reachable(tensors, offered, budget, overhead)
    *larger, smallest = (replace(types, dense=(dense,)) for dense in FIXED_DENSE)
    for fixed in larger:
        try:
            return fixed, check_reachable(tensors, fixed, budget, overhead)
        except InfeasibleBudgetError:
            continue
    return smallest, check_reachable(tensors, smallest, budget, overhead)


def optimal_plan(problem: Problem, made_from: Provenance, budget: Budget, packing: Packing = EXACT) -> Plan:
    """The types of least cost for the problem's tensors.

    Args:
        budget: the problem's, for the record.
        packing: how the measured candidates were packed.

    Raises:
        InfeasibleBudgetError: no choice meets the budget.
    """
    units = problem.tensor_units()
    solution = problem.solve(units)
    return plan_of(problem, units, solution, made_from, budget, packing)


def plan_of(
    problem: Problem,
    units: Sequence[AllocationUnit],
    solution: Solution,
    made_from: Provenance,
    budget: Budget,
    packing: Packing = EXACT,
) -> Plan:
    """The plan that stores every tensor as `solution` chose for its unit; units are the problem's `tensor_units`."""
    chosen = {unit.name: choice for unit, choice in zip(units, solution.choices, strict=True)}
    planned = [_chosen(tensor, chosen.get(tensor.name)) for tensor in problem.tensors]
    return _plan(problem, solution, planned, made_from, budget, packing)


def expert_plan(problem: Problem, made_from: Provenance, budget: Budget, packing: Packing = EXACT) -> Plan:
    """A type per expert, its projections alike as far as their rows fit it, and one for every other tensor.

    As `optimal_plan` otherwise.

    The maps that say where a layer's experts are stored are paid for by the budget.

    Raises:
        InfeasibleBudgetError: no choice meets the budget.
    """
    units = problem.expert_units()
    solution = problem.solve(units, map_bytes(problem.tensors, len(problem.types.expert)))
    chosen = {unit.name: choice for unit, choice in zip(units, solution.choices, strict=True)}
    types = problem.expert_types(units, solution)
    planned = [
        _planned_experts(tensor, types[tensor.name])
        if tensor.role is Role.EXPERT
        else _chosen(tensor, chosen.get(tensor.name))
        for tensor in problem.tensors
    ]
    return _plan(problem, solution, planned, made_from, budget, packing)


def _plan(
    problem: Problem,
    solution: Solution,
    planned: list[PlannedTensor],
    made_from: Provenance,
    budget: Budget,
    packing: Packing,
) -> Plan:
    """The record of a choice under a budget."""
    return Plan(
        made_from=made_from,
        preset=problem.preset.name,
        signals=problem.preset,
        packing=packing,
        budget=budget,
        solver=SolverRecord.model_validate(solution, from_attributes=True),
        reachable_bpw=(problem.reach.lowest_bpw, problem.reach.highest_bpw),
        **sizes_of(planned),
    )


def _planned_experts(tensor: SourceTensor, types: Sequence[QuantType]) -> PlannedTensor:
    """A tensor with a type per expert; what it costs is only known of all projections together."""
    one = tensor.n_weights // tensor.n_experts
    rows = one // tensor.row_width
    return PlannedTensor(
        name=tensor.name,
        type=type_of_most_weights((quant_type, one) for quant_type in types).name,
        experts=[quant_type.name for quant_type in types],
        n_weights=tensor.n_weights,
        size_bytes=sum(rows * quant_type.row_bytes(tensor.row_width) for quant_type in types),
    )


def _chosen(tensor: SourceTensor, choice: Candidate | None) -> PlannedTensor:
    """A tensor as its unit's choice says; F32 without one."""
    return _planned(tensor, choice.quant_type, choice.cost) if choice else _planned(tensor, QUANT_TYPES["F32"])


def _planned(tensor: SourceTensor, quant_type: QuantType, cost: float | None = None) -> PlannedTensor:
    size = tensor_bytes(tensor, quant_type)
    return PlannedTensor(name=tensor.name, type=quant_type.name, n_weights=tensor.n_weights, size_bytes=size, cost=cost)


def uniform_dense(quant_type: QuantType) -> QuantType:
    """The type of attention, embedding and output in a uniform plan."""
    return max(quant_type, DENSE_FLOOR, key=lambda candidate: candidate.bits_per_weight)


def uniform_type(tensor: SourceTensor, quant_type: QuantType) -> QuantType:
    """Experts in `quant_type`; attention, embedding and output in it too, but not below Q4_K; what is absorbed in its
    own type, and where all is in a float type, in that."""
    match tensor.role:
        case Role.KEEP:
            return QUANT_TYPES["F32"]
        case Role.ABSORBED:
            return quant_type if quant_type.block_size == 1 else absorbed_type(tensor)
        case Role.EXPERT:
            return type_or_any(tensor, quant_type)
    return type_or_any(tensor, uniform_dense(quant_type))


def uniform_plan(
    tensors: Sequence[SourceTensor], made_from: Provenance, quant_type: QuantType, packing: Packing = EXACT
) -> Plan:
    """Every tensor in `uniform_type`."""
    planned = [_planned(tensor, uniform_type(tensor, quant_type)) for tensor in tensors]
    return Plan(
        made_from=made_from,
        preset=f"uniform-{quant_type.name}",
        packing=packing,
        **sizes_of(planned),
    )


def _smallest(units: Iterable[AllocationUnit]) -> int:
    """Bytes of units that each take their smallest candidate."""
    return sum(min(candidate.size_bytes for candidate in unit.candidates) for unit in units)
