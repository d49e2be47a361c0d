"""Images in prompts: the arrays that a model is fed with, and the tokens that stand for them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mode_gguf.architectures.hparams import config
from mode_gguf.architectures.tensors import Array
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSize: TypeAlias = tuple[int, int]
"""Width and height in pixels."""


def scaled_size(size: ImageSize, max_pixels: int) -> ImageSize:
    """`size`, scaled down where its area is larger than `max_pixels`."""
    width, height = size
    scale = math.sqrt(max_pixels / (width * height))
    return size if scale >= 1 else (max(1, int(width * scale)), max(1, int(height * scale)))


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """An image that is to take its place in a prompt, and what its checkpoint prepares it with.

    Attributes:
        checkpoint: whose model is to see it.
        image: in RGB.
        processor: transformers' image processor; None for a family that needs none.
        tokenizer: transformers' tokenizer.
        image_token: id of the token that stands for a piece of an image.
        max_pixels: area that it is scaled down to, where the model's own limit is not lower.
    """

    checkpoint: Checkpoint
    image: "Image"
    processor: Any
    tokenizer: Any
    image_token: int
    max_pixels: int

    @property
    def scaled_image(self) -> "Image":
        """The image, no larger than `max_pixels`."""
        size = scaled_size(self.image.size, self.max_pixels)
        return self.image if size == self.image.size else self.image.resize(size)


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image as the model is fed with it.

    Attributes:
        tokens: ids in the place of the template's placeholder: image tokens, and marks that the template has not set.
        arguments: of the model's forward, by name; `pixel_values` and what tells their layout.
    """

    tokens: Sequence[int]
    arguments: Mapping[str, Array]


def joined_arguments(placed: Sequence[PlacedImage], origin: str) -> Mapping[str, Array]:
    """The arguments of a forward with all of these images: their arrays one after the other.

    Images of different sizes that are not cut into patches are padded with zeros at their ends; `image_sizes` tells
    the model what of them is an image.

    Raises:
        InputError: the arrays are of shapes that cannot be joined.
    """
    if len(placed) == 1:
        return placed[0].arguments
    joined = {}
    for name in placed[0].arguments:
        arrays = [one.arguments[name] for one in placed]
        if name == "pixel_values" and "image_sizes" in placed[0].arguments:
            arrays = _padded(arrays)
        if len({(array.dtype, array.shape[1:]) for array in arrays}) > 1 or not arrays[0].ndim:
            raise InputError(
                f"{origin}: this model's pictures of different sizes do not go into one sample; give it one picture"
            )
        joined[name] = np.concatenate(arrays)
    return joined


def _padded(arrays: Sequence[Array]) -> list[Array]:
    shape = np.max([array.shape[1:] for array in arrays], axis=0)
    return [
        np.pad(array, [(0, 0), *((0, most - n) for most, n in zip(shape, array.shape[1:], strict=True))])
        for array in arrays
    ]


def image_token_id(checkpoint: Checkpoint) -> int:
    """`image_token_id` of config.json."""
    if "image_token_id" not in checkpoint.config:
        raise InputError(f"{checkpoint.path}: config.json names no image_token_id; not a vision-language model")
    return config(checkpoint).int("image_token_id")
