"""Pico Kimi models in the embedded llama.cpp against transformers, in F32; see `test_llama_cpp`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.images import ImagePlace
from mode_gguf.architectures.vision import moon_vit
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import write_text_model
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.divergence import compare
from tests.calibration.conftest import picture
from tests.llama_cpp.test_in_process import ANSWER, QUESTION, TEXT, image_prompt


@dataclass
class Pair:
    """A checkpoint in llama.cpp, and what transformers makes of the same weights."""

    builder: InputBuilder
    begin: str
    reference: Any
    exact: LlamaModel
    text: Path

    def tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.builder.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def seen(self, image: Image.Image) -> tuple[list[int], dict[str, torch.Tensor]]:
        """llama.cpp's prompt, which lacks the words that the chat template has between mark and picture."""
        builder = self.builder
        place = ImagePlace(builder.checkpoint, image, None, builder.tokenizer, builder.image_token, 10**9)
        placed = builder.family.vision.place_image(place)
        before = self.tokens(f"<|im_user|>user<|im_middle|>{self.begin}")
        after = self.tokens(f"<|media_end|>{QUESTION}<|im_end|><|im_assistant|>assistant<|im_middle|>")
        arguments = {name: torch.from_numpy(values) for name, values in placed.arguments.items()}
        return [*before, *placed.tokens, *after], arguments

    @torch.no_grad()
    def logits(self, tokens: list[int], arguments: dict[str, torch.Tensor]) -> np.ndarray:
        rows: np.ndarray = self.reference(input_ids=torch.tensor([tokens]), **arguments).logits[0].numpy()
        return rows


@pytest.fixture(scope="module", params=["kimi_vl", "kimi_k25"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    is_vl = request.param == "kimi_vl"
    checkpoint = Checkpoint.open(request.getfixturevalue(f"pico_{request.param}"))
    published: Path = request.getfixturevalue("pico_kimi_vl_as_k25" if is_vl else "pico_kimi_k25")
    builder = InputBuilder.open(checkpoint)
    config = Kimi_K25Config.from_dict(dict(builder.family.layout.model_config(checkpoint)))
    reference = Kimi_K25ForConditionalGeneration.from_pretrained(published, config=config, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("gguf")
    text, mmproj = folder / "pico-F32.gguf", folder / "mmproj-pico-F32.gguf"
    write_text_model(text, checkpoint, {tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(checkpoint)})
    write_projector(mmproj, checkpoint, "F32")
    with LlamaModel(text, mmproj, context=1024, threads=1, exact=True) as model:
        yield Pair(builder, "<|media_start|>" if is_vl else "<|media_begin|>", reference, model, text)


def test_text_equals_transformers(pair: Pair) -> None:
    tokens = pair.tokens(TEXT * 3)
    assert pair.exact.tokenize(TEXT * 3) == tokens
    scores = compare(pair.logits(tokens[:-1], {}), pair.exact.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl.max() < 1e-8
    assert scores.same_top1.all()


def test_image_answer_and_greedy_tokens_equal_transformers(pair: Pair) -> None:
    image = picture(0, 112, 112)
    prompt, arguments = pair.seen(image)
    answer = pair.tokens(ANSWER)
    expected = pair.logits(prompt + answer[:-1], arguments)[len(prompt) - 1 :]
    scores = compare(expected, pair.exact.logits(image_prompt(pair.exact), answer, image), answer)
    print(f"KL: {scores.kl.mean():.3g} nats")
    assert scores.kl.mean() < 1e-6
    assert scores.same_top1.all()
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(pair.logits(tokens, arguments)[-1].argmax()))
    assert pair.exact.generate(image_prompt(pair.exact), image, max_tokens=12) == tokens[len(prompt) :]


@pytest.mark.parametrize("pair", ["kimi_vl"], indirect=True)
def test_the_checkpoints_order_mixes_rows_with_columns(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the stock converter's projector."""
    monkeypatch.setattr(moon_vit, "column_and_row_halves", lambda channels, heads: np.arange(channels))
    stock = tmp_path / "mmproj-stock-F32.gguf"
    write_projector(stock, pair.builder.checkpoint, "F32")
    image = picture(0, 112, 112)
    prompt, arguments = pair.seen(image)
    answer = pair.tokens(ANSWER)
    expected = pair.logits(prompt + answer[:-1], arguments)[len(prompt) - 1 :]
    with LlamaModel(pair.text, stock, context=1024, threads=1, exact=True) as model:
        kl = compare(expected, model.logits(image_prompt(model), answer, image), answer).kl.mean()
    print(f"KL with the stock converter's order: {kl:.3g} nats")
    assert kl > 0.01


def test_positions_between_those_of_the_table(pair: Pair) -> None:
    """Kimi K2.5's are interpolated alike; Kimi-VL's llama.cpp takes straight lines where the model has cubics."""
    image = picture(1, 176, 112).crop((0, 0, 168, 112))
    prompt, arguments = pair.seen(image)
    answer = pair.tokens(ANSWER)
    expected = pair.logits(prompt + answer[:-1], arguments)[len(prompt) - 1 :]
    kl = compare(expected, pair.exact.logits(image_prompt(pair.exact), answer, image), answer).kl.mean()
    if pair.begin == "<|media_begin|>":
        assert kl < 1e-6
    else:
        assert 1e-6 < kl < 0.3
