"""What only Gemma 4 has: two kinds of attention, image tokens that see each other, an audio tower, clipped layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mode_gguf.architectures import find_family, ignored_tensors, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.tokenizer import read_vocabulary
from mode_gguf.forward.inputs import InputBuilder
from mode_gguf.forward.modality import TEXT_ATTENTION
from mode_gguf.forward.streaming import open_streamed
from mode_gguf.importance.output_error import block_mse
from mode_gguf.importance.sensitivity_settings import SensitivityRequest, SensitivitySettings
from mode_gguf.quantization.types import QUANT_TYPES
from tests.families.case.gemma4 import GEMMA4
from tests.families.changed import changed
from tests.families.conftest import Families, exact, exported
from tests.families.pico.files import write_json
from tests.families.pico.gemma4_moe import (
    EXPERTS,
    FULL_DIM,
    SOFT_TOKENS,
    VISION_BLOCKS,
    write_pico_gemma4_moe,
)
from tests.families.pico.tokenizer import VOCAB
from tests.families.prompts import Reference, waves
from tests.families.test_convert import convert_and_answer
from tests.families.test_logits import image_scores
from tests.importance.conftest import answered_samples

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(pico_gemma4: Path) -> Checkpoint:
    return Checkpoint.open(pico_gemma4)


def test_rotary_frequencies_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    """llama.cpp divides base^(-2i / head size) by them."""
    text = AutoConfig.from_pretrained(checkpoint.path).text_config
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](text, None, layer_type="full_attention")
    spread = 1e6 ** -(np.arange(0, FULL_DIM, 2) / FULL_DIM)
    (factors,) = (tensor for tensor in text_tensors(checkpoint) if tensor.name == "rope_freqs.weight")
    np.testing.assert_allclose(spread / as_float32(factors.read(0)), expected.numpy(), rtol=1e-6, atol=1e-29)


def test_settings_as_transformers_saves_them(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Layer by layer, in the place of names of their own."""
    saved = AutoConfig.from_pretrained(checkpoint.path).to_dict()["text_config"]
    without = {name: None for name in checkpoint.config["text_config"] if name not in saved}
    assert without.keys() == {"global_head_dim", "num_global_key_value_heads"}
    settings = {**json.loads(json.dumps(saved)), **without}
    resaved = changed(checkpoint.path, tmp_path / "resaved", "text_config", **settings)
    family = find_family(resaved)
    assert family.text_metadata(resaved) == family.text_metadata(checkpoint)


def test_kinds_of_tokens(checkpoint: Checkpoint) -> None:
    vocabulary = read_vocabulary(checkpoint.path, VOCAB)
    kinds = {token: kind.name for token, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True)}
    assert [kinds[token] for token in ("<bos>", "<|image>", "<0x0A>", "<|channel>", "\n", "<unused511>")] == [
        *("CONTROL", "CONTROL", "BYTE", "USER_DEFINED", "NORMAL", "NORMAL")
    ]


def test_tokens_of_a_picture_at_most(checkpoint: Checkpoint, tmp_path: Path) -> None:
    image_tokens = find_family(checkpoint).vision.image_tokens
    assert image_tokens is not None
    assert image_tokens(checkpoint, None) == SOFT_TOKENS == 70
    larger = changed(checkpoint.path, tmp_path / "larger", "text_config")
    write_json(larger.path / "preprocessor_config.json", {"max_soft_tokens": 280})
    assert [image_tokens(larger, size) for size in (None, (48, 48), (720, 480), (2000, 2000))] == [280, 70, 140, 280]


def test_an_audio_tower_is_left_out(checkpoint: Checkpoint) -> None:
    assert ignored_tensors(checkpoint) == ["model.audio_tower.output_proj.weight"]
    assert find_family(checkpoint).layout.model_config(checkpoint)["audio_config"] is None


def test_clipped_linear_layers(families: Families, tmp_path: Path) -> None:
    """Optional parts of the vision tower: bounds of every linear layer, and soft tokens as they are."""
    folder = write_pico_gemma4_moe(tmp_path / "clipped", clipped=True, standardized=False)
    checkpoint = Checkpoint.open(folder)
    tensors = {tensor.name: tensor for tensor in projector_tensors(checkpoint)}
    assert len(tensors) == 2 + (13 + 7 * 4) * VISION_BLOCKS + 1
    assert as_float32(tensors["v.blk.2.ffn_down.input_max"].read(0)).tolist() == [1.25]
    assert "v.std_bias" not in tensors
    reference = Reference(GEMMA4, checkpoint, checkpoint, GEMMA4.load(folder, checkpoint))
    with exact(*exported(checkpoint, tmp_path)) as model:
        assert image_scores(GEMMA4, reference, model, waves(GEMMA4.pictures[0])).kl.mean() < GEMMA4.image_kl


def test_image_tokens_see_later_ones_in_sliding_layers_only(families: Families) -> None:
    """A change of the last image token reaches the first one's hidden state, but for what full attention does."""
    one, plain = families.inputs("pico_gemma4")[2], families.model(GEMMA4)
    first, last = torch.nonzero(one.is_vision)[[0, -1], 0].tolist()
    text_model = plain.model.language_model

    @torch.no_grad()
    def at_first(kinds: list[str], change: float) -> torch.Tensor:
        def changed(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
            embeddings = options["inputs_embeds"].clone()
            embeddings[0, last] += change
            masks = options["attention_mask"]
            one_kind = {name: masks[kind] for name, kind in zip(masks, kinds, strict=True)}
            return arguments, {**options, "inputs_embeds": embeddings, "attention_mask": one_kind}

        hook = text_model.register_forward_pre_hook(changed, with_kwargs=True)
        hidden: torch.Tensor = plain.model(**one.model_arguments(CPU, torch.float32)).last_hidden_state[0, first]
        hook.remove()
        return hidden

    sliding, full = ["sliding_attention"] * 2, ["full_attention"] * 2
    assert (at_first(sliding, 1.0) - at_first(sliding, 0.0)).abs().max() > 1e-3
    assert torch.equal(at_first(full, 1.0), at_first(full, 0.0))


def test_errors_of_experts_with_gate_and_up_in_one(checkpoint: Checkpoint) -> None:
    """A tensor each for what the experts read and for what they hand on, and one of both."""
    types = (QUANT_TYPES["Q8_0"],)
    result = block_mse(
        open_streamed(checkpoint, "cpu"),
        [InputBuilder.open(checkpoint).build(answered_samples()[0])],
        SensitivitySettings(SensitivityRequest(types, types, label_draws=1), {}, TEXT_ATTENTION),
    )
    for name in ("ffn_gate_up_exps.weight", "ffn_down_exps.weight", "ffn_exps"):
        values = result.arrays[f"blk.0.{name}.expert"]
        assert values.shape == (1, 3, EXPERTS, 1)
        assert (values[0, 0, :, 0] > 0).all()
        assert (f"blk.0.{name}.unit" in result.arrays) == (name != "ffn_exps")
    errors = [result.arrays[f"blk.0.{name}.weight_error"] for name in ("ffn_gate_up_exps.weight", "ffn_exps")]
    assert (errors[1] > errors[0]).all()


def test_convert_and_answer_about_a_picture(
    pico_gemma4: Path, tmp_path: Path, run: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """With default types."""
    convert_and_answer(GEMMA4, pico_gemma4, tmp_path, run, caplog)
