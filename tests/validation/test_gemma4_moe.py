"""A pico Gemma 4 MoE in the embedded llama.cpp against transformers, in F32; see `test_llama_cpp`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import Keys
from PIL import Image

from mode_gguf.architectures import gemma4_moe, text_tensors
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.export import projector
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import write_text_model
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.divergence import compare
from mode_gguf.validation.llama_cpp import LlamaModel
from tests.families.pico.gemma4_moe import PICTURE, SOFT_TOKENS, WINDOW, write_pico_gemma4_moe
from tests.validation.test_llama_cpp import ANSWER, QUESTION, TEXT, Transformers, image_prompt


class Gemma(Transformers):
    """With a picture's tokens between their marks, and no BOS but the template's."""

    def tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def seen(self, picture: Image.Image) -> dict[str, Any]:
        seen = super().seen(picture)
        assert seen.pop("num_soft_tokens_per_image").tolist() == [SOFT_TOKENS]
        return seen

    def prompt(self, seen: dict[str, Any]) -> list[int]:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        text: str = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.tokens(text.replace("<|image|>", "<|image>" + "<|image|>" * SOFT_TOKENS + "<image|>"))


@pytest.fixture(scope="module")
def transformers(pico_gemma4: Path) -> Gemma:
    return Gemma(pico_gemma4)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    x, y = np.meshgrid(np.arange(PICTURE[0]) / 60, np.arange(PICTURE[1]) / 60)
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    return Image.fromarray((127.5 + 120 * waves).astype(np.uint8))


@pytest.fixture(scope="module")
def files(pico_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return exported(pico_gemma4, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def exact(files: tuple[Path, Path]) -> Iterator[LlamaModel]:
    with LlamaModel(*files, context=1024, threads=1, exact=True) as model:
        yield model


def exported(folder: Path, to: Path) -> tuple[Path, Path]:
    text, mmproj = to / "pico-F32.gguf", to / "mmproj-pico-F32.gguf"
    checkpoint = Checkpoint.open(folder)
    write_text_model(text, checkpoint, {tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(checkpoint)})
    write_projector(mmproj, checkpoint, "F32")
    return text, mmproj


def image_kl(model: LlamaModel, transformers: Gemma, picture: Image.Image) -> np.ndarray:
    seen = transformers.seen(picture)
    prompt, answer = transformers.prompt(seen), transformers.tokens(ANSWER)
    expected = transformers.logits(prompt + answer[:-1], seen)[len(prompt) - 1 :]
    return compare(expected, model.logits(image_prompt(model), answer, picture), answer).kl


def test_text_equals_transformers(exact: LlamaModel, transformers: Gemma) -> None:
    """Longer than the sliding window."""
    tokens = [*exact.beginning, *transformers.tokens(TEXT * 3)]
    assert [*exact.beginning, *exact.tokenize(TEXT * 3)] == tokens
    assert len(tokens) > 2 * WINDOW
    scores = compare(transformers.logits(tokens[:-1]), exact.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl.max() < 1e-6  # llama.cpp reads GELU from a table in F16
    assert scores.same_top1.all()


@pytest.mark.parametrize("text", ["a\n\n b  c", "<|turn>user\nHi<turn|>\n", "naïve 🙂 ▁ x", "नमस्ते"])
def test_tokens_equal_transformers(exact: LlamaModel, transformers: Gemma, text: str) -> None:
    assert exact.tokenize(text) == transformers.tokens(text)


def test_image_answer_equals_transformers(exact: LlamaModel, transformers: Gemma, picture: Image.Image) -> None:
    assert image_kl(exact, transformers, picture).mean() < 1e-6


def test_greedy_tokens_equal_transformers(exact: LlamaModel, transformers: Gemma, picture: Image.Image) -> None:
    seen = transformers.seen(picture)
    tokens = transformers.prompt(seen)
    start = len(tokens)
    for _ in range(12):
        tokens.append(int(transformers.logits(tokens, seen)[-1].argmax()))
    assert exact.generate(image_prompt(exact), picture, max_tokens=12) == tokens[start:]


def test_clipped_linear_layers(tmp_path: Path, picture: Image.Image) -> None:
    folder = write_pico_gemma4_moe(tmp_path / "clipped", clipped=True, standardized=False)
    with LlamaModel(*exported(folder, tmp_path), context=1024, threads=1, exact=True) as model:
        assert image_kl(model, Gemma(folder), picture).mean() < 1e-6


def test_without_the_activation_that_stock_leaves_out(
    pico_gemma4: Path,
    files: tuple[Path, Path],
    transformers: Gemma,
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The projector as llama.cpp's converter writes it is further from transformers."""

    def stock(checkpoint: Checkpoint) -> dict[str, Any]:
        keys = gemma4_moe.projector_metadata(checkpoint)
        return {key: value for key, value in keys.items() if key != Keys.ClipVision.USE_GELU}

    family = replace(gemma4_moe.FAMILY, projector_metadata=stock)
    monkeypatch.setattr(projector, "find_family", lambda checkpoint: family)
    write_projector(tmp_path / "mmproj-stock.gguf", Checkpoint.open(pico_gemma4), "F32")
    with LlamaModel(files[0], tmp_path / "mmproj-stock.gguf", context=1024, threads=1, exact=True) as model:
        assert image_kl(model, transformers, picture).mean() > 1e-5
