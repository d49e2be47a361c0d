"""Loops over whole matrices, a tile of blocks at a time, and the kernels that are made of them for each type.

`_pack` and `_unpack` are templates: `matrix_kernels` compiles a copy of each for a type, with the names declared here
as that type's constants. A tile holds `BLOCKS_PER_LANE` blocks per lane side by side: item BLOCK_SIZE k + i is weight i
of a lane's block k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mode_gguf_kernels.compilation import device, kernel_of
from mode_gguf_kernels.levels import Layout
from mode_gguf_kernels.refine import Search
from mode_gguf_kernels.search import INTERLEAVED, F
from mode_gguf_kernels.simd import LANES, Tile, load, splat, store
from mode_gguf_kernels.tiles import (
    float_tile,
    int_tile,
    lane_starts,
    load_blocks,
    load_importance,
    load_run,
    load_weights,
    staging_words,
    store_blocks,
    store_weights,
)

QK_K = 256
"""Weights in a super-block of any K-quant; the name is ggml's."""

BLOCK_SIZE: Any = ...
BLOCK_BYTES: Any = ...
BLOCKS_PER_LANE: Any = ...
USES_IMPORTANCE: Any = ...
USES_ROW_SQUARES: Any = ...
pack_tile: Any = ...
unpack_tile: Any = ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One type's block and its compiled loops over all blocks of a matrix.

    Attributes:
        name: GGUF name.
        block_size: weights in a block; rows hold whole blocks.
        block_bytes: bytes a block is packed into.
        pack: pack(source, source_dtype, importance, blocks_per_row, (), packed): `source` holds the matrix's bytes,
            `source_dtype` says of what (`tiles.FLOAT32`, ...), `importance` is empty for none. Returns the number of
            blocks; or the first block of a run of `simd.LANES` blocks among which one holds a value that is not finite.
        unpack: unpack(packed, weights), both flat.
        pack_refined: like `pack`, with a `refine.Search` before `packed`; None for a type that leaves nothing to
            search for.
        searches: the `refine.Search` of each effort.
        layout: where levels lie in a block; None for a type that is not rounded with feedback.
    """

    name: str
    block_size: int
    block_bytes: int
    pack: Callable[[np.ndarray, int, np.ndarray, int, tuple[()], np.ndarray], int]
    unpack: Callable[[np.ndarray, np.ndarray], None]
    pack_refined: Callable[[np.ndarray, int, np.ndarray, int, Search, np.ndarray], int] | None
    searches: Mapping[str, Search]
    layout: Layout | None


class TileFunctions(NamedTuple):
    """A type's device functions for one tile.

    Attributes:
        pack: pack(x, w, mean_squares, weighted, search, words) writes the words of a lane's blocks as ggml packs them.
            w holds the importance if `weighted`, and may be overwritten; mean_squares that of the row each block is of,
            for types that ask for it; search is ().
        unpack: unpack(words, level, x), the inverse for one block per lane; `level` is scratch.
        refine: like `pack`, with less error; `search` is a `refine.Search`.
    """

    pack: Callable[[Tile, Tile, Tile, bool, tuple[()], Tile], None]
    unpack: Callable[[Tile, Tile, Tile], None]
    refine: Callable[[Tile, Tile, Tile, bool, Search, Tile], None] | None = None


def matrix_kernels(
    name: str,
    block_size: int,
    block_bytes: int,
    tiles: TileFunctions,
    searches: Mapping[str, Search],
    layout: Layout | None = None,
    uses_row_squares: bool = False,
) -> Kernels:
    """The kernels of a type; blocks of 32 weights that are searched are packed `search.INTERLEAVED` per lane."""
    common = {
        "BLOCK_SIZE": block_size,
        "BLOCK_BYTES": block_bytes,
        "BLOCKS_PER_LANE": INTERLEAVED if block_size == 32 and searches else 1,
        "USES_IMPORTANCE": bool(searches),
    }
    exact = {**common, "pack_tile": tiles.pack, "USES_ROW_SQUARES": uses_row_squares}
    refined = {**common, "pack_tile": tiles.refine, "USES_ROW_SQUARES": False}
    return Kernels(
        name,
        block_size,
        block_bytes,
        kernel_of(_pack, f"{name}.pack", exact),
        kernel_of(_unpack, f"{name}.unpack", {**common, "unpack_tile": tiles.unpack}),
        kernel_of(_pack, f"{name}.pack_refined", refined) if tiles.refine else None,
        searches,
        layout,
    )


def _pack(
    source: np.ndarray, source_dtype: int, importance: np.ndarray, blocks_per_row: int, search: Any, packed: np.ndarray
) -> int:
    """Pack a whole matrix; see `Kernels`."""
    weighted = USES_IMPORTANCE and importance.size > 0
    stride = staging_words(BLOCK_BYTES)
    x, w = float_tile(BLOCKS_PER_LANE * BLOCK_SIZE), float_tile(BLOCKS_PER_LANE * BLOCK_SIZE)
    squares = float_tile(BLOCKS_PER_LANE)
    words, staging = int_tile(BLOCKS_PER_LANE * stride), int_tile(stride)
    n_blocks: int = packed.size // BLOCK_BYTES
    if USES_ROW_SQUARES:
        n_rows = n_blocks // blocks_per_row if weighted else 0
        row_squares = mean_squares(source, source_dtype, n_rows, blocks_per_row * BLOCK_SIZE)
    for start in range(0, n_blocks, BLOCKS_PER_LANE * LANES):
        for k in range(BLOCKS_PER_LANE):
            first = start + k * LANES
            if not load_weights(source, source_dtype, first, n_blocks, BLOCK_SIZE, x, k * BLOCK_SIZE):
                return first
            if USES_IMPORTANCE and weighted:
                load_importance(importance, blocks_per_row, first, n_blocks, BLOCK_SIZE, w, k * BLOCK_SIZE)
            if USES_ROW_SQUARES and weighted:
                for lane in range(LANES):
                    squares[k * LANES + lane] = row_squares[min(first + lane, n_blocks - 1) // blocks_per_row]
        pack_tile(x, w, squares, weighted, search, words)
        for k in range(BLOCKS_PER_LANE):
            store_blocks(words, k * stride, BLOCK_BYTES, start + k * LANES, n_blocks, staging, packed)
    return n_blocks


def _unpack(packed: np.ndarray, weights: np.ndarray) -> None:
    """Unpack a whole matrix, a block per lane at a time; see `Kernels`."""
    x, level = float_tile(BLOCK_SIZE), int_tile(BLOCK_SIZE)
    words, staging = int_tile(staging_words(BLOCK_BYTES)), int_tile(staging_words(BLOCK_BYTES))
    n_blocks = packed.size // BLOCK_BYTES
    for first in range(0, n_blocks, LANES):
        load_blocks(packed, BLOCK_BYTES, first, n_blocks, staging, words)
        unpack_tile(words, level, x)
        store_weights(x, first, n_blocks, BLOCK_SIZE, weights)


@device
def block_items(tile: Tile, k: int, items: int) -> Tile:
    """The items of a lane's block k, of `items` per block."""
    return tile[k * items * LANES : (k + 1) * items * LANES]


@device
def mean_squares(source: np.ndarray, source_dtype: int, n_rows: int, n: int) -> np.ndarray:
    """The mean square of every row of n weights, summed in order; a row per lane."""
    result = np.empty(n_rows, np.float32)
    run, total = float_tile(16), float_tile(1)
    for first in range(0, n_rows, LANES):
        starts = lane_starts(first, n_rows, n)
        store(total, 0, splat(F(0)))
        for column in range(0, n, 16):
            load_run(source, source_dtype, starts, column, run, 0)
            summed = load(total, 0)
            for item in range(16):
                value = load(run, item)
                summed = summed + value * value
            store(total, 0, summed)
        for lane in range(min(LANES, n_rows - first)):
            result[first + lane] = total[lane] / F(n)
    return result
