"""Multi-head latent attention, as DeepSeek-V2/V3, Kimi and Mistral 4 have it and llama.cpp's `deepseek2` runs it.

Keys and values of all heads come from one latent vector per token. The checkpoint expands it with kv_b_proj; llama.cpp
multiplies the query of each head with the key half of that matrix instead, and the latent sum that attention gives with
the value half, so that its cache holds latent vectors only. It wants the two halves apart: attn_k_b (heads, latent,
nope), transposed, and attn_v_b (heads, v, latent). What they are multiplied with is nowhere in transformers' forward,
so that there are no statistics of it: they have the role `ABSORBED` and one type, whatever the plan
(`allocation.units`). They hold 0.35 % of Kimi-VL-A3B's weights, and 0.05 % of Kimi K2.5's and Mistral Small 4's.

Rotated channels lie in pairs, in the checkpoints as in llama.cpp: nothing is permuted.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from gguf import Keys

from mode_gguf.architectures.common_keys import MetadataValue
from mode_gguf.architectures.hparams import Hparams, text_hparams
from mode_gguf.architectures.rules import LAYER, ModuleRules, TensorRule, View, check_shape
from mode_gguf.architectures.tensors import ALL_ROWS, Array, Role
from mode_gguf.checkpoint.folder import Checkpoint

FULL_QUERY, LOW_RANK_QUERY = "full_query", "low_rank_query"
"""Subsets of the layers: queries from one matrix, or from two with a norm between them."""

ABSORBED_PARTS = ("attn_k_b", "attn_v_b")
"""GGUF's names of the halves of kv_b_proj."""


def absorbed_keys(checkpoint: Checkpoint, source: str) -> View:
    """The key half of kv_b_proj, (heads, latent, nope): each head's rows of it, transposed."""
    heads, nope, _, latent = _sizes(checkpoint, source)

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return np.ascontiguousarray(_read_heads(checkpoint, source, rows)[:, :nope].swapaxes(1, 2))

    return View((heads, latent, nope), read)


def absorbed_values(checkpoint: Checkpoint, source: str) -> View:
    """The value half of kv_b_proj, (heads, v, latent)."""
    heads, nope, value, latent = _sizes(checkpoint, source)

    def read(_: int, rows: slice = ALL_ROWS) -> Array:
        return np.ascontiguousarray(_read_heads(checkpoint, source, rows)[:, nope:])

    return View((heads, value, latent), read)


_ATTENTION = ModuleRules(f"{LAYER.source}.self_attn", LAYER.name, measured=True)
_KV_B = f"{_ATTENTION.source}.kv_b_proj.weight"

RULES = (
    _ATTENTION.dense("q_proj", "attn_q", FULL_QUERY),
    _ATTENTION.dense("q_a_proj", "attn_q_a", LOW_RANK_QUERY),
    _ATTENTION.norm("q_a_layernorm", "attn_q_a_norm", LOW_RANK_QUERY),
    _ATTENTION.dense("q_b_proj", "attn_q_b", LOW_RANK_QUERY),
    _ATTENTION.dense("kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    _ATTENTION.norm("kv_a_layernorm", "attn_kv_a_norm"),
    TensorRule(_KV_B, "blk.{layer}.attn_k_b.weight", Role.ABSORBED, absorbed_keys),
    TensorRule(_KV_B, "blk.{layer}.attn_v_b.weight", Role.ABSORBED, absorbed_values),
    _ATTENTION.dense("o_proj", "attn_output"),
)
"""Latent attention of a decoder layer, from its queries to its output."""


def subsets(text: Hparams) -> Mapping[str, Iterable[int]]:
    """Layers with each kind of query."""
    layers = range(text.int("num_hidden_layers"))
    low_rank = text.has("q_lora_rank")
    return {LOW_RANK_QUERY: layers if low_rank else (), FULL_QUERY: () if low_rank else layers}


def keys(text: Hparams) -> dict[str, MetadataValue]:
    """Heads and sizes, as llama.cpp's `deepseek2` and its relatives read them: one KV head, the latent vector."""
    latent, rotated, nope = (text.int(name) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    found: dict[str, MetadataValue] = {
        Keys.Attention.HEAD_COUNT: text.int("num_attention_heads"),
        Keys.Attention.HEAD_COUNT_KV: 1,
        Keys.Attention.KV_LORA_RANK: latent,
        Keys.Attention.KEY_LENGTH: latent + rotated,
        Keys.Attention.VALUE_LENGTH: latent,
        Keys.Attention.KEY_LENGTH_MLA: nope + rotated,
        Keys.Attention.VALUE_LENGTH_MLA: text.int("v_head_dim"),
        Keys.Rope.DIMENSION_COUNT: rotated,
    }
    if text.has("q_lora_rank"):
        found[Keys.Attention.Q_LORA_RANK] = text.int("q_lora_rank")
    return found


def check(text: Hparams) -> None:
    """Refuse what llama.cpp has no place for, with an `InputError`."""
    text.expect("attention_bias", False, "has no attention biases")
    text.expect(
        "num_key_value_heads",
        text.get("num_attention_heads"),
        "expands latent vectors to as many keys as there are queries",
    )


def _read_heads(checkpoint: Checkpoint, source: str, heads: slice) -> Array:
    """kv_b_proj of some heads, (n, nope + v, latent)."""
    n_heads, nope, value, latent = _sizes(checkpoint, source)
    first, last, _ = heads.indices(n_heads)
    stored = checkpoint.read(source, slice(first * (nope + value), last * (nope + value)))
    return stored.reshape(-1, nope + value, latent)


def _sizes(checkpoint: Checkpoint, source: str) -> tuple[int, int, int, int]:
    """Heads, channels of a key without rotation, of a value, and of the latent vector.

    Raises:
        InputError: the matrix has another shape.
    """
    text = text_hparams(checkpoint)
    names = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    heads, nope, value, latent = (text.int(name) for name in names)
    check_shape(checkpoint, source, (heads * (nope + value), latent))
    return heads, nope, value, latent
