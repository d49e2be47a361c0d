"""Mistral Small 4 (119B): llama.cpp's `mistral4`, which is DeepSeek's latent attention, with a `pixtral` projector.

Its class, Mistral3ForConditionalGeneration, also has the dense Mistral Small 3 and Ministral 3, which are refused.

Beyond `original_max_position_embeddings`, queries grow with the logarithm of the position (`llama_4_scaling_beta`).
llama.cpp knows that, but its own converter writes the two keys for dense models only: such a file answers differently
from position 8192 on. The norm inside the query (q_a_layernorm) and the one of the latent vector have transformers'
epsilon of 1e-6, llama.cpp gives them `rms_norm_eps`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gguf import Keys, RopeScalingType
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, VisionProjectorType

from mode_gguf.architectures import mla, pixtral
from mode_gguf.architectures.config import check_settings, section, setting
from mode_gguf.architectures.experts import expert_rules, expert_sizes
from mode_gguf.architectures.family import Metadata, ModelFamily, Ranges, TensorRule, any_checkpoint, same_name
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

HF_CLASS = "Mistral3ForConditionalGeneration"
GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.MISTRAL4]
TEXT_MODEL_TYPE = "mistral4"

_PUBLIC_EMBEDDING = "language_model.model.embed_tokens.weight"
"""In every checkpoint whose tensors have the names that transformers saves."""


def _public_name(parameter: str) -> str:
    """How transformers saves a parameter, unless it read it under its own name."""
    if parameter == "lm_head.weight":
        return f"language_model.{parameter}"
    return parameter.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


def _names_as_saved(checkpoint: Checkpoint) -> bool:
    return _PUBLIC_EMBEDDING in checkpoint.tensors


def _text_rules(text: str, head: str) -> tuple[TensorRule, ...]:
    """Tensors of the text model, in file order.

    Args:
        text: what the checkpoint has ahead of their names.
        head: its name for the output head.
    """
    layer = f"{text}layers.{{layer}}"

    def dense(source: str, name: str) -> TensorRule:
        name = f"blk.{{layer}}.{name}.weight"
        return TensorRule(f"{layer}.{source}.weight", name, Role.DENSE, activation=name)

    def keep(source: str, name: str) -> TensorRule:
        return TensorRule(f"{layer}.{source}.weight", f"blk.{{layer}}.{name}.weight", Role.KEEP)

    return (
        TensorRule(f"{text}embed_tokens.weight", "token_embd.weight", Role.EMBEDDING),
        keep("input_layernorm", "attn_norm"),
        *mla.attention_rules(layer),
        keep("post_attention_layernorm", "ffn_norm"),
        keep("mlp.gate", "ffn_gate_inp"),
        *expert_rules(layer),
        dense("mlp.shared_experts.gate_proj", "ffn_gate_shexp"),
        dense("mlp.shared_experts.up_proj", "ffn_up_shexp"),
        dense("mlp.shared_experts.down_proj", "ffn_down_shexp"),
        TensorRule(f"{text}norm.weight", "output_norm.weight", Role.KEEP),
        TensorRule(head, "output.weight", Role.OUTPUT, activation="output.weight"),
    )


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers, kinds of their queries, and experts; vision blocks."""
    n_layers = setting(checkpoint, section(checkpoint, "text_config"), int, "num_hidden_layers")
    layers = [{"layer": i} for i in range(n_layers)]
    return {
        "layer": layers,
        "expert": [{"expert": i} for i in range(expert_sizes(checkpoint)[0])],
        **mla.query_ranges(checkpoint, layers),
        **pixtral.ranges(checkpoint),
    }


def image_token(checkpoint: Checkpoint) -> int:
    """Id of [IMG]."""
    return setting(checkpoint, checkpoint.config, int, "image_token_index", "image_token_id")


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the token embedding: transformers ties by default, but not a head that is stored."""
    if {"lm_head.weight", _public_name("lm_head.weight")} & checkpoint.tensors.keys():
        return False
    return bool(checkpoint.config.get("tie_word_embeddings", True))


def model_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json, saying whether embeddings are tied."""
    return {**checkpoint.config, "tie_word_embeddings": is_tied(checkpoint)}


# --- metadata ---------------------------------------------------------------------------------------------------------


def text_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's loader reads for `mistral4`."""
    text, rope = section(checkpoint, "text_config"), _rope(checkpoint)
    number = partial(setting, checkpoint, text, int)
    experts, hidden, width = expert_sizes(checkpoint)
    original_context = setting(checkpoint, rope, int, "original_max_position_embeddings")
    keys: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: number("num_hidden_layers"),
        Keys.LLM.CONTEXT_LENGTH: number("max_position_embeddings"),
        Keys.LLM.EMBEDDING_LENGTH: hidden,
        Keys.LLM.VOCAB_SIZE: number("vocab_size"),
        Keys.LLM.LEADING_DENSE_BLOCK_COUNT: 0,
        Keys.Attention.LAYERNORM_RMS_EPS: setting(checkpoint, text, float, "rms_norm_eps"),
        Keys.Attention.TEMPERATURE_SCALE: setting(checkpoint, rope, float, "llama_4_scaling_beta"),
        Keys.Attention.TEMPERATURE_LENGTH: original_context,
        Keys.Rope.FREQ_BASE: setting(checkpoint, rope, float, "rope_theta"),
        Keys.Rope.SCALING_TYPE: RopeScalingType.YARN.value,
        Keys.Rope.SCALING_FACTOR: setting(checkpoint, rope, float, "factor"),
        Keys.Rope.SCALING_ORIG_CTX_LEN: original_context,
        Keys.Rope.SCALING_YARN_BETA_FAST: setting(checkpoint, {"beta_fast": 32.0, **rope}, float, "beta_fast"),
        Keys.Rope.SCALING_YARN_BETA_SLOW: setting(checkpoint, {"beta_slow": 1.0, **rope}, float, "beta_slow"),
        # A tenth: llama.cpp's DeepSeek loader divides by 0.1.
        Keys.Rope.SCALING_YARN_LOG_MUL: 0.1 * setting(checkpoint, rope, float, "mscale_all_dim"),
        Keys.LLM.EXPERT_COUNT: experts,
        Keys.LLM.EXPERT_USED_COUNT: number("num_experts_per_tok"),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: width,
        Keys.LLM.EXPERT_SHARED_COUNT: number("n_shared_experts"),
        Keys.LLM.EXPERT_GROUP_COUNT: 1,
        Keys.LLM.EXPERT_GROUP_USED_COUNT: 1,
        Keys.LLM.EXPERT_WEIGHTS_SCALE: setting(
            checkpoint, {"routed_scaling_factor": 1.0, **text}, float, "routed_scaling_factor"
        ),
    }
    if text.get("intermediate_size") is not None:  # of dense layers, which there are none of
        keys[Keys.LLM.FEED_FORWARD_LENGTH] = number("intermediate_size")
    if text.get("norm_topk_prob", True):
        keys[Keys.LLM.EXPERT_WEIGHTS_NORM] = True
    metadata: dict[str, Any] = {key.format(arch=GGUF_ARCH): value for key, value in keys.items()}
    return {**metadata, **mla.attention_metadata(checkpoint, GGUF_ARCH)}


def _rope(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Of transformers 5, or as 4 had it, with the base beside it."""
    text = section(checkpoint, "text_config")
    return {
        "rope_theta": text.get("rope_theta"),
        **setting(checkpoint, text, dict, "rope_parameters", "rope_scaling"),
    }


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def check(checkpoint: Checkpoint) -> None:
    """Refuse dense models of the class, and settings that llama.cpp's `mistral4` has no place for.

    Raises:
        InputError: naming the setting.
    """
    path = checkpoint.path / "config.json"
    text = section(checkpoint, "text_config")
    if text.get("model_type") != TEXT_MODEL_TYPE:
        raise InputError(
            f"{path}: the text model is {text.get('model_type')!r}, expected {TEXT_MODEL_TYPE!r} (Mistral Small 4): "
            f"the others of {HF_CLASS} are not Mixture-of-Experts models; use llama.cpp's own convert_hf_to_gguf.py "
            "and llama-quantize for dense models"
        )
    rope = _rope(checkpoint)
    rotated = setting(checkpoint, text, int, "qk_rope_head_dim")
    head = rotated + setting(checkpoint, text, int, "qk_nope_head_dim")
    check_settings(
        checkpoint,
        GGUF_ARCH,
        {
            "hidden_act": (text.get("hidden_act", "silu"), "silu", "always gates with silu"),
            "first_k_dense_replace": (text.get("first_k_dense_replace") or 0, 0, "export has experts in every layer"),
            "n_group": (text.get("n_group") or 1, 1, "export supports no groups of experts"),
            "rope_interleave": (text.get("rope_interleave", True), True, "rotates neighbouring channels"),
            "rope_type": (rope.get("rope_type", rope.get("type")), "yarn", "export supports no other scaling"),
            "mscale": (rope.get("mscale", 1.0), 1.0, "scales cosines by no other factor"),
            "mscale_all_dim": (rope.get("mscale_all_dim"), 1.0, "was compared with transformers at this value only"),
            "attention_factor": (rope.get("attention_factor"), None, "computes it from the scaling factor"),
            "truncate": (rope.get("truncate", True), True, "rounds the range of channels that YaRN corrects"),
            "partial_rotary_factor": (
                int(head * rope.get("partial_rotary_factor", rotated / head)),
                rotated,
                "rotates qk_rope_head_dim channels",
            ),
            **mla.expected(text),
            **pixtral.expected(checkpoint),
        },
    )


def _family(*, public: bool) -> ModelFamily:
    """The family in one of the two ways in which checkpoints name tensors."""
    text, outside = ("language_model.model.", "") if public else ("model.language_model.", "model.")
    head = _public_name("lm_head.weight") if public else "lm_head.weight"
    return ModelFamily(
        hf_class=HF_CLASS,
        gguf_arch=GGUF_ARCH,
        projector_type=VisionProjectorType.PIXTRAL,
        text_rules=_text_rules(text, head),
        projector_rules=pixtral.projector_rules(outside, f"{text}embed_tokens.weight"),
        ignored=(),
        check=check,
        ranges=ranges,
        text_metadata=text_metadata,
        projector_metadata=pixtral.projector_metadata,
        tied_output=head,
        place_image=pixtral.place_image,
        image_token=image_token,
        token_types=None,
        tied=is_tied,
        model_config=model_config,
        matches=_names_as_saved if public else any_checkpoint,
        stored_name=_public_name if public else same_name,
    )


PUBLIC, FAMILY = _family(public=True), _family(public=False)
"""Names as transformers saves them, and as it names parameters."""
