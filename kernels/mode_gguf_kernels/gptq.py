"""Rounding with error feedback: each column's errors are passed on to the columns that are not rounded yet (GPTQ).

Least (w - q) H (w - q)' over a row's values q on a grid, for H = sum over inputs x of x x', is hard; rounding one
column after another, each time moving what is left by what the errors so far ask for, comes near it. With H = U D U',
U upper triangular with ones on its diagonal, column j is rounded to what is nearest to

    w[j] + sum over i < j of (w[i] - q[i]) U[i, j]

which is what GPTQ's updates through the inverse of H come to (Frantar et al. 2022; this form: Chee et al. 2023). Each
column is decided once, the first ones without knowing what will be left to the last ones; `polish` then goes over the
row again and moves single levels for as long as that helps.
"""

import numpy as np

from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.levels import Grid

_PANEL = 32
"""Columns whose errors are gathered before they are passed on beyond the panel; a multiple of _UNROLLED."""

_ROWS = 32
"""Rows that share what is loaded of U."""

_CHUNK = 256
"""Columns that errors are passed on to at a time."""

_UNROLLED = 8
"""Errors that are passed on in one go."""


@kernel
def round_with_feedback(
    weights: np.ndarray,
    grid: Grid,
    factor: np.ndarray,
    levels: np.ndarray,
) -> None:
    """Choose the levels of all rows.

    Args:
        weights: float32 (rows, n), n a multiple of 32.
        grid: what the rows can take.
        factor: U, float32 (n, n); what is below the diagonal is not read.
        levels: uint8 (rows, n), the result.
    """
    rows, n = weights.shape
    errors = np.empty((_ROWS, _PANEL), np.float32)
    passed_on = np.empty((_ROWS, n), np.float32)
    lowest, step, width, values, borders = grid
    zero = np.float32(0)
    for top in range(0, rows, _ROWS):
        here = min(_ROWS, rows - top)
        passed_on[:here] = zero
        for left in range(0, n, _PANEL):
            right = left + _PANEL
            for r in range(here):
                for j in range(left, right):
                    unit, low = step[top + r, j // width], lowest[top + r, j // width]
                    level = 0
                    if unit != zero:
                        level = _nearest((weights[top + r, j] + passed_on[r, j] - low) / unit, values, borders)
                    levels[top + r, j] = level
                    error = weights[top + r, j] - (low + unit * values[level])
                    errors[r, j - left] = error
                    for k in range(j + 1, right):
                        passed_on[r, k] += error * factor[j, k]
            for start in range(right, n, _CHUNK):
                stop = min(start + _CHUNK, n)
                for r in range(here):
                    for first in range(0, _PANEL, _UNROLLED):
                        _pass_on(errors[r], first, factor, left + first, passed_on[r], start, stop)


@kernel
def polish(
    weights: np.ndarray,
    grid: Grid,
    moments: np.ndarray,
    levels: np.ndarray,
    sweeps: int,
) -> None:
    """Coordinate descent on (w - q) H (w - q)': every level in turn to where its row errs least, others as they are.

    Args:
        weights, grid: as in `round_with_feedback`.
        moments: H, float32 (n, n), symmetric, its diagonal above 0.
        levels: uint8 (rows, n), what to start from; overwritten.
        sweeps: over a row, at most; one without a move ends it.
    """
    rows, n = weights.shape
    errors = np.empty((_ROWS, n), np.float32)
    gradients = np.empty((_ROWS, n), np.float32)
    lowest, step, width, values, borders = grid
    zero = np.float32(0)
    for top in range(0, rows, _ROWS):
        here = min(_ROWS, rows - top)
        for r in range(here):
            for j in range(n):
                unit, low = step[top + r, j // width], lowest[top + r, j // width]
                errors[r, j] = weights[top + r, j] - (low + unit * values[levels[top + r, j]])
        gradients[:here] = zero
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            for first in range(0, n, _UNROLLED):
                for r in range(here):
                    _pass_on(errors[r], first, moments, first, gradients[r], start, stop)
        for r in range(here):
            for _ in range(sweeps):
                moved = False
                for j in range(n):
                    unit = step[top + r, j // width]
                    if unit == zero:
                        continue
                    value = values[levels[top + r, j]]
                    level = _nearest(value + gradients[r, j] / (unit * moments[j, j]), values, borders)
                    move = values[level] - value
                    if move == zero:
                        continue
                    change = unit * move
                    # Rounding and clipping never overshoot by more than half a level, except in floating point.
                    if change * (change * moments[j, j] - 2 * gradients[r, j]) >= zero:
                        continue
                    levels[top + r, j] = level
                    moved = True
                    for k in range(n):
                        gradients[r, k] -= change * moments[j, k]
                if not moved:
                    break


@device
def _nearest(position: np.float32, values: np.ndarray, borders: np.ndarray) -> int:
    """The level whose value is nearest."""
    if borders.size == 0:
        return int(min(max(np.rint(position), np.float32(0)), np.float32(values.size - 1)))
    level = 0
    for border in borders:
        level += int(position > border)
    return level


@device
def _pass_on(errors: np.ndarray, first: int, rows: np.ndarray, i: int, sums: np.ndarray, start: int, stop: int) -> None:
    """Add errors[first + t] * rows[i + t, k] to sums[k], for _UNROLLED values of t and start <= k < stop."""
    e0, e1, e2, e3 = errors[first], errors[first + 1], errors[first + 2], errors[first + 3]
    e4, e5, e6, e7 = errors[first + 4], errors[first + 5], errors[first + 6], errors[first + 7]
    for k in range(start, stop):
        sums[k] += (
            e0 * rows[i, k]
            + e1 * rows[i + 1, k]
            + e2 * rows[i + 2, k]
            + e3 * rows[i + 3, k]
            + e4 * rows[i + 4, k]
            + e5 * rows[i + 5, k]
            + e6 * rows[i + 6, k]
            + e7 * rows[i + 7, k]
        )
