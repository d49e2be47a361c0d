"""InternVL3.5-30B-A3B and 241B-A28B: llama.cpp's `qwen3moe` with an `internvl` projector, in both layouts.

The original one is `InternVLChatModel`, whose own code is never run; transformers' is
`InternVLForConditionalGeneration`, of the repositories that end in -HF. The text model's names are the same in both.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mode_gguf.architectures.family import SAVED, Layout, ModelFamily, says_tied, says_tied_at_either_level
from mode_gguf.architectures.hparams import Hparams, config, has_experts, text_hparams
from mode_gguf.architectures.tensors import Array
from mode_gguf.architectures.text import qwen3_moe
from mode_gguf.architectures.tokenizer import QWEN2
from mode_gguf.architectures.vision import internvl
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

HF_CLASS = "InternVLForConditionalGeneration"
TEXT_CLASS, TEXT_TYPE = "Qwen3MoeForCausalLM", "qwen3_moe"
"""Names of the only text model that is supported, in both layouts."""

_ORIGINAL_RENAMES = (
    (r"^vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.([qk]_norm)\.", r".attn.\1."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
)
"""Names that transformers stores, and the original ones."""

_NOT_TRANSFORMERS = {"auto_map", "_attn_implementation", "attn_implementation", "_name_or_path"}
"""Names in llm_config that say nothing about the model."""


def _check(text: Hparams) -> None:
    """Refuse InternVL with another language model, dense ones foremost, and what `qwen3moe` has no place for."""
    classes = text.get("architectures")
    found = classes[0] if isinstance(classes, list) and classes else text.get("model_type")
    if found not in (TEXT_CLASS, TEXT_TYPE):
        name = "llm_config" if internvl.is_original(text.checkpoint) else "text_config"
        way_out = (
            "of InternVL, this is the only Mixture-of-Experts text model that is supported"
            if has_experts(text.values)
            else "it is not a Mixture-of-Experts model: use llama.cpp's own convert_hf_to_gguf.py and llama-quantize"
        )
        raise InputError(f"{text.file}: {name} is of {found!r}, expected {TEXT_CLASS!r}; {way_out}")
    qwen3_moe.check(text)


def original_vision_config(vision: Hparams) -> Mapping[str, Any]:
    """transformers' vision_config, made from the original one as `tower_hparams` reads it."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "model_type": "internvl_vision",
        **{name: vision.int(name) for name in sizes},
        "hidden_act": "gelu",
        "layer_norm_eps": vision.float("layer_norm_eps"),
        **{name: [vision.int(name)] * 2 for name in ("image_size", "patch_size")},
        "num_channels": 3,
        **{name: vision.get(name) for name in internvl.DEFAULTS},
        "use_mean_pooling": True,  # without the tower's last norm, which the original does not have
        "use_absolute_position_embeddings": True,
    }


def original_model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """transformers' configuration, made from the original one."""
    text = {name: value for name, value in text_hparams(checkpoint).values.items() if name not in _NOT_TRANSFORMERS}
    return {
        "architectures": [HF_CLASS],
        "model_type": "internvl",
        "text_config": {**text, "model_type": TEXT_TYPE},
        "vision_config": original_vision_config(internvl.tower_hparams(checkpoint)),
        "image_token_id": internvl.image_token(checkpoint),
        "image_seq_length": internvl.tokens_per_tile(checkpoint),
        "downsample_ratio": config(checkpoint).float("downsample_ratio"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def read_original(checkpoint: Checkpoint, parameter: str) -> Array | None:
    """Queries, keys or values of the vision tower from the original's fused tensor; None for every other parameter."""
    found = re.search(r"\.attention\.([qkv])_proj\.", parameter)
    if found is None:
        return None
    source = ORIGINAL.layout.stored_name(parameter)
    return internvl.part_of_qkv(checkpoint, source, "qkv".index(found[1])).read(0)


FAMILY = ModelFamily(
    hf_class=HF_CLASS,
    text=replace(qwen3_moe.TEXT_MODEL, check=_check),
    vision=internvl.TOWER,
    tokenizer=QWEN2,
    layout=Layout(SAVED, tied=partial(says_tied, default=True)),
)

ORIGINAL = replace(
    FAMILY,
    hf_class="InternVLChatModel",
    vision=replace(internvl.TOWER, placeholder="<image>"),
    layout=Layout((*SAVED, *_ORIGINAL_RENAMES), read_original, original_model_config, says_tied_at_either_level),
)
