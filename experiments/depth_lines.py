"""Lines through what was measured at a few depths, drawn out to those of large models."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from rich.table import Table

GIB: Final = 2**30
DEPTHS: Final = (48, 94)
"""Layers of Qwen3-VL-30B-A3B and of 235B-A22B."""


def fitted(layers: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Slope per layer and value at none, by least squares."""
    slope, start = np.polyfit(layers, values, 1)
    return float(slope), float(start)


def add_depths(table: Table, runs: dict[int, dict[str, float]], columns: Sequence[str]) -> None:
    """Rows for deep models, where there are layers enough to fit a line."""
    units = {"seconds": 1.0, "outputs": 1e9, "written": 1e9}
    if len(runs) < 2:
        return
    for depth in DEPTHS:
        values = []
        for column in columns:
            slope, start = fitted(list(runs), [run[column] for run in runs.values()])
            values.append((slope * depth + start) / units.get(column, GIB))
        table.add_row(f"{depth} (line)", f"{values[0]:.0f}", *(f"{value:.3f}" for value in values[1:]))
