"""A pico Qwen3.5-MoE in the embedded llama.cpp against transformers, in F32; see `test_llama_cpp`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import write_text_model
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.divergence import compare
from tests.llama_cpp.test_in_process import ANSWER, TEXT, Transformers, image_prompt


@pytest.fixture(scope="module")
def transformers(pico_qwen3_5: Path) -> Transformers:
    return Transformers(pico_qwen3_5)


@pytest.fixture(scope="module")
def exact(pico_qwen3_5: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    folder = tmp_path_factory.mktemp("gguf")
    text, mmproj = folder / "pico-F32.gguf", folder / "mmproj-pico-F32.gguf"
    checkpoint = Checkpoint.open(pico_qwen3_5)
    write_text_model(text, checkpoint, {tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(checkpoint)})
    write_projector(mmproj, checkpoint, "F32")
    with LlamaModel(text, mmproj, context=1024, threads=1, exact=True) as model:
        yield model


def test_text_equals_transformers(exact: LlamaModel, transformers: Transformers) -> None:
    tokens = transformers.tokens(TEXT * 3)
    assert exact.tokenize(TEXT * 3) == tokens
    scores = compare(transformers.logits(tokens[:-1]), exact.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl.max() < 1e-8
    assert scores.same_top1.all()


def test_combining_marks_are_split_alike(exact: LlamaModel, transformers: Transformers) -> None:
    """What tells this pre-tokenizer from Qwen2's."""
    text = "नमस्ते दुनिया! ก็ได้ ‏שָׁלוֹם"
    assert exact.tokenize(text) == transformers.tokens(text)


def test_image_answer_equals_transformers(exact: LlamaModel, transformers: Transformers, picture: Image.Image) -> None:
    seen = transformers.seen(picture)
    prompt, answer = transformers.prompt(seen), transformers.tokens(ANSWER)
    expected = transformers.logits(prompt + answer[:-1], seen)[len(prompt) - 1 :]
    scores = compare(expected, exact.logits(image_prompt(exact), answer, picture), answer)
    assert scores.kl.mean() < 1e-6
    assert scores.same_top1.all()


def test_greedy_tokens_equal_transformers(exact: LlamaModel, transformers: Transformers, picture: Image.Image) -> None:
    seen = transformers.seen(picture)
    tokens = transformers.prompt(seen)
    start = len(tokens)
    for _ in range(12):
        tokens.append(int(transformers.logits(tokens, seen)[-1].argmax()))
    assert exact.generate(image_prompt(exact), picture, max_tokens=12) == tokens[start:]
