"""Gemma 4 MoE (26B-A4B): llama.cpp's `gemma4` with a `gemma4v` projector.

Every layer has a dense feed-forward network beside the routed experts; gate and up of an expert are one tensor. Layers
of full attention have heads of another size than those with a sliding window, and may take their keys for values. Only
the variant with experts is supported: the dense ones need no tool of this kind.

The vision tower gives a picture as many tokens as its shape asks for, and they see each other in layers with a sliding
window, but not in those of full attention; llama.cpp does the same. An audio tower (`model.audio_tower.*`) is left out:
the file answers about text and pictures.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, VisionProjectorType

from mode_gguf.architectures.config import check_settings, preprocessor, section, setting
from mode_gguf.architectures.experts import expert_rules, expert_sizes, fused_experts
from mode_gguf.architectures.family import Metadata, ModelFamily, Ranges, TensorRule, View, as_stored
from mode_gguf.architectures.images import ImagePlace, ImageSize, PlacedImage
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA4]

SLIDING, FULL = "sliding_attention", "full_attention"
OWN_VALUES = "own_values"
"""Range of the layers with a value projection of their own."""
CLIPPED, STANDARDIZED = "clipped", "standardized"
"""Ranges of optional parts of the vision tower."""

FULL_EVERY = 6
FULL_HEAD_DIM = 512
PARTIAL_ROTARY_FACTOR = 0.25
"""transformers' defaults, of full attention."""
ROTARY: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": PARTIAL_ROTARY_FACTOR, "rope_theta": 1_000_000.0},
}
"""transformers' defaults."""
UNROTATED = 1e30
"""Frequencies are divided by it, which leaves a position no angle to speak of."""

SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Limits on a picture's tokens that the image processor knows."""
MAX_SOFT_TOKENS = 280
"""transformers' default."""
POOLING = 3
"""Patches along a side of a token, where a projector's file does not say."""
VISION_ROPE_THETA = 100.0
CAUSAL_WIDTHS = (1536, 2560)
"""Hidden sizes of which llama.cpp concludes that image tokens do not see later ones (E2B, E4B)."""
IMAGE_SIZE = 224
"""Without a meaning: llama.cpp asks for one."""

# --- transforms -------------------------------------------------------------------------------------------------------


def rope_frequencies(checkpoint: Checkpoint, source: str) -> View:
    """What llama.cpp divides the rotary frequencies of full attention by; no tensor of the checkpoint.

    Of a head's channel pairs the first ones turn, by frequencies spread over the whole head, and the others do not.
    """
    head_dim, _ = full_attention(checkpoint)
    share = setting(checkpoint, rotary(checkpoint, FULL), float, "partial_rotary_factor")
    turning = int(share * head_dim // 2)
    factors = np.array([1.0] * turning + [UNROTATED] * (head_dim // 2 - turning), np.float32)
    return View(factors.shape, lambda _, rows=ALL_ROWS: factors[rows])


def patches(checkpoint: Checkpoint, source: str) -> View:
    """The patch embedding as a convolution: (n, p * p * 3) to (n, 3, p, p)."""
    vision = section(checkpoint, "vision_config")
    n, side = setting(checkpoint, vision, int, "hidden_size"), setting(checkpoint, vision, int, "patch_size")
    if checkpoint.shape(source) != (n, side * side * 3):
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(checkpoint.shape(source))}, expected "
            f"{[n, side * side * 3]}; use the config.json published with these weights"
        )

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return np.ascontiguousarray(checkpoint.read(source, rows).reshape(-1, side, side, 3).transpose(0, 3, 1, 2))

    return View((n, 3, side, side), read)


def scalar(checkpoint: Checkpoint, source: str) -> View:
    """A single number as a tensor with one dimension."""
    return View((1,), lambda _, rows=ALL_ROWS: checkpoint.read(source).reshape(1)[rows])


# --- tensors ----------------------------------------------------------------------------------------------------------

_LAYER = "model.language_model.layers.{layer}"
_BLOCK = "model.vision_tower.encoder.layers.{block}"


def _dense(source: str, name: str, only: str | None = None) -> TensorRule:
    name = f"blk.{{layer}}.{name}.weight"
    return TensorRule(f"{_LAYER}.{source}.weight", name, Role.DENSE, activation=name, only=only)


def _keep(source: str, name: str) -> TensorRule:
    return TensorRule(f"{_LAYER}.{source}", f"blk.{{layer}}.{name}", Role.KEEP)


def _norms(layer: str, block: str, names: Mapping[str, str]) -> tuple[TensorRule, ...]:
    return tuple(
        TensorRule(f"{layer}.{source}.weight", f"{block}.{name}.weight", Role.KEEP) for source, name in names.items()
    )


def _clippable(source: str, name: str) -> tuple[TensorRule, ...]:
    """A linear layer of the vision tower, and what its inputs and outputs are clipped to."""
    source, name = f"{_BLOCK}.{source}", f"v.blk.{{block}}.{name}"
    bounds = ("input_min", "input_max", "output_min", "output_max")
    return (
        TensorRule(f"{source}.linear.weight", f"{name}.weight", Role.DENSE),
        *(TensorRule(f"{source}.{bound}", f"{name}.{bound}", Role.KEEP, scalar, only=CLIPPED) for bound in bounds),
    )


TEXT_RULES = (
    TensorRule("rope_parameters of full attention", "rope_freqs.weight", Role.KEEP, rope_frequencies),
    TensorRule("model.language_model.embed_tokens.weight", "token_embd.weight", Role.EMBEDDING),
    _keep("input_layernorm.weight", "attn_norm.weight"),
    _dense("self_attn.q_proj", "attn_q"),
    _dense("self_attn.k_proj", "attn_k"),
    _dense("self_attn.v_proj", "attn_v", OWN_VALUES),
    _dense("self_attn.o_proj", "attn_output"),
    _keep("self_attn.q_norm.weight", "attn_q_norm.weight"),
    _keep("self_attn.k_norm.weight", "attn_k_norm.weight"),
    _keep("post_attention_layernorm.weight", "post_attention_norm.weight"),
    _keep("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    _dense("mlp.gate_proj", "ffn_gate"),
    _dense("mlp.up_proj", "ffn_up"),
    _dense("mlp.down_proj", "ffn_down"),
    _keep("post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"),
    _keep("router.proj.weight", "ffn_gate_inp.weight"),
    _keep("router.scale", "ffn_gate_inp.scale"),
    _keep("router.per_expert_scale", "ffn_down_exps.scale"),
    _keep("pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"),
    *expert_rules(_LAYER, fused_experts, block="experts", fused=True),
    _keep("post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"),
    _keep("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    _keep("layer_scalar", "layer_output_scale.weight"),
    TensorRule("model.language_model.norm.weight", "output_norm.weight", Role.KEEP),
    TensorRule("lm_head.weight", "output.weight", Role.OUTPUT, activation="output.weight"),
)

PROJECTOR_RULES = (
    TensorRule("model.vision_tower.patch_embedder.input_proj.weight", "v.patch_embd.weight", Role.DENSE, patches),
    TensorRule("model.vision_tower.patch_embedder.position_embedding_table", "v.position_embd.weight", Role.KEEP),
    *_norms(
        _BLOCK,
        "v.blk.{block}",
        {
            "input_layernorm": "ln1",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "post_attention_layernorm": "attn_post_norm",
            "pre_feedforward_layernorm": "ln2",
            "post_feedforward_layernorm": "ffn_post_norm",
        },
    ),
    *_clippable("self_attn.q_proj", "attn_q"),
    *_clippable("self_attn.k_proj", "attn_k"),
    *_clippable("self_attn.v_proj", "attn_v"),
    *_clippable("self_attn.o_proj", "attn_out"),
    *_clippable("mlp.gate_proj", "ffn_gate"),
    *_clippable("mlp.up_proj", "ffn_up"),
    *_clippable("mlp.down_proj", "ffn_down"),
    TensorRule("model.vision_tower.std_bias", "v.std_bias", Role.KEEP, only=STANDARDIZED),
    TensorRule("model.vision_tower.std_scale", "v.std_scale", Role.KEEP, only=STANDARDIZED),
    TensorRule("model.embed_vision.embedding_projection.weight", "mm.input_projection.weight", Role.DENSE, as_stored),
)


def layer_types(checkpoint: Checkpoint) -> list[str]:
    """`sliding_attention` or `full_attention` per layer; the last is always of full attention.

    Raises:
        InputError: the list has another length, or another kind.
    """
    text = section(checkpoint, "text_config")
    layers = setting(checkpoint, text, int, "num_hidden_layers")
    default = [SLIDING if (layer + 1) % FULL_EVERY else FULL for layer in range(layers)]
    types = [*(default if text.get("layer_types") is None else setting(checkpoint, text, list, "layer_types"))]
    if len(types) != layers or not {*types} <= {SLIDING, FULL}:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: layer_types is {types!r}, expected {layers} of {SLIDING} and {FULL}; "
            "use the configuration published with the model"
        )
    return [*types[:-1], FULL]


def full_attention(checkpoint: Checkpoint) -> tuple[int, int]:
    """Head size and number of KV heads of the layers of full attention.

    Published files have names of their own for them; transformers 5 writes them layer by layer.
    """
    text = section(checkpoint, "text_config")
    heads = setting(checkpoint, text, int, "num_key_value_heads")
    by_layer = text.get("per_layer_config")
    if by_layer is not None:
        found = {
            (
                setting(checkpoint, {**text, **own}, int, "head_dim"),
                setting(checkpoint, {**text, **own}, int, "num_key_value_heads"),
            )
            for layer, kind in enumerate(layer_types(checkpoint))
            if isinstance(own := by_layer.get(str(layer), {}), dict) and kind == FULL
        }
        if len(found) != 1 or any(layer_types(checkpoint)[int(layer)] != FULL for layer in by_layer):
            raise InputError(
                f"{checkpoint.path / 'config.json'}: per_layer_config is {by_layer!r}, expected the same for every "
                "layer of full attention and nothing else; use the configuration published with the model"
            )
        return found.pop()
    if _keys_are_values(checkpoint) and text.get("num_global_key_value_heads") is not None:
        heads = setting(checkpoint, text, int, "num_global_key_value_heads")
    return setting(checkpoint, {"global_head_dim": FULL_HEAD_DIM, **text}, int, "global_head_dim"), heads


def rotary(checkpoint: Checkpoint, kind: str) -> Mapping[str, Any]:
    """Rotary settings of the layers of one kind."""
    text = section(checkpoint, "text_config")
    given = ROTARY if text.get("rope_parameters") is None else setting(checkpoint, text, dict, "rope_parameters")
    return {**ROTARY[kind], **setting(checkpoint, given, dict, kind)}


def _keys_are_values(checkpoint: Checkpoint) -> bool:
    return bool(section(checkpoint, "text_config").get("attention_k_eq_v", False))


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Layers, those with values of their own, and vision blocks; optional parts are there once or not at all."""
    vision = section(checkpoint, "vision_config")
    kinds = layer_types(checkpoint)
    blocks = [{"block": block} for block in range(setting(checkpoint, vision, int, "num_hidden_layers"))]
    return {
        "layer": [{"layer": layer} for layer in range(len(kinds))],
        OWN_VALUES: [
            {"layer": layer} for layer, kind in enumerate(kinds) if kind == SLIDING or not _keys_are_values(checkpoint)
        ],
        "block": blocks,
        CLIPPED: blocks if vision.get("use_clipped_linears", False) else [],
        STANDARDIZED: [{}] if vision.get("standardize", False) else [],
    }


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the token embedding; it is unless config.json says otherwise."""
    return bool(checkpoint.config.get("tie_word_embeddings", True))


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Without the audio tower, whose weights nobody needs."""
    return {**checkpoint.config, "audio_config": None}


# --- metadata ---------------------------------------------------------------------------------------------------------


def text_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's loader reads for `gemma4`."""
    text = section(checkpoint, "text_config")
    experts, hidden, width = expert_sizes(checkpoint)
    kinds = layer_types(checkpoint)
    head_dim, (full_dim, full_heads) = setting(checkpoint, text, int, "head_dim"), full_attention(checkpoint)
    heads = setting(checkpoint, text, int, "num_key_value_heads")
    keys: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: len(kinds),
        Keys.LLM.CONTEXT_LENGTH: setting(checkpoint, text, int, "max_position_embeddings"),
        Keys.LLM.EMBEDDING_LENGTH: hidden,
        Keys.LLM.EMBD_LENGTH_PER_LAYER_INP: 0,
        Keys.LLM.FEED_FORWARD_LENGTH: setting(checkpoint, text, int, "intermediate_size"),
        Keys.LLM.EXPERT_COUNT: experts,
        Keys.LLM.EXPERT_USED_COUNT: setting(checkpoint, text, int, "top_k_experts"),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: width,
        Keys.Attention.HEAD_COUNT: setting(checkpoint, text, int, "num_attention_heads"),
        Keys.Attention.HEAD_COUNT_KV: [full_heads if kind == FULL else heads for kind in kinds],
        Keys.Attention.KEY_LENGTH: full_dim,
        Keys.Attention.VALUE_LENGTH: full_dim,
        Keys.Attention.KEY_LENGTH_SWA: head_dim,
        Keys.Attention.VALUE_LENGTH_SWA: head_dim,
        Keys.Attention.SLIDING_WINDOW: setting(checkpoint, text, int, "sliding_window"),
        Keys.Attention.SLIDING_WINDOW_PATTERN: [kind == SLIDING for kind in kinds],
        Keys.Attention.SHARED_KV_LAYERS: 0,
        Keys.Attention.LAYERNORM_RMS_EPS: setting(checkpoint, text, float, "rms_norm_eps"),
        Keys.Rope.DIMENSION_COUNT: full_dim,
        Keys.Rope.DIMENSION_COUNT_SWA: head_dim,
        Keys.Rope.FREQ_BASE: setting(checkpoint, rotary(checkpoint, FULL), float, "rope_theta"),
        Keys.Rope.FREQ_BASE_SWA: setting(checkpoint, rotary(checkpoint, SLIDING), float, "rope_theta"),
    }
    if text.get("final_logit_softcapping") is not None:
        keys[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = setting(checkpoint, text, float, "final_logit_softcapping")
    return {key.format(arch=GGUF_ARCH): value for key, value in keys.items()}


def projector_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's mtmd reads for `gemma4v`."""
    vision, processor = section(checkpoint, "vision_config"), preprocessor(checkpoint)
    pooling = _pooling(checkpoint)
    keys: dict[str, Any] = {
        Keys.ClipVision.PROJECTOR_TYPE: VisionProjectorType.GEMMA4V,
        Keys.ClipVision.PROJECTION_DIM: setting(checkpoint, section(checkpoint, "text_config"), int, "hidden_size"),
        Keys.ClipVision.IMAGE_SIZE: IMAGE_SIZE,
        Keys.ClipVision.PATCH_SIZE: setting(checkpoint, vision, int, "patch_size"),
        Keys.ClipVision.EMBEDDING_LENGTH: setting(checkpoint, vision, int, "hidden_size"),
        Keys.ClipVision.FEED_FORWARD_LENGTH: setting(checkpoint, vision, int, "intermediate_size"),
        Keys.ClipVision.BLOCK_COUNT: setting(checkpoint, vision, int, "num_hidden_layers"),
        Keys.ClipVision.Attention.HEAD_COUNT: setting(checkpoint, vision, int, "num_attention_heads"),
        Keys.ClipVision.Attention.LAYERNORM_EPS: setting(
            checkpoint, {"rms_norm_eps": 1e-6, **vision}, float, "rms_norm_eps"
        ),
        Keys.ClipVision.IMAGE_MEAN: setting(checkpoint, processor, list, "image_mean"),
        Keys.ClipVision.IMAGE_STD: setting(checkpoint, processor, list, "image_std"),
        # llama.cpp's converter leaves it out, and llama.cpp then takes another activation, gelu_quick.
        Keys.ClipVision.USE_GELU: True,
    }
    return keys if pooling == POOLING else {**keys, Keys.ClipVision.Projector.SCALE_FACTOR: pooling}


def _pooling(checkpoint: Checkpoint) -> int:
    vision = section(checkpoint, "vision_config")
    return setting(checkpoint, {"pooling_kernel_size": POOLING, **vision}, int, "pooling_kernel_size")


# --- pictures ---------------------------------------------------------------------------------------------------------


def place_image(place: ImagePlace) -> PlacedImage:
    """The image in patches, and a token for every `pooling_kernel_size` squared of them, between its marks.

    The processor scales every picture, small ones too, to as many tokens as its limit allows; the limit is the largest
    it knows that keeps to `max_pixels`, and at least its smallest.
    """
    processor, config = place.processor, place.checkpoint.config
    area = (processor.patch_size * processor.pooling_kernel_size) ** 2
    limit = _largest_limit(min(processor.max_soft_tokens, place.max_pixels // area))
    processed = processor(images=[place.image], max_soft_tokens=limit, return_tensors="np")
    n_tokens = int(np.asarray(processed["num_soft_tokens_per_image"]).reshape(-1)[0])
    begin, end = (setting(place.checkpoint, config, int, f"{mark}_token_id") for mark in ("boi", "eoi"))
    return PlacedImage(
        [begin, *[place.image_token] * n_tokens, end],
        {name: processed[name] for name in ("pixel_values", "image_position_ids")},
    )


def image_tokens(checkpoint: Checkpoint, size: ImageSize | None) -> int:
    """At most, of a picture as large as pictures may be; by the processor's own limit where no size is given."""
    vision, processor = section(checkpoint, "vision_config"), preprocessor(checkpoint)
    own = setting(checkpoint, {"max_soft_tokens": MAX_SOFT_TOKENS, **processor}, int, "max_soft_tokens")
    if size is None:
        return own
    area = (setting(checkpoint, vision, int, "patch_size") * _pooling(checkpoint)) ** 2
    return _largest_limit(min(own, size[0] * size[1] // area))


def _largest_limit(n_tokens: int) -> int:
    """The largest limit that the processor knows up to `n_tokens`, at least its smallest."""
    return max((n for n in SOFT_TOKENS if n <= n_tokens), default=SOFT_TOKENS[0])


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def check(checkpoint: Checkpoint) -> None:
    """Refuse models without experts, and settings that llama.cpp's `gemma4` or this export has no place for.

    Raises:
        InputError: naming the setting.
    """
    text, vision = section(checkpoint, "text_config"), section(checkpoint, "vision_config")
    if not text.get("enable_moe_block", False):
        raise InputError(
            f"{checkpoint.path}: this Gemma 4 is not a Mixture-of-Experts model (enable_moe_block is "
            f"{text.get('enable_moe_block')!r} in config.json); use llama.cpp's own convert_hf_to_gguf.py and "
            "llama-quantize for dense models"
        )
    hidden = setting(checkpoint, text, int, "hidden_size")
    bidirectional = None if hidden in CAUSAL_WIDTHS else "vision"
    full, sliding = rotary(checkpoint, FULL), rotary(checkpoint, SLIDING)
    vision_heads = setting(checkpoint, vision, int, "num_attention_heads")
    vision_rope = vision.get("rope_parameters") or {}
    gelu = ("gelu_pytorch_tanh", "always takes this activation")
    check_settings(
        checkpoint,
        GGUF_ARCH,
        {
            "hidden_size_per_layer_input": (
                text.get("hidden_size_per_layer_input", 256) or 0,
                0,
                "export supports no per-layer embeddings",
            ),
            "num_kv_shared_layers": (
                text.get("num_kv_shared_layers", 0),
                0,
                "export supports no layers that share keys and values",
            ),
            "use_bidirectional_attention": (
                text.get("use_bidirectional_attention"),
                bidirectional,
                f"decides by the hidden size, {hidden}, whether image tokens see later ones",
            ),
            "hidden_activation": (text.get("hidden_activation", gelu[0]), *gelu),
            "attention_bias": (text.get("attention_bias", False), False, "has no attention biases"),
            "rope_type of full_attention": (full["rope_type"], "proportional", "export supports no other"),
            "factor of full_attention": (full.get("factor", 1.0), 1.0, "export supports no scaling of positions"),
            "rope_type of sliding_attention": (sliding["rope_type"], "default", "export supports no other"),
            "vision hidden_activation": (vision.get("hidden_activation", gelu[0]), *gelu),
            "vision attention_bias": (vision.get("attention_bias") or False, False, "has no biases there"),
            "vision num_key_value_heads": (
                vision.get("num_key_value_heads", vision_heads),
                vision_heads,
                "has as many keys as queries there",
            ),
            "vision head_dim": (
                setting(checkpoint, {"head_dim": 64, **vision}, int, "head_dim") * vision_heads,
                setting(checkpoint, vision, int, "hidden_size"),
                "divides the width among the heads (this is head_dim times heads)",
            ),
            "vision rope_theta": (
                vision_rope.get("rope_theta", VISION_ROPE_THETA),
                VISION_ROPE_THETA,
                "knows no other",
            ),
        },
    )
    layer_types(checkpoint)
    full_attention(checkpoint)


FAMILY = ModelFamily(
    hf_class="Gemma4ForConditionalGeneration",
    gguf_arch=GGUF_ARCH,
    projector_type=VisionProjectorType.GEMMA4V,
    text_rules=TEXT_RULES,
    projector_rules=PROJECTOR_RULES,
    ignored=("model.audio_tower.", "model.embed_audio."),
    check=check,
    ranges=ranges,
    text_metadata=text_metadata,
    projector_metadata=projector_metadata,
    tied_output="lm_head.weight",
    tied=is_tied,
    model_config=model_config,
    place_image=place_image,
    image_tokens=image_tokens,
)
