"""Q5_1: weight = d * level + m, levels of 5 bits, a d and an m per 32 weights.

A block of 32 weights, `block_q5_1` of ggml:

| bytes | what                                                                                  |
|-------|---------------------------------------------------------------------------------------|
| 0-1   | d, float16                                                                            |
| 2-3   | m, float16                                                                            |
| 4-7   | levels, bit 4: bit i of the 32 belongs to weight i                                    |
| 8-23  | levels, bits 0-3: byte 8 + n holds weights n (bits 0-3) and n + 16 (bits 4-7)         |
"""

import numpy as np

from mode_gguf_kernels.bits import bits_of_word, clear, pack_bits, unpack_bits, word_of_bits
from mode_gguf_kernels.block_min import decode_min_block, encode_min_blocks, refine_min_block
from mode_gguf_kernels.blocks import BLOCK_SIZE, pack_blocks, part, unpack_blocks
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.search import TOGETHER
from mode_gguf_kernels.simd import Ints, Tile, load, store
from mode_gguf_kernels.tiles import int_tile, staging_words

BLOCK_BYTES = 2 + 2 + 4 + 32 // 2
_HIGH_BITS, _LOW_BITS = 1, 2  # first 32-bit word of each field

SEARCHES: dict[str, Search] = {
    "fast": Search(7, 0, 0, 2),
    "default": Search(15, 0, 0, 4),
    "max": Search(41, 0, 0, 10),
}


@device
def pack_tile(x: Tile, w: Tile, variances: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
    """Pack a lane's blocks: `quantize_row_q5_1_impl`; with `weighted`, w holds the importance (it is overwritten)."""
    level, halves = int_tile(TOGETHER * BLOCK_SIZE), int_tile(TOGETHER)
    encode_min_blocks(x, w, variances, 31, weighted, level, halves)
    for k in range(TOGETHER):
        _lay_out(part(level, k, BLOCK_SIZE), load(halves, k), part(words, k, staging_words(BLOCK_BYTES)))


@device
def refine_tile(x: Tile, w: Tile, _variances: Tile, weighted: bool, search: Search, words: Tile) -> None:
    """Pack a lane's blocks with less error; w is overwritten."""
    level = int_tile(TOGETHER * BLOCK_SIZE)
    for k in range(TOGETHER):
        halves = refine_min_block(x, w, k, 31, weighted, search, level)
        _lay_out(part(level, k, BLOCK_SIZE), halves, part(words, k, staging_words(BLOCK_BYTES)))


@device
def _lay_out(level: Tile, halves: Ints, words: Tile) -> None:
    """Write a block: levels and the float16 bits of d and m."""
    store(words, 0, halves)
    store(words, _HIGH_BITS, word_of_bits(level, 4))
    pack_bits(level, BLOCK_SIZE, 0, 4, 16, words, _LOW_BITS)


@device
def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`, for one block per lane."""
    clear(level, BLOCK_SIZE)
    bits_of_word(load(words, _HIGH_BITS), 4, level)
    unpack_bits(words, _LOW_BITS, BLOCK_SIZE, 0, 4, 16, level)
    decode_min_block(load(words, 0), level, x)


@kernel
def pack(source: np.ndarray, kind: int, importance: np.ndarray, blocks_per_row: int, packed: np.ndarray) -> int:
    """Pack a whole matrix as ggml does; see `registry.Kernels`."""
    return pack_blocks(pack_tile, (), True, BLOCK_BYTES, source, kind, importance, blocks_per_row, packed)


@kernel
def pack_refined(
    source: np.ndarray, kind: int, importance: np.ndarray, blocks_per_row: int, search: Search, packed: np.ndarray
) -> int:
    """Pack a whole matrix with less error; see `registry.Kernels`."""
    return pack_blocks(refine_tile, search, False, BLOCK_BYTES, source, kind, importance, blocks_per_row, packed)


@kernel
def unpack(packed: np.ndarray, weights: np.ndarray) -> None:
    """Unpack a whole matrix; see `registry.Kernels`."""
    unpack_blocks(unpack_tile, BLOCK_BYTES, packed, weights)
