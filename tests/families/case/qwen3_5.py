"""Qwen3.5-MoE."""

import numpy as np

from mode_gguf.architectures import text_tensors
from tests.families.case.shared import FRAMES, QWEN, QWEN_VISION, SHARED_EXPERTS, SOME
from tests.families.family_case import Change, Conversion, FamilyCase, MeasuredChange, block
from tests.families.pico import qwen3_5_moe as pico
from tests.families.refusal import TEXT, Refusal, of_rope, refused_ropes, unlike


def tiled(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Value heads along the first dimension, from `of key head 0 ..., of key head 1 ...` to `first of each, ...`."""
    heads = array.reshape(pico.KEY_HEADS, -1, head_dim, *array.shape[1:])
    return heads.swapaxes(0, 1).reshape(array.shape)


def channels(array: np.ndarray) -> np.ndarray:
    """Queries and keys as they are, values tiled."""
    unmoved = 2 * pico.KEY_HEADS * pico.LINEAR_DIM
    return np.concatenate([array[:unmoved], tiled(array[unmoved:], pico.LINEAR_DIM)])


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
    refusals=(
        *unlike(TEXT, norm_topk_prob=False, hidden_act="gelu", attention_bias=True, attn_output_gate=False),
        *unlike(TEXT, linear_value_head_dim=64, linear_num_value_heads=5),
        *unlike(TEXT, layer_types=["linear_attention", "sliding_attention"]),
        *of_rope("rope_parameters", TEXT, r"\w+", *refused_ropes(rope_theta=10_000)),
        *of_rope("rope_parameters", TEXT, "full_attention", {"full_attention": {"rope_type": "yarn", "factor": 2.0}}),
        Refusal(
            TEXT,
            {"linear_num_value_heads": 4},
            r"in_proj_qkv\.weight has shape \[1280, 256\], expected 1024 rows",
            text_tensors,
        ),
    ),
    pico=pico,
    write=pico.write_pico_qwen3_5_moe,
    layouts=("pico_qwen3_5", "pico_qwen3_5_resaved"),
    gguf_arch="qwen35moe",
    layers=(*(LINEAR_LAYER,) * 3, FULL_LAYER, LINEAR_LAYER),
    vision=QWEN_VISION,
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
    converted={
        **FRAMES,
        r"blk\.\d+\.attn_qkv\.weight": channels,
        r"blk\.\d+\.attn_gate\.weight": lambda matrix: tiled(matrix, pico.LINEAR_DIM),
        r"blk\.\d+\.ssm_conv1d\.weight": lambda kernel: channels(kernel[:, 0]),
        r"blk\.\d+\.ssm_(alpha|beta)\.weight": lambda matrix: tiled(matrix, 1),
        r"blk\.\d+\.ssm_dt\.bias": lambda bias: tiled(bias, 1),
        r"blk\.\d+\.ssm_a": lambda log: -np.exp(tiled(log, 1).astype(np.float64)).astype(np.float32),
        r"blk\.\d+\.ssm_out\.weight": lambda matrix: tiled(matrix.T, pico.LINEAR_DIM).T,
        # RMSNorms that add 1 themselves.
        r"(blk\.\d+\.(attn|post_attention|attn_q|attn_k)|output)_norm\.weight": lambda gains: gains + 1,
    },
    text_keys={
        "attention.recurrent_layers": [True, True, True, False, True],
        "rope.dimension_count": 32,
        "rope.dimension_sections": [6, 5, 5, 0],
        "ssm.inner_size": pico.VALUE_HEADS * pico.LINEAR_DIM,
        "ssm.conv_kernel": pico.KERNEL,
        "full_attention_interval": 4,
    },
    projector_keys={"vision.is_deepstack_layers": [False] * 3},
    changes=(
        Change("implied layers", TEXT, {"layer_types": None}),
        Change(
            "default rope",
            TEXT,
            {"rope_parameters": {"rope_theta": 10_000}},
            {"rope.dimension_sections": [11, 11, 10, 0], "rope.dimension_count": 16},
        ),
    ),
    pre_tokenizer="qwen35",
    attention_from=3,
    measured=MeasuredChange(
        ("blk.4.attn_qkv.weight", "blk.4.attn_gate.weight", "blk.4.ssm_out.weight", "blk.4.ffn_down_shexp.weight"),
        fisher=(0.6, 1.7),
    ),
    conversion=Conversion(
        3.0,
        SOME,
        log="more tensors are left out; `export --mtp Q8_0` writes them to a file to draft with",
        f32="blk.0.ssm_a blk.0.ffn_gate_inp_shexp.weight",
        quantized="blk.0.attn_qkv blk.0.ssm_out blk.0.ffn_up_shexp",
        alone=True,
    ),
    **QWEN,
)
