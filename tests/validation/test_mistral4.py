"""A pico Mistral Small 4 in the embedded llama.cpp against transformers, in F32; see `test_llama_cpp`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.pixtral import RMS_NORM_EPSILON
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import ModeGgufError
from mode_gguf.export.projector import write_projector
from mode_gguf.export.text_model import write_text_model
from mode_gguf.quantization.types import QUANT_TYPES
from mode_gguf.validation.divergence import compare
from mode_gguf.validation.llama_cpp import LlamaModel
from tests.families.pico.mistral4 import MERGE, ORIGINAL_CONTEXT, PATCH
from tests.validation.test_llama_cpp import ANSWER, QUESTION, TEXT, image_prompt

SIDE = PATCH * MERGE
LONG = TEXT * 6
"""Far beyond the first positions, which all have one attention temperature."""


class Transformers:
    """The pico checkpoint in transformers, F32, fed as its own processor (which needs torchvision) would feed it."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def tokens(self, text: str, *, bos: bool = True) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=bos)["input_ids"]
        return tokens

    def seen(self, picture: Image.Image) -> dict[str, Any]:
        return dict(self.processor(images=[picture], patch_size=SIDE, return_tensors="pt"))

    def prompt(self, seen: dict[str, Any]) -> list[int]:
        height, width = (int(n) // SIDE for n in seen["image_sizes"][0])
        rows = "[IMG_BREAK]".join(["[IMG]" * width] * height)
        return self.tokens(f"<s>[INST]{rows}[IMG_END]{QUESTION}[/INST]", bos=False)

    @torch.no_grad()
    def logits(self, tokens: list[int], seen: dict[str, Any] | None = None) -> np.ndarray:
        rows: np.ndarray = self.model(input_ids=torch.tensor([tokens]), **(seen or {})).logits[0].numpy()
        return rows


@pytest.fixture(scope="module")
def whole_pieces(picture: Image.Image) -> Image.Image:
    """4 x 3 pieces: transformers rounds other sizes up, llama.cpp to the nearest."""
    return picture.resize((4 * SIDE, 3 * SIDE))


@pytest.fixture(scope="module")
def transformers(pico_mistral4: Path) -> Transformers:
    return Transformers(pico_mistral4)


@pytest.fixture(scope="module")
def files(pico_mistral4: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    text, mmproj = folder / "pico-F32.gguf", folder / "mmproj-pico-F32.gguf"
    checkpoint = Checkpoint.open(pico_mistral4)
    write_text_model(text, checkpoint, {tensor.name: QUANT_TYPES["F32"] for tensor in text_tensors(checkpoint)})
    write_projector(mmproj, checkpoint, "F32")
    return text, mmproj


@pytest.fixture(scope="module")
def exact(files: tuple[Path, Path]) -> Iterator[LlamaModel]:
    with LlamaModel(*files, context=1024, threads=1, exact=True) as model:
        yield model


def without(source: Path, target: Path, *left_out: str) -> Path:
    """A copy of a GGUF file without some keys and tensors, as the stock converter writes it."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name not in {*left_out, "general.architecture"} and not name.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name not in left_out:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_text_equals_transformers(exact: LlamaModel, transformers: Transformers) -> None:
    tokens = transformers.tokens(LONG)
    assert exact.beginning + exact.tokenize(LONG) == tokens
    assert len(tokens) > 4 * ORIGINAL_CONTEXT
    scores = compare(transformers.logits(tokens[:-1]), exact.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl.max() < 1e-8
    assert scores.same_top1.all()


def test_without_attention_temperature_later_positions_are_wrong(
    files: tuple[Path, Path], transformers: Transformers, tmp_path: Path
) -> None:
    """What the stock converter leaves out."""
    keys = [f"mistral4.attention.temperature_{what}" for what in ("scale", "length")]
    tokens = transformers.tokens(LONG)
    with LlamaModel(without(files[0], tmp_path / "stock.gguf", *keys), context=1024, threads=1, exact=True) as model:
        scores = compare(transformers.logits(tokens[:-1]), model.text_logits(tokens[:-1]), tokens[1:])
    assert scores.kl[:ORIGINAL_CONTEXT].max() < 1e-8
    assert scores.kl[ORIGINAL_CONTEXT:].mean() > 1e-5


def test_words_are_split_alike(exact: LlamaModel, transformers: Transformers) -> None:
    """Case, marks, slashes and single digits are what tells this pre-tokenizer from others."""
    text = "camelCase HTTPServer ÉCOLE école नमस्ते a/b//c\n\n 1234 it's DON'T  \t x"
    assert exact.tokenize(text) == transformers.tokens(text, bos=False)


def test_image_answer_equals_transformers(
    exact: LlamaModel, transformers: Transformers, whole_pieces: Image.Image
) -> None:
    seen = transformers.seen(whole_pieces)
    prompt, answer = transformers.prompt(seen), transformers.tokens(ANSWER, bos=False)
    expected = transformers.logits(prompt + answer[:-1], seen)[len(prompt) - 1 :]
    scores = compare(expected, exact.logits(image_prompt(exact), answer, whole_pieces), answer)
    assert scores.kl.mean() < 1e-5
    assert scores.same_top1.all()


def test_image_difference_is_rounding_inside_llama_cpp(
    exact: LlamaModel, pico_mistral4: Path, transformers: Transformers, whole_pieces: Image.Image
) -> None:
    """ggml takes pixels in F16 (im2col), reads GELU's tanh form from an F16 table, and has one epsilon for all norms of
    the projector; with that, transformers says the same."""
    rounded = Transformers(pico_mistral4)

    class TableGelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    projector = rounded.model.model.multi_modal_projector
    projector.act = TableGelu()
    projector.norm.variance_epsilon = RMS_NORM_EPSILON
    seen = rounded.seen(whole_pieces)
    seen["pixel_values"] = seen["pixel_values"].half().float()
    prompt, answer = rounded.prompt(seen), rounded.tokens(ANSWER, bos=False)
    expected = rounded.logits(prompt + answer[:-1], seen)[len(prompt) - 1 :]
    assert compare(expected, exact.logits(image_prompt(exact), answer, whole_pieces), answer).kl.mean() < 1e-7


def test_greedy_tokens_equal_transformers(
    exact: LlamaModel, transformers: Transformers, whole_pieces: Image.Image
) -> None:
    seen = transformers.seen(whole_pieces)
    tokens = transformers.prompt(seen)
    start = len(tokens)
    for _ in range(12):
        tokens.append(int(transformers.logits(tokens, seen)[-1].argmax()))
    assert exact.generate(image_prompt(exact), whole_pieces, max_tokens=12) == tokens[start:]


def test_without_the_break_the_projector_does_not_load(files: tuple[Path, Path], tmp_path: Path) -> None:
    """What the stock converter leaves out."""
    projector = without(files[1], tmp_path / "mmproj-stock.gguf", "v.token_embd.img_break")
    with pytest.raises(ModeGgufError, match="img_break"):
        LlamaModel(files[0], projector, context=1024, threads=1, exact=True).close()
