"""The text model of Kimi-VL and Kimi K2.5: DeepSeek-V3's, llama.cpp's `deepseek2`.

Latent attention (`mla`), dense feed-forward networks in the first layers, then routed experts with a bias that only
chooses them, and shared experts. Checkpoints store every expert on its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gguf import ExpertGatingFuncType, Keys, RopeScalingType
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mode_gguf.architectures import mla
from mode_gguf.architectures.config import check_settings, section, setting
from mode_gguf.architectures.experts import expert_rules, expert_sizes
from mode_gguf.architectures.family import Metadata, Ranges, TensorRule
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.DEEPSEEK2]
DENSE, SPARSE = "dense", "sparse"
"""Subsets of the layers: one feed-forward network, or experts."""

OUTPUT = "language_model.lm_head.weight"
IGNORED = ("language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
"""Frequencies, which models compute and some checkpoints store."""
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""transformers' defaults."""

FULL_QUERY_LAYERS = (26, 27)
"""llama.cpp takes models of so many layers for ones without a low-rank query, and looks for its rank in all others."""

# --- tensors ----------------------------------------------------------------------------------------------------------

_LAYER = "language_model.model.layers.{layer}"


def _keep(source: str, name: str, only: str | None = None) -> TensorRule:
    return TensorRule(f"{_LAYER}.{source}", f"blk.{{layer}}.{name}", Role.KEEP, only=only)


def _feed_forward(source: str, suffix: str, only: str) -> tuple[TensorRule, ...]:
    names = {projection: f"blk.{{layer}}.ffn_{projection}{suffix}.weight" for projection in ("gate", "up", "down")}
    return tuple(
        TensorRule(f"{_LAYER}.mlp.{source}{projection}_proj.weight", name, Role.DENSE, activation=name, only=only)
        for projection, name in names.items()
    )


TEXT_RULES = (
    TensorRule("language_model.model.embed_tokens.weight", "token_embd.weight", Role.EMBEDDING),
    _keep("input_layernorm.weight", "attn_norm.weight"),
    *mla.attention_rules(_LAYER),
    _keep("post_attention_layernorm.weight", "ffn_norm.weight"),
    *_feed_forward("", "", DENSE),
    _keep("mlp.gate.weight", "ffn_gate_inp.weight", SPARSE),
    _keep("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", SPARSE),
    *(replace(rule, only=SPARSE) for rule in expert_rules(_LAYER)),
    *_feed_forward("shared_experts.", "_shexp", SPARSE),
    TensorRule("language_model.model.norm.weight", "output_norm.weight", Role.KEEP),
    TensorRule(OUTPUT, "output.weight", Role.OUTPUT, activation="output.weight"),
)


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers, of each kind, and experts."""
    text = section(checkpoint, "text_config")
    layers = [{"layer": i} for i in range(setting(checkpoint, text, int, "num_hidden_layers"))]
    first = setting(checkpoint, text, int, "first_k_dense_replace")
    return {
        "layer": layers,
        DENSE: layers[:first],
        SPARSE: layers[first:],
        **mla.query_ranges(checkpoint, layers),
        "expert": [{"expert": i} for i in range(expert_sizes(checkpoint)[0])],
    }


# --- metadata ---------------------------------------------------------------------------------------------------------


def text_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's loader reads for `deepseek2`."""
    text = section(checkpoint, "text_config")
    number = partial(setting, checkpoint, text, int)
    experts, hidden, width = expert_sizes(checkpoint)
    layers, rope = number("num_hidden_layers"), _rope(checkpoint)
    keys: dict[str, Any] = {
        Keys.LLM.VOCAB_SIZE: number("vocab_size"),
        Keys.LLM.BLOCK_COUNT: layers,
        Keys.LLM.CONTEXT_LENGTH: number("max_position_embeddings"),
        Keys.LLM.EMBEDDING_LENGTH: hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: number("intermediate_size"),
        Keys.LLM.LEADING_DENSE_BLOCK_COUNT: number("first_k_dense_replace"),
        Keys.Attention.LAYERNORM_RMS_EPS: setting(checkpoint, text, float, "rms_norm_eps"),
        Keys.Rope.FREQ_BASE: setting(checkpoint, {**text, **rope}, float, "rope_theta"),
        Keys.LLM.EXPERT_COUNT: experts,
        Keys.LLM.EXPERT_USED_COUNT: number("num_experts_per_tok"),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: width,
        Keys.LLM.EXPERT_SHARED_COUNT: number("n_shared_experts"),
        Keys.LLM.EXPERT_WEIGHTS_SCALE: setting(checkpoint, text, float, "routed_scaling_factor"),
        Keys.LLM.EXPERT_GATING_FUNC: ExpertGatingFuncType.SIGMOID.value,
        Keys.LLM.EXPERT_GROUP_COUNT: 1,
        Keys.LLM.EXPERT_GROUP_USED_COUNT: 1,
    }
    if text.get("norm_topk_prob"):
        keys[Keys.LLM.EXPERT_WEIGHTS_NORM] = True
    if text.get("q_lora_rank") is None and layers not in FULL_QUERY_LAYERS:
        keys[Keys.Attention.Q_LORA_RANK] = 0
    if _rope_type(rope) == "yarn":
        keys |= {
            Keys.Rope.SCALING_TYPE: RopeScalingType.YARN.value,
            Keys.Rope.SCALING_FACTOR: setting(checkpoint, rope, float, "factor"),
            Keys.Rope.SCALING_ORIG_CTX_LEN: setting(checkpoint, rope, int, "original_max_position_embeddings"),
            Keys.Rope.SCALING_YARN_BETA_FAST: setting(checkpoint, {**YARN_BETAS, **rope}, float, "beta_fast"),
            Keys.Rope.SCALING_YARN_BETA_SLOW: setting(checkpoint, {**YARN_BETAS, **rope}, float, "beta_slow"),
            # llama.cpp divides it by 0.1 again
            Keys.Rope.SCALING_YARN_LOG_MUL: 0.1 * setting(checkpoint, rope, float, "mscale_all_dim"),
        }
    return {
        **{key.format(arch=GGUF_ARCH): value for key, value in keys.items()},
        **mla.attention_metadata(checkpoint, GGUF_ARCH),
    }


def _rope(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Rotary settings: `rope_parameters` since transformers 5, `rope_scaling` (or null) before."""
    text = section(checkpoint, "text_config")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{checkpoint.path / 'config.json'}: expected an object rope_scaling, found {rope!r}")
    return rope


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """text_config as transformers' DeepSeek-V3 takes it."""
    text = {**section(checkpoint, "text_config"), "model_type": "deepseek_v3"}
    text.pop("quantization_config", None)
    return text


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def check(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp's `deepseek2`, or transformers' DeepSeek-V3, has no place for.

    Raises:
        InputError: naming the setting.
    """
    text = section(checkpoint, "text_config")
    rope = _rope(checkpoint)
    kind = _rope_type(rope)
    layers = setting(checkpoint, text, int, "num_hidden_layers")
    expected: dict[str, tuple[Any, Any, str]] = {
        "hidden_act": (text.get("hidden_act", "silu"), "silu", "always gates with silu"),
        "scoring_func": (text.get("scoring_func", "sigmoid"), "sigmoid", "is told so here, as transformers computes"),
        "topk_method": (text.get("topk_method", "noaux_tc"), "noaux_tc", "chooses experts with a bias"),
        "n_group": (text.get("n_group", 1), 1, "is told here that all experts are one group"),
        "topk_group": (text.get("topk_group", 1), 1, "is told here that all experts are one group"),
        "moe_layer_freq": (text.get("moe_layer_freq", 1), 1, "has experts in every layer after the dense ones"),
        "num_nextn_predict_layers": (text.get("num_nextn_predict_layers", 0), 0, "gets no block for it here"),
        "rope_interleave": (text.get("rope_interleave", True), True, "rotates neighbouring channels"),
        **mla.expected(text),
    }
    if kind == "yarn":
        expected |= {
            "mscale": (rope.get("mscale"), rope.get("mscale_all_dim"), "scales rotated channels as all others"),
            "attention_factor": (rope.get("attention_factor"), None, "computes it"),
        }
    elif kind != "default":
        expected["rope_type"] = (kind, "yarn", "is exported with this scaling or none")
    check_settings(checkpoint, GGUF_ARCH, expected)
    if text.get("q_lora_rank") is not None and layers in FULL_QUERY_LAYERS:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: q_lora_rank is {text['q_lora_rank']!r} with {layers} layers, expected "
            f"null: llama.cpp's {GGUF_ARCH} takes models of so many layers for ones without a low-rank query"
        )
