"""Pictures that show how alike two implementations see."""

import numpy as np
from PIL import Image


def waves(size: tuple[int, int]) -> Image.Image:
    """Smooth colours."""
    x, y = np.meshgrid(*(np.arange(n) / 16 for n in size))
    colours = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    return Image.fromarray((127.5 + 120 * colours).astype(np.uint8))
