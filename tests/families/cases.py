"""The table of model families that the conformance tests of this folder go through: adding a family takes one case.

A case says how its pico checkpoint is written, what transformers and llama.cpp are to make of it, and how near they
come. What is refused is a table of its own (`refusals`); what only one family has is tested in a file of that family.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from mode_gguf.architectures import find_family
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint import Checkpoint
from tests.families import converted, prompts, rounding
from tests.families.family_case import (
    Change,
    Conversion,
    FamilyCase,
    MeasuredChange,
    StockDifference,
    block,
    weights,
)
from tests.families.pico import gemma4_moe as gemma4
from tests.families.pico import glm4v_moe as glm4v
from tests.families.pico import internvl, kimi, mistral4
from tests.families.pico import qwen3_5_moe as qwen3_5
from tests.families.pico import qwen3_vl_moe as qwen3_vl
from tests.families.pico.tokenizer import VOCAB

OUTSIDE = {"token_embd.weight": Role.EMBEDDING, "output_norm.weight": Role.KEEP, "output.weight": Role.OUTPUT}
SHARED_EXPERTS = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
DENSE_FFN = "ffn_gate ffn_up ffn_down"
FEW = ("--image-samples", "1", "--text-samples", "1", "--no-validate")
SOME = ("--image-samples", "2", "--text-samples", "2", "--no-validate")

QWEN3_LAYER = block(
    dense="attn_q attn_k attn_v attn_output", keep="attn_norm attn_q_norm attn_k_norm ffn_norm ffn_gate_inp"
)
QWEN_VISION_BLOCK = weights("ln1.* attn_qkv.* attn_out.* ln2.* ffn_up.* ffn_down.*")
QWEN_VISION = weights("v.patch_embd.* v.patch_embd.weight.1= v.position_embd v.post_ln.* mm.0.* mm.2.*")
DEEPSTACK = weights(" ".join(f"v.deepstack.{tap}.{part}.*" for tap in (0, 2) for part in ("norm", "fc1", "fc2")))
QWEN3_PARAMETERS = {
    "token_embd.weight": "model.language_model.embed_tokens.weight",
    "output_norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
} | {
    f"blk.{{n}}.{ours}.weight": f"model.language_model.layers.{{n}}.{theirs}.weight"
    for ours, theirs in {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }.items()
}

QWEN3_VL = FamilyCase(
    name="qwen3-vl",
    pico=qwen3_vl,
    write=qwen3_vl.write_pico_qwen3vlmoe,
    layouts=("pico", "pico_module"),
    published="pico",
    tied={"tied": True},
    hf_class="Qwen3VLMoeForConditionalGeneration",
    gguf_arch="qwen3vlmoe",
    projector_type="qwen3vl_merger",
    outside=OUTSIDE,
    layers=(QWEN3_LAYER,) * 3,
    vision=(*QWEN_VISION, *DEEPSTACK),
    vision_block=QWEN_VISION_BLOCK,
    parameters={
        **QWEN3_PARAMETERS,
        "v.deepstack.0.fc1.weight": "model.visual.deepstack_merger_list.0.linear_fc1.weight",
        "v.deepstack.2.fc2.bias": "model.visual.deepstack_merger_list.1.linear_fc2.bias",
        "v.blk.{n}.ffn_down.weight": "model.visual.blocks.{n}.mlp.linear_fc2.weight",
        "mm.2.weight": "model.visual.merger.linear_fc2.weight",
        "v.post_ln.bias": "model.visual.merger.norm.bias",
    },
    converted=converted.FRAMES,
    text_keys={"rope.freq_base": 5e6, "rope.dimension_sections": [12, 10, 10, 0], "n_deepstack_layers": 2},
    projector_keys={"vision.is_deepstack_layers": [True, False, True], "vision.patch_size": qwen3_vl.PATCH},
    pre_tokenizer="qwen2",
    image_token="<|image_pad|>",
    marks=("<|vision_start|>", "<|vision_end|>"),
    image_tokens=(12, 15, 12),
    streamed_atol=2e-5,
    sums_rtol=1e-4,
    ask=prompts.with_processor(prompts.merged_patches),
    token_types=True,
    text_kl=1e-9,
    rounded=rounding.table_gelu("act_fn", under="model.visual"),
)

LINEAR_LAYER = block(
    dense=f"attn_qkv attn_gate ssm_out {SHARED_EXPERTS}",
    keep="attn_norm ssm_conv1d ssm_alpha ssm_beta ssm_a= ssm_dt.bias= ssm_norm post_attention_norm ffn_gate_inp "
    "ffn_gate_inp_shexp",
)
FULL_LAYER = block(
    dense=f"attn_q attn_k attn_v attn_output {SHARED_EXPERTS}",
    keep="attn_norm attn_q_norm attn_k_norm post_attention_norm ffn_gate_inp ffn_gate_inp_shexp",
)
QWEN3_5 = FamilyCase(
    name="qwen3.5",
    pico=qwen3_5,
    write=qwen3_5.write_pico_qwen3_5_moe,
    layouts=("pico_qwen3_5", "pico_qwen3_5_resaved"),
    published="pico_qwen3_5",
    tied={"tied": True},
    hf_class="Qwen3_5MoeForConditionalGeneration",
    gguf_arch="qwen35moe",
    projector_type="qwen3vl_merger",
    outside=OUTSIDE,
    layers=(*(LINEAR_LAYER,) * 3, FULL_LAYER, LINEAR_LAYER),
    vision=QWEN_VISION,
    vision_block=QWEN_VISION_BLOCK,
    parameters={
        "blk.3.attn_norm.weight": "model.language_model.layers.3.input_layernorm.weight",
        "blk.3.post_attention_norm.weight": "model.language_model.layers.3.post_attention_layernorm.weight",
        "blk.3.attn_q_norm.weight": "model.language_model.layers.3.self_attn.q_norm.weight",
        "blk.3.attn_k_norm.weight": "model.language_model.layers.3.self_attn.k_norm.weight",
        "output_norm.weight": "model.language_model.norm.weight",
    }
    | {
        f"blk.0.{ours}": f"model.language_model.layers.0.linear_attn.{theirs}"
        for ours, theirs in {
            "attn_qkv.weight": "in_proj_qkv.weight",
            "attn_gate.weight": "in_proj_z.weight",
            "ssm_conv1d.weight": "conv1d.weight",
            "ssm_alpha.weight": "in_proj_a.weight",
            "ssm_beta.weight": "in_proj_b.weight",
            "ssm_dt.bias": "dt_bias",
            "ssm_a": "A_log",
            "ssm_norm.weight": "norm.weight",
            "ssm_out.weight": "out_proj.weight",
        }.items()
    },
    converted={**converted.FRAMES, **converted.LINEAR_ATTENTION},
    text_keys={
        "attention.recurrent_layers": [True, True, True, False, True],
        "rope.dimension_count": 32,
        "rope.dimension_sections": [6, 5, 5, 0],
        "ssm.inner_size": qwen3_5.VALUE_HEADS * qwen3_5.LINEAR_DIM,
        "ssm.conv_kernel": qwen3_5.KERNEL,
        "full_attention_interval": 4,
    },
    projector_keys={"vision.is_deepstack_layers": [False] * 3},
    changes=(
        Change("implied layers", "text_config", {"layer_types": None}),
        Change(
            "default rope",
            "text_config",
            {"rope_parameters": {"rope_theta": 10_000}},
            {"rope.dimension_sections": [11, 11, 10, 0], "rope.dimension_count": 16},
        ),
    ),
    pre_tokenizer="qwen35",
    image_token="<|image_pad|>",
    marks=("<|vision_start|>", "<|vision_end|>"),
    image_tokens=(12, 15, 12),
    attention_from=3,
    ask=prompts.with_processor(prompts.merged_patches),
    token_types=True,
    measured=MeasuredChange(
        ("blk.4.attn_qkv.weight", "blk.4.attn_gate.weight", "blk.4.ssm_out.weight", "blk.4.ffn_down_shexp.weight"),
        fisher=(0.6, 1.7),
    ),
    conversion=Conversion(
        3.0,
        SOME,
        log="more tensors are left out; `mode-gguf mtp` writes them to a file to draft with",
        f32="blk.0.ssm_a blk.0.ffn_gate_inp_shexp.weight",
        quantized="blk.0.attn_qkv blk.0.ssm_out blk.0.ffn_up_shexp",
        alone=True,
    ),
)


def gemma_layer(values: str) -> dict[str, Role]:
    """A decoder layer; those of full attention have no values of their own."""
    return block(
        dense=f"attn_q attn_k {values} attn_output {DENSE_FFN}",
        keep="attn_norm attn_q_norm attn_k_norm post_attention_norm ffn_norm post_ffw_norm_1 pre_ffw_norm_2 "
        "post_ffw_norm_2 post_ffw_norm ffn_gate_inp ffn_gate_inp.scale= ffn_down_exps.scale= layer_output_scale",
        experts="gate_up down",
    )


GEMMA4 = FamilyCase(
    name="gemma4",
    pico=gemma4,
    write=gemma4.write_pico_gemma4_moe,
    layouts=("pico_gemma4",),
    published="pico_gemma4",
    tied={},
    hf_class="Gemma4ForConditionalGeneration",
    gguf_arch="gemma4",
    projector_type="gemma4v",
    outside={"rope_freqs.weight": Role.KEEP, "token_embd.weight": Role.EMBEDDING, "output_norm.weight": Role.KEEP},
    layers=(gemma_layer("attn_v"), gemma_layer("")) * 2,
    vision=weights("v.patch_embd v.position_embd v.std_bias= v.std_scale= mm.input_projection"),
    vision_block=weights(
        "ln1 attn_q_norm attn_k_norm attn_post_norm ln2 ffn_post_norm attn_q attn_k attn_v attn_out ffn_gate ffn_up "
        "ffn_down"
    ),
    converted={r"v\.patch_embd\.weight": converted.gemma_patches, r"rope_freqs\.weight": None},
    text_keys={
        "attention.head_count_kv": [2, 1, 2, 1],
        "attention.sliding_window_pattern": [True, False, True, False],
        "attention.key_length": gemma4.FULL_DIM,
        "attention.key_length_swa": gemma4.SLIDING_DIM,
        "attention.sliding_window": gemma4.WINDOW,
        "final_logit_softcapping": gemma4.SOFT_CAP,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    },
    projector_keys={"use_gelu": True, "vision.projector.scale_factor": None},
    changes=(
        Change(
            "defaults of transformers",
            "text_config",
            {"layer_types": None, "rope_parameters": None, "global_head_dim": None},
            {"attention.sliding_window_pattern": [True, True, True, False], "rope.freq_base": 1e6},
        ),
        Change(
            "pooling",
            "vision_config",
            {"pooling_kernel_size": 2},
            projector={"vision.projector.scale_factor": 2},
        ),
    ),
    pre_tokenizer="gemma4",
    image_token="<|image|>",
    marks=("<|image>", "<image|>"),
    image_tokens=(63, 60, 63),
    activation=lambda gate: gelu(gate, approximate="tanh"),
    ask=prompts.with_processor(prompts.soft_tokens),
    token_types=True,
    pictures=(gemma4.PICTURE,),
    text_length=2 * gemma4.WINDOW,
    text_kl=1e-6,  # llama.cpp reads GELU from a table in F16
    stock=(StockDifference("no activation", "mmproj", 1e-5, left_out=("clip.use_gelu",)),),
    measured=MeasuredChange(
        (
            *("blk.3.ffn_gate_up_exps.weight", "blk.3.ffn_down_exps.weight", "blk.3.attn_k.weight"),
            *("blk.2.ffn_down.weight", "token_embd.weight"),
        ),
        samples=(1, 4),
        rtol=5e-3,
        draws=8,
        fisher=(0.4, 2.5),
        reroutes=frozenset({("token_embd.weight", 0)}),
    ),
    conversion=Conversion(
        3.3,
        FEW,
        reached=0.98,
        log="model.audio_tower.output_proj.weight and 0 more tensors are left out",
        f32="blk.0.ffn_down_exps.scale rope_freqs.weight",
        quantized="blk.0.attn_k blk.0.ffn_gate_up_exps",
        among=("ffn_down_exps", "IQ4_NL Q5_0 Q5_1"),
        alone=True,
    ),
)

GLM_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
GLM_NORMS = "attn_norm post_attention_norm attn_q.bias= attn_k.bias= attn_v.bias="
GLM_ATTENTION = "attn_q attn_k attn_v attn_output"
GLM4V = FamilyCase(
    name="glm4.5v",
    pico=glm4v,
    write=glm4v.write_pico_glm4v_moe,
    layouts=("pico_glm4v", "pico_glm4v_fused"),
    published="pico_glm4v",
    tied={"tied": True},
    hf_class="Glm4vMoeForConditionalGeneration",
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
    converted=converted.FRAMES,
    text_keys={
        "leading_dense_block_count": glm4v.DENSE_LAYERS,
        "rope.dimension_count": glm4v.HEAD_DIM // 2,
        "rope.dimension_sections": [4, 6, 6, 0],
        "expert_gating_func": 2,
        "expert_weights_scale": 1.5,
    },
    projector_keys={
        "vision.image_size": glm4v.IMAGE_SIZE,
        "vision.patch_size": glm4v.PATCH,
        "vision.embedding_length": qwen3_vl.VISION_HIDDEN,
        "use_silu": True,
    },
    changes=(
        Change(
            "rope as transformers 5 writes it",
            "text_config",
            {"rope_scaling": None, "rope_theta": None, "partial_rotary_factor": None, "rope_parameters": GLM_ROPE},
        ),
        Change(
            "defaults of transformers",
            "text_config",
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
    rounded=rounding.glm,
    measured=MeasuredChange(
        ("blk.0.ffn_down.weight", "blk.0.ffn_gate.weight", "blk.3.attn_k.weight", "blk.3.ffn_up_shexp.weight"),
        options={"num_experts_per_tok": glm4v.EXPERTS},
    ),
    conversion=Conversion(
        4.5,
        (
            *("--types", "Q3_K,Q5_K", "--dense-types", "Q4_K,Q8_0", "--effort", "fast"),
            *("--image-samples", "2", "--text-samples", "1", "--no-validate"),
        ),
        reached=0.98,
        log=f"layers.{glm4v.LAYERS}.eh_proj.weight and 2 more tensors are left out",
        f32="blk.0.attn_q.bias blk.1.exp_probs_b.bias blk.1.ffn_gate_inp.weight",
        quantized="blk.0.ffn_gate blk.0.ffn_down blk.1.ffn_down_shexp blk.1.ffn_down_exps blk.1.attn_output",
    ),
)

INTERNVL = FamilyCase(
    name="internvl",
    pico=internvl,
    write=internvl.write_pico_internvl,
    layouts=("pico_internvl", "pico_internvl_hf"),
    published="pico_internvl_hf",
    tied={"tied": True},
    hf_class="InternVLChatModel",
    gguf_arch="qwen3moe",
    projector_type="internvl",
    outside=OUTSIDE,
    layers=(QWEN3_LAYER,) * 3,
    vision=weights("v.class_embd= v.patch_embd.* v.position_embd mm.model.mlp.0.* mm.model.mlp.1.* mm.model.mlp.3.*"),
    vision_block=weights("ln1.* attn_q.* attn_k.* attn_v.* attn_out.* ls1 ln2.* ffn_up.* ffn_down.* ls2"),
    vision_blocks=internvl.BLOCKS,
    parameters={
        **QWEN3_PARAMETERS,
        "v.class_embd": "model.vision_tower.embeddings.cls_token",
        "v.patch_embd.weight": "model.vision_tower.embeddings.patch_embeddings.projection.weight",
        "v.patch_embd.bias": "model.vision_tower.embeddings.patch_embeddings.projection.bias",
        "v.position_embd.weight": "model.vision_tower.embeddings.position_embeddings",
        "v.blk.{n}.ls1.weight": "model.vision_tower.encoder.layer.{n}.lambda_1",
        "v.blk.{n}.ls2.weight": "model.vision_tower.encoder.layer.{n}.lambda_2",
    }
    | {
        f"{ours}.{part}": f"model.{theirs}.{part}"
        for part in ("weight", "bias")
        for ours, theirs in {
            "v.blk.{n}.ln1": "vision_tower.encoder.layer.{n}.layernorm_before",
            "v.blk.{n}.attn_q": "vision_tower.encoder.layer.{n}.attention.q_proj",
            "v.blk.{n}.attn_k": "vision_tower.encoder.layer.{n}.attention.k_proj",
            "v.blk.{n}.attn_v": "vision_tower.encoder.layer.{n}.attention.v_proj",
            "v.blk.{n}.attn_out": "vision_tower.encoder.layer.{n}.attention.projection_layer",
            "v.blk.{n}.ln2": "vision_tower.encoder.layer.{n}.layernorm_after",
            "v.blk.{n}.ffn_up": "vision_tower.encoder.layer.{n}.mlp.fc1",
            "v.blk.{n}.ffn_down": "vision_tower.encoder.layer.{n}.mlp.fc2",
            "mm.model.mlp.0": "multi_modal_projector.layer_norm",
            "mm.model.mlp.1": "multi_modal_projector.linear_1",
            "mm.model.mlp.3": "multi_modal_projector.linear_2",
        }.items()
    },
    converted={r"v\.position_embd\.weight": converted.class_token_last},
    text_keys={"attention.key_length": qwen3_vl.HEAD_DIM, "rope.freq_base": 1_000_000},
    projector_keys={
        "vision.image_size": internvl.SIDE,
        "vision.patch_size": internvl.PATCH,
        "vision.projector.scale_factor": 2,
        "vision.preproc_min_tiles": 1,
        "vision.preproc_max_tiles": internvl.MAX_TILES,
        "use_gelu": True,
    },
    changes=(
        Change(
            "scaling beyond the trained context",
            "llm_config",
            {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}},
        ),
    ),
    pre_tokenizer="qwen2",
    image_token="<IMG_CONTEXT>",
    marks=("<img>", "</img>"),
    image_tokens=(28, 28, 28),
    streamed_atol=1e-5,
    ask=prompts.built,
    before_question="\n",
    pictures=((128, 96), (56, 56), (30, 40), (96, 160), (61, 200)),
    rounded=rounding.table_gelu("activation_fn", "act"),
    stock=(
        StockDifference(
            "class token first", "mmproj", 0.05, rewritten={r"v\.position_embd\.weight": converted.class_token_first}
        ),
    ),
    conversion=Conversion(3.0, SOME),
)


def kimi_layer(queries: str, feed_forward: str, kept: str = "", experts: str = "") -> dict[str, Role]:
    """A decoder layer; queries of a low rank have a norm."""
    norms = "attn_q_a_norm" if "attn_q_a" in queries else ""
    return block(
        dense=f"{queries} attn_kv_a_mqa attn_output {feed_forward}",
        keep=f"attn_norm attn_kv_a_norm ffn_norm {norms} {kept}",
        absorbed="attn_k_b attn_v_b",
        experts=experts,
    )


def kimi_layers(queries: str) -> tuple[dict[str, Role], ...]:
    """A dense layer, and two with experts."""
    sparse = kimi_layer(queries, SHARED_EXPERTS, "ffn_gate_inp exp_probs_b.bias=", "gate up down")
    return kimi_layer(queries, DENSE_FFN), sparse, sparse


def kimi_model(folder: Path, checkpoint: Checkpoint) -> Any:
    """transformers' Kimi K2.5, which computes what Kimi-VL does, too."""
    config = Kimi_K25Config.from_dict(dict(find_family(checkpoint).model_config(checkpoint)))
    return Kimi_K25ForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32).eval()


KIMI: dict[str, Any] = {
    "pico": kimi,
    "write": kimi.write_pico_kimi,
    "gguf_arch": "deepseek2",
    "load": kimi_model,
    "outside": OUTSIDE,
    "vision": weights("v.patch_embd.* v.position_embd v.post_ln.* mm.input_norm.* mm.1.* mm.2.*"),
    "pre_tokenizer": "kimi-k2",
    "image_token": "<|media_pad|>",
    "marks": ("<|media_content|>", "<|media_end|>"),
    "image_tokens": (20, 24, 20),
    "ask": prompts.placed,
    "pictures": ((112, 112),),
}
KIMI_TEXT_KEYS = {"expert_gating_func": 2, "leading_dense_block_count": kimi.DENSE_LAYERS}
KIMI_VISION_BLOCK = "ln1.* attn_out.* ln2.* ffn_up.* ffn_down.*"
KIMI_VL = FamilyCase(
    name="kimi-vl",
    layouts=("pico_kimi_vl",),
    published="pico_kimi_vl_as_k25",
    hf_class="KimiVLForConditionalGeneration",
    projector_type="kimivl",
    layers=kimi_layers("attn_q"),
    vision_block=weights(f"attn_q.* attn_k.* attn_v.* {KIMI_VISION_BLOCK}"),
    converted={**converted.absorbed(kimi.ATTENTION), **converted.moon_vit(apart=True)},
    # Only models of 26 or 27 layers may leave the rank out.
    text_keys={**KIMI_TEXT_KEYS, "attention.q_lora_rank": 0, "rope.scaling.type": None, "rope.scaling.factor": None},
    projector_keys={"vision.image_max_pixels": None},
    stock=(
        StockDifference(
            "columns and rows mixed",
            "mmproj",
            0.01,
            rewritten={r"v\.blk\.\d+\.attn_[qk]\..*": converted.columns_with_rows},
        ),
    ),
    conversion=Conversion(
        3.5,
        (*FEW, "--rounding", "nearest"),
        reached=0.99,
        f32="blk.1.exp_probs_b.bias",
        quantized="blk.0.ffn_up blk.1.ffn_up_shexp",
        among=("ffn_down_exps", "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL"),
    ),
    **KIMI,
)
KIMI_K25 = FamilyCase(
    name="kimi-k2.5",
    layouts=("pico_kimi_k25",),
    published="pico_kimi_k25",
    hf_class="KimiK25ForConditionalGeneration",
    projector_type="kimik25",
    layers=kimi_layers("attn_q_a attn_q_b"),
    vision_block=weights(f"attn_qkv.* {KIMI_VISION_BLOCK}"),
    converted={**converted.absorbed(kimi.ATTENTION), **converted.moon_vit(apart=False)},
    text_keys={
        **KIMI_TEXT_KEYS,
        "attention.q_lora_rank": kimi.ATTENTION.query_rank,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
    },
    projector_keys={"vision.image_max_pixels": 16384 * kimi.PATCH**2},
    **KIMI,
)

MISTRAL_LAYER = block(
    dense=f"attn_q_a attn_q_b attn_kv_a_mqa attn_output {SHARED_EXPERTS}",
    keep="attn_norm attn_q_a_norm attn_kv_a_norm ffn_norm ffn_gate_inp",
    absorbed="attn_k_b attn_v_b",
)
MISTRAL_OLD_ROPE = {key: value for key, value in mistral4.ROPE.items() if key not in ("rope_theta", "rope_type")}
MISTRAL4 = FamilyCase(
    name="mistral4",
    pico=mistral4,
    write=mistral4.write_pico_mistral4,
    layouts=("pico_mistral4", "pico_mistral4_module"),
    published="pico_mistral4",
    hf_class="Mistral3ForConditionalGeneration",
    gguf_arch="mistral4",
    projector_type="pixtral",
    outside=OUTSIDE,
    layers=(MISTRAL_LAYER,) * 3,
    vision=weights("v.patch_embd v.pre_ln v.token_embd.img_break= mm.input_norm mm.patch_merger mm.1 mm.2"),
    vision_block=weights("ln1 attn_q attn_k attn_v attn_out ln2 ffn_gate ffn_up ffn_down"),
    converted={
        **converted.absorbed(mistral4.ATTENTION),
        r"v\.blk\.\d+\.attn_[qk]\.weight": converted.neighbours,
        r"v\.token_embd\.img_break": lambda table: table[mistral4.token_id("[IMG_BREAK]")],
    },
    text_keys={
        "vocab_size": VOCAB,
        "attention.head_count_kv": 1,
        "attention.key_length": mistral4.ATTENTION.latent + mistral4.ATTENTION.rotated,
        "attention.value_length": mistral4.ATTENTION.latent,
        "attention.key_length_mla": mistral4.ATTENTION.nope + mistral4.ATTENTION.rotated,
        "attention.value_length_mla": mistral4.ATTENTION.value,
        "attention.temperature_scale": 0.1,
        "attention.temperature_length": mistral4.ORIGINAL_CONTEXT,
        "rope.dimension_count": mistral4.ATTENTION.rotated,
        "rope.scaling.type": "yarn",
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
        "expert_shared_count": 1,
        "expert_weights_norm": True,
    },
    projector_keys={"use_silu": True},
    changes=(
        Change(
            "rope as transformers 4 wrote it",
            "text_config",
            {
                "rope_parameters": None,
                "rope_theta": mistral4.ROPE["rope_theta"],
                "rope_scaling": {**MISTRAL_OLD_ROPE, "type": mistral4.ROPE["rope_type"]},
            },
        ),
        Change(
            "other weights of experts",
            "text_config",
            {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
            {"expert_weights_norm": None, "expert_weights_scale": 2.5},
        ),
        Change("GELU", "vision_config", {"hidden_act": "gelu"}, projector={"use_gelu": True}),
    ),
    pre_tokenizer="tekken",
    image_token="[IMG]",
    marks=("[INST]", "[IMG_END]"),
    image_tokens=(20, 24, 20),
    ask=prompts.with_processor(prompts.rows_of_pieces, patch_size=mistral4.PATCH * mistral4.MERGE),
    pictures=((112, 84),),
    text_repeats=6,
    text_length=4 * mistral4.ORIGINAL_CONTEXT,
    image_kl=1e-5,
    rounded=rounding.pixtral,
    stock=(
        StockDifference(
            "no attention temperature",
            "text",
            1e-5,
            left_out=("mistral4.attention.temperature_scale", "mistral4.attention.temperature_length"),
            unharmed=mistral4.ORIGINAL_CONTEXT,
        ),
    ),
    measured=MeasuredChange(
        ("blk.1.attn_q_a.weight", "blk.1.attn_q_b.weight", "blk.1.attn_kv_a_mqa.weight", "blk.2.ffn_down_shexp.weight")
    ),
    conversion=Conversion(
        3.0,
        (*FEW, "--rounding", "nearest", "--types", "Q2_K,Q4_K", "--dense-types", "Q2_K,Q4_K,Q8_0"),
        quantized="blk.0.attn_q_b blk.0.ffn_up_shexp",
        alone=True,
    ),
)

CASES = (QWEN3_VL, QWEN3_5, GEMMA4, GLM4V, INTERNVL, KIMI_VL, KIMI_K25, MISTRAL4)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_layout = pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, id=f"{case.name}-{layout.removeprefix('pico_')}")
        for case in CASES
        for layout in case.layouts
    ],
)


def cases_with(attribute: str) -> pytest.MarkDecorator:
    """A test of the families that have something."""
    having = [case for case in CASES if getattr(case, attribute)]
    return pytest.mark.parametrize("case", having, ids=lambda case: case.name)
