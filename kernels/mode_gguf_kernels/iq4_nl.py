"""IQ4_NL: weight = d * VALUES[level], levels of 4 bits, one d per 32 weights; values (see `levels`) are not even.

A block of 32 weights, `block_iq4_nl` of ggml, is laid out as in `q4_0`. The search is ggml's `quantize_row_iq4_nl_impl`
(MIT licence, The ggml authors), which weighs errors with x^2 where there is no importance.
"""

from itertools import pairwise

import numpy as np

from mode_gguf_kernels.bits import after_half, clear, pack_bits, unpack_bits, without_half
from mode_gguf_kernels.blocks import BLOCK_SIZE, pack_blocks, part, unpack_blocks
from mode_gguf_kernels.compilation import device, kernel
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.levels import IQ4_NL_VALUES as VALUES
from mode_gguf_kernels.refine import Search, as_half, error_weights, lost_gain, reciprocal
from mode_gguf_kernels.search import GROUP_MAX_EPS, TOGETHER, F, signed_extreme, sum_of_squares, weigh_by_size
from mode_gguf_kernels.simd import Floats, Ints, Tile, fused, load, negative, select, splat, store
from mode_gguf_kernels.tiles import int_tile, staging_words

BLOCK_BYTES = 2 + 32 // 2
_PAYLOAD = 4  # 32-bit words after d


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

SEARCHES: dict[str, Search] = {
    "fast": Search(7, 0, 0, 2),
    "default": Search(15, 0, 0, 4),
    "max": Search(41, 0, 0, 10),
}

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
def pack_tile(x: Tile, w: Tile, _variances: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
    """Pack a lane's blocks; with `weighted`, w holds the importance (it is overwritten)."""
    level = int_tile(BLOCK_SIZE)
    for k in range(TOGETHER):
        first = BLOCK_SIZE * k
        if weighted:
            weigh_by_size(x, w, first, BLOCK_SIZE, sum_of_squares(x, first, BLOCK_SIZE) * F(2 / 32))
        else:
            for i in range(first, first + BLOCK_SIZE):
                store(w, i, load(x, i) * load(x, i))
        d = _scale(x, w, first, _TRIES, F(1))
        inverse = select(d != F(0), F(1) / d, F(0))
        for i in range(BLOCK_SIZE):
            store(level, i, nearest_level(inverse * load(x, first + i)))
        _lay_out(level, half_bits(d), part(words, k, staging_words(BLOCK_BYTES)))


@device
def refine_tile(x: Tile, w: Tile, _variances: Tile, weighted: bool, search: Search, words: Tile) -> None:
    """Pack a lane's blocks with less error; w is overwritten."""
    level = int_tile(BLOCK_SIZE)
    zero = splat(F(0))
    tries = search.encoders // 2
    for k in range(TOGETHER):
        first, last = BLOCK_SIZE * k, BLOCK_SIZE * (k + 1)
        error_weights(x, w, first, BLOCK_SIZE, weighted, search.half_powers)
        d = as_half(_scale(x, w, first, tries, F(8) / F(tries)))
        best, best_d = splat(F(np.inf)), d
        for _ in range(search.rounds):
            inverse = reciprocal(d)
            total, sum_qx, sum_q2 = zero, zero, zero
            for i in range(first, last):
                value, weight = load(x, i), load(w, i)
                q = nearest_value(inverse * value)
                error = fused(d, q, negative(value))
                total = fused(weight * error, error, total)
                sum_qx = fused(weight * q, value, sum_qx)
                sum_q2 = fused(weight * q, q, sum_q2)
            better = total < best
            best, best_d = select(better, total, best), select(better, d, best_d)
            d = as_half(select(sum_q2 > F(0), sum_qx / sum_q2, d))
        inverse = reciprocal(best_d)
        sum_xx, sum_xq = zero, zero
        for i in range(first, last):
            value = load(x, i)
            scaled = inverse * value
            store(level, i - first, nearest_level(scaled))
            weighted_value = load(w, i) * value
            sum_xx = fused(weighted_value, value, sum_xx)
            sum_xq = fused(weighted_value, best_d * nearest_value(scaled), sum_xq)
        if search.unbiased:
            best_d = as_half(best_d * lost_gain(sum_xx, sum_xq))
        _lay_out(level, half_bits(best_d), part(words, k, staging_words(BLOCK_BYTES)))


@device
def _lay_out(level: Tile, d: Ints, words: Tile) -> None:
    """Write a block: levels and the float16 bits of d."""
    payload = int_tile(_PAYLOAD)
    pack_bits(level, BLOCK_SIZE, 0, 4, 16, payload, 0)
    after_half(d, payload, _PAYLOAD, words)


@device
def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
    """The inverse of `pack_tile`, for one block per lane."""
    payload = int_tile(_PAYLOAD)
    without_half(words, _PAYLOAD, payload)
    clear(level, BLOCK_SIZE)
    unpack_bits(payload, 0, BLOCK_SIZE, 0, 4, 16, level)
    d = half_value(load(words, 0))
    for i in range(BLOCK_SIZE):
        value = splat(_VALUES[15])
        for j in range(15):
            value = select(load(level, i) == j, splat(_VALUES[j]), value)
        store(x, i, d * value)


@kernel
def pack(source: np.ndarray, kind: int, importance: np.ndarray, blocks_per_row: int, packed: np.ndarray) -> int:
    """Pack a whole matrix as ggml does; see `registry.Kernels`."""
    return pack_blocks(pack_tile, (), False, BLOCK_BYTES, source, kind, importance, blocks_per_row, packed)


@kernel
def pack_refined(
    source: np.ndarray, kind: int, importance: np.ndarray, blocks_per_row: int, search: Search, packed: np.ndarray
) -> int:
    """Pack a whole matrix with less error; see `registry.Kernels`."""
    return pack_blocks(refine_tile, search, False, BLOCK_BYTES, source, kind, importance, blocks_per_row, packed)


@kernel
def unpack(packed: np.ndarray, weights: np.ndarray) -> None:
    """Unpack a whole matrix; see `registry.Kernels`."""
    unpack_blocks(unpack_tile, BLOCK_BYTES, packed, weights)
