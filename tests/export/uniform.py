"""Text models whose matrices all have one type."""

from pathlib import Path
from typing import Any

from mode_gguf.architectures import text_tensors
from mode_gguf.architectures.tensors import Role
from mode_gguf.checkpoint.folder import Checkpoint
from mode_gguf.export.text_model import TensorPacking, write_text_model
from mode_gguf.quantization.types import QUANT_TYPES, QuantType


def all_in(checkpoint: Checkpoint, name: str) -> dict[str, QuantType]:
    """The plan that gives every matrix one type."""
    return {tensor.name: QUANT_TYPES[name] for tensor in text_tensors(checkpoint) if tensor.role is not Role.KEEP}


def write_all_in(path: Path, checkpoint: Checkpoint, name: str, **options: Any) -> None:
    """The text model of a checkpoint in one type; options as of `write_text_model`."""
    write_text_model(path, checkpoint, TensorPacking(all_in(checkpoint, name)), **options)
