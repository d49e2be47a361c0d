"""Q6_K: weight = d * scale * (level - 32), levels of 6 bits, a signed scale of 8 bits per 16 weights.

A super-block of 256 weights, `block_q6_K` of ggml:

| bytes   | what                                                                                                 |
|---------|------------------------------------------------------------------------------------------------------|
| 0-127   | levels, bits 0-3: byte 64 h + m holds weights 128 h + m (bits 0-3) and 128 h + m + 64 (bits 4-7)     |
| 128-191 | levels, bits 4-5: byte 32 h + m holds weights 128 h + m, + 32, + 64, + 96 in bits 0-1, 2-3, 4-5, 6-7 |
| 192-207 | scales, int8                                                                                         |
| 208-209 | d, float16                                                                                           |
"""

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.levels import Field, Layout
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.search import GROUP_MAX_EPS, F, encode_signed, make_qx_quants, nearest_int, signed_extreme
from mode_gguf_kernels.simd import Ints, Tile, any_lane, load, select, smaller, splat, store, to_float
from mode_gguf_kernels.super_block_signed import sign_extended, signed_super_block_kernels
from mode_gguf_kernels.tiles import float_tile, int_tile

SEARCHES: dict[str, Search] = {
    "fast": Search(3, 0, 0, 1),
    "default": Search(3, 1, 0, 1),
    "max": Search(9, 8, 0, 4),
}


@device
def encode(x: Tile, w: Tile, weighted: bool, code: Tile, level: Tile) -> Ints:
    """Scales and levels of one super-block per lane; returns the float16 bits of d. The importance is used as it is."""
    scales, inverses, zeros, trial = float_tile(16), float_tile(16), int_tile(16), float_tile(16)
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
        stored = sign_extended(smaller(nearest_int(inverse * load(scales, j)), 127))
        store(code, j, select(empty, 0, stored))
        scale = half_value(half) * to_float(stored)
        encode_signed(x, level, 16 * j, 16, 32, scale, load(inverses, j), load(zeros, j) != 0)
    if any_lane(empty):
        for i in range(256):
            store(level, i, select(empty, 0, load(level, i)))
    return half


KERNELS = signed_super_block_kernels(
    "Q6_K",
    Layout(16, (Field(first=0, shift=0, n_bits=4, stride=64), Field(first=128, shift=4, n_bits=2, stride=32))),
    codes=(Field(first=192, shift=0, n_bits=8, stride=16, weights=16),),
    code_offset=0,
    encode=encode,
    searches=SEARCHES,
)
