"""How pieces of a measurement are put together, and what plans are held against."""

import numpy as np
import pytest

from check_fisher_stability import bytes_moved, combined, cost_of, costs_off, subsets
from mode_gguf.allocation.units import AllocationUnit, Candidate
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.quantization.types import QUANT_TYPES


def table(positions: tuple[int, int], draws: int, text: float, image: float) -> SensitivityTable:
    unit = np.array([text, image, np.nan])[:2, None, None] * np.ones((2, 3, 1))
    arrays = {"a.unit": unit, "a.weight_error": np.ones((1, 1))}
    return SensitivityTable("m", "f", "fisher", ("Q2_K",), ("Q4_K",), arrays, positions, draws, 0, {})


def test_pieces_weigh_by_positions_and_draws_of_each_kind_of_answer() -> None:
    arrays = combined([table((10, 0), 1, 4.0, 0.0), table((10, 5), 3, 8.0, 2.0)])
    assert list(arrays) == ["a.unit"]
    np.testing.assert_allclose(arrays["a.unit"][:, 0, 0], [(10 * 4 + 30 * 8) / 40, 2.0])


def test_subsets_are_disjoint_and_of_the_size_asked_for() -> None:
    batches = (1, 1, 1, 3, 3, 3)
    assert list(subsets(4, batches, 0.5, 6)) == [
        ([0, 1], [3, 4]),
        ([0, 1], [0, 1, 2, 5]),
        ([2, 3], [3, 4]),
        ([2, 3], [0, 1, 2, 5]),
    ]
    assert len(list(subsets(8, batches, 1 / 8, 1))) == 8 * 3
    assert list(subsets(8, batches, 1.0, 12)) == [(list(range(8)), list(range(6)))]
    assert list(subsets(8, batches, 1.0, 13)) == []


def unit(name: str, costs: tuple[float, float]) -> AllocationUnit:
    kinds = QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"]
    candidates = tuple(Candidate(kind, size, cost) for kind, size, cost in zip(kinds, (10, 30), costs, strict=True))
    return AllocationUnit(name, (name,), 100, candidates)


def test_plans_are_held_against_the_reference() -> None:
    reference = [unit("a", (4.0, 1.0)), unit("b", (3.0, 2.0))]
    plan, best = {"a": "Q2_K", "b": "Q4_K"}, {"a": "Q4_K", "b": "Q2_K"}
    assert (cost_of(plan, reference), cost_of(best, reference)) == (6.0, 4.0)
    assert bytes_moved(plan, best, reference) == 1.0
    assert bytes_moved({"a": "Q4_K", "b": "Q4_K"}, best, reference) == pytest.approx(10 / 40)
    assert costs_off([unit("a", (5.0, 1.0)), unit("b", (2.0, 2.0))], reference) == pytest.approx(2 / 10)
