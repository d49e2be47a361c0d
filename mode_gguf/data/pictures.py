"""Pictures as rows of data sets name them: paths, addresses, encoded bytes, and objects that hold one of these."""

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from PIL import Image

from mode_gguf.errors import InputError
from mode_gguf.image_files import ImageSource

_INSIDE: Final = ("bytes", "base64", "data", "image", "image_url", "url", "path", "source")
"""Keys of an object that may hold the picture, the first that does."""
_ENCODED: Final = ("bytes", "base64", "data")
_DEPTH: Final = 3
"""Objects inside each other, such as a part with an address in an object."""
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_SHOWN: Final = 80


def pictures_in(value: Any, origin: str, folder: Path | None) -> tuple[ImageSource, ...]:
    """The pictures of a value: none for null, one, or those of a list, nulls in it left out.

    A path relative to `folder` or absolute, an address (`file:` or `data:`), bytes, a PIL image, or an object that has
    one of these under `path`, `url`, `bytes`, `base64` or their like, as Hugging Face's and OpenAI's parts do.

    Args:
        origin: of the row, for messages.
        folder: None where there are no files beside the row, so that a path says nothing.

    Raises:
        InputError: a file that is not there, an address on the web, or no picture at all.
    """
    if value is None or (isinstance(value, str) and not value):
        return ()
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(_picture(one, origin, folder) for one in values if one is not None)


def _picture(value: Any, origin: str, folder: Path | None, depth: int = 0) -> ImageSource:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str):
        return _named(value, origin, folder)
    if isinstance(value, Mapping) and depth < _DEPTH:
        key = next((key for key in _INSIDE if value.get(key) is not None), None)
        if key in _ENCODED and isinstance(value[key], str) and not value[key].startswith("data:"):
            return _decoded(value[key], origin)
        if key is not None:
            return _picture(value[key], origin, folder, depth + 1)
    raise InputError(
        f"{origin}: `image` must be a path, an address, or an object with one of these, found {type(value).__name__}"
    )


def _named(value: str, origin: str, folder: Path | None) -> ImageSource:
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    found = None if _is_file(Path(value), folder) else _SCHEME.match(value)
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        head, comma, data = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InputError(f"{origin}: image {shown}: `data:image/TYPE;base64,...` expected")
        return _decoded(data, origin)
    if scheme == "file":
        value = unquote(re.sub(r"^file:(//(localhost)?(?=/))?", "", value, flags=re.IGNORECASE))
    elif scheme:
        raise InputError(
            f"{origin}: image {shown}: pictures are not fetched from addresses; download it and name its file"
        )
    if folder is None:
        raise InputError(f"{origin}: image {shown}: names a file, and pictures are expected in the rows themselves")
    path = folder / value
    if not _is_file(path, folder):
        there = "is no regular file" if _exists(path) else "does not exist"
        raise InputError(f"{origin}: image {path if len(value) <= _SHOWN else shown} {there}")
    return path


def _is_file(path: Path, folder: Path | None) -> bool:
    try:
        return folder is not None and (folder / path).is_file()
    except (OSError, ValueError):  # too long a name, characters that no name has
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _decoded(text: str, origin: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s+", "", unquote(text)), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{origin}: a picture's bytes are no base64 ({error})") from error
