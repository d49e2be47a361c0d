"""InternVL3.5-30B-A3B and 241B-A28B: llama.cpp's `qwen3moe` with an `internvl` projector.

In both layouts: the original one (`InternVLChatModel`, whose own code is never run) and transformers'
(`InternVLForConditionalGeneration`, the repositories that end in -HF). Rules are written with transformers' names;
`original_name` translates them. The text model's names are the same in both.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, VisionProjectorType

from mode_gguf.architectures import qwen3_text
from mode_gguf.architectures.config import check_settings, preprocessor, section, setting
from mode_gguf.architectures.experts import Projection
from mode_gguf.architectures.family import (
    Metadata,
    ModelFamily,
    Ranges,
    TensorRule,
    Transform,
    View,
    as_stored,
    is_tied,
)
from mode_gguf.architectures.images import ImagePlace, ImageSize, PlacedImage, scaled_size
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role
from mode_gguf.checkpoint.folder import Checkpoint, read_json
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3MOE]

TEXT_CLASS, TEXT_TYPE = "Qwen3MoeForCausalLM", "qwen3_moe"
"""What both layouts call the only text model that is supported."""

LAYER_NORM, RMS_NORM = "layer_norm", "rms_norm"
RMS_WIDTH, RMS_BLOCKS = 3200, 45
"""The vision tower that llama.cpp knows by its size to have RMS norms."""

IMAGE_TOKEN, IMAGE_BEGIN, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"

# --- names ------------------------------------------------------------------------------------------------------------

_MODULES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
"""Beginnings of transformers' parameter names, and of the names it stores them by."""

_ORIGINAL = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    ".attention.q_proj": ".attn.qkv",
    ".attention.k_proj": ".attn.qkv",
    ".attention.v_proj": ".attn.qkv",
    ".attention.q_norm": ".attn.q_norm",
    ".attention.k_norm": ".attn.k_norm",
    ".attention.projection_layer": ".attn.proj",
    ".lambda_1": ".ls1",
    ".lambda_2": ".ls2",
    ".layernorm_before": ".norm1",
    ".layernorm_after": ".norm2",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}
"""Pieces of the names that transformers stores, and of the original ones."""


def stored_name(parameter: str) -> str:
    """The tensor of a parameter in transformers' layout."""
    for module, stored in _MODULES.items():
        if parameter.startswith(module):
            return stored + parameter.removeprefix(module)
    return parameter


def original_name(name: str) -> str:
    """The original name of what transformers stores as `name`."""
    if name.startswith("language_model."):
        return name
    for piece, original in _ORIGINAL.items():
        name = name.replace(piece, original)
    return name


def original_stored_name(parameter: str) -> str:
    """The tensor of a parameter in the original layout; queries, keys and values share one."""
    return original_name(stored_name(parameter))


# --- transforms -------------------------------------------------------------------------------------------------------

_QKV = ("q_proj", "k_proj", "v_proj")


def third(checkpoint: Checkpoint, source: str, index: int) -> View:
    """Queries, keys or values of the original's fused matrix or bias (3n, ...)."""
    shape = checkpoint.shape(source)
    if shape[0] % 3:
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected queries, keys and values of one "
            "size; use the weights as they were published"
        )
    n = shape[0] // 3

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        start, end, _ = rows.indices(n)
        return checkpoint.read(source, slice(index * n + start, index * n + end))

    return View((n, *shape[1:]), read)


def class_last(checkpoint: Checkpoint, source: str) -> View:
    """Positions (1, n + 1, width) with the first, the class token's, moved to the end.

    llama.cpp puts the class token behind the patches and adds row i to token i.
    """
    shape = checkpoint.shape(source)
    expected = (1, 1 + _patches_per_side(checkpoint) ** 2, _vision_width(checkpoint))
    if shape != expected:
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected {list(expected)} by the image and "
            "patch sizes in config.json; llama.cpp does not interpolate positions"
        )
    return View(shape, lambda _, rows=ALL_ROWS: np.roll(checkpoint.read(source, rows), -1, axis=1))


def _never_fused(checkpoint: Checkpoint, source: str, projection: Projection) -> View:
    """No checkpoint of this family has fused experts: raises, naming the tensor that is missing."""
    return as_stored(checkpoint, source)


# --- tensors ----------------------------------------------------------------------------------------------------------

_BLOCK = "vision_tower.encoder.layer.{block}"


_WITH_NORM_BIAS, _WITH_QKV_BIAS, _WITH_QK_NORM = "norm bias", "qkv bias", "qk norm"
"""Ranges of vision blocks: all of the 300M tower or none for the first two, the reverse for the third."""


TEXT_RULES = qwen3_text.text_rules("language_model.model", "language_model.lm_head", _never_fused)


def _projector_rules(named: Callable[[str], str], part: Callable[[int], Transform]) -> tuple[TensorRule, ...]:
    """Tensors of the projector.

    Args:
        named: the layout's name of what transformers stores by another.
        part: how queries (0), keys (1) and values (2) come out of their tensor.
    """

    def pair(
        source: str, name: str, role: Role, transform: Transform = as_stored, bias: str | None = None
    ) -> tuple[TensorRule, ...]:
        """Weight and bias; `bias` is the range of the blocks that have one."""
        return (
            TensorRule(named(f"{source}.weight"), f"{name}.weight", role, transform),
            TensorRule(named(f"{source}.bias"), f"{name}.bias", Role.KEEP, transform, only=bias),
        )

    def scale(source: str, name: str) -> TensorRule:
        return TensorRule(named(f"{_BLOCK}.{source}"), f"v.blk.{{block}}.{name}.weight", Role.KEEP)

    return (
        TensorRule(named("vision_tower.embeddings.cls_token"), "v.class_embd", Role.KEEP),
        *pair("vision_tower.embeddings.patch_embeddings.projection", "v.patch_embd", Role.DENSE),
        TensorRule(
            named("vision_tower.embeddings.position_embeddings"), "v.position_embd.weight", Role.KEEP, class_last
        ),
        *pair(f"{_BLOCK}.layernorm_before", "v.blk.{block}.ln1", Role.KEEP, bias=_WITH_NORM_BIAS),
        *(
            rule
            for index, projection in enumerate(_QKV)
            for rule in pair(
                f"{_BLOCK}.attention.{projection}",
                f"v.blk.{{block}}.attn_{projection[0]}",
                Role.DENSE,
                part(index),
                _WITH_QKV_BIAS,
            )
        ),
        *(
            TensorRule(
                named(f"{_BLOCK}.attention.{norm}.weight"),
                f"v.blk.{{block}}.attn_{norm}.weight",
                Role.KEEP,
                only=_WITH_QK_NORM,
            )
            for norm in ("q_norm", "k_norm")
        ),
        *pair(f"{_BLOCK}.attention.projection_layer", "v.blk.{block}.attn_out", Role.DENSE),
        scale("lambda_1", "ls1"),
        *pair(f"{_BLOCK}.layernorm_after", "v.blk.{block}.ln2", Role.KEEP, bias=_WITH_NORM_BIAS),
        *pair(f"{_BLOCK}.mlp.fc1", "v.blk.{block}.ffn_up", Role.DENSE),
        *pair(f"{_BLOCK}.mlp.fc2", "v.blk.{block}.ffn_down", Role.DENSE),
        scale("lambda_2", "ls2"),
        *pair("multi_modal_projector.layer_norm", "mm.model.mlp.0", Role.KEEP),
        *pair("multi_modal_projector.linear_1", "mm.model.mlp.1", Role.DENSE),
        *pair("multi_modal_projector.linear_2", "mm.model.mlp.3", Role.DENSE),
    )


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers, experts, vision blocks."""
    blocks = [{"block": i} for i in range(_vision_blocks(checkpoint))]
    tower = _tower(checkpoint)
    return {
        "layer": [{"layer": i} for i in range(setting(checkpoint, _text(checkpoint), int, "num_hidden_layers"))],
        "expert": [{"expert": i} for i in range(_experts(checkpoint))],
        "block": blocks,
        _WITH_NORM_BIAS: blocks if tower["norm_type"] == LAYER_NORM else [],
        _WITH_QKV_BIAS: blocks if tower["attention_bias"] else [],
        _WITH_QK_NORM: blocks if tower["use_qk_norm"] else [],
    }


# --- settings ---------------------------------------------------------------------------------------------------------


def _text(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return section(checkpoint, "llm_config" if "llm_config" in checkpoint.config else "text_config")


def _experts(checkpoint: Checkpoint) -> int:
    return setting(checkpoint, _text(checkpoint), int, "num_experts", "num_local_experts")


def _rope(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Rotary settings: `rope_parameters` since transformers 5, beside the others and in `rope_scaling` before."""
    text = _text(checkpoint)
    return {**text, **(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}


def _vision_width(checkpoint: Checkpoint) -> int:
    return setting(checkpoint, section(checkpoint, "vision_config"), int, "hidden_size")


def _vision_blocks(checkpoint: Checkpoint) -> int:
    return setting(checkpoint, section(checkpoint, "vision_config"), int, "num_hidden_layers")


def _tower(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells the vision towers of 300M and 6B apart, by transformers' names.

    What is absent has the layout's default.
    """
    vision = section(checkpoint, "vision_config")
    if "llm_config" not in checkpoint.config:
        return {"norm_type": LAYER_NORM, "attention_bias": False, "use_qk_norm": False, **_only(vision, _TOWER)}
    original = {"norm_type": RMS_NORM, "qkv_bias": False, "qk_normalization": True, **_only(vision, _ORIGINAL_TOWER)}
    return dict(zip(_TOWER, (original[name] for name in _ORIGINAL_TOWER), strict=True))


_TOWER = ("norm_type", "attention_bias", "use_qk_norm")
_ORIGINAL_TOWER = ("norm_type", "qkv_bias", "qk_normalization")


def _only(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _square(checkpoint: Checkpoint, name: str) -> int:
    """A size of the vision tower: a number, or twice the same."""
    vision = section(checkpoint, "vision_config")
    value = vision.get(name)
    if not isinstance(value, list):
        return setting(checkpoint, vision, int, name)
    if len(value) != 2 or value[0] != value[1] or type(value[0]) is not int:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: {name} of vision_config is {value!r}, expected a square; llama.cpp "
            "takes no other"
        )
    return int(value[0])


def _patches_per_side(checkpoint: Checkpoint) -> int:
    return _square(checkpoint, "image_size") // _square(checkpoint, "patch_size")


def _merge(checkpoint: Checkpoint) -> int:
    """Patches per side that the pixel shuffle makes one token of."""
    return int(1 / setting(checkpoint, checkpoint.config, float, "downsample_ratio"))


def tokens_per_tile(checkpoint: Checkpoint) -> int:
    """Image tokens of one tile; 256 of 448 x 448 pixels."""
    return (_patches_per_side(checkpoint) // _merge(checkpoint)) ** 2


def image_token(checkpoint: Checkpoint) -> int:
    """The id of `<IMG_CONTEXT>`, which the original config.json does not name.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if checkpoint.config.get("image_token_id") is not None:
        return setting(checkpoint, checkpoint.config, int, "image_token_id")
    for token, number in _added_tokens(checkpoint):
        if token == IMAGE_TOKEN:
            return number
    raise InputError(
        f"{checkpoint.path}: the tokenizer has no added token {IMAGE_TOKEN}; use the one published with these weights"
    )


def _added_tokens(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """From tokenizer.json, which slow tokenizers lack, and tokenizer_config.json, where transformers 5 has none."""
    paths = (checkpoint.path / "tokenizer.json", checkpoint.path / "tokenizer_config.json")
    tokenizer, config = (read_json(path) if path.exists() else {} for path in paths)
    try:
        for token in tokenizer.get("added_tokens", ()):
            yield str(token["content"]), int(token["id"])
        for number, token in config.get("added_tokens_decoder", {}).items():
            yield str(token["content"]), int(number)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{checkpoint.path}: added tokens cannot be read ({error!r}); download the tokenizer again"
        ) from error


# --- metadata ---------------------------------------------------------------------------------------------------------


def text_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's loader reads for `qwen3moe`."""
    text = _text(checkpoint)
    head_dim = setting(checkpoint, text, int, "head_dim")
    keys: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: setting(checkpoint, text, int, "num_hidden_layers"),
        Keys.LLM.CONTEXT_LENGTH: setting(checkpoint, text, int, "max_position_embeddings"),
        Keys.LLM.EMBEDDING_LENGTH: setting(checkpoint, text, int, "hidden_size"),
        Keys.LLM.FEED_FORWARD_LENGTH: setting(checkpoint, text, int, "intermediate_size"),
        Keys.Attention.HEAD_COUNT: setting(checkpoint, text, int, "num_attention_heads"),
        Keys.Attention.HEAD_COUNT_KV: setting(checkpoint, text, int, "num_key_value_heads"),
        Keys.Attention.KEY_LENGTH: head_dim,
        Keys.Attention.VALUE_LENGTH: head_dim,
        Keys.Attention.LAYERNORM_RMS_EPS: setting(checkpoint, text, float, "rms_norm_eps"),
        Keys.Rope.FREQ_BASE: setting(checkpoint, _rope(checkpoint), float, "rope_theta"),
        Keys.LLM.EXPERT_COUNT: _experts(checkpoint),
        Keys.LLM.EXPERT_USED_COUNT: setting(checkpoint, text, int, "num_experts_per_tok"),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: setting(checkpoint, text, int, "moe_intermediate_size"),
    }
    return {key.format(arch=GGUF_ARCH): value for key, value in keys.items()}


def projector_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's mtmd reads for `internvl`."""
    vision = section(checkpoint, "vision_config")
    normalised = preprocessor(checkpoint)
    fewest, most = tile_limits(checkpoint)
    return {
        Keys.ClipVision.PROJECTION_DIM: setting(checkpoint, _text(checkpoint), int, "hidden_size"),
        Keys.ClipVision.IMAGE_SIZE: _square(checkpoint, "image_size"),
        Keys.ClipVision.PATCH_SIZE: _square(checkpoint, "patch_size"),
        Keys.ClipVision.EMBEDDING_LENGTH: _vision_width(checkpoint),
        Keys.ClipVision.FEED_FORWARD_LENGTH: setting(checkpoint, vision, int, "intermediate_size"),
        Keys.ClipVision.BLOCK_COUNT: _vision_blocks(checkpoint),
        Keys.ClipVision.Attention.HEAD_COUNT: setting(checkpoint, vision, int, "num_attention_heads"),
        Keys.ClipVision.Attention.LAYERNORM_EPS: setting(checkpoint, vision, float, "layer_norm_eps"),
        Keys.ClipVision.IMAGE_MEAN: setting(checkpoint, normalised, list, "image_mean"),
        Keys.ClipVision.IMAGE_STD: setting(checkpoint, normalised, list, "image_std"),
        Keys.ClipVision.USE_GELU: True,
        Keys.ClipVision.Projector.SCALE_FACTOR: _merge(checkpoint),
        Keys.ClipVision.PREPROC_MIN_TILES: fewest,
        Keys.ClipVision.PREPROC_MAX_TILES: most,
    }


# --- transformers' model ----------------------------------------------------------------------------------------------


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """transformers' configuration: where the original layout has another, made from it."""
    config = checkpoint.config
    if "llm_config" not in config:
        return {**config, "tie_word_embeddings": is_tied(checkpoint)}
    vision = section(checkpoint, "vision_config")
    text = {key: value for key, value in _text(checkpoint).items() if key not in _NOT_TRANSFORMERS}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": {**text, "model_type": TEXT_TYPE, "tie_word_embeddings": is_tied(checkpoint)},
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": _vision_width(checkpoint),
            "intermediate_size": setting(checkpoint, vision, int, "intermediate_size"),
            "num_hidden_layers": _vision_blocks(checkpoint),
            "num_attention_heads": setting(checkpoint, vision, int, "num_attention_heads"),
            "hidden_act": "gelu",
            "layer_norm_eps": setting(checkpoint, vision, float, "layer_norm_eps"),
            "image_size": [_square(checkpoint, "image_size")] * 2,
            "patch_size": [_square(checkpoint, "patch_size")] * 2,
            "num_channels": 3,
            **_tower(checkpoint),
            "use_mean_pooling": True,  # without the tower's last norm, which the original does not have
            "use_absolute_position_embeddings": True,
        },
        "image_token_id": image_token(checkpoint),
        "image_seq_length": tokens_per_tile(checkpoint),
        "downsample_ratio": setting(checkpoint, config, float, "downsample_ratio"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": is_tied(checkpoint),
    }


_NOT_TRANSFORMERS = {"auto_map", "rope_scaling", "_attn_implementation", "attn_implementation", "_name_or_path"}
"""Keys of llm_config that say nothing about the model as transformers and llama.cpp run it (see `check`)."""


def read_original(checkpoint: Checkpoint, parameter: str) -> Array | None:
    """Queries, keys or values of the vision tower from the original's fused tensor; None for every other parameter."""
    for index, projection in enumerate(_QKV):
        if f".attention.{projection}." in parameter:
            return third(checkpoint, original_stored_name(parameter), index).read(0)
    return None


def place_image(place: ImagePlace) -> PlacedImage:
    """The picture as llama.cpp cuts it (`internvl_tiles`), and the tokens of its tiles between begin and end."""
    from mode_gguf.architectures.internvl_tiles import tiles  # brings Pillow, which nothing else of a family needs

    checkpoint = place.checkpoint
    size = scaled_size(place.image.size, place.max_pixels)
    cut = tiles(
        place.image if size == place.image.size else place.image.resize(size),
        _square(checkpoint, "image_size"),
        *tile_limits(checkpoint),
    )
    normalised = preprocessor(checkpoint)
    mean, std = (np.array(setting(checkpoint, normalised, list, key), np.float32) for key in _NORMALISATION)
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


_NORMALISATION = ("image_mean", "image_std")


def image_tokens(checkpoint: Checkpoint, size: ImageSize | None) -> int:
    """Tokens of a picture's tiles; of the most that there can be where its size is not known."""
    from mode_gguf.architectures.internvl_tiles import count

    fewest, most = tile_limits(checkpoint)
    n_tiles = most + 1 if size is None else count(size, _square(checkpoint, "image_size"), fewest, most)
    return n_tiles * tokens_per_tile(checkpoint)


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def check(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp's `qwen3moe` and `internvl` have no place for.

    Raises:
        InputError: naming the setting.
    """
    config, text = checkpoint.config, _text(checkpoint)
    path = checkpoint.path / "config.json"
    _check_text_model(checkpoint)
    rope = _rope(checkpoint)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    check_settings(
        checkpoint,
        GGUF_ARCH,
        {
            "norm_topk_prob": (text.get("norm_topk_prob", False), True, "always renormalises the weights of the top-k"),
            "hidden_act": (text.get("hidden_act", "silu"), "silu", "always gates with silu"),
            "attention_bias": (text.get("attention_bias", False), False, "has no attention biases"),
            "mlp_only_layers": (text.get("mlp_only_layers") or [], [], "has experts in every layer"),
            "decoder_sparse_step": (text.get("decoder_sparse_step", 1), 1, "has experts in every layer"),
            "use_sliding_window": (text.get("use_sliding_window", False), False, "attends to everything before"),
            # "dynamic" scales beyond max_position_embeddings only, where llama.cpp is told the context to end.
            "rope_type": (
                "default" if rope_type == "dynamic" else rope_type,
                "default",
                "export supports no other scaling",
            ),
        },
    )
    check_settings(checkpoint, PROJECTOR, _vision_settings(checkpoint))
    ratio = setting(checkpoint, config, float, "downsample_ratio")
    if not 0 < ratio <= 1 or 1 / ratio % 1 or _patches_per_side(checkpoint) % int(1 / ratio):
        raise InputError(
            f"{path}: downsample_ratio is {ratio!r}, expected one part of {_patches_per_side(checkpoint)} patches per "
            "side; use the configuration published with the model"
        )
    fewest, most = tile_limits(checkpoint)
    if not 1 <= fewest <= most:
        raise InputError(
            f"{path}: min_dynamic_patch is {fewest} and max_dynamic_patch {most}, expected 1 or more and no fewer; "
            "llama.cpp can cut no picture otherwise"
        )


def _check_text_model(checkpoint: Checkpoint) -> None:
    """Refuse InternVL with another language model, dense ones foremost."""
    text = _text(checkpoint)
    name = "llm_config" if "llm_config" in checkpoint.config else "text_config"
    classes = text.get("architectures")
    found = classes[0] if isinstance(classes, list) and classes else text.get("model_type")
    if found in (TEXT_CLASS, TEXT_TYPE):
        return
    dense = not any(text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    way_out = (
        "it is not a Mixture-of-Experts model: use llama.cpp's own convert_hf_to_gguf.py and llama-quantize"
        if dense
        else "of InternVL, this is the only Mixture-of-Experts text model that is supported"
    )
    raise InputError(f"{checkpoint.path / 'config.json'}: {name} is of {found!r}, expected {TEXT_CLASS!r}; {way_out}")


PROJECTOR = VisionProjectorType.INTERNVL


def _vision_settings(checkpoint: Checkpoint) -> Mapping[str, tuple[Any, Any, str]]:
    """What `check_settings` takes, by transformers' names where both layouts have a setting."""
    config, vision = checkpoint.config, section(checkpoint, "vision_config")
    large = (_vision_width(checkpoint), _vision_blocks(checkpoint)) == (RMS_WIDTH, RMS_BLOCKS)
    tower = _tower(checkpoint)
    common = {
        "vision hidden_act": (vision.get("hidden_act", "gelu"), "gelu", "is supported with this activation only"),
        "norm_type": (
            tower["norm_type"],
            RMS_NORM if large else LAYER_NORM,
            f"chooses by size: RMS norms at a width of {RMS_WIDTH} and {RMS_BLOCKS} blocks, layer norms elsewhere",
        ),
        "qk_normalization" if "llm_config" in config else "use_qk_norm": (
            tower["use_qk_norm"] and not large,
            False,
            "has RMS norms of queries and keys in the tower of 6B only",
        ),
    }
    if "llm_config" in config:
        return {
            **common,
            "ps_version": (config.get("ps_version", "v1"), "v2", "shuffles pixels in this order only"),
            "select_layer": (config.get("select_layer", -1), -1, _LAST_LAYER),
            "dynamic_image_size": (config.get("dynamic_image_size", False), True, "always cuts large pictures"),
            "use_thumbnail": (config.get("use_thumbnail", False), True, "always adds the whole picture to its tiles"),
            "pad2square": (config.get("pad2square", False), False, "never pads the whole picture"),
        }
    return {
        **common,
        "use_mean_pooling": (vision.get("use_mean_pooling", True), True, "has no norm after the vision tower"),
        "use_mask_token": (vision.get("use_mask_token", False), False, "has no mask token"),
        "use_absolute_position_embeddings": (
            vision.get("use_absolute_position_embeddings", True),
            True,
            "always adds a table of positions",
        ),
        "vision_feature_layer": (config.get("vision_feature_layer", -1), -1, _LAST_LAYER),
        "vision_feature_select_strategy": (
            config.get("vision_feature_select_strategy", "default"),
            "default",
            "leaves the class token out",
        ),
        "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), "gelu", "always uses this activation"),
    }


_LAST_LAYER = "takes the last layer of the vision tower"


def tile_limits(checkpoint: Checkpoint) -> tuple[int, int]:
    """Fewest and most tiles of a large picture, as config.json says or transformers' image processor."""
    given = {"min_patches": 1, "max_patches": 12, **preprocessor(checkpoint), **checkpoint.config}
    return (
        setting(checkpoint, given, int, "min_dynamic_patch", "min_patches"),
        setting(checkpoint, given, int, "max_dynamic_patch", "max_patches"),
    )


def _family(
    hf_class: str, named: Callable[[str], str], part: Callable[[int], Transform], **differing: Any
) -> ModelFamily:
    return ModelFamily(
        hf_class=hf_class,
        gguf_arch=GGUF_ARCH,
        projector_type=PROJECTOR,
        text_rules=TEXT_RULES,
        projector_rules=_projector_rules(named, part),
        ignored=(),
        check=check,
        ranges=ranges,
        text_metadata=text_metadata,
        projector_metadata=projector_metadata,
        tied_output="language_model.lm_head.weight",
        place_image=place_image,
        needs_processor=False,
        image_tokens=image_tokens,
        image_token=image_token,
        token_types=None,
        model_config=model_config,
        **differing,
    )


ORIGINAL = _family(
    "InternVLChatModel",
    original_name,
    lambda index: partial(third, index=index),
    placeholder="<image>",
    stored_name=original_stored_name,
    read_parameter=read_original,
)
FAMILY = _family("InternVLForConditionalGeneration", str, lambda index: as_stored, stored_name=stored_name)
