"""Tiles of an image, as llama.cpp cuts them for an `internvl` projector.

Not as the model's authors do: they choose the grid nearest in proportions and stretch the picture over it. llama.cpp
chooses the grid that keeps most of the picture's pixels, and leaves black what is over. Files are made for llama.cpp,
so calibration sees what it shows.
"""

import math

import numpy as np
from PIL import Image


def tiles(image: Image.Image, side: int, fewest: int, most: int) -> list[Image.Image]:
    """`image` as squares of `side` pixels: its tiles row by row, then the whole of it.

    Args:
        image: RGB.
        fewest: tiles, at least, of a picture that does not fit into one.
        most: tiles, without the whole.
    """
    whole = _resized(image, (side, side))
    if max(image.size) <= side:
        return [whole]
    columns, rows = tile_grid(image.size, side, fewest, most)
    canvas = _padded(image, (columns * side, rows * side))
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    return [*(canvas.crop(box) for box in boxes), whole]


def tile_count(size: tuple[int, int], side: int, fewest: int, most: int) -> int:
    """The number of `tiles` of a picture of `size`."""
    return 1 if max(size) <= side else 1 + math.prod(tile_grid(size, side, fewest, most))


def tile_grid(size: tuple[int, int], side: int, fewest: int, most: int) -> tuple[int, int]:
    """Columns and rows that keep most pixels of a picture of `size`, and of those that waste fewest."""
    best, kept, wasted = (1, 1), 0, math.inf
    for columns in range(fewest, most + 1):
        for rows in range(max(-(-fewest // columns), fewest), min(most // columns, most) + 1):
            width, height = columns * side, rows * side
            scale = _scale(size, (width, height))
            area = int(np.float32(size[0]) * scale) * int(np.float32(size[1]) * scale)
            now_kept = min(area, size[0] * size[1])
            now_wasted = width * height - now_kept
            if now_kept > kept or (now_kept == kept and now_wasted < wasted):
                best, kept, wasted = (columns, rows), now_kept, now_wasted
    return best


def _scale(size: tuple[int, int], into: tuple[int, int]) -> np.float32:
    """The scale that fits `size` into `into`; in single precision, as where it decides about a pixel."""
    return np.float32(min(np.float32(into[0]) / np.float32(size[0]), np.float32(into[1]) / np.float32(size[1])))


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` as large as it fits into `size`, in the middle of black."""
    if image.size == size:
        return image
    scale = _scale(image.size, size)
    width, height = (min(math.ceil(np.float32(n) * scale), limit) for n, limit in zip(image.size, size, strict=True))
    canvas = Image.new("RGB", size)
    canvas.paste(_resized(image, (width, height)), ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Rows first, then columns, rounded in between: Pillow itself takes the order that is less work."""
    across = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return across.resize(size, Image.Resampling.BICUBIC)
