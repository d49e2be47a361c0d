"""Refining the types that store weight = scale * level - min: Q2_K, Q4_K, Q5_K. See `refine`."""

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits
from mode_gguf_kernels.refine import Search, as_half, limited, lost_gain, reciprocal
from mode_gguf_kernels.search import F, clamped, nearest_int, sum_of
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
def start_with_min(x: Tile, w: Tile, first: int, n: int, highest: int, encoders: int) -> tuple[Floats, Floats]:
    """Scale and min of one sub-block: the best of some encoders, each fitted to its own levels."""
    nmax = F(highest)
    step = F(1.8) / F(encoders - 1)
    zero = splat(F(0))
    value = load(x, first)
    low, high = value, value
    sum_w, sum_x = zero, zero
    for i in range(first, first + n):
        value = load(x, i)
        weight = load(w, i)
        low = select(value < low, value, low)
        high = select(value > high, value, high)
        sum_w = sum_w + weight
        sum_x = fused(weight, value, sum_x)
    low = select(low > F(0), zero, low)
    reach = high - low
    per_reach = reciprocal(reach)
    scale = reach / nmax
    best_low = low
    best = splat(F(-1))
    for k in range(encoders):
        inverse = (nmax - F(0.9) + step * F(k)) * per_reach
        offset = negative(low) * inverse
        sum_l, sum_l2, sum_xl = zero, zero, zero
        for i in range(first, first + n):
            value = load(x, i)
            level = limited(round_even(fused(value, inverse, offset)), F(0), nmax)
            weighted = load(w, i) * level
            sum_l = sum_l + weighted
            sum_l2 = fused(weighted, level, sum_l2)
            sum_xl = fused(weighted, value, sum_xl)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fit_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        fit_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        above = fit_low > F(0)
        fit_scale = select(above, sum_xl / sum_l2, fit_scale)
        fit_low = select(above, zero, fit_low)
        # What the fit explains of sum(w x^2); the rest is the error.
        explained = fused(fit_scale, sum_xl, fit_low * sum_x)
        better = (determinant > F(0)) & (explained > best)
        best = select(better, explained, best)
        scale = select(better, fit_scale, scale)
        best_low = select(better, fit_low, best_low)
    return scale, negative(best_low)


@device
def error_with_min(
    x: Tile, w: Tile, first: int, n: int, highest: int, scale: Floats, low: Floats
) -> tuple[Floats, Floats]:
    """Error of a sub-block stored with this scale and min, and sum of w * residual, its slope by the min."""
    inverse = reciprocal(scale)
    offset = low * inverse
    total, slope = splat(F(0)), splat(F(0))
    for i in range(first, first + n):
        position = fused(load(x, i), inverse, offset)
        residual = position - limited(round_even(position), F(0), F(highest))
        weighted = load(w, i) * residual
        total = fused(weighted, residual, total)
        slope = slope + weighted
    return total * scale * scale, slope * scale


@device
def improve_codes_with_min(
    x: Tile,
    w: Tile,
    sums: Tile,
    code: Tile,
    min_code: Tile,
    n_sub: int,
    n: int,
    highest: int,
    highest_code: int,
    d: Floats,
    dmin: Floats,
    reach: int,
    slides: int,
) -> Floats:
    """Try scale codes up to `reach` away; for each, move the min to where it should be, `slides` times.

    Returns the error of the super-block.
    """
    total = splat(F(0))
    per_dmin = reciprocal(dmin)
    for j in range(n_sub):
        first = n * j
        start, start_min = load(code, j), load(min_code, j)
        best_code, best_min = start, start_min
        best = splat(F(np.inf))
        per_sum = reciprocal(load(sums, j)) * per_dmin
        for away in range(-reach, reach + 1):
            tried = clamped(start + away, 1, highest_code)
            tried_min = start_min
            for _ in range(slides + 1):
                low = dmin * to_float(tried_min)
                error, slope = error_with_min(x, w, first, n, highest, d * to_float(tried), low)
                better = error < best
                best = select(better, error, best)
                best_code = select(better, tried, best_code)
                best_min = select(better, tried_min, best_min)
                tried_min = clamped(nearest_int(to_float(tried_min) - slope * per_sum), 0, highest_code)
        store(code, j, best_code)
        store(min_code, j, best_min)
        total = total + best
    return total


@device
def fit_with_min(
    x: Tile, w: Tile, sums: Tile, code: Tile, min_code: Tile, n_sub: int, n: int, highest: int, d: Floats, dmin: Floats
) -> tuple[Floats, Floats]:
    """d and dmin of least error for the levels that the codes give now."""
    zero = splat(F(0))
    a11, a12, a22, b1, b2 = zero, zero, zero, zero, zero
    for j in range(n_sub):
        scale_code, low_code = to_float(load(code, j)), to_float(load(min_code, j))
        inverse = reciprocal(d * scale_code)
        offset = dmin * low_code * inverse
        sum_l, sum_l2, sum_xl, sum_x = zero, zero, zero, zero
        for i in range(n * j, n * j + n):
            value = load(x, i)
            weight = load(w, i)
            level = limited(round_even(fused(value, inverse, offset)), F(0), F(highest))
            weighted = weight * level
            sum_l = sum_l + weighted
            sum_l2 = fused(weighted, level, sum_l2)
            sum_xl = fused(weighted, value, sum_xl)
            sum_x = fused(weight, value, sum_x)
        a11 = fused(scale_code * scale_code, sum_l2, a11)
        a12 = fused(scale_code * low_code, sum_l, a12)
        a22 = fused(low_code * low_code, load(sums, j), a22)
        b1 = fused(scale_code, sum_xl, b1)
        b2 = b2 - low_code * sum_x
    determinant = a11 * a22 - a12 * a12
    independent = determinant > a11 * a22 * F(1e-5)
    new_d = select(independent, (b1 * a22 + b2 * a12) / determinant, b1 / a11)
    new_dmin = select(independent, (b2 * a11 + b1 * a12) / determinant, zero)
    usable = (new_d > F(0)) & (new_dmin >= F(0)) & (a11 > F(0))
    return select(usable, new_d, d), select(usable, new_dmin, dmin)


@device
def refine_with_min(
    x: Tile,
    w: Tile,
    n_sub: int,
    n: int,
    highest: int,
    highest_code: int,
    search: Search,
    code: Tile,
    min_code: Tile,
    level: Tile,
) -> tuple[Ints, Ints]:
    """Codes and levels of one super-block per lane; returns the float16 bits of d and dmin."""
    scales, mins, sums = float_tile(n_sub), float_tile(n_sub), float_tile(n_sub)
    trial, trial_min = int_tile(n_sub), int_tile(n_sub)
    largest, largest_min = splat(F(0)), splat(F(0))
    for j in range(n_sub):
        scale, low = start_with_min(x, w, n * j, n, highest, search.encoders)
        store(scales, j, scale)
        store(mins, j, low)
        store(sums, j, sum_of(w, n * j, n))
        largest = select(scale > largest, scale, largest)
        largest_min = select(low > largest_min, low, largest_min)
    d = as_half(largest / F(highest_code))
    dmin = as_half(largest_min / F(highest_code))
    per_d, per_dmin = reciprocal(d), reciprocal(dmin)
    for j in range(n_sub):
        store(trial, j, clamped(nearest_int(load(scales, j) * per_d), 1, highest_code))
        store(trial_min, j, clamped(nearest_int(load(mins, j) * per_dmin), 0, highest_code))

        store(code, j, load(trial, j))
        store(min_code, j, load(trial_min, j))

    best = splat(F(np.inf))
    best_d, best_dmin = d, dmin
    for done in range(search.rounds):
        if done > 0:
            d, dmin = fit_with_min(x, w, sums, trial, trial_min, n_sub, n, highest, d, dmin)
            d, dmin = as_half(d), as_half(dmin)
        error = improve_codes_with_min(
            x, w, sums, trial, trial_min, n_sub, n, highest, highest_code, d, dmin, search.reach, search.slides
        )
        better = error < best
        best = select(better, error, best)
        best_d, best_dmin = select(better, d, best_d), select(better, dmin, best_dmin)
        for j in range(n_sub):
            store(code, j, select(better, load(trial, j), load(code, j)))
            store(min_code, j, select(better, load(trial_min, j), load(min_code, j)))
    sum_xx, sum_xq = splat(F(0)), splat(F(0))
    for j in range(n_sub):
        scale = best_d * to_float(load(code, j))
        low = best_dmin * to_float(load(min_code, j))
        inverse = reciprocal(scale)
        offset = low * inverse
        for i in range(n * j, n * j + n):
            value = load(x, i)
            chosen = limited(round_even(fused(value, inverse, offset)), F(0), F(highest))
            store(level, i, to_int(chosen))
            weighted = load(w, i) * value
            sum_xx = fused(weighted, value, sum_xx)
            sum_xq = fused(weighted, fused(scale, chosen, negative(low)), sum_xq)
    if search.unbiased:
        gain = lost_gain(sum_xx, sum_xq)
        best_d, best_dmin = as_half(best_d * gain), as_half(best_dmin * gain)
    return half_bits(best_d), half_bits(best_dmin)
