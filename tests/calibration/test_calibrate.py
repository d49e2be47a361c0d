"""Calibration counts; its sums are compared with the whole model's in `families`."""

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mode_gguf.calibration.calibrate import calibrate, calibrate_and_probe
from mode_gguf.calibration.observers import Observer
from mode_gguf.calibration.probe_prompts import SCORED, probe_prompts
from mode_gguf.calibration.statistics import CalibrationStatistics, SampleCounts
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.probes import LISTED
from mode_gguf.validation.divergence import compare

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


def test_probes_count_in_no_statistics(
    checkpoint: Checkpoint, statistics: CalibrationStatistics, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: a file is the same whether there are probes or not."""
    monkeypatch.setattr("mode_gguf.calibration.calibrate.probe_prompts", lambda builder, with_picture: iter(()))
    monkeypatch.setattr("mode_gguf.calibration.calibrate.probes_of", lambda *arguments: None)
    without = calibrate(checkpoint, samples, device="cpu")
    assert replace(without, arrays={}) == replace(statistics, arrays={})
    assert set(without.arrays) == set(statistics.arrays)
    for name, array in statistics.arrays.items():
        np.testing.assert_array_equal(without.arrays[name], array)


def test_probes_are_what_the_whole_model_predicts(checkpoint: Checkpoint, samples: list[Sample]) -> None:
    """Run beside the samples, layer by layer, and only where their logits are asked for."""
    _, probes = calibrate_and_probe(checkpoint, samples[:1], device="cpu")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.path, dtype="float32").eval()
    for prompt, probe in zip(
        probe_prompts(InputBuilder.open(checkpoint), with_picture=True), probes.probes, strict=True
    ):
        with torch.no_grad():
            logits = model(**prompt.inputs.model_arguments(CPU, torch.float32)).logits[0, -SCORED:]
        assert probe.tokens == tuple(prompt.inputs.input_ids.tolist())
        assert probe.distributions.rows.shape == logits.shape
        np.testing.assert_allclose(probe.distributions.rows, logits.log_softmax(-1).numpy(), atol=2e-4)


def test_a_template_that_takes_no_pictures_costs_one_probe(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    builder = InputBuilder.open(checkpoint)
    builder.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.content is string else '' }}{% endfor %}"
    )
    names = [prompt.name for prompt in probe_prompts(builder, with_picture=True)]
    assert names == ["prose", "code", "numbers and signs", "chat"]
    assert "the exported file will not be compared with transformers on a probe picture: " in caplog.text


def test_likeliest_tokens_of_a_large_vocabulary(checkpoint: Checkpoint) -> None:
    prompt = next(probe_prompts(InputBuilder.open(checkpoint), with_picture=False))
    logits = torch.arange(2 * 10000.0).reshape(2, 10000) / 1000
    probe = prompt.predicted(logits)
    rows = probe.distributions.rows
    assert (~np.isnan(rows)).sum(axis=1).tolist() == [LISTED, LISTED]
    np.testing.assert_allclose(rows[:, -LISTED:], logits.log_softmax(-1)[:, -LISTED:].numpy(), rtol=1e-6)
    scores = compare(rows, logits.numpy(), [9999, 9999])
    assert scores.kl.max() < 1e-4
    assert compare(rows, logits.flip(1).numpy(), [9999, 9999]).kl.min() > 1
