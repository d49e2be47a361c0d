"""GLM-4.5V."""

import numpy as np
from torch import nn

from tests.e2e.conftest import settings
from tests.families import prompts
from tests.families.case.shared import DENSE_FFN, FRAMES, OUTSIDE, SHARED_EXPERTS
from tests.families.family_case import Change, Conversion, FamilyCase, MeasuredChange, block, weights
from tests.families.pico import glm4v_moe as pico
from tests.families.pico import qwen3_vl_moe as pico_qwen3_vl
from tests.families.refusal import TEXT, VISION, Refusal, of_rope, refused_ropes, unlike


def glm(model: nn.Module) -> None:
    """What the merger joins goes through a convolution, which takes F16 (im2col)."""
    downsample = model.get_submodule("model.visual.downsample")
    downsample.register_forward_pre_hook(lambda _, arguments: (arguments[0].half().float(),))


GLM_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
GLM_NORMS = "attn_norm post_attention_norm attn_q.bias= attn_k.bias= attn_v.bias="
GLM_ATTENTION = "attn_q attn_k attn_v attn_output"
GLM4V = FamilyCase(
    name="glm4.5v",
    refusals=(
        *unlike(TEXT, norm_topk_prob=False, hidden_act="gelu", use_qk_norm=True, n_group=4),
        *unlike(TEXT, first_k_dense_replace=pico.LAYERS),
        Refusal(TEXT, {"n_group": 2, "topk_group": 2}, r"config\.json: n_group is .*expected"),  # all groups
        *of_rope(
            "rope_scaling",
            TEXT,
            "(rope_type|mrope_section)",
            {"rope_type": "longrope", "mrope_section": [4, 6, 6]},
            {"rope_type": "default", "mrope_section": [8, 12, 12]},
            {"rope_type": "default", "mrope_section": ["4", 6, 6]},
        ),
        *of_rope("rope_scaling", TEXT, r"\w+", *refused_ropes(mrope_section=[4, 6, 6])),
        *unlike(VISION, names="(vision )?", hidden_act="gelu", attention_bias=True, temporal_patch_size=1),
        *unlike(VISION, names="(vision )?", spatial_merge_size=4, out_hidden_size=128),
        *of_rope(
            "rope_parameters",
            VISION,
            r"(vision )?rope_\w+",
            {"rope_theta": 1e6},
            {"rope_type": "yarn", "factor": 2.0},
        ),
        *unlike(VISION, names="vision ", rope_theta=1e6),
        Refusal(VISION, {"rope_parameters": "axial"}, r"config\.json: (vision )?rope_\w+ is .*expected"),
        Refusal(
            None,
            {"architectures": ["Glm4vForConditionalGeneration"], TEXT: {"hidden_size": pico_qwen3_vl.HIDDEN}},
            r"Glm4vForConditionalGeneration.* is not a Mixture-of-Experts model",
        ),
    ),
    pico=pico,
    write=pico.write_pico_glm4v_moe,
    layouts=("pico_glm4v", "pico_glm4v_fused"),
    tied=True,
    gguf_arch="glm4moe",
    projector_type="glm4v",
    outside=OUTSIDE,
    layers=(
        block(dense=f"{GLM_ATTENTION} {DENSE_FFN}", keep=GLM_NORMS, experts=""),
        *(block(dense=f"{GLM_ATTENTION} {SHARED_EXPERTS}", keep=f"{GLM_NORMS} ffn_gate_inp exp_probs_b.bias="),) * 3,
    ),
    vision=weights(
        "v.patch_embd.* v.patch_embd.weight.1= v.position_embd v.norm_embd v.post_ln mm.patch_merger.* mm.model.fc "
        "mm.post_norm.* mm.gate mm.up mm.down"
    ),
    vision_block=weights("ln1 attn_qkv attn_out ln2 ffn_gate ffn_up ffn_down"),
    parameters={"blk.1.exp_probs_b.bias": "model.language_model.layers.1.mlp.gate.e_score_correction_bias"},
    converted=FRAMES,
    text_keys={
        "leading_dense_block_count": pico.DENSE_LAYERS,
        "rope.dimension_count": pico.HEAD_DIM // 2,
        "rope.dimension_sections": [4, 6, 6, 0],
        "expert_gating_func": 2,
        "expert_weights_scale": 1.5,
    },
    projector_keys={
        "vision.image_size": pico.IMAGE_SIZE,
        "vision.patch_size": pico.PATCH,
        "vision.embedding_length": pico_qwen3_vl.VISION_HIDDEN,
        "use_silu": True,
    },
    changes=(
        Change(
            "rope as transformers 5 writes it",
            TEXT,
            {"rope_scaling": None, "rope_theta": None, "partial_rotary_factor": None, "rope_parameters": GLM_ROPE},
        ),
        Change(
            "defaults of transformers",
            TEXT,
            dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group", "n_shared_experts", "attention_bias")),
        ),
    ),
    pre_tokenizer="glm4",
    image_token="<|image|>",
    marks=("<|begin_of_image|>", "<|end_of_image|>"),
    image_tokens=(15, 18, 15),
    ask=prompts.with_processor(prompts.merged_patches),
    token_types=True,
    pictures=((140, 84),),
    image_kl=2e-6,
    image_average=np.median,
    rounded=glm,
    measured=MeasuredChange(
        ("blk.0.ffn_down.weight", "blk.0.ffn_gate.weight", "blk.3.attn_k.weight", "blk.3.ffn_up_shexp.weight"),
        options={"num_experts_per_tok": pico.EXPERTS},
    ),
    conversion=Conversion(
        4.5,
        (
            *settings("sensitivity.types=Q3_K,Q5_K", "sensitivity.dense_types=Q4_K,Q8_0"),
            *settings("sensitivity.packing.effort=fast"),
            *("--image-samples", "2", "--text-samples", "1", "--no-validate"),
        ),
        reached=0.98,
        log=f"layers.{pico.LAYERS}.eh_proj.weight and 2 more tensors are left out",
        f32="blk.0.attn_q.bias blk.1.exp_probs_b.bias blk.1.ffn_gate_inp.weight",
        quantized="blk.0.ffn_gate blk.0.ffn_down blk.1.ffn_down_shexp blk.1.ffn_down_exps blk.1.attn_output",
    ),
)
