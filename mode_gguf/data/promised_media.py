"""Media that a row promises: keys and marks in its text that stand for what is not text."""

import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Final

from mode_gguf.errors import InputError

_IMAGE_MARK: Final = re.compile(
    r"(?:<\|vision_start\|>|<\|begin_of_image\|>|<start_of_image>|<img>)?"
    r"(?:<image>|<\|image\|>|<\|image_\d+\|>|<image[ _]?\d+>|<image_?(?:token|placeholder|here)>|\[IMG\]"
    r"|<\|media_pad\|>|(?:<\|image_(?:pad|placeholder)\|>)+|(?:<IMG_CONTEXT>)+|(?:<image_soft_token>)+)"
    r"(?:<\|vision_end\|>|<\|end_of_image\|>|<end_of_image>|</img>)?"
    r"|<start_of_image>|<\|begin_of_image\|>|<img>[^<\n]{0,300}</img>",
    re.IGNORECASE,
)
"""What data sets write where a picture belongs."""
_PERHAPS: Final = re.compile(r"<\|?(image|img|vision|begin|media|start)", re.IGNORECASE)
"""What is found fast, and must be there if a mark is that begins so."""
_OTHER_MARKS: Final = re.compile(
    r"<\|?(video|vid|audio|speech|sound|voice|point_?cloud|pdf)"
    r"([_ ]?(\d+|pad|token|bos|eos|start|end|placeholder|here|soft_token))?\|?>",
    re.IGNORECASE,
)
_NUMBER: Final = re.compile(r"\d+")
_PICTURE: Final = re.compile(r"(^|_)(image|img|pic|picture|photo|screenshot)s?($|_)")
_OTHER: Final = re.compile(
    r"(^|_)(video|audio|speech|wav|mp3|mp4|pdf|point_?cloud)s?($|_)"
    r"|^(media|multimedia|clip|sound|voice|frame)s?(_(path|file|url|data|list)s?)?$"
)
_WORDS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]+")
_SHOWN: Final = 40


class PromisedMediaError(InputError):
    """A row that promises media that is not loaded; such rows are passed over and counted by `kind`."""

    def __init__(self, kind: str, origin: str) -> None:
        super().__init__(f"{origin}: {kind}: this is not loaded, and without it the text would be about nothing")
        self.kind = kind
        self.origin = origin


def refuse_media_keys(row: Mapping[str, Any], origin: str, read: Sequence[str] = ("image", "images")) -> None:
    """Refuse a row with media under another key than those that are read; it may describe a picture under one of these.

    Raises:
        PromisedMediaError: names the key.
    """
    has_pictures = any(_is_given(row.get(key)) for key in read)
    for key, value in row.items():
        if key in read or not _is_given(value):
            continue
        words = _WORDS.sub("_", str(key)).lower()
        if _OTHER.search(words) or (not has_pictures and _PICTURE.search(words)):
            raise PromisedMediaError(f"key `{str(key)[:_SHOWN]}`", origin)


def _is_given(value: Any) -> bool:
    return not (value is None or value is False or (isinstance(value, Sized) and len(value) == 0))


def refuse_other_marks(text: str, origin: str) -> None:
    """Refuse a text that says that a video, a sound or their like belongs there.

    Raises:
        PromisedMediaError: names the mark.
    """
    found = _OTHER_MARKS.search(text)
    if found:
        raise PromisedMediaError(f"`{found[0]}` in the text", origin)


def image_marks(text: str) -> Iterator[tuple[int, str, int]]:
    """Marks that stand for pictures in a text: beginning, mark and end of each."""
    if not _PERHAPS.search(text) and "[img]" not in text.lower():
        return
    for found in _IMAGE_MARK.finditer(text):
        yield found.start(), found[0], found.end()


def refuse_unordered(marks: Sequence[str], origin: str) -> None:
    """Refuse marks with numbers, such as `<image 2>`, that do not count the pictures in their order.

    Raises:
        PromisedMediaError: they do not.
    """
    named = [_NUMBER.search(mark) for mark in marks if not mark.lower().startswith("<img>")]
    numbers = [int(found[0]) for found in named if found]
    if numbers and numbers not in ([*range(len(marks))], [*range(1, len(marks) + 1)]):
        raise PromisedMediaError("marks such as `<image 2>` that do not count the pictures in their order", origin)
