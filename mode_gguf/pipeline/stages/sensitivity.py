"""Sensitivity: damage of quantization in every candidate type, measured or from an importance matrix."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mode_gguf.allocation.units import CandidateTypes, candidate_types
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.importance.imatrix_kind import chosen_imatrix
from mode_gguf.options import ComputeOptions, Packing, SensitivityOptions
from mode_gguf.pipeline.run import Run, Stage, base_key
from mode_gguf.pipeline.samples_key import calibration_samples
from mode_gguf.pipeline.stages.calibrate import (
    Calibrate,
    check_same_model,
    save_imatrix,
    stored_statistics,
    unknown_model_errors,
)
from mode_gguf.vocabulary import ImatrixKind, Method

if TYPE_CHECKING:
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.sensitivity_table import SensitivityTable


@dataclass(frozen=True, slots=True)
class MeasureSensitivity(Stage):
    """Writes sensitivity.safetensors, and where there are gradients the Fisher importance matrix and token weights.

    Attributes:
        calibrate: the stage whose samples, seed and key tokens this one takes.
        types: candidates that are measured.
        imatrix: that candidates are packed with.
    """

    calibrate: Calibrate
    types: CandidateTypes
    method: Method
    imatrix: ImatrixKind
    packing: Packing
    compute: ComputeOptions = ComputeOptions()
    name: ClassVar[str] = "sensitivity"

    @classmethod
    def of(cls, calibrate: Calibrate, options: SensitivityOptions, types: CandidateTypes) -> "MeasureSensitivity":
        """The stage that options ask for.

        Raises:
            UsageError: the method makes no importance matrix of the kind asked for.
        """
        imatrix = chosen_imatrix(options.imatrix, options.method)
        return cls(calibrate, types, options.method, imatrix, options.packing, calibrate.compute)

    @classmethod
    def of_folder(cls, run: Run, compute: ComputeOptions) -> "MeasureSensitivity":
        """The stage as it ran in the folder.

        Raises:
            InputError: it or calibration did not run there, or for another model.
        """
        table = stored_table(run)
        types = candidate_types(table.expert_types, table.dense_types)
        calibrate = Calibrate.of_folder(run, compute)
        return cls(calibrate, types, table.method, table.imatrix, table.packing, calibrate.compute)

    def key(self, run: Run) -> dict[str, Any]:
        return {
            **self.calibrate.key(run),
            **base_key(run.checkpoint, "sensitivity"),
            "sensitivity": self.method,
            "imatrix": self.imatrix,
            "packing": self.packing.mode,
            "effort": self.packing.effort,
            "size power": self.packing.size_power,
            "unbiased": self.packing.unbiased,
            "types": [quant_type.name for quant_type in self.types.expert],
            "dense types": [quant_type.name for quant_type in self.types.dense],
        }

    def outputs(self, run: Run) -> tuple[Path, ...]:
        folder = run.folder
        with_gradients = (folder.imatrix_of("fisher"), folder.token_weights) if self.method == "fisher" else ()
        return (folder.sensitivity, *with_gradients)

    def execute(self, run: Run) -> None:
        """Raises:
        InputError: `calibrate` has not run in this folder, or ran for another model; a sample cannot be used.
        """
        if self.method == "imatrix-error":
            from mode_gguf.pipeline.from_imatrix import measure_imatrix_error

            with run.recorded(self):
                measure_imatrix_error(run, self.types, self.packing, self.compute.threads)
            return
        statistics = stored_statistics(run)
        with run.recorded(self):
            self._measure(run, statistics)

    def _measure(self, run: Run, statistics: "CalibrationStatistics") -> None:
        from mode_gguf.forward.distributed import on_all_ranks
        from mode_gguf.importance.sensitivity import measure_sensitivity
        from mode_gguf.importance.sensitivity_settings import SensitivityRequest

        folder, types = run.folder, self.types
        seed = self.calibrate.options.seed
        request = SensitivityRequest(types.expert, types.dense, self.method, self.imatrix, self.packing, seed=seed)
        way_out = "plan by errors weighed with calibration's importance: --set sensitivity.method=imatrix-error"
        with unknown_model_errors(run.checkpoint, way_out):
            measured = on_all_ranks(
                measure_sensitivity,
                run.checkpoint.identified(),
                calibration_samples(self.calibrate.options),
                dict(read_imatrix(folder.imatrix)),
                statistics,
                request,
                self.compute,
                progress=run.progress,
            )
        measured.table.save(folder.sensitivity)
        if measured.token_weights is not None:
            save_imatrix(folder.imatrix_of("fisher"), measured.imatrix, statistics)
            measured.token_weights.save(folder.token_weights)


def stored_table(run: Run) -> "SensitivityTable":
    """The table that `sensitivity` left in the folder.

    Raises:
        InputError: nothing, or of another model.
    """
    from mode_gguf.importance.sensitivity_table import SensitivityTable

    table = SensitivityTable.load(run.folder.sensitivity)
    check_same_model(run.checkpoint, run.folder.sensitivity, table.fingerprint)
    return table
