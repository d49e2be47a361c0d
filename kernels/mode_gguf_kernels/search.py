"""ggml's searches for scales, mins and levels: the algorithms of `ggml-quants.c` (MIT licence, The ggml authors),
written for one block per lane.

Each function reads like the C function it is named after: a C `float` is a value per lane, a C `if` is a `select`.
The bytes that come out must equal libggml's, so the order of every float32 operation is ggml's as well; where a line
looks clumsy, that is why. float32 constants are spelled `F(...)`: a Python float is a float64 to Numba.

Where C keeps the best candidate's levels in an array, these functions return the *encoder* (inverse scale and
offset) that gave them, and the caller computes levels from it in the rare case that it needs them.
"""

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.simd import (
    Floats,
    Ints,
    Mask,
    Tile,
    absolute,
    any_lane,
    bits_of,
    fused,
    larger,
    load,
    negative,
    round_even,
    select,
    smaller,
    splat,
    square_root,
    store,
    to_float,
)
from mode_gguf_kernels.tiles import float_tile

F = np.float32
GROUP_MAX_EPS = F(1e-15)
"""ggml's threshold below which a group counts as zero."""

INTERLEAVED = 2
"""Sub-blocks that `make_qkx_quants` searches side by side: divisions for one hide behind sums over the other."""

_ROUNDER = F(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the lowest bits
_ROUNDER_BITS = 0x4B400000
_RANGE = 1 << 21  # half of what `nearest_int` rounds as its name says
_LARGEST_DIVISOR = F(2.0**120)  # its reciprocal, and a level divided by it, are normal numbers
_LARGEST = F(np.finfo(np.float32).max)


@device
def nearest_int(value: Floats) -> Ints:
    """ggml's `nearest_int`: nearest, ties to even, and its own answers beyond 2**22, for infinities and NaN."""
    return (bits_of(value + _ROUNDER) & 0x007FFFFF) - 0x00400000


@device
def clamped(level: Ints, lowest: int, highest: int) -> Ints:
    """Levels limited to [lowest, highest]."""
    return larger(smaller(level, highest), lowest)


@device
def bounded_level(value: Floats, highest: np.float32) -> Floats:
    """make_qkx3_quants' `v > 0 ? nearest_int(MIN(v, nmax)) : 0`, as floats; the value may be infinite or NaN."""
    limited = select(value < highest, value, splat(highest))
    return select(value > F(0), round_even(limited), splat(F(0)))


@device
def any_level(value: Floats, highest: int) -> Floats:
    """make_qkx2_quants' `MAX(0, MIN(nmax, nearest_int(v)))`, as floats."""
    return to_float(clamped(nearest_int(value), 0, highest))


@device
def divided(dividend: np.float32, divisor: Floats, reciprocal: Floats) -> Floats:
    """dividend / divisor, correctly rounded, given the correctly rounded reciprocal of the divisor; takes a fifth of
    a division's time.

    Markstein's correction of a quotient by its fused remainder. That the result is the rounded quotient was checked for
    every dividend `make_qx_quants` has and all 2**23 significands of the divisor (tests/kernels/test_search.py), and
    exponents do not matter as long as no step leaves the normal numbers.
    """
    quotient = reciprocal * dividend
    return fused(fused(negative(quotient), divisor, dividend), reciprocal, quotient)


@device
def sum_of_squares(x: Tile, first: int, n: int) -> Floats:
    """Sum of squares of the weights first..first+n-1, in order."""
    total = splat(F(0))
    for i in range(first, first + n):
        value = load(x, i)
        total = total + value * value
    return total


@device
def sum_of(w: Tile, first: int, n: int) -> Floats:
    """Sum of the items first..first+n-1, in order."""
    total = splat(F(0))
    for i in range(first, first + n):
        total = total + load(w, i)
    return total


@device
def weigh_by_size(x: Tile, w: Tile, first: int, n: int, variance: Floats) -> None:
    """w *= sqrt(variance + x^2): how ggml makes n error weights, from `first` on, from the importance matrix."""
    for i in range(first, first + n):
        value = load(x, i)
        store(w, i, load(w, i) * square_root(variance + value * value))


@device
def make_qkx_quants(
    x: Tile,
    w: Tile,
    first: int,
    n: int,
    highest: int,
    rmin: np.float32,
    rdelta: np.float32,
    nstep: int,
    use_mad: bool,
    guarded: bool,
    found: tuple[Tile, Tile, Tile, Tile],
    j: int,
) -> None:
    """`make_qkx3_quants` (guarded) and `make_qkx2_quants` (not): x ~ scale * level - min, levels 0..highest.

    Tries nstep + 1 encoders, fits scale and min to each one's levels by weighted least squares, and keeps the best.
    A better min also moves the origin of the encoders tried after it.

    Searches `INTERLEAVED` sub-blocks of n weights from `first` on, and sets items j, j + 1, ... of the tiles in
    `found`: scale, min (as stored: what is subtracted), and the winner's inverse scale and offset: its levels are
    those of inverse * (x - offset).
    """
    scales, lows, inverses, offsets = found
    sums_w, sums_x, highs = float_tile(INTERLEAVED), float_tile(INTERLEAVED), float_tile(INTERLEAVED)
    first_lows, bests = float_tile(INTERLEAVED), float_tile(INTERLEAVED)
    tried, determinants = float_tile(INTERLEAVED), float_tile(INTERLEAVED)
    fitted_scales, fitted_lows, level = float_tile(INTERLEAVED), float_tile(INTERLEAVED), float_tile(INTERLEAVED * n)
    nmax = F(highest)
    zero = splat(F(0))
    for k in range(INTERLEAVED):
        start = first + k * n
        value = load(x, start)
        weight = load(w, start)
        low = value
        high = value
        sum_w = weight
        sum_x = weight * value
        for i in range(start + 1, start + n):
            value = load(x, i)
            weight = load(w, i)
            low = select(value < low, value, low)
            high = select(value > high, value, high)
            sum_w = sum_w + weight
            sum_x = sum_x + weight * value
        low = select(low > F(0), zero, low)
        inverse = nmax / (high - low)
        scale = F(1) / inverse
        best = zero
        for i in range(start, start + n):
            value = load(x, i)
            error = scale * any_level(inverse * (value - low), highest) + low - value
            error = absolute(error) if use_mad else error * error
            best = best + load(w, i) * error
        store(sums_w, k, sum_w)
        store(sums_x, k, sum_x)
        store(highs, k, high)
        store(first_lows, k, low)
        store(bests, k, best)
        store(scales, j + k, scale)
        store(lows, j + k, low)
        # An inverse that overflowed gives level 0 everywhere under both rules if it is 0.
        store(inverses, j + k, select(inverse <= _LARGEST, inverse, zero))
        store(offsets, j + k, low)

    for step in range(nstep + 1):
        for k in range(INTERLEAVED):
            start = first + k * n
            low = load(lows, j + k)
            inverse = (rmin + rdelta * F(step) + nmax) / (load(highs, k) - low)
            sum_l = zero
            sum_l2 = zero
            sum_xl = zero
            for i in range(n):
                value = load(x, start + i)
                scaled = inverse * (value - low)
                encoded = bounded_level(scaled, nmax) if guarded else any_level(scaled, highest)
                store(level, k * n + i, encoded)
                weighted = load(w, start + i) * encoded
                sum_l = sum_l + weighted
                sum_l2 = sum_l2 + weighted * encoded
                sum_xl = sum_xl + weighted * value
            sum_w = load(sums_w, k)
            sum_x = load(sums_x, k)
            determinant = sum_w * sum_l2 - sum_l * sum_l
            scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            above = low > F(0)
            if any_lane(above):
                scale = select(above, sum_xl / sum_l2, scale)
                low = select(above, zero, low)
            store(determinants, k, determinant)
            store(fitted_scales, k, scale)
            store(fitted_lows, k, low)
            store(tried, k, inverse)
        for k in range(INTERLEAVED):
            start = first + k * n
            scale = load(fitted_scales, k)
            low = load(fitted_lows, k)
            total = zero
            for i in range(n):
                error = scale * load(level, k * n + i) + low - load(x, start + i)
                error = absolute(error) if use_mad else error * error
                total = total + load(w, start + i) * error
            better = (load(determinants, k) > F(0)) & (total < load(bests, k))
            store(bests, k, select(better, total, load(bests, k)))
            store(inverses, j + k, select(better, load(tried, k), load(inverses, j + k)))
            store(offsets, j + k, select(better, load(lows, j + k), load(offsets, j + k)))
            store(scales, j + k, select(better, scale, load(scales, j + k)))
            store(lows, j + k, select(better, low, load(lows, j + k)))

    for k in range(INTERLEAVED):
        constant = load(highs, k) <= load(first_lows, k)
        store(scales, j + k, select(constant, zero, load(scales, j + k)))
        store(lows, j + k, negative(select(constant, load(first_lows, k), load(lows, j + k))))
        store(inverses, j + k, select(constant, zero, load(inverses, j + k)))
        store(offsets, j + k, select(constant, zero, load(offsets, j + k)))


@device
def encode_quotients(
    x: Tile, level: Tile, first: int, n: int, lowest: int, highest: int, offset: int, scale: Floats, low: Floats
) -> None:
    """level = nearest_int((x + low) / scale) limited to [lowest, highest], plus offset; anything where scale is 0.

    Multiplies by the reciprocal. Where |quotient| < 64 that is within 2**-16 of the quotient (three roundings of
    half an ulp), and where it is larger both are far beyond the limits; so the level differs only if the product is as
    near as that to the middle between two integers. Such sub-blocks are divided, and those in which |quotient| is so
    large that `nearest_int` might leave its range.
    """
    reciprocal = F(1) / scale
    farthest = splat(F(0))
    all_rounded = splat(0)
    for i in range(first, first + n):
        quotient = (load(x, i) + low) * reciprocal
        shifted = quotient + _ROUNDER
        nearest = shifted - _ROUNDER
        farther = absolute(quotient - nearest)
        farthest = select(farther > farthest, farther, farthest)
        rounded = bits_of(shifted) - (_ROUNDER_BITS - _RANGE)  # plus _RANGE: from 0 to twice the range, if within it
        all_rounded = all_rounded | rounded
        store(level, i, clamped(rounded, lowest + _RANGE, highest + _RANGE) + (offset - _RANGE))
    uncertain = (farthest > F(0.5 - 2.0**-16)) | ((all_rounded & -(2 * _RANGE)) != 0)
    if any_lane(uncertain & (scale != F(0))):
        for i in range(first, first + n):
            quotient = (load(x, i) + low) / scale
            store(level, i, clamped(nearest_int(quotient), lowest, highest) + offset)


@device
def encode_with_min(
    x: Tile,
    level: Tile,
    first: int,
    n: int,
    highest: int,
    scale: Floats,
    low: Floats,
    inverse: Floats,
    offset: Floats,
    guarded: bool,
) -> None:
    """Levels 0..highest of (x + low) / scale; where the stored scale is 0, those that the search had found."""
    stored_zero = scale == F(0)
    encode_quotients(x, level, first, n, 0, highest, 0, scale, low)
    if any_lane(stored_zero):
        for i in range(first, first + n):
            scaled = inverse * (load(x, i) - offset)
            if guarded:
                found = nearest_int(bounded_level(scaled, F(highest)))
            else:
                found = clamped(nearest_int(scaled), 0, highest)
            store(level, i, select(stored_zero, found, load(level, i)))


@device
def make_qp_quants(values: Tile, w: Tile, code: Tile, n: int, highest: int) -> Floats:
    """`make_qp_quants`: values ~ scale * code, values of at least 0; codes are the uint8 that C stores.

    Returns the scale.
    """
    nmax = F(highest)
    zero = splat(F(0))
    largest = zero
    for i in range(n):
        value = load(values, i)
        largest = select(largest > value, largest, value)
    all_zero = largest < GROUP_MAX_EPS

    inverse = nmax / largest
    scale = F(1) / inverse
    best = zero
    for i in range(n):
        value = load(values, i)
        error = value - scale * to_float(nearest_int(inverse * value) & 255)
        best = best + load(w, i) * error * error
    for step in range(-4, 5):
        if step == 0:
            continue
        candidate = (F(0.1) * F(step) + nmax) / largest
        candidate_scale = F(1) / candidate
        total = zero
        for i in range(n):
            value = load(values, i)
            error = value - candidate_scale * to_float(smaller(nearest_int(candidate * value), highest))
            total = total + load(w, i) * error * error
        better = total < best
        best = select(better, total, best)
        inverse = select(better, candidate, inverse)

    sum_lx = zero
    sum_l2 = zero
    for i in range(n):
        value = load(values, i)
        weight = load(w, i)
        encoded = smaller(nearest_int(inverse * value), highest)
        store(code, i, encoded & 255)
        sum_lx = sum_lx + weight * value * to_float(encoded)
        sum_l2 = sum_l2 + weight * to_float(encoded) * to_float(encoded)

    for _ in range(5):
        n_changed = splat(0)
        for i in range(n):
            value = load(values, i)
            weight = load(w, i)
            old = load(code, i)
            old_float = to_float(old)
            lx = sum_lx - weight * value * old_float
            l2 = sum_l2 - weight * old_float * old_float
            accepted = (lx > F(0)) & (l2 > F(0))
            new = smaller(nearest_int(value * l2 / lx), highest)
            accepted = accepted & (new != old)
            new_float = to_float(new)
            lx = lx + weight * value * new_float
            l2 = l2 + weight * new_float * new_float
            accepted = accepted & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            store(code, i, select(accepted, new & 255, old))
            sum_lx = select(accepted, lx, sum_lx)
            sum_l2 = select(accepted, l2, sum_l2)
            n_changed = select(accepted, n_changed + 1, n_changed)
        if not any_lane(n_changed > 0):
            break

    if any_lane(all_zero):
        for i in range(n):
            store(code, i, select(all_zero, 0, load(code, i)))
    scale = select(sum_l2 > F(0), sum_lx / sum_l2, zero)
    return select(all_zero, zero, scale)


@device
def scale_to_largest(values: Tile, code: Tile, n: int, highest: int) -> Floats:
    """Codes of scales and mins as in the `_ref` quantizers: the largest becomes `highest`. Codes may be any int.

    Returns the scale.
    """
    nmax = F(highest)
    largest = splat(F(0))
    for i in range(n):
        value = load(values, i)
        largest = select(value > largest, value, largest)
    positive = largest > F(0)
    inverse = nmax / largest
    for i in range(n):
        store(code, i, select(positive, nearest_int(inverse * load(values, i)), 0))
    return largest / nmax


@device
def signed_extreme(x: Tile, first: int, n: int) -> tuple[Floats, Floats]:
    """The largest magnitude and the (first) value that has it."""
    magnitude = splat(F(0))
    extreme = splat(F(0))
    for i in range(first, first + n):
        value = load(x, i)
        farther = absolute(value) > magnitude
        magnitude = select(farther, absolute(value), magnitude)
        extreme = select(farther, value, extreme)
    return magnitude, extreme


@device
def make_qx_quants(
    x: Tile, w: Tile, weighted: Tile, first: int, n: int, highest: int, finite: bool
) -> tuple[Floats, Floats, Mask]:
    """`make_qx_quants` with rmse_type 1 and weights: x ~ scale * level, levels -highest..highest-1.

    `weighted` is scratch for n floats per lane; `finite` says that all of x is finite, which saves time.

    Returns:
        scale, the winner's inverse scale, and where the group counts as zero (its levels are then stored as 0, which
        C's offset of `highest` is not added to).
    """
    nmax = F(highest)
    zero = splat(F(0))
    magnitude, extreme = signed_extreme(x, first, n)
    all_zero = magnitude < GROUP_MAX_EPS
    for i in range(n):
        store(weighted, i, load(w, first + i) * load(x, first + i))

    reciprocal = F(1) / extreme
    reciprocal_is_normal = finite and not any_lane(magnitude > _LARGEST_DIVISOR)
    best_inverse = -nmax / extreme
    sum_lx, sum_l2 = _signed_sums(x, w, weighted, first, n, highest, best_inverse, finite, True, False)
    scale = select(sum_l2 != F(0), sum_lx / sum_l2, zero)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        numerator = -(nmax + F(0.1) * F(step))
        inverse = divided(numerator, extreme, reciprocal) if reciprocal_is_normal else numerator / extreme
        # |inverse * x| is at most highest + step / 10, and a few ulps. Below highest - 0.5 it rounds to a level without
        # limits; below highest + 0.5, only highest itself is too much.
        if step < -5:
            sum_lx, sum_l2 = _signed_sums(x, w, weighted, first, n, highest, inverse, finite, False, False)
        elif step < 5:
            sum_lx, sum_l2 = _signed_sums(x, w, weighted, first, n, highest, inverse, finite, True, False)
        else:
            sum_lx, sum_l2 = _signed_sums(x, w, weighted, first, n, highest, inverse, finite, True, True)
        # Without a branch, the divisions of one candidate hide behind the sums of the next.
        better = (sum_l2 > F(0)) & (sum_lx * sum_lx > best * sum_l2)
        candidate_scale = sum_lx / sum_l2
        scale = select(better, candidate_scale, scale)
        best = select(better, candidate_scale * sum_lx, best)
        best_inverse = select(better, inverse, best_inverse)
    return select(all_zero, zero, scale), best_inverse, all_zero


@device
def _signed_sums(
    x: Tile,
    w: Tile,
    weighted: Tile,
    first: int,
    n: int,
    highest: int,
    inverse: Floats,
    finite: bool,
    limit_above: bool,
    limit_below: bool,
) -> tuple[Floats, Floats]:
    """Sums of w x level and w level^2 for the levels of inverse * x."""
    low = F(-highest)
    high = F(highest - 1)
    sum_lx = splat(F(0))
    sum_l2 = splat(F(0))
    for i in range(n):
        scaled = inverse * load(x, first + i)
        if finite:  # then |scaled| is at most highest + 1, where rounding a float is what nearest_int does
            if limit_above:
                scaled = select(scaled < high, scaled, splat(high))
            if limit_below:
                scaled = select(scaled > low, scaled, splat(low))
            encoded = (scaled + _ROUNDER) - _ROUNDER  # LLVM makes less of round_even after a limit
        else:
            encoded = to_float(clamped(nearest_int(scaled), -highest, highest - 1))
        sum_lx = sum_lx + load(weighted, i) * encoded
        sum_l2 = sum_l2 + load(w, first + i) * encoded * encoded
    return sum_lx, sum_l2


@device
def signed_level(value: Floats, highest: int) -> Ints:
    """nearest_int(value) limited to -highest..highest-1, stored with an offset of `highest`."""
    return clamped(nearest_int(value), -highest, highest - 1) + highest


@device
def encode_signed(
    x: Tile, level: Tile, first: int, n: int, highest: int, scale: Floats, inverse: Floats, all_zero: Mask
) -> None:
    """Levels of x / scale, offset by `highest`; where the stored scale is 0, those that the search had found."""
    stored_zero = scale == F(0)
    encode_quotients(x, level, first, n, -highest, highest - 1, highest, scale, splat(F(-0.0)))  # x + -0 is x
    if any_lane(stored_zero):
        for i in range(first, first + n):
            found = select(all_zero, 0, signed_level(inverse * load(x, i), highest))
            store(level, i, select(stored_zero, found, load(level, i)))


@device
def make_q3_quants(x: Tile, level: Tile, first: int, n: int, highest: int) -> Floats:
    """`make_q3_quants` with do_rmse: x ~ scale * level, each weight weighing x^2, levels changed one by one.

    Writes the levels, offset by `highest` (0 where the group counts as zero), and returns the scale.
    """
    nmax = F(highest)
    zero = splat(F(0))
    magnitude, extreme = signed_extreme(x, first, n)
    all_zero = magnitude < GROUP_MAX_EPS
    inverse = -nmax / extreme
    sum_lx = zero
    sum_l2 = zero
    for i in range(first, first + n):
        value = load(x, i)
        encoded = clamped(nearest_int(inverse * value), -highest, highest - 1)
        store(level, i, encoded)
        weight = value * value
        sum_lx = sum_lx + weight * value * to_float(encoded)
        sum_l2 = sum_l2 + weight * to_float(encoded) * to_float(encoded)

    for _ in range(5):
        n_changed = splat(0)
        for i in range(first, first + n):
            value = load(x, i)
            weight = value * value
            old = load(level, i)
            old_float = to_float(old)
            lx = sum_lx - weight * value * old_float
            l2 = sum_l2 - weight * old_float * old_float
            accepted = lx > F(0)
            new = clamped(nearest_int(value * l2 / lx), -highest, highest - 1)
            accepted = accepted & (new != old)
            new_float = to_float(new)
            lx = lx + weight * value * new_float
            l2 = l2 + weight * new_float * new_float
            accepted = accepted & (l2 > F(0)) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            store(level, i, select(accepted, new, old))
            sum_lx = select(accepted, lx, sum_lx)
            sum_l2 = select(accepted, l2, sum_l2)
            n_changed = select(accepted, n_changed + 1, n_changed)
        if not any_lane(n_changed > 0):
            break

    for i in range(first, first + n):
        store(level, i, select(all_zero, 0, load(level, i) + highest))
    scale = select(sum_l2 > F(0), sum_lx / sum_l2, zero)
    return select(all_zero, zero, scale)
