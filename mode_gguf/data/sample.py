"""One calibration sample: a text, or a chat about one image."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mode_gguf.errors import InputError
from mode_gguf.image_files import open_image_file


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; `role` is `system`, `user` or `assistant`."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A text (`text` set) or a chat (`messages` set), the latter with or without an image in its first user turn.

    Attributes:
        origin: file and line, or another name of the sample for messages.
        dataset: name of the data set, recorded in everything made from it.
        image: a file that is opened when needed, or an image in memory.
    """

    origin: str
    dataset: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    image: Path | Image.Image | None = None

    @property
    def has_image(self) -> bool:
        return self.image is not None

    def open_image(self) -> Image.Image:
        """The image, decoded, in RGB.

        Raises:
            InputError: the sample has no image, or its file cannot be read as one or is too large.
        """
        if self.image is None:
            raise InputError(f"{self.origin}: sample has no image")
        return open_image_file(self.image, f"{self.origin}: image {self.image}")
