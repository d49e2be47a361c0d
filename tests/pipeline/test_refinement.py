"""Refinement of plans, on measured functions that are known and on a whole pico model."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mode_gguf.allocation.costs import CostModel, MeasuredCosts, tensor_units
from mode_gguf.allocation.solver import solve
from mode_gguf.allocation.units import AllocationUnit, Candidate, CandidateTypes
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import UsageError
from mode_gguf.forward.modality import TEXT_ATTENTION
from mode_gguf.importance.quantized_kl import KlSettings
from mode_gguf.importance.unit_kl import open_kl_model
from mode_gguf.pipeline.refinement import Measure, measure_plans, refine
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from tests.calibration.conftest import noise_image

NAMES = ("Q2_K", "Q3_K", "Q4_K")
SIZES = {"Q2_K": 80, "Q3_K": 110, "Q4_K": 140}


def units_with(costs: Sequence[Sequence[float]]) -> list[AllocationUnit]:
    """Units of equal size with these costs at the three types."""
    return [
        AllocationUnit(
            f"u{number}",
            (f"u{number}",),
            256,
            tuple(Candidate(QUANT_TYPES[name], SIZES[name], cost) for name, cost in zip(NAMES, row, strict=True)),
        )
        for number, row in enumerate(costs)
    ]


class Interacting:
    """KL that is not additive: each unit's error, and a product of neighbours' errors the solver does not know."""

    def __init__(self, errors: Sequence[Sequence[float]], coupling: float) -> None:
        self.errors, self.coupling, self.calls = errors, coupling, 0

    def of(self, types: Mapping[str, QuantType]) -> np.ndarray:
        e = [self.errors[u][NAMES.index(types[f"u{u}"].name)] for u in range(len(self.errors))]
        text = sum(e) + self.coupling * sum(a * b for a, b in pairwise(e))
        return np.array([text, 0.5 * sum(e[::2])])

    def __call__(
        self, types: Mapping[str, QuantType], moves: Sequence[tuple[str, QuantType]]
    ) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        moved = [self.of({**types, name: quant_type}) for name, quant_type in moves]
        return self.of(types), np.array(moved).reshape(-1, 2)


@pytest.fixture
def interacting() -> Interacting:
    generator = np.random.default_rng(5)
    scale = generator.uniform(0.5, 2, (8, 1))
    return Interacting((scale * np.array([1.0, 0.3, 0.08])).tolist(), coupling=3.0)


def best_by_hand(measure: Interacting, units: Sequence[AllocationUnit], budget: int) -> float:
    found = np.inf
    for code in range(3 ** len(units)):
        digits = [code // 3**u % 3 for u in range(len(units))]
        choices = [unit.candidates[digit] for unit, digit in zip(units, digits, strict=True)]
        if sum(c.size_bytes for c in choices) <= budget:
            kl = measure.of({unit.name: c.quant_type for unit, c in zip(units, choices, strict=True)})
            found = min(found, float(kl.sum()))
    return found


def test_finds_what_an_additive_model_misses(interacting: Interacting) -> None:
    units = units_with(interacting.errors)
    budget = 8 * 110
    first = solve(units, budget).choices
    result = refine(units, first, budget, interacting, rounds=6)
    before, after = sum(result.history[0].kl), min(sum(t.kl) for t in result.history if t.accepted)
    best = best_by_hand(interacting, units, budget)
    assert after < before
    assert after - best < 0.25 * (before - best)
    kl = interacting.of({unit.name: c.quant_type for unit, c in zip(units, result.choices, strict=True)})
    assert float(kl.sum()) == pytest.approx(after)
    assert all(trial.size_bytes <= budget for trial in result.history)
    objectives = [sum(trial.kl) for trial in result.history if trial.accepted]
    assert objectives == sorted(objectives, reverse=True)
    assert refine(units, first, budget, interacting, rounds=6) == result


def test_an_additive_optimum_stays(interacting: Interacting) -> None:
    additive = Interacting(interacting.errors, coupling=0.0)
    weights = np.array([1.5, 1.0] * 4)  # what image answers add to even units
    units = units_with((weights[:, None] * np.array(additive.errors)).tolist())
    budget = 8 * 110
    first = solve(units, budget).choices
    result = refine(units, first, budget, additive)
    assert result.choices == first
    assert additive.calls == 1


def test_few_units_move_at_once(interacting: Interacting) -> None:
    units = units_with(interacting.errors)
    first = [unit.candidates[1] for unit in units]
    result = refine(units, first, 8 * 110, interacting, rounds=4, max_moves=2)
    assert {len(trial.moved) for trial in result.history[1:]} == {2}
    one = refine(units, first, 8 * 110 + 34, interacting, rounds=1, max_moves=1)
    assert [len(trial.moved) for trial in one.history] == [0, 1]


def test_units_move_by_one_type_per_round() -> None:
    steep = Interacting([[9.0, 4.0, 0.0]], coupling=0.0)
    units = units_with([[9.0, 4.0, 0.0]])
    result = refine(units, [units[0].candidates[0]], 144, steep, rounds=1)
    assert result.choices[0].quant_type.name == "Q3_K"
    result = refine(units, [units[0].candidates[0]], 144, steep, rounds=2)
    assert result.choices[0].quant_type.name == "Q4_K"


def test_a_plan_that_does_not_fall_is_refused_and_fewer_move() -> None:
    """Single moves promise much, any two together are a disaster."""

    def misleading(
        types: Mapping[str, QuantType], moves: Sequence[tuple[str, QuantType]]
    ) -> tuple[np.ndarray, np.ndarray]:
        def kl(types: Mapping[str, QuantType]) -> list[float]:
            larger = sum(t.name == "Q3_K" for t in types.values())
            return [10.0 if larger > 1 else 1.0 - 0.1 * larger, 0.0]

        return np.array(kl(types)), np.array([kl({**types, name: t}) for name, t in moves]).reshape(-1, 2)

    measure: Measure = misleading
    units = units_with([[1.0, 0.5, 0.1]] * 4)
    result = refine(units, [unit.candidates[0] for unit in units], 4 * 110, measure, rounds=1, max_moves=4)
    assert [(len(trial.moved), trial.accepted) for trial in result.history] == [
        (0, True),
        (4, False),
        (2, False),
        (1, True),
    ]
    assert sum(choice.quant_type.name == "Q3_K" for choice in result.choices) == 1


def test_a_first_plan_above_the_budget(interacting: Interacting) -> None:
    units = units_with(interacting.errors)
    with pytest.raises(UsageError, match="takes 1120 bytes, more than its budget of 880"):
        refine(units, [unit.candidates[2] for unit in units], 880, interacting)


def test_on_a_model(pico: Path) -> None:
    """A plan for nothing but size gets better, stays within its size, and the history says what is measured."""
    checkpoint = Checkpoint.open(pico)
    tensors = text_tensors(checkpoint)
    question = (Message("user", "What colour is the square?"), Message("assistant", "The square is red."))
    samples = [
        Sample("text", "tests", text="The quick brown fox jumps over the lazy dog, and the dog does not mind."),
        Sample("image", "tests", messages=question, image=noise_image(0, 64, 64)),
    ]
    types = CandidateTypes(
        tuple(QUANT_TYPES[name] for name in NAMES), tuple(QUANT_TYPES[name] for name in ("Q4_K", "Q6_K"))
    )
    arrays = {
        f"{tensor.name}.unit": np.ones((2, 3, len(types.expert if tensor.role is Role.EXPERT else types.dense)))
        for tensor in tensors
        if tensor.role is not Role.KEEP
    }
    names = (NAMES, ("Q4_K", "Q6_K"))
    units = tensor_units(tensors, types, MeasuredCosts(arrays, *names, {}), CostModel())
    first = [unit.candidates[0] for unit in units[:-6]] + [unit.candidates[-1] for unit in units[-6:]]
    budget = sum(choice.size_bytes for choice in first)
    model = open_kl_model(checkpoint, samples, device="cpu")
    measure = measure_plans(model, KlSettings({}, EXACT, TEXT_ATTENTION), tensors)
    result = refine(units, first, budget, measure, answer_weights=(1.0, 0.5), rounds=1)
    accepted = [trial for trial in result.history if trial.accepted]
    assert len(accepted) == 2
    assert accepted[1].kl[0] + 0.5 * accepted[1].kl[1] < accepted[0].kl[0] + 0.5 * accepted[0].kl[1]
    assert sum(choice.size_bytes for choice in result.choices) == accepted[1].size_bytes <= budget
    assert all(choice in unit.candidates for unit, choice in zip(units, result.choices, strict=True))
    chosen = {unit.name: choice.quant_type for unit, choice in zip(units, result.choices, strict=True)}
    other = next(c.quant_type for c in units[3].candidates if c.quant_type != chosen[units[3].name])
    kl, moved = measure(chosen, [(units[3].name, other)])
    np.testing.assert_allclose(kl, accepted[1].kl, rtol=1e-6)
    alone, _ = measure({**chosen, units[3].name: other}, [])
    np.testing.assert_allclose(moved[0], alone, rtol=2e-3)
    both = [(units[3].name, other), (units[0].name, units[0].candidates[1].quant_type)]
    one_by_one = measure_plans(model, KlSettings({}, EXACT, TEXT_ATTENTION), tensors, pass_bytes=1)(chosen, both)
    for alone, together in zip(one_by_one, measure(chosen, both), strict=True):
        np.testing.assert_allclose(alone, together, rtol=1e-4)
