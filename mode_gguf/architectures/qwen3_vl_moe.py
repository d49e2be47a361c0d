"""Qwen3-VL-MoE (30B-A3B, 235B-A22B): llama.cpp's `qwen3vlmoe` with a `qwen3vl_merger` projector.

H is the hidden size, I the width of an expert, E their number.
"""

from collections.abc import Mapping
from typing import Any

from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, VisionProjectorType

from mode_gguf.architectures import qwen3_text, qwen_vision
from mode_gguf.architectures.config import check_settings, section, setting
from mode_gguf.architectures.experts import Projection, expert_sizes, fused_experts, fused_shape
from mode_gguf.architectures.family import Metadata, ModelFamily, Ranges, View
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3VLMOE]

# --- transforms -------------------------------------------------------------------------------------------------------


def experts_either_way(checkpoint: Checkpoint, source: str, projection: Projection) -> View:
    """One projection of the fused experts as (E, rows, n_in), whichever way the checkpoint lays them out.

    Checkpoints on the hubs store `x @ W`: gate_up_proj (E, H, 2I) and down_proj (E, I, H). A re-save by
    transformers 5 stores `W @ x`: (E, 2I, H) and (E, H, I).

    Raises:
        InputError: the shape is neither, or both and the configuration does not say who saved it.
    """
    experts, rows, n_in = fused_shape(checkpoint, projection)
    shape = checkpoint.shape(source)
    swapped = shape == (experts, n_in, rows)
    if not swapped and shape != (experts, rows, n_in):
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected {[experts, n_in, rows]} or "
            f"{[experts, rows, n_in]}; use the config.json published with these weights"
        )
    if rows == n_in:
        swapped = not _saved_by_transformers_5(checkpoint, source)
    return fused_experts(checkpoint, source, projection, transposed=swapped)


def _saved_by_transformers_5(checkpoint: Checkpoint, source: str) -> bool:
    """For square matrices, whose layout no shape tells apart."""
    version = str(checkpoint.config.get("transformers_version", ""))
    major = version.partition(".")[0]
    if not major.isdecimal():
        raise InputError(
            f"{checkpoint.path / 'config.json'}: transformers_version is missing, and the square experts of {source} "
            "may be stored either way; use the configuration published with the model"
        )
    return int(major) >= 5


# --- tensors ----------------------------------------------------------------------------------------------------------

TEXT_RULES = qwen3_text.text_rules("model.language_model", "lm_head", experts_either_way)


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers and experts; vision blocks and DeepStack mergers."""
    layers = setting(checkpoint, section(checkpoint, "text_config"), int, "num_hidden_layers")
    return {
        "layer": [{"layer": i} for i in range(layers)],
        "expert": [{"expert": i} for i in range(expert_sizes(checkpoint)[0])],
        **qwen_vision.ranges(checkpoint),
    }


# --- metadata ---------------------------------------------------------------------------------------------------------


def text_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's loader reads for `qwen3vlmoe`."""
    text = section(checkpoint, "text_config")
    experts, hidden, width = expert_sizes(checkpoint)
    heads = setting(checkpoint, text, int, "num_attention_heads")
    head_dim = setting(checkpoint, text, int, "head_dim") if text.get("head_dim") else hidden // heads
    rope = _rope(checkpoint)
    sections = setting(checkpoint, rope, list, "mrope_section")
    theta = setting(checkpoint, {**text, **rope}, float, "rope_theta")
    keys: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: setting(checkpoint, text, int, "num_hidden_layers"),
        Keys.LLM.CONTEXT_LENGTH: setting(checkpoint, text, int, "max_position_embeddings"),
        Keys.LLM.EMBEDDING_LENGTH: hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: setting(checkpoint, text, int, "intermediate_size"),
        Keys.Attention.HEAD_COUNT: heads,
        Keys.Attention.HEAD_COUNT_KV: setting(checkpoint, text, int, "num_key_value_heads"),
        Keys.Attention.KEY_LENGTH: head_dim,
        Keys.Attention.VALUE_LENGTH: head_dim,
        Keys.Attention.LAYERNORM_RMS_EPS: setting(checkpoint, text, float, "rms_norm_eps"),
        Keys.Rope.DIMENSION_SECTIONS: [*sections, 0, 0, 0, 0][:4],
        Keys.Rope.FREQ_BASE: theta,
        Keys.LLM.EXPERT_COUNT: experts,
        Keys.LLM.EXPERT_USED_COUNT: setting(checkpoint, text, int, "num_experts_per_tok"),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: width,
        Keys.LLM.NUM_DEEPSTACK_LAYERS: len(qwen_vision.deepstack_taps(checkpoint)),
    }
    return {key.format(arch=GGUF_ARCH): value for key, value in keys.items()}


def _rope(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Rotary settings: `rope_parameters` since transformers 5, `rope_scaling` before."""
    text = section(checkpoint, "text_config")
    return setting(checkpoint, text, dict, "rope_parameters", "rope_scaling")


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def check(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp's `qwen3vlmoe` has no place for.

    Raises:
        InputError: naming the setting.
    """
    text = section(checkpoint, "text_config")
    layers = setting(checkpoint, text, int, "num_hidden_layers")
    check_settings(
        checkpoint,
        GGUF_ARCH,
        {
            "norm_topk_prob": (text.get("norm_topk_prob", True), True, "always renormalises the weights of the top-k"),
            "hidden_act": (text.get("hidden_act", "silu"), "silu", "always gates with silu"),
            "attention_bias": (text.get("attention_bias", False), False, "has no attention biases"),
            "mlp_only_layers": (text.get("mlp_only_layers") or [], [], "has experts in every layer"),
            "decoder_sparse_step": (text.get("decoder_sparse_step", 1), 1, "has experts in every layer"),
            "rope_type": (_rope(checkpoint).get("rope_type", "default"), "default", "export supports no other scaling"),
            **qwen_vision.expected(checkpoint),
        },
    )
    taps = qwen_vision.deepstack_taps(checkpoint)
    if len(taps) >= layers:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: {len(taps)} DeepStack mergers for {layers} decoder layers, expected "
            "fewer mergers than layers: llama.cpp stops at one in the last layer"
        )


FAMILY = ModelFamily(
    hf_class="Qwen3VLMoeForConditionalGeneration",
    gguf_arch=GGUF_ARCH,
    projector_type=VisionProjectorType.QWEN3VL,
    text_rules=TEXT_RULES,
    projector_rules=qwen_vision.PROJECTOR_RULES,
    ignored=(),
    check=check,
    ranges=ranges,
    text_metadata=text_metadata,
    projector_metadata=qwen_vision.projector_metadata,
    tied_output="lm_head.weight",
    place_image=qwen_vision.place_image,
)
