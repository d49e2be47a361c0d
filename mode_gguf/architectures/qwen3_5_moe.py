"""Qwen3.5-MoE and Qwen3.6-MoE (35B-A3B, 122B-A10B, 397B-A17B): llama.cpp's `qwen35moe` with a `qwen3vl_merger`.

Three layers of four mix tokens by a gated delta rule ("linear attention") instead of attention, and every layer has a
shared expert beside the routed ones. The block for multi-token prediction (`mtp.*`) is not in the model's file: a
forward gives no statistics of it, and without it the file says the same. It makes a file of its own, to draft with.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, VisionProjectorType

from mode_gguf.architectures import qwen_vision
from mode_gguf.architectures.config import check_settings, section, setting
from mode_gguf.architectures.experts import expert_rules, expert_sizes
from mode_gguf.architectures.family import Metadata, ModelFamily, Ranges, TensorRule, Transform, View, as_stored
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Order, Role, as_float32
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.QWEN35MOE]
RECURRENT_LAYERS = f"{GGUF_ARCH}.attention.recurrent_layers"
"""Bool per layer: linear attention; gguf has no name for it yet."""

LINEAR, FULL = "linear_attention", "full_attention"
MROPE_SECTION = [11, 11, 10]
"""transformers' default."""
PARTIAL_ROTARY_FACTOR = 0.25
"""transformers' default."""

# --- transforms -------------------------------------------------------------------------------------------------------


def plus_one(checkpoint: Checkpoint, source: str) -> View:
    """An RMSNorm's weight as llama.cpp multiplies with it: transformers adds the 1 itself."""
    return View(
        checkpoint.shape(source), lambda _, rows=ALL_ROWS: as_float32(checkpoint.read(source, rows)) + np.float32(1)
    )


def value_heads(checkpoint: Checkpoint, head_dim: int) -> np.ndarray:
    """Where llama.cpp's value-head channels are in the checkpoint's.

    With more value heads than key heads, the checkpoint has those of one key head together; llama.cpp repeats the key
    heads as a whole, so it wants every key head's first value head, then every one's second.

    Args:
        head_dim: channels of a head.
    """
    text = section(checkpoint, "text_config")
    n_key = setting(checkpoint, text, int, "linear_num_key_heads")
    n_value = setting(checkpoint, text, int, "linear_num_value_heads")
    return np.arange(n_value * head_dim).reshape(n_key, n_value // n_key, head_dim).swapaxes(0, 1).reshape(-1)


def value_channels(checkpoint: Checkpoint) -> np.ndarray:
    """`value_heads` with all channels of the heads."""
    text = section(checkpoint, "text_config")
    return value_heads(checkpoint, setting(checkpoint, text, int, "linear_value_head_dim"))


def all_channels(checkpoint: Checkpoint) -> np.ndarray:
    """The same of queries, keys and values one after the other; queries and keys stay where they are."""
    text = section(checkpoint, "text_config")
    n_key = setting(checkpoint, text, int, "linear_num_key_heads")
    before = 2 * n_key * setting(checkpoint, text, int, "linear_key_head_dim")
    return np.concatenate([np.arange(before), before + value_channels(checkpoint)])


def reordered_rows(checkpoint: Checkpoint, source: str, order: Callable[[Checkpoint], np.ndarray]) -> View:
    """Rows in llama.cpp's order; a convolution (n, 1, kernel) becomes (n, kernel)."""
    shape = checkpoint.shape(source)
    rows_of = order(checkpoint)
    if shape[0] != len(rows_of):
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected {len(rows_of)} rows by the "
            "linear attention's heads in config.json; use the configuration published with the model"
        )
    shape = (shape[0], *(n for n in shape[1:] if n != 1)) if len(shape) == 3 else shape

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return checkpoint.read(source, rows_of[rows]).reshape(-1, *shape[1:])

    return View(shape, read, Order(rows=rows_of))


def reordered_columns(checkpoint: Checkpoint, source: str) -> View:
    """Columns in llama.cpp's order: they read the value heads."""
    shape, columns = checkpoint.shape(source), value_channels(checkpoint)
    if shape[1:] != columns.shape:
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(shape)}, expected {len(columns)} columns by the "
            "linear attention's heads in config.json; use the configuration published with the model"
        )

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return np.ascontiguousarray(checkpoint.read(source, rows)[:, columns])

    return View(shape, read, Order(columns=columns))


def decay(checkpoint: Checkpoint, source: str) -> View:
    """A of the delta rule, of which the checkpoint has the logarithm of the negative; rounded correctly."""
    view = reordered_rows(checkpoint, source, partial(value_heads, head_dim=1))

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        rounded: Array = -np.exp(as_float32(view.read(0, rows)).astype(np.float64)).astype(np.float32)
        return rounded

    return View(view.shape, read, view.order)


# --- tensors ----------------------------------------------------------------------------------------------------------

_LAYER = "model.language_model.layers.{layer}"
_MTP_LAYER = "mtp.layers.0"


def _dense(source: str, name: str, only: str | None = None, transform: Transform = as_stored) -> TensorRule:
    name = f"blk.{{layer}}.{name}.weight"
    return TensorRule(f"{_LAYER}.{source}.weight", name, Role.DENSE, transform, activation=name, only=only)


def _keep(source: str, name: str, only: str | None = None, transform: Transform = as_stored) -> TensorRule:
    return TensorRule(f"{_LAYER}.{source}", f"blk.{{layer}}.{name}", Role.KEEP, transform, only=only)


_BY_HEAD = partial(reordered_rows, order=partial(value_heads, head_dim=1))
_BY_VALUE = partial(reordered_rows, order=value_channels)
_BY_CHANNEL = partial(reordered_rows, order=all_channels)

_EMBEDDING = TensorRule("model.language_model.embed_tokens.weight", "token_embd.weight", Role.EMBEDDING)
_NORM = TensorRule("model.language_model.norm.weight", "output_norm.weight", Role.KEEP, plus_one)
_HEAD = TensorRule("lm_head.weight", "output.weight", Role.OUTPUT, activation="output.weight")

TEXT_RULES = (
    _EMBEDDING,
    _keep("input_layernorm.weight", "attn_norm.weight", transform=plus_one),
    _dense("self_attn.q_proj", "attn_q", FULL),
    _dense("self_attn.k_proj", "attn_k", FULL),
    _dense("self_attn.v_proj", "attn_v", FULL),
    _dense("self_attn.o_proj", "attn_output", FULL),
    _keep("self_attn.q_norm.weight", "attn_q_norm.weight", FULL, plus_one),
    _keep("self_attn.k_norm.weight", "attn_k_norm.weight", FULL, plus_one),
    _dense("linear_attn.in_proj_qkv", "attn_qkv", LINEAR, _BY_CHANNEL),
    _dense("linear_attn.in_proj_z", "attn_gate", LINEAR, _BY_VALUE),
    _keep("linear_attn.conv1d.weight", "ssm_conv1d.weight", LINEAR, _BY_CHANNEL),
    _keep("linear_attn.in_proj_a.weight", "ssm_alpha.weight", LINEAR, _BY_HEAD),
    _keep("linear_attn.in_proj_b.weight", "ssm_beta.weight", LINEAR, _BY_HEAD),
    _keep("linear_attn.A_log", "ssm_a", LINEAR, decay),
    _keep("linear_attn.dt_bias", "ssm_dt.bias", LINEAR, _BY_HEAD),
    _keep("linear_attn.norm.weight", "ssm_norm.weight", LINEAR),
    _dense("linear_attn.out_proj", "ssm_out", LINEAR, reordered_columns),
    _keep("post_attention_layernorm.weight", "post_attention_norm.weight", transform=plus_one),
    _keep("mlp.gate.weight", "ffn_gate_inp.weight"),
    *expert_rules(_LAYER),
    _keep("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),
    _dense("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    _dense("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    _dense("mlp.shared_expert.down_proj", "ffn_down_shexp"),
    _NORM,
    _HEAD,
)
"""Gates of one number per value head (ssm_alpha, ssm_beta) or shared expert stay F32, as routers do: 0.1 % of
the file."""


def mtp_rules(checkpoint: Checkpoint) -> tuple[TensorRule, ...]:
    """Embedding, head and the block, which is a layer of full attention after the model's own."""
    block = f"blk.{_layers(checkpoint)}"
    in_block = [rule for rule in TEXT_RULES if rule.source.startswith(_LAYER) and rule.only != LINEAR]

    def norm(source: str, name: str) -> TensorRule:
        return TensorRule(f"mtp.{source}.weight", f"{block}.nextn.{name}.weight", Role.KEEP, plus_one)

    return (
        _EMBEDDING,
        _NORM,
        _HEAD,
        *(
            replace(
                rule,
                source=rule.source.replace(_LAYER, _MTP_LAYER),
                name=rule.name.replace("blk.{layer}", block),
                each=rule.each and rule.each.replace(_LAYER, _MTP_LAYER),
                activation=None,
                only=None,
            )
            for rule in in_block
        ),
        TensorRule("mtp.fc.weight", f"{block}.nextn.eh_proj.weight", Role.DENSE),
        norm("pre_fc_norm_embedding", "enorm"),
        norm("pre_fc_norm_hidden", "hnorm"),
        norm("norm", "shared_head_norm"),
    )


def _layers(checkpoint: Checkpoint) -> int:
    return setting(checkpoint, section(checkpoint, "text_config"), int, "num_hidden_layers")


def layer_types(checkpoint: Checkpoint) -> list[str]:
    """`linear_attention` or `full_attention` of every layer; every `full_attention_interval`th is full by default.

    Raises:
        InputError: another kind, or not one per layer.
    """
    text = section(checkpoint, "text_config")
    layers = setting(checkpoint, text, int, "num_hidden_layers")
    if text.get("layer_types") is None:
        interval = setting(checkpoint, {"full_attention_interval": 4, **text}, int, "full_attention_interval")
        return [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]
    kinds = setting(checkpoint, text, list, "layer_types")
    if len(kinds) != layers or not set(kinds) <= {LINEAR, FULL}:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: layer_types is {kinds!r}, expected {LINEAR} or {FULL} for each of "
            f"{layers} layers; use the configuration published with the model"
        )
    return kinds


def ranges(checkpoint: Checkpoint) -> Ranges:
    """Decoder layers, of each kind, and experts; vision blocks."""
    kinds = layer_types(checkpoint)
    return {
        "layer": [{"layer": i} for i in range(len(kinds))],
        LINEAR: [{"layer": i} for i, kind in enumerate(kinds) if kind == LINEAR],
        FULL: [{"layer": i} for i, kind in enumerate(kinds) if kind == FULL],
        "expert": [{"expert": i} for i in range(expert_sizes(checkpoint)[0])],
        **qwen_vision.ranges(checkpoint),
    }


# --- metadata ---------------------------------------------------------------------------------------------------------


def text_metadata(checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp's loader reads for `qwen35moe`."""
    text = section(checkpoint, "text_config")
    rope = setting(checkpoint, text, dict, "rope_parameters")
    experts, hidden, width = expert_sizes(checkpoint)
    head_dim = setting(checkpoint, text, int, "head_dim")
    n_value = setting(checkpoint, text, int, "linear_num_value_heads")
    rotary = {"partial_rotary_factor": PARTIAL_ROTARY_FACTOR, "mrope_section": MROPE_SECTION, **rope}
    sections = setting(checkpoint, rotary, list, "mrope_section")
    keys: dict[str, Any] = {
        Keys.LLM.BLOCK_COUNT: setting(checkpoint, text, int, "num_hidden_layers"),
        Keys.LLM.CONTEXT_LENGTH: setting(checkpoint, text, int, "max_position_embeddings"),
        Keys.LLM.EMBEDDING_LENGTH: hidden,
        Keys.Attention.HEAD_COUNT: setting(checkpoint, text, int, "num_attention_heads"),
        Keys.Attention.HEAD_COUNT_KV: setting(checkpoint, text, int, "num_key_value_heads"),
        Keys.Attention.KEY_LENGTH: head_dim,
        Keys.Attention.VALUE_LENGTH: head_dim,
        Keys.Attention.LAYERNORM_RMS_EPS: setting(checkpoint, text, float, "rms_norm_eps"),
        Keys.Rope.DIMENSION_SECTIONS: [*sections, 0, 0, 0, 0][:4],
        Keys.Rope.DIMENSION_COUNT: int(head_dim * setting(checkpoint, rotary, float, "partial_rotary_factor")),
        Keys.Rope.FREQ_BASE: setting(checkpoint, rope, float, "rope_theta"),
        Keys.LLM.EXPERT_COUNT: experts,
        Keys.LLM.EXPERT_USED_COUNT: setting(checkpoint, text, int, "num_experts_per_tok"),
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: width,
        Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: setting(checkpoint, text, int, "shared_expert_intermediate_size"),
        Keys.SSM.CONV_KERNEL: setting(checkpoint, text, int, "linear_conv_kernel_dim"),
        Keys.SSM.STATE_SIZE: setting(checkpoint, text, int, "linear_key_head_dim"),
        Keys.SSM.GROUP_COUNT: setting(checkpoint, text, int, "linear_num_key_heads"),
        Keys.SSM.TIME_STEP_RANK: n_value,
        Keys.SSM.INNER_SIZE: n_value * setting(checkpoint, text, int, "linear_value_head_dim"),
    }
    if text.get("full_attention_interval"):  # what llama.cpp read before it had a key with all layers
        keys[Keys.LLM.FULL_ATTENTION_INTERVAL] = setting(checkpoint, text, int, "full_attention_interval")
    metadata: dict[str, Any] = {key.format(arch=GGUF_ARCH): value for key, value in keys.items()}
    return {**metadata, RECURRENT_LAYERS: [kind == LINEAR for kind in layer_types(checkpoint)]}


def mtp_metadata(checkpoint: Checkpoint) -> Metadata:
    """The same with the block counted as a further layer."""
    text = section(checkpoint, "text_config")
    blocks = setting(checkpoint, {"mtp_num_hidden_layers": 1, **text}, int, "mtp_num_hidden_layers")
    if blocks != 1:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: mtp_num_hidden_layers is {blocks}, expected 1: llama.cpp's "
            f"{GGUF_ARCH} drafts with one block"
        )
    return {
        **text_metadata(checkpoint),
        Keys.LLM.BLOCK_COUNT.format(arch=GGUF_ARCH): _layers(checkpoint) + blocks,
        Keys.LLM.NEXTN_PREDICT_LAYERS.format(arch=GGUF_ARCH): blocks,
        RECURRENT_LAYERS: [*(kind == LINEAR for kind in layer_types(checkpoint)), False],
    }


# --- what llama.cpp would run differently -----------------------------------------------------------------------------


def check(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp's `qwen35moe` has no place for.

    Raises:
        InputError: naming the setting.
    """
    text = section(checkpoint, "text_config")
    rope = setting(checkpoint, text, dict, "rope_parameters")
    key_dim = setting(checkpoint, text, int, "linear_key_head_dim")
    n_key = setting(checkpoint, text, int, "linear_num_key_heads")
    n_value = setting(checkpoint, text, int, "linear_num_value_heads")
    check_settings(
        checkpoint,
        GGUF_ARCH,
        {
            "norm_topk_prob": (text.get("norm_topk_prob", True), True, "always renormalises the weights of the top-k"),
            "hidden_act": (text.get("hidden_act", "silu"), "silu", "always gates with silu"),
            "attention_bias": (text.get("attention_bias", False), False, "has no attention biases"),
            "attn_output_gate": (text.get("attn_output_gate", True), True, "always gates attention's output"),
            "rope_type": (rope.get("rope_type", "default"), "default", "export supports no other scaling"),
            "linear_value_head_dim": (text.get("linear_value_head_dim"), key_dim, "has keys and values of one size"),
            **qwen_vision.expected(checkpoint),
        },
    )
    if n_key < 1 or n_value % n_key:
        raise InputError(
            f"{checkpoint.path / 'config.json'}: linear_num_value_heads is {n_value}, expected a multiple of "
            f"linear_num_key_heads, {n_key}; use the configuration published with the model"
        )
    layer_types(checkpoint)


FAMILY = ModelFamily(
    hf_class="Qwen3_5MoeForConditionalGeneration",
    gguf_arch=GGUF_ARCH,
    projector_type=VisionProjectorType.QWEN3VL,
    text_rules=TEXT_RULES,
    projector_rules=qwen_vision.PROJECTOR_RULES,
    ignored=("mtp.",),
    check=check,
    ranges=ranges,
    text_metadata=text_metadata,
    projector_metadata=qwen_vision.projector_metadata,
    tied_output="lm_head.weight",
    place_image=qwen_vision.place_image,
    mtp_rules=mtp_rules,
    mtp_metadata=mtp_metadata,
)
