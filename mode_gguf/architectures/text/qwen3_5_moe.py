"""The decoder of Qwen3.5-MoE: llama.cpp's `qwen35moe`.

Three layers of four mix tokens by a gated delta rule ("linear attention") instead of attention, and every layer has a
shared expert beside the routed ones. The block for multi-token prediction (`mtp.*`) is not in the model's file: a
forward gives no statistics of it, and without it the file says the same. It makes a file of its own, to draft with.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys
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
from mode_gguf.architectures.family import MtpBlock, TextModel
from mode_gguf.architectures.hparams import Hparams, text_hparams
from mode_gguf.architectures.rope import check_rope, check_sections, mrope_sections, rope_hparams, scaling_keys
from mode_gguf.architectures.rules import (
    EMBEDDING,
    LAYER,
    OUTPUT,
    ModuleRules,
    Ranges,
    TensorRule,
    View,
    refuse_shape,
    text_rules,
)
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Order, as_float32
from mode_gguf.checkpoint.folder import Checkpoint

GGUF_ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.QWEN35MOE]
RECURRENT_LAYERS = "{arch}.attention.recurrent_layers"
"""Bool per layer: linear attention; gguf has no name for it yet."""

LINEAR, FULL = "linear_attention", "full_attention"
DEFAULTS: Mapping[str, Any] = {"mtp_num_hidden_layers": 1}
ROPE_DEFAULTS: Mapping[str, Any] = {"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
"""transformers' own, of what config.json may lack."""

FULL_ATTENTION_INTERVAL = 4
"""transformers' default; a file says it only where config.json does."""

# --- transforms -------------------------------------------------------------------------------------------------------


def plus_one(checkpoint: Checkpoint, source: str) -> View:
    """An RMSNorm's weight as llama.cpp multiplies with it: transformers adds the 1 itself."""
    return View(
        checkpoint.shape(source), lambda _, rows=ALL_ROWS: as_float32(checkpoint.read(source, rows)) + np.float32(1)
    )


def value_heads(checkpoint: Checkpoint, head_dim: int) -> np.ndarray:
    """Positions of llama.cpp's value-head channels in the checkpoint.

    With more value heads than key heads, the checkpoint has those of one key head together; llama.cpp repeats the key
    heads as a whole, so it wants every key head's first value head, then every one's second.

    Args:
        head_dim: channels of a head.
    """
    text = text_hparams(checkpoint)
    n_key = text.int("linear_num_key_heads")
    n_value = text.int("linear_num_value_heads")
    return np.arange(n_value * head_dim).reshape(n_key, n_value // n_key, head_dim).swapaxes(0, 1).reshape(-1)


def value_channels(checkpoint: Checkpoint) -> np.ndarray:
    """Positions of the channels of all value heads."""
    return value_heads(checkpoint, text_hparams(checkpoint).int("linear_value_head_dim"))


def all_channels(checkpoint: Checkpoint) -> np.ndarray:
    """Positions of queries, keys and values one after the other; queries and keys stay where they are."""
    text = text_hparams(checkpoint)
    n_key = text.int("linear_num_key_heads")
    before = 2 * n_key * text.int("linear_key_head_dim")
    return np.concatenate([np.arange(before), before + value_channels(checkpoint)])


def reordered_rows(checkpoint: Checkpoint, source: str, order: Callable[[Checkpoint], np.ndarray]) -> View:
    """Rows in llama.cpp's order; a convolution (n, 1, kernel) becomes (n, kernel)."""
    shape = checkpoint.shape(source)
    rows_of = order(checkpoint)
    if shape[0] != len(rows_of):
        refuse_shape(checkpoint, source, f"{len(rows_of)} rows by the linear attention's heads")
    shape = (shape[0], *(n for n in shape[1:] if n != 1)) if len(shape) == 3 else shape

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return checkpoint.read(source, rows_of[rows]).reshape(-1, *shape[1:])

    return View(shape, read, Order(rows=rows_of))


def reordered_columns(checkpoint: Checkpoint, source: str) -> View:
    """Columns in llama.cpp's order: they read the value heads."""
    shape, columns = checkpoint.shape(source), value_channels(checkpoint)
    if shape[1:] != columns.shape:
        refuse_shape(checkpoint, source, f"{len(columns)} columns by the linear attention's heads")

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

_BY_HEAD = partial(reordered_rows, order=partial(value_heads, head_dim=1))
_BY_VALUE = partial(reordered_rows, order=value_channels)
_BY_CHANNEL = partial(reordered_rows, order=all_channels)

RULES = text_rules(
    LAYER.norm("input_layernorm", "attn_norm", transform=plus_one),
    LAYER.dense("self_attn.q_proj", "attn_q", FULL),
    LAYER.dense("self_attn.k_proj", "attn_k", FULL),
    LAYER.dense("self_attn.v_proj", "attn_v", FULL),
    LAYER.dense("self_attn.o_proj", "attn_output", FULL),
    LAYER.norm("self_attn.q_norm", "attn_q_norm", FULL, plus_one),
    LAYER.norm("self_attn.k_norm", "attn_k_norm", FULL, plus_one),
    LAYER.dense("linear_attn.in_proj_qkv", "attn_qkv", LINEAR, _BY_CHANNEL),
    LAYER.dense("linear_attn.in_proj_z", "attn_gate", LINEAR, _BY_VALUE),
    LAYER.keep("linear_attn.conv1d.weight", "ssm_conv1d.weight", LINEAR, _BY_CHANNEL),
    LAYER.keep("linear_attn.in_proj_a.weight", "ssm_alpha.weight", LINEAR, _BY_HEAD),
    LAYER.keep("linear_attn.in_proj_b.weight", "ssm_beta.weight", LINEAR, _BY_HEAD),
    LAYER.keep("linear_attn.A_log", "ssm_a", LINEAR, decay),
    LAYER.keep("linear_attn.dt_bias", "ssm_dt.bias", LINEAR, _BY_HEAD),
    LAYER.norm("linear_attn.norm", "ssm_norm", LINEAR),
    LAYER.dense("linear_attn.out_proj", "ssm_out", LINEAR, reordered_columns),
    LAYER.norm("post_attention_layernorm", "post_attention_norm", transform=plus_one),
    LAYER.keep("mlp.gate.weight", "ffn_gate_inp.weight"),
    *expert_rules(),
    LAYER.keep("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),
    *LAYER.feed_forward("mlp.shared_expert", "_shexp"),
    norm=plus_one,
)
"""Gates of one number per value head (ssm_alpha, ssm_beta) or shared expert stay F32, as routers do: 0.1 % of
the file."""


def mtp_rules(text: Hparams) -> tuple[TensorRule, ...]:
    """Embedding, last norm, head, and the block, which is a layer of full attention after the model's own."""
    block = ModuleRules("mtp", f"blk.{text.int('num_hidden_layers')}")
    of_layer = [rule for rule in RULES if rule.source.startswith(LAYER.source) and rule.only != LINEAR]
    layer = f"{block.source}.layers.0"
    return (
        EMBEDDING,
        RULES[-2],
        OUTPUT,
        *(
            replace(
                rule,
                source=rule.source.replace(LAYER.source, layer),
                name=rule.name.replace(LAYER.name, block.name),
                each=rule.each and rule.each.replace(LAYER.source, layer),
                activation=None,
                only=None,
            )
            for rule in of_layer
        ),
        block.dense("fc", "nextn.eh_proj"),
        block.norm("pre_fc_norm_embedding", "nextn.enorm", transform=plus_one),
        block.norm("pre_fc_norm_hidden", "nextn.hnorm", transform=plus_one),
        block.norm("norm", "nextn.shared_head_norm", transform=plus_one),
    )


# --- hyperparameters --------------------------------------------------------------------------------------------------


def layer_types(text: Hparams) -> list[str]:
    """`linear_attention` or `full_attention` of every layer; every `full_attention_interval`th is full by default.

    Raises:
        InputError: another kind, or not one per layer.
    """
    layers = text.int("num_hidden_layers")
    if not text.has("layer_types"):
        has_interval = text.has("full_attention_interval")
        interval = text.int("full_attention_interval") if has_interval else FULL_ATTENTION_INTERVAL
        return [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]
    types = text.list("layer_types")
    if len(types) != layers or not set(types) <= {LINEAR, FULL}:
        text.refuse("layer_types", f"{LINEAR} or {FULL} for each of {layers} layers")
    return types


def _ranges(text: Hparams) -> Ranges:
    types = layer_types(text)
    return text_ranges(
        text, {kind: [layer for layer, found in enumerate(types) if found == kind] for kind in (LINEAR, FULL)}
    )


def _rope(text: Hparams) -> Hparams:
    return rope_hparams(text, ROPE_DEFAULTS)


def _rotated(text: Hparams) -> int:
    """Channels of a head that its position rotates."""
    return int(text.int("head_dim") * _rope(text).float("partial_rotary_factor"))


def _keys(text: Hparams) -> Metadata:
    rope = _rope(text)
    head_dim, n_value = text.int("head_dim"), text.int("linear_num_value_heads")
    keys: dict[str, MetadataValue] = {
        **common_text_keys(text, *SIZES, Keys.Attention.HEAD_COUNT, Keys.Attention.HEAD_COUNT_KV),
        Keys.Attention.KEY_LENGTH: head_dim,
        Keys.Attention.VALUE_LENGTH: head_dim,
        **common_text_keys(text, Keys.Attention.LAYERNORM_RMS_EPS),
        Keys.Rope.DIMENSION_SECTIONS: mrope_sections(rope),
        Keys.Rope.DIMENSION_COUNT: _rotated(text),
        Keys.Rope.FREQ_BASE: rope.float("rope_theta"),
        **scaling_keys(rope),
        **common_text_keys(text, *EXPERTS),
        Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: text.int("shared_expert_intermediate_size"),
        Keys.SSM.CONV_KERNEL: text.int("linear_conv_kernel_dim"),
        Keys.SSM.STATE_SIZE: text.int("linear_key_head_dim"),
        Keys.SSM.GROUP_COUNT: text.int("linear_num_key_heads"),
        Keys.SSM.TIME_STEP_RANK: n_value,
        Keys.SSM.INNER_SIZE: n_value * text.int("linear_value_head_dim"),
    }
    if text.get("full_attention_interval"):  # what llama.cpp read before it had a key with all layers
        keys[Keys.LLM.FULL_ATTENTION_INTERVAL] = text.int("full_attention_interval")
    return {**keys, RECURRENT_LAYERS: [kind == LINEAR for kind in layer_types(text)]}


def _mtp_keys(text: Hparams) -> Metadata:
    """The text model's keys with the block counted as a further layer."""
    blocks = text.int("mtp_num_hidden_layers")
    if blocks != 1:
        text.refuse("mtp_num_hidden_layers", f"1: llama.cpp's {GGUF_ARCH} drafts with one block")
    return {
        **_keys(text),
        Keys.LLM.BLOCK_COUNT: text.int("num_hidden_layers") + blocks,
        Keys.LLM.NEXTN_PREDICT_LAYERS: blocks,
        RECURRENT_LAYERS: [*(kind == LINEAR for kind in layer_types(text)), False],
    }


def _check(text: Hparams) -> None:
    """Refuse hyperparameters that llama.cpp's `qwen35moe` has no place for."""
    text.expect("norm_topk_prob", True, "always renormalises the weights of the top-k")
    text.expect("hidden_act", "silu", "always gates with silu")
    text.expect("attention_bias", False, "has no attention biases")
    text.expect("attn_output_gate", True, "always gates attention's output")
    check_rope(text, _rope(text))
    check_sections(_rope(text), _rotated(text), interleaved=True)
    key_dim, n_key = text.int("linear_key_head_dim"), text.int("linear_num_key_heads")
    text.expect("linear_value_head_dim", key_dim, "has keys and values of one size", default=None)
    if n_key < 1 or text.int("linear_num_value_heads") % n_key:
        text.refuse("linear_num_value_heads", f"a multiple of linear_num_key_heads, {n_key}")
    layer_types(text)


TEXT_MODEL = TextModel(
    GGUF_ARCH,
    hparams=partial(text_hparams, defaults=DEFAULTS, reader=GGUF_ARCH),
    rules=RULES,
    keys=_keys,
    check=_check,
    ranges=_ranges,
    mtp=MtpBlock(mtp_rules, _mtp_keys),
)
