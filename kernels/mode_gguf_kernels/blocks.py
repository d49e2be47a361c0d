"""Whole matrices in blocks of 32 weights, each with a scale of its own: the loops of Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL.

A tile works on `TOGETHER` blocks per lane, side by side: item 32 k + i is weight i of a lane's block k.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.search import TOGETHER, F
from mode_gguf_kernels.simd import LANES, Tile, load, splat, store
from mode_gguf_kernels.tiles import (
    float_tile,
    int_tile,
    lane_starts,
    load_blocks,
    load_importance,
    load_run,
    load_weights,
    staging_words,
    store_blocks,
    store_weights,
)

BLOCK_SIZE = 32


@device
def part(tile: Tile, k: int, items: int) -> Tile:
    """The items of a lane's block k, of `items` per block."""
    return tile[k * items * LANES : (k + 1) * items * LANES]


@device
def pack_blocks(
    pack_tile: Callable[[Tile, Tile, Tile, bool, Any, Tile], None],
    search: Any,
    by_row: bool,
    block_bytes: int,
    source: np.ndarray,
    kind: int,
    importance: np.ndarray,
    blocks_per_row: int,
    packed: np.ndarray,
) -> int:
    """Pack a whole matrix in blocks of `block_bytes`; see `registry.Kernels`.

    pack_tile gets weights, their importance, the mean square of each block's row (with an importance and `by_row`),
    whether there is an importance, and `search`; it writes the words of the blocks.
    """
    weighted = importance.size > 0
    stride = staging_words(block_bytes)
    x, w = float_tile(TOGETHER * BLOCK_SIZE), float_tile(TOGETHER * BLOCK_SIZE)
    variances = float_tile(TOGETHER)
    words, staging = int_tile(TOGETHER * stride), int_tile(stride)
    n_blocks = packed.size // block_bytes
    n_rows = n_blocks // blocks_per_row if weighted and by_row else 0
    of_rows = mean_squares(source, kind, n_rows, blocks_per_row * BLOCK_SIZE)
    for start in range(0, n_blocks, TOGETHER * LANES):
        for k in range(TOGETHER):
            first = start + k * LANES
            if not load_weights(source, kind, first, n_blocks, BLOCK_SIZE, part(x, k, BLOCK_SIZE)):
                return first
            if weighted:
                load_importance(importance, blocks_per_row, first, n_blocks, BLOCK_SIZE, part(w, k, BLOCK_SIZE))
            if n_rows > 0:
                for lane in range(LANES):
                    variances[k * LANES + lane] = of_rows[min(first + lane, n_blocks - 1) // blocks_per_row]
        pack_tile(x, w, variances, weighted, search, words)
        for k in range(TOGETHER):
            store_blocks(part(words, k, stride), block_bytes, start + k * LANES, n_blocks, staging, packed)
    return n_blocks


@device
def mean_squares(source: np.ndarray, kind: int, n_rows: int, n: int) -> np.ndarray:
    """The mean square of every row of n weights, summed in order; a row per lane."""
    result = np.empty(n_rows, np.float32)
    run, total = float_tile(16), float_tile(1)
    for first in range(0, n_rows, LANES):
        starts = lane_starts(first, n_rows, n)
        store(total, 0, splat(F(0)))
        for column in range(0, n, 16):
            load_run(source, kind, starts, column, run, 0)
            summed = load(total, 0)
            for item in range(16):
                value = load(run, item)
                summed = summed + value * value
            store(total, 0, summed)
        for lane in range(min(LANES, n_rows - first)):
            result[first + lane] = total[lane] / F(n)
    return result


@device
def unpack_blocks(
    unpack_tile: Callable[[Tile, Tile, Tile], None], block_bytes: int, packed: np.ndarray, weights: np.ndarray
) -> None:
    """Unpack a whole matrix, a block per lane at a time."""
    x, level = float_tile(BLOCK_SIZE), int_tile(BLOCK_SIZE)
    words, staging = int_tile(staging_words(block_bytes)), int_tile(staging_words(block_bytes))
    n_blocks = packed.size // block_bytes
    for first in range(0, n_blocks, LANES):
        load_blocks(packed, block_bytes, first, n_blocks, staging, words)
        unpack_tile(words, level, x)
        store_weights(x, first, n_blocks, BLOCK_SIZE, weights)
