"""The stages that run the model: calibrate, sensitivity, unit-kl. torch is imported when they run."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mode_gguf.allocation.units import CandidateTypes
from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.imatrix_file import read_imatrix, write_imatrix
from mode_gguf.importance.imatrix_kind import ImatrixKind, chosen_imatrix
from mode_gguf.pipeline.options import DEFAULT_MEASURED_SAMPLES, CalibrationOptions
from mode_gguf.pipeline.stage_cache import StageCache
from mode_gguf.pipeline.stages import calibrate_stage, sensitivity_stage, unit_kl_stage
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.packing import DEFAULT_PACKING, Packing
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.workfolder import WorkFolder

if TYPE_CHECKING:
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.data.sample import Sample
    from mode_gguf.forward.modality import KeyTokens
    from mode_gguf.importance.imatrix import Imatrix
    from mode_gguf.importance.quantized_kl import KlSettings
    from mode_gguf.importance.sensitivity_table import Method, SensitivityTable
    from mode_gguf.importance.unit_kl import KlModel
    from mode_gguf.importance.unit_kl_table import UnitKl

log = logging.getLogger(__name__)


def run_calibration(
    checkpoint: Checkpoint, folder: WorkFolder, options: CalibrationOptions, progress: Progress = silent
) -> "CalibrationStatistics":
    """Write calibration.safetensors and the importance matrix, measured or from another importance matrix."""
    if options.from_imatrix is not None:
        from mode_gguf.pipeline.from_imatrix import take_statistics

        stage = StageCache(folder).begin(calibrate_stage(checkpoint, folder, options))
        taken = take_statistics(checkpoint, folder, options.from_imatrix)
        stage.finish()
        return taken
    from mode_gguf.calibration.calibrate import calibrate
    from mode_gguf.calibration.coverage import calibration_warnings
    from mode_gguf.forward.distributed import on_all_ranks
    from mode_gguf.importance.imatrix import balanced_imatrix

    stage = StageCache(folder).begin(calibrate_stage(checkpoint, folder, options))
    with _of_any_form(checkpoint, "give llama-imatrix's file of this model with --calibration-from"):
        statistics = on_all_ranks(
            calibrate,
            checkpoint,
            calibration_samples(options),
            device=options.device,
            key_tokens=_key_tokens(options),
            hidden_bytes=options.hidden_bytes,
            progress=progress,
        )
    statistics.save(folder.calibration)
    for warning in calibration_warnings(statistics):
        log.warning("%s", warning)
    _write_imatrix(folder.imatrix, balanced_imatrix(statistics, text_tensors(checkpoint)), statistics)
    stage.finish()
    return statistics


def run_sensitivity(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    options: CalibrationOptions,
    method: "Method",
    types: CandidateTypes,
    *,
    imatrix: ImatrixKind | None = None,
    packing: Packing = DEFAULT_PACKING,
    progress: Progress = silent,
) -> None:
    """Write sensitivity.safetensors, measured with weights packed as they will be.

    Fisher sensitivity writes the Fisher importance matrix and token weights, too.

    `imatrix` None stands for the best that `method` makes, see `chosen_imatrix`.

    Raises:
        InputError: `calibrate` has not run in this folder, or ran for another model.
        UsageError: `method` makes no importance matrix of the kind asked for.
    """
    if method == "imatrix-error":
        from mode_gguf.pipeline.from_imatrix import measure_imatrix_error

        kind = chosen_imatrix(imatrix, method)
        stage = StageCache(folder).begin(sensitivity_stage(checkpoint, folder, options, method, types, kind, packing))
        measure_imatrix_error(checkpoint, folder, types, packing, progress=progress)
        stage.finish()
        return
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.forward.distributed import on_all_ranks
    from mode_gguf.importance.sensitivity import measure_sensitivity

    statistics = CalibrationStatistics.load(folder.calibration)
    if statistics.key_tokens != _key_tokens(options):
        log.warning(
            "key tokens are chosen as in calibration (%s), not as asked for here (%s); to change them, calibrate again",
            statistics.key_tokens,
            _key_tokens(options),
        )
    imatrix = chosen_imatrix(imatrix, method)
    stage = StageCache(folder).begin(sensitivity_stage(checkpoint, folder, options, method, types, imatrix, packing))
    with _of_any_form(checkpoint, "plan by errors weighed with calibration's importance: --sensitivity imatrix-error"):
        measured = on_all_ranks(
            measure_sensitivity,
            checkpoint,
            calibration_samples(options),
            dict(read_imatrix(folder.imatrix)),
            statistics=statistics,
            method=method,
            imatrix=imatrix,
            packing=packing,
            expert_types=types.expert,
            dense_types=types.dense,
            device=options.device,
            seed=options.seed,
            hidden_bytes=options.hidden_bytes,
            progress=progress,
        )
    measured.table.save(folder.sensitivity)
    if measured.token_weights is not None:
        _write_imatrix(folder.imatrix_of("fisher"), measured.imatrix, statistics)
        measured.token_weights.save(folder.token_weights)
    stage.finish()


@contextmanager
def _of_any_form(checkpoint: Checkpoint, way_out: str) -> Iterator[None]:
    """A model without a family may be of a form that nobody has seen: then an error of its code is one of input.

    Raises:
        InputError: with a way out.
    """
    try:
        yield
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        if checkpoint.base is None:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{checkpoint.path}: this model cannot be measured ({reason}); {way_out}") from error


def run_unit_kl(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    options: CalibrationOptions,
    types: CandidateTypes | None = None,
    *,
    sample_budget: int = DEFAULT_MEASURED_SAMPLES,
    progress: Progress = silent,
) -> "UnitKl":
    """Write unit-kl.safetensors: what every tensor in every type was measured to do, packed as `sensitivity` packed.

    Cut off, it continues where it was when run again.

    Args:
        types: None for those that `sensitivity` measured.
        sample_budget: of the calibration samples that are measured on, half of them with an image.

    Raises:
        InputError: `calibrate` or `sensitivity` has not run in this folder, or ran for another model.
    """
    from mode_gguf.importance.unit_kl import measure_unit_kl

    table, _ = measured_tables(checkpoint, folder)
    types = types or CandidateTypes(
        tuple(QUANT_TYPES[name] for name in table.expert_types), tuple(QUANT_TYPES[name] for name in table.dense_types)
    )
    packed = sensitivity_stage(checkpoint, folder, options, table.method, types, table.imatrix, table.packing)
    stage = StageCache(folder).begin(unit_kl_stage(folder, packed, sample_budget))
    model, settings = kl_measurement(checkpoint, folder, options, sample_budget)
    measured = measure_unit_kl(
        model,
        settings,
        expert_types=types.expert,
        dense_types=types.dense,
        imatrix=table.imatrix,
        seed=options.seed,
        partial=folder.unit_kl.with_suffix(".partial"),
        progress=progress,
    )
    measured.save(folder.unit_kl)
    stage.finish()
    return measured


def measured_tables(checkpoint: Checkpoint, folder: WorkFolder) -> tuple["SensitivityTable", "CalibrationStatistics"]:
    """What `sensitivity` and `calibrate` left in the folder, when it is of this checkpoint."""
    from mode_gguf.calibration.statistics import CalibrationStatistics
    from mode_gguf.importance.sensitivity_table import SensitivityTable

    table, statistics = SensitivityTable.load(folder.sensitivity), CalibrationStatistics.load(folder.calibration)
    check_same_model(checkpoint, folder.sensitivity, table.fingerprint)
    check_same_model(checkpoint, folder.calibration, statistics.fingerprint)
    return table, statistics


def kl_measurement(
    checkpoint: Checkpoint, folder: WorkFolder, calibration: CalibrationOptions, sample_budget: int
) -> tuple["KlModel", "KlSettings"]:
    """The model on some of the calibration samples, and packing as `sensitivity` packed."""
    from mode_gguf.importance.quantized_kl import KlSettings
    from mode_gguf.importance.unit_kl import open_kl_model, stratified

    table, statistics = measured_tables(checkpoint, folder)
    samples = stratified(calibration_samples(calibration), sample_budget, calibration.seed)
    settings = KlSettings(
        dict(read_imatrix(folder.imatrix_of(table.imatrix))),
        table.packing,
        statistics.key_tokens,
        calibration.hidden_bytes,
    )
    return open_kl_model(checkpoint, samples, device=calibration.device), settings


def warnings_of_calibration(folder: WorkFolder) -> list[str]:
    from mode_gguf.calibration.coverage import calibration_warnings
    from mode_gguf.calibration.statistics import CalibrationStatistics

    return calibration_warnings(CalibrationStatistics.load(folder.calibration, sums=False))


def check_same_model(checkpoint: Checkpoint, path: Path, found: str) -> None:
    if found != checkpoint.fingerprint:
        raise InputError(
            f"{path}: made from a model with fingerprint {found}, but {checkpoint.path} has {checkpoint.fingerprint}; "
            "run the stage that writes it again, or choose another work folder"
        )


def _write_imatrix(path: Path, entries: "Imatrix", statistics: "CalibrationStatistics") -> None:
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


def _key_tokens(options: CalibrationOptions) -> "KeyTokens":
    from mode_gguf.forward.modality import KeyTokens

    return KeyTokens(options.key_tokens, options.key_ratio, options.seed)


def calibration_samples(options: CalibrationOptions) -> "Sequence[Sample]":
    """The samples that the options stand for."""
    from mode_gguf.data.samples import load_samples

    return load_samples(
        options.source,
        max_image_samples=options.image_samples,
        max_text_samples=options.text_samples,
        seed=options.seed,
    )
