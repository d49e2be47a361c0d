"""Base GGUF files without llama.cpp's converter: our own export of a family's checkpoint, and one of OLMoE by hand."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from safetensors.torch import load_file

from mode_gguf.architectures.base_gguf import open_base
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.projector import write_projector
from mode_gguf.export.tokenizer import add_tokenizer_keys
from tests.export.uniform import write_all_in
from tests.families.pico.base import EXPERTS, LAYERS, TOP_K, WIDTH
from tests.families.pico.qwen3_vl_moe import HIDDEN
from tests.families.pico.tokenizer import VOCAB

__all__ = ["open_base", "write_family_base", "write_olmoe_base"]

HEADS = 4


def write_family_base(checkpoint: Checkpoint, folder: Path, quant_type: str = "BF16") -> tuple[Path, Path]:
    """Text model and projector of a family's checkpoint."""
    text, projector = folder / f"{checkpoint.name}-{quant_type}.gguf", folder / f"mmproj-{checkpoint.name}-F16.gguf"
    write_all_in(text, checkpoint, quant_type)
    write_projector(projector, checkpoint)
    return text, projector


def permuted_rows(rows: int) -> np.ndarray:
    """The order in which llama.cpp's converter writes rows of Llama's Q and K."""
    return np.arange(rows).reshape(HEADS, 2, rows // HEADS // 2).swapaxes(1, 2).reshape(-1)


def write_olmoe_base(
    checkpoint: Path, out: Path, *, permute: bool = False, swap_columns: bool = False, layers: int = LAYERS
) -> Path:
    """A BF16 file of `write_pico_olmoe`.

    Args:
        permute: rows of Q and K in another order.
        swap_columns: two columns of every attn_output exchanged.
    """
    stored = load_file(checkpoint / "model.safetensors")
    writer = GGUFWriter(out, "olmoe")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_key_value("olmoe.of_bytes", [0, 1, 2, 3], GGUFValueType.ARRAY, GGUFValueType.UINT8)
    writer.add_int8("olmoe.a_byte", -3)
    add_tokenizer_keys(writer, checkpoint, VOCAB, "qwen2")

    def add(name: str, weights: torch.Tensor) -> None:
        values = weights.float().numpy()
        kept = values.ndim < 2 or "gate_inp" in name
        kind = GGMLQuantizationType.F32 if kept else GGMLQuantizationType.BF16
        writer.add_tensor(f"{name}.weight", quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd", stored["model.embed_tokens.weight"])
    for layer in range(layers):
        source, name = f"model.layers.{layer}", f"blk.{layer}"
        add(f"{name}.attn_norm", stored[f"{source}.input_layernorm.weight"])
        add(f"{name}.ffn_norm", stored[f"{source}.post_attention_layernorm.weight"])
        add(f"{name}.ffn_gate_inp", stored[f"{source}.mlp.gate.weight"])
        for part, projection in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
            weights = stored[f"{source}.self_attn.{part}_proj.weight"]
            if permute and part in "qk":
                weights = weights[permuted_rows(len(weights))]
            if swap_columns and part == "o":
                weights = weights[:, [1, 0, *range(2, weights.shape[1])]]
            add(f"{name}.{projection}", weights)
        for part in ("q", "k"):
            norm = stored[f"{source}.self_attn.{part}_norm.weight"]
            add(f"{name}.attn_{part}_norm", norm[permuted_rows(len(norm))] if permute else norm)
        for part in ("gate", "up", "down"):
            each = [stored[f"{source}.mlp.experts.{e}.{part}_proj.weight"] for e in range(EXPERTS)]
            add(f"{name}.ffn_{part}_exps", torch.stack(each))
    add("output_norm", stored["model.norm.weight"])
    add("output", stored["lm_head.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
