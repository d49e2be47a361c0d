"""Files that every pico checkpoint has: settings as published ones have them, the README, safetensors shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PUBLISHED = Path(__file__).parent / "published"
"""JSON files by model, as a pico checkpoint has them where nothing else is asked for."""


def published_config(model: str) -> dict[str, Any]:
    """Its config.json."""
    config: dict[str, Any] = json.loads((PUBLISHED / model / "config.json").read_text())
    return config


def begin_folder(folder: Path, model: str, config: dict[str, Any]) -> None:
    """Creates `folder` with that configuration and the model's other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (PUBLISHED / model).iterdir():
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", config)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_readme(folder: Path, licence: str, *, more: str = "pipeline_tag: image-text-to-text\n") -> None:
    """A model card with front matter."""
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n{more}---\n# Pico\nRandom weights.\n")


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int = 2) -> None:
    """`weights` in so many safetensors files; 1 writes a single `model.safetensors` without an index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(weights)
    files = {
        name: f"model-{1 + i * shards // len(names):05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def in_bfloat16(weights: dict[str, torch.Tensor], *kept: str) -> dict[str, torch.Tensor]:
    """`weights` as the hubs store them; names that end with one of `kept` stay F32, as transformers keeps them."""
    return {
        name: (tensor if name.endswith(kept) else tensor.bfloat16()).contiguous() for name, tensor in weights.items()
    }
