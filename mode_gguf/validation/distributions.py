"""Storage format of a reference's next-token distributions."""

from typing import Final, TypeAlias

import numpy as np

from mode_gguf.llama_cpp.model_protocol import Logits
from mode_gguf.validation.divergence import log_softmax

Array: TypeAlias = np.ndarray

FLOAT32_VOCABULARY: Final = 1 << 15
"""Up to this vocabulary distributions are kept as they are; beyond, in 16 bits."""
NATS_KEPT: Final = 32.0
"""16-bit distributions reach this far below the most likely token, in steps of 0.0005 nats; less likely tokens are
raised to that floor. What this adds to a KL divergence is below 1e-7 nats, less than float16 does
(docs/experiments/comparisons.md)."""


def normalised(logits: Logits) -> Array:
    """float32 log-probabilities; what a server lists is normalised already."""
    if np.isnan(logits).any():
        return logits
    return np.concatenate([log_softmax(row[None]).astype(np.float32) for row in logits])


def pack_distributions(log_probs: Array) -> dict[str, Array]:
    """Stored arrays of (positions, vocabulary) float32 log-probabilities; NaN, which are unknown, are left out."""
    if np.isnan(log_probs).any():
        listed = ~np.isnan(log_probs)
        return {
            "counts": listed.sum(axis=1, dtype=np.int32),
            "listed": np.nonzero(listed)[1].astype(np.int32),
            "values": log_probs[listed],
            "vocabulary": np.asarray([log_probs.shape[1]]),
        }
    if log_probs.shape[1] <= FLOAT32_VOCABULARY:
        return {"log_probs": log_probs}
    return pack_in_16_bits(log_probs)


def pack_in_16_bits(log_probs: Array) -> dict[str, Array]:
    """Steps below each row's largest value, uint16."""
    top = log_probs.max(axis=1, keepdims=True)
    steps = np.rint(np.clip((top - log_probs) * (65535 / NATS_KEPT), 0, 65535)).astype(np.uint16)
    return {"top": top, "steps": steps}


def unpack_distributions(arrays: dict[str, Array]) -> Array:
    """The inverse of `pack_distributions`."""
    if "log_probs" in arrays:
        return arrays["log_probs"]
    if "steps" in arrays:
        unpacked: Array = arrays["top"] - arrays["steps"] * np.float32(NATS_KEPT / 65535)
        return unpacked
    counts = arrays["counts"]
    sparse = np.full((len(counts), int(arrays["vocabulary"][0])), np.nan, np.float32)
    sparse[np.repeat(np.arange(len(counts)), counts), arrays["listed"]] = arrays["values"]
    return sparse
