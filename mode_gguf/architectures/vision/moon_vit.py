"""MoonViT, the vision tower of Kimi-VL and Kimi K2.5, and the projector behind it.

K2.5's differs from Kimi-VL's for several frames only: for a picture, both compute the same.

Rotary positions alternate: a head's first pair of channels is turned by the column, the second by the row, and so on.
llama.cpp turns a head's first half by the column and its second by the row, so that queries and keys are reordered. Its
own converter does that for K2.5 only and leaves Kimi-VL's in the checkpoint's order, which mixes rows with columns.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys

from mode_gguf.architectures.common_keys import MetadataValue, common_vision_keys
from mode_gguf.architectures.hparams import Hparams, config, image_hparams, vision_hparams
from mode_gguf.architectures.images import ImagePlace, ImageSize, PlacedImage
from mode_gguf.architectures.rope import check_tower
from mode_gguf.architectures.rules import ModuleRules, TensorRule, Transform, View, refuse_shape
from mode_gguf.architectures.tensors import ALL_ROWS, Array
from mode_gguf.checkpoint.folder import Checkpoint

LAYER_NORM_EPSILON = 1e-5
"""The epsilon of every LayerNorm of the tower: a constant in its model, not a hyperparameter."""

ROPE_THETA = 10_000.0
"""The base of rotary positions: a constant, too."""

MERGE = 2
"""Patches that a token takes in each direction."""

MAX_PATCHES_PER_SIDE = 512
"""The rotary table's size."""

DEFAULTS: Mapping[str, Any] = {"patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_time": 4}
"""transformers' own, of what config.json may lack."""

RENAMES = (
    (r"^model\.vision_tower\.final_layernorm\.", "vision_tower.encoder.final_layernorm."),
    (r"^model\.vision_tower\.patch_embed\.pos_emb\.position_embeddings$", "vision_tower.patch_embed.pos_emb.weight"),
    (r"^model\.vision_tower\.layers\.([^.]+)\.norm1\.", r"vision_tower.encoder.blocks.\1.norm0."),
    (r"^model\.vision_tower\.layers\.([^.]+)\.norm2\.", r"vision_tower.encoder.blocks.\1.norm1."),
    (r"^model\.vision_tower\.layers\.([^.]+)\.mlp\.fc1\.", r"vision_tower.encoder.blocks.\1.mlp.fc0."),
    (r"^model\.vision_tower\.layers\.([^.]+)\.mlp\.fc2\.", r"vision_tower.encoder.blocks.\1.mlp.fc1."),
    (r"^model\.vision_tower\.layers\.([^.]+)\.attn\.proj\.", r"vision_tower.encoder.blocks.\1.wo."),
    (r"^model\.vision_tower\.layers\.([^.]+)\.attn\.[qkv]_proj\.", r"vision_tower.encoder.blocks.\1.wqkv."),
)
"""transformers' names of the tower's parameters, and the published ones."""

# --- tensors ----------------------------------------------------------------------------------------------------------


def column_and_row_halves(channels: int, heads: int) -> np.ndarray:
    """Positions of llama.cpp's query and key channels in the checkpoint."""
    by_axis = np.arange(channels).reshape(heads, -1, 2, 2)  # head, frequency, column or row, pair
    return by_axis.swapaxes(1, 2).reshape(-1)


def even_and_odd_halves(channels: int, heads: int) -> np.ndarray:
    """Positions of transformers' query and key channels in the checkpoint."""
    pairs = np.arange(channels).reshape(heads, -1, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def part_of_qkv(checkpoint: Checkpoint, source: str, parts: str) -> View:
    """The `parts` (such as "q", or "qkv") of wqkv, weight or bias, in llama.cpp's order."""
    rows_of = _qkv_rows(checkpoint, source, parts, column_and_row_halves)
    shape = (len(rows_of), *checkpoint.shape(source)[1:])

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return checkpoint.read(source, rows_of[rows])

    return View(shape, read)


def _qkv_rows(checkpoint: Checkpoint, source: str, parts: str, order: Callable[[int, int], np.ndarray]) -> np.ndarray:
    vision = tower_hparams(checkpoint)
    channels, heads = vision.int("hidden_size"), vision.int("num_attention_heads")
    if checkpoint.shape(source)[0] != 3 * channels or channels % (4 * heads):
        refuse_shape(checkpoint, source, f"{3 * channels} rows of {heads} heads by vision_config")
    rows = {"q": order(channels, heads), "k": channels + order(channels, heads)}
    rows["v"] = np.arange(2 * channels, 3 * channels)
    return np.concatenate([rows[part] for part in parts])


def flat_positions(checkpoint: Checkpoint, source: str) -> View:
    """The table of positions (rows, columns, n) as (rows * columns, n)."""
    shape = checkpoint.shape(source)
    if len(shape) != 3 or shape[0] != shape[1]:
        refuse_shape(checkpoint, source, "as many rows as columns of vectors: llama.cpp can run no other table")
    flat = (shape[0] * shape[1], shape[2])
    return View(flat, lambda _, rows=ALL_ROWS: checkpoint.read(source).reshape(flat)[rows])


_TOWER = ModuleRules("model.vision_tower", "v")
_BLOCK = ModuleRules("model.vision_tower.layers.{block}", "v.blk.{block}")
_PROJECTOR = ModuleRules("model.mm_projector", "mm")


def rules(attention: Mapping[str, str], positions: Transform) -> tuple[TensorRule, ...]:
    """Tensors of the projector's file.

    Args:
        attention: which parts of wqkv go into which GGUF tensor of a block.
        positions: how the table of positions is stored.
    """
    return (
        *_TOWER.linear("patch_embed.proj", "patch_embd"),
        _TOWER.keep("patch_embed.pos_emb.position_embeddings", "position_embd.weight", transform=positions),
        *_BLOCK.layer_norm("norm1", "ln1"),
        *(
            rule
            for name, parts in attention.items()
            for rule in _BLOCK.linear("attn.q_proj", name, transform=partial(part_of_qkv, parts=parts))
        ),
        *_BLOCK.linear("attn.proj", "attn_out"),
        *_BLOCK.layer_norm("norm2", "ln2"),
        *_BLOCK.linear("mlp.fc1", "ffn_up"),
        *_BLOCK.linear("mlp.fc2", "ffn_down"),
        *_TOWER.layer_norm("final_layernorm", "post_ln"),
        *_PROJECTOR.layer_norm("pre_norm", "input_norm"),
        *_PROJECTOR.linear("in_proj", "1"),
        *_PROJECTOR.linear("out_proj", "2"),
    )


def read_parameter(checkpoint: Checkpoint, parameter: str) -> Array | None:
    """A block's query, key or value projection, which the checkpoint has together and in another order."""
    found = re.search(r"^model\.vision_tower\.layers\.(\d+)\.attn\.([qkv])_proj\.(weight|bias)$", parameter)
    if found is None:
        return None
    source = f"vision_tower.encoder.blocks.{found[1]}.wqkv.{found[3]}"
    return checkpoint.read(source, _qkv_rows(checkpoint, source, found[2], even_and_odd_halves))


# --- hyperparameters --------------------------------------------------------------------------------------------------


def tower_hparams(checkpoint: Checkpoint, reader: str = "") -> Hparams:
    """vision_config, without the `vt_` that K2.5's files have ahead of the tower's own names."""
    vision = vision_hparams(checkpoint, reader=reader)
    own = {name.removeprefix("vt_"): value for name, value in vision.values.items() if name.startswith("vt_")}
    return replace(vision, values={**DEFAULTS, **own, **vision.values})


def positions_per_side(vision: Hparams) -> int:
    """Rows, and columns, of the table of positions."""
    return vision.int("pos_emb_height", "init_pos_emb_height")


def keys(vision: Hparams) -> dict[str, MetadataValue]:
    """clip.* keys that both projectors have."""
    image_size = positions_per_side(vision) * vision.int("patch_size")
    return {
        **common_vision_keys(vision, epsilon=LAYER_NORM_EPSILON, image_size=image_size),
        Keys.ClipVision.Projector.SCALE_FACTOR: MERGE,
        Keys.ClipVision.USE_GELU: True,
    }


def check(vision: Hparams) -> None:
    """Refuse what llama.cpp's projectors have no other value for, with an `InputError`."""
    side, merge = positions_per_side(vision), list(vision.get("merge_kernel_size", [MERGE, MERGE]))
    width = vision.get("pos_emb_width", vision.get("init_pos_emb_width", side))
    check_tower(vision, ROPE_THETA)
    vision.require("merge_kernel_size", merge, [MERGE, MERGE], "merges so many")
    vision.require("init_pos_emb_width", width, side, "takes tables of positions with as many columns as rows")
    images = replace(image_hparams(vision.checkpoint), reader=vision.reader)
    images.expect("pad_input", True, "pads pictures and does not cut them")


def model_config(checkpoint: Checkpoint, text: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of transformers' Kimi K2.5, which computes Kimi-VL as well.

    Args:
        text: its text_config.
    """
    vision = tower_hparams(checkpoint)
    side = positions_per_side(vision)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return {
        "model_type": "kimi_k25",
        "text_config": text,
        "vision_config": {
            "model_type": "kimi_k25_vision",
            **{name: vision.int(name) for name in sizes},
            "pos_emb_height": side,
            "pos_emb_width": side,
            "merge_kernel_size": [MERGE, MERGE],
        },
        "projection_hidden_size": vision.int("hidden_size"),
        "projection_layer_norm_eps": LAYER_NORM_EPSILON,
        "image_token_id": image_token(checkpoint),
    }


def image_token(checkpoint: Checkpoint) -> int:
    """`media_placeholder_token_id` of config.json, `image_token_id` where transformers 5 has saved it."""
    return config(checkpoint).int("media_placeholder_token_id", "image_token_id")


# --- pictures ---------------------------------------------------------------------------------------------------------


def table_size(checkpoint: Checkpoint) -> ImageSize:
    """A picture's size with a patch for each entry of the table of positions, which is then not interpolated."""
    vision = tower_hparams(checkpoint)
    side = positions_per_side(vision) * vision.int("patch_size")
    return side, side


def place_image(place: ImagePlace, limit: str) -> PlacedImage:
    """The image in patches, scaled down where it has too many and padded to whole tokens; a token for every four.

    Args:
        limit: the image processor's name for the most patches of an image.
    """
    from PIL import Image

    checkpoint = place.checkpoint
    images, patch = image_hparams(checkpoint), tower_hparams(checkpoint).int("patch_size")
    most = min(images.int(limit, "max_patches"), max(1, place.max_pixels // patch**2))
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
    mean, std = (np.asarray(images.list(key), np.float32) for key in ("image_mean", "image_std"))
    patched = ((pixels - mean) / std).reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return PlacedImage(
        [place.image_token] * (rows * columns // MERGE**2),
        {
            "pixel_values": np.ascontiguousarray(patched.reshape(-1, 3, patch, patch)),
            "image_grid_thw": np.array([[1, rows, columns]]),
        },
    )
