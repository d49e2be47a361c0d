"""Names of tensors that say how a model was saved: what wraps it, and what is no weight of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from mode_gguf.checkpoint.adapter import MERGE
from mode_gguf.checkpoint.stored_tensor import StoredTensor
from mode_gguf.errors import InputError

_BUFFERS: Final = (
    ".inv_freq",
    ".original_inv_freq",
    ".cos_cached",
    ".sin_cached",
    ".masked_bias",
    ".position_ids",
    ".num_batches_tracked",
    "._extra_state",
)
"""Endings of the names of what a model computes, and some checkpoints store: frequencies, masks, places, counters."""
_MASKS: Final = (".attn.bias", ".attention.bias")
"""Endings of names of masks, where they have as many dimensions as attention has; of biases where they have one."""

_ADAPTED: Final = (
    ".lora_A.",
    ".lora_B.",
    ".lora_embedding_",
    ".lora_magnitude_vector",
    ".base_layer.",
    "base_model.model.",
)
_WRAPPED: Final = {
    "module.": "a wrapper for training on several devices; save the model inside it (model.module.save_pretrained)",
    "_orig_mod.": "torch.compile; save the model inside it (model._orig_mod.save_pretrained)",
    "_fsdp_wrapped_module.": "FSDP; save the gathered model without it (accelerate's save_model)",
    "_checkpoint_wrapped_module.": "a wrapper for activation checkpointing; save the model without it",
}


def check_unwrapped(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose names say that a wrapper or an adapter was saved with the model.

    Raises:
        InputError: naming the first such tensor, what is around it, and what to do.
    """
    for name in names:
        if any(part in name for part in _ADAPTED):
            raise InputError(f"{folder}: tensor {name:.200} is of a model with a LoRA adapter around it; {MERGE}")
        for prefix, what in _WRAPPED.items():
            if name.startswith(prefix) or (prefix.startswith("_") and f".{prefix}" in name):
                raise InputError(
                    f"{folder}: tensor {name:.200} has {prefix!r} in its name, of {what}, or strip that from the names "
                    "of all tensors"
                )


def without_buffers(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that are weights: without what a model computes itself, whatever some checkpoints store."""
    return {name: tensor for name, tensor in tensors.items() if not _is_buffer(name, tensor)}


def other_beginnings(names: Iterable[str], known: Iterable[str]) -> tuple[str, str] | None:
    """The first of `names` that is a known one but for its beginning, and that one; None where there is none."""
    endings: dict[str, str | None] = {}
    for one in known:
        for ending in _endings(one):
            endings[ending] = None if ending in endings else one
    for name in names:
        for ending in _endings(name):
            if found := endings.get(ending):
                return name, found
    return None


def _endings(name: str) -> list[str]:
    """A name, and what is left of it without its first parts: two parts at least, which tell tensors apart."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(max(len(parts) - 1, 1))]


def _is_buffer(name: str, tensor: StoredTensor) -> bool:
    dotted = f".{name}"
    return dotted.endswith(_BUFFERS) or (dotted.endswith(_MASKS) and len(tensor.shape) > 2)
