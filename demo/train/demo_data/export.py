"""Write the checkpoint as the public ones are stored: bf16 shards, fused experts with input rows first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from . import tokenizer as bpe
from .network import MERGE, PATCH, Shape, config_dict
from .pictures import SIZE

SHARDS = 2


def public_tensors(model: Any) -> dict[str, Tensor]:
    """Names and layout of the public checkpoints: experts (E, H, 2I) and (E, I, H), everything bf16."""
    result = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensor = tensor.transpose(1, 2)
        result[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return result


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Two shards of about equal size and their index."""
    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    done = 0
    for name in sorted(tensors):
        shards[min(SHARDS - 1, done * SHARDS // total)][name] = tensors[name]
        done += tensors[name].nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def processor_config(kind: str, smallest: int, largest: int) -> dict[str, Any]:
    """The preprocessing of a "image" or "video" input."""
    name = {"image": "Qwen2VLImageProcessorFast", "video": "Qwen3VLVideoProcessor"}[kind]
    return {
        "size": {"longest_edge": largest, "shortest_edge": smallest},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        f"{kind}_processor_type": name,
    }


def write_checkpoint(model: Any, tokenizer: Tokenizer, shape: Shape, folder: Path) -> None:
    """The whole checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = bpe.special_ids(tokenizer)
    write_weights(public_tensors(model), folder)
    _write_json(folder / "config.json", config_dict(ids, shape))
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "transformers_version": "4.57.0.dev0",
    }
    _write_json(folder / "generation_config.json", generation)
    cell = PATCH * MERGE
    _write_json(folder / "preprocessor_config.json", processor_config("image", 16 * cell * cell, 4 * SIZE * SIZE))
    _write_json(
        folder / "video_preprocessor_config.json",
        processor_config("video", 16 * cell * cell, 4 * SIZE * SIZE),
    )
    bpe.save(tokenizer, folder)
