"""Rounding with error feedback: the plan's K-quants packed layer by layer, for the export that follows."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.artifacts import SCHEMAS, Record, fingerprint, read_record, write_text
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import MissingResourceError
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.feedback.rounded_tensors import RoundedTensors, is_rounded, part_of
from mode_gguf.pipeline.run import Run, Stage
from mode_gguf.pipeline.samples_key import calibration_samples
from mode_gguf.pipeline.stages.calibrate import Calibrate, check_same_model
from mode_gguf.pipeline.stages.packed_key import packed_key
from mode_gguf.quantization.expert_groups import stored_tensors
from mode_gguf.vocabulary import ImatrixKind
from mode_gguf.workfolder import WorkFolder

log = logging.getLogger(__name__)


class RoundingReport(Record):
    """rounding.json: counts of the matrices that were to be rounded with feedback.

    Attributes:
        matrices: how many there were, by tensor.
        nearest: how many of them were rounded to nearest, because too few tokens reached them.
    """

    matrices: dict[str, int]
    nearest: dict[str, int]

    @property
    def warnings(self) -> list[str]:
        """Warning about matrices that were rounded to nearest, if there are any."""
        left = sum(self.nearest.values())
        if not left:
            return []
        share = f"{left} of {sum(self.matrices.values())} matrices"
        return [f"rounding: too few calibration tokens reached {share}, which were rounded to nearest"]


@dataclass(frozen=True, slots=True)
class RoundWithFeedback(Stage):
    """Packs into the folder's `rounded` and writes rounding.json; layers that are there are not packed again.

    With the Fisher importance matrix tokens count what `sensitivity` found that they weigh, with the plain one all
    alike.

    Attributes:
        calibrate: the stage whose samples run through the model once more.
        imatrix: that packs; None for the plan's.
    """

    plan: Plan
    calibrate: Calibrate
    imatrix: ImatrixKind | None = None
    name: ClassVar[str] = "round"

    def key(self, run: Run) -> dict[str, Any]:
        return packed_key(run, self.plan, self.imatrix, self.calibrate)

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (run.folder.rounding,)

    def is_current(self, run: Run) -> bool:
        """Never: it is asked for where an export needs it, and what it left is found layer by layer."""
        return False

    def execute(self, run: Run) -> None:
        """Raises:
        InputError: plan or token weights belong to another model or other samples, or a weight cannot be packed.
        MissingResourceError: no importance matrix or token weights in the folder, or not enough disk space.
        """
        check_same_model(run.checkpoint, run.folder.plan, self.plan.made_from.model_fingerprint)
        rounded = rounded_tensors(run, self.plan, self.calibrate, self.imatrix)
        with run.recorded(self):
            self._round(run, rounded)
            chosen = _rounded_tensors(run.checkpoint, self.plan)
            nearest = [rounded.nearest(part) for part in dict.fromkeys(map(part_of, chosen))]
            report = RoundingReport(
                matrices={tensor.name: tensor.n_experts for tensor in chosen},
                nearest={name: count for part in nearest for name, count in part.items() if count},
            )
            write_text(run.folder.rounding, report.model_dump_json(indent=1) + "\n")
        for warning in report.warnings:
            log.warning("%s", warning)

    def _round(self, run: Run, rounded: RoundedTensors) -> None:
        from mode_gguf.feedback.round_layers import RoundingSettings, round_tensors
        from mode_gguf.forward.inputs import InputBuilder
        from mode_gguf.forward.streaming import open_streamed
        from mode_gguf.importance.token_weights import TokenWeights

        plan, compute = self.plan, self.calibrate.compute
        builder = InputBuilder.open(run.checkpoint)
        inputs = [builder.build(sample) for sample in calibration_samples(self.calibrate.options)]
        weights = {}
        kind = self.imatrix or plan.made_from.imatrix_kind
        if kind == "fisher":
            measured = TokenWeights.load(run.folder.token_weights)
            check_same_model(run.checkpoint, run.folder.token_weights, measured.fingerprint)
            measured.check_samples(inputs, run.folder.token_weights)
            weights = dict(measured.weights)
        settings = RoundingSettings(
            types=plan.types,
            experts=plan.experts,
            importance=dict(read_imatrix(run.folder.imatrix_of(kind))),
            packing=plan.packing,
            token_weights=weights,
            threads=compute.threads or os.cpu_count() or 1,
            hidden_bytes=compute.hidden_memory,
        )
        round_tensors(open_streamed(run.checkpoint, compute.device), inputs, settings, rounded, run.progress)


def rounded_tensors(run: Run, plan: Plan, calibrate: Calibrate, imatrix: ImatrixKind | None = None) -> RoundedTensors:
    """The folder of the plan's tensors, rounded on the samples of `calibrate`.

    Raises:
        MissingResourceError: a file that they are made from is not in the folder.
    """
    kind = imatrix or plan.made_from.imatrix_kind
    folder = run.folder
    sources = [folder.imatrix_of(kind), *([folder.token_weights] if kind == "fisher" else [])]
    for source in sources:
        if not source.exists():
            stage = "calibrate" if kind == "plain" else "sensitivity"
            raise MissingResourceError(f"{source}: not there; `mode-gguf {stage}` writes it")
    key = fingerprint(packed_key(run, plan, imatrix, calibrate), SCHEMAS["rounded"])
    return RoundedTensors(folder.rounded, key)


def packed_sources(
    run: Run, plan: Plan, calibrate: Calibrate, imatrix: ImatrixKind | None = None
) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    """Iterators over the plan's rounded tensors for the export, by name.

    Raises:
        MissingResourceError: some of them are not there.
    """
    rounded = rounded_tensors(run, plan, calibrate, imatrix)
    chosen = _rounded_tensors(run.checkpoint, plan)
    for part in dict.fromkeys(map(part_of, chosen)):
        rounded.check(part)
    return {tensor.name: partial(rounded.matrices, part_of(tensor), tensor.name) for tensor in chosen}


def _rounded_tensors(checkpoint: Checkpoint, plan: Plan) -> list[SourceTensor]:
    """The tensors of the plan's file that are rounded with feedback."""
    stored, types = stored_tensors(text_tensors(checkpoint), plan.experts), plan.stored_types
    return [tensor for tensor in stored.tensors if is_rounded(tensor, types)]


def forget_rounded(folder: WorkFolder) -> None:
    """Remove the rounded tensors, once a file has them: they take as much space as it."""
    shutil.rmtree(folder.rounded, ignore_errors=True)


def warnings_of_rounding(folder: WorkFolder) -> list[str]:
    """Warnings of the last rounding in a folder; none once its report was removed."""
    if not folder.rounding.exists():
        return []
    return read_record(folder.rounding, RoundingReport, "rounding report").warnings
