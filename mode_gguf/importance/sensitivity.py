"""The sensitivity stage: from checkpoint, samples and importance matrix to the cost of every candidate type."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.denormals import denormals_flushed
from mode_gguf.forward.distributed import gathered_in_order, share_of
from mode_gguf.forward.inputs import model_inputs
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.fisher import fisher_sensitivity
from mode_gguf.importance.imatrix import Imatrix, Importance
from mode_gguf.importance.imatrix_kind import chosen_imatrix
from mode_gguf.importance.output_error import block_mse, expert_mse
from mode_gguf.importance.sensitivity_settings import SensitivityRequest, SensitivitySettings
from mode_gguf.importance.sensitivity_table import METHODS, SensitivityTable, check_costs
from mode_gguf.importance.token_weights import TokenWeights, tokens_digest
from mode_gguf.options import ComputeOptions
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.fallback_types import fallback_types_of, stored_as

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Result of the sensitivity stage.

    Attributes:
        table: the cost of every candidate.
        imatrix: the Fisher importance matrix; empty where the method has no gradients.
        token_weights: the importance matrix's weights of tokens; None where the method has no gradients.
    """

    table: SensitivityTable
    imatrix: Imatrix
    token_weights: TokenWeights | None


@denormals_flushed()
def measure_sensitivity(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    importance: Importance,
    statistics: CalibrationStatistics,
    request: SensitivityRequest,
    compute: ComputeOptions = ComputeOptions(),
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every expert tensor and expert, and every other matrix, at their candidate types.

    Called by several processes together, each runs its share of the samples; all return the values of all samples.

    Args:
        importance: the plain one; a tensor without is packed plainly.
        statistics: of the same checkpoint; its key tokens are chosen again.

    Raises:
        UsageError: no samples, fewer of them than processes, a method that runs no model, an importance matrix that
            does not go with the method, or no draws.
        InputError: model or sample cannot be used, the statistics belong to another checkpoint, or a cost is beyond
            float32.
    """
    started = time.monotonic()
    if not samples:
        raise UsageError("sensitivity needs at least one sample")
    method = request.method
    if method not in METHODS:
        raise UsageError(f"unknown sensitivity method {method!r}: choose from {', '.join(METHODS)}")
    chosen_imatrix(request.imatrix, method)
    if request.label_draws < 1:
        raise UsageError(f"label draws is {request.label_draws}: at least one is needed")
    if statistics.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"calibration of {statistics.model} ({statistics.fingerprint}) belongs to another checkpoint than "
            f"{checkpoint.path} ({checkpoint.fingerprint}): calibrate this one"
        )
    inputs = model_inputs(checkpoint, share_of(samples))
    settings = SensitivitySettings(request, importance, statistics.key_tokens, compute.hidden_memory)
    measure = {"fisher": fisher_sensitivity, "expert-mse": expert_mse, "block-mse": block_mse}[method]
    streamed = open_streamed(checkpoint, compute.device)
    measurement = measure(streamed, inputs, settings, progress)
    for tensor in streamed.tensors:
        types = request.expert_types if tensor.role is Role.EXPERT else request.dense_types
        check_costs(measurement.arrays, tensor, types, [stored_as(tensor, one) is not None for one in types])
    table = SensitivityTable(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        method=method,
        expert_types=tuple(quant_type.name for quant_type in request.expert_types),
        dense_types=tuple(quant_type.name for quant_type in request.dense_types),
        arrays=measurement.arrays,
        positions=measurement.positions,
        draws=request.label_draws if method == "fisher" else 0,
        seed=request.seed,
        estimated=measurement.estimated,
        imatrix=request.imatrix,
        packing=request.packing,
        fallback_types=_fallback_types(streamed.tensors, request),
    )
    seconds = time.monotonic() - started
    log.info(
        "sensitivity: %s units (a matrix of one expert, or any other, in one type) in %.1f s, %.3g s each",
        f"{table.n_units:,}",
        seconds,
        seconds / max(table.n_units, 1),
    )
    digest = tokens_digest(gathered_in_order([one.input_ids for one in inputs]))
    weights = measurement.token_weights
    return Sensitivity(
        table, measurement.imatrix, TokenWeights(checkpoint.fingerprint, digest, weights) if weights else None
    )


def _fallback_types(tensors: Sequence[SourceTensor], request: SensitivityRequest) -> dict[str, tuple[str, ...]]:
    """Fallback types of candidates that a tensor's rows do not fit, by tensor."""
    experts = [tensor for tensor in tensors if tensor.role is Role.EXPERT]
    others = [tensor for tensor in tensors if tensor.role not in (Role.EXPERT, Role.KEEP)]
    return fallback_types_of(experts, request.expert_types) | fallback_types_of(others, request.dense_types)
