"""The levels of packed K-quants apart from their scales: the grid that scales leave, and levels written anew on it.

With the bytes of its levels all zeros a block unpacks to the lowest value of every weight's grid, with all ones to the
last one, and values in between are evenly spaced. So a table of where levels lie serves all types.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK_SIZE = 256
"""Weights in a super-block of any K-quant."""


class Field(NamedTuple):
    """Bits [shift, shift + n_bits) of a block's levels, from byte `first` on, laid out as `bits` describes."""

    first: int
    shift: int
    n_bits: int
    stride: int

    @property
    def place(self) -> slice:
        """The field's bytes in a block."""
        return slice(self.first, self.first + BLOCK_SIZE * self.n_bits // 8)


class Layout(NamedTuple):
    """Where a type keeps its levels; `width` weights in a row share scale and min."""

    width: int
    fields: tuple[Field, ...]

    @property
    def highest(self) -> int:
        """The last level."""
        return int((1 << sum(field.n_bits for field in self.fields)) - 1)


LAYOUTS = {
    "Q2_K": Layout(16, (Field(16, 0, 2, 32),)),
    "Q3_K": Layout(16, (Field(32, 0, 2, 32), Field(0, 2, 1, 32))),
    "Q4_K": Layout(32, (Field(16, 0, 4, 32),)),
    "Q5_K": Layout(32, (Field(48, 0, 4, 32), Field(16, 4, 1, 32))),
    "Q6_K": Layout(16, (Field(0, 0, 4, 64), Field(128, 4, 2, 32))),
}


class Grid(NamedTuple):
    """The values that rows can take: lowest + step * level for levels 0..highest.

    Attributes:
        lowest: float32 (rows, n / width).
        step: likewise; below zero where a scale is, 0 where all levels mean one value.
        width: weights in a row that share both.
        highest: the last level.
    """

    lowest: np.ndarray
    step: np.ndarray
    width: int
    highest: int


def grid_of(blocks: np.ndarray, layout: Layout, unpack: Callable[[np.ndarray], np.ndarray]) -> Grid:
    """The grid of packed rows.

    Args:
        blocks: uint8 (rows, blocks, block_bytes).
        unpack: gives the weights of such blocks, float32 (rows, n).
    """
    ends = []
    for byte in (0, 255):
        filled = blocks.copy()
        for field in layout.fields:
            filled[..., field.place] = byte
        ends.append(unpack(filled)[:, :: layout.width])
    lowest, last = ends
    return Grid(lowest, (last - lowest) / np.float32(layout.highest), layout.width, layout.highest)


def write_levels(levels: np.ndarray, layout: Layout, blocks: np.ndarray) -> None:
    """Put levels, uint8 (rows, n), into packed rows, uint8 (rows, blocks, block_bytes)."""
    for field in layout.fields:
        per_byte, mask = 8 // field.n_bits, (1 << field.n_bits) - 1
        values = (levels >> field.shift) & mask
        grouped = values.reshape(*blocks.shape[:2], -1, per_byte, field.stride)
        together = grouped[..., 0, :].copy()
        for j in range(1, per_byte):
            together |= grouped[..., j, :] << (j * field.n_bits)
        blocks[..., field.place] = together.reshape(*blocks.shape[:2], -1)


def read_levels(blocks: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `write_levels`."""
    levels = np.zeros((*blocks.shape[:2], BLOCK_SIZE), np.uint8)
    for field in layout.fields:
        per_byte, mask = 8 // field.n_bits, (1 << field.n_bits) - 1
        bytes_ = blocks[..., field.place].reshape(*blocks.shape[:2], -1, 1, field.stride)
        shifts = (np.arange(per_byte, dtype=np.uint8) * field.n_bits)[:, None]
        levels |= (((bytes_ >> shifts) & mask) << field.shift).reshape(levels.shape)
    return levels.reshape(len(blocks), -1)
