"""K-quants without mins: Q3_K and Q6_K, weight = d * scale * (level - highest), a signed scale per 16 weights."""

from collections.abc import Callable, Mapping
from typing import Any

from mode_gguf_kernels.bits import field_packer, field_unpacker
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.halves import half_value
from mode_gguf_kernels.levels import Field, Layout
from mode_gguf_kernels.matrix import QK_K, Kernels, TileFunctions, matrix_kernels
from mode_gguf_kernels.refine import Search, error_weights
from mode_gguf_kernels.refine_signed import refine_signed
from mode_gguf_kernels.simd import Ints, Tile, load, store, to_float
from mode_gguf_kernels.tiles import int_tile


@device
def sign_extended(byte: Ints) -> Ints:
    """The low eight bits of each lane as an int8."""
    return (byte << 24) >> 24


def signed_super_block_kernels(
    name: str,
    layout: Layout,
    codes: tuple[Field, ...],
    code_offset: int,
    encode: Callable[[Tile, Tile, bool, Tile, Tile], Ints],
    searches: Mapping[str, Search],
) -> Kernels:
    """The kernels of a type whose d, a float16, ends the block.

    Args:
        name: GGUF name.
        layout: where levels lie.
        codes: where the sixteen scales lie.
        code_offset: what is added to a scale before it is stored.
        encode: encode(x, w, weighted, code, level) chooses scales and levels of one super-block per lane as ggml does,
            levels offset by `highest`, and returns the float16 bits of d. w holds the importance if `weighted`, and
            may be overwritten.
        searches: for each effort.
    """
    highest = (layout.highest + 1) // 2
    highest_code = 1 << (sum(field.n_bits for field in codes) - 1)
    d_byte = layout.n_bytes + sum(field.n_bytes for field in codes)
    d_word = d_byte // 4
    pack_levels, unpack_levels = field_packer(layout.fields), field_unpacker(layout.fields)
    pack_codes, unpack_codes = field_packer(codes), field_unpacker(codes)

    @device
    def lay_out(code: Tile, level: Tile, d: Ints, words: Tile) -> None:
        for j in range(16):
            store(code, j, load(code, j) + code_offset)
        pack_codes(code, words)
        pack_levels(level, words)
        store(words, d_word, d)

    @device
    def pack_tile(x: Tile, w: Tile, _mean_squares: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
        code, level = int_tile(16), int_tile(QK_K)
        d = encode(x, w, weighted, code, level)
        lay_out(code, level, d, words)

    @device
    def refine_tile(x: Tile, w: Tile, _mean_squares: Tile, weighted: bool, search: Any, words: Tile) -> None:
        code, level = int_tile(16), int_tile(QK_K)
        error_weights(x, w, 0, QK_K, weighted, search.half_powers)
        d = refine_signed(x, w, highest, highest_code, search, code, level)
        lay_out(code, level, d, words)

    @device
    def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
        code = int_tile(16)
        unpack_codes(words, code)
        unpack_levels(words, level)
        d = half_value(load(words, d_word))
        for j in range(16):
            scale = d * to_float(sign_extended(load(code, j) - code_offset))
            for i in range(16 * j, 16 * j + 16):
                store(x, i, scale * to_float(load(level, i) - highest))

    tiles = TileFunctions(pack_tile, unpack_tile, refine_tile)
    return matrix_kernels(name, QK_K, d_byte + 2, tiles, searches, layout)
