"""Expected cost factor of rounding with feedback, for plans made before anything is rounded."""

from collections.abc import Mapping, Sequence

import numpy as np

from mode_gguf.architectures.tensors import Role, SourceTensor
from mode_gguf.feedback.rounded_tensors import is_rounded
from mode_gguf.quantization.fallback_types import stored_as
from mode_gguf.quantization.types import QUANT_TYPES

COST_FACTOR = 0.45
"""Ratio of a tensor's cost rounded with feedback to its cost rounded to nearest.

Much the same for all K-quants, and for experts, attention and output (docs/experiments/rounding.md).
What a plan changes for is what has no feedback: the embedding, and types without even steps.
"""


def with_feedback_factor(
    arrays: Mapping[str, np.ndarray],
    tensors: Sequence[SourceTensor],
    expert_types: Sequence[str],
    dense_types: Sequence[str],
) -> dict[str, np.ndarray]:
    """Expected costs with feedback, from costs rounded to nearest as docs/design/artefacts.md names them.

    Args:
        expert_types, dense_types: names along the last axis of experts' and of all other arrays.
    """
    factors: dict[str, np.ndarray] = {}
    by_layer: dict[str, list[np.ndarray]] = {}
    for tensor in tensors:
        types = expert_types if tensor.role is Role.EXPERT else dense_types
        stored = [stored_as(tensor, QUANT_TYPES[name]) for name in types]
        factor = np.array([COST_FACTOR if one and is_rounded(tensor, {tensor.name: one}) else 1.0 for one in stored])
        factors[tensor.name] = factor
        if tensor.role is Role.EXPERT:
            by_layer.setdefault(f"blk.{tensor.layer}.ffn_exps", []).append(factor)
    factors |= {name: np.mean(of_projections, axis=0) for name, of_projections in by_layer.items()}
    return {
        name: values * factors[tensor] if kind in ("unit", "expert") else values
        for name, values in arrays.items()
        for tensor, _, kind in [name.rpartition(".")]
    }
