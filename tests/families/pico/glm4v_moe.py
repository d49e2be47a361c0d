"""The smallest honest GLM-4.5V checkpoint: a dense layer, three with experts, one for multi-token prediction."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from tests.families.pico import tokenizer
from tests.families.pico.files import begin_folder, in_bfloat16, published_config, write_readme, write_weights
from tests.families.pico.tokenizer import VOCAB, write_tokenizer
from tests.families.pico.weights import Draw, Named, one_by_one

GLM4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONFIG = published_config("glm4v_moe")
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
LAYERS, DENSE_LAYERS, HIDDEN = TEXT["num_hidden_layers"], TEXT["first_k_dense_replace"], TEXT["hidden_size"]
HEADS, KV_HEADS, HEAD_DIM = TEXT["num_attention_heads"], TEXT["num_key_value_heads"], TEXT["head_dim"]
EXPERTS, TOP_K = TEXT["n_routed_experts"], TEXT["num_experts_per_tok"]
WIDTH, DENSE_WIDTH = TEXT["moe_intermediate_size"], TEXT["intermediate_size"]
"""Multiples of 32 and not of 256, as the real model's 1408 and 10944 are."""
VISION_HIDDEN, VISION_BLOCKS, MERGER_WIDTH = VISION["hidden_size"], VISION["depth"], VISION["intermediate_size"]
PATCH, IMAGE_SIZE = VISION["patch_size"], VISION["image_size"]

Layout = Literal["public", "fused"]

token_id = partial(tokenizer.token_id, special_tokens=SPECIAL_TOKENS)


def write_pico_glm4v_moe(
    folder: Path,
    *,
    layout: Layout = "public",
    mtp: bool = False,
    tied: bool = False,
    **text: Any,
) -> Path:
    """Write a random checkpoint into `folder` (created) and return it.

    Args:
        layout: "public" stores one tensor per expert and projection, like the checkpoints on the hubs; "fused"
            (E, 2I, H) and (E, H, I), as transformers 5 holds them.
        mtp: with a block for multi-token prediction behind the last layer, three tensors of it.
        tied: the output head is the token embedding, and is not stored.
        text: further settings of `text_config`.
    """
    text = {**TEXT, **text, "num_nextn_predict_layers": int(mtp)}
    begin_folder(folder, "glm4v_moe", {**CONFIG, "tie_word_embeddings": tied, "text_config": text})
    write_tokenizer(
        folder,
        GLM4_SPLIT,
        "PreTrainedTokenizerFast",
        special_tokens=SPECIAL_TOKENS,
        eos="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        normalised=False,
    )
    write_readme(folder, "mit")
    draw = Draw()
    weights = dict(_weights(draw, layout, tied, text))
    if mtp:
        block = f"model.language_model.layers.{LAYERS}"
        weights[f"{block}.eh_proj.weight"] = draw.matrix(HIDDEN, 2 * HIDDEN)
        weights[f"{block}.enorm.weight"] = draw.gains(HIDDEN)
        weights[f"{block}.self_attn.o_proj.weight"] = draw.matrix(HIDDEN, HEADS * HEAD_DIM)
    write_weights(folder, in_bfloat16(weights, "e_score_correction_bias"))
    return folder


def _weights(draw: Draw, layout: Layout, tied: bool, text: Mapping[str, Any]) -> Named:
    matrix, gains = draw.matrix, draw.gains
    yield "model.language_model.embed_tokens.weight", draw.normal(VOCAB, HIDDEN) * 0.5
    for layer in range(LAYERS):
        prefix = f"model.language_model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", gains(HIDDEN)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{prefix}.self_attn.{name}_proj.weight", matrix(heads * HEAD_DIM, HIDDEN)
            if text["attention_bias"]:
                yield f"{prefix}.self_attn.{name}_proj.bias", 0.2 * draw.normal(heads * HEAD_DIM)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(HIDDEN, HEADS * HEAD_DIM)
        yield f"{prefix}.post_attention_layernorm.weight", gains(HIDDEN)
        if layer < text["first_k_dense_replace"]:
            yield from draw.feed_forward(f"{prefix}.mlp", DENSE_WIDTH, HIDDEN)
            continue
        yield f"{prefix}.mlp.gate.weight", matrix(EXPERTS, HIDDEN, gain=2.0)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", 0.1 * draw.normal(EXPERTS)
        gate_up, down = matrix(EXPERTS, 2 * WIDTH, HIDDEN), matrix(EXPERTS, HIDDEN, WIDTH)
        yield from _experts(f"{prefix}.mlp.experts", gate_up, down, layout)
        yield from draw.feed_forward(f"{prefix}.mlp.shared_experts", WIDTH, HIDDEN)
    yield "model.language_model.norm.weight", gains(HIDDEN)
    if not tied:
        yield "lm_head.weight", matrix(VOCAB, HIDDEN, gain=2.0)
    yield from _vision_weights(draw)


def _experts(prefix: str, gate_up: torch.Tensor, down: torch.Tensor, layout: Layout) -> Named:
    if layout == "fused":
        yield f"{prefix}.gate_up_proj", gate_up
        yield f"{prefix}.down_proj", down
        return
    apart = dict(one_by_one(prefix, "gate_up", gate_up)) | dict(one_by_one(prefix, "down", down))
    for expert in range(EXPERTS):
        for projection in ("gate", "up", "down"):
            name = f"{prefix}.{expert}.{projection}_proj.weight"
            yield name, apart[name]


def _vision_weights(draw: Draw) -> Named:
    matrix, gains = draw.matrix, draw.gains
    visual = "model.visual"
    yield from draw.patches(f"{visual}.patch_embed.proj.weight", VISION_HIDDEN, 3, 2, PATCH, PATCH)
    yield f"{visual}.patch_embed.proj.bias", draw.bias(VISION_HIDDEN)
    positions = (IMAGE_SIZE // PATCH) ** 2
    yield f"{visual}.embeddings.position_embedding.weight", 0.1 * draw.normal(positions, VISION_HIDDEN)
    yield f"{visual}.post_conv_layernorm.weight", gains(VISION_HIDDEN)
    for block in range(VISION_BLOCKS):
        prefix = f"{visual}.blocks.{block}"
        yield f"{prefix}.norm1.weight", gains(VISION_HIDDEN)
        yield f"{prefix}.attn.qkv.weight", matrix(3 * VISION_HIDDEN, VISION_HIDDEN)
        yield f"{prefix}.attn.proj.weight", matrix(VISION_HIDDEN, VISION_HIDDEN)
        yield f"{prefix}.norm2.weight", gains(VISION_HIDDEN)
        yield from draw.feed_forward(f"{prefix}.mlp", HIDDEN, VISION_HIDDEN)
    yield f"{visual}.post_layernorm.weight", gains(VISION_HIDDEN)
    yield from draw.patches(f"{visual}.downsample.weight", HIDDEN, VISION_HIDDEN, 2, 2)
    yield f"{visual}.downsample.bias", draw.bias(HIDDEN)
    yield f"{visual}.merger.proj.weight", matrix(HIDDEN, HIDDEN)
    yield from draw.layer_norm(f"{visual}.merger.post_projection_norm", HIDDEN)
    yield from draw.feed_forward(f"{visual}.merger", MERGER_WIDTH, HIDDEN)
