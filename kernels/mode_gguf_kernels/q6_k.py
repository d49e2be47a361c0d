"""Q6_K: weight = d * scale * (level - 32), levels of 6 bits, a signed scale of 8 bits per 16 weights.

A super-block of 256 weights, `block_q6_K` of ggml:

| bytes   | what                                                                                                 |
|---------|------------------------------------------------------------------------------------------------------|
| 0-127   | levels, bits 0-3: byte 64 h + m holds weights 128 h + m (bits 0-3) and 128 h + m + 64 (bits 4-7)     |
| 128-191 | levels, bits 4-5: byte 32 h + m holds weights 128 h + m, + 32, + 64, + 96 in bits 0-1, 2-3, 4-5, 6-7 |
| 192-207 | scales, int8                                                                                         |
| 208-209 | d, float16                                                                                           |
"""

import numpy as np

from mode_gguf_kernels.bits import byte_of, clear, pack_bits, unpack_bits
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.matrix import pack_matrix, unpack_matrix
from mode_gguf_kernels.refine import Search, error_weights
from mode_gguf_kernels.refine_signed import refine_signed
from mode_gguf_kernels.search import (
    GROUP_MAX_EPS,
    F,
    encode_signed,
    make_qx_quants,
    nearest_int,
    signed_extreme,
)
from mode_gguf_kernels.simd import Ints, Tile, any_lane, load, select, smaller, splat, store, to_float
from mode_gguf_kernels.tiles import float_tile, int_tile

BLOCK_SIZE = 256
BLOCK_BYTES = 256 // 2 + 256 // 4 + 256 // 16 + 2
_LOW_BITS, _HIGH_BITS, _SCALES, _D = 0, 32, 48, 52  # first 32-bit word of each field

SEARCHES: dict[str, Search] = {
    "fast": Search(3, 0, 0, 1),
    "default": Search(3, 1, 0, 1),
    "max": Search(9, 8, 0, 4),
}


@device
def pack_tile(x: Tile, w: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
    """Pack one super-block per lane; with `weighted`, w holds the importance, used as it is."""
    scales, inverses, zeros = float_tile(16), float_tile(16), int_tile(16)
    trial, code, level = float_tile(16), int_tile(16), int_tile(256)
    if not weighted:
        for i in range(256):
            store(w, i, load(x, i) * load(x, i))
    for j in range(16):
        scale, inverse, all_zero = make_qx_quants(x, w, trial, 16 * j, 16, 32, True)
        store(scales, j, scale)
        store(inverses, j, inverse)
        store(zeros, j, select(all_zero, splat(1), 0))
    magnitude, extreme = signed_extreme(scales, 0, 16)
    empty = magnitude < GROUP_MAX_EPS  # C zeroes such a block as a whole, levels too
    inverse = F(-128) / extreme
    half = select(empty, 0, half_bits(F(1) / inverse))
    for j in range(16):
        stored = _sign_extended(smaller(nearest_int(inverse * load(scales, j)), 127))
        store(code, j, select(empty, 0, stored))
        scale = half_value(half) * to_float(stored)
        encode_signed(x, level, 16 * j, 16, 32, scale, load(inverses, j), load(zeros, j) != 0)
    if any_lane(empty):
        for i in range(256):
            store(level, i, select(empty, 0, load(level, i)))
    _lay_out(code, level, half, words)


@device
def refine_tile(x: Tile, w: Tile, weighted: bool, search: Search, words: Tile) -> None:
    """Pack one super-block per lane with less error; w is overwritten."""
    code, level = int_tile(16), int_tile(256)
    error_weights(x, w, 0, 256, weighted, search.half_powers)
    d = refine_signed(x, w, 32, 128, search, code, level)
    _lay_out(code, level, d, words)


@device
def _lay_out(code: Tile, level: Tile, d: Ints, words: Tile) -> None:
    """Write the block: codes, levels with their offset, float16 bits of d."""
    pack_bits(level, 256, 0, 4, 64, words, _LOW_BITS)
    pack_bits(level, 256, 4, 2, 32, words, _HIGH_BITS)
    pack_bits(code, 16, 0, 8, 16, words, _SCALES)
    store(words, _D, d)


@device
def _sign_extended(byte: Ints) -> Ints:
    """The low eight bits of each lane as an int8."""
    return (byte << 24) >> 24


@device
def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`."""
    clear(level, 256)
    unpack_bits(words, _LOW_BITS, 256, 0, 4, 64, level)
    unpack_bits(words, _HIGH_BITS, 256, 4, 2, 32, level)
    d = half_value(load(words, _D))
    for j in range(16):
        scale = d * to_float(_sign_extended(byte_of(words, _SCALES, j)))
        for i in range(16 * j, 16 * j + 16):
            store(x, i, scale * to_float(load(level, i) - 32))


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
