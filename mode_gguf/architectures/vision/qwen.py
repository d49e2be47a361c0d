"""The vision tower that Qwen3-VL and Qwen3.5 share: llama.cpp's `qwen3vl_merger` projector."""

from functools import partial

from gguf import Keys
from gguf.constants import VisionProjectorType

from mode_gguf.architectures.common_keys import Metadata, common_vision_keys, vision_ranges
from mode_gguf.architectures.family import VisionTower
from mode_gguf.architectures.hparams import Hparams, text_hparams, vision_hparams
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.architectures.rope import check_tower
from mode_gguf.architectures.rules import ModuleRules, Ranges, TensorRule, View, refuse_shape
from mode_gguf.architectures.tensors import ALL_ROWS, Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

PROJECTOR = VisionProjectorType.QWEN3VL

LAYER_NORM_EPSILON = 1e-6
"""The epsilon of every LayerNorm of the tower: a constant in transformers' model, not a hyperparameter."""

ROPE_THETA = 10_000.0
"""The base of rotary positions: a constant in llama.cpp."""

FRAMES = 2
"""Time steps of the patch convolution."""


def time_step(checkpoint: Checkpoint, source: str, index: int) -> View:
    """One of the two time steps of the patch convolution: (n, 3, 2, p, p) -> (n, 3, p, p).

    Raises:
        InputError: there is another number of them.
    """
    shape = checkpoint.shape(source)
    if len(shape) != 5 or shape[2] != FRAMES:
        refuse_shape(checkpoint, source, "two time steps, [n, 3, 2, patch, patch]: llama.cpp can run no other number")
    return View(shape[:2] + shape[3:], lambda _, rows=ALL_ROWS: checkpoint.read(source, (rows, slice(None), index)))


_TOWER = ModuleRules("model.visual", "v")
_BLOCK = ModuleRules("model.visual.blocks.{block}", "v.blk.{block}")
_DEEPSTACK = ModuleRules("model.visual.deepstack_merger_list.{merger}", "v.deepstack.{tap}")
_MERGER = ModuleRules("model.visual.merger", "mm")

PATCH_RULES = (
    _TOWER.dense("patch_embed.proj", "patch_embd", transform=partial(time_step, index=0)),
    TensorRule(
        "model.visual.patch_embed.proj.weight", "v.patch_embd.weight.1", Role.DENSE, partial(time_step, index=1)
    ),
    _TOWER.keep("patch_embed.proj.bias", "patch_embd.bias"),
)
"""The convolution over patches."""

_RULES = (
    *PATCH_RULES,
    _TOWER.keep("pos_embed.weight", "position_embd.weight"),
    *_BLOCK.layer_norm("norm1", "ln1"),
    *_BLOCK.linear("attn.qkv", "attn_qkv"),
    *_BLOCK.linear("attn.proj", "attn_out"),
    *_BLOCK.layer_norm("norm2", "ln2"),
    *_BLOCK.linear("mlp.linear_fc1", "ffn_up"),
    *_BLOCK.linear("mlp.linear_fc2", "ffn_down"),
    *_DEEPSTACK.layer_norm("norm", "norm"),
    *_DEEPSTACK.linear("linear_fc1", "fc1"),
    *_DEEPSTACK.linear("linear_fc2", "fc2"),
    *_TOWER.layer_norm("merger.norm", "post_ln"),
    *_MERGER.linear("linear_fc1", "0"),
    *_MERGER.linear("linear_fc2", "2"),
)


def deepstack_taps(vision: Hparams) -> list[int]:
    """Vision blocks whose outputs DeepStack hands to the first decoder layers."""
    key = "deepstack_visual_indexes"
    return vision.list(key) if vision.has(key) else []


def _ranges(vision: Hparams) -> Ranges:
    """Vision blocks, and DeepStack mergers, if there are any; merger i takes the output of vision block `tap`."""
    mergers = [{"merger": i, "tap": tap} for i, tap in enumerate(deepstack_taps(vision))]
    return {**vision_ranges(vision), "merger": mergers}


def _keys(vision: Hparams) -> Metadata:
    taps = deepstack_taps(vision)
    image_size = round(vision.int("num_position_embeddings") ** 0.5) * vision.int("patch_size")
    return {
        **common_vision_keys(vision, epsilon=LAYER_NORM_EPSILON, image_size=image_size),
        Keys.ClipVision.SPATIAL_MERGE_SIZE: vision.int("spatial_merge_size"),
        Keys.ClipVision.IS_DEEPSTACK_LAYERS: [block in taps for block in range(vision.int("depth"))],
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


def _check(vision: Hparams) -> None:
    """Refuse what llama.cpp's projector has one value for only, and more DeepStack mergers than it can run."""
    vision.expect("hidden_act", "gelu_pytorch_tanh", "uses this activation", default=None)
    vision.expect("temporal_patch_size", FRAMES, "takes two frames at a time")
    check_tower(vision, ROPE_THETA)
    taps, layers = deepstack_taps(vision), text_hparams(vision.checkpoint).int("num_hidden_layers")
    if len(taps) >= layers:
        raise InputError(
            f"{vision.file}: {len(taps)} DeepStack mergers for {layers} decoder layers, expected fewer mergers than "
            "layers: llama.cpp stops at one in the last layer"
        )


TOWER = VisionTower(PROJECTOR, partial(vision_hparams, reader=PROJECTOR), _RULES, _keys, _check, place_image, _ranges)
