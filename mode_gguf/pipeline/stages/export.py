"""Export: the GGUF files of a plan, of the projector, of multi-token prediction, and the one to compare with."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import projector_tensors, text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.checkpoint.identity import PROCESSOR, TEMPLATE, TOKENIZER
from mode_gguf.errors import MissingResourceError
from mode_gguf.estimate.machine import fits_half_of_memory, total_memory
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.export.metadata import imatrix_keys
from mode_gguf.export.mtp import write_mtp
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, text_model_files, write_text_model
from mode_gguf.options import ComputeOptions, ExportOptions
from mode_gguf.pipeline.followed_plan import check_tensors, followed_plan
from mode_gguf.pipeline.gpu_budget import with_breakdown
from mode_gguf.pipeline.planning import make_uniform_plan
from mode_gguf.pipeline.run import Run, Stage, base_key, general_key
from mode_gguf.pipeline.stages.calibrate import Calibrate, check_same_model
from mode_gguf.pipeline.stages.feedback import RoundWithFeedback, forget_rounded, packed_sources
from mode_gguf.pipeline.stages.packed_key import packed_key
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.sizes import binary_size
from mode_gguf.vocabulary import ImatrixKind, MtpType, ProjectorType, Rounding
from mode_gguf.workfolder import (
    WorkFolder,
    model_file_name,
    mtp_file_name,
    projector_file_name,
    uniform_file_name,
)

log = logging.getLogger(__name__)

_LEAST_OF_BUDGET = 0.8
"""Part of a budget that a plan for it uses at least, even of the smallest models; one with less was edited."""
REFERENCE_TYPE = QUANT_TYPES["BF16"]
"""Type of the full-precision reference: the checkpoint's own weights, unless they are stored in more bits."""


@dataclass(frozen=True, slots=True)
class ExportText(Stage):
    """Writes the text model as planned, rounded with feedback first where that is asked for.

    Attributes:
        plan: None for the folder's.
        calibrate: the stage whose samples feedback takes; None for the one that ran in the folder.
        imatrix: that packs; None for the one that the plan's measurements were packed with, and that one may be
            missing if it is the plain one.
        rounding: None for the plan's.
    """

    plan: Plan | None = None
    options: ExportOptions = ExportOptions()
    compute: ComputeOptions = ComputeOptions()
    calibrate: Calibrate | None = None
    imatrix: ImatrixKind | None = None
    rounding: Rounding | None = None
    name: ClassVar[str] = "export"

    def key(self, run: Run) -> dict[str, Any]:
        plan = self.resolved_plan(run)
        settings = packed_key(run, plan, self.imatrix, self.feedback(run, plan))
        if not projector_tensors(run.checkpoint):
            settings["projector"] = "none"
        return {
            **settings,
            **general_key(run.checkpoint, TOKENIZER, TEMPLATE),
            "pre-tokenizer": run.checkpoint.pre_tokenizer,
            "shard size": self.options.shard_size,
        }

    def outputs(self, run: Run) -> tuple[Path, ...]:
        """The files of the text model, the one that users open first.

        Raises:
            UsageError: there would be more shards than llama.cpp loads.
        """
        plan = self.resolved_plan(run)
        path = model_path(run.folder, plan)
        return tuple(text_model_files(path, run.checkpoint, plan.types, plan.experts, self.options.shard_size))

    def feedback(self, run: Run, plan: Plan) -> Calibrate | None:
        """The stage on whose samples weights are rounded with feedback; None where they are rounded to nearest."""
        if (self.rounding or plan.rounding) == "nearest":
            return None
        return self.calibrate or Calibrate.of_folder(run, self.compute)

    def resolved_plan(self, run: Run) -> Plan:
        """The plan that the file is made by."""
        return self.plan or followed_plan(run.folder)

    def execute(self, run: Run) -> None:
        """Raises:
        UsageError: there would be more shards than llama.cpp loads.
        InputError: the plan belongs to another model, or a weight cannot be packed.
        MissingResourceError: not enough disk space, or an importance matrix or token weights are not there.
        """
        plan = self.resolved_plan(run)
        check_tensors(run.checkpoint, plan)
        if beyond := _beyond_budget(run.checkpoint, plan):
            log.warning("%s", beyond)
        if calibrate := self.feedback(run, plan):
            run.ensure(RoundWithFeedback(plan, calibrate, self.imatrix))
        with run.recorded(self):
            self.write(run)
        forget_rounded(run.folder)

    def write(self, run: Run) -> None:
        """Write the text model, without recording it in the stage cache."""
        plan, folder = self.resolved_plan(run), run.folder
        check_same_model(run.checkpoint, folder.plan, plan.made_from.model_fingerprint)
        kind = self.imatrix or plan.made_from.imatrix_kind
        packed_with = folder.imatrix_of(kind)
        if kind == "fisher" and not packed_with.exists():
            raise MissingResourceError(f"{packed_with}: not there; `mode-gguf sensitivity` writes it")
        with_imatrix = packed_with.exists() and not plan.is_full_precision
        calibrate = self.feedback(run, plan)
        write_text_model(
            model_path(folder, plan),
            run.checkpoint,
            TensorPacking(
                plan.types,
                read_imatrix(packed_with) if with_imatrix else None,
                plan.experts,
                plan.packing,
                packed_sources(run, plan, calibrate, self.imatrix) if calibrate else {},
            ),
            metadata=imatrix_keys(packed_with) if with_imatrix else None,
            shard_bytes=self.options.shard_size,
            threads=self.compute.threads or os.cpu_count() or 1,
            progress=run.progress,
        )


@dataclass(frozen=True, slots=True)
class ExportProjector(Stage):
    """Writes the projector."""

    type: ProjectorType = ExportOptions.mmproj_type
    name: ClassVar[str] = "projector"

    def key(self, run: Run) -> dict[str, Any]:
        return {**base_key(run.checkpoint, "projector"), **general_key(run.checkpoint, PROCESSOR), "type": self.type}

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (projector_path(run.folder, self.type),)

    def execute(self, run: Run) -> None:
        with run.recorded(self):
            write_projector(projector_path(run.folder, self.type), run.checkpoint, self.type, progress=run.progress)


@dataclass(frozen=True, slots=True)
class ExportMtp(Stage):
    """Writes the block for multi-token prediction as a file to draft with."""

    type: MtpType
    compute: ComputeOptions = ComputeOptions()
    name: ClassVar[str] = "mtp"

    def key(self, run: Run) -> dict[str, Any]:
        return {
            **base_key(run.checkpoint, "mtp"),
            **general_key(run.checkpoint, TOKENIZER, TEMPLATE),
            "type": self.type,
            "pre-tokenizer": run.checkpoint.pre_tokenizer,
        }

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (run.folder.file(mtp_file_name(run.folder.name, self.type)),)

    def execute(self, run: Run) -> None:
        """Raises:
        InputError: the checkpoint has no such block, or llama.cpp cannot draft with that of its family.
        """
        (path,) = self.outputs(run)
        threads = self.compute.threads or os.cpu_count() or 1
        with run.recorded(self):
            write_mtp(path, run.checkpoint, self.type, threads=threads, progress=run.progress)


@dataclass(frozen=True, slots=True)
class ExportReference(Stage):
    """Writes the full-precision text model that results are compared with."""

    compute: ComputeOptions = ComputeOptions()
    name: ClassVar[str] = "reference"

    def key(self, run: Run) -> dict[str, Any]:
        return {
            **base_key(run.checkpoint, "text model"),
            **general_key(run.checkpoint, TOKENIZER, TEMPLATE),
            "pre-tokenizer": run.checkpoint.pre_tokenizer,
        }

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (model_path(run.folder, self._plan(run)),)

    def execute(self, run: Run) -> None:
        with run.recorded(self):
            ExportText(self._plan(run), compute=self.compute).write(run)

    def _plan(self, run: Run) -> Plan:
        return make_uniform_plan(run, REFERENCE_TYPE, imatrix="plain")


def model_path(folder: WorkFolder, plan: Plan) -> Path:
    """Path of the text model of `plan`: its name has the size that was asked for, or that an edited plan comes to."""
    if plan.budget is None:
        return folder.file(uniform_file_name(folder.name, plan.main_type))
    asked = plan.budget.value if plan.budget.kind == "bpw" and not plan.is_edited else plan.bpw
    bpw = asked if _LEAST_OF_BUDGET * asked <= plan.bpw <= asked * (1 + 1e-9) else plan.bpw
    return folder.file(model_file_name(folder.name, bpw, plan.main_type, groups=plan.has_expert_groups))


def _beyond_budget(checkpoint: Checkpoint, plan: Plan) -> str | None:
    """Warning about an edited plan whose types take more than the budget that it was made for; None if they do not."""
    if plan.budget is None or not plan.is_edited:
        return None
    memory = with_breakdown(checkpoint, plan).memory
    within = {
        "bpw": plan.bpw <= plan.budget.value,
        "size": plan.size_bytes <= plan.budget.value,
        "expert-bpw": plan.experts_bpw <= plan.budget.value,
        "fit": memory is None or memory.used <= memory.memory,
    }
    if within[plan.budget.kind]:
        return None
    return f"the edited plan takes {plan.bpw:.3f} bits per weight, more than the budget it was made for ({plan.budget})"


def projector_path(folder: WorkFolder, projector_type: str) -> Path:
    """Path of the projector."""
    return folder.file(projector_file_name(folder.name, projector_type))


def fits_to_compare(checkpoint: Checkpoint) -> bool:
    """Whether the full-precision file would leave half of this machine's memory free."""
    return fits_half_of_memory(_reference_bytes(checkpoint))


def reference_fits(checkpoint: Checkpoint) -> bool:
    """`fits_to_compare`; logs a warning if it does not."""
    fits = fits_to_compare(checkpoint)
    if not fits:
        log.warning(
            "the %s file to compare with would take %s of this machine's %s of memory, so the result is "
            "only loaded and asked; compare it with `mode-gguf validate --reference` on a larger machine",
            REFERENCE_TYPE.name,
            binary_size(_reference_bytes(checkpoint)),
            binary_size(total_memory()),
        )
    return fits


def _reference_bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.n_weights for tensor in text_tensors(checkpoint)) * REFERENCE_TYPE.type_size
