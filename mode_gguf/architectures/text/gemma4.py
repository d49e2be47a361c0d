"""The decoder of Gemma 4 MoE: llama.cpp's `gemma4`.

Every layer has a dense feed-forward network beside the routed experts; gate and up of an expert are one tensor. Layers
of full attention have heads of another size than those with a sliding window, and may take their keys for values.
"""

import math
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
from mode_gguf.architectures.rope import DEFAULT, LINEAR
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

PROPORTIONAL, LLAMA3 = "proportional", "llama3"
FULL_SCALINGS = (PROPORTIONAL, DEFAULT, LINEAR, LLAMA3)
"""Kinds of rotary frequencies that divisors make of the spread ones; YaRN's amplitude would be that of all layers."""

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
    factors = full_divisors(_rope(text, FULL), head_dim).astype(np.float32)
    return View(factors.shape, lambda _, rows=ALL_ROWS: factors[rows])


def full_divisors(rope: Hparams, head_dim: int) -> np.ndarray:
    """Divisors (head_dim / 2) of the frequencies of full attention.

    Of a head's channel pairs, `proportional` turns the first ones, by frequencies spread over the whole head, and the
    others not at all. A factor stretches all positions, Llama 3's only those of long waves (transformers'
    `_compute_llama3_parameters`).
    """
    kind, pairs = rope.get("rope_type"), head_dim // 2
    if kind == LLAMA3:
        return _llama3_divisors(rope, head_dim)
    turning = int(rope.float("partial_rotary_factor") * head_dim // 2) if kind == PROPORTIONAL else pairs
    factor = 1.0 if kind == DEFAULT else rope.float("factor")
    return np.array([factor] * turning + [UNROTATED] * (pairs - turning))


def _llama3_divisors(rope: Hparams, head_dim: int) -> np.ndarray:
    factor, low, high = (rope.float(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        rope.refuse("high_freq_factor", f"more than low_freq_factor, {low}")
    waves = 2 * np.pi * rope.float("rope_theta") ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope.int("original_max_position_embeddings") / waves
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


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
    """Rotary settings of the layers of one kind; transformers has defaults for all of them together only."""
    by_kind = text.section("rope_parameters") if text.has("rope_parameters") else replace(text, values=ROPE_DEFAULTS)
    of_kind = by_kind.section(kind, defaults={"partial_rotary_factor": 1.0})
    values = {"rope_type": of_kind.get("type", DEFAULT), **of_kind.values}
    if values["rope_type"] == PROPORTIONAL:
        values.setdefault("factor", 1.0)
    if values["rope_type"] == LLAMA3:
        values.setdefault("original_max_position_embeddings", text.get("max_position_embeddings"))
    return replace(of_kind, values=values, label=f"{kind} ")


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
    layer_types(text)
    _check_rope(text)
    full_attention(text)


def _check_rope(text: Hparams) -> None:
    """Refuse rotary settings that llama.cpp has no place for, or that transformers would not read."""
    if text.get("rope_scaling"):
        text.refuse("rope_scaling", "rope_parameters of each kind of layer, the only ones that transformers reads here")
    full, sliding = _rope(text, FULL), _rope(text, SLIDING)
    sliding.expect("rope_type", DEFAULT, "scales positions of full attention only")
    if full.get("rope_type") not in FULL_SCALINGS:
        full.refuse("rope_type", " or ".join(map(repr, FULL_SCALINGS)), f"llama.cpp's {text.reader} runs no other")
    for rope in (full, sliding):
        if not 1.0 < rope.float("rope_theta") < math.inf:
            rope.refuse("rope_theta", "a number above 1")
    if full.get("rope_type") != PROPORTIONAL:
        full.expect("partial_rotary_factor", 1.0, "rotates whole heads")
    elif not 0.0 <= full.float("partial_rotary_factor") <= 1.0:
        full.refuse("partial_rotary_factor", "a share")
    divisors = full_divisors(full, full_attention(text)[0])
    if not (np.isfinite(divisors).all() and (divisors >= 1.0).all()):
        full.refuse("factor", "1 or more")


TEXT_MODEL = TextModel(GGUF_ARCH, _hparams, _RULES, _keys, _check, _ranges)
