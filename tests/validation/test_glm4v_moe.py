"""A pico GLM-4.5V in the embedded llama.cpp against transformers, in F32; see `test_llama_cpp`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import write_text_model
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.divergence import compare
from mode_gguf.validation.llama_cpp import LlamaModel
from tests.families.pico.glm4v_moe import write_pico_glm4v_moe
from tests.validation.test_llama_cpp import ANSWER, TEXT, Transformers, image_prompt


@contextmanager
def exported(checkpoint: Path, folder: Path) -> Iterator[LlamaModel]:
    """The checkpoint in F32."""
    text, mmproj = folder / "pico-F32.gguf", folder / "mmproj-pico-F32.gguf"
    opened = Checkpoint.open(checkpoint)
    write_text_model(text, opened, {tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(opened)})
    write_projector(mmproj, opened, "F32")
    with LlamaModel(text, mmproj, context=1024, threads=1, exact=True) as model:
        yield model


@pytest.fixture(scope="module")
def transformers(pico_glm4v: Path) -> Transformers:
    return Transformers(pico_glm4v)


@pytest.fixture(scope="module")
def exact(pico_glm4v: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    with exported(pico_glm4v, tmp_path_factory.mktemp("gguf")) as model:
        yield model


@pytest.fixture(scope="module")
def tile() -> Image.Image:
    """Smooth colours, of a size that no implementation needs to change: 5 x 3 tokens of 28 x 28 pixels."""
    y, x = np.mgrid[0:84, 0:140] / 16
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    return Image.fromarray((127.5 + 120 * waves).astype(np.uint8))


def test_text_equals_transformers(exact: LlamaModel, transformers: Transformers) -> None:
    tokens = transformers.tokens(TEXT * 3)
    assert exact.tokenize(TEXT * 3) == tokens
    scores = compare(transformers.logits(tokens[:-1]), exact.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl.max() < 1e-8
    assert scores.same_top1.all()


def test_digits_are_split_alike(exact: LlamaModel, transformers: Transformers) -> None:
    """Three at a time, unlike Qwen's."""
    text = "1234567 89 I'LL don't  \n\n x"
    assert exact.tokenize(text) == transformers.tokens(text)


@pytest.mark.parametrize("settings", [{"n_group": 3, "topk_group": 2}, {"biased": False, "dense_layers": 0}])
def test_other_settings_equal_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    other = write_pico_glm4v_moe(tmp_path / "other", **settings)
    reference = Transformers(other)
    tokens = reference.tokens(TEXT * 2)
    with exported(other, tmp_path) as model:
        scores = compare(reference.logits(tokens[:-1]), model.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl.max() < 1e-8


def test_image_answer_equals_transformers_but_for_rounding(
    exact: LlamaModel, transformers: Transformers, tile: Image.Image
) -> None:
    """ggml's convolutions take pixels, and the features that the merger joins, in F16 (im2col)."""
    seen = transformers.seen(tile)
    prompt, answer = transformers.prompt(seen), transformers.tokens(ANSWER)
    ours = exact.logits(image_prompt(exact), answer, tile)

    def divergence(seen: dict[str, Any]) -> np.ndarray:
        reference = transformers.logits(prompt + answer[:-1], seen)[len(prompt) - 1 :]
        return compare(reference, ours, answer).kl

    assert np.median(divergence(seen)) < 2e-6
    rounded = {**seen, "pixel_values": seen["pixel_values"].half().float()}
    hook = transformers.model.model.visual.downsample.register_forward_pre_hook(lambda _, x: (x[0].half().float(),))
    try:
        assert divergence(rounded).max() < 1e-7
    finally:
        hook.remove()


def test_greedy_tokens_equal_transformers(exact: LlamaModel, transformers: Transformers, tile: Image.Image) -> None:
    seen = transformers.seen(tile)
    tokens = transformers.prompt(seen)
    start = len(tokens)
    for _ in range(12):
        tokens.append(int(transformers.logits(tokens, seen)[-1].argmax()))
    assert exact.generate(image_prompt(exact), tile, max_tokens=12) == tokens[start:]
