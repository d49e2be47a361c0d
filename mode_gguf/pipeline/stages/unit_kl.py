"""Unit KL: the KL divergence that every tensor in every candidate type really causes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.options import SensitivityOptions
from mode_gguf.pipeline.run import Run, Stage, base_key
from mode_gguf.pipeline.samples_key import calibration_samples
from mode_gguf.pipeline.stages.calibrate import stored_statistics
from mode_gguf.pipeline.stages.sensitivity import MeasureSensitivity, stored_table

if TYPE_CHECKING:
    from mode_gguf.importance.quantized_kl import KlSettings
    from mode_gguf.importance.unit_kl import KlModel


@dataclass(frozen=True, slots=True)
class MeasureUnitKl(Stage):
    """Writes unit-kl.safetensors; cut off, it continues where it was when run again.

    Attributes:
        sensitivity: the stage whose samples, candidates and packing this one takes.
        measured_samples: of the calibration samples that are measured on, half of them with an image.
    """

    sensitivity: MeasureSensitivity
    measured_samples: int = SensitivityOptions.measured_samples
    name: ClassVar[str] = "unit-kl"

    def key(self, run: Run) -> dict[str, Any]:
        common = {**self.sensitivity.key(run), **base_key(run.checkpoint, "unit-kl")}
        return {**common, "measured samples": self.measured_samples}

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return (run.folder.unit_kl,)

    def execute(self, run: Run) -> None:
        """Raises:
        InputError: `calibrate` or `sensitivity` has not run in this folder, or ran for another model.
        """
        from mode_gguf.importance.unit_kl import measure_unit_kl

        stored_table(run)
        with run.recorded(self):
            model, settings = kl_measurement(run, self.sensitivity, self.measured_samples)
            measured = measure_unit_kl(
                model,
                settings,
                expert_types=self.sensitivity.types.expert,
                dense_types=self.sensitivity.types.dense,
                imatrix=self.sensitivity.imatrix,
                seed=self.sensitivity.calibrate.options.seed,
                partial=run.folder.unit_kl.with_suffix(".partial"),
                progress=run.progress,
            )
            measured.save(run.folder.unit_kl)


def kl_measurement(run: Run, sensitivity: MeasureSensitivity, measured_samples: int) -> tuple["KlModel", "KlSettings"]:
    """The model on some of the calibration samples, and packing as `sensitivity` packed.

    Raises:
        InputError: calibration has not run in this folder, or ran for another model.
    """
    from mode_gguf.importance.quantized_kl import KlSettings
    from mode_gguf.importance.unit_kl import open_kl_model, stratified

    options, compute = sensitivity.calibrate.options, sensitivity.compute
    samples = stratified(calibration_samples(options), measured_samples, options.seed)
    settings = KlSettings(
        dict(read_imatrix(run.folder.imatrix_of(sensitivity.imatrix))),
        sensitivity.packing,
        stored_statistics(run).key_tokens,
        compute.hidden_memory,
    )
    return open_kl_model(run.checkpoint, samples, device=compute.device), settings
