"""Kimi-VL-A3B: llama.cpp's `deepseek2` with a `kimivl` projector.

Its modelling code is published beside the weights only, and not in transformers; such code is never run here. For text
and pictures it computes what transformers' Kimi K2.5 does, so that this one is built from its configuration and given
its weights.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gguf.constants import VisionProjectorType

from mode_gguf.architectures import kimi_text, moon_vit
from mode_gguf.architectures.config import check_settings
from mode_gguf.architectures.family import ModelFamily, Ranges
from mode_gguf.checkpoint.folder import Checkpoint

_PROJECTOR = "multi_modal_projector"


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers and experts; vision blocks."""
    return {**kimi_text.ranges(checkpoint), **moon_vit.ranges(checkpoint)}


def check(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp has no place for; raises `InputError`."""
    kimi_text.check(checkpoint)
    check_settings(checkpoint, FAMILY.projector_type, moon_vit.expected(checkpoint))


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Of transformers' Kimi K2.5."""
    return moon_vit.model_config(checkpoint, kimi_text.text_config(checkpoint), moon_vit.image_token(checkpoint))


FAMILY = ModelFamily(
    hf_class="KimiVLForConditionalGeneration",
    gguf_arch=kimi_text.GGUF_ARCH,
    projector_type=VisionProjectorType.KIMIVL,
    text_rules=kimi_text.TEXT_RULES,
    projector_rules=moon_vit.projector_rules(
        attention={"attn_q": "q", "attn_k": "k", "attn_v": "v"},
        positions=moon_vit.flat_positions,
        norm=f"{_PROJECTOR}.pre_norm",
        first=f"{_PROJECTOR}.linear_1",
        second=f"{_PROJECTOR}.linear_2",
    ),
    ignored=kimi_text.IGNORED,
    check=check,
    ranges=ranges,
    text_metadata=kimi_text.text_metadata,
    projector_metadata=moon_vit.vision_metadata,
    tied_output=kimi_text.OUTPUT,
    place_image=partial(moon_vit.place_image, limit="in_token_limit"),
    needs_processor=False,
    image_token=moon_vit.image_token,
    token_types=None,
    model_config=model_config,
    stored_name=partial(
        moon_vit.stored_name,
        projector={
            "model.mm_projector.pre_norm": f"{_PROJECTOR}.pre_norm",
            "model.mm_projector.in_proj": f"{_PROJECTOR}.linear_1",
            "model.mm_projector.out_proj": f"{_PROJECTOR}.linear_2",
        },
    ),
    read_parameter=moon_vit.read_parameter,
)
