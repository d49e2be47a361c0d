"""Refining the types that store weight = scale * level, both signed: Q3_K, Q6_K. See `refine`."""

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits
from mode_gguf_kernels.refine import Search, as_half, limited, lost_gain, reciprocal
from mode_gguf_kernels.search import F, clamped, nearest_int, signed_extreme
from mode_gguf_kernels.simd import (
    Floats,
    Ints,
    Tile,
    fused,
    load,
    negative,
    round_even,
    select,
    splat,
    store,
    to_float,
    to_int,
)
from mode_gguf_kernels.tiles import float_tile, int_tile


@device
def start_signed(x: Tile, w: Tile, first: int, n: int, highest: int, encoders: int) -> Floats:
    """Scale of one sub-block: the best of some encoders around the one that makes the extreme -highest."""
    nmax = F(highest)
    step = F(1.8) / F(encoders - 1)
    zero = splat(F(0))
    _, extreme = signed_extreme(x, first, n)
    per_extreme = negative(reciprocal(extreme))
    scale = extreme / (F(0) - nmax)
    best = zero
    for k in range(encoders):
        inverse = (nmax - F(0.9) + step * F(k)) * per_extreme
        sum_xl, sum_l2 = zero, zero
        for i in range(first, first + n):
            value = load(x, i)
            level = limited(round_even(inverse * value), F(-highest), F(highest - 1))
            weighted = load(w, i) * level
            sum_xl = fused(weighted, value, sum_xl)
            sum_l2 = fused(weighted, level, sum_l2)
        better = sum_xl * sum_xl > best * sum_l2
        fit = sum_xl / sum_l2
        scale = select(better, fit, scale)
        best = select(better, fit * sum_xl, best)
    return scale


@device
def error_signed(x: Tile, w: Tile, first: int, n: int, highest: int, scale: Floats) -> Floats:
    """Error of a sub-block stored with this scale; infinite for scale 0, which nothing is to be moved to."""
    inverse = reciprocal(scale)
    total = splat(F(0))
    for i in range(first, first + n):
        position = load(x, i) * inverse
        residual = position - limited(round_even(position), F(-highest), F(highest - 1))
        total = fused(load(w, i) * residual, residual, total)
    return select(scale != F(0), total * scale * scale, splat(F(np.inf)))


@device
def refine_signed(
    x: Tile,
    w: Tile,
    highest: int,
    highest_code: int,
    search: Search,
    code: Tile,
    level: Tile,
) -> Ints:
    """Signed codes -highest_code..highest_code-1 and levels of one super-block per lane; returns d's float16 bits.

    Levels are stored with an offset of `highest`.
    """
    zero = splat(F(0))
    scales, trial = float_tile(16), int_tile(16)
    for j in range(16):
        store(scales, j, start_signed(x, w, 16 * j, 16, highest, search.encoders))
    _, extreme = signed_extreme(scales, 0, 16)
    d = as_half(extreme / F(-highest_code))
    per_d = reciprocal(d)
    for j in range(16):
        store(trial, j, clamped(nearest_int(load(scales, j) * per_d), -highest_code, highest_code - 1))
        store(code, j, load(trial, j))

    best = splat(F(np.inf))
    best_d = d
    for done in range(search.rounds):
        if done > 0:
            a, b = zero, zero
            for j in range(16):
                scale_code = to_float(load(trial, j))
                inverse = reciprocal(d * scale_code)
                sum_xl, sum_l2 = zero, zero
                for i in range(16 * j, 16 * j + 16):
                    value = load(x, i)
                    encoded = limited(round_even(inverse * value), F(-highest), F(highest - 1))
                    weighted = load(w, i) * encoded
                    sum_xl = fused(weighted, value, sum_xl)
                    sum_l2 = fused(weighted, encoded, sum_l2)
                a = fused(scale_code * scale_code, sum_l2, a)
                b = fused(scale_code, sum_xl, b)
            d = as_half(select(a > F(0), b / a, d))
        total = zero
        for j in range(16):
            start = load(trial, j)
            best_code = start
            least = splat(F(np.inf))
            for away in range(-search.reach, search.reach + 1):
                tried = clamped(start + away, -highest_code, highest_code - 1)
                error = error_signed(x, w, 16 * j, 16, highest, d * to_float(tried))
                better = error < least
                least = select(better, error, least)
                best_code = select(better, tried, best_code)
            store(trial, j, best_code)
            total = total + least
        better = total < best
        best = select(better, total, best)
        best_d = select(better, d, best_d)
        for j in range(16):
            store(code, j, select(better, load(trial, j), load(code, j)))
    sum_xx, sum_xq = zero, zero
    for j in range(16):
        scale = best_d * to_float(load(code, j))
        inverse = reciprocal(scale)
        for i in range(16 * j, 16 * j + 16):
            value = load(x, i)
            chosen = limited(round_even(value * inverse), F(-highest), F(highest - 1))
            store(level, i, to_int(chosen) + highest)
            weighted = load(w, i) * value
            sum_xx = fused(weighted, value, sum_xx)
            sum_xq = fused(weighted, scale * chosen, sum_xq)
    if search.unbiased:
        best_d = as_half(best_d * lost_gain(sum_xx, sum_xq))
    return half_bits(best_d)
