"""What several families' cases have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu

from mode_gguf.architectures.tensors import Role
from tests.families import prompts
from tests.families.family_case import Converted, block, weights
from tests.families.pico.weights import LatentAttention

OUTSIDE = {"token_embd.weight": Role.EMBEDDING, "output_norm.weight": Role.KEEP, "output.weight": Role.OUTPUT}
SHARED_EXPERTS = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
DENSE_FFN = "ffn_gate ffn_up ffn_down"
FEW = ("--image-samples", "1", "--text-samples", "1", "--no-validate")
SOME = ("--image-samples", "2", "--text-samples", "2", "--no-validate")

QWEN3_LAYER = block(
    dense="attn_q attn_k attn_v attn_output", keep="attn_norm attn_q_norm attn_k_norm ffn_norm ffn_gate_inp"
)
QWEN_VISION = weights("v.patch_embd.* v.patch_embd.weight.1= v.position_embd v.post_ln.* mm.0.* mm.2.*")

QWEN: dict[str, Any] = {
    "tied": True,
    "projector_type": "qwen3vl_merger",
    "outside": OUTSIDE,
    "vision_block": weights("ln1.* attn_qkv.* attn_out.* ln2.* ffn_up.* ffn_down.*"),
    "image_token": "<|image_pad|>",
    "marks": ("<|vision_start|>", "<|vision_end|>"),
    "image_tokens": (12, 15, 12),
    "ask": prompts.with_processor(prompts.merged_patches),
    "token_types": True,
}

QWEN3_PARAMETERS = {
    "token_embd.weight": "model.language_model.embed_tokens.weight",
    "output_norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
} | {
    f"blk.{{n}}.{ours}.weight": f"model.language_model.layers.{{n}}.{theirs}.weight"
    for ours, theirs in {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }.items()
}

FRAMES: Mapping[str, Converted] = {
    r"v\.patch_embd\.weight": lambda kernel: kernel[:, :, 0],
    r"v\.patch_embd\.weight\.1": lambda kernel: kernel[:, :, 1],
}
"""A convolution over two frames as one for each."""


def absorbed(sizes: LatentAttention) -> dict[str, Converted]:
    """Latent attention's kv_b_proj by heads: keys transposed, values as they are."""

    def by_head(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(sizes.heads, sizes.nope + sizes.value, sizes.latent)

    return {
        r"blk\.\d+\.attn_k_b\.weight": lambda matrix: by_head(matrix)[:, : sizes.nope].swapaxes(1, 2),
        r"blk\.\d+\.attn_v_b\.weight": lambda matrix: by_head(matrix)[:, sizes.nope :],
    }


class TableGelu(nn.Module):
    """GELU's tanh form, read from a table in F16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(x.half().float(), approximate="tanh").half().float()


def table_gelu(*names: str, under: str = "model") -> Callable[[nn.Module], None]:
    """Replaces the activations of those attributes in the modules under one of the model's."""

    def rounded(model: nn.Module) -> None:
        for module in model.get_submodule(under).modules():
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, TableGelu())

    return rounded
