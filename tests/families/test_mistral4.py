"""What only Mistral Small 4 has: FP8, pictures with row breaks, a head of its own, matrices that nobody measures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import save_file

from mode_gguf.allocation.plan import Plan
from mode_gguf.architectures import find_family, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.data.sample import Message, Sample
from mode_gguf.errors import InputError, ModeGgufError
from mode_gguf.export.imatrix_file import read_imatrix
from mode_gguf.export.tokenizer import add_tokenizer_keys, read_vocabulary
from mode_gguf.forward.converted_weights import as_tensor
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.forward.modality import TEXT_ATTENTION
from mode_gguf.forward.model_config import model_config
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.quantized_kl import KlSettings, quantized_kl
from mode_gguf.importance.sensitivity_table import SensitivityTable
from mode_gguf.importance.variants import Variant
from mode_gguf.pipeline.report_data import planned_tensors
from mode_gguf.quantization.packing import EXACT
from mode_gguf.quantization.types import QUANT_TYPES
from tests.calibration.conftest import noise_image
from tests.families.case.mistral4 import MISTRAL4
from tests.families.changed import changed
from tests.families.conftest import Families, exact
from tests.families.gguf_copy import gguf_copy
from tests.families.pico.mistral4 import MERGE, PATCH, token_id, write_pico_mistral4
from tests.families.pico.tokenizer import VOCAB
from tests.families.test_convert import convert_and_answer
from tests.forward.test_streaming import assert_streamed_is_plain
from tests.importance.conftest import answered_samples

SIDE = PATCH * MERGE
TYPE = QUANT_TYPES["Q8_0"]


@pytest.fixture
def checkpoint(pico_mistral4: Path) -> Checkpoint:
    return Checkpoint.open(pico_mistral4)


def test_projector_with_biases(tmp_path: Path) -> None:
    biased = Checkpoint.open(write_pico_mistral4(tmp_path, projector_bias=True))
    assert {"mm.1.bias", "mm.2.bias"} <= {tensor.name for tensor in projector_tensors(biased)}


def test_fp8_is_decoded(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Against the weights it was made of: a step of E4M3 is at most 1/16 of a value."""
    exact_tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    coarse = text_tensors(Checkpoint.open(write_pico_mistral4(tmp_path / "fp8", fp8=True)))
    assert exact_tensors.keys() == {tensor.name for tensor in coarse}
    for tensor in coarse:
        last = tensor.n_experts - 1
        assert tensor.shape == exact_tensors[tensor.name].shape
        found, expected = (as_float32(one.read(last)) for one in (tensor, exact_tensors[tensor.name]))
        off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        in_fp8 = tensor.role in (Role.EXPERT, Role.DENSE, Role.ABSORBED)
        assert (0.01 < off < 0.04) if in_fp8 else off == 0, tensor.name


def test_fp8_streams_as_the_weights_it_stands_for(tmp_path: Path, families: Families) -> None:
    checkpoint = Checkpoint.open(write_pico_mistral4(tmp_path / "fp8", fp8=True))
    decoded = write_pico_mistral4(tmp_path / "decoded")
    (decoded / "model.safetensors.index.json").unlink()
    weights = {name: as_tensor(checkpoint.read(name)) for name in checkpoint.tensors}
    save_file(weights, decoded / "model.safetensors", {"format": "pt"})
    inputs = [InputBuilder.open(checkpoint).build(families.samples[2])]
    plain = MISTRAL4.load(decoded, checkpoint)
    assert_streamed_is_plain(open_streamed(checkpoint, "cpu"), inputs, plain, atol=MISTRAL4.streamed_atol)


def test_tokenizer(checkpoint: Checkpoint) -> None:
    vocabulary = read_vocabulary(checkpoint.path, VOCAB)
    assert vocabulary.tokens[10:14] == ["[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
    assert vocabulary.token_types[12:15] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    writer = GGUFWriter(None, "test")
    add_tokenizer_keys(writer, checkpoint.path, VOCAB)
    keys = {key: value.value for key, value in writer.kv_data[0].items()}
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.bos_token_id"] == token_id("<s>")
    assert "[INST]" in keys["tokenizer.chat_template"]


@pytest.mark.parametrize("said", [True, None])
def test_a_stored_head_is_the_head_whatever_config_json_says(
    checkpoint: Checkpoint, tmp_path: Path, said: bool | None
) -> None:
    tied = changed(checkpoint.path, tmp_path / "tied", tie_word_embeddings=said)
    assert "output.weight" in {tensor.name for tensor in text_tensors(tied)}
    assert model_config(tied, find_family(tied)).tie_word_embeddings is False


def test_a_vocabulary_without_the_break(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = changed(checkpoint.path, tmp_path / "other")
    path = other.path / "tokenizer.json"
    path.write_text(path.read_text().replace("[IMG_BREAK]", "[IMG_ROW]"))
    with pytest.raises(InputError, match=r"the tokenizer has no added token \[IMG_BREAK\]"):
        next(tensor for tensor in projector_tensors(other) if tensor.name == "v.token_embd.img_break")


def test_without_the_break_the_projector_does_not_load(families: Families, tmp_path: Path) -> None:
    """What the stock converter leaves out."""
    text, mmproj = families.files(MISTRAL4)
    stock = gguf_copy(mmproj, tmp_path / "mmproj-stock.gguf", left_out=["v.token_embd.img_break"])
    with pytest.raises(ModeGgufError, match="img_break"):
        exact(text, stock).close()


@pytest.mark.parametrize(
    ("width", "height", "pixels", "rows", "columns"),
    [
        (112, 84, 512 * 512, 3, 4),
        (96, 160, 512 * 512, 6, 4),  # sides are rounded up to whole pieces
        (640, 320, 100 * 100, 2, 5),  # and the area is kept to, in the picture's proportions
        (10, 10, 512 * 512, 1, 1),
    ],
)
def test_pieces_breaks_and_the_end(
    checkpoint: Checkpoint, width: int, height: int, pixels: int, rows: int, columns: int
) -> None:
    builder = InputBuilder.open(checkpoint, max_image_pixels=pixels)
    shown = noise_image(0, max(width, 16), max(height, 16)).resize((width, height))
    chat = (Message("user", "What is it?"), Message("assistant", "Red."))
    inputs = builder.build(Sample("i", "tests", messages=chat, image=shown))
    piece, row_break, end, begin = (token_id(token) for token in ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]"))
    tokens = [*[piece] * columns, row_break] * rows
    expected = [begin, *tokens[:-1], end]
    assert inputs.input_ids[1 : 1 + len(expected)].tolist() == expected
    assert torch.equal(inputs.is_vision, inputs.input_ids == piece)
    assert int(inputs.is_vision.sum()) == rows * columns
    assert inputs.image["image_sizes"].tolist() == [[rows * SIDE, columns * SIDE]]
    assert inputs.image["pixel_values"].shape == (1, 3, rows * SIDE, columns * SIDE)
    assert builder.tokenizer.decode(inputs.input_ids[inputs.is_query]) == "What is it?Red."
    arguments: dict[str, Any] = inputs.model_arguments(torch.device("cpu"), torch.float32)
    assert set(arguments) == {"input_ids", "use_cache", "pixel_values", "image_sizes"}


def test_types_of_matrices_that_are_not_measured(checkpoint: Checkpoint) -> None:
    """A plan's base may have them, and nothing comes of it."""
    assert MISTRAL4.measured is not None
    builder = InputBuilder.open(checkpoint)
    inputs = [builder.build(sample) for sample in answered_samples()[:2]]
    variants = [Variant(name, {name: (TYPE,)}) for name in MISTRAL4.measured.names]
    settings = KlSettings({}, EXACT, TEXT_ATTENTION)
    base = {tensor.name: (TYPE,) for tensor in text_tensors(checkpoint) if tensor.role is Role.ABSORBED}
    without, with_base = (
        quantized_kl(open_streamed(checkpoint, "cpu"), inputs, variants, settings, base=types) for types in ({}, base)
    )
    assert not with_base.base.any()
    np.testing.assert_allclose(with_base.variants, without.variants, rtol=1e-6)


def test_convert_and_answer_about_a_picture(
    tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """Stored in FP8; what becomes of the parts of latent attention that nobody measures."""
    checkpoint, out = MISTRAL4.write(tmp_path / "Pico-Mistral", fp8=True), tmp_path / "out"
    types = convert_and_answer(MISTRAL4, checkpoint, out, run, caplog)
    absorbed = {f"blk.{layer}.{part}.weight" for layer in range(3) for part in ("attn_k_b", "attn_v_b")}
    assert {types[name] for name in absorbed} == {"Q8_0"}
    measured = {name.split(".")[2] for name in read_imatrix(next(out.glob("imatrix-fisher-*.gguf"))) if "attn" in name}
    assert measured == {"attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_output"}
    roles = {tensor.name: tensor.role for tensor in text_tensors(Checkpoint.open(checkpoint))}
    plan, table = Plan.load(out / "plan.json"), SensitivityTable.load(out / "sensitivity.safetensors")
    assert {tensor.name: tensor.role for tensor in planned_tensors(plan, table)} == roles
