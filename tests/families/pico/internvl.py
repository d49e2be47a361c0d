"""The smallest honest InternVL3.5-MoE checkpoint, in the original layout and in transformers'."""

import math
from pathlib import Path
from typing import Any, Literal

import torch

from tests.families.pico.files import begin_folder, in_bfloat16, published_config, write_weights
from tests.families.pico.qwen3_vl_moe import HIDDEN, attention_weights
from tests.families.pico.tokenizer import (
    CHAT_TEMPLATE,
    IMAGE_OF_TEMPLATE,
    SPECIAL_TOKENS,
    VOCAB,
    add_tokens,
    token_id,
    write_tokenizer,
)
from tests.families.pico.weights import Draw, Named

CONFIG, ORIGINAL_CONFIG = published_config("internvl_hf"), published_config("internvl")
TEXT, VISION = ORIGINAL_CONFIG["llm_config"], ORIGINAL_CONFIG["vision_config"]
LAYERS, EXPERTS, TOP_K = TEXT["num_hidden_layers"], TEXT["num_experts"], TEXT["num_experts_per_tok"]
WIDTH = TEXT["moe_intermediate_size"]
VISION_HIDDEN, VISION_WIDTH, BLOCKS = VISION["hidden_size"], VISION["intermediate_size"], VISION["num_hidden_layers"]
"""With fewer than four blocks, llama.cpp's converter does not know the projector's last layer."""
SIDE, PATCH, MERGE = ORIGINAL_CONFIG["force_image_size"], VISION["patch_size"], 2
"""Pixels of a tile: four tokens."""
MAX_TILES = ORIGINAL_CONFIG["max_dynamic_patch"]
MARKS = ("<img>", "</img>", "<IMG_CONTEXT>")
ORIGINAL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Knows no parts: a picture is a mark in the text."""

Layout = Literal["original", "transformers"]


def mark_id(token: str) -> int:
    """Of the tokens that InternVL adds to Qwen's."""
    return token_id(SPECIAL_TOKENS[-1]) + 1 + MARKS.index(token)


def write_pico_internvl(folder: Path, *, layout: Layout = "original", tied: bool = False, large: bool = False) -> Path:
    """Write a random checkpoint into `folder` (created) and return it; both layouts are one model.

    Args:
        tied: the output head is the token embedding, and is not stored.
        large: the vision tower is of the form, not the size, of that of 6B: RMS norms, of queries and keys as well, and
            fewer biases. llama.cpp knows that form by its size only.
    """
    original = layout == "original"
    begin_folder(folder, "internvl" if original else "internvl_hf", _config(original=original, tied=tied, large=large))
    write_tokenizer(folder)
    known_parts = CHAT_TEMPLATE.replace(IMAGE_OF_TEMPLATE, "<IMG_CONTEXT>\n")
    add_tokens(folder, MARKS, ORIGINAL_TEMPLATE if original else known_parts)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n# Pico\n")
    weights = dict(_weights(Draw(), tied))
    if large:
        weights = _large(weights)
    if original:
        weights = _original(weights)
    write_weights(folder, in_bfloat16(weights))
    return folder


def _config(*, original: bool, tied: bool, large: bool) -> dict[str, Any]:
    config, section = (ORIGINAL_CONFIG, "llm_config") if original else (CONFIG, "text_config")
    form = {
        "qk_normalization" if original else "use_qk_norm": large,
        "qkv_bias" if original else "attention_bias": not large,
        "norm_type": "rms_norm" if large else "layer_norm",
    }
    return {
        **config,
        "tie_word_embeddings": tied,
        section: {**config[section], "tie_word_embeddings": tied},
        "vision_config": {**config["vision_config"], **form},
    }


def _weights(draw: Draw, tied: bool) -> Named:
    """As repositories in transformers' layout store them."""
    yield "language_model.model.embed_tokens.weight", draw.normal(VOCAB, HIDDEN) * 0.5
    for layer in range(LAYERS):
        prefix = f"language_model.model.layers.{layer}"
        yield from attention_weights(draw, prefix)
        yield f"{prefix}.mlp.gate.weight", draw.matrix(EXPERTS, HIDDEN, gain=2.0)
        for expert in range(EXPERTS):
            yield from draw.feed_forward(f"{prefix}.mlp.experts.{expert}", WIDTH, HIDDEN)
    yield "language_model.model.norm.weight", draw.gains(HIDDEN)
    if not tied:
        yield "language_model.lm_head.weight", draw.matrix(VOCAB, HIDDEN, gain=2.0)

    embeddings = "vision_tower.embeddings"
    yield f"{embeddings}.cls_token", draw.normal(1, 1, VISION_HIDDEN)
    # As far apart as those of trained towers: a table whose rows are taken for their neighbours' must show.
    yield f"{embeddings}.position_embeddings", draw.normal(1, 1 + (SIDE // PATCH) ** 2, VISION_HIDDEN)
    for name, weights in draw.patches(
        f"{embeddings}.patch_embeddings.projection.weight", VISION_HIDDEN, 3, PATCH, PATCH
    ):
        yield name, weights * math.sqrt(3)
    yield f"{embeddings}.patch_embeddings.projection.bias", draw.bias(VISION_HIDDEN)
    for block in range(BLOCKS):
        prefix = f"vision_tower.encoder.layer.{block}"
        for projection in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            yield from draw.linear(f"{prefix}.attention.{projection}", VISION_HIDDEN, VISION_HIDDEN)
        yield f"{prefix}.lambda_1", draw.gains(VISION_HIDDEN)
        yield f"{prefix}.lambda_2", draw.gains(VISION_HIDDEN)
        yield from draw.layer_norm(f"{prefix}.layernorm_before", VISION_HIDDEN)
        yield from draw.layer_norm(f"{prefix}.layernorm_after", VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.mlp.fc1", VISION_WIDTH, VISION_HIDDEN)
        yield from draw.linear(f"{prefix}.mlp.fc2", VISION_HIDDEN, VISION_WIDTH)
    yield from draw.layer_norm("multi_modal_projector.layer_norm", VISION_HIDDEN * MERGE**2)
    yield from draw.linear("multi_modal_projector.linear_1", HIDDEN, VISION_HIDDEN * MERGE**2)
    yield from draw.linear("multi_modal_projector.linear_2", HIDDEN, HIDDEN)


def _large(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors without those that the tower of 6B does not have, and norms of queries and keys."""
    draw = Draw(1)
    without = tuple(f".{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "layernorm_before", "layernorm_after"))
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(without)}
    for block in range(BLOCKS):
        for norm in ("q_norm", "k_norm"):
            name = f"vision_tower.encoder.layer.{block}.attention.{norm}.weight"
            kept[name] = draw.gains(VISION_HIDDEN)
    return kept


def _original(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors by the names of the model's authors, queries, keys and values in one."""
    renamed = {}
    for name, tensor in weights.items():
        if ".attention.q_proj." in name:
            tensor = torch.cat([weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        elif ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        for piece, original in _ORIGINAL_PIECES:
            name = name.replace(piece, original)
        renamed[name] = tensor
    return renamed


_ORIGINAL_PIECES = (
    ("vision_tower.", "vision_model."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.q_proj", "attn.qkv"),
    ("attention.q_norm", "attn.q_norm"),
    ("attention.k_norm", "attn.k_norm"),
    ("attention.projection_layer", "attn.proj"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("multi_modal_projector.layer_norm", "mlp1.0"),
    ("multi_modal_projector.linear_1", "mlp1.1"),
    ("multi_modal_projector.linear_2", "mlp1.3"),
)
