"""Q3_K: weight = d * (scale - 32) * (level - 4), levels of 3 bits, a scale of 6 bits per 16 weights.

A super-block of 256 weights, `block_q3_K` of ggml:

| bytes   | what                                                                                                |
|---------|-----------------------------------------------------------------------------------------------------|
| 0-31    | levels, bit 2: bit g of byte m belongs to weight 32 g + m                                           |
| 32-95   | levels, bits 0-1: byte 32 h + m holds weights 128 h + m, + 32, + 64, + 96 in bits 0-1, 2-3, 4-5, 6-7 |
| 96-103  | scales, bits 0-3: byte j holds scale j (bits 0-3) and scale j + 8 (bits 4-7)                        |
| 104-107 | scales, bits 4-5: byte j holds scales j, j + 4, j + 8, j + 12 in bits 0-1, 2-3, 4-5, 6-7            |
| 108-109 | d, float16                                                                                          |
"""

import numpy as np

from mode_gguf_kernels.bits import clear, pack_bits, unpack_bits
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.matrix import pack_matrix, unpack_matrix
from mode_gguf_kernels.refine import Search, error_weights
from mode_gguf_kernels.refine_signed import refine_signed
from mode_gguf_kernels.search import (
    F,
    encode_signed,
    make_q3_quants,
    make_qx_quants,
    signed_extreme,
    signed_level,
    sum_of,
    sum_of_squares,
    weigh_by_size,
)
from mode_gguf_kernels.simd import Ints, Tile, load, select, splat, store, to_float
from mode_gguf_kernels.tiles import float_tile, int_tile

BLOCK_SIZE = 256
BLOCK_BYTES = 256 // 8 + 256 // 4 + 12 + 2
_HIGH_BITS, _LOW_BITS, _SCALES_LOW, _SCALES_HIGH, _D = 0, 8, 24, 26, 27  # first 32-bit word of each field

SEARCHES: dict[str, Search] = {
    "fast": Search(3, 1, 0, 1),
    "default": Search(5, 1, 0, 2),
    "max": Search(19, 4, 0, 6),
}


@device
def pack_tile(x: Tile, w: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
    """Pack one super-block per lane; with `weighted`, w holds the importance (it is overwritten)."""
    scales, code, level = float_tile(16), int_tile(16), int_tile(256)
    d = _encode_weighted(x, w, scales, code, level) if weighted else _encode(x, scales, code, level)
    _lay_out(code, level, d, words)


@device
def refine_tile(x: Tile, w: Tile, weighted: bool, search: Search, words: Tile) -> None:
    """Pack one super-block per lane with less error; w is overwritten."""
    code, level = int_tile(16), int_tile(256)
    error_weights(x, w, 0, 256, weighted, search.half_powers)
    d = refine_signed(x, w, 4, 32, search, code, level)
    for j in range(16):
        store(code, j, load(code, j) + 32)
    _lay_out(code, level, d, words)


@device
def _lay_out(code: Tile, level: Tile, d: Ints, words: Tile) -> None:
    """Write the block: codes and levels with their offsets, float16 bits of d."""
    pack_bits(level, 256, 2, 1, 32, words, _HIGH_BITS)
    pack_bits(level, 256, 0, 2, 32, words, _LOW_BITS)
    pack_bits(code, 16, 0, 4, 8, words, _SCALES_LOW)
    pack_bits(code, 16, 4, 2, 4, words, _SCALES_HIGH)
    store(words, _D, d)


@device
def _encode_weighted(x: Tile, w: Tile, scales: Tile, code: Tile, level: Tile) -> Ints:
    """`quantize_row_q3_K_impl`: fill code and level, return d's float16 bits."""
    sums, inverses, zeros, trial = float_tile(16), float_tile(16), int_tile(16), float_tile(16)
    weigh_by_size(x, w, 0, 256, F(2) * sum_of_squares(x, 0, 256) / F(256))
    for j in range(16):
        scale, inverse, all_zero = make_qx_quants(x, w, trial, 16 * j, 16, 4, True)
        store(scales, j, scale)
        store(inverses, j, inverse)
        store(zeros, j, select(all_zero, splat(1), 0))
        store(sums, j, sum_of(w, 16 * j, 16))
    d, inverse, all_zero = make_qx_quants(scales, sums, trial, 0, 16, 32, False)
    half = half_bits(d)
    for j in range(16):
        store(code, j, select(all_zero, 0, signed_level(inverse * load(scales, j), 32)))
        scale = half_value(half) * to_float(load(code, j) - 32)
        encode_signed(x, level, 16 * j, 16, 4, scale, load(inverses, j), load(zeros, j) != 0)
    return half


@device
def _encode(x: Tile, scales: Tile, code: Tile, level: Tile) -> Ints:
    """`quantize_row_q3_K_ref`: fill code and level, return d's float16 bits."""
    for j in range(16):
        store(scales, j, make_q3_quants(x, level, 16 * j, 16, 4))
    _, extreme = signed_extreme(scales, 0, 16)
    nonzero = extreme != F(0)
    inverse = F(-32) / extreme
    half = half_bits(select(nonzero, F(1) / inverse, F(0)))
    for j in range(16):
        store(code, j, select(nonzero, signed_level(inverse * load(scales, j), 32), 0))
        scale = half_value(half) * to_float(load(code, j) - 32)
        for i in range(16 * j, 16 * j + 16):
            store(level, i, select(scale != F(0), signed_level(load(x, i) / scale, 4), load(level, i)))
    return half


@device
def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`."""
    code = int_tile(16)
    clear(code, 16)
    unpack_bits(words, _SCALES_LOW, 16, 0, 4, 8, code)
    unpack_bits(words, _SCALES_HIGH, 16, 4, 2, 4, code)
    clear(level, 256)
    unpack_bits(words, _HIGH_BITS, 256, 2, 1, 32, level)
    unpack_bits(words, _LOW_BITS, 256, 0, 2, 32, level)
    d = half_value(load(words, _D))
    for j in range(16):
        scale = d * to_float(load(code, j) - 32)
        for i in range(16 * j, 16 * j + 16):
            store(x, i, scale * to_float(load(level, i) - 4))


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
