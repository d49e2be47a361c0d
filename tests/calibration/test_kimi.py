"""Calibration of Kimi's models, which transformers' Kimi K2.5 computes whichever of them it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from mode_gguf.architectures import find_family
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.checkpoint import Checkpoint
from tests.calibration.test_streaming import build, streamed_logits
from tests.families.pico.kimi import EXPERTS, TOP_K, special

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layout", "as_published"), [("pico_kimi_vl", "pico_kimi_vl_as_k25"), ("pico_kimi_k25", "pico_kimi_k25")]
)
def test_streamed_forward_equals_the_plain_one(
    layout: str, as_published: str, samples: list[Sample], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(layout)
    checkpoint = Checkpoint.open(folder)
    config = Kimi_K25Config.from_dict(dict(find_family(checkpoint).model_config(checkpoint)))
    plain: Any = Kimi_K25ForConditionalGeneration.from_pretrained(
        request.getfixturevalue(as_published), config=config, dtype=torch.float32
    ).eval()
    inputs = build(folder, samples[1:4])
    logits = streamed_logits(open_streamed(checkpoint, "cpu"), inputs)
    for number, one in enumerate(inputs):
        with torch.no_grad():
            expected = plain(**one.model_arguments(CPU, torch.float32)).logits
        torch.testing.assert_close(logits[number], expected, rtol=0, atol=1e-4)


def test_prompts_with_a_picture(pico_kimi_vl: Path, samples: list[Sample]) -> None:
    (inputs,) = build(pico_kimi_vl, samples[2:3])
    vision = (inputs.input_ids == special("<|media_pad|>")).nonzero()[:, 0]
    assert len(vision) == 5 * 4  # 128 x 96, padded to 140 x 112
    torch.testing.assert_close(inputs.is_vision.nonzero()[:, 0], vision)
    assert int(inputs.input_ids[vision[-1] + 1]) == special("<|media_end|>")
    assert int(inputs.input_ids[vision[0] - 1]) == special("<|media_content|>")


@pytest.mark.parametrize("layout", ["pico_kimi_vl", "pico_kimi_k25_packed"])
def test_counts(layout: str, samples: list[Sample], request: pytest.FixtureRequest) -> None:
    """Of the layers with experts; every token goes to as many of them, and to the dense layer's matrices once."""
    statistics = calibrate(Checkpoint.open(request.getfixturevalue(layout)), samples, device="cpu")
    shown = statistics.samples
    assert list(statistics.moe_layers) == [1, 2]
    for layer in statistics.moe_layers:
        counts = statistics.counts(layer)
        assert counts.shape[1] == EXPERTS
        assert counts.sum() == TOP_K * (shown.text_tokens + shown.vision_tokens)
        assert counts[0].sum() == TOP_K * shown.text_tokens
    assert statistics.arrays["blk.0.ffn_down.weight.count"].sum() == shown.text_tokens + shown.vision_tokens
