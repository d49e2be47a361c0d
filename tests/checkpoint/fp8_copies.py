"""Copies of a checkpoint as llm-compressor writes them in FP8, and what they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.weights import Weights, changed_json, save_alone, weights_of

BLOCK = 128
STRATEGIES = ("tensor", "channel", "block", "group")
KEPT = ("norm", "embed", "lm_head", "mlp.gate.", "visual", "vision")
"""Parts of the names of what such files keep in BF16."""


def one_by_one(weights: Weights) -> Weights:
    """Fused experts as single linear layers, which llm-compressor makes of them before it quantizes."""
    found: Weights = {}
    for name, value in weights.items():
        prefix, fused, kind = name.partition(".experts.")
        if not fused or kind not in ("gate_up_proj", "down_proj"):
            found[name] = value
            continue
        for expert, matrix in enumerate(value):
            rows = matrix.T  # stored as `x @ W`
            parts = {"down": rows} if kind == "down_proj" else dict(zip(("gate", "up"), rows.chunk(2), strict=True))
            found |= {f"{prefix}.experts.{expert}.{part}_proj.weight": one for part, one in parts.items()}
    return found


def quantized(weight: torch.Tensor, strategy: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in FP8, its scales as they are stored, and what it stands for, in float32."""
    rows, columns = weight.shape
    high, wide = {"tensor": weight.shape, "channel": (1, columns), "block": (BLOCK, BLOCK), "group": (1, 32)}[strategy]
    down, across = -(-rows // high), -(-columns // wide)
    padded = torch.zeros(down * high, across * wide)
    padded[:rows, :columns] = weight.float()
    blocks = padded.reshape(down, high, across, wide)
    scale = (blocks.abs().amax((1, 3)) / 448).clamp(min=1e-12).bfloat16()
    expanded = scale.float().repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
    stored = (weight.float() / expanded).clamp(-448, 448).to(torch.float8_e4m3fn)
    return stored, scale.reshape(1) if strategy == "tensor" else scale, stored.float() * expanded


def settings(strategy: str, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    if strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
    if strategy == "group":
        weights["group_size"] = 32
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float"}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*visual.*", "re:.*mlp.gate$"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        **changes,
    }


def write_fp8(folder: Path, target: Path, strategy: str = "channel", section: str | None = None) -> tuple[Path, Path]:
    """Copies of a checkpoint: in FP8, and in float32 with what that stands for; their folders have one name.

    Args:
        section: of config.json that says so; None for the outermost.
    """
    small, plain = (target / kind / "pico" for kind in ("fp8", "plain"))
    stored: Weights = {}
    meant: Weights = {}
    for name, value in one_by_one(weights_of(folder)).items():
        if value.ndim != 2 or any(part in name for part in KEPT):
            stored[name] = meant[name] = value
            continue
        stored[name], stored[f"{name}_scale"], meant[name] = quantized(value, strategy)
        stored[name.replace(".weight", ".input_scale")] = torch.ones(1)
    stored["model.language_model.layers.0.self_attn.k_scale"] = torch.ones(1)
    for copy, weights in ((small, stored), (plain, meant)):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_alone(copy, weights)
    edited(small, section, lambda part: part.update(quantization_config=settings(strategy)))
    return small, plain


def edited(folder: Path, section: str | None, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config[section] if section else config)
    changed_json(folder / "config.json", **config)
