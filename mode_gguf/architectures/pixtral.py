"""Pixtral's vision tower with Mistral 3's patch merger: llama.cpp's `pixtral` projector.

Mistral writes a picture row by row, with [IMG_BREAK] after every row but the last, and [IMG_END] after that. llama.cpp
takes the breaks from the projector, which has their embedding, and the end from the vocabulary. Its own converter
leaves the embedding out for this class, and the file cannot be loaded.

The norm ahead of the merger has the text model's epsilon; llama.cpp gives it the tower's, 1e-5.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from gguf import MODEL_TENSOR, TENSOR_NAMES, Keys

from mode_gguf.architectures.config import preprocessor, section, setting
from mode_gguf.architectures.family import Metadata, Ranges, TensorRule, View
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role
from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.errors import InputError

RMS_NORM_EPSILON = 1e-5
"""Of every norm of the tower: a constant in transformers' model, not a setting."""

ROPE_THETA = 10_000.0
"""llama.cpp's, and transformers' default."""

BREAK, END = "[IMG_BREAK]", "[IMG_END]"

MAX_TOKENS = 1024
"""Pieces of a picture that llama.cpp takes at most; it scales larger ones down, whatever the checkpoint allows."""

_BIASED = "biased_projector"
"""Subset of ranges: projectors whose matrices have biases."""


def interleaved(checkpoint: Checkpoint, source: str) -> View:
    """Rows of queries or keys with the halves of a head interleaved: llama.cpp rotates neighbours."""
    heads = setting(checkpoint, section(checkpoint, "vision_config"), int, "num_attention_heads")
    shape = checkpoint.shape(source)
    if len(shape) != 2 or shape[0] % (2 * heads):
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected a multiple of {2 * heads} rows by "
            "num_attention_heads of the vision_config; use the configuration published with the model"
        )

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        halves = checkpoint.read(source).reshape(heads, 2, -1, shape[1])
        return halves.swapaxes(1, 2).reshape(shape)[rows]

    return View(shape, read)


def break_embedding(checkpoint: Checkpoint, source: str) -> View:
    """The token embedding's row of [IMG_BREAK]."""
    rows, width = checkpoint.shape(source)
    number = special_token(checkpoint, BREAK)
    if number >= rows:
        raise InputError(
            f"{checkpoint.path}: {BREAK} has id {number}, expected less than the {rows} rows of {source}; use the "
            "tokenizer published with these weights"
        )
    return View((width,), lambda _, rows=ALL_ROWS: checkpoint.read(source, number)[rows])


def special_token(checkpoint: Checkpoint, token: str) -> int:
    """Id of a special token, from tokenizer.json.

    Raises:
        InputError: the file is missing, or has no such token.
    """
    path = checkpoint.path / "tokenizer.json"
    for added in read_json(path).get("added_tokens", ()):
        if isinstance(added, dict) and added.get("content") == token and isinstance(added.get("id"), int):
            return int(added["id"])
    raise InputError(f"{path}: special token {token} is missing; use the tokenizer published with these weights")


def projector_rules(prefix: str, token_embedding: str) -> tuple[TensorRule, ...]:
    """Tensors of the projector.

    Args:
        prefix: what the checkpoint has ahead of the names of tower and projector.
        token_embedding: its name for the text model's.
    """
    block = f"{prefix}vision_tower.transformer.layers.{{block}}"
    projector = f"{prefix}multi_modal_projector"

    def dense(source: str, name: str) -> TensorRule:
        return TensorRule(f"{source}.weight", f"{name}.weight", Role.DENSE)

    def keep(source: str, name: str, only: str | None = None) -> TensorRule:
        return TensorRule(source, name, Role.KEEP, only=only)

    def turned(source: str, name: str) -> TensorRule:
        return TensorRule(f"{source}.weight", f"{name}.weight", Role.DENSE, interleaved)

    return (
        dense(f"{prefix}vision_tower.patch_conv", "v.patch_embd"),
        keep(f"{prefix}vision_tower.ln_pre.weight", "v.pre_ln.weight"),
        TensorRule(token_embedding, TENSOR_NAMES[MODEL_TENSOR.V_TOK_EMBD_IMG_BREAK], Role.KEEP, break_embedding),
        keep(f"{block}.attention_norm.weight", "v.blk.{block}.ln1.weight"),
        turned(f"{block}.attention.q_proj", "v.blk.{block}.attn_q"),
        turned(f"{block}.attention.k_proj", "v.blk.{block}.attn_k"),
        dense(f"{block}.attention.v_proj", "v.blk.{block}.attn_v"),
        dense(f"{block}.attention.o_proj", "v.blk.{block}.attn_out"),
        keep(f"{block}.ffn_norm.weight", "v.blk.{block}.ln2.weight"),
        dense(f"{block}.feed_forward.gate_proj", "v.blk.{block}.ffn_gate"),
        dense(f"{block}.feed_forward.up_proj", "v.blk.{block}.ffn_up"),
        dense(f"{block}.feed_forward.down_proj", "v.blk.{block}.ffn_down"),
        keep(f"{projector}.norm.weight", "mm.input_norm.weight"),
        dense(f"{projector}.patch_merger.merging_layer", "mm.patch_merger"),
        dense(f"{projector}.linear_1", "mm.1"),
        keep(f"{projector}.linear_1.bias", "mm.1.bias", _BIASED),
        dense(f"{projector}.linear_2", "mm.2"),
        keep(f"{projector}.linear_2.bias", "mm.2.bias", _BIASED),
    )


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Vision blocks; and whether the projector has biases."""
    blocks = setting(checkpoint, section(checkpoint, "vision_config"), int, "num_hidden_layers")
    return {
        "block": [{"block": i} for i in range(blocks)],
        _BIASED: [{}] if checkpoint.config.get("multimodal_projector_bias", False) else [],
    }


def projector_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's mtmd reads for `pixtral`."""
    vision, prepared = section(checkpoint, "vision_config"), preprocessor(checkpoint)
    activation = Keys.ClipVision.USE_GELU if vision.get("hidden_act", "gelu") == "gelu" else Keys.ClipVision.USE_SILU
    return {
        Keys.ClipVision.PROJECTION_DIM: setting(checkpoint, section(checkpoint, "text_config"), int, "hidden_size"),
        Keys.ClipVision.IMAGE_SIZE: setting(checkpoint, vision, int, "image_size"),
        Keys.ClipVision.PATCH_SIZE: setting(checkpoint, vision, int, "patch_size"),
        Keys.ClipVision.EMBEDDING_LENGTH: setting(checkpoint, vision, int, "hidden_size"),
        Keys.ClipVision.FEED_FORWARD_LENGTH: setting(checkpoint, vision, int, "intermediate_size"),
        Keys.ClipVision.BLOCK_COUNT: setting(checkpoint, vision, int, "num_hidden_layers"),
        Keys.ClipVision.Attention.HEAD_COUNT: setting(checkpoint, vision, int, "num_attention_heads"),
        Keys.ClipVision.Attention.LAYERNORM_EPS: RMS_NORM_EPSILON,
        Keys.ClipVision.IMAGE_MEAN: setting(checkpoint, prepared, list, "image_mean"),
        Keys.ClipVision.IMAGE_STD: setting(checkpoint, prepared, list, "image_std"),
        Keys.ClipVision.SPATIAL_MERGE_SIZE: _merged(checkpoint),
        activation: True,
    }


def place_image(place: ImagePlace) -> PlacedImage:
    """The image scaled to whole pieces, and its rows of tokens."""
    side = setting(place.checkpoint, section(place.checkpoint, "vision_config"), int, "patch_size")
    side *= _merged(place.checkpoint)
    area = min(place.max_pixels, MAX_TOKENS * side * side)
    width, height = place.image.size
    longest = min(int(place.processor.size["longest_edge"]), int(max(width, height) * sqrt(area / (width * height))))
    while True:  # sides are rounded up to whole pieces
        processed = place.processor(
            images=[place.image],
            size={"longest_edge": max(longest, 1)},
            patch_size={"height": side, "width": side},
            return_tensors="np",
        )
        ((height, width),) = processed["image_sizes"]
        if height * width <= area or longest <= side:
            break
        longest -= side
    end, after_row = (place.tokenizer.convert_tokens_to_ids(token) for token in (END, BREAK))
    row = [place.image_token] * int(width // side)
    tokens = [*row, after_row] * int(height // side)
    return PlacedImage(
        [*tokens[:-1], end], {"pixel_values": processed["pixel_values"], "image_sizes": processed["image_sizes"]}
    )


def expected(checkpoint: Checkpoint) -> Mapping[str, tuple[Any, Any, str]]:
    """What `check_settings` takes: settings that llama.cpp's projector has no other value for."""
    vision, config = section(checkpoint, "vision_config"), checkpoint.config
    rope = {"rope_theta": vision.get("rope_theta", ROPE_THETA), **(vision.get("rope_parameters") or {})}
    activation = vision.get("hidden_act", "gelu")
    return {
        "vision model_type": (vision.get("model_type"), "pixtral", "has the projector of this tower"),
        "vision hidden_act": (activation, activation if activation == "gelu" else "silu", "has gelu and silu only"),
        "vision rope_theta": (rope["rope_theta"], ROPE_THETA, "rotates with this base"),
        "vision rope_type": (rope.get("rope_type", "axial"), "axial", "rotates rows and columns apart"),
        "vision num_channels": (vision.get("num_channels", 3), 3, "takes RGB"),
        "vision_feature_layer": (config.get("vision_feature_layer", -1), -1, "takes the last block's output"),
        "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), "gelu", "uses this activation"),
    }


def _merged(checkpoint: Checkpoint) -> int:
    """Patches a side that make one token."""
    return setting(checkpoint, {"spatial_merge_size": 2, **checkpoint.config}, int, "spatial_merge_size")
