"""The decoder of GLM-4.5V and GLM-4.6V: llama.cpp's `glm4moe`.

The first layers have a dense FFN; all others have a shared expert beside the routed ones, which sigmoids with a bias of
their own choose.
"""

from collections.abc import Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any

from gguf import ExpertGatingFuncType, Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mode_gguf.architectures.common_keys import (
    HEADS,
    SIZES,
    Metadata,
    common_text_keys,
    head_dim,
    text_ranges,
)
from mode_gguf.architectures.experts import expert_rules
from mode_gguf.architectures.family import TextModel
from mode_gguf.architectures.hparams import Hparams, expert_sizes, text_hparams
from mode_gguf.architectures.rope import check_rope, check_sections, mrope_sections, rope_hparams, scaling_keys
from mode_gguf.architectures.rules import LAYER, Ranges, numbered, text_rules

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.GLM4_MOE]

DENSE, SPARSE, BIASED = "dense layers", "sparse layers", "biased layers"
"""Layers without experts, with them, and with biases of queries, keys and values."""

DEFAULTS: Mapping[str, Any] = {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "attention_bias": True,
}
"""transformers' own, of what config.json may lack."""

ROPE_DEFAULTS: Mapping[str, Any] = {
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [8, 12, 12],
}
"""transformers' own rotary settings."""

_RULES = text_rules(
    LAYER.norm("input_layernorm", "attn_norm"),
    *LAYER.linear("self_attn.q_proj", "attn_q", BIASED),
    *LAYER.linear("self_attn.k_proj", "attn_k", BIASED),
    *LAYER.linear("self_attn.v_proj", "attn_v", BIASED),
    LAYER.dense("self_attn.o_proj", "attn_output"),
    LAYER.norm("post_attention_layernorm", "post_attention_norm"),
    *LAYER.feed_forward("mlp", only=DENSE),
    LAYER.keep("mlp.gate.weight", "ffn_gate_inp.weight", SPARSE),
    LAYER.keep("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", SPARSE),
    *expert_rules(only=SPARSE),
    *LAYER.feed_forward("mlp.shared_experts", "_shexp", SPARSE),
)


def _rope(text: Hparams) -> Hparams:
    return rope_hparams(text, ROPE_DEFAULTS)


def _rotated(text: Hparams) -> int:
    """Channels of a head that its position rotates."""
    return int(head_dim(text) * _rope(text).float("partial_rotary_factor"))


def _ranges(text: Hparams) -> Ranges:
    """Decoder layers, of each kind, and experts; blocks for multi-token prediction (`mtp`) behind the layers."""
    layers, n_dense = range(text.int("num_hidden_layers")), text.int("first_k_dense_replace")
    biased = layers if text.bool("attention_bias") else ()
    drafting = takewhile(
        lambda i: f"{LAYER.source.format(layer=i)}.eh_proj.weight" in text.checkpoint.tensors, count(len(layers))
    )
    subsets = {DENSE: layers[:n_dense], SPARSE: layers[n_dense:], BIASED: biased}
    return {**text_ranges(text, subsets), "mtp": numbered("mtp", drafting)}


def _keys(text: Hparams) -> Metadata:
    rope = _rope(text)
    return {
        **common_text_keys(
            text,
            *SIZES,
            Keys.LLM.FEED_FORWARD_LENGTH,
            Keys.LLM.LEADING_DENSE_BLOCK_COUNT,
            *HEADS,
            Keys.Attention.LAYERNORM_RMS_EPS,
        ),
        Keys.Rope.DIMENSION_SECTIONS: mrope_sections(rope),
        Keys.Rope.DIMENSION_COUNT: _rotated(text),
        Keys.Rope.FREQ_BASE: rope.float("rope_theta"),
        **scaling_keys(rope),
        **common_text_keys(
            text,
            Keys.LLM.EXPERT_COUNT,
            Keys.LLM.EXPERT_USED_COUNT,
            Keys.LLM.EXPERT_GROUP_COUNT,
            Keys.LLM.EXPERT_GROUP_USED_COUNT,
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH,
            Keys.LLM.EXPERT_SHARED_COUNT,
        ),
        Keys.LLM.EXPERT_GATING_FUNC: int(ExpertGatingFuncType.SIGMOID),
        **common_text_keys(text, Keys.LLM.EXPERT_WEIGHTS_SCALE),
        Keys.LLM.EXPERT_WEIGHTS_NORM: True,
    }


def _check(text: Hparams) -> None:
    """Refuse hyperparameters that llama.cpp's `glm4moe`, or transformers' model, has no place for."""
    rope = _rope(text)
    text.expect("hidden_act", "silu", "always gates with silu")
    check_rope(text, rope)
    if text.get("use_qk_norm", False):
        text.refuse(
            "use_qk_norm",
            "False: transformers' model has no norm of queries and keys, so calibration would run another model",
        )
    if text.get("norm_topk_prob", True) is not True:
        text.refuse("norm_topk_prob", "True: no model without has been tried")
    layers = text.int("num_hidden_layers")
    if not 0 <= text.int("first_k_dense_replace") < layers:
        text.refuse("first_k_dense_replace", f"fewer than the {layers} layers")
    experts, groups, used = expert_sizes(text)[0], text.int("n_group"), text.int("topk_group")
    if groups != 1 and not (0 < used < groups < experts and experts % groups == 0):
        text.refuse(
            "n_group",
            f"1, or a divisor of {experts} experts of which topk_group, {used}, are fewer: llama.cpp stops at others",
        )
    check_sections(rope, _rotated(text))


TEXT_MODEL = TextModel(
    GGUF_ARCH, partial(text_hparams, defaults=DEFAULTS, reader=GGUF_ARCH), _RULES, _keys, _check, _ranges
)
