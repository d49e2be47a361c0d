"""The vision tower of GLM-4.5V and GLM-4.6V: llama.cpp's `glm4v` projector.

llama.cpp shows the model at most 4096 tokens of an image, and pads one whose sides are no multiples of 28 with black;
transformers goes further, and stretches it. Of others both say the same in F32, but for ggml's convolutions, which take
pixels and the features that the merger joins in F16: a KL near 1e-6 on random weights.
"""

from functools import partial

from gguf import Keys
from gguf.constants import VisionProjectorType

from mode_gguf.architectures.common_keys import Metadata, common_vision_keys
from mode_gguf.architectures.family import VisionTower
from mode_gguf.architectures.hparams import Hparams, text_hparams, vision_hparams
from mode_gguf.architectures.rope import check_tower
from mode_gguf.architectures.rules import ModuleRules
from mode_gguf.architectures.vision import qwen

PROJECTOR = VisionProjectorType.GLM4V

MERGE = 2
"""Patches a side that a token stands for."""

OUTPUT_WIDTH = 4096
"""transformers' default."""

_TOWER = ModuleRules("model.visual", "v")
_BLOCK = ModuleRules("model.visual.blocks.{block}", "v.blk.{block}")
_PROJECTOR = ModuleRules("model.visual", "mm")
_MERGER = ModuleRules("model.visual.merger", "mm")

_RULES = (
    *qwen.PATCH_RULES,
    _TOWER.keep("embeddings.position_embedding.weight", "position_embd.weight"),
    _TOWER.norm("post_conv_layernorm", "norm_embd"),
    _BLOCK.norm("norm1", "ln1"),
    _BLOCK.dense("attn.qkv", "attn_qkv"),
    _BLOCK.dense("attn.proj", "attn_out"),
    _BLOCK.norm("norm2", "ln2"),
    *_BLOCK.feed_forward("mlp"),
    _TOWER.norm("post_layernorm", "post_ln"),
    *_PROJECTOR.linear("downsample", "patch_merger"),
    _MERGER.dense("proj", "model.fc"),
    *_MERGER.layer_norm("post_projection_norm", "post_norm"),
    _MERGER.dense("gate_proj", "gate"),
    _MERGER.dense("up_proj", "up"),
    _MERGER.dense("down_proj", "down"),
)


def _keys(vision: Hparams) -> Metadata:
    return {
        **common_vision_keys(vision, epsilon=vision.float("rms_norm_eps")),
        Keys.ClipVision.SPATIAL_MERGE_SIZE: MERGE,
        Keys.ClipVision.USE_SILU: True,
    }


def _check(vision: Hparams) -> None:
    """Refuse what llama.cpp's `glm4v` projector has one value for only."""
    vision.expect("hidden_act", "silu", "is run with silu")
    vision.expect("attention_bias", False, "has no place for these biases")
    vision.expect("temporal_patch_size", qwen.FRAMES, "takes two frames at a time")
    vision.expect("spatial_merge_size", MERGE, "merges two by two patches")
    hidden = text_hparams(vision.checkpoint).int("hidden_size")
    vision.expect("out_hidden_size", hidden, "makes images as wide as the text", default=OUTPUT_WIDTH)
    check_tower(vision, qwen.ROPE_THETA)


TOWER = VisionTower(
    PROJECTOR,
    hparams=partial(vision_hparams, reader=PROJECTOR),
    rules=_RULES,
    keys=_keys,
    check=_check,
    place_image=partial(qwen.place_image, frames=qwen.FRAMES),  # its processor counts the pixels of both
)
