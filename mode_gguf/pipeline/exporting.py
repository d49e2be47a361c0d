"""The stage that writes GGUF files, planned or in full precision."""

import logging
import os
from pathlib import Path

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import MissingResourceError
from mode_gguf.estimate.machine import leaves_half, total_memory
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.export.metadata import imatrix_keys
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import text_model_files, write_text_model
from mode_gguf.importance.imatrix_kind import ImatrixKind
from mode_gguf.pipeline.measuring import check_same_model
from mode_gguf.pipeline.planning import make_uniform_plan
from mode_gguf.pipeline.rounding import packed_sources
from mode_gguf.pipeline.stage_cache import StageCache
from mode_gguf.pipeline.stages import export_stage, projector_stage, reference_stage
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.packing import Rounding
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.workfolder import WorkFolder, model_file_name, projector_file_name

log = logging.getLogger(__name__)

REFERENCE_TYPE = QUANT_TYPES["BF16"]
"""What a result is compared with: the checkpoint's own weights, unless they are stored in more."""


def run_export(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    plan: Plan,
    *,
    imatrix: ImatrixKind | None = None,
    rounding: Rounding | None = None,
    projector_type: str = "F16",
    pre_tokenizer: str | None = None,
    shard_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[Path, Path]:
    """Write the text model as planned, and the projector; returns their paths. Raises like `export_text`."""
    text = run_text_export(
        checkpoint,
        folder,
        plan,
        imatrix=imatrix,
        rounding=rounding,
        pre_tokenizer=pre_tokenizer,
        shard_bytes=shard_bytes,
        threads=threads,
        progress=progress,
    )
    return text, run_projector(checkpoint, folder, projector_type, progress)


def run_text_export(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    plan: Plan,
    *,
    imatrix: ImatrixKind | None = None,
    rounding: Rounding | None = None,
    pre_tokenizer: str | None = None,
    shard_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Path:
    """`export_text`, remembered as the folder's result."""
    asked = export_stage(
        checkpoint,
        folder,
        plan,
        model_files(checkpoint, folder, plan, shard_bytes),
        imatrix=imatrix,
        rounding=rounding,
        pre_tokenizer=pre_tokenizer,
        shard_bytes=shard_bytes,
    )
    stage = StageCache(folder).begin(asked)
    text = export_text(
        checkpoint,
        folder,
        plan,
        imatrix=imatrix,
        rounding=rounding,
        pre_tokenizer=pre_tokenizer,
        shard_bytes=shard_bytes,
        threads=threads,
        progress=progress,
    )
    stage.finish()
    return text


def run_projector(checkpoint: Checkpoint, folder: WorkFolder, projector_type: str, progress: Progress = silent) -> Path:
    """Write the projector; returns its path."""
    projector = projector_path(folder, projector_type)
    stage = StageCache(folder).begin(projector_stage(checkpoint, projector, projector_type))
    write_projector(projector, checkpoint, projector_type, progress=progress)
    stage.finish()
    return projector


def export_text(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    plan: Plan,
    *,
    imatrix: ImatrixKind | None = None,
    rounding: Rounding | None = None,
    pre_tokenizer: str | None = None,
    shard_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Path:
    """Write the text model as planned, with an importance matrix of the folder; returns its path, or its first shard's.

    Args:
        imatrix: which of them; None for the one that the plan's measurements were packed with, and that one may be
            missing if it is the plain one.
        rounding: None for the plan's; `feedback` takes what `run_rounding` has packed.
        shard_bytes: most bytes of tensors in one file, see `mode_gguf.gguf.shards`.

    Raises:
        UsageError: there would be more shards than llama.cpp loads.
        InputError: the plan belongs to another model, or a weight cannot be packed.
        MissingResourceError: not enough disk space, or the importance matrix or rounded tensors asked for are not
            there.
    """
    check_same_model(checkpoint, folder.plan, plan.made_from.model_fingerprint)
    path = model_path(folder, plan)
    files = model_files(checkpoint, folder, plan, shard_bytes)
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
        experts=plan.experts,
        packing=plan.packing,
        packed=packed_sources(checkpoint, folder, plan, imatrix) if (rounding or plan.rounding) == "feedback" else None,
        metadata=imatrix_keys(packed_with) if with_imatrix else None,
        pre_tokenizer=pre_tokenizer,
        shard_bytes=shard_bytes,
        threads=threads or os.cpu_count() or 1,
        progress=progress,
    )
    return files[0]


def run_reference(
    checkpoint: Checkpoint, folder: WorkFolder, *, pre_tokenizer: str | None = None, progress: Progress = silent
) -> Path:
    """Write, unless it is there already, the full-precision text model that results are compared with."""
    plan = make_uniform_plan(checkpoint, folder, REFERENCE_TYPE, imatrix="plain")
    path, ledger = model_path(folder, plan), StageCache(folder)
    asked = reference_stage(checkpoint, path, pre_tokenizer)
    if not ledger.is_current(asked):
        stage = ledger.begin(asked)
        export_text(checkpoint, folder, plan, pre_tokenizer=pre_tokenizer, progress=progress)
        stage.finish()
    return path


def model_path(folder: WorkFolder, plan: Plan) -> Path:
    """Where the text model of `plan` goes."""
    if plan.budget is None:
        return folder.path / f"{folder.name}-{plan.main_type}.gguf"
    bpw = plan.budget.value if plan.budget.kind == "bpw" else plan.bpw
    return folder.path / model_file_name(folder.name, bpw, plan.main_type, groups=plan.has_expert_groups)


def model_files(checkpoint: Checkpoint, folder: WorkFolder, plan: Plan, shard_bytes: int | None) -> list[Path]:
    """The files of the text model of `plan`, the one that users open first.

    Raises:
        UsageError: there would be more shards than llama.cpp loads.
    """
    return text_model_files(model_path(folder, plan), checkpoint, plan.types, plan.experts, shard_bytes)


def projector_path(folder: WorkFolder, projector_type: str) -> Path:
    """Where the projector goes."""
    return folder.path / projector_file_name(folder.name, projector_type)


def reference_fits(checkpoint: Checkpoint) -> bool:
    """Whether the full-precision file would leave half of this machine's memory free; says so when it would not."""
    needed = sum(tensor.n_weights for tensor in text_tensors(checkpoint)) * REFERENCE_TYPE.type_size
    memory = total_memory()
    fits = leaves_half(needed)
    if not fits:
        log.warning(
            "the %s file to compare with would take %.0f GiB of this machine's %.0f GiB of memory, so the result is "
            "only loaded and asked; compare it with `mode-gguf validate --reference` on a larger machine",
            REFERENCE_TYPE.name,
            needed / 2**30,
            memory / 2**30,
        )
    return fits
