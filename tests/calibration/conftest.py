"""Samples and models the calibration tests share."""

import numpy as np
import pytest
from PIL import Image

from mode_gguf.data.sample import Message, Sample


def noise_image(seed: int, width: int = 128, height: int = 96) -> Image.Image:
    """Coarse random patches: neighbouring vision tokens differ."""
    blocks = np.random.default_rng(seed).integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(16, axis=0).repeat(16, axis=1))


def calibration_samples() -> list[Sample]:
    """Two texts, two answered questions about an image, one that has no answer."""
    question, answer = Message("user", "What colour is the square?"), Message("assistant", "The square is red.")
    other = (Message("user", "How many shapes are there?"), Message("assistant", "There are 3 shapes: a square."))
    return [
        Sample("text 0", "tests", text="The quick brown fox jumps over the lazy dog. What is the colour?"),
        Sample("text 1", "tests", text="Describe the picture in one sentence, please. It doesn't show text."),
        Sample("image 0", "tests", messages=(question, answer), image=noise_image(0)),
        Sample("image 1", "tests", messages=other, image=noise_image(1, 96, 160)),
        Sample("image 2", "more tests", messages=(Message("user", "Describe the picture."),), image=noise_image(2)),
    ]


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """See `calibration_samples`."""
    return calibration_samples()
