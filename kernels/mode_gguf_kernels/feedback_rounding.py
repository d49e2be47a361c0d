"""Rounding of packed rows with error feedback: scales and mins stay, levels are chosen anew."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from mode_gguf_kernels.gptq import polish, round_with_feedback
from mode_gguf_kernels.levels import grid_of, write_levels
from mode_gguf_kernels.registry import TYPES, PackingError, unpack

FEEDBACK_TYPES = tuple(name for name, kernels in TYPES.items() if kernels.layout)
"""The types that can be rounded with feedback."""

SWEEPS = 8
"""Sweeps of `polish`; the first finds two thirds of what twenty find, and all cost less than its first gradient."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """Measure of a row's error: (w - q) H (w - q)' for a row w rounded to q.

    Attributes:
        moments: H, float32 (n, n), symmetric and positive definite.
        factor: float32 (n, n), the unit upper triangular U of H = U D U', see `gptq`.
    """

    moments: np.ndarray
    factor: np.ndarray


def round_again(packed: np.ndarray, type_name: str, matrix: np.ndarray, feedback: Feedback) -> None:
    """Choose the levels of packed rows so that the errors of a row's weights make up for each other.

    Runs in the calling thread and without the GIL; rows are independent of each other.

    Args:
        packed: uint8 (rows, row_bytes), contiguous: the rows as `pack` packed them; levels are overwritten.
        type_name: one of `FEEDBACK_TYPES`.
        matrix: float32 (rows, n), what was packed.
        feedback: what errors are measured by.

    Raises:
        PackingError: another type, or shapes that do not go together.
    """
    kernels = TYPES.get(type_name)
    if kernels is None or kernels.layout is None:
        raise PackingError(f"{type_name} cannot be rounded with feedback: choose from {', '.join(FEEDBACK_TYPES)}")
    rows, n = matrix.shape
    shapes = feedback.moments.shape, feedback.factor.shape
    if packed.shape != (rows, n // kernels.block_size * kernels.block_bytes) or shapes != ((n, n), (n, n)):
        raise PackingError(f"packed {packed.shape}, matrix {matrix.shape} and feedback {shapes} do not go together")
    blocks = packed.reshape(rows, -1, kernels.block_bytes)
    grid = grid_of(blocks, kernels.layout, partial(_weights, type_name=type_name, n=n))
    levels = np.empty((rows, n), np.uint8)
    weights = np.ascontiguousarray(matrix, np.float32)
    grid = grid._replace(lowest=np.ascontiguousarray(grid.lowest), step=np.ascontiguousarray(grid.step))
    round_with_feedback(weights, grid, feedback.factor, levels)
    polish(weights, grid, feedback.moments, levels, SWEEPS)
    write_levels(levels, kernels.layout, blocks)


def _weights(blocks: np.ndarray, type_name: str, n: int) -> np.ndarray:
    return unpack(blocks.reshape(len(blocks), -1), type_name, n)
