"""Calibration of a model with linear attention and shared experts, against the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.checkpoint import Checkpoint
from tests.calibration.test_streaming import assert_streamed_is_plain, build
from tests.families.pico.qwen3_5_moe import EXPERTS, LAYERS, TOP_K

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(pico_qwen3_5: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pico_qwen3_5, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def statistics(pico_qwen3_5: Path, samples: list[Sample]) -> CalibrationStatistics:
    return calibrate(Checkpoint.open(pico_qwen3_5), samples, device="cpu")


@pytest.mark.parametrize("layout", ["pico_qwen3_5", "pico_qwen3_5_resaved"])
def test_streamed_forward_equals_the_plain_one(
    layout: str, plain: Any, samples: list[Sample], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(layout)
    inputs = build(folder, samples[1:4])
    assert_streamed_is_plain(open_streamed(Checkpoint.open(folder), "cpu"), inputs, plain, atol=1e-4)


def test_layers_without_attention_keep_the_choice_of_the_last_one_with_it(statistics: CalibrationStatistics) -> None:
    shown = statistics.samples
    key = sum(max(1, int(0.2 * n)) for n in (12, 15, 12))
    for layer, name in enumerate(("attn_qkv", "attn_qkv", "attn_qkv", "attn_q", "attn_qkv")):
        counts = statistics.arrays[f"blk.{layer}.{name}.weight.count"][:, 0]
        chosen = key if layer >= 3 else shown.vision_tokens
        assert counts.tolist() == [shown.text_tokens, chosen, shown.vision_tokens - chosen]
        np.testing.assert_array_equal(statistics.counts(layer).sum(axis=1), counts * TOP_K)


def test_sums_are_those_of_the_whole_model(
    pico_qwen3_5: Path, statistics: CalibrationStatistics, plain: Any, samples: list[Sample]
) -> None:
    """Of every matrix, from plain module hooks; columns in the order of the GGUF tensor."""
    checkpoint = Checkpoint.open(pico_qwen3_5)
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name: str) -> Any:
        return lambda module, arguments, output: seen.setdefault(name, []).append(arguments[0].flatten(0, -2))

    dense = {t.activation: t for t in text_tensors(checkpoint) if t.activation and t.projection is None}
    hooks = [
        plain.get_submodule(tensor.sources[0].removesuffix(".weight")).register_forward_hook(record(str(name)))
        for name, tensor in dense.items()
    ]
    for layer in range(LAYERS):
        mlp = plain.model.language_model.layers[layer].mlp
        hooks += [mlp.experts.register_forward_hook(record(f"x{layer}"))]
        hooks += [mlp.gate.register_forward_hook(lambda m, a, o, n=f"i{layer}": seen.setdefault(n, []).append(o[2]))]
    with torch.no_grad():
        for one in build(pico_qwen3_5, samples):
            plain(**one.model_arguments(CPU, torch.float32))
    for hook in hooks:
        hook.remove()
    for name, tensor in dense.items():
        expected = torch.cat(seen[str(name)]).double().square().sum(0).numpy()
        if tensor.order is not None and tensor.order.columns is not None:
            assert tensor.name.endswith("ssm_out.weight")
            expected = expected[tensor.order.columns]
        found = statistics.arrays[f"{name}.sum2"].sum(axis=(0, 1))
        np.testing.assert_allclose(found, expected, rtol=1e-3, err_msg=str(name))
    for layer in range(LAYERS):
        x, index = torch.cat(seen[f"x{layer}"]), torch.cat(seen[f"i{layer}"])
        experts = plain.model.language_model.layers[layer].mlp.experts
        for expert in range(EXPERTS):
            read = x[(index == expert).any(-1)]
            gate, up = torch.nn.functional.linear(read, experts.gate_up_proj[expert]).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
            assert statistics.counts(layer)[:, expert].sum() == len(read)
            for suffix, values in (("input", read), ("hidden", hidden)):
                sum2 = statistics.arrays[f"blk.{layer}.ffn_exps.{suffix}.sum2"][:, expert].sum(axis=0)
                expected = values.double().square().sum(0).detach().numpy()
                np.testing.assert_allclose(sum2, expected, rtol=1e-3, atol=1e-6)
