"""`calibrate` and `sensitivity` from an importance matrix: nothing is run, and torch is not imported."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mode_gguf.allocation.units import CandidateTypes
from mode_gguf.architectures import find_family, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.calibration.coverage import calibration_warnings
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.imatrix_file import read_imatrix, read_imatrix_header, read_sums, write_imatrix
from mode_gguf.forward.modality import MODALITIES, TEXT, KeyTokens
from mode_gguf.importance.imatrix_error import imatrix_error
from mode_gguf.importance.sensitivity_settings import SensitivityRequest
from mode_gguf.options import CalibrationOptions, Packing
from mode_gguf.pipeline.run import Run
from mode_gguf.quantization.libggml import needs_importance
from mode_gguf.workfolder import WorkFolder

log = logging.getLogger(__name__)

Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_statistics(checkpoint: Checkpoint, folder: WorkFolder, options: CalibrationOptions) -> None:
    """Write calibration.safetensors and the folder's importance matrix from one that llama-imatrix made.

    Raises:
        InputError: it is none, or is of another model; or a weight is NaN or infinite that nothing else reads early.
    """
    imatrix = options.from_imatrix
    assert imatrix is not None
    header = read_imatrix_header(imatrix)
    tensors = text_tensors(checkpoint)
    _read_unmeasured(checkpoint, tensors)
    sums = _model_entries(imatrix, read_sums(imatrix), tensors)
    tokens = header.chunk_count * header.chunk_size
    statistics = CalibrationStatistics(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        arrays=_statistics_arrays(sums, tensors),
        samples=SampleCounts(header.chunk_count, 0, tokens, 0),
        key_tokens=KeyTokens(),
        datasets=header.datasets,
        imatrix=imatrix.name,
        has_vision=bool(find_family(checkpoint).projector_type),
        options=options,
    )
    statistics.save(folder.calibration)
    for warning in calibration_warnings(statistics):
        log.warning("%s", warning)
    write_imatrix(folder.imatrix, sums, header.datasets, header.chunk_count, header.chunk_size)


def _read_unmeasured(checkpoint: Checkpoint, tensors: Sequence[SourceTensor]) -> None:
    """Read what no error is measured of, so that a weight that is NaN there stops the work here and not at its end."""
    unmeasured = [tensor for tensor in tensors if tensor.role in (Role.KEEP, Role.ABSORBED)]
    for tensor in (*unmeasured, *projector_tensors(checkpoint)):
        tensor.read(0)


def measure_imatrix_error(run: Run, types: CandidateTypes, packing: Packing, threads: int | None = None) -> None:
    """Write sensitivity.safetensors from the folder's statistics and plain importance matrix.

    Raises:
        InputError: a candidate type needs importance that the matrix does not have.
    """
    checkpoint, folder = run.checkpoint, run.folder
    statistics = CalibrationStatistics.load(folder.calibration, sums=False)
    importance = read_imatrix(folder.imatrix)
    tensors = text_tensors(checkpoint)
    for tensor in tensors:
        lacking = [one.name for one in types.of(tensor) if needs_importance(one)] if tensor.activation else []
        if lacking and tensor.name not in importance:
            raise InputError(
                f"{folder.imatrix}: has nothing of {tensor.name}, and {lacking[0]} needs it; leave that type out, or "
                "give tensors of this kind a floor (plan.floors)"
            )
    counts = {layer: statistics.counts(layer).sum(axis=0) for layer in statistics.moe_layers}
    table = imatrix_error(
        checkpoint.name,
        checkpoint.fingerprint,
        tensors,
        importance,
        counts,
        SensitivityRequest(types.expert, types.dense, "imatrix-error", packing=packing),
        threads,
        run.progress,
    )
    table.save(folder.sensitivity)


def _model_entries(path: Path, sums: Sums, tensors: Sequence[SourceTensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The entries of the model's matrices, in its order.

    Raises:
        InputError: an expert tensor is not there, or an entry has another shape.
    """
    found = {}
    for tensor in tensors:
        if tensor.activation is None:
            continue
        entry = sums.get(tensor.name)
        if entry is None:
            if tensor.role is Role.EXPERT:
                raise InputError(
                    f"{path}: has nothing of {tensor.name}; make the importance matrix of this model, with "
                    "llama-imatrix on its BF16 file"
                )
            continue
        in_sum2, counts = entry
        if in_sum2.shape == (tensor.n_experts, tensor.row_width):
            found[tensor.name] = (in_sum2, np.rint(counts[:, 0]))
        elif len(tensor.shape) == 2 or tensor.role is Role.EXPERT:
            raise InputError(
                f"{path}: {tensor.name} has {len(in_sum2)} x {in_sum2.shape[1]} sums, expected {tensor.n_experts} x "
                f"{tensor.row_width}; it is of another model"
            )
    return found


def _statistics_arrays(sums: Sums, tensors: Sequence[SourceTensor]) -> dict[str, np.ndarray]:
    """Statistics arrays as calibration writes them, all tokens under `text`; routing weights are not known, and 0."""
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        if tensor.name not in sums or tensor.activation is None or f"{tensor.activation}.count" in arrays:
            continue
        in_sum2, counts = sums[tensor.name]
        sum2 = np.zeros((len(MODALITIES), *in_sum2.shape))
        sum2[TEXT] = in_sum2
        count = np.zeros((len(MODALITIES), len(counts)), np.int64)
        count[TEXT] = counts
        arrays |= {f"{tensor.activation}.sum2": sum2, f"{tensor.activation}.count": count}
        if tensor.role is Role.EXPERT:
            for name in ("weight", "weight2"):
                arrays[f"blk.{tensor.layer}.ffn_exps.{name}"] = np.zeros(count.shape)
    return arrays
