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

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.levels import Field, Layout
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.search import (
    F,
    clamped,
    encode_signed,
    make_q3_quants,
    make_qx_quants,
    nearest_int,
    signed_extreme,
    signed_level,
    sum_of,
    sum_of_squares,
    weigh_by_size,
)
from mode_gguf_kernels.simd import Ints, Tile, load, select, splat, store, to_float
from mode_gguf_kernels.super_block_signed import signed_super_block_kernels
from mode_gguf_kernels.tiles import float_tile, int_tile

SEARCHES: dict[str, Search] = {
    "fast": Search(3, 1, 0, 1),
    "default": Search(5, 1, 0, 2),
    "max": Search(19, 4, 0, 6),
}


@device
def encode(x: Tile, w: Tile, weighted: bool, code: Tile, level: Tile) -> Ints:
    """Scales and levels of one super-block per lane; returns the float16 bits of d. w may be overwritten."""
    scales = float_tile(16)
    return _encode_weighted(x, w, scales, code, level) if weighted else _encode(x, scales, code, level)


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
        store(code, j, select(all_zero, -32, clamped(nearest_int(inverse * load(scales, j)), -32, 31)))
        scale = half_value(half) * to_float(load(code, j))
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
        store(code, j, select(nonzero, clamped(nearest_int(inverse * load(scales, j)), -32, 31), -32))
        scale = half_value(half) * to_float(load(code, j))
        for i in range(16 * j, 16 * j + 16):
            store(level, i, select(scale != F(0), signed_level(load(x, i) / scale, 4), load(level, i)))
    return half


KERNELS = signed_super_block_kernels(
    "Q3_K",
    Layout(16, (Field(first=32, shift=0, n_bits=2, stride=32), Field(first=0, shift=2, n_bits=1, stride=32))),
    codes=(
        Field(first=96, shift=0, n_bits=4, stride=8, weights=16),
        Field(first=104, shift=4, n_bits=2, stride=4, weights=16),
    ),
    code_offset=32,
    encode=encode,
    searches=SEARCHES,
)
