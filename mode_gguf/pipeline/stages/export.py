"""Export: the GGUF files of a plan, of the projector, of multi-token prediction, and the one to compare with."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import projector_tensors, text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import MissingResourceError
from mode_gguf.estimate.machine import fits_half_of_memory, total_memory
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.export.metadata import imatrix_keys
from mode_gguf.export.mtp import write_mtp
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import TensorPacking, text_model_files, write_text_model
from mode_gguf.options import ComputeOptions, ExportOptions
from mode_gguf.pipeline.planning import make_uniform_plan
from mode_gguf.pipeline.run import Run, Stage, base_key
from mode_gguf.pipeline.stages.calibrate import Calibrate, check_same_model
from mode_gguf.pipeline.stages.feedback import RoundWithFeedback, forget_rounded, packed_sources
from mode_gguf.pipeline.stages.packed_key import packed_key
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.sizes import binary_size
from mode_gguf.vocabulary import ImatrixKind, MtpType, ProjectorType, Rounding
from mode_gguf.workfolder import WorkFolder, model_file_name, mtp_file_name, projector_file_name

log = logging.getLogger(__name__)

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
        settings = packed_key(run, plan, self.imatrix, self.rounding or plan.rounding)
        if not projector_tensors(run.checkpoint):
            settings["projector"] = "none"
        return {
            **settings,
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

    def resolved_plan(self, run: Run) -> Plan:
        """The plan that the file is made by."""
        return self.plan or Plan.load(run.folder.plan)

    def execute(self, run: Run) -> None:
        """Raises:
        UsageError: there would be more shards than llama.cpp loads.
        InputError: the plan belongs to another model, or a weight cannot be packed.
        MissingResourceError: not enough disk space, or an importance matrix or token weights are not there.
        """
        plan = self.resolved_plan(run)
        if (self.rounding or plan.rounding) == "feedback":
            calibrate = self.calibrate or Calibrate.of_folder(run, self.compute)
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
        feedback = (self.rounding or plan.rounding) == "feedback"
        write_text_model(
            model_path(folder, plan),
            run.checkpoint,
            TensorPacking(
                plan.types,
                read_imatrix(packed_with) if with_imatrix else None,
                plan.experts,
                plan.packing,
                packed_sources(run, plan, self.imatrix) if feedback else {},
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
        return {**base_key(run.checkpoint, "projector"), "type": self.type}

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
            "type": self.type,
            "pre-tokenizer": run.checkpoint.pre_tokenizer,
        }

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (run.folder.path / mtp_file_name(run.folder.name, self.type),)

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
        return {**base_key(run.checkpoint, "text model"), "pre-tokenizer": run.checkpoint.pre_tokenizer}

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (model_path(run.folder, self._plan(run)),)

    def execute(self, run: Run) -> None:
        with run.recorded(self):
            ExportText(self._plan(run), compute=self.compute).write(run)

    def _plan(self, run: Run) -> Plan:
        return make_uniform_plan(run, REFERENCE_TYPE, imatrix="plain")


def model_path(folder: WorkFolder, plan: Plan) -> Path:
    """Path of the text model of `plan`."""
    if plan.budget is None:
        return folder.path / f"{folder.name}-{plan.main_type}.gguf"
    bpw = plan.budget.value if plan.budget.kind == "bpw" else plan.bpw
    return folder.path / model_file_name(folder.name, bpw, plan.main_type, groups=plan.has_expert_groups)


def projector_path(folder: WorkFolder, projector_type: str) -> Path:
    """Path of the projector."""
    return folder.path / projector_file_name(folder.name, projector_type)


def reference_fits(checkpoint: Checkpoint) -> bool:
    """Whether the full-precision file would leave half of this machine's memory free; logs a warning if not."""
    needed = sum(tensor.n_weights for tensor in text_tensors(checkpoint)) * REFERENCE_TYPE.type_size
    memory = total_memory()
    fits = fits_half_of_memory(needed)
    if not fits:
        log.warning(
            "the %s file to compare with would take %s of this machine's %s of memory, so the result is "
            "only loaded and asked; compare it with `mode-gguf validate --reference` on a larger machine",
            REFERENCE_TYPE.name,
            binary_size(needed),
            binary_size(memory),
        )
    return fits
