"""Q5_K: levels of 5 bits, scale and min of 6 bits per 32 weights; see `scale_min`.

A super-block of 256 weights, `block_q5_K` of ggml:

| bytes  | what                                                                                             |
|--------|--------------------------------------------------------------------------------------------------|
| 0-1    | d, float16                                                                                       |
| 2-3    | dmin, float16                                                                                    |
| 4-15   | eight scales and eight mins of 6 bits, see `scale_min`                                           |
| 16-47  | levels, bit 4: bit g of byte m belongs to weight 32 g + m                                        |
| 48-175 | levels, bits 0-3: byte 32 h + m holds weights 64 h + m (bits 0-3) and 64 h + m + 32 (bits 4-7)   |
"""

import numpy as np

from mode_gguf_kernels.bits import clear, pack_bits, unpack_bits
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.matrix import pack_matrix, unpack_matrix
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.scale_min import decode_tile, encode_refined, encode_tile
from mode_gguf_kernels.search import F
from mode_gguf_kernels.simd import Tile
from mode_gguf_kernels.tiles import int_tile

BLOCK_SIZE = 256
BLOCK_BYTES = 2 + 2 + 12 + 256 // 8 + 256 // 2
_HIGH_BITS, _LOW_BITS = 4, 12  # first 32-bit word of each field

SEARCHES: dict[str, Search] = {
    "fast": Search(5, 1, 0, 1),
    "default": Search(9, 2, 1, 3),
    "max": Search(19, 5, 2, 8),
}


@device
def pack_tile(x: Tile, w: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
    """Pack one super-block per lane; with `weighted`, w holds the importance (it is overwritten)."""
    level = int_tile(256)
    encode_tile(x, w, weighted, 31, F(-0.5), 15, words, level)
    _lay_out(level, words)


@device
def refine_tile(x: Tile, w: Tile, weighted: bool, search: Search, words: Tile) -> None:
    """Pack one super-block per lane with less error; w is overwritten."""
    level = int_tile(256)
    encode_refined(x, w, weighted, 31, search, words, level)
    _lay_out(level, words)


@device
def _lay_out(level: Tile, words: Tile) -> None:
    """Write the levels into the block."""
    pack_bits(level, 256, 4, 1, 32, words, _HIGH_BITS)
    pack_bits(level, 256, 0, 4, 32, words, _LOW_BITS)


@device
def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`."""
    clear(level, 256)
    unpack_bits(words, _HIGH_BITS, 256, 4, 1, 32, level)
    unpack_bits(words, _LOW_BITS, 256, 0, 4, 32, level)
    decode_tile(words, level, x)


@kernel
def pack(source: np.ndarray, kind: int, importance: np.ndarray, blocks_per_row: int, packed: np.ndarray) -> int:
    """Pack a whole matrix as ggml does; see `registry.Kernels`."""
    return pack_matrix(pack_tile, (), BLOCK_BYTES, source, kind, importance, blocks_per_row, packed)


@kernel
def pack_refined(
    source: np.ndarray, kind: int, importance: np.ndarray, blocks_per_row: int, search: Search, packed: np.ndarray
) -> int:
    """Pack a whole matrix with less error; see `registry.Kernels`."""
    return pack_matrix(refine_tile, search, BLOCK_BYTES, source, kind, importance, blocks_per_row, packed)


@kernel
def unpack(packed: np.ndarray, weights: np.ndarray) -> None:
    """Unpack a whole matrix; see `registry.Kernels`."""
    unpack_matrix(unpack_tile, BLOCK_BYTES, packed, weights)
