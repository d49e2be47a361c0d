"""GLM-4.5V and GLM-4.6V (106B-A12B): llama.cpp's `glm4moe` with a `glm4v` projector.

The first layers have a dense FFN; all others have a shared expert beside the routed ones, which sigmoids with a bias of
their own choose. Blocks for multi-token prediction, which some checkpoints have behind the last layer, are left out: a
forward of the model gives no statistics of them, and without them the file says the same; llama.cpp cannot draft then.

llama.cpp shows the model at most 4096 tokens of an image, and pads one whose sides are no multiples of 28 with black;
transformers goes further, and stretches it. Of others both say the same in F32, but for ggml's convolutions, which take
pixels and the features that the merger joins in F16: a KL near 1e-6 on random weights.
"""

from collections.abc import Mapping
from functools import partial
from itertools import count, takewhile
from typing import Any

from gguf import ExpertGatingFuncType, Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, VisionProjectorType

from mode_gguf.architectures import qwen_vision
from mode_gguf.architectures.config import check_settings, preprocessor, section, setting
from mode_gguf.architectures.experts import expert_rules, expert_sizes
from mode_gguf.architectures.family import Metadata, ModelFamily, Ranges, TensorRule, is_tied
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.GLM4_MOE]

DENSE, SPARSE, BIASED = "dense_layer", "sparse_layer", "biased_layer"
"""Layers without experts, with them, and with biases of queries, keys and values."""

DEFAULTS: Mapping[str, Any] = {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "attention_bias": True,
}
"""transformers' own, of settings that config.json may lack."""

ROPE_DEFAULTS: Mapping[str, Any] = {
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [8, 12, 12],
}
"""The same of rotary settings."""

VISION_THETA = 10_000.0
"""Of the vision tower's rotary embedding: a constant in llama.cpp."""

MERGE = 2
"""Patches a side that a token stands for."""

FRAMES = 2
"""An image is two equal frames, and the image processor's limits count the pixels of both."""

# --- tensors ----------------------------------------------------------------------------------------------------------

_MODEL = "model.language_model"
_LAYER = f"{_MODEL}.layers.{{layer}}"
_BLOCK = "model.visual.blocks.{block}"
_MERGER = "model.visual.merger"


def _dense(source: str, name: str, only: str | None = None) -> TensorRule:
    name = f"blk.{{layer}}.{name}.weight"
    return TensorRule(f"{_LAYER}.{source}.weight", name, Role.DENSE, activation=name, only=only)


def _keep(source: str, name: str, only: str | None = None) -> TensorRule:
    return TensorRule(f"{_LAYER}.{source}", f"blk.{{layer}}.{name}", Role.KEEP, only=only)


TEXT_RULES = (
    TensorRule(f"{_MODEL}.embed_tokens.weight", "token_embd.weight", Role.EMBEDDING),
    _keep("input_layernorm.weight", "attn_norm.weight"),
    _dense("self_attn.q_proj", "attn_q"),
    _keep("self_attn.q_proj.bias", "attn_q.bias", BIASED),
    _dense("self_attn.k_proj", "attn_k"),
    _keep("self_attn.k_proj.bias", "attn_k.bias", BIASED),
    _dense("self_attn.v_proj", "attn_v"),
    _keep("self_attn.v_proj.bias", "attn_v.bias", BIASED),
    _dense("self_attn.o_proj", "attn_output"),
    _keep("post_attention_layernorm.weight", "post_attention_norm.weight"),
    _dense("mlp.gate_proj", "ffn_gate", DENSE),
    _dense("mlp.up_proj", "ffn_up", DENSE),
    _dense("mlp.down_proj", "ffn_down", DENSE),
    _keep("mlp.gate.weight", "ffn_gate_inp.weight", SPARSE),
    _keep("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", SPARSE),
    *expert_rules(_LAYER, only=SPARSE),
    _dense("mlp.shared_experts.gate_proj", "ffn_gate_shexp", SPARSE),
    _dense("mlp.shared_experts.up_proj", "ffn_up_shexp", SPARSE),
    _dense("mlp.shared_experts.down_proj", "ffn_down_shexp", SPARSE),
    TensorRule(f"{_MODEL}.norm.weight", "output_norm.weight", Role.KEEP),
    TensorRule("lm_head.weight", "output.weight", Role.OUTPUT, activation="output.weight"),
)

PROJECTOR_RULES = (
    *qwen_vision.PATCH_RULES,
    TensorRule("model.visual.embeddings.position_embedding.weight", "v.position_embd.weight", Role.KEEP),
    TensorRule("model.visual.post_conv_layernorm.weight", "v.norm_embd.weight", Role.KEEP),
    TensorRule(f"{_BLOCK}.norm1.weight", "v.blk.{block}.ln1.weight", Role.KEEP),
    TensorRule(f"{_BLOCK}.attn.qkv.weight", "v.blk.{block}.attn_qkv.weight", Role.DENSE),
    TensorRule(f"{_BLOCK}.attn.proj.weight", "v.blk.{block}.attn_out.weight", Role.DENSE),
    TensorRule(f"{_BLOCK}.norm2.weight", "v.blk.{block}.ln2.weight", Role.KEEP),
    TensorRule(f"{_BLOCK}.mlp.gate_proj.weight", "v.blk.{block}.ffn_gate.weight", Role.DENSE),
    TensorRule(f"{_BLOCK}.mlp.up_proj.weight", "v.blk.{block}.ffn_up.weight", Role.DENSE),
    TensorRule(f"{_BLOCK}.mlp.down_proj.weight", "v.blk.{block}.ffn_down.weight", Role.DENSE),
    TensorRule("model.visual.post_layernorm.weight", "v.post_ln.weight", Role.KEEP),
    TensorRule("model.visual.downsample.weight", "mm.patch_merger.weight", Role.DENSE),
    TensorRule("model.visual.downsample.bias", "mm.patch_merger.bias", Role.KEEP),
    TensorRule(f"{_MERGER}.proj.weight", "mm.model.fc.weight", Role.DENSE),
    TensorRule(f"{_MERGER}.post_projection_norm.weight", "mm.post_norm.weight", Role.KEEP),
    TensorRule(f"{_MERGER}.post_projection_norm.bias", "mm.post_norm.bias", Role.KEEP),
    TensorRule(f"{_MERGER}.gate_proj.weight", "mm.gate.weight", Role.DENSE),
    TensorRule(f"{_MERGER}.up_proj.weight", "mm.up.weight", Role.DENSE),
    TensorRule(f"{_MERGER}.down_proj.weight", "mm.down.weight", Role.DENSE),
)


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers, of each kind, and experts; vision blocks; blocks for multi-token prediction (`mtp`)."""
    text = _text(checkpoint)
    n_layers = setting(checkpoint, text, int, "num_hidden_layers")
    n_dense = setting(checkpoint, text, int, "first_k_dense_replace")
    depth = setting(checkpoint, section(checkpoint, "vision_config"), int, "depth")
    layers = [{"layer": i} for i in range(n_layers)]
    drafting = takewhile(lambda i: f"{_MODEL}.layers.{i}.eh_proj.weight" in checkpoint.tensors, count(n_layers))
    return {
        "layer": layers,
        DENSE: layers[:n_dense],
        SPARSE: layers[n_dense:],
        BIASED: layers if setting(checkpoint, text, bool, "attention_bias") else [],
        "expert": [{"expert": i} for i in range(expert_sizes(checkpoint)[0])],
        "block": [{"block": i} for i in range(depth)],
        "mtp": [{"mtp": i} for i in drafting],
    }


# --- metadata ---------------------------------------------------------------------------------------------------------


def text_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's loader reads for `glm4moe`."""
    text, rope = _text(checkpoint), _rope(checkpoint)
    experts, hidden, width = expert_sizes(checkpoint)
    head_dim = _head_dim(checkpoint)
    sections = setting(checkpoint, rope, list, "mrope_section")
    keys: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: setting(checkpoint, text, int, "num_hidden_layers"),
        Keys.LLM.CONTEXT_LENGTH: setting(checkpoint, text, int, "max_position_embeddings"),
        Keys.LLM.EMBEDDING_LENGTH: hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: setting(checkpoint, text, int, "intermediate_size"),
        Keys.LLM.LEADING_DENSE_BLOCK_COUNT: setting(checkpoint, text, int, "first_k_dense_replace"),
        Keys.Attention.HEAD_COUNT: setting(checkpoint, text, int, "num_attention_heads"),
        Keys.Attention.HEAD_COUNT_KV: setting(checkpoint, text, int, "num_key_value_heads"),
        Keys.Attention.KEY_LENGTH: head_dim,
        Keys.Attention.VALUE_LENGTH: head_dim,
        Keys.Attention.LAYERNORM_RMS_EPS: setting(checkpoint, text, float, "rms_norm_eps"),
        Keys.Rope.DIMENSION_SECTIONS: [*sections, 0, 0, 0, 0][:4],
        Keys.Rope.DIMENSION_COUNT: _rotated(checkpoint),
        Keys.Rope.FREQ_BASE: setting(checkpoint, rope, float, "rope_theta"),
        Keys.LLM.EXPERT_COUNT: experts,
        Keys.LLM.EXPERT_USED_COUNT: setting(checkpoint, text, int, "num_experts_per_tok"),
        Keys.LLM.EXPERT_GROUP_COUNT: setting(checkpoint, text, int, "n_group"),
        Keys.LLM.EXPERT_GROUP_USED_COUNT: setting(checkpoint, text, int, "topk_group"),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: width,
        Keys.LLM.EXPERT_SHARED_COUNT: setting(checkpoint, text, int, "n_shared_experts"),
        Keys.LLM.EXPERT_GATING_FUNC: int(ExpertGatingFuncType.SIGMOID),
        Keys.LLM.EXPERT_WEIGHTS_SCALE: setting(checkpoint, text, float, "routed_scaling_factor"),
        Keys.LLM.EXPERT_WEIGHTS_NORM: True,
    }
    return {key.format(arch=GGUF_ARCH): value for key, value in keys.items()}


def projector_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's mtmd reads for `glm4v`."""
    vision = section(checkpoint, "vision_config")
    prepared = preprocessor(checkpoint)
    return {
        Keys.ClipVision.PROJECTION_DIM: setting(checkpoint, section(checkpoint, "text_config"), int, "hidden_size"),
        Keys.ClipVision.IMAGE_SIZE: setting(checkpoint, vision, int, "image_size"),
        Keys.ClipVision.PATCH_SIZE: setting(checkpoint, vision, int, "patch_size"),
        Keys.ClipVision.EMBEDDING_LENGTH: setting(checkpoint, vision, int, "hidden_size"),
        Keys.ClipVision.FEED_FORWARD_LENGTH: setting(checkpoint, vision, int, "intermediate_size"),
        Keys.ClipVision.BLOCK_COUNT: setting(checkpoint, vision, int, "depth"),
        Keys.ClipVision.Attention.HEAD_COUNT: setting(checkpoint, vision, int, "num_heads"),
        Keys.ClipVision.Attention.LAYERNORM_EPS: setting(checkpoint, vision, float, "rms_norm_eps"),
        Keys.ClipVision.IMAGE_MEAN: setting(checkpoint, prepared, list, "image_mean"),
        Keys.ClipVision.IMAGE_STD: setting(checkpoint, prepared, list, "image_std"),
        Keys.ClipVision.SPATIAL_MERGE_SIZE: MERGE,
        Keys.ClipVision.USE_SILU: True,
    }


def _text(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return {**DEFAULTS, **section(checkpoint, "text_config")}


def _rope(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Rotary settings: `rope_parameters` since transformers 5, beside and in `rope_scaling` before."""
    text = section(checkpoint, "text_config")
    beside = {name: text[name] for name in ROPE_DEFAULTS if text.get(name) is not None}
    inside = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = setting(checkpoint, {"rope_parameters": inside}, dict, "rope_parameters")
    return {**ROPE_DEFAULTS, **beside, **found}


def _head_dim(checkpoint: Checkpoint) -> int:
    text = section(checkpoint, "text_config")
    if text.get("head_dim") is not None:
        return setting(checkpoint, text, int, "head_dim")
    heads = setting(checkpoint, text, int, "num_attention_heads")
    return setting(checkpoint, text, int, "hidden_size") // heads


def _rotated(checkpoint: Checkpoint) -> int:
    """Channels of a head that its position rotates."""
    return int(_head_dim(checkpoint) * setting(checkpoint, _rope(checkpoint), float, "partial_rotary_factor"))


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def check(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp's `glm4moe`, its `glm4v` projector or transformers' model has no place for.

    Raises:
        InputError: naming the setting.
    """
    text, rope, vision = _text(checkpoint), _rope(checkpoint), section(checkpoint, "vision_config")
    found_rope = setting(checkpoint, {"rope_parameters": vision.get("rope_parameters") or {}}, dict, "rope_parameters")
    vision_rope = {"rope_theta": VISION_THETA, "rope_type": "axial", **found_rope}
    hidden = setting(checkpoint, text, int, "hidden_size")
    check_settings(
        checkpoint,
        GGUF_ARCH,
        {
            "hidden_act": (text.get("hidden_act", "silu"), "silu", "always gates with silu"),
            "rope_type": (
                rope.get("rope_type", rope.get("type", "default")),
                "default",
                "export supports no other scaling",
            ),
            "vision hidden_act": (vision.get("hidden_act", "silu"), "silu", "projector is run with silu"),
            "vision attention_bias": (
                vision.get("attention_bias", False),
                False,
                "projector has no place for these biases",
            ),
            "temporal_patch_size": (vision.get("temporal_patch_size", FRAMES), FRAMES, "takes two frames at a time"),
            "spatial_merge_size": (
                vision.get("spatial_merge_size", MERGE),
                MERGE,
                "projector merges two by two patches",
            ),
            "out_hidden_size": (vision.get("out_hidden_size", 4096), hidden, "takes images as wide as its text"),
            "vision rope_type": (vision_rope["rope_type"], "axial", "projector knows no other positions"),
            "vision rope_theta": (vision_rope["rope_theta"], VISION_THETA, "projector has this base"),
        },
    )
    layers = setting(checkpoint, text, int, "num_hidden_layers")
    n_dense = setting(checkpoint, text, int, "first_k_dense_replace")
    experts = expert_sizes(checkpoint)[0]
    groups, used = setting(checkpoint, text, int, "n_group"), setting(checkpoint, text, int, "topk_group")
    sections = setting(checkpoint, rope, list, "mrope_section")
    for refused, name, expected in (
        (
            bool(text.get("use_qk_norm", False)),
            "use_qk_norm",
            "False: transformers' model has no norm of queries and keys, so calibration would run another model",
        ),
        (
            text.get("norm_topk_prob", True) is not True,
            "norm_topk_prob",
            "True: no model without has been tried",
        ),
        (not 0 <= n_dense < layers, "first_k_dense_replace", f"fewer than the {layers} layers"),
        (
            groups != 1 and not (0 < used < groups < experts and experts % groups == 0),
            "n_group",
            f"1, or a divisor of {experts} experts of which topk_group, {used}, are fewer: llama.cpp stops at others",
        ),
        (
            len(sections) > 3
            or not all(isinstance(pairs, int) for pairs in sections)
            or 2 * sum(sections) != _rotated(checkpoint),
            "mrope_section",
            f"up to three sections with {_rotated(checkpoint) // 2} pairs in all, as many as are rotated",
        ),
    ):
        if refused:
            found = {**text, **rope}[name]
            raise InputError(f"{checkpoint.path / 'config.json'}: {name} is {found!r}, expected {expected}")


def tied(checkpoint: Checkpoint) -> bool:
    """`tie_word_embeddings`, of either level: transformers takes the inner one over."""
    return is_tied(checkpoint) or bool(section(checkpoint, "text_config").get("tie_word_embeddings", False))


FAMILY = ModelFamily(
    hf_class="Glm4vMoeForConditionalGeneration",
    gguf_arch=GGUF_ARCH,
    projector_type=VisionProjectorType.GLM4V,
    text_rules=TEXT_RULES,
    projector_rules=PROJECTOR_RULES,
    ignored=(f"{_MODEL}.layers.{{mtp}}.",),
    check=check,
    ranges=ranges,
    text_metadata=text_metadata,
    projector_metadata=projector_metadata,
    tied_output="lm_head.weight",
    tied=tied,
    special_tokens={
        "bos": "[gMASK]",
        "eot": "<|user|>",
        "eom": "<|observation|>",
        "unk": "<|endoftext|>",
    },
    place_image=partial(qwen_vision.place_image, frames=FRAMES),
)
