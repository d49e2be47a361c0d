"""The vision tower that Qwen3-VL and Qwen3.5 share: llama.cpp's `qwen3vl_merger` projector."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gguf import Keys

from mode_gguf.architectures.config import preprocessor, section, setting
from mode_gguf.architectures.family import Metadata, TensorRule, Values, View
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.architectures.tensors import ALL_ROWS, Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

LAYER_NORM_EPSILON = 1e-6
"""Of every LayerNorm of the vision tower: a constant in transformers' model, not a setting."""


def time_slice(checkpoint: Checkpoint, source: str, index: int) -> View:
    """One of the two time steps of the patch convolution: (n, 3, 2, p, p) -> (n, 3, p, p)."""
    shape = checkpoint.shape(source)
    if len(shape) != 5 or shape[2] != 2:
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected two time steps, "
            "[n, 3, 2, patch, patch]; llama.cpp can run no other number"
        )
    return View(shape[:2] + shape[3:], lambda _, rows=ALL_ROWS: checkpoint.read(source, (rows, slice(None), index)))


_BLOCK = "model.visual.blocks.{block}"
_MERGER = "model.visual.deepstack_merger_list.{merger}"


def _linear(source: str, name: str) -> tuple[TensorRule, ...]:
    """Weight and bias of a linear layer of the projector."""
    return (
        TensorRule(f"{source}.weight", f"{name}.weight", Role.DENSE),
        TensorRule(f"{source}.bias", f"{name}.bias", Role.KEEP),
    )


def _norm(source: str, name: str) -> tuple[TensorRule, ...]:
    """Weight and bias of a LayerNorm of the projector."""
    return (
        TensorRule(f"{source}.weight", f"{name}.weight", Role.KEEP),
        TensorRule(f"{source}.bias", f"{name}.bias", Role.KEEP),
    )


PATCH_RULES = (
    TensorRule("model.visual.patch_embed.proj.weight", "v.patch_embd.weight", Role.DENSE, partial(time_slice, index=0)),
    TensorRule(
        "model.visual.patch_embed.proj.weight", "v.patch_embd.weight.1", Role.DENSE, partial(time_slice, index=1)
    ),
    TensorRule("model.visual.patch_embed.proj.bias", "v.patch_embd.bias", Role.KEEP),
)
"""Of the convolution over patches."""

PROJECTOR_RULES = (
    *PATCH_RULES,
    TensorRule("model.visual.pos_embed.weight", "v.position_embd.weight", Role.KEEP),
    *_norm(f"{_BLOCK}.norm1", "v.blk.{block}.ln1"),
    *_linear(f"{_BLOCK}.attn.qkv", "v.blk.{block}.attn_qkv"),
    *_linear(f"{_BLOCK}.attn.proj", "v.blk.{block}.attn_out"),
    *_norm(f"{_BLOCK}.norm2", "v.blk.{block}.ln2"),
    *_linear(f"{_BLOCK}.mlp.linear_fc1", "v.blk.{block}.ffn_up"),
    *_linear(f"{_BLOCK}.mlp.linear_fc2", "v.blk.{block}.ffn_down"),
    *_norm(f"{_MERGER}.norm", "v.deepstack.{tap}.norm"),
    *_linear(f"{_MERGER}.linear_fc1", "v.deepstack.{tap}.fc1"),
    *_linear(f"{_MERGER}.linear_fc2", "v.deepstack.{tap}.fc2"),
    *_norm("model.visual.merger.norm", "v.post_ln"),
    *_linear("model.visual.merger.linear_fc1", "mm.0"),
    *_linear("model.visual.merger.linear_fc2", "mm.2"),
)


def ranges(checkpoint: Checkpoint) -> Mapping[str, list[Values]]:
    """Vision blocks, and DeepStack mergers, if there are any; merger i takes the output of vision block `tap`."""
    depth = setting(checkpoint, section(checkpoint, "vision_config"), int, "depth")
    return {
        "block": [{"block": i} for i in range(depth)],
        "merger": [{"merger": i, "tap": tap} for i, tap in enumerate(deepstack_taps(checkpoint))],
    }


def deepstack_taps(checkpoint: Checkpoint) -> list[int]:
    """Vision blocks whose outputs DeepStack hands to the first decoder layers."""
    vision, key = section(checkpoint, "vision_config"), "deepstack_visual_indexes"
    return [] if vision.get(key) is None else setting(checkpoint, vision, list, key)


def projector_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's mtmd reads for `qwen3vl_merger`."""
    vision = section(checkpoint, "vision_config")
    prepared = preprocessor(checkpoint)
    depth = setting(checkpoint, vision, int, "depth")
    patch_size = setting(checkpoint, vision, int, "patch_size")
    positions = setting(checkpoint, vision, int, "num_position_embeddings")
    taps = deepstack_taps(checkpoint)
    return {
        Keys.ClipVision.PROJECTION_DIM: setting(checkpoint, section(checkpoint, "text_config"), int, "hidden_size"),
        Keys.ClipVision.IMAGE_SIZE: round(positions**0.5) * patch_size,
        Keys.ClipVision.PATCH_SIZE: patch_size,
        Keys.ClipVision.EMBEDDING_LENGTH: setting(checkpoint, vision, int, "hidden_size"),
        Keys.ClipVision.FEED_FORWARD_LENGTH: setting(checkpoint, vision, int, "intermediate_size"),
        Keys.ClipVision.BLOCK_COUNT: depth,
        Keys.ClipVision.Attention.HEAD_COUNT: setting(checkpoint, vision, int, "num_heads"),
        Keys.ClipVision.Attention.LAYERNORM_EPS: LAYER_NORM_EPSILON,
        Keys.ClipVision.IMAGE_MEAN: setting(checkpoint, prepared, list, "image_mean"),
        Keys.ClipVision.IMAGE_STD: setting(checkpoint, prepared, list, "image_std"),
        Keys.ClipVision.SPATIAL_MERGE_SIZE: setting(checkpoint, vision, int, "spatial_merge_size"),
        Keys.ClipVision.IS_DEEPSTACK_LAYERS: [block in taps for block in range(depth)],
        Keys.ClipVision.USE_GELU: True,
    }


def place_image(place: ImagePlace, frames: int = 1) -> PlacedImage:
    """The image in patches, and a token for every `merge_size` x `merge_size` of them.

    Args:
        frames: of an image, whose pixels the processor's limits count.
    """
    size = dict(place.processor.size)
    longest = min(size["longest_edge"], frames * place.max_pixels)  # despite their names, both are areas in pixels
    size |= {"longest_edge": longest, "shortest_edge": min(size["shortest_edge"], longest)}
    processed = place.processor(images=[place.image], size=size, return_tensors="np")
    grid = processed["image_grid_thw"]
    n_tokens = int(grid.prod()) // place.processor.merge_size**2
    return PlacedImage(
        [place.image_token] * n_tokens, {"pixel_values": processed["pixel_values"], "image_grid_thw": grid}
    )


def expected(checkpoint: Checkpoint) -> Mapping[str, tuple[Any, Any, str]]:
    """What `check_settings` takes: settings that llama.cpp's projector has no other value for."""
    vision = section(checkpoint, "vision_config")
    return {
        "vision hidden_act": (vision.get("hidden_act"), "gelu_pytorch_tanh", "uses this activation"),
        "temporal_patch_size": (vision.get("temporal_patch_size", 2), 2, "takes two frames at a time"),
    }
