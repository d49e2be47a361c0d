"""Kimi K2.5 (1T-A32B): llama.cpp's `deepseek2` with a `kimik25` projector.

Its routed experts are published in four bits (`packed_weights`); they are read as what they stand for.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gguf import Keys
from gguf.constants import VisionProjectorType

from mode_gguf.architectures import kimi_text, moon_vit
from mode_gguf.architectures.config import check_settings, section, setting
from mode_gguf.architectures.family import Metadata, ModelFamily, Ranges, as_stored
from mode_gguf.checkpoint.folder import Checkpoint

MIN_PATCHES = 8
"""Of a picture: llama.cpp enlarges smaller ones, which the model itself takes as they are."""

_POSITIONS = "vision.pos_emb_{}"


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers and experts; vision blocks."""
    return {**kimi_text.ranges(checkpoint), **moon_vit.ranges(checkpoint)}


def projector_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's mtmd reads for `kimik25`."""
    vision, side = section(checkpoint, "vision_config"), moon_vit.positions_per_side(checkpoint)
    shared = moon_vit.vision_metadata(checkpoint)
    patch_size = setting(checkpoint, shared, int, Keys.ClipVision.PATCH_SIZE)
    frames = {"init_pos_emb_time": 4, **vision}
    return {
        **shared,
        _POSITIONS.format("height"): side,
        _POSITIONS.format("width"): side,
        _POSITIONS.format("time"): setting(checkpoint, frames, int, "pos_emb_time", "init_pos_emb_time"),
        Keys.ClipVision.IMAGE_MIN_PIXELS: MIN_PATCHES * patch_size**2,
        Keys.ClipVision.IMAGE_MAX_PIXELS: _most_patches(checkpoint) * patch_size**2,
    }


def _most_patches(checkpoint: Checkpoint) -> int:
    return setting(checkpoint, moon_vit.preprocessor(checkpoint), int, "in_patch_limit", "max_patches")


def check(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp has no place for; raises `InputError`."""
    kimi_text.check(checkpoint)
    vision = section(checkpoint, "vision_config")
    epsilon = vision.get("projector_ln_eps", checkpoint.config.get("projection_layer_norm_eps"))
    check_settings(
        checkpoint,
        FAMILY.projector_type,
        {
            "projector_hidden_act": (vision.get("projector_hidden_act", "gelu"), "gelu", "uses this activation"),
            "projector_ln_eps": (
                moon_vit.LAYER_NORM_EPSILON if epsilon is None else epsilon,
                moon_vit.LAYER_NORM_EPSILON,
                "has one epsilon for the vision tower and the projector",
            ),
            **moon_vit.expected(checkpoint),
        },
    )


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """transformers reads config.json itself only where it has saved it: the published one has other names."""
    return moon_vit.model_config(checkpoint, kimi_text.text_config(checkpoint), moon_vit.image_token(checkpoint))


FAMILY = ModelFamily(
    hf_class="KimiK25ForConditionalGeneration",
    gguf_arch=kimi_text.GGUF_ARCH,
    projector_type=VisionProjectorType.KIMIK25,
    text_rules=kimi_text.TEXT_RULES,
    projector_rules=moon_vit.projector_rules(
        attention={"attn_qkv": "qkv"},
        positions=as_stored,
        norm="mm_projector.pre_norm",
        first="mm_projector.proj.0",
        second="mm_projector.proj.2",
    ),
    ignored=(*kimi_text.IGNORED, "vision_tower.patch_embed.pos_emb.time_weight"),
    check=check,
    ranges=ranges,
    text_metadata=kimi_text.text_metadata,
    projector_metadata=projector_metadata,
    tied_output=kimi_text.OUTPUT,
    place_image=partial(moon_vit.place_image, limit="in_patch_limit"),
    needs_processor=False,
    image_token=moon_vit.image_token,
    token_types=None,
    model_config=model_config,
    stored_name=partial(
        moon_vit.stored_name,
        projector={
            "model.mm_projector.in_proj": "mm_projector.proj.0",
            "model.mm_projector.out_proj": "mm_projector.proj.2",
        },
    ),
    read_parameter=moon_vit.read_parameter,
)
