"""The conversion record of a work folder: all that its report shows but the validation in llama.cpp.

No checkpoint is needed: what planning has to know of tensors is in the plan and in what was measured.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mode_gguf.allocation.costs import MeasuredCosts, cost_of_types, expert_units, tensor_units
from mode_gguf.allocation.frontier import frontier, predicted_answers
from mode_gguf.allocation.plan import Plan, PlannedTensor
from mode_gguf.allocation.planner import uniform_plan
from mode_gguf.allocation.presets import PRESETS, Preset
from mode_gguf.allocation.units import AllocationUnit, Candidate, CandidateTypes
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, SourceTensor
from mode_gguf.architectures.text.mla import ABSORBED_PARTS
from mode_gguf.artifacts import read_metadata
from mode_gguf.errors import InputError, ModeGgufError
from mode_gguf.feedback.feedback_factor import with_feedback_factor
from mode_gguf.pipeline.followed_plan import followed_plan
from mode_gguf.pipeline.planning import measured_costs
from mode_gguf.pipeline.stage_cache import StageCache
from mode_gguf.quantization.types import QUANT_TYPES, QuantType
from mode_gguf.report.page import KEPT_TYPE
from mode_gguf.validation.conversion_record import (
    CalibrationRecord,
    ConversionRecord,
    PlanRecord,
    Prediction,
    Routing,
    SensitivityRecord,
    SizePoint,
    StageRun,
    TensorTypes,
    Unit,
)
from mode_gguf.workfolder import WorkFolder

if TYPE_CHECKING:
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.sensitivity_table import SensitivityTable

FRONTIER_POINTS = 12
SHOWN_UNITS = 12
STAGES = ("calibrate", "sensitivity", "unit-kl", "plan", "round", "export", "projector", "reference")
"""Stages in their order; the times of `validate` are in its report."""
LARGE_BLOCK, SMALL_BLOCK = 256, 32
FULL_PRECISION = QUANT_TYPES["BF16"]
UNIFORM_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ArtefactT = TypeVar("ArtefactT")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def conversion_record(folder: WorkFolder) -> ConversionRecord:
    """The record of a conversion, from the folder's artefacts; a part whose artefact is missing or unusable is None."""
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.sensitivity_table import SensitivityTable

    missing: dict[str, str] = {}
    plan = _loaded(folder.plan, lambda _: followed_plan(folder), "plan", "plan", missing)
    load_statistics = partial(CalibrationStatistics.load, sums=False)
    statistics = _loaded(folder.calibration, load_statistics, "calibration", "calibrate", missing)
    table = _loaded(folder.sensitivity, SensitivityTable.load, "sensitivity", "sensitivity", missing)
    if plan and table and table.fingerprint != plan.made_from.model_fingerprint:
        of_another = f"sensitivity.safetensors is of another checkpoint ({table.fingerprint}) than plan.json."
        missing["sensitivity"], table = of_another, None
    tensors = planned_tensors(plan, table) if plan else []
    plan_costs = _plan_costs(folder, plan, tensors, table, statistics, missing)
    found = StageCache(folder).entries()
    entries = {stage: found[stage] for stage in STAGES if stage in found}
    if not entries:
        missing["stages"] = "stages.json is not there: nothing in this folder remembers which command made it."
    return ConversionRecord(
        model=folder.name,
        plan=_plan_record(plan) if plan else None,
        uniform=_uniform(plan, tensors, plan_costs) if plan else [],
        prediction=_prediction(plan_costs, missing) if plan_costs else None,
        sensitivity=_sensitivity(plan_costs, missing) if plan_costs else None,
        calibration=_calibration_record(statistics) if statistics else None,
        stages=[_stage_run(stage, entry) for stage, entry in entries.items()],
        versions=_versions(entries),
        missing=missing,
    )


def work_folder(path: Path) -> WorkFolder:
    """The work folder at `path`; its model's name is in what the stages wrote.

    Raises:
        InputError: no stage has written anything there.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the work folder of a conversion")
    unnamed = WorkFolder(path, "")
    with suppress(InputError):
        return WorkFolder(path, Plan.load(unnamed.plan).made_from.model)
    for measured in (unnamed.calibration, unnamed.sensitivity):
        with suppress(InputError):
            return WorkFolder(path, str(read_metadata(measured).get("model", path.name)))
    raise InputError(
        f"{path}: holds no plan.json, calibration.safetensors or sensitivity.safetensors that can be read; give the "
        "work folder of a conversion, <model>-mode-gguf unless --out said otherwise"
    )


@dataclass(frozen=True, slots=True)
class _PlanCosts:
    """A plan beside the costs that it was chosen by, corrected for how its weights are rounded."""

    plan: Plan
    tensors: Sequence[SourceTensor]
    table: "SensitivityTable"
    measured: MeasuredCosts
    preset: Preset
    types: CandidateTypes


def planned_tensors(plan: Plan, table: "SensitivityTable | None") -> list[SourceTensor]:
    """The plan's tensors as planning sees them, without weights.

    Neither file has the width of a row. What matters is which types' blocks it is a multiple of, and the table says.
    """
    arrays = table.arrays if table else {}
    tensors = []
    for tensor in plan.tensors:
        layer, part = split_name(tensor.name)
        experts = arrays.get(f"{tensor.name}.expert")
        n_experts = len(tensor.experts) if tensor.experts else 1 if experts is None else experts.shape[2]
        if part.endswith("_exps"):
            role = Role.EXPERT
        elif tensor.type == KEPT_TYPE:
            role = Role.KEEP
        elif part in ABSORBED_PARTS:
            role = Role.ABSORBED
        else:
            role = {"token_embd": Role.EMBEDDING, "output": Role.OUTPUT}.get(part, Role.DENSE)
        width = _row_width(tensor, n_experts, table, arrays.get(f"{tensor.name}.unit"))
        shape = (n_experts, tensor.n_weights // n_experts // width, width)
        unmeasured = role in (Role.DENSE, Role.OUTPUT) and table is not None and f"{tensor.name}.unit" not in arrays
        activation = None if role in (Role.EMBEDDING, Role.ABSORBED, Role.KEEP) or unmeasured else tensor.name
        tensors.append(SourceTensor(tensor.name, shape, role, (), unread, activation, layer))
    return tensors


def split_name(tensor: str) -> tuple[int | None, str]:
    """Layer and rest of a tensor's name: 3 and `attn_q` of `blk.3.attn_q.weight`; None outside the layers."""
    match = _LAYER.fullmatch(tensor)
    layer, part = (int(match[1]), match[2]) if match else (None, tensor)
    return layer, part.removesuffix(".weight")


def _row_width(
    tensor: PlannedTensor, n_experts: int, table: "SensitivityTable | None", units: np.ndarray | None
) -> int:
    """A row width that the blocks of all measured types divide; of all types where the tensor was not measured."""
    most = tensor.n_weights // n_experts
    if table is not None and tensor.name in table.fallback_types:
        return SMALL_BLOCK
    if table is None or units is None:
        return LARGE_BLOCK if most % LARGE_BLOCK == 0 else most
    names = table.expert_types if "_exps" in tensor.name else table.dense_types
    measured = [QUANT_TYPES[n].block_size for n, fits in zip(names, np.isfinite(units[0, 0]), strict=True) if fits]
    return max(measured, default=SMALL_BLOCK)


def unread(index: int, rows: slice = ALL_ROWS) -> Array:
    """`SourceTensor.read` of a tensor without weights."""
    raise AssertionError("a report reads no weights")


def _loaded(
    path: Path, load: Callable[[Path], ArtefactT], part: str, command: str, missing: dict[str, str]
) -> ArtefactT | None:
    """The artefact that `command` writes; None, with the reason in `missing`, where it is missing or unusable."""
    if not path.exists():
        missing[part] = f"{path.name} is not there: `mode-gguf {command}` writes it."
        return None
    try:
        return load(path)
    except InputError as error:
        missing[part] = str(error)
        return None


def _plan_costs(
    folder: WorkFolder,
    plan: Plan | None,
    tensors: Sequence[SourceTensor],
    table: "SensitivityTable | None",
    statistics: "CalibrationStatistics | None",
    missing: dict[str, str],
) -> _PlanCosts | None:
    """The costs of a plan; None, with the reason in `missing`, where an artefact is missing or unusable."""
    if plan is None or table is None or statistics is None:
        reasons = [missing[part] for part in ("plan", "sensitivity", "calibration") if part in missing]
        missing["prediction"] = " ".join(reasons)
        missing.setdefault("sensitivity", missing["prediction"])
        return None
    try:
        measured, preset = measured_costs(folder, table, statistics, plan.signals or PRESETS["mode"])
    except ModeGgufError as error:
        missing["prediction"] = missing["sensitivity"] = str(error)
        return None
    if plan.rounding == "feedback":
        arrays = with_feedback_factor(measured.arrays, tensors, measured.expert_types, measured.dense_types)
        measured = replace(measured, arrays=arrays)
    expert, dense = (tuple(QUANT_TYPES[name] for name in names) for names in (table.expert_types, table.dense_types))
    return _PlanCosts(plan, tensors, table, measured, preset, CandidateTypes(expert, dense))


def _plan_record(plan: Plan) -> PlanRecord:
    n_weights = sum(tensor.n_weights for tensor in plan.tensors)
    return PlanRecord(
        preset=plan.preset,
        budget=str(plan.budget) if plan.budget else None,
        granularity="expert" if plan.has_expert_groups else "tensor",
        size_bytes=plan.size_bytes,
        bpw=plan.bpw,
        experts_bpw=plan.experts_bpw,
        full_precision_bytes=n_weights * FULL_PRECISION.type_size,
        n_weights=n_weights,
        packing=plan.packing.mode,
        rounding=plan.rounding,
        imatrix=plan.made_from.imatrix_kind if plan.made_from.imatrix else "none",
        gap=plan.solver.gap if plan.solver else None,
        types=[_tensor_types(tensor) for tensor in plan.tensors],
    )


def _tensor_types(tensor: PlannedTensor) -> TensorTypes:
    layer, part = split_name(tensor.name)
    types = tensor.experts or [tensor.type]
    by_bits = sorted(set(types), key=lambda name: QUANT_TYPES[name].bits_per_weight)
    return TensorTypes(
        layer=layer, part=part, n_weights=tensor.n_weights, types={name: types.count(name) for name in by_bits}
    )


def _uniform(plan: Plan, tensors: Sequence[SourceTensor], plan_costs: _PlanCosts | None) -> list[SizePoint]:
    """Uniform plans, every expert in one type, with predicted damage where the type was measured."""
    points = []
    for name in UNIFORM_TYPES:
        one = uniform_plan(tensors, plan.made_from, QUANT_TYPES[name])
        predicted = (
            _predicted(plan_costs, {t: (quant_type,) for t, quant_type in one.types.items()}) if plan_costs else None
        )
        points.append(SizePoint(name=name, size_bytes=one.size_bytes, bpw=one.bpw, predicted=predicted))
    return points


def _predicted(plan_costs: _PlanCosts, chosen: Mapping[str, Sequence[QuantType]]) -> tuple[float, ...] | None:
    """A number per kind of answer; None where some type was not measured."""
    # Where attention is fixed, planning does not count it.
    counted = [t for t in plan_costs.tensors if t.role is Role.EXPERT or plan_costs.preset.dense == "measured"]
    try:
        return tuple(
            cost_of_types(counted, chosen, plan_costs.measured, model)
            for model in predicted_answers(plan_costs.preset).values()
        )
    except InputError:
        return None


def _prediction(plan_costs: _PlanCosts, missing: dict[str, str]) -> Prediction:
    plan = plan_costs.plan
    chosen = {tensor.name: plan.experts.get(tensor.name, (plan.types[tensor.name],)) for tensor in plan.tensors}
    try:
        found = frontier(
            plan.made_from.model,
            plan_costs.tensors,
            plan_costs.measured,
            preset=plan_costs.preset,
            types=plan_costs.types,
            points=FRONTIER_POINTS,
        ).points
    except ModeGgufError as error:
        missing["frontier"] = str(error)
        found = []
    planned = [
        SizePoint(name=f"{point.bpw:.2f} bpw", size_bytes=point.size_bytes, bpw=point.bpw, predicted=point.predicted)
        for point in found
    ]
    return Prediction(
        sensitivity="unit-kl" if plan.signals and plan.signals.unit_kl else plan_costs.table.method,
        answers=tuple(predicted_answers(plan_costs.preset)),
        this=_predicted(plan_costs, chosen),
        planned=planned,
    )


def _sensitivity(plan_costs: _PlanCosts, missing: dict[str, str]) -> SensitivityRecord | None:
    """The most sensitive units, by the cost of their smallest type."""
    costs = plan_costs.preset.costs
    try:
        by_tensor = tensor_units(plan_costs.tensors, plan_costs.types, plan_costs.measured, costs)
        together = expert_units(plan_costs.tensors, plan_costs.types, plan_costs.measured, costs)
    except ModeGgufError as error:
        missing["sensitivity"] = str(error)
        return None
    by_expert = [unit for unit in together if unit.expert is not None]
    layers: dict[int, list[float]] = {}
    for unit in by_expert:
        layers.setdefault(unit.layer or 0, []).append(_smallest(unit).cost)
    return SensitivityRecord(
        method=plan_costs.table.method,
        positions=tuple(plan_costs.table.positions),
        tensors=[_unit(unit, plan_costs.plan) for unit in _most_sensitive(by_tensor)],
        experts=[_unit(unit, plan_costs.plan) for unit in _most_sensitive(by_expert)],
        layers=list(layers),
        by_expert=list(layers.values()),
    )


def _most_sensitive(units: Sequence[AllocationUnit]) -> list[AllocationUnit]:
    with_choice = [unit for unit in units if len(unit.candidates) > 1]
    return sorted(with_choice, key=lambda unit: -_smallest(unit).cost)[:SHOWN_UNITS]


def _smallest(unit: AllocationUnit) -> Candidate:
    return min(unit.candidates, key=lambda candidate: candidate.size_bytes)


def _unit(unit: AllocationUnit, plan: Plan) -> Unit:
    smallest = _smallest(unit)
    experts = [plan.experts.get(name) for name in unit.tensors]
    stored = [
        types[unit.expert].name if types and unit.expert is not None else plan.types[name].name
        for name, types in zip(unit.tensors, experts, strict=True)
    ]
    alike = len(set(stored)) == 1 and not (unit.expert is None and any(experts))
    costs = {candidate.quant_type.name: candidate.cost for candidate in unit.candidates}
    return Unit(
        name=unit.name.removesuffix(".weight"),
        types=", ".join(dict.fromkeys(stored)) if alike or unit.expert is not None else "by expert",
        cost=costs.get(stored[0]) if alike else None,
        smallest=smallest.quant_type.name,
        smallest_cost=smallest.cost,
    )


def _calibration_record(statistics: "CalibrationStatistics") -> CalibrationRecord:
    from mode_gguf.calibration.coverage import MIN_TOKENS_PER_EXPERT, calibration_warnings, rarely_routed_experts
    from mode_gguf.forward.modality import MODALITIES

    layers = statistics.moe_layers
    counts = [statistics.counts(layer) for layer in layers]
    return CalibrationRecord(
        datasets=tuple(statistics.datasets),
        **asdict(statistics.samples),
        key_tokens="none: tokens were not told apart" if statistics.imatrix else str(statistics.key_tokens),
        layers=layers,
        n_experts=max((one.shape[1] for one in counts), default=0),
        routing=[
            Routing(
                modality="any" if statistics.imatrix else modality,
                tokens=[one[index].tolist() for one in counts],
                never_routed=sum(int((one[index] == 0).sum()) for one in counts),
                likeness_to_text=_likeness([(one[0], one[index]) for one in counts]),
            )
            for index, modality in enumerate(MODALITIES[:1] if statistics.imatrix else MODALITIES)
        ],
        hardly_seen=int((rarely_routed_experts(statistics)).sum()),
        hardly_seen_below=MIN_TOKENS_PER_EXPERT,
        warnings=tuple(calibration_warnings(statistics)),
    )


def _likeness(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Mean cosine of pairs of counts; None where one side has none."""
    used = [(first.astype(float), second.astype(float)) for first, second in pairs if first.any() and second.any()]
    if not used:
        return None
    return float(np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in used]))


def _stage_run(stage: str, entry: Mapping[str, Any]) -> StageRun:
    command, seconds = entry.get("command"), entry.get("seconds")
    return StageRun(
        name=stage,
        seconds=float(seconds) if isinstance(seconds, int | float) else 0.0,
        finished=str(entry.get("finished", "")),
        command=command if isinstance(command, str) else None,
    )


def _versions(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Package versions of the last stage, in their order, that recorded them."""
    recorded = [entry["versions"] for entry in entries.values() if isinstance(entry.get("versions"), dict)]
    return {str(name): str(number) for name, number in recorded[-1].items()} if recorded else {}
