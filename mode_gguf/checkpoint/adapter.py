"""LoRA adapters in or beside a checkpoint, which are weights of no model of their own."""

from pathlib import Path
from typing import Final

from mode_gguf.checkpoint.index import has_weights
from mode_gguf.checkpoint.side_files import read_json
from mode_gguf.errors import InputError

_CONFIG: Final = "adapter_config.json"
ADAPTER_FILES: Final = (_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
MERGE: Final = "merge it into its base model first (peft's merge_and_unload, then save_pretrained)"


def found_in(folder: Path) -> tuple[Path, str, str] | None:
    """The folder, the name of a file of an adapter in it, and how to make it count; None where there is none."""
    file = next((name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    return None if file is None else (folder, file, f"to convert the model with it, {MERGE}")


def refuse_alone(folder: Path) -> None:
    """Refuse a folder that holds an adapter and nothing to apply it to.

    Raises:
        InputError: naming the base model where the adapter does.
    """
    file = next((name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None or has_weights(folder):
        return
    raise InputError(
        f"{folder}: only a LoRA adapter ({file}{_base_of(folder)}) found, expected a whole model; {MERGE}, and convert "
        "the result"
    )


def _base_of(folder: Path) -> str:
    try:
        base = read_json(folder / _CONFIG).get("base_model_name_or_path")
    except InputError:
        return ""
    return f" of {' '.join(base.split()):.200}" if isinstance(base, str) and base.strip() else ""
