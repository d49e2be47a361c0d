"""`convert`: all stages on one work folder; those whose inputs have not changed are skipped."""

import shutil
from dataclasses import asdict
from pathlib import Path

from mode_gguf import __version__
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.planner import settled_types
from mode_gguf.allocation.units import CandidateTypes
from mode_gguf.architectures import find_family, text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.artifacts import file_fingerprint, fingerprint, samples_fingerprint
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError, UsageError
from mode_gguf.importance.choice import chosen_imatrix
from mode_gguf.pipeline.exporting import model_files, projector_path, reference_fits, run_export, run_reference
from mode_gguf.pipeline.measuring import run_calibration, run_sensitivity, run_unit_kl, warnings_of_calibration
from mode_gguf.pipeline.options import ConvertOptions, ConvertResult, Estimate
from mode_gguf.pipeline.planning import overhead_bytes, run_plan, run_refined_plan
from mode_gguf.pipeline.rounding import forget_rounded, run_rounding, warnings_of_rounding
from mode_gguf.pipeline.validating import run_validation
from mode_gguf.progress import Progress, silent
from mode_gguf.workfolder import StageLedger, WorkFolder


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
    groups = len(options.types.expert) if options.granularity == "expert" else 1
    overhead = overhead_bytes(checkpoint, options.budget, options.pre_tokenizer, groups)
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
    if options.refine and options.granularity == "expert":
        raise UsageError("--refine improves a type per tensor; leave it out with --granularity expert")
    estimate(checkpoint, folder, options)
    ledger = StageLedger(folder)
    method = options.preset.method
    imatrix = chosen_imatrix(options.imatrix, method)
    rounding = options.rounding or options.packing.default_rounding

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
        {role.value: floor.name for role, floor in options.types.floors.items()},
        options.pre_tokenizer,
        rounding,
        options.granularity,
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

    plan = Plan.load(folder.plan)
    files = model_files(checkpoint, folder, plan, options.shard_bytes)
    mmproj = projector_path(folder, options.projector_type)
    exported = fingerprint(
        file_fingerprint(folder.plan),
        calibrated,
        options.projector_type,
        options.pre_tokenizer,
        *([options.shard_bytes] if options.shard_bytes else []),
    )
    if not ledger.is_current("export", exported):
        if plan.rounding == "feedback":
            with ledger.running("round", exported, [folder.rounding]):
                run_rounding(checkpoint, folder, plan, options.calibration, threads=options.threads, progress=progress)
        with ledger.running("export", exported, [*files, mmproj]):
            run_export(
                checkpoint,
                folder,
                plan,
                projector_type=options.projector_type,
                pre_tokenizer=options.pre_tokenizer,
                shard_bytes=options.shard_bytes,
                threads=options.threads,
                progress=progress,
            )
        forget_rounded(folder)
    if options.validate:
        validated = fingerprint(exported, samples_fingerprint(options.held_out), str(options.llama_cpp))
        if not ledger.is_current("validate", validated):
            with ledger.running("validate", validated, [folder.report]):
                reference = None
                if reference_fits(checkpoint):
                    reference = run_reference(
                        checkpoint, folder, pre_tokenizer=options.pre_tokenizer, progress=progress
                    )
                run_validation(
                    files[0],
                    mmproj,
                    reference,
                    folder.report,
                    plan=plan,
                    held_out=options.held_out,
                    llama_cpp=options.llama_cpp,
                    reference_folder=folder.path / "reference",
                    warnings=[*warnings_of_calibration(folder), *_warnings_of_rounding(folder, plan)],
                    progress=progress,
                )
    return ConvertResult(
        model=files[0],
        mmproj=mmproj,
        imatrix=folder.imatrix_of(imatrix),
        plan=folder.plan,
        report=folder.report if options.validate else None,
        bpw=plan.bpw,
        size_bytes=sum(file.stat().st_size for file in files),
        seconds=dict(ledger.seconds),
    )


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
    merged = run_plan(
        checkpoint,
        folder,
        plan.budget,
        plan.signals,
        options.types,
        rounding=plan.rounding,
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


def _sensitivity_files(folder: WorkFolder, method: str) -> list[Path]:
    """What `run_sensitivity` writes."""
    return [folder.sensitivity, *([folder.imatrix_of("fisher"), folder.token_weights] if method == "fisher" else [])]


def _warnings_of_rounding(folder: WorkFolder, plan: Plan) -> list[str]:
    return warnings_of_rounding(folder) if plan.rounding == "feedback" else []


def _type_names(types: CandidateTypes) -> list[list[str]]:
    return [[quant_type.name for quant_type in group] for group in (types.expert, types.dense)]


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
