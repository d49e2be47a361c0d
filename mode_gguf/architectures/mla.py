"""Multi-head latent attention, as DeepSeek-V2/V3, Kimi and Mistral 4 have it and llama.cpp's `deepseek2` runs it.

Keys and values of all heads come from one latent vector per token. The checkpoint expands it with kv_b_proj; llama.cpp
multiplies the query of each head with the key half of that matrix instead, and the latent sum that attention gives with
the value half, so that its cache holds latent vectors only. It wants the two halves apart: attn_k_b (heads, latent,
nope), transposed, and attn_v_b (heads, v, latent). What they are multiplied with is nowhere in transformers' forward,
so that there are no statistics of it: they have the role `ABSORBED` and one type, whatever the plan
(`allocation.units`). They hold 0.35 % of Kimi-VL-A3B's weights, and 0.05 % of Kimi K2.5's and Mistral Small 4's.

Rotated channels lie in pairs, in the checkpoints as in llama.cpp: nothing is permuted.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from gguf import Keys

from mode_gguf.architectures.config import section, setting
from mode_gguf.architectures.family import Metadata, Ranges, TensorRule, Values, View
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.errors import InputError

FULL_QUERY, LOW_RANK_QUERY = "full_query", "low_rank_query"
"""Subsets of the layers: queries from one matrix, or from two with a norm between them."""

ABSORBED_PARTS = ("attn_k_b", "attn_v_b")
"""What GGUF calls the halves of kv_b_proj."""


def absorbed_keys(checkpoint: Checkpoint, source: str) -> View:
    """The key half of kv_b_proj, (heads, latent, nope): each head's rows of it, transposed."""
    heads, nope, _, latent = _checked_sizes(checkpoint, source)

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return np.ascontiguousarray(_read_heads(checkpoint, source, rows)[:, :nope].swapaxes(1, 2))

    return View((heads, latent, nope), read)


def absorbed_values(checkpoint: Checkpoint, source: str) -> View:
    """The value half of kv_b_proj, (heads, v, latent)."""
    heads, nope, value, latent = _checked_sizes(checkpoint, source)

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return np.ascontiguousarray(_read_heads(checkpoint, source, rows)[:, nope:])

    return View((heads, value, latent), read)


def attention_rules(layer: str) -> tuple[TensorRule, ...]:
    """Latent attention of `layer`, a checkpoint's name for a decoder layer, from its queries to its output."""

    def dense(source: str, name: str, only: str | None = None) -> TensorRule:
        name = f"blk.{{layer}}.{name}.weight"
        return TensorRule(f"{layer}.self_attn.{source}.weight", name, Role.DENSE, activation=name, only=only)

    def norm(source: str, name: str, only: str | None = None) -> TensorRule:
        name = f"blk.{{layer}}.{name}.weight"
        return TensorRule(f"{layer}.self_attn.{source}.weight", name, Role.KEEP, only=only)

    both = f"{layer}.self_attn.kv_b_proj.weight"
    return (
        dense("q_proj", "attn_q", FULL_QUERY),
        dense("q_a_proj", "attn_q_a", LOW_RANK_QUERY),
        norm("q_a_layernorm", "attn_q_a_norm", LOW_RANK_QUERY),
        dense("q_b_proj", "attn_q_b", LOW_RANK_QUERY),
        dense("kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        norm("kv_a_layernorm", "attn_kv_a_norm"),
        TensorRule(both, "blk.{layer}.attn_k_b.weight", Role.ABSORBED, absorbed_keys),
        TensorRule(both, "blk.{layer}.attn_v_b.weight", Role.ABSORBED, absorbed_values),
        dense("o_proj", "attn_output"),
    )


def query_ranges(checkpoint: Checkpoint, layers: Sequence[Values]) -> Ranges:
    """Which of `layers` each kind of query is in."""
    low_rank = section(checkpoint, "text_config").get("q_lora_rank") is not None
    return {LOW_RANK_QUERY: layers if low_rank else [], FULL_QUERY: [] if low_rank else layers}


def attention_metadata(checkpoint: Checkpoint, gguf_arch: str) -> Metadata:
    """Heads and sizes, as llama.cpp's `deepseek2` and its relatives read them: one KV head, the latent vector."""
    text = section(checkpoint, "text_config")
    number = partial(setting, checkpoint, text, int)
    latent, rotated, nope = number("kv_lora_rank"), number("qk_rope_head_dim"), number("qk_nope_head_dim")
    keys: dict[str, Any] = {
        Keys.Attention.HEAD_COUNT: number("num_attention_heads"),
        Keys.Attention.HEAD_COUNT_KV: 1,
        Keys.Attention.KV_LORA_RANK: latent,
        Keys.Attention.KEY_LENGTH: latent + rotated,
        Keys.Attention.VALUE_LENGTH: latent,
        Keys.Attention.KEY_LENGTH_MLA: nope + rotated,
        Keys.Attention.VALUE_LENGTH_MLA: number("v_head_dim"),
        Keys.Rope.DIMENSION_COUNT: rotated,
    }
    if text.get("q_lora_rank") is not None:
        keys[Keys.Attention.Q_LORA_RANK] = number("q_lora_rank")
    return {key.format(arch=gguf_arch): value for key, value in keys.items()}


def expected(text: Mapping[str, Any]) -> Mapping[str, tuple[Any, Any, str]]:
    """What `check_settings` takes: settings of `text_config` that llama.cpp has no other value for."""
    heads = text.get("num_attention_heads")
    return {
        "attention_bias": (text.get("attention_bias", False), False, "has no attention biases"),
        "num_key_value_heads": (
            text.get("num_key_value_heads", heads),
            heads,
            "expands latent vectors to as many keys as there are queries",
        ),
    }


def _read_heads(checkpoint: Checkpoint, source: str, heads: slice) -> Array:
    """kv_b_proj of some heads, (n, nope + v, latent)."""
    n_heads, nope, value, latent = _checked_sizes(checkpoint, source)
    first, last, _ = heads.indices(n_heads)
    stored = checkpoint.read(source, slice(first * (nope + value), last * (nope + value)))
    return stored.reshape(-1, nope + value, latent)


def _checked_sizes(checkpoint: Checkpoint, source: str) -> tuple[int, int, int, int]:
    """Heads, channels of a key without rotation, of a value, and of the latent vector.

    Raises:
        InputError: the matrix has another shape.
    """
    text = section(checkpoint, "text_config")
    names = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    heads, nope, value, latent = (setting(checkpoint, text, int, name) for name in names)
    shape = (heads * (nope + value), latent)
    if checkpoint.shape(source) != shape:
        raise InputError(
            f"{checkpoint.path}: tensor {source} has shape {list(checkpoint.shape(source))}, expected {list(shape)} by "
            f"{', '.join(names)} in config.json; use the configuration published with the model"
        )
    return heads, nope, value, latent
