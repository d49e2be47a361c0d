"""The sensitivity stage: a checkpoint, samples and an importance matrix in; the damage of every candidate type out."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mode_gguf.architectures.tensors import Role
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.denormals import denormals_flushed
from mode_gguf.forward.distributed import gathered_in_order, share_of
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.forward.limits import HIDDEN_BYTES, LABEL_DRAWS, MAX_IMAGE_PIXELS, MAX_TOKENS
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.fisher import fisher_sensitivity
from mode_gguf.importance.imatrix import Imatrix, Importance
from mode_gguf.importance.imatrix_kind import chosen_imatrix
from mode_gguf.importance.output_error import block_mse, expert_mse
from mode_gguf.importance.sensitivity_settings import SensitivitySettings
from mode_gguf.importance.sensitivity_table import METHODS, SensitivityTable
from mode_gguf.importance.token_weights import TokenWeights, tokens_digest
from mode_gguf.options import Packing
from mode_gguf.progress import Progress, silent
from mode_gguf.quantization.fallback_types import fallback_types_of
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QuantType
from mode_gguf.vocabulary import ImatrixKind, Method

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured.

    Attributes:
        table: the damage of every candidate.
        imatrix: the Fisher importance matrix; empty where the method has no gradients.
        token_weights: what the importance matrix weighed tokens by; None where the method has no gradients.
    """

    table: SensitivityTable
    imatrix: Imatrix
    token_weights: TokenWeights | None


@denormals_flushed()
def measure_sensitivity(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    importance: Importance,
    *,
    expert_types: Sequence[QuantType],
    dense_types: Sequence[QuantType],
    statistics: CalibrationStatistics,
    method: Method = "fisher",
    imatrix: ImatrixKind = "plain",
    packing: Packing = EXACT,
    label_draws: int = LABEL_DRAWS,
    seed: int = 0,
    device: str = "auto",
    max_tokens: int = MAX_TOKENS,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    hidden_bytes: int = HIDDEN_BYTES,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every expert tensor and expert at `expert_types`, every other matrix at `dense_types`.

    Called by several processes together, each runs its share of the samples; all return what all samples say.

    Args:
        importance: the plain one; a tensor without is packed plainly.
        statistics: of the same checkpoint; its key tokens are chosen again.
        method: `fisher` (KL, see `fisher`), `expert-mse` (the paper's recipe) or `block-mse`, see `output_error`.
        imatrix: which importance the file will be packed with; for `fisher` see `SensitivitySettings`.
        packing: how the file will be packed.
        label_draws: per scored position; Fisher only.
        device, max_tokens, max_image_pixels, hidden_bytes: as for `calibrate`.

    Raises:
        UsageError: no samples, fewer of them than processes, an unknown method or importance matrix, a pair that does
            not go together, or no draws.
        InputError: model or sample cannot be used, or the statistics belong to another checkpoint.
    """
    started = time.monotonic()
    if not samples:
        raise UsageError("sensitivity needs at least one sample")
    if method not in METHODS:
        raise UsageError(f"unknown sensitivity method {method!r}: choose from {', '.join(METHODS)}")
    chosen_imatrix(imatrix, method)
    if label_draws < 1:
        raise UsageError(f"label draws is {label_draws}: at least one is needed")
    if statistics.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"calibration of {statistics.model} ({statistics.fingerprint}) belongs to another checkpoint than "
            f"{checkpoint.path} ({checkpoint.fingerprint}): calibrate this one"
        )
    builder = InputBuilder.open(checkpoint, max_tokens=max_tokens, max_image_pixels=max_image_pixels)
    inputs = [builder.build(sample) for sample in share_of(samples)]
    settings = SensitivitySettings(
        expert_types, dense_types, importance, statistics.key_tokens, label_draws, seed, imatrix, packing, hidden_bytes
    )
    measure = {"fisher": fisher_sensitivity, "expert-mse": expert_mse, "block-mse": block_mse}[method]
    streamed = open_streamed(checkpoint, device)
    measurement = measure(streamed, inputs, settings, progress)
    table = SensitivityTable(
        model=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        method=method,
        expert_types=tuple(quant_type.name for quant_type in expert_types),
        dense_types=tuple(quant_type.name for quant_type in dense_types),
        arrays=measurement.arrays,
        positions=measurement.positions,
        draws=label_draws if method == "fisher" else 0,
        seed=seed,
        estimated=measurement.estimated,
        imatrix=imatrix,
        packing=packing,
        stand_ins=fallback_types_of([t for t in streamed.tensors if t.role is Role.EXPERT], expert_types)
        | fallback_types_of([t for t in streamed.tensors if t.role not in (Role.EXPERT, Role.KEEP)], dense_types),
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
