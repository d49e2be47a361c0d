"""What each stage's outputs depend on: the settings that stages.json keeps, and that a later run is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mode_gguf import __version__
from mode_gguf.allocation.budget import Budget
from mode_gguf.allocation.plan import Plan
from mode_gguf.allocation.presets import Preset
from mode_gguf.allocation.units import CandidateTypes, Granularity
from mode_gguf.architectures import projector_tensors
from mode_gguf.artifacts import fingerprint, samples_fingerprint
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.importance.imatrix_kind import ImatrixKind
from mode_gguf.pipeline.options import CalibrationOptions
from mode_gguf.pipeline.stage_cache import Stage, file_identity
from mode_gguf.quantization.packing import Packing, Rounding
from mode_gguf.workfolder import WorkFolder


def calibrate_stage(checkpoint: Checkpoint, folder: WorkFolder, options: CalibrationOptions) -> Stage:
    """See `run_calibration`."""
    if options.from_imatrix is not None:
        settings = {
            **_basis(checkpoint),
            "calibration from": options.from_imatrix.name,
            "its content": file_identity(options.from_imatrix),
        }
        return Stage("calibrate", settings, (folder.calibration, folder.imatrix))
    settings = {
        **_basis(checkpoint),
        "calibration data": options.source or "built-in",
        "calibration data's names, sizes and times": samples_fingerprint(options.source),
        "image samples": options.image_samples,
        "text samples": options.text_samples,
        "key tokens": options.key_tokens,
        "key ratio": options.key_ratio,
        "seed": options.seed,
        "device": options.device,
    }
    return Stage("calibrate", settings, (folder.calibration, folder.imatrix))


def sensitivity_stage(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    options: CalibrationOptions,
    method: str,
    types: CandidateTypes,
    imatrix: ImatrixKind,
    packing: Packing,
) -> Stage:
    """See `run_sensitivity`."""
    settings = {
        **calibrate_stage(checkpoint, folder, options).settings,
        "sensitivity": method,
        "imatrix": imatrix,
        **_packing(packing),
        "types": [quant_type.name for quant_type in types.expert],
        "dense types": [quant_type.name for quant_type in types.dense],
    }
    with_gradients = (folder.imatrix_of("fisher"), folder.token_weights) if method == "fisher" else ()
    return Stage("sensitivity", settings, (folder.sensitivity, *with_gradients))


def unit_kl_stage(folder: WorkFolder, sensitivity: Stage, sample_budget: int) -> Stage:
    """See `run_unit_kl`; `sensitivity` is the stage that packed as this one does."""
    settings = {**sensitivity.settings, "measured samples": sample_budget}
    return Stage("unit-kl", settings, (folder.unit_kl,))


def plan_stage(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    budget: Budget,
    preset: Preset,
    types: CandidateTypes,
    *,
    granularity: Granularity = "tensor",
    rounding: Rounding,
    pre_tokenizer: str | None,
    refinement: Mapping[str, Any] | None = None,
) -> Stage:
    """See `run_plan` and `run_refined_plan`; what was measured must be there, and is known by its content."""
    measured = [folder.calibration, folder.sensitivity, folder.imatrix, folder.imatrix_of("fisher")]
    if preset.unit_kl:
        measured.append(folder.unit_kl)
    settings = {
        **_basis(checkpoint),
        "measured": {path.name: file_identity(path) for path in measured},
        "budget": f"{budget.kind} {budget.value:.15g}",
        **({"fit": budget.fit.model_dump()} if budget.fit else {}),
        "preset": asdict(preset),
        "types": [quant_type.name for quant_type in types.expert],
        "dense types": [quant_type.name for quant_type in types.dense],
        "floors": {role.value: floor.name for role, floor in types.floors.items()},
        "granularity": granularity,
        "rounding": rounding,
        "pre-tokenizer": pre_tokenizer,
        **({"refinement": dict(refinement)} if refinement else {}),
    }
    return Stage("plan", settings, (folder.plan, folder.tensor_types))


def refinement_settings(rounds: int, sample_budget: int, calibration: CalibrationOptions) -> dict[str, Any]:
    """What a refined plan depends on beside what every plan does."""
    matters = {name: value for name, value in asdict(calibration).items() if name != "hidden_bytes"}
    return {"rounds": rounds, "measured samples": sample_budget, "calibration": matters}


def round_stage(checkpoint: Checkpoint, folder: WorkFolder, plan: Plan, imatrix: ImatrixKind | None = None) -> Stage:
    """See `run_rounding`."""
    return Stage("round", _packed(checkpoint, folder, plan, imatrix, "feedback"), (folder.rounding,))


def export_stage(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    plan: Plan,
    files: Sequence[Path],
    *,
    imatrix: ImatrixKind | None = None,
    rounding: Rounding | None = None,
    pre_tokenizer: str | None = None,
    shard_bytes: int | None = None,
) -> Stage:
    """See `run_export`; this is the text model alone, `files`."""
    settings = _packed(checkpoint, folder, plan, imatrix, rounding or plan.rounding)
    if not projector_tensors(checkpoint):
        settings["projector"] = "none"
    return Stage("export", {**settings, "pre-tokenizer": pre_tokenizer, "shard size": shard_bytes}, tuple(files))


def projector_stage(checkpoint: Checkpoint, projector: Path, projector_type: str) -> Stage:
    """The other half of `run_export`."""
    return Stage("projector", {**_basis(checkpoint), "type": projector_type}, (projector,))


def reference_stage(checkpoint: Checkpoint, model: Path, pre_tokenizer: str | None) -> Stage:
    """See `run_reference`."""
    return Stage("reference", {**_basis(checkpoint), "pre-tokenizer": pre_tokenizer}, (model,))


def validate_stage(
    folder: WorkFolder, export: Stage, projector: Stage | None, held_out: Path | None, llama_cpp: Path | None
) -> Stage:
    """See `run_validation`; of what the two stages wrote."""
    settings = {
        **export.settings,
        "projector": projector.settings["type"] if projector else None,
        "held-out data": str(held_out or "built-in"),
        "held-out data's names, sizes and times": samples_fingerprint(held_out),
        "llama.cpp": llama_cpp,
    }
    return Stage("validate", settings, (folder.report,))


def _basis(checkpoint: Checkpoint) -> dict[str, Any]:
    """What everything depends on; the fingerprint is of checkpoint and base."""
    base = {} if checkpoint.base is None else {"base": [path.name for path in checkpoint.base.files]}
    return {"model": checkpoint.name, "model fingerprint": checkpoint.fingerprint, "tool version": __version__, **base}


def _packing(packing: Packing) -> dict[str, Any]:
    return {
        "packing": packing.mode,
        "effort": packing.effort,
        "size power": packing.size_power,
        "unbiased": packing.unbiased,
    }


def _packed(
    checkpoint: Checkpoint, folder: WorkFolder, plan: Plan, imatrix: ImatrixKind | None, rounding: Rounding
) -> dict[str, Any]:
    """What packed weights depend on."""
    kind = imatrix or plan.made_from.imatrix_kind
    settings = {
        **_basis(checkpoint),
        "plan": fingerprint(plan.model_dump(mode="json")),
        "imatrix": kind,
        "imatrix file": file_identity(folder.imatrix_of(kind)),
        "rounding": rounding,
    }
    if rounding == "feedback" and kind == "fisher":
        settings["token weights"] = file_identity(folder.token_weights)
    return settings
