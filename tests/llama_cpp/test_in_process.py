"""The embedded llama.cpp on the pico checkpoint in F32; against transformers it is compared in `families`."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode_gguf.errors import InputError, ValidationError
from mode_gguf.llama_cpp import in_process
from mode_gguf.llama_cpp.in_process import BATCH, LlamaModel
from mode_gguf.validation.divergence import compare
from tests.families.prompts import ANSWER, QUESTION, TEXT
from tests.validation.conftest import Files


@pytest.fixture(scope="module")
def exact(full: Files) -> Iterator[LlamaModel]:
    with LlamaModel(full.text, full.mmproj, context=1024, threads=1, exact=True) as model:
        yield model


def image_prompt(model: LlamaModel) -> str:
    return model.chat_template.question(QUESTION, model.image_marker)


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
