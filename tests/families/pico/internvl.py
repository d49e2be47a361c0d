"""The smallest honest InternVL3.5-MoE checkpoint, in the original layout and in transformers'."""

import math
from pathlib import Path
from typing import Any, Literal

import torch

from tests.families.pico.files import in_bfloat16, write_json, write_weights
from tests.families.pico.qwen3_vl_moe import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, attention_weights
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

LAYERS = 3
EXPERTS, TOP_K, WIDTH = 4, 2, 512
VISION_HIDDEN, VISION_WIDTH, VISION_HEADS, BLOCKS = 64, 128, 2, 4
"""With fewer blocks, llama.cpp's converter does not know the projector's last layer."""
SIDE, PATCH, MERGE = 56, 14, 2
"""Pixels of a tile: four tokens."""
MAX_TILES = 6
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


def write_pico_internvl(
    folder: Path, *, seed: int = 0, layout: Layout = "original", tied: bool = False, large: bool = False
) -> Path:
    """Write a random checkpoint into `folder` (created) and return it; both layouts of one seed are one model.

    Args:
        seed: of the weights.
        tied: the output head is the token embedding, and is not stored.
        large: the vision tower is of the form, not the size, of that of 6B: RMS norms, of queries and keys as well, and
            fewer biases. llama.cpp knows that form by its size only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    known_parts = CHAT_TEMPLATE.replace(IMAGE_OF_TEMPLATE, "<IMG_CONTEXT>\n")
    add_tokens(folder, MARKS, ORIGINAL_TEMPLATE if layout == "original" else known_parts)
    write_json(folder / "generation_config.json", {"eos_token_id": token_id("<|im_end|>")})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n# Pico\n")
    write_json(folder / "preprocessor_config.json", _preprocessor(layout))
    write_json(folder / "config.json", _original_config(tied, large) if layout == "original" else _config(tied, large))
    weights = dict(_weights(Draw(torch.Generator().manual_seed(seed)), tied))
    if large:
        weights = _large(weights)
    if layout == "original":
        weights = _original(weights)
    write_weights(folder, in_bfloat16(weights))
    return folder


def _preprocessor(layout: Layout) -> dict[str, Any]:
    common = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_resize": True}
    if layout == "original":
        return {
            **common,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "crop_size": SIDE,
            "do_center_crop": True,
            "do_normalize": True,
            "resample": 3,
            "size": SIDE,
        }
    return {
        **common,
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": True,
        "max_patches": MAX_TILES,
        "size": {"height": SIDE, "width": SIDE},
    }


def _text_config(tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 768,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "flash_attention_2",
        "max_position_embeddings": 4096,
        "max_window_layers": 3,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": False,
    }


def _vision_config(image_size: Any, patch_size: Any, **settings: Any) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": VISION_WIDTH,
        "num_attention_heads": VISION_HEADS,
        "num_hidden_layers": BLOCKS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": patch_size,
        **settings,
    }


def _original_config(tied: bool, large: bool) -> dict[str, Any]:
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": "internvl_chat",
        "downsample_ratio": 1 / MERGE,
        "dynamic_image_size": True,
        "force_image_size": SIDE,
        "image_fold": None,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": MAX_TILES,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": tied,
        "transformers_version": None,
        "use_thumbnail": True,
        "llm_config": _text_config(tied),
        "vision_config": _vision_config(
            SIDE,
            PATCH,
            auto_map={"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
            model_type="intern_vit_6b",
            num_experts=8,
            moe_intermediate_size=768,
            qk_normalization=large,
            qkv_bias=not large,
            norm_type="rms_norm" if large else "layer_norm",
            use_moe=False,
        ),
    }


def _config(tied: bool, large: bool) -> dict[str, Any]:
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "transformers_version": "4.55.0",
        "downsample_ratio": 1 / MERGE,
        "image_seq_length": (SIDE // PATCH // MERGE) ** 2,
        "image_token_id": mark_id("<IMG_CONTEXT>"),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": tied,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": _text_config(tied),
        "vision_config": _vision_config(
            [SIDE, SIDE],
            [PATCH, PATCH],
            model_type="internvl_vision",
            attention_bias=not large,
            use_qk_norm=large,
            norm_type="rms_norm" if large else "layer_norm",
            use_absolute_position_embeddings=True,
            use_mask_token=False,
            use_mean_pooling=True,
        ),
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
    generator = torch.Generator().manual_seed(1)
    without = tuple(f".{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "layernorm_before", "layernorm_after"))
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(without)}
    for block in range(BLOCKS):
        for norm in ("q_norm", "k_norm"):
            name = f"vision_tower.encoder.layer.{block}.attention.{norm}.weight"
            kept[name] = Draw(generator).gains(VISION_HIDDEN)
    return kept


def _original(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors by the names of the model's authors, queries, keys and values in one."""
    renamed = {}
    for name, tensor in weights.items():
        if ".attention.q_proj." in name:
            parts = [tensor, *(weights[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))]
            tensor = torch.cat(parts)
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
