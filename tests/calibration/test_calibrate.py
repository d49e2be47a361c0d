"""What calibration counts; its sums are compared with the whole model's in `families`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.key_tokens import KeyTokens
from mode_gguf.calibration.observers import Observer
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.statistics import CalibrationStatistics, merge
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError, UsageError

CPU = torch.device("cpu")
TOP_K = 2


@pytest.fixture(scope="module")
def checkpoint(pico: Path) -> Checkpoint:
    return Checkpoint.open(pico)


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, samples: list[Sample]) -> CalibrationStatistics:
    return calibrate(checkpoint, samples, device="cpu")


def test_counts_add_up_to_tokens_times_top_k(statistics: CalibrationStatistics) -> None:
    shown = statistics.samples
    assert (shown.text_samples, shown.image_samples) == (2, 3)
    for layer in statistics.moe_layers:
        counts = statistics.counts(layer)
        assert counts[0].sum() == shown.text_tokens * TOP_K
        assert counts[1:].sum() == shown.vision_tokens * TOP_K
        weight = statistics.arrays[f"blk.{layer}.ffn_exps.weight"]
        np.testing.assert_allclose(weight.sum(), shown.text_tokens + shown.vision_tokens, rtol=1e-6)
        assert (statistics.arrays[f"blk.{layer}.ffn_exps.weight2"] <= weight + 1e-9).all()


def test_save_and_load(statistics: CalibrationStatistics, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    statistics.save(path)
    loaded = CalibrationStatistics.load(path)
    assert replace(loaded, arrays={}) == replace(statistics, arrays={})
    assert loaded.datasets == ("tests", "more tests")
    assert set(loaded.arrays) == set(statistics.arrays)
    for name, array in statistics.arrays.items():
        assert loaded.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.arrays[name], array)


def test_merged_halves_equal_the_whole(
    checkpoint: Checkpoint, statistics: CalibrationStatistics, samples: list[Sample]
) -> None:
    halves = [calibrate(checkpoint, samples[:2], device="cpu"), calibrate(checkpoint, samples[2:], device="cpu")]
    both = merge(*halves)
    assert (both.samples, tuple(both.datasets)) == (statistics.samples, tuple(statistics.datasets))
    for name, array in statistics.arrays.items():
        np.testing.assert_allclose(both.arrays[name], array, rtol=1e-9)
        assert both.arrays[name].dtype == array.dtype


def test_merging_what_does_not_belong_together(statistics: CalibrationStatistics) -> None:
    with pytest.raises(InputError, match="different checkpoints"):
        merge(statistics, replace(statistics, fingerprint="other"))
    for other in (KeyTokens(ratio=0.5), KeyTokens("redundant")):
        with pytest.raises(InputError, match=f"by text-attention, ratio 0.2 and by {other} cannot be merged"):
            merge(statistics, replace(statistics, key_tokens=other))


def test_coverage_names_experts_never_routed(statistics: CalibrationStatistics) -> None:
    counts = statistics.counts(1).copy()
    counts[1, 2] = 0
    counts[2] = 0
    changed = replace(statistics, arrays={**statistics.arrays, "blk.1.ffn_exps.input.count": counts})
    layer = changed.coverage()[1]
    assert layer.layer == 1
    assert 2 in layer.never_routed["key_vision"]
    assert "redundant_vision" not in layer.never_routed


def test_another_file_is_not_statistics(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        CalibrationStatistics.load(tmp_path / "gone.safetensors")


def test_silent_capture_is_an_error(
    checkpoint: Checkpoint, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Observer, "_add_experts", lambda self, call, modality, layer: None)
    with pytest.raises(InputError, match=r"saw nothing of blk\.0\.ffn_exps\.hidden, blk\.0\.ffn_exps\.input"):
        calibrate(checkpoint, samples[:1], device="cpu")


def test_bad_options(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    with pytest.raises(UsageError, match="at least one sample"):
        calibrate(checkpoint, [], device="cpu")
