"""MoonViT, the vision tower of Kimi-VL and Kimi K2.5, and the projector behind it.

K2.5's differs from Kimi-VL's for several frames only: for a picture, both compute the same.

Rotary positions alternate: a head's first pair of channels is turned by the column, the second by the row, and so on.
llama.cpp turns a head's first half by the column and its second by the row, so that queries and keys are reordered. Its
own converter does that for K2.5 only and leaves Kimi-VL's in the checkpoint's order, which mixes rows with columns.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys

from mode_gguf.architectures.config import section, setting
from mode_gguf.architectures.family import Metadata, TensorRule, Transform, Values, View, as_stored
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role
from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.errors import InputError

LAYER_NORM_EPSILON = 1e-5
"""Of every LayerNorm of the vision tower: a constant in its model, not a setting."""

MERGE = 2
"""Patches that a token takes in each direction."""

MAX_PATCHES_PER_SIDE = 512
"""The rotary table's size."""

# --- tensors ----------------------------------------------------------------------------------------------------------

_BLOCK = "vision_tower.encoder.blocks.{block}"


def column_and_row_halves(channels: int, heads: int) -> np.ndarray:
    """Where llama.cpp's query and key channels are in the checkpoint's."""
    by_axis = np.arange(channels).reshape(heads, -1, 2, 2)  # head, frequency, column or row, pair
    return by_axis.swapaxes(1, 2).reshape(-1)


def even_and_odd_halves(channels: int, heads: int) -> np.ndarray:
    """Where transformers' query and key channels are in the checkpoint's."""
    pairs = np.arange(channels).reshape(heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def part_of_qkv(checkpoint: Checkpoint, source: str, parts: str) -> View:
    """Of wqkv, weight or bias, the `parts` (such as "q", or "qkv") in llama.cpp's order."""
    rows_of = _qkv_rows(checkpoint, source, parts, column_and_row_halves)
    shape = (len(rows_of), *checkpoint.shape(source)[1:])

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return checkpoint.read(source, rows_of[rows])

    return View(shape, read)


def _qkv_rows(checkpoint: Checkpoint, source: str, parts: str, order: Callable[[int, int], np.ndarray]) -> np.ndarray:
    vision = _vision(checkpoint)
    channels, heads = vision["hidden_size"], vision["num_attention_heads"]
    if checkpoint.shape(source)[0] != 3 * channels or channels % (4 * heads):
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(checkpoint.shape(source))}, expected {3 * channels} "
            f"rows of {heads} heads by vision_config in config.json; use the configuration published with the model"
        )
    rows = {"q": order(channels, heads), "k": channels + order(channels, heads)}
    rows["v"] = np.arange(2 * channels, 3 * channels)
    return np.concatenate([rows[part] for part in parts])


def flat_positions(checkpoint: Checkpoint, source: str) -> View:
    """The table of positions (rows, columns, n) as (rows * columns, n)."""
    shape = checkpoint.shape(source)
    if len(shape) != 3 or shape[0] != shape[1]:
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected as many rows as columns of vectors: "
            "llama.cpp can run no other table"
        )
    flat = (shape[0] * shape[1], shape[2])
    return View(flat, lambda _, rows=ALL_ROWS: checkpoint.read(source).reshape(flat)[rows])


def _with_bias(role: Role, source: str, name: str, transform: Transform = as_stored) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{source}.weight", f"{name}.weight", role, transform),
        TensorRule(f"{source}.bias", f"{name}.bias", Role.KEEP, transform),
    )


_linear, _norm = partial(_with_bias, Role.DENSE), partial(_with_bias, Role.KEEP)


def projector_rules(
    *, attention: Mapping[str, str], positions: Transform, norm: str, first: str, second: str
) -> tuple[TensorRule, ...]:
    """Tensors of the projector.

    Args:
        attention: which parts of wqkv go into which GGUF tensor of a block.
        positions: how the table of positions is stored.
        norm, first, second: checkpoint names of what follows the vision tower.
    """
    return (
        *_linear("vision_tower.patch_embed.proj", "v.patch_embd"),
        TensorRule("vision_tower.patch_embed.pos_emb.weight", "v.position_embd.weight", Role.KEEP, positions),
        *_norm(f"{_BLOCK}.norm0", "v.blk.{block}.ln1"),
        *(
            rule
            for name, parts in attention.items()
            for rule in _linear(f"{_BLOCK}.wqkv", f"v.blk.{{block}}.{name}", partial(part_of_qkv, parts=parts))
        ),
        *_linear(f"{_BLOCK}.wo", "v.blk.{block}.attn_out"),
        *_norm(f"{_BLOCK}.norm1", "v.blk.{block}.ln2"),
        *_linear(f"{_BLOCK}.mlp.fc0", "v.blk.{block}.ffn_up"),
        *_linear(f"{_BLOCK}.mlp.fc1", "v.blk.{block}.ffn_down"),
        *_norm("vision_tower.encoder.final_layernorm", "v.post_ln"),
        *_norm(norm, "mm.input_norm"),
        *_linear(first, "mm.1"),
        *_linear(second, "mm.2"),
    )


def ranges(checkpoint: Checkpoint) -> Mapping[str, Sequence[Values]]:
    """Vision blocks."""
    return {"block": [{"block": i} for i in range(_vision(checkpoint)["num_hidden_layers"])]}


# --- settings ---------------------------------------------------------------------------------------------------------

_SETTINGS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _vision(checkpoint: Checkpoint) -> Mapping[str, int]:
    """Sizes in vision_config, which K2.5's files prefix with `vt_`."""
    vision = section(checkpoint, "vision_config")
    return {
        **{name: setting(checkpoint, vision, int, name, f"vt_{name}") for name in _SETTINGS},
        "patch_size": setting(checkpoint, {"patch_size": 14, **vision}, int, "patch_size"),
    }


def positions_per_side(checkpoint: Checkpoint) -> int:
    """Rows, and columns, of the table of positions."""
    vision = {"init_pos_emb_height": 64, **section(checkpoint, "vision_config")}
    return setting(checkpoint, vision, int, "pos_emb_height", "init_pos_emb_height")


def preprocessor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """preprocessor_config.json, with what K2.5's has in `media_proc_cfg`, or what transformers 5 saves in its place."""
    old, new = checkpoint.path / "preprocessor_config.json", checkpoint.path / "processor_config.json"
    if new.exists() and not old.exists():
        found = read_json(new).get("image_processor")
    else:
        found = read_json(old)
        found = {**found, **(found.get("media_proc_cfg") or {})}
    if not isinstance(found, dict):
        raise InputError(f"{new}: expected an object image_processor, found {found!r}; download it again")
    return found


def vision_metadata(checkpoint: Checkpoint) -> Metadata:
    """clip.* keys that both projectors have."""
    vision, images = _vision(checkpoint), preprocessor(checkpoint)
    return {
        Keys.ClipVision.PROJECTION_DIM: setting(checkpoint, section(checkpoint, "text_config"), int, "hidden_size"),
        Keys.ClipVision.IMAGE_SIZE: positions_per_side(checkpoint) * vision["patch_size"],
        Keys.ClipVision.PATCH_SIZE: vision["patch_size"],
        Keys.ClipVision.EMBEDDING_LENGTH: vision["hidden_size"],
        Keys.ClipVision.FEED_FORWARD_LENGTH: vision["intermediate_size"],
        Keys.ClipVision.BLOCK_COUNT: vision["num_hidden_layers"],
        Keys.ClipVision.Attention.HEAD_COUNT: vision["num_attention_heads"],
        Keys.ClipVision.Attention.LAYERNORM_EPS: LAYER_NORM_EPSILON,
        Keys.ClipVision.IMAGE_MEAN: setting(checkpoint, images, list, "image_mean"),
        Keys.ClipVision.IMAGE_STD: setting(checkpoint, images, list, "image_std"),
        Keys.ClipVision.Projector.SCALE_FACTOR: MERGE,
        Keys.ClipVision.USE_GELU: True,
    }


def expected(checkpoint: Checkpoint) -> Mapping[str, tuple[Any, Any, str]]:
    """What `check_settings` takes: settings that llama.cpp's projectors have no other value for."""
    vision, side = section(checkpoint, "vision_config"), positions_per_side(checkpoint)
    width = vision.get("pos_emb_width", vision.get("init_pos_emb_width", side))
    return {
        "merge_kernel_size": (list(vision.get("merge_kernel_size", [MERGE, MERGE])), [MERGE, MERGE], "merges so many"),
        "init_pos_emb_width": (width, side, "takes tables of positions with as many columns as rows"),
        "pad_input": (preprocessor(checkpoint).get("pad_input", True), True, "pads pictures and does not cut them"),
    }


def model_config(checkpoint: Checkpoint, text: Mapping[str, Any], image_token: int) -> Mapping[str, Any]:
    """What transformers' Kimi K2.5 is made of; it computes Kimi-VL as well."""
    vision, side = _vision(checkpoint), positions_per_side(checkpoint)
    return {
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": {
            "model_type": "kimi_k25_vision",
            **vision,
            "pos_emb_height": side,
            "pos_emb_width": side,
            "merge_kernel_size": [MERGE, MERGE],
        },
        "projection_hidden_size": vision["hidden_size"],
        "projection_layer_norm_eps": LAYER_NORM_EPSILON,
        "image_token_id": image_token,
        "tie_word_embeddings": bool(checkpoint.config.get("tie_word_embeddings", False)),
    }


def image_token(checkpoint: Checkpoint) -> int:
    """`media_placeholder_token_id` of config.json, `image_token_id` where transformers 5 has saved it."""
    return setting(checkpoint, checkpoint.config, int, "media_placeholder_token_id", "image_token_id")


# --- pictures ---------------------------------------------------------------------------------------------------------


def place_image(place: ImagePlace, limit: str) -> PlacedImage:
    """The image in patches, scaled down where it has too many and padded to whole tokens; a token for every four.

    Args:
        limit: the setting with the most patches of an image.
    """
    from PIL import Image

    checkpoint = place.checkpoint
    images, patch = preprocessor(checkpoint), _vision(checkpoint)["patch_size"]
    most = min(setting(checkpoint, images, int, limit, "max_patches"), max(1, place.max_pixels // patch**2))
    width, height = place.image.size
    patches = max(1, width // patch) * max(1, height // patch)
    side = MAX_PATCHES_PER_SIDE * patch
    scale = min(1.0, math.sqrt(most / patches), side / width, side / height)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    resized = place.image if scale == 1.0 else place.image.resize(size, Image.Resampling.BICUBIC)
    whole = patch * MERGE
    columns, rows = (-(-n // whole) * MERGE for n in size)
    pixels = np.zeros((rows * patch, columns * patch, 3), np.float32)
    pixels[: size[1], : size[0]] = np.asarray(resized, np.float32) / 255
    mean, std = (np.asarray(setting(checkpoint, images, list, key), np.float32) for key in ("image_mean", "image_std"))
    patched = ((pixels - mean) / std).reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return PlacedImage(
        [place.image_token] * (rows * columns // MERGE**2),
        {
            "pixel_values": np.ascontiguousarray(patched.reshape(-1, 3, patch, patch)),
            "image_grid_thw": np.array([[1, rows, columns]]),
        },
    )


# --- parameters of transformers' Kimi K2.5 ----------------------------------------------------------------------------

_STORED = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.final_layernorm\.", "vision_tower.encoder.final_layernorm."),
    (r"^model\.vision_tower\.patch_embed\.pos_emb\.position_embeddings$", "vision_tower.patch_embed.pos_emb.weight"),
    (r"^model\.vision_tower\.layers\.(\d+)\.norm1\.", r"vision_tower.encoder.blocks.\1.norm0."),
    (r"^model\.vision_tower\.layers\.(\d+)\.norm2\.", r"vision_tower.encoder.blocks.\1.norm1."),
    (r"^model\.vision_tower\.layers\.(\d+)\.mlp\.fc1\.", r"vision_tower.encoder.blocks.\1.mlp.fc0."),
    (r"^model\.vision_tower\.layers\.(\d+)\.mlp\.fc2\.", r"vision_tower.encoder.blocks.\1.mlp.fc1."),
    (r"^model\.vision_tower\.layers\.(\d+)\.attn\.proj\.", r"vision_tower.encoder.blocks.\1.wo."),
    (r"^model\.vision_tower\.layers\.(\d+)\.attn\.[qkv]_proj\.", r"vision_tower.encoder.blocks.\1.wqkv."),
    (r"^model\.", ""),
)


def stored_name(parameter: str, projector: Mapping[str, str]) -> str:
    """The checkpoint's name of a parameter of transformers' Kimi K2.5.

    Args:
        projector: checkpoint names of what follows the vision tower, by transformers'.
    """
    owner, _, leaf = parameter.rpartition(".")
    if owner in projector:
        return f"{projector[owner]}.{leaf}"
    for pattern, name in _STORED:
        stored, found = re.subn(pattern, name, parameter)
        if found:
            return stored
    return parameter


def read_parameter(checkpoint: Checkpoint, parameter: str) -> Array | None:
    """A block's query, key or value projection, which the checkpoint has together and in another order."""
    found = re.search(r"^model\.vision_tower\.layers\.(\d+)\.attn\.([qkv])_proj\.(weight|bias)$", parameter)
    if found is None:
        return None
    source = f"{_BLOCK.format(block=found[1])}.wqkv.{found[3]}"
    return checkpoint.read(source, _qkv_rows(checkpoint, source, found[2], even_and_odd_halves))
