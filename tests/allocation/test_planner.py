"""Plans: budget kept and used, policies obeyed, costs weighed as the presets say, files that survive editing."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.costs import (
    CostModel,
    ExpertUse,
    MeasuredCosts,
    cost_of_types,
    expert_units,
    tensor_units,
)
from mode_gguf.allocation.plan import Plan, Provenance
from mode_gguf.allocation.planner import UNDERSHOOT, Problem, expert_plan, optimal_plan, uniform_plan
from mode_gguf.allocation.presets import PRESETS, Preset
from mode_gguf.allocation.units import AllocationUnit, Candidate, CandidateTypes, tensor_bytes
from mode_gguf.architectures.tensors import ALL_ROWS, Role, SourceTensor
from mode_gguf.errors import InfeasibleBudgetError, InputError
from mode_gguf.quantization.expert_groups import stored_tensors
from mode_gguf.quantization.fallback_types import stored_as
from mode_gguf.quantization.types import QUANT_TYPES

E, LAYERS = 4, 6
F32 = QUANT_TYPES["F32"]
EXPERT_TYPES, DENSE_TYPES = ("Q2_K", "Q3_K", "Q4_K"), ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
TYPES = CandidateTypes(
    tuple(QUANT_TYPES[name] for name in EXPERT_TYPES), tuple(QUANT_TYPES[name] for name in DENSE_TYPES)
)
MADE_FROM = Provenance(tool_version="0", model="m", model_fingerprint="f")


def tensor(
    name: str, shape: tuple[int, ...], role: Role, layer: int | None = None, projection: str | None = None
) -> SourceTensor:
    def read(index: int, rows: slice = ALL_ROWS) -> np.ndarray:
        raise AssertionError("planning reads no weights")

    seen = name if role in (Role.DENSE, Role.OUTPUT) else None
    return SourceTensor(name, shape, role, (name,), read, seen, layer=layer, projection=projection)


def model(expert_width: int = 256) -> list[SourceTensor]:
    tensors = [tensor("token_embd.weight", (512, 256), Role.EMBEDDING)]
    for layer in range(LAYERS):
        tensors.append(tensor(f"blk.{layer}.attn_q.weight", (256, 256), Role.DENSE, layer))
        tensors.append(tensor(f"blk.{layer}.ffn_gate_inp.weight", (E, 256), Role.KEEP, layer))
        for projection, shape in (("gate", (E, expert_width, 256)), ("down", (E, 256, expert_width))):
            name = f"blk.{layer}.ffn_{projection}_exps.weight"
            tensors.append(tensor(name, shape, Role.EXPERT, layer, projection))
    return tensors


def measurements(
    tensors: list[SourceTensor], seed: int = 0, expert_types: tuple[str, ...] = EXPERT_TYPES
) -> MeasuredCosts:
    generator = np.random.default_rng(seed)
    expert_drop, dense_drop = np.array([1.0, 0.25, 0.06]), np.array([1.0, 0.25, 0.06, 0.001])
    arrays: dict[str, np.ndarray] = {}
    for t in tensors:
        if t.role is Role.EXPERT:
            stored = [stored_as(t, QUANT_TYPES[name]) for name in expert_types]
            drop = expert_drop[[stored.index(one) for one in stored]]
            arrays[f"{t.name}.expert"] = generator.random((2, 3, E, 1)) * drop
            arrays[f"{t.name}.unit"] = arrays[f"{t.name}.expert"].sum(axis=2)
            layer = f"blk.{t.layer}.ffn_exps.expert"
            arrays[layer] = arrays.get(layer, 0) + arrays[f"{t.name}.expert"]
        elif t.role is not Role.KEEP:
            arrays[f"{t.name}.unit"] = generator.random((2, 3, 1)) * dense_drop * 0.1
    use = {layer: ExpertUse(np.full((3, E), 10), np.full((3, E), 2.5)) for layer in range(LAYERS)}
    return MeasuredCosts(arrays, expert_types, DENSE_TYPES, use)


def plan_for(
    tensors: list[SourceTensor],
    measured: MeasuredCosts,
    *,
    bpw: float,
    types: CandidateTypes = TYPES,
    preset: str | Preset = "mode",
) -> Plan:
    budget = Budget(value=bpw)
    chosen = PRESETS[preset] if isinstance(preset, str) else preset
    problem = Problem.of(tensors, measured, budget=budget, types=types, preset=chosen)
    return optimal_plan(problem, MADE_FROM, budget)


@pytest.mark.parametrize("preset", ["mode", "paper"])
@pytest.mark.parametrize("bpw", [3.2, 3.5, 4.0])
def test_budget_is_kept_and_used(preset: str, bpw: float) -> None:
    tensors = model()
    plan = plan_for(tensors, measurements(tensors), bpw=bpw, preset=preset)
    largest_step = QUANT_TYPES["Q4_K"].bits_per_weight - QUANT_TYPES["Q3_K"].bits_per_weight
    one_tensor = largest_step * E * 256 * 256 / sum(t.n_weights for t in tensors)
    assert (bpw * (1 - UNDERSHOOT) if preset == "mode" else bpw - one_tensor) <= plan.bpw <= bpw
    weights = sum(t.n_weights for t in tensors)
    assert plan.bpw == pytest.approx(8 * sum(tensor_bytes(t, plan.types[t.name]) for t in tensors) / weights)
    assert plan.solver is not None
    assert plan.solver.gap <= 1e-4


def test_policies() -> None:
    tensors = model()
    plan = plan_for(tensors, measurements(tensors), bpw=3.3)
    for t in tensors:
        allowed = {Role.KEEP: {"F32"}, Role.EXPERT: set(EXPERT_TYPES)}.get(t.role, set(DENSE_TYPES))
        assert plan.types[t.name].name in allowed


@pytest.mark.parametrize(("width", "stored"), [(128, "Q8_0"), (24, "BF16")])
def test_absorbed_matrices_have_one_type_and_need_no_measurement(width: int, stored: str) -> None:
    plain = model()
    absorbed = [tensor(f"blk.{layer}.attn_k_b.weight", (2, 512, width), Role.ABSORBED, layer) for layer in range(2)]
    tensors = [*plain, *absorbed]
    measured = measurements(plain)
    plan = plan_for(tensors, measured, bpw=3.6)
    assert plan.bpw <= 3.6
    assert plan.bpw == pytest.approx(
        8 * sum(tensor_bytes(t, plan.types[t.name]) for t in tensors) / sum(t.n_weights for t in tensors)
    )
    problem = Problem.of(tensors, measured, budget=Budget(value=3.6), types=TYPES, preset=PRESETS["mode"])
    plans = [plan, uniform_plan(tensors, MADE_FROM, QUANT_TYPES["Q2_K"])]
    plans.append(expert_plan(problem, MADE_FROM, Budget(value=3.6)))
    for one in plans:
        assert {one.types[t.name].name for t in absorbed} == {stored}
        cost = cost_of_types(tensors, {name: (found,) for name, found in plan.types.items()}, measured, CostModel())
        assert cost == pytest.approx(
            cost_of_types(plain, {name: (found,) for name, found in plan.types.items()}, measured, CostModel())
        )
    full = uniform_plan(tensors, MADE_FROM, QUANT_TYPES["BF16"])
    assert {full.types[t.name].name for t in absorbed} == {"BF16"}
    with pytest.raises(InfeasibleBudgetError, match=rf"absorbed matrices of latent attention .* %, as {stored}"):
        plan_for(tensors, measured, bpw=1.0)


def test_a_floor_raises_what_is_absorbed() -> None:
    absorbed = tensor("blk.0.attn_v_b.weight", (2, 128, 512), Role.ABSORBED, 0)
    assert replace(TYPES, floors={Role.ABSORBED: QUANT_TYPES["F16"]}).of(absorbed) == (QUANT_TYPES["F16"],)


def test_what_is_sensitive_gets_the_bits() -> None:
    tensors = model()
    measured = measurements(tensors)
    name = "blk.3.ffn_down_exps.weight"
    measured.arrays[f"{name}.unit"][...] *= 1000
    plan = plan_for(tensors, measured, bpw=3.3)
    assert plan.types[name].name == "Q4_K"


def test_redundant_vision_counts_for_nothing_in_the_paper_preset() -> None:
    tensors = model()
    measured = measurements(tensors)
    plans = []
    for factor in (1.0, 1000.0):
        for t in tensors:
            if t.role is Role.EXPERT and t.layer == 2:
                measured.arrays[f"{t.name}.expert"][:, 2] *= factor
                measured.arrays[f"{t.name}.unit"][:, 2] *= factor
        plans.append([plan_for(tensors, measured, bpw=3.3, preset=preset) for preset in ("paper", "mode")])
    experts = [t.name for t in tensors if t.role is Role.EXPERT]
    assert [plans[0][0].types[n] for n in experts] == [plans[1][0].types[n] for n in experts]
    assert [plans[0][1].types[n] for n in experts] != [plans[1][1].types[n] for n in experts]


@pytest.mark.parametrize("expert_width", [256, 704])
def test_a_plan_with_a_type_per_expert(tmp_path: Path, expert_width: int) -> None:
    tensors = model(expert_width)
    budget = Budget(value=3.3 if expert_width == 256 else 4.2)
    problem = Problem.of(tensors, measurements(tensors), budget=budget, types=TYPES, preset=PRESETS["mode"])
    plan, by_tensor = expert_plan(problem, MADE_FROM, budget), optimal_plan(problem, MADE_FROM, budget)
    assert budget.value * (1 - UNDERSHOOT) <= plan.bpw <= budget.value
    assert plan.solver is not None
    assert by_tensor.solver is not None
    assert plan.solver.objective < by_tensor.solver.objective
    by_name = {t.name: t for t in tensors}
    stored = stored_tensors(tensors, plan.experts).tensors
    assert plan.size_bytes == sum(
        tensor_bytes(t, {**dict.fromkeys(by_name, F32), **plan.stored_types}[t.name]) for t in stored
    )
    assert plan.has_expert_groups
    assert {len(types) for types in plan.experts.values()} == {E}
    assert set(plan.experts) == {t.name for t in tensors if t.role is Role.EXPERT}
    for layer in range(LAYERS):
        gate, down = (plan.experts[f"blk.{layer}.ffn_{projection}_exps.weight"] for projection in ("gate", "down"))
        assert down == (gate if expert_width == 256 else (QUANT_TYPES["IQ4_NL"],) * E)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    path.write_text(path.read_text().replace('"Q4_K"', '"Q9_K"'))
    with pytest.raises(InputError, match="unknown type 'Q9_K'"):
        Plan.load(path)


def test_out_of_reach_names_the_range_and_the_reason() -> None:
    tensors = model(expert_width=704)
    with pytest.raises(
        InfeasibleBudgetError, match=r"--bpw 2 .* \d\.\d+ to \d\.\d+ .*rows of 704 in 6 tensors"
    ) as caught:
        plan_for(tensors, measurements(tensors), bpw=2)
    assert caught.value.exit_code == 3


def test_a_projection_that_fits_no_candidate_does_not_stop_the_others() -> None:
    tensors = model(expert_width=704)
    measured = measurements(tensors)
    plan = plan_for(tensors, measured, bpw=4.2)
    assert {plan.types[f"blk.{layer}.ffn_down_exps.weight"].name for layer in range(LAYERS)} == {"IQ4_NL"}
    budget = Budget(value=4.2)
    problem = Problem.of(tensors, measured, budget=budget, types=TYPES, preset=PRESETS["mode"])
    by_expert = expert_plan(problem, MADE_FROM, budget)
    assert by_expert.experts_bpw == pytest.approx(plan.experts_bpw, rel=0.05)


def test_rows_no_candidate_fits_fall_back_or_fail() -> None:
    narrow = tensor("blk.0.ffn_down_exps.weight", (E, 256, 704), Role.EXPERT, 0, "down")
    assert [t.name for t in TYPES.of(narrow)] == ["IQ4_NL"]
    assert [t.name for t in replace(TYPES, floors={Role.EXPERT: QUANT_TYPES["Q5_K"]}).of(narrow)] == ["Q5_0"]
    assert [t.name for t in replace(TYPES, floors={Role.EXPERT: QUANT_TYPES["Q6_K"]}).of(narrow)] == ["Q8_0"]
    with pytest.raises(InfeasibleBudgetError, match="rows of 100 weights"):
        TYPES.of(tensor("odd", (4, 100), Role.DENSE))


WIDER = tuple(QUANT_TYPES[name] for name in ("Q2_K", "Q4_K", "Q6_K"))


def test_what_stands_in_is_chosen_like_any_candidate() -> None:
    """Rows of 704 have two types in the place of three, at the costs of the first that means each."""
    tensors = model(expert_width=704)
    measured = measurements(tensors, expert_types=tuple(one.name for one in WIDER))
    types = replace(TYPES, expert=WIDER)
    units = {unit.name: unit for unit in tensor_units(tensors, types, measured, PRESETS["mode"].costs)}
    down = units["blk.0.ffn_down_exps.weight"]
    assert [candidate.quant_type.name for candidate in down.candidates] == ["IQ4_NL", "Q5_1"]
    costs = measured.arrays["blk.0.ffn_down_exps.weight.unit"].sum(axis=(0, 1))
    assert [candidate.cost for candidate in down.candidates] == pytest.approx([costs[0], costs[2]])
    plan = plan_for(tensors, measured, bpw=3.9, types=types)
    assert {plan.types[t.name].name for t in tensors if t.projection == "down"} == {"IQ4_NL", "Q5_1"}
    chosen = {name: (quant_type,) for name, quant_type in plan.types.items()}
    assert plan.solver is not None
    predicted = cost_of_types(tensors, chosen, measured, PRESETS["mode"].costs)
    assert predicted == pytest.approx(plan.solver.objective)


def test_projections_of_an_expert_take_what_goes_together() -> None:
    tensors = model(expert_width=704)
    measured = measurements(tensors, expert_types=tuple(one.name for one in WIDER))
    budget = Budget(value=4.6)
    types = replace(TYPES, expert=WIDER)
    problem = Problem.of(tensors, measured, budget=budget, types=types, preset=PRESETS["mode"])
    plan = expert_plan(problem, MADE_FROM, budget)
    pairs = {
        pair
        for layer in range(LAYERS)
        for pair in zip(
            *(plan.experts[f"blk.{layer}.ffn_{projection}_exps.weight"] for projection in ("gate", "down")), strict=True
        )
    }
    names = {(gate.name, down.name) for gate, down in pairs}
    assert names <= {("Q2_K", "IQ4_NL"), ("Q4_K", "IQ4_NL"), ("Q6_K", "Q5_1")}
    assert len(names) > 1
    assert plan.solver is not None
    predicted = cost_of_types(
        tensors,
        {t.name: plan.experts.get(t.name, (plan.types[t.name],)) for t in tensors},
        measured,
        problem.preset.costs,
    )
    assert predicted == pytest.approx(plan.solver.objective)


def test_an_expert_of_narrow_rows_alone_takes_32_block_types() -> None:
    tensors = [replace(t, shape=(E, 256, 96)) if t.role is Role.EXPERT else t for t in model()]
    measured = measurements(tensors, expert_types=tuple(one.name for one in WIDER))
    units = expert_units(tensors, replace(TYPES, expert=WIDER), measured, PRESETS["mode"].costs)
    experts = [unit for unit in units if unit.expert is not None]
    assert {tuple(c.quant_type.name for c in unit.candidates) for unit in experts} == {("IQ4_NL", "Q5_1")}


@pytest.mark.parametrize("preset", ["mode", "paper"])
def test_floors_hold_by_role(preset: str) -> None:
    tensors = model()
    floors = {Role.EMBEDDING: QUANT_TYPES["Q6_K"], Role.DENSE: QUANT_TYPES["F16"], Role.EXPERT: QUANT_TYPES["Q3_K"]}
    types = replace(TYPES, floors=floors)
    plan = plan_for(tensors, measurements(tensors), bpw=5.5, preset=preset, types=types)
    chosen = {t.name: plan.types[t.name] for t in tensors}
    for t in tensors:
        least = floors.get(t.role)
        assert least is None or chosen[t.name].bits_per_weight >= least.bits_per_weight
    assert chosen["blk.0.attn_q.weight"].name == "F16", "no candidate is as large: the floor itself"
    with pytest.raises(InfeasibleBudgetError, match="expert not below Q3_K"):
        plan_for(tensors, measurements(tensors), bpw=3.3, preset=preset, types=types)


@pytest.mark.parametrize(("name", "dense"), [("Q2_K", "Q4_K"), ("Q8_0", "Q8_0"), ("BF16", "BF16")])
def test_uniform_plan_keeps_the_dense_floor(name: str, dense: str) -> None:
    plan = uniform_plan(model(), MADE_FROM, QUANT_TYPES[name])
    assert plan.types["blk.0.ffn_gate_exps.weight"].name == name
    assert plan.types["token_embd.weight"].name == dense
    assert plan.types["blk.0.ffn_gate_inp.weight"].name == "F32"
    assert plan.main_type == name


def test_unmeasured_type_is_refused() -> None:
    tensors = model()
    types = CandidateTypes((QUANT_TYPES["Q2_K"], QUANT_TYPES["Q6_K"]), TYPES.dense)
    with pytest.raises(InputError, match="not measured at Q6_K"):
        plan_for(tensors, measurements(tensors), bpw=3.5, types=types)


def test_plan_file_round_trip_and_refusals(tmp_path: Path) -> None:
    tensors = model()
    plan = plan_for(tensors, measurements(tensors), bpw=3.3)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan

    edited = json.loads(path.read_text())
    edited["tensors"][0]["type"] = "Q9_K"
    path.write_text(json.dumps(edited))
    with pytest.raises(InputError, match="Q9_K"):
        Plan.load(path)
    path.write_text(json.dumps({**edited, "surprise": 1}))
    with pytest.raises(InputError, match="surprise"):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read as a plan"):
        Plan.load(path)


def test_the_paper_s_budget_per_layer_reaches_the_exact_optimum() -> None:
    """Every layer's best choice of all there are, of those that use its share as well as any."""
    tensors = model()
    problem = Problem.of(tensors, measurements(tensors), budget=Budget(value=3.3), types=TYPES, preset=PRESETS["paper"])
    units = problem.expert_units()
    solution = problem.solve(units)
    by_layer: dict[int, list[tuple[AllocationUnit, Candidate]]] = {}
    for unit, choice in zip(units, solution.choices, strict=True):
        if unit.expert is not None and unit.layer is not None:
            by_layer.setdefault(unit.layer, []).append((unit, choice))
    assert len(by_layer) == LAYERS
    sizes = set()
    for members in by_layer.values():
        size = sum(choice.size_bytes for _, choice in members)
        equally_large = (
            sum(c.cost for c in choices)
            for choices in itertools.product(*(unit.candidates for unit, _ in members))
            if sum(c.size_bytes for c in choices) == size
        )
        assert sum(choice.cost for _, choice in members) == pytest.approx(min(equally_large), rel=1e-9)
        sizes.add(size)
    steps = {c.size_bytes for unit, _ in by_layer[0] for c in unit.candidates}
    largest_step = max(steps) - min(steps)
    assert max(sizes) - min(sizes) <= largest_step, "layers differ by what sizes cannot split, and no more"
    assert solution.size_bytes > problem.unit_bytes - largest_step
