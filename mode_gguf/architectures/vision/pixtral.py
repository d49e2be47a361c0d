"""Pixtral's vision tower with Mistral 3's patch merger: llama.cpp's `pixtral` projector.

Mistral writes a picture row by row, with [IMG_BREAK] after every row but the last, and [IMG_END] after that. llama.cpp
takes the breaks from the projector, which has their embedding, and the end from the vocabulary. Its own converter
leaves the embedding out for this class, and the file cannot be loaded.

The norm ahead of the merger has the text model's epsilon; llama.cpp gives it the tower's, 1e-5.
"""

from functools import partial
from math import sqrt

from gguf import MODEL_TENSOR, TENSOR_NAMES, Keys
from gguf.constants import VisionProjectorType

from mode_gguf.architectures.added_tokens import special_token
from mode_gguf.architectures.common_keys import Metadata, common_vision_keys, vision_ranges
from mode_gguf.architectures.family import VisionTower
from mode_gguf.architectures.hparams import Hparams, config, vision_hparams
from mode_gguf.architectures.images import ImagePlace, PlacedImage
from mode_gguf.architectures.rope import check_tower
from mode_gguf.architectures.rules import EMBEDDING, ModuleRules, Ranges, TensorRule, View, refuse_shape
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

PROJECTOR = VisionProjectorType.PIXTRAL

RMS_NORM_EPSILON = 1e-5
"""The epsilon of every norm of the tower: a constant in transformers' model, not a hyperparameter."""

ROPE_THETA = 10_000.0
"""llama.cpp's, and transformers' default."""

BREAK, END = "[IMG_BREAK]", "[IMG_END]"

MAX_TOKENS = 1024
"""Pieces of a picture that llama.cpp takes at most; it scales larger ones down, whatever the checkpoint allows."""

BIASED = "biased projector"
"""Subset of ranges: projectors whose matrices have biases."""


_hparams = partial(vision_hparams, defaults={"hidden_act": "gelu"}, reader=PROJECTOR)


def interleaved(checkpoint: Checkpoint, source: str) -> View:
    """Rows of queries or keys with the halves of a head interleaved: llama.cpp rotates neighbours."""
    heads = _hparams(checkpoint).int("num_attention_heads")
    shape = checkpoint.shape(source)
    if len(shape) != 2 or shape[0] % (2 * heads):
        refuse_shape(checkpoint, source, f"a multiple of {2 * heads} rows by the heads of vision_config")

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


_TOWER = ModuleRules("model.vision_tower", "v")
_BLOCK = ModuleRules("model.vision_tower.transformer.layers.{block}", "v.blk.{block}")
_PROJECTOR = ModuleRules("model.multi_modal_projector", "mm")

_RULES = (
    _TOWER.dense("patch_conv", "patch_embd"),
    _TOWER.norm("ln_pre", "pre_ln"),
    TensorRule(EMBEDDING.source, TENSOR_NAMES[MODEL_TENSOR.V_TOK_EMBD_IMG_BREAK], Role.KEEP, break_embedding),
    _BLOCK.norm("attention_norm", "ln1"),
    _BLOCK.dense("attention.q_proj", "attn_q", transform=interleaved),
    _BLOCK.dense("attention.k_proj", "attn_k", transform=interleaved),
    _BLOCK.dense("attention.v_proj", "attn_v"),
    _BLOCK.dense("attention.o_proj", "attn_out"),
    _BLOCK.norm("ffn_norm", "ln2"),
    *_BLOCK.feed_forward("feed_forward"),
    _PROJECTOR.norm("norm", "input_norm"),
    _PROJECTOR.dense("patch_merger.merging_layer", "patch_merger"),
    *_PROJECTOR.linear("linear_1", "1", BIASED),
    *_PROJECTOR.linear("linear_2", "2", BIASED),
)


def _merge(checkpoint: Checkpoint) -> int:
    """Patches a side that make one token."""
    return config(checkpoint, {"spatial_merge_size": 2}).int("spatial_merge_size")


def _ranges(vision: Hparams) -> Ranges:
    """Vision blocks; and whether the projector has biases."""
    biased = vision.checkpoint.config.get("multimodal_projector_bias", False)
    return {**vision_ranges(vision), BIASED: [{}] if biased else []}


def _keys(vision: Hparams) -> Metadata:
    gelu = vision.get("hidden_act") == "gelu"
    return {
        **common_vision_keys(vision, epsilon=RMS_NORM_EPSILON),
        Keys.ClipVision.SPATIAL_MERGE_SIZE: _merge(vision.checkpoint),
        Keys.ClipVision.USE_GELU if gelu else Keys.ClipVision.USE_SILU: True,
    }


def _check(vision: Hparams) -> None:
    """Refuse what llama.cpp's `pixtral` projector has no other value for."""
    outside = config(vision.checkpoint, reader=PROJECTOR)
    vision.expect("model_type", "pixtral", "has the projector of this tower", default=None)
    if vision.get("hidden_act") != "gelu":
        vision.expect("hidden_act", "silu", "has gelu and silu only")
    check_tower(vision, ROPE_THETA)
    vision.expect("num_channels", 3, "takes RGB")
    outside.expect("vision_feature_layer", -1, "takes the last block's output")
    outside.expect("projector_hidden_act", "gelu", "uses this activation")


def place_image(place: ImagePlace) -> PlacedImage:
    """The image scaled to whole pieces, and its rows of tokens."""
    side = _hparams(place.checkpoint).int("patch_size") * _merge(place.checkpoint)
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


def image_token(checkpoint: Checkpoint) -> int:
    """The id of [IMG]."""
    return config(checkpoint).int("image_token_index", "image_token_id")


TOWER = VisionTower(
    PROJECTOR,
    hparams=_hparams,
    rules=_RULES,
    keys=_keys,
    check=_check,
    place_image=place_image,
    ranges=_ranges,
    image_token=image_token,
    token_types=None,
)
