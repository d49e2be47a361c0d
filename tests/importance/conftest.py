"""One calibrated pico model the importance tests share."""

from pathlib import Path

import pytest

from mode_gguf.architectures import text_tensors
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.importance.imatrix import Importance, balanced_imatrix, importance_of
from tests.calibration.conftest import noise_image


@pytest.fixture(scope="session")
def checkpoint(pico: Path) -> Checkpoint:
    return Checkpoint.open(pico)


def answered_samples() -> list[Sample]:
    """Four texts and four answered questions: enough tokens for every expert, few enough for brute force."""
    texts = (
        "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
        "There are 3 shapes: a square, a circle and a triangle. Which one is green?",
        "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
        "It doesn't show text; it's a drawing that we have seen before, long ago.",
    )
    questions = ("What colour is the square?", "How many shapes are there?", "Describe it.", "Is there any text?")
    answers = ("The square is red, like the circle.", "There are 3 shapes.", "A drawing of boxes.", "No text at all.")
    return [Sample(f"text {i}", "tests", text=text) for i, text in enumerate(texts)] + [
        Sample(
            f"image {i}",
            "tests",
            messages=(Message("user", question), Message("assistant", answer)),
            image=noise_image(i, 128, 128),
        )
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """See `answered_samples`."""
    return answered_samples()


@pytest.fixture(scope="session")
def statistics(checkpoint: Checkpoint, samples: list[Sample]) -> CalibrationStatistics:
    return calibrate(checkpoint, samples, device="cpu")


@pytest.fixture(scope="session")
def importance(checkpoint: Checkpoint, statistics: CalibrationStatistics) -> Importance:
    return importance_of(balanced_imatrix(statistics, text_tensors(checkpoint)))
