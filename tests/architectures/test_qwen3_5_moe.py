from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode_gguf.architectures import find_family, projector_tensors, qwen3_5_moe, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import read_vocabulary
from tests.architectures.test_qwen3_vl_moe import changed
from tests.families.pico.qwen3_5_moe import (
    EXPERTS,
    KERNEL,
    KEY_HEADS,
    LAYERS,
    LINEAR_DIM,
    VALUE_HEADS,
    WIDTH,
    write_pico_qwen3_5_moe,
)
from tests.families.pico.qwen3_vl_moe import HIDDEN
from tests.families.pico.tokenizer import VOCAB

LINEAR = "model.language_model.layers.0.linear_attn"


@cache
def module_state(folder: Path) -> dict[str, np.ndarray]:
    """The weights as transformers holds them after loading."""
    import torch
    from transformers import Qwen3_5MoeForConditionalGeneration

    model = Qwen3_5MoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def by_name(folder: Path) -> dict[str, SourceTensor]:
    return {tensor.name: tensor for tensor in text_tensors(Checkpoint.open(folder))}


def whole(tensor: SourceTensor) -> np.ndarray:
    return as_float32(tensor.read(0))


def tiled(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Value heads along the first dimension, from `of key head 0 ..., of key head 1 ...` to `first of each, ...`."""
    heads = array.reshape(KEY_HEADS, VALUE_HEADS // KEY_HEADS, head_dim, *array.shape[1:])
    return np.concatenate([heads[:, i].reshape(-1, *array.shape[1:]) for i in range(VALUE_HEADS // KEY_HEADS)])


@pytest.mark.parametrize("layout", ["pico_qwen3_5", "pico_qwen3_5_resaved"])
def test_experts_are_those_transformers_computes_with(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    state, tensors = module_state(folder), by_name(folder)
    for layer in range(LAYERS):
        gate_up = state[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = state[f"model.language_model.layers.{layer}.mlp.experts.down_proj"]
        for projection, weights in (("gate", gate_up[:, :WIDTH]), ("up", gate_up[:, WIDTH:]), ("down", down)):
            tensor = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert (tensor.shape, tensor.layer, tensor.projection) == (weights.shape, layer, projection)
            for expert in range(EXPERTS):
                np.testing.assert_array_equal(as_float32(tensor.read(expert)), weights[expert])
                np.testing.assert_array_equal(as_float32(tensor.read(expert, slice(3, 7))), weights[expert][3:7])


def test_linear_attention(pico_qwen3_5: Path) -> None:
    state, tensors = module_state(pico_qwen3_5), by_name(pico_qwen3_5)
    unmoved = 2 * KEY_HEADS * LINEAR_DIM

    def channels(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[:unmoved], tiled(array[unmoved:], LINEAR_DIM)])

    expected = {
        "attn_qkv.weight": channels(state[f"{LINEAR}.in_proj_qkv.weight"]),
        "attn_gate.weight": tiled(state[f"{LINEAR}.in_proj_z.weight"], LINEAR_DIM),
        "ssm_conv1d.weight": channels(state[f"{LINEAR}.conv1d.weight"][:, 0]),
        "ssm_alpha.weight": tiled(state[f"{LINEAR}.in_proj_a.weight"], 1),
        "ssm_beta.weight": tiled(state[f"{LINEAR}.in_proj_b.weight"], 1),
        "ssm_dt.bias": tiled(state[f"{LINEAR}.dt_bias"], 1),
        "ssm_a": -np.exp(tiled(state[f"{LINEAR}.A_log"], 1).astype(np.float64)).astype(np.float32),
        "ssm_norm.weight": state[f"{LINEAR}.norm.weight"],
        "ssm_out.weight": tiled(state[f"{LINEAR}.out_proj.weight"].T, LINEAR_DIM).T,
    }
    assert expected["ssm_conv1d.weight"].shape[1] == KERNEL
    for name, weights in expected.items():
        tensor = tensors[f"blk.0.{name}"]
        assert tensor.shape == weights.shape
        np.testing.assert_array_equal(whole(tensor), weights, err_msg=name)
        np.testing.assert_array_equal(as_float32(tensor.read(0, slice(1, 4))), weights[1:4], err_msg=name)
        (source,) = tensor.sources
        if tensor.order and tensor.role is Role.DENSE:
            rows = slice(None) if tensor.order.rows is None else tensor.order.rows
            columns = slice(None) if tensor.order.columns is None else tensor.order.columns
            np.testing.assert_array_equal(state[source][rows][:, columns], weights, err_msg=name)


def test_norms_have_the_one_that_transformers_adds(pico_qwen3_5: Path) -> None:
    state, tensors = module_state(pico_qwen3_5), by_name(pico_qwen3_5)
    for name, source in {
        "blk.3.attn_norm.weight": "layers.3.input_layernorm",
        "blk.3.post_attention_norm.weight": "layers.3.post_attention_layernorm",
        "blk.3.attn_q_norm.weight": "layers.3.self_attn.q_norm",
        "blk.3.attn_k_norm.weight": "layers.3.self_attn.k_norm",
        "output_norm.weight": "norm",
    }.items():
        np.testing.assert_array_equal(whole(tensors[name]), state[f"model.language_model.{source}.weight"] + 1)


def test_everything_else_is_stored_as_it_is(pico_qwen3_5: Path) -> None:
    state, tensors = module_state(pico_qwen3_5), by_name(pico_qwen3_5)
    plain = [
        tensor
        for tensor in tensors.values()
        if tensor.role is not Role.EXPERT and "norm" not in tensor.name and "linear_attn" not in tensor.sources[0]
    ]
    assert len(plain) == 2 + 4 + 5 * LAYERS
    for tensor in plain:
        np.testing.assert_array_equal(whole(tensor), state[tensor.sources[0]], err_msg=tensor.name)


def test_kinds_of_layers_and_roles(pico_qwen3_5: Path) -> None:
    tensors = by_name(pico_qwen3_5)
    for layer in range(LAYERS):
        assert (f"blk.{layer}.attn_q.weight" in tensors) == (layer == 3)
        assert (f"blk.{layer}.ssm_out.weight" in tensors) == (layer != 3)
    dense = {name.removeprefix("blk.0.") for name, t in tensors.items() if t.layer == 0 and t.role is Role.DENSE}
    assert dense == {f"{n}.weight" for n in ("attn_qkv", "attn_gate", "ssm_out")} | {
        f"ffn_{projection}_shexp.weight" for projection in ("gate", "up", "down")
    }
    assert not [name for name in tensors if "nextn" in name or name.startswith(f"blk.{LAYERS}.")]


def test_projector_tensors(pico_qwen3_5: Path) -> None:
    checkpoint = Checkpoint.open(pico_qwen3_5)
    state = module_state(pico_qwen3_5)
    for tensor in projector_tensors(checkpoint):
        assert "deepstack" not in tensor.name
        if "patch_embd.weight" not in tensor.name:
            np.testing.assert_array_equal(whole(tensor), state[tensor.sources[0]], err_msg=tensor.name)
    metadata = find_family(checkpoint).projector_metadata(checkpoint)
    assert metadata["clip.vision.is_deepstack_layers"] == [False] * 3
    assert metadata["clip.vision.projection_dim"] == HIDDEN


def test_text_metadata(pico_qwen3_5: Path, tmp_path: Path) -> None:
    found = qwen3_5_moe.text_metadata(Checkpoint.open(pico_qwen3_5))
    assert found["qwen35moe.block_count"] == LAYERS
    assert found["qwen35moe.attention.recurrent_layers"] == [True, True, True, False, True]
    assert found["qwen35moe.rope.dimension_count"] == 32
    assert found["qwen35moe.rope.dimension_sections"] == [6, 5, 5, 0]
    assert found["qwen35moe.ssm.inner_size"] == VALUE_HEADS * LINEAR_DIM
    assert found["qwen35moe.full_attention_interval"] == 4
    implied = changed(pico_qwen3_5, tmp_path / "implied", "text_config", layer_types=None)
    assert qwen3_5_moe.text_metadata(implied) == found
    plain = changed(pico_qwen3_5, tmp_path / "plain", "text_config", rope_parameters={"rope_theta": 10_000})
    defaults = qwen3_5_moe.text_metadata(plain)
    assert defaults["qwen35moe.rope.dimension_sections"] == [11, 11, 10, 0]
    assert defaults["qwen35moe.rope.dimension_count"] == 16


def test_pre_tokenizer(pico_qwen3_5: Path) -> None:
    assert read_vocabulary(pico_qwen3_5, VOCAB).pre_tokenizer == "qwen35"


def test_tied_embeddings_have_no_output_tensor(tmp_path: Path) -> None:
    assert "output.weight" not in by_name(write_pico_qwen3_5_moe(tmp_path, tied=True))


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("norm_topk_prob", False),
            ("hidden_act", "gelu"),
            ("attention_bias", True),
            ("attn_output_gate", False),
            ("linear_value_head_dim", 64),
            ("layer_types", ["linear_attention", "sliding_attention"]),
            ("linear_num_value_heads", 5),
            ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10_000}),
        ],
    )
    def test_what_llama_cpp_would_run_differently(
        self, pico_qwen3_5: Path, tmp_path: Path, setting: str, value: Any
    ) -> None:
        checkpoint = changed(pico_qwen3_5, tmp_path / "other", "text_config", **{setting: value})
        name = "rope_type" if setting == "rope_parameters" else setting
        with pytest.raises(InputError, match=rf"config\.json: {name} is .*expected"):
            find_family(checkpoint)

    def test_other_heads_than_the_weights_have(self, pico_qwen3_5: Path, tmp_path: Path) -> None:
        checkpoint = changed(pico_qwen3_5, tmp_path / "other", "text_config", linear_num_value_heads=4)
        with pytest.raises(InputError, match=r"in_proj_qkv\.weight has shape \[1280, 256\], expected 1024 rows"):
            text_tensors(checkpoint)

    def test_another_number_of_experts(self, pico_qwen3_5_resaved: Path, tmp_path: Path) -> None:
        fewer = changed(pico_qwen3_5_resaved, tmp_path / "fewer", "text_config", num_experts=3)
        with pytest.raises(InputError, match=r"experts\.3\.\S+ .* has no place"):
            text_tensors(fewer)
        more = changed(pico_qwen3_5_resaved, tmp_path / "more", "text_config", num_experts=5)
        with pytest.raises(InputError, match=r"experts\.4\.gate_proj\.weight is missing"):
            text_tensors(more)
