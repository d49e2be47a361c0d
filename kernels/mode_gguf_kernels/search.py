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

F = np.float32
GROUP_MAX_EPS = F(1e-15)
"""ggml's threshold below which a group counts as zero."""

_ROUNDER = F(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the lowest bits
_LARGEST = F(np.finfo(np.float32).max)


@device
def nearest_int(value: Floats) -> Ints:
    """ggml's `nearest_int`: nearest, ties to even, and its own answers beyond 2**22, for infinities and NaN."""
    return (bits_of(value + _ROUNDER) & 0x007FFFFF) - 0x00400000


@device
def clamped(level: Ints, lowest: int, highest: int) -> Ints:
    """Each level limited to [lowest, highest]."""
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
def weigh_by_size(x: Tile, w: Tile, variance: Floats) -> None:
    """w *= sqrt(variance + x^2): how ggml makes 256 error weights from the importance matrix."""
    for i in range(256):
        value = load(x, i)
        store(w, i, load(w, i) * square_root(variance + value * value))


@device
def make_qkx_quants(
    x: Tile,
    w: Tile,
    level: Tile,
    first: int,
    n: int,
    highest: int,
    rmin: np.float32,
    rdelta: np.float32,
    nstep: int,
    use_mad: bool,
    guarded: bool,
) -> tuple[Floats, Floats, Floats, Floats]:
    """`make_qkx3_quants` (guarded) and `make_qkx2_quants` (not): x ~ scale * level - min, levels 0..highest.

    Tries nstep + 1 encoders, fits scale and min to each one's levels by weighted least squares, and keeps the best.
    A better min also moves the origin of the encoders tried after it. `level` is scratch for n floats per lane.

    Returns:
        scale, min (as stored: what is subtracted), and the winner's inverse scale and offset: its levels are those of
        inverse * (x - offset).
    """
    nmax = F(highest)
    zero = splat(F(0))
    value = load(x, first)
    weight = load(w, first)
    low = value
    high = value
    sum_w = weight
    sum_x = weight * value
    for i in range(first + 1, first + n):
        value = load(x, i)
        weight = load(w, i)
        low = select(value < low, value, low)
        high = select(value > high, value, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * value
    low = select(low > F(0), zero, low)
    constant = high <= low
    constant_low = low

    inverse = nmax / (high - low)
    scale = F(1) / inverse
    # An inverse that overflowed gives level 0 everywhere under both rules if it is 0.
    best_inverse = select(inverse <= _LARGEST, inverse, zero)
    best_offset = low
    best = zero
    for i in range(first, first + n):
        value = load(x, i)
        error = scale * any_level(inverse * (value - low), highest) + low - value
        error = absolute(error) if use_mad else error * error
        best = best + load(w, i) * error

    for step in range(nstep + 1):
        inverse = (rmin + rdelta * F(step) + nmax) / (high - low)
        sum_l = zero
        sum_l2 = zero
        sum_xl = zero
        for i in range(n):
            value = load(x, first + i)
            scaled = inverse * (value - low)
            encoded = bounded_level(scaled, nmax) if guarded else any_level(scaled, highest)
            store(level, i, encoded)
            weighted = load(w, first + i) * encoded
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * encoded
            sum_xl = sum_xl + weighted * value
        determinant = sum_w * sum_l2 - sum_l * sum_l
        candidate_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = candidate_low > F(0)
        candidate_low = select(above, zero, candidate_low)
        numerator = select(above, sum_xl, sum_w * sum_xl - sum_x * sum_l)
        candidate_scale = numerator / select(above, sum_l2, determinant)
        total = zero
        for i in range(n):
            error = candidate_scale * load(level, i) + candidate_low - load(x, first + i)
            error = absolute(error) if use_mad else error * error
            total = total + load(w, first + i) * error
        better = (determinant > F(0)) & (total < best)
        best = select(better, total, best)
        best_inverse = select(better, inverse, best_inverse)
        best_offset = select(better, low, best_offset)
        scale = select(better, candidate_scale, scale)
        low = select(better, candidate_low, low)

    scale = select(constant, zero, scale)
    low = select(constant, constant_low, low)
    best_inverse = select(constant, zero, best_inverse)
    best_offset = select(constant, zero, best_offset)
    return scale, negative(low), best_inverse, best_offset


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
    for i in range(first, first + n):
        store(level, i, clamped(nearest_int((load(x, i) + low) / scale), 0, highest))
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
    """How the `_ref` quantizers code scales and mins: the largest becomes `highest`. Codes may be any int.

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

    best_inverse = -nmax / extreme
    sum_lx, sum_l2 = _signed_sums(x, w, weighted, first, n, highest, best_inverse, finite)
    scale = select(sum_l2 != F(0), sum_lx / sum_l2, zero)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        inverse = -(nmax + F(0.1) * F(step)) / extreme
        sum_lx, sum_l2 = _signed_sums(x, w, weighted, first, n, highest, inverse, finite)
        better = (sum_l2 > F(0)) & (sum_lx * sum_lx > best * sum_l2)
        if any_lane(better):
            scale = select(better, sum_lx / sum_l2, scale)
            best = select(better, scale * sum_lx, best)
            best_inverse = select(better, inverse, best_inverse)
    return select(all_zero, zero, scale), best_inverse, all_zero


@device
def _signed_sums(
    x: Tile, w: Tile, weighted: Tile, first: int, n: int, highest: int, inverse: Floats, finite: bool
) -> tuple[Floats, Floats]:
    """Sums of w x level and w level^2 for the levels of inverse * x."""
    low = F(-highest)
    high = F(highest - 1)
    sum_lx = splat(F(0))
    sum_l2 = splat(F(0))
    for i in range(n):
        scaled = inverse * load(x, first + i)
        if finite:  # then |scaled| is at most highest + 1, where rounding a float is what nearest_int does
            encoded = round_even(scaled)
            encoded = select(encoded < high, encoded, splat(high))
            encoded = select(encoded > low, encoded, splat(low))
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
    for i in range(first, first + n):
        store(level, i, signed_level(load(x, i) / scale, highest))
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
