"""The integer linear programme (MODE section 3.3): one type per unit, least cost, within the budget.

minimise    sum_u sum_b cost(u, b) x(u, b)
subject to  sum_b x(u, b) = 1                        for every unit u
            floor <= sum_u sum_b size(u, b) x(u, b) <= budget
            x(u, b) in {0, 1}
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pulp

from mode_gguf.allocation.units import AllocationUnit, Candidate
from mode_gguf.errors import InfeasibleBudgetError, ModeGgufError

RELATIVE_GAP = 1e-4
"""How far from the proven optimum the solution may be, relative to its cost."""


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


def solve(units: Sequence[AllocationUnit], budget: int, *, floor: int = 0, gap: float = RELATIVE_GAP) -> Solution:
    """Choose one candidate per unit.

    Args:
        units: what to choose for; costs finite and not negative.
        budget: bytes all units may occupy together.
        floor: bytes they must occupy at least, so that a budget is used where costs are flat.
        gap: relative gap at which the search may stop.

    Raises:
        InfeasibleBudgetError: no choice lies between floor and budget.
        ModeGgufError: the solver ended without a proof.
    """
    problem = pulp.LpProblem("types", pulp.LpMinimize)
    chosen = [
        [problem.add_variable(f"x_{u}_{c}", cat=pulp.LpBinary) for c in range(len(unit.candidates))]
        for u, unit in enumerate(units)
    ]
    pairs = [
        (candidate, variable)
        for unit, variables in zip(units, chosen, strict=True)
        for candidate, variable in zip(unit.candidates, variables, strict=True)
    ]
    # Solvers compare costs and sizes with absolute tolerances, so both are brought near one.
    cost_scale = max((candidate.cost for candidate, _ in pairs), default=0.0) or 1.0
    size_scale = max(candidate.size_bytes for candidate, _ in pairs)
    problem += pulp.lpSum(candidate.cost / cost_scale * variable for candidate, variable in pairs)
    size = pulp.lpSum(candidate.size_bytes / size_scale * variable for candidate, variable in pairs)
    problem += size <= budget / size_scale
    if floor:
        problem += size >= floor / size_scale
    for variables in chosen:
        problem += pulp.lpSum(variables) == 1

    name, status, bound = _run(problem, gap)
    if status == pulp.LpStatusInfeasible:
        raise InfeasibleBudgetError(f"no assignment of types takes between {floor} and {budget} bytes")
    choices = tuple(
        max(zip(unit.candidates, variables, strict=True), key=lambda pair: float(pair[1].value() or 0.0))[0]
        for unit, variables in zip(units, chosen, strict=True)
    )
    objective = math.fsum(choice.cost for choice in choices)
    solution = Solution(choices, objective, min(bound * cost_scale, objective), name)
    if status != pulp.LpStatusOptimal or solution.gap > 2 * gap:
        raise ModeGgufError(f"{name} stopped at gap {solution.gap:.2e} without proving {gap:.0e}")
    if not floor <= solution.size_bytes <= budget:
        raise InfeasibleBudgetError(f"{name} used {solution.size_bytes} bytes, allowed were {floor} to {budget}")
    return solution


def _run(problem: pulp.LpProblem, gap: float) -> tuple[str, int, float]:
    """Solve in place; gives the solver's name, pulp's status and the proven lower bound in scaled cost."""
    highs = pulp.HiGHS(msg=False, gapRel=gap, threads=1, random_seed=0)
    if highs.available():
        status = problem.solve(highs)
        return "HiGHS", status, float(problem.solverModel.getInfo().mip_dual_bound)
    with warnings.catch_warnings():
        # PuLP 4 will move its CBC binary to an extra of 600 MB; up to then (pyproject pins < 4) it lies in the wheel.
        warnings.simplefilter("ignore", DeprecationWarning)
        cbc = pulp.PULP_CBC_CMD(msg=False, gapRel=gap, threads=1)
    status = problem.solve(cbc)
    # CBC's interface reports no bound; what it proved is the gap it was asked for.
    return "CBC", status, float(pulp.value(problem.objective) or 0.0) * (1 - gap)
