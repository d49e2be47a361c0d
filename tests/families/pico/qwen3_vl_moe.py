"""The smallest honest Qwen3-VL-MoE checkpoint: random weights, real file formats, for transformers and llama.cpp.

Everything a public checkpoint has is there (config, sharded safetensors with an index, byte-level BPE tokenizer, chat
template, image preprocessor, README front matter), so that tests read what users read.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from tests.families.pico.files import begin_folder, published_config, write_readme, write_weights
from tests.families.pico.tokenizer import VOCAB, write_tokenizer
from tests.families.pico.weights import Draw, Named

CONFIG = published_config("qwen3_vl_moe")
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
LAYERS, HIDDEN = TEXT["num_hidden_layers"], TEXT["hidden_size"]
HEADS, KV_HEADS, HEAD_DIM = TEXT["num_attention_heads"], TEXT["num_key_value_heads"], TEXT["head_dim"]
EXPERTS, TOP_K, WIDTH = TEXT["num_experts"], TEXT["num_experts_per_tok"], TEXT["moe_intermediate_size"]
VISION_HIDDEN, VISION_WIDTH, VISION_BLOCKS = VISION["hidden_size"], VISION["intermediate_size"], VISION["depth"]
PATCH, MERGE, POSITIONS = VISION["patch_size"], VISION["spatial_merge_size"], VISION["num_position_embeddings"]
DEEPSTACK_LAYERS = VISION["deepstack_visual_indexes"]

Layout = Literal["public", "module"]


def write_pico_qwen3vlmoe(
    folder: Path,
    *,
    seed: int = 0,
    layout: Layout = "public",
    dtype: str = "bfloat16",
    layers: int = LAYERS,
    experts: int = EXPERTS,
    experts_used: int = TOP_K,
    expert_width: int = WIDTH,
    shards: int = 2,
    tied: bool = False,
) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        seed: of the weights.
        layout: "public" stores the fused experts as (E, H, 2I) and (E, I, H), like the checkpoints on the hubs;
            "module" as (E, 2I, H) and (E, H, I), like a re-save by transformers 5.
        dtype: torch's name of the stored type.
        layers: more than the two DeepStack mergers, which llama.cpp's last layer has no place for.
        expert_width: I; 512 is told apart from H = 256 by shape, 256 and 128 are the ambiguous widths.
        shards: safetensors files; 1 writes a single `model.safetensors` without an index.
        tied: the output head is the token embedding, and is not stored.
    """
    sizes = {
        "dtype": dtype,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": experts_used,
        "moe_intermediate_size": expert_width,
        "tie_word_embeddings": tied,
    }
    config = {**CONFIG, "tie_word_embeddings": tied, "text_config": {**TEXT, **sizes}}
    begin_folder(folder, "qwen3_vl_moe", config if layout == "public" else _as_saved_again(config))
    write_tokenizer(folder)
    write_readme(folder, "apache-2.0")
    weights = {
        name: tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in _weights(Draw(seed), layout, layers, experts, expert_width, tied)
    }
    write_weights(folder, weights, shards)
    return folder


def _as_saved_again(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings and the number of experts as transformers 5 spells them."""
    text = {"num_local_experts" if key == "num_experts" else key: value for key, value in config["text_config"].items()}
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    return {**config, "transformers_version": "5.23.0", "text_config": text}


def _weights(draw: Draw, layout: Layout, layers: int, experts: int, expert_width: int, tied: bool) -> Named:
    yield "model.language_model.embed_tokens.weight", draw.normal(VOCAB, HIDDEN) * 0.5
    for layer in range(layers):
        prefix = f"model.language_model.layers.{layer}"
        yield from attention_weights(draw, prefix)
        yield f"{prefix}.mlp.gate.weight", draw.matrix(experts, HIDDEN, gain=2.0)
        gate_up = draw.matrix(experts, 2 * expert_width, HIDDEN)
        down = draw.matrix(experts, HIDDEN, expert_width)
        transposed = layout == "public"
        yield f"{prefix}.mlp.experts.gate_up_proj", gate_up.mT if transposed else gate_up
        yield f"{prefix}.mlp.experts.down_proj", down.mT if transposed else down
    yield "model.language_model.norm.weight", draw.gains(HIDDEN)
    if not tied:
        yield "lm_head.weight", draw.matrix(VOCAB, HIDDEN, gain=2.0)
    yield from vision_weights(draw, taps=len(DEEPSTACK_LAYERS))


def attention_weights(draw: Draw, prefix: str) -> Named:
    """Attention of a layer of Qwen3's decoder, with the norms before and behind it."""
    yield f"{prefix}.input_layernorm.weight", draw.gains(HIDDEN)
    yield f"{prefix}.self_attn.q_proj.weight", draw.matrix(HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.k_proj.weight", draw.matrix(KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.v_proj.weight", draw.matrix(KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.o_proj.weight", draw.matrix(HIDDEN, HEADS * HEAD_DIM)
    yield f"{prefix}.self_attn.q_norm.weight", draw.gains(HEAD_DIM)
    yield f"{prefix}.self_attn.k_norm.weight", draw.gains(HEAD_DIM)
    yield f"{prefix}.post_attention_layernorm.weight", draw.gains(HIDDEN)


def vision_weights(draw: Draw, *, taps: int) -> Named:
    """Names and values of Qwen's vision tower, with so many DeepStack mergers."""
    yield from draw.patches("model.visual.patch_embed.proj.weight", VISION_HIDDEN, 3, 2, PATCH, PATCH)
    yield "model.visual.patch_embed.proj.bias", draw.bias(VISION_HIDDEN)
    yield "model.visual.pos_embed.weight", 0.1 * draw.normal(POSITIONS, VISION_HIDDEN)
    for block in range(VISION_BLOCKS):
        prefix = f"model.visual.blocks.{block}"
        yield from draw.layer_norm(f"{prefix}.norm1", VISION_HIDDEN)
        yield from draw.layer_norm(f"{prefix}.norm2", VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.attn.qkv", 3 * VISION_HIDDEN, VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.attn.proj", VISION_HIDDEN, VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.mlp.linear_fc1", VISION_WIDTH, VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.mlp.linear_fc2", VISION_HIDDEN, VISION_WIDTH)
    n_merged = VISION_HIDDEN * MERGE * MERGE
    mergers = [f"model.visual.deepstack_merger_list.{index}" for index in range(taps)]
    for merger in ("model.visual.merger", *mergers):
        yield from draw.layer_norm(f"{merger}.norm", n_merged if merger in mergers else VISION_HIDDEN)
        yield from draw.linear(f"{merger}.linear_fc1", n_merged, n_merged)
        yield from draw.linear(f"{merger}.linear_fc2", HIDDEN, n_merged)
