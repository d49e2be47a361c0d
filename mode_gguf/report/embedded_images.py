"""Images embedded in the page as data URIs: heatmaps with a pixel per cell, and thumbnails of photographs."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mode_gguf.errors import InputError
from mode_gguf.image_files import open_image_file
from mode_gguf.report.colours import NEVER, ramp

THUMBNAIL = 320
"""Longest side in pixels: sharp at half of that on a phone."""
_LEVELS = 255  # of the ramp; one colour is left for cells without a value


def heatmap(positions: Sequence[Sequence[float]]) -> str:
    """A PNG with one pixel per value of `ramp`, 0 to 1; NaN has the colour of nothing at all.

    Browsers enlarge it, without smoothing where the style sheet says so: 48 x 128 cells take a few kilobytes.
    """
    values = np.asarray(positions, np.float64)
    levels = 1 + np.round(np.clip(np.nan_to_num(values), 0, 1) * (_LEVELS - 1)).astype(np.uint8)
    levels[np.isnan(values)] = 0
    image = Image.fromarray(levels, mode="P")
    colours = [NEVER, *(ramp(level / (_LEVELS - 1)) for level in range(_LEVELS))]
    image.putpalette([channel for colour in colours for channel in colour])
    return _uri(image, "PNG", optimize=True)


def thumbnail(path: Path) -> str | None:
    """Thumbnail of an image as a data URI; None where the file is gone or cannot be read."""
    try:
        image = open_image_file(path, str(path))
    except InputError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return _uri(image, "WEBP", quality=75)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
