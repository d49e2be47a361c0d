"""The choice of key tokens on its way through the stages, and what is said when calibration saw little."""

import json
import logging
from pathlib import Path

import pytest

from mode_gguf import pipeline
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.forward.modality import KeyTokens
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.options import CalibrationOptions, ComputeOptions
from tests.e2e.conftest import Run, samples, settings

SMALL = (*samples(2, 2), "--preset", "paper", "--bpw", "4.0", "--no-validate", "--json")


def test_another_choice_of_key_tokens_is_measured_anew(pico: Path, tmp_path: Path, run: Run) -> None:
    run("convert", pico, "--out", tmp_path, *SMALL)
    first = CalibrationStatistics.load(tmp_path / "calibration.safetensors")
    again = json.loads(
        run("convert", pico, "--out", tmp_path, *SMALL, *settings("calibration.key_tokens=all"), "--restart")
    )
    assert min(again["seconds"]["calibrate"], again["seconds"]["sensitivity"]) > 0
    second = CalibrationStatistics.load(tmp_path / "calibration.safetensors")
    assert (first.key_tokens, second.key_tokens) == (KeyTokens(), KeyTokens("all"))
    assert first.counts(0)[2].any()
    assert not second.counts(0)[2].any()


def test_little_calibration_is_warned_of(pico: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = pipeline.open_model(pico, tmp_path)
    chosen = CalibrationOptions(image_samples=1, text_samples=0, key_tokens="random", key_ratio=0.1, seed=4)
    with caplog.at_level(logging.WARNING, "mode_gguf"):
        run.ensure(pipeline.Calibrate(chosen, ComputeOptions(device="cpu")))
    assert caplog.messages[0].startswith("calibration saw no sample without an image")
    assert any("experts saw fewer than 32 text and key vision tokens" in line for line in caplog.messages)


def test_later_stages_take_key_tokens_and_samples_from_calibration(pico: Path, tmp_path: Path, run: Run) -> None:
    """Each command alone, told nothing: stages.json has what calibrate was told, and convert finds it right."""
    told = (*samples(2, 2), *settings("calibration.key_tokens=all", "calibration.seed=7"))
    few = settings("sensitivity.types=Q2_K,Q4_K", "sensitivity.dense_types=Q4_K")
    run("calibrate", pico, "--out", tmp_path, *told)
    run("sensitivity", pico, "--out", tmp_path, *few)
    run("unit-kl", pico, "--out", tmp_path, *settings("sensitivity.measured_samples=2"))
    stages = json.loads((tmp_path / "stages.json").read_text())
    for name in ("calibrate", "sensitivity", "unit-kl"):
        told_then = stages[name]["settings"]
        assert (told_then["key tokens"], told_then["seed"], told_then["image samples"]) == ("all", 7, 2), name
    table = SensitivityTable.load(tmp_path / "sensitivity.safetensors")
    assert table.seed == 7
    asked = (*few, *settings("plan.unit_kl=true", "sensitivity.measured_samples=2"))
    converted = run("convert", pico, "--out", tmp_path, "--bpw", "3.8", "--no-validate", "--json", *told, *asked)
    seconds = json.loads(converted)["seconds"]
    assert (seconds["calibrate"], seconds["sensitivity"], seconds["unit-kl"]) == (0, 0, 0)
