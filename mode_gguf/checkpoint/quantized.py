"""Weights that a checkpoint stores quantized: which forms are decoded, and where their scales are.

FP8 with scales comes in two forms: `quant_method` fp8 with `x_scale_inv` beside a tensor `x`, and compressed-tensors
with `x_scale`, as llm-compressor writes it. Four-bit groups are those of `compressed_tensors`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mode_gguf.checkpoint import compressed_tensors, fp8
from mode_gguf.checkpoint.header import are_sizes
from mode_gguf.checkpoint.stored_tensor import StoredTensor, stored_values
from mode_gguf.errors import InputError

_SETTINGS: Final = ("quantization_config", "compression_config")
"""Names of the settings in config.json; the second is that of older compressed-tensors."""
_TEXT: Final = ("text_config", "llm_config")
"""Sections that may have settings of their own, as Kimi K2.5's."""

Tensors = Mapping[str, StoredTensor]


def taken_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of quantization in config.json, empty where it has none; they are taken out of it."""
    found: list[Any] = [config.pop(name, None) for name in _SETTINGS]
    for section in _TEXT:
        if isinstance(config.get(section), dict):
            text = dict(config[section])
            found += [text.pop(name, None) for name in _SETTINGS]
            config[section] = text
    settings: Any = next((one for one in found if one), {})
    return settings if isinstance(settings, dict) else {"quant_method": settings}


def check_supported(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse weights that are stored in another form than those that are decoded here.

    Raises:
        InputError: naming the form.
    """
    method = settings.get("quant_method", "unknown") if settings else None
    if method in (None, fp8.METHOD) or compressed_tensors.is_supported(settings):
        return
    raise _refused(folder, compressed_tensors.described(settings) if method == compressed_tensors.METHOD else method)


def _refused(folder: Path, what: object) -> InputError:
    return InputError(
        f"{folder}: the checkpoint is already quantized ({what!s:.200}); expected full-precision weights (BF16, F16 "
        "or F32), FP8 with scales, or symmetric 4-bit groups as Kimi K2.5 has them, so point to the original model"
    )


def decodable(folder: Path, tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The model's tensors: quantized ones with their scales, and without the tensors that only quantization needs.

    Raises:
        InputError: something is quantized, and its scales are missing or do not fit; or nothing is, and config.json
            says otherwise.
    """
    method = settings.get("quant_method", "unknown") if settings else None
    in_groups = method == compressed_tensors.METHOD
    if method == fp8.METHOD and all(tensor.dtype != fp8.DTYPE for tensor in tensors.values()):
        raise _refused(folder, method)
    if not in_groups:
        return _with_scales(folder, tensors, fp8.SCALE, settings.get("weight_block_size"), (fp8.ACTIVATION_SCALE,))
    block = compressed_tensors.block_of(settings)
    unpacked = _with_unpacked(folder, tensors)
    return _with_scales(folder, unpacked, compressed_tensors.SCALE, block, compressed_tensors.NOT_WEIGHTS)


def _with_scales(
    folder: Path, stored: Tensors, suffix: str, block: Any, dropped: tuple[str, ...]
) -> dict[str, StoredTensor]:
    """Tensors in FP8 with their scales; scales are no tensors of the model.

    Args:
        suffix: of the names of scales.
        block: sizes of the blocks that share one, None for scales of another form.
        dropped: endings of the names of what only arithmetic in FP8 needs.
    """
    scaled = [name for name, tensor in stored.items() if tensor.dtype == fp8.DTYPE]
    if not scaled and suffix == fp8.SCALE:
        return dict(stored)
    if block is not None and not (are_sizes(block) and len(block) == 2 and all(block)):
        raise InputError(f"{folder}: weight_block_size is {block!r}, expected two sizes; download config.json again")
    left_out = {f"{name}{suffix}" for name in scaled}
    tensors = {}
    for name, tensor in stored.items():
        if name in left_out or name.endswith(dropped) or (suffix == fp8.SCALE and name.endswith(suffix)):
            continue
        if tensor.dtype != fp8.DTYPE:
            tensors[name] = tensor
            continue
        scales = stored.get(f"{name}{suffix}")
        blocks = None if scales is None else fp8.scaling_blocks(tensor.shape, scales.shape, block)
        if scales is None or scales.dtype not in fp8.SCALE_DTYPES or blocks is None:
            found = "is missing" if scales is None else f"is {scales.dtype} {list(scales.shape)}"
            raise InputError(
                f"{folder}: tensor {name} {list(tensor.shape)} has type {fp8.DTYPE}, and {name}{suffix} {found}; "
                "expected its scales: use the BF16 original, or download both again"
            )
        tensors[name] = replace(tensor, scale=scales, blocks=blocks, scale_name=f"{name}{suffix}")
    return tensors


def _with_unpacked(folder: Path, tensors: Tensors) -> dict[str, StoredTensor]:
    """Packed weights under the name of what they stand for, in the place of their parts."""
    found = dict(tensors)
    for packed in tensors:
        name = compressed_tensors.packed_name(packed)
        if name is None:
            continue
        _, scale, shape = (found.pop(part, None) for part in compressed_tensors.part_names(name))
        stored, broken = tensors[packed], f"{folder}: tensor {packed:.200} cannot be unpacked"
        if scale is None or shape is None:
            raise InputError(f"{broken}, its _scale or _shape is missing; download the checkpoint again")
        size = tuple(int(n) for n in stored_values(shape).reshape(-1))
        scale_name = compressed_tensors.part_names(name)[1]
        unpacked = StoredTensor(stored.file, size, stored.dtype, stored.offset, scale, scale_name=scale_name)
        whole = len(size) == 2 and stored.dtype == "I32" and stored.shape == unpacked.stored_shape
        if not whole or len(scale.shape) != 2 or scale.shape[0] != size[0] or size[1] % max(1, scale.shape[1]):
            raise InputError(
                f"{broken}: {list(stored.shape)} {stored.dtype} and scales {list(scale.shape)} found for {list(size)}; "
                "expected eight numbers per int32, rows after each other, and whole groups; use a full-precision copy"
            )
        found[name] = unpacked
    return found
