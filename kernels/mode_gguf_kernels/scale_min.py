"""What Q4_K and Q5_K share: weight = d * scale * level - dmin * min, scale and min of 6 bits per 32 weights.

The twelve bytes of eight scales and eight mins (ggml's `get_scale_min_k4`):

| bytes | bits 0-3              | bits 4-5              | bits 6-7              |
|-------|-----------------------|-----------------------|-----------------------|
| 0-3   | scale j, bits 0-3     | scale j, bits 4-5     | scale j + 4, bits 4-5 |
| 4-7   | min j, bits 0-3       | min j, bits 4-5       | min j + 4, bits 4-5   |
| 8-11  | scale j + 4, bits 0-3 | min j + 4, bits 0-3 (in bits 4-7)            ||
"""

import numpy as np

from mode_gguf_kernels.bits import byte_of
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
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
from mode_gguf_kernels.simd import Tile, absolute, load, smaller, splat, square_root, store, to_float
from mode_gguf_kernels.tiles import float_tile, int_tile

HALVES, SCALES = 0, 1
"""First 32-bit word of d and dmin (float16 each) and of the twelve bytes of scales and mins, in both types."""


@device
def pack_scales(code: Tile, min_code: Tile, words: Tile) -> None:
    """Lay out eight scales and eight mins of 6 bits; what exceeds them spills as it does in C."""
    for group in range(3):
        word = splat(0)
        for j in range(4):
            if group == 0:
                byte = load(code, j) | ((load(code, j + 4) >> 4) << 6)
            elif group == 1:
                byte = load(min_code, j) | ((load(min_code, j + 4) >> 4) << 6)
            else:
                byte = (load(code, j + 4) & 15) | ((load(min_code, j + 4) & 15) << 4)
            word = word | ((byte & 255) << (8 * j))
        store(words, SCALES + group, word)


@device
def unpack_scales(words: Tile, code: Tile, min_code: Tile) -> None:
    """The inverse of `pack_scales`."""
    for j in range(4):
        scale_byte, min_byte = byte_of(words, SCALES, j), byte_of(words, SCALES, j + 4)
        low_bits = byte_of(words, SCALES, j + 8)
        store(code, j, scale_byte & 63)
        store(min_code, j, min_byte & 63)
        store(code, j + 4, (low_bits & 15) | ((scale_byte >> 6) << 4))
        store(min_code, j + 4, (low_bits >> 4) | ((min_byte >> 6) << 4))


@device
def encode_tile(
    x: Tile, w: Tile, weighted: bool, highest: int, rmin: np.float32, nstep: int, words: Tile, level: Tile
) -> None:
    """Find levels 0..highest of one super-block per lane, and write d, dmin, scales and mins.

    With `weighted`, w holds the importance (it is overwritten); rmin and nstep are for the search without it.
    """
    scales, mins, sums = float_tile(8), float_tile(8), float_tile(8)
    inverses, offsets = float_tile(8), float_tile(8)
    code, min_code = int_tile(8), int_tile(8)
    if weighted:
        weigh_by_size(x, w, 0, 256, F(2) * sum_of_squares(x, 0, 256) / F(256))
    else:
        for j in range(8):
            typical = square_root(sum_of_squares(x, 32 * j, 32) / F(32))
            for i in range(32 * j, 32 * j + 32):
                store(w, i, typical + absolute(load(x, i)))
    found = scales, mins, inverses, offsets
    for j in range(0, 8, TOGETHER):
        if weighted:
            make_qkx_quants(x, w, 32 * j, 32, highest, F(-0.9), F(0.05), 36, False, True, found, j)
        else:
            make_qkx_quants(x, w, 32 * j, 32, highest, rmin, F(0.1), nstep, False, False, found, j)
    if weighted:
        for j in range(8):
            store(sums, j, sum_of(w, 32 * j, 32))
        d = half_bits(make_qp_quants(scales, sums, code, 8, 63))
        dmin = half_bits(make_qp_quants(mins, sums, min_code, 8, 63))
    else:
        d = half_bits(scale_to_largest(scales, code, 8, 63))
        dmin = half_bits(scale_to_largest(mins, min_code, 8, 63))
    if not (weighted and highest == 15):  # where ggml lets codes that wrapped around spill
        for j in range(8):
            store(code, j, smaller(load(code, j) & 255, 63))
            store(min_code, j, smaller(load(min_code, j) & 255, 63))
    store(words, HALVES, d | (dmin << 16))
    pack_scales(code, min_code, words)
    unpack_scales(words, code, min_code)
    for j in range(8):
        scale = half_value(d) * to_float(load(code, j))
        low = half_value(dmin) * to_float(load(min_code, j))
        inverse, offset = load(inverses, j), load(offsets, j)
        encode_with_min(x, level, 32 * j, 32, highest, scale, low, inverse, offset, weighted)


@device
def encode_refined(x: Tile, w: Tile, weighted: bool, highest: int, search: Search, words: Tile, level: Tile) -> None:
    """`encode_tile` with less error."""
    code, min_code = int_tile(8), int_tile(8)
    error_weights(x, w, 0, 256, weighted, search.half_powers)
    d, dmin = refine_with_min(x, w, 8, 32, highest, 63, search, code, min_code, level)
    store(words, HALVES, d | (dmin << 16))
    pack_scales(code, min_code, words)


@device
def decode_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The weights of one super-block per lane, from its levels and from d, dmin, scales and mins in `words`."""
    code, min_code = int_tile(8), int_tile(8)
    unpack_scales(words, code, min_code)
    halves = load(words, HALVES)
    for j in range(8):
        scale = half_value(halves) * to_float(load(code, j))
        low = half_value(halves >> 16) * to_float(load(min_code, j))
        for i in range(32 * j, 32 * j + 32):
            store(x, i, scale * to_float(load(level, i)) - low)
