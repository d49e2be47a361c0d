"""Costs: every combination is the formula it is named after, and weights and floors do what they say."""

import numpy as np
import pytest

from mode_gguf.allocation.costs import (
    CostModel,
    ExpertUse,
    MeasuredCosts,
    cost_of_types,
    expert_frequency,
    expert_units,
    tensor_units,
)
from mode_gguf.allocation.units import CandidateTypes
from mode_gguf.architectures.tensors import ALL_ROWS, Role, SourceTensor
from mode_gguf.errors import InputError, UsageError
from mode_gguf.quantization.types import QUANT_TYPES

E, TYPES = 3, ("Q2_K", "Q4_K")
CANDIDATES = CandidateTypes(tuple(QUANT_TYPES[name] for name in TYPES), tuple(QUANT_TYPES[name] for name in TYPES))
COUNTS = np.array([[6, 3, 1], [0, 2, 2], [40, 40, 0]])
WEIGHTS = np.array([[3.0, 2.0, 0.5], [0.0, 1.0, 1.5], [30.0, 5.0, 0.0]])


def unread(index: int, rows: slice = ALL_ROWS) -> np.ndarray:
    raise AssertionError("costs read no weights")


GATE = SourceTensor(
    "blk.0.ffn_gate_exps.weight", (E, 256, 256), Role.EXPERT, ("gate",), unread, layer=0, projection="gate"
)
ATTENTION = SourceTensor("blk.0.attn_q.weight", (256, 256), Role.DENSE, ("q",), unread, "blk.0.attn_q.weight", layer=0)


@pytest.fixture
def measured() -> MeasuredCosts:
    generator = np.random.default_rng(5)
    sensitivity = generator.random((2, 3, E, 2))
    arrays = {
        f"{GATE.name}.expert": sensitivity,
        f"{GATE.name}.unit": 10 * sensitivity.sum(axis=2),
        f"{GATE.name}.weight_error": generator.random((E, 2)),
        "blk.0.ffn_exps.expert": 3 * sensitivity,
        "blk.0.ffn_exps.weight_error": generator.random((E, 2)),
        f"{ATTENTION.name}.unit": generator.random((2, 3, 2)),
        f"{ATTENTION.name}.weight_error": generator.random((1, 2)),
    }
    return MeasuredCosts(arrays, TYPES, TYPES, {0: ExpertUse(COUNTS, WEIGHTS)})


def expert_costs(measured: MeasuredCosts, model: CostModel) -> np.ndarray:
    units = expert_units([GATE, ATTENTION], CANDIDATES, measured, model)
    return np.array([[candidate.cost for candidate in unit.candidates] for unit in units if unit.is_expert])


def tensor_costs(measured: MeasuredCosts, model: CostModel, tensor: SourceTensor) -> list[float]:
    (unit,) = tensor_units([tensor], CANDIDATES, measured, model)
    return [candidate.cost for candidate in unit.candidates]


def test_sensitivity_is_summed_by_weight(measured: MeasuredCosts) -> None:
    model = CostModel(answer_weights=(1.0, 0.5), modality_weights=(1.0, 2.0, 0.0))
    d = 3 * measured.arrays[f"{GATE.name}.expert"]
    expected = d[0, 0] + 2 * d[0, 1] + 0.5 * d[1, 0] + d[1, 1]
    np.testing.assert_allclose(expert_costs(measured, model), expected)
    # A whole tensor was measured as such: its experts' changes add up within a token before they are squared.
    unit = 10 * measured.arrays[f"{GATE.name}.expert"].sum(axis=2)
    np.testing.assert_allclose(tensor_costs(measured, CostModel(), GATE), unit.sum(axis=(0, 1)))


def test_product_is_equation_4(measured: MeasuredCosts) -> None:
    model = CostModel("product", modality_weights=(1.0, 1.0, 0.0))
    f = COUNTS / COUNTS.sum(axis=1, keepdims=True)
    d = measured.arrays[f"{GATE.name}.expert"].sum(axis=0)
    expected = f[0, :, None] * d[0] + f[1, :, None] * d[1]
    np.testing.assert_allclose(expert_costs(measured, model), 3 * expected)
    np.testing.assert_allclose(tensor_costs(measured, model, GATE), expected.sum(axis=0))


def test_frequency_alone_knows_no_activations(measured: MeasuredCosts) -> None:
    model = CostModel("frequency", modality_weights=(1.0, 1.0, 0.0))
    f = COUNTS / COUNTS.sum(axis=1, keepdims=True)
    expected = (f[0] + f[1])[:, None] * measured.arrays["blk.0.ffn_exps.weight_error"]
    np.testing.assert_allclose(expert_costs(measured, model), expected)


def test_pmq_counts_all_tokens_alike(measured: MeasuredCosts) -> None:
    d = 3 * measured.arrays[f"{GATE.name}.expert"].sum(axis=0)
    phi, omega = COUNTS.sum(axis=0) / COUNTS.sum(), WEIGHTS.sum(axis=0) / WEIGHTS.sum()
    squared_error = (COUNTS[:, :, None] * d).sum(axis=0) / COUNTS.sum(axis=0)[:, None]
    expected = (phi * omega**1.5)[:, None] * squared_error
    np.testing.assert_allclose(expert_costs(measured, CostModel("pmq")), expected)


def test_random_costs_belong_to_the_seed_and_fall_with_the_error(measured: MeasuredCosts) -> None:
    first, again, other = (expert_costs(measured, CostModel("random", seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    ratio = first / measured.arrays["blk.0.ffn_exps.weight_error"]
    np.testing.assert_allclose(ratio[:, 0], ratio[:, 1])
    assert len(set(ratio[:, 0])) == E
    assert min(tensor_costs(measured, CostModel("random"), ATTENTION)) > 0


def test_pooled_frequency_lets_the_many_tokens_decide() -> None:
    by_modality = expert_frequency(COUNTS, CostModel())
    np.testing.assert_allclose(by_modality.sum(axis=1), 1)
    pooled = expert_frequency(COUNTS, CostModel(pooled=True))
    np.testing.assert_allclose(pooled, np.tile(COUNTS.sum(axis=0) / COUNTS.sum(), (3, 1)))
    without_redundant = expert_frequency(COUNTS, CostModel(pooled=True, modality_weights=(1.0, 1.0, 0.0)))
    np.testing.assert_allclose(without_redundant[0], COUNTS[:2].sum(axis=0) / COUNTS[:2].sum())


def test_frequency_floor_lifts_the_unused_and_keeps_a_modality_without_tokens_at_zero() -> None:
    counts = np.vstack([COUNTS[:2], np.zeros((1, E), np.int64)])
    floored = expert_frequency(counts, CostModel(frequency_floor=0.5))
    assert floored[1, 0] == pytest.approx((0.5 / E) / (0.5 / E + 1))
    np.testing.assert_allclose(floored[:2].sum(axis=1), 1)
    assert not floored[2].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality_weights": (1.0, -1.0, 0.0)}, "modality weights"),
        ({"answer_weights": (0.0, 0.0)}, "answer weights"),
        ({"answer_weights": (float("nan"), 1.0)}, "answer weights"),
        ({"frequency_floor": 1.5}, "frequency floor"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CostModel(**options)  # type: ignore[arg-type]


def test_what_was_not_measured_is_named(measured: MeasuredCosts) -> None:
    del measured.arrays[f"{GATE.name}.weight_error"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"ffn_gate_exps\.weight\.weight_error is missing"):
        tensor_costs(measured, CostModel("random"), GATE)


def test_types_cost_what_their_units_do(measured: MeasuredCosts) -> None:
    model, (q2, q4) = CostModel(), (QUANT_TYPES[name] for name in TYPES)
    gate, attention = tensor_costs(measured, model, GATE), tensor_costs(measured, model, ATTENTION)
    whole = cost_of_types([GATE, ATTENTION], {GATE.name: [q2], ATTENTION.name: [q4]}, measured, model)
    assert whole == pytest.approx(gate[0] + attention[1])
    experts = expert_costs(measured, model)
    mixed = cost_of_types([GATE], {GATE.name: [q2, q4, q2]}, measured, model)
    assert mixed == pytest.approx(experts[0, 0] + experts[1, 1] + experts[2, 0])
    with pytest.raises(InputError, match="not measured at Q6_K"):
        cost_of_types([ATTENTION], {ATTENTION.name: [QUANT_TYPES["Q6_K"]]}, measured, model)
    measured.arrays[f"{ATTENTION.name}.unit"][...] = np.nan
    assert cost_of_types([ATTENTION], {ATTENTION.name: [q4]}, measured, model) == 0, "no type fits its rows"
