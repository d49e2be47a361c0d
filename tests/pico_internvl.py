"""The smallest honest InternVL3.5-MoE checkpoint, in the original layout and in transformers'."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer

from tests.pico import (
    CHAT_TEMPLATE,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    SPECIAL_TOKENS,
    VOCAB,
    Draw,
    token_id,
    write_json,
    write_tokenizer,
    write_weights,
)

LAYERS = 3
EXPERTS, TOP_K, WIDTH = 4, 2, 512
VISION_HIDDEN, VISION_WIDTH, VISION_HEADS, BLOCKS = 64, 128, 2, 4
"""With fewer blocks, llama.cpp's converter does not know the projector's last layer."""
SIDE, PATCH, MERGE = 56, 14, 2
"""Pixels of a tile: four tokens."""
MAX_TILES = 6
MARKS = ("<img>", "</img>", "<IMG_CONTEXT>")

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
    _write_tokenizer(folder, layout)
    write_json(folder / "generation_config.json", {"eos_token_id": token_id("<|im_end|>")})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: image-text-to-text\n---\n# Pico\n")
    write_json(folder / "preprocessor_config.json", _preprocessor(layout))
    write_json(folder / "config.json", _original_config(tied, large) if layout == "original" else _config(tied, large))
    weights = dict(_weights(torch.Generator().manual_seed(seed), tied))
    if large:
        weights = _large(weights)
    if layout == "original":
        weights = _original(weights)
    write_weights(folder, {name: tensor.bfloat16().contiguous() for name, tensor in weights.items()}, shards=2)
    return folder


def _write_tokenizer(folder: Path, layout: Layout) -> None:
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    first = config["added_tokens_decoder"][str(token_id("<|im_end|>"))]
    config["added_tokens_decoder"] |= {str(mark_id(token)): {**first, "content": token} for token in MARKS}
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    config["chat_template"] = (
        ORIGINAL_TEMPLATE if layout == "original" else CHAT_TEMPLATE.replace(image, "<IMG_CONTEXT>\n")
    )
    write_json(folder / "tokenizer_config.json", config)


ORIGINAL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Knows no parts: a picture is a mark in the text."""


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


def _weights(generator: torch.Generator, tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """As repositories in transformers' layout store them."""
    draw = Draw(generator)
    matrix, gains = draw.matrix, draw.gains

    def linear(name: str, rows: int, n_in: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{name}.weight", matrix(rows, n_in)
        yield f"{name}.bias", 0.05 * torch.randn(rows, generator=generator)

    def layer_norm(name: str, n: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{name}.weight", gains(n)
        yield f"{name}.bias", 0.05 * torch.randn(n, generator=generator)

    yield "language_model.model.embed_tokens.weight", torch.randn(VOCAB, HIDDEN, generator=generator) * 0.5
    for layer in range(LAYERS):
        prefix = f"language_model.model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.self_attn.q_proj.weight", matrix(HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(HIDDEN, HEADS * HEAD_DIM)
        yield f"{prefix}.self_attn.q_norm.weight", gains(HEAD_DIM)
        yield f"{prefix}.self_attn.k_norm.weight", gains(HEAD_DIM)
        yield f"{prefix}.post_attention_layernorm.weight", gains(HIDDEN)
        yield f"{prefix}.mlp.gate.weight", matrix(EXPERTS, HIDDEN, gain=2.0)
        for expert in range(EXPERTS):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", matrix(WIDTH, HIDDEN)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", matrix(WIDTH, HIDDEN)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", matrix(HIDDEN, WIDTH)
    yield "language_model.model.norm.weight", gains(HIDDEN)
    if not tied:
        yield "language_model.lm_head.weight", matrix(VOCAB, HIDDEN, gain=2.0)

    n_positions = 1 + (SIDE // PATCH) ** 2
    embeddings = "vision_tower.embeddings"
    n_patch = 3 * PATCH * PATCH
    yield f"{embeddings}.cls_token", torch.randn(1, 1, VISION_HIDDEN, generator=generator)
    # As far apart as those of trained towers: a table whose rows are taken for their neighbours' must show.
    yield f"{embeddings}.position_embeddings", torch.randn(1, n_positions, VISION_HIDDEN, generator=generator)
    yield (
        f"{embeddings}.patch_embeddings.projection.weight",
        matrix(VISION_HIDDEN, n_patch).view(VISION_HIDDEN, 3, PATCH, PATCH) * math.sqrt(3),
    )
    yield f"{embeddings}.patch_embeddings.projection.bias", 0.05 * torch.randn(VISION_HIDDEN, generator=generator)
    for block in range(BLOCKS):
        prefix = f"vision_tower.encoder.layer.{block}"
        for projection in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            yield from linear(f"{prefix}.attention.{projection}", VISION_HIDDEN, VISION_HIDDEN)
        yield f"{prefix}.lambda_1", gains(VISION_HIDDEN)
        yield f"{prefix}.lambda_2", gains(VISION_HIDDEN)
        yield from layer_norm(f"{prefix}.layernorm_before", VISION_HIDDEN)
        yield from layer_norm(f"{prefix}.layernorm_after", VISION_HIDDEN)
        yield from linear(f"{prefix}.mlp.fc1", VISION_WIDTH, VISION_HIDDEN)
        yield from linear(f"{prefix}.mlp.fc2", VISION_HIDDEN, VISION_WIDTH)
    yield from layer_norm("multi_modal_projector.layer_norm", VISION_HIDDEN * MERGE**2)
    yield from linear("multi_modal_projector.linear_1", HIDDEN, VISION_HIDDEN * MERGE**2)
    yield from linear("multi_modal_projector.linear_2", HIDDEN, HIDDEN)


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
