"""Planning problems: the folder's measurements as costs of candidates; uniform plans and the frontier."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mode_gguf import __version__
from mode_gguf.allocation.costs import ExpertUse, MeasuredCosts, expert_frequency
from mode_gguf.allocation.frontier import Frontier, FrontierPoint, frontier
from mode_gguf.allocation.plan import Plan, Provenance
from mode_gguf.allocation.planner import Problem, uniform_plan
from mode_gguf.allocation.presets import Preset
from mode_gguf.allocation.units import CandidateTypes
from mode_gguf.architectures import text_tensors
from mode_gguf.artifacts import file_fingerprint, write_text
from mode_gguf.errors import UsageError
from mode_gguf.feedback.feedback_factor import with_feedback_factor
from mode_gguf.options import Packing
from mode_gguf.pipeline.run import Run
from mode_gguf.pipeline.settings import PlanSettings, Target
from mode_gguf.pipeline.stages.calibrate import stored_statistics
from mode_gguf.pipeline.stages.sensitivity import stored_table
from mode_gguf.quantization.packing import DEFAULT_PACKING
from mode_gguf.quantization.types import QuantType
from mode_gguf.report.frontier_chart import frontier_svg
from mode_gguf.validation.conversion_record import SizePoint
from mode_gguf.vocabulary import ImatrixKind, Rounding
from mode_gguf.workfolder import WorkFolder

if TYPE_CHECKING:
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.sensitivity_table import SensitivityTable
    from mode_gguf.importance.unit_kl_table import UnitKl


@dataclass(frozen=True, slots=True)
class PlanningProblem:
    """The problem that a plan for a budget solves, its provenance, and the packing of its candidates."""

    problem: Problem
    made_from: Provenance
    packing: Packing


def planning_problem(run: Run, settings: PlanSettings, target: Target) -> PlanningProblem:
    """The problem that a plan solves.

    Raises:
        InputError: the measurements are missing or belong to another model.
        UsageError: they were made for another preset.
    """
    tensors, table = text_tensors(run.checkpoint), stored_table(run)
    measured, preset = measured_costs(run.folder, table, stored_statistics(run), settings.preset)
    if settings.rounding == "feedback":
        arrays = with_feedback_factor(measured.arrays, tensors, measured.expert_types, measured.dense_types)
        measured = replace(measured, arrays=arrays)
    problem = Problem(tensors, measured, preset, target.types, target.reach)
    return PlanningProblem(problem, _provenance(run, table.method, table.imatrix), table.packing)


def measured_costs(
    folder: WorkFolder, table: "SensitivityTable", statistics: "CalibrationStatistics", preset: Preset
) -> tuple[MeasuredCosts, Preset]:
    """Measured costs from the folder's tables, and the preset that combines them.

    Raises:
        InputError: measured KL is needed, and is missing or belongs to other tables.
        UsageError: the table was made for another preset.
    """
    from mode_gguf.importance.unit_kl_table import UnitKl

    if table.method != preset.method:
        raise UsageError(
            f"{folder.sensitivity}: measured with {table.method}, but this plan needs {preset.method} (preset "
            f"{preset.name}); run `mode-gguf sensitivity` with the same --preset or recipe"
        )
    use = {
        layer: ExpertUse(statistics.counts(layer), statistics.routing_weights(layer)) for layer in statistics.moe_layers
    }
    if preset.unit_kl:
        table, preset = with_unit_kl(table, UnitKl.load(folder.unit_kl), use, preset)
    return MeasuredCosts(table.arrays, tuple(table.expert_types), tuple(table.dense_types), use), preset


def with_unit_kl(
    table: "SensitivityTable", measured: "UnitKl", use: Mapping[int, ExpertUse], preset: Preset
) -> tuple["SensitivityTable", Preset]:
    """The table with measured units, and the preset that takes them as they are.

    A product with frequencies is formed before its proportions are taken, because measured KL holds frequency already.

    Raises:
        UsageError: costs are made of something else.
    """
    from mode_gguf.importance.unit_kl_table import split_over_experts

    if preset.costs.combination == "product":
        shares = {f"blk.{layer}": expert_frequency(one.counts, preset.costs) for layer, one in use.items()}
        arrays = {
            name: values * shares[name[: name.index(".ffn_")]][None, :, :, None] if name.endswith(".expert") else values
            for name, values in table.arrays.items()
        }
        table = replace(table, arrays=arrays)
    elif preset.costs.combination != "sensitivity":
        raise UsageError(
            f"plan.unit_kl shares out by sensitivity or its product with frequency, not by {preset.costs.combination}"
        )
    return split_over_experts(measured, table), replace(preset, costs=replace(preset.costs, combination="sensitivity"))


def make_uniform_plan(
    run: Run,
    quant_type: QuantType,
    *,
    imatrix: ImatrixKind | None = None,
    packing: Packing = DEFAULT_PACKING,
    rounding: Rounding = "nearest",
) -> Plan:
    """The plan that stores every expert in `quant_type`; nothing need be measured for it, and nothing is written.

    `imatrix` None stands for the Fisher importance matrix if the folder has one.
    """
    kind = imatrix or ("fisher" if run.folder.imatrix_of("fisher").exists() else "plain")
    plan = uniform_plan(text_tensors(run.checkpoint), _provenance(run, kind=kind), quant_type, packing)
    return plan.model_copy(update={"rounding": rounding})


def make_frontier(run: Run, preset: Preset, types: CandidateTypes, points: int = 20) -> Frontier:
    """Predict the damage at `points` sizes from what was measured; writes frontier.json and frontier.svg.

    Raises:
        InputError: the measurements are missing or belong to another model.
        UsageError: they were made for another preset.
    """
    measured, preset = measured_costs(run.folder, stored_table(run), stored_statistics(run), preset)
    tensors = text_tensors(run.checkpoint)
    made = frontier(run.checkpoint.name, tensors, measured, preset=preset, types=types, points=points)
    write_text(run.folder.frontier, made.model_dump_json(indent=1, exclude_none=True) + "\n")
    title = f"{made.model}, preset {made.preset}, {made.sensitivity} sensitivity"
    planned, uniform = (list(map(_size_point, found)) for found in (made.points, made.uniform))
    write_text(run.folder.frontier_plot, frontier_svg(planned, uniform, made.answers, title))
    return made


def _size_point(point: FrontierPoint) -> SizePoint:
    name = point.uniform or "planned"
    return SizePoint(name=name, size_bytes=point.size_bytes, bpw=point.bpw, predicted=point.predicted)


def _provenance(run: Run, method: str | None = None, kind: ImatrixKind = "plain") -> Provenance:
    checkpoint, folder = run.checkpoint, run.folder
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
