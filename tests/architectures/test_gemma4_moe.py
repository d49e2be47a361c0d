import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode_gguf.architectures import find_family, gemma4_moe, left_out, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import read_vocabulary
from tests.architectures.test_qwen3_vl_moe import changed
from tests.families.pico.files import write_json
from tests.families.pico.gemma4_moe import (
    EXPERTS,
    FULL_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    PATCH,
    SLIDING_DIM,
    SOFT_CAP,
    SOFT_TOKENS,
    VISION_BLOCKS,
    VISION_HIDDEN,
    WIDTH,
    WINDOW,
    write_pico_gemma4_moe,
)
from tests.families.pico.tokenizer import VOCAB


@cache
def module_state(folder: Path) -> dict[str, np.ndarray]:
    """The weights as transformers holds them after loading."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def by_name(folder: Path) -> dict[str, SourceTensor]:
    return {tensor.name: tensor for tensor in text_tensors(Checkpoint.open(folder))}


def whole(tensor: SourceTensor) -> np.ndarray:
    return as_float32(tensor.read(0))


def test_experts_with_gate_and_up_in_one(pico_gemma4: Path) -> None:
    state, tensors = module_state(pico_gemma4), by_name(pico_gemma4)
    for layer in range(LAYERS):
        for projection, source in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            weights = state[f"model.language_model.layers.{layer}.experts.{source}"]
            tensor = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert (tensor.shape, tensor.layer, tensor.projection) == (weights.shape, layer, projection)
            for expert in range(EXPERTS):
                np.testing.assert_array_equal(as_float32(tensor.read(expert)), weights[expert])
                np.testing.assert_array_equal(
                    as_float32(tensor.read(expert, slice(WIDTH - 2, WIDTH + 3))), weights[expert][WIDTH - 2 : WIDTH + 3]
                )


def test_everything_else_is_stored_as_it_is(pico_gemma4: Path) -> None:
    state, tensors = module_state(pico_gemma4), by_name(pico_gemma4)
    plain = [t for t in tensors.values() if t.role is not Role.EXPERT and t.name != "rope_freqs.weight"]
    assert len(plain) == 2 + 20 * LAYERS - LAYERS // 2  # two layers without values of their own
    for tensor in plain:
        np.testing.assert_array_equal(whole(tensor), state[tensor.sources[0]], err_msg=tensor.name)


def test_kinds_of_layers_and_roles(pico_gemma4: Path) -> None:
    tensors = by_name(pico_gemma4)
    assert [f"blk.{layer}.attn_v.weight" in tensors for layer in range(LAYERS)] == [True, False] * 2
    for layer, head_dim in enumerate((SLIDING_DIM, FULL_DIM) * 2):
        assert tensors[f"blk.{layer}.attn_q.weight"].shape == (HEADS * head_dim, HIDDEN)
    dense = {name.removeprefix("blk.1.") for name, t in tensors.items() if t.layer == 1 and t.role is Role.DENSE}
    names = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert dense == {f"{name}.weight" for name in names}
    for name in ("ffn_gate_inp.weight", "ffn_gate_inp.scale", "ffn_down_exps.scale", "layer_output_scale.weight"):
        assert tensors[f"blk.0.{name}"].role is Role.KEEP
    assert "output.weight" not in tensors


def test_rotary_frequencies_are_those_of_transformers(pico_gemma4: Path) -> None:
    """llama.cpp divides base^(-2i / head size) by them."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = AutoConfig.from_pretrained(pico_gemma4).text_config
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](text, None, layer_type="full_attention")
    spread = 1e6 ** -(np.arange(0, FULL_DIM, 2) / FULL_DIM)
    found = spread / whole(by_name(pico_gemma4)["rope_freqs.weight"])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-29)


def test_projector_tensors(pico_gemma4: Path) -> None:
    state, checkpoint = module_state(pico_gemma4), Checkpoint.open(pico_gemma4)
    tensors = {tensor.name: tensor for tensor in projector_tensors(checkpoint)}
    assert len(tensors) == 2 + 13 * VISION_BLOCKS + 3
    for tensor in tensors.values():
        if tensor.name != "v.patch_embd.weight":
            np.testing.assert_array_equal(whole(tensor), state[tensor.sources[0]], err_msg=tensor.name)
    patches = tensors["v.patch_embd.weight"]
    rows = state[patches.sources[0]].reshape(VISION_HIDDEN, PATCH, PATCH, 3)
    assert patches.shape == (VISION_HIDDEN, 3, PATCH, PATCH)
    np.testing.assert_array_equal(whole(patches)[:, 1, 2, 3], rows[:, 2, 3, 1])
    np.testing.assert_array_equal(as_float32(patches.read(0, slice(4, 6))), whole(patches)[4:6])
    metadata = find_family(checkpoint).projector_metadata(checkpoint)
    assert metadata["clip.use_gelu"] is True
    assert metadata["clip.vision.projection_dim"] == HIDDEN
    assert "clip.vision.projector.scale_factor" not in metadata


def test_optional_parts_of_the_vision_tower(tmp_path: Path) -> None:
    folder = write_pico_gemma4_moe(tmp_path / "clipped", clipped=True, standardized=False)
    tensors = {tensor.name: tensor for tensor in projector_tensors(Checkpoint.open(folder))}
    assert len(tensors) == 2 + (13 + 7 * 4) * VISION_BLOCKS + 1
    assert whole(tensors["v.blk.2.ffn_down.input_max"]).tolist() == [1.25]
    assert "v.std_bias" not in tensors
    pooled = changed(folder, tmp_path / "pooled", "vision_config", pooling_kernel_size=2)
    assert gemma4_moe.projector_metadata(pooled)["clip.vision.projector.scale_factor"] == 2


def test_text_metadata(pico_gemma4: Path) -> None:
    found = gemma4_moe.text_metadata(Checkpoint.open(pico_gemma4))
    assert found["gemma4.attention.head_count_kv"] == [2, 1, 2, 1]
    assert found["gemma4.attention.sliding_window_pattern"] == [True, False, True, False]
    assert (found["gemma4.attention.key_length"], found["gemma4.attention.key_length_swa"]) == (FULL_DIM, SLIDING_DIM)
    assert found["gemma4.attention.sliding_window"] == WINDOW
    assert found["gemma4.final_logit_softcapping"] == SOFT_CAP
    assert (found["gemma4.expert_count"], found["gemma4.expert_feed_forward_length"]) == (EXPERTS, WIDTH)
    assert (found["gemma4.rope.freq_base"], found["gemma4.rope.freq_base_swa"]) == (1e6, 1e4)


def test_settings_as_transformers_saves_them(pico_gemma4: Path, tmp_path: Path) -> None:
    """Layer by layer, in the place of names of their own."""
    from transformers import AutoConfig

    checkpoint = Checkpoint.open(pico_gemma4)
    saved = AutoConfig.from_pretrained(pico_gemma4).to_dict()["text_config"]
    without = {name: None for name in checkpoint.config["text_config"] if name not in saved}
    assert without.keys() == {"global_head_dim", "num_global_key_value_heads"}
    resaved = changed(pico_gemma4, tmp_path / "resaved", "text_config", **json.loads(json.dumps(saved)), **without)
    assert gemma4_moe.text_metadata(resaved) == gemma4_moe.text_metadata(checkpoint)


def test_defaults_are_those_of_transformers(pico_gemma4: Path, tmp_path: Path) -> None:
    settings = dict.fromkeys(("layer_types", "rope_parameters", "global_head_dim"), None)
    found = gemma4_moe.text_metadata(changed(pico_gemma4, tmp_path / "bare", "text_config", **settings))
    assert found["gemma4.attention.sliding_window_pattern"] == [True, True, True, False]
    assert found["gemma4.rope.freq_base"] == 1e6


def test_vocabulary(pico_gemma4: Path) -> None:
    vocabulary = read_vocabulary(pico_gemma4, VOCAB)
    assert vocabulary.pre_tokenizer == "gemma4"
    kinds = {token: kind.name for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)}
    assert [kinds[token] for token in ("<bos>", "<|image>", "<0x0A>", "<|channel>", "\n", "<unused511>")] == [
        *("CONTROL", "CONTROL", "BYTE", "USER_DEFINED", "NORMAL", "NORMAL")
    ]


def test_tokens_of_a_picture_at_most(pico_gemma4: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico_gemma4)
    assert gemma4_moe.image_tokens(checkpoint, None) == SOFT_TOKENS == 70
    larger = changed(pico_gemma4, tmp_path / "larger", "text_config")
    write_json(larger.path / "preprocessor_config.json", {"max_soft_tokens": 280})
    assert [gemma4_moe.image_tokens(larger, size) for size in (None, (48, 48), (720, 480), (2000, 2000))] == [
        *(280, 70, 140, 280)
    ]


def test_an_audio_tower_is_left_out(pico_gemma4: Path) -> None:
    checkpoint = Checkpoint.open(pico_gemma4)
    assert left_out(checkpoint) == ["model.audio_tower.output_proj.weight"]
    assert gemma4_moe.model_config(checkpoint)["audio_config"] is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("hidden_size_per_layer_input", 256),
            ("num_kv_shared_layers", 2),
            ("use_bidirectional_attention", None),
            ("use_bidirectional_attention", "all"),
            ("hidden_activation", "silu"),
            ("attention_bias", True),
            ("layer_types", ["full_attention", "linear_attention"]),
            ("per_layer_config", {"0": {"head_dim": 64}, "1": {"head_dim": 128}}),
        ],
    )
    def test_text_settings(self, pico_gemma4: Path, tmp_path: Path, setting: str, value: Any) -> None:
        checkpoint = changed(pico_gemma4, tmp_path / "other", "text_config", **{setting: value})
        with pytest.raises(InputError, match=rf"config\.json: {setting} is .*expected"):
            find_family(checkpoint)

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("hidden_activation", "gelu"),
            ("attention_bias", True),
            ("num_key_value_heads", 1),
            ("head_dim", 64),
            ("rope_parameters", {"rope_theta": 50.0}),
        ],
    )
    def test_vision_settings(self, pico_gemma4: Path, tmp_path: Path, setting: str, value: Any) -> None:
        checkpoint = changed(pico_gemma4, tmp_path / "other", "vision_config", **{setting: value})
        name = "rope_theta" if setting == "rope_parameters" else setting
        with pytest.raises(InputError, match=rf"config\.json: vision {name} is .*expected"):
            find_family(checkpoint)

    def test_other_rotary_embeddings(self, pico_gemma4: Path, tmp_path: Path) -> None:
        rope = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}
        checkpoint = changed(pico_gemma4, tmp_path / "other", "text_config", rope_parameters=rope)
        with pytest.raises(InputError, match="rope_type of full_attention is 'yarn', expected 'proportional'"):
            find_family(checkpoint)

    def test_a_dense_model(self, pico_gemma4: Path, tmp_path: Path) -> None:
        checkpoint = changed(pico_gemma4, tmp_path / "dense", "text_config", enable_moe_block=False)
        with pytest.raises(InputError, match="not a Mixture-of-Experts model"):
            find_family(checkpoint)

    def test_other_patches_than_the_weights_have(self, pico_gemma4: Path, tmp_path: Path) -> None:
        checkpoint = changed(pico_gemma4, tmp_path / "other", "vision_config", patch_size=14)
        with pytest.raises(InputError, match=r"input_proj\.weight has shape \[64, 768\], expected \[64, 588\]"):
            projector_tensors(checkpoint)
