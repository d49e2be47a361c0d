"""K-quants with mins: Q2_K, Q4_K, Q5_K, weight = d * scale * level - dmin * min, codes per sub-block.

A *code* is what a sub-block stores as its scale or its min, a whole number from 0 to `highest_code`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from mode_gguf_kernels.bits import field_packer, field_unpacker
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_bits, half_value
from mode_gguf_kernels.levels import Layout
from mode_gguf_kernels.matrix import QK_K, Kernels, TileFunctions, matrix_kernels
from mode_gguf_kernels.refine import Search, error_weights
from mode_gguf_kernels.refine_min import refine_with_min
from mode_gguf_kernels.search import (
    INTERLEAVED,
    F,
    encode_with_min,
    make_qkx_quants,
    make_qp_quants,
    scale_to_largest,
    sum_of,
    sum_of_squares,
    weigh_by_size,
)
from mode_gguf_kernels.simd import Tile, load, smaller, store, to_float
from mode_gguf_kernels.tiles import float_tile, int_tile

SEARCHES: dict[str, Search] = {
    "fast": Search(5, 1, 0, 1),
    "default": Search(9, 2, 1, 3),
    "max": Search(19, 5, 2, 8),
}


class Codes(NamedTuple):
    """Storage of a type's codes.

    Attributes:
        highest: the highest one.
        store: store(code, min_code, words) lays the codes of all sub-blocks out; what exceeds its bits spills as in C.
        load: load(words, code, min_code), the inverse.
        halves_word: the 32-bit word of d and dmin, both float16.
    """

    highest: int
    store: Callable[[Tile, Tile, Tile], None]
    load: Callable[[Tile, Tile, Tile], None]
    halves_word: int


class GgmlSearch(NamedTuple):
    """Settings of ggml's search for a type's scales and mins.

    Attributes:
        variance_factor: of the super-block's mean square in the error weights, with importance.
        weigh: weigh(x, w) sets the error weights where there is no importance.
        rmin, nstep, use_mad: arguments of `make_qkx2_quants`, used where there is no importance.
        limits_plain, limits_weighted: whether codes are limited to the highest one before they are stored, without
            importance and with it; ggml lets some that wrapped around spill into their neighbours.
    """

    variance_factor: float
    weigh: Callable[[Tile, Tile], None]
    rmin: float
    nstep: int
    use_mad: bool
    limits_plain: bool
    limits_weighted: bool


def min_super_block_kernels(name: str, block_bytes: int, layout: Layout, codes: Codes, ggml: GgmlSearch) -> Kernels:
    """The kernels of a type."""
    n, highest, highest_code = layout.width, layout.highest, codes.highest
    n_sub = QK_K // n
    store_codes, load_codes, halves_word = codes.store, codes.load, codes.halves_word
    pack_levels, unpack_levels = field_packer(layout.fields), field_unpacker(layout.fields)
    encode = _encoder(n, highest, codes, ggml)

    @device
    def pack_tile(x: Tile, w: Tile, _mean_squares: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
        level = int_tile(QK_K)
        encode(x, w, weighted, words, level)
        pack_levels(level, words)

    @device
    def refine_tile(x: Tile, w: Tile, _mean_squares: Tile, weighted: bool, search: Any, words: Tile) -> None:
        code, min_code, level = int_tile(n_sub), int_tile(n_sub), int_tile(QK_K)
        error_weights(x, w, 0, QK_K, weighted, search.half_powers)
        d, dmin = refine_with_min(x, w, n_sub, n, highest, highest_code, search, code, min_code, level)
        store(words, halves_word, d | (dmin << 16))
        store_codes(code, min_code, words)
        pack_levels(level, words)

    @device
    def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
        code, min_code = int_tile(n_sub), int_tile(n_sub)
        unpack_levels(words, level)
        load_codes(words, code, min_code)
        halves = load(words, halves_word)
        for j in range(n_sub):
            scale = half_value(halves) * to_float(load(code, j))
            low = half_value(halves >> 16) * to_float(load(min_code, j))
            for i in range(n * j, n * j + n):
                store(x, i, scale * to_float(load(level, i)) - low)

    tiles = TileFunctions(pack_tile, unpack_tile, refine_tile)
    return matrix_kernels(name, QK_K, block_bytes, tiles, SEARCHES, layout)


def _encoder(n: int, highest: int, codes: Codes, ggml: GgmlSearch) -> Callable[[Tile, Tile, bool, Tile, Tile], None]:
    """encode(x, w, weighted, words, level): levels of one super-block per lane as ggml chooses them, for sub-blocks of
    n weights and levels 0..highest; d, dmin and codes are written to `words`.

    With `weighted`, w holds the importance; it is overwritten.
    """
    n_sub, highest_code = QK_K // n, codes.highest
    store_codes, load_codes, halves_word = codes.store, codes.load, codes.halves_word
    weigh, nstep, use_mad = ggml.weigh, ggml.nstep, ggml.use_mad
    variance_factor, rmin = F(ggml.variance_factor), F(ggml.rmin)
    rdelta = F(0.1)
    limits_plain, limits_weighted = ggml.limits_plain, ggml.limits_weighted

    @device
    def encode(x: Tile, w: Tile, weighted: bool, words: Tile, level: Tile) -> None:
        scales, mins, sums = float_tile(n_sub), float_tile(n_sub), float_tile(n_sub)
        inverses, offsets = float_tile(n_sub), float_tile(n_sub)
        code, min_code = int_tile(n_sub), int_tile(n_sub)
        if weighted:
            weigh_by_size(x, w, 0, QK_K, variance_factor * sum_of_squares(x, 0, QK_K) / F(QK_K))
        else:
            weigh(x, w)
        found = scales, mins, inverses, offsets
        for j in range(0, n_sub, INTERLEAVED):
            if weighted:
                make_qkx_quants(x, w, n * j, n, highest, F(-0.9), F(0.05), 36, False, True, found, j)
            else:
                make_qkx_quants(x, w, n * j, n, highest, rmin, rdelta, nstep, use_mad, False, found, j)
        if weighted:
            for j in range(n_sub):
                store(sums, j, sum_of(w, n * j, n))
            d = half_bits(make_qp_quants(scales, sums, code, n_sub, highest_code))
            dmin = half_bits(make_qp_quants(mins, sums, min_code, n_sub, highest_code))
        else:
            d = half_bits(scale_to_largest(scales, code, n_sub, highest_code))
            dmin = half_bits(scale_to_largest(mins, min_code, n_sub, highest_code))
        if (limits_weighted and weighted) or (limits_plain and not weighted):
            for j in range(n_sub):
                store(code, j, smaller(load(code, j) & 255, highest_code))
                store(min_code, j, smaller(load(min_code, j) & 255, highest_code))
        store(words, halves_word, d | (dmin << 16))
        store_codes(code, min_code, words)
        load_codes(words, code, min_code)  # as they were stored: what spilled changed its neighbours
        for j in range(n_sub):
            scale = half_value(d) * to_float(load(code, j))
            low = half_value(dmin) * to_float(load(min_code, j))
            inverse, offset = load(inverses, j), load(offsets, j)
            encode_with_min(x, level, n * j, n, highest, scale, low, inverse, offset, weighted)

    return encode
