"""Calibration of a model with a dense first layer and marks around images, against the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.inputs import InputBuilder
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.checkpoint import Checkpoint
from tests.calibration.test_streaming import assert_streamed_is_plain, build
from tests.families.pico.glm4v_moe import DENSE_LAYERS, EXPERTS, LAYERS, PATCH, TOP_K, token_id

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(pico_glm4v: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pico_glm4v, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def statistics(pico_glm4v: Path, samples: list[Sample]) -> CalibrationStatistics:
    return calibrate(Checkpoint.open(pico_glm4v), samples, device="cpu")


def test_only_pieces_of_the_image_are_vision_tokens(pico_glm4v: Path, samples: list[Sample]) -> None:
    """Marks around it are text: the template writes them, and llama.cpp feeds them as text, too."""
    (one,) = build(pico_glm4v, samples[2:3])
    image = token_id("<|image|>")
    np.testing.assert_array_equal(one.is_vision, one.input_ids == image)
    first = int(one.is_vision.nonzero()[0])
    assert int(one.input_ids[first - 1]) == token_id("<|begin_of_image|>")
    assert int(one.input_ids[first + int(one.is_vision.sum())]) == token_id("<|end_of_image|>")
    assert one.token_types == "mm_token_type_ids"
    grid = one.image["image_grid_thw"]
    assert int(one.is_vision.sum()) == int(grid.prod()) // 4


def test_images_are_scaled_down_to_their_area(pico_glm4v: Path, samples: list[Sample]) -> None:
    """The image processor counts the pixels of two frames."""
    limit = 13 * (2 * PATCH) ** 2
    builder = InputBuilder.open(Checkpoint.open(pico_glm4v), max_image_pixels=limit)
    assert int(builder.build(samples[2]).is_vision.sum()) == 12  # 4 x 3
    assert int(build(pico_glm4v, samples[2:3])[0].is_vision.sum()) == 15  # 5 x 3


@pytest.mark.parametrize("layout", ["pico_glm4v", "pico_glm4v_fused"])
def test_streamed_forward_equals_the_plain_one(
    layout: str, plain: Any, samples: list[Sample], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(layout)
    inputs = build(folder, samples[1:4])
    assert_streamed_is_plain(open_streamed(Checkpoint.open(folder), "cpu"), inputs, plain, atol=1e-4)


def test_sums_are_those_of_the_whole_model(
    pico_glm4v: Path, statistics: CalibrationStatistics, plain: Any, samples: list[Sample]
) -> None:
    """Of every matrix, from plain module hooks."""
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name: str) -> Any:
        return lambda module, arguments, output: seen.setdefault(name, []).append(arguments[0].flatten(0, -2))

    tensors = text_tensors(Checkpoint.open(pico_glm4v))
    dense = {str(t.activation): t for t in tensors if t.activation and t.projection is None}
    assert {f"blk.0.ffn_{name}.weight" for name in ("gate", "up", "down")} <= dense.keys()
    hooks = [
        plain.get_submodule(tensor.sources[0].removesuffix(".weight")).register_forward_hook(record(name))
        for name, tensor in dense.items()
    ]
    sparse = range(DENSE_LAYERS, LAYERS)
    assert statistics.moe_layers == list(sparse)
    for layer in sparse:
        mlp = plain.model.language_model.layers[layer].mlp
        hooks += [mlp.experts.register_forward_hook(record(f"x{layer}"))]
        hooks += [mlp.gate.register_forward_hook(lambda m, a, o, n=f"i{layer}": seen.setdefault(n, []).append(o[2]))]
    with torch.no_grad():
        for one in build(pico_glm4v, samples):
            plain(**one.model_arguments(CPU, torch.float32))
    for hook in hooks:
        hook.remove()
    for name in dense:
        expected = torch.cat(seen[name]).double().square().sum(0).numpy()
        found = statistics.arrays[f"{name}.sum2"].sum(axis=(0, 1))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6, err_msg=name)
    for layer in sparse:
        x, index = torch.cat(seen[f"x{layer}"]), torch.cat(seen[f"i{layer}"])
        experts = plain.model.language_model.layers[layer].mlp.experts
        assert statistics.counts(layer).sum() == TOP_K * len(x)
        for expert in range(EXPERTS):
            read = x[(index == expert).any(-1)]
            gate, up = torch.nn.functional.linear(read, experts.gate_up_proj[expert]).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
            assert statistics.counts(layer)[:, expert].sum() == len(read)
            for suffix, values in (("input", read), ("hidden", hidden)):
                sum2 = statistics.arrays[f"blk.{layer}.ffn_exps.{suffix}.sum2"][:, expert].sum(axis=0)
                expected = values.double().square().sum(0).detach().numpy()
                np.testing.assert_allclose(sum2, expected, rtol=1e-3, atol=1e-6)
