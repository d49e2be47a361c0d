"""Probes: what transformers makes of a few prompts, which validation holds the exported files against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mode_gguf.checkpoint.identity import PROCESSOR, TEMPLATE, TOKENIZER, side_files
from mode_gguf.errors import InputError
from mode_gguf.options import CalibrationOptions, ComputeOptions
from mode_gguf.pipeline.run import Run, Stage, base_key
from mode_gguf.pipeline.samples_key import calibration_samples
from mode_gguf.probes import Probes
from mode_gguf.workfolder import WorkFolder


@dataclass(frozen=True, slots=True)
class MeasureProbes(Stage):
    """Writes probes.safetensors in a pass of its own.

    Calibration writes it along the way. This is for where that is current and these are not, as after a change of the
    chat template where no sample is a chat.
    """

    options: CalibrationOptions = CalibrationOptions()
    compute: ComputeOptions = ComputeOptions()
    name: ClassVar[str] = "probes"

    def key(self, run: Run) -> dict[str, Any]:
        read = side_files(run.checkpoint.path, TOKENIZER, TEMPLATE, PROCESSOR)
        return {**base_key(run.checkpoint, "probes"), **read, "device": self.compute.device}

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (run.folder.probes,)

    def execute(self, run: Run) -> None:
        """Raises:
        InputError: the model cannot be run, or one of its files not be used.
        """
        from mode_gguf.calibration.calibrate import measure_probes

        # Of a model without a family a picture is asked for only where the samples have shown that it can be placed.
        known = run.checkpoint.base is None
        with run.recorded(self):
            probes = measure_probes(
                run.checkpoint,
                with_picture=known or any(sample.has_image for sample in calibration_samples(self.options)),
                device=self.compute.device,
                hidden_bytes=self.compute.hidden_memory,
                progress=run.progress,
            )
            probes.save(run.folder.probes)


def stored_probes(folder: WorkFolder, fingerprint: str) -> Probes | None:
    """The probes of a checkpoint that are in the folder; None where there are none, or another's."""
    try:
        probes = Probes.load(folder.probes)
    except InputError:
        return None
    return probes if probes.fingerprint == fingerprint else None
