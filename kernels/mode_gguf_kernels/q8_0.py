"""Q8_0: weight = d * level, signed levels of 8 bits, one d per 32 weights. It has no search and ignores importance.

A block of 32 weights, `block_q8_0` of ggml:

| bytes | what         |
|-------|--------------|
| 0-1   | d, float16   |
| 2-33  | levels, int8 |
"""

import numpy as np

from mode_gguf_kernels.bits import byte_of
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.search import F, signed_extreme
from mode_gguf_kernels.simd import LANES, Tile, absolute, load, round_away, select, splat, store, to_float, to_int
from mode_gguf_kernels.tiles import (
    float_tile,
    int_tile,
    load_blocks,
    load_weights,
    staging_words,
    store_blocks,
    store_weights,
)

BLOCK_SIZE = 32
BLOCK_BYTES = 2 + 32


@device
def pack_tile(x: Tile, words: Tile) -> None:
    """Pack one block per lane: `quantize_row_q8_0_ref`."""
    magnitude, _ = signed_extreme(x, 0, 32)
    d = magnitude / F(127)
    inverse = select(d != F(0), F(1) / d, F(0))
    word = half_bits(d)
    for i in range(32):
        # Levels start at byte 2, in the upper half of a word. 1 / d may overflow: C then stores 0.
        scaled = inverse * load(x, i)
        level = to_int(round_away(select(absolute(scaled) <= F(128), scaled, F(0)))) & 255
        word = word | (level << (8 * ((i + 2) % 4)))
        if i % 4 == 1:
            store(words, (i + 2) // 4, word)
            word = splat(0)
    store(words, 8, word)


@device
def unpack_tile(words: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`."""
    d = half_value(load(words, 0))
    for i in range(32):
        level = (byte_of(words, 0, i + 2) << 24) >> 24
        store(x, i, to_float(level) * d)


@kernel
def pack(source: np.ndarray, kind: int, _importance: np.ndarray, _blocks_per_row: int, packed: np.ndarray) -> int:
    """Pack a whole matrix; see `registry.Kernels`."""
    x = float_tile(BLOCK_SIZE)
    words, staging = int_tile(staging_words(BLOCK_BYTES)), int_tile(staging_words(BLOCK_BYTES))
    n_blocks = packed.size // BLOCK_BYTES
    for first in range(0, n_blocks, LANES):
        if not load_weights(source, kind, first, n_blocks, BLOCK_SIZE, x):
            return first
        pack_tile(x, words)
        store_blocks(words, BLOCK_BYTES, first, n_blocks, staging, packed)
    return n_blocks


@kernel
def unpack(packed: np.ndarray, weights: np.ndarray) -> None:
    """Unpack a whole matrix; see `registry.Kernels`."""
    x = float_tile(BLOCK_SIZE)
    words, staging = int_tile(staging_words(BLOCK_BYTES)), int_tile(staging_words(BLOCK_BYTES))
    n_blocks = packed.size // BLOCK_BYTES
    for first in range(0, n_blocks, LANES):
        load_blocks(packed, BLOCK_BYTES, first, n_blocks, staging, words)
        unpack_tile(words, x)
        store_weights(x, first, n_blocks, BLOCK_SIZE, weights)
