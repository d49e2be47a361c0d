"""Levels of packed weights: their places in a block, the grid of values that scales leave them, reading and writing.

With the bytes of its levels all zeros a block unpacks to the lowest value of every weight's grid, with all ones to the
last one, and values in between are evenly spaced, but for IQ4_NL. So the places of its levels are all that need be
known of a type.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Field(NamedTuple):
    """Bits [shift, shift + n_bits) of the levels of a block of `weights`, from byte `first` on, laid out as `bits`
    describes.
    """

    first: int
    shift: int
    n_bits: int
    stride: int
    weights: int = 256

    @property
    def place(self) -> slice:
        """The field's bytes in a block."""
        return slice(self.first, self.first + self.n_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of the field in a block."""
        return self.weights * self.n_bits // 8


class Layout(NamedTuple):
    """Places of a type's levels in a block; `width` weights in a row share scale and min.

    `uneven`: what levels stand for, in steps above the lowest; none for 0, 1, 2, ...
    """

    width: int
    fields: tuple[Field, ...]
    uneven: tuple[int, ...] = ()

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return self.fields[0].weights

    @property
    def n_bytes(self) -> int:
        """Bytes of the levels of a block."""
        return sum(field.n_bytes for field in self.fields)

    @property
    def highest(self) -> int:
        """The last level."""
        return int((1 << sum(field.n_bits for field in self.fields)) - 1)


class Grid(NamedTuple):
    """The values that rows can take: lowest + step * values[level].

    Attributes:
        lowest: float32 (rows, n / width).
        step: likewise; below zero where a scale is, 0 where all levels mean one value.
        width: weights in a row that share both.
        values: float32 (levels,): 0, 1, 2, ..., or others where levels are not evenly spaced.
        borders: float32 (levels - 1,): what is in the middle between two values; empty where they are even.
    """

    lowest: np.ndarray
    step: np.ndarray
    width: int
    values: np.ndarray
    borders: np.ndarray


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
    values = np.array(layout.uneven or range(layout.highest + 1), np.float32)
    borders = (values[1:] + values[:-1]) / 2 if layout.uneven else np.empty(0, np.float32)
    return Grid(lowest, (last - lowest) / values[-1], layout.width, values, borders)


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
    levels = np.zeros((*blocks.shape[:2], layout.block_size), np.uint8)
    for field in layout.fields:
        per_byte, mask = 8 // field.n_bits, (1 << field.n_bits) - 1
        bytes_ = blocks[..., field.place].reshape(*blocks.shape[:2], -1, 1, field.stride)
        shifts = (np.arange(per_byte, dtype=np.uint8) * field.n_bits)[:, None]
        levels |= (((bytes_ >> shifts) & mask) << field.shift).reshape(levels.shape)
    return levels.reshape(len(blocks), -1)
