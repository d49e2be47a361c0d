import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLConfig

from mode_gguf.architectures import find_family, internvl, projector_tensors, text_tensors
from mode_gguf.architectures.images import ImagePlace, scaled_size
from mode_gguf.architectures.tensors import SourceTensor, as_float32
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.tokenizer import read_vocabulary
from tests.architectures.test_qwen3_vl_moe import changed
from tests.families.pico.internvl import (
    BLOCKS,
    EXPERTS,
    LAYERS,
    MAX_TILES,
    PATCH,
    SIDE,
    VISION_HIDDEN,
    WIDTH,
    mark_id,
    write_pico_internvl,
)
from tests.families.pico.qwen3_vl_moe import HEAD_DIM, HIDDEN
from tests.families.pico.tokenizer import VOCAB

LAYOUTS = pytest.mark.parametrize("layout", ["pico_internvl", "pico_internvl_hf"])


@cache
def module_state(folder: Path) -> dict[str, np.ndarray]:
    """The weights as transformers holds them after loading; it cannot open the authors' layout."""
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def state(pico_internvl_hf: Path) -> dict[str, np.ndarray]:
    return module_state(pico_internvl_hf)


def whole(tensor: SourceTensor) -> np.ndarray:
    return as_float32(tensor.read(0))


@LAYOUTS
def test_experts_are_those_transformers_computes_with(
    layout: str, request: pytest.FixtureRequest, state: dict[str, np.ndarray]
) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    tensors = {tensor.name: tensor for tensor in text_tensors(checkpoint)}
    for layer in range(LAYERS):
        gate_up = state[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = state[f"model.language_model.layers.{layer}.mlp.experts.down_proj"]
        for projection, weights in (("gate", gate_up[:, :WIDTH]), ("up", gate_up[:, WIDTH:]), ("down", down)):
            tensor = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert (tensor.shape, tensor.layer, tensor.projection) == (weights.shape, layer, projection)
            for expert in range(EXPERTS):
                np.testing.assert_array_equal(as_float32(tensor.read(expert)), weights[expert])


@LAYOUTS
def test_every_other_tensor_is_a_parameter_of_transformers(
    layout: str, request: pytest.FixtureRequest, state: dict[str, np.ndarray]
) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    family = find_family(checkpoint)
    expected = {
        "token_embd.weight": "model.language_model.embed_tokens.weight",
        "output_norm.weight": "model.language_model.norm.weight",
        "output.weight": "lm_head.weight",
        "v.class_embd": "model.vision_tower.embeddings.cls_token",
        "v.patch_embd.weight": "model.vision_tower.embeddings.patch_embeddings.projection.weight",
        "v.patch_embd.bias": "model.vision_tower.embeddings.patch_embeddings.projection.bias",
    }
    for ours, theirs in (
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate_inp", "mlp.gate"),
    ):
        for layer in range(LAYERS):
            expected[f"blk.{layer}.{ours}.weight"] = f"model.language_model.layers.{layer}.{theirs}.weight"
    for block in range(BLOCKS):
        source = f"model.vision_tower.encoder.layer.{block}"
        expected |= {f"v.blk.{block}.ls{i}.weight": f"{source}.lambda_{i}" for i in (1, 2)}
    for part in ("weight", "bias"):
        for ours, theirs in (("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")):
            expected[f"mm.model.mlp.{ours}.{part}"] = f"model.multi_modal_projector.{theirs}.{part}"
        for ours, theirs in (
            ("ln1", "layernorm_before"),
            ("attn_q", "attention.q_proj"),
            ("attn_k", "attention.k_proj"),
            ("attn_v", "attention.v_proj"),
            ("attn_out", "attention.projection_layer"),
            ("ln2", "layernorm_after"),
            ("ffn_up", "mlp.fc1"),
            ("ffn_down", "mlp.fc2"),
        ):
            for block in range(BLOCKS):
                expected[f"v.blk.{block}.{ours}.{part}"] = f"model.vision_tower.encoder.layer.{block}.{theirs}.{part}"
    tensors = [*text_tensors(checkpoint), *projector_tensors(checkpoint)]
    plain = {t.name: t for t in tensors if t.projection is None and t.name != "v.position_embd.weight"}
    assert plain.keys() == expected.keys()
    for name, tensor in plain.items():
        source = expected[name]
        assert tensor.sources == (family.stored_name(source),)
        assert tensor.shape == state[source].shape
        np.testing.assert_array_equal(whole(tensor), state[source], err_msg=name)
        if tensor.shape[0] > 4:
            np.testing.assert_array_equal(as_float32(tensor.read(0, slice(1, 4))), state[source][1:4], err_msg=name)
        special = family.read_parameter(checkpoint, source)
        read = checkpoint.read(tensor.sources[0]) if special is None else special
        np.testing.assert_array_equal(as_float32(read), state[source], err_msg=source)


@LAYOUTS
def test_the_class_token_has_the_last_position(
    layout: str, request: pytest.FixtureRequest, state: dict[str, np.ndarray]
) -> None:
    tensors = {t.name: t for t in projector_tensors(Checkpoint.open(request.getfixturevalue(layout)))}
    found = whole(tensors["v.position_embd.weight"])
    table = state["model.vision_tower.embeddings.position_embeddings"]
    np.testing.assert_array_equal(found[0, -1], table[0, 0])
    np.testing.assert_array_equal(found[0, :-1], table[0, 1:])


@LAYOUTS
def test_metadata(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    family = find_family(checkpoint)
    text, vision = family.text_metadata(checkpoint), family.projector_metadata(checkpoint)
    assert family.gguf_arch == "qwen3moe"
    assert text["qwen3moe.attention.key_length"] == HEAD_DIM
    assert text["qwen3moe.rope.freq_base"] == 1_000_000
    assert (text["qwen3moe.expert_count"], text["qwen3moe.expert_feed_forward_length"]) == (EXPERTS, WIDTH)
    assert (vision["clip.vision.image_size"], vision["clip.vision.patch_size"]) == (SIDE, PATCH)
    assert vision["clip.vision.projection_dim"] == HIDDEN
    assert vision["clip.vision.projector.scale_factor"] == 2
    assert (vision["clip.vision.preproc_min_tiles"], vision["clip.vision.preproc_max_tiles"]) == (1, MAX_TILES)
    assert vision["clip.use_gelu"] is True
    assert family.image_token(checkpoint) == mark_id("<IMG_CONTEXT>")
    assert read_vocabulary(checkpoint.path, VOCAB).pre_tokenizer == "qwen2"


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_the_larger_vision_tower(
    layout: Literal["original", "transformers"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter of transformers' model is in the checkpoint, and all of them in the file."""
    from transformers import InternVLForConditionalGeneration

    monkeypatch.setattr(internvl, "RMS_WIDTH", VISION_HIDDEN)
    monkeypatch.setattr(internvl, "RMS_BLOCKS", BLOCKS)
    checkpoint = Checkpoint.open(write_pico_internvl(tmp_path, layout=layout, large=True))
    family = find_family(checkpoint)
    tensors = {tensor.name: tensor for tensor in projector_tensors(checkpoint)}
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig.from_dict(dict(family.model_config(checkpoint))))
    read = {
        name: family.read_parameter(checkpoint, name)
        for name, _ in model.named_parameters()
        if name.startswith(("model.vision_tower", "model.multi_modal_projector"))
    }
    assert len(read) == len(tensors)
    for name, special in read.items():
        values = checkpoint.read(family.stored_name(name)) if special is None else special
        assert values.shape == model.get_parameter(name).shape
    source = "model.vision_tower.encoder.layer.3.attention"
    for norm in ("q_norm", "k_norm"):
        assert tensors[f"v.blk.3.attn_{norm}.weight"].sources == (family.stored_name(f"{source}.{norm}.weight"),)
    assert "v.blk.0.ln1.bias" not in tensors
    assert "v.blk.0.attn_q.bias" not in tensors
    assert "v.blk.0.attn_out.bias" in tensors


def test_both_layouts_make_one_configuration(pico_internvl: Path, pico_internvl_hf: Path) -> None:
    ours, theirs = (
        InternVLConfig.from_dict(dict(internvl.model_config(Checkpoint.open(folder)))).to_dict()
        for folder in (pico_internvl, pico_internvl_hf)
    )
    for config in (ours, theirs):
        del config["transformers_version"], config["vision_config"]["architectures"]
    assert ours == theirs


def test_scaling_beyond_the_trained_context_is_left_out(pico_internvl: Path, tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}
    checkpoint = changed(pico_internvl, tmp_path / "other", "llm_config", rope_scaling=scaling)
    assert find_family(checkpoint).text_metadata(checkpoint)["qwen3moe.rope.freq_base"] == 1_000_000
    assert "rope_scaling" not in internvl.model_config(checkpoint)["text_config"]


def test_tied_embeddings_have_no_output_tensor(tmp_path: Path) -> None:
    tensors = text_tensors(Checkpoint.open(write_pico_internvl(tmp_path, tied=True)))
    assert "output.weight" not in {tensor.name for tensor in tensors}


@pytest.mark.parametrize(
    ("size", "max_pixels", "n_tiles"), [((56, 40), 10**6, 1), ((120, 60), 10**6, 7), ((120, 60), 1000, 1)]
)
def test_a_picture_takes_its_place(
    pico_internvl: Path, pico_internvl_hf: Path, size: tuple[int, int], max_pixels: int, n_tiles: int
) -> None:
    picture, token = Image.new("RGB", size, (255, 0, 128)), mark_id("<IMG_CONTEXT>")
    from transformers import AutoTokenizer

    checkpoint, tokenizer = Checkpoint.open(pico_internvl), AutoTokenizer.from_pretrained(pico_internvl_hf)
    placed = internvl.place_image(ImagePlace(checkpoint, picture, None, tokenizer, token, max_pixels))
    assert placed.tokens == [mark_id("<img>"), *[token] * (4 * n_tiles), mark_id("</img>")]
    assert internvl.image_tokens(checkpoint, scaled_size(size, max_pixels)) == 4 * n_tiles
    assert internvl.image_tokens(checkpoint, None) == 4 * (MAX_TILES + 1)
    pixels = placed.arguments["pixel_values"]
    assert pixels.shape == (n_tiles, 3, SIDE, SIDE)
    assert pixels.dtype == np.float32
    red, green, blue = pixels[-1].mean(axis=(1, 2))
    assert red == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)
    assert green == pytest.approx((0 - 0.456) / 0.224, rel=1e-5)
    assert blue == pytest.approx((128 / 255 - 0.406) / 0.225, rel=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("section", "setting", "value"),
        [
            ("llm_config", "norm_topk_prob", False),
            ("llm_config", "hidden_act", "gelu"),
            ("llm_config", "attention_bias", True),
            ("llm_config", "mlp_only_layers", [0]),
            ("llm_config", "decoder_sparse_step", 2),
            ("llm_config", "use_sliding_window", True),
            ("vision_config", "qk_normalization", True),
            ("vision_config", "norm_type", "rms_norm"),
            ("vision_config", "image_size", [448, 224]),
            (None, "ps_version", "v1"),
            (None, "select_layer", -4),
            (None, "dynamic_image_size", False),
            (None, "use_thumbnail", False),
            (None, "pad2square", True),
            (None, "downsample_ratio", 0.3),
            (None, "min_dynamic_patch", 0),
        ],
    )
    def test_what_llama_cpp_would_run_differently(
        self, pico_internvl: Path, tmp_path: Path, section: str | None, setting: str, value: Any
    ) -> None:
        checkpoint = changed(pico_internvl, tmp_path / "other", section, **{setting: value})
        with pytest.raises(InputError, match=rf"config\.json: {setting} .*is .*expected"):
            find_family(checkpoint)

    def test_other_rotary_scaling(self, pico_internvl: Path, tmp_path: Path) -> None:
        yarn = {"rope_type": "yarn", "factor": 4.0}
        with pytest.raises(InputError, match="rope_type is 'yarn', expected 'default'"):
            find_family(changed(pico_internvl, tmp_path / "other", "llm_config", rope_scaling=yarn))

    @pytest.mark.parametrize(
        ("section", "setting", "value"),
        [
            ("text_config", "norm_topk_prob", False),
            ("vision_config", "use_qk_norm", True),
            ("vision_config", "norm_type", "rms_norm"),
            ("vision_config", "use_mean_pooling", False),
            ("vision_config", "use_mask_token", True),
            ("vision_config", "use_absolute_position_embeddings", False),
            (None, "vision_feature_layer", -2),
            (None, "vision_feature_select_strategy", "full"),
            (None, "projector_hidden_act", "relu"),
        ],
    )
    def test_in_transformers_layout(
        self, pico_internvl_hf: Path, tmp_path: Path, section: str | None, setting: str, value: Any
    ) -> None:
        checkpoint = changed(pico_internvl_hf, tmp_path / "other", section, **{setting: value})
        with pytest.raises(InputError, match=rf"config\.json: .*{setting} is .*expected"):
            find_family(checkpoint)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ({"architectures": ["Qwen3ForCausalLM"], "num_experts": None}, "'Qwen3ForCausalLM'.*convert_hf_to_gguf"),
            ({"architectures": ["InternLM2ForCausalLM"], "num_experts": None}, "'InternLM2ForCausalLM'.*not a Mixture"),
            ({"architectures": ["GptOssForCausalLM"]}, "'GptOssForCausalLM', expected 'Qwen3MoeForCausalLM'; of Inter"),
            ({"architectures": None, "model_type": "gpt_oss"}, "'gpt_oss', expected"),
        ],
    )
    def test_other_language_models(
        self, pico_internvl: Path, tmp_path: Path, text: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=rf"llm_config is of {message}"):
            find_family(changed(pico_internvl, tmp_path / "other", "llm_config", **text))

    def test_positions_for_other_pictures(self, pico_internvl: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"position_embedding has shape \[1, 17, 64\], expected \[1, 65, 64\]"):
            projector_tensors(changed(pico_internvl, tmp_path / "other", "vision_config", image_size=112))

    def test_biases_that_the_configuration_does_not_know(self, pico_internvl: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"layers\.0\.attn\.qkv\.bias \[192\] has no place"):
            projector_tensors(changed(pico_internvl, tmp_path / "other", "vision_config", qkv_bias=False))

    def test_a_missing_expert(self, pico_internvl: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"experts\.4\.gate_proj\.weight is missing"):
            text_tensors(changed(pico_internvl, tmp_path / "more", "llm_config", num_experts=5))

    def test_a_tokenizer_without_image_tokens(self, pico_internvl: Path, tmp_path: Path) -> None:
        """Which may be named in either file, or in both."""
        checkpoint = changed(pico_internvl, tmp_path / "other")
        for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("tokenizer.json", "added_tokens")):
            assert internvl.image_token(checkpoint) == mark_id("<IMG_CONTEXT>")
            path = checkpoint.path / name
            content = json.loads(path.read_text())
            del content[key]
            path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"the tokenizer has no added token <IMG_CONTEXT>"):
            internvl.image_token(checkpoint)

    def test_a_tokenizer_without_marks(self, pico: Path, pico_internvl: Path) -> None:
        from transformers import AutoTokenizer

        place = ImagePlace(
            Checkpoint.open(pico_internvl),
            Image.new("RGB", (56, 56)),
            None,
            AutoTokenizer.from_pretrained(pico),
            mark_id("<IMG_CONTEXT>"),
            10**6,
        )
        with pytest.raises(InputError, match=r"the tokenizer lacks <img> or </img>"):
            internvl.place_image(place)
