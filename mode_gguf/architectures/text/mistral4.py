"""The decoder of Mistral Small 4: llama.cpp's `mistral4`, which is DeepSeek's with other settings.

Beyond `original_max_position_embeddings`, queries grow with the logarithm of the position (`llama_4_scaling_beta`).
llama.cpp knows that, but its own converter writes the two keys for dense models only: such a file answers differently
from position 8192 on. The norm inside the query (q_a_layernorm) and the one of the latent vector have transformers'
epsilon of 1e-6, llama.cpp gives them `rms_norm_eps`.
"""

from functools import partial

from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES

from mode_gguf.architectures.common_keys import EXPERTS, SIZES, Metadata, MetadataValue, common_text_keys
from mode_gguf.architectures.family import TextModel
from mode_gguf.architectures.hparams import Hparams, text_hparams
from mode_gguf.architectures.rope import LINEAR, YARN, check_rope, latent_scaling_keys, rope_hparams
from mode_gguf.architectures.text import deepseek, mla
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.MISTRAL4]
MODEL_TYPE = "mistral4"
DEFAULTS = {"routed_scaling_factor": 1.0}
"""transformers' own, of what config.json may lack."""


def _keys(text: Hparams) -> Metadata:
    rope = rope_hparams(text)
    keys: dict[str, MetadataValue] = {
        **common_text_keys(text, *SIZES, Keys.LLM.VOCAB_SIZE),
        Keys.LLM.LEADING_DENSE_BLOCK_COUNT: 0,
        **common_text_keys(text, Keys.Attention.LAYERNORM_RMS_EPS),
        Keys.Attention.TEMPERATURE_SCALE: rope.float("llama_4_scaling_beta"),
        Keys.Attention.TEMPERATURE_LENGTH: rope.int("original_max_position_embeddings"),
        Keys.Rope.FREQ_BASE: rope.float("rope_theta"),
        **latent_scaling_keys(rope),
        **common_text_keys(text, *EXPERTS, Keys.LLM.EXPERT_SHARED_COUNT),
        Keys.LLM.EXPERT_GROUP_COUNT: 1,
        Keys.LLM.EXPERT_GROUP_USED_COUNT: 1,
        **common_text_keys(text, Keys.LLM.EXPERT_WEIGHTS_SCALE),
    }
    if text.has("intermediate_size"):  # of dense layers, which there are none of
        keys |= common_text_keys(text, Keys.LLM.FEED_FORWARD_LENGTH)
    if text.get("norm_topk_prob", True):
        keys[Keys.LLM.EXPERT_WEIGHTS_NORM] = True
    return {**keys, **mla.keys(text)}


def _check(text: Hparams) -> None:
    """Refuse dense models of the class, and hyperparameters that llama.cpp's `mistral4` has no place for."""
    if text.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"{text.file}: the text model is {text.get('model_type')!r}, expected {MODEL_TYPE!r} (Mistral Small 4): "
            "the others of this class are not Mixture-of-Experts models; use llama.cpp's own convert_hf_to_gguf.py and "
            "llama-quantize for dense models"
        )
    rope = rope_hparams(text)
    text.expect("hidden_act", "silu", "always gates with silu")
    text.require(
        "first_k_dense_replace", text.get("first_k_dense_replace") or 0, 0, "export has experts in every layer"
    )
    text.require("n_group", text.get("n_group") or 1, 1, "export supports no groups of experts")
    text.expect("rope_interleave", True, "rotates neighbouring channels")
    check_rope(text, rope, (YARN, LINEAR))
    latent_scaling_keys(rope)
    rope.float("llama_4_scaling_beta"), rope.int("original_max_position_embeddings")  # transformers has no defaults
    rotated = text.int("qk_rope_head_dim")
    head = rotated + text.int("qk_nope_head_dim")
    rope.require(
        "partial_rotary_factor",
        int(head * rope.get("partial_rotary_factor", rotated / head)),
        rotated,
        "rotates qk_rope_head_dim channels",
    )
    mla.check(text)


TEXT_MODEL = TextModel(
    GGUF_ARCH,
    hparams=partial(text_hparams, defaults=DEFAULTS, reader=GGUF_ARCH),
    rules=deepseek.RULES,
    keys=_keys,
    check=_check,
    ranges=partial(deepseek.ranges, dense=0, biased=False),
)
