"""Q8_0: weight = d * level, signed levels of 8 bits, one d per 32 weights. It has no search and ignores importance.

A block of 32 weights, `block_q8_0` of ggml:

| bytes | what         |
|-------|--------------|
| 0-1   | d, float16   |
| 2-33  | levels, int8 |
"""

from mode_gguf_kernels.bits import byte_of
from mode_gguf_kernels.blocks import BLOCK_SIZE
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.matrix import TileFunctions, matrix_kernels
from mode_gguf_kernels.search import F, signed_extreme
from mode_gguf_kernels.simd import Tile, absolute, load, round_away, select, splat, store, to_float, to_int

BLOCK_BYTES = 2 + 32


@device
def pack_tile(x: Tile, _w: Tile, _mean_squares: Tile, _weighted: bool, _search: tuple[()], words: Tile) -> None:
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
def unpack_tile(words: Tile, _level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`, for one block per lane."""
    d = half_value(load(words, 0))
    for i in range(32):
        level = (byte_of(words, 0, i + 2) << 24) >> 24
        store(x, i, to_float(level) * d)


KERNELS = matrix_kernels("Q8_0", BLOCK_SIZE, BLOCK_BYTES, TileFunctions(pack_tile, unpack_tile), searches={})
