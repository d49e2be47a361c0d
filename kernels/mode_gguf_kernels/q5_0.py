"""Q5_0: weight = d * (level - 16), levels of 5 bits, one d per 32 weights.

A block of 32 weights, `block_q5_0` of ggml:

| bytes | what                                                                                  |
|-------|---------------------------------------------------------------------------------------|
| 0-1   | d, float16                                                                            |
| 2-5   | levels, bit 4: bit i of the 32 belongs to weight i                                    |
| 6-21  | levels, bits 0-3: byte 6 + m holds weights m (bits 0-3) and m + 16 (bits 4-7)         |
"""

import numpy as np

from mode_gguf_kernels.bits import after_half, bits_of_word, clear, pack_bits, unpack_bits, without_half, word_of_bits
from mode_gguf_kernels.block_signed import decode_signed_block, encode_signed_block, refine_signed_block
from mode_gguf_kernels.blocks import BLOCK_SIZE, pack_blocks, part, unpack_blocks
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.search import TOGETHER
from mode_gguf_kernels.simd import Ints, Tile, load, store
from mode_gguf_kernels.tiles import float_tile, int_tile, staging_words

BLOCK_BYTES = 2 + 4 + 32 // 2
_PAYLOAD = 5  # 32-bit words after d

SEARCHES: dict[str, Search] = {
    "fast": Search(7, 0, 0, 2),
    "default": Search(15, 0, 0, 4),
    "max": Search(41, 0, 0, 10),
}


@device
def pack_tile(x: Tile, w: Tile, variances: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
    """Pack a lane's blocks: `quantize_row_q5_0_impl`; with `weighted`, w holds the importance (it is overwritten)."""
    level, scratch = int_tile(TOGETHER * BLOCK_SIZE), float_tile(BLOCK_SIZE)
    for k in range(TOGETHER):
        d = encode_signed_block(x, w, scratch, variances, k, 16, weighted, level)
        _lay_out(part(level, k, BLOCK_SIZE), d, part(words, k, staging_words(BLOCK_BYTES)))


@device
def refine_tile(x: Tile, w: Tile, _variances: Tile, weighted: bool, search: Search, words: Tile) -> None:
    """Pack a lane's blocks with less error; w is overwritten."""
    level = int_tile(TOGETHER * BLOCK_SIZE)
    for k in range(TOGETHER):
        d = refine_signed_block(x, w, k, 16, weighted, search, level)
        _lay_out(part(level, k, BLOCK_SIZE), d, part(words, k, staging_words(BLOCK_BYTES)))


@device
def _lay_out(level: Tile, d: Ints, words: Tile) -> None:
    """Write a block: levels and the float16 bits of d."""
    payload = int_tile(_PAYLOAD)
    store(payload, 0, word_of_bits(level, 4))
    pack_bits(level, BLOCK_SIZE, 0, 4, 16, payload, 1)
    after_half(d, payload, _PAYLOAD, words)


@device
def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`, for one block per lane."""
    payload = int_tile(_PAYLOAD)
    without_half(words, _PAYLOAD, payload)
    clear(level, BLOCK_SIZE)
    bits_of_word(load(payload, 0), 4, level)
    unpack_bits(payload, 1, BLOCK_SIZE, 0, 4, 16, level)
    decode_signed_block(load(words, 0), 16, level, x)


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
