"""Calibration of a model in its authors' layout, against the whole model in transformers' one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import internvl
from mode_gguf.calibration.calibrate import calibrate
from mode_gguf.calibration.inputs import InputBuilder
from mode_gguf.calibration.sample import Sample
from mode_gguf.calibration.statistics import CalibrationStatistics
from mode_gguf.calibration.streaming import open_streamed
from mode_gguf.checkpoint import Checkpoint
from tests.calibration.test_streaming import assert_streamed_is_plain, build, streamed_logits
from tests.families.pico.internvl import BLOCKS, EXPERTS, LAYERS, TOP_K, VISION_HIDDEN, mark_id, write_pico_internvl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(pico_internvl_hf: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pico_internvl_hf, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def statistics(pico_internvl: Path, samples: list[Sample]) -> CalibrationStatistics:
    return calibrate(Checkpoint.open(pico_internvl), samples, device="cpu")


@pytest.mark.parametrize("layout", ["pico_internvl", "pico_internvl_hf"])
def test_streamed_forward_equals_the_plain_one(
    layout: str, plain: Any, samples: list[Sample], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(layout)
    inputs = build(folder, samples)
    assert_streamed_is_plain(open_streamed(Checkpoint.open(folder), "cpu"), inputs, plain, atol=1e-5)


def test_streamed_forward_with_the_larger_vision_tower(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its authors' layout, against transformers' own loading of the other one."""
    monkeypatch.setattr(internvl, "RMS_WIDTH", VISION_HIDDEN)
    monkeypatch.setattr(internvl, "RMS_BLOCKS", BLOCKS)
    folder = write_pico_internvl(tmp_path / "original", large=True)
    stored = write_pico_internvl(tmp_path / "transformers", layout="transformers", large=True)
    model: Any = AutoModelForImageTextToText.from_pretrained(stored, dtype=torch.float32).eval()
    inputs = build(folder, samples[2:4])
    logits = streamed_logits(open_streamed(Checkpoint.open(folder), "cpu"), inputs)
    for number, one in enumerate(inputs):
        with torch.no_grad():
            expected = model(**one.model_arguments(CPU, torch.float32)).logits
        torch.testing.assert_close(logits[number], expected, rtol=0, atol=1e-5)


def test_prompts_of_both_layouts_are_the_same(
    pico_internvl: Path, pico_internvl_hf: Path, samples: list[Sample]
) -> None:
    """The authors' template knows only text, transformers' writes the image token; llama.cpp adds the same marks."""
    builders = [InputBuilder.open(Checkpoint.open(folder)) for folder in (pico_internvl, pico_internvl_hf)]
    for sample in samples:
        ours, theirs = (builder.build(sample) for builder in builders)
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.scored.tolist() == theirs.scored.tolist()
    shown = builders[0].build(samples[2])
    text = builders[0].tokenizer.decode(shown.input_ids)
    image = "<img>" + "<IMG_CONTEXT>" * 28 + "</img>\nWhat colour is the square?<|im_end|>"
    assert text.startswith(f"<|im_start|>user\n{image}")
    assert int(shown.is_vision.sum()) == 28
    assert set(shown.input_ids[shown.is_vision].tolist()) == {mark_id("<IMG_CONTEXT>")}
    first = int(torch.nonzero(shown.is_query)[0])
    assert builders[0].tokenizer.decode(shown.input_ids[first:]).startswith("What")


def test_counts_and_sums_are_those_of_the_whole_model(
    pico_internvl: Path, statistics: CalibrationStatistics, plain: Any, samples: list[Sample]
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name: str, part: int | None = None) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            value = arguments[0] if part is None else output[part]
            seen.setdefault(name, []).append(value.flatten(0, -2))

        return hook

    hooks = [plain.lm_head.register_forward_hook(record("output.weight"))]
    for number, layer in enumerate(plain.model.language_model.layers):
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            module = layer.self_attn.get_submodule(f"{theirs}_proj")
            hooks.append(module.register_forward_hook(record(f"blk.{number}.attn_{ours}.weight")))
        hooks.append(layer.mlp.experts.register_forward_hook(record(f"x{number}")))
        hooks.append(layer.mlp.gate.register_forward_hook(record(f"i{number}", 2)))
    inputs = build(pico_internvl, samples)
    with torch.no_grad():
        for one in inputs:
            plain(**one.model_arguments(CPU, torch.float32))
    for hook in hooks:
        hook.remove()
    vision = torch.cat([one.is_vision for one in inputs]).numpy()
    assert 0 < vision.sum() == statistics.samples.vision_tokens
    for name, parts in seen.items():
        if name.startswith(("blk.", "output")):
            expected = torch.cat(parts).double().square().numpy()
            found = statistics.arrays[f"{name}.sum2"].sum(axis=1)  # by modality: text, key vision, other vision
            np.testing.assert_allclose(found.sum(axis=0), expected.sum(axis=0), rtol=1e-3, err_msg=name)
            np.testing.assert_allclose(found[0], expected[~vision].sum(axis=0), rtol=1e-3, err_msg=name)
    for layer in range(LAYERS):
        x, index = torch.cat(seen[f"x{layer}"]), torch.cat(seen[f"i{layer}"])
        counts = statistics.counts(layer)
        assert counts.sum() == len(x) * TOP_K
        for expert in range(EXPERTS):
            routed = (index == expert).any(-1).numpy()
            assert counts[0, expert] == (routed & ~vision).sum()
            assert counts[:, expert].sum() == routed.sum()
            sum2 = statistics.arrays[f"blk.{layer}.ffn_exps.input.sum2"][:, expert].sum(axis=0)
            expected = x[torch.from_numpy(routed)].double().square().sum(0).numpy()
            np.testing.assert_allclose(sum2, expected, rtol=1e-3, atol=1e-6)
