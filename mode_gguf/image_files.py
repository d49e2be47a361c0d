"""Decoding of image files that users name, which may be damaged or made to do harm."""

import io
from pathlib import Path

from PIL import Image

from mode_gguf.errors import InputError
from mode_gguf.regular_files import check_regular

MAX_PIXELS = 2**26
"""Size limit of an image, which takes 200 MB decoded then; every model looks at far fewer pixels."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded; for some others Pillow starts other programs."""


def open_image_file(source: Path | bytes | Image.Image, name: str) -> Image.Image:
    """The image in RGB; `name` is what messages call it. Its size is checked before it is decoded.

    Raises:
        InputError: it cannot be read, or has more than `MAX_PIXELS`.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Path):
        check_regular(source, "picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{name}: {width} x {height} pixels, {MAX_PIXELS:,} at most are read; scale it down")
            return opened.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise dozens of kinds on damaged files
        raise InputError(f"{name}: cannot be read as an image ({', '.join(FORMATS)}): {error}") from error
