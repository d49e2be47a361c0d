"""Calibration counts; its sums are compared with the whole model's in `families`."""

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.observers import Observer
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
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


def test_sums_and_counts_add_up_over_samples(
    checkpoint: Checkpoint, statistics: CalibrationStatistics, samples: list[Sample]
) -> None:
    first, second = (calibrate(checkpoint, part, device="cpu") for part in (samples[:2], samples[2:]))
    assert SampleCounts(*np.add(astuple(first.samples), astuple(second.samples))) == statistics.samples
    assert {*first.datasets, *second.datasets} == set(statistics.datasets)
    for name, array in statistics.arrays.items():
        np.testing.assert_allclose(first.arrays[name] + second.arrays[name], array, rtol=1e-9)


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
