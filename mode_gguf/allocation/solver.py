"""The integer linear programme (MODE section 3.3): one type per unit, least cost, within the budget.

minimise    sum_u sum_b cost(u, b) x(u, b)
subject to  sum_b x(u, b) = 1                        for every unit u
            floor <= sum_u sum_b size(u, b) x(u, b) <= budget
            x(u, b) in {0, 1}

A large model has tens of thousands of units, of which only those near the best price per byte are in doubt. The solver
gets this core alone, as moves away from the relaxation's start (`allocation/relaxation.py`); whatever is left out costs
the relaxation's bound and its reduced cost at least, so that the proof covers all of it. Where it proves too little,
the core grows, in the end to the whole programme.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pulp

from mode_gguf.allocation.relaxation import Relaxation, relax
from mode_gguf.allocation.units import AllocationUnit, Candidate
from mode_gguf.errors import InfeasibleBudgetError, ModeGgufError

RELATIVE_GAP = 1e-4
"""Relative optimality gap at which the solver may stop."""

CORE_MOVES = 128
"""Number of moves in the first core."""

CORE_GROWTH = 4
"""Factor by which a core grows that did not prove enough."""

TOLERANCE = 1e-6
"""Error of a solver's bound, relative to the dearest move."""

HIGHS_OPTIONS = {
    "random_seed": 0,
    "mip_feasibility_tolerance": 1e-9,
    "primal_feasibility_tolerance": 1e-9,
    "dual_feasibility_tolerance": 1e-9,
    # Cores are small and nearly solved by their relaxation: these take longer than the search itself.
    "mip_allow_restart": False,
    "presolve": "off",
    "mip_heuristic_run_feasibility_jump": False,
}

CBC_OPTIONS = ["integerTolerance 1e-9", "primalTolerance 1e-9", "dualTolerance 1e-9"]


@dataclass(frozen=True, slots=True)
class Solution:
    """The candidate chosen for each unit, in the units' order, and how good the choice is proven to be.

    `objective` and `bound` are in the unit of the costs; no choice within the budget costs less than `bound`.
    """

    choices: tuple[Candidate, ...]
    objective: float
    bound: float
    solver: str

    @property
    def gap(self) -> float:
        return (self.objective - self.bound) / self.objective if self.objective > 0 else 0.0

    @property
    def size_bytes(self) -> int:
        return sum(choice.size_bytes for choice in self.choices)


class SizeRange(NamedTuple):
    """Bytes that units must occupy together at least, and may at most."""

    floor: int
    budget: int


def solve(units: Sequence[AllocationUnit], budget: int, *, floor: int = 0, gap: float = RELATIVE_GAP) -> Solution:
    """Choose one candidate per unit.

    Args:
        units: what to choose for, at least one; costs finite and not negative.
        budget: bytes all units may occupy together.
        floor: bytes they must occupy at least, so that a budget is used where costs are flat.
        gap: relative gap at which the search may stop.

    Raises:
        InfeasibleBudgetError: no choice lies between floor and budget.
        ModeGgufError: the solver ended without a proof.
    """
    relaxation = relax(units, floor, budget)
    if relaxation is None:
        raise InfeasibleBudgetError(f"no assignment of types takes between {floor} and {budget} bytes")
    chosen, cost, n_moves = relaxation.start, math.inf, CORE_MOVES
    if floor <= relaxation.total_size(chosen) <= budget and relaxation.total_cost(chosen) <= relaxation.bound:
        return _solution(units, chosen, relaxation.bound, "relaxation")
    core_gap = 0.9 * gap * max(relaxation.bound, 0.0)  # absolute; the rest is for the solver's tolerance
    while True:
        moves, left_out = _moves(relaxation, chosen, cost, n_moves)
        core = _solve_core(relaxation, chosen, moves, SizeRange(floor, budget), core_gap)
        if core is not None:
            improved = relaxation.total_cost(core.chosen) < cost
            chosen, cost = core.chosen, relaxation.total_cost(core.chosen)
            bound = min(max(core.bound, relaxation.bound), relaxation.bound + left_out, cost)
            if cost - bound <= gap * cost:
                return _solution(units, chosen, bound, core.solver)
            if left_out == math.inf and not improved:
                raise ModeGgufError(f"{core.solver} stopped at gap {1 - bound / cost:.1e} without proving {gap:.0e}")
        elif left_out == math.inf:
            raise InfeasibleBudgetError(f"no assignment of types takes between {floor} and {budget} bytes")
        n_moves *= CORE_GROWTH


def solve_layers(
    units: Sequence[AllocationUnit],
    ranges: Mapping[int | None, SizeRange],
    *,
    gap: float = RELATIVE_GAP,
) -> Solution:
    """Choose one candidate per unit, each layer within a range of its own; choices are in the units' order.

    Args:
        units: as for `solve`.
        ranges: per `AllocationUnit.layer`; None is everything outside the layers.
        gap: of every layer, and so of their sum.

    Raises:
        InfeasibleBudgetError: no choice lies in a layer's range; the message names the layer.
        ModeGgufError: the solver ended without a proof.
    """
    members: dict[int | None, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit.layer, []).append(index)
    choices: dict[int, Candidate] = {}
    solutions = []
    for layer, indices in members.items():
        try:
            solution = solve([units[i] for i in indices], ranges[layer].budget, floor=ranges[layer].floor, gap=gap)
        except InfeasibleBudgetError as error:
            where = "outside the layers" if layer is None else f"layer {layer}"
            raise InfeasibleBudgetError(f"{where}: {error}") from error
        choices.update(zip(indices, solution.choices, strict=True))
        solutions.append(solution)
    return Solution(
        choices=tuple(choices[index] for index in range(len(units))),
        objective=math.fsum(solution.objective for solution in solutions),
        bound=math.fsum(solution.bound for solution in solutions),
        solver=" + ".join(sorted({solution.solver for solution in solutions})),
    )


def _solution(units: Sequence[AllocationUnit], chosen: np.ndarray, bound: float, solver: str) -> Solution:
    choices = tuple(unit.candidates[index] for unit, index in zip(units, chosen, strict=True))
    objective = math.fsum(choice.cost for choice in choices)
    return Solution(choices, objective, min(bound, objective), solver)


def _moves(relaxation: Relaxation, base: np.ndarray, cost: float, n_moves: int) -> tuple[np.ndarray, float]:
    """The `n_moves` candidates, but not those of `base`, likeliest to be needed by a choice that costs under `cost`.

    Returns flat indices of (unit, candidate) by reduced cost, ties in the units' order, and the reduced cost of the
    next one: inf where that choice, if there is one, needs no other.
    """
    dearer = relaxation.costs - relaxation.costs.min(axis=1)[:, None]
    cheapest = float(relaxation.costs.min(axis=1).sum())
    needed = np.isfinite(relaxation.costs)
    if cost < math.inf:  # dear candidates are useless, and would spoil the solver's tolerances
        needed &= (relaxation.bound + relaxation.reduced_costs <= cost) & (cheapest + dearer <= cost)
    needed[np.arange(len(base)), base] = False
    flat = np.flatnonzero(needed)
    reduced_costs = relaxation.reduced_costs.flat[flat]
    order = np.argsort(reduced_costs, kind="stable")
    left_out = float(reduced_costs[order[n_moves]]) if n_moves < len(order) else math.inf
    return flat[order[:n_moves]], left_out


@dataclass(frozen=True, slots=True)
class _Core:
    """The best choice of a core, and a lower bound of all its choices' costs."""

    chosen: np.ndarray
    bound: float
    solver: str


def _solve_core(
    relaxation: Relaxation, base: np.ndarray, moves: np.ndarray, allowed: SizeRange, gap: float
) -> _Core | None:
    """Choose among moves away from `base`, at most one per unit; None where no choice is allowed.

    Args:
        base: (U,) a candidate per unit.
        moves: (n,) flat indices of (unit, candidate).
        allowed: bytes of all units.
        gap: absolute gap at which the search may stop, in the unit of the costs.
    """
    units, candidates = np.unravel_index(moves, relaxation.costs.shape)
    costs = relaxation.costs[units, candidates] - relaxation.costs[units, base[units]]
    sizes = relaxation.sizes[units, candidates]
    growths = sizes - relaxation.sizes[units, base[units]]
    base_size, base_cost = relaxation.total_size(base), relaxation.total_cost(base)
    # Solvers compare with absolute tolerances: costs are brought near one, sizes counted in the grid they all lie on.
    scale = float(np.abs(costs).max(initial=0.0)) or 1.0
    grid = int(np.gcd.reduce(growths)) or 1
    problem = pulp.LpProblem("types", pulp.LpMinimize)
    variables = [problem.add_variable(f"x_{u}_{c}", 0, 1) for u, c in zip(units, candidates, strict=True)]
    problem += pulp.LpAffineExpression(zip(variables, (costs / scale).tolist(), strict=True))
    # How many more units of each size there are than in the base is an integer. Given these few counts, who has which
    # size is an assignment problem, whose basic solutions are whole, so that the search branches on the counts alone.
    ends: dict[int, list[tuple[pulp.LpVariable, int]]] = {}
    for variable, growth, size in zip(variables, growths.tolist(), sizes.tolist(), strict=True):
        if growth:
            ends.setdefault(size, []).append((variable, 1))
            ends.setdefault(size - growth, []).append((variable, -1))
    grown = []
    for size, arrivals in sorted(ends.items()):
        more = problem.add_variable(f"n_{size}", -len(arrivals), len(arrivals), pulp.LpInteger)
        problem += pulp.LpAffineExpression([*arrivals, (more, -1)]) == 0
        grown.append((more, size // grid))  # sizes of one unit leave the same remainder
    problem += pulp.LpAffineExpression(grown) <= (allowed.budget - base_size) // grid
    problem += pulp.LpAffineExpression(grown) >= -((base_size - allowed.floor) // grid)
    by_unit: dict[int, list[pulp.LpVariable]] = {}
    for unit, variable in zip(units.tolist(), variables, strict=True):
        by_unit.setdefault(unit, []).append(variable)
    for alternatives in by_unit.values():
        if len(alternatives) > 1:
            problem += pulp.lpSum(alternatives) <= 1

    name, status, bound = _run(problem, gap / scale)
    if any(0.01 < (variable.value() or 0.0) < 0.99 for variable in variables):  # a solution between basic ones
        for variable in variables:
            variable.cat = pulp.LpInteger
        name, status, bound = _run(problem, gap / scale)
    if status == pulp.LpStatusInfeasible:
        return None
    taken = np.array([(variable.value() or 0.0) > 0.5 for variable in variables], dtype=bool)
    chosen = base.copy()
    chosen[units[taken]] = candidates[taken]
    size = relaxation.total_size(chosen)
    if status != pulp.LpStatusOptimal or not allowed.floor <= size <= allowed.budget:
        limits = f"allowed were {allowed.floor} to {allowed.budget}"
        raise ModeGgufError(f"{name} ended as {pulp.LpStatus[status].lower()} with {size} bytes, {limits}")
    return _Core(chosen, base_cost + (bound - TOLERANCE) * scale, name)


def _run(problem: pulp.LpProblem, gap: float) -> tuple[str, int, float]:
    """Solve in place, to an absolute gap; gives the solver's name, pulp's status and the proven lower bound."""
    highs = pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=gap, threads=1, **HIGHS_OPTIONS)
    if highs.available():
        status = problem.solve(highs)
        return "HiGHS", status, float(problem.solverModel.getInfo().mip_dual_bound)
    with warnings.catch_warnings():
        # PuLP 4 will move its CBC binary to an extra of 600 MB; up to then (pyproject pins < 4) it lies in the wheel.
        warnings.simplefilter("ignore", DeprecationWarning)
        cbc = pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, gapAbs=gap, threads=1, options=CBC_OPTIONS)
    status = problem.solve(cbc)
    # CBC's interface reports no bound; what it proved is the gap it was asked for.
    return "CBC", status, float(pulp.value(problem.objective) or 0.0) - gap
