"""A pico InternVL3.5-MoE in the embedded llama.cpp against transformers, in F32; see `test_llama_cpp`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from PIL import Image
from transformers import AutoModelForImageTextToText

from mode_gguf.architectures import text_tensors
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import write_text_model
from mode_gguf.forward.inputs import InputBuilder, ModelInputs
from mode_gguf.llama_cpp.in_process import LlamaModel
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.divergence import Scores, compare
from tests.llama_cpp.test_in_process import ANSWER, QUESTION, TEXT

SIZES = [(56, 56), (30, 40), (128, 96), (96, 160), (61, 200)]
"""One tile as it is and enlarged; two by three and one by four, with the whole picture, shrunk in both directions."""


def waves(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width] / 8
    colours = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x)], axis=-1)
    return Image.fromarray((127.5 + 120 * colours).astype(np.uint8))


@pytest.fixture(scope="module")
def builder(pico_internvl: Path) -> InputBuilder:
    return InputBuilder.open(Checkpoint.open(pico_internvl))


@pytest.fixture(scope="module")
def reference(pico_internvl_hf: Path) -> Any:
    """The same weights where transformers can open them."""
    return AutoModelForImageTextToText.from_pretrained(pico_internvl_hf, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exported(pico_internvl: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    text, mmproj = folder / "pico-F32.gguf", folder / "mmproj-pico-F32.gguf"
    checkpoint = Checkpoint.open(pico_internvl)
    write_text_model(text, checkpoint, {tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(checkpoint)})
    write_projector(mmproj, checkpoint, "F32")
    return text, mmproj


@pytest.fixture(scope="module")
def exact(exported: tuple[Path, Path]) -> Iterator[LlamaModel]:
    with LlamaModel(*exported, context=1024, threads=1, exact=True) as model:
        yield model


def prompt(model: LlamaModel) -> str:
    """With the line break that the model's authors write behind a picture, and so the builder."""
    return model.chat_template.question(f"\n{QUESTION}", model.image_marker)


def asked(builder: InputBuilder, picture: Image.Image, answer: str | None = ANSWER) -> ModelInputs:
    messages = [Message("user", QUESTION), *([] if answer is None else [Message("assistant", answer)])]
    return builder.build(Sample("test", "tests", messages=tuple(messages), image=picture))


@torch.no_grad()
def logits(reference: Any, inputs: ModelInputs) -> np.ndarray:
    rows: np.ndarray = reference(**inputs.model_arguments(torch.device("cpu"), torch.float32)).logits[0].numpy()
    return rows


def scores(model: LlamaModel, reference: Any, inputs: ModelInputs, picture: Image.Image) -> Scores:
    answer = model.tokenize(ANSWER)
    expected = logits(reference, inputs)[inputs.scored[: len(answer)]]
    return compare(expected, model.logits(prompt(model), answer, picture), answer)


def test_text_equals_transformers(exact: LlamaModel, builder: InputBuilder, reference: Any) -> None:
    inputs = builder.build(Sample("test", "tests", text=TEXT * 3))
    tokens = inputs.input_ids.tolist()
    assert exact.tokenize(TEXT * 3) == tokens
    found = compare(logits(reference, inputs)[:-1], exact.text_logits(tokens[:-1]), tokens[1:])
    assert found.kl.max() < 1e-8
    assert found.same_top1.all()


@pytest.mark.parametrize("size", SIZES)
def test_image_answer_equals_transformers(
    size: tuple[int, int], exact: LlamaModel, builder: InputBuilder, reference: Any
) -> None:
    picture = waves(*size)
    found = scores(exact, reference, asked(builder, picture), picture)
    assert found.kl.mean() < 1e-6
    assert found.same_top1.all()


def test_image_difference_is_rounding_inside_llama_cpp(
    exact: LlamaModel, builder: InputBuilder, pico_internvl_hf: Path
) -> None:
    """ggml takes pixels in F16 and reads GELU, its tanh form, from an F16 table; with both, transformers says the same.

    Pixels have no share in it: the pictures are cut and scaled bit for bit alike.
    """

    class TableGelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    rounded: Any = AutoModelForImageTextToText.from_pretrained(pico_internvl_hf, dtype=torch.float32).eval()
    for module in rounded.modules():
        for name in ("activation_fn", "act"):
            if hasattr(module, name):
                setattr(module, name, TableGelu())
    for size in SIZES:
        inputs = asked(builder, waves(*size))
        inputs.image["pixel_values"].copy_(inputs.image["pixel_values"].half().float())
        assert scores(exact, rounded, inputs, waves(*size)).kl.mean() < 1e-7


def test_greedy_tokens_equal_transformers(exact: LlamaModel, builder: InputBuilder, reference: Any) -> None:
    picture = waves(128, 96)
    inputs = asked(builder, picture, answer=None)
    arguments = inputs.model_arguments(torch.device("cpu"), torch.float32)
    start = arguments["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(12):
            chosen = reference(**arguments).logits[:, -1:].argmax(-1)
            arguments["input_ids"] = torch.cat([arguments["input_ids"], chosen], dim=1)
    assert exact.generate(prompt(exact), picture, max_tokens=12) == arguments["input_ids"][0, start:].tolist()


def test_positions_as_the_stock_converter_writes_them_are_worse(
    exported: tuple[Path, Path], exact: LlamaModel, builder: InputBuilder, reference: Any, tmp_path: Path
) -> None:
    """It keeps the class token's row first, and llama.cpp has that token last."""
    text, mmproj = exported
    stock = tmp_path / "mmproj-stock.gguf"
    stock.write_bytes(mmproj.read_bytes())
    (table,) = (t for t in GGUFReader(stock, "r+").tensors if t.name == "v.position_embd.weight")
    table.data[:] = np.roll(table.data, 1, axis=1)
    picture = waves(128, 96)
    inputs = asked(builder, picture)
    with LlamaModel(text, stock, context=1024, threads=1, exact=True) as model:
        assert scores(model, reference, inputs, picture).kl.mean() > 0.05
    assert scores(exact, reference, inputs, picture).kl.mean() < 1e-6
