"""Qwen3-VL-MoE (30B-A3B, 235B-A22B): llama.cpp's `qwen3vlmoe` with a `qwen3vl_merger` projector.

H is the hidden size, I the width of an expert, E their number.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, VisionProjectorType

from mode_gguf.architectures.config import section, setting
from mode_gguf.architectures.family import Metadata, ModelFamily, TensorRule, View
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role, transposed
from mode_gguf.checkpoint import Checkpoint, Index, read_json
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3VLMOE]
LAYER_NORM_EPSILON = 1e-6
"""Of every LayerNorm of the vision tower: a constant in transformers' model, not a setting."""

Projection = Literal["gate", "up", "down"]


# --- transforms -------------------------------------------------------------------------------------------------------


def fused_experts(checkpoint: Checkpoint, source: str, projection: Projection) -> View:
    """One projection of the fused experts as (E, rows, n_in), whichever way the checkpoint lays them out.

    Checkpoints on the hubs store `x @ W`: gate_up_proj (E, H, 2I) and down_proj (E, I, H). A re-save by
    transformers 5 stores `W @ x`: (E, 2I, H) and (E, H, I). Gate is the first half of 2I.

    Raises:
        InputError: the shape is neither, or both and the configuration does not say who saved it.
    """
    experts, hidden, width = expert_sizes(checkpoint)
    rows, n_in = (hidden, width) if projection == "down" else (2 * width, hidden)
    shape = checkpoint.shape(source)
    swapped = shape == (experts, n_in, rows)
    if not swapped and shape != (experts, rows, n_in):
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected {[experts, n_in, rows]} or "
            f"{[experts, rows, n_in]}; use the config.json published with these weights"
        )
    if rows == n_in:
        swapped = not _saved_by_transformers_5(checkpoint, source)
    first = width if projection == "up" else 0
    last = rows if projection == "down" else first + width

    def read(expert: int, rows: slice = ALL_ROWS) -> Array:
        start, end, _ = rows.indices(last - first)
        chosen = slice(first + start, first + end)
        index: Index = (expert, slice(None), chosen) if swapped else (expert, chosen)
        matrix = checkpoint.read(source, index)
        return transposed(matrix) if swapped else matrix

    return (experts, last - first, n_in), read


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


def time_slice(checkpoint: Checkpoint, source: str, index: int) -> View:
    """One of the two time steps of the patch convolution: (n, 3, 2, p, p) -> (n, 3, p, p)."""
    shape = checkpoint.shape(source)
    if len(shape) != 5 or shape[2] != 2:
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected two time steps, "
            "[n, 3, 2, patch, patch]; llama.cpp can run no other number"
        )
    return shape[:2] + shape[3:], lambda _, rows=ALL_ROWS: checkpoint.read(source, (rows, slice(None), index))


# --- tensors ----------------------------------------------------------------------------------------------------------

_LAYER = "model.language_model.layers.{layer}"
_BLOCK = "model.visual.blocks.{block}"
_MERGER = "model.visual.deepstack_merger_list.{merger}"


def _linear(source: str, name: str) -> tuple[TensorRule, ...]:
    """Weight and bias of a linear layer of the projector."""
    return (
        TensorRule(f"{source}.weight", f"{name}.weight", Role.DENSE),
        TensorRule(f"{source}.bias", f"{name}.bias", Role.KEEP),
    )


def _norm(source: str, name: str) -> tuple[TensorRule, ...]:
    """Weight and bias of a LayerNorm of the projector."""
    return (
        TensorRule(f"{source}.weight", f"{name}.weight", Role.KEEP),
        TensorRule(f"{source}.bias", f"{name}.bias", Role.KEEP),
    )


def _attention(source: str, name: str) -> TensorRule:
    name = f"blk.{{layer}}.{name}.weight"
    return TensorRule(f"{_LAYER}.self_attn.{source}.weight", name, Role.DENSE, activation=name)


def _experts(source: str, projection: Projection, activation: str) -> TensorRule:
    return TensorRule(
        source=f"{_LAYER}.mlp.experts.{source}",
        name=f"blk.{{layer}}.ffn_{projection}_exps.weight",
        role=Role.EXPERT,
        transform=partial(fused_experts, projection=projection),
        projection=projection,
        activation=f"blk.{{layer}}.ffn_exps.{activation}",
    )


TEXT_RULES = (
    TensorRule("model.language_model.embed_tokens.weight", "token_embd.weight", Role.EMBEDDING),
    TensorRule(f"{_LAYER}.input_layernorm.weight", "blk.{layer}.attn_norm.weight", Role.KEEP),
    _attention("q_proj", "attn_q"),
    _attention("k_proj", "attn_k"),
    _attention("v_proj", "attn_v"),
    _attention("o_proj", "attn_output"),
    TensorRule(f"{_LAYER}.self_attn.q_norm.weight", "blk.{layer}.attn_q_norm.weight", Role.KEEP),
    TensorRule(f"{_LAYER}.self_attn.k_norm.weight", "blk.{layer}.attn_k_norm.weight", Role.KEEP),
    TensorRule(f"{_LAYER}.post_attention_layernorm.weight", "blk.{layer}.ffn_norm.weight", Role.KEEP),
    TensorRule(f"{_LAYER}.mlp.gate.weight", "blk.{layer}.ffn_gate_inp.weight", Role.KEEP),
    _experts("gate_up_proj", "gate", "input"),
    _experts("gate_up_proj", "up", "input"),
    _experts("down_proj", "down", "hidden"),
    TensorRule("model.language_model.norm.weight", "output_norm.weight", Role.KEEP),
    TensorRule("lm_head.weight", "output.weight", Role.OUTPUT, activation="output.weight"),
)

PROJECTOR_RULES = (
    TensorRule("model.visual.patch_embed.proj.weight", "v.patch_embd.weight", Role.DENSE, partial(time_slice, index=0)),
    TensorRule(
        "model.visual.patch_embed.proj.weight", "v.patch_embd.weight.1", Role.DENSE, partial(time_slice, index=1)
    ),
    TensorRule("model.visual.patch_embed.proj.bias", "v.patch_embd.bias", Role.KEEP),
    TensorRule("model.visual.pos_embed.weight", "v.position_embd.weight", Role.KEEP),
    *_norm(f"{_BLOCK}.norm1", "v.blk.{block}.ln1"),
    *_linear(f"{_BLOCK}.attn.qkv", "v.blk.{block}.attn_qkv"),
    *_linear(f"{_BLOCK}.attn.proj", "v.blk.{block}.attn_out"),
    *_norm(f"{_BLOCK}.norm2", "v.blk.{block}.ln2"),
    *_linear(f"{_BLOCK}.mlp.linear_fc1", "v.blk.{block}.ffn_up"),
    *_linear(f"{_BLOCK}.mlp.linear_fc2", "v.blk.{block}.ffn_down"),
    *_norm(f"{_MERGER}.norm", "v.deepstack.{tap}.norm"),
    *_linear(f"{_MERGER}.linear_fc1", "v.deepstack.{tap}.fc1"),
    *_linear(f"{_MERGER}.linear_fc2", "v.deepstack.{tap}.fc2"),
    *_norm("model.visual.merger.norm", "v.post_ln"),
    *_linear("model.visual.merger.linear_fc1", "mm.0"),
    *_linear("model.visual.merger.linear_fc2", "mm.2"),
)


def ranges(checkpoint: Checkpoint) -> Mapping[str, Sequence[Mapping[str, int]]]:
    """Decoder layers, vision blocks, and DeepStack mergers; merger i takes the output of vision block `tap`."""
    text, vision = section(checkpoint, "text_config"), section(checkpoint, "vision_config")
    return {
        "layer": [{"layer": i} for i in range(setting(checkpoint, text, int, "num_hidden_layers"))],
        "block": [{"block": i} for i in range(setting(checkpoint, vision, int, "depth"))],
        "merger": [{"merger": i, "tap": tap} for i, tap in enumerate(_deepstack_taps(checkpoint))],
    }


def expert_sizes(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """E, H, I."""
    text = section(checkpoint, "text_config")
    return (
        setting(checkpoint, text, int, "num_experts", "num_local_experts"),
        setting(checkpoint, text, int, "hidden_size"),
        setting(checkpoint, text, int, "moe_intermediate_size"),
    )


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
        Keys.LLM.NUM_DEEPSTACK_LAYERS: len(_deepstack_taps(checkpoint)),
    }
    return {key.format(arch=GGUF_ARCH): value for key, value in keys.items()}


def projector_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's mtmd reads for `qwen3vl_merger`."""
    vision = section(checkpoint, "vision_config")
    preprocessor = _preprocessor(checkpoint)
    depth = setting(checkpoint, vision, int, "depth")
    patch_size = setting(checkpoint, vision, int, "patch_size")
    positions = setting(checkpoint, vision, int, "num_position_embeddings")
    taps = _deepstack_taps(checkpoint)
    return {
        Keys.ClipVision.PROJECTION_DIM: expert_sizes(checkpoint)[1],
        Keys.ClipVision.IMAGE_SIZE: round(positions**0.5) * patch_size,
        Keys.ClipVision.PATCH_SIZE: patch_size,
        Keys.ClipVision.EMBEDDING_LENGTH: setting(checkpoint, vision, int, "hidden_size"),
        Keys.ClipVision.FEED_FORWARD_LENGTH: setting(checkpoint, vision, int, "intermediate_size"),
        Keys.ClipVision.BLOCK_COUNT: depth,
        Keys.ClipVision.Attention.HEAD_COUNT: setting(checkpoint, vision, int, "num_heads"),
        Keys.ClipVision.Attention.LAYERNORM_EPS: LAYER_NORM_EPSILON,
        Keys.ClipVision.IMAGE_MEAN: setting(checkpoint, preprocessor, list, "image_mean"),
        Keys.ClipVision.IMAGE_STD: setting(checkpoint, preprocessor, list, "image_std"),
        Keys.ClipVision.SPATIAL_MERGE_SIZE: setting(checkpoint, vision, int, "spatial_merge_size"),
        Keys.ClipVision.IS_DEEPSTACK_LAYERS: [block in taps for block in range(depth)],
        Keys.ClipVision.USE_GELU: True,
    }


def _preprocessor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """preprocessor_config.json, or its place in the processor_config.json that transformers 5 writes."""
    old, new = checkpoint.path / "preprocessor_config.json", checkpoint.path / "processor_config.json"
    if old.exists() or not new.exists():
        return read_json(old)
    value = read_json(new).get("image_processor")
    if not isinstance(value, dict):
        raise InputError(f"{new}: expected an object image_processor, found {value!r}; download it again")
    return value


def _deepstack_taps(checkpoint: Checkpoint) -> list[int]:
    return list(setting(checkpoint, section(checkpoint, "vision_config"), list, "deepstack_visual_indexes"))


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
    text, vision = section(checkpoint, "text_config"), section(checkpoint, "vision_config")
    layers = setting(checkpoint, text, int, "num_hidden_layers")
    expected = {
        "norm_topk_prob": (text.get("norm_topk_prob", True), True, "always renormalises the weights of the top-k"),
        "hidden_act": (text.get("hidden_act", "silu"), "silu", "always gates with silu"),
        "attention_bias": (text.get("attention_bias", False), False, "has no attention biases"),
        "mlp_only_layers": (text.get("mlp_only_layers") or [], [], "has experts in every layer"),
        "decoder_sparse_step": (text.get("decoder_sparse_step", 1), 1, "has experts in every layer"),
        "rope_type": (_rope(checkpoint).get("rope_type", "default"), "default", "export supports no other scaling"),
        "vision hidden_act": (vision.get("hidden_act"), "gelu_pytorch_tanh", "uses this activation"),
        "temporal_patch_size": (vision.get("temporal_patch_size", 2), 2, "takes two frames at a time"),
    }
    for name, (found, wanted, reason) in expected.items():
        if found != wanted:
            raise InputError(
                f"{checkpoint.path / 'config.json'}: {name} is {found!r}, expected {wanted!r}: llama.cpp's "
                f"{GGUF_ARCH} {reason}; the file would not compute what the checkpoint does"
            )
    taps = _deepstack_taps(checkpoint)
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
    projector_rules=PROJECTOR_RULES,
    ignored=frozenset(),
    image_token_key="image_token_id",
    check=check,
    ranges=ranges,
    text_metadata=text_metadata,
    projector_metadata=projector_metadata,
    tied_output="lm_head.weight",
)
