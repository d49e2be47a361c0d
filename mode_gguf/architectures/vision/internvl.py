"""The vision towers of InternVL3.5, of 300M and 6B: llama.cpp's `internvl` projector.

Hyperparameters are read by transformers' names; `tower_hparams` translates those of the original layout
(`InternVLChatModel`).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys
from gguf.constants import VisionProjectorType

from mode_gguf.architectures.added_tokens import special_token
from mode_gguf.architectures.common_keys import Metadata, common_vision_keys, vision_ranges
from mode_gguf.architectures.family import VisionTower
from mode_gguf.architectures.hparams import Hparams, config, image_hparams, vision_hparams
from mode_gguf.architectures.images import ImagePlace, ImageSize, PlacedImage
from mode_gguf.architectures.rules import ModuleRules, Ranges, View, as_stored, check_shape, refuse_shape
from mode_gguf.architectures.tensors import ALL_ROWS, Array
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

PROJECTOR = VisionProjectorType.INTERNVL

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"
RMS_WIDTH, RMS_BLOCKS = 3200, 45
"""The vision tower that llama.cpp knows by its size to have RMS norms."""

IMAGE_TOKEN, IMAGE_BEGIN, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"

DEFAULTS: Mapping[str, Any] = {"norm_type": LAYER_NORM, "attention_bias": False, "use_qk_norm": False}
"""transformers' own, of what config.json may lack, and tells the two towers apart."""

ORIGINAL_DEFAULTS: Mapping[str, Any] = {"norm_type": RMS_NORM, "qkv_bias": False, "qk_normalization": True}
"""The original layout's own, in the same order."""

TILE_DEFAULTS: Mapping[str, Any] = {"min_patches": 1, "max_patches": 12}

# --- tensors ----------------------------------------------------------------------------------------------------------


def part_of_qkv(checkpoint: Checkpoint, source: str, index: int) -> View:
    """Queries (0), keys (1) or values (2): a tensor of their own, or a third of the original's fused one (3n, ...).

    Raises:
        InputError: the fused tensor cannot be divided by three.
    """
    if ".attn.qkv." not in source:
        return as_stored(checkpoint, source)
    shape = checkpoint.shape(source)
    if shape[0] % 3:
        refuse_shape(checkpoint, source, "queries, keys and values of one size")
    n = shape[0] // 3

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        start, end, _ = rows.indices(n)
        return checkpoint.read(source, slice(index * n + start, index * n + end))

    return View((n, *shape[1:]), read)


def class_last(checkpoint: Checkpoint, source: str) -> View:
    """Positions (1, n + 1, width) with the first, the class token's, moved to the end.

    llama.cpp puts the class token behind the patches and adds row i to token i. It does not interpolate positions.

    Raises:
        InputError: there is another number of them.
    """
    vision = tower_hparams(checkpoint)
    check_shape(checkpoint, source, (1, 1 + _patches_per_side(vision) ** 2, vision.int("hidden_size")))
    shape = checkpoint.shape(source)
    return View(shape, lambda _, rows=ALL_ROWS: np.roll(checkpoint.read(source, rows), -1, axis=1))


NORM_BIAS, QKV_BIAS, QK_NORM = "norm bias", "qkv bias", "qk norm"
"""Subsets of vision blocks: all of the 300M tower or none for the first two, the reverse for the third."""

_EMBEDDINGS = ModuleRules("model.vision_tower.embeddings", "v")
_BLOCK = ModuleRules("model.vision_tower.encoder.layer.{block}", "v.blk.{block}")
_PROJECTOR = ModuleRules("model.multi_modal_projector", "mm.model.mlp")

_RULES = (
    _EMBEDDINGS.keep("cls_token", "class_embd"),
    *_EMBEDDINGS.linear("patch_embeddings.projection", "patch_embd"),
    _EMBEDDINGS.keep("position_embeddings", "position_embd.weight", transform=class_last),
    *_BLOCK.layer_norm("layernorm_before", "ln1", NORM_BIAS),
    *_BLOCK.linear("attention.q_proj", "attn_q", QKV_BIAS, partial(part_of_qkv, index=0)),
    *_BLOCK.linear("attention.k_proj", "attn_k", QKV_BIAS, partial(part_of_qkv, index=1)),
    *_BLOCK.linear("attention.v_proj", "attn_v", QKV_BIAS, partial(part_of_qkv, index=2)),
    _BLOCK.norm("attention.q_norm", "attn_q_norm", QK_NORM),
    _BLOCK.norm("attention.k_norm", "attn_k_norm", QK_NORM),
    *_BLOCK.linear("attention.projection_layer", "attn_out"),
    _BLOCK.keep("lambda_1", "ls1.weight"),
    *_BLOCK.layer_norm("layernorm_after", "ln2", NORM_BIAS),
    *_BLOCK.linear("mlp.fc1", "ffn_up"),
    *_BLOCK.linear("mlp.fc2", "ffn_down"),
    _BLOCK.keep("lambda_2", "ls2.weight"),
    *_PROJECTOR.layer_norm("layer_norm", "0"),
    *_PROJECTOR.linear("linear_1", "1"),
    *_PROJECTOR.linear("linear_2", "3"),
)


# --- hyperparameters --------------------------------------------------------------------------------------------------


def is_original(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is in its authors' layout."""
    return "llm_config" in checkpoint.config


def tower_hparams(checkpoint: Checkpoint) -> Hparams:
    """vision_config with transformers' names for what tells the towers apart; sides of squares as one number.

    Raises:
        InputError: images or patches are no squares.
    """
    vision = vision_hparams(checkpoint, reader=PROJECTOR)
    given = {name: value for name, value in vision.values.items() if value is not None}
    if is_original(checkpoint):
        original = {**ORIGINAL_DEFAULTS, **given}
        given |= dict(zip(DEFAULTS, (original[name] for name in ORIGINAL_DEFAULTS), strict=True))
    for name in ("image_size", "patch_size"):
        side = given.get(name)
        if isinstance(side, list):
            if len(side) != 2 or side[0] != side[1]:
                vision.refuse(name, "a square", "llama.cpp takes no other")
            given[name] = side[0]
    return replace(vision, values={**DEFAULTS, **given})


def _patches_per_side(vision: Hparams) -> int:
    return vision.int("image_size") // vision.int("patch_size")


def _merge(checkpoint: Checkpoint) -> int:
    """Patches per side that the pixel shuffle makes one token of."""
    return int(1 / config(checkpoint).float("downsample_ratio"))


def tokens_per_tile(checkpoint: Checkpoint) -> int:
    """Image tokens of one tile; 256 of 448 x 448 pixels."""
    return (_patches_per_side(tower_hparams(checkpoint)) // _merge(checkpoint)) ** 2


def tile_limits(checkpoint: Checkpoint) -> tuple[int, int]:
    """Fewest and most tiles of a large picture, as config.json says or transformers' image processor."""
    given = config(checkpoint, {**TILE_DEFAULTS, **image_hparams(checkpoint).values})
    return given.int("min_dynamic_patch", "min_patches"), given.int("max_dynamic_patch", "max_patches")


def _ranges(vision: Hparams) -> Ranges:
    return vision_ranges(
        vision,
        {
            NORM_BIAS: vision.get("norm_type") == LAYER_NORM,
            QKV_BIAS: vision.get("attention_bias"),
            QK_NORM: vision.get("use_qk_norm"),
        },
    )


def _keys(vision: Hparams) -> Metadata:
    fewest, most = tile_limits(vision.checkpoint)
    return {
        **common_vision_keys(vision, epsilon=vision.float("layer_norm_eps")),
        Keys.ClipVision.USE_GELU: True,
        Keys.ClipVision.Projector.SCALE_FACTOR: _merge(vision.checkpoint),
        Keys.ClipVision.PREPROC_MIN_TILES: fewest,
        Keys.ClipVision.PREPROC_MAX_TILES: most,
    }


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def _check(vision: Hparams) -> None:
    """Refuse what llama.cpp's `internvl` projector has one value for only."""
    outside, original = config(vision.checkpoint, reader=PROJECTOR), is_original(vision.checkpoint)
    large = (vision.int("hidden_size"), vision.int("num_hidden_layers")) == (RMS_WIDTH, RMS_BLOCKS)
    vision.expect("hidden_act", "gelu", "is supported with this activation only")
    vision.expect(
        "norm_type",
        RMS_NORM if large else LAYER_NORM,
        f"chooses by size: RMS norms at a width of {RMS_WIDTH} and {RMS_BLOCKS} blocks, layer norms elsewhere",
    )
    vision.require(
        "qk_normalization" if original else "use_qk_norm",
        vision.get("use_qk_norm") and not large,
        False,
        "has RMS norms of queries and keys in the tower of 6B only",
    )
    (_check_original if original else _check_transformers)(vision, outside)
    ratio, side = outside.float("downsample_ratio"), _patches_per_side(vision)
    if not 0 < ratio <= 1 or 1 / ratio % 1 or side % int(1 / ratio):
        outside.refuse("downsample_ratio", f"one part of {side} patches per side")
    fewest, most = tile_limits(vision.checkpoint)
    if not 1 <= fewest <= most:
        raise InputError(
            f"{outside.file}: min_dynamic_patch is {fewest} and max_dynamic_patch {most}, expected 1 or more and no "
            "fewer; llama.cpp can cut no picture otherwise"
        )


_LAST_LAYER = "takes the last layer of the vision tower"


def _check_original(vision: Hparams, outside: Hparams) -> None:
    outside.expect("ps_version", "v2", "shuffles pixels in this order only", default="v1")
    outside.expect("select_layer", -1, _LAST_LAYER)
    outside.expect("dynamic_image_size", True, "always cuts large pictures", default=False)
    outside.expect("use_thumbnail", True, "always adds the whole picture to its tiles", default=False)
    outside.expect("pad2square", False, "never pads the whole picture")


def _check_transformers(vision: Hparams, outside: Hparams) -> None:
    vision.expect("use_mean_pooling", True, "has no norm after the vision tower")
    vision.expect("use_mask_token", False, "has no mask token")
    vision.expect("use_absolute_position_embeddings", True, "always adds a table of positions")
    outside.expect("vision_feature_layer", -1, _LAST_LAYER)
    outside.expect("vision_feature_select_strategy", "default", "leaves the class token out")
    outside.expect("projector_hidden_act", "gelu", "always uses this activation")


# --- pictures ---------------------------------------------------------------------------------------------------------


def place_image(place: ImagePlace) -> PlacedImage:
    """The picture as llama.cpp cuts it (`internvl_tiles`), and the tokens of its tiles between begin and end."""
    from mode_gguf.architectures.vision.internvl_tiles import tiles  # brings Pillow, which nothing else here needs

    checkpoint = place.checkpoint
    cut = tiles(place.scaled_image, tower_hparams(checkpoint).int("image_size"), *tile_limits(checkpoint))
    normalised = image_hparams(checkpoint)
    mean, std = (np.array(normalised.list(key), np.float32) for key in ("image_mean", "image_std"))
    values = np.stack([(np.asarray(tile, np.float32) / 255 - mean) / std for tile in cut])
    image_tokens = [place.image_token] * (len(cut) * tokens_per_tile(checkpoint))
    begin, end = place.tokenizer.convert_tokens_to_ids([IMAGE_BEGIN, IMAGE_END])
    if begin is None or end is None:
        raise InputError(
            f"{checkpoint.path}: the tokenizer lacks {IMAGE_BEGIN} or {IMAGE_END}; use the one published with these "
            "weights"
        )
    pixels = np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)
    return PlacedImage([begin, *image_tokens, end], {"pixel_values": pixels})


def image_tokens(checkpoint: Checkpoint, size: ImageSize | None) -> int:
    """Tokens of a picture's tiles; of the most that there can be where its size is not known."""
    from mode_gguf.architectures.vision.internvl_tiles import tile_count

    fewest, most = tile_limits(checkpoint)
    side = tower_hparams(checkpoint).int("image_size")
    n_tiles = most + 1 if size is None else tile_count(size, side, fewest, most)
    return n_tiles * tokens_per_tile(checkpoint)


def image_token(checkpoint: Checkpoint) -> int:
    """The id of `<IMG_CONTEXT>`, which the original config.json does not name.

    Raises:
        InputError: the tokenizer has no such token.
    """
    named = config(checkpoint)
    return named.int("image_token_id") if named.has("image_token_id") else special_token(checkpoint, IMAGE_TOKEN)


TOWER = VisionTower(
    PROJECTOR,
    hparams=tower_hparams,
    rules=_RULES,
    keys=_keys,
    check=_check,
    place_image=place_image,
    ranges=_ranges,
    needs_processor=False,
    image_tokens=image_tokens,
    image_token=image_token,
    token_types=None,
)
