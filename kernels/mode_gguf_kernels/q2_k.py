"""Q2_K: weight = d * scale * level - dmin * min, levels of 2 bits, scale and min of 4 bits per 16 weights.

A super-block of 256 weights, `block_q2_K` of ggml:

| bytes  | what                                                                                            |
|--------|-------------------------------------------------------------------------------------------------|
| 0-15   | byte j: sub-block j's scale (bits 0-3) and min (bits 4-7)                                       |
| 16-79  | levels: byte 32 h + m holds weights 128 h + m, + 32, + 64, + 96 in bits 0-1, 2-3, 4-5, 6-7      |
| 80-81  | d, float16                                                                                      |
| 82-83  | dmin, float16                                                                                   |
"""

import numpy as np

from mode_gguf_kernels.bits import byte_of, clear, pack_bits, unpack_bits
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.matrix import pack_matrix, unpack_matrix
from mode_gguf_kernels.refine import Search, error_weights
from mode_gguf_kernels.refine_min import refine_with_min
from mode_gguf_kernels.search import (
    TOGETHER,
    F,
    encode_with_min,
    make_qkx_quants,
    make_qp_quants,
    scale_to_largest,
    sum_of,
    sum_of_squares,
    weigh_by_size,
)
from mode_gguf_kernels.simd import Ints, Tile, absolute, load, store, to_float
from mode_gguf_kernels.tiles import float_tile, int_tile

BLOCK_SIZE = 256
BLOCK_BYTES = 256 // 16 + 256 // 4 + 2 + 2
_SCALES, _LEVELS, _HALVES = 0, 4, 20  # first 32-bit word of each field

SEARCHES: dict[str, Search] = {
    "fast": Search(5, 1, 0, 1),
    "default": Search(9, 2, 1, 3),
    "max": Search(19, 5, 2, 8),
}


@device
def pack_tile(x: Tile, w: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
    """Pack one super-block per lane; with `weighted`, w holds the importance (it is overwritten)."""
    scales, mins, sums = float_tile(16), float_tile(16), float_tile(16)
    inverses, offsets = float_tile(16), float_tile(16)
    level, code, min_code = int_tile(256), int_tile(16), int_tile(16)
    if weighted:
        weigh_by_size(x, w, 0, 256, sum_of_squares(x, 0, 256) / F(256))
    else:
        for i in range(256):
            store(w, i, absolute(load(x, i)))
    found = scales, mins, inverses, offsets
    for j in range(0, 16, TOGETHER):
        if weighted:
            make_qkx_quants(x, w, 16 * j, 16, 3, F(-0.9), F(0.05), 36, False, True, found, j)
        else:
            make_qkx_quants(x, w, 16 * j, 16, 3, F(-0.5), F(0.1), 15, True, False, found, j)
    if weighted:
        for j in range(16):
            store(sums, j, sum_of(w, 16 * j, 16))
        d = half_bits(make_qp_quants(scales, sums, code, 16, 15))
        dmin = half_bits(make_qp_quants(mins, sums, min_code, 16, 15))
    else:
        d = half_bits(scale_to_largest(scales, code, 16, 15))
        dmin = half_bits(scale_to_largest(mins, min_code, 16, 15))
    for j in range(16):
        # A code beyond 4 bits spills into its neighbour here as it does in C, so read back what was stored.
        both = (load(code, j) | (load(min_code, j) << 4)) & 255
        store(code, j, both)
        scale = half_value(d) * to_float(both & 15)
        low = half_value(dmin) * to_float(both >> 4)
        encode_with_min(x, level, 16 * j, 16, 3, scale, low, load(inverses, j), load(offsets, j), weighted)
    _lay_out(code, level, d, dmin, words)


@device
def refine_tile(x: Tile, w: Tile, weighted: bool, search: Search, words: Tile) -> None:
    """Pack one super-block per lane with less error; w is overwritten."""
    code, min_code, level = int_tile(16), int_tile(16), int_tile(256)
    error_weights(x, w, 0, 256, weighted, search.half_powers)
    d, dmin = refine_with_min(x, w, 16, 16, 3, 15, search, code, min_code, level)
    for j in range(16):
        store(code, j, load(code, j) | (load(min_code, j) << 4))
    _lay_out(code, level, d, dmin, words)


@device
def _lay_out(both: Tile, level: Tile, d: Ints, dmin: Ints, words: Tile) -> None:
    """Write the block: bytes of scale and min, levels, float16 bits of d and dmin."""
    pack_bits(both, 16, 0, 8, 16, words, _SCALES)
    pack_bits(level, 256, 0, 2, 32, words, _LEVELS)
    store(words, _HALVES, d | (dmin << 16))


@device
def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`."""
    clear(level, 256)
    unpack_bits(words, _LEVELS, 256, 0, 2, 32, level)
    halves = load(words, _HALVES)
    for j in range(16):
        both = byte_of(words, _SCALES, j)
        scale = half_value(halves) * to_float(both & 15)
        low = half_value(halves >> 16) * to_float(both >> 4)
        for i in range(16 * j, 16 * j + 16):
            store(x, i, scale * to_float(load(level, i)) - low)


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
