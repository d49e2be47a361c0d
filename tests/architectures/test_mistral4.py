import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType

from mode_gguf.architectures import find_family, mistral4, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import add_tokenizer_keys, read_vocabulary
from tests.architectures.test_qwen3_vl_moe import changed
from tests.families.pico.mistral4 import (
    ATTENTION,
    EXPERTS,
    LAYERS,
    ORIGINAL_CONTEXT,
    VISION_HEADS,
    WIDTH,
    token_id,
    write_pico_mistral4,
)
from tests.families.pico.qwen3_vl_moe import HIDDEN
from tests.families.pico.tokenizer import VOCAB

LAYOUTS = ["pico_mistral4", "pico_mistral4_module"]


@cache
def module_state(folder: Path) -> dict[str, np.ndarray]:
    """The weights as transformers holds them after loading."""
    import torch
    from transformers import Mistral3ForConditionalGeneration

    model = Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def by_name(folder: Path) -> dict[str, SourceTensor]:
    return {tensor.name: tensor for tensor in text_tensors(Checkpoint.open(folder))}


def whole(tensor: SourceTensor) -> np.ndarray:
    return as_float32(tensor.read(0))


def parameter(source: str) -> str:
    """Of a stored name of either layout."""
    name = source.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
    return name if name.startswith(("model.", "lm_head")) else f"model.{name}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_tensors_are_those_transformers_computes_with(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    state, tensors = module_state(folder), by_name(folder)
    for tensor in tensors.values():
        (source,) = tensor.sources
        stored = state[parameter(source)]
        match tensor.role, tensor.projection:
            case Role.EXPERT, "down":
                expected = stored
            case Role.EXPERT, projection:
                expected = stored[:, WIDTH:] if projection == "up" else stored[:, :WIDTH]
            case Role.ABSORBED, _:
                heads = stored.reshape(ATTENTION.heads, ATTENTION.nope + ATTENTION.value, ATTENTION.latent)
                expected = (
                    heads[:, : ATTENTION.nope].swapaxes(1, 2)
                    if "attn_k_b" in tensor.name
                    else heads[:, ATTENTION.nope :]
                )
            case _:
                expected = stored
        assert tensor.shape == expected.shape
        if tensor.role is Role.EXPERT:
            assert tensor.n_experts == EXPERTS
            found = np.stack([as_float32(tensor.read(expert)) for expert in range(EXPERTS)])
        else:
            found = whole(tensor)
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)


def test_roles(pico_mistral4: Path) -> None:
    tensors = by_name(pico_mistral4)
    dense = {name.removeprefix("blk.0.") for name, t in tensors.items() if t.layer == 0 and t.role is Role.DENSE}
    assert dense == {
        f"{name}.weight"
        for name in ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_output", "ffn_gate_shexp", "ffn_up_shexp")
    } | {"ffn_down_shexp.weight"}
    assert sum(tensor.role is Role.ABSORBED for tensor in tensors.values()) == 2 * LAYERS
    assert tensors["blk.0.ffn_gate_inp.weight"].role is Role.KEEP


@pytest.mark.parametrize("layout", LAYOUTS)
def test_projector_tensors(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    state = module_state(checkpoint.path)
    tensors = {tensor.name: tensor for tensor in projector_tensors(checkpoint)}
    for name, tensor in tensors.items():
        expected = state[parameter(tensor.sources[0])]
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            halves = expected.reshape(VISION_HEADS, 2, -1, expected.shape[1])
            expected = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(expected.shape)
            np.testing.assert_array_equal(as_float32(tensor.read(0, slice(3, 7))), expected[3:7])
        if name == "v.token_embd.img_break":
            expected = expected[token_id("[IMG_BREAK]")]
        np.testing.assert_array_equal(whole(tensor), expected, err_msg=name)
    assert "mm.1.bias" not in tensors


def test_projector_with_biases(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_pico_mistral4(tmp_path, projector_bias=True))
    assert {"mm.1.bias", "mm.2.bias"} <= {tensor.name for tensor in projector_tensors(checkpoint)}


def test_fp8_is_decoded(tmp_path: Path) -> None:
    """Against the weights it was made of: a step of E4M3 is at most 1/16 of a value."""
    exact, coarse = by_name(write_pico_mistral4(tmp_path / "a")), by_name(write_pico_mistral4(tmp_path / "b", fp8=True))
    assert exact.keys() == coarse.keys()
    for name, tensor in coarse.items():
        assert tensor.shape == exact[name].shape
        found, expected = (
            as_float32(tensor.read(tensor.n_experts - 1)),
            as_float32(exact[name].read(tensor.n_experts - 1)),
        )
        off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        in_fp8 = tensor.role in (Role.EXPERT, Role.DENSE, Role.ABSORBED)
        assert (0.01 < off < 0.04) if in_fp8 else off == 0, name


def test_text_metadata(pico_mistral4: Path, tmp_path: Path) -> None:
    found = mistral4.text_metadata(Checkpoint.open(pico_mistral4))
    expected = {
        "block_count": LAYERS,
        "vocab_size": VOCAB,
        "attention.head_count_kv": 1,
        "attention.key_length": ATTENTION.latent + ATTENTION.rotated,
        "attention.value_length": ATTENTION.latent,
        "attention.key_length_mla": ATTENTION.nope + ATTENTION.rotated,
        "attention.value_length_mla": ATTENTION.value,
        "attention.temperature_scale": 0.1,
        "attention.temperature_length": ORIGINAL_CONTEXT,
        "rope.dimension_count": ATTENTION.rotated,
        "rope.scaling.type": "yarn",
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
        "expert_count": EXPERTS,
        "expert_shared_count": 1,
        "expert_weights_norm": True,
    }
    assert {key: found[f"mistral4.{key}"] for key in expected} == expected
    plain = changed(pico_mistral4, tmp_path / "plain", "text_config", norm_topk_prob=False, routed_scaling_factor=2.5)
    other = find_family(plain).text_metadata(plain)
    assert "mistral4.expert_weights_norm" not in other
    assert other["mistral4.expert_weights_scale"] == 2.5


def test_rope_as_transformers_4_wrote_it(pico_mistral4: Path, tmp_path: Path) -> None:
    rope = json.loads((pico_mistral4 / "config.json").read_text())["text_config"]["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = changed(
        pico_mistral4,
        tmp_path / "old",
        "text_config",
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling={**rope, "type": kind},
    )
    assert find_family(old).text_metadata(old) == mistral4.text_metadata(Checkpoint.open(pico_mistral4))


def test_projector_metadata(pico_mistral4: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico_mistral4)
    found = find_family(checkpoint).projector_metadata(checkpoint)
    assert found["clip.vision.projection_dim"] == HIDDEN
    assert found["clip.use_silu"] is True
    gelu = changed(pico_mistral4, tmp_path / "gelu", "vision_config", hidden_act="gelu")
    assert find_family(gelu).projector_metadata(gelu)["clip.use_gelu"] is True


def test_tokenizer(pico_mistral4: Path) -> None:
    vocabulary = read_vocabulary(pico_mistral4, VOCAB)
    assert vocabulary.pre_tokenizer == "tekken"
    assert vocabulary.tokens[10:14] == ["[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
    assert vocabulary.kinds[12:15] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    writer = GGUFWriter(None, "test")
    add_tokenizer_keys(writer, pico_mistral4, VOCAB)
    keys = {key: value.value for key, value in writer.kv_data[0].items()}
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.bos_token_id"] == token_id("<s>")
    assert "[INST]" in keys["tokenizer.chat_template"]


@pytest.mark.parametrize("said", [True, None])
def test_a_stored_head_is_the_head_whatever_config_json_says(pico_mistral4: Path, tmp_path: Path, said: Any) -> None:
    checkpoint = changed(pico_mistral4, tmp_path / "tied", tie_word_embeddings=said)
    assert "output.weight" in {tensor.name for tensor in text_tensors(checkpoint)}
    assert mistral4.model_config(checkpoint)["tie_word_embeddings"] is False


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("hidden_act", "gelu"),
            ("attention_bias", True),
            ("num_key_value_heads", 2),
            ("first_k_dense_replace", 1),
            ("n_group", 2),
            ("rope_interleave", False),
        ],
    )
    def test_settings_of_the_text_model(self, pico_mistral4: Path, tmp_path: Path, setting: str, value: Any) -> None:
        checkpoint = changed(pico_mistral4, tmp_path / "other", "text_config", **{setting: value})
        with pytest.raises(InputError, match=rf"config\.json: {setting} is .*expected"):
            find_family(checkpoint)

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("rope_type", "linear"),
            ("mscale", 0.7),
            ("mscale_all_dim", None),
            ("attention_factor", 1.2),
            ("truncate", False),
            ("partial_rotary_factor", 1.0),
        ],
    )
    def test_rope(self, pico_mistral4: Path, tmp_path: Path, setting: str, value: Any) -> None:
        rope = json.loads((pico_mistral4 / "config.json").read_text())["text_config"]["rope_parameters"]
        checkpoint = changed(pico_mistral4, tmp_path / "other", "text_config", rope_parameters={**rope, setting: value})
        with pytest.raises(InputError, match=rf"config\.json: {setting} is .*expected"):
            find_family(checkpoint)

    @pytest.mark.parametrize(
        ("section", "setting", "value"),
        [
            ("vision_config", "hidden_act", "relu"),
            ("vision_config", "model_type", "siglip"),
            ("vision_config", "rope_parameters", {"rope_theta": 500.0}),
            (None, "vision_feature_layer", -2),
            (None, "projector_hidden_act", "relu"),
        ],
    )
    def test_settings_of_the_projector(
        self, pico_mistral4: Path, tmp_path: Path, section: str | None, setting: str, value: Any
    ) -> None:
        checkpoint = changed(pico_mistral4, tmp_path / "other", section, **{setting: value})
        with pytest.raises(InputError, match=r"config\.json: .* is .*expected"):
            find_family(checkpoint)

    @pytest.mark.parametrize("model_type", ["mistral", "ministral3"])
    def test_dense_models_of_the_class(self, pico_mistral4: Path, tmp_path: Path, model_type: str) -> None:
        checkpoint = changed(pico_mistral4, tmp_path / "dense", "text_config", model_type=model_type)
        with pytest.raises(InputError, match=rf"text model is '{model_type}', expected 'mistral4'.*dense models"):
            find_family(checkpoint)

    def test_a_vocabulary_without_the_break(self, pico_mistral4: Path, tmp_path: Path) -> None:
        checkpoint = changed(pico_mistral4, tmp_path / "other")
        path = tmp_path / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace("[IMG_BREAK]", "[IMG_ROW]"))
        with pytest.raises(InputError, match=r"tokenizer\.json: special token \[IMG_BREAK\] is missing"):
            next(t for t in projector_tensors(checkpoint) if t.name == "v.token_embd.img_break")
