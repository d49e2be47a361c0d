"""`convert`: all stages on one work folder; those whose settings have not changed are skipped."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.presets import Preset
from mode_gguf.architectures import checkpoint_with_base, find_family, projector_tensors, text_tensors
from mode_gguf.architectures.base_gguf import open_base
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, MissingResourceError, UsageError
from mode_gguf.estimate.free_resources import free_resources, memory_warning, shortages
from mode_gguf.estimate.machine import measure_machine
from mode_gguf.estimate.stage_estimates import ModelSizes, StageEstimate, TokenCounts, stage_estimates
from mode_gguf.hub.source import Download, checkpoint_folder, checkpoint_outline
from mode_gguf.importance.imatrix_kind import chosen_imatrix
from mode_gguf.pipeline.exporting import (
    model_files,
    projector_path,
    reference_fits,
    run_export,
    run_projector,
    run_reference,
    run_text_export,
)
from mode_gguf.pipeline.folder_lock import folder_lock
from mode_gguf.pipeline.gpu_budget import breakdown_of_reach, reachable_sizes
from mode_gguf.pipeline.measuring import (
    calibration_samples,
    run_calibration,
    run_sensitivity,
    run_unit_kl,
    warnings_of_calibration,
)
from mode_gguf.pipeline.options import ConvertOptions, ConvertResult, Estimate
from mode_gguf.pipeline.planning import run_plan, run_refined_plan, save_tensor_types
from mode_gguf.pipeline.report_data import conversion_record
from mode_gguf.pipeline.reporting import draw_converted
from mode_gguf.pipeline.resolve_options import base_warnings, resolve_options
from mode_gguf.pipeline.rounding import forget_rounded, run_rounding, warnings_of_rounding
from mode_gguf.pipeline.stage_cache import RunningStage, Stage, StageCache
from mode_gguf.pipeline.stages import (
    calibrate_stage,
    export_stage,
    plan_stage,
    projector_stage,
    refinement_settings,
    sensitivity_stage,
    unit_kl_stage,
    validate_stage,
)
from mode_gguf.pipeline.validating import run_validation
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.packing import Rounding
from mode_gguf.workfolder import WorkFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Base:
    """The files of a base GGUF; `compared`: whether its weights are looked for in the checkpoint."""

    text: Path
    projector: Path | None = None
    compared: bool = True


def open_model(
    model: str | Path | None, out: Path | None, progress: Progress = silent, base: Base | None = None
) -> tuple[Checkpoint, WorkFolder]:
    """The checkpoint, and the work folder for it: `out`, or `<name>-mode-gguf` in the current folder.

    `model` is a folder, or the name of a model on the hub, which is downloaded; see `mode_gguf.hub.source`. None stands
    for the base alone, which is enough where no model is run.
    """
    return _opened(None if model is None else checkpoint_folder(model, progress), out, base)


@contextmanager
def outlined_model(
    model: str | Path | None, out: Path | None, base: Base | None = None
) -> Iterator[tuple[Checkpoint, WorkFolder, Download | None]]:
    """As `open_model`, for `estimate`: of a model on the hub no weights are downloaded, and what would be is told."""
    if model is None:
        yield *_opened(None, out, base), None
        return
    with checkpoint_outline(model) as (path, download):
        # Weights that are not there cannot be compared with the base's.
        yield *_opened(path, out, base and replace(base, compared=base.compared and download is None)), download


def _opened(path: Path | None, out: Path | None, base: Base | None) -> tuple[Checkpoint, WorkFolder]:
    checkpoint = None if path is None else Checkpoint.open(path)
    if base is not None:
        checkpoint = checkpoint_with_base(checkpoint, open_base(base.text, base.projector), compared=base.compared)
    if checkpoint is None:
        raise UsageError("no MODEL: give the checkpoint's folder or name, or --base-gguf with --calibration-from")
    return checkpoint, WorkFolder(out or Path.cwd() / f"{checkpoint.name}-mode-gguf", checkpoint.name)


def estimate(
    checkpoint: Checkpoint, folder: WorkFolder, options: ConvertOptions, *, measured: bool = False
) -> Estimate:
    """Check that the model is supported and the budget can be met, before anything is computed.

    Args:
        measured: look at the samples and at this machine, for closer estimates and for times; a second or two.

    Raises:
        InputError: the checkpoint cannot be converted, or with `measured` a sample not be read.
        UsageError: the preset makes no importance matrix of the kind asked for.
        InfeasibleBudgetError: the bits per weight are out of reach.
    """
    options = resolve_options(checkpoint, options)
    chosen_imatrix(options.imatrix, options.preset.method)
    tensors = text_tensors(checkpoint)
    budget = options.budget
    types, reach, overhead = reachable_sizes(
        checkpoint, budget, options.types, options.preset, options.pre_tokenizer, options.granularity
    )
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    n_weights = sum(tensor.n_weights for tensor in tensors)
    model_bytes = reach.budget + (overhead if budget.kind == "size" else 0)
    return Estimate(
        model_name=checkpoint.name,
        family=find_family(checkpoint).hf_class,
        reach=reach,
        model_bytes=model_bytes,
        n_weights=n_weights,
        expert_weights=sum(tensor.n_weights for tensor in experts),
        layers=len({tensor.layer for tensor in experts}),
        experts=max(tensor.n_experts for tensor in experts),
        stages=tuple(_needs(checkpoint, options, model_bytes, measured=measured)),
        room=free_resources(folder),
        memory=breakdown_of_reach(checkpoint, budget, types, reach),
    )


def _needs(checkpoint: Checkpoint, options: ConvertOptions, model_bytes: int, *, measured: bool) -> list[StageEstimate]:
    sizes = ModelSizes.of(checkpoint)
    work, machine = TokenCounts.at_most(options.calibration, sizes), None
    if options.calibration.from_imatrix is not None:
        work = TokenCounts(0, 0, 0)
    elif measured:
        work = TokenCounts.of(calibration_samples(options.calibration), sizes)
    if measured:
        device = "cpu" if options.calibration.from_imatrix else options.calibration.device
        machine = measure_machine(device, checkpoint.files)
    return stage_estimates(sizes, work, options, model_bytes, options.threads or os.cpu_count() or 1, machine)


def convert(
    checkpoint: Checkpoint, folder: WorkFolder, options: ConvertOptions, progress: Progress = silent
) -> ConvertResult:
    """All stages; those whose settings have not changed since the last run in this folder are skipped.

    A run that was cut off at any moment goes on when it is repeated. An edited plan is followed.

    Raises:
        MissingResourceError: the disks have too little room for it.
        UsageError: what was measured in this folder had other settings, and `options.restart` is not set.
        ModeGgufError: whatever the stages raise; what earlier stages wrote stays and is reused next time.
    """
    if options.refine and options.granularity == "expert":
        raise UsageError("--refine improves a type per tensor; leave it out with --granularity expert")
    options = resolve_options(checkpoint, options)
    expected = estimate(checkpoint, folder, options)
    for shortage in shortages(expected.stages, expected.room):
        raise MissingResourceError(shortage)
    if warning := memory_warning(expected.stages, expected.room):
        log.warning("%s", warning)
    with folder_lock(folder):
        for remark in base_warnings(checkpoint):
            log.warning("%s", remark)
        return _convert(checkpoint, folder, options, progress)


def _convert(checkpoint: Checkpoint, folder: WorkFolder, options: ConvertOptions, progress: Progress) -> ConvertResult:
    ledger = StageCache(folder)
    seconds: dict[str, float] = {}
    method, calibration, types = options.preset.method, options.calibration, options.types
    imatrix = chosen_imatrix(options.imatrix, method)
    rounding = options.rounding or options.packing.default_rounding

    def unless_current(stage: Stage, run: Callable[[], object]) -> None:
        seconds[stage.name] = 0.0
        if not ledger.is_current(stage):
            run()
            seconds[stage.name] = ledger.seconds(stage.name)

    calibrated = calibrate_stage(checkpoint, folder, calibration)
    measured = sensitivity_stage(checkpoint, folder, calibration, method, types, imatrix, options.packing)
    units = unit_kl_stage(folder, measured, options.measured_samples)
    if not options.restart:
        ledger.check_unchanged([calibrated, measured, *([units] if options.preset.unit_kl else [])])
    unless_current(calibrated, lambda: run_calibration(checkpoint, folder, calibration, progress))
    unless_current(
        measured,
        lambda: run_sensitivity(
            checkpoint,
            folder,
            calibration,
            method,
            types,
            imatrix=imatrix,
            packing=options.packing,
            progress=progress,
        ),
    )
    if options.preset.unit_kl:
        unless_current(
            units,
            lambda: run_unit_kl(
                checkpoint,
                folder,
                calibration,
                types,
                sample_budget=options.measured_samples,
                progress=progress,
            ),
        )

    seconds["plan"] = _plan(checkpoint, folder, options, rounding, progress)
    plan = Plan.load(folder.plan)
    files = model_files(checkpoint, folder, plan, options.shard_bytes)
    mmproj = projector_path(folder, options.projector_type) if projector_tensors(checkpoint) else None
    exported = export_stage(
        checkpoint, folder, plan, files, pre_tokenizer=options.pre_tokenizer, shard_bytes=options.shard_bytes
    )
    if plan.rounding == "feedback" and not ledger.is_current(exported):
        run_rounding(checkpoint, folder, plan, calibration, threads=options.threads, progress=progress)
        seconds["round"] = ledger.seconds("round")
    unless_current(
        exported,
        lambda: run_text_export(
            checkpoint,
            folder,
            plan,
            pre_tokenizer=options.pre_tokenizer,
            shard_bytes=options.shard_bytes,
            threads=options.threads,
            progress=progress,
        ),
    )
    forget_rounded(folder)
    projected = None
    if mmproj is not None:
        projected = projector_stage(checkpoint, mmproj, options.projector_type)
        unless_current(projected, lambda: run_projector(checkpoint, folder, options.projector_type, progress))
    if options.validate:
        validated = validate_stage(folder, exported, projected, options.held_out, options.llama_cpp)
        unless_current(
            validated, lambda: _validate(checkpoint, folder, options, plan, files[0], ledger.begin(validated), progress)
        )
    page = draw_converted(folder, options.held_out, validated=options.validate)
    return ConvertResult(
        model=files[0],
        mmproj=mmproj,
        imatrix=folder.imatrix_of(imatrix),
        plan=folder.plan,
        report=folder.report if options.validate else None,
        page=page,
        bpw=plan.bpw,
        size_bytes=sum(file.stat().st_size for file in files),
        seconds=seconds,
    )


def _plan(
    checkpoint: Checkpoint, folder: WorkFolder, options: ConvertOptions, rounding: Rounding, progress: Progress
) -> float:
    """Plan, unless the plan that is there is for these settings, be it edited; returns the seconds that took."""
    ledger = StageCache(folder)
    asked = plan_stage(
        checkpoint,
        folder,
        options.budget,
        options.preset,
        options.types,
        granularity=options.granularity,
        rounding=rounding,
        pre_tokenizer=options.pre_tokenizer,
        refinement=refinement_settings(options.refine, options.measured_samples, options.calibration)
        if options.refine
        else None,
    )
    edited = folder.plan in ledger.edited(asked)
    if edited and ledger.has_settings(asked):
        log.warning("%s was edited and is followed as it is; remove it to have it made again", folder.plan)
        save_tensor_types(folder, Plan.load(folder.plan))
        return 0.0
    if ledger.is_current(asked):
        return 0.0
    if edited:
        kept = folder.plan.with_name("plan-edited.json")
        folder.plan.replace(kept)
        log.warning("the plan that was edited is kept as %s; a new one is made for other settings", kept)
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
            rounding=rounding,
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
            granularity=options.granularity,
            rounding=rounding,
            pre_tokenizer=options.pre_tokenizer,
        )
    return ledger.seconds("plan")


def _validate(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    options: ConvertOptions,
    plan: Plan,
    model: Path,
    stage: RunningStage,
    progress: Progress,
) -> None:
    """Compare the model with its reference, which is made if this machine can run it."""
    reference = None
    if reference_fits(checkpoint):
        reference = run_reference(checkpoint, folder, pre_tokenizer=options.pre_tokenizer, progress=progress)
    run_validation(
        model,
        projector_path(folder, options.projector_type) if projector_tensors(checkpoint) else None,
        reference,
        folder.report,
        plan=plan,
        held_out=options.held_out,
        llama_cpp=options.llama_cpp,
        reference_folder=folder.reference,
        warnings=[
            *base_warnings(checkpoint),
            *warnings_of_calibration(folder),
            *_warnings_of_rounding(folder, plan),
        ],
        conversion=conversion_record(folder),
        progress=progress,
    )
    stage.finish()


def merge(
    checkpoint: Checkpoint, folder: WorkFolder, options: ConvertOptions, progress: Progress = silent
) -> tuple[Path, Path]:
    """From a plan with a type per expert to a file that stock llama.cpp loads: one type per tensor in as many bytes.

    Types are chosen again from the folder's measurements and packed again from the checkpoint; plan.json is then the
    new plan. Budget, signals, packing and rounding are those of the plan.

    Args:
        options: candidates, calibration samples (those of `calibrate`), projector and threads are taken from it.

    Returns:
        Paths of the text model and the projector.

    Raises:
        UsageError: the plan has no experts of different types.
        InputError: the plan was not made for a budget, or the measurements are missing.
    """
    plan = Plan.load(folder.plan)
    if not plan.has_expert_groups:
        raise UsageError(f"{folder.plan}: all experts of a tensor have one type already; there is nothing to merge")
    if plan.budget is None or plan.signals is None:
        raise InputError(f"{folder.plan}: was not made for a budget; make a plan with `mode-gguf plan`")
    with folder_lock(folder):
        return _merge(checkpoint, folder, options, plan.budget, plan.signals, plan.rounding, progress)


def _merge(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    options: ConvertOptions,
    budget: Budget,
    signals: Preset,
    rounding: Rounding,
    progress: Progress,
) -> tuple[Path, Path]:
    merged = run_plan(
        checkpoint,
        folder,
        budget,
        signals,
        options.types,
        rounding=rounding,
        pre_tokenizer=options.pre_tokenizer,
    )
    if merged.rounding == "feedback":
        run_rounding(checkpoint, folder, merged, options.calibration, threads=options.threads, progress=progress)
    paths = run_export(
        checkpoint,
        folder,
        merged,
        projector_type=options.projector_type,
        pre_tokenizer=options.pre_tokenizer,
        shard_bytes=options.shard_bytes,
        threads=options.threads,
        progress=progress,
    )
    forget_rounded(folder)
    return paths


def _warnings_of_rounding(folder: WorkFolder, plan: Plan) -> list[str]:
    return warnings_of_rounding(folder) if plan.rounding == "feedback" else []
