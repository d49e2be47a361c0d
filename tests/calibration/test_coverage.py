"""Warnings of a calibration with gaps, and none of one without."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mode_gguf.artifacts import read_metadata
from mode_gguf.calibration.coverage import MIN_TOKENS_PER_EXPERT, calibration_warnings
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.forward.modality import TEXT_ATTENTION

SHOWN = SampleCounts(text_samples=10, image_samples=20, text_tokens=900, vision_tokens=600)


def statistics_of(*counts: np.ndarray) -> CalibrationStatistics:
    """Layers with these routed tokens (M, E)."""
    arrays: dict[str, np.ndarray] = {}
    for layer, count in enumerate(counts):
        arrays[f"blk.{layer}.ffn_exps.input.sum2"] = np.ones((*count.shape, 4))
        arrays[f"blk.{layer}.ffn_exps.input.count"] = count
    return CalibrationStatistics("m", "f", arrays, SHOWN, TEXT_ATTENTION, ("d",))


def enough(n_experts: int = 20) -> np.ndarray:
    """Text and key vision tokens make up the least there should be, together."""
    return np.repeat([[MIN_TOKENS_PER_EXPERT - 1], [1], [1]], n_experts, axis=1)


def test_nothing_is_said_where_nothing_is_missing() -> None:
    assert calibration_warnings(statistics_of(enough(), enough())) == []


def test_samples_of_one_kind_only() -> None:
    statistics = statistics_of(enough())

    def said(**counts: int) -> list[str]:
        return calibration_warnings(replace(statistics, samples=replace(SHOWN, **counts)))

    (no_image,) = said(image_samples=0, vision_tokens=0)
    assert no_image.startswith("calibration saw no image: ")
    (no_vision,) = said(vision_tokens=0)
    assert "no vision token in its 20 samples with an image" in no_vision
    (no_text,) = said(text_samples=0)
    assert no_text.startswith("calibration saw no sample without an image: ")


def test_rarely_routed_experts_are_counted_over_text_and_key_vision() -> None:
    one, two = enough(), enough()
    one[0, 3] -= 1
    one[2, 3] += 1000  # redundant vision tokens do not make up for it
    two[1, 5] += 1
    assert calibration_warnings(statistics_of(one)) == [], "1 of 20 is not above 5 %"
    one[0, 4] -= 1
    assert calibration_warnings(statistics_of(one, two)) == [], "2 of 40 are not, either"
    (warning,) = calibration_warnings(statistics_of(one))
    assert warning.startswith("10.0 % of the 20 experts saw fewer than 32 text and key vision tokens in 10 text and 20")
    assert warning.endswith("calibrate on more or more varied samples")


def test_a_handful_of_gaps_is_named_and_more_are_summed_up() -> None:
    gap = enough()
    gap[2, [4, 7]] = 0
    (named,) = calibration_warnings(statistics_of(enough(), gap))
    assert named == "layer 1: no redundant vision token reached experts 4, 7 of 20; the layer's mean stands in"
    both = gap.copy()
    both[0] += 1
    both[1, 4] = 0
    lines = calibration_warnings(statistics_of(*[gap] * 5, *[both] * 3, enough()))
    assert lines == [
        "no key vision token reached 3 of 180 experts, in 3 of 9 layers; the layer's mean stands in",
        "no redundant vision token reached 16 of 180 experts, in 8 of 9 layers; the layer's mean stands in",
    ]


def test_warnings_are_kept_with_the_statistics(tmp_path: Path) -> None:
    statistics = replace(statistics_of(enough()), samples=replace(SHOWN, text_samples=0))
    statistics.save(tmp_path / "c.safetensors")
    assert read_metadata(tmp_path / "c.safetensors")["warnings"] == calibration_warnings(statistics)
    loaded = CalibrationStatistics.load(tmp_path / "c.safetensors")
    assert calibration_warnings(loaded) == calibration_warnings(statistics)
