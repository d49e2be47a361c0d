"""Estimated costs of experts that no calibration token reached: small, never zero.

An expert without tokens of a modality (or whose tokens no scored position depends on) is taken to serve one such
token, at the layer's mean cost per routed token, scaled by how much worse or better than the layer's average its own
weights survive the type.
"""

from collections.abc import Sequence

import numpy as np

from mode_gguf.forward.modality import ANSWERS, MODALITIES


def fill_unrouted(per_expert: np.ndarray, counts: np.ndarray, weight_error: np.ndarray, *, summed: bool) -> np.ndarray:
    """Costs `per_expert` with estimates where they are zero.

    Args:
        per_expert: (A, M, E, T) measured values.
        counts: (A, M, E) routed tokens behind them; a row of zeros (a modality that cannot occur) stays zero.
        weight_error: (E, T) relative squared change of the expert's weights.
        summed: whether values are sums over tokens (an unrouted expert then counts for one) or means.

    Returns:
        float64 (A, M, E, T).
    """
    tokens = counts.sum(axis=2) if summed else (counts > 0).sum(axis=2)
    mean = per_expert.sum(axis=2) / np.maximum(tokens, 1)[..., None]
    relative = weight_error / np.maximum(weight_error.mean(axis=0), np.finfo(np.float64).tiny)
    estimate = mean[:, :, None, :] * relative
    filled: np.ndarray = np.where(per_expert > 0, per_expert, estimate)
    return filled


def unrouted_experts(layer: int, counts: np.ndarray, answers: Sequence[str] = ANSWERS) -> dict[str, list[int]]:
    """Experts of `layer` whose values are estimates, by `blk.L/answer/modality`; `counts` is (A, M, E)."""
    return {
        f"blk.{layer}/{answers[a]}/{MODALITIES[m]}": np.flatnonzero(counts[a, m] == 0).tolist()
        for a, m in np.ndindex(counts.shape[:2])
        if counts[a, m].any() and not counts[a, m].all()
    }
