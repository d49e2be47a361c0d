"""Calibration of a model with fused gate and up, scaled embeddings and image tokens that see each other."""

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
from tests.families.pico.gemma4_moe import EXPERTS, LAYERS, TOP_K, token_id

CPU = torch.device("cpu")
SHOWN = (63, 60, 63)
"""Tokens of pictures of 128 x 96, 96 x 160 and 128 x 96 pixels: as many multiples of 48 as make at most 70 tokens."""


@pytest.fixture(scope="module")
def plain(pico_gemma4: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pico_gemma4, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def statistics(pico_gemma4: Path, samples: list[Sample]) -> CalibrationStatistics:
    return calibrate(Checkpoint.open(pico_gemma4), samples, device="cpu")


def test_streamed_forward_equals_the_plain_one(pico_gemma4: Path, plain: Any, samples: list[Sample]) -> None:
    inputs = build(pico_gemma4, samples[1:4])
    assert_streamed_is_plain(open_streamed(Checkpoint.open(pico_gemma4), "cpu"), inputs, plain, atol=1e-4)


def test_image_tokens_between_their_marks(pico_gemma4: Path, samples: list[Sample]) -> None:
    (one,) = build(pico_gemma4, samples[2:3])
    (places,) = torch.nonzero(one.is_vision, as_tuple=True)
    assert len(places) == SHOWN[0]
    assert (places.diff() == 1).all()
    begin, end = int(one.input_ids[places[0] - 1]), int(one.input_ids[places[-1] + 1])
    assert (begin, end) == (token_id("<|image>"), token_id("<image|>"))


def test_image_tokens_see_later_ones_in_sliding_layers_only(
    pico_gemma4: Path, plain: Any, samples: list[Sample]
) -> None:
    """A change of the last image token reaches the first one's hidden state, but for what full attention does."""
    (one,) = build(pico_gemma4, samples[2:3])
    first, last = torch.nonzero(one.is_vision)[[0, -1], 0].tolist()
    text_model = plain.model.language_model

    @torch.no_grad()
    def at_first(kinds: list[str], change: float) -> torch.Tensor:
        def changed(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
            embeddings = options["inputs_embeds"].clone()
            embeddings[0, last] += change
            masks = options["attention_mask"]
            one_kind = {name: masks[kind] for name, kind in zip(masks, kinds, strict=True)}
            return arguments, {**options, "inputs_embeds": embeddings, "attention_mask": one_kind}

        hook = text_model.register_forward_pre_hook(changed, with_kwargs=True)
        hidden: torch.Tensor = plain.model(**one.model_arguments(CPU, torch.float32)).last_hidden_state[0, first]
        hook.remove()
        return hidden

    sliding, full = ["sliding_attention"] * 2, ["full_attention"] * 2
    assert (at_first(sliding, 1.0) - at_first(sliding, 0.0)).abs().max() > 1e-3
    assert torch.equal(at_first(full, 1.0), at_first(full, 0.0))


def test_counts_by_modality(statistics: CalibrationStatistics) -> None:
    shown = statistics.samples
    assert shown.vision_tokens == sum(SHOWN)
    key = sum(int(0.2 * n) for n in SHOWN)
    for layer in range(LAYERS):
        counts = statistics.arrays[f"blk.{layer}.attn_q.weight.count"][:, 0]
        assert counts.tolist() == [shown.text_tokens, key, shown.vision_tokens - key]
        np.testing.assert_array_equal(statistics.counts(layer).sum(axis=1), counts * TOP_K)


def test_sums_are_those_of_the_whole_model(
    pico_gemma4: Path, statistics: CalibrationStatistics, plain: Any, samples: list[Sample]
) -> None:
    """Of every matrix, from plain module hooks."""
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name: str) -> Any:
        return lambda module, arguments, output: seen.setdefault(name, []).append(arguments[0].flatten(0, -2))

    tensors = text_tensors(Checkpoint.open(pico_gemma4))
    dense = {t.activation: t for t in tensors if t.activation and t.projection is None}
    hooks = [
        plain.get_submodule(tensor.sources[0].removesuffix(".weight")).register_forward_hook(record(str(name)))
        for name, tensor in dense.items()
    ]
    for index, layer in enumerate(plain.model.language_model.layers):
        hooks += [layer.experts.register_forward_hook(record(f"x{index}"))]
        hooks += [
            layer.router.register_forward_hook(lambda m, a, o, n=f"i{index}": seen.setdefault(n, []).append(o[2]))
        ]
    with torch.no_grad():
        for one in build(pico_gemma4, samples):
            plain(**one.model_arguments(CPU, torch.float32))
    for hook in hooks:
        hook.remove()
    for name in dense:
        expected = torch.cat(seen[str(name)]).double().square().sum(0).numpy()
        found = statistics.arrays[f"{name}.sum2"].sum(axis=(0, 1))
        np.testing.assert_allclose(found, expected, rtol=1e-3, err_msg=str(name))
    for index, layer in enumerate(plain.model.language_model.layers):
        x, chosen = torch.cat(seen[f"x{index}"]), torch.cat(seen[f"i{index}"])
        for expert in range(EXPERTS):
            read = x[(chosen == expert).any(-1)]
            gate, up = torch.nn.functional.linear(read, layer.experts.gate_up_proj[expert]).chunk(2, -1)
            hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
            assert statistics.counts(index)[:, expert].sum() == len(read)
            for suffix, values in (("input", read), ("hidden", hidden)):
                sum2 = statistics.arrays[f"blk.{index}.ffn_exps.{suffix}.sum2"][:, expert].sum(axis=0)
                expected = values.double().square().sum(0).detach().numpy()
                np.testing.assert_allclose(sum2, expected, rtol=1e-3, atol=1e-6)
