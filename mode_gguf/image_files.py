"""Decoding of image files that users name, which may be damaged or made to do harm.

What comes out is what llama.cpp's reader (stb_image) shows the model, for calibration and validation alike: 16 bits per
channel are cut to the upper 8, transparency is dropped (it is black in a GIF), an animation is its first frame, and
pixels stay as they are stored, whatever the EXIF data say about which side is up.
"""

import io
import stat
import warnings
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from mode_gguf.errors import InputError

ImageSource: TypeAlias = Path | bytes | Image.Image
"""An image: its file, what is in such a file, or decoded."""

MAX_PIXELS: Final = 2**26
"""Size limit of an image, which takes 200 MB decoded then; every model looks at far fewer pixels."""
MAX_RATIO: Final = 200
"""Limit of one side to the other, which is that of Qwen's image processors."""
FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded; for some others Pillow starts other programs."""
_OF_LLAMA_CPP: Final = ("BMP", "GIF", "JPEG", "PNG")
"""Formats that llama.cpp's reader shows right: it takes the bytes of 16-bit PPM files in the wrong order."""
_SIXTEEN_BITS: Final = ("PNG", "PPM")
"""Formats whose pixels of mode `I` have 16 bits; others may hold any number."""


def open_image_file(source: ImageSource, name: str) -> Image.Image:
    """The image in RGB; `name` is what messages call it. Its size is checked before it is decoded.

    Raises:
        InputError: it cannot be read, is no regular file, has more than `MAX_PIXELS` or one side more than `MAX_RATIO`
            times the other, or holds numbers that say nothing about their range.
    """
    try:
        if isinstance(source, Image.Image):
            return _checked_rgb(source, name)
        if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):
            raise InputError(f"{name}: is no regular file; name a picture's file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, checked here, and about damage that does not matter
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
                return _checked_rgb(opened, name)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: cannot be read as an image ({', '.join(FORMATS)}); it is damaged or none") from error
    except Exception as error:  # Pillow's decoders raise dozens of kinds on damaged files
        raise InputError(f"{name}: cannot be read as an image ({', '.join(FORMATS)}): {error}") from error


def file_for_llama_cpp(path: Path, folder: Path) -> Path:
    """The picture's file if llama.cpp's programs can read it, or else one in `folder` with the same pixels.

    Raises:
        InputError: as `open_image_file`.
    """
    picture = open_image_file(path, str(path))
    try:
        with Image.open(path, formats=_OF_LLAMA_CPP):
            return path
    except UnidentifiedImageError:
        picture.save(folder / "picture.png")
        return folder / "picture.png"


def _checked_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if min(width, height) < 1:
        raise InputError(f"{name}: {width} x {height} pixels, at least one of both expected")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels, {MAX_PIXELS:,} at most are read; scale it down")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(
            f"{name}: {width} x {height} pixels, one side may be {MAX_RATIO} times the other at most; cut it"
        )
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image) >> 8)
    if image.mode in ("I", "F"):
        return _grey(_eight_bits(np.asarray(image), name, sixteen=image.format in _SIXTEEN_BITS))
    if image.format == "GIF":
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA")).convert("RGB")
    # With a transparent colour, by way of RGBA: straight to RGB Pillow warns.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _eight_bits(values: np.ndarray, name: str, *, sixteen: bool) -> np.ndarray:
    """Numbers of 32 bits as 8 bits; what white is follows from the largest: 1, of fractions, 255 or 65535.

    Raises:
        InputError: some are negative, larger than that, or not finite.
    """
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= 0xFFFF):
        raise InputError(f"{name}: its values go from {least:g} to {most:g}, 0 to 65535 expected; save it with 8 bits")
    if values.dtype.kind == "f" and most <= 1:
        fractions: np.ndarray = np.rint(values * 255)
        return fractions
    scaled: np.ndarray = values // 256 if sixteen or most > 0xFF else np.rint(values)
    return scaled


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
