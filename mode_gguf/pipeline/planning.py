"""From what was measured to plan.json: plans, refined plans, granularity, frontier."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mode_gguf import __version__
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.costs import ExpertUse, Measurements, expert_frequency
from mode_gguf.allocation.frontier import Frontier, frontier
from mode_gguf.allocation.granularity import GranularityReport, GranularityRow
from mode_gguf.allocation.plan import Plan, Provenance, RefinementTrial
from mode_gguf.allocation.planner import Problem, expert_plan, optimal_plan, plan_of, uniform_plan
from mode_gguf.allocation.presets import Preset
from mode_gguf.allocation.units import CandidateTypes, Granularity
from mode_gguf.architectures import text_tensors
from mode_gguf.artifacts import file_fingerprint, write_text
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import UsageError
from mode_gguf.export.tensor_types import tensor_types_text
from mode_gguf.feedback.feedback_factor import with_feedback_factor
from mode_gguf.importance.imatrix_kind import ImatrixKind
from mode_gguf.pipeline.gpu_budget import reachable_sizes, with_breakdown
from mode_gguf.pipeline.measuring import kl_measurement, measured_tables
from mode_gguf.pipeline.options import DEFAULT_MEASURED_SAMPLES, CalibrationOptions
from mode_gguf.pipeline.refinement import measure_plans, refine
from mode_gguf.pipeline.stage_cache import StageCache
from mode_gguf.pipeline.stages import plan_stage, refinement_settings
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.packing import DEFAULT_PACKING, Packing, Rounding
from mode_gguf.quantization.types import QuantType
from mode_gguf.workfolder import WorkFolder

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.sensitivity_table import SensitivityTable
    from mode_gguf.importance.unit_kl_table import UnitKl


def run_plan(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    *,
    granularity: Granularity = "tensor",
    rounding: Rounding = "nearest",
    pre_tokenizer: str | None = None,
) -> Plan:
    """Write plan.json and tensor-types.txt for a budget.

    Args:
        granularity: what shares a type; stock llama.cpp cannot load a file with a type per expert. Where that costs
            more than a type per tensor, the latter is planned.
        rounding: that the file will have; the measurements, which are to nearest, are corrected for it.

    Raises:
        InfeasibleBudgetError: it is out of reach.
        InputError: the measurements are missing or belong to another model.
        UsageError: they were made for another preset.
    """
    problem, made_from, packing = planning_problem(
        checkpoint, folder, budget, preset, types, pre_tokenizer, rounding, granularity
    )
    stage = StageCache(folder).begin(
        plan_stage(
            checkpoint,
            folder,
            budget,
            preset,
            types,
            granularity=granularity,
            rounding=rounding,
            pre_tokenizer=pre_tokenizer,
        )
    )
    plan = optimal_plan(problem, made_from, budget, packing)
    if granularity == "expert":
        plan = _better(expert_plan(problem, made_from, budget, packing), plan)
    saved = save_plan(folder, with_breakdown(checkpoint, plan.model_copy(update={"rounding": rounding})))
    stage.finish()
    return saved


def planning_problem(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    pre_tokenizer: str | None = None,
    rounding: Rounding = "nearest",
    granularity: Granularity = "tensor",
) -> tuple[Problem, Provenance, Packing]:
    """What a plan for this budget is chosen from, what that was made from, and how candidates were packed.

    Raises like `run_plan`.
    """
    tensors = text_tensors(checkpoint)
    _, _, overhead = reachable_sizes(checkpoint, budget, types, preset, pre_tokenizer, granularity)
    measured, preset, table = _measurements(checkpoint, folder, preset)
    if rounding == "feedback":
        arrays = with_feedback_factor(measured.arrays, tensors, measured.expert_types, measured.dense_types)
        measured = replace(measured, arrays=arrays)
    problem = Problem.of(tensors, measured, budget=budget, types=types, preset=preset, overhead=overhead)
    return problem, _provenance(checkpoint, folder, table.method, table.imatrix), table.packing


def run_refined_plan(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    calibration: CalibrationOptions,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    *,
    rounds: int,
    sample_budget: int = DEFAULT_MEASURED_SAMPLES,
    rounding: Rounding = "nearest",
    pre_tokenizer: str | None = None,
    progress: Progress = silent,
) -> Plan:
    """As `run_plan`, then improve the plan by measuring it and its neighbours on calibration samples, see `refine`.

    Plans are measured rounded to nearest, whatever the file will have.

    Args:
        rounds: how often all neighbours are measured at most.
        sample_budget: of the calibration samples, half of them with an image.
    """
    problem, made_from, packing = planning_problem(checkpoint, folder, budget, preset, types, pre_tokenizer, rounding)
    stage = StageCache(folder).begin(
        plan_stage(
            checkpoint,
            folder,
            budget,
            preset,
            types,
            rounding=rounding,
            pre_tokenizer=pre_tokenizer,
            refinement=refinement_settings(rounds, sample_budget, calibration),
        )
    )
    units = problem.tensor_units()
    first = problem.solve(units)
    measure = measure_plans(*kl_measurement(checkpoint, folder, calibration, sample_budget), problem.tensors, progress)
    refined = refine(
        units,
        first.choices,
        problem.unit_bytes,
        measure,
        answer_weights=preset.costs.answer_weights,
        rounds=rounds,
    )
    history = [
        RefinementTrial(kl=trial.kl, size_bytes=trial.size_bytes, moved=trial.moved, accepted=trial.accepted)
        for trial in refined.history
    ]
    best = replace(first, choices=refined.choices)
    plan = plan_of(problem, units, best, made_from, budget, packing, history)
    saved = save_plan(folder, with_breakdown(checkpoint, plan.model_copy(update={"rounding": rounding})))
    stage.finish()
    return saved


def run_granularity(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    calibration: CalibrationOptions,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    *,
    sample_budget: int = DEFAULT_MEASURED_SAMPLES,
    pre_tokenizer: str | None = None,
    progress: Progress = silent,
) -> GranularityReport:
    """Plan one type per tensor and one per expert under one budget, and measure both with unpacked weights.

    The first is written as plan.json. The second cannot be loaded by stock llama.cpp; granularity.json has both.
    """
    from mode_gguf.importance.quantized_kl import quantized_kl

    problem, made_from, packing = planning_problem(checkpoint, folder, budget, preset, types, pre_tokenizer)
    per_tensor, per_expert = problem.tensor_units(), problem.expert_units()
    solutions = (problem.solve(per_tensor), problem.solve(per_expert))
    save_plan(folder, plan_of(problem, per_tensor, solutions[0], made_from, budget, packing))
    model, settings = kl_measurement(checkpoint, folder, calibration, sample_budget)
    n_experts = {tensor.name: tensor.n_experts for tensor in problem.tensors}
    chosen = (
        {
            unit.name: (choice.quant_type,) * n_experts[unit.name]
            for unit, choice in zip(per_tensor, solutions[0].choices, strict=True)
        },
        problem.expert_types(per_expert, solutions[1]),
    )
    rows = []
    for name, solution, by_tensor in zip(("tensor", "expert"), solutions, chosen, strict=True):
        description = f"measuring one type per {name}"
        kl = quantized_kl(
            model.streamed, model.inputs, [], settings, base=by_tensor, description=description, progress=progress
        ).base
        rows.append(
            GranularityRow(
                granularity=name, size_bytes=solution.size_bytes, predicted=solution.objective, kl=tuple(map(float, kl))
            )
        )
    report = GranularityReport(budget=budget, preset=preset.name, rows=rows)
    write_text(folder.granularity, report.model_dump_json(indent=1) + "\n")
    return report


def run_frontier(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    preset: Preset,
    types: CandidateTypes,
    *,
    points: int = 20,
    plot: Path | None = None,
) -> Frontier:
    """Predict the damage at `points` sizes from what was measured; writes frontier.json, and a plot of it.

    Args:
        plot: where the PNG goes; None for the folder's own.

    Raises:
        InputError: the measurements are missing or belong to another model.
        UsageError: they were made for another preset.
    """
    from mode_gguf.allocation.frontier_plot import draw

    measured, preset, _ = _measurements(checkpoint, folder, preset)
    made = frontier(checkpoint.name, text_tensors(checkpoint), measured, preset=preset, types=types, points=points)
    write_text(folder.frontier, made.model_dump_json(indent=1, exclude_none=True) + "\n")
    draw(made, plot or folder.frontier_plot)
    return made


def make_uniform_plan(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    quant_type: QuantType,
    *,
    imatrix: ImatrixKind | None = None,
    packing: Packing = DEFAULT_PACKING,
    rounding: Rounding = "nearest",
) -> Plan:
    """The plan that stores every expert in `quant_type`; nothing need be measured for it, and nothing is written.

    `imatrix` None stands for the Fisher importance matrix if the folder has one.
    """
    kind = imatrix or ("fisher" if folder.imatrix_of("fisher").exists() else "plain")
    plan = uniform_plan(text_tensors(checkpoint), _provenance(checkpoint, folder, kind=kind), quant_type, packing)
    return plan.model_copy(update={"rounding": rounding})


def save_plan(folder: WorkFolder, plan: Plan) -> Plan:
    """Write plan.json, and tensor-types.txt for llama-quantize where it can do the same."""
    StageCache(folder).forget("plan")
    plan.save(folder.plan)
    save_tensor_types(folder, plan)
    return plan


def save_tensor_types(folder: WorkFolder, plan: Plan) -> None:
    """Write tensor-types.txt, or remove it where llama-quantize has no such types."""
    if plan.has_expert_groups:
        folder.tensor_types.unlink(missing_ok=True)
    else:
        write_text(folder.tensor_types, tensor_types_text(plan.stored_types))


def with_unit_kl(
    table: "SensitivityTable", measured: "UnitKl", use: Mapping[int, ExpertUse], preset: Preset
) -> tuple["SensitivityTable", Preset]:
    """The table with measured units, and the preset that takes them as they are.

    A product with frequencies is formed before its proportions are taken, because measured KL holds frequency already.
    """
    from mode_gguf.importance.unit_kl_table import shared_out

    if preset.costs.combination == "product":
        shares = {f"blk.{layer}": expert_frequency(one.counts, preset.costs) for layer, one in use.items()}
        arrays = {
            name: values * shares[name[: name.index(".ffn_")]][None, :, :, None] if name.endswith(".expert") else values
            for name, values in table.arrays.items()
        }
        table = replace(table, arrays=arrays)
    elif preset.costs.combination != "sensitivity":
        raise UsageError(
            f"--unit-kl shares out by sensitivity or its product with frequency, not by {preset.costs.combination}"
        )
    return shared_out(measured, table), replace(preset, costs=replace(preset.costs, combination="sensitivity"))


def _better(by_expert: Plan, by_tensor: Plan) -> Plan:
    """The plan with a type per expert, unless it costs more.

    Near the smallest size there is, the projections of an expert, which share a type in one and not in the other, are
    what is left to choose.
    """
    assert by_expert.solver is not None
    assert by_tensor.solver is not None
    if by_expert.solver.objective < by_tensor.solver.objective:
        return by_expert
    log.warning("at this size a type per tensor costs no more than a type per expert, so that is planned")
    return by_tensor


def _measurements(
    checkpoint: Checkpoint, folder: WorkFolder, preset: Preset
) -> tuple[Measurements, Preset, "SensitivityTable"]:
    """What costs are made of, the preset that makes them of it, and the table that it is from."""
    table, statistics = measured_tables(checkpoint, folder)
    measured, preset = measurements_of(folder, table, statistics, preset)
    return measured, preset, table


def measurements_of(
    folder: WorkFolder, table: "SensitivityTable", statistics: "CalibrationStatistics", preset: Preset
) -> tuple[Measurements, Preset]:
    """What costs are made of, from the folder's tables, and the preset that makes them of it.

    Raises:
        InputError: measured KL is needed, and is missing or belongs to other tables.
        UsageError: the table was made for another preset.
    """
    from mode_gguf.importance.unit_kl_table import UnitKl

    if table.method != preset.method:
        raise UsageError(
            f"{folder.sensitivity}: measured with {table.method}, but this plan needs {preset.method} (preset "
            f"{preset.name}); run `mode-gguf sensitivity` with the same --preset and --sensitivity"
        )
    use = {
        layer: ExpertUse(statistics.counts(layer), statistics.routing_weights(layer)) for layer in statistics.moe_layers
    }
    if preset.unit_kl:
        table, preset = with_unit_kl(table, UnitKl.load(folder.unit_kl), use, preset)
    return Measurements(table.arrays, tuple(table.expert_types), tuple(table.dense_types), use), preset


def _provenance(
    checkpoint: Checkpoint, folder: WorkFolder, method: str | None = None, kind: ImatrixKind = "plain"
) -> Provenance:
    imatrix = folder.imatrix_of(kind)
    return Provenance(
        tool_version=__version__,
        model=checkpoint.name,
        model_fingerprint=checkpoint.fingerprint,
        repository=checkpoint.repository,
        revision=checkpoint.revision,
        imatrix=file_fingerprint(imatrix) if imatrix.exists() else None,
        imatrix_kind=kind,
        sensitivity_method=method,
        sensitivity_fingerprint=file_fingerprint(folder.sensitivity) if method else None,
    )
