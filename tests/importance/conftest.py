"""One calibrated pico model the importance tests share, and ways of measuring it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mode_gguf.architectures import text_tensors
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.forward.inputs import ModelInputs, model_inputs
from mode_gguf.importance.imatrix import Importance, balanced_imatrix, importance_of
from mode_gguf.importance.sensitivity import Sensitivity, measure_sensitivity
from mode_gguf.importance.sensitivity_settings import SensitivityRequest
from mode_gguf.options import ComputeOptions
from mode_gguf.quantization.types import QuantType
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
def inputs(checkpoint: Checkpoint, samples: list[Sample]) -> list[ModelInputs]:
    """A text and an answered question, so that both kinds of answer and all modalities are there."""
    return model_inputs(checkpoint, (samples[0], samples[-1]))


@pytest.fixture(scope="session")
def statistics(checkpoint: Checkpoint, samples: list[Sample]) -> CalibrationStatistics:
    return calibrate(checkpoint, samples, device="cpu")


@pytest.fixture(scope="session")
def importance(checkpoint: Checkpoint, statistics: CalibrationStatistics) -> Importance:
    return importance_of(balanced_imatrix(statistics, text_tensors(checkpoint)))


def measured_on_cpu(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    importance: Importance,
    statistics: CalibrationStatistics,
    types: Sequence[QuantType],
    **asked: Any,
) -> Sensitivity:
    """Sensitivity at `types`, those of experts and, unless `asked` names others, of all else."""
    request = SensitivityRequest(types, **{"dense_types": types, **asked})
    return measure_sensitivity(checkpoint, samples, importance, statistics, request, ComputeOptions(device="cpu"))
