"""Checkpoints that every family must refuse, as other settings in config.json, and what the refusal says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mode_gguf.architectures import find_family, projector_tensors, text_tensors
from tests.families.pico import glm4v_moe as glm4v
from tests.families.pico import mistral4
from tests.families.pico import qwen3_vl_moe as qwen3_vl


@dataclass(frozen=True)
class Refusal:
    """Settings of a section of config.json, None for the outermost; a value None removes one.

    Attributes:
        says: pattern of the message.
        by: what refuses them.
        layout: fixture of the checkpoint, the case's first by default.
    """

    section: str | None
    settings: Mapping[str, Any]
    says: str
    by: Callable[..., Any] = find_family
    layout: str | None = None

    @property
    def name(self) -> str:
        (key, value), *_ = self.settings.items()
        return f"{key}={value}".replace(" ", "")[:60]


def unlike(section: str | None, *, names: str = "", layout: str | None = None, **settings: Any) -> list[Refusal]:
    """Settings each of which alone is refused by its name, with `names` before it, and what was expected."""
    return [
        Refusal(section, {key: value}, rf"config\.json: {names}{key}\b.* is .*expected", layout=layout)
        for key, value in settings.items()
    ]


def of_rope(setting: str, section: str, name: str, *values: Mapping[str, Any]) -> list[Refusal]:
    """Values of a setting of rotary embeddings, refused by names within them."""
    return [Refusal(section, {setting: value}, rf"config\.json: {name} is .*expected") for value in values]


TEXT, VISION = "text_config", "vision_config"

REFUSALS: Mapping[str, list[Refusal]] = {
    "qwen3-vl": [
        *unlike(TEXT, norm_topk_prob=False, hidden_act="gelu", attention_bias=True, mlp_only_layers=[1]),
        *unlike(TEXT, decoder_sparse_step=2),
        *of_rope("rope_scaling", TEXT, "rope_type", {"rope_type": "yarn", "mrope_section": [12, 10, 10]}),
        Refusal(TEXT, {"num_hidden_layers": None}, r"num_hidden_layers \(int\) is missing", text_tensors),
        Refusal(TEXT, {"num_hidden_layers": 4}, r"layers\.3\.input_layernorm\.weight is missing", text_tensors),
        Refusal(
            TEXT,
            {"num_experts": 5},
            r"gate_up_proj has shape \[4, 256, 1024\], expected \[5, 256, 1024\]",
            text_tensors,
        ),
        *(
            Refusal(TEXT, {"num_experts": value}, r"num_experts is .*expected int", text_tensors)
            for value in ("4", 4.0, True, [4])
        ),
    ],
    "qwen3.5": [
        *unlike(TEXT, norm_topk_prob=False, hidden_act="gelu", attention_bias=True, attn_output_gate=False),
        *unlike(TEXT, linear_value_head_dim=64, linear_num_value_heads=5),
        *unlike(TEXT, layer_types=["linear_attention", "sliding_attention"]),
        *of_rope("rope_parameters", TEXT, "rope_type", {"rope_type": "yarn", "rope_theta": 10_000}),
        Refusal(
            TEXT,
            {"linear_num_value_heads": 4},
            r"in_proj_qkv\.weight has shape \[1280, 256\], expected 1024 rows",
            text_tensors,
        ),
        Refusal(TEXT, {"num_experts": 3}, r"experts\.3\.\S+ .* has no place", text_tensors, "pico_qwen3_5_resaved"),
        Refusal(
            TEXT, {"num_experts": 5}, r"experts\.4\.gate_proj\.weight is missing", text_tensors, "pico_qwen3_5_resaved"
        ),
    ],
    "gemma4": [
        *unlike(TEXT, hidden_size_per_layer_input=256, num_kv_shared_layers=2, use_bidirectional_attention=None),
        *unlike(TEXT, use_bidirectional_attention="all", hidden_activation="silu", attention_bias=True),
        *unlike(TEXT, layer_types=["full_attention", "linear_attention"]),
        *unlike(TEXT, per_layer_config={"0": {"head_dim": 64}, "1": {"head_dim": 128}}),
        *unlike(VISION, names="vision ", hidden_activation="gelu", attention_bias=True, num_key_value_heads=1),
        *unlike(VISION, names="vision ", head_dim=64),
        *of_rope("rope_parameters", VISION, "vision rope_theta", {"rope_theta": 50.0}),
        Refusal(
            TEXT,
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}},
            "rope_type of full_attention is 'yarn', expected 'proportional'",
        ),
        Refusal(TEXT, {"enable_moe_block": False}, "not a Mixture-of-Experts model"),
        Refusal(
            VISION,
            {"patch_size": 14},
            r"input_proj\.weight has shape \[64, 768\], expected \[64, 588\]",
            projector_tensors,
        ),
    ],
    "glm4.5v": [
        *unlike(TEXT, norm_topk_prob=False, hidden_act="gelu", use_qk_norm=True, n_group=4),
        *unlike(TEXT, first_k_dense_replace=glm4v.LAYERS),
        Refusal(TEXT, {"n_group": 2, "topk_group": 2}, r"config\.json: n_group is .*expected"),  # all groups
        *of_rope(
            "rope_scaling",
            TEXT,
            "(rope_type|mrope_section)",
            {"rope_type": "yarn", "mrope_section": [4, 6, 6]},
            {"rope_type": "default", "mrope_section": [8, 12, 12]},
            {"rope_type": "default", "mrope_section": ["4", 6, 6]},
        ),
        *unlike(VISION, names="(vision )?", hidden_act="gelu", attention_bias=True, temporal_patch_size=1),
        *unlike(VISION, names="(vision )?", spatial_merge_size=4, out_hidden_size=128),
        *of_rope(
            "rope_parameters",
            VISION,
            r"(vision )?rope_\w+",
            {"rope_theta": 1e6},
            {"rope_type": "default"},
        ),
        Refusal(VISION, {"rope_parameters": "axial"}, r"config\.json: (vision )?rope_\w+ is .*expected"),
        Refusal(
            None,
            {"architectures": ["Glm4vForConditionalGeneration"], "text_config": {"hidden_size": qwen3_vl.HIDDEN}},
            r"Glm4vForConditionalGeneration.* is not a Mixture-of-Experts model",
        ),
    ],
    "internvl": [
        *unlike("llm_config", norm_topk_prob=False, hidden_act="gelu", attention_bias=True, mlp_only_layers=[0]),
        *unlike("llm_config", decoder_sparse_step=2, use_sliding_window=True),
        *unlike(VISION, qk_normalization=True, norm_type="rms_norm", image_size=[448, 224]),
        *unlike(None, ps_version="v1", select_layer=-4, dynamic_image_size=False, use_thumbnail=False),
        *unlike(None, pad2square=True, downsample_ratio=0.3, min_dynamic_patch=0),
        Refusal(
            "llm_config",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn', expected 'default'",
        ),
        *unlike(TEXT, layout="pico_internvl_hf", norm_topk_prob=False),
        *unlike(VISION, layout="pico_internvl_hf", use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False),
        *unlike(VISION, layout="pico_internvl_hf", use_mask_token=True, use_absolute_position_embeddings=False),
        *unlike(None, layout="pico_internvl_hf", vision_feature_layer=-2, vision_feature_select_strategy="full"),
        *unlike(None, layout="pico_internvl_hf", projector_hidden_act="relu"),
        *(
            Refusal("llm_config", settings, f"llm_config is of {says}")
            for settings, says in (
                (
                    {"architectures": ["Qwen3ForCausalLM"], "num_experts": None},
                    "'Qwen3ForCausalLM'.*convert_hf_to_gguf",
                ),
                (
                    {"architectures": ["InternLM2ForCausalLM"], "num_experts": None},
                    "'InternLM2ForCausalLM'.*not a Mixture",
                ),
                (
                    {"architectures": ["GptOssForCausalLM"]},
                    "'GptOssForCausalLM', expected 'Qwen3MoeForCausalLM'; of Inter",
                ),
                ({"architectures": None, "model_type": "gpt_oss"}, "'gpt_oss', expected"),
            )
        ),
        Refusal(
            VISION,
            {"image_size": 112},
            r"position_embedding has shape \[1, 17, 64\], expected \[1, 65, 64\]",
            projector_tensors,
        ),
        Refusal(VISION, {"qkv_bias": False}, r"layers\.0\.attn\.qkv\.bias \[192\] has no place", projector_tensors),
        Refusal("llm_config", {"num_experts": 5}, r"experts\.4\.gate_proj\.weight is missing", text_tensors),
    ],
    "kimi-vl": [
        *unlike(TEXT, hidden_act="gelu", scoring_func="softmax", topk_method="greedy", n_group=2, topk_group=2),
        *unlike(TEXT, moe_layer_freq=2, num_nextn_predict_layers=1, attention_bias=True, num_key_value_heads=2),
        *of_rope(
            "rope_scaling",
            TEXT,
            "(rope_type|mscale)",
            {"type": "linear", "factor": 2.0},
            {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.7},
        ),
    ],
    "kimi-k2.5": [
        *unlike(VISION, merge_kernel_size=[1, 1], init_pos_emb_width=4),
        # As many layers as llama.cpp expects none in.
        Refusal(TEXT, {"num_hidden_layers": 27}, "q_lora_rank is 256 with 27 layers"),
    ],
    "mistral4": [
        *unlike(TEXT, hidden_act="gelu", attention_bias=True, num_key_value_heads=2, first_k_dense_replace=1),
        *unlike(TEXT, n_group=2, rope_interleave=False),
        *(
            Refusal(TEXT, {"rope_parameters": {**mistral4.ROPE, key: value}}, rf"config\.json: {key} is .*expected")
            for key, value in {
                "rope_type": "linear",
                "mscale": 0.7,
                "mscale_all_dim": None,
                "attention_factor": 1.2,
                "truncate": False,
                "partial_rotary_factor": 1.0,
            }.items()
        ),
        *(
            Refusal(section, settings, r"config\.json: .* is .*expected")
            for section, settings in (
                (VISION, {"hidden_act": "relu"}),
                (VISION, {"model_type": "siglip"}),
                (VISION, {"rope_parameters": {"rope_theta": 500.0}}),
                (None, {"vision_feature_layer": -2}),
                (None, {"projector_hidden_act": "relu"}),
            )
        ),
        *(
            Refusal(TEXT, {"model_type": kind}, rf"text model is '{kind}', expected 'mistral4'.*dense models")
            for kind in ("mistral", "ministral3")
        ),
    ],
}
