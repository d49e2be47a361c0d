"""The integer programme against exhaustive search, and what it does when nothing fits."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mode_gguf.allocation.solver import RELATIVE_GAP, solve
from mode_gguf.allocation.units import AllocationUnit, Candidate
from mode_gguf.errors import InfeasibleBudgetError
from mode_gguf.quantization.types import QUANT_TYPES

TYPES = [QUANT_TYPES[name] for name in ("Q2_K", "Q3_K", "Q4_K")]


def unit(name: str, rows: int, costs: list[float]) -> AllocationUnit:
    candidates = tuple(Candidate(t, rows * t.row_bytes(256), c) for t, c in zip(TYPES, costs, strict=True))
    return AllocationUnit(name, (name,), rows * 256, candidates)


unit_lists = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.floats(1e-9, 1.0), min_size=3, max_size=3)), min_size=1, max_size=5
)


@settings(max_examples=40, deadline=None)
@given(unit_lists, st.floats(2.7, 4.4))
def test_cost_is_the_least_there_is(drawn: list[tuple[int, list[float]]], bpw: float) -> None:
    units = [unit(f"u{i}", rows, sorted(costs, reverse=True)) for i, (rows, costs) in enumerate(drawn)]
    budget = int(bpw * sum(u.n_weights for u in units) / 8)
    best = min(
        math.fsum(candidate.cost for candidate in choice)
        for choice in itertools.product(*(u.candidates for u in units))
        if sum(candidate.size_bytes for candidate in choice) <= budget
    )
    solution = solve(units, budget)
    assert solution.size_bytes <= budget
    assert best <= solution.objective * (1 + 1e-9)
    assert solution.objective <= best * (1 + RELATIVE_GAP) + 1e-9 * max(c.cost for u in units for c in u.candidates)
    assert solution.bound <= best * (1 + 1e-6) + 1e-9
    assert solution.gap <= 2 * RELATIVE_GAP


def test_same_input_gives_same_choice() -> None:
    units = [unit(f"u{i}", 10 + i % 7, [1.0 / (i + 1), 0.3 / (i + 1), 0.1 / (i + 1)]) for i in range(60)]
    budget = int(3.1 * sum(u.n_weights for u in units) / 8)
    assert solve(units, budget).choices == solve(units, budget).choices


def test_floor_fills_a_budget_that_costs_would_leave_empty() -> None:
    units = [unit(f"u{i}", 10, [0.0, 0.0, 0.0]) for i in range(20)]
    budget = int(3.5 * sum(u.n_weights for u in units) / 8)
    assert budget * 0.97 <= solve(units, budget, floor=int(budget * 0.97)).size_bytes <= budget


def test_impossible_budget_is_infeasible() -> None:
    with pytest.raises(InfeasibleBudgetError, match="between 0 and 100 bytes"):
        solve([unit("u", 10, [1.0, 0.5, 0.1])], 100)


def test_cbc_takes_over_when_highs_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [unit(f"u{i}", 10 + i % 7, [1.0 / (i + 1), 0.3 / (i + 1), 0.1 / (i + 1)]) for i in range(30)]
    budget = int(3.1 * sum(u.n_weights for u in units) / 8)
    with_highs = solve(units, budget)
    monkeypatch.setattr("pulp.HiGHS.available", lambda self: False)
    with_cbc = solve(units, budget)
    assert (with_highs.solver, with_cbc.solver) == ("HiGHS", "CBC")
    assert with_cbc.objective == pytest.approx(with_highs.objective, rel=2 * RELATIVE_GAP)
