"""The vision tower of Gemma 4: llama.cpp's `gemma4v` projector.

It gives a picture as many tokens as its shape asks for, and they see each other in layers with a sliding window, but
not in those of full attention; llama.cpp does the same.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys
from gguf.constants import VisionProjectorType

from mode_gguf.architectures.common_keys import Metadata, MetadataValue, common_vision_keys, vision_ranges
from mode_gguf.architectures.family import VisionTower
from mode_gguf.architectures.hparams import Hparams, config, image_hparams, vision_hparams
from mode_gguf.architectures.images import ImagePlace, ImageSize, PlacedImage
from mode_gguf.architectures.rope import check_tower
from mode_gguf.architectures.rules import ModuleRules, Ranges, TensorRule, View, check_shape
from mode_gguf.architectures.tensors import ALL_ROWS, Array
from mode_gguf.checkpoint.folder import Checkpoint

PROJECTOR = VisionProjectorType.GEMMA4V

CLIPPED, STANDARDIZED = "clipped", "standardized"
"""Subsets of optional parts of the tower."""

DEFAULTS: Mapping[str, Any] = {"rms_norm_eps": 1e-6, "pooling_kernel_size": 3, "head_dim": 64}
IMAGE_DEFAULTS: Mapping[str, Any] = {"max_soft_tokens": 280}
"""transformers' own, of what configurations may lack."""

SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Limits on a picture's tokens that the image processor knows."""
POOLING = 3
"""Patches along a side of a token, where a projector's file does not say."""
ROPE_THETA = 100.0
IMAGE_SIZE = 224
"""A size without a meaning: llama.cpp asks for one."""

_hparams = partial(vision_hparams, defaults=DEFAULTS, reader=PROJECTOR)

# --- tensors ----------------------------------------------------------------------------------------------------------


def patches(checkpoint: Checkpoint, source: str) -> View:
    """The patch embedding as a convolution: (n, p * p * 3) to (n, 3, p, p)."""
    vision = _hparams(checkpoint)
    n, side = vision.int("hidden_size"), vision.int("patch_size")
    check_shape(checkpoint, source, (n, side * side * 3))

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return np.ascontiguousarray(checkpoint.read(source, rows).reshape(-1, side, side, 3).transpose(0, 3, 1, 2))

    return View((n, 3, side, side), read)


def scalar(checkpoint: Checkpoint, source: str) -> View:
    """A single number as a tensor with one dimension."""
    return View((1,), lambda _, rows=ALL_ROWS: checkpoint.read(source).reshape(1)[rows])


_TOWER = ModuleRules("model.vision_tower", "v")
_BLOCK = ModuleRules("model.vision_tower.encoder.layers.{block}", "v.blk.{block}")


def _clippable(source: str, name: str) -> tuple[TensorRule, ...]:
    """A linear layer, and what its inputs and outputs are clipped to."""
    bounds = ("input_min", "input_max", "output_min", "output_max")
    return (
        _BLOCK.dense(f"{source}.linear", name),
        *(_BLOCK.keep(f"{source}.{bound}", f"{name}.{bound}", CLIPPED, scalar) for bound in bounds),
    )


_RULES = (
    _TOWER.dense("patch_embedder.input_proj", "patch_embd", transform=patches),
    _TOWER.keep("patch_embedder.position_embedding_table", "position_embd.weight"),
    _BLOCK.norm("input_layernorm", "ln1"),
    _BLOCK.norm("self_attn.q_norm", "attn_q_norm"),
    _BLOCK.norm("self_attn.k_norm", "attn_k_norm"),
    _BLOCK.norm("post_attention_layernorm", "attn_post_norm"),
    _BLOCK.norm("pre_feedforward_layernorm", "ln2"),
    _BLOCK.norm("post_feedforward_layernorm", "ffn_post_norm"),
    *_clippable("self_attn.q_proj", "attn_q"),
    *_clippable("self_attn.k_proj", "attn_k"),
    *_clippable("self_attn.v_proj", "attn_v"),
    *_clippable("self_attn.o_proj", "attn_out"),
    *_clippable("mlp.gate_proj", "ffn_gate"),
    *_clippable("mlp.up_proj", "ffn_up"),
    *_clippable("mlp.down_proj", "ffn_down"),
    _TOWER.keep("std_bias", "std_bias", STANDARDIZED),
    _TOWER.keep("std_scale", "std_scale", STANDARDIZED),
    ModuleRules("model.embed_vision", "mm").dense("embedding_projection", "input_projection"),
)


# --- hyperparameters --------------------------------------------------------------------------------------------------


def _ranges(vision: Hparams) -> Ranges:
    """Vision blocks; what clips and standardizes is there once or not at all."""
    clipped = vision_ranges(vision, {CLIPPED: vision.get("use_clipped_linears", False)})
    return {**clipped, STANDARDIZED: [{}] if vision.get("standardize", False) else []}


def _keys(vision: Hparams) -> Metadata:
    keys: dict[str, MetadataValue] = {
        Keys.ClipVision.PROJECTOR_TYPE: PROJECTOR,
        **common_vision_keys(vision, epsilon=vision.float("rms_norm_eps"), image_size=IMAGE_SIZE),
        # llama.cpp's converter leaves it out, and llama.cpp then takes another activation, gelu_quick.
        Keys.ClipVision.USE_GELU: True,
    }
    pooling = vision.int("pooling_kernel_size")
    return keys if pooling == POOLING else {**keys, Keys.ClipVision.Projector.SCALE_FACTOR: pooling}


def _check(vision: Hparams) -> None:
    """Refuse what llama.cpp's `gemma4v` projector has one value for only."""
    heads = vision.int("num_attention_heads")
    vision.expect("hidden_activation", "gelu_pytorch_tanh", "always takes this activation")
    vision.require("attention_bias", vision.get("attention_bias") or False, False, "has no biases there")
    vision.expect("num_key_value_heads", heads, "has as many keys as queries there")
    vision.require(
        "head_dim",
        vision.int("head_dim") * heads,
        vision.int("hidden_size"),
        "divides the width among the heads (this is head_dim times heads)",
    )
    check_tower(vision, ROPE_THETA)


# --- pictures ---------------------------------------------------------------------------------------------------------


def place_image(place: ImagePlace) -> PlacedImage:
    """The image in patches, and a token for every `pooling_kernel_size` squared of them, between its marks.

    The processor scales every picture, small ones too, to as many tokens as its limit allows; the limit is the largest
    it knows that keeps to `max_pixels`, and at least its smallest.
    """
    processor, marks = place.processor, config(place.checkpoint)
    area = (processor.patch_size * processor.pooling_kernel_size) ** 2
    limit = _largest_limit(min(processor.max_soft_tokens, place.max_pixels // area))
    processed = processor(images=[place.image], max_soft_tokens=limit, return_tensors="np")
    n_tokens = int(np.asarray(processed["num_soft_tokens_per_image"]).reshape(-1)[0])
    return PlacedImage(
        [marks.int("boi_token_id"), *[place.image_token] * n_tokens, marks.int("eoi_token_id")],
        {name: processed[name] for name in ("pixel_values", "image_position_ids")},
    )


def image_tokens(checkpoint: Checkpoint, size: ImageSize | None) -> int:
    """The most tokens of a picture as large as pictures may be; by the processor's own limit where no size is given."""
    own = image_hparams(checkpoint, IMAGE_DEFAULTS).int("max_soft_tokens")
    if size is None:
        return own
    vision = _hparams(checkpoint)
    area = (vision.int("patch_size") * vision.int("pooling_kernel_size")) ** 2
    return _largest_limit(min(own, size[0] * size[1] // area))


def _largest_limit(n_tokens: int) -> int:
    """The largest limit that the processor knows up to `n_tokens`, at least its smallest."""
    return max((n for n in SOFT_TOKENS if n <= n_tokens), default=SOFT_TOKENS[0])


def plain_size(checkpoint: Checkpoint) -> ImageSize:
    """10 x 7 tokens: the smallest limit, to which transformers scales pictures up and llama.cpp does not."""
    vision = _hparams(checkpoint)
    side = vision.int("patch_size") * vision.int("pooling_kernel_size")
    return 10 * side, 7 * side


TOWER = VisionTower(
    PROJECTOR,
    _hparams,
    _RULES,
    _keys,
    _check,
    place_image,
    _ranges,
    image_tokens=image_tokens,
    plain_size=plain_size,
)
