"""Decoders of DeepSeek-V3's kind, as llama.cpp's `deepseek2` and its relatives run them.

Latent attention (`mla`), dense feed-forward networks in the first layers, then routed experts and shared ones; a bias
may choose the experts. Checkpoints store every expert on its own.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gguf import ExpertGatingFuncType, Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mode_gguf.architectures.common_keys import (
    EXPERTS,
    SIZES,
    Metadata,
    MetadataValue,
    common_text_keys,
    text_ranges,
)
from mode_gguf.architectures.experts import expert_rules
from mode_gguf.architectures.family import TextModel
from mode_gguf.architectures.hparams import Hparams, text_hparams
from mode_gguf.architectures.rope import check_rope, check_whole_heads, latent_scaling_keys, rope_hparams
from mode_gguf.architectures.rules import LAYER, Ranges, text_rules
from mode_gguf.architectures.text import mla
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.DEEPSEEK2]

DENSE, SPARSE, BIASED = "dense layers", "sparse layers", "layers that choose with a bias"
"""Subsets of the layers: one feed-forward network, or experts; and what chooses these."""

DEFAULT_GROUPS = (8, 4)
"""transformers' own, of experts and of those that a token may choose from."""

FULL_QUERY_LAYERS = (26, 27)
"""llama.cpp takes models of so many layers for ones without a low-rank query, and looks for its rank in all others."""

RULES = text_rules(
    LAYER.norm("input_layernorm", "attn_norm"),
    *mla.RULES,
    LAYER.norm("post_attention_layernorm", "ffn_norm"),
    *LAYER.feed_forward("mlp", only=DENSE),
    LAYER.keep("mlp.gate.weight", "ffn_gate_inp.weight", SPARSE),
    LAYER.keep("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", BIASED),
    *expert_rules(only=SPARSE),
    *LAYER.feed_forward("mlp.shared_experts", "_shexp", SPARSE),
)


def ranges(text: Hparams, *, dense: int, biased: bool) -> Ranges:
    """Decoder layers, of each kind, and experts.

    Args:
        dense: layers without experts, which come first.
        biased: whether a bias chooses the experts.
    """
    layers = range(text.int("num_hidden_layers"))
    subsets = {DENSE: layers[:dense], SPARSE: layers[dense:], BIASED: layers[dense:] if biased else ()}
    return text_ranges(text, {**subsets, **mla.subsets(text)})


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """text_config as transformers' DeepSeek-V3 takes it."""
    text = {**text_hparams(checkpoint).values, "model_type": "deepseek_v3"}
    text.pop("quantization_config", None)
    return text


def _ranges(text: Hparams) -> Ranges:
    return ranges(text, dense=text.int("first_k_dense_replace"), biased=True)


def _keys(text: Hparams) -> Metadata:
    rope = rope_hparams(text)
    keys: dict[str, MetadataValue] = {
        **common_text_keys(
            text,
            Keys.LLM.VOCAB_SIZE,
            *SIZES,
            Keys.LLM.FEED_FORWARD_LENGTH,
            Keys.LLM.LEADING_DENSE_BLOCK_COUNT,
            Keys.Attention.LAYERNORM_RMS_EPS,
        ),
        Keys.Rope.FREQ_BASE: rope.float("rope_theta"),
        **common_text_keys(text, *EXPERTS, Keys.LLM.EXPERT_SHARED_COUNT, Keys.LLM.EXPERT_WEIGHTS_SCALE),
        Keys.LLM.EXPERT_GATING_FUNC: ExpertGatingFuncType.SIGMOID.value,
        Keys.LLM.EXPERT_GROUP_COUNT: 1,
        Keys.LLM.EXPERT_GROUP_USED_COUNT: 1,
    }
    if text.get("norm_topk_prob", True):
        keys[Keys.LLM.EXPERT_WEIGHTS_NORM] = True
    if not text.has("q_lora_rank") and text.int("num_hidden_layers") not in FULL_QUERY_LAYERS:
        keys[Keys.Attention.Q_LORA_RANK] = 0
    return {**keys, **latent_scaling_keys(rope), **mla.keys(text)}


def _check(text: Hparams) -> None:
    """Refuse hyperparameters that llama.cpp's `deepseek2`, or transformers' DeepSeek-V3, has no place for."""
    text.expect("hidden_act", "silu", "always gates with silu")
    text.expect("scoring_func", "sigmoid", "is told so here, as transformers computes")
    text.expect("topk_method", "noaux_tc", "chooses experts with a bias")
    text.expect("n_group", 1, "is told here that all experts are one group", default=DEFAULT_GROUPS[0])
    text.expect("topk_group", 1, "is told here that all experts are one group", default=DEFAULT_GROUPS[1])
    text.expect("moe_layer_freq", 1, "has experts in every layer after the dense ones")
    text.expect("num_nextn_predict_layers", 0, "gets no block for it here")
    text.expect("rope_interleave", True, "rotates neighbouring channels")
    mla.check(text)
    rope = rope_hparams(text)
    check_rope(text, rope)
    check_whole_heads(rope)
    latent_scaling_keys(rope)
    layers = text.int("num_hidden_layers")
    if text.has("q_lora_rank") and layers in FULL_QUERY_LAYERS:
        raise InputError(
            f"{text.file}: q_lora_rank is {text.get('q_lora_rank')!r} with {layers} layers, expected null: llama.cpp's "
            f"{GGUF_ARCH} takes models of so many layers for ones without a low-rank query"
        )


TEXT_MODEL = TextModel(GGUF_ARCH, partial(text_hparams, reader=GGUF_ARCH), RULES, _keys, _check, _ranges)
"""The decoder of Kimi-VL and Kimi K2.5."""
