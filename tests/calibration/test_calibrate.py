"""What calibration counts and sums, against the same sums taken from the whole model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.observers import Observer
from mode_gguf.calibration.statistics import CalibrationStatistics, merge
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Sample
from mode_gguf.errors import InputError, UsageError
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.forward.key_tokens import KeyTokens

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


def test_key_tokens_are_a_fifth_of_each_image(
    checkpoint: Checkpoint, statistics: CalibrationStatistics, samples: list[Sample]
) -> None:
    builder = InputBuilder.open(checkpoint)
    n_vision = [int(builder.build(sample).is_vision.sum()) for sample in samples if sample.has_image]
    counts = statistics.arrays["blk.1.attn_q.weight.count"][:, 0]
    assert counts[1] == sum(max(1, int(0.2 * n)) for n in n_vision)
    assert counts[2] == sum(n_vision) - counts[1]


def test_sums_are_those_of_the_whole_model(
    checkpoint: Checkpoint, statistics: CalibrationStatistics, pico_module: Path, samples: list[Sample]
) -> None:
    """Summed over modalities: routing from the router's own output, inputs from plain module hooks."""
    model = AutoModelForImageTextToText.from_pretrained(pico_module, dtype=torch.float32).eval()
    layer = model.model.language_model.layers[1]
    seen: dict[str, list[torch.Tensor]] = {"q": [], "o": [], "x": [], "index": [], "head": []}
    layer.self_attn.q_proj.register_forward_hook(lambda m, a, o: seen["q"].append(a[0][0]))
    layer.self_attn.o_proj.register_forward_hook(lambda m, a, o: seen["o"].append(a[0][0]))
    layer.mlp.experts.register_forward_hook(lambda m, a, o: seen["x"].append(a[0]))
    layer.mlp.gate.register_forward_hook(lambda m, a, o: seen["index"].append(o[2]))
    model.lm_head.register_forward_hook(lambda m, a, o: seen["head"].append(a[0][0]))
    builder = InputBuilder.open(checkpoint)
    with torch.no_grad():
        for sample in samples:
            model(**builder.build(sample).model_arguments(CPU, torch.float32))
    joined = {name: torch.cat(parts).double() for name, parts in seen.items()}
    for name, activation in (
        ("q", "blk.1.attn_q.weight"),
        ("o", "blk.1.attn_output.weight"),
        ("head", "output.weight"),
    ):
        expected = joined[name].square().sum(0).numpy()
        np.testing.assert_allclose(statistics.arrays[f"{activation}.sum2"].sum(axis=(0, 1)), expected, rtol=1e-4)
    experts = layer.mlp.experts
    for expert in range(4):
        token = (joined["index"] == expert).any(-1)
        x = joined["x"][token].float()
        gate, up = torch.nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
        hidden = (torch.nn.functional.silu(gate) * up).double()
        assert statistics.counts(1)[:, expert].sum() == int(token.sum())
        for suffix, values in (("input", x.double()), ("hidden", hidden)):
            sum2 = statistics.arrays[f"blk.1.ffn_exps.{suffix}.sum2"][:, expert].sum(axis=0)
            np.testing.assert_allclose(sum2, values.square().sum(0).detach().numpy(), rtol=1e-3, atol=1e-6)


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


def test_every_dense_tensor_is_watched(checkpoint: Checkpoint, statistics: CalibrationStatistics) -> None:
    dense = [tensor for tensor in text_tensors(checkpoint) if tensor.role in (Role.DENSE, Role.OUTPUT)]
    assert {tensor.activation for tensor in dense} <= set(statistics.activations)
