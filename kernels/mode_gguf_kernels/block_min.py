"""Types with a scale and a min per 32 weights: Q4_1 and Q5_1, weight = d * level + m, levels 0..highest."""

from collections.abc import Mapping

import numpy as np

from mode_gguf_kernels.blocks import BLOCK_SIZE, block_kernels
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.levels import Layout
from mode_gguf_kernels.matrix import Kernels
from mode_gguf_kernels.refine import Search, as_half, error_weights, limited, lost_gain, reciprocal
from mode_gguf_kernels.refine_min import start_with_min
from mode_gguf_kernels.search import INTERLEAVED, F, bounded_level, make_qkx_quants, nearest_int, weigh_by_size
from mode_gguf_kernels.simd import (
    Floats,
    Ints,
    Tile,
    absolute,
    fused,
    load,
    negative,
    round_even,
    select,
    smaller,
    splat,
    store,
    to_float,
    to_int,
)
from mode_gguf_kernels.tiles import float_tile

_LARGEST = F(np.finfo(np.float32).max)


def min_block_kernels(name: str, layout: Layout, searches: Mapping[str, Search]) -> Kernels:
    """The kernels of a type with weight = d * level + m."""
    highest = layout.highest

    @device
    def encode(x: Tile, w: Tile, mean_squares: Tile, weighted: bool, level: Tile, halves: Tile) -> None:
        _encode_blocks(x, w, mean_squares, highest, weighted, level, halves)

    @device
    def refine(x: Tile, w: Tile, k: int, weighted: bool, search: Search, level: Tile) -> Ints:
        return _refine_block(x, w, k, highest, weighted, search, level)

    @device
    def decode(halves: Ints, level: Tile, x: Tile) -> None:
        d, m = half_value(halves), half_value(halves >> 16)
        for i in range(BLOCK_SIZE):
            store(x, i, to_float(load(level, i)) * d + m)

    return block_kernels(name, layout, encode, refine, decode, searches)


@device
def _encode_blocks(
    x: Tile, w: Tile, mean_squares: Tile, highest: int, weighted: bool, level: Tile, halves: Tile
) -> None:
    """Levels of all of a lane's blocks as ggml chooses them; item k of `halves` becomes d and m of block k.

    With `weighted`, w is overwritten.
    """
    if not weighted:
        for k in range(INTERLEAVED):
            store(halves, k, _encode_between_extremes(x, k, highest, level))
        return
    scales, lows, inverses, offsets = (
        float_tile(INTERLEAVED),
        float_tile(INTERLEAVED),
        float_tile(INTERLEAVED),
        float_tile(INTERLEAVED),
    )
    for k in range(INTERLEAVED):
        weigh_by_size(x, w, BLOCK_SIZE * k, BLOCK_SIZE, load(mean_squares, k))
    found = scales, lows, inverses, offsets
    make_qkx_quants(x, w, 0, BLOCK_SIZE, highest, F(-0.9), F(0.05), 36, False, True, found, 0)
    for k in range(INTERLEAVED):
        inverse, offset = load(inverses, k), load(offsets, k)
        for i in range(BLOCK_SIZE * k, BLOCK_SIZE * (k + 1)):
            store(level, i, nearest_int(bounded_level(inverse * (load(x, i) - offset), F(highest))))
        store(halves, k, half_bits(load(scales, k)) | (half_bits(negative(load(lows, k))) << 16))


@device
def _encode_between_extremes(x: Tile, k: int, highest: int, level: Tile) -> Ints:
    """Levels of block k with the first at its least weight, the last at its greatest; returns d and m."""
    first, last = BLOCK_SIZE * k, BLOCK_SIZE * (k + 1)
    low, high = splat(_LARGEST), splat(-_LARGEST)
    for i in range(first, last):
        value = load(x, i)
        low = select(value < low, value, low)
        high = select(value > high, value, high)
    d = (high - low) / F(highest)
    inverse = select(d != F(0), F(1) / d, F(0))
    for i in range(first, last):
        # Where the range or 1 / d overflows, what C converts to an integer gives 0.
        scaled = (load(x, i) - low) * inverse
        shifted = select(absolute(scaled) <= F(2 * highest), scaled + F(0.5), F(0))
        store(level, i, smaller(to_int(shifted), highest))
    return half_bits(d) | (half_bits(low) << 16)


@device
def _refine_block(x: Tile, w: Tile, k: int, highest: int, weighted: bool, search: Search, level: Tile) -> Ints:
    """Levels of block k of less error; returns d and m. w is overwritten."""
    first, last = BLOCK_SIZE * k, BLOCK_SIZE * (k + 1)
    nmax, zero = F(highest), splat(F(0))
    error_weights(x, w, first, BLOCK_SIZE, weighted, search.half_powers)
    scale, below = start_with_min(x, w, first, BLOCK_SIZE, highest, search.encoders)
    d, m = as_half(scale), negative(as_half(below))
    best, best_d, best_m = splat(F(np.inf)), d, m
    for _ in range(search.rounds):
        inverse = reciprocal(d)
        offset = negative(m) * inverse
        total, sum_w, sum_x, sum_l, sum_l2, sum_xl = zero, zero, zero, zero, zero, zero
        for i in range(first, last):
            value, weight = load(x, i), load(w, i)
            chosen = limited(round_even(fused(value, inverse, offset)), F(0), nmax)
            error = fused(d, chosen, m) - value
            total = fused(weight * error, error, total)
            weighted_level = weight * chosen
            sum_w = sum_w + weight
            sum_x = fused(weight, value, sum_x)
            sum_l = sum_l + weighted_level
            sum_l2 = fused(weighted_level, chosen, sum_l2)
            sum_xl = fused(weighted_level, value, sum_xl)
        better = total < best
        best = select(better, total, best)
        best_d, best_m = select(better, d, best_d), select(better, m, best_m)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        usable = determinant > sum_w * sum_l2 * F(1e-5)
        d = as_half(select(usable, (sum_w * sum_xl - sum_x * sum_l) / determinant, d))
        m = _signed_half(select(usable, (sum_l2 * sum_x - sum_l * sum_xl) / determinant, m))
    inverse = reciprocal(best_d)
    offset = negative(best_m) * inverse
    sum_xx, sum_xq = zero, zero
    for i in range(first, last):
        value = load(x, i)
        chosen = limited(round_even(fused(value, inverse, offset)), F(0), nmax)
        store(level, i, to_int(chosen))
        weighted_value = load(w, i) * value
        sum_xx = fused(weighted_value, value, sum_xx)
        sum_xq = fused(weighted_value, fused(best_d, chosen, best_m), sum_xq)
    if search.unbiased:
        gain = lost_gain(sum_xx, sum_xq)
        fits = (absolute(best_d * gain) < F(65504)) & (absolute(best_m * gain) < F(65504))
        gain = select(fits, gain, splat(F(1)))
        best_d, best_m = as_half(best_d * gain), _signed_half(best_m * gain)
    return half_bits(best_d) | (half_bits(best_m) << 16)


@device
def _signed_half(value: Floats) -> Floats:
    """The value rounded to float16; the largest of its sign where it is too large."""
    return select(value < F(0), negative(as_half(negative(value))), as_half(value))
