"""The embedded llama.cpp against transformers, in F32, on the pico checkpoint."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp import in_process
from mode_gguf.llama_cpp.in_process import BATCH, LlamaModel
from mode_gguf.validation.divergence import compare
from tests.validation.conftest import Files

TEXT = "The quick brown fox jumps over the lazy dog. What is the colour of the square? It's 12:30, héllo — 你好. "
QUESTION = "What is the colour of the circle?"
ANSWER = "The square is red. There are 3 shapes"


class Transformers:
    """The pico checkpoint in transformers, F32, on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        return tokens

    def seen(self, picture: Image.Image) -> dict[str, Any]:
        return dict(self.processor(images=[picture], return_tensors="pt"))

    def prompt(self, seen: dict[str, Any]) -> list[int]:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        text: str = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        count = int(seen["image_grid_thw"].prod()) // 4
        image_token: str = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        return self.tokens(text.replace(image_token, image_token * count))

    @torch.no_grad()
    def logits(self, tokens: list[int], seen: dict[str, Any] | None = None) -> np.ndarray:
        ids = torch.tensor([tokens])
        arguments = dict(seen or {})
        if seen:
            arguments["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        rows: np.ndarray = self.model(input_ids=ids, **arguments).logits[0].numpy()
        return rows


@pytest.fixture(scope="module")
def transformers(pico: Path) -> Iterator[Transformers]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Transformers(pico)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exact(full: Files) -> Iterator[LlamaModel]:
    with LlamaModel(full.text, full.mmproj, context=1024, threads=1, exact=True) as model:
        yield model


def image_prompt(model: LlamaModel) -> str:
    return model.chat_template.question(QUESTION, model.image_marker)


def test_text_equals_transformers(exact: LlamaModel, transformers: Transformers) -> None:
    tokens = transformers.tokens(TEXT * 3)
    assert exact.tokenize(TEXT * 3) == tokens
    scores = compare(transformers.logits(tokens[:-1]), exact.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl.max() < 1e-9
    assert scores.same_top1.all()


def test_image_answer_equals_transformers(exact: LlamaModel, transformers: Transformers, picture: Image.Image) -> None:
    seen = transformers.seen(picture)
    prompt, answer = transformers.prompt(seen), transformers.tokens(ANSWER)
    expected = transformers.logits(prompt + answer[:-1], seen)[len(prompt) - 1 :]
    scores = compare(expected, exact.logits(image_prompt(exact), answer, picture), answer)
    assert scores.kl.mean() < 1e-6
    assert scores.same_top1.all()


def test_image_difference_is_rounding_inside_llama_cpp(
    exact: LlamaModel, pico: Path, transformers: Transformers, picture: Image.Image
) -> None:
    """ggml takes pixels in F16 (im2col) and reads GELU from an F16 table; with both, transformers says the same."""
    rounded = Transformers(pico)

    class TableGelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    for module in rounded.model.model.visual.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = TableGelu()
    seen = rounded.seen(picture)
    plain = transformers.seen(picture)
    seen["pixel_values"] = seen["pixel_values"].half().float()
    prompt, answer = rounded.prompt(seen), rounded.tokens(ANSWER)
    ours = exact.logits(image_prompt(exact), answer, picture)

    def distance(reference: Transformers, arguments: dict[str, Any]) -> float:
        rows = reference.logits(prompt + answer[:-1], arguments)[len(prompt) - 1 :]
        return float(compare(rows, ours, answer).kl.mean())

    assert distance(rounded, seen) < 1e-7
    assert distance(rounded, seen) < 0.5 * distance(transformers, plain)


def test_greedy_tokens_equal_transformers(exact: LlamaModel, transformers: Transformers, picture: Image.Image) -> None:
    seen = transformers.seen(picture)
    tokens = transformers.prompt(seen)
    start = len(tokens)
    for _ in range(12):
        tokens.append(int(transformers.logits(tokens, seen)[-1].argmax()))
    assert exact.generate(image_prompt(exact), picture, max_tokens=12) == tokens[start:]


def test_generated_tokens_are_the_argmax_of_their_own_logits(exact: LlamaModel, picture: Image.Image) -> None:
    for image in (None, picture):
        prompt = exact.chat_template.question(QUESTION, exact.image_marker if image else None)
        answer = exact.generate(prompt, image, max_tokens=8)
        assert exact.logits(prompt, answer, image).argmax(axis=-1).tolist() == answer


def test_calls_do_not_depend_on_each_other(exact: LlamaModel, picture: Image.Image) -> None:
    tokens = exact.tokenize(TEXT)
    first = exact.text_logits(tokens)
    exact.generate(image_prompt(exact), picture, max_tokens=4)
    np.testing.assert_array_equal(exact.text_logits(tokens), first)


def test_long_prompts_go_through_in_batches(exact: LlamaModel) -> None:
    prompt = TEXT * 14
    tokens, answer = exact.tokenize(prompt), exact.tokenize(ANSWER)
    assert len(tokens) > BATCH
    together = exact.text_logits(tokens + answer[:-1])
    assert together.shape == (len(tokens) + len(answer) - 1, exact.n_vocab)
    np.testing.assert_allclose(exact.logits(prompt, answer), together[len(tokens) - 1 :], atol=1e-4)


def test_images_larger_than_a_batch(full: Files, exact: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Image.effect_mandelbrot((320, 256), (-2, -1.2, 1, 1.2), 60)
    answer = exact.tokenize(ANSWER)
    whole = exact.logits(image_prompt(exact), answer, large)
    monkeypatch.setattr(in_process, "BATCH", 32)
    with LlamaModel(full.text, full.mmproj, context=1024, threads=1, exact=True) as model:
        split = model.logits(image_prompt(model), answer, large)
    assert compare(whole, split, answer).kl.max() < 1e-8


def test_defaults_stay_close_to_exact(full: Files, exact: LlamaModel) -> None:
    tokens = exact.tokenize(TEXT)
    with LlamaModel(full.text, threads=1) as model:
        scores = compare(exact.text_logits(tokens[:-1]), model.text_logits(tokens[:-1]), tokens[1:])
    assert 0 < scores.kl.mean() < 1e-4


def test_images_can_be_files_bytes_or_open(exact: LlamaModel, picture: Image.Image, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    (tmp_path / "picture.png").write_bytes(buffer.getvalue())
    answers = [
        exact.generate(image_prompt(exact), image, max_tokens=3)
        for image in (picture, buffer.getvalue(), tmp_path / "picture.png")
    ]
    assert answers[0] == answers[1] == answers[2]


def test_tokens_and_text(exact: LlamaModel) -> None:
    assert exact.detokenize(exact.tokenize(TEXT)) == TEXT
    assert exact.detokenize([]) == ""
    assert len(exact.tokenize("<|im_end|>")) == 1
    assert len(exact.tokenize("<|im_end|>", special=False)) > 1
    assert exact.is_end(exact.end_of_turn[0])
    assert exact.end_of_turn == exact.tokenize("<|im_end|>")
    assert exact.beginning == []


def test_nothing_is_printed(full: Files, capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaModel(full.text, full.mmproj, threads=1) as model:
        model.generate("The", max_tokens=1)
    assert capfd.readouterr() == ("", "")


def test_messages_of_llama_cpp_go_to_logging(full: Files, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "mode_gguf.libllama"), LlamaModel(full.text, threads=1):
        pass
    assert any("llama_model_loader" in record.getMessage() for record in caplog.records)


def test_image_without_projector(full: Files, picture: Image.Image) -> None:
    with LlamaModel(full.text, threads=1) as model, pytest.raises(InputError, match="no mmproj file was given"):
        model.generate("What?", picture)


def test_prompt_without_the_place_of_its_image(exact: LlamaModel, picture: Image.Image) -> None:
    with pytest.raises(InputError, match="exactly once"):
        exact.generate("What?", picture)


def test_broken_image(exact: LlamaModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(InputError, match=r"broken\.png: cannot be read as an image"):
        exact.generate(image_prompt(exact), broken)


def test_prompt_beyond_the_context(exact: LlamaModel, picture: Image.Image) -> None:
    with pytest.raises(InputError, match="the context holds 1024"):
        exact.generate("fox " * 1100)
    with pytest.raises(InputError, match="the context holds 1024"):
        exact.generate(image_prompt(exact), picture, max_tokens=1020)


def test_missing_and_foreign_files(full: Files, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.gguf: cannot be read"):
        LlamaModel(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(InputError, match=r"text\.gguf: not a GGUF file"):
        LlamaModel(full.text, tmp_path / "text.gguf")


def test_files_that_llama_cpp_refuses(full: Files) -> None:
    with pytest.raises(ValidationError, match=r"mmproj-pico-F32\.gguf: llama\.cpp cannot load it: .*CLIP"):
        LlamaModel(full.mmproj)
    with pytest.raises(ValidationError, match=r"pico-F32\.gguf: llama\.cpp cannot load it as the projector"):
        LlamaModel(full.text, full.text)
