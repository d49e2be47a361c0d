"""The integer programme against dynamic programming, and what it does when nothing fits."""

import math

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mode_gguf.allocation import solver
from mode_gguf.allocation.reachable import greatest_size
from mode_gguf.allocation.solver import RELATIVE_GAP, SizeRange, solve, solve_layers
from mode_gguf.allocation.units import AllocationUnit, Candidate
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.quantization.types import QUANT_TYPES

TYPES = [QUANT_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]


def unit(name: str, rows: int, costs: list[float], layer: int | None = None) -> AllocationUnit:
    candidates = tuple(Candidate(t, rows * t.row_bytes(256), c) for t, c in zip(TYPES, costs, strict=False))
    return AllocationUnit(name, (name,), rows * 256, candidates, layer)


def sized(name: str, candidates: list[tuple[int, float]], layer: int | None = None) -> AllocationUnit:
    return AllocationUnit(
        name, (name,), 256, tuple(Candidate(t, *c) for t, c in zip(TYPES, candidates, strict=False)), layer
    )


def budget_of(units: list[AllocationUnit], bpw: float) -> int:
    return int(bpw * sum(u.n_weights for u in units) / 8)


def exact(units: list[AllocationUnit], floor: int, budget: int) -> float | None:
    """The least cost there is, by dynamic programming over sizes; None if nothing fits."""
    least = {0: 0.0}
    for u in units:
        following: dict[int, float] = {}
        for size, cost in least.items():
            for candidate in u.candidates:
                total = size + candidate.size_bytes
                following[total] = min(following.get(total, math.inf), cost + candidate.cost)
        least = following
    return min((cost for size, cost in least.items() if floor <= size <= budget), default=None)


costs = st.one_of(st.floats(1e-9, 1.0), st.sampled_from([0.0, 0.25, 1.0, 1e-9, 1e3]))
sizes = st.one_of(st.integers(1, 60).map(lambda n: 84 * n), st.integers(1, 10**6))
any_units = st.lists(st.lists(st.tuples(sizes, costs), min_size=1, max_size=5), min_size=1, max_size=7).map(
    lambda drawn: [sized(f"u{i}", candidates) for i, candidates in enumerate(drawn)]
)


@settings(max_examples=150, deadline=None)
@given(any_units, st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.995, 1.0]))
def test_cost_is_the_least_there_is(units: list[AllocationUnit], share: float, filled: float) -> None:
    smallest, largest = (sum(bound(c.size_bytes for c in u.candidates) for u in units) for bound in (min, max))
    budget = int(smallest + share * (largest - smallest))
    floor = int(filled * budget)
    best = exact(units, floor, budget)
    if best is None:
        with pytest.raises(InfeasibleBudgetError, match=f"between {floor} and {budget} bytes"):
            solve(units, budget, floor=floor)
        return
    solution = solve(units, budget, floor=floor)
    rounding = 1e-12 * max(c.cost for u in units for c in u.candidates)
    assert floor <= solution.size_bytes <= budget
    assert solution.objective == math.fsum(choice.cost for choice in solution.choices)
    assert best - rounding <= solution.objective <= best * (1 + 1.01 * RELATIVE_GAP) + rounding
    assert solution.bound <= best * (1 + 1e-9) + rounding
    assert solution.gap <= RELATIVE_GAP


expert_costs = st.lists(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3), min_size=8, max_size=8)


@settings(max_examples=40, deadline=None)
@given(expert_costs, expert_costs, st.floats(2.65, 4.45))
def test_equal_average_per_layer_is_the_exact_solver_s(
    first: list[list[float]], second: list[list[float]], bpw: float
) -> None:
    layers = [
        [unit(f"{layer}.{e}", 12, c, layer) for e, c in enumerate(drawn)] for layer, drawn in enumerate((first, second))
    ]
    units = [u for pair in zip(*layers, strict=True) for u in pair]  # layers need not be together
    ranges: dict[int | None, SizeRange] = {}
    for layer, members in enumerate(layers):
        most = greatest_size(members, budget_of(members, bpw))
        assert most is not None
        ranges[layer] = SizeRange(most, most)
    solution = solve_layers(units, ranges)
    best = 0.0
    for layer, members in enumerate(layers):
        size = sum(c.size_bytes for c, u in zip(solution.choices, units, strict=True) if u.layer == layer)
        assert ranges[layer].floor == size == ranges[layer].budget
        least = exact(members, size, size)
        assert least is not None
        assert exact(members, size + 1, budget_of(members, bpw)) is None, "there is a size closer to the budget"
        best += least
    assert solution.objective == pytest.approx(best, rel=1.01 * RELATIVE_GAP, abs=1e-12)
    assert solution.bound <= best * (1 + 1e-9)
    assert [choice in u.candidates for choice, u in zip(solution.choices, units, strict=True)] == [True] * len(units)


def test_many_units_are_proven_from_a_small_core() -> None:
    """At 2.7 bits steps of one size leave room that only mixtures of others can fill, of units that are much alike."""
    units = [
        unit(f"u{i}", 24, [(1 + i * 37 % 101) * 3.0**-b * (1 + i % 13 / 100) for b in range(5)]) for i in range(3000)
    ]
    for bpw in (2.7, 3.3, 4.5, 6.0):
        budget = budget_of(units, bpw)
        solution = solve(units, budget, floor=int(0.995 * budget))
        assert solution.gap <= RELATIVE_GAP
        assert solution.bound < solution.objective or solution.solver == "relaxation"


def test_a_core_that_proves_too_little_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mode_gguf.allocation.solver.CORE_MOVES", 1)
    units = [unit(f"u{i}", 5 + i * i % 11, [1 + i % 5, 0.4, 0.1 + i % 3 / 10]) for i in range(9)]
    budget = budget_of(units, 3.2)
    least = exact(units, budget - 400, budget)
    assert least is not None
    assert solve(units, budget, floor=budget - 400).objective == pytest.approx(least, rel=1.01 * RELATIVE_GAP)


def test_same_input_gives_same_choice() -> None:
    units = [unit(f"u{i}", 10 + i % 7, [1.0 / (i + 1), 0.3 / (i + 1), 0.1 / (i + 1)]) for i in range(60)]
    budget = budget_of(units, 3.1)
    assert solve(units, budget).choices == solve(units, budget).choices


def test_floor_fills_a_budget_that_costs_would_leave_empty() -> None:
    units = [unit(f"u{i}", 10, [0.0, 0.0, 0.0]) for i in range(20)]
    budget = budget_of(units, 3.5)
    assert budget * 0.97 <= solve(units, budget, floor=int(budget * 0.97)).size_bytes <= budget


def test_equal_costs_need_no_search() -> None:
    units = [unit(f"u{i}", 10, [1.0, 0.5, 0.25]) for i in range(5000)]
    assert solve(units, budget_of(units, 3.3), floor=budget_of(units, 3.29)).gap <= RELATIVE_GAP


def test_impossible_budget_is_infeasible() -> None:
    with pytest.raises(InfeasibleBudgetError, match="between 0 and 100 bytes"):
        solve([unit("u", 10, [1.0, 0.5, 0.1])], 100)
    units = [unit("a", 10, [1.0, 0.5, 0.1], 0), unit("b", 10, [1.0, 0.5, 0.1], 1), unit("c", 10, [1.0])]
    ranges = {0: SizeRange(0, 1440), 1: SizeRange(841, 1099), None: SizeRange(0, 840)}
    with pytest.raises(InfeasibleBudgetError, match="layer 1: no assignment of types takes between 841 and 1099 bytes"):
        solve_layers(units, ranges)
    with pytest.raises(InfeasibleBudgetError, match=r"outside the layers: .* 0 and 1 bytes"):
        solve_layers(units, ranges | {1: SizeRange(0, 900), None: SizeRange(0, 1)})


def test_cbc_takes_over_when_highs_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [unit(f"u{i}", 10 + i % 7, [1.0 / (i + 1), 0.3 / (i + 1), 0.1 / (i + 1)]) for i in range(30)]
    budget = budget_of(units, 3.1)
    with_highs = solve(units, budget)
    monkeypatch.setattr("pulp.HiGHS.available", lambda self: False)
    with_cbc = solve(units, budget)
    assert (with_highs.solver, with_cbc.solver) == ("HiGHS", "CBC")
    assert with_cbc.gap <= RELATIVE_GAP
    assert with_cbc.objective == pytest.approx(with_highs.objective, rel=2 * RELATIVE_GAP)
    with pytest.raises(InfeasibleBudgetError):
        solve(units, budget | 1, floor=budget | 1)  # every size is even


def test_a_fractional_solution_is_searched_again_for_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assignment's basic solutions are whole, but a solver may stop at a mixture of two of them."""
    units = [unit(f"u{i}", 10 + i % 3, [1.0 / (i + 1), 0.3 / (i + 1), 0.1 / (i + 1)]) for i in range(12)]
    budget = budget_of(units, 3.1)
    expected = solve(units, budget)
    integers: list[bool] = []

    def mixed_at_first(problem: pulp.LpProblem, gap: float) -> tuple[str, int, float]:
        result = run(problem, gap)
        variables = [variable for variable in problem.variables() if variable.name.startswith("x_")]
        integers.append(all(variable.cat == pulp.LpInteger for variable in variables))
        if len(integers) == 1:
            variables[0].varValue = 0.5
        return result

    run = solver._run
    monkeypatch.setattr(solver, "_run", mixed_at_first)
    assert solve(units, budget) == expected
    assert integers[:2] == [False, True]
