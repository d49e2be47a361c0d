"""The choice of key tokens on its way through the stages, and what is said when calibration saw little."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mode_gguf import pipeline
from mode_gguf.allocation.units import CandidateTypes
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.forward.key_tokens import KeyTokens
from mode_gguf.quantization.types import QUANT_TYPES

SMALL = ("--image-samples", "2", "--text-samples", "2", "--preset", "paper", "--bpw", "4.0", "--no-validate", "--json")


def test_another_choice_of_key_tokens_is_measured_anew(pico: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run("convert", pico, "--out", tmp_path, *SMALL)
    first = CalibrationStatistics.load(tmp_path / "calibration.safetensors")
    again = json.loads(run("convert", pico, "--out", tmp_path, *SMALL, "--key-tokens", "all", "--restart"))
    assert min(again["seconds"]["calibrate"], again["seconds"]["sensitivity"]) > 0
    second = CalibrationStatistics.load(tmp_path / "calibration.safetensors")
    assert (first.key_tokens, second.key_tokens) == (KeyTokens(), KeyTokens("all"))
    assert first.counts(0)[2].any()
    assert not second.counts(0)[2].any()


def test_little_calibration_and_another_choice_later_are_warned_of(
    pico: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, folder = pipeline.open_model(pico, tmp_path)
    chosen = pipeline.CalibrationOptions(
        image_samples=1, text_samples=0, key_tokens="random", key_ratio=0.1, device="cpu", seed=4
    )
    types = CandidateTypes((QUANT_TYPES["Q4_K"],), (QUANT_TYPES["Q4_K"],))
    with caplog.at_level(logging.WARNING, "mode_gguf"):
        pipeline.run_calibration(checkpoint, folder, chosen)
        said = caplog.messages.copy()
        caplog.clear()
        pipeline.run_sensitivity(checkpoint, folder, chosen, "block-mse", types)
        assert caplog.messages == []
        pipeline.run_sensitivity(
            checkpoint, folder, pipeline.CalibrationOptions(image_samples=1, text_samples=0), "block-mse", types
        )
    assert said[0].startswith("calibration saw no sample without an image")
    assert any("experts saw fewer than 32 text and key vision tokens" in line for line in said)
    assert caplog.messages == [
        "key tokens are chosen as in calibration (random, ratio 0.1, seed 4), not as asked for here "
        "(text-attention, ratio 0.2); to change them, calibrate again"
    ]
