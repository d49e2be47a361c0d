"""Scales, mins and levels of less error than ggml's searches find, for the same bytes.

ggml settles each sub-block's scale and min by itself, then rounds them to codes of the super-block, and stops there.
Here that is only the start: in rounds, every sub-block looks for better codes around its own, with its levels chosen
anew for each, and the super-block's d and dmin are fitted to the outcome by weighted least squares, as float16. The
round of least error is kept, so no round can do harm.

Error means sum of w * (x - stored)^2, see `error_weights`. What minimises it is a shrunken copy of the weights: a least
squares fit q of x has <q, x> = <q, q> < <x, x>, so that all outputs come out a little too small together. Other
rounding errors mostly cancel in an output, a sum of hundreds of products; this one does not. So in the end d and dmin
are scaled by <x, x> / <q, x>: of all that keep the size of outputs, that has the least error. See `lost_gain`.

As these sums need not be ggml's, multiplications and additions are fused: faster, and closer to the exact sum.
`refine_min` has the K-quants with mins, `refine_signed` those without, `block_min` and `block_scale` the types of 32
weights to a block.
"""

from typing import NamedTuple

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.search import F, sum_of_squares
from mode_gguf_kernels.simd import Floats, Tile, absolute, fused, load, select, splat, square_root, store


class Search(NamedTuple):
    """Extent of the search for less error; time is proportional to each number.

    Attributes:
        encoders: how many encoders (inverse scales) a sub-block's start is chosen from.
        reach: how far from its code a sub-block looks for a better one, in each round.
        slides: how often the min follows the levels there (types with a min).
        rounds: how often codes are searched; between rounds d and dmin are fitted.
        half_powers: twice the power of (variance + x^2) in the error weights.
        unbiased: whether d and dmin make up for the shrinkage of least squares.
    """

    encoders: int
    reach: int
    slides: int
    rounds: int
    half_powers: int = 0
    unbiased: bool = True


@device
def error_weights(x: Tile, w: Tile, first: int, n: int, weighted: bool, half_powers: int) -> None:
    """Turn the importance in w (1 everywhere unless `weighted`) into error weights, for the block from `first` on.

    w *= (variance + x^2) ^ (half_powers / 2), with the mean square of the block's n weights as variance.
    """
    if not weighted:
        for i in range(first, first + n):
            store(w, i, splat(F(1)))
    if half_powers == 0:
        return
    variance = sum_of_squares(x, first, n) / F(n)
    for i in range(first, first + n):
        value = load(x, i)
        size = fused(value, value, variance)
        weight = load(w, i)
        if half_powers % 2 == 1:
            weight = weight * square_root(size)
        for _ in range(half_powers // 2):
            weight = weight * size
        store(w, i, weight)


@device
def limited(level: Floats, lowest: np.float32, highest: np.float32) -> Floats:
    """Levels limited to [lowest, highest]."""
    level = select(level < highest, level, splat(highest))
    return select(level > lowest, level, splat(lowest))


@device
def as_half(value: Floats) -> Floats:
    """The value rounded to float16; the largest where it is too large."""
    return half_value(half_bits(select(absolute(value) < F(65504), value, splat(F(65504)))))


@device
def reciprocal(value: Floats) -> Floats:
    """1 / value, and 0 for 0."""
    return select(value != F(0), F(1) / value, splat(F(0)))


@device
def lost_gain(sum_xx: Floats, sum_xq: Floats) -> Floats:
    """The factor g of stored weights q that makes <g q, x> = <x, x>, from the weighted sums of x * x and x * q.

    No more than 2 and no less than 1/2, for super-blocks that cannot be stored well anyhow.
    """
    gain = select(sum_xq > F(0), sum_xx / sum_xq, splat(F(1)))
    # A comparison with a NaN (of sums that overflowed) fails, which gives 1.
    return select((gain >= F(0.5)) & (gain <= F(2)), gain, splat(F(1)))
