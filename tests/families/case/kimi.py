"""Kimi-VL and Kimi K2.5."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from mode_gguf.architectures import find_family
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from tests.families import prompts
from tests.families.case.shared import DENSE_FFN, FEW, OUTSIDE, SHARED_EXPERTS, absorbed
from tests.families.family_case import Change, Conversion, FamilyCase, StockDifference, block, weights
from tests.families.pico import kimi as pico
from tests.families.refusal import TEXT, VISION, Refusal, of_rope, refused_ropes, unlike


def columns_then_rows(array: np.ndarray) -> np.ndarray:
    """MoonViT's queries or keys: first a head's pairs for columns, then those for rows."""
    return array.reshape(pico.VISION_HEADS, -1, 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def columns_with_rows(array: np.ndarray) -> np.ndarray:
    """The inverse: the checkpoint's order, which the stock converter keeps."""
    return array.reshape(pico.VISION_HEADS, 2, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def queries_and_keys_turned(array: np.ndarray) -> np.ndarray:
    """MoonViT's three in one, with the values."""
    q, k, v = np.split(array, 3)
    return np.concatenate([columns_then_rows(q), columns_then_rows(k), v])


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
    config = Kimi_K25Config.from_dict(dict(find_family(checkpoint).layout.model_config(checkpoint)))
    return Kimi_K25ForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32).eval()


KIMI: dict[str, Any] = {
    "pico": pico,
    "write": pico.write_pico_kimi,
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
KIMI_TEXT_KEYS = {"expert_gating_func": 2, "leading_dense_block_count": pico.DENSE_LAYERS}
KIMI_VISION_BLOCK = "ln1.* attn_out.* ln2.* ffn_up.* ffn_down.*"
KIMI_VL = FamilyCase(
    name="kimi-vl",
    refusals=(
        *unlike(TEXT, hidden_act="gelu", scoring_func="softmax", topk_method="greedy", n_group=2, topk_group=2),
        *unlike(TEXT, moe_layer_freq=2, num_nextn_predict_layers=1, attention_bias=True, num_key_value_heads=2),
        *unlike(TEXT, partial_rotary_factor=0.5),
        Refusal(TEXT, {"n_group": None}, "n_group is 8, expected 1"),
        *of_rope("rope_scaling", TEXT, r"\w+", *refused_ropes()),
        *of_rope(
            "rope_scaling",
            TEXT,
            "(mscale_all_dim|attention_factor)",
            {"type": "dynamic", "factor": 2.0, "mscale_all_dim": 1.0},
            {"type": "yarn", "factor": 1, "attention_factor": 1.3},
        ),
    ),
    layouts=("pico_kimi_vl",),
    transformers_layout="pico_kimi_vl_as_k25",
    projector_type="kimivl",
    layers=kimi_layers("attn_q"),
    vision_block=weights(f"attn_q.* attn_k.* attn_v.* {KIMI_VISION_BLOCK}"),
    converted={
        **absorbed(pico.ATTENTION),
        r"v\.blk\.\d+\.attn_q\..*": lambda array: columns_then_rows(np.split(array, 3)[0]),
        r"v\.blk\.\d+\.attn_k\..*": lambda array: columns_then_rows(np.split(array, 3)[1]),
        r"v\.blk\.\d+\.attn_v\..*": lambda array: np.split(array, 3)[2],
        r"v\.position_embd\.weight": lambda table: table.reshape(pico.POSITIONS**2, pico.VISION_HIDDEN),
    },
    # Only models of 26 or 27 layers may leave the rank out.
    text_keys={**KIMI_TEXT_KEYS, "attention.q_lora_rank": 0},
    projector_keys={"vision.image_max_pixels": None},
    changes=(
        Change("renormalised by default", TEXT, {"norm_topk_prob": None}, {"expert_weights_norm": True}),
        Change("dynamic", TEXT, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ),
    stock=(
        StockDifference(
            "columns and rows mixed",
            "mmproj",
            0.01,
            rewritten={r"v\.blk\.\d+\.attn_[qk]\..*": columns_with_rows},
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
    refusals=(
        *of_rope("rope_parameters", VISION, "vision rope_theta", {"rope_type": "axial", "rope_theta": 1e6}),
        *unlike(VISION, merge_kernel_size=[1, 1], init_pos_emb_width=4),
        # As many layers as llama.cpp expects none in.
        Refusal(TEXT, {"num_hidden_layers": 27}, "q_lora_rank is 256 with 27 layers"),
    ),
    layouts=("pico_kimi_k25",),
    projector_type="kimik25",
    layers=kimi_layers("attn_q_a attn_q_b"),
    vision_block=weights(f"attn_qkv.* {KIMI_VISION_BLOCK}"),
    converted={**absorbed(pico.ATTENTION), r"v\.blk\.\d+\.attn_qkv\..*": queries_and_keys_turned},
    text_keys={
        **KIMI_TEXT_KEYS,
        "attention.q_lora_rank": pico.ATTENTION.query_rank,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
    },
    projector_keys={"vision.image_max_pixels": 16384 * pico.PATCH**2},
    **KIMI,
)
