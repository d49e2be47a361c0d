"""GGUF files of any widths without weights: all that llama.cpp needs to say what it would allocate.

They end where their tensors would end, but nothing is stored between (sparse files).
"""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from mode_gguf.gpu_memory.model_graphs import EncoderShape, TextShape
from mode_gguf.gpu_memory.qwen3_vl_moe import ARCHITECTURE


def write_hollow_text_model(path: Path, shape: TextShape) -> Path:
    """A text model in F16 and F32."""
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, width, experts = shape.hidden, shape.expert_width, shape.experts
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd": (shape.vocabulary, hidden),
        "output": (shape.vocabulary, hidden),
        "output_norm": (hidden,),
    }
    for layer in range(shape.layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "attn_q": (heads, hidden),
            "attn_k": (kv_heads, hidden),
            "attn_v": (kv_heads, hidden),
            "attn_output": (hidden, heads),
            "attn_norm": (hidden,),
            "attn_q_norm": (shape.head_dim,),
            "attn_k_norm": (shape.head_dim,),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, width, hidden),
            "ffn_up_exps": (experts, width, hidden),
            "ffn_down_exps": (experts, hidden, width),
        }
        tensors |= {f"blk.{layer}.{name}": dimensions for name, dimensions in of_layer.items()}
    keys = {
        "context_length": 1 << 18,
        "embedding_length": hidden,
        "block_count": shape.layers,
        "feed_forward_length": width,
        "expert_feed_forward_length": width,
        "expert_count": experts,
        "expert_used_count": shape.experts_used,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "n_deepstack_layers": shape.deepstack,
    }
    writer = GGUFWriter(path, ARCHITECTURE)
    for key, value in keys.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    third = shape.head_dim // 6
    writer.add_array(f"{ARCHITECTURE}.rope.dimension_sections", [shape.head_dim // 2 - 2 * third, third, third, 0])
    writer.add_float32(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "none")
    return _write(path, writer, {f"{name}.weight": dimensions for name, dimensions in tensors.items()})


def write_hollow_projector(path: Path, shape: EncoderShape) -> Path:
    """A projector in F16 and F32; llama.cpp reads it as zeros."""
    merged, side = shape.hidden * shape.merge**2, round(shape.positions**0.5)
    tensors: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (shape.hidden, 3, shape.patch, shape.patch),
        "v.patch_embd.weight.1": (shape.hidden, 3, shape.patch, shape.patch),
        "v.patch_embd.bias": (shape.hidden,),
        "v.position_embd.weight": (shape.positions, shape.hidden),
    }

    def norm(name: str, width: int) -> None:
        tensors.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def linear(name: str, rows: int, n_in: int) -> None:
        tensors.update({f"{name}.weight": (rows, n_in), f"{name}.bias": (rows,)})

    for block in range(shape.blocks):
        prefix = f"v.blk.{block}"
        norm(f"{prefix}.ln1", shape.hidden)
        norm(f"{prefix}.ln2", shape.hidden)
        linear(f"{prefix}.attn_qkv", 3 * shape.hidden, shape.hidden)
        linear(f"{prefix}.attn_out", shape.hidden, shape.hidden)
        linear(f"{prefix}.ffn_up", shape.width, shape.hidden)
        linear(f"{prefix}.ffn_down", shape.hidden, shape.width)
    for tap in shape.taps:
        norm(f"v.deepstack.{tap}.norm", merged)
        linear(f"v.deepstack.{tap}.fc1", merged, merged)
        linear(f"v.deepstack.{tap}.fc2", shape.output, merged)
    norm("v.post_ln", shape.hidden)
    linear("mm.0", merged, merged)
    linear("mm.2", shape.output, merged)
    keys = {
        "projection_dim": shape.output,
        "image_size": side * shape.patch,
        "patch_size": shape.patch,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.width,
        "block_count": shape.blocks,
        "attention.head_count": shape.heads,
        "spatial_merge_size": shape.merge,
    }
    writer = GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "qwen3vl_merger")
    for key, value in keys.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    writer.add_array("clip.vision.is_deepstack_layers", [block in shape.taps for block in range(shape.blocks)])
    return _write(path, writer, tensors)


def _write(path: Path, writer: GGUFWriter, tensors: Mapping[str, tuple[int, ...]]) -> Path:
    end = 0
    for name, dimensions in tensors.items():
        kept = len(dimensions) == 1 or "gate_inp" in name or "position" in name
        dtype = np.dtype(np.float32 if kept else np.float16)
        size = prod(dimensions) * dtype.itemsize
        raw = GGMLQuantizationType.F32 if kept else GGMLQuantizationType.F16
        writer.add_tensor_info(name, dimensions, dtype, size, raw)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + end + 32)
    return path
