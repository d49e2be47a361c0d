"""Runs the stages on one work folder: calibrate, sensitivity, plan, export, validate.

Each `run_` function reads what earlier stages left in the folder, writes its own artefacts, and can be called alone.
`convert` chains them and skips those whose inputs have not changed. Stages that need torch are imported when they
run, so that planning and exporting start at once.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mode_gguf import __version__
from mode_gguf.allocation.budget import Budget, Reach
from mode_gguf.allocation.costs import ExpertUse, Measurements, expert_frequency
from mode_gguf.allocation.frontier import Frontier, frontier
from mode_gguf.allocation.granularity import GranularityReport, GranularityRow
from mode_gguf.allocation.plan import Plan, Provenance, RefinementTrial
from mode_gguf.allocation.planner import Problem, optimal_plan, plan_of, settled_types, uniform_plan
from mode_gguf.allocation.presets import PRESETS, Preset
from mode_gguf.allocation.units import DEFAULT_TYPES, CandidateTypes
from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.artifacts import file_fingerprint, fingerprint, samples_fingerprint, write_text
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError, MissingResourceError, UsageError
from mode_gguf.export.imatrix import read_imatrix, write_imatrix
from mode_gguf.export.metadata import imatrix_keys
from mode_gguf.export.projector import write_projector
from mode_gguf.export.tensor_types import tensor_types_text
from mode_gguf.export.text_model import metadata_bytes, write_text_model
from mode_gguf.importance.choice import ImatrixKind, chosen_imatrix
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization import libggml
from mode_gguf.quantization.packing import DEFAULT_PACKING, Packing
from mode_gguf.quantization.types import QUANT_TYPES, Packer, QuantType, types_packed_by
from mode_gguf.refinement import measure_plans, refine
from mode_gguf.validation.c_api import library_version
from mode_gguf.validation.questions import load_held_out
from mode_gguf.validation.report import ValidationReport
from mode_gguf.validation.runtimes import find_llama_cpp
from mode_gguf.validation.validate import validate
from mode_gguf.workfolder import StageLedger, WorkFolder, model_file_name, projector_file_name

if TYPE_CHECKING:
    from mode_gguf.calibration.key_tokens import Criterion, KeyTokens
    from mode_gguf.calibration.sample import Sample
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.imatrix import Imatrix
    from mode_gguf.importance.quantized_kl import KlSettings
    from mode_gguf.importance.table import Method, SensitivityTable
    from mode_gguf.importance.unit_kl import KlModel
    from mode_gguf.importance.unit_table import UnitKl

log = logging.getLogger(__name__)

DEFAULT_MEASURED_SAMPLES = 64
"""Calibration samples that KL is measured on, where it is measured rather than predicted."""

REFERENCE_TYPE = QUANT_TYPES["BF16"]
"""What a result is compared with: the checkpoint's own weights, unless they are stored in more."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What the model is run on, and where.

    `source` is as in `load_samples`; `key_ratio` is the share of an image's tokens that count as key vision tokens, and
    `key_tokens` the criterion that chooses them, see `mode_gguf.calibration.key_tokens`.
    """

    source: str | None = None
    image_samples: int = 128
    text_samples: int = 128
    key_ratio: float = 0.2
    key_tokens: "Criterion" = "text-attention"
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Everything `convert` can be told; each stage takes the part it needs."""

    budget: Budget
    calibration: CalibrationOptions = CalibrationOptions()
    preset: Preset = PRESETS["mode"]
    refine: int = 0
    measured_samples: int = DEFAULT_MEASURED_SAMPLES
    imatrix: ImatrixKind | None = None
    packing: Packing = DEFAULT_PACKING
    types: CandidateTypes = DEFAULT_TYPES
    projector_type: str = "F16"
    pre_tokenizer: str | None = None
    threads: int | None = None
    validate: bool = True
    held_out: Path | None = None
    llama_cpp: Path | None = None


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion wrote, and how long each stage took (0 for one that was reused)."""

    model: Path
    mmproj: Path
    imatrix: Path
    plan: Path
    report: Path | None
    bpw: float
    size_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a conversion will do, known from shapes alone."""

    model_name: str
    family: str
    reach: Reach
    model_bytes: int
    n_weights: int
    expert_weights: int
    layers: int
    experts: int
    free_disk_bytes: int


def open_model(model: Path, out: Path | None) -> tuple[Checkpoint, WorkFolder]:
    """The checkpoint, and the work folder for it: `out`, or `<name>-mode-gguf` in the current folder."""
    checkpoint = Checkpoint.open(model)
    return checkpoint, WorkFolder(out or Path.cwd() / f"{checkpoint.name}-mode-gguf", checkpoint.name)


def estimate(checkpoint: Checkpoint, folder: WorkFolder, options: ConvertOptions) -> Estimate:
    """Check that the model is supported and the budget can be met, before anything is computed.

    Raises:
        InputError: the checkpoint cannot be converted.
        UsageError: the preset makes no importance matrix of the kind asked for.
        InfeasibleBudgetError: the bits per weight are out of reach.
    """
    chosen_imatrix(options.imatrix, options.preset.method)
    tensors = text_tensors(checkpoint)
    overhead = _overhead(checkpoint, options.budget, options.pre_tokenizer)
    _, reach = settled_types(tensors, options.types, options.budget, options.preset, overhead)
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    n_weights = sum(tensor.n_weights for tensor in tensors)
    return Estimate(
        model_name=checkpoint.name,
        family=find_family(checkpoint).hf_class,
        reach=reach,
        model_bytes=reach.budget + overhead,
        n_weights=n_weights,
        expert_weights=sum(tensor.n_weights for tensor in experts),
        layers=len({tensor.layer for tensor in experts}),
        experts=max(tensor.n_experts for tensor in experts),
        free_disk_bytes=shutil.disk_usage(_existing_parent(folder.path)).free,
    )


def convert(
    checkpoint: Checkpoint, folder: WorkFolder, options: ConvertOptions, progress: Progress = silent
) -> ConvertResult:
    """All stages; those whose inputs have not changed since the last run in this folder are skipped.

    Raises:
        ModeGgufError: whatever the stages raise; what earlier stages wrote stays and is reused next time.
    """
    estimate(checkpoint, folder, options)
    ledger = StageLedger(folder)
    method = options.preset.method
    imatrix = chosen_imatrix(options.imatrix, method)

    samples = samples_fingerprint(options.calibration.source)
    calibrated = fingerprint(checkpoint.fingerprint, asdict(options.calibration), samples, __version__)
    if not ledger.is_current("calibrate", calibrated):
        with ledger.running("calibrate", calibrated, [folder.calibration, folder.imatrix]):
            run_calibration(checkpoint, folder, options.calibration, progress)

    measured = fingerprint(calibrated, method, imatrix, asdict(options.packing), _type_names(options.types))
    if not ledger.is_current("sensitivity", measured):
        with ledger.running("sensitivity", measured, _sensitivity_files(folder, method)):
            run_sensitivity(
                checkpoint,
                folder,
                options.calibration,
                method,
                options.types,
                imatrix=imatrix,
                packing=options.packing,
                progress=progress,
            )

    if options.preset.unit_kl:
        units = fingerprint(measured, options.measured_samples)
        if not ledger.is_current("unit-kl", units):
            with ledger.running("unit-kl", units, [folder.unit_kl]):
                run_unit_kl(
                    checkpoint,
                    folder,
                    options.calibration,
                    options.types,
                    sample_budget=options.measured_samples,
                    progress=progress,
                )

    planned = fingerprint(
        measured,
        options.budget.model_dump(),
        asdict(options.preset),
        options.pre_tokenizer,
        (options.refine, options.measured_samples) if options.refine or options.preset.unit_kl else None,
    )
    if not ledger.is_current("plan", planned):
        with ledger.running("plan", planned, [folder.plan, folder.tensor_types]):
            if options.refine:
                run_refined_plan(
                    checkpoint,
                    folder,
                    options.calibration,
                    options.budget,
                    options.preset,
                    options.types,
                    rounds=options.refine,
                    sample_budget=options.measured_samples,
                    pre_tokenizer=options.pre_tokenizer,
                    progress=progress,
                )
            else:
                run_plan(
                    checkpoint,
                    folder,
                    options.budget,
                    options.preset,
                    options.types,
                    pre_tokenizer=options.pre_tokenizer,
                )

    plan = Plan.load(folder.plan)
    model, mmproj = model_path(folder, plan), projector_path(folder, options.projector_type)
    exported = fingerprint(file_fingerprint(folder.plan), calibrated, options.projector_type, options.pre_tokenizer)
    if not ledger.is_current("export", exported):
        with ledger.running("export", exported, [model, mmproj]):
            run_export(
                checkpoint,
                folder,
                plan,
                projector_type=options.projector_type,
                pre_tokenizer=options.pre_tokenizer,
                threads=options.threads,
                progress=progress,
            )
    if options.validate:
        validated = fingerprint(exported, samples_fingerprint(options.held_out), str(options.llama_cpp))
        if not ledger.is_current("validate", validated):
            with ledger.running("validate", validated, [folder.report]):
                reference = None
                if _reference_fits(checkpoint):
                    reference = run_reference(
                        checkpoint, folder, pre_tokenizer=options.pre_tokenizer, progress=progress
                    )
                run_validation(
                    model,
                    mmproj,
                    reference,
                    folder.report,
                    plan=plan,
                    held_out=options.held_out,
                    llama_cpp=options.llama_cpp,
                    reference_folder=folder.path / "reference",
                    warnings=_calibration_warnings(folder),
                    progress=progress,
                )
    return ConvertResult(
        model=model,
        mmproj=mmproj,
        imatrix=folder.imatrix_of(imatrix),
        plan=folder.plan,
        report=folder.report if options.validate else None,
        bpw=plan.bpw,
        size_bytes=model.stat().st_size,
        seconds=dict(ledger.seconds),
    )


def run_calibration(
    checkpoint: Checkpoint, folder: WorkFolder, options: CalibrationOptions, progress: Progress = silent
) -> "CalibrationStatistics":
    """Write calibration.safetensors and the importance matrix."""
    from mode_gguf.calibration.calibrate import calibrate
    from mode_gguf.calibration.coverage import calibration_warnings
    from mode_gguf.importance.imatrix import balanced_imatrix

    samples = _samples(options)
    statistics = calibrate(
        checkpoint, samples, device=options.device, key_tokens=_key_tokens(options), progress=progress
    )
    statistics.save(folder.calibration)
    for warning in calibration_warnings(statistics):
        log.warning("%s", warning)
    _write_imatrix(folder.imatrix, balanced_imatrix(statistics, text_tensors(checkpoint)), statistics)
    return statistics


def run_sensitivity(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    options: CalibrationOptions,
    method: "Method",
    types: CandidateTypes,
    *,
    imatrix: ImatrixKind | None = None,
    packing: Packing = DEFAULT_PACKING,
    progress: Progress = silent,
) -> None:
    """Write sensitivity.safetensors, measured with weights packed as they will be, and the Fisher importance matrix.

    `imatrix` None stands for the best that `method` makes, see `chosen_imatrix`.

    Raises:
        InputError: `calibrate` has not run in this folder, or ran for another model.
        UsageError: `method` makes no importance matrix of the kind asked for.
    """
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.sensitivity import measure_sensitivity

    statistics = CalibrationStatistics.load(folder.calibration)
    if statistics.key_tokens != _key_tokens(options):
        log.warning(
            "key tokens are chosen as in calibration (%s), not as asked for here (%s); to change them, calibrate again",
            statistics.key_tokens,
            _key_tokens(options),
        )
    table, fisher_imatrix = measure_sensitivity(
        checkpoint,
        _samples(options),
        read_imatrix(folder.imatrix),
        statistics=statistics,
        method=method,
        imatrix=chosen_imatrix(imatrix, method),
        packing=packing,
        expert_types=types.expert,
        dense_types=types.dense,
        device=options.device,
        seed=options.seed,
        progress=progress,
    )
    table.save(folder.sensitivity)
    if fisher_imatrix:
        _write_imatrix(folder.imatrix_of("fisher"), fisher_imatrix, statistics)


def run_unit_kl(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    options: CalibrationOptions,
    types: CandidateTypes | None = None,
    *,
    sample_budget: int = DEFAULT_MEASURED_SAMPLES,
    progress: Progress = silent,
) -> "UnitKl":
    """Write unit-kl.safetensors: what every tensor in every type was measured to do, packed as `sensitivity` packed.

    Cut off, it continues where it was when run again.

    Args:
        types: None for those that `sensitivity` measured.
        sample_budget: of the calibration samples that are measured on, half of them with an image.

    Raises:
        InputError: `calibrate` or `sensitivity` has not run in this folder, or ran for another model.
    """
    from mode_gguf.importance.unit_kl import measure_unit_kl

    table, _ = _measured(checkpoint, folder)
    types = types or CandidateTypes(
        tuple(QUANT_TYPES[name] for name in table.expert_types), tuple(QUANT_TYPES[name] for name in table.dense_types)
    )
    model, settings = _kl_measurement(checkpoint, folder, options, sample_budget)
    measured = measure_unit_kl(
        model,
        settings,
        expert_types=types.expert,
        dense_types=types.dense,
        imatrix=table.imatrix,
        seed=options.seed,
        partial=folder.unit_kl.with_suffix(".partial"),
        progress=progress,
    )
    measured.save(folder.unit_kl)
    return measured


def run_plan(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    *,
    pre_tokenizer: str | None = None,
) -> Plan:
    """Write plan.json and tensor-types.txt for a budget.

    Raises:
        InfeasibleBudgetError: it is out of reach.
        InputError: the measurements are missing or belong to another model.
        UsageError: they were made for another preset.
    """
    problem, made_from, packing = planning_problem(checkpoint, folder, budget, preset, types, pre_tokenizer)
    return save_plan(folder, optimal_plan(problem, made_from, budget, packing))


def planning_problem(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    pre_tokenizer: str | None = None,
) -> tuple[Problem, Provenance, Packing]:
    """What a plan for this budget is chosen from, what that was made from, and how candidates were packed.

    Raises like `run_plan`.
    """
    tensors = text_tensors(checkpoint)
    overhead = _overhead(checkpoint, budget, pre_tokenizer)
    settled_types(tensors, types, budget, preset, overhead)
    measured, preset, table = _measurements(checkpoint, folder, preset)
    problem = Problem.of(tensors, measured, budget=budget, types=types, preset=preset, overhead=overhead)
    return problem, _provenance(checkpoint, folder, table.method, table.imatrix), table.packing


def _measurements(
    checkpoint: Checkpoint, folder: WorkFolder, preset: Preset
) -> tuple[Measurements, Preset, "SensitivityTable"]:
    """What costs are made of, the preset that makes them of it, and the table that it is from."""
    from mode_gguf.importance.unit_table import UnitKl

    table, statistics = _measured(checkpoint, folder)
    if table.method != preset.method:
        raise UsageError(
            f"{folder.sensitivity}: measured with {table.method}, but this plan needs {preset.method} (preset "
            f"{preset.name}); run `mode-gguf sensitivity` with the same --preset and --sensitivity"
        )
    use = {
        layer: ExpertUse(statistics.counts(layer), statistics.routing_weights(layer)) for layer in statistics.moe_layers
    }
    if preset.unit_kl:
        measured_units = UnitKl.load(folder.unit_kl)
        _check_same_model(checkpoint, folder.unit_kl, measured_units.fingerprint)
        table, preset = with_unit_kl(table, measured_units, use, preset)
    measured = Measurements(table.arrays, tuple(table.expert_types), tuple(table.dense_types), use)
    return measured, preset, table


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


def with_unit_kl(
    table: "SensitivityTable", measured: "UnitKl", use: Mapping[int, ExpertUse], preset: Preset
) -> tuple["SensitivityTable", Preset]:
    """The table with measured units, and the preset that takes them as they are.

    A product with frequencies is formed before its proportions are taken, because measured KL holds frequency already.
    """
    from mode_gguf.importance.unit_table import shared_out

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
    pre_tokenizer: str | None = None,
    progress: Progress = silent,
) -> Plan:
    """As `run_plan`, then improve the plan by measuring it and its neighbours on calibration samples, see `refine`.

    Args:
        rounds: how often all neighbours are measured at most.
        sample_budget: of the calibration samples, half of them with an image.
    """
    problem, made_from, packing = planning_problem(checkpoint, folder, budget, preset, types, pre_tokenizer)
    units = problem.tensor_units()
    first = problem.solve(units)
    measure = measure_plans(*_kl_measurement(checkpoint, folder, calibration, sample_budget), problem.tensors, progress)
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
    return save_plan(folder, plan_of(problem, units, best, made_from, budget, packing, history))


def run_granularity(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    calibration: CalibrationOptions,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    *,
    sample_budget: int = DEFAULT_MEASURED_SAMPLES,
    progress: Progress = silent,
) -> GranularityReport:
    """Plan one type per tensor and one per expert under one budget, and measure both with unpacked weights.

    The first is written as plan.json. The second cannot be loaded by stock llama.cpp; granularity.json has both.
    """
    from mode_gguf.importance.quantized_kl import quantized_kl

    problem, made_from, packing = planning_problem(checkpoint, folder, budget, preset, types)
    save_plan(folder, optimal_plan(problem, made_from, budget, packing))
    per_tensor, per_expert = problem.tensor_units(), problem.expert_units()
    model, settings = _kl_measurement(checkpoint, folder, calibration, sample_budget)
    n_experts = {tensor.name: tensor.n_experts for tensor in problem.tensors}
    solutions = (problem.solve(per_tensor), problem.solve(per_expert))
    chosen = (
        {
            unit.name: (choice.quant_type,) * n_experts[unit.name]
            for unit, choice in zip(per_tensor, solutions[0].choices, strict=True)
        },
        problem.expert_types(solutions[1]),
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


def _kl_measurement(
    checkpoint: Checkpoint, folder: WorkFolder, calibration: CalibrationOptions, sample_budget: int
) -> tuple["KlModel", "KlSettings"]:
    """The model on some of the calibration samples, and packing as `sensitivity` packed."""
    from mode_gguf.importance.quantized_kl import KlSettings
    from mode_gguf.importance.unit_kl import open_kl_model, stratified

    table, statistics = _measured(checkpoint, folder)
    samples = stratified(_samples(calibration), sample_budget, calibration.seed)
    settings = KlSettings(read_imatrix(folder.imatrix_of(table.imatrix)), table.packing, statistics.key_tokens)
    return open_kl_model(checkpoint, samples, device=calibration.device), settings


def _measured(checkpoint: Checkpoint, folder: WorkFolder) -> tuple["SensitivityTable", "CalibrationStatistics"]:
    """What `sensitivity` and `calibrate` left in the folder, when it is of this checkpoint."""
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.table import SensitivityTable

    table, statistics = SensitivityTable.load(folder.sensitivity), CalibrationStatistics.load(folder.calibration)
    _check_same_model(checkpoint, folder.sensitivity, table.fingerprint)
    _check_same_model(checkpoint, folder.calibration, statistics.fingerprint)
    return table, statistics


def make_uniform_plan(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    quant_type: QuantType,
    *,
    imatrix: ImatrixKind | None = None,
    packing: Packing = DEFAULT_PACKING,
) -> Plan:
    """The plan that stores every expert in `quant_type`; nothing need be measured for it, and nothing is written.

    `imatrix` None stands for the Fisher importance matrix if the folder has one.
    """
    kind = imatrix or ("fisher" if folder.imatrix_of("fisher").exists() else "plain")
    return uniform_plan(text_tensors(checkpoint), _provenance(checkpoint, folder, kind=kind), quant_type, packing)


def save_plan(folder: WorkFolder, plan: Plan) -> Plan:
    """Write plan.json, and tensor-types.txt for llama-quantize."""
    plan.save(folder.plan)
    write_text(folder.tensor_types, tensor_types_text(plan.types))
    return plan


def run_export(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    plan: Plan,
    *,
    imatrix: ImatrixKind | None = None,
    projector_type: str = "F16",
    pre_tokenizer: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[Path, Path]:
    """Write the text model as planned, and the projector; returns their paths. Raises like `export_text`."""
    text = export_text(
        checkpoint, folder, plan, imatrix=imatrix, pre_tokenizer=pre_tokenizer, threads=threads, progress=progress
    )
    projector = projector_path(folder, projector_type)
    write_projector(projector, checkpoint, projector_type, progress=progress)
    return text, projector


def export_text(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    plan: Plan,
    *,
    imatrix: ImatrixKind | None = None,
    pre_tokenizer: str | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Path:
    """Write the text model as planned, with an importance matrix of the folder; returns its path.

    Args:
        imatrix: which of them; None for the one that the plan's measurements were packed with, and that one may be
            missing if it is the plain one.

    Raises:
        InputError: the plan belongs to another model, or a weight cannot be packed.
        MissingResourceError: not enough disk space, or the importance matrix asked for is not there.
    """
    _check_same_model(checkpoint, folder.plan, plan.made_from.model_fingerprint)
    path = model_path(folder, plan)
    kind = imatrix or plan.made_from.imatrix_kind
    packed_with = folder.imatrix_of(kind)
    if kind == "fisher" and not packed_with.exists():
        raise MissingResourceError(f"{packed_with}: not there; `mode-gguf sensitivity` writes it")
    with_imatrix = packed_with.exists() and not plan.is_full_precision
    write_text_model(
        path,
        checkpoint,
        plan.types,
        read_imatrix(packed_with) if with_imatrix else None,
        packing=plan.packing,
        metadata=imatrix_keys(packed_with) if with_imatrix else None,
        pre_tokenizer=pre_tokenizer,
        threads=threads or os.cpu_count() or 1,
        progress=progress,
    )
    return path


def run_reference(
    checkpoint: Checkpoint, folder: WorkFolder, *, pre_tokenizer: str | None = None, progress: Progress = silent
) -> Path:
    """Write, unless it is there already, the full-precision text model that results are compared with."""
    plan = make_uniform_plan(checkpoint, folder, REFERENCE_TYPE, imatrix="plain")
    path, ledger = model_path(folder, plan), StageLedger(folder)
    inputs = fingerprint(checkpoint.fingerprint, pre_tokenizer, __version__)
    if not ledger.is_current("reference", inputs):
        with ledger.running("reference", inputs, [path]):
            export_text(checkpoint, folder, plan, pre_tokenizer=pre_tokenizer, progress=progress)
    return path


def run_validation(
    candidate: Path,
    mmproj: Path | None,
    reference: Path | None,
    report: Path,
    *,
    plan: Plan | None = None,
    held_out: Path | None = None,
    llama_cpp: Path | None = None,
    reference_folder: Path | None = None,
    warnings: Sequence[str] = (),
    progress: Progress = silent,
) -> ValidationReport:
    """Run candidate and reference in llama.cpp, compare them, and write the report to `report`, `warnings` included."""
    result = validate(
        candidate,
        reference,
        mmproj,
        load_held_out(held_out) if held_out else None,
        planned=plan.types if plan else None,
        tools=find_llama_cpp(llama_cpp),
        reference_folder=reference_folder,
        progress=progress,
    )
    result = result.model_copy(update={"warnings": tuple(warnings)})
    result.save(report)
    return result


def environment(llama_cpp: Path | None = None) -> dict[str, object]:
    """What computes, packs and validates here: torch's device, who packs which types, and the llama.cpp found."""
    from mode_gguf.calibration.streaming import choose_device

    tools = find_llama_cpp(llama_cpp)
    return {
        "device": str(choose_device("auto")),
        "cores": os.cpu_count(),
        **{f"packed by {packer}": ", ".join(types_packed_by(packer)) for packer in Packer},
        "libggml": libggml.status(),
        "embedded llama.cpp": library_version(),
        "llama.cpp": tools.version or ("of unknown version" if tools.programs else "none found"),
        **{name: str(path) for name, path in tools.programs.items()},
    }


def model_path(folder: WorkFolder, plan: Plan) -> Path:
    """Where the text model of `plan` goes."""
    if plan.budget is None:
        return folder.path / f"{folder.name}-{plan.main_type}.gguf"
    bpw = plan.budget.value if plan.budget.kind == "bpw" else plan.bpw
    return folder.path / model_file_name(folder.name, bpw, plan.main_type)


def projector_path(folder: WorkFolder, projector_type: str) -> Path:
    """Where the projector goes."""
    return folder.path / projector_file_name(folder.name, projector_type)


def _overhead(checkpoint: Checkpoint, budget: Budget, pre_tokenizer: str | None) -> int:
    """Bytes of the file that a budget of its size must leave for metadata; not asked for by other budgets."""
    return metadata_bytes(checkpoint, pre_tokenizer) if budget.kind == "size" else 0


def _write_imatrix(path: Path, entries: "Imatrix", statistics: "CalibrationStatistics") -> None:
    """Write an importance matrix of the samples that `statistics` were taken of."""
    samples = statistics.samples
    n_samples = samples.text_samples + samples.image_samples
    write_imatrix(
        path,
        entries,
        datasets=statistics.datasets,
        chunk_count=n_samples,
        chunk_size=(samples.text_tokens + samples.vision_tokens) // n_samples,
    )


def _calibration_warnings(folder: WorkFolder) -> list[str]:
    from mode_gguf.calibration.coverage import calibration_warnings
    from mode_gguf.calibration.statistics import CalibrationStatistics

    return calibration_warnings(CalibrationStatistics.load(folder.calibration))


def _sensitivity_files(folder: WorkFolder, method: str) -> list[Path]:
    """What `run_sensitivity` writes."""
    return [folder.sensitivity, *([folder.imatrix_of("fisher")] if method == "fisher" else [])]


def _reference_fits(checkpoint: Checkpoint) -> bool:
    """Whether the full-precision file would leave half of this machine's memory free; says so when it would not."""
    needed = sum(tensor.n_weights for tensor in text_tensors(checkpoint)) * REFERENCE_TYPE.type_size
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = needed <= memory / 2
    if not fits:
        log.warning(
            "the %s file to compare with would take %.0f GiB of this machine's %.0f GiB of memory, so the result is "
            "only loaded and asked; compare it with `mode-gguf validate --reference` on a larger machine",
            REFERENCE_TYPE.name,
            needed / 2**30,
            memory / 2**30,
        )
    return fits


def _key_tokens(options: CalibrationOptions) -> "KeyTokens":
    from mode_gguf.calibration.key_tokens import KeyTokens

    return KeyTokens(options.key_tokens, options.key_ratio, options.seed)


def _samples(options: CalibrationOptions) -> "Sequence[Sample]":
    from mode_gguf.calibration.samples import load_samples

    return load_samples(
        options.source,
        max_image_samples=options.image_samples,
        max_text_samples=options.text_samples,
        seed=options.seed,
    )


def _check_same_model(checkpoint: Checkpoint, path: Path, found: str) -> None:
    if found != checkpoint.fingerprint:
        raise InputError(
            f"{path}: made from a model with fingerprint {found}, but {checkpoint.path} has {checkpoint.fingerprint}; "
            "run the stage that writes it again, or choose another work folder"
        )


def _provenance(
    checkpoint: Checkpoint, folder: WorkFolder, method: str | None = None, kind: ImatrixKind = "plain"
) -> Provenance:
    imatrix = folder.imatrix_of(kind)
    return Provenance(
        tool_version=__version__,
        model=checkpoint.name,
        model_fingerprint=checkpoint.fingerprint,
        imatrix=file_fingerprint(imatrix) if imatrix.exists() else None,
        imatrix_kind=kind,
        sensitivity_method=method,
        sensitivity_fingerprint=file_fingerprint(folder.sensitivity) if method else None,
    )


def _type_names(types: CandidateTypes) -> list[list[str]]:
    return [[quant_type.name for quant_type in group] for group in (types.expert, types.dense)]


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
