"""The frontier: from the smallest plan to the largest, never worse for more bytes, beside uniform plans as they are."""

from dataclasses import replace

import pytest

from mode_gguf.allocation.frontier import Frontier, frontier
from mode_gguf.allocation.planner import uniform_plan
from mode_gguf.allocation.presets import PRESETS
from mode_gguf.allocation.units import CandidateTypes
from mode_gguf.architectures.tensors import Role
from mode_gguf.quantization.types import QUANT_TYPES
from tests.allocation.test_planner import EXPERT_TYPES, MADE_FROM, TYPES, measurements, model


def made(preset: str = "mode", points: int = 9) -> Frontier:
    tensors = model()
    return frontier("m", tensors, measurements(tensors), preset=PRESETS[preset], types=TYPES, points=points)


def test_points_go_from_the_smallest_plan_to_the_largest() -> None:
    found = made()
    sizes = [point.size_bytes for point in found.points]
    assert len(sizes) == 9
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (found.lowest_bytes, found.highest_bytes)
    step = (found.highest_bytes - found.lowest_bytes) / 8
    for index, size in enumerate(sizes):
        budget = found.lowest_bytes + index * step
        assert 0.99 * budget <= size <= budget
    assert found.points[0].expert_shares == {"Q2_K": 1.0}
    assert found.points[-1].expert_shares == {"Q4_K": 1.0}


def test_predictions_fall_and_are_told_apart_by_answers() -> None:
    tensors, found = model(), made()
    assert found.answers == ("text", "image")
    totals = [sum(point.predicted) for point in found.points]
    assert totals == sorted(totals, reverse=True)
    arrays = measurements(tensors).arrays
    units = [arrays[f"{t.name}.unit"] for t in tensors if t.role is not Role.KEEP]
    for point, candidate in ((found.points[0], 0), (found.points[-1], -1)):
        for answer in range(2):
            assert point.predicted[answer] == pytest.approx(sum(unit[answer, :, candidate].sum() for unit in units))
    assert all(point.gap is not None and point.gap <= 1e-4 for point in found.points)


def test_answer_weights_choose_but_do_not_scale() -> None:
    tensors = model()
    only_text = replace(PRESETS["mode"], costs=replace(PRESETS["mode"].costs, answer_weights=(1.0, 0.0)))
    found = frontier("m", tensors, measurements(tensors), preset=only_text, types=TYPES, points=9)
    for text, both in zip(found.points[1:-1], made().points[1:-1], strict=True):
        assert text.predicted[0] <= both.predicted[0] * (1 + 1e-4)
        assert text.predicted[1] > 0


def test_uniform_points_are_uniform_plans() -> None:
    found = made()
    assert [point.uniform for point in found.uniform] == list(EXPERT_TYPES)
    for point in found.uniform:
        plan = uniform_plan(model(), MADE_FROM, QUANT_TYPES[str(point.uniform)])
        assert point.size_bytes == plan.size_bytes
        assert point.bpw == pytest.approx(plan.bpw)
        assert point.expert_shares == {point.uniform: 1.0}
        better = [planned for planned in found.points if planned.size_bytes <= point.size_bytes]
        assert sum(better[0].predicted) >= sum(point.predicted) > 0
    assert found.uniform[0].predicted == pytest.approx(found.points[0].predicted)


def test_a_uniform_type_whose_others_were_not_measured_is_left_out() -> None:
    tensors = model()
    measured = replace(measurements(tensors), dense_types=("Q5_K", "Q6_K", "Q8_0", "F16"))
    types = CandidateTypes(TYPES.expert, (QUANT_TYPES["Q5_K"], QUANT_TYPES["Q8_0"]))
    assert frontier("m", tensors, measured, preset=PRESETS["mode"], types=types, points=2).uniform == []


def test_what_is_no_divergence_is_one_cost() -> None:
    found = made("paper")
    assert (found.answers, found.preset, found.sensitivity) == (("cost",), "paper", "expert-mse")
    assert {len(point.predicted) for point in (*found.points, *found.uniform)} == {1}
    assert found.points[0].size_bytes == found.lowest_bytes
    assert found.points[-1].size_bytes == found.highest_bytes


def test_costs_of_zero_have_a_frontier() -> None:
    tensors = model()
    measured = measurements(tensors)
    nothing = replace(measured, arrays={name: 0 * array for name, array in measured.arrays.items()})
    found = frontier("m", tensors, nothing, preset=PRESETS["mode"], types=TYPES, points=2)
    assert {value for point in found.points for value in point.predicted} == {0.0}
    assert Frontier.model_validate_json(found.model_dump_json()) == found
