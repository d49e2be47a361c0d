"""Rounding with error feedback: each column's errors are passed on to the columns that are not rounded yet (GPTQ).

Least (w - q) H (w - q)' over a row's values q on a grid, for H = sum over inputs x of x x', is hard; rounding one
column after another, each time moving what is left by what the errors so far ask for, comes near it. With H = U D U',
U upper triangular with ones on its diagonal, column j is rounded to what is nearest to

    w[j] + sum over i < j of (w[i] - q[i]) U[i, j]

which is what GPTQ's updates through the inverse of H come to (Frantar et al. 2022; this form: Chee et al. 2023).
"""

import numpy as np

from mode_gguf_kernels.compilation import kernel

_PANEL = 32
"""Columns whose errors are gathered before they are passed on beyond the panel; a multiple of _TOGETHER."""

_ROWS = 32
"""Rows that share what is loaded of U."""

_CHUNK = 256
"""Columns that errors are passed on to at a time."""

_TOGETHER = 8
"""Errors that are passed on in one go."""


@kernel
def round_with_feedback(
    weights: np.ndarray,
    lowest: np.ndarray,
    step: np.ndarray,
    width: int,
    highest: int,
    factor: np.ndarray,
    levels: np.ndarray,
) -> None:
    """Choose the levels of all rows.

    Args:
        weights: float32 (rows, n), n a multiple of 32.
        lowest, step, width, highest: the grid, see `levels.Grid`.
        factor: U, float32 (n, n); what is below the diagonal is not read.
        levels: uint8 (rows, n), the result.
    """
    rows, n = weights.shape
    errors = np.empty((_ROWS, _PANEL), np.float32)
    passed_on = np.empty((_ROWS, n), np.float32)
    last = np.float32(highest)
    zero = np.float32(0)
    for top in range(0, rows, _ROWS):
        here = min(_ROWS, rows - top)
        passed_on[:here] = zero
        for left in range(0, n, _PANEL):
            right = left + _PANEL
            for r in range(here):
                for j in range(left, right):
                    unit, low = step[top + r, j // width], lowest[top + r, j // width]
                    level = zero
                    if unit != zero:
                        level = np.rint((weights[top + r, j] + passed_on[r, j] - low) / unit)
                        level = min(max(level, zero), last)
                    levels[top + r, j] = np.uint8(level)
                    error = weights[top + r, j] - (low + unit * level)
                    errors[r, j - left] = error
                    for k in range(j + 1, right):
                        passed_on[r, k] += error * factor[j, k]
            for start in range(right, n, _CHUNK):
                stop = min(start + _CHUNK, n)
                for r in range(here):
                    for first in range(0, _PANEL, _TOGETHER):
                        i = left + first
                        e0, e1 = errors[r, first], errors[r, first + 1]
                        e2, e3 = errors[r, first + 2], errors[r, first + 3]
                        e4, e5 = errors[r, first + 4], errors[r, first + 5]
                        e6, e7 = errors[r, first + 6], errors[r, first + 7]
                        for k in range(start, stop):
                            passed_on[r, k] += (
                                e0 * factor[i, k]
                                + e1 * factor[i + 1, k]
                                + e2 * factor[i + 2, k]
                                + e3 * factor[i + 3, k]
                                + e4 * factor[i + 4, k]
                                + e5 * factor[i + 5, k]
                                + e6 * factor[i + 6, k]
                                + e7 * factor[i + 7, k]
                            )
