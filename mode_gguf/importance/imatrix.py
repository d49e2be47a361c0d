"""The importance matrix: column weights for packing, balanced between modalities."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from mode_gguf.architectures.tensors import SourceTensor
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.errors import InputError, UsageError

Imatrix: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]
"""Importance matrix: in_sum2 (E, n) and whole counts (E,), both float32, by tensor name; E = 1 but for experts."""

Importance: TypeAlias = Mapping[str, np.ndarray]
"""Importance: per tensor name in_sum2 / counts, float32 (E, n), for packing; also the form read from a file."""

DEFAULT_MODALITY_WEIGHTS = (1.0, 1.0, 0.1)
"""Weights of text, key and redundant vision tokens. Text and key ones count alike, whatever their numbers; redundant
ones, four out of five, count a tenth: enough to order the columns of an expert that only they reach."""


def balanced_imatrix(
    statistics: CalibrationStatistics,
    tensors: Sequence[SourceTensor],
    modality_weights: tuple[float, float, float] = DEFAULT_MODALITY_WEIGHTS,
) -> Imatrix:
    """Importance of every tensor that has input statistics, in llama.cpp's form.

    A modality's sums and counts are divided by its tokens in the layer, so that 3,000 pixels' worth of image do not
    drown 300 words; then they are combined by weight and scaled back to the number of tokens seen. An expert that no
    token of a weighted modality reached gets the layer's mean importance with count 1.

    Args:
        modality_weights: of text, key vision and redundant vision tokens; at least one positive.

    Returns:
        {tensor name: (in_sum2 float32 (E, n), counts float32 (E,))}. Counts are rounded to whole numbers, at least 1,
        because llama-quantize rounds them before it divides; sums are those of the rounded counts.

    Raises:
        UsageError: weights are negative or all zero.
        InputError: the statistics lack a tensor, no token of a weighted modality reached its layer, or sums of squares
            are beyond float32.
    """
    if min(modality_weights) < 0 or max(modality_weights) == 0:
        raise UsageError(
            f"modality weights {modality_weights} are not usable: none may be negative, one must be positive"
        )
    balanced = {}
    for tensor in tensors:
        if tensor.activation is None:
            continue
        if f"{tensor.activation}.sum2" not in statistics.arrays:
            raise InputError(f"calibration of {statistics.model} lacks {tensor.activation}: calibrate this checkpoint")
        balanced[tensor.name] = _balance(
            statistics.arrays[f"{tensor.activation}.sum2"],
            statistics.arrays[f"{tensor.activation}.count"],
            np.asarray(modality_weights),
            tensor.activation,
        )
    return balanced


def importance_of(imatrix: Imatrix) -> dict[str, np.ndarray]:
    """Sums divided by counts, float32 (E, n), by tensor name: as llama-quantize, and `read_imatrix`, divide them."""
    return {name: in_sum2 / counts[:, None] for name, (in_sum2, counts) in imatrix.items()}


def _balance(
    sum2: np.ndarray, count: np.ndarray, weights: np.ndarray, activation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Balanced sums and counts: (M, E, n) and (M, E) to (E, n) and (E,)."""
    tokens = count.sum(axis=1)
    weights = np.where(tokens > 0, weights, 0.0)
    if not weights.any():
        raise InputError(f"calibration: no token of a modality with positive weight reached {activation}")
    share = weights / np.maximum(tokens, 1) * tokens[weights > 0].sum() / weights.sum()
    sums = np.einsum("m,men->en", share, sum2)
    counts = share @ count
    routed = counts > 0
    mean_squares = np.empty_like(sums)
    mean_squares[routed] = sums[routed] / counts[routed, None]
    mean_squares[~routed] = mean_squares[routed].mean(axis=0)
    whole = np.maximum(np.rint(counts), 1)
    scaled = mean_squares * whole[:, None]
    if (largest := float(scaled.max())) > np.finfo(np.float32).max:
        raise InputError(
            f"calibration: squares of what {activation} reads add up to {largest:.3g}, beyond float32, in which "
            "importance matrices are stored; activations this large are a fault of the checkpoint: use the one it was "
            "made from"
        )
    return scaled.astype(np.float32), whole.astype(np.float32)
