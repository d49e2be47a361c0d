"""One calibration sample: a text, or a chat with or without pictures."""

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from mode_gguf.errors import InputError
from mode_gguf.image_files import ImageSource, open_image_file


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: `system`, `user` or `assistant`.
        pictures: of every picture in this turn the number of characters of `text` before it, ascending.
    """

    role: str
    text: str
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A text (`text` set) or a chat (`messages` set), the latter with or without pictures.

    Attributes:
        origin: file and line, or another name of the sample for messages.
        dataset: name of the data set, recorded in everything made from it.
        image: one picture, or several in the order of their places: files, what is in such files, or decoded. Where no
            message has a place for them, they come first in the first user's turn.
    """

    origin: str
    dataset: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    image: ImageSource | tuple[ImageSource, ...] | None = None

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All pictures, in the order of their places."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def has_image(self) -> bool:
        return bool(self.images)

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages, with a place for every picture."""
        if not self.images or any(message.pictures for message in self.messages):
            return self.messages
        first = next(number for number, message in enumerate(self.messages) if message.role == "user")
        placed = replace(self.messages[first], pictures=(0,) * len(self.images))
        return (*self.messages[:first], placed, *self.messages[first + 1 :])

    def open_images(self) -> list[Image.Image]:
        """The pictures, decoded, in RGB.

        Raises:
            InputError: one cannot be read as a picture, or is too large.
        """
        return [open_image_file(image, f"{self.origin}: image {_name(image)}") for image in self.images]

    def open_image(self) -> Image.Image:
        """The first picture, decoded, in RGB.

        Raises:
            InputError: the sample has no picture, or it cannot be read as one or is too large.
        """
        if not self.images:
            raise InputError(f"{self.origin}: sample has no image")
        return open_image_file(self.images[0], f"{self.origin}: image {_name(self.images[0])}")


def _name(image: ImageSource) -> str:
    if isinstance(image, bytes):
        return f"of {len(image):,} bytes"
    return str(image) if isinstance(image, Path) else "in memory"
