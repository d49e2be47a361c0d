"""What Q4_0 and Q5_0 share: weight = d * (level - highest), one d per 32 weights, levels 0..2 highest - 1."""

import numpy as np

from mode_gguf_kernels.blocks import BLOCK_SIZE
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.refine import Search, as_half, error_weights, limited, lost_gain, reciprocal
from mode_gguf_kernels.refine_signed import start_signed
from mode_gguf_kernels.search import F, make_qx_quants, signed_extreme, signed_level, weigh_by_size
from mode_gguf_kernels.simd import (
    Ints,
    Tile,
    absolute,
    fused,
    load,
    round_even,
    select,
    smaller,
    splat,
    store,
    to_float,
    to_int,
)


@device
def encode_signed_block(
    x: Tile, w: Tile, scratch: Tile, variances: Tile, k: int, highest: int, weighted: bool, level: Tile
) -> Ints:
    """Levels of a lane's block k as ggml chooses them; returns the float16 bits of d.

    With `weighted`, w is overwritten.
    """
    first = BLOCK_SIZE * k
    if weighted:
        weigh_by_size(x, w, first, BLOCK_SIZE, load(variances, k))
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
def refine_signed_block(x: Tile, w: Tile, k: int, highest: int, weighted: bool, search: Search, level: Tile) -> Ints:
    """Levels of less error; returns the float16 bits of d. w is overwritten."""
    first, last = BLOCK_SIZE * k, BLOCK_SIZE * (k + 1)
    low, high, zero = F(-highest), F(highest - 1), splat(F(0))
    error_weights(x, w, first, BLOCK_SIZE, weighted, search.half_powers)
    d = as_half(start_signed(x, w, first, BLOCK_SIZE, highest, search.encoders))
    best, best_d = splat(F(np.inf)), d
    for _ in range(search.rounds):
        inverse = reciprocal(d)
        total, sum_xl, sum_l2 = zero, zero, zero
        for i in range(first, last):
            value, weight = load(x, i), load(w, i)
            chosen = limited(round_even(inverse * value), low, high)
            error = fused(d, chosen, zero - value)
            total = fused(weight * error, error, total)
            sum_xl = fused(weight * chosen, value, sum_xl)
            sum_l2 = fused(weight * chosen, chosen, sum_l2)
        better = total < best
        best, best_d = select(better, total, best), select(better, d, best_d)
        d = as_half(select(sum_l2 > F(0), sum_xl / sum_l2, d))
    inverse = reciprocal(best_d)
    sum_xx, sum_xq = zero, zero
    for i in range(first, last):
        value = load(x, i)
        chosen = limited(round_even(inverse * value), low, high)
        store(level, i, to_int(chosen) + highest)
        weighted_value = load(w, i) * value
        sum_xx = fused(weighted_value, value, sum_xx)
        sum_xq = fused(weighted_value, best_d * chosen, sum_xq)
    if search.unbiased:
        best_d = as_half(best_d * lost_gain(sum_xx, sum_xq))
    return half_bits(best_d)


@device
def decode_signed_block(half: Ints, highest: int, level: Tile, x: Tile) -> None:
    """Weights of the levels 0..31 of a tile."""
    d = half_value(half)
    for i in range(BLOCK_SIZE):
        store(x, i, to_float(load(level, i) - highest) * d)
