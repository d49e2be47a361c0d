"""Whole matrices, a tile of blocks at a time: the loops that every K-quant shares.

A type's `pack_tile` and `unpack_tile` are handed in; Numba compiles a copy of the loop around each.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.simd import LANES, Tile
from mode_gguf_kernels.tiles import (
    float_tile,
    int_tile,
    load_blocks,
    load_importance,
    load_weights,
    staging_words,
    store_blocks,
    store_weights,
)

BLOCK_SIZE = 256
"""Weights in a super-block of any K-quant."""


@device
def pack_matrix(
    pack_tile: Callable[[Tile, Tile, bool, Any, Tile], None],
    search: Any,
    block_bytes: int,
    source: np.ndarray,
    kind: int,
    importance: np.ndarray,
    blocks_per_row: int,
    packed: np.ndarray,
) -> int:
    """Pack a whole matrix in super-blocks of `block_bytes`, `search` going to pack_tile; see `registry.Kernels`."""
    x, w = float_tile(BLOCK_SIZE), float_tile(BLOCK_SIZE)
    words, staging = int_tile(staging_words(block_bytes)), int_tile(staging_words(block_bytes))
    n_blocks = packed.size // block_bytes
    for first in range(0, n_blocks, LANES):
        if not load_weights(source, kind, first, n_blocks, BLOCK_SIZE, x):
            return first
        if importance.size > 0:
            load_importance(importance, blocks_per_row, first, n_blocks, BLOCK_SIZE, w)
        pack_tile(x, w, importance.size > 0, search, words)
        store_blocks(words, block_bytes, first, n_blocks, staging, packed)
    return n_blocks


@device
def unpack_matrix(
    unpack_tile: Callable[[Tile, Tile, Tile], None], block_bytes: int, packed: np.ndarray, weights: np.ndarray
) -> None:
    """Unpack a whole matrix; see `registry.Kernels`."""
    x, level = float_tile(BLOCK_SIZE), int_tile(BLOCK_SIZE)
    words, staging = int_tile(staging_words(block_bytes)), int_tile(staging_words(block_bytes))
    n_blocks = packed.size // block_bytes
    for first in range(0, n_blocks, LANES):
        load_blocks(packed, block_bytes, first, n_blocks, staging, words)
        unpack_tile(words, level, x)
        store_weights(x, first, n_blocks, BLOCK_SIZE, weights)
