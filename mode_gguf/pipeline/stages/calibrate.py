"""Calibration: the model's statistics, the plain importance matrix and the probes, or llama-imatrix's file instead."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError, reason
from mode_gguf.export.imatrix_file import write_imatrix
from mode_gguf.export.tokenizer import checked_vocabulary
from mode_gguf.options import CalibrationOptions, ComputeOptions
from mode_gguf.pipeline.run import Run, Stage, base_key
from mode_gguf.pipeline.samples_key import calibration_key, calibration_samples
from mode_gguf.pipeline.stages.probes import MeasureProbes
from mode_gguf.workfolder import WorkFolder

if TYPE_CHECKING:
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.data.sample import Sample
    from mode_gguf.importance.imatrix import Imatrix

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Calibrate(Stage):
    """Writes calibration.safetensors, the importance matrix and, where the model is run, the probes."""

    options: CalibrationOptions = CalibrationOptions()
    compute: ComputeOptions = ComputeOptions()
    name: ClassVar[str] = "calibrate"

    @classmethod
    def of_folder(cls, run: Run, compute: ComputeOptions) -> "Calibrate":
        """The stage as it ran in the folder.

        Raises:
            InputError: it did not run there, or for another model.
        """
        statistics = stored_statistics(run, sums=False)
        return cls(statistics.options, ComputeOptions(statistics.device, compute.threads, compute.hidden_memory))

    def key(self, run: Run) -> dict[str, Any]:
        options, common = self.options, base_key(run.checkpoint, "calibration")
        if options.from_imatrix is not None:
            content = run.cache.identity(options.from_imatrix)
            return {**common, "calibration from": options.from_imatrix.name, "its content": content}
        return {
            **common,
            **calibration_key(run, options),
            "image samples": options.image_samples,
            "text samples": options.text_samples,
            "key tokens": options.key_tokens,
            "key ratio": options.key_ratio,
            "seed": options.seed,
            "device": self.compute.device,
        }

    def outputs(self, run: Run) -> tuple[Path, ...]:
        return run.folder.calibration, run.folder.imatrix

    def execute(self, run: Run) -> None:
        """Raises:
        InputError: a sample or the importance matrix cannot be used, or the model cannot be run.
        """
        with run.recorded(self):
            if self.options.from_imatrix is not None:
                from mode_gguf.pipeline.from_imatrix import write_statistics

                write_statistics(run.checkpoint, run.folder, self.options)
                run.folder.probes.unlink(missing_ok=True)
                run.cache.forget(MeasureProbes.name)
            else:
                self._measure(run)

    def _measure(self, run: Run) -> None:
        from mode_gguf.calibration.calibrate import calibrate_and_probe
        from mode_gguf.calibration.coverage import calibration_warnings
        from mode_gguf.forward.distributed import on_all_ranks
        from mode_gguf.forward.modality import KeyTokens
        from mode_gguf.importance.imatrix import balanced_imatrix

        samples = checked_samples(run.checkpoint, self.options)
        with unknown_model_errors(run.checkpoint, "give llama-imatrix's file of this model with --calibration-from"):
            statistics, probes = on_all_ranks(
                calibrate_and_probe,
                run.checkpoint.identified(),
                samples,
                device=self.compute.device,
                key_tokens=KeyTokens.of(self.options),
                hidden_bytes=self.compute.hidden_memory,
                progress=run.progress,
            )
        statistics = replace(statistics, options=self.options, device=self.compute.device)
        statistics.save(run.folder.calibration)
        probes.save(run.folder.probes)
        run.cache.record(MeasureProbes(self.options, self.compute).state(run), 0.0)
        for warning in calibration_warnings(statistics):
            log.warning("%s", warning)
        save_imatrix(run.folder.imatrix, balanced_imatrix(statistics, text_tensors(run.checkpoint)), statistics)


def checked_samples(checkpoint: Checkpoint, options: CalibrationOptions) -> "Sequence[Sample]":
    """The samples that the options stand for, of a checkpoint whose tokenizer, template and processor take them.

    Raises:
        InputError: a sample cannot be read, or one of the checkpoint's files cannot be used.
    """
    from mode_gguf.forward.inputs import check_inputs

    samples, vocabulary = calibration_samples(options), checked_vocabulary(checkpoint)
    check_inputs(
        checkpoint,
        chats=any(sample.messages for sample in samples),
        pictures=any(sample.has_image for sample in samples),
        tokens=vocabulary.tokens if vocabulary else None,
    )
    return samples


def stored_statistics(run: Run, *, sums: bool = True) -> "CalibrationStatistics":
    """The statistics that `calibrate` left in the folder; without `sums` what is quickly read.

    Raises:
        InputError: nothing, or of another model.
    """
    from mode_gguf.calibration.statistics import CalibrationStatistics

    statistics = CalibrationStatistics.load(run.folder.calibration, sums=sums)
    check_same_model(run.checkpoint, run.folder.calibration, statistics.fingerprint)
    return statistics


def stored_warnings(folder: WorkFolder) -> list[str]:
    """Warnings of the calibration in a folder."""
    from mode_gguf.calibration.coverage import calibration_warnings
    from mode_gguf.calibration.statistics import CalibrationStatistics

    return calibration_warnings(CalibrationStatistics.load(folder.calibration, sums=False))


def check_same_model(checkpoint: Checkpoint, path: Path, found: str) -> None:
    """Refuse an artefact of another model.

    Raises:
        InputError: the fingerprint that the artefact has is not the checkpoint's.
    """
    if found != checkpoint.fingerprint:
        raise InputError(
            f"{path}: made from a model with fingerprint {found}, but {checkpoint.path} has {checkpoint.fingerprint}; "
            "run the stage that writes it again, or choose another work folder"
        )


def save_imatrix(path: Path, entries: "Imatrix", statistics: "CalibrationStatistics") -> None:
    """Write an importance matrix of the samples that `statistics` were taken of."""
    samples = statistics.samples
    n_samples = samples.text_samples + samples.image_samples
    write_imatrix(
        path,
        entries,
        datasets=statistics.datasets,
        chunk_count=n_samples,
        chunk_size=(samples.text_tokens + samples.vision_tokens) // n_samples,
    )


@contextmanager
def unknown_model_errors(checkpoint: Checkpoint, way_out: str) -> Iterator[None]:
    """Context that raises errors of an unknown model's code as InputError: it may have a form that no family covers.

    Raises:
        InputError: with a way out.
    """
    try:
        yield
    except (MemoryError, RecursionError, OverflowError) as error:
        raise InputError(f"{checkpoint.path}: this model cannot be measured ({reason(error)})") from error
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if checkpoint.base is None:
            raise
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{checkpoint.path}: this model cannot be measured ({said}); {way_out}") from error
