from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from mode_gguf.architectures import find_family, moon_vit, projector_tensors, text_tensors
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError
from tests.architectures.test_qwen3_vl_moe import changed
from tests.families.pico.kimi import EXPERTS, LAYERS, POSITIONS, VISION_HEADS, VISION_HIDDEN, WIDTH, special


@cache
def module_state(folder: Path) -> dict[str, np.ndarray]:
    """The weights of Kimi K2.5 as transformers holds them after its own loading."""
    checkpoint = Checkpoint.open(folder)
    config = Kimi_K25Config.from_dict(dict(find_family(checkpoint).model_config(checkpoint)))
    model = Kimi_K25ForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def by_name(tensors: list[SourceTensor]) -> dict[str, SourceTensor]:
    return {tensor.name: tensor for tensor in tensors}


def whole(tensor: SourceTensor) -> np.ndarray:
    return as_float32(tensor.read(0))


def test_text_tensors_are_those_transformers_computes_with(pico_kimi_k25: Path) -> None:
    state, tensors = module_state(pico_kimi_k25), by_name(text_tensors(Checkpoint.open(pico_kimi_k25)))
    for layer in range(1, LAYERS):
        mlp = f"model.language_model.layers.{layer}.mlp"
        gate_up, down = state[f"{mlp}.experts.gate_up_proj"], state[f"{mlp}.experts.down_proj"]
        for projection, weights in (("gate", gate_up[:, :WIDTH]), ("up", gate_up[:, WIDTH:]), ("down", down)):
            tensor = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert (tensor.shape, tensor.layer, tensor.role) == (weights.shape, layer, Role.EXPERT)
            for expert in range(EXPERTS):
                np.testing.assert_array_equal(as_float32(tensor.read(expert)), weights[expert])
        bias = whole(tensors[f"blk.{layer}.exp_probs_b.bias"])
        np.testing.assert_array_equal(bias, state[f"{mlp}.gate.e_score_correction_bias"])
        assert f"blk.{layer}.ffn_gate.weight" not in tensors
    assert tensors["blk.0.ffn_gate.weight"].role is Role.DENSE
    assert not [name for name in tensors if name.startswith("blk.0.") and ("exp" in name or "gate_inp" in name)]


@pytest.mark.parametrize(("layout", "full"), [("pico_kimi_vl", True), ("pico_kimi_k25", False)])
def test_kinds_of_queries(layout: str, full: bool, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    names = by_name(text_tensors(checkpoint))
    assert ("blk.0.attn_q.weight" in names, "blk.0.attn_q_b.weight" in names) == (full, not full)
    # Only models of 26 or 27 layers may leave it out.
    rank = find_family(checkpoint).text_metadata(checkpoint)["deepseek2.attention.q_lora_rank"]
    assert rank == (0 if full else 256)


def test_queries_and_keys_turn_by_columns_then_rows(pico_kimi_vl: Path, pico_kimi_k25: Path) -> None:
    """Both projectors' rows of one head: first its pairs for columns, then those for rows."""
    head = VISION_HIDDEN // VISION_HEADS
    pairs = np.arange(head).reshape(-1, 2)
    expected = np.concatenate([pairs[0::2].ravel(), pairs[1::2].ravel()])
    for folder, parts in ((pico_kimi_vl, ("q", "k", "v")), (pico_kimi_k25, ("qkv",))):
        checkpoint = Checkpoint.open(folder)
        tensors = by_name(projector_tensors(checkpoint))
        stored = as_float32(checkpoint.read("vision_tower.encoder.blocks.1.wqkv.weight"))
        found = np.concatenate([whole(tensors[f"v.blk.1.attn_{part}.weight"]) for part in parts])
        np.testing.assert_array_equal(found[head : 2 * head], stored[head : 2 * head][expected])
        np.testing.assert_array_equal(found[VISION_HIDDEN:][:head], stored[VISION_HIDDEN:][:head][expected])
        np.testing.assert_array_equal(found[2 * VISION_HIDDEN :], stored[2 * VISION_HIDDEN :])
        if len(parts) > 1:
            np.testing.assert_array_equal(tensors["v.blk.1.attn_q.bias"].read(0, slice(3, 9)).shape, (6,))


def test_position_tables(pico_kimi_vl: Path, pico_kimi_k25: Path) -> None:
    flat = by_name(projector_tensors(Checkpoint.open(pico_kimi_vl)))["v.position_embd.weight"]
    square = by_name(projector_tensors(Checkpoint.open(pico_kimi_k25)))["v.position_embd.weight"]
    assert flat.shape == (POSITIONS**2, VISION_HIDDEN) == whole(flat).shape
    assert square.shape == (POSITIONS, POSITIONS, VISION_HIDDEN)


def test_metadata(pico_kimi_k25: Path, pico_kimi_vl: Path) -> None:
    checkpoint = Checkpoint.open(pico_kimi_k25)
    found = find_family(checkpoint).text_metadata(checkpoint)
    assert found["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert (found["deepseek2.expert_gating_func"], found["deepseek2.leading_dense_block_count"]) == (2, 1)
    limits = find_family(checkpoint).projector_metadata(checkpoint)
    assert limits["clip.vision.image_max_pixels"] == 16384 * 14 * 14
    checkpoint = Checkpoint.open(pico_kimi_vl)
    assert not [key for key in find_family(checkpoint).text_metadata(checkpoint) if "scaling" in key]


def placed(folder: Path, size: tuple[int, int], max_pixels: int = 10**7) -> PlacedImage:
    checkpoint = Checkpoint.open(folder)
    image = Image.new("RGB", size, (255, 0, 0))
    return find_family(checkpoint).place_image(ImagePlace(checkpoint, image, None, None, 7, max_pixels))


def test_pictures_are_padded_to_whole_tokens_and_scaled_down(pico_kimi_vl: Path) -> None:
    found = placed(pico_kimi_vl, (60, 28))
    assert found.arguments["image_grid_thw"].tolist() == [[1, 2, 6]]
    assert list(found.tokens) == [7] * 3
    pixels = found.arguments["pixel_values"]
    assert pixels.shape == (12, 3, 14, 14)
    assert pixels[0, :, 0, 0].tolist() == [1, -1, -1]
    assert pixels[5, :, 0, 0].tolist() == [-1, -1, -1]  # columns 70 on
    rows, columns = placed(pico_kimi_vl, (2800, 1400)).arguments["image_grid_thw"][0, 1:]
    assert rows * columns <= 4096 + 2 * (rows + columns)
    assert len(placed(pico_kimi_vl, (280, 280), 56 * 56).tokens) <= 4


def test_image_token(pico_kimi_vl: Path, tmp_path: Path) -> None:
    assert moon_vit.image_token(Checkpoint.open(pico_kimi_vl)) == special("<|media_pad|>")


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("hidden_act", "gelu"),
            ("scoring_func", "softmax"),
            ("topk_method", "greedy"),
            ("n_group", 2),
            ("topk_group", 2),
            ("moe_layer_freq", 2),
            ("num_nextn_predict_layers", 1),
            ("attention_bias", True),
            ("num_key_value_heads", 2),
            ("rope_scaling", {"type": "linear", "factor": 2.0}),
            ("rope_scaling", {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7}),
        ],
    )
    def test_text(self, pico_kimi_vl: Path, tmp_path: Path, setting: str, value: Any) -> None:
        checkpoint = changed(pico_kimi_vl, tmp_path / "other", "text_config", **{setting: value})
        name = "(rope_type|mscale)" if setting == "rope_scaling" else setting
        with pytest.raises(InputError, match=rf"config\.json: {name} is .*expected"):
            find_family(checkpoint)

    @pytest.mark.parametrize(("setting", "value"), [("merge_kernel_size", [1, 1]), ("init_pos_emb_width", 4)])
    def test_vision(self, pico_kimi_k25: Path, tmp_path: Path, setting: str, value: Any) -> None:
        checkpoint = changed(pico_kimi_k25, tmp_path / "other", "vision_config", **{setting: value})
        with pytest.raises(InputError, match=rf"{setting} is .*expected"):
            find_family(checkpoint)

    def test_a_low_rank_query_in_as_many_layers_as_llama_cpp_expects_none(
        self, pico_kimi_k25: Path, tmp_path: Path
    ) -> None:
        checkpoint = changed(pico_kimi_k25, tmp_path / "other", "text_config", num_hidden_layers=27)
        with pytest.raises(InputError, match="q_lora_rank is 256 with 27 layers"):
            find_family(checkpoint)
