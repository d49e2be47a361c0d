"""One out-of-range access per SIMD operation on memory, each of which must raise IndexError; run by `test_bounds`.

    NUMBA_BOUNDSCHECK=1 python -m tests.kernels.bounds

Prints the name of each operation that was caught. Without the setting it would corrupt memory.
"""

from collections.abc import Callable

import numpy as np

from mode_gguf_kernels.compilation import device
from mode_gguf_kernels.simd import LANES, copy_bytes, gather, load, scatter, splat, store

ITEMS = 16
"""Items of the tile, and of each row it is gathered from."""


@device
def load_from(tile: np.ndarray, item: int) -> None:
    store(tile, 0, load(tile, item))


@device
def store_to(tile: np.ndarray, item: int) -> None:
    store(tile, item, splat(1))


@device
def gather_from(rows: np.ndarray, starts: np.ndarray, column: int, tile: np.ndarray, item: int) -> None:
    gather(rows, starts, column, tile, item)


@device
def scatter_to(tile: np.ndarray, item: int, rows: np.ndarray, starts: np.ndarray, column: int) -> None:
    scatter(tile, item, rows, starts, column)


@device
def copy_from_to(source: np.ndarray, first: int, target: np.ndarray, target_first: int, count: int) -> None:
    copy_bytes(source, first, target, target_first, count)


def accesses() -> dict[str, tuple[Callable[..., None], tuple[object, ...], list[tuple[object, ...]]]]:
    """Per operation: the compiled function, arguments that are just in range, and some just out of range."""
    tile, rows = np.zeros(ITEMS * LANES, np.int32), np.zeros(ITEMS * LANES, np.int32)
    starts = np.arange(LANES) * ITEMS
    few = starts[:-1].copy()
    words, some_bytes = np.zeros(4, np.int32), np.zeros(20, np.uint8)
    return {
        "load": (load_from, (tile, ITEMS - 1), [(tile, ITEMS), (tile, -1)]),
        "store": (store_to, (tile, ITEMS - 1), [(tile, ITEMS), (tile, -1)]),
        "gather": (
            gather_from,
            (rows, starts, 0, tile, 0),
            [
                (rows, starts, 1, tile, 0),
                (rows, starts, -1, tile, 0),
                (rows, starts, 0, tile, 1),
                (rows, few, 0, tile, 0),
            ],
        ),
        "scatter": (
            scatter_to,
            (tile, 0, rows, starts, 0),
            [
                (tile, 0, rows, starts, 1),
                (tile, 0, rows, starts, -1),
                (tile, 1, rows, starts, 0),
                (tile, 0, rows, few, 0),
            ],
        ),
        "copy_bytes": (
            copy_from_to,
            (words, 2, some_bytes, 6, 14),
            [(words, 3, some_bytes, 6, 14), (words, 2, some_bytes, 7, 14), (words, -1, some_bytes, 6, 14)],
        ),
    }


def main() -> None:
    for name, (function, allowed, refused) in accesses().items():
        function(*allowed)
        for arguments in refused:
            try:
                function(*arguments)
            except IndexError:
                continue
            raise SystemExit(f"{name}{arguments[1:]}: an IndexError expected, nothing was raised")
        print(name)


if __name__ == "__main__":
    main()
