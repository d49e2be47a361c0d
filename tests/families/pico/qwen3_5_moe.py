"""The smallest honest Qwen3.5-MoE checkpoint: four layers of linear attention, one of full attention."""

from pathlib import Path
from typing import Any, Literal

import torch

from tests.families.pico.files import in_bfloat16, write_json, write_weights
from tests.families.pico.qwen3_vl_moe import HEAD_DIM, HIDDEN, vision_config, vision_weights, write_surroundings
from tests.families.pico.tokenizer import VOCAB, token_id, write_tokenizer
from tests.families.pico.weights import Draw, Named, one_by_one

QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LAYERS = 5
"""The fourth is of full attention."""
HEADS, KV_HEADS = 4, 2
KEY_HEADS, VALUE_HEADS, LINEAR_DIM = 2, 6, 128
"""Three value heads per key head: an order that is its own inverse could not be told from it."""
KERNEL = 4
EXPERTS, TOP_K, WIDTH, SHARED_WIDTH = 4, 2, 768, 512
MTP_NORMS = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")

Layout = Literal["public", "resaved"]


def write_pico_qwen3_5_moe(
    folder: Path, *, seed: int = 0, layout: Layout = "public", mtp: bool = False, tied: bool = False
) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        seed: of the weights.
        layout: "public" stores fused experts (E, 2I, H) and (E, H, I), like the checkpoints on the hubs; "resaved" one
            tensor per expert and projection, as transformers 5 saves them.
        mtp: with the block for multi-token prediction.
        tied: the output head is the token embedding, and is not stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, QWEN35_SPLIT)
    write_json(folder / "config.json", _config(tied=tied, mtp=mtp))
    write_surroundings(folder)
    draw = Draw(torch.Generator().manual_seed(seed))
    weights = dict(_weights(draw, layout, tied=tied))
    if mtp:
        weights |= _mtp_weights(draw, layout)
    write_weights(folder, in_bfloat16(weights))
    return folder


def _config(*, tied: bool, mtp: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "transformers_version": "5.2.0",
        "tie_word_embeddings": tied,
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "dtype": "bfloat16",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "attention_bias": False,
            "attn_output_gate": True,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "full_attention_interval": 4,
            "layer_types": ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(LAYERS)],
            "linear_conv_kernel_dim": KERNEL,
            "linear_key_head_dim": LINEAR_DIM,
            "linear_value_head_dim": LINEAR_DIM,
            "linear_num_key_heads": KEY_HEADS,
            "linear_num_value_heads": VALUE_HEADS,
            "mamba_ssm_dtype": "float32",
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": SHARED_WIDTH,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "mtp_num_hidden_layers": int(mtp),
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
                "partial_rotary_factor": 0.5,
                "rope_theta": 10_000_000,
                "rope_type": "default",
            },
        },
        "vision_config": vision_config("qwen3_5_moe", deepstack_visual_indexes=[]),
    }


def _weights(draw: Draw, layout: Layout, *, tied: bool) -> Named:
    matrix = draw.matrix
    channels = (2 * KEY_HEADS + VALUE_HEADS) * LINEAR_DIM
    values = VALUE_HEADS * LINEAR_DIM
    yield "model.language_model.embed_tokens.weight", draw.normal(VOCAB, HIDDEN) * 0.5
    for layer in range(LAYERS):
        prefix = f"model.language_model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", _gains(draw, HIDDEN)
        if layer % 4 == 3:
            yield from _attention(draw, prefix)
        else:
            yield f"{prefix}.linear_attn.in_proj_qkv.weight", matrix(channels, HIDDEN)
            yield f"{prefix}.linear_attn.in_proj_z.weight", matrix(values, HIDDEN)
            yield f"{prefix}.linear_attn.in_proj_a.weight", matrix(VALUE_HEADS, HIDDEN)
            yield f"{prefix}.linear_attn.in_proj_b.weight", matrix(VALUE_HEADS, HIDDEN)
            yield f"{prefix}.linear_attn.conv1d.weight", matrix(channels, 1, KERNEL)
            yield f"{prefix}.linear_attn.A_log", draw.normal(VALUE_HEADS)
            yield f"{prefix}.linear_attn.dt_bias", draw.normal(VALUE_HEADS)
            yield f"{prefix}.linear_attn.norm.weight", draw.gains(LINEAR_DIM)
            yield f"{prefix}.linear_attn.out_proj.weight", matrix(HIDDEN, values)
        yield from _moe(draw, prefix, layout)
    yield "model.language_model.norm.weight", _gains(draw, HIDDEN)
    if not tied:
        yield "lm_head.weight", matrix(VOCAB, HIDDEN, gain=2.0)
    yield from vision_weights(draw, taps=0)


def _mtp_weights(draw: Draw, layout: Layout) -> dict[str, torch.Tensor]:
    prefix = "mtp.layers.0"
    return {
        "mtp.fc.weight": draw.matrix(HIDDEN, 2 * HIDDEN),
        **{f"mtp.{name}.weight": _gains(draw, HIDDEN) for name in MTP_NORMS},
        f"{prefix}.input_layernorm.weight": _gains(draw, HIDDEN),
        **dict(_attention(draw, prefix)),
        **dict(_moe(draw, prefix, layout)),
    }


def _gains(draw: Draw, n: int) -> torch.Tensor:
    """Of RMSNorms that add 1 themselves."""
    return draw.gains(n) - 1


def _attention(draw: Draw, prefix: str) -> Named:
    yield f"{prefix}.self_attn.q_proj.weight", draw.matrix(2 * HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.k_proj.weight", draw.matrix(KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.v_proj.weight", draw.matrix(KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.o_proj.weight", draw.matrix(HIDDEN, HEADS * HEAD_DIM)
    yield f"{prefix}.self_attn.q_norm.weight", _gains(draw, HEAD_DIM)
    yield f"{prefix}.self_attn.k_norm.weight", _gains(draw, HEAD_DIM)


def _moe(draw: Draw, prefix: str, layout: Layout) -> Named:
    yield f"{prefix}.post_attention_layernorm.weight", _gains(draw, HIDDEN)
    yield f"{prefix}.mlp.gate.weight", draw.matrix(EXPERTS, HIDDEN, gain=2.0)
    experts = f"{prefix}.mlp.experts"
    for projection, shape in (("gate_up", (2 * WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
        weights = draw.matrix(EXPERTS, *shape)
        if layout == "public":
            yield f"{experts}.{projection}_proj", weights
        else:
            yield from one_by_one(experts, projection, weights)
    yield from draw.feed_forward(f"{prefix}.mlp.shared_expert", SHARED_WIDTH, HIDDEN)
    yield f"{prefix}.mlp.shared_expert_gate.weight", draw.matrix(1, HIDDEN)
