"""GGUF models with random weights, for speed measurements: any widths, experts in one type or in groups of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from mode_gguf.quantization.expert_groups import ARCHITECTURE_SUFFIX, VERSION, VERSION_KEY, group_name, map_name

_ARCHITECTURE: Final = "qwen3moe"
_DENSE: Final = "Q6_K"
_SCALES: Final = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q6_K": (208,)}
"""Byte offsets of a block's float16 scales; any other byte may have any value."""


@dataclass(frozen=True, slots=True)
class RandomModelShape:
    """Shape of a text model; widths are multiples of 256."""

    hidden: int
    width: int
    experts: int
    used: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 1024


def random_groups(shape: RandomModelShape, counts: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Experts at random in groups of `counts`, in ascending order in each."""
    order = np.random.default_rng(seed).permutation(shape.experts)
    return [np.sort(part) for part in np.split(order, np.cumsum(counts)[:-1])]


def write_random_model(
    path: Path, shape: RandomModelShape, types: Sequence[str], groups: Sequence[np.ndarray], seed: int = 0
) -> Path:
    """Write a text model with the experts groups[g] in types[g], in all layers alike; one group is an ordinary file."""
    rng = np.random.default_rng(seed)
    grouped = len(groups) > 1
    writer = GGUFWriter(path, _ARCHITECTURE + ARCHITECTURE_SUFFIX * grouped)
    for key, value in {
        "context_length": 4096,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.width,
        "expert_feed_forward_length": shape.width,
        "expert_count": shape.experts,
        "expert_used_count": shape.used,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "vocab_size": shape.vocabulary,
    }.items():
        writer.add_uint32(f"{_ARCHITECTURE}.{key}", value)
    writer.add_float32(f"{_ARCHITECTURE}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{_ARCHITECTURE}.rope.freq_base", 1e6)
    writer.add_string("tokenizer.ggml.model", "none")
    if grouped:
        writer.add_uint32(VERSION_KEY, VERSION)

    def add(name: str, *shape: int, quant_type: str = _DENSE) -> None:
        writer.add_tensor(name, _drawn(rng, quant_type, shape), raw_dtype=GGMLQuantizationType[quant_type])

    def norm(name: str, width: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    add("token_embd.weight", shape.vocabulary, shape.hidden)
    add("output.weight", shape.vocabulary, shape.hidden)
    norm("output_norm", shape.hidden)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_q.weight", shape.heads * shape.head_dim, shape.hidden)
        add(f"{block}.attn_k.weight", shape.kv_heads * shape.head_dim, shape.hidden)
        add(f"{block}.attn_v.weight", shape.kv_heads * shape.head_dim, shape.hidden)
        add(f"{block}.attn_output.weight", shape.hidden, shape.heads * shape.head_dim)
        for name, width in (("attn", shape.hidden), ("ffn", shape.hidden)):
            norm(f"{block}.{name}_norm", width)
        for name in ("attn_q", "attn_k"):
            norm(f"{block}.{name}_norm", shape.head_dim)
        # So large that tokens differ in their experts.
        router = rng.normal(0, 1, (shape.experts, shape.hidden)).astype(np.float32)
        writer.add_tensor(f"{block}.ffn_gate_inp.weight", router)
        for projection in ("gate", "up", "down"):
            rows, columns = (shape.hidden, shape.width) if projection == "down" else (shape.width, shape.hidden)
            for number, (quant_type, members) in enumerate(zip(types, groups, strict=True)):
                name = group_name(f"{block}.ffn_{projection}_exps.weight", number)
                add(name, len(members), rows, columns, quant_type=quant_type)
        if grouped:
            places = np.full((len(groups), shape.experts), -1, np.int32)
            for row, members in zip(places, groups, strict=True):
                row[members] = np.arange(len(members))
            writer.add_tensor(map_name(layer), places)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _drawn(rng: np.random.Generator, quant_type: str, shape: Sequence[int]) -> np.ndarray:
    """uint8 (..., rows, row_bytes): blocks with any bytes, and small scales, so that all stays finite."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[quant_type]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), np.uint8)
    for offset in _SCALES[quant_type]:
        blocks[..., offset : offset + 2] = np.frombuffer(np.float16(1e-5).tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)
