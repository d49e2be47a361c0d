import numpy as np
import pytest
from PIL import Image

from mode_gguf.architectures.vision.internvl_tiles import tile_grid, tiles

SIDE = 56


def image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(56, 56), (10, 50)])
def test_a_small_image_is_one_tile(size: tuple[int, int]) -> None:
    (tile,) = tiles(image(*size), SIDE, 1, 12)
    assert tile.size == (SIDE, SIDE)
    if size == (SIDE, SIDE):
        assert tile.tobytes() == image(*size).tobytes()


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((57, 56), 12, (2, 1)),  # kept whole, in fewest tiles
        ((168, 112), 12, (3, 2)),
        ((100, 1000), 12, (1, 10)),
        ((1000, 1000), 12, (3, 3)),
        ((1000, 1000), 3, (1, 1)),  # of the grids that keep as much, the one that wastes nothing
    ],
)
def test_tile_grid(size: tuple[int, int], most: int, expected: tuple[int, int]) -> None:
    assert tile_grid(size, SIDE, 1, most) == expected


def test_tiles_are_cut_row_by_row_and_the_whole_comes_last() -> None:
    large = image(3 * SIDE, 2 * SIDE)
    cut = tiles(large, SIDE, 1, 12)
    assert len(cut) == 7
    pixels = np.asarray(large)
    for number, tile in enumerate(cut[:-1]):
        y, x = (SIDE * i for i in divmod(number, 3))
        np.testing.assert_array_equal(np.asarray(tile), pixels[y : y + SIDE, x : x + SIDE])
    across = large.resize((SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    assert cut[-1].tobytes() == across.resize((SIDE, SIDE), Image.Resampling.BICUBIC).tobytes()


def test_what_no_picture_covers_is_black() -> None:
    cut = tiles(Image.new("RGB", (57, 40), (255, 255, 255)), SIDE, 1, 12)
    canvas = np.concatenate([np.asarray(tile) for tile in cut[:-1]], axis=1)
    assert canvas.shape == (SIDE, 2 * SIDE, 3)
    lit = np.argwhere(canvas[..., 0] > 0)
    assert lit.min(axis=0).tolist() == [0, 16]
    assert lit.max(axis=0).tolist() == [55, 95]
