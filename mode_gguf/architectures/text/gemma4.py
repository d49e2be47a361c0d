"""The decoder of Gemma 4 MoE: llama.cpp's `gemma4`.

Every layer has a dense feed-forward network beside the routed experts; gate and up of an expert are one tensor. Layers
of full attention have heads of another size than those with a sliding window, and may take their keys for values.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mode_gguf.architectures.common_keys import EXPERTS, SIZES, Metadata, MetadataValue, common_text_keys, text_ranges
from mode_gguf.architectures.experts import expert_rules
from mode_gguf.architectures.family import TextModel
from mode_gguf.architectures.hparams import Hparams, text_hparams
from mode_gguf.architectures.rules import LAYER, Ranges, TensorRule, View, text_rules
from mode_gguf.architectures.tensors import ALL_ROWS, Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA4]

SLIDING, FULL = "sliding_attention", "full_attention"
OWN_VALUES = "own values"
"""Subset of the layers: those with a value projection of their own."""

FULL_EVERY = 6
DEFAULTS: Mapping[str, Any] = {"global_head_dim": 512, "hidden_size_per_layer_input": 256}
ROPE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
"""transformers' own, of what config.json may lack."""

UNROTATED = 1e30
"""Frequencies are divided by it, which leaves a position no angle to speak of."""

CAUSAL_WIDTHS = (1536, 2560)
"""Hidden sizes of which llama.cpp concludes that image tokens do not see later ones (E2B, E4B)."""


_hparams = partial(text_hparams, defaults=DEFAULTS, reader=GGUF_ARCH)


def rope_frequencies(checkpoint: Checkpoint, source: str) -> View:
    """Divisors of the rotary frequencies of full attention; no tensor of the checkpoint.

    Of a head's channel pairs the first ones turn, by frequencies spread over the whole head, and the others do not.
    """
    text = _hparams(checkpoint)
    head_dim, _ = full_attention(text)
    turning = int(_rope(text, FULL).float("partial_rotary_factor") * head_dim // 2)
    factors = np.array([1.0] * turning + [UNROTATED] * (head_dim // 2 - turning), np.float32)
    return View(factors.shape, lambda _, rows=ALL_ROWS: factors[rows])


_RULES = (
    TensorRule("rope_parameters of full attention", "rope_freqs.weight", Role.KEEP, rope_frequencies),
    *text_rules(
        LAYER.norm("input_layernorm", "attn_norm"),
        LAYER.dense("self_attn.q_proj", "attn_q"),
        LAYER.dense("self_attn.k_proj", "attn_k"),
        LAYER.dense("self_attn.v_proj", "attn_v", OWN_VALUES),
        LAYER.dense("self_attn.o_proj", "attn_output"),
        LAYER.norm("self_attn.q_norm", "attn_q_norm"),
        LAYER.norm("self_attn.k_norm", "attn_k_norm"),
        LAYER.norm("post_attention_layernorm", "post_attention_norm"),
        LAYER.norm("pre_feedforward_layernorm", "ffn_norm"),
        *LAYER.feed_forward("mlp"),
        LAYER.norm("post_feedforward_layernorm_1", "post_ffw_norm_1"),
        LAYER.keep("router.proj.weight", "ffn_gate_inp.weight"),
        LAYER.keep("router.scale", "ffn_gate_inp.scale"),
        LAYER.keep("router.per_expert_scale", "ffn_down_exps.scale"),
        LAYER.norm("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
        *expert_rules(block="experts", fused=True),
        LAYER.norm("post_feedforward_layernorm_2", "post_ffw_norm_2"),
        LAYER.norm("post_feedforward_layernorm", "post_ffw_norm"),
        LAYER.keep("layer_scalar", "layer_output_scale.weight"),
    ),
)


def layer_types(text: Hparams) -> list[str]:
    """`sliding_attention` or `full_attention` per layer; the last is always of full attention.

    Raises:
        InputError: the list has another length, or another kind.
    """
    layers = text.int("num_hidden_layers")
    default = [SLIDING if (layer + 1) % FULL_EVERY else FULL for layer in range(layers)]
    types = text.list("layer_types") if text.has("layer_types") else default
    if len(types) != layers or not {*types} <= {SLIDING, FULL}:
        text.refuse("layer_types", f"{layers} of {SLIDING} and {FULL}")
    return [*types[:-1], FULL]


def full_attention(text: Hparams) -> tuple[int, int]:
    """Head size and number of KV heads of the layers of full attention.

    Published files have names of their own for them; transformers 5 writes them layer by layer.

    Raises:
        InputError: they differ between layers.
    """
    if text.has("per_layer_config"):
        return _full_attention_by_layer(text)
    own = _keys_are_values(text) and text.has("num_global_key_value_heads")
    return text.int("global_head_dim"), text.int("num_global_key_value_heads" if own else "num_key_value_heads")


def _full_attention_by_layer(text: Hparams) -> tuple[int, int]:
    by_layer, types = text.get("per_layer_config"), layer_types(text)
    found = set()
    for layer, kind in enumerate(types):
        if kind == FULL and isinstance(own := by_layer.get(str(layer), {}), dict):
            of_layer = replace(text, values={**text.values, **own})
            found.add((of_layer.int("head_dim"), of_layer.int("num_key_value_heads")))
    if len(found) != 1 or any(types[int(layer)] != FULL for layer in by_layer):
        text.refuse("per_layer_config", "the same for every layer of full attention and nothing else")
    return found.pop()


def _rope(text: Hparams, kind: str) -> Hparams:
    """Rotary settings of the layers of one kind."""
    by_kind = text.section("rope_parameters") if text.has("rope_parameters") else replace(text, values=ROPE_DEFAULTS)
    return by_kind.section(kind, defaults=ROPE_DEFAULTS[kind])


def _keys_are_values(text: Hparams) -> bool:
    return bool(text.get("attention_k_eq_v", False))


def _ranges(text: Hparams) -> Ranges:
    shared = _keys_are_values(text)
    own = [layer for layer, kind in enumerate(layer_types(text)) if kind == SLIDING or not shared]
    return text_ranges(text, {OWN_VALUES: own})


def _keys(text: Hparams) -> Metadata:
    types = layer_types(text)
    head_dim, (full_dim, full_heads) = text.int("head_dim"), full_attention(text)
    heads = text.int("num_key_value_heads")
    keys: dict[str, MetadataValue] = {
        **common_text_keys(text, *SIZES),
        Keys.LLM.EMBD_LENGTH_PER_LAYER_INP: 0,
        **common_text_keys(text, Keys.LLM.FEED_FORWARD_LENGTH, *EXPERTS, Keys.Attention.HEAD_COUNT),
        Keys.Attention.HEAD_COUNT_KV: [full_heads if kind == FULL else heads for kind in types],
        Keys.Attention.KEY_LENGTH: full_dim,
        Keys.Attention.VALUE_LENGTH: full_dim,
        Keys.Attention.KEY_LENGTH_SWA: head_dim,
        Keys.Attention.VALUE_LENGTH_SWA: head_dim,
        Keys.Attention.SLIDING_WINDOW: text.int("sliding_window"),
        Keys.Attention.SLIDING_WINDOW_PATTERN: [kind == SLIDING for kind in types],
        Keys.Attention.SHARED_KV_LAYERS: 0,
        **common_text_keys(text, Keys.Attention.LAYERNORM_RMS_EPS),
        Keys.Rope.DIMENSION_COUNT: full_dim,
        Keys.Rope.DIMENSION_COUNT_SWA: head_dim,
        Keys.Rope.FREQ_BASE: _rope(text, FULL).float("rope_theta"),
        Keys.Rope.FREQ_BASE_SWA: _rope(text, SLIDING).float("rope_theta"),
    }
    if text.has("final_logit_softcapping"):
        keys[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = text.float("final_logit_softcapping")
    return keys


def _check(text: Hparams) -> None:
    """Refuse models without experts, and hyperparameters that llama.cpp's `gemma4` or this export has no place for."""
    if not text.get("enable_moe_block", False):
        raise InputError(
            f"{text.checkpoint.path}: this Gemma 4 is not a Mixture-of-Experts model (enable_moe_block is "
            f"{text.get('enable_moe_block')!r} in config.json); use llama.cpp's own convert_hf_to_gguf.py and "
            "llama-quantize for dense models"
        )
    hidden = text.int("hidden_size")
    per_layer = text.get("hidden_size_per_layer_input") or 0
    text.require("hidden_size_per_layer_input", per_layer, 0, "export supports no per-layer embeddings")
    text.expect("num_kv_shared_layers", 0, "export supports no layers that share keys and values")
    text.expect(
        "use_bidirectional_attention",
        None if hidden in CAUSAL_WIDTHS else "vision",
        f"decides by the hidden size, {hidden}, whether image tokens see later ones",
        default=None,
    )
    text.expect("hidden_activation", "gelu_pytorch_tanh", "always takes this activation")
    text.expect("attention_bias", False, "has no attention biases")
    full, sliding = _rope(text, FULL), _rope(text, SLIDING)
    full.require(f"rope_type of {FULL}", full.get("rope_type"), "proportional", "export supports no other")
    full.require(f"factor of {FULL}", full.get("factor", 1.0), 1.0, "export supports no scaling of positions")
    sliding.require(f"rope_type of {SLIDING}", sliding.get("rope_type"), "default", "export supports no other")
    layer_types(text)
    full_attention(text)


TEXT_MODEL = TextModel(GGUF_ARCH, _hparams, _RULES, _keys, _check, _ranges)
