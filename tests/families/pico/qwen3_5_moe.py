"""The smallest honest Qwen3.5-MoE checkpoint: four layers of linear attention, one of full attention."""

from pathlib import Path
from typing import Literal

import torch

from tests.families.pico.files import begin_folder, in_bfloat16, published_config, write_readme, write_weights
from tests.families.pico.qwen3_vl_moe import vision_weights
from tests.families.pico.tokenizer import VOCAB, write_tokenizer
from tests.families.pico.weights import Draw, Named, one_by_one

QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CONFIG = published_config("qwen3_5_moe")
TEXT = CONFIG["text_config"]
LAYERS, HIDDEN = TEXT["num_hidden_layers"], TEXT["hidden_size"]
"""The fourth layer is of full attention."""
HEADS, KV_HEADS, HEAD_DIM = TEXT["num_attention_heads"], TEXT["num_key_value_heads"], TEXT["head_dim"]
KEY_HEADS, VALUE_HEADS = TEXT["linear_num_key_heads"], TEXT["linear_num_value_heads"]
"""Three value heads per key head: an order that is its own inverse could not be told from it."""
LINEAR_DIM, KERNEL = TEXT["linear_value_head_dim"], TEXT["linear_conv_kernel_dim"]
EXPERTS, TOP_K, WIDTH = TEXT["num_experts"], TEXT["num_experts_per_tok"], TEXT["moe_intermediate_size"]
SHARED_WIDTH = TEXT["shared_expert_intermediate_size"]
MTP_NORMS = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")

Layout = Literal["public", "resaved"]


def write_pico_qwen3_5_moe(folder: Path, *, layout: Layout = "public", mtp: bool = False, tied: bool = False) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        layout: "public" stores fused experts (E, 2I, H) and (E, H, I), like the checkpoints on the hubs; "resaved" one
            tensor per expert and projection, as transformers 5 saves them.
        mtp: with the block for multi-token prediction.
        tied: the output head is the token embedding, and is not stored.
    """
    text = {**TEXT, "mtp_num_hidden_layers": int(mtp), "tie_word_embeddings": tied}
    begin_folder(folder, "qwen3_vl_moe", {**CONFIG, "tie_word_embeddings": tied, "text_config": text})
    write_tokenizer(folder, QWEN35_SPLIT)
    write_readme(folder, "apache-2.0")
    draw = Draw()
    weights = dict(_weights(draw, layout, tied=tied))
    if mtp:
        weights |= _mtp_weights(draw, layout)
    write_weights(folder, in_bfloat16(weights))
    return folder


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
