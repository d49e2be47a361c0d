"""The decoder of Qwen3 with experts, which several vision-language models have: llama.cpp's `qwen3moe` and kin."""

from functools import partial

from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mode_gguf.architectures.common_keys import EXPERTS, HEADS, SIZES, Metadata, common_text_keys
from mode_gguf.architectures.experts import FusedTransform, expert_rules, fused_experts
from mode_gguf.architectures.family import TextModel
from mode_gguf.architectures.hparams import Hparams, text_hparams
from mode_gguf.architectures.rope import check_rope, check_whole_heads, rope_hparams, scaling_keys
from mode_gguf.architectures.rules import LAYER, TensorRule, text_rules

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3MOE]
DEFAULTS = {"norm_topk_prob": False}
"""transformers' own, of what config.json may lack."""


def rules(experts: FusedTransform = fused_experts) -> tuple[TensorRule, ...]:
    """Tensors of the text model; `experts` takes fused experts apart."""
    return text_rules(
        LAYER.norm("input_layernorm", "attn_norm"),
        LAYER.dense("self_attn.q_proj", "attn_q"),
        LAYER.dense("self_attn.k_proj", "attn_k"),
        LAYER.dense("self_attn.v_proj", "attn_v"),
        LAYER.dense("self_attn.o_proj", "attn_output"),
        LAYER.norm("self_attn.q_norm", "attn_q_norm"),
        LAYER.norm("self_attn.k_norm", "attn_k_norm"),
        LAYER.norm("post_attention_layernorm", "ffn_norm"),
        LAYER.keep("mlp.gate.weight", "ffn_gate_inp.weight"),
        *expert_rules(experts),
    )


def check(text: Hparams) -> None:
    """Refuse what llama.cpp runs with one value only, with an `InputError`."""
    text.expect("norm_topk_prob", True, "always renormalises the weights of the top-k")
    text.expect("hidden_act", "silu", "always gates with silu")
    text.expect("attention_bias", False, "has no attention biases")
    text.require("mlp_only_layers", text.get("mlp_only_layers") or [], [], "has experts in every layer")
    text.expect("decoder_sparse_step", 1, "has experts in every layer")
    text.expect("use_sliding_window", False, "attends to everything before")
    rope = rope_hparams(text)
    check_rope(text, rope)
    check_whole_heads(rope)


def _keys(text: Hparams) -> Metadata:
    rope = rope_hparams(text)
    return {
        **common_text_keys(text, *SIZES, Keys.LLM.FEED_FORWARD_LENGTH, *HEADS, Keys.Attention.LAYERNORM_RMS_EPS),
        Keys.Rope.FREQ_BASE: rope.float("rope_theta"),
        **scaling_keys(rope),
        **common_text_keys(text, *EXPERTS),
    }


TEXT_MODEL = TextModel(
    GGUF_ARCH, partial(text_hparams, defaults=DEFAULTS, reader=GGUF_ARCH), rules(), keys=_keys, check=check
)
"""The decoder of InternVL3.5."""
