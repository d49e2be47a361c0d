"""Kimi K2.5 (1T-A32B): llama.cpp's `deepseek2` with a `kimik25` projector.

Its routed experts are published in four bits (`packed_weights`); they are read as what they stand for.
"""

from dataclasses import replace
from functools import partial

from gguf import Keys
from gguf.constants import VisionProjectorType

from mode_gguf.architectures.common_keys import Metadata
from mode_gguf.architectures.families import kimi_vl
from mode_gguf.architectures.family import SAVED, ModelFamily, VisionTower, says_tied
from mode_gguf.architectures.hparams import Hparams, image_hparams
from mode_gguf.architectures.rules import as_stored
from mode_gguf.architectures.text import deepseek
from mode_gguf.architectures.vision import moon_vit

MIN_PATCHES = 8
"""The fewest patches of a picture: llama.cpp enlarges smaller ones, which the model itself takes as they are."""

_PROJECTOR = VisionProjectorType.KIMIK25
_LIMIT = "in_patch_limit"
_POSITIONS = "vision.pos_emb_{}"
_RENAMES = (
    (r"^model\.mm_projector\.in_proj\.", "mm_projector.proj.0."),
    (r"^model\.mm_projector\.out_proj\.", "mm_projector.proj.2."),
)


def _keys(vision: Hparams) -> Metadata:
    side, area = moon_vit.positions_per_side(vision), vision.int("patch_size") ** 2
    return {
        **moon_vit.keys(vision),
        _POSITIONS.format("height"): side,
        _POSITIONS.format("width"): side,
        _POSITIONS.format("time"): vision.int("pos_emb_time", "init_pos_emb_time"),
        Keys.ClipVision.IMAGE_MIN_PIXELS: MIN_PATCHES * area,
        Keys.ClipVision.IMAGE_MAX_PIXELS: image_hparams(vision.checkpoint).int(_LIMIT, "max_patches") * area,
    }


def _check(vision: Hparams) -> None:
    """Refuse what llama.cpp's `kimik25` projector has one value for only."""
    vision.expect("projector_hidden_act", "gelu", "uses this activation")
    epsilon = vision.get("projector_ln_eps", vision.checkpoint.config.get("projection_layer_norm_eps"))
    vision.require(
        "projector_ln_eps",
        moon_vit.LAYER_NORM_EPSILON if epsilon is None else epsilon,
        moon_vit.LAYER_NORM_EPSILON,
        "has one epsilon for the vision tower and the projector",
    )
    moon_vit.check(vision)


FAMILY = ModelFamily(
    hf_class="KimiK25ForConditionalGeneration",
    text=deepseek.TEXT_MODEL,
    vision=VisionTower(
        projector_type=_PROJECTOR,
        hparams=partial(moon_vit.tower_hparams, reader=_PROJECTOR),
        rules=moon_vit.rules({"attn_qkv": "qkv"}, as_stored),
        keys=_keys,
        check=_check,
        place_image=partial(moon_vit.place_image, limit=_LIMIT),
        needs_processor=False,
        image_token=moon_vit.image_token,
        token_types=None,
    ),
    tokenizer=kimi_vl.TOKENIZER,
    layout=replace(
        kimi_vl.FAMILY.layout, renames=(*moon_vit.RENAMES, *_RENAMES, *SAVED), tied=partial(says_tied, default=True)
    ),
    ignored=("model.vision_tower.patch_embed.pos_emb.time_weight",),
)
