"""The smallest honest Qwen3-VL-MoE checkpoint: random weights, real file formats, for transformers and llama.cpp.

Everything a public checkpoint has is there (config, sharded safetensors with an index, byte-level BPE tokenizer, chat
template, image preprocessor, README front matter), so that tests read what users read.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from tests.families.pico.files import EVEN_NORMALISATION, write_json, write_readme, write_weights
from tests.families.pico.tokenizer import VOCAB, token_id, write_tokenizer
from tests.families.pico.weights import Draw, Named

HIDDEN = 256
VISION_HIDDEN = 64
VISION_WIDTH = 128
VISION_BLOCKS = 3
DEEPSTACK_LAYERS = (0, 2)
PATCH = 16
MERGE = 2
POSITIONS = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
LAYERS, EXPERTS, TOP_K, WIDTH = 3, 4, 2, 512

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
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_json(folder / "config.json", _config(layout, dtype, layers, experts, experts_used, expert_width, tied))
    write_surroundings(folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor.to(getattr(torch, dtype)).contiguous()
        for name, tensor in _weights(generator, layout, layers, experts, expert_width, tied)
    }
    write_weights(folder, weights, shards)
    return folder


def write_surroundings(folder: Path) -> None:
    """Generation settings, image preprocessor, and a README with front matter."""
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")]},
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 8 * 32 * 32, "longest_edge": 256 * 32 * 32},
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            **EVEN_NORMALISATION,
        },
    )
    write_readme(folder, "apache-2.0")


def vision_config(model_type: str, **settings: Any) -> dict[str, Any]:
    """Of Qwen's vision tower."""
    return {
        "model_type": model_type,
        "depth": VISION_BLOCKS,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": VISION_WIDTH,
        "num_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": POSITIONS,
        "out_hidden_size": HIDDEN,
        **settings,
    }


def _config(
    layout: Layout, dtype: str, layers: int, experts: int, experts_used: int, expert_width: int, tied: bool
) -> dict[str, Any]:
    sections = {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"}
    theta = 5_000_000.0
    old_style = layout == "public"
    rope: dict[str, Any] = (
        {"rope_scaling": sections, "rope_theta": theta}
        if old_style
        else {"rope_parameters": {**sections, "rope_theta": theta}}
    )
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "transformers_version": "4.57.0" if old_style else "5.23.0",
        "tie_word_embeddings": tied,
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "dtype": dtype,
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "moe_intermediate_size": expert_width,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_experts" if old_style else "num_local_experts": experts,
            "num_experts_per_tok": experts_used,
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "tie_word_embeddings": tied,
            **rope,
        },
        "vision_config": vision_config("qwen3_vl_moe", deepstack_visual_indexes=list(DEEPSTACK_LAYERS)),
    }


def _weights(
    generator: torch.Generator, layout: Layout, layers: int, experts: int, expert_width: int, tied: bool
) -> Named:
    draw = Draw(generator)
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
