from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import TokenType

from mode_gguf.architectures import find_family, glm4v_moe, left_out, projector_tensors, text_tensors
from mode_gguf.architectures.tensors import Role, SourceTensor, as_float32
from mode_gguf.checkpoint import Checkpoint
from mode_gguf.errors import InputError
from mode_gguf.export.text_model import write_text_model
from mode_gguf.export.tokenizer import read_vocabulary
from mode_gguf.quantization.types import QUANT_TYPES
from tests.architectures.test_qwen3_vl_moe import changed
from tests.families.pico.glm4v_moe import (
    DENSE_LAYERS,
    EXPERTS,
    HEAD_DIM,
    IMAGE_SIZE,
    LAYERS,
    PATCH,
    WIDTH,
    token_id,
    write_pico_glm4v_moe,
)
from tests.families.pico.qwen3_vl_moe import HIDDEN, VISION_HIDDEN
from tests.families.pico.tokenizer import VOCAB

ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


@cache
def module_state(folder: Path) -> dict[str, np.ndarray]:
    """The weights as transformers holds them after loading."""
    import torch
    from transformers import Glm4vMoeForConditionalGeneration

    model = Glm4vMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def by_name(folder: Path) -> dict[str, SourceTensor]:
    return {tensor.name: tensor for tensor in text_tensors(Checkpoint.open(folder))}


@pytest.mark.parametrize("layout", ["pico_glm4v", "pico_glm4v_fused"])
def test_experts_are_those_transformers_computes_with(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    # Both hold the same weights; transformers joins experts that are stored one by one.
    state, tensors = module_state(request.getfixturevalue("pico_glm4v")), by_name(folder)
    for layer in range(DENSE_LAYERS, LAYERS):
        gate_up = state[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"]
        down = state[f"model.language_model.layers.{layer}.mlp.experts.down_proj"]
        for projection, weights in (("gate", gate_up[:, :WIDTH]), ("up", gate_up[:, WIDTH:]), ("down", down)):
            tensor = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"]
            assert (tensor.shape, tensor.layer, tensor.projection) == (weights.shape, layer, projection)
            for expert in range(EXPERTS):
                np.testing.assert_array_equal(as_float32(tensor.read(expert)), weights[expert])
                np.testing.assert_array_equal(as_float32(tensor.read(expert, slice(3, 7))), weights[expert][3:7])


def test_everything_else_is_stored_as_it_is(pico_glm4v: Path) -> None:
    state, tensors = module_state(pico_glm4v), by_name(pico_glm4v)
    plain = [tensor for tensor in tensors.values() if tensor.role is not Role.EXPERT]
    assert len(plain) == 3 + 9 * LAYERS + 3 * DENSE_LAYERS + 5 * (LAYERS - DENSE_LAYERS)
    for tensor in plain:
        np.testing.assert_array_equal(as_float32(tensor.read(0)), state[tensor.sources[0]], err_msg=tensor.name)
    assert tensors["blk.1.exp_probs_b.bias"].sources == (
        "model.language_model.layers.1.mlp.gate.e_score_correction_bias",
    )


def test_kinds_of_layers_and_roles(pico_glm4v: Path) -> None:
    tensors = by_name(pico_glm4v)
    attention = {f"attn_{name}.weight" for name in ("q", "k", "v", "output")}
    for layer in range(LAYERS):
        dense = {
            name.removeprefix(f"blk.{layer}.")
            for name, tensor in tensors.items()
            if tensor.layer == layer and tensor.role is Role.DENSE
        }
        kind = "" if layer < DENSE_LAYERS else "_shexp"
        assert dense == attention | {f"ffn_{projection}{kind}.weight" for projection in ("gate", "up", "down")}
        assert (f"blk.{layer}.ffn_gate_inp.weight" in tensors) == (layer >= DENSE_LAYERS)


def test_block_for_multi_token_prediction_is_left_out(pico_glm4v: Path, pico_glm4v_fused: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico_glm4v)
    assert len(left_out(checkpoint)) == 3
    assert all(name.startswith(f"model.language_model.layers.{LAYERS}.") for name in left_out(checkpoint))
    assert not [name for name in by_name(pico_glm4v) if name.startswith(f"blk.{LAYERS}.")]
    assert not left_out(Checkpoint.open(pico_glm4v_fused))
    # A layer too many that is no such block is not left out.
    fewer = changed(pico_glm4v_fused, tmp_path / "fewer", "text_config", num_hidden_layers=LAYERS - 1)
    with pytest.raises(InputError, match=rf"layers\.{LAYERS - 1}\.\S+ .* has no place"):
        text_tensors(fewer)


def test_projector_tensors(pico_glm4v: Path) -> None:
    state = module_state(pico_glm4v)
    tensors = {tensor.name: tensor for tensor in projector_tensors(Checkpoint.open(pico_glm4v))}
    assert {name for name in state if name.startswith("model.visual.")} == {t.sources[0] for t in tensors.values()}
    for name, tensor in tensors.items():
        weights = state[tensor.sources[0]]
        if name.startswith("v.patch_embd.weight"):
            weights = weights[:, :, int(name.endswith(".1"))]
        np.testing.assert_array_equal(as_float32(tensor.read(0)), weights, err_msg=name)


def test_metadata(pico_glm4v: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(pico_glm4v)
    found = glm4v_moe.text_metadata(checkpoint)
    assert found["glm4moe.block_count"] == LAYERS
    assert found["glm4moe.leading_dense_block_count"] == DENSE_LAYERS
    assert found["glm4moe.rope.dimension_count"] == HEAD_DIM // 2
    assert found["glm4moe.rope.dimension_sections"] == [4, 6, 6, 0]
    assert found["glm4moe.expert_gating_func"] == 2
    assert found["glm4moe.expert_weights_scale"] == 1.5
    new_style = changed(
        pico_glm4v,
        tmp_path / "new",
        "text_config",
        **{"rope_scaling": None, "rope_theta": None, "partial_rotary_factor": None, "rope_parameters": ROPE},
    )
    assert glm4v_moe.text_metadata(new_style) == found
    implied = {name: None for name in glm4v_moe.DEFAULTS if name != "routed_scaling_factor"}
    assert glm4v_moe.text_metadata(changed(pico_glm4v, tmp_path / "implied", "text_config", **implied)) == found
    projector = glm4v_moe.projector_metadata(checkpoint)
    assert projector["clip.vision.image_size"] == IMAGE_SIZE
    assert projector["clip.vision.patch_size"] == PATCH
    assert (projector["clip.vision.projection_dim"], projector["clip.vision.embedding_length"]) == (
        HIDDEN,
        VISION_HIDDEN,
    )
    assert projector["clip.use_silu"] is True


def test_tokenizer(pico_glm4v: Path, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(pico_glm4v, VOCAB)
    assert vocabulary.pre_tokenizer == "glm4"
    assert vocabulary.kinds[token_id("[gMASK]")] is TokenType.CONTROL
    checkpoint = Checkpoint.open(pico_glm4v)
    types = {tensor.name: QUANT_TYPES["Q8_0"] for tensor in text_tensors(checkpoint) if tensor.role is not Role.KEEP}
    write_text_model(tmp_path / "pico.gguf", checkpoint, types)
    fields = GGUFReader(tmp_path / "pico.gguf").fields
    for role, token in {
        "bos": "[gMASK]",
        "eos": "<|endoftext|>",
        "eot": "<|user|>",
        "eom": "<|observation|>",
        "unknown": "<|endoftext|>",
        "padding": "<|endoftext|>",
    }.items():
        assert fields[f"tokenizer.ggml.{role}_token_id"].contents() == token_id(token), role


@pytest.mark.parametrize("section", [None, "text_config"])
def test_tied_embeddings_have_no_output_tensor(section: str | None, tmp_path: Path) -> None:
    folder = write_pico_glm4v_moe(tmp_path / "tied", tied=True)
    checkpoint = changed(folder, tmp_path / "other", tie_word_embeddings=None)
    assert not find_family(checkpoint).tied(checkpoint)
    tied = changed(checkpoint.path, tmp_path / "again", section, tie_word_embeddings=True)
    assert "output.weight" not in {tensor.name for tensor in text_tensors(tied)}


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("norm_topk_prob", False),
            ("hidden_act", "gelu"),
            ("use_qk_norm", True),
            ("first_k_dense_replace", LAYERS),
            ("n_group", 4),
            ("n_group", 2),
            ("rope_scaling", {"rope_type": "yarn", "mrope_section": [4, 6, 6]}),
            ("rope_scaling", {"rope_type": "default", "mrope_section": [8, 12, 12]}),
            ("rope_scaling", {"rope_type": "default", "mrope_section": ["4", 6, 6]}),
        ],
    )
    def test_text(self, pico_glm4v: Path, tmp_path: Path, setting: str, value: Any) -> None:
        more = {"topk_group": 2} if value == 2 else {}  # all groups
        checkpoint = changed(pico_glm4v, tmp_path / "other", "text_config", **{setting: value}, **more)
        name = "rope_type|mrope_section" if setting == "rope_scaling" else setting
        with pytest.raises(InputError, match=rf"config\.json: ({name}) is .*expected"):
            find_family(checkpoint)

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("hidden_act", "gelu"),
            ("attention_bias", True),
            ("temporal_patch_size", 1),
            ("spatial_merge_size", 4),
            ("out_hidden_size", 128),
            ("rope_parameters", {"rope_theta": 1e6}),
            ("rope_parameters", {"rope_type": "default"}),
            ("rope_parameters", "axial"),
        ],
    )
    def test_vision(self, pico_glm4v: Path, tmp_path: Path, setting: str, value: Any) -> None:
        checkpoint = changed(pico_glm4v, tmp_path / "other", "vision_config", **{setting: value})
        name = r"(vision )?rope_\w+" if setting == "rope_parameters" else setting
        with pytest.raises(InputError, match=rf"config\.json: (vision )?{name} is .*expected"):
            find_family(checkpoint)

    def test_dense_models(self, pico_glm4v: Path, tmp_path: Path) -> None:
        config: dict[str, Any] = {
            "architectures": ["Glm4vForConditionalGeneration"],
            "text_config": {"hidden_size": HIDDEN},
        }
        with pytest.raises(InputError, match=r"Glm4vForConditionalGeneration.* is not a Mixture-of-Experts model"):
            find_family(changed(pico_glm4v, tmp_path / "dense", **config))

    @pytest.mark.parametrize("layout", ["public", "fused"])
    def test_another_number_of_experts(self, layout: Any, tmp_path: Path) -> None:
        folder = write_pico_glm4v_moe(tmp_path / "pico", layout=layout)
        for experts in (EXPERTS - 1, EXPERTS + 1):
            other = changed(folder, tmp_path / str(experts), "text_config", n_routed_experts=experts)
            with pytest.raises(InputError, match=r"experts\.\S+ .*(has no place|is missing|expected)"):
                text_tensors(other)

    def test_a_vocabulary_without_the_tokens(self, pico_glm4v: Path, tmp_path: Path) -> None:
        checkpoint = changed(pico_glm4v, tmp_path / "other")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = tmp_path / "other" / name
            path.write_text(path.read_text().replace("[gMASK]", "[MASK]"))
        types = {t.name: QUANT_TYPES["Q8_0"] for t in text_tensors(checkpoint) if t.role is not Role.KEEP}
        with pytest.raises(InputError, match=r"token \[gMASK\] is missing, expected it as bos"):
            write_text_model(tmp_path / "pico.gguf", checkpoint, types)
