"""Checkpoint folders taken apart and put together in other ways."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mode_gguf.checkpoint.folder import INDEX_FILE, SINGLE_FILE

Weights = dict[str, torch.Tensor]


def weights_of(folder: Path) -> Weights:
    """All tensors of a checkpoint."""
    return {
        name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
    }


def save(path: Path, weights: Weights) -> None:
    save_file({name: value.contiguous() for name, value in weights.items()}, path, {"format": "pt"})


def save_alone(folder: Path, weights: Weights) -> None:
    """`weights` as the only ones, in one file."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save(folder / SINGLE_FILE, weights)


def changed_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    return found
