"""Types of 32 weights to a block: 16 or 32 bits of scale (and min), then the levels."""

from collections.abc import Callable, Mapping
from typing import Any

from mode_gguf_kernels.bits import after_half, field_packer, field_unpacker, without_half
from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.levels import Layout
from mode_gguf_kernels.matrix import Kernels, TileFunctions, block_items, matrix_kernels
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.search import INTERLEAVED
from mode_gguf_kernels.simd import Ints, Tile, load, store
from mode_gguf_kernels.tiles import int_tile, staging_words

BLOCK_SIZE = 32

SEARCHES: dict[str, Search] = {
    "fast": Search(7, 0, 0, 2),
    "default": Search(15, 0, 0, 4),
    "max": Search(41, 0, 0, 10),
}
"""Search settings by effort, for most of the types."""


def block_kernels(
    name: str,
    layout: Layout,
    encode: Callable[[Tile, Tile, Tile, bool, Tile, Tile], None],
    refine: Callable[[Tile, Tile, int, bool, Search, Tile], Ints],
    decode: Callable[[Ints, Tile, Tile], None],
    searches: Mapping[str, Search],
    uses_row_squares: bool = True,
) -> Kernels:
    """The kernels of a type.

    Args:
        name: GGUF name.
        layout: where levels lie; what is before them, 2 or 4 bytes, is the block's float16 numbers, its *halves*.
        encode: encode(x, w, mean_squares, weighted, level, halves) chooses levels and halves of a lane's `INTERLEAVED`
            blocks as ggml does.
        refine: refine(x, w, k, weighted, search, level) chooses levels of block k with less error and returns its
            halves.
        decode: decode(halves, level, x) gives the weights of one block per lane.
        searches: the settings of `refine` by effort.
        uses_row_squares: whether `encode` reads mean_squares.
    """
    header_bytes = min(field.first for field in layout.fields)
    level_bytes = layout.n_bytes
    block_bytes = header_bytes + level_bytes
    starts_within_word = header_bytes == 2
    pack_levels = field_packer(layout.fields, header_bytes if starts_within_word else 0)
    unpack_levels = field_unpacker(layout.fields, header_bytes if starts_within_word else 0)
    level_words = level_bytes // 4

    @device
    def lay_out(level: Tile, halves: Ints, words: Tile) -> None:
        if starts_within_word:
            payload = int_tile(level_words)
            pack_levels(level, payload)
            after_half(halves, payload, level_words, words)
        else:
            store(words, 0, halves)
            pack_levels(level, words)

    @device
    def pack_tile(x: Tile, w: Tile, mean_squares: Tile, weighted: bool, _search: tuple[()], words: Tile) -> None:
        level, halves, stride = int_tile(INTERLEAVED * BLOCK_SIZE), int_tile(INTERLEAVED), staging_words(block_bytes)
        encode(x, w, mean_squares, weighted, level, halves)
        for k in range(INTERLEAVED):
            lay_out(block_items(level, k, BLOCK_SIZE), load(halves, k), block_items(words, k, stride))

    @device
    def refine_tile(x: Tile, w: Tile, _mean_squares: Tile, weighted: bool, search: Any, words: Tile) -> None:
        level, stride = int_tile(INTERLEAVED * BLOCK_SIZE), staging_words(block_bytes)
        for k in range(INTERLEAVED):
            halves = refine(x, w, k, weighted, search, level)
            lay_out(block_items(level, k, BLOCK_SIZE), halves, block_items(words, k, stride))

    @device
    def unpack_tile(words: Tile, level: Tile, x: Tile) -> None:
        if starts_within_word:
            payload = int_tile(level_words)
            without_half(words, level_words, payload)
            unpack_levels(payload, level)
        else:
            unpack_levels(words, level)
        decode(load(words, 0), level, x)

    tiles = TileFunctions(pack_tile, unpack_tile, refine_tile)
    return matrix_kernels(name, BLOCK_SIZE, block_bytes, tiles, searches, layout, uses_row_squares)
