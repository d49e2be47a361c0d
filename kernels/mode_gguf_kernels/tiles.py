"""Transfers between memory and tiles: blocks of a matrix in, packed blocks out, and back.

A *block* is the run of weights a type stores together (a super-block of 256 for K-quants). Lane k of a tile works on
block `first + k` of the flat matrix; lanes past the end repeat the last block, so they write its bytes once more.
"""

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_value
from mode_gguf_kernels.simd import (
    LANES,
    Tile,
    any_lane,
    bits_of,
    copy_bytes,
    floats_from_bits,
    gather,
    larger,
    load,
    scatter,
    splat,
    store,
)

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
"""dtypes of a source matrix."""

_LINE = 16  # 32-bit words in a cache line
_INFINITY_BITS = 0x7F800000


@device
def float_tile(items: int) -> Tile:
    """An uninitialised tile of `items` floats per lane."""
    return _from_cache_line(np.empty(items * LANES + _LINE, np.float32))[: items * LANES]


@device
def int_tile(items: int) -> Tile:
    """An uninitialised tile of `items` ints per lane."""
    return _from_cache_line(np.empty(items * LANES + _LINE, np.int32))[: items * LANES]


@device
def _from_cache_line(buffer: Tile) -> Tile:
    """`buffer` from its first whole cache line on: a register's lanes in two lines would take two accesses."""
    return buffer[-(buffer.ctypes.data // 4) % _LINE :]


@device
def lane_starts(first: int, n_blocks: int, stride: int) -> np.ndarray:
    """Start of each lane's block when blocks are `stride` apart."""
    starts = np.empty(LANES, np.int64)
    for lane in range(LANES):
        starts[lane] = min(first + lane, n_blocks - 1) * stride
    return starts


@device
def load_weights(
    source: np.ndarray, source_dtype: int, first: int, n_blocks: int, block_size: int, tile: Tile, first_item: int
) -> bool:
    """Fill `tile`, from `first_item` on, with the blocks [first, first + LANES) of `source`.

    Returns whether every value is finite.
    """
    starts = lane_starts(first, n_blocks, block_size)
    largest = splat(0)
    for start in range(0, block_size, 16):
        load_run(source, source_dtype, starts, start, tile, first_item + start)
        for item in range(first_item + start, first_item + start + 16):
            largest = larger(largest, bits_of(load(tile, item)) & 0x7FFFFFFF)
    return not any_lane(largest >= _INFINITY_BITS)


@device
def load_run(
    source: np.ndarray, source_dtype: int, starts: np.ndarray, column: int, tile: Tile, first_item: int
) -> None:
    """Fill 16 items of `tile` with the values from starts[lane] + column on of `source`."""
    if source_dtype == FLOAT32:
        gather(source.view(np.float32), starts, column, tile, first_item)
    else:
        gather(source.view(np.uint16), starts, column, tile, first_item)
    for item in range(first_item, first_item + 16):
        value = load(tile, item)
        if source_dtype == FLOAT16:
            value = half_value(bits_of(value))
        elif source_dtype == BFLOAT16:
            value = floats_from_bits(bits_of(value) << 16)
        store(tile, item, value)


@device
def load_importance(
    importance: np.ndarray,
    blocks_per_row: int,
    first: int,
    n_blocks: int,
    block_size: int,
    tile: Tile,
    first_item: int,
) -> None:
    """Fill `tile`, from `first_item` on, with the importance of the weights of blocks [first, first + LANES).

    Every row has the same.
    """
    starts = np.empty(LANES, np.int64)
    for lane in range(LANES):
        starts[lane] = min(first + lane, n_blocks - 1) % blocks_per_row * block_size
    for item in range(0, block_size, 16):
        gather(importance, starts, item, tile, first_item + item)


@device
def staging_words(block_bytes: int) -> int:
    """int32 words a block takes in the staging area between tiles and packed bytes."""
    return (block_bytes + 63) // 64 * 16


@device
def store_blocks(
    words: Tile,
    first_item: int,
    block_bytes: int,
    first: int,
    n_blocks: int,
    staging: np.ndarray,
    packed: np.ndarray,
) -> None:
    """Write the blocks [first, first + LANES): item first_item + i of `words` holds a block's bytes [4 i, 4 i + 4)."""
    stride = staging_words(block_bytes)
    starts = lane_starts(0, LANES, stride)
    for item in range(0, stride, 16):
        scatter(words, first_item + item, staging, starts, item)
    for lane in range(min(LANES, n_blocks - first)):
        copy_bytes(staging, 4 * stride * lane, packed, (first + lane) * block_bytes, block_bytes)


@device
def load_blocks(
    packed: np.ndarray, block_bytes: int, first: int, n_blocks: int, staging: np.ndarray, words: Tile
) -> None:
    """The inverse of `store_blocks`."""
    stride = staging_words(block_bytes)
    starts = lane_starts(0, LANES, stride)
    for lane in range(LANES):
        block = min(first + lane, n_blocks - 1)
        copy_bytes(packed, block * block_bytes, staging, 4 * stride * lane, block_bytes)
    for item in range(0, stride, 16):
        gather(staging, starts, item, words, item)


@device
def store_weights(tile: Tile, first: int, n_blocks: int, block_size: int, weights: np.ndarray) -> None:
    """Write the blocks [first, first + LANES) of a flat float32 matrix."""
    starts = lane_starts(first, n_blocks, block_size)
    for item in range(0, block_size, 16):
        scatter(tile, item, weights, starts, item)
