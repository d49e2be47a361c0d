"""IQ4_NL: weight = d * VALUES[level], levels of 4 bits, one d per 32 weights; values are not evenly spaced.

A block of 32 weights, `block_iq4_nl` of ggml, is laid out as in `q4_0`. The search is ggml's `quantize_row_iq4_nl_impl`
(MIT licence, The ggml authors), which weighs errors with x^2 where there is no importance.
"""

from itertools import pairwise

import numpy as np

from mode_gguf_kernels.block_scale import refine_scale
from mode_gguf_kernels.blocks import BLOCK_SIZE, SEARCHES, block_kernels
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.levels import Field, Layout
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.search import GROUP_MAX_EPS, INTERLEAVED, F, signed_extreme, sum_of_squares, weigh_by_size
from mode_gguf_kernels.simd import Floats, Ints, Tile, load, negative, select, splat, store

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""ggml's `kvalues_iq4nl`."""

LAYOUT = Layout(
    32, (Field(first=2, shift=0, n_bits=4, stride=16, weights=32),), tuple(value - VALUES[0] for value in VALUES)
)


def _border(low: int, high: int) -> np.float32:
    """The least float32 that `best_index_int8` rounds up: where its differences, rounded, are no longer in order."""
    least, most = (np.float32(value) for value in (low, high))
    ends = [int(np.int64(_ordered(value))) for value in (least, most)]
    while ends[0] < ends[1]:
        middle = (ends[0] + ends[1]) // 2
        value = _from_ordered(middle)
        if value - least < most - value:
            ends[0] = middle + 1
        else:
            ends[1] = middle
    return _from_ordered(ends[0])


def _ordered(value: np.float32) -> int:
    """float32 numbers as integers of the same order."""
    bits = int(value.view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _from_ordered(number: int) -> np.float32:
    bits = number if number >= 0 else -number | 0x80000000
    return np.uint32(bits).view(np.float32)


_VALUES = tuple(F(value) for value in VALUES)
_BORDERS = tuple(_border(low, high) for low, high in pairwise(VALUES))

_TRIES = 7


@device
def nearest_value(scaled: Floats) -> Floats:
    """VALUES[best_index_int8(scaled)]: the value nearest to `scaled`, the last one for NaN."""
    value = splat(_VALUES[15])
    for i in range(14, -1, -1):
        value = select(scaled < _BORDERS[i], splat(_VALUES[i]), value)
    return value


@device
def nearest_level(scaled: Floats) -> Ints:
    """best_index_int8(scaled): the index of that value."""
    level = splat(15)
    for i in range(14, -1, -1):
        level = select(scaled < _BORDERS[i], splat(i), level)
    return level


@device
def _sums(x: Tile, w: Tile, first: int, inverse: Floats) -> tuple[Floats, Floats]:
    """Sums of w q x and w q^2 for the values q nearest to inverse * x."""
    sum_qx, sum_q2 = splat(F(0)), splat(F(0))
    for i in range(first, first + BLOCK_SIZE):
        value = load(x, i)
        q = nearest_value(inverse * value)
        weighted = load(w, i) * q
        sum_qx = sum_qx + weighted * value
        sum_q2 = sum_q2 + weighted * q
    return sum_qx, sum_q2


@device
def _scale(x: Tile, w: Tile, first: int, tries: int, step: np.float32) -> Floats:
    """ggml's scale: the best of the least squares fits to the levels of 2 + 2 tries encoders; 0 for no weights."""
    magnitude, extreme = signed_extreme(x, first, BLOCK_SIZE)
    zero = splat(F(0))
    d = negative(extreme) / F(VALUES[0])
    sum_qx, sum_q2 = _sums(x, w, first, F(1) / d)
    d = select(sum_q2 > F(0), sum_qx / sum_q2, zero)
    best = d * sum_qx
    for k in range(-tries, tries + 1):
        sum_qx, sum_q2 = _sums(x, w, first, (F(k) * step + F(VALUES[0])) / extreme)
        better = (sum_q2 > F(0)) & (sum_qx * sum_qx > best * sum_q2)
        candidate = sum_qx / sum_q2
        d = select(better, candidate, d)
        best = select(better, candidate * sum_qx, best)
    return select(magnitude < GROUP_MAX_EPS, zero, d)


@device
def encode(x: Tile, w: Tile, _mean_squares: Tile, weighted: bool, level: Tile, halves: Tile) -> None:
    """Levels and d of a lane's blocks as ggml chooses them; w is overwritten."""
    for k in range(INTERLEAVED):
        first, last = BLOCK_SIZE * k, BLOCK_SIZE * (k + 1)
        if weighted:
            weigh_by_size(x, w, first, BLOCK_SIZE, sum_of_squares(x, first, BLOCK_SIZE) * F(2 / 32))
        else:
            for i in range(first, last):
                store(w, i, load(x, i) * load(x, i))
        d = _scale(x, w, first, _TRIES, F(1))
        inverse = select(d != F(0), F(1) / d, F(0))
        for i in range(first, last):
            store(level, i, nearest_level(inverse * load(x, i)))
        store(halves, k, half_bits(d))


@device
def start_scale(x: Tile, w: Tile, first: int, encoders: int) -> Floats:
    """The scale that refining starts from."""
    tries = encoders // 2
    return _scale(x, w, first, tries, F(8) / F(tries))


@device
def refine(x: Tile, w: Tile, k: int, weighted: bool, search: Search, level: Tile) -> Ints:
    """Levels of block k of less error; returns the float16 bits of d. w is overwritten."""
    return refine_scale(start_scale, nearest_value, nearest_level, x, w, k, weighted, search, level)


@device
def decode(half: Ints, level: Tile, x: Tile) -> None:
    """Weights of the levels 0..31 of a tile."""
    d = half_value(half)
    for i in range(BLOCK_SIZE):
        value = splat(_VALUES[15])
        for j in range(15):
            value = select(load(level, i) == j, splat(_VALUES[j]), value)
        store(x, i, d * value)


KERNELS = block_kernels("IQ4_NL", LAYOUT, encode, refine, decode, SEARCHES, uses_row_squares=False)
