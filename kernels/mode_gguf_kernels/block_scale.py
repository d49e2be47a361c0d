"""Types with one scale per 32 weights: Q4_0 and Q5_0, weight = d * (level - 8 or 16), and what IQ4_NL shares."""

from collections.abc import Callable

import numpy as np

from mode_gguf_kernels.blocks import BLOCK_SIZE, SEARCHES, block_kernels
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.levels import Layout
from mode_gguf_kernels.matrix import Kernels
from mode_gguf_kernels.refine import Search, as_half, error_weights, limited, lost_gain, reciprocal
from mode_gguf_kernels.refine_signed import start_signed
from mode_gguf_kernels.search import INTERLEAVED, F, make_qx_quants, signed_extreme, signed_level, weigh_by_size
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


def signed_block_kernels(name: str, layout: Layout) -> Kernels:
    """The kernels of a type with weight = d * (level - highest), levels 0..2 highest - 1."""
    highest = (layout.highest + 1) // 2
    lowest_level, highest_level = F(-highest), F(highest - 1)

    @device
    def encode(x: Tile, w: Tile, mean_squares: Tile, weighted: bool, level: Tile, halves: Tile) -> None:
        scratch = float_tile(BLOCK_SIZE)
        for k in range(INTERLEAVED):
            store(halves, k, _encode_block(x, w, scratch, mean_squares, k, highest, weighted, level))

    @device
    def start_scale(x: Tile, w: Tile, first: int, encoders: int) -> Floats:
        return start_signed(x, w, first, BLOCK_SIZE, highest, encoders)

    @device
    def nearest(scaled: Floats) -> Floats:
        return limited(round_even(scaled), lowest_level, highest_level)

    @device
    def level_of(scaled: Floats) -> Ints:
        return to_int(nearest(scaled)) + highest

    @device
    def refine(x: Tile, w: Tile, k: int, weighted: bool, search: Search, level: Tile) -> Ints:
        return refine_scale(start_scale, nearest, level_of, x, w, k, weighted, search, level)

    @device
    def decode(half: Ints, level: Tile, x: Tile) -> None:
        d = half_value(half)
        for i in range(BLOCK_SIZE):
            store(x, i, to_float(load(level, i) - highest) * d)

    return block_kernels(name, layout, encode, refine, decode, SEARCHES)


@device
def _encode_block(
    x: Tile, w: Tile, scratch: Tile, mean_squares: Tile, k: int, highest: int, weighted: bool, level: Tile
) -> Ints:
    """Levels of a lane's block k as ggml chooses them; returns the float16 bits of d.

    With `weighted`, w is overwritten.
    """
    first = BLOCK_SIZE * k
    if weighted:
        weigh_by_size(x, w, first, BLOCK_SIZE, load(mean_squares, k))
        scale, inverse, all_zero = make_qx_quants(x, w, scratch, first, BLOCK_SIZE, highest, True)
        for i in range(first, first + BLOCK_SIZE):
            store(level, i, select(all_zero, 0, signed_level(inverse * load(x, i), highest)))
        return half_bits(scale)
    _, extreme = signed_extreme(x, first, BLOCK_SIZE)
    d = extreme / F(-highest)
    inverse = select(d != F(0), F(1) / d, F(0))
    for i in range(first, first + BLOCK_SIZE):
        # 1 / d may overflow: what C then converts to an int8 gives 0.
        scaled = inverse * load(x, i)
        shifted = select(absolute(scaled) <= F(2 * highest), scaled + F(highest + 0.5), F(0))
        store(level, i, smaller(to_int(shifted), 2 * highest - 1))
    return half_bits(d)


@device
def refine_scale(
    start_scale: Callable[[Tile, Tile, int, int], Floats],
    nearest: Callable[[Floats], Floats],
    level_of: Callable[[Floats], Ints],
    x: Tile,
    w: Tile,
    k: int,
    weighted: bool,
    search: Search,
    level: Tile,
) -> Ints:
    """Levels of block k of less error, for weight = d * value; returns the float16 bits of d. w is overwritten.

    start_scale(x, w, first, encoders) gives the first d, nearest(x / d) the value that is stored, level_of(x / d) its
    level.
    """
    first, last = BLOCK_SIZE * k, BLOCK_SIZE * (k + 1)
    zero = splat(F(0))
    error_weights(x, w, first, BLOCK_SIZE, weighted, search.half_powers)
    d = as_half(start_scale(x, w, first, search.encoders))
    best, best_d = splat(F(np.inf)), d
    for _ in range(search.rounds):
        inverse = reciprocal(d)
        total, sum_xq, sum_q2 = zero, zero, zero
        for i in range(first, last):
            value, weight = load(x, i), load(w, i)
            q = nearest(inverse * value)
            error = fused(d, q, negative(value))
            total = fused(weight * error, error, total)
            sum_xq = fused(weight * q, value, sum_xq)
            sum_q2 = fused(weight * q, q, sum_q2)
        better = total < best
        best, best_d = select(better, total, best), select(better, d, best_d)
        d = as_half(select(sum_q2 > F(0), sum_xq / sum_q2, d))
    inverse = reciprocal(best_d)
    sum_xx, sum_xq = zero, zero
    for i in range(first, last):
        value = load(x, i)
        scaled = inverse * value
        store(level, i, level_of(scaled))
        weighted_value = load(w, i) * value
        sum_xx = fused(weighted_value, value, sum_xx)
        sum_xq = fused(weighted_value, best_d * nearest(scaled), sum_xq)
    if search.unbiased:
        best_d = as_half(best_d * lost_gain(sum_xx, sum_xq))
    return half_bits(best_d)
